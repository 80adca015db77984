"The compressor from the command line: trained, measured, diagnosed, killed in either stage and resumed; every option and its mistakes."
import json
import os
import random
import time
import typing

import pytest
from common import Job, log_of, one_error, read, reading, same_end, small_llama, write

SMALL = {'records': 'train.jsonl', 'val': 'val.jsonl', 'llm': 'llama', 'hidden': 1, 'reconstruct-epochs': 2, 'reconstruct-minutes': 'none',
         'reconstruct-eval-every': 2, 'reconstruct-batch-size': 8, 'epochs': 2, 'minutes': 'none', 'eval-every': 2, 'batch-size': 4,
         'log-every': 1, 'random-tokens': 8, 'max-new-tokens': 4, 'n-passages': 2}


def train(words='', **changed):
    given = SMALL | {k.replace('_', '-'): v for k, v in changed.items()}
    return f'train compressor {words} --json ' + ' '.join(f'--{k} {v}' for k, v in given.items())


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    home, rng = tmp_path_factory.mktemp('home'), random.Random(0)
    write(home/'train.jsonl', [reading(rng, i) for i in range(12)])
    write(home/'val.jsonl', [reading(rng, i) for i in range(20, 25)])
    write(home/'none.jsonl', [reading(rng, i) | {'answers': []} for i in range(30, 33)])
    write(home/'bad.jsonl', [reading(rng, 40), reading(rng, 41) | {'context': []}])
    small_llama(home/'llama')
    return home


@pytest.fixture(scope='session')
def whole(home):
    "An uninterrupted run in a process of its own: its metrics."
    job = Job(home, train(run='whole'))
    assert job.code() == 0, job.err
    return json.loads(job.out)


def test_training(home, whole):
    assert whole == read(home, 'whole', 'metrics.json') and not any(isinstance(v, dict | list) for v in whole.values())
    assert (whole['n'], whole['failed'], whole['n_train'], whole['rate'], whole['n_dropped']) == (5, 0, 12, 4, 0)
    assert (whole['reconstruct/updates'], whole['generate/updates']) == (10, 6)  # 36 passages in eights and 12 records in fours, twice
    assert whole['reconstruct/without_gradient'] == whole['generate/without_gradient'] == 0
    log = log_of(home, 'whole')
    assert [row['step'] for row in log if 'val/squad/f1' in row] == [2, 4, 6]
    assert all({'cosine', 'mse', 'vocabulary'} <= row.keys() for row in log if row['stage'] == 'reconstruct' and 'loss' in row)
    assert {p.name for p in (home/'figures'/'whole').iterdir()} == {'reconstruct.png', 'generate.png', 'eos.png'}
    assert read(home, 'whole', 'manifest.json')['data'].keys() == {'records', 'val'}


def test_rows_and_diagnosis(home, whole, drag):
    code, out, err = drag('eval whole --data val.jsonl --controls --predictions said.jsonl --json')
    assert code == 0, err
    found = json.loads(out)
    for row in ('text', 'embeddings', 'pca', 'snap', 'truncated', 'reconstruct', 'generate'): assert 0 <= found[f'{row}/squad/f1'] <= 1
    assert found['embeddings/same_as_text'] == 1 and found['squad/f1'] == found['generate/squad/f1'] == whole['squad/f1']
    assert len((home/'said.jsonl').read_text().splitlines()) == 5
    code, out, err = drag('eval whole --data none.jsonl --json')
    assert code == 0 and json.loads(out)['n'] == 3, err
    code, out, err = drag('diagnose whole --json')  # a random model does not stop
    assert code == 1 and 'stop by themselves' in err
    assert {'vectors.png', 'tokens.png', 'tokens.html'} <= {p.name for p in (home/'figures'/'whole').iterdir()}


