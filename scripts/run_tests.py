"""`make test`: lint, notebooks clean and exported, README, every notebook executed, every run notebook by papermill, pytest.

    run_tests.py [NAME ...]    only the steps whose name contains one of NAME

Each step is its own process, two at a time, one thread each. A step's output is shown when it fails. The last line is
`N passed, N failed` (`, N skipped` where something was); the exit code is 0 only when something passed and nothing failed.
Set DRAG_TEST_WORKERS to run more steps side by side."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import BIN, ROOT, drifted, malformed, notebooks, unclean, working_copy  # noqa: E402

TIMES = ROOT / '.cache' / 'test_seconds.json'  # how long each step took last time, for the time left
TIMEOUT = 900  # seconds a step may take
SHOWN = 60  # lines shown of a step that failed
ENV = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1',
       'MPLBACKEND': 'Agg', 'PATH': f'{BIN}{os.pathsep}{os.environ.get("PATH", "")}', 'PYTHONDONTWRITEBYTECODE': '1'}


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    output: str = ''
    seconds: float = 0.
    parts: dict[str, float] = field(default_factory=dict)  # seconds of the tests in it


@dataclass
class Step:
    name: str
    run: callable  # () -> Result
    guess: float = 20.  # seconds, until the first time is known
    result: Result = field(default_factory=Result)


def _command(*command, env=None) -> tuple[int, str]:
    "Exit code and output; when it takes longer than TIMEOUT, it and all it started are killed."
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as out:
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env={**ENV, **(env or {})}, text=True,
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        _running.add(process.pid)
        try: code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            process.wait()
            code = f'none: stopped after {TIMEOUT} s'
        finally: _running.discard(process.pid)
        out.seek(0)
        return code, out.read()


_running: set[int] = set()


def _kill(pid: int):
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass


def _one(ok: bool, output: str) -> Result: return Result(passed=int(ok), failed=int(not ok), output=output)


def _found(lines: list[str]) -> Result: return _one(not lines, '\n'.join(lines))


def lint() -> Result:
    code, output = _command(BIN / 'ruff', 'check', '--no-cache', 'drag_lib', 'scripts', 'tests', 'setup.py')
    return _one(code == 0, output)


def clean() -> Result:
    with working_copy() as copy: return _found(malformed(copy) + unclean(copy))


def drift() -> Result:
    with working_copy() as copy: return _found(drifted(copy))


def readme() -> Result:
    code, output = _command(sys.executable, ROOT / 'scripts' / 'make_readme.py', '--check')
    return _one(code == 0, output)


def lock() -> Result:
    code, output = _command(sys.executable, ROOT / 'scripts' / 'lock.py', '--check')
    return _one(code == 0, output)


def notebook(path: Path) -> Result:
    "nbdev_test on one notebook. It must say `Success.`: for a notebook it leaves out, nbdev_test exits 0 as well."
    if 'skip_exec: true' in path.read_text(encoding='utf-8').lower():
        return _one(False, f'{path.relative_to(ROOT)}: skip_exec: nbdev_test would not execute it and call that a success')
    code, output = _command(BIN / 'nbdev_test', '--path', path, '--n_workers', '0')
    if code == 0 and 'Success.' not in output: output += '\nnbdev_test executed nothing'
    return _one(code == 0 and 'Success.' in output, output)


def run_notebook(path: Path) -> Result:
    "A papermill notebook at its small defaults, by the command users call; its outputs go to a folder of their own."
    with tempfile.TemporaryDirectory(prefix='drag_home_') as home:
        code, output = _command(sys.executable, '-m', 'drag_lib.cli', 'run', path.stem.replace('_', '-'), env={'DRAG_HOME': home})
        kept = list(Path(home).rglob('metrics.json'))
    if code == 0 and not kept: output += f'\n{path.stem}: exit code 0, but no metrics.json was written under DRAG_HOME'
    return _one(code == 0 and bool(kept), output)


def pytests() -> Result:
    "tests/, counted test by test."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        code, output = _command(sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                                f'--junitxml={report}', 'tests', env={'DRAG_HOME': folder})
        if not report.exists(): return _one(False, output)
        suites = list(ET.parse(report).getroot().iter('testsuite'))
    parts = {case.get('name'): float(case.get('time', 0)) for suite in suites for case in suite.iter('testcase')}
    total, bad, skipped = (sum(sum(int(s.get(k, 0)) for k in keys) for s in suites)
                           for keys in (('tests',), ('failures', 'errors'), ('skipped',)))
    if code and not bad: bad = 1  # an error outside any test, or no test collected
    return Result(max(total - bad - skipped, 0), bad, skipped, output, parts=parts)


def tree_state() -> dict[str, str]:
    "Porcelain status and the content of every file in it: what a test run must leave as it was."
    lines = subprocess.check_output(['git', 'status', '--porcelain', '-z', '--untracked-files=all', '--no-renames'], cwd=ROOT, text=True)
    names = [entry[3:] for entry in lines.split('\0') if entry]
    files = [n for n in names if (ROOT / n).is_file()]
    hashes = subprocess.run(['git', 'hash-object', '--stdin-paths'], cwd=ROOT, input='\n'.join(files), text=True, capture_output=True,
                            check=True).stdout.split()
    return {**dict.fromkeys(names, 'removed'), **dict(zip(files, hashes, strict=True))}


def all_steps() -> list[Step]:
    steps = [Step('lint', lint, 2), Step('clean notebooks', clean, 5), Step('drift', drift, 5), Step('readme', readme, 5),
             Step('lock', lock, 1)]
    for path in notebooks(ROOT):
        if path.parent.name == 'runs': steps.append(Step(f'run {path.stem}', lambda p=path: run_notebook(p), 60))
        else: steps.append(Step(f'notebook {path.relative_to(ROOT / "nbs").with_suffix("")}', lambda p=path: notebook(p), 25))
    return steps + [Step('pytest', pytests, 40)]


def _clock(seconds: float) -> str: return f'{int(seconds) // 60:02d}:{int(seconds) % 60:02d}'


def _timed(step: Step) -> Step:
    start = time.monotonic()
    try: step.result = step.run()
    except Exception as e: step.result = _one(False, f'{type(e).__name__}: {e}')
    step.result.seconds = time.monotonic() - start
    return step


def run(steps: list[Step], workers: int) -> None:
    "All steps, the longest first, with a line for each that ends and one every half minute while none does."
    began, done, started = time.monotonic(), [], {}
    pool = ThreadPoolExecutor(workers)

    def begin(step):
        started[step.name] = time.monotonic()
        return _timed(step)

    def left() -> str:
        now = time.monotonic()
        rest = sum(max(s.guess - (now - started.get(s.name, now)), 1) for s in steps if s not in done)
        return f'about {_clock(rest / workers)} left' if rest else 'done'

    pending = {pool.submit(begin, s) for s in sorted(steps, key=lambda s: -s.guess)}
    try:
        while pending:
            ready, pending = wait(pending, timeout=30, return_when=FIRST_COMPLETED)
            for future in ready:
                step = future.result()
                done.append(step)
                r = step.result
                print(f'[{len(done):2d}/{len(steps)}] {_clock(time.monotonic() - began)}  {"FAILED" if r.failed else "ok":6s} '
                      f'{step.name:32s} {r.seconds:5.0f} s   {left()}', flush=True)
                if r.failed:
                    lines = r.output.rstrip().splitlines()
                    print('\n'.join('    | ' + line for line in lines[-SHOWN:]), flush=True)
            if not ready:
                busy = [n for n in started if n not in {s.name for s in done}]
                print(f'        {_clock(time.monotonic() - began)}  running: {", ".join(busy)}   {left()}', flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for pid in list(_running): _kill(pid)
        raise
    pool.shutdown()


def main(names: list[str]) -> int:
    began = time.monotonic()
    steps = [s for s in all_steps() if not names or any(n in s.name for n in names)]
    known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    for s in steps: s.guess = known.get(s.name, s.guess)
    workers = int(os.environ.get('DRAG_TEST_WORKERS', min(2, os.cpu_count() or 1)))
    print(f'{len(steps)} steps, {workers} at a time', flush=True)
    before = tree_state()
    run(steps, workers)

    results = [s.result for s in steps]
    after = tree_state()
    if changed := sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)):
        print('FAILED tree unchanged: the tests changed what git sees (or somebody edited meanwhile): ' + ', '.join(changed))
    if steps: results.append(_one(not changed, ''))

    TIMES.parent.mkdir(exist_ok=True)
    known.update({s.name: round(s.result.seconds, 1) for s in steps})
    part = TIMES.with_name(f'{TIMES.name}.{os.getpid()}.tmp')
    part.write_text(json.dumps(known, indent=0))
    part.replace(TIMES)
    if len(steps) > 1:
        tests = {name: seconds for s in steps for name, seconds in s.result.parts.items()}
        for what, took in (('steps', {s.name: s.result.seconds for s in steps}), ('tests', tests)):
            slow = sorted(took, key=lambda name: -took[name])[:10]
            if slow: print(f'slowest {what}: ' + ', '.join(f'{name} {took[name]:.0f} s' for name in slow))
    if bad := [s.name for s in steps if s.result.failed]: print('failed: ' + ', '.join(bad))
    print(f'{time.monotonic() - began:.0f} s in all')
    passed, failed, skipped = (sum(getattr(r, k) for r in results) for k in ('passed', 'failed', 'skipped'))
    if not steps: print(f'no step is named {" ".join(names)}')
    print(f'{passed} passed, {failed} failed' + (f', {skipped} skipped' if skipped else ''), flush=True)
    return 0 if passed and not failed and steps else 1


if __name__ == '__main__':
    try: sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt: sys.exit('interrupted')
