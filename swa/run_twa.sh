#!/usr/bin/env bash
# Tail stage, second half: TWA over the checkpoints that run.sh averaged equally.
#
#     bash run_twa.sh [DATASET [MODEL [DATA_DIR]]]     as given to run.sh, SEED and SWA_LR too
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

dataset=${1:-Digits}
model=${2:-PreResNet20}
data_path=$(path_of "${3-}" ../datasets)
seed=${SEED:-1}
swa_lr=${SWA_LR:-0.05}

# The window is [swa_start, epochs + 1) of run.sh.
case $dataset/$model in
    Digits/*)
        params_start=21 params_end=41 epochs=5 granularity=model batch_size=32 amp=
        ;;
    FashionMNIST/*)
        params_start=5 params_end=11 epochs=1 granularity=channel batch_size=128 amp=--amp
        ;;
    */PreResNet*) # epochs as in the paper's recipe for PreResNet164
        params_start=126 params_end=226 epochs=10 granularity=model batch_size=128 amp=
        ;;
    *) # epochs as in the paper's recipe for VGG16BN
        params_start=161 params_end=301 epochs=10 granularity=model batch_size=128 amp=
        ;;
esac
# The paper's own settings, from the last checkpoint on:
#     --opt SGD --extract Schmidt --schedule step --lr 2 --wd 5e-5 --train_start $((params_end - 1))

dir=../results/swa_${model}_$dataset/swa_lr$swa_lr.seed$seed
"$PYTHON" -u ../train_twa.py --datasets "$dataset" --arch "$model" --data-dir "$data_path" \
    --params_start $params_start --params_end $params_end --epochs $epochs \
    --granularity $granularity --batch-size $batch_size $amp --randomseed "$seed" \
    --save-dir "$dir/checkpoints" --log-dir "$dir" -p 100 --resume
