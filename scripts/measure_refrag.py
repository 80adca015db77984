#!/usr/bin/env python
"""Measure REFRAG's orderings on texts and questions of the world, each row over seeds; rows already there are kept.

The texts tell of four things and then of the same four again, in other words and another order (`retold_texts`): what comes later can be
read off what came before, so it matters what of a context is kept. No thing is in two texts.

Reconstruction trains the decoder too: one of 5 M parameters has not learnt anything that helps it to read a vector as text, as the paper's
7 B may have. The row `start` has the paper's frozen decoder beside it. All rows have full length but those of the row `curriculum`. For
questions decoder and encoder begin anew, from the reader, on questions in ever new names (`drag_lib.questions`): trained on the world's own
few, they learn the answers by heart. They begin with text, and ever less of it stands as tokens: drawn at random, then, in a second run
on other questions, those chunks that have rare tokens in common with the question.

    .venv/bin/python scripts/measure_refrag.py                       all rows, seeds 0 1 2: a few hours on one core
    .venv/bin/python scripts/measure_refrag.py curriculum --seeds 0  one row, one seed
    .venv/bin/python scripts/measure_refrag.py --help                the rows and the settings

Writes figures/bench/refrag.json. Runs are kept in checkpoints/measure-refrag-…: what was interrupted goes on where it was.
"""
import argparse
import json
import sys
import time

from drag_lib.files import write_json, write_jsonl
from drag_lib.llm import load_llm
from drag_lib.questions import write_new_questions
from drag_lib.records import read_reading
from drag_lib.refrag.encoder import ChunkEncoder
from drag_lib.refrag.model import Refrag, expand, n_chunks
from drag_lib.refrag.train import (SELECTORS, RefragConfig, answer_questions, choose_chunks, evaluate_refrag, load_refrag, question_prompts,
                                   train_refrag)
from drag_lib.runs import device_name, git_state, load_run, project_folder
from drag_lib.world import retold_texts

NAME = 'measure-refrag'
WORLD, RETOLD, NEW = 'data/world/reading/{}.jsonl.gz', 'data/retold/texts.jsonl.gz', 'data/new-questions/{}-{}.jsonl.gz'
ORDERS = ('stages', 'shuffled', 'longest')
ROWS = {'curriculum': 'reconstruction with the curriculum, with its rows in random order, and with rows of full length, at equal updates',
        'start': 'CPT from reconstruction, from one whose decoder was frozen, and from a new encoder, at equal updates',
        'text': 'perplexity of held-out text after CPT: REFRAG-k, full, last s/k tokens, none',
        'tokens': 'perplexity after as many updates on plain tokens: full, last s/k tokens, none',
        'questions': 'F1 on 4 passages after each run: as vectors, with overlapping chunks as tokens, as text',
        'dev questions': 'the same of the world’s dev questions: nothing was chosen by these',
        'new questions': 'the same after the second run, of questions drawn as those of training, with new passages',
        'choices': 'questions at equal rate after the first run, whose decoder has met no choice but random ones',
        'policy': 'questions at equal rate: policy, overlap, attention, perplexity, similarity, first, last, random',
        'cheap policy': 'the same with a policy that is shown the overlap, but not the attention',
        'blind policy': 'the same with a policy that is shown vectors and question alone, as the paper’s'}
SHOWN = {'policy': ('attention', 'overlap'), 'cheap policy': ('overlap',), 'blind policy': ()}
ASKED = ('questions', 'dev questions', 'new questions', 'choices', *SHOWN)
READ = ('vectors', 'overlap', 'full')
OF_QUESTIONS = ('question_groups', 'policy_updates', 'expand', 'limit')
OF_TEXTS = ('texts', 'n_context', 'n_next', 'batch_size', 'pretrain_updates', 'reconstruct_updates', 'cpt_updates', 'learning_rate',
            'encoder_rate', 'start', 'limit')


