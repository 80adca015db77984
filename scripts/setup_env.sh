#!/usr/bin/env bash
# Make or mend .venv: the versions of requirements.lock, the library itself (editable), the Jupyter kernel, the git hooks.
# Does nothing when .venv already matches requirements.lock, setup.py, settings.ini and this file.
#   PYTHON=python3.12       use this interpreter (default: the first of the list below that will do)
#   TORCH_INDEX=URL         take torch from here: PyTorch's own index for the CPU (small) or for a CUDA version, as its installation page names it
set -euo pipefail
cd "$(dirname "$0")/.."

[ -f requirements.lock ] || { echo "setup: requirements.lock is missing: git checkout requirements.lock" >&2; exit 1; }

mkdir -p .stamps
if command -v flock >/dev/null; then exec 9>.stamps/setup.lock; flock 9; fi  # two `make` at once: the second waits

venv=.venv
wanted=$( { cat requirements.lock setup.py settings.ini scripts/setup_env.sh; pwd -P; echo "${TORCH_INDEX:-}"; } | git hash-object --stdin)
stamp=$venv/.drag-setup
if [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && $venv/bin/python -c 'import drag_lib' 2>/dev/null; then exit 0; fi

say() { printf '[%02d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
fail() { echo "setup: $*" >&2; exit 1; }
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

install() {  # install WHAT ARGUMENTS...: pip with a count of packages on one line, its whole log only when it fails
    local what=$1 log=.stamps/pip.log; shift
    say "$what"
    if ! $venv/bin/python -u -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 | tee $log |
        awk -v tty="$([ -t 1 ] && echo 1 || echo 0)" -v t0="$(date +%s)" '
            /^ *(Collecting|Processing|Obtaining) / { n++; sub(".*/", "", $2); if (tty || n % 25 == 0) line(n " packages looked up, at " $2) }
            /^ *Downloading / && /[0-9][0-9][0-9]\.[0-9] MB|GB/ { line("downloading " $2 " " $3 " " $4) }
            /^Installing collected/ { line("installing " n + 0 " packages (a minute or two)") }
            function line(s) { printf tty ? "\r\033[K        %s" : "        %s\n", s; fflush() }
            END { if (tty) printf "\r\033[K" }'
    then
        tail -n 40 $log >&2
        fail "pip failed (above; whole log: $log). What is there stays: run the same command again."
    fi
}

rm -f $stamp  # from here to the end .venv counts as half-made; the next call mends it
if ! { usable $venv/bin/python && $venv/bin/python -m pip --version; } >/dev/null 2>&1; then
    python='' seen=''
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        usable "$candidate" || continue
        seen=$candidate
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then python=$candidate; break; fi
    done
    [ -n "$seen" ] || fail "no Python 3.11 or newer found (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3 python}).
       Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python"
    [ -n "$python" ] || fail "$seen has no venv module (Debian, Ubuntu: apt install python3-venv)"
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear $venv
fi

torch=$(grep '^torch==' requirements.lock)
install "[1/3] $torch" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} ${TORCH_INDEX:+--extra-index-url https://pypi.org/simple} -c requirements.lock "$torch"
install "[2/3] $(grep -c == requirements.lock) packages of requirements.lock" -r requirements.lock
install "[3/3] drag_lib itself, editable" --no-deps --no-build-isolation --use-pep517 -e .
$venv/bin/python -m pip check >.stamps/pip-check.log || { cat .stamps/pip-check.log >&2; fail "requirements.lock contradicts itself (above)"; }
$venv/bin/python -m ipykernel install --sys-prefix --name python3 --display-name python3 >/dev/null

# notebooks are cleaned at commit and merged cell by cell (.githooks/pre-commit, .gitattributes); only in a checkout of our own
if [ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$(pwd -P)" ]; then
    hooks=$(git config --local core.hooksPath || true)
    if [ -z "$hooks" ] || [ "$hooks" = .githooks ]; then
        git config --local core.hooksPath .githooks
        git config --local merge.nbdev-merge.name 'notebook merge, cell by cell'
        git config --local merge.nbdev-merge.driver '.venv/bin/nbdev_merge %O %A %B %P'
    else
        say "git hooks not installed: core.hooksPath is already $hooks (ours: .githooks/pre-commit)"
    fi
fi

echo "$wanted" >$stamp
say "ready: $($venv/bin/python --version), $($venv/bin/python -c 'import torch; print("torch", torch.__version__)'), drag_lib in $venv"
