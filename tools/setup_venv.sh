#!/bin/sh
# Make a virtual environment with the tested versions and this package; say in one sentence what is missing.
#   PYTHON=python3.12 sh tools/setup_venv.sh .venv requirements.txt
# Where $PYTHON has a torch that requirements.txt allows (a GPU machine's, say), the environment uses it and every other
# package found beside it that is new enough; only what is missing is installed.
venv=$1 requirements=$2 python=${PYTHON:-python3}

fail() { echo "error: $1" >&2; exit 2; }

[ -n "$venv" ] && [ -n "$requirements" ] || fail "usage: sh tools/setup_venv.sh FOLDER REQUIREMENTS"
command -v "$python" >/dev/null || fail "$python not found; install Python 3.11 to 3.13, or name it with PYTHON=..."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    fail "$("$python" -V) is not supported; install Python 3.11 to 3.13, or name it with PYTHON=..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python lacks venv or pip; install its venv package (python3-venv on Debian and Ubuntu)"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler found; DeepSpeed needs one (g++ on Debian and Ubuntu, gcc-c++ on Fedora)"

# The version of a torch 2.11 to 2.15 that $python has, and the folders of its packages; nothing where it has none.
there=$("$python" - "$venv" <<'END'
import os
import sys
from importlib.metadata import PackageNotFoundError, version
if os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1]):  # made by us before, and active
    sys.exit()
try:
    torch = version("torch")
except PackageNotFoundError:
    sys.exit()
if (2, 11) <= tuple(map(int, torch.split(".")[:2])) < (2, 16):
    print(torch, *(path for path in sys.path if path.endswith("-packages")), sep="\n")
END
) || fail "$python cannot say which torch it has; name another Python with PYTHON=..."
torch=$(echo "$there" | head -n 1)

echo "setting up $venv from $requirements (once; a few minutes)${torch:+, with torch $torch of $python}"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "$venv cannot be made; check permissions and free space"
log=$venv/setup.log
run() { "$@" >>"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "'$*' failed; the whole output is in $log"; }; }
: >"$log" || fail "$venv is not writable"
versions=constraints.txt
if [ -n "$torch" ]; then
    # Named in a .pth file rather than by --system-site-packages, which misses the packages of a parent that is a
    # virtual environment itself.
    echo "$there" | tail -n +2 >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
    versions=$venv/constraints.txt
    echo "torch==$torch" >"$versions"
fi
run "$venv/bin/python" -m pip install --upgrade pip
if [ -n "$torch" ]; then  # what is pinned exactly brings commands (deepspeed, ruff, mypy), which belong in $venv/bin
    run "$venv/bin/python" -m pip install --ignore-installed --no-deps $(grep -hE '^[A-Za-z-]+==' requirements.txt "$requirements" | sort -u)
fi
run "$venv/bin/python" -m pip install -c "$versions" -r "$requirements"
run "$venv/bin/python" -m pip install --no-deps -e .
