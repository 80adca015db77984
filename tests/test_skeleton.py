"The tools around the notebooks catch what they are there to catch."
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import lock  # noqa: E402
import make_readme  # noqa: E402
import notebooks  # noqa: E402
import run_tests  # noqa: E402

PIXEL = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')


def _write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(new_notebook(cells=list(cells), metadata={'kernelspec': kernel}), path)


@pytest.fixture
def project(tmp_path):
    "A small nbdev project with the settings of this one, exported and clean."
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text(encoding='utf-8'), encoding='utf-8')
    (tmp_path / 'drag_lib').mkdir()
    (tmp_path / 'drag_lib' / '__init__.py').write_text('__version__ = "0.1.0"\n')
    _write(tmp_path / 'nbs' / '00_one.ipynb', new_markdown_cell('# One'), new_code_cell('#| default_exp one'),
           new_code_cell('#| export\nx = 1'))
    for command in ('nbdev_export', 'nbdev_clean'): notebooks._run(notebooks.BIN / command, cwd=tmp_path)
    return tmp_path


def test_exported_and_clean_project_passes(project):
    assert notebooks.drifted(project) + notebooks.unclean(project) + notebooks.malformed(project) == []


def test_edited_module_is_drift(project):
    module = project / 'drag_lib' / 'one.py'
    module.write_text(module.read_text().replace('x = 1', 'x = 2'))
    assert [line.split(':')[0] for line in notebooks.drifted(project)] == ['drag_lib/one.py']


def test_module_of_a_renamed_notebook_is_drift(project):
    _write(project / 'nbs' / '00_one.ipynb', new_code_cell('#| default_exp two'), new_code_cell('#| export\nx = 1'))
    found = '\n'.join(notebooks.drifted(project))
    assert 'drag_lib/one.py: no notebook exports it' in found and 'drag_lib/two.py: exported by a notebook, but missing' in found


def test_execution_counts_are_unclean(project):
    path = project / 'nbs' / '00_one.ipynb'
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert notebooks.unclean(project)[0].startswith('nbs/00_one.ipynb: not clean')


def test_cleaning_keeps_the_parameters_tag_and_its_absence_is_found(project):
    path = project / 'nbs' / 'runs' / 'small.ipynb'
    _write(path, new_code_cell('seed = 0', metadata={'tags': ['parameters']}))
    notebooks.unclean(project)
    assert notebooks.malformed(project) == []
    _write(path, new_code_cell('seed = 0'))
    assert 'nbs/runs/small.ipynb: 0 cells are tagged `parameters`' in notebooks.malformed(project)[0]


def test_truncated_notebook_and_kept_error_are_found(project):
    (project / 'nbs' / '01_cut.ipynb').write_text('{"cells": [')
    error = new_output('error', ename='ZeroDivisionError', evalue='', traceback=[])
    _write(project / 'nbs' / '02_error.ipynb', new_code_cell('1/0', outputs=[error]))
    found = notebooks.malformed(project)
    assert found[0].startswith('nbs/01_cut.ipynb: not a notebook') and found[1].startswith('nbs/02_error.ipynb: cell 0 ended in an error')


@pytest.mark.parametrize('place', [f'{ROOT}/data', '/usr/lib/python3/site-packages/tqdm/auto.py'])
def test_paths_of_a_machine_in_outputs_are_found(project, place):
    path = project / 'nbs' / '01_path.ipynb'
    for output in (new_output('stream', text=f'{place}: a warning\n'), new_output('display_data', data={'text/plain': place})):
        _write(path, new_markdown_cell('# Path'), new_code_cell('warn()', outputs=[output]))
        (found,) = notebooks.malformed(project)
        assert found.startswith('nbs/01_path.ipynb: the output of cell 1 shows a path of one machine')
    _write(path, new_code_cell(f'root = {place!r}', outputs=[new_output('stream', text='data/a.jsonl\n')]))
    assert notebooks.malformed(project) == []


def test_a_leftover_build_is_no_notebook(project):
    (project / 'nbs' / '_build_01_x.ipynb').write_text('{"cells": [')
    assert notebooks.malformed(project) == [] and [p.name for p in notebooks.notebooks(project)] == ['00_one.ipynb']


