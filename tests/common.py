"What the tests of the trained methods share: small questions, command lines in processes of their own, what a run leaves."
import json
import multiprocessing
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout

os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
FORK = multiprocessing.get_context('forkserver')  # a process each, without its seconds of imports
FORK.set_forkserver_preload(['drag_lib.cli', 'drag_lib.drag', 'drag_lib.phase2', 'peft', 'sentence_transformers', 'matplotlib.pyplot',
                             'transformers.models.llama.modeling_llama', 'transformers.models.nemotron_h.modeling_nemotron_h'])

RELATIONS = ('capital', 'country', 'river', 'border', 'language', 'founder')
NAMES = ('Niamey', 'Lagos', 'Tartu', 'Bergen', 'Kyoto', 'Salta')


def question(rng, i, n_facts=15, **change):
    "A two-hop question: topic -a-> middle -b-> answer, among other facts."
    nodes = [f'entity {i}.{k}' for k in range(10)]
    a, b = rng.sample(RELATIONS, 2)
    path = [[nodes[0], a, nodes[1]], [nodes[1], b, nodes[2]]]
    others = [[rng.choice(nodes[3:]), rng.choice(RELATIONS), rng.choice(nodes)] for _ in range(n_facts - 2)]
    return {'id': f'q{i}', 'question': f'What is the {b} of the {a} of entity {i}.0?', 'q_entity': [nodes[0]], 'a_entity': [nodes[2]],
            'answer': [nodes[2]], 'graph': rng.sample(path + others, n_facts), 'paths': [path], **change}


def reading(rng, i):
    "A reading record of three passages, the second of which holds the answer."
    said = [f'{rng.choice(NAMES)} {n} has {rng.randint(2, 999)} houses.' for n in range(3)]
    return {'id': f'r{i}', 'question': f'How many houses has {said[1].split(" has")[0]}?', 'context': said, 'answers': [said[1].split()[3]],
            'gold': [1]}


def small_llama(folder):
    "A random language model of bytes in a folder."
    from drag_lib.llm import tiny_llm
    llm = tiny_llm('llama', hidden_size=32, intermediate_size=64)
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)


def write(path, rows):
    path.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows), encoding='utf-8')


def forked(words, home, folder):
    os.environ.update(DRAG_HOME=str(home), DRAG_CACHE=str(home/'cache'))
    os.chdir(home)
    from drag_lib import cli
    with open(folder/'out', 'w') as out, open(folder/'err', 'w') as err, redirect_stdout(out), redirect_stderr(err): code = cli.main(words)
    os._exit(code)


class Job:
    "A command line in a forked process: `.code()`, `.kill()`, and, when it has ended, `.out` and `.err`."
    def __init__(self, home, line):
        self.folder = home/f'job-{time.monotonic_ns()}'
        self.folder.mkdir()
        self.process = FORK.Process(target=forked, args=(line.split(), home, self.folder))
        self.process.start()

    def code(self, timeout=300):
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        return self.code() == -signal.SIGKILL

    out = property(lambda self: (self.folder/'out').read_text())
    err = property(lambda self: (self.folder/'err').read_text())


def read(home, run, name): return json.loads((home/'checkpoints'/run/name).read_text())


def log_of(home, run):
    "What a run logged, without the times."
    rows = map(json.loads, (home/'checkpoints'/run/'log.jsonl').read_text().splitlines())
    timed = lambda key: key == 'seconds' or 'runtime' in key or 'per_second' in key
    return [{k: v for k, v in row.items() if not timed(k)} for row in rows]


def same_end(home, run, reference, files=('model.safetensors', 'last.safetensors')):
    "Bit-identical files, equal metrics, equal log."
    for name in files:
        assert (home/'checkpoints'/run/name).read_bytes() == (home/'checkpoints'/reference/name).read_bytes(), name
    assert read(home, run, 'metrics.json') == read(home, reference, 'metrics.json')
    assert log_of(home, run) == log_of(home, reference)
    assert read(home, run, 'manifest.json')['status'] == 'done' and not (home/'checkpoints'/run/'training').exists()


def one_error(err, *parts):
    "One error line, the last, with `parts`; no traceback."
    lines = err.splitlines()
    assert 'Traceback' not in err and lines[-1].startswith('error: ') and sum('error' in line for line in lines) == 1, err
    for part in parts: assert part in lines[-1], lines[-1]
