#!/usr/bin/env python
"""Measure D-RAG phase 1 on the real sets of ../shared/data/kgqa: three seeds, controls, transfer between sets.

    .venv/bin/python scripts/measure_phase1.py [SET ...] [--seeds 0 1 2]     train and evaluate; one JSON a set under figures/bench/
    .venv/bin/python scripts/measure_phase1.py --transfer                    each set's retrievers on the other sets' dev questions
    .venv/bin/python scripts/measure_phase1.py --novelty                     the novelty term's weight, on questions held out of train files

The checkpoint and the temperature are chosen on questions held out of a set's train file, never on its dev file.
"""
import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from drag_lib.drag import (
    Phase1Config, build_retriever, control_scores, crossfit, load_questions, load_retriever, retrieval_report, train_phase1)
from drag_lib.files import write_json
from drag_lib.graphs import KnowledgeGraph, extract_subgraphs
from drag_lib.metrics import seed_interval
from drag_lib.records import QuestionRecord, read_questions, write_questions
from drag_lib.retriever import relation_vectors, score_facts
from drag_lib.runs import device_name, git_state, load_run, project_folder
from drag_lib.text_encoder import TextEncoder

SHARED = project_folder().parent/'shared/data/kgqa'
# set: (file stem, training questions, validation questions held out of the train file, settings)
SETS = {
    'world': ('world', None, None, {'epochs': 4}),  # drag data world --out data/world; its own train, dev and test files
    'PQ-2H': ('PQ-2H', 1433, 160, {'epochs': 5}),
    'PQL-2H': ('PQL-2H', 1042, 116, {'epochs': 10}),
    'PQ-3H': ('PQ-3H', 2700, 300, {'epochs': 4}),
    'metaqa-3hop': ('metaqa-3hop', 1000, 300, {'epochs': 6}),
    'metaqa-3hop-own': ('metaqa-3hop', 1000, 300, {'epochs': 6}),  # on subgraphs of the library's own extraction from metaqa-kb
    'wq': ('wq', 7500, 500, {'epochs': 3}),
}
RANKED = [f'answer_recall@{k}' for k in (1, 5, 10, 50, 100)] + ['path_recall@10', 'path_recall@50', 'map']
SHOWN = ['answer_recall@10', 'answer_recall@50', 'path_recall@10', 'path_recall@50']
PROBABLE = ['fact_precision', 'fact_recall', 'n_selected', 'ece_uncalibrated', 'ece', 'ece_selected', 'brier', 'brier_base_rate']


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
            asked, topics = [r.question for r in records], [r.q_entity for r in records]
            graphs = extract_subgraphs(kg, asked, topics, 200, progress=f'subgraphs of {part}')
            parts[part] = [QuestionRecord(**{**r.model_dump(), 'graph': g}) for r, g in zip(records, graphs)]
    for part, records in parts.items(): write_questions(records, paths[part])
    return paths


def train(name: str, seed: int) -> tuple[str, Phase1Config]:
    "Train `name` with `seed`, or take the finished run of the same configuration (another one is refused)."
    paths = files(name)
    config = Phase1Config(train=str(paths['train']), val=str(paths['val']), seed=seed, **SETS[name][3])
    run = f'phase1-{name}-s{seed}'
    train_phase1(config, run=run, resume=True)
    return run, config


def measure(name: str, seeds: list[int]):
    "Train `name` with each seed, evaluate on its dev questions, write figures/bench/phase1-NAME.json."
    rows, encoder = [], TextEncoder()
    packed, _ = load_questions(str(files(name)['dev']), 'test', encoder)
    relations = relation_vectors(packed.relations, encoder)
    for seed in seeds:
        run, config = train(name, seed)
        done, (model, saved) = load_run(run), load_retriever(run)
        told, manifest = done.metrics, done.manifest
        logits = score_facts(model, packed, relations)
        report = retrieval_report(packed, logits, temperature=saved['temperature'])
        report['ece_dev_temperature'] = retrieval_report(packed, crossfit(packed, logits))['ece']
        rows.append({'seed': seed, 'train_seconds': manifest['seconds'], 'git': manifest['git'], 'trained': report})
        known = model.known_relations.cpu()
        controls = control_scores(packed, encoder, config, known) if seed == seeds[0] else {
            'untrained': score_facts(build_retriever(config, encoder, known), packed, relations)}
        for row, scores in controls.items():
            rows[-1][row] = {k: v for k, v in retrieval_report(packed, scores, probability=False).items() if k in RANKED}
        print(name, seed, {k: round(report[k], 3) for k in (*RANKED, *PROBABLE, 'ece_dev_temperature')}, flush=True)
    summary = {row: mean_rows([r[row] for r in rows]) for row in ('trained', 'untrained')} | {'cosine': mean_rows([rows[0]['cosine']])}
    config = {k: v for k, v in asdict(config).items() if k not in ('train', 'val', 'seed')}
    counts = {'n_train': told['n_train'], 'n_val': told['n'], 'n_dev': rows[0]['trained']['n']}
    write_json(project_folder()/f'figures/bench/phase1-{name}.json', {
        'set': name, **counts, 'config': config, **made_by(name), 'summary': summary, 'seeds': rows})


