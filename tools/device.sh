#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build, tests, benchmarks and compute-sanitizer on a machine with an NVIDIA GPU, in under ten minutes, without a network.
#
# Needs python3 with torch (2.10 or newer), a C++ compiler and nvcc. Every stage has a limit of its own and none may pass
# the deadline; a failed stage is named in the summary and does not stop the later ones, except a failed build.
#
#   PYTHON       interpreter                                            (python3)
#   OUT          folder for device.log, JSON and plots                  (bench/results)
#   ARCHES       PYCORE_CUDA_ARCH_LIST of the build                     (9.0a)
#   LIMIT        seconds for everything                                 (560)
#   STAGES       which of them to run, in this order                    (build tests bench sanitize cpu)
#   SANITIZERS   compute-sanitizer's tools, initcheck among them        (memcheck racecheck synccheck)
#   WHEELS       folder of wheels to install first, if it is there      (.whl)
#   PREBUILT     folder with a pycore built elsewhere: must load here   (.prebuilt)
#   PYCORE_CUDA  off: a rehearsal without a GPU                         (on)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
ARCHES=${ARCHES:-9.0a}
LIMIT=${LIMIT:-560}
STAGES=${STAGES:-build tests bench sanitize cpu}
SANITIZERS=${SANITIZERS:-memcheck racecheck synccheck}
WHEELS=${WHEELS:-.whl}
PREBUILT=${PREBUILT:-.prebuilt}
export PYCORE_CUDA=${PYCORE_CUDA:-on}
export PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin

mkdir -p "$OUT" || exit 1
log=$OUT/device.log
: >"$log"
summary=()
failed=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# stage NAME SECONDS COMMAND...: runs it within its limit and the deadline, all output into the log.
stage() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status=0 word
  shift 2
  if ((left < 10)); then
    summary+=("$(printf '%-28s %-12s' "$name" "no time left")")
    return 1
  fi
  ((limit < left)) || limit=$left
  printf '\n==== %s (at most %s s): %s\n' "$name" "$limit" "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
  case $status in
    0) word=ok ;;
    124 | 137) word="over ${limit} s" failed=1 ;;
    *) word="FAILED ($status)" failed=1 ;;
  esac
  summary+=("$(printf '%-28s %-12s %4d s' "$name" "$word" $((SECONDS - start)))")
  return "$status"
}

finish() {
  printf '\n==== stages (log: %s)\n' "$log"
  printf '%s\n' "${summary[@]}"
  exit "$failed"
}

wanted() { [[ " $STAGES " == *" $1 "* ]]; }

skip() { summary+=("$(printf '%-28s %s' "$1" "left out: $2")"); }

# ---- the machine ----------------------------------------------------------------------------------------------------

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  stage "wheels" 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$scratch/site" "$WHEELS"/*.whl
  export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
fi
{
  grep -m1 'model name' /proc/cpuinfo | sed 's/.*: //'
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
  nvcc --version 2>/dev/null | tail -2 | head -1 || echo "no nvcc"
  "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__)'
  grep -qw avx512f /proc/cpuinfo && echo "avx512f: yes" || echo "avx512f: no"
} | tee "$scratch/machine" | tee -a "$log"

# ---- build and tests ------------------------------------------------------------------------------------------------

if [[ -d $PREBUILT ]]; then
  # What users install is a wheel built on another machine, against another torch.
  stage "prebuilt loads" 60 env PYTHONPATH="$PREBUILT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -P -c '
import torch, pycore
from pycore import ops
print(pycore.__file__, pycore.build_info())
q = torch.randn(1, 2, 33, 16, device="cuda" if torch.cuda.is_available() else "cpu")
print(ops.lambda_attention(q, q, q, sink_size=2, window_size=8).abs().max())'
fi

if wanted build; then
  stage "build" 240 env PYCORE_CUDA_ARCH_LIST="$ARCHES" "$PYTHON" setup.py -q build_ext --inplace || finish
fi

if [[ $PYCORE_CUDA == off ]]; then
  skip "CUDA stages" "PYCORE_CUDA=off"
elif wanted tests; then
  # With a line for each test, those that failed are known even if time ran out.
  stage "tests on the GPU" 150 "$PYTHON" -m pytest -v --tb=short -m cuda tests
fi

# ---- benchmarks, before the slower checks -----------------------------------------------------------------------------

if wanted bench && [[ $PYCORE_CUDA != off ]]; then
  stage "benchmarks on the GPU" 210 "$PYTHON" -m bench.run --quick --device cuda --out "$OUT"
fi

# ---- sanitizers -------------------------------------------------------------------------------------------------------

# sanitize TOOL SECONDS [ARGUMENT...]: tools/sanitize_cuda.py under it. Loading torch under the sanitizer takes most of
# the 40 s that the program is not given; it stops by itself, because a sanitizer that is killed says nothing.
sanitize() {
  local tool=$1 limit=$2 left=$((LIMIT - SECONDS))
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 50)); then
    skip "compute-sanitizer $tool" "no time"
    return
  fi
  # Without torch's caching allocator every tensor is an allocation of its own, so an overrun is seen.
  stage "compute-sanitizer $tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m tools.sanitize_cuda --seconds $((limit - 40)) "$@"
}

if ! wanted sanitize || [[ $PYCORE_CUDA == off ]]; then
  :
elif command -v compute-sanitizer >/dev/null; then
  for tool in $SANITIZERS; do
    case $tool in
      memcheck) sanitize "$tool" 110 ;;
      *) sanitize "$tool" 100 --reduced ;;
    esac
  done
else
  skip "compute-sanitizer" "not installed"
fi

# ---- the CPU half, as far as time allows ------------------------------------------------------------------------------

if wanted cpu; then
  stage "tests on the CPU" 150 "$PYTHON" -m pytest -q -m "not cuda and not slow" tests
  stage "benchmarks on the CPU" 120 "$PYTHON" -m bench.run --quick --no-memory --only "L 8192" --out "$OUT"
fi

# ---- what came of it ------------------------------------------------------------------------------------------------

echo
grep -hE "^(E  |FAILED |ERROR |[0-9]+ (passed|failed)|=+ .*(passed|failed|deselected))|^tests.* (FAILED|ERROR) " "$log" |
  tail -30
grep -hE "^sanitize: |  WRONG$|^=========.* SUMMARY: " "$log"
grep -hE "^========= (Invalid|Misaligned|Error|Race|Barrier|Divergent|Uninit|Program hit|Out-of)" "$log" | sort | uniq -c |
  sort -rn | head -10
sed -n '/^Limits in this run/,/^$/p;/contender .*median ms/,/json$/p' "$log"
cat "$scratch/machine"
finish
