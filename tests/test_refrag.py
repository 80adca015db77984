"REFRAG from the command line: every stage from the one before, killed and resumed; every option and its mistakes."
import json
import os
import random
import shutil
import subprocess
import sys
import time
import typing

import pytest
from common import NAMES, Job, log_of, one_error, read, reading, same_end, small_llama, write

SMALL = {'texts': 'text.jsonl', 'questions': 'train.jsonl', 'k': 4, 'n-context': 16, 'n-next': 6, 'updates': 12, 'batch-size': 2,
         'val-rows': 3, 'eval-every': 4, 'log-every': 1, 'n-passages': 2, 'max-new-tokens': 3, 'learning-rate': .01}


def train(stage, words='', **changed):
    given = SMALL | {'stage': stage} | {k.replace('_', '-'): v for k, v in changed.items()}
    return f'train refrag {words} --json ' + ' '.join(f'--{k} {v}' for k, v in given.items())


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    home, rng = tmp_path_factory.mktemp('home'), random.Random(0)
    write(home/'text.jsonl', [{'text': ' '.join(rng.choices(NAMES, k=30))} for _ in range(8)])
    write(home/'other.jsonl', [{'text': ' '.join(rng.choices(NAMES[:2], k=30))} for _ in range(8)])
    write(home/'train.jsonl', [reading(rng, i) for i in range(20)])
    write(home/'others.jsonl', [reading(rng, i) for i in range(40, 60)])
    write(home/'bad.jsonl', [reading(rng, 60), reading(rng, 61) | {'context': []}])
    small_llama(home/'llama')
    return home


@pytest.fixture(scope='session')
def whole(home):
    "An uninterrupted reconstruction in a process of its own: its metrics."
    job = Job(home, train('reconstruct', run='whole', llm='llama'))
    assert job.code() == 0, job.err
    return json.loads(job.out)


def test_training(home, whole):
    assert whole == read(home, 'whole', 'metrics.json') and not any(isinstance(v, dict | list) for v in whole.values())
    assert (whole['updates'], whole['without_gradient'], whole['n_texts']) == (12, 0, 8)
    log = log_of(home, 'whole')
    assert [row['step'] for row in log if 'val/loss' in row] == [4, 8, 12]
    assert all({'first', 'last', 'accuracy'} <= row.keys() for row in log if 'loss' in row)
    assert (home/'figures'/'whole'/'training.png').exists()


def test_killed_ends_in_the_same_weights(home, whole):
    line, folder = train('reconstruct', '--resume', run='killed', llm='llama'), home/'checkpoints'/'killed'/'training'
    job, until = Job(home, line), time.monotonic() + 200
    while not [*folder.glob('**/checkpoint-*')] and job.process.is_alive() and time.monotonic() < until: time.sleep(.005)
    assert job.process.is_alive() and job.kill(), job.err
    job = Job(home, line)
    assert job.code() == 0, job.err
    same_end(home, 'killed', 'whole', ['model.safetensors', 'last.safetensors', 'encoder/chunk_encoder.safetensors'])
    assert read(home, 'killed', 'manifest.json')['resumes'] == 1


def test_a_killed_policy_ends_in_the_same_weights(home, whole, drag):
    "Two updates share their choices: a checkpoint stands between such pairs."
    line = train('policy', '--resume', run='killed-policy', start='whole', expand=.3, updates=60, group=3)
    code, out, err = drag(line.replace('killed-policy', 'whole-policy'))
    assert code == 0, err
    folder, job, until = home/'checkpoints'/'killed-policy'/'training', Job(home, line), time.monotonic() + 200
    while not [*folder.glob('**/checkpoint-*')] and job.process.is_alive() and time.monotonic() < until: time.sleep(.005)
    assert job.process.is_alive() and job.kill(), job.err
    code, out, err = drag(line)
    assert code == 0 and read(home, 'killed-policy', 'manifest.json')['resumes'] == 1, err
    same_end(home, 'killed-policy', 'whole-policy', ['model.safetensors', 'last.safetensors', 'policy.safetensors'])
    code, out, err = drag(train('policy', run='odd', start='whole', expand=.3, passes=3))
    assert (code, out) == (1, '') and not (home/'checkpoints'/'odd').exists()
    one_error(err, 'eval_every = 4', 'multiple of passes, 3')


