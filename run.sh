#!/usr/bin/env bash
# Head stage: SGD with checkpoints, then TWA on the first half of them.
#
#     bash run.sh [DATASET [ARCH [DATA_DIR]]]     Digits, PreResNet20 and ./datasets if left out
#     bash run.sh ImageNet resnet18 /path/to/imagenet
#     SEED=2 bash run.sh
#
# Run again, it goes on where it was stopped. Edit the settings below for your own: for another SGD
# run, with another DST; for other settings of TWA on the same checkpoints, with another OUT.
#
# The paper's method is there by its own flags: for TWA on CIFAR
#     --opt SGD --extract Schmidt --schedule step --lr 2 --wd 0.00001 --train_start -1
# and on ImageNet, with an --out of their own,
#     --opt SGD --extract Schmidt --schedule step --lr 0.3 --wd 0.00001 --train_start -1      (60+2)
#     --opt SGD --extract Schmidt --schedule linear --lr 0.03 --wd 0.00001 --train_start -1   (90+1)
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh

datasets=${1:-Digits}
model=${2:-PreResNet20}
data_dir=$(path_of "${3-}" ./datasets)
seed=${SEED:-1}
DST=results/${model}_$datasets/seed$seed
OUT=$DST

common=(--arch="$model" --save-dir="$DST/checkpoints" --log-dir="$DST" --seed "$seed" -p 100 --resume)
twa() { # FLAGS
    "$PYTHON" -u train_twa.py --datasets "$datasets" --data-dir "$data_dir" "${common[@]}" "$@"
}

if [ "$datasets" = ImageNet ]; then # as in the paper: TWA on the first 60 epochs, and on the last 30
    common+=(--batch-size 256 --amp)
    "$PYTHON" -u train_sgd_imagenet.py "$data_dir" --epochs 90 --saves-per-epoch 5 --lr 0.1 \
        --wd 0.0001 "${common[@]}"
    twa --epochs 2 --granularity model --params_start 0 --params_end 301 --out "$OUT/60+2"
    twa --epochs 1 --granularity model --params_start 301 --params_end 451 --out "$OUT/90+1"
    exit
fi

case $datasets in
    Digits) # a minute
        epochs=60 saves_per_epoch=1 params_end=31 twa_epochs=5 granularity=model
        common+=(--batch-size 32)
        ;;
    FashionMNIST) # about 15 minutes on two cores
        epochs=12 saves_per_epoch=5 params_end=31 twa_epochs=2 granularity=channel
        common+=(--batch-size 128 --amp)
        ;;
    *) # CIFAR10 and CIFAR100: epochs as in the paper
        epochs=200 saves_per_epoch=1 params_end=101 twa_epochs=10 granularity=model
        common+=(--batch-size 128)
        ;;
esac

"$PYTHON" -u train_sgd_cifar.py --datasets "$datasets" --data-dir "$data_dir" --epochs $epochs \
    --lr 0.1 --saves-per-epoch $saves_per_epoch "${common[@]}"

twa --epochs $twa_epochs --params_start 0 --params_end $params_end --granularity $granularity \
    --out "$OUT"
