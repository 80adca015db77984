"D-RAG's phase 1 in processes of its own: killed and resumed, under torchrun, its mistakes, its evaluation."
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from common import Job, log_of, one_error, question, read, same_end, write

TRAIN = '--dim 16 --n-layers 2 --batch-size 8 --epochs 6 --eval-every 3 --log-every 1 --dropout 0.2 --learning-rate 0.01'


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "A project folder with a small data set and its mistakes."
    home, rng = tmp_path_factory.mktemp('home'), random.Random(0)
    train, val = [question(rng, i) for i in range(40)], [question(rng, i) for i in range(100, 116)]
    write(home/'train.jsonl', train)
    write(home/'val.jsonl', val)
    write(home/'bad.jsonl', [*train[:2], {**train[2], 'graph': [train[2]['graph'][0], ['only', 'two']]}, *train[3:]])
    write(home/'badval.jsonl', [*val[:3], '{"id": ', *val[3:]])
    write(home/'far.jsonl', [{**row, 'a_entity': ['nowhere'], 'paths': None} for row in train])
    write(home/'topicless.jsonl', [{**row, 'q_entity': [], 'paths': None} for row in val])
    os.environ.update(DRAG_HOME=str(home), DRAG_CACHE=str(home/'cache'))
    return home


@pytest.fixture(scope='session')
def reference(home):
    "An uninterrupted run by the real command: (its name, its metrics, the seconds that it takes)."
    words = f'train drag-phase1 --train train.jsonl --val val.jsonl {TRAIN} --run whole --json'.split()
    done = subprocess.run([sys.executable, '-m', 'drag_lib.cli', *words], cwd=home, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics == read(home, 'whole', 'metrics.json') and metrics['updates'] == 30 and metrics['n_trained_items'] == 240
    assert metrics['without_gradient'] == 0 and metrics['failed'] == 0 and metrics['n'] == 16
    return 'whole', metrics, read(home, 'whole', 'manifest.json')['seconds']


def at_a_moment(rng, home, run, seconds):
    "Wait a random part of the time that an uninterrupted run takes."
    time.sleep(rng.uniform(0, seconds))


def in_the_log(rng, home, run, seconds):
    "Wait until a random number of further lines is logged and there is a checkpoint, and a little more."
    places = home/'checkpoints'/run/'training'
    log, count = home/'checkpoints'/run/'log.jsonl', lambda: log.read_bytes().count(b'\n') if log.exists() else 0
    wanted, until = count() + rng.randint(3, 9), time.monotonic() + 60
    while (count() < wanted or not any(places.glob('checkpoint-*'))) and time.monotonic() < until: time.sleep(.002)
    time.sleep(rng.uniform(0, .05))


def in_a_checkpoint(rng, home, run, seconds):
    "Wait until a checkpoint is being written."
    draft, until = home/'checkpoints'/run/'training'/'.draft', time.monotonic() + 60
    started = lambda: draft.exists() and any(draft.iterdir())
    for _ in range(rng.randint(1, 3)):
        while started() and time.monotonic() < until: time.sleep(.0005)
        while not started() and time.monotonic() < until: time.sleep(.0005)


def after_the_last_update(rng, home, run, seconds):
    "Wait until only the plots and the metrics are missing."
    last, until = home/'checkpoints'/run/'last.safetensors', time.monotonic() + 60
    while not last.exists() and time.monotonic() < until: time.sleep(.002)
    time.sleep(rng.uniform(0, .2))


@pytest.mark.parametrize('waits', [(at_a_moment,)*3, (in_the_log, in_a_checkpoint, after_the_last_update)], ids=['by_time', 'by_progress'])
def test_killed_three_times_ends_in_the_same_weights(home, reference, waits):
    name, _, seconds = reference
    rng, run = random.Random(len(set(waits))), f'killed-{len(set(waits))}'
    folder, kills, interrupted = home/'checkpoints'/run, 0, 0
    line = f'train drag-phase1 --train train.jsonl --val val.jsonl {TRAIN} --run {run} --resume'
    for _ in range(12):
        if kills == 3: break
        job = Job(home, line)
        waits[kills](rng, home, run, seconds)
        if job.process.is_alive() and job.kill():
            kills += 1
            interrupted += any((folder/'training').glob('checkpoint-*'))
        else:  # too late: what has ended is compared, and another moment chosen
            assert job.code() == 0, job.err
            same_end(home, run, name)
            shutil.rmtree(folder)
    assert kills == 3 and (interrupted or waits[0] is at_a_moment)
    before = read(home, run, 'manifest.json') if (folder/'manifest.json').exists() else {'resumes': -1}
    job = Job(home, line)
    assert job.code() == 0, job.err
    same_end(home, run, name)
    assert read(home, run, 'manifest.json')['resumes'] == before['resumes'] + 1
    if waits[-1] is after_the_last_update: assert 'resuming at update 30' in job.err and kills == interrupted


def test_a_finished_run_is_resumed_without_training(home, reference, drag):
    name, metrics, _ = reference
    began = time.monotonic()
    code, out, err = drag(f'train drag-phase1 --run {name} --resume --json')
    assert (code, json.loads(out)) == (0, metrics), err
    code, out, err = drag(f'train drag-phase1 --run {name} --resume --epochs 9')
    assert (code, out) == (1, '')
    one_error(err, 'epochs (was 6, now 9)')
    assert time.monotonic() - began < 20


@pytest.fixture(scope='session')
def two_processes(home):
    "The same training in two processes and in one, without dropout. The `--` keeps torchrun from reading `--run` as its own `--run-path`."
    line = f'train drag-phase1 --train train.jsonl --val val.jsonl {TRAIN.replace("0.2", "0")} --json'
    single = Job(home, f'{line} --run one')
    words = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2 -m drag_lib.cli --'.split(), *line.split()]
    double = subprocess.run([*words, '--run', 'two'], cwd=home, capture_output=True, text=True, timeout=100)
    assert single.code() == 0, single.err
    assert double.returncode == 0, double.stderr
    return single, double


def test_two_processes_train_as_one(home, two_processes):
    single, double = two_processes
    one, two = json.loads(single.out), json.loads(double.stdout)  # one object: printed once
    assert read(home, 'one', 'manifest.json')['world_size'] == 1 and read(home, 'two', 'manifest.json')['world_size'] == 2
    assert sum(line.startswith('run two:') for line in double.stderr.splitlines()) == 1 and 'Traceback' not in double.stderr
    losses = [[row['loss'] for row in log_of(home, run) if 'loss' in row] for run in ('one', 'two')]
    assert len(losses[0]) == 30 and losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert two == read(home, 'two', 'metrics.json') and two.keys() == one.keys()
    assert two == pytest.approx(one, abs=1e-3)
    assert two['n_trained_items'] == 240


@pytest.mark.parametrize('words, code, parts', [
    ('--val nowhere.jsonl', 1, ['nowhere.jsonl']),
    ('--train nowhere.jsonl', 1, ['nowhere.jsonl']),
    ('--learnig-rate 0.1', 2, ["'learning_rate'"]),
    ('--dropout 1.5', 2, ['dropout']),
    ('--top-k 0', 2, ['top_k']),
    ('--threshold -0.1', 2, ['threshold']),
    ('--epochs 0', 2, ['epochs']),
    ('--batch-size 8 --micro-batch-size 3', 1, ['batch_size 8', 'micro_batch_size 3']),
    ('--train bad.jsonl', 1, ['bad.jsonl:3: graph.1: expected [head, relation, tail], got 2 items']),
    ('--val badval.jsonl', 1, ['badval.jsonl:4: invalid JSON']),
    ('--train far.jsonl', 1, ['far.jsonl', 'no question has labels']),
    ('--train topicless.jsonl', 1, ['topicless.jsonl', 'no question has labels']),
    ('--val topicless.jsonl', 1, ['topicless.jsonl', 'labels']),
    ('--encoder nobody/nothing', 1, ['nobody/nothing']),
])
def test_mistakes(home, drag, words, code, parts):
    run = 'mistake-' + ''.join(c if c.isalnum() else '-' for c in words)
    defaults = {'--train': 'train.jsonl', '--val': 'val.jsonl', '--dim': 16, '--epochs': 1, '--run': run}
    line = 'train drag-phase1 ' + words + ''.join(f' {k} {v}' for k, v in defaults.items() if k not in words.split())
    got, out, err = drag(line)
    assert (got, out) == (code, ''), err
    one_error(err, *parts)
    folder = home/'checkpoints'/run
    assert not (folder/'metrics.json').exists() and not list(folder.glob('*.safetensors'))
    assert not folder.exists() or read(home, run, 'manifest.json')['status'] == 'failed'


def test_malformed_records_are_counted(home, drag):
    words = '--train bad.jsonl --val badval.jsonl --dim 16 --epochs 1 --skip-bad --run skipping --json'
    code, out, err = drag(f'train drag-phase1 {words}')
    assert code == 0, err
    metrics = json.loads(out)
    assert (metrics['n_train'], metrics['n_train_malformed'], metrics['n'], metrics['failed']) == (39, 1, 17, 1)
    assert metrics['answer_recall@100'] == pytest.approx(16/17)  # 15 facts: all that are not malformed


@pytest.mark.parametrize('words', ['--learning-rate 1e30 --max-grad-norm 1e30', '--learning-rate 1e30'])
def test_not_finite_stops(home, drag, words):
    run = f'nan-{len(words)}'
    code, out, err = drag(f'train drag-phase1 --train train.jsonl --val val.jsonl --dim 16 --epochs 3 --warmup 0 {words} --run {run}')
    assert (code, out) == (1, ''), err
    one_error(err, 'update ')
    assert any(word in err.splitlines()[-1] for word in ('non-finite tensor: ', 'gradient not finite: ')), err
    manifest = read(home, run, 'manifest.json')
    assert manifest['status'] == 'failed' and 'update ' in manifest['reason'] and not (home/'checkpoints'/run/'metrics.json').exists()


KEYS = ('n failed answer_recall@1 answer_recall@5 answer_recall@10 answer_recall@50 answer_recall@100 path_recall@10 path_recall@50 '
        'fact_precision fact_recall fact_f1 ece').split()


def test_eval(home, reference, drag):
    name, metrics, _ = reference
    code, out, err = drag(f'eval {name} --data val.jsonl --json --controls --predictions out/facts.jsonl')
    assert code == 0, err
    got = json.loads(out)
    assert all(isinstance(got[k], int | float) for k in KEYS) and not any(isinstance(v, dict | list) for v in got.values())
    same = [k for k in KEYS if k != 'ece']  # that of training is cross-fitted: no question is measured by its own temperature
    assert {k: got[k] for k in same} == pytest.approx({k: metrics[k] for k in same})
    for control in ('untrained', 'cosine'):
        assert all(0 <= got[f'{control}/{k}'] <= 1 for k in KEYS if 'recall@' in k)
    assert got['map'] > got['untrained/map'] and 0 < got['cosine/map'] <= 1
    rows = [json.loads(line) for line in (home/'out'/'facts.jsonl').read_text().splitlines()]
    records = [json.loads(line) for line in (home/'val.jsonl').read_text().splitlines()]
    assert [row['id'] for row in rows] == [record['id'] for record in records]
    for row, record in zip(rows, records):
        assert row['question'] == record['question'] and row['facts']
        assert all(fact[:3] in record['graph'] and 0 <= fact[3] <= 1 for fact in row['facts'])
        assert [fact[3] for fact in row['facts']] == sorted((fact[3] for fact in row['facts']), reverse=True)
    table = drag(f'eval {name} --data val.jsonl')[1]
    assert set(KEYS) <= {line.split()[0] for line in table.splitlines()}


def test_eval_mistakes(home, reference, drag):
    name = reference[0]
    folder = home/'checkpoints'/'unfinished'
    folder.mkdir()
    manifest = read(home, name, 'manifest.json') | {'name': 'unfinished', 'status': 'running'}
    (folder/'manifest.json').write_text(json.dumps(manifest))
    for line, part in [('unfinished --data val.jsonl', "run 'unfinished' holds no finished retriever"),
                       (f'{name} --data nowhere.jsonl', 'nowhere.jsonl'), (f'{name} --data badval.jsonl', 'badval.jsonl:4'),
                       ('whloe --data val.jsonl', "'whole'")]:
        code, out, err = drag(f'eval {line} --predictions out/none.jsonl')
        assert (code, out) == (1, ''), err
        one_error(err, part)
    assert not (home/'out'/'none.jsonl').exists()
    skipping = json.loads(drag(f'eval {name} --data badval.jsonl --skip-bad --json')[1])
    assert (skipping['n'], skipping['failed']) == (17, 1)
    code, out, err = drag(f'eval {name} --data topicless.jsonl --json')
    assert code == 0 and json.loads(out)['n'] == 16, err
    shutil.rmtree(folder)


def test_runs_and_compare(home, two_processes, drag):
    listed = json.loads(drag('runs --json')[1])
    assert listed['one/status'] == listed['two/status'] == 'done' and listed['two/method'] == 'drag-phase1'
    assert listed['two/answer_recall@10'] == read(home, 'two', 'metrics.json')['answer_recall@10']
    table = drag('runs')[1]
    assert 'answer_recall@10' in table and sum(line.split()[0] in ('one', 'two') for line in table.splitlines()) == 2
    compared = json.loads(drag('compare one two --json')[1])
    assert compared['one/fact_f1'] == pytest.approx(compared['two/fact_f1'], abs=1e-3) and 'one/config/epochs' not in compared
    assert 'fact_f1' in drag('compare one two --key fact_f1')[1]