def test_two_processes(home, whole, drag):
    "The `--` keeps torchrun from reading `--run` as its own `--run-path`."
    words = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2 -m drag_lib.cli --'.split()]
    env = {**os.environ, 'DRAG_HOME': str(home), 'DRAG_CACHE': str(home/'cache')}
    for line in (train('reconstruct', run='two', llm='llama'),
                 train('instruct', run='two-instruct', start='two', text_share=.5, reconstruct_share=.3, expand=.3, expand_by='overlap'),
                 train('policy', run='two-policy', start='two-instruct', expand=.3, updates=4, policy_attention=True, policy_overlap=True)):
        done = subprocess.run([*words, *line.split()], cwd=home, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    losses = [[row['loss'] for row in log_of(home, run) if 'loss' in row] for run in ('whole', 'two')]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[0]) == 12
    assert read(home, 'two', 'manifest.json')['world_size'] == 2
    assert read(home, 'two-instruct', 'metrics.json')['without_gradient'] == 0
    assert all(read(home, run, 'metrics.json')['updates'] == n for run, n in (('two-instruct', 9), ('two-policy', 4)))


def test_the_stages_after_it(home, whole, drag):
    for stage, start, changed in (('cpt', 'whole', {}), ('instruct', 'cpt', {}), ('policy', 'instruct', {'expand': .3, 'updates': 2})):
        code, out, err = drag(train(stage, run=stage, start=start, **changed))
        assert code == 0, err
    code, out, err = drag('eval cpt --data other.jsonl --controls --json')
    assert code == 0, err
    found = json.loads(out)
    assert found['rate'] > 2 and {'full/perplexity', 'last/perplexity', 'none/perplexity'} <= found.keys()
    code, out, err = drag('eval policy --data others.jsonl --controls --predictions said.jsonl --json')
    assert code == 0, err
    assert {'full/squad/f1', 'vectors/squad/f1', 'expand_random/squad/f1', 'expand_perplexity/squad/f1'} <= json.loads(out).keys()
    assert len((home/'said.jsonl').read_text().splitlines()) == 20
    code, out, err = drag('eval policy --data bad.jsonl --json')
    assert code == 1 and out == ''
    one_error(err, 'bad.jsonl:2', 'context')
    code, out, err = drag('diagnose whole --json')
    assert 'vectors.png' in {p.name for p in (home/'figures'/'whole').iterdir()}, err


def test_an_inf_in_the_projector_is_no_bad_figure(home, whole, drag):
    from safetensors.torch import load_file, save_file
    shutil.copytree(home/'checkpoints'/'whole', folder := home/'checkpoints'/'broken')
    (folder/'refrag.json').write_text((folder/'refrag.json').read_text().replace('"encoder": "whole"', '"encoder": "broken"'))
    weights = load_file(file := folder/'encoder'/'chunk_encoder.safetensors')
    name = next(name for name in weights if 'projector' in name and name.endswith('bias'))
    weights[name][0] = float('inf')
    save_file(weights, file)
    code, out, err = drag('eval broken --data other.jsonl --json')
    assert (code, out) == (1, '')
    one_error(err, 'chunk vectors are not finite', f'parameter {name}')


