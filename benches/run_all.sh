#!/usr/bin/env bash
# Every comparison with TRL, then the page: benches/run_all.sh PEER_PYTHON [THREADS]. About an hour on two idle cores.
set -euo pipefail
cd "$(dirname "$0")/.."
peer=${1:?usage: run_all.sh PEER_PYTHON [THREADS]}
threads=${2:-2}
python=${PYTHON:-.venv/bin/python}
against() { "$python" benches/against_trl.py --peer-python "$peer" --threads "$threads" "$@"; }
against --workload tiny --dtype fp32 --pairs 9
against --workload tiny-lognormal --dtype fp32 --pairs 9
against --workload tiny --dtype bf16 --pairs 5
against --workload medium --dtype fp32 --pairs 5
against --workload medium-lognormal --dtype fp32 --pairs 3
against --workload medium --dtype bf16 --pairs 3
"$python" benches/equal_learning.py --peer-python "$peer" --side both --evaluate
"$python" benches/against_trl.py --page