def test_killed_in_either_stage_ends_in_the_same_weights(home, whole):
    line, folder = train('--resume', run='killed'), home/'checkpoints'/'killed'/'training'
    for stage in ('reconstruct', 'generate'):
        job, until = Job(home, line), time.monotonic() + 200
        reached = lambda: any(int(p.name.split('-')[1]) >= 2 for p in (folder/stage).glob('checkpoint-*'))
        while not reached() and job.process.is_alive() and time.monotonic() < until: time.sleep(.005)
        assert job.process.is_alive() and job.kill(), job.err
    job = Job(home, line)
    assert job.code() == 0 and 'of stage generate' in job.err, job.err
    same_end(home, 'killed', 'whole', [f'{kind}-{stage}.safetensors' for kind in ('model', 'last') for stage in ('reconstruct', 'generate')]
             + [f'{stage}/compressor.safetensors' for stage in ('pca', 'reconstruct', 'generate')])
    assert read(home, 'killed', 'manifest.json')['resumes'] == 2


CHANGES = {'reconstruct': {
               'kind': 'sequence', 'rate': 8, 'hidden': 2, 'dropout': .5, 'norm': 'vocabulary', 'quantize': 'int8',
               'reconstruct_rate': 1e-4, 'reconstruct_batch_size': 4, 'cosine_weight': 2, 'mse_weight': 1, 'vocabulary_weight': 1,
               'temperature': .5, 'frequency_power': 1, 'random_tokens': 0},
           'generate': {
               'n_passages': 3, 'max_length': 150, 'answer_weight': 1, 'kl_weight': .5, 'prefix_weight': 1, 'lora_rank': 2,
               'train_limit': 8, 'learning_rate': 1e-2, 'seed': 1}}


@pytest.fixture(scope='session')
def short(home):
    "What one evaluation and few updates log, for a changed setting."
    from drag_lib.compressor.train import CompressorConfig, train_compressor
    from drag_lib.runs import check_value
    kinds = typing.get_type_hints(CompressorConfig, include_extras=True)

    def run(name, **changed):
        os.environ['DRAG_HOME'] = str(home)
        given = {k.replace('-', '_'): v for k, v in SMALL.items()} | {'reconstruct_epochs': 1, 'epochs': 1, 'llm': home/'llama'}
        given |= {'records': home/'train.jsonl', 'val': home/'val.jsonl', 'eval_every': None, 'reconstruct_eval_every': None}
        given |= {'val_limit': 2, 'max_new_tokens': 1} | changed
        config = CompressorConfig(**{k: check_value(k, v if v is None else str(v), kinds[k]) for k, v in given.items()})
        try: train_compressor(config, run=name, plots=False)
        finally: del os.environ['DRAG_HOME']
        return losses(home, name)
    return run


def losses(home, run): return [row['loss'] for row in log_of(home, run) if 'loss' in row]


def test_every_option_changes_the_training(home, short):
    for stage, changes in CHANGES.items():
        plain = short(stage, stages=stage)
        assert short(f'{stage}-again', stages=stage) == plain
        for name, value in changes.items(): assert short(f'with-{name}', stages=stage, **{name: value}) != plain, name
    one = {'stages': 'generate'}
    assert short('prefix', **one, prefix_weight=1, prefix_tokens=3) != losses(home, 'with-prefix_weight')
    assert short('lora', **one, lora_rank=2, lora_rate=1e-2) != losses(home, 'with-lora_rank')


def test_mistakes(home, drag):
    for words, parts in ((train(run='x', val='bad.jsonl'), ('bad.jsonl', 'context')), (train(run='x', rate=1000), ('rate 1000',)),
                         (train(run='x', kind='sequence', rate=2.5), ('not whole',)), (train(run='x', llm='nowhere'), ('nowhere',)),
                         (train(run='x', kl_weight=0), ('stage generate has no loss',)),
                         (train(run='x', records='no.jsonl'), ('no.jsonl',)),
                         (train(run='x', precision='fp16'), ('precision', 'fp16'))):
        code, out, err = drag(words)
        assert code and out == '', words
        one_error(err, *parts)
    code, out, err = drag(train('--skip-bad', run='skipped', val='bad.jsonl'))
    assert code == 0, err
    assert (json.loads(out)['n'], json.loads(out)['failed']) == (2, 1)
