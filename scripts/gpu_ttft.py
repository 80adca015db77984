"""Time to the first token on one GPU: Llama-3.2-3B's and 8B's configurations with random weights, bf16, 16,384 tokens of context.

    python scripts/gpu_ttft.py
    python scripts/gpu_ttft.py --tiny      # a small decoder on the CPU: does the script work?

No data, weights or network is needed. Each model is timed twice: `eager`, as a user calls it, and `graph`, its kernels recorded in a
CUDA graph, because a prompt of a few hundred positions takes a large GPU less time than Python needs to start its kernels. In both, the
plain prompt and the prompts with vectors run the same way. The encoder has RoBERTa-large's configuration. Writes
figures/bench/ttft-<device>.json after every part, and prints the speed-ups beside the formula and the paper's 16.5 (k = 16) and 30.9
(k = 32). A part that fails (no memory, say) is printed, kept in the file and makes the script exit with an error; the others stand."""
import argparse
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from drag_lib.files import write_json  # noqa: E402
from drag_lib.llm import PRESETS  # noqa: E402
from drag_lib.refrag.cost import SMALL, random_decoder, random_encoder, time_prompts  # noqa: E402
from drag_lib.runs import device_name, git_state  # noqa: E402

PAPER = {16: 16.5, 32: 30.9}  # at 16,384 tokens


def show(name: str, timed: dict, ks: list[int]):
    print(f'{name}: tokens {timed["tokens/ttft"]*1e3:.1f} ms to the first token, {timed["tokens/ttit"]*1e3:.1f} ms a token')
    for way in (f'k{k}/{w}' for k in ks for w in ('kept', 'computed')):
        print(f'  {way:14} {timed[f"{way}/ttft"]*1e3:8.2f} ms: {timed[f"{way}/speedup"]:.1f}x (formula {timed[f"{way}/formula"]:.1f}x, '
              f'paper {PAPER.get(int(way[1:].split("/")[0]), "-")}), {timed[f"{way}/ttit"]*1e3:.1f} ms a token, '
              f'cache {timed[f"{way}/cache_gain"]:.1f} times smaller', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--tiny', action='store_true', help='a small decoder on the CPU, 512 tokens')
    parser.add_argument('--models', nargs='+', default=['llama-3.2-3b', 'llama-3-8b'], help='presets of drag_lib.llm')
    parser.add_argument('--contexts', type=int, nargs='+', default=[16384])
    parser.add_argument('--ks', type=int, nargs='+', default=[16, 32])
    parser.add_argument('--query', type=int, default=64)
    parser.add_argument('--new-tokens', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--encoder', default='roberta-large')
    parser.add_argument('--out', type=Path, help='the JSON; default: figures/bench/ttft-<device>.json')
    args = parser.parse_args()
    if args.tiny: args.models, args.contexts, args.repeats, args.encoder, args.new_tokens = ['tiny'], [512], 1, 'minilm', 2
    elif not torch.cuda.is_available(): sys.exit('error: torch sees no GPU; --tiny tries the script on the CPU')
    device, dtype = ('cpu', torch.float32) if args.tiny else ('cuda', torch.bfloat16)
    name = device_name()
    slug = re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-') + '-tiny'*args.tiny
    out = args.out or ROOT/'figures'/'bench'/f'ttft-{slug}.json'
    result = {'device': name, 'command': ' '.join(['python', 'scripts/gpu_ttft.py', *sys.argv[1:]]), 'git': git_state(),
              'torch': str(torch.__version__), 'precision': str(dtype)[6:], 'weights': 'random',
              **{k: v for k, v in vars(args).items() if k != 'out'}, 'errors': {}}
    for model_name in args.models:
        fields = dict(SMALL, num_hidden_layers=2) if args.tiny else dict(PRESETS[model_name].fields, max_position_embeddings=131072)
        model = random_decoder(fields, device, dtype)
        encoder = random_encoder(args.encoder, model.config.hidden_size, device, dtype)
        for context, mode in ((s, m) for s in args.contexts for m in ('eager', 'graph')[:1 if args.tiny else 2]):
            part = f'{model_name}/{context}/{mode}'
            try:
                timed = time_prompts(model, context, args.ks, query=args.query, new_tokens=args.new_tokens, repeats=args.repeats,
                                     encoder=encoder, graph=mode == 'graph')
                result |= {f'{part}/{k}': v for k, v in timed.items()}
                show(f'{name}, {part}', timed, args.ks)
            except RuntimeError as e:  # out of memory, or kernels that cannot be recorded: the other parts stand
                result['errors'][part] = str(e).splitlines()[0]
                print(f'{part} left out: {result["errors"][part]}', flush=True)
            if not args.tiny: result[f'{part}/peak_gpu_gb'] = torch.cuda.max_memory_allocated()/1e9; torch.cuda.reset_peak_memory_stats()
            write_json(out, result)
        del model, encoder
        if not args.tiny: torch.cuda.empty_cache()
    print('written to', out)
    if result['errors']: sys.exit(f'error: {len(result["errors"])} parts were left out')


if __name__ == '__main__': main()
