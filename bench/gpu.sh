#!/usr/bin/env bash
# What a GPU has to say in under five minutes a call, on a machine that has one and little else: torch >= 2.11,
# Triton >= 3.6, numpy, safetensors, pillow, tqdm, pytest with xdist, timeout and benchmark. No network, no diffusers.
#
#   bench/gpu.sh first                    is everything right
#   bench/gpu.sh second                   how fast, and the sweep of launch settings
#   bench/gpu.sh first --pretend          the script itself, on a CPU
#
# One archive a call goes to OUT (default bench/results); `--help` says more, bench/README.md what to do with it.
# Packages that a machine lacks can lie as wheels in the folder wheels/.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if ls wheels/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$PYTHON" -W ignore -m bench.device "$@"
