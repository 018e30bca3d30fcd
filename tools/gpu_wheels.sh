#!/bin/sh
# Collect what a machine with PyTorch but no DeepSpeed and no network lacks: DeepSpeed and its small dependencies.
#   sh tools/gpu_wheels.sh DIR [3.12]                                        # here, for that Python on x86-64 Linux
#   python3 -m pip install --no-index --find-links DIR deepspeed             # there; torch stays as it is
dir=$1 python=${2:-3.12}
[ -n "$dir" ] || { echo "error: name a folder for the wheels: sh tools/gpu_wheels.sh DIR [3.12]" >&2; exit 2; }
deepspeed=$(grep '^deepspeed==' requirements.txt) || { echo "error: run this in the repository's folder" >&2; exit 2; }
set -e
# DeepSpeed is published as source; its kernels are compiled when first used, so the wheel fits any Python.
python3 -m pip wheel --no-deps --wheel-dir "$dir" "$deepspeed"
python3 -m pip download --dest "$dir" --constraint constraints.txt --only-binary :all: --python-version "$python" \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 hjson pydantic