def mean_rows(rows: list[dict], keys: list[str] = RANKED + PROBABLE) -> dict:
    "Mean and 95 % t-interval over seeds of the figures named `keys`; intervals of shares end at 0 and 1."
    def interval(values):
        if len(values) == 1: return {'mean': values[0]}
        mean, low, high = seed_interval(values)
        return {'mean': mean, 'low': max(low, 0.), 'high': min(high, 1.)}
    return {k: interval([r[k] for r in rows]) for k in rows[0] if k in keys}


def made_by(*words: str, script: str = 'scripts/measure_phase1.py') -> dict:
    command = ' '.join([script, *words])
    return {'device': device_name(), 'threads': torch.get_num_threads(), 'command': command, 'git': git_state()}


def transfer(names: list[str], seeds: list[int]):
    "Each set's retrievers on each other set's dev questions, beside the untrained network that knows the same relations."
    table = {}
    for target in names:
        encoder = TextEncoder()
        packed, _ = load_questions(str(files(target)['dev']), 'test', encoder)
        relations = relation_vectors(packed.relations, encoder)
        for source in names:
            if source == target: continue
            rows = {'trained': [], 'trained, novelty 0': [], 'untrained': []}
            for seed in seeds:
                run, config = train(source, seed)
                model, saved = load_retriever(run)
                temperature, known = saved['temperature'], model.known_relations.cpu()
                rows['trained'].append(retrieval_report(packed, score_facts(model, packed, relations), temperature=temperature))
                model.novelty_weight = 0.
                rows['trained, novelty 0'].append(retrieval_report(packed, score_facts(model, packed, relations), temperature=temperature))
                scores = score_facts(build_retriever(config, encoder, known), packed, relations)
                rows['untrained'].append(retrieval_report(packed, scores, probability=False))
            table[f'{source} -> {target}'] = means = {row: mean_rows(values) for row, values in rows.items()}
            print(source, '->', target, {row: [round(means[row][k]['mean'], 3) for k in SHOWN] for row in means}, flush=True)
    write_json(project_folder()/'figures/bench/phase1-transfer.json', {**made_by('--transfer'), 'seeds': seeds, 'transfer': table})


def novelty(names: list[str]):
    "What the weight of the novelty term does off-domain: seed 0 of each set on questions held out of the other sets' train files."
    weights, table = (0., 10., 20., 40., 80.), {}
    for target in names:
        encoder = TextEncoder()
        packed, _ = load_questions(str(files(target)['val']), 'test', encoder)
        relations = relation_vectors(packed.relations, encoder)
        for source in names:
            if source == target: continue
            model, _ = load_retriever(f'phase1-{source}-s0')
            for model.novelty_weight in weights:
                report = retrieval_report(packed, score_facts(model, packed, relations), probability=False)
                table[f'{source} -> {target}, {model.novelty_weight:.0f}'] = {k: report[k] for k in RANKED}
                print(source, '->', target, model.novelty_weight, [round(report[k], 3) for k in SHOWN], flush=True)
    of_weight = {f'{w:.0f}': [row for pair, row in table.items() if pair.endswith(f', {w:.0f}')] for w in weights}
    mean = {w: {k: sum(row[k] for row in rows)/len(rows) for k in RANKED} for w, rows in of_weight.items()}
    print('mean', {w: [round(v[k], 3) for k in SHOWN] for w, v in mean.items()})
    write_json(project_folder()/'figures/bench/phase1-novelty.json', {**made_by('--novelty'), 'mean': mean, 'pairs': table})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sets', nargs='*', metavar='SET', help=f'some of: {", ".join(SETS)} (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--transfer', action='store_true')
    parser.add_argument('--novelty', action='store_true')
    args = parser.parse_args()
    if unknown := set(args.sets) - set(SETS): sys.exit(f'unknown set {sorted(unknown)[0]!r}: there are {", ".join(SETS)}')
    others = args.sets or ['PQ-2H', 'PQ-3H', 'metaqa-3hop', 'wq']
    if args.transfer: transfer(others, args.seeds)
    elif args.novelty: novelty(others)
    else:
        for name in args.sets or SETS:
            if name == 'world' or SHARED.exists(): measure(name, args.seeds)
            else: print(f'{name}: skipped, {SHARED} is absent')
