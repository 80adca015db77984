"The command line: exit codes, one-line errors, flat JSON. In a process of its own where that matters, else through `main`."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from drag_lib import cli
from drag_lib.runs import list_runs, load_run, start_run

TINY = '''
import os, time
from dataclasses import asdict, dataclass
from drag_lib.runs import start_run

@dataclass
class TinyConfig:
    train: str  # question records
    learning_rate: float = 1e-3  # of the updates
    epochs: int = 2
    shuffle: bool = True
    seed: int = 0
    def __post_init__(self):
        if not 0 < self.learning_rate < 1: raise ValueError(f'learning_rate: must lie in (0, 1), got {self.learning_rate}')

def train_tiny(config, *, run=None, resume=False):
    with start_run(run, asdict(config), method='tiny', data={'train': config.train}, seed=config.seed, resume=resume) as run:
        print('training', run.name, flush=True)
        for step in range(config.epochs):
            run.log({'step': step})
            time.sleep(float(os.environ.get('SECONDS_A_STEP', 0)))
        return run.finish({'n': 4, 'failed': 0, 'rank': int(os.environ.get('RANK', 0)), 'answer_recall@10': 1 - config.learning_rate})

def evaluate_tiny(run, data, *, split='test', limit=None, skip_bad=False, predictions=None, controls=False):
    return {'n': len(open(data).readlines()), 'failed': 0}
'''
DRAG = '''
import sys
from drag_lib import cli
cli.TRAINERS['tiny'] = ('tiny_method', 'TinyConfig', 'train_tiny', 'as small as can be')
sys.exit(cli.main())
'''
NOTEBOOK = '''import sys, time
from drag_lib.runs import start_run
with start_run(run, {'epochs': epochs}, method='tiny-report', resume=resume) as made:
    for epoch in range(epochs):
        print(f'epoch {epoch + 1}/{epochs}', flush=True)
        time.sleep(seconds)
    made.note(executable=sys.executable)
    made.finish({'n': 1/(epochs - 1), 'failed': 0})'''


def question(i, name, country, **change):
    fact = [name, 'country', country]
    return {'id': f'q{i}', 'question': f'In which country is {name}?', 'q_entity': [name], 'a_entity': [country], 'answer': [country],
            'graph': [fact, [country, 'capital', name]], 'paths': [[fact]], **change}


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "A project folder with a tiny method, a tiny notebook and tiny data."
    home = tmp_path_factory.mktemp('home')
    (home/'tiny_method.py').write_text(TINY)
    (home/'drag.py').write_text(DRAG)
    (home/'nbs'/'runs').mkdir(parents=True)
    parameters = 'run: str | None = None\nresume = False\nepochs = 2\nseconds = 0.0'
    cells = [new_code_cell(parameters, metadata={'tags': ['parameters']}), new_code_cell(NOTEBOOK)]
    nbformat.write(new_notebook(cells=cells), home/'nbs'/'runs'/'tiny_report.ipynb')
    nbformat.write(new_notebook(cells=[new_code_cell('epochs = 2')]), home/'nbs'/'runs'/'untagged.ipynb')
    pairs = [('Bern', 'Switzerland'), ('Lyon', 'France'), ('Turin', 'Italy'), ('Antananarivo', 'Madagascar')]
    train = [question(i, *pair) for i, pair in enumerate(pairs)]
    write(home/'train.jsonl', train)
    write(home/'test.jsonl', [question(10, 'Oslo', 'Norway'), question(11, 'Quito', 'Ecuador')])
    write(home/'leak.jsonl', [question(12, 'Bern', 'Switzerland'), question(13, 'Quito', 'Ecuador')])
    write(home/'bad.jsonl', [train[0], {**train[1], 'graph': [['Lyon', 'country']]}, train[2]])
    write(home/'pred.jsonl', [{'id': '1', 'prediction': ['Paris'], 'answer': ['Paris']},
                              {'id': '2', 'prediction': 'Oslo', 'answer': ['Rome', 'Bern']}])
    write(home/'badpred.jsonl', [{'id': '1', 'prediction': 3, 'answer': ['Paris']}])
    return home


