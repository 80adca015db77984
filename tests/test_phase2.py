"D-RAG's phase 2 from the command line: trained, gated, read again, killed and resumed, under torchrun; every option and its mistakes."
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import fields

import pandas as pd
import pytest
import torch
from common import Job, log_of, one_error, question, read, same_end, write
from safetensors.torch import load_file, save_file

SMALL = {'phase1': 'small', 'train': 'train.jsonl', 'val': 'val.jsonl', 'llm': 'llama', 'batch-size': 8, 'epochs': 1, 'log-every': 1,
         'lora-rank': 4, 'learning-rate': .01, 'max-facts-cap': 6, 'prob-threshold': 0, 'max-new-tokens': 8}


def train(words='', **changed):
    "A small training's command line. Most go without the gate: nothing that is as random as these language models passes it."
    given = SMALL | {k.replace('_', '-'): v for k, v in changed.items()}
    return f'train drag-phase2 {words} --json ' + ' '.join(f'--{k} {v}' for k, v in given.items())


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "A project folder with questions, their mistakes, a graph, two random language models and a phase-1 run, `small`."
    from drag_lib.llm import tiny_llm
    home, rng = tmp_path_factory.mktemp('home'), random.Random(0)
    train, val = ([question(rng, i, rng.randint(9, 15)) for i in ids] for ids in (range(24), range(100, 110)))
    for i in (3, 9):  # two answers, and none
        two = [*train[i]['answer'], train[i]['graph'][0][0]]
        train[i] |= {'answer': two, 'a_entity': two}
        val[i] |= {'answer': [], 'a_entity': [], 'paths': None}
    write(home/'train.jsonl', train)
    write(home/'val.jsonl', val)
    write(home/'few.jsonl', train[:6])
    write(home/'others.jsonl', train[6:12])
    (home/'splits').mkdir()
    for split, rows in (('train', train[:6]), ('validation', val[:3]), ('test', train[6:12])):
        pd.DataFrame(rows).to_parquet(home/'splits'/f'{split}-00000-of-00001.parquet')
    write(home/'bad.jsonl', [*train[:2], {**train[2], 'graph': [train[2]['graph'][0], ['only', 'two']]}, *train[3:]])
    write(home/'badval.jsonl', [*val[:3], {**val[3], 'question': 7}, *val[4:]])
    write(home/'far.jsonl', [{**row, 'a_entity': ['nowhere'], 'answer': ['nowhere'], 'paths': None} for row in train])
    (home/'graph.csv').write_text('head,relation,tail\n' + ''.join(','.join(t) + '\n' for row in val[:3] for t in row['graph']))
    for family in ('llama', 'nemotron_h'):
        llm = tiny_llm(family)
        llm.model.save_pretrained(home/family)
        llm.tokenizer.save_pretrained(home/family)
    words = '--train train.jsonl --val val.jsonl --dim 16 --n-layers 1 --dropout 0 --epochs 2 --learning-rate 0.01 --run small'
    job = Job(home, f'train drag-phase1 {words}')
    assert job.code() == 0, job.err
    shutil.copytree(home/'checkpoints'/'small', home/'checkpoints'/'cold')  # the same retriever, surer of itself
    settings = read(home, 'cold', 'retriever.json')
    (home/'checkpoints'/'cold'/'retriever.json').write_text(json.dumps(settings | {'temperature': settings['temperature']/2}))
    return home


@pytest.fixture(scope='session')
def whole(home):
    "An uninterrupted run in a process of its own: its metrics."
    job = Job(home, train('--no-eos-gate', run='whole', epochs=3, eval_every=2))
    assert job.code() == 0, job.err
    return json.loads(job.out)


def rows_of(path): return [json.loads(line) for line in path.read_text().splitlines()]


