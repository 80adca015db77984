#!/usr/bin/env python
"""`make demo`: build the embedded data set, audit it, train D-RAG's retriever through its notebook, evaluate it on held-out entities,
and show five questions with the facts retrieved and their probabilities. About ten minutes on two CPU cores."""
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import BIN, ROOT  # noqa: E402

WORLD = Path('data/world/kgqa')
ENV = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'MPLBACKEND': 'Agg'}
BEGAN = time.monotonic()


def step(number: int, what: str, *command: str, capture: bool = False) -> str:
    "Run one command with its output passed on (`capture`: stdout returned); stop the demo when it fails."
    print(f'\n[{number}/5 · {time.monotonic() - BEGAN:.0f} s] {what}\n    $ drag {" ".join(command)}', flush=True)
    done = subprocess.run([str(BIN/'drag'), *command], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode: sys.exit(f'demo: step {number} failed with exit code {done.returncode}')
    return done.stdout


def table(metrics: dict) -> str:
    columns = ['answer_recall@1', 'answer_recall@5', 'answer_recall@10', 'path_recall@10', 'map']
    lines = ['retriever   ' + ''.join(f'{c:>18}' for c in columns)]
    for row in ('trained', 'untrained', 'cosine'):
        values = [metrics[c if row == 'trained' else f'{row}/{c}'] for c in columns]
        lines.append(f'{row:<12}' + ''.join(f'{v:18.3f}' for v in values))
    return '\n'.join(lines)


def five_questions(path: Path) -> str:
    "One question of each of five kinds, with its best facts."
    with gzip.open(ROOT/WORLD/'test.jsonl.gz', 'rt', encoding='utf-8') as f: records = {r['id']: r for r in map(json.loads, f)}
    shown, lines = set(), []
    for row in map(json.loads, path.read_text().splitlines()):
        record = records[row['id']]
        if record['kind'] in shown or record['kind'] not in ('1hop', '2hop', '3hop', 'conjunction', 'multi'): continue
        shown.add(record['kind'])
        gold = {tuple(f) for p in record['paths'] for f in p}
        lines.append(f"\n{record['question']}   [{record['kind']}; answer: {' | '.join(record['answer'])}]")
        lines += [f"   {p:.3f} {'*' if (h, r, t) in gold else ' '} {h} — {r} — {t}" for h, r, t, p in row['facts'][:6]]
    return '\n'.join(lines)


def main():
    os.chdir(ROOT)
    run = f'demo-{time.strftime("%Y%m%d-%H%M%S")}'
    out = Path('checkpoints')/run
    step(1, 'the embedded data set: real facts, questions split by entity', 'data', 'world', '--out', 'data/world', '--seed', '0')
    step(2, 'is it sound? duplicates, leakage, coverage', 'data', 'audit', str(WORLD/'train.jsonl.gz'), str(WORLD/'test.jsonl.gz'))
    settings = {'run': run, 'dim': 256, 'epochs': 4, 'learning_rate': 0.001}
    settings |= {part: WORLD/f'{name}.jsonl.gz' for part, name in (('train', 'train'), ('val', 'dev'), ('test', 'test'))}
    given = [x for name, value in settings.items() for x in ('-p', name, str(value))]
    step(3, 'train and evaluate the retriever through its notebook', 'run', 'drag-phase1', *given)
    text = step(4, 'evaluate on held-out topic entities', 'eval', run, '--data', str(WORLD/'test.jsonl.gz'), '--controls', '--json',
                '--predictions', str(out/'facts.jsonl'), capture=True)
    metrics = json.loads(text)
    print('\n' + table(metrics))
    before, after = metrics['ece_uncalibrated'], metrics['ece']
    print(f'\nexpected calibration error of the probabilities: {before:.4f}, after temperature scaling {after:.4f}')
    print(f"\n[5/5 · {time.monotonic() - BEGAN:.0f} s] five questions about entities never seen; the facts retrieved, * = on a gold path")
    print(five_questions(out/'facts.jsonl'))
    print(f'\nplots: figures/{run}/   report: checkpoints/{run}/drag_phase1.ipynb   {time.monotonic() - BEGAN:.0f} s in all')


if __name__ == '__main__': main()
