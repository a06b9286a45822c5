#!/usr/bin/env bash
# Language models, second half: TWA over the checkpoints that run.sh left, with as many steps as its
# decay; a table and a figure of all, and a line that each model writes.
#
#     bash run_twa.sh [ARCH [DATA]]     as given to run.sh, SEED too
set -euo pipefail
cd "$(dirname "$0")"
. ../env.sh

arch=${1:-gpt}
data=$(path_of "${2-}" "")
seed=${SEED:-1}
dir=../results/lm_$arch${2:+_$(basename "$2")}/seed$seed

# The window: the last 60 checkpoints of run.sh.
case $arch in
    gpt) twa="--batch-size 8 --params_start 21 --params_end 81 --steps 100" ;;
    *) twa="--batch-size 64 --context 1024 --params_start 21 --params_end 81 --steps 1000" ;;
esac

"$PYTHON" -u ../train_twa.py --datasets Text ${data:+--data-dir "$data"} --arch "$arch" $twa \
    --granularity channel --amp --seed "$seed" --save-dir "$dir/checkpoints" --log-dir "$dir" \
    -p 100 --resume
"$PYTHON" -u show.py --dir "$dir" --decay-dir "$dir/decay" --out "$dir"
