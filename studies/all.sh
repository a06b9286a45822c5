#!/usr/bin/env bash
# All studies behind docs/RESULTS.md, and its pages:    bash all.sh
#
# Days on two CPU cores; can be stopped and started at will, as nothing is measured twice. Seeds can
# run side by side (OMP_NUM_THREADS=1 then) once the first has chosen the rates of the baselines.
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

for seed in 1 2 3 6 7; do
    for arch in PreResNet20 studies.architectures:cnn; do
        "$PYTHON" -u head.py --arch $arch --seed $seed
    done
done
for seed in 4 5; do "$PYTHON" -u head.py --part units --seed $seed; done
bash swa/study.sh
bash soup/study.sh
for seed in 1 2 3; do "$PYTHON" -u language.py --text python --seed $seed; done
for seed in 4 5 6; do "$PYTHON" -u language.py --text linux --seed $seed; done
"$PYTHON" -u safety.py
"$PYTHON" -u digits.py
"$PYTHON" report.py