def test_ask_a_corpus(home, whole, drag):
    code, out, err = drag(train('instruct', run='answers', start='whole', updates=2))
    assert code == 0, err
    code, out, err = drag('refrag index others.jsonl --out index --kind hnsw --json')
    assert code == 0 and json.loads(out)['n_passages'] > 9, err
    asked = json.loads((home/'others.jsonl').read_text().splitlines()[0])['question']
    found = [json.loads(drag(['ask', 'answers', asked, '--index', 'index', '--json'])[1]) for _ in range(2)]
    assert found[0].pop('vectors_computed') > found[1].pop('vectors_computed') == 0 and found[0] == found[1]
    assert len(found[0]['passages']) == 2 and isinstance(found[0]['answer'], list) and found[0]['positions'] < found[0]['positions_as_text']
    found = [json.loads(drag('refrag encode answers --index index --json')[1]) for _ in range(2)]
    assert found[0]['n_computed'] > found[1]['n_computed'] == 0
    code, out, err = drag(['ask', 'answers', asked, '--index', 'index', '--n-passages', '3'])
    assert code == 0 and len(out.splitlines()) == 4, err
    for words, code, parts in ((['ask', 'answers', asked], 2, ['--index']), (['ask', 'answers', asked, '--graph', 'g.csv'], 2, ['--index']),
                               (['ask', 'answers', asked, '--index', 'index', '--budget', '9'], 2, ['budget']),
                               (['ask', 'whole', asked, '--index', 'index'], 1, ['reconstruct']),
                               (['ask', 'answers', asked, '--index', 'none'], 1, ['not a passage index']),
                               ('refrag encode answers --index none'.split(), 1, ['not a passage index']),
                               ('refrag index text.jsonl --out index2 --kind tree'.split(), 1, ['tree'])):
        got, out, err = drag(words)
        assert (got, out) == (code, ''), err
        one_error(err, *parts)


