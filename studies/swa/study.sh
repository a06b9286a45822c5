#!/usr/bin/env bash
# The study of the tail stage: SGD, SWA and TWA on FashionMNIST with PreResNet20.
#
#     bash study.sh [SEED ...]        seeds 1 2 3 if left out; about an hour of one core each
#
# What is in results/ is not run again; see ../all.sh. Ends with the tables of the pages.
set -euo pipefail
cd "$(dirname "$0")"
. ../../env.sh

epochs=10 swa_start=5
work=../../results/swa_study
mkdir -p results

# train NAME [FLAGS]: a run of swa/train.py in $work/NAME.SEED; nothing where it is finished.
train() {
    "$PYTHON" -u ../../swa/train.py --dir "$work/$1.$seed" --dataset FashionMNIST \
        --data_path ../../datasets --model PreResNet20 --epochs $epochs --lr_init 0.1 --wd 1e-4 \
        --batch_size 128 --amp --seed "$seed" -p 1000 --resume "${@:2}"
}

# sgd NAME [FLAGS]: the results of such a run, NAME.SEED.json.
sgd() {
    [ -e "results/$1.$seed.json" ] && return
    train "$@"
    cp "$work/$1.$seed/swa.json" "results/$1.$seed.json"
}

# twa NAME FLAGS: train_twa.py over the tail of $run; its results are RUN.NAME.SEED.json.
twa() {
    local dir=$work/$run.$seed kept=results/$run.$1.$seed.json
    [ -e "$kept" ] && return
    train "$run" "${tail[@]}" # Its checkpoints may be gone where its results are not.
    "$PYTHON" -u ../../train_twa.py --datasets FashionMNIST --data-dir ../../datasets \
        --arch PreResNet20 --params_start $swa_start --params_end $((epochs + 1)) --epochs 1 \
        --batch-size 128 --amp --randomseed "$seed" -p 1000 --resume "${@:2}" \
        --save-dir "$dir/checkpoints" --log-dir "$dir" --out "$dir/$1"
    cp "$dir/$1/twa.json" "$kept"
}

[ $# -gt 0 ] || set -- 1 2 3
for seed; do
    for swa_lr in 0.05 0.1; do
        run=swa$swa_lr tail=(--swa --swa_start $swa_start --swa_lr $swa_lr --eval_freq 5)
        sgd "$run" "${tail[@]}"
        # The paper's choices but for the rate: from the last checkpoint, step schedule.
        paper="--extract Schmidt --opt SGD --lr 0.37"
        twa paper $paper --schedule step --train_start $epochs --wd 5e-5
        twa mean $paper --schedule linear --train_start -1 --wd 1e-5
        # Coefficients in units of the window's spread, by model.
        twa spread --granularity model
        twa channel --granularity channel
        if [ ! -e "results/$run.sgd.$seed.json" ]; then
            train "$run" "${tail[@]}"
            "$PYTHON" -u ../tail.py "$run" "$seed"
        fi
    done
    # The usual alternative to a tail: the rate falls to 0.01 · lr_init over all epochs.
    sgd sgd
done
"$PYTHON" ../report.py
