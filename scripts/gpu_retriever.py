"""Time 10 epochs of the D-RAG retriever on a data set of CWQ's size, all of it on one GPU (or, with small numbers, on a CPU).

    python scripts/gpu_retriever.py
    python scripts/gpu_retriever.py --device cpu --questions 200 --epochs 2 --dim 32      # a test without a GPU

Graphs and question vectors are made up (`drag_lib.bench`): no data, sentence encoder, notebook or network is needed. Needs torch, numpy,
tqdm and pydantic. Packed tensors are moved to the device once; each update picks its batch there by indexing. Prints seconds per epoch
and peak memory and writes `figures/bench/retriever_<device>.json`."""
import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from drag_lib.bench import add_random_vectors, synthetic_questions  # noqa: E402
from drag_lib.files import write_json  # noqa: E402
from drag_lib.graphs import PackedQuestions, pack_questions  # noqa: E402
from drag_lib.retriever import Retriever, retrieval_loss  # noqa: E402
from drag_lib.runs import device_name, git_state  # noqa: E402


def on_device(packed: PackedQuestions, device: torch.device) -> PackedQuestions:
    "The packed questions with all their tensors on the device; names stay where they are."
    return dataclasses.replace(packed, **{k: v.to(device) for k, v in vars(packed).items() if isinstance(v, torch.Tensor)})


def train(packed, relations, args, device) -> dict:
    "Seconds per epoch and losses of a training run."
    model = Retriever(relations.shape[1], args.dim).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-3, fused=True)
    per_epoch = -(-len(packed) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.epochs*per_epoch, pct_start=.1)
    finish = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    seconds, losses = [], []
    for epoch in range(args.epochs):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for questions in torch.randperm(len(packed), device=device).split(args.batch_size):
            batch = packed.batch(questions)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == 'bf16'):
                logits = model(batch, relations).logits
            loss, _ = retrieval_loss(logits, batch.label, batch.fact_ptr)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach()
        finish()
        seconds.append(time.perf_counter() - began)
        losses.append(total.item()/per_epoch)
        print(f'epoch {epoch + 1}/{args.epochs}: {seconds[-1]:.2f} s, loss {losses[-1]:.4f}', flush=True)
        if not torch.isfinite(total): sys.exit('error: the loss is not finite')
    return {'seconds_total': sum(seconds), 'seconds_first_epoch': seconds[0], 'seconds_median_epoch': sorted(seconds)[len(seconds)//2],
            'ms_per_update': 1000*sum(seconds)/(args.epochs*per_epoch), 'updates': args.epochs*per_epoch, 'loss_first_epoch': losses[0],
            'loss_last_epoch': losses[-1], 'n_parameters': sum(p.numel() for p in model.parameters())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--precision', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 where the GPU has it, else fp32')
    sizes = {'questions': 27_600, 'facts': 50, 'relations': 500, 'tokens': 15, 'epochs': 10, 'batch-size': 64, 'dim': 256}
    for name, default in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--learning-rate', type=float, default=1e-3)
    parser.add_argument('--out', type=Path, help='the JSON; default: figures/bench/retriever_<device>.json')
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.precision == 'auto': args.precision = 'bf16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'fp32'
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device_name()
    torch.manual_seed(0)

    began = time.perf_counter()
    packed = add_random_vectors(pack_questions(synthetic_questions(args.questions, args.facts, args.relations)), args.tokens)
    relations = torch.randn(len(packed.relations), packed.tokens.shape[1]).to(device)
    packing = time.perf_counter() - began
    packed = on_device(packed, device)
    print(f'{name}: {len(packed)} questions, {len(packed.head)} facts, made and packed in {packing:.1f} s; {args.precision}', flush=True)
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    result = {'device': name, 'command': ' '.join(['python', 'scripts/gpu_retriever.py', *sys.argv[1:]]), 'git': git_state(),
              'torch': str(torch.__version__), 'threads': torch.get_num_threads(), 'n_facts': len(packed.head),
              'question_vectors': 'random', 'seconds_make_and_pack': packing,
              **{k: v for k, v in vars(args).items() if k not in ('out', 'device')}}
    result |= train(packed, relations, args, device)
    if device.type == 'cuda': result['peak_gpu_gb'] = torch.cuda.max_memory_allocated(device)/1e9
    out = args.out or ROOT/'figures'/'bench'/f'retriever_{re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    memory = f', peak {result["peak_gpu_gb"]:.2f} GB of GPU memory' if 'peak_gpu_gb' in result else ''
    print(f'{args.epochs} epochs: {result["seconds_total"]:.1f} s, {result["ms_per_update"]:.1f} ms an update{memory}; written to {out}')


if __name__ == '__main__': main()
