"""Write requirements.lock from what is installed: the exact versions of everything that settings.ini asks for, and of what
those ask for in turn. `--check` writes nothing and fails when the lock no longer meets settings.ini.

    .venv/bin/pip install 'peft>=0.22' && .venv/bin/python scripts/lock.py"""
import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / 'requirements.lock'
BUILD = ['setuptools', 'wheel']  # `make setup` builds the library itself without a network
OPTIONAL = ['rdflib>=7']  # small extras that the tests use
HEADER = '''# The exact environment of `make setup`: Linux x86-64, Python 3.11 or newer (made with {python}).
# Made by scripts/lock.py from what settings.ini requires; refresh it as CONTRIBUTING.md says, never by hand.
# torch carries no build suffix: the same line takes the CPU or the CUDA build, whichever the package index offers.
'''


def declared() -> list[Requirement]:
    "What settings.ini asks for, with the development tools."
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    wanted = cfg['DEFAULT']['requirements'].split() + cfg['DEFAULT']['dev_requirements'].split()
    return [Requirement(r) for r in wanted + BUILD + OPTIONAL]


def closure(roots: list[Requirement]) -> dict[str, str]:
    "Name and version of every installed distribution that `roots` reach; local suffixes such as +cpu are dropped."
    found, seen, todo = {}, set(), list(roots)
    while todo:
        req = todo.pop()
        key = (canonicalize_name(req.name), frozenset(req.extras))
        if key in seen: continue
        seen.add(key)
        try: dist = distribution(req.name)
        except PackageNotFoundError: sys.exit(f'lock.py: {req.name} is required but not installed: .venv/bin/pip install {str(req)!r}')
        if dist.version not in req.specifier:
            sys.exit(f'lock.py: {req.name} {dist.version} is installed, but {req} is required')
        found[key[0]] = (dist.metadata['Name'], Version(dist.version).public)
        for line in dist.requires or []:
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({'extra': e}) for e in {'', *req.extras}): todo.append(child)
    return {name: version for _, (name, version) in sorted(found.items())}


def read_lock() -> dict[str, str]:
    lines = (line.split('#')[0].strip() for line in LOCK.read_text(encoding='utf-8').splitlines())
    return {canonicalize_name(name): version for name, version in (line.split('==') for line in lines if line)}


def problems() -> list[str]:
    "Every requirement of settings.ini that the lock leaves out or contradicts."
    locked, out = read_lock(), []
    for req in declared():
        version = locked.get(canonicalize_name(req.name))
        if version is None: out.append(f'requirements.lock: {req} of settings.ini is missing')
        elif version not in req.specifier: out.append(f'requirements.lock: {req.name}=={version} does not meet {req} of settings.ini')
    return out


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 when the lock does not meet settings.ini')
    if parser.parse_args().check:
        found = problems()
        if found: sys.exit('\n'.join(found + ['refresh it: .venv/bin/python scripts/lock.py']))
        print(f'requirements.lock: {len(read_lock())} exact versions meet settings.ini')
    else:
        pins = closure(declared())
        head = HEADER.format(python='.'.join(map(str, sys.version_info[:3])))
        part = LOCK.with_name(f'.{LOCK.name}.{os.getpid()}.tmp')
        part.write_text(head + ''.join(f'{name}=={version}\n' for name, version in pins.items()), encoding='utf-8')
        part.replace(LOCK)
        print(f'requirements.lock: {len(pins)} exact versions')
