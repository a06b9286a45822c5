#!/usr/bin/env bash
# The tests:     bash test.sh [--slow | --examples] [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
# One thread: small tensors gain nothing from more, and child processes share the cores. Two
# processes: each takes a half of the tests and then what the other has left.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 --dist worksteal "$@"