@pytest.fixture
def drag(home, capsys, monkeypatch):
    "Run a command line in this process: (exit code, stdout, stderr)."
    monkeypatch.setenv('DRAG_HOME', str(home))
    monkeypatch.delenv('DRAG_DEBUG', raising=False)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setitem(cli.TRAINERS, 'tiny', ('tiny_method', 'TinyConfig', 'train_tiny', 'as small as can be'))
    monkeypatch.setitem(cli.EVALUATORS, 'tiny', ('tiny_method', 'evaluate_tiny'))

    def run(line):
        capsys.readouterr()
        code = cli.main(line.split())
        return code, *capsys.readouterr()
    return run


def script(home, *words, **env):
    "The real console script."
    return subprocess.run([Path(sys.executable).parent/'drag', *words], cwd=home, capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'DRAG_HOME': str(home), **env})


def start(home, *words, **env):
    "A process that Ctrl-C can reach, also where the tests run in the background of a shell, which ignores it."
    env = {**os.environ, 'DRAG_HOME': str(home), **env}
    return subprocess.Popen(words, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def one_line(err, *parts):
    assert len(err.splitlines()) == 1 and err.startswith('error: ') and 'Traceback' not in err, err
    for part in parts: assert part in err, err


def test_console_script_help_is_quick(home):
    took = []
    for _ in range(3):
        began = time.monotonic()
        done = script(home, '--help')
        took.append(time.monotonic() - began)
        assert done.returncode == 0 and done.stdout.startswith('Usage: drag') and done.stderr == ''
    assert min(took) < 1, took


def test_console_script_exit_codes(home):
    wrong = script(home, 'trian')
    assert wrong.returncode == 2 and wrong.stdout == ''
    one_line(wrong.stderr, "'train'")
    failed = script(home, 'score', 'nowhere.jsonl')
    assert failed.returncode == 1
    one_line(failed.stderr, 'nowhere.jsonl')
    debug = script(home, 'score', 'nowhere.jsonl', DRAG_DEBUG='1')
    assert debug.returncode == 1 and 'Traceback' in debug.stderr and debug.stderr.splitlines()[-1].startswith('error: ')


@pytest.mark.parametrize('words', ['', 'data', 'data audit', 'data world', 'data convert', 'data split', 'train', 'train tiny', 'run',
                                   'runs', 'compare', 'eval', 'score', 'bench', 'doctor'])
def test_help_on_every_level(drag, words):
    if words == 'data world': pytest.importorskip('drag_lib.world')
    code, out, err = drag(f'{words} --help')
    assert (code, err) == (0, '') and out.startswith('Usage: drag ' + words), out


def test_help_names_the_fields(drag):
    out = drag('train tiny --help')[1]
    assert '--learning-rate' in out and 'of the updates' in out and 'default 0.001' in out
    assert 'tiny-report' in drag('run --help')[1] and 'epochs' in drag('run tiny-report --help')[1]


@pytest.mark.parametrize('line, part', [
    ('train tiny --train train.jsonl --learnig-rate 0.1', "'learning_rate'"),
    ('train tiny --train train.jsonl --epochs two', 'epochs'),
    ('train tiny --train train.jsonl --epochs 1.5', 'int'),
    ('train tiny --train train.jsonl --learning-rate nan', 'learning_rate'),
    ('train tiny --train train.jsonl --learning-rate 7', '(0, 1)'),
    ('train tiny --train train.jsonl --shuffle perhaps', 'shuffle'),
    ('train tiny --train train.jsonl --epochs', 'needs a value'),
    ('train tiny --train train.jsonl --epochs 1 --epochs 2', 'twice'),
    ('train tiny', '--train'),
    ('train tinny', "'tiny'"),
    ('train', 'tiny'),
    ('train tiny --train train.jsonl --resume', '--run'),
    ('run tiny-report -p epohcs 3', "'epochs'"),
    ('run tiny-report -p epochs many', 'epochs'),
    ('run tiny-report -p epochs', '-p'),
    ('run tiny-report --epochs 3', '--epochs'),
    ('run tiny-reprot', "'tiny-report'"),
    ('run', 'which notebook'),
    ('', 'Missing command'),
    ('runs --jsn', '--json'),
    ('eval', 'Missing'),
    ('score pred.jsonl --dialect ROG', 'rog'),
    ('score pred.jsonl --failed -1', 'failed'),
    ('data audit train.jsonl test.jsonl --max across/near_duplicates', 'FIGURE=LIMIT'),
    ('data split --out parts', 'IN'),
    ('data split train.jsonl --out parts --bye topic', "'by'"),
    ('data split train.jsonl --out parts --by colour', 'topic'),
    ('bench retreiver', "'retriever'"),
])
def test_wrong_usage(drag, line, part):
    code, out, err = drag(line)
    assert (code, out) == (2, ''), err
    one_line(err, part)


@pytest.mark.parametrize('line, part', [
    ('train tiny --train nowhere.jsonl', 'nowhere.jsonl'),
    ('train tiny --train train.jsonl --run ../out', 'run name'),
    ('train tiny --train train.jsonl --run /tmp/out', 'run name'),
    ('run tiny-report --run ../out', 'run name'),
    ('run untagged', 'parameters'),
    ('eval nobody --data test.jsonl', "no run 'nobody'"),
    ('compare nobody nobody2', "no run 'nobody'"),
    ('score badpred.jsonl', 'badpred.jsonl:1: prediction'),
    ('data audit train.jsonl bad.jsonl', 'bad.jsonl:2: graph'),
    ('data audit train.jsonl nowhere.jsonl', 'nowhere.jsonl'),
])
def test_failures(drag, home, line, part):
    code, out, err = drag(line)
    assert (code, out) == (1, ''), err
    one_line(err, part)
    assert not (home.parent/'out').exists() and not (home/'parts').exists()


def test_unexpected_exceptions_are_one_line_too(drag, monkeypatch):
    def broken(): raise RuntimeError('an inner\nfault')
    monkeypatch.setattr(cli, 'list_runs', broken)
    code, out, err = drag('runs')
    assert code == 1
    one_line(err, 'RuntimeError: an inner; fault', '--debug')
    code, out, err = drag('runs --debug')
    assert code == 1 and 'Traceback' in err


def test_train_resume_compare_eval(drag, home):
    code, out, err = drag('train tiny --train train.jsonl --run a --learning-rate 0.02 --no-shuffle --json')
    assert code == 0 and json.loads(out)['answer_recall@10'] == .98 and 'training a' in err
    assert load_run('a').metrics == json.loads(out)
    assert load_run('a').manifest['config'] == {'train': 'train.jsonl', 'learning_rate': .02, 'epochs': 2, 'shuffle': False, 'seed': 0}
    one_line(drag('train tiny --train train.jsonl --run a')[2], 'choose another --run')
    one_line(drag('train tiny --train train.jsonl --run a --resume --epochs 9')[2], 'epochs (was 2, now 9)')
    assert drag('train tiny --run a --resume')[0] == 0 and load_run('a').manifest['resumes'] == 1
    assert drag(f'train tiny --config {home}/checkpoints/a/manifest.json --run b --seed 1')[0] == 0
    assert load_run('b').manifest['config'] == {**load_run('a').manifest['config'], 'seed': 1}
    compared = json.loads(drag('compare a b --json')[1])
    assert compared['b/config/seed'] == 1 and compared['a/answer_recall@10'] == .98 and 'a/config/epochs' not in compared
    listed = json.loads(drag('runs --json')[1])
    assert listed['a/status'] == 'done' and listed['b/answer_recall@10'] == .98
    assert json.loads(drag('eval a --data test.jsonl --json')[1]) == {'n': 2, 'failed': 0}


def test_config_file_and_its_mistakes(drag, home):
    (home/'c.toml').write_text('train = "train.jsonl"\nepochs = 3\n')
    assert drag('train tiny --config c.toml --run c --epochs 4')[0] == 0 and load_run('c').manifest['config']['epochs'] == 4
    for text, part in [('{"epohcs": 3}', "'epochs'"), ('{"epochs": true}', 'epochs'), ('{"epochs": ', 'c.json'), ('[1]', 'object')]:
        (home/'c.json').write_text(text)
        code, out, err = drag('train tiny --train train.jsonl --config c.json')
        assert code == 2
        one_line(err, part)


def test_kill_and_resume(drag, home):
    words = [sys.executable, 'drag.py', 'train', 'tiny', '--train', 'train.jsonl', '--run', 'killed', '--epochs', '3']
    child = start(home, *words, SECONDS_A_STEP='30')
    assert child.stdout.readline() == 'training killed\n'
    one_line(drag('train tiny --run killed --resume')[2], f'pid {child.pid}')
    assert list_runs().set_index('name').status['killed'] == 'running'
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=20)
    assert list_runs().set_index('name').status['killed'] == 'interrupted'
    assert drag('train tiny --run killed --resume')[0] == 0 and load_run('killed').manifest['status'] == 'done'


