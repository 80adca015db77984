#!/usr/bin/env python
"""Time the compressor's PCA and both training steps at the size of an 8 B model with random weights, on one GPU (or a tiny one on a CPU).

    python scripts/gpu_compressor.py
    python scripts/gpu_compressor.py --tiny --device cpu      a test without a GPU: seconds

No weights, data or network are needed: the architecture is that of the preset llama-3-8b (width 4,096, 128,256 tokens), the texts are
random letters read as bytes. Random weights cost what trained ones cost; losses mean nothing here. Writes
figures/bench/compressor_<device>.json.
"""
import argparse
import json
import random
import re
import string
import sys
import time
from pathlib import Path
from statistics import median

import torch

from drag_lib.compressor.adapter import PCAAdapter, vocabulary_rms
from drag_lib.compressor.pca import PCA
from drag_lib.compressor.train import ReadingItem, ReadingTask, ReconstructionTask, frozen_hash, token_batch
from drag_lib.files import write_json
from drag_lib.llm import PRESETS, byte_tokenizer, from_parts
from drag_lib.prompts import Evidence, tokenize
from drag_lib.reader import read_prompt
from drag_lib.records import ReadingRecord
from drag_lib.runs import device_name, git_state

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128,
            vocab_size=2000)


def random_llm(tiny: bool, device: torch.device, dtype: torch.dtype):
    "The preset's architecture with random weights, made on the device."
    from transformers import AutoModelForCausalLM
    config = PRESETS['llama-3-8b'].config()
    for key, value in (TINY if tiny else {}).items(): setattr(config, key, value)
    with torch.device(device): model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokenizer = byte_tokenizer()
    llm = from_parts(model, tokenizer, 'random llama')
    llm.model.requires_grad_(False)
    return llm


class Clock:
    "Seconds and peak GB of the GPU's memory of what happens inside."
    def __init__(self, device): self.device = device
    def __enter__(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.began = time.perf_counter()
        return self
    def __exit__(self, *error):
        if self.device.type == 'cuda': torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self.began
        self.peak = {'peak_gpu_gb': torch.cuda.max_memory_allocated(self.device)/1e9} if self.device.type == 'cuda' else {}


def time_pca(llm, n: int, k: int, block: int) -> tuple[PCA, dict]:
    "Streaming fit on embeddings of random tokens, then the components."
    pca, g = PCA(k), torch.Generator().manual_seed(0)
    with Clock(llm.device) as stream:
        for start in range(0, n, block):
            ids = torch.randint(llm.vocab_size, (min(block, n - start),), generator=g).to(llm.device)
            with torch.no_grad(): pca.partial_fit(llm.embed(ids))
    with Clock(llm.device) as solve: explained = pca.explained
    peak = {k: max(stream.peak[k], solve.peak[k]) for k in stream.peak}
    return pca, {'n_vectors': n, 'stream_seconds': stream.seconds, 'vectors_per_second': n/stream.seconds, 'solve_seconds': solve.seconds,
                 'explained': explained, **peak}


def time_steps(task, inputs: dict, steps: int, device) -> dict:
    "Median milliseconds of an update of AdamW after two to warm up, its loss, peak memory; every step on the same inputs."
    adam, seconds, losses = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4), [], []
    task.train()
    peak = {}
    for _ in range(steps + 2):
        with Clock(device) as step, torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = task(**inputs)['loss']
            loss.backward()
            adam.step(); adam.zero_grad()
        seconds.append(step.seconds); losses.append(loss.item())
        peak = {key: max(value, peak.get(key, 0.)) for key, value in step.peak.items()}
    return {'steps': steps, 'ms_per_step': 1000*median(seconds[2:]), 'first_loss': losses[0], 'last_loss': losses[-1],
            'n_parameters': sum(p.numel() for p in task.parameters() if p.requires_grad), **peak}


def made_up_items(n: int, n_tokens: int, rng: random.Random) -> list[ReadingItem]:
    "Prompts with n_tokens of evidence in three passages: a letter is a token."
    letters = lambda n: ''.join(rng.choices(string.ascii_letters, k=n))
    items = []
    for i in range(n):
        lines = [letters(n_tokens//3 - 2) for _ in range(3)]
        record = ReadingRecord(id=f'{i}', question='Which letters come next?', context=lines, answers=[letters(8)])
        items.append(ReadingItem(record, read_prompt(record.question, lines, 'Passages:'), record.answers[0]))
    return items


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--tiny', action='store_true', help='a tiny model and small numbers: a test of the script')
    parser.add_argument('--vectors', type=int, default=1_000_000, help='of the PCA')
    parser.add_argument('--rate', type=float, default=4.)
    parser.add_argument('--batch-size', type=int, default=4, help='prompts of a generation step')
    parser.add_argument('--tokens', type=int, default=1536, help='of evidence in a prompt')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.tiny: args.vectors, args.tokens, args.batch_size, args.steps = 5_000, 90, 2, 2
    device = torch.device(args.device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device_name()
    with Clock(device) as load: llm = random_llm(args.tiny, device, torch.bfloat16 if device.type == 'cuda' else torch.float32)
    before, k = frozen_hash(llm), int(llm.width/args.rate)
    size = f'{llm.model.num_parameters()/1e9:.2f} B parameters, width {llm.width}, {llm.dtype}'
    print(f'{name}: {size}, made in {load.seconds:.0f} s', flush=True)
    result = {'device': name, 'command': ' '.join(['python', 'scripts/gpu_compressor.py', *sys.argv[1:]]), 'git': git_state(),
              'torch': str(torch.__version__), 'llm_parameters': llm.model.num_parameters(), 'width': llm.width, 'k': k, 'tiny': args.tiny,
              'batch_size': args.batch_size, 'evidence_tokens': args.tokens}
    pca, told = time_pca(llm, args.vectors, k, 16_384)
    result |= {f'pca/{key}': value for key, value in told.items()}
    with torch.no_grad(): x = llm.embed(torch.randint(llm.vocab_size, (4096,)).to(device))
    adapter = PCAAdapter(llm.width, k).to(device).fit(pca, vocabulary_rms(llm), x.float())
    items = made_up_items(args.batch_size, args.tokens, random.Random(0))
    texts = [part[0] for item in items for part in item.prompt if isinstance(part, Evidence)]
    rows = [torch.tensor(row) for row in tokenize(llm.tokenizer, texts)]
    reconstruct = ReconstructionTask(adapter, llm, random_tokens=min(4096, llm.vocab_size))
    steps = {'reconstruct': (reconstruct, token_batch(rows)), 'generate': (ReadingTask(adapter, llm), {'items': items})}
    for stage, (task, inputs) in steps.items():
        result |= {f'{stage}/{key}': value for key, value in time_steps(task, inputs, args.steps, device).items()}
        print(stage, {key: round(value, 3) for key, value in result.items() if key.startswith(stage)}, flush=True)
    assert frozen_hash(llm) == before, 'the language model changed'
    out = args.out or ROOT/'figures/bench'/f'compressor_{re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")}.json'
    write_json(out, result)
    print(json.dumps({key: value for key, value in result.items() if key.startswith('pca/')}), f'written to {out}', sep='\n')


if __name__ == '__main__': main()
