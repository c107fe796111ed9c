#!/usr/bin/env bash
# What is measured on a GPU, in parts of less than nine minutes: gpu.sh [PART...], all where none is
# named. PYTHON has fastbert, torch, transformers and pytest-benchmark. The numbers go to
# RESULTS/<gpu>.json, part by part; elsewhere than in benchmarks/results with the raw ones beside it.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
raw=$(realpath -m "${RESULTS:-.benchmarks}")
export RESULTS=${RESULTS:-benchmarks/results} BENCH_SECONDS=${BENCH_SECONDS:-450}
TEST_SECONDS=${TEST_SECONDS:-530} SOAK_SECONDS=${SOAK_SECONDS:-450}
mkdir -p "$RESULTS" "$raw"
check="import sys, torch, fastbert._tokenizer, fastbert.kernels.attention as _"
if ! "$PYTHON" -P -c "$check; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: there is no CUDA GPU, or $PYTHON has no torch for it or no fastbert" >&2
  exit 2
fi

# By what they are worth where time is short.
PARTS="inference training text kernels sweep_attention sweeps profile soak sanitize"
PARTS+=" sizes fills drop_in fp8 fit"

# What is being measured when the time is over is lost, and nothing else.
bounded() { timeout --signal=INT --kill-after=20 "$1" "$PYTHON" "${@:2}"; }
run() { bounded "$1" -P -m pytest "${@:2}"; }
sweep() { SWEEP_SECONDS=$2 bounded $(($2 + 30)) "benchmarks/sweep_$1.py"; }

# measure PART BENCHMARKS...: functions of bench_gpu.py, which a word of their names says, and files
measure() {
  local part=$1 words="bench_ceiling or $2" status=0
  rm -f "$raw/gpu-$part.json"
  run $((BENCH_SECONDS + 60)) benchmarks/bench_gpu.py "${@:3}" -k "$words" --benchmark-json="$raw/gpu-$part.json" || status=$?
  if [ -s "$raw/gpu-$part.json" ]; then
    "$PYTHON" benchmarks/report.py "$raw/gpu-$part.json" || status=$?
  fi
  return $status
}

part() {
  case $1 in
    tests)
      # Several at once where pytest-xdist is there: most of the time is the compiler's.
      local -x OMP_NUM_THREADS=1
      local at_once=()
      "$PYTHON" -P -c "import xdist" 2> /dev/null && at_once=(-n 8)
      run "$TEST_SECONDS" -q "${at_once[@]}" tests/test_model_cuda.py tests/test_graphs.py tests/kernels ;;
    kernels)
      # That of which there are targets comes first.
      # shellcheck disable=SC2046
      measure kernels "not bench_gpu" benchmarks/bench_layer_norm.py \
        $(grep -l "^def launch_all" benchmarks/bench_*.py) ;;
    inference) measure inference "bench_attention_kernel or bench_inference or bench_latency" ;;
    training) measure training "bench_training" ;;
    fills) measure fills "bench_fill" ;;
    sizes) measure sizes "bench_length or bench_batch" ;;
    drop_in) measure drop_in "bench_drop_in" benchmarks/bench_drop_in.py ;;
    text) measure text "bench_embedding or bench_ranking" benchmarks/bench_text.py ;;
    fp8) measure fp8 "bench_fp8" benchmarks/bench_fp8.py ;;
    sweep_attention)
      local -x OMP_NUM_THREADS=1
      sweep attention 450 ;;
    sweeps)  # within nine minutes in all
      local -x OMP_NUM_THREADS=1
      local status=0
      sweep layer_norm 60 || status=$?
      sweep embeddings 90 || status=$?
      sweep cross_entropy 40 || status=$?
      sweep pooling 60 || status=$?
      sweep gelu 200 || status=$?
      return $status ;;
    profile) bounded 300 benchmarks/profile_gpu.py ;;
    soak)
      local -x OMP_NUM_THREADS=1
      bounded $((SOAK_SECONDS + 80)) tests/support/soak.py --seconds "$SOAK_SECONDS" \
        --first "${SOAK_FIRST:-0}" ;;
    sanitize)
      local tool status=0
      tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
      if [ ! -x "$tool" ]; then
        echo "gpu.sh: sanitize is left out: there is no compute-sanitizer"
        return 0
      fi
      # Memory of its own for each tensor, else reads behind one are reads of another's.
      for kind in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal=INT --kill-after=20 260 \
          "$tool" --tool $kind --error-exitcode 9 "$PYTHON" tests/support/soak.py --unchecked \
          --jobs 1 --longest 200 --cases 210 --seconds 200 || status=$?
      done
      return $status ;;
    fit)
      rm -f "$raw/gpu-fit.json"
      bounded 510 benchmarks/measure_training.py "$raw/gpu-fit.json" || return 1
      [ ! -s "$raw/gpu-fit.json" ] || "$PYTHON" benchmarks/report.py "$raw/gpu-fit.json" ;;
    *) echo "gpu.sh: no part $1; there are tests $PARTS" >&2; return 2 ;;
  esac
}

# shellcheck disable=SC2206
[ $# -gt 0 ] && parts=("$@") || parts=(tests $PARTS)
failed=0
for name in "${parts[@]}"; do
  part "$name" || failed=1  # goes on: what is timed is compared with the truth there, too
done
exit $failed