def test_interrupt_is_130_and_resumable(home):
    words = [sys.executable, 'drag.py', 'train', 'tiny', '--train', 'train.jsonl', '--run', 'interrupted']
    child = start(home, *words, SECONDS_A_STEP='30')
    assert child.stdout.readline() == 'training interrupted\n'
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130 and err.splitlines()[-1] == 'error: interrupted' and 'Traceback' not in err
    assert json.loads((home/'checkpoints'/'interrupted'/'manifest.json').read_text())['reason'].startswith('KeyboardInterrupt')


def test_torchrun_makes_one_run_and_prints_once(home):
    words = [sys.executable, *'-m torch.distributed.run --nproc_per_node 2 drag.py train tiny --train train.jsonl --json'.split()]
    before = set((home/'checkpoints').glob('tiny-*')) if (home/'checkpoints').exists() else set()
    child = start(home, *words, OMP_NUM_THREADS='1')
    out, err = child.communicate(timeout=90)
    assert child.returncode == 0, err
    assert json.loads(out)['rank'] == 0
    made = set((home/'checkpoints').glob('tiny-*')) - before
    assert len(made) == 1 and json.loads((made.pop()/'manifest.json').read_text())['world_size'] == 2


def test_notebook_run(home):
    done = script(home, 'run', 'tiny-report', '-p', 'epochs', '3', '--run', 'report', '--json')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {'n': .5, 'failed': 0} and 'epoch 3/3' in done.stderr
    manifest = json.loads((home/'checkpoints'/'report'/'manifest.json').read_text())
    assert manifest['config'] == {'epochs': 3} and Path(manifest['executable']).parent == Path(sys.executable).parent
    assert (home/'checkpoints'/'report'/'tiny_report.ipynb').exists()
    taken = script(home, 'run', 'tiny-report', '--run', 'report')
    assert taken.returncode == 1
    one_line(taken.stderr, 'choose another --run')


