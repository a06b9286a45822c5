#!/usr/bin/env bash
# Language models, first half: a run at a constant rate, and the decay that it would end with.
# Then: bash run_twa.sh
#
#     bash run.sh [ARCH [DATA]]     gpt and the source of Python's standard library if left out
#     SEED=2 bash run.sh            another seed, in a folder of its own
#
# DATA is a file or a folder of text. The folder of results bears its name without the folders above it,
# so that /a/corpus and /b/corpus would share one: rename one of the two. Run again, it goes on where it
# was stopped. Edit the settings below for your own.
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

arch=${1:-gpt}
data=$(path_of "${2-}" "")
seed=${SEED:-1}
dir=../results/lm_$arch${2:+_$(basename "$2")}/seed$seed

case $arch in
    gpt) # a few minutes on two cores: 1,024 bytes a step
        run="--batch-size 8 --steps 2000 --test-every 1000 --save-every 25 --lr 2e-3"
        decay="--steps 100 --decay 1-sqrt --decay-steps 100 --warmup 0 --test-every 100 --save-every 25"
        ;;
    *) # for a GPU
        run="--batch-size 64 --context 1024 --steps 20000 --test-every 1000 --save-every 250 --lr 6e-4 --warmup 1000"
        decay="--steps 1000 --decay 1-sqrt --decay-steps 1000 --warmup 0 --test-every 1000 --save-every 250"
        ;;
esac
common=(--arch "$arch" ${data:+--data-dir "$data"} --amp --seed "$seed" -p 100 --resume)

"$PYTHON" -u train.py --dir "$dir" $run "${common[@]}"
"$PYTHON" -u train.py --dir "$dir/decay" $run $decay --initial "$dir/checkpoints/state.pt" "${common[@]}"
