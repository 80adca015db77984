"""Time 10 epochs of the D-RAG retriever on a data set of CWQ's size, all of it on one GPU (or, with small numbers, on a CPU).

    python scripts/gpu_retriever.py
    python scripts/gpu_retriever.py --device cpu --questions 200 --epochs 2 --dim 32      # a test without a GPU

Graphs and question vectors are made up (`drag_lib.bench`): no data, sentence encoder, notebook or network is needed. Needs torch, numpy,
tqdm and pydantic. Two loops are timed. `bare_loop`: packed tensors are moved to the device once and each update picks its batch there by
indexing; no logging, checkpoints or validation. `library_loop`: `drag_lib.training.fit`, what `drag train` runs, with packed questions in
the CPU's memory and a checkpoint an epoch; it needs transformers and accelerate and is left out, with a line, where one is missing. Prints
seconds per epoch and peak memory and writes `figures/bench/retriever_<device>.json`."""
import argparse
import dataclasses
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from drag_lib.bench import add_random_vectors, synthetic_questions  # noqa: E402
from drag_lib.files import write_json  # noqa: E402
from drag_lib.graphs import Batch, PackedQuestions, pack_questions  # noqa: E402
from drag_lib.retriever import Retriever, retrieval_loss  # noqa: E402
from drag_lib.runs import device_name, git_state  # noqa: E402


def on_device(packed: PackedQuestions, device: torch.device) -> PackedQuestions:
    "The packed questions with all their tensors on the device; names stay where they are."
    return dataclasses.replace(packed, **{k: v.to(device) for k, v in vars(packed).items() if isinstance(v, torch.Tensor)})


def bare_loop(packed, relations, args, device) -> dict:
    "Seconds per epoch and losses of a training run with all its data on the device."
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
            'loss_last_epoch': losses[-1]}


class WithLoss(nn.Module):
    "The retriever as the library's training loop wants it: forward(**Batch fields) -> {'loss', 'n_items'}."
    def __init__(self, retriever, relations):
        super().__init__()
        self.retriever = retriever
        self.register_buffer('relations', relations, persistent=False)

    def forward(self, **inputs):
        batch = Batch(**inputs)
        loss, _ = retrieval_loss(self.retriever(batch, self.relations).logits, batch.label, batch.fact_ptr)
        return {'loss': loss, 'n_items': len(batch.question)}


def library_loop(packed, relations, args, device) -> dict:
    "The same training by `drag_lib.training.fit`, seconds with start, checkpoints and validation on one batch; {} where it cannot run."
    try:
        from drag_lib.runs import start_run
        from drag_lib.training import TrainConfig, fit
    except ImportError as e:
        print(f'library loop left out: {e}', flush=True)
        return {}
    if torch.cuda.is_available() != (device.type == 'cuda'):
        print('library loop left out: it takes the GPU where there is one (CUDA_VISIBLE_DEVICES= hides it)', flush=True)
        return {}
    per_epoch = -(-len(packed) // args.batch_size)
    config = TrainConfig(epochs=args.epochs, batch_size=args.batch_size, learning_rate=args.learning_rate, precision=args.precision,
                         log_every=min(10, per_epoch))
    model = WithLoss(Retriever(relations.shape[1], args.dim), relations.cpu())
    def inputs(questions): return packed.batch(torch.as_tensor(questions))._asdict()
    def measure(model):
        batch = {k: None if v is None else v.to(device) for k, v in inputs(range(min(len(packed), args.batch_size))).items()}
        with torch.no_grad(): return {'loss': model(**batch)['loss'].item()}
    with tempfile.TemporaryDirectory() as os.environ['DRAG_HOME']:
        began = time.perf_counter()
        with start_run('library-loop', dataclasses.asdict(config), method='bench') as run:
            fit(model, list(range(len(packed))), inputs, config, run, measure, 'loss', greater_is_better=False, label='library loop')
            losses = [line['loss'] for line in run.read_log() if 'loss' in line]
            run.finish({'n': len(packed)})
        seconds = time.perf_counter() - began
    updates = args.epochs*per_epoch
    return {'seconds_total': seconds, 'ms_per_update': 1000*seconds/updates, 'updates': updates, 'loss_first_logged': losses[0],
            'loss_last_logged': losses[-1]}


def peak(device) -> dict:
    "GB of the GPU's memory since the last call."
    if device.type != 'cuda': return {}
    found = {'peak_gpu_gb': torch.cuda.max_memory_allocated(device)/1e9}
    torch.cuda.reset_peak_memory_stats(device)
    return found


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
    print(f'{name}: {len(packed)} questions, {len(packed.head)} facts, made and packed in {packing:.1f} s; {args.precision}', flush=True)
    peak(device)
    result = {'device': name, 'command': ' '.join(['python', 'scripts/gpu_retriever.py', *sys.argv[1:]]), 'git': git_state(),
              'torch': str(torch.__version__), 'threads': torch.get_num_threads(), 'n_facts': len(packed.head),
              'n_parameters': sum(p.numel() for p in Retriever(relations.shape[1], args.dim).parameters()),
              'question_vectors': 'random', 'seconds_make_and_pack': packing,
              **{k: v for k, v in vars(args).items() if k not in ('out', 'device')}}
    for loop, data in ((bare_loop, on_device(packed, device)), (library_loop, packed)):
        torch.manual_seed(0)
        if found := loop(data, relations, args, device): result |= {f'{loop.__name__}/{k}': v for k, v in (found | peak(device)).items()}
        del data
    out = args.out or ROOT/'figures'/'bench'/f'retriever_{re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    for name in ('bare_loop', 'library_loop'):
        if f'{name}/updates' not in result: continue
        memory = f', peak {result[f"{name}/peak_gpu_gb"]:.2f} GB of GPU memory' if f'{name}/peak_gpu_gb' in result else ''
        seconds, each = (result[f'{name}/{key}'] for key in ('seconds_total', 'ms_per_update'))
        print(f'{name}: {args.epochs} epochs in {seconds:.1f} s, {each:.1f} ms an update{memory}')
    print(f'written to {out}')


if __name__ == '__main__': main()