def test_notebook_failure_is_one_line_and_kept(home):
    done = script(home, 'run', 'tiny-report', '-p', 'epochs', '1', '--run', 'fails')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'tiny_report.ipynb, cell 3: ZeroDivisionError' in done.stderr.splitlines()[-1]
    assert (home/'checkpoints'/'fails'/'tiny_report.failed.ipynb').exists()


def test_notebook_output_is_live_and_interrupt_ends_its_kernel(home):
    words = [Path(sys.executable).parent/'drag', 'run', 'tiny-report', '-p', 'seconds', '60', '--run', 'live']
    child = start(home, *words)
    assert child.stdout.readline() == 'epoch 1/2\n'
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode in (1, 130) and err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err
    for _ in range(50):  # the kernel holds the run's lock as long as it lives
        if list_status(home, 'live') != 'running': break
        time.sleep(.2)
    assert list_status(home, 'live') in ('failed', 'interrupted')


def test_dead_kernel_is_one_line(home):
    parameters = new_code_cell('run = None', metadata={'tags': ['parameters']})
    dies = "import os\nfrom drag_lib.runs import start_run\nstart_run(run, {}, method='dies')\nos._exit(9)"
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(dies)]), home/'nbs'/'runs'/'dies.ipynb')
    done = script(home, 'run', 'dies', '--run', 'dead')
    assert done.returncode == 1 and 'the kernel died' in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr
    assert list_status(home, 'dead') == 'interrupted'


def list_status(home, name):
    return json.loads(script(home, 'runs', '--json').stdout)[f'{name}/status']


