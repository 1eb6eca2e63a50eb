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
# Each part is stopped within ten minutes, leaves what it has, and goes on where it was when it is run again.
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
  timeout --kill-after 20 400 $PYTHON -m pytest -q -W ignore tests/rfkernels -k "(kernels or gelu or qk_norm or operator) and not opcheck" \
    >"$STAMP-tests.log" 2>&1 || failed=1
  tail -15 "$STAMP-tests.log"
  if command -v compute-sanitizer >/dev/null; then
    timeout --kill-after 20 150 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON -m pytest -q -W ignore \
      tests/rfkernels/test_joint_attention_kernels.py -k "bits_when_repeated or (lengths_per_sample and True)" \
      >"$STAMP-sanitizer.log" 2>&1 || failed=1
    tail -5 "$STAMP-sanitizer.log"
  fi
}

# suite FILE NAME...: each name in a process and a file of its own, until 560 seconds are over; what has a file is not run
# again. Cut off by SIGINT, so that pytest-benchmark writes what it has, then by force.
suite() {
  local file=$1 end=$((SECONDS + 560)) name left out
  shift
  for name in "$@"; do
    out="$STAMP-$file-$name"
    left=$((end - SECONDS))
    [ -s "$out.json" ] && continue
    [ "$left" -lt 20 ] && { echo "no time left for $file $name: run this part again"; failed=1; continue; }
    timeout --signal INT --kill-after 20 "$left" $PYTHON -m pytest "bench/test_$file.py" -q -W ignore --ops "$name" \
      --benchmark-json "$out.part" >"$out.log" 2>&1 || { failed=1; tail -5 "$out.log"; }
    [ -s "$out.part" ] && mv "$out.part" "$out.json"
    rm -f "$out.part"
  done
}

run_sweep() { $PYTHON -W ignore -m bench.sweep --out "$OUT" --minutes 8 --only "$NAME" 2>"$OUT/sweep.err" || failed=1; }
run_error() {
  timeout --kill-after 20 300 $PYTHON -W ignore -m bench.attention_error >"$STAMP-error.txt" 2>"$STAMP-error.log" || failed=1
  cat "$STAMP-error.txt"
}

run_profile() {
  timeout --kill-after 20 200 $PYTHON -W ignore -m bench.profile >"$STAMP-profile.txt" 2>&1 || failed=1
  head -40 "$STAMP-profile.txt"
  if command -v ncu >/dev/null; then                # counters may be closed to users: then it says so in the log
    timeout --kill-after 20 300 ncu --set basic --kernel-name "regex:adaln|gated|attention|key_rstd|sum_|gelu_bwd|qk_norm|patch|rectified|weighted" \
      --launch-count 40 --profile-from-start off $PYTHON -W ignore -m bench.profile --kernels >"$STAMP-ncu.txt" 2>&1
    tail -5 "$STAMP-ncu.txt"
  fi
}

OPS=${NAME:-joint_attention block adaln gated_residual gelu_mlp qk_norm patch rectified_flow weighted_mse}      # adaln: gated_adaln too
MODELS=${NAME:-d24-256px-B32 d24-1024px d38-256px d24-256px-B1 d24-512px d38-1024px}
run_report() { $PYTHON -W ignore -m bench report --out "$OUT" || failed=1; }

case "$PART" in
  tests) run_tests ;;
  ops) suite ops $OPS ;;
  model) suite model $MODELS ;;
  sweep) run_sweep ;;
  error) run_error ;;
  profile) run_profile ;;
  report) run_report ;;
  all) run_tests; suite ops $OPS; suite model $MODELS; run_error; run_profile; run_sweep; run_report ;;
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
