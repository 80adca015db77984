#!/usr/bin/env python
"""`make demo`: build the embedded data set, audit it, train D-RAG's retriever through its notebook, then retriever, projector and language
model together, evaluate on held-out entities beside the controls, look at how the answers end, and show five questions with their
answers and the facts they were read from. About ten minutes on two CPU cores."""
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
PHASE2 = ('--constrain --epochs 1 --train-limit 1500 --batch-size 8 --learning-rate 1e-3 --max-facts-cap 20 --prob-threshold 0.02 '
          '--max-new-tokens 96 --val-generation-limit 100')
ENV = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'MPLBACKEND': 'Agg'}
BEGAN = time.monotonic()


def step(number: int, what: str, *command: str, capture: bool = False, verdict: bool = False) -> str:
    "Run one command with its output passed on (`capture`: stdout returned); stop the demo when it fails, unless failing is its `verdict`."
    print(f'\n[{number}/7 · {time.monotonic() - BEGAN:.0f} s] {what}\n    $ drag {" ".join(command)}', flush=True)
    done = subprocess.run([str(BIN/'drag'), *command], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode == 1 and verdict: print('    (the gate says no: see above)', flush=True)
    elif done.returncode: sys.exit(f'demo: step {number} failed with exit code {done.returncode}')
    return done.stdout


def table(metrics: dict, columns: list[str], rows: dict[str, str]) -> str:
    "`columns` of `metrics`, one line a row; `rows`: name -> prefix of its keys."
    lines = [' '*24 + ''.join(f'{c:>18}' for c in columns)]
    for row, prefix in rows.items(): lines.append(f'{row:<24}' + ''.join(f'{metrics[prefix + c]:18.3f}' for c in columns))
    return '\n'.join(lines)


def five_questions(path: Path) -> str:
    "One question of each of five kinds, with its answer and the best facts it was read from."
    with gzip.open(ROOT/WORLD/'test.jsonl.gz', 'rt', encoding='utf-8') as f: records = {r['id']: r for r in map(json.loads, f)}
    shown, lines = set(), []
    for row in map(json.loads, path.read_text().splitlines()):
        record = records[row['id']]
        if record['kind'] in shown or record['kind'] not in ('1hop', '2hop', '3hop', 'conjunction', 'multi'): continue
        shown.add(record['kind'])
        gold = {tuple(f) for p in record['paths'] for f in p}
        lines.append(f"\n{record['question']}   [{record['kind']}]")
        lines.append(f"   answer: {' | '.join(row['prediction']) or '(nothing)'}      wanted: {' | '.join(record['answer'])}")
        lines += [f"   {p:.3f} {'*' if (h, r, t) in gold else ' '} {h} — {r} — {t}" for h, r, t, p in row['facts'][:5]]
    return '\n'.join(lines)


def main():
    os.chdir(ROOT)
    run = f'demo-{time.strftime("%Y%m%d-%H%M%S")}'
    out = Path('checkpoints')/run
    step(1, 'the embedded data set: real facts, questions split by entity', 'data', 'world', '--out', 'data/world', '--seed', '0')
    step(2, 'is it sound? duplicates, leakage, coverage', 'data', 'audit', str(WORLD/'train.jsonl.gz'), str(WORLD/'test.jsonl.gz'))
    settings = {'run': run, 'dim': 256, 'epochs': 3, 'learning_rate': 0.001}
    settings |= {part: WORLD/f'{name}.jsonl.gz' for part, name in (('train', 'train'), ('val', 'dev'), ('test', 'test'))}
    given = [x for name, value in settings.items() for x in ('-p', name, str(value))]
    step(3, 'phase 1: train the retriever through its notebook, measure it on held-out topic entities', 'run', 'drag-phase1', *given)
    retrieval = json.loads((out/'metrics.json').read_text())
    answers = f'{run}-answers'
    step(4, 'phase 2: retriever, projector and language model together', 'train', 'drag-phase2', '--phase1', run, '--run', answers,
         '--train', str(WORLD/'train.jsonl.gz'), '--val', str(WORLD/'dev.jsonl.gz'), *PHASE2.split())
    text = step(5, 'evaluate on held-out topic entities', 'eval', answers, '--data', str(WORLD/'test.jsonl.gz'), '--limit', '300',
                '--controls', '--json', '--predictions', str(out/'answers.jsonl'), capture=True)
    metrics = json.loads(text)
    print('\n' + table(metrics, ['answer_recall@1', 'answer_recall@10', 'path_recall@10', 'map'], {'facts of phase 2': ''}))
    print(f"\nexpected calibration error after phase 1: {retrieval['ece']:.4f}, after phase 2 {metrics['ece']:.4f}\n")
    print(table(metrics, ['strict/hits_at_1', 'strict/em', 'strict/f1'],
                {'phase 2': '', 'untuned reader': 'untuned/', 'best fact, no reader': 'retriever/'}))
    step(6, 'how the answers end: the gate that fails a training run', 'diagnose', answers, '--limit', '100', verdict=True)
    print(f'\n[7/7 · {time.monotonic() - BEGAN:.0f} s] five questions about entities never seen; the facts read, * = on a gold path')
    print(five_questions(out/'answers.jsonl'))
    plots = f'figures/{run}/, figures/{answers}/ (eos.png: how answers end)'
    print(f'\nplots: {plots}   report: checkpoints/{run}/drag_phase1.ipynb   {time.monotonic() - BEGAN:.0f} s in all')


if __name__ == '__main__': main()
