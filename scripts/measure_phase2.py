#!/usr/bin/env python
"""Measure D-RAG phase 2 on the world and on the real sets of ../shared/data/kgqa: seeds, ablations and controls in one table.

    .venv/bin/python scripts/measure_phase2.py [SET ...] [--seeds 0 1 2] [--rows NAME ...]     one JSON a set under figures/bench/

The phase-1 retrievers are those of scripts/measure_phase1.py (trained first where they are not there). The checkpoint is chosen on
questions held out of a set's train file, never on its dev file. A row that is already measured at the same seed is kept: rows can be
added one by one.
"""
import argparse
import json
import sys
from dataclasses import asdict, replace

from measure_phase1 import RANKED, SHARED, files, made_by, mean_rows
from measure_phase1 import train as train_retriever

from drag_lib.files import write_json
from drag_lib.phase2 import Phase2Config, evaluate_phase2, load_drag, measure_drag, read_set, train_phase2
from drag_lib.runs import load_run, project_folder
from drag_lib.text_encoder import TextEncoder

READER = {'llm': 'reader-tiny', 'eos_gate': False, 'batch_size': 8, 'learning_rate': 1e-3, 'retriever_rate': 1e-5, 'prob_threshold': .02,
          'lora_rank': 32, 'lora_alpha': 64., 'eval_every': None}
SETS = {  # settings beside READER's
    'world': {'epochs': 1, 'max_facts_cap': 20, 'max_answers': 16, 'max_new_tokens': 96},
    'metaqa-3hop': {'epochs': 2, 'max_facts_cap': 20, 'max_answers': 8, 'max_new_tokens': 96},
    'PQ-2H': {'epochs': 3, 'max_facts_cap': 10, 'max_new_tokens': 48},
    'PQ-3H': {'epochs': 2, 'max_facts_cap': 12, 'max_new_tokens': 48},
}
ROWS = {  # what is changed against the first
    'phase 2': {},
    'cascade': {'train_retriever': False, 'estimator': 'none'},  # the frozen phase-1 retriever, its facts read as they come
    'text only': {'evidence': 'text'},
    'vectors only': {'evidence': 'vectors'},
    'projector not trained': {'train_projector': False},
    'score function': {'estimator': 'score_function'},
    'gate on vectors alone': {'gate_text': False},
    'balanced': {'balance_every': 20},
    'faster retriever': {'retriever_rate': 5e-5},
    'whole labels': {'supervise': 'all'},
    'faster, whole labels': {'retriever_rate': 5e-5, 'supervise': 'all'},
    'text only, faster, whole labels': {'evidence': 'text', 'retriever_rate': 5e-5, 'supervise': 'all'},
    'vectors only, faster, whole labels': {'evidence': 'vectors', 'retriever_rate': 5e-5, 'supervise': 'all'},
    'cascade, whole labels': {'train_retriever': False, 'estimator': 'none', 'supervise': 'all'},
    'retrieval weight 1': {'ret_weight': 1.},
}
DECODED = {'phase 2, constrained': ('phase 2', {'constrain': True})}  # trained as another row, answered in another way
ANSWERS = [f'{d}/{k}' for d in ('strict', 'rog') for k in ('hits_at_1', 'em', 'f1', 'hit')]
SHOWN = ['strict/hits_at_1', 'strict/em', 'strict/f1', 'answer_recall@10', 'map', 'fact_precision', 'fact_recall', 'n_selected',
         'eos/stopped', 'eos/empty', 'eos/pad']
KEYS = list(dict.fromkeys(ANSWERS + RANKED + SHOWN))


def one(name: str, row: str, seed: int) -> dict:
    "Train and evaluate one row with one seed; the untuned and retriever-only controls come with the first row."
    row, answered = DECODED.get(row, (row, {}))
    paths = files(name)
    phase1, _ = train_retriever(name, seed)
    settings = READER | SETS[name] | ROWS[row]
    config = Phase2Config(phase1=phase1, train=str(paths['train']), val=str(paths['val']), seed=seed, **settings)
    run = f'phase2-{name}-{row.replace(" ", "-")}-s{seed}'
    train_phase2(config, run=run, resume=True)
    if answered: report = decode(run, str(paths['dev']), answered)
    else: report = evaluate_phase2(run, str(paths['dev']), controls=row == 'phase 2')
    made = load_run(run).manifest
    told = {k: v for k, v in asdict(replace(config, **answered)).items() if k not in ('train', 'val', 'seed')}
    return {'seed': seed, 'train_seconds': made['seconds'], 'git': made['git'], 'config': told, 'report': report}


def decode(run: str, data: str, changes: dict) -> dict:
    "Metrics of a trained run whose answers are generated with other settings."
    model, config, settings = load_drag(run)
    questions, _ = read_set(data, 'test', TextEncoder(settings['encoder']), settings['max_hops'])
    return measure_drag(model, questions, replace(config, **changes))[0]


def measure(name: str, rows: list[str], seeds: list[int]):
    "All rows with all seeds; the file is written after each, so that nothing measured is lost."
    path = project_folder()/f'figures/bench/phase2-{name}.json'
    kept = json.loads(path.read_text())['seeds'] if path.exists() else {}
    for row in rows:
        for seed in seeds:
            done = kept.setdefault(row, [])
            if seed in [r['seed'] for r in done]: continue
            done.append(one(name, row, seed))
            print(name, row, seed, {k: round(done[-1]['report'][k], 3) for k in SHOWN}, flush=True)
            write(path, name, kept)
    write(path, name, kept)


def write(path, name: str, kept: dict):
    "Means and intervals of all rows over their seeds, and the reports."
    summary = {r: mean_rows([s['report'] for s in found], KEYS) for r, found in kept.items() if found}
    for control in ('untuned', 'retriever'):
        found = [{k.removeprefix(f'{control}/'): v for k, v in s['report'].items()} for s in kept.get('phase 2', [])]
        of = [{k: report[k] for k in ANSWERS if k in report} for report in found]
        if of: summary[control] = mean_rows(of, KEYS)
    write_json(path, {'set': name, **made_by(name, script='scripts/measure_phase2.py'), 'summary': summary, 'seeds': kept})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sets', nargs='*', metavar='SET', help=f'some of: {", ".join(SETS)} (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--rows', nargs='+', default=list(ROWS)[:5], metavar='NAME', help=f'some of: {", ".join([*ROWS, *DECODED])}')
    args = parser.parse_args()
    for given, known in ((args.sets, SETS), (args.rows, ROWS | DECODED)):
        if unknown := [x for x in given if x not in known]: sys.exit(f'unknown {unknown[0]!r}: there are {", ".join(known)}')
    for name in args.sets or SETS:
        if name == 'world' or SHARED.exists(): measure(name, args.rows, args.seeds)
        else: print(f'{name}: skipped, {SHARED} is absent')
