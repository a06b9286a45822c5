#!/usr/bin/env bash
# Fine-tune stage: a base model, a dozen fine-tunings of it, and their soups.
#
#     bash run.sh [DATASET [MODEL [DATA_DIR]]]     Digits, PreResNet20, ../datasets if left out
#     SEED=2 bash run.sh                           another seed, in a folder of its own
#
# Run again, it goes on where it was stopped. Edit the settings below for your own.
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

dataset=${1:-Digits}
model=${2:-PreResNet20}
data_dir=$(path_of "${3-}" ../datasets)
seed=${SEED:-1}
dir=../results/soup_${model}_$dataset/seed$seed

case $dataset/$model in
    Digits/*) # a minute
        base_epochs=10 base="--lr 0.1 --schedule constant" val_ratio=20 batch_size=32 amp=
        finetune="--lr 0.001 0.3 --wd 1e-4 1e-3 --epochs 2 4 --label-smoothing 0 0.1 --randaugment 0 5"
        soup="--epochs 10"
        ;;
    FashionMNIST/*) # about 15 minutes of one core
        base_epochs=4 base="--lr 0.1 --schedule constant" val_ratio=10 batch_size=128 amp=--amp
        finetune="--lr 0.001 0.3 --wd 1e-4 1e-3 --epochs 1 2 --label-smoothing 0 0.1 --randaugment 0 5
            --images 10000"
        soup="--epochs 3 --bn-images 5000"
        ;;
    */ViT) # the transformer recipe
        base_epochs=200 val_ratio=2 batch_size=128 amp=--amp
        base="--optimizer adamw --lr 5e-4 --wd 0.05 --schedule cosine --warmup-epochs 10
            --label-smoothing 0.1 --clip-grad 1 --randaugment 9"
        finetune="--optimizer adamw --clip-grad 1 --warmup-epochs 1 --lr 1e-6 1e-4 --wd 0.01 0.1
            --epochs 4 8 --label-smoothing 0 0.1 --randaugment 0 9 15"
        soup="--epochs 10"
        ;;
    *)
        base_epochs=100 base="--lr 0.1 --schedule cosine" val_ratio=2 batch_size=128 amp=
        finetune="--lr 0.0001 0.1 --wd 1e-4 1e-3 --epochs 4 8 --label-smoothing 0 0.1
            --randaugment 0 5 9"
        soup="--epochs 10"
        ;;
esac
# What is held out is the same for all three: the share and the seed decide.
common=(--datasets "$dataset" --arch "$model" --data-dir "$data_dir" --batch-size $batch_size $amp
    --val-ratio $val_ratio --randomseed "$seed" -p 100)

"$PYTHON" -u ../train_sgd_cifar.py "${common[@]}" --split --epochs $base_epochs $base \
    --save-dir "$dir/checkpoints" --log-dir "$dir" --resume

"$PYTHON" -u finetune.py "${common[@]}" --base "$dir/checkpoints/$base_epochs.pt" --models 12 $finetune \
    --save-dir "$dir/models"

for kind in "t v" "v --granularity layer" "v --granularity layer --bits 4"; do
    "$PYTHON" -u soup.py "${common[@]}" --checkpoints "$dir/models/*.pt" $soup --log-dir "$dir" --twa $kind
done
