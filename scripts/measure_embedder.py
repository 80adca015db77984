#!/usr/bin/env python
"""Judge the embedder's losses: each alone, ranking with isotropy, all; three seeds; on the world and on ../shared/data/retrieval.

    .venv/bin/python scripts/measure_embedder.py                         every training set and loss; figures/bench/embedder.json
    .venv/bin/python scripts/measure_embedder.py world --losses ranking all --seeds 0 1
    .venv/bin/python scripts/measure_embedder.py --evaluator             the base's figures by sentence-transformers' own evaluator
    .venv/bin/python scripts/measure_embedder.py --index 1000000 --frozen

A shared set has no training queries: half of its queries train (a tenth of all choose the weights), the other half are measured. A run
is measured on its own set's test half and on all other sets, whole. The MiniLM base is frozen and its vectors are kept, so that a training
takes seconds. Rows that are there already are kept and not trained again.
"""
import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from drag_lib.embedder.diagnostics import isotropy_report
from drag_lib.embedder.evaluate import (
    asked, base_vectors, bench_frozen, compare_rows, rank_by_cosine, rank_by_words, ranking_metrics, retention, run_vectors, whitened)
from drag_lib.embedder.store import bench_index
from drag_lib.embedder.train import EmbedderConfig, train_embedder
from drag_lib.files import write_json
from drag_lib.records import RetrievalSet, document_text, read_retrieval, write_retrieval
from drag_lib.runs import device_name, git_state, project_folder
from drag_lib.text_encoder import TextEncoder

SHARED = project_folder().parent/'shared/data/retrieval'
PATH = project_folder()/'figures/bench/embedder.json'
SETS = ('world', 'cranfield', 'cacm', 'cisi')
ALONE = ('ranking', 'margin', 'predictive', 'covariance', 'sigreg', 'std', 'orthogonal')
LOSSES = {name: {'ranking': 0.} | {name: 1.} for name in ALONE} | {
    'ranking+covariance': {'covariance': .1}, 'ranking+sigreg': {'sigreg': 1.},
    'all': {'margin': .1, 'predictive': .1, 'covariance': .1, 'sigreg': 1., 'std': .1, 'orthogonal': .1}}
SETTINGS = {'epochs': 5, 'slices': 64, 'log_every': 20, 'learning_rate': 1e-3, 'precision': 'fp32'}


def folder_of(name: str) -> Path: return project_folder()/'data/world/retrieval' if name == 'world' else SHARED/name


