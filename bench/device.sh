#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build, tests and benchmarks on a machine with an NVIDIA GPU, in under ten minutes and without a network.
#
# Needs python3 with torch (2.10 or newer), a C++ compiler and nvcc. Every stage has a limit of its own and none may pass
# the deadline; a failed stage is named in the summary and does not stop the later ones, except a failed build.
#
#   PYTHON       interpreter                                            (python3)
#   OUT          folder for device.log, JSON and plots                  (bench/results)
#   ARCHES       PYCORE_CUDA_ARCH_LIST of the build                     (9.0a)
#   LIMIT        seconds for everything                                 (560)
#   WHEELS       folder of wheels to install first, if it is there      (.whl)
#   PREBUILT     folder with a pycore built elsewhere: must load here   (.prebuilt)
#   PYCORE_CUDA  off: a rehearsal without a GPU                         (on)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
ARCHES=${ARCHES:-9.0a}
LIMIT=${LIMIT:-560}
WHEELS=${WHEELS:-.whl}
PREBUILT=${PREBUILT:-.prebuilt}
export PYCORE_CUDA=${PYCORE_CUDA:-on}
export PYTHONUNBUFFERED=1

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
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
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

stage "build" 240 env PYCORE_CUDA_ARCH_LIST="$ARCHES" "$PYTHON" setup.py -q build_ext --inplace || finish

if [[ $PYCORE_CUDA == off ]]; then
  skip "CUDA stages" "PYCORE_CUDA=off"
else
  stage "tests on the GPU" 150 "$PYTHON" -m pytest -q -m cuda tests
fi

# ---- benchmarks, before the slower checks -----------------------------------------------------------------------------

if [[ $PYCORE_CUDA != off ]]; then
  stage "benchmarks on the GPU" 200 "$PYTHON" -m bench.run --quick --device cuda --out "$OUT"
fi

# ---- sanitizers -------------------------------------------------------------------------------------------------------

cat >"$scratch/small.py" <<'PYTHON'
"""Every kernel once on small odd shapes, each result compared, for compute-sanitizer."""
import torch
from pycore import ops
from pycore.positions import rope_tables
from pycore.schedules import Causal, Full

torch.manual_seed(0)
for heads, kv_heads, length, keys, dim in ((2, 2, 17, 17, 40), (4, 2, 65, 113, 64), (1, 1, 130, 130, 96)):
    query = torch.randn(1, heads, length, dim)
    key, value = torch.randn(2, 1, kv_heads, keys, dim).unbind()
    rope = rope_tables(256, dim)
    for name, arguments in (
        ("causal", {"schedule": Causal()}),
        ("full", {"schedule": Full()}),
        ("lambda", {"sink_size": 3, "window_size": 20}),
        ("lambda, rope", {"sink_size": 3, "window_size": 20, "rope": rope}),
    ):
        op = ops.attention if "schedule" in arguments else ops.lambda_attention
        moved = dict(arguments)
        if "rope" in moved:
            moved["rope"] = tuple(table.cuda() for table in moved["rope"])
        ours = op(query.cuda(), key.cuda(), value.cuda(), **moved).cpu()
        error = (ours - op(query, key, value, **arguments)).abs().max().item()
        print(heads, kv_heads, length, keys, dim, name, error)
        assert error < 1e-4
PYTHON
if [[ $PYCORE_CUDA == off ]]; then
  :
elif command -v compute-sanitizer >/dev/null; then
  # Without torch's caching allocator every tensor is an allocation of its own, so an overrun is seen.
  for tool in memcheck racecheck; do
    stage "compute-sanitizer $tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" "$scratch/small.py"
  done
else
  skip "compute-sanitizer" "not installed"
fi

# ---- the CPU half, as far as time allows ------------------------------------------------------------------------------

stage "tests on the CPU" 150 "$PYTHON" -m pytest -q -m "not cuda and not slow" tests
stage "benchmarks on the CPU" 120 "$PYTHON" -m bench.run --quick --no-memory --only "L 8192" --out "$OUT"

# ---- what came of it ------------------------------------------------------------------------------------------------

echo
grep -hE "^(E  |FAILED |ERROR |[0-9]+ (passed|failed)|=+ .*(passed|failed|deselected))" "$log" | tail -20
sed -n '/^Limits in this run/,/^$/p;/contender .*median ms/,/json$/p' "$log"
cat "$scratch/machine"
finish
