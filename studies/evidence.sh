#!/usr/bin/env bash
# The studies behind docs/RESULTS.md, and the page itself:    bash evidence.sh [SEED ...]
#
# Seeds 1 2 3 if left out; many hours on two CPU cores. What is measured is not measured again, so
# it can be stopped and started at will, and several seeds can run side by side (OMP_NUM_THREADS=1
# then).
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

study() { # PART ARCH [DATA]
    "$PYTHON" -u evidence.py "$1" --arch "$2" --data "${3:-FashionMNIST-12k}" --seed "$seed"
}
cnn=studies.architectures:cnn
vit=studies.architectures:vit

[ $# -gt 0 ] || set -- 1 2 3
for seed; do
    study head PreResNet20
    study head $cnn
    study spread PreResNet20
    study spread $cnn
    for arch in PreResNet20 $cnn $vit; do study rates $arch; done
    for arch in PreResNet20 $cnn; do study settings $arch; done
    for part in checkpoints second-order little; do study $part PreResNet20; done
    study little PreResNet20 FashionMNIST-12k-noisy
    study head PreResNet20 FashionMNIST
done
for seed in 4 5; do study units PreResNet20; done
for seed in 6 7; do
    for part in head spread; do
        for arch in PreResNet20 $cnn; do study $part $arch; done
    done
done
seed=1
study plane PreResNet20
study cost PreResNet20
study cost $cnn
"$PYTHON" evidence.py report
