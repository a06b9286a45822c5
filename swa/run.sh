#!/usr/bin/env bash
# Tail stage, first half: SGD with stochastic weight averaging. Then: bash run_twa.sh
#
#     bash run.sh [DATASET [MODEL [DATA_DIR]]]     Digits, PreResNet20, ../datasets if left out
#
# SEED and SWA_LR of the environment name the folder too. Run again, it goes on where it was stopped.
# Edit the settings below for your own.
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

dataset=${1:-Digits}
model=${2:-PreResNet20}
data_path=$(path_of "${3-}" ../datasets)
seed=${SEED:-1}
swa_lr=${SWA_LR:-0.05} # the paper also reports 0.10

case $dataset/$model in
    Digits/*) # a minute
        epochs=40 lr_init=0.1 wd=1e-4 swa_start=21 batch_size=32 amp=
        ;;
    FashionMNIST/*) # about 10 minutes on two cores
        epochs=10 lr_init=0.1 wd=1e-4 swa_start=5 batch_size=128 amp=--amp
        ;;
    */PreResNet*) # the paper's recipe for PreResNet164
        epochs=225 lr_init=0.1 wd=3e-4 swa_start=126 batch_size=128 amp=
        ;;
    *) # the paper's recipe for VGG16BN
        epochs=300 lr_init=0.1 wd=5e-4 swa_start=161 batch_size=128 amp=
        ;;
esac

"$PYTHON" -u train.py --dir "../results/swa_${model}_$dataset/swa_lr$swa_lr.seed$seed" \
    --dataset "$dataset" --data_path "$data_path" --model "$model" --epochs $epochs \
    --lr_init $lr_init --wd $wd --batch_size $batch_size $amp --seed "$seed" \
    --swa --swa_start $swa_start --swa_lr "$swa_lr" -p 100 --resume
