#!/usr/bin/env bash
# What is measured on a GPU, in parts of less than nine minutes: gpu.sh [PART...], all where none is
# named. PYTHON has fastbert, torch, transformers and pytest-benchmark. The numbers go to
# RESULTS/<gpu>.json, part by part; elsewhere than in benchmarks/results with the raw ones beside it.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
raw=$(realpath -m "${RESULTS:-.benchmarks}")
export RESULTS=${RESULTS:-benchmarks/results} BENCH_SECONDS=${BENCH_SECONDS:-450}
mkdir -p "$RESULTS" "$raw"
if ! "$PYTHON" -P -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: there is no CUDA GPU, or $PYTHON has no torch for it" >&2
  exit 2
fi

PARTS="inference training kernels fills sizes drop_in"

# What is being measured when the time is over is lost, and nothing else.
run() { timeout --signal=INT --kill-after=20 "$1" "$PYTHON" -P -m pytest "${@:2}"; }

# measure PART BENCHMARKS...: functions of bench_gpu.py, which a word of their names says, and files
measure() {
  local part=$1 words="bench_ceiling or $2" status=0
  rm -f "$raw/gpu-$part.json"
  run 510 benchmarks/bench_gpu.py "${@:3}" -k "$words" --benchmark-json="$raw/gpu-$part.json" || status=$?
  if [ -s "$raw/gpu-$part.json" ]; then
    "$PYTHON" -P benchmarks/report.py "$raw/gpu-$part.json" || status=$?
  fi
  return $status
}

part() {
  case $1 in
    tests)
      # Several at once where pytest-xdist is there: most of the time is the compiler's.
      local at_once=()
      "$PYTHON" -P -c "import xdist" 2> /dev/null && at_once=(-n 4)
      run 530 -q "${at_once[@]}" tests/kernels tests/test_model_cuda.py ;;
    kernels)
      # shellcheck disable=SC2046
      measure kernels "not bench_gpu" $(grep -l "^def launch_all" benchmarks/bench_*.py) ;;
    inference) measure inference "bench_attention_kernel or bench_inference or bench_latency" ;;
    training) measure training "bench_training" ;;
    fills) measure fills "bench_fill" ;;
    sizes) measure sizes "bench_length or bench_batch" ;;
    drop_in) measure drop_in "bench_drop_in" benchmarks/bench_drop_in.py ;;
    *) echo "gpu.sh: no part $1; there are tests $PARTS" >&2; return 2 ;;
  esac
}

# shellcheck disable=SC2206
[ $# -gt 0 ] && parts=("$@") || parts=(tests $PARTS)
failed=0
for name in "${parts[@]}"; do
  part "$name" || failed=1
  # Numbers of what computes something else are worth nothing.
  [ "$name" = tests ] && [ $failed = 1 ] && exit 1
done
exit $failed
