#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and nothing else: torch >= 2.11, Triton >= 3.6, numpy, safetensors,
# pytest, pytest-benchmark; no network. Results go to OUT (default bench/results); a short table is printed last.
#
#   bench/gpu.sh              all parts
#   bench/gpu.sh tests        the kernels' tests on the device, then compute-sanitizer on a few, if it is there
#   bench/gpu.sh ops [NAME]   every op at SD3's shapes against eager, compilers and libraries
#   bench/gpu.sh sweep [NAME] launch settings, eight minutes, resumable
#   bench/gpu.sh error        joint attention against fp64
# Each part fits in ten minutes and leaves what it has when it is stopped.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
PART=${1:-all}
NAME=${2:-}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OUT
GPU=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))') || {
  echo "error: no GPU that torch can use"; exit 1; }
STAMP="$OUT/$GPU-$(date -u +%F)"
$PYTHON -c 'from bench.environment import environment; print(environment())'

run_tests() {
  timeout 560 $PYTHON -m pytest -q -W ignore tests/rfkernels/test_joint_attention_kernels.py \
    tests/rfkernels/test_adaln_kernels.py tests/rfkernels/test_joint_attention_operator.py -k "not opcheck" 2>&1 | tee "$STAMP-tests.log" | tail -15
  if command -v compute-sanitizer >/dev/null; then
    timeout 200 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON -m pytest -q -W ignore \
      tests/rfkernels/test_joint_attention_kernels.py -k "bits_when_repeated or (lengths_per_sample and True)" \
      2>&1 | tee "$STAMP-sanitizer.log" | tail -5
  fi
}

run_ops() {
  timeout 560 $PYTHON -m pytest bench/test_ops.py -q -W ignore --ops "$NAME" \
    --benchmark-json "$STAMP${NAME:+-$NAME}.json" --benchmark-columns=median,iqr 2>&1 | tail -5
}

run_sweep() { $PYTHON -W ignore -m bench.sweep --out "$OUT" --minutes 8 --only "$NAME" 2>"$OUT/sweep.err"; }
run_error() { $PYTHON -W ignore -m bench.attention_error 2>/dev/null | tee "$STAMP-error.txt"; }

case "$PART" in
  tests) run_tests ;;
  ops) run_ops ;;
  sweep) run_sweep ;;
  error) run_error ;;
  all) run_tests; run_ops; run_error; run_sweep ;;
  *) echo "error: unknown part '$PART'; expected tests, ops, sweep, error or nothing"; exit 2 ;;
esac

$PYTHON - "$STAMP${NAME:+-$NAME}.json" <<'EOF'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
if path.is_file():
    print(f"{'case':52s} {'us':>9s} {'x eager':>8s} {'x best':>7s} {'of copy':>8s}  best other")
    for b in json.loads(path.read_text())["benchmarks"]:
        e = b["extra_info"]
        if e.get("contender") == "ours":
            print(f"{b['group']:52s} {b['stats']['median'] * 1e6:9.1f} {1 / e['ratio']:8.2f} "
                  f"{e['speedup_over_best']:7.2f} {e['of_copy']:8.1%}  {e['best_other']}")
EOF
