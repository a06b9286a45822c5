#!/usr/bin/env bash
# The study behind the table in README.md: SGD, SWA and TWA on FashionMNIST with PreResNet20.
#
#     bash study.sh [SEED ...]        seeds 1 2 3 if left out; about 45 minutes of one core each
#
# Each part that stands already is left alone, so it can be stopped and started at will, and
# several seeds can run side by side. Prints the table at the end (python summary.py).
set -euo pipefail
cd "$(dirname "$0")"
. ../../env.sh

epochs=10 swa_start=5
common="--dataset FashionMNIST --data_path ../../datasets --model PreResNet20 --epochs $epochs
    --lr_init 0.1 --wd 1e-4 --batch_size 128 --amp -p 1000 --resume"
study=../../results/swa_study
mkdir -p results

# A run of train_twa.py over the tail of $1 with the seed $2, its results kept as $1.$2.$3.json.
twa() {
    local dir=$study/$1.$2 kept=results/$1.$2.$3.json
    [ -e "$kept" ] && return
    "$PYTHON" -u ../../train_twa.py --datasets FashionMNIST --data-dir ../../datasets --arch PreResNet20 \
        --params_start $swa_start --params_end $((epochs + 1)) --batch-size 128 --amp -p 1000 \
        --randomseed "$2" --save-dir "$dir/checkpoints" --log-dir "$dir" "${@:4}"
    cp "$dir/twa.json" "$kept"
}

[ $# -gt 0 ] || set -- 1 2 3
for seed; do
    for swa_lr in 0.05 0.1; do
        dir=$study/swa$swa_lr.$seed kept=results/swa$swa_lr.$seed.json
        [ -e "$kept" ] || "$PYTHON" -u ../../swa/train.py --dir "$dir" $common --seed "$seed" \
            --swa --swa_start $swa_start --swa_lr $swa_lr --eval_freq 5
        [ -e "$kept" ] || cp "$dir/swa.json" "$kept"
        # The paper's choices but for the rate (started at the last checkpoint, step schedule), then
        # from the mean of the window.
        twa swa$swa_lr "$seed" paper --epochs 1 --schedule step --train_start $epochs --wd 5e-5 --lr 0.37
        twa swa$swa_lr "$seed" mean --epochs 1 --schedule linear --train_start -1 --lr 0.37
    done
done

# The usual alternative to a tail: the rate falls to 0.01 · lr_init over all epochs.
for seed; do
    dir=$study/sgd.$seed kept=results/sgd.$seed.json
    [ -e "$kept" ] || "$PYTHON" -u ../../swa/train.py --dir "$dir" $common --seed "$seed"
    [ -e "$kept" ] || cp "$dir/swa.json" "$kept"
done
"$PYTHON" summary.py
