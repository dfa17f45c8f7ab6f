#!/usr/bin/env bash
# Everything that needs a GPU: kernels, engine, benchmark. Wants only what models/ needs, not the whole stack.
#   tests/gpu/run.sh FOLDER    logs go to FOLDER; each part has its own limit, and none stops the others
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a folder for the logs}
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1 && echo "$name: ok" || { echo "$name: FAILED ($?)"; failed=1; }
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
}

pytest=("$python" -m pytest -c /dev/null --rootdir=. --import-mode=importlib -p no:cacheprovider -q -s)
part kernels 120 "${pytest[@]}" --confcutdir=tests/unit/models tests/unit/models/test_triton_kernels.py
part engine 150 "${pytest[@]}" --confcutdir=tests/gpu tests/gpu
LINES_SHOWN=40 part benchmark "${BENCHMARK_SECONDS:-240}" "$python" -c 'from benchmarks.gpu import measure; measure(quick=False)'
cp benchmarks/results/gpu.json "$out/" 2> /dev/null
exit $failed
