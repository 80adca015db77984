#!/usr/bin/env python
"""Time to the first token over the length of the context, on the CPU: tokens, kept vectors, computed vectors, beside the formula.

    .venv/bin/python scripts/measure_ttft.py                     writes figures/bench/ttft.json and figures/bench/ttft.png
    .venv/bin/python scripts/measure_ttft.py --contexts 4096     one context more; what the file holds of others is kept

Each context is one run of `drag bench ttft` (`drag_lib.refrag.cost.bench_ttft`), written as soon as it is done."""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from drag_lib.files import write_json  # noqa: E402
from drag_lib.plots import save_figure  # noqa: E402
from drag_lib.refrag.cost import SMALL, bench_ttft, model_cost, plot_ttft, random_decoder  # noqa: E402

SAME = ('machine', 'threads', 'query', 'encoder', 'batch_size')  # what points of one plot have in common


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--contexts', type=int, nargs='*', default=[512, 1024, 2048, 4096, 8192], help='none: only draw again')
    parser.add_argument('--ks', type=int, nargs='+', default=[16, 32])
    parser.add_argument('--query', type=int, default=64)
    parser.add_argument('--encoder', default='minilm')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', type=Path, default=ROOT/'figures'/'bench'/'ttft.json')
    args = parser.parse_args()
    old = json.loads(args.out.read_text())['runs'] if args.out.exists() else []
    runs = {run['context']: run for run in old}
    for context in args.contexts:
        run = bench_ttft(context, args.ks, query=args.query, encoder=args.encoder, threads=args.threads, repeats=args.repeats)
        runs = {s: r for s, r in runs.items() if all(r[name] == run[name] for name in SAME)} | {context: run}
        write_json(args.out, {'decoder': SMALL, 'runs': [runs[s] for s in sorted(runs)]})
        found = ((k, *(run[f'k{k}/kept/{name}'] for name in ('speedup', 'share_of_formula', 'cpu_speedup'))) for k in args.ks)
        line = ', '.join(f'k = {k}: {x:.1f}x, {share:.0%} of the formula ({cpu:.1f}x in CPU time)' for k, x, share, cpu in found)
        print(f's = {context}: {run["tokens/ttft"]:.2f} s with tokens; kept vectors, {line}', flush=True)
    if not runs: sys.exit(f'error: {args.out} holds no run: give --contexts')
    reads = None if args.encoder == 'none' else model_cost(args.encoder)
    fig = plot_ttft(model_cost(random_decoder().config), args.ks, query=args.query, encoder=reads, measured=list(runs.values()),
                    contexts=(min(runs)//2, max(runs)*2), title=f'26 M decoder, {args.threads} CPU thread(s)')
    print('written to', args.out, 'and', save_figure(fig, args.out.with_suffix('.png'), close=True))


if __name__ == '__main__': main()