def test_training(home, whole):
    folder = home/'checkpoints'/'whole'
    assert whole == read(home, 'whole', 'metrics.json') and not any(isinstance(v, dict | list) for v in whole.values())
    for key in ('strict/em', 'strict/hits_at_1', 'answer_recall@10', 'eos/stopped', 'eos/p_end', 'loss', 'fact_f1'):
        assert 0 <= whole[key] < 20, key
    assert (whole['n'], whole['failed'], whole['n_answered'], whole['n_train'], whole['n_train_malformed']) == (10, 0, 10, 24, 0)
    assert (whole['updates'], whole['n_trained_items'], whole['without_gradient']) == (9, 72, 0)
    assert whole['eos/supervised'] == 1 and whole['eos/failures'] > 0
    log = log_of(home, 'whole')
    steps = [row for row in log if 'loss' in row]
    assert len(steps) == 9 and all(row[k] > 0 for row in steps[1:] for k in ('lr/retriever', 'lr/projector', 'learning_rate'))
    assert all(row.keys() >= {'gen', 'ret', 'ret_weight', 'tau', 'n_facts', 'answer', 'eos'} for row in steps)
    assert sum(row['gen'] for row in steps[-3:]) < sum(row['gen'] for row in steps[:3])
    assert [row['step'] for row in log if 'val/strict/f1' in row] == [2, 4, 6, 8, 9]
    assert [row['id'] for row in rows_of(folder/'predictions.jsonl')] == [row['id'] for row in rows_of(home/'val.jsonl')]
    manifest = read(home, 'whole', 'manifest.json')
    assert manifest['status'] == 'done' and manifest['data'].keys() == {'train', 'val', 'phase1'}
    assert {p.name for p in (home/'figures'/'whole').iterdir()} == {'training.png', 'eos.png'}


def test_the_gate_fails_a_run_that_does_not_stop(home, drag):
    code, out, err = drag(train(run='gated', max_new_tokens=30))
    assert (code, out) == (1, ''), err
    one_error(err, 'stop by themselves', 'P(EOS)')
    metrics, manifest = read(home, 'gated', 'metrics.json'), read(home, 'gated', 'manifest.json')
    assert metrics['eos/failures'] >= 1 and metrics['eos/stopped'] < .99 and metrics['n'] == 10 and metrics['updates'] == 3
    assert manifest['status'] == 'failed' and 'stop by themselves' in manifest['reason']
    seen = json.loads(drag('eval gated --data val.jsonl --json')[1])  # what was trained can be looked at
    assert seen['eos/stopped'] == metrics['eos/stopped']


def test_the_gate_passes_a_run_that_stops(home, drag):
    "Answers that must be entities of the one fact read come to an end in any model."
    code, out, err = drag(train('--constrain', run='held', max_facts_cap=1, max_new_tokens=60))
    assert code == 0, err
    assert json.loads(out)['eos/failures'] == 0 and json.loads(out)['eos/clean'] == 1
    names = {e for row in rows_of(home/'val.jsonl') for h, _, t in row['graph'] for e in (h, t)} | {'unknown'}
    assert all(set(row['prediction']) <= names for row in rows_of(home/'checkpoints'/'held'/'predictions.jsonl'))
    code, out, err = drag('diagnose held --json')
    assert code == 0 and json.loads(out)['n_failures'] == 0, err
    assert {p.name for p in (home/'figures'/'held').iterdir()} == {'training.png', 'eos.png', 'vectors.png', 'tokens.png', 'tokens.html'}


def same_answers(home, run, data='val.jsonl'):
    "Whether a process that knows only the run's folder gives the answers that its training gave."
    job = Job(home, f'eval {run} --data {data} --predictions again-{run}.jsonl --json')
    assert job.code() == 0, job.err
    then, now = rows_of(home/'checkpoints'/run/'predictions.jsonl'), rows_of(home/f'again-{run}.jsonl')
    assert any(row['prediction'] for row in then)
    plain = lambda rows: [{k: v for k, v in row.items() if k != 'log_probability'} for row in rows]
    close = [row['log_probability'] for row in now] == pytest.approx([row['log_probability'] for row in then], abs=1e-5)
    return plain(then) == plain(now) and close, json.loads(job.out)


@pytest.mark.parametrize('words, changed', [
    ('', {}), ('', {'llm': 'nemotron_h'}), ('', {'tune': 'full', 'learning_rate': .003}), ('', {'evidence': 'text'}),
    ('--no-train-projector', {'evidence': 'vectors'})], ids=['lora', 'hybrid', 'full', 'text', 'vectors'])
