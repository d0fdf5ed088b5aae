#!/usr/bin/env bash
# Trains on several nodes, one worker a node with all its GPUs. RUN, DATA and the environment lie where all nodes
# see them. Requeued, it goes on from the last checkpoint.
#
#   sbatch --nodes=2 training/launch/slurm.sh RECIPE --data DATA --out RUN [further arguments of medattn train]
#SBATCH --job-name=medattn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?a recipe, --data DATA and --out RUN are missing}"
out=
for ((i = 1; i < $#; i++)); do
    [ "${!i}" = --out ] && { j=$((i + 1)) && out=${!j}; }
done
resume=()
[ -f "$out/run.json" ] && resume=(--resume)

# --kill-on-bad-exit: a lost worker ends the others at once
srun --kill-on-bad-exit=1 bash -c '
    TF_CONFIG="$(python -m keras_medattn.train.cluster)" || exit 1
    export TF_CONFIG
    exec medattn train "$@"
' medattn "$@" "${resume[@]}"