def test_notebook_that_nbdev_leaves_out_is_no_success(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text(encoding='utf-8'), encoding='utf-8')
    path = tmp_path / 'nbs' / '00_one.ipynb'
    _write(path, new_code_cell('assert 1 + 1 == 2'))
    monkeypatch.setattr(run_tests, 'ROOT', tmp_path)
    assert run_tests.notebook(path).passed == 1
    (path.parent / '.notest').touch()
    left_out = run_tests.notebook(path)
    assert left_out.failed == 1 and 'executed nothing' in left_out.output
    (path.parent / '.notest').unlink()
    _write(path, new_code_cell('assert 1 + 1 == 3'))
    assert run_tests.notebook(path).failed == 1


def test_no_step_is_a_failure():
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'run_tests.py', 'no such step'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == '0 passed, 0 failed'


@pytest.mark.parametrize('missing', ['', 'transformers'])
def test_gpu_script_times_both_loops_and_leaves_one_out_in_one_line(tmp_path, missing):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'x'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    words = '--device cpu --questions 40 --facts 10 --relations 5 --tokens 3 --epochs 2 --dim 8 --batch-size 16'.split()
    done = subprocess.run([sys.executable, '-c', code, ROOT / 'scripts' / 'gpu_retriever.py', *words, '--out', tmp_path / 'out.json'],
                          capture_output=True, text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'out.json').read_text())
    assert result['bare_loop/updates'] == 6 and result['bare_loop/ms_per_update'] > 0
    left_out = [line for line in done.stdout.splitlines() if line.startswith('library loop left out')]
    assert ('library_loop/ms_per_update' in result, len(left_out)) == (not missing, bool(missing))
    assert result.get('library_loop/updates', 6) == 6 and not (ROOT / 'checkpoints' / 'library-loop').exists()


def test_gpu_script_of_refrag_runs_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'gpu_ttft.py', '--tiny', '--out', tmp_path / 'out.json'],
                          capture_output=True, text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out.json').stat().st_size > 500 and 'k32/kept' in done.stdout and 'formula' in done.stdout


def test_lock_meets_settings(monkeypatch):
    assert lock.problems() == []
    locked = lock.read_lock()
    monkeypatch.setattr(lock, 'read_lock', lambda: {**locked, 'nbdev': '3.0.0'})
    assert lock.problems() == ['requirements.lock: nbdev==3.0.0 does not meet nbdev==2.4.14 of settings.ini']


def test_lock_has_no_build_suffix(): assert not [v for v in lock.read_lock().values() if '+' in v]


def test_readme_is_made_from_the_notebook(tmp_path, capsys):
    index = tmp_path / 'nbs' / 'index.ipynb'
    picture = new_output('display_data', data={'image/png': base64.b64encode(PIXEL).decode(), 'text/plain': 'a figure'})
    html = '<style scoped>td {}</style><table><tr><td>1</td></tr></table>'
    table = new_output('display_data', data={'text/html': html, 'text/plain': '1'})
    _write(index, new_markdown_cell('# Title\n\n[first](00_one.ipynb#part) [up](../LICENSE) [web](https://a.b/c) `[code](x)`'),
           new_code_cell('#| hide\nsecret = 1'), new_code_cell('#| echo: false\nshow()', outputs=[picture, table]),
           new_code_cell('print(1)', outputs=[new_output('stream', text='\x1b[31mred\x1b[0m\n')]))
    assert make_readme.main([], tmp_path) == 1 and 'link to a file that is not there: 00_one.ipynb#part' in capsys.readouterr().err
    (tmp_path / 'nbs' / '00_one.ipynb').touch()
    (tmp_path / 'LICENSE').touch()
    assert make_readme.main(['--check'], tmp_path) == 1 and not (tmp_path / 'README.md').exists()
    assert make_readme.main([], tmp_path) == 0 == make_readme.main(['--check'], tmp_path)
    text = (tmp_path / 'README.md').read_text()
    assert '[first](nbs/00_one.ipynb#part) [up](LICENSE) [web](https://a.b/c) `[code](x)`' in text
    assert 'secret' not in text and 'show()' not in text and 'print(1)' in text and '\n    red\n' in text and '<style' not in text
    (name,) = [p.name for p in (tmp_path / 'figures' / 'readme').iterdir()]
    assert f'(figures/readme/{name})' in text and (tmp_path / 'figures' / 'readme' / name).read_bytes() == PIXEL
    _write(index, new_markdown_cell('# Title'))
    assert make_readme.main(['--check'], tmp_path) == 1
    assert make_readme.main([], tmp_path) == 0 and not list((tmp_path / 'figures' / 'readme').iterdir())
