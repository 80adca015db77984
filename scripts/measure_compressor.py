#!/usr/bin/env python
"""Train compressors at several rates and measure how a frozen reader answers from their vectors, beside all control rows.

    .venv/bin/python scripts/measure_compressor.py world                                   2x, 4x, 8x and 16x
    .venv/bin/python scripts/measure_compressor.py world --rates 4 --seed 1                one more row; the others stay
    .venv/bin/python scripts/measure_compressor.py squadshifts-wiki nq-oracle --rates 4    data sets of ../shared/data/reading

Each set's rows go to figures/bench/compressor-<set>.json, the plot of several rates beside it. World and the squadshifts sets have
compressors of their own, trained where the run is not there yet (`compressor-<set>-<row>`); the other sets have no training part and are
read through world's. The squadshifts sets have two parts only: checkpoints are chosen on records of the training part, the other is the
test.
"""
import argparse
import json
from dataclasses import asdict

from drag_lib.compressor.evaluate import evaluate_compressor, load_compressor_run, plot_rates, reading_table
from drag_lib.compressor.train import CompressorConfig, answer_items, embedded, read_items, train_compressor
from drag_lib.files import write_json
from drag_lib.plots import save_figure
from drag_lib.runs import device_name, git_state, project_folder
from drag_lib.world import write_world

WORLD, SHARED = 'data/world/reading', '../shared/data/reading'
OWN = {'world': [f'{WORLD}/{part}.jsonl.gz' for part in ('train', 'dev', 'test')],
       **{f'squadshifts-{name}': [f'{SHARED}/squadshifts-{name}.{part}.jsonl.gz' for part in ('train', 'train', 'dev')]
          for name in ('wiki', 'reddit')}}
OTHERS = {name: f'{SHARED}/{name}.jsonl.gz' for name in ('nq-oracle', 'policyqa-dev', 'pubmedqa.train', 'multihop')}


def identical(run: str, data: str, n: int = 200) -> int:
    "Questions whose answer from the tokens' own embeddings is the text's; AssertionError unless it is all of them."
    trained = load_compressor_run(run)
    items = read_items(data, 'test', n_passages=trained.config.n_passages, seed=trained.config.seed, limit=n)[0]
    text, own = (answer_items(trained.llm, items, vectors, max_new_tokens=trained.config.max_new_tokens)[0].texts
                 for vectors in (None, lambda texts: embedded(trained.llm, texts)))
    same = sum(a == b for a, b in zip(text, own))
    assert same == len(items), f'{len(items) - same} of {len(items)} answers from own embeddings differ from those of the text'
    return same


def trained_run(name: str, row: str, rate: float, options: dict) -> str:
    "The run of a set at a rate, trained where it is not there."
    train, val, _ = OWN[name]
    run = f'compressor-{name}-{row}'
    train_compressor(CompressorConfig(records=train, val=val, rate=rate, **options), run=run,
                     resume=(project_folder()/'checkpoints'/run).exists())
    return run


def command_of(name: str, rate: float, options: dict, limit: int | None) -> str:
    "What makes this one row, with the options that are not the defaults."
    changed = {k: v for k, v in {**options, 'limit': limit}.items() if v != getattr(CompressorConfig, k, None)}
    told = [f'--{k.replace("_", "-")} {v}' for k, v in changed.items()]
    return ' '.join(['scripts/measure_compressor.py', name, f'--rates {rate:g}', *told])


def measure(name: str, rates: list[float], options: dict, limit: int | None):
    data, path = OTHERS.get(name) or OWN[name][2], project_folder()/f'figures/bench/compressor-{name}.json'
    rows = json.loads(path.read_text())['rows'] if path.exists() else {}
    for rate in rates:
        told = (options['kind'], f'{rate:g}x', options['quantize'], options['seed'] and f's{options["seed"]}')
        row = '-'.join(part for part in told if part)
        run = trained_run(name if name in OWN else 'world', row, rate, options)
        same, metrics = identical(run, data), evaluate_compressor(run, data, limit=limit, controls=True)
        rows[row] = {'command': command_of(name, rate, options, limit), 'rate': rate, 'run': run, 'git': git_state(),
                     'device': device_name(), 'identical_answers': same, 'limit': limit,
                     'config': asdict(load_compressor_run(run).config), 'metrics': metrics}
        columns = ['squad/em', 'squad/f1', 'squad/f1_low', 'squad/f1_high', 'of_text', 'same_as_text']
        tokens = {k: v if v is None else round(v, 3) for k, v in metrics.items() if k.startswith('tokens/')}
        print(f'{name}, {row}', reading_table(metrics)[columns].round(3).to_string(), tokens, sep='\n', flush=True)
        write_json(path, {'data': data, 'rows': rows})
    alike = {r['rate']: r['metrics'] for r in rows.values() if all(r['config'][k] == options[k] for k in ('kind', 'quantize', 'seed'))}
    if len(alike) > 1: save_figure(plot_rates(alike, f'{name}: {options["llm"]}, {options["kind"]}'), path.with_suffix('.png'), close=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sets', nargs='+', choices=[*OWN, *OTHERS], metavar='SET', help=f'of {", ".join([*OWN, *OTHERS])}')
    parser.add_argument('--rates', nargs='+', type=float, default=[2, 4, 8, 16])
    parser.add_argument('--limit', type=int, help='questions of the test part; default: all')
    default = CompressorConfig()
    for field in ('llm', 'kind', 'quantize', 'seed', 'minutes', 'reconstruct_minutes', 'precision'):
        value = getattr(default, field)
        parser.add_argument(f'--{field.replace("_", "-")}', type=str if value is None else type(value), default=value)
    args = parser.parse_args()
    options = {k: v for k, v in vars(args).items() if k not in ('sets', 'rates', 'limit')}
    write_world(project_folder()/'data/world', progress=False)
    for name in args.sets:
        if name != 'world' and not (project_folder()/SHARED).exists(): print(f'{name}: {SHARED} is not there, skipped'); continue
        measure(name, args.rates, options, args.limit)


if __name__ == '__main__': main()