def test_gradient_checkpointing_computes_layers_again(home, whole, monkeypatch):
    import torch
    from drag_lib.refrag.model import cut
    from drag_lib.refrag.train import RefragConfig, build_refrag
    monkeypatch.setenv('DRAG_HOME', str(home))
    monkeypatch.chdir(home)
    found = []
    for on in (False, True):
        model, _ = build_refrag(RefragConfig(stage='cpt', start='whole', k=4, n_context=16, gradient_checkpointing=on))
        calls, row = [], list(range(5, 21))
        model.train().lm.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        loss = model([[cut(row, 4)]], [row])['loss']
        loss.backward()
        found.append((len(calls), loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (once, loss, gradients), (twice, same, others) = found
    assert (once, twice) == (1, 2) and same == pytest.approx(loss, abs=1e-6) and gradients.keys() == others.keys()
    assert all(torch.allclose(gradients[n], others[n], atol=1e-6) for n in gradients)


def test_budget(drag):
    code, out, err = drag('refrag budget --llm llama-3-8b --context 16384 --k 16 --json')
    assert code == 0 and any('speedup' in key for key in json.loads(out)), err
    code, out, err = drag('refrag budget --llm no-such-model')
    assert code and out == ''
    one_error(err, 'no-such-model')


def test_new_questions(home, whole, drag):
    write(home/'golden.jsonl', [{'id': f'g{i}', 'question': f'What is the capital of {a}?', 'answers': [b], 'gold': [0],
                                 'context': [f'The country of {a} is big. Its capital is {b}.', f'The city of {c} is old.']}
                                for i, (a, b, c) in enumerate(zip(NAMES, NAMES[1:], NAMES[2:]))])
    code, out, err = drag('data questions golden.jsonl --out new.jsonl.gz --n 12 --n-asked 2 --invented 0.5 --json')
    assert code == 0, err
    assert json.loads(out)['groups'] == 12 < json.loads(out)['questions'] <= 24
    code, out, err = drag(train('instruct', run='gradual', start='whole', questions='new.jsonl.gz', expand_start=1., text_share=.2,
                                reconstruct_share=.5, boundaries='sentences'))
    assert code == 0 and json.loads(out)['n_questions'] > json.loads(out)['updates'], err  # a group is an item
    code, out, err = drag('data questions bad.jsonl --out none.jsonl.gz --n 3')
    assert code == 1 and out == '' and not (home/'none.jsonl.gz').exists()
    one_error(err, 'bad.jsonl:2', 'context')
    write(home/'plain.jsonl', [{'id': 'p', 'question': 'Who?', 'context': 'Someone.', 'answers': ['Someone']}])
    code, out, err = drag('data questions plain.jsonl --out none.jsonl.gz --n 3')
    assert code == 1 and not (home/'none.jsonl.gz').exists()
    one_error(err, 'no record has `gold`')


CHANGES = {'reconstruct': {
               'encoder': 'minilm', 'pooling': 'cls', 'normalize': True, 'residual': False, 'projector_hidden': 8, 'trainable': 'all',
               'encoder_rate': 1e-4, 'k': 8, 'n_context': 32, 'order': 'shuffled', 'texts': 'other.jsonl', 'val_share': .5, 'val_rows': 1,
               'updates': 5, 'train_encoder': False, 'seed': 1},
           'cpt': {'n_next': 3, 'expand': .5, 'trainable': 'lora'},
           'instruct': {'questions': 'others.jsonl', 'n_questions': 9, 'n_passages': 1, 'question_first': False, 'max_length': 120,
                        'max_new_tokens': 1, 'boundaries': 'sentences', 'expand_start': 1., 'expand_by': 'overlap', 'text_share': .5,
                        'reconstruct_share': .5},
           'policy': {'expand': .5, 'policy_hidden': 16, 'policy_question': False, 'policy_attention': True, 'policy_overlap': True,
                      'group': 2, 'passes': 1, 'clip': .001}}
SHARED = {'instruct': {'updates': 3, 'val_share': .5, 'val_rows': 30, 'expand': .3},
          'policy': {'start': 'whole', 'expand': .3, 'updates': 4, 'learning_rate': .05}}
PAIRS = {'lora_rank': (2, {'trainable': 'lora'}), 'lora_alpha': (2, {'trainable': 'lora'})}
ELSEWHERE = {'stage', 'start', 'llm', 'gradient_checkpointing'}  # the other tests; the last changes memory and time alone


def test_every_option_changes_something(home, whole, monkeypatch):
    from dataclasses import fields
    from drag_lib.refrag.train import RefragConfig, train_refrag
    from drag_lib.runs import check_value
    from drag_lib.training import TrainConfig
    kinds = typing.get_type_hints(RefragConfig, include_extras=True)
    monkeypatch.setattr('drag_lib.refrag.train.save_figure', lambda *_, **__: None)  # fifty plots are a third of the time
    monkeypatch.setattr('drag_lib.refrag.train.plot_stage', lambda *_: None)
    monkeypatch.setenv('DRAG_HOME', str(home))
    monkeypatch.chdir(home)

    def traces(name, stage, **changed):
        given = {k.replace('-', '_'): v for k, v in SMALL.items()} | {'updates': 4, 'eval_every': None, 'llm': 'llama'} | changed
        if 'start' in given: del given['llm']
        config = RefragConfig(stage=stage, **{k: check_value(k, v if v is None else str(v), kinds[k]) for k, v in given.items()})
        return train_refrag(config, run=name), [row for row in log_of(home, name) if 'loss' in row]

    without_effect = []
    for stage, changes in CHANGES.items():
        shared = SHARED.get(stage, {})
        plain = traces(f'{stage}-plain', stage, **shared)
        assert traces(f'{stage}-again', stage, **shared) == plain
        without_effect += [name for name, value in changes.items() if traces(f'{stage}-{name}', stage, **shared | {name: value}) == plain]
    for name, (value, shared) in PAIRS.items():
        if traces(f'{name}-a', 'cpt', **shared) == traces(f'{name}-b', 'cpt', **shared | {name: value}): without_effect.append(name)
    assert without_effect == []
    own = {f.name for f in fields(RefragConfig)} - {f.name for f in fields(TrainConfig)}
    assert own - {name for changes in (*CHANGES.values(), PAIRS) for name in changes} == ELSEWHERE


def test_mistakes(home, whole, drag):
    for words, parts in ((train('reconstruct', run='x', llm='nowhere'), ('nowhere',)), (train('cpt', run='x', start='nobody'), ('nobody',)),
                         (train('reconstruct', run='x', llm='llama', n_context=24), ('n_context = 24', 'curriculum')),
                         (train('policy', run='x', llm='llama'), ('give start',)), (train('cpt', run='x', start='whole', k=8), ('k = 4',)),
                         (train('cpt', run='x', llm='llama', texts='no.jsonl'), ('no.jsonl',)),
                         (train('cpt', run='x', llm='llama', precision='fp16'), ('precision', 'fp16 overflows', 'bf16')),
                         (train('pretrain', run='x', llm='llama', n_context=9999), ('none of them',))):
        code, out, err = drag(words)
        assert code and out == '', words
        one_error(err, *parts)
