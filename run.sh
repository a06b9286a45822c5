#!/usr/bin/env bash
# Head stage: SGD with checkpoints, then TWA on the first half of them.
#
#     bash run.sh [DATASET [ARCH [DATA_DIR]]]     Digits, PreResNet20 and ./datasets if left out
#     bash run.sh ImageNet resnet18 /path/to/imagenet
#
# Run again, it goes on where it was stopped. Edit the settings below for your own: for another SGD
# run, with another DST; for other settings of TWA on the same checkpoints, with another OUT.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh

datasets=${1:-Digits}
model=${2:-PreResNet20}
data_dir=${3:-./datasets}
DST=results/${model}_$datasets
OUT=$DST

if [ "$datasets" = ImageNet ]; then # as in the paper: TWA on the first 60 epochs, and on the last 30
    common=(--arch="$model" --batch-size 256 --amp
        --save-dir="$DST/checkpoints" --log-dir="$DST" -p 100 --resume)

    recipe() { # NAME FLAGS: TWA with these flags, to $OUT/NAME
        "$PYTHON" -u train_twa.py --datasets ImageNet --data-dir "$data_dir" --out "$OUT/$1" \
            "${@:2}" --opt SGD --extract Schmidt --train_start -1 --wd 0.00001 "${common[@]}"
    }

    "$PYTHON" -u train_sgd_imagenet.py "$data_dir" --epochs 90 --saves-per-epoch 5 --lr 0.1 \
        --wd 0.0001 "${common[@]}"
    recipe 60+2 --epochs 2 --params_start 0 --params_end 301 --lr 0.3 --schedule step
    recipe 90+1 --epochs 1 --params_start 301 --params_end 451 --lr 0.03 --schedule linear
    exit
fi

case $datasets in
    Digits) # seconds
        epochs=60 batch_size=32 saves_per_epoch=1 amp=
        params_end=31 twa_epochs=5
        twa="--opt SGD --schedule linear --start-average 10"
        ;;
    FashionMNIST) # about 15 minutes on two cores
        epochs=12 batch_size=128 saves_per_epoch=5 amp=--amp
        params_end=31 twa_epochs=2
        twa="--opt AdamW --granularity channel --schedule linear --start-average 5"
        ;;
    *) # CIFAR10 and CIFAR100, as in the paper
        epochs=200 batch_size=128 saves_per_epoch=1 amp=
        params_end=101 twa_epochs=10
        twa="--opt SGD --schedule step --lr 2 --train_start -1"
        ;;
esac

"$PYTHON" -u train_sgd_cifar.py --datasets "$datasets" --arch="$model" --data-dir "$data_dir" \
    --epochs=$epochs --lr 0.1 --batch-size $batch_size --saves-per-epoch $saves_per_epoch $amp \
    --save-dir="$DST/checkpoints" --log-dir="$DST" -p 100 --resume

"$PYTHON" -u train_twa.py --datasets "$datasets" --arch="$model" --data-dir "$data_dir" \
    --epochs $twa_epochs --extract Schmidt --params_start 0 --params_end $params_end \
    --wd 0.00001 --batch-size $batch_size $amp $twa \
    --save-dir="$DST/checkpoints" --log-dir="$DST" --out="$OUT" -p 100 --resume
