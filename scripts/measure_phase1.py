#!/usr/bin/env python
"""Measure D-RAG phase 1 on the real sets of ../shared/data/kgqa: three seeds, controls, transfer between sets.

    .venv/bin/python scripts/measure_phase1.py [SET ...] [--seeds 0 1 2]     train and evaluate; one JSON a set under figures/bench/
    .venv/bin/python scripts/measure_phase1.py --transfer                    each set's seed-0 retriever on the other sets' dev questions

A set's dev file is touched once, at the end. The checkpoint and the temperature are chosen on questions held out of its train file.
"""
import argparse, json, sys, time
from dataclasses import asdict
from pathlib import Path

import torch

from drag_lib.drag import Phase1Config, build_retriever, control_scores, crossfit, evaluate_phase1, load_questions, load_retriever, retrieval_report, train_phase1
from drag_lib.files import write_json
from drag_lib.graphs import KnowledgeGraph, extract_subgraphs
from drag_lib.metrics import expected_calibration_error, seed_interval
from drag_lib.records import QuestionRecord, read_questions, write_questions
from drag_lib.retriever import relation_vectors, score_facts
from drag_lib.runs import device_name, git_state, list_runs, load_run, project_folder
from drag_lib.text_encoder import TextEncoder

SHARED = project_folder().parent/'shared/data/kgqa'
# set: (file stem, training questions, validation questions held out of the train file, settings)
SETS = {
    'world': ('world', None, None, {'epochs': 5}),  # drag data world --out data/world; its own train, dev and test files
    'PQ-2H': ('PQ-2H', 1433, 160, {'epochs': 5}),
    'PQL-2H': ('PQL-2H', 1042, 116, {'epochs': 10}),
    'PQ-3H': ('PQ-3H', 2700, 300, {'epochs': 5}),
    'metaqa-3hop': ('metaqa-3hop', 1000, 300, {'epochs': 10}),
    'metaqa-3hop-own': ('metaqa-3hop', 1000, 300, {'epochs': 10}),  # on subgraphs of the library's own extraction from metaqa-kb
    'wq': ('wq', 7500, 500, {'epochs': 4}),
}
KEYS = [f'answer_recall@{k}' for k in (1, 5, 10, 50, 100)] + ['path_recall@10', 'path_recall@50', 'map']


def files(name: str) -> dict[str, Path]:
    "Write the set's train, val and dev records under data/bench once; return their paths."
    stem, n_train, n_val, _ = SETS[name]
    if name == 'world':
        folder = project_folder()/'data/world/kgqa'
        return {part: folder/f'{file}.jsonl.gz' for part, file in (('train', 'train'), ('val', 'dev'), ('dev', 'test'))}
    folder = project_folder()/'data/bench'/name
    paths = {part: folder/f'{part}.jsonl.gz' for part in ('train', 'val', 'dev')}
    if all(p.exists() for p in paths.values()): return paths
    train, dev = (read_questions(SHARED/f'{stem}.{part}.jsonl.gz') for part in ('train', 'dev'))
    parts = {'train': train[:n_train], 'val': train[n_train:n_train + n_val], 'dev': dev}
    if name.endswith('-own'):
        kg = KnowledgeGraph.read(SHARED/'metaqa-kb.jsonl.gz')
        for part, records in parts.items():
            graphs = extract_subgraphs(kg, [r.question for r in records], [r.q_entity for r in records], 200, progress=f'subgraphs of {part}')
            parts[part] = [QuestionRecord(**{**r.model_dump(), 'graph': g}) for r, g in zip(records, graphs)]
    for part, records in parts.items(): write_questions(records, paths[part])
    return paths


def measure(name: str, seeds: list[int]):
    "Train `name` with each seed, evaluate on its dev questions, write figures/bench/phase1-NAME.json."
    paths, settings, rows = files(name), SETS[name][3], []
    finished = {r.name for r in list_runs().itertuples() if r.status == 'done'} if len(list_runs()) else set()
    for seed in seeds:
        run = f'phase1-{name}-s{seed}'
        config = Phase1Config(train=str(paths['train']), val=str(paths['val']), seed=seed, **settings)
        began = time.perf_counter()
        if run not in finished: train_phase1(config, run=run, resume=True)
        seconds = time.perf_counter() - began
        trained, (model, saved) = load_run(run).metrics, load_retriever(run)
        encoder = TextEncoder()
        packed, _ = load_questions(str(paths['dev']), 'test', encoder)
        relations = relation_vectors(packed.relations, encoder)
        logits = score_facts(model, packed, relations)
        report = retrieval_report(packed, logits, temperature=saved['temperature'])
        report['ece_dev_temperature'] = expected_calibration_error(crossfit(packed, logits).sigmoid(), packed.label)
        rows.append({'seed': seed, 'train_seconds': round(seconds, 1), 'trained': report})
        controls = control_scores(packed, encoder, config, relations) if seed == seeds[0] else {'untrained': score_facts(build_retriever(config, encoder), packed, relations)}
        for row, scores in controls.items():
            rows[-1][row] = {k: v for k, v in retrieval_report(packed, scores, probability=False).items() if k in KEYS}
        print(name, seed, {k: round(report[k], 3) for k in (*KEYS, 'ece_uncalibrated', 'ece', 'ece_dev_temperature')}, flush=True)
    summary = {row: {k: dict(zip(('mean', 'low', 'high'), seed_interval([r[row][k] for r in rows])) if len(rows) > 1 else zip(('mean',), [rows[0][row][k]]))
                     for k in rows[0][row] if isinstance(rows[0][row][k], float)} for row in ('trained', 'untrained')}
    summary['cosine'] = {k: {'mean': v} for k, v in rows[0]['cosine'].items()}
    write_json(project_folder()/f'figures/bench/phase1-{name}.json', {
        'set': name, 'n_train': trained['n_train'], 'n_val': trained['n'], 'n_dev': rows[0]['trained']['n'], 'config': {k: v for k, v in asdict(config).items() if k not in ('train', 'val', 'seed')},
        'device': device_name(), 'threads': torch.get_num_threads(), 'command': 'scripts/measure_phase1.py ' + name, 'commit': git_state()['commit'], 'summary': summary, 'seeds': rows})


def transfer(names: list[str]):
    "Each set's seed-0 retriever on each other set's dev questions, beside that set's cosine row."
    table = {}
    for source in names:
        for target in names:
            if source != target:
                report = evaluate_phase1(f'phase1-{source}-s0', str(files(target)['dev']))
                table[f'{source} -> {target}'] = {k: report[k] for k in KEYS}
                print(source, '->', target, {k: round(report[k], 3) for k in KEYS}, flush=True)
    write_json(project_folder()/'figures/bench/phase1-transfer.json', {
        'device': device_name(), 'command': 'scripts/measure_phase1.py --transfer', 'commit': git_state()['commit'], 'transfer': table})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sets', nargs='*', metavar='SET', help=f'some of: {", ".join(SETS)} (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--transfer', action='store_true')
    args = parser.parse_args()
    if unknown := set(args.sets) - set(SETS): sys.exit(f'unknown set {sorted(unknown)[0]!r}: there are {", ".join(SETS)}')
    if args.transfer: transfer(args.sets or ['PQ-2H', 'PQ-3H', 'metaqa-3hop', 'wq'])
    else:
        for name in args.sets or SETS:
            if name == 'world' or SHARED.exists(): measure(name, args.seeds)
            else: print(f'{name}: skipped, {SHARED} is absent')