def test_a_run_read_again_gives_the_same_answers(home, words, changed):
    run = 'again-' + '-'.join(['lora', *map(str, changed.values())])
    job = Job(home, train(f'--no-eos-gate {words}', run=run, **changed))
    assert job.code() == 0, job.err
    same, metrics = same_answers(home, run)
    then = json.loads(job.out)
    assert same and metrics == pytest.approx({k: then[k] for k in metrics}, abs=1e-5)


@pytest.mark.parametrize('part, tensor', [('adapter/adapter_model', 'lora_B'), ('projector', 'outer.weight'), ('retriever', 'out.weight')])
def test_each_part_of_a_run_is_read(home, whole, part, tensor):
    run = f'without-{tensor}'
    shutil.copytree(home/'checkpoints'/'whole', home/'checkpoints'/run)
    file = home/'checkpoints'/run/f'{part}.safetensors'
    weights = load_file(file)
    assert any(tensor in name and value.any() for name, value in weights.items())
    save_file({name: value*(tensor not in name) for name, value in weights.items()}, file)
    assert not same_answers(home, run)[0]


def test_killed_twice_ends_in_the_same_weights(home, whole):
    "The sampler's draws too are those of the uninterrupted run."
    line, places = train('--no-eos-gate --resume', run='killed', epochs=3, eval_every=2), home/'checkpoints'/'killed'/'training'
    for least in (2, 6):  # updates: within an epoch, at the end of one
        job, until = Job(home, line), time.monotonic() + 200
        reached = lambda: any(int(p.name.split('-')[1]) >= least for p in places.glob('checkpoint-*'))
        while not reached() and job.process.is_alive() and time.monotonic() < until: time.sleep(.005)
        assert job.process.is_alive() and job.kill(), job.err
    with open(home/'checkpoints'/'killed'/'samples.jsonl', 'a') as f:  # an evaluation that was reached and then lost
        f.write(json.dumps({'passes': 10**6, 'id': 'lost'}) + '\n')
    job = Job(home, line)
    assert job.code() == 0 and 'resuming at update' in job.err, job.err
    same_end(home, 'killed', 'whole', ['model.safetensors', 'last.safetensors', 'retriever.safetensors', 'projector.safetensors',
                                       'adapter/adapter_model.safetensors', 'predictions.jsonl', 'samples.jsonl'])
    assert read(home, 'killed', 'manifest.json')['resumes'] == 2


def test_a_finished_run_is_resumed_without_training(home, whole, drag):
    line = train('--no-eos-gate --resume', run='whole', epochs=3, eval_every=2)
    code, out, err = drag(line)
    assert (code, json.loads(out or '{}')) == (0, whole), err
    code, out, err = drag(line.replace('--epochs 3', '--epochs 4'))
    assert (code, out) == (1, '')
    one_error(err, 'epochs (was 3, now 4)')


@pytest.fixture(scope='session')
def at_once(home):
    "A training whose questions go through the model eight at a time, with nothing drawn: its metrics."
    job = Job(home, train('--no-eos-gate', run='at-once', **EXACT))
    assert job.code() == 0, job.err
    return json.loads(job.out)


EXACT = {'estimator': 'none', 'dropout': 0., 'epochs': 2, 'learning_rate': .001}


def apart(home, run, reference):
    "The largest difference of two runs' weights after the last update."
    weights, others = (load_file(home/'checkpoints'/name/'last.safetensors') for name in (run, reference))
    assert weights.keys() == others.keys()
    return max(float((weights[k] - others[k]).abs().max()) for k in weights if k != 'passes')


def test_micro_batches_change_nothing(home, at_once):
    job = Job(home, train('--no-eos-gate', run='in-parts', micro_batch_size=4, **EXACT))
    assert job.code() == 0, job.err
    assert apart(home, 'in-parts', 'at-once') < 1e-5
    assert json.loads(job.out)['n_trained_items'] == at_once['n_trained_items'] == 48


