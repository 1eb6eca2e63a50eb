#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and nothing else: torch >= 2.11, Triton >= 3.6, numpy, safetensors,
# tyro, tqdm, pytest, pytest-benchmark; no network. What else the suite can use (diffusers, flash-attn, Liger, matplotlib)
# it uses if it is there. Results go to OUT (default bench/results); a short table is printed last.
#
#   bench/gpu.sh                       all parts
#   bench/gpu.sh --part tests          the kernels' tests on the device, then compute-sanitizer on a few, if it is there
#   bench/gpu.sh --part ops [NAME]     ops and blocks at SD3's shapes against eager, compilers, libraries (NAME: only those)
#   bench/gpu.sh --part model [NAME]   training and sampling steps (NAME: d24-256px-B32, ...)
#   bench/gpu.sh --part sweep [NAME]   launch settings, eight minutes, resumable
#   bench/gpu.sh --part error          joint attention against fp64
#   bench/gpu.sh --part profile        one step by kernel (torch.profiler), and Nsight Compute on the kernels if it may
#   bench/gpu.sh --part report         tables and pictures of what is there
# Each part is stopped after ten minutes and leaves what it has.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
PART=all
NAME=""
while [ $# -gt 0 ]; do
  case "$1" in
    --part) PART=${2:?--part needs a name}; shift 2 ;;
    *) NAME=$1; shift ;;
  esac
done
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OUT
GPU=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))' 2>/dev/null) || {
  echo "error: no GPU that torch can use"; exit 1; }
STAMP="$OUT/$GPU-$(date -u +%F)"
$PYTHON -c 'from bench.environment import environment; print(environment())'
failed=0

run_tests() {
  timeout 560 $PYTHON -m pytest -q -W ignore tests/rfkernels/test_joint_attention_kernels.py \
    tests/rfkernels/test_adaln_kernels.py tests/rfkernels/test_joint_attention_operator.py -k "not opcheck" \
    >"$STAMP-tests.log" 2>&1 || failed=1
  tail -15 "$STAMP-tests.log"
  if command -v compute-sanitizer >/dev/null; then
    timeout 200 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON -m pytest -q -W ignore \
      tests/rfkernels/test_joint_attention_kernels.py -k "bits_when_repeated or (lengths_per_sample and True)" \
      >"$STAMP-sanitizer.log" 2>&1 || failed=1
    tail -5 "$STAMP-sanitizer.log"
  fi
}

# SIGINT, so that pytest-benchmark still writes what it has
suite() {
  timeout --signal INT 560 $PYTHON -m pytest "bench/test_$1.py" -q -W ignore --ops "$NAME" \
    --benchmark-json "$STAMP-$1${NAME:+-$NAME}.json" >"$STAMP-$1${NAME:+-$NAME}.log" 2>&1 || failed=1
  grep -A200 "ours, and what it is held against" "$STAMP-$1${NAME:+-$NAME}.log" || tail -15 "$STAMP-$1${NAME:+-$NAME}.log"
}

run_sweep() { $PYTHON -W ignore -m bench.sweep --out "$OUT" --minutes 8 --only "$NAME" 2>"$OUT/sweep.err" || failed=1; }
run_error() { timeout 300 $PYTHON -W ignore -m bench.attention_error 2>/dev/null | tee "$STAMP-error.txt"; }

run_profile() {
  timeout 200 $PYTHON -W ignore -m bench.profile >"$STAMP-profile.txt" 2>&1 || failed=1
  head -40 "$STAMP-profile.txt"
  if command -v ncu >/dev/null; then                # counters may be closed to users: then it says so in the log
    timeout 300 ncu --set basic --kernel-name "regex:adaln|gated|attention|key_rstd|sum_" --launch-count 12 \
      --profile-from-start off $PYTHON -W ignore -m bench.profile --kernels >"$STAMP-ncu.txt" 2>&1
    tail -5 "$STAMP-ncu.txt"
  fi
}

run_report() { $PYTHON -W ignore -m bench report --out "$OUT" || failed=1; }

case "$PART" in
  tests) run_tests ;;
  ops) suite ops ;;
  model) suite model ;;
  sweep) run_sweep ;;
  error) run_error ;;
  profile) run_profile ;;
  report) run_report ;;
  all) run_tests; suite ops; suite model; run_error; run_profile; run_sweep; run_report ;;
  *) echo "error: unknown part '$PART'; expected tests, ops, model, sweep, error, profile, report or nothing"; exit 2 ;;
esac

$PYTHON - "$STAMP"-*.json <<'PY'
import json, pathlib, sys
from bench import tables
rows = {}
for path in map(pathlib.Path, sys.argv[1:]):
    if path.is_file() and "benchmarks" in (found := json.loads(path.read_text() or "{}")):
        rows |= tables.rows(found)
if rows:
    print("\n".join(tables.summary(rows)))
PY
exit $failed