def test_audit(drag, home):
    code, out, err = drag('data audit train.jsonl test.jsonl --out audit.json')
    assert (code, err) == (0, '') and 'near_duplicates' in out
    assert json.loads((home/'audit.json').read_text())['failures'] == []
    code, out, err = drag('data audit train.jsonl leak.jsonl --json')
    assert code == 1
    one_line(err, 'across/exact_duplicates is 1')
    assert json.loads(out)['across/exact_duplicates'] == 1 and json.loads(out)['n_failures'] > 0
    assert drag('data audit train.jsonl leak.jsonl --max across/exact_duplicates=1 --max across/near_duplicates=1')[0] == 0
    code, out, err = drag('data audit train.jsonl bad.jsonl --skip-bad --max across/exact_duplicates=2 --max across/duplicate_ids=2 --json')
    assert code == 0 and json.loads(out)['test/skipped'] == 1 and 'skipped 1 malformed' in err and 'bad.jsonl:2' in err


def test_audit_takes_the_cosine_of_the_library_where_none_is_given(drag, home):
    for name, text in (('near1', 'In which country is the city of Bern?'), ('near2', 'In what country is the city of Bern?')):
        write(home/f'{name}.jsonl', [question(name, 'Bern', 'Switzerland', question=text)])
    def near(words=''): return json.loads(drag(f'data audit near1.jsonl near2.jsonl --json {words}')[1])['across/near_duplicates']
    assert (near(), near('--near 0.9')) == (1, 0)


def test_score(drag):
    code, out, err = drag('score pred.jsonl --json')
    scores = json.loads(out)
    assert (code, scores['n'], scores['failed']) == (0, 2, 0)
    keys = 'strict/hits_at_1 strict/em strict/f1 rog/hit rog/hits_at_1 rog/f1 gnn_rag/hits_at_1 subgraphrag/f1 squad/em squad/f1'
    assert set(keys.split()) <= scores.keys() and scores['strict/f1'] == .5
    half = json.loads(drag('score pred.jsonl --dialect strict,rog --failed 2 --json')[1])
    assert half['n'] == 4 and half['strict/f1'] == .25 and 'squad/f1' not in half
    out = drag('score pred.jsonl')[1]
    assert 'strict' in out and 'subgraphrag' in out


def test_split(drag, home):
    code, out, err = drag('data split train.jsonl --out split --by topic --shares train=0.5,test=0.5 --json')
    assert code == 0 and json.loads(out) == {'train': 2, 'test': 2} and (home/'split'/'test.jsonl.gz').exists()
    one_line(drag('data split train.jsonl --out split --by topic --shares train=0.5,test=0.5')[2], 'exists')
    code, out, err = drag('data split bad.jsonl --out split2 --shares train=0.5,test=0.5 --skip-bad')
    assert code == 0 and 'skipped 1 malformed' in err


def test_convert(drag, home):
    code, out, err = drag('data convert train.jsonl --out out.jsonl.gz --json')
    assert code == 0 and json.loads(out) == {'n': 4}
    code, out, err = drag('data convert bad.jsonl --out bad.jsonl.gz')
    assert code == 1 and not (home/'bad.jsonl.gz').exists()
    one_line(err, 'bad.jsonl:2')


def test_world(drag, home):
    pytest.importorskip('drag_lib.world')
    code, out, err = drag('data world --out world --n-train 60 --n-dev 10 --n-test 20 --n-corpus 200 --no-progress --json')
    assert code == 0, err
    assert json.loads(out)['train/questions'] == 60
    code, out, err = drag('data world --out world --n-trian 60')
    assert code == 2
    one_line(err, "'n_train'")


def test_doctor(drag, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    code, out, err = drag('doctor --json')
    rows = json.loads(out)
    assert code == (1 if rows['fail'] else 0) and rows['sentence encoder/status'] == 'OK' and rows['torch/status'] == 'OK'
    monkeypatch.setattr(cli, '_check_encoder', lambda: cli._row('sentence encoder', 'FAIL', 'missing'))
    code, out, err = drag('doctor')
    assert code == 1 and 'FAIL  sentence encoder' in out and err.splitlines()[-1].startswith('error: doctor')


def test_names_of_runs_stay_in_their_folder(home, monkeypatch):
    monkeypatch.setenv('DRAG_HOME', str(home))
    for name in ('..', '../x', 'a/b', '/etc/x', '.hidden', '-x', '', 'x\n', 'ü', 'x' * 101):
        with pytest.raises(ValueError, match='run name'): start_run(name, {}, method='tiny')
