#!/usr/bin/env bash
# The studies behind docs/RESULTS.md, and the page itself:    bash evidence.sh [SEED ...]
#
# Seeds 1 2 3 6 7 if left out; many hours on two CPU cores. What is measured is not measured again, so
# it can be stopped and started at will, and several seeds can run side by side (OMP_NUM_THREADS=1
# then).
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

study() { # PART ARCH [DATA]
    "$PYTHON" -u evidence.py "$1" --arch "$2" --data "${3:-FashionMNIST-12k}" --seed "$seed"
}
cnn=studies.architectures:cnn

[ $# -gt 0 ] || set -- 1 2 3 6 7
for seed; do
    study head PreResNet20
    study head $cnn
done
for seed in 4 5; do study units PreResNet20; done
"$PYTHON" evidence.py report