class Measurement:
    """One seed and one k; every stage is a run, trained once."""
    def __init__(self, args, seed: int, k: int):
        self.args, self.seed, self.k, self.name = args, seed, k, f'{args.name}-s{seed}'
        self.common = dict(texts=args.texts, questions=WORLD.format('train'), seed=seed, n_context=args.n_context, n_next=args.n_next,
                           batch_size=args.batch_size, val_rows=64, log_every=10, optimizer='muon', learning_rate=args.learning_rate,
                           encoder_rate=args.encoder_rate, order='longest')

    def train(self, name: str, stage: str, start: str | None = None, **changes) -> str:
        name = f'{self.name}-{name}' + ('' if stage == 'pretrain' else f'-k{self.k}')
        began = time.monotonic()
        updates = vars(self.args).get(f'{stage}_updates', 1)  # instruct has one for each eight groups
        settings = self.common | dict(k=8 if stage == 'pretrain' else self.k, updates=updates, eval_every=max(updates//5, 1))
        train_refrag(RefragConfig(**settings | changes, stage=stage, start=start), run=name, resume=True)
        print(f'{name}: {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)
        return name

    def decoder(self):  # None: the reader as it comes
        return self.args.start or (self.train('decoder', 'pretrain') if self.args.pretrain_updates else None)

    def reconstruct(self, order='longest', trainable='all'):
        return self.train(f'rec-{order}-{trainable}', 'reconstruct', self.decoder(), order=order, trainable=trainable)

    def cpt(self, start: str = 'reconstruction'):
        begin = {'reconstruction': self.reconstruct, 'frozen decoder': lambda: self.reconstruct(trainable='frozen'),
                 'new encoder': self.decoder}[start]
        return self.train(f'cpt-{start.replace(" ", "-")}', 'cpt', begin())

    def tokens(self):
        updates = self.args.reconstruct_updates + self.args.cpt_updates
        return self.train(f'tokens-k{self.k}', 'pretrain', self.decoder(), k=self.k, updates=updates, eval_every=updates//5)

    def instruct(self, n: int = 2) -> str:
        "The n-th run on questions, of two; each has questions of its own, which `new_questions` makes."
        changes, rate = {
            1: (dict(val_share=.005, eval_every=400, expand=.12, expand_start=1., reconstruct_share=.35, text_share=.15), 2e-3),
            2: (dict(val_share=.008, val_rows=128, eval_every=500, warmup=.05, expand_by='overlap', expand=.12, expand_start=.3,
                     reconstruct_share=.1, text_share=.15), 1e-3)}[n]
        return self.train(f'questions-{n}', 'instruct', self.instruct(1) if n == 2 else None, **self.new_questions(n), **changes,
                          batch_size=8, learning_rate=rate, encoder_rate=rate, precision='bf16')

    def new_questions(self, n: int) -> dict:
        path = NEW.format(self.args.question_groups, n)
        if not (project_folder()/path).exists():
            write_new_questions(WORLD.format('train'), project_folder()/path, n=self.args.question_groups, seed=n - 1)
        return dict(questions=path, boundaries='sentences')

    def policy(self, row: str):
        shown = SHOWN[row]
        return self.train(row.replace(' ', '-'), 'policy', self.instruct(), **self.new_questions(2), val_share=.008,
                          policy_attention='attention' in shown, policy_overlap='overlap' in shown, expand=self.args.expand,
                          updates=self.args.policy_updates, batch_size=16, eval_every=2*max(self.args.policy_updates//8, 1),
                          optimizer='adamw', learning_rate=5e-4)

    def measure(self, row: str) -> dict:
        if row == 'curriculum': return {order: self.figures(self.reconstruct(order)) for order in ORDERS}
        if row == 'start': return {start: self.figures(self.cpt(start)) for start in ('reconstruction', 'frozen decoder', 'new encoder')}
        if row == 'text': return evaluate_refrag(self.cpt(), limit=self.args.limit, controls=True)
        if row == 'tokens': return evaluate_refrag(self.tokens(), limit=self.args.limit, controls=True)
        if row == 'questions': return self.reading(WORLD.format('test'))
        if row == 'dev questions': return self.reading(WORLD.format('dev'))
        if row == 'new questions': return self.reading(self.new_questions(3)['questions'], [2])
        if row == 'choices': return self.reading(WORLD.format('test'), [1], ['vectors', *SELECTORS[:-1], 'full'])  # no policy yet
        return evaluate_refrag(self.policy(row), WORLD.format('test'), limit=self.args.limit, controls=row == 'policy')

    def reading(self, questions: str, runs=(1, 2), names=READ) -> dict:
        "What the reader as it comes makes of the text, and what is read after each run on questions."
        records = read_reading(project_folder()/questions)[:self.args.limit]

        def answers(row: str, model: Refrag, config: RefragConfig, name: str = 'full') -> dict:
            prompts, _ = question_prompts(config, model.llm.tokenizer, records)
            if name == 'vectors': chosen = [set()]*len(prompts)
            elif name == 'full': chosen = [{*range(n_chunks(prompt))} for prompt in prompts]
            else: chosen = choose_chunks(model, name, prompts, self.args.expand, questions=[r.question for r in records], seed=self.seed)
            metrics, _ = answer_questions(model, expand(prompts, chosen), records, config, progress=row)
            return {f'{row}/{metric}': value for metric, value in metrics.items()}

        llm = load_llm('reader-tiny')
        found = answers('reader', Refrag(llm, ChunkEncoder(llm, 'identity'), 1).eval(), RefragConfig(stage='instruct', k=1, seed=self.seed))
        for n in runs:
            model, _, config = load_refrag(self.instruct(n))
            for name in names: found |= answers(f'run {n}/{name}', model, config, name)
        return found

    def figures(self, run: str) -> dict:
        r = load_run(run)
        curve = [[line['step'], line['val/loss']] for line in r.read_log() if 'val/loss' in line]
        return {'loss': r.metrics['loss'], 'updates': r.metrics['updates'], 'seconds': r.manifest['seconds'], 'curve': curve}


def main(args):
    path = project_folder()/'figures/bench/refrag.json'
    found = json.loads(path.read_text()) if path.exists() else {'rows': {}}
    if RETOLD in args.texts and not (project_folder()/RETOLD).exists():
        write_jsonl(project_folder()/RETOLD, [{'text': text} for text in retold_texts()])
    for row in args.rows or ROWS:
        settings = {k: v for k, v in vars(args).items() if k in (OF_QUESTIONS if row in ASKED else OF_TEXTS) and v is not None}
        for k in args.ks if row == 'text' else args.ks[:1]:
            for seed in args.seeds:
                key = f'{row} k={k} seed={seed}' + ('' if args.name == NAME else f' {args.name}')
                if found['rows'].get(key, {}).get('settings') == settings: continue
                metrics = Measurement(args, seed, k).measure(row)
                found['rows'][key] = {'about': ROWS[row], 'settings': settings, 'git': git_state(), 'metrics': metrics}
                about = 'world: texts of things told twice, reading questions; other texts are named in the settings'
                write_json(path, found | {'data': about, 'device': device_name()})
                print(key, json.dumps({m: round(v, 4) for m, v in metrics.items() if isinstance(v, float)} or metrics)[:600], flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__ + '\nRows:\n' + '\n'.join(f'  {k:<12} {v}' for k, v in ROWS.items()),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', metavar='ROW', help='rows to measure; none: all')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--ks', nargs='+', type=int, default=[8, 16, 32], help='tokens of a chunk: all for the row text, else the first')
    parser.add_argument('--name', default=NAME, help='of the runs; another one for other settings: it then stands in the rows’ names, too')
    parser.add_argument('--texts', nargs='+', default=[RETOLD])
    parser.add_argument('--n-context', type=int, default=128)
    parser.add_argument('--n-next', type=int, default=32)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--pretrain-updates', type=int, default=0, help='of the decoder on plain texts; 0: reader-tiny as it is')
    parser.add_argument('--start', help='a finished run of such a decoder, e.g. another measurement’s NAME-s0-decoder: none is trained')
    parser.add_argument('--reconstruct-updates', type=int, default=300)
    parser.add_argument('--cpt-updates', type=int, default=400)
    parser.add_argument('--question-groups', type=int, default=16_000, help='of up to four questions in new names, for each of two runs')
    parser.add_argument('--policy-updates', type=int, default=240)
    parser.add_argument('--expand', type=float, default=.07, help='share of the chunks that the policy gives back as tokens')
    parser.add_argument('--learning-rate', type=float, default=1e-3, help='of the decoder, where it is trained')
    parser.add_argument('--encoder-rate', type=float, default=3e-3)
    parser.add_argument('--limit', type=int, default=200, help='rows of text, and questions')
    args = parser.parse_args()
    if unknown := set(args.rows) - ROWS.keys(): parser.error(f'no row {min(unknown)!r}: {", ".join(ROWS)}')
    main(args)
