#!/bin/sh
# Make a virtual environment with pinned requirements and this package; say in one sentence what is missing.
#   PYTHON=python3.12 sh tools/setup_venv.sh .venv requirements.txt
venv=$1 requirements=$2 python=${PYTHON:-python3}

fail() { echo "error: $1" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python not found; install Python 3.11 or newer, or name it with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" -V) is too old; install Python 3.11 or newer, or name it with PYTHON=..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python lacks venv or pip; install its venv package (python3-venv on Debian and Ubuntu)"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler found; DeepSpeed needs one (g++ on Debian and Ubuntu, gcc-c++ on Fedora)"

echo "setting up $venv from $requirements (once; a few minutes)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "$venv cannot be made; check permissions and free space"
log=$venv/setup.log
run() { "$@" >>"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "'$*' failed; the whole output is in $log"; }; }
: >"$log" || fail "$venv is not writable"
run "$venv/bin/python" -m pip install --upgrade pip setuptools wheel
# torch first: DeepSpeed's own setup imports it.
run "$venv/bin/python" -m pip install "$(grep '^torch==' requirements.txt)"
run "$venv/bin/python" -m pip install -r "$requirements"
run "$venv/bin/python" -m pip install --no-deps -e .
