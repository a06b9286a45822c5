#!/usr/bin/env bash
# The study of the fine-tune stage: soups of 12 models on FashionMNIST with PreResNet20.
#
#     bash study.sh [SEED ...]        seeds 1 2 3 if left out; about 15 minutes of one core each
#
# What is finished is not run again; see ../all.sh. Ends with the tables of the pages.
set -euo pipefail
cd "$(dirname "$0")"
. ../../env.sh

base_epochs=4
base="--lr 0.1 --schedule constant"
finetune="--models 12 --lr 0.001 0.3 --wd 1e-4 1e-3 --epochs 1 2 --label-smoothing 0 0.1
    --randaugment 0 5 --images 10000"
soup="--epochs 3 --bn-images 5000"
mkdir -p results

[ $# -gt 0 ] || set -- 1 2 3
for seed; do
    dir=../../results/soup_study/$seed
    common="--datasets FashionMNIST --data-dir ../../datasets --arch PreResNet20 --batch-size 128
        --amp --val-ratio 10 --randomseed $seed -p 100"
    "$PYTHON" -u ../../train_sgd_cifar.py $common --split --epochs $base_epochs $base \
        --save-dir "$dir/checkpoints" --log-dir "$dir" --resume
    "$PYTHON" -u ../../soup/finetune.py $common --base "$dir/checkpoints/$base_epochs.pt" \
        $finetune --save-dir "$dir/models"
    for kind in "t v" "v --granularity layer" "v --granularity layer --bits 4"; do
        "$PYTHON" -u ../../soup/soup.py $common --checkpoints "$dir/models/*.pt" --log-dir "$dir" \
            $soup --twa $kind
        cp "$dir/results.jsonl" "results/$seed.jsonl"
    done
done
"$PYTHON" ../report.py