def test_two_processes_train_as_one(home, at_once):
    "The `--` keeps torchrun from reading `--run` as its own `--run-path`."
    words = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2 -m drag_lib.cli --'.split()]
    env = {**os.environ, 'DRAG_HOME': str(home), 'DRAG_CACHE': str(home/'cache')}
    done = subprocess.run([*words, *train('--no-eos-gate', run='two', **EXACT).split()], cwd=home, env=env, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    two = json.loads(done.stdout)
    for told in (two, at_once): assert (told['updates'], told['n_trained_items'], told['without_gradient']) == (6, 48, 0)
    assert two == read(home, 'two', 'metrics.json') and two.keys() == at_once.keys()
    assert read(home, 'two', 'manifest.json')['world_size'] == 2 and apart(home, 'two', 'at-once') < 1e-5


def test_eval(home, whole, drag):
    code, out, err = drag('eval whole --data val.jsonl --controls --json')
    assert code == 0 and err.count('needs ~') == 1, err  # the language model is loaded once
    got = json.loads(out)
    for control in ('untuned', 'retriever'):
        assert {k.removeprefix(f'{control}/') for k in got if k.startswith(f'{control}/')} >= {'strict/em', 'rog/f1', 'squad/f1'}
    own = {k: v for k, v in got.items() if not k.startswith(('untuned/', 'retriever/'))}
    assert own == pytest.approx({k: whole[k] for k in own}, abs=1e-5)
    assert got['untuned/strict/f1'] == 0 and 0 <= got['retriever/strict/hits_at_1'] <= 1
    code, out, err = drag('eval whole --data badval.jsonl --json')
    assert (code, out) == (1, '')
    one_error(err, 'badval.jsonl:4: question')
    skipping = json.loads(drag('eval whole --data badval.jsonl --skip-bad --json')[1])
    assert (skipping['n'], skipping['failed'], skipping['n_answered']) == (10, 1, 9)


CHANGES = {  # field: (another value, the settings that both runs share)
    'phase1': ('cold', {}), 'train': ('others.jsonl', {}), 'val': ('others.jsonl', {}), 'train_limit': (4, {}), 'val_limit': (2, {}),
    'train_split': ('test', {'train': 'splits'}), 'val_split': ('test', {'val': 'splits'}), 'llm': ('nemotron_h', {}),
    'tune': ('none', {}), 'lora_rank': (2, {}), 'lora_alpha': (8., {}), 'lora_dropout': (.5, {}), 'lora_targets': (['mlp'], {}),
    'learning_rate': (.002, {}), 'retriever_rate': (.01, {}), 'projector_rate': (.01, {}), 'train_retriever': (False, {}),
    'dropout': (.6, {}), 'train_projector': (False, {}), 'projector_hidden': (8, {}), 'evidence': ('text', {}), 'estimator': ('none', {}),
    'gate_text': (False, {}), 'n_draws': (2, {'estimator': 'score_function'}), 'temperature': (2., {}), 'temperature_end': (2., {}),
    'max_facts_cap': (2, {}), 'prob_threshold': (.9, {}), 'fallback': (3, {'prob_threshold': .9999}), 'ret_weight': (1., {}),
    'balance_every': (1, {}), 'balance_rho': (.1, {'balance_every': 1}), 'rho': (.2, {}), 'margin': (3., {}), 'eos_loss_weight': (3., {}),
    'max_length': (200, {}), 'max_answers': (1, {'supervise': 'all'}), 'supervise': ('all', {'max_facts_cap': 2}),
    'max_new_tokens': (2, {}), 'num_beams': (3, {}), 'constrain': (True, {}), 'val_generation_limit': (1, {}), 'seed': (1, {})}
ELSEWHERE = {'skip_bad', 'eos_gate', 'quantize', 'trust_remote_code', 'gradient_checkpointing'}  # see the other tests


def test_every_field_changes_something(home, monkeypatch, capsys):
    from drag_lib.phase2 import Phase2Config, train_phase2
    from drag_lib.training import TrainConfig
    monkeypatch.setenv('DRAG_HOME', str(home))
    monkeypatch.setenv('DRAG_CACHE', str(home/'cache'))
    monkeypatch.chdir(home)
    small = {k.replace('-', '_'): v for k, v in SMALL.items()}
    small |= {'train': 'few.jsonl', 'val_limit': 3, 'batch_size': 3, 'max_facts_cap': 5, 'max_new_tokens': 4, 'eos_gate': False}
    names = iter(range(1000))

    def traces(**changed):
        run = f'field-{next(names)}'
        told = train_phase2(Phase2Config(**small | changed), run=run, plots=False)
        return told, log_of(home, run), rows_of(home/'checkpoints'/run/'predictions.jsonl')

    base, without_effect = {'{}': traces()}, []
    assert traces() == base['{}']
    for field, (value, shared) in CHANGES.items():
        key = json.dumps(shared)
        if key not in base: base[key] = traces(**shared)
        if traces(**shared, **{field: value}) == base[key]: without_effect.append(field)
    assert without_effect == []
    own = {f.name for f in fields(Phase2Config)} - {f.name for f in fields(TrainConfig)}
    assert own - CHANGES.keys() == ELSEWHERE


def test_gradient_checkpointing_computes_twice_what_it_does_not_keep(home, monkeypatch):
    from drag_lib.drag import load_retriever
    from drag_lib.phase2 import Phase2Config, _load_base, build_drag, read_set
    from drag_lib.text_encoder import TextEncoder
    monkeypatch.setenv('DRAG_HOME', str(home))
    monkeypatch.setenv('DRAG_CACHE', str(home/'cache'))
    data, _ = read_set(str(home/'few.jsonl'), 'train', TextEncoder())
    found = []
    for kept in (True, False):
        config = Phase2Config(phase1='small', llm=str(home/'llama'), max_facts_cap=5, gradient_checkpointing=not kept)
        model, calls = build_drag(config, _load_base(config), load_retriever('small')[0], 1.).train(), []
        model.lm.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        loss = model(**data.inputs([0, 1]))['loss']
        loss.backward()
        found.append((len(calls), loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (once, loss, gradients), (twice, same, others) = found
    assert (once, twice) == (1, 2) and same == pytest.approx(loss, abs=1e-6) and gradients.keys() == others.keys()
    assert all(torch.allclose(gradients[n], others[n], atol=1e-6) for n in gradients)


ASKED = 'What is the river of the capital of entity 100.0?'


def test_ask(home, whole, drag):
    code, out, err = drag(['ask', 'whole', ASKED, '--graph', 'graph.csv', '--json'])
    assert code == 0, err
    found = json.loads(out)
    assert found['topics'] == ['entity 100.0'] and isinstance(found['answer'], list) and found['log_probability'] < 0
    graph = [tuple(row) for row in rows_of(home/'val.jsonl')[0]['graph']]
    assert 1 <= len(found['facts']) <= 6 and all(tuple(fact[:3]) in graph and 0 <= fact[3] <= 1 for fact in found['facts'])
    assert [fact[3] for fact in found['facts']] == sorted((fact[3] for fact in found['facts']), reverse=True)
    elsewhere = json.loads(drag(['ask', 'whole', ASKED, '--graph', 'graph.csv', '--topic', 'entity 101.0', '--json'])[1])
    assert elsewhere['topics'] == ['entity 101.0'] and elsewhere['facts'] != found['facts']
    code, out, err = drag(['ask', 'whole', ASKED, '--graph', 'graph.csv'])
    assert code == 0 and ' — '.join(found['facts'][0][:3]) in out, err


def test_diagnose(home, whole, drag):
    plots = [home/'figures'/'whole'/f'{name}.png' for name in ('training', 'eos')]
    for path in plots: path.unlink()
    code, out, err = drag('diagnose whole --json')
    assert code == 1
    one_error(err, "'whole' is not healthy", 'stop by themselves')
    found = json.loads(out)
    assert found['n_failures'] == whole['eos/failures'] and {k: found[k] for k in found if k.startswith('eos/')} == pytest.approx(
        {k: whole[k] for k in found if k.startswith('eos/')}, abs=1e-5)
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in plots)
    code, out, err = drag('diagnose whole --data train.jsonl --limit 3')
    ends = [line.split() for line in out.splitlines() if '<|eos|>' in line and 'True' in line]
    assert code == 1 and [row[0] for row in ends] == ['0', '1'], out  # the item that each ends


@pytest.mark.parametrize('words, changed, code, parts', [
    ('', {'phase1': 'nowhere'}, 1, ["no run 'nowhere'"]),
    ('', {'phase1': 'whole'}, 1, ["run 'whole'"]),
    ('', {'llm': 'nowhere'}, 1, ["no model 'nowhere'"]),
    ('', {'llm': 'checkpoints'}, 1, ['checkpoints', 'config.json']),
    ('', {'train': 'nowhere.jsonl'}, 1, ['nowhere.jsonl']),
    ('', {'train': 'far.jsonl'}, 1, ['far.jsonl', 'hops']),
    ('', {'train': 'bad.jsonl'}, 1, ['bad.jsonl:3: graph.1: expected [head, relation, tail], got 2 items']),
    ('', {'val': 'badval.jsonl'}, 1, ['badval.jsonl:4: question']),
    ('', {'quantize': '4bit'}, 1, ['bitsandbytes']),
    ('', {'quantize': '2bit'}, 2, ['quantize']),
    ('', {'tune': 'some'}, 2, ['tune']),
    ('', {'evidence': 'pictures'}, 2, ['evidence']),
    ('', {'n_draws': 1}, 2, ['n_draws']),
    ('', {'fallback': 0}, 2, ['fallback']),
    ('', {'lora_targets': 'attention,mind'}, 1, ['mind', 'LoRA']),
    ('', {'lora_targets': 'experts'}, 1, ['experts', 'attention']),
    ('', {'micro_batch_size': 3}, 1, ['batch_size 8', 'micro_batch_size 3']),
    ('', {'max_length': 60}, 1, ['positions', 'max_length']),
    ('--no-train-retriever', {'tune': 'none', 'evidence': 'text'}, 1, ['nothing']),
    ('', {'learning_rate': 1e30, 'warmup': 0}, 1, ['update ']),
    ('--projector 3', {}, 2, ["'projector_"]),
])
def test_mistakes(home, whole, drag, words, changed, code, parts):
    run = 'mistake-' + ''.join(c for c in f'{words}{changed}' if c.isalnum())
    got, out, err = drag(train(words, run=run, **changed))
    assert (got, out) == (code, ''), err
    one_error(err, *parts)
    folder = home/'checkpoints'/run
    assert not (folder/'metrics.json').exists() and not (folder/'drag.json').exists()
    assert not folder.exists() or read(home, run, 'manifest.json')['status'] == 'failed'


def test_a_phase_1_run_must_be_named(home, drag):
    code, out, err = drag('train drag-phase2 --train train.jsonl --val val.jsonl --llm llama')
    assert (code, out) == (2, '')
    one_error(err, '--phase1')


@pytest.mark.parametrize('words, code, parts', [
    (['whole', ASKED, '--graph', 'graph.csv', '--topic', 'entity 100.00'], 1, ["no entity 'entity 100.00'", "did you mean 'entity 100.0'"]),
    (['whole', 'Who is she?', '--graph', 'graph.csv'], 1, ['names no entity', '--topic']),
    (['whole', 'What is the river of entity 100.01?', '--graph', 'graph.csv'], 1, ['names no entity']),
    (['whole', ASKED, '--graph', 'nowhere.csv'], 1, ['nowhere.csv']),
    (['whole', ASKED, '--graph', 'train.jsonl'], 1, ['train.jsonl:1']),
    (['whole', ASKED], 2, ['--graph']),
    (['whloe', ASKED, '--graph', 'graph.csv'], 1, ["'whole'"]),
    (['small', ASKED, '--graph', 'graph.csv'], 1, ["run 'small'"]),
])
def test_mistakes_of_ask(home, whole, drag, words, code, parts):
    got, out, err = drag(['ask', *words])
    assert (got, out) == (code, ''), err
    one_error(err, *parts)


def test_malformed_records_are_counted(home, drag):
    code, out, err = drag(train('--no-eos-gate --skip-bad', run='skipping', train='bad.jsonl', val='badval.jsonl', max_new_tokens=2))
    assert code == 0, err
    got = json.loads(out)
    assert (got['n_train'], got['n_train_malformed'], got['n'], got['failed'], got['n_answered']) == (23, 1, 10, 1, 9)
