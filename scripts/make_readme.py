"""README.md from nbs/index.ipynb, pictures to figures/readme/ (nbconvert; no quarto). `--check` writes nothing and fails when
README.md is not what the notebook gives.

Cells marked `#| hide` or `#| export` are left out; `#| echo: false` keeps a cell's outputs and leaves out its code."""
import argparse
import base64
import os
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'figures/readme'
MADE = 'index-*'  # names of the pictures made here; others in the folder are left alone
_directive = re.compile(r'^#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$')
_link = re.compile(r'(\]\(|\b(?:src|href)=")([^)\s"]+)')


def _split(source: str) -> tuple[dict, str]:
    "The `#|` directives a cell begins with, and the rest."
    lines, directives = source.splitlines(), {}
    while lines and (m := _directive.match(lines[0])):
        directives[m[1]] = m[2]
        lines.pop(0)
    return directives, '\n'.join(lines).strip('\n')


def _from_root(text: str, folder: str, root: Path) -> str:
    "Relative links of a notebook in `folder`, as seen from the repository root; code blocks are left as they are."
    def moved(m):
        target = m[2]
        if re.match(r'[a-z][a-z0-9+.-]*:|//|/|#', target, re.I): return m[0]
        path, mark, rest = re.match(r'([^#?]*)([#?]?)(.*)', target).groups()
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith('..'): raise ValueError(f'link leaves the repository: {target}')
        if not (root / path).exists(): raise FileNotFoundError(f'link to a file that is not there: {target}')
        return m[1] + path + mark + rest
    parts = re.split(r'(^```.*?^```[^\n]*$|`[^`\n]*`)', text, flags=re.M | re.S)
    return ''.join(p if i % 2 else _link.sub(moved, p) for i, p in enumerate(parts))


def render(notebook: Path, root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "Markdown text, and the pictures it shows by their path from the root. ValueError, FileNotFoundError: a link leads nowhere."
    nb = nbformat.read(notebook, as_version=4)
    folder = notebook.parent.relative_to(root).as_posix()
    pictures, cells = {}, []
    for cell in nb.cells:
        directives, rest = _split(cell.source) if cell.cell_type == 'code' else ({}, cell.source)
        if directives.keys() & {'hide', 'export', 'exporti', 'default_exp'} or directives.get('include') == 'false': continue
        if cell.cell_type == 'raw': continue
        cell.source = '' if directives.get('echo') == 'false' else rest
        if cell.cell_type == 'markdown':
            cell.source = _from_root(cell.source, folder, root)
            for name, data in cell.get('attachments', {}).items():
                kept = f'{PICTURES}/index-{re.sub(r"[^A-Za-z0-9._-]", "_", name)}'
                pictures[kept] = base64.b64decode(next(iter(data.values())))
                cell.source = cell.source.replace(f'attachment:{name}', kept)
        for out in cell.get('outputs', []):
            if out.output_type == 'error': raise ValueError(f'{notebook.name}: a cell ended in an error; run it again')
            if out.output_type == 'stream': out.text = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', out.text)
            if 'data' in out and 'text/html' in out.data:  # code hosts show the text of <style>
                out.data['text/html'] = re.sub(r'<style.*?</style>\s*', '', ''.join(out.data['text/html']), flags=re.S)
        cells.append(cell)
    nb.cells = cells
    names = {'output_filename_template': 'index-{cell_index}-{index}{extension}'}
    exporter = MarkdownExporter(config=Config({'ExtractOutputPreprocessor': names}))
    text, resources = exporter.from_notebook_node(nb, {'output_files_dir': PICTURES})
    text = re.sub(r'^```(?:ipython3?)?[ \t]*\n\s*```[ \t]*\n', '', text, flags=re.M)  # the shell of a cell whose code is left out
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip() + '\n'
    pictures |= {name: data for name, data in resources.get('outputs', {}).items()}
    note = f'<!-- made from {folder}/{notebook.name} by `make readme`: edit the notebook -->\n\n'
    return note + text, pictures


def differences(text: str, pictures: dict[str, bytes], root: Path = ROOT) -> list[str]:
    wanted = {'README.md': text.encode(), **pictures}
    out = [f'{n}: {"differs from" if (root / n).exists() else "missing, made from"} nbs/index.ipynb' for n, data in wanted.items()
           if not (root / n).exists() or (root / n).read_bytes() != data]
    return out + [f'{p.relative_to(root)}: nbs/index.ipynb no longer makes it' for p in _stale(pictures, root)]


def _stale(pictures, root) -> list[Path]: return sorted(p for p in (root / PICTURES).glob(MADE) if f'{PICTURES}/{p.name}' not in pictures)


def write(text: str, pictures: dict[str, bytes], root: Path = ROOT):
    "Pictures first, README.md last, each whole or not at all."
    for name, data in {**pictures, 'README.md': text.encode()}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
        part.write_bytes(data)
        part.replace(path)
    for path in _stale(pictures, root): path.unlink()


def main(argv=None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 when README.md is out of date')
    args = parser.parse_args(argv)
    notebook = root / 'nbs' / 'index.ipynb'
    try:
        if not notebook.exists(): raise FileNotFoundError('nbs/index.ipynb is missing: README.md is made from it')
        text, pictures = render(notebook, root)
    except (ValueError, FileNotFoundError) as e:
        print(f'make_readme: {e}', file=sys.stderr)
        return 1
    if not args.check:
        write(text, pictures, root)
        print(f'README.md: {len(text.splitlines())} lines, {len(pictures)} pictures in {PICTURES}/')
        return 0
    found = differences(text, pictures, root)
    if found: print('\n'.join(found + ['mend it: make readme']), file=sys.stderr)
    else: print('README.md is what nbs/index.ipynb gives')
    return 1 if found else 0


if __name__ == '__main__': sys.exit(main())