def halves(name: str, where: Path) -> Path:
    "A shared set with its queries parted into train, dev and test, by seed 0; the world has its own parts."
    if name == 'world': return folder_of(name)
    data = read_retrieval(folder_of(name))
    queries = sorted(asked(data))
    random.Random(0).shuffle(queries)
    n = len(queries)
    for part, some in (('train', queries[:2*n//5]), ('dev', queries[2*n//5:n//2]), ('test', queries[n//2:])):
        write_retrieval(RetrievalSet(data.corpus, data.queries, {q: data.qrels[q] for q in some}), where/name, split=part)
    return where/name


def part_of(data: RetrievalSet, test: RetrievalSet) -> list[int]:
    "Places of the test half's queries among the asked ones of the whole set."
    return [i for i, q in enumerate(asked(data)) if q in test.qrels]


def score(vectors, data, codes: bool = True) -> dict:
    means, per = ranking_metrics(rank_by_cosine(vectors, data), data)
    out = {**means, 'per_query': [round(v, 5) for v in per['ndcg@10'].tolist()]}
    return out | (retention(vectors, data) if codes else {})


def controls(name: str, data: RetrievalSet) -> dict:
    base = base_vectors('minilm', data)
    means, per = ranking_metrics(rank_by_words(data), data)
    return {'bm25': {**means, 'per_query': [round(v, 5) for v in per['ndcg@10'].tolist()]}, 'base': score(base, data),
            'whitened': score(whitened(base), data), 'isotropy': isotropy_report(base.documents), 'n': len(asked(data)),
            'n_documents': len(data.corpus)}


def measure(train: str, loss: str, seed: int, sets: dict, parts: dict, home: Path) -> dict:
    "Train one run in a folder of its own, measure it on every set, throw its weights away."
    os.environ['DRAG_HOME'] = str(home)
    name = f'{train}-{loss.replace("+", "-")}-{seed}'
    metrics = train_embedder(EmbedderConfig(train=str(parts[train]), seed=seed, **SETTINGS | LOSSES[loss]), run=name)
    row = {'val': {k: metrics[k] for k in ('verdict', 'loss', 'mrr', 'base/mrr', 'updates', 'best_update')}}
    for other, data in sets.items():
        vectors = run_vectors(name, data)
        row[other] = score(vectors, data, codes=other == train)
        if other == train: row['isotropy'] = isotropy_report(vectors.documents)
    shutil.rmtree(home/'checkpoints'/name)
    return row


def summary(found: dict, sets: dict, parts: dict) -> dict:
    "Per training set, loss and measured set: nDCG@10 over seeds against the controls; on the test half of the training set's own."
    out, order = {}, [loss for loss in LOSSES if any(key.split('/')[1] == loss for key in found['rows'])]
    for train in {key.split('/')[0] for key in found['rows']}:
        own = part_of(sets[train], read_retrieval(parts[train])) if train in parts else None
        for loss in order:
            rows = [row for key, row in found['rows'].items() if key.startswith(f'{train}/{loss}/')]
            for other in (s for s in SETS if rows and all(s in row for row in rows) and s in found['controls']):
                pick = lambda values: np.array(values)[own if other == train else slice(None)]
                runs = np.stack([pick(row[other]['per_query']) for row in rows])
                line = {'seeds': len(rows), 'ndcg@10': float(runs.mean()), 'by_seed': runs.mean(1).round(4).tolist()}
                for control in ('base', 'bm25', 'whitened'):
                    line[control] = float(pick(found['controls'][other][control]['per_query']).mean())
                    line[f'vs_{control}'] = compare_rows(runs, pick(found['controls'][other][control]['per_query']))
                below = '' if line['ndcg@10'] >= line['base'] else 'BELOW its untrained base: '
                p = line['vs_base']['p_value']
                line = {'verdict': f'{below}{line["ndcg@10"]:.4f} against {line["base"]:.4f} (p = {p:.3g})'} | line
                if other == train:
                    codes = [k for k in rows[0][other] if k.split('/')[0].startswith(('int8', 'binary', 'truncate'))]
                    line['kept'] = {k.split('/')[0]: float(np.mean([row[other][k]/row[other]['ndcg@10'] for row in rows])) for k in codes}
                    line['kept_base'] = {k.split('/')[0]: found['controls'][other]['base'][k]/found['controls'][other]['base']['ndcg@10']
                                         for k in codes if k in found['controls'][other]['base']}
                    line['iso_score'] = float(np.mean([row['isotropy']['isotropy/iso_score'] for row in rows]))
                out[f'{train}/{loss}/{other}'] = line
    return out


def by_evaluator(data: RetrievalSet) -> dict:
    "nDCG@10 of the base by sentence-transformers' InformationRetrievalEvaluator (it encodes the queries anew), and ours."
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim
    relevant = {q: {d for d, grade in grades.items() if grade > 0} for q, grades in data.qrels.items()}
    texts = {d: document_text(doc) for d, doc in data.corpus.items()}
    evaluator = InformationRetrievalEvaluator({q: data.queries[q] for q in asked(data)}, texts, relevant, write_csv=False,
                                              score_functions={'cosine': cos_sim})
    base = base_vectors('minilm', data)
    found = evaluator.compute_metrices(TextEncoder('minilm').model, corpus_embeddings=base.documents)
    ours = ranking_metrics(rank_by_cosine(base, data), data)[0]['ndcg@10']
    theirs = float(found['cosine']['ndcg@k'][10])
    return {'ours': ours, 'theirs': theirs, 'difference': ours - theirs}


def main(args):
    torch.set_num_threads(1)
    found = json.loads(PATH.read_text()) if PATH.exists() else {'rows': {}, 'controls': {}, 'evaluator': {}, 'bench': {}}
    made = {'made_by': 'scripts/measure_embedder.py', 'device': device_name(), 'git': git_state(), 'settings': SETTINGS, 'losses': LOSSES}
    save = lambda: write_json(PATH, found | made)
    if args.frozen: found['bench']['frozen'] = bench_frozen()
    if args.index: found['bench'][f'index-{args.index}'] = bench_index(args.index)
    if args.frozen or args.index: print(json.dumps(found['bench'], indent=1)); return save()
    there = {name: read_retrieval(folder_of(name)) for name in SETS if folder_of(name).exists()}
    sets = {name: data for name, data in there.items() if not args.on or name in args.on}
    if args.evaluator:
        for name, data in sets.items():
            found['evaluator'][name] = by_evaluator(data)
            print(name, found['evaluator'][name], flush=True)
            save()
        return
    for name, data in sets.items():
        if name not in found['controls']: found['controls'][name] = controls(name, data); save()
        print(name, {row: round(found['controls'][name][row]['ndcg@10'], 4) for row in ('bm25', 'base', 'whitened')}, flush=True)
    with tempfile.TemporaryDirectory() as home:
        parts = {name: halves(name, Path(home)/'sets') for name in there}
        for seed in args.seeds:
            for train in args.train or sets:
                for loss in args.losses:
                    key = f'{train}/{loss}/{seed}'
                    if set(sets) <= found['rows'].get(key, {}).keys(): continue
                    found['rows'][key] = measure(train, loss, seed, sets, parts, Path(home))
                    save()
                    print(key, {other: round(found['rows'][key][other]['ndcg@10'], 4) for other in sets}, flush=True)
        found['summary'] = summary(found, there, parts)
    save()
    for key, line in found['summary'].items(): print(key, line['verdict'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('train', nargs='*', help=f'training sets, of {", ".join(SETS)}')
    parser.add_argument('--on', nargs='*', help='sets that are measured; none named: all that are there')
    parser.add_argument('--losses', nargs='*', default=list(LOSSES))
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--evaluator', action='store_true')
    parser.add_argument('--frozen', action='store_true')
    parser.add_argument('--index', type=int, default=0)
    main(parser.parse_args())
