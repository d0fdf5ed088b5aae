#!/usr/bin/env bash
# Does one mask for all images help? IDRiD at 224 px on a frozen EfficientNet-Lite0, 15 joint of 60 epochs, 3 seeds.
#
#   bash training/studies/idrid_mask.sh IDRID_224 runs/idrid_mask [edema|retinopathy]
#
# Runs that are finished are left as they are, a stopped one goes on. IDRID_224: see idrid_mask.py. Rows: the plain CNN;
# one weight a pixel under L1, with the least lambda of the paper's grid; the global mask with the paper's lambda times the
# sum of the mask, and times its mean (50,176 times weaker at 224 px). The backbone is frozen in all
# of them: its features are computed once where the mask rests, anew in each step where it learns. The head learns at 3e-3,
# chosen by five-fold cross validation on the training side; the mask at the paper's 1e-4; the single weights at the head's
# rate, so that in 15 epochs they can move as far as in the paper's 250. The last epoch counts.
# The network whole, as the paper has it: training/recipes/idrid_edema_mask.toml.
set -euo pipefail
source=$1 out=$2 task=${3:-edema}
here=$(dirname "$0") seeds="0 1 2"
recipe=$here/../recipes/idrid_${task}_mask.toml
frozen="data.set= model.backbone=efficientnet_lite0 model.joint_epochs=15 train.epochs=60 train.frozen_stride=32"
frozen="$frozen train.cached_views=1 train.learning_rate=3e-3 train.backbone_rate=0.0333 train.schedule=cosine"

[ -f "$out/$task/images/manifest.csv" ] || python "$here/idrid_mask.py" "$source" "$out/$task/images" --task "$task"

train() { # name, settings
    local run=$out/$task/$1 settings=() resume=()
    shift
    for setting in $frozen "$@"; do settings+=(--set "$setting"); done
    [ -f "$run/done" ] && return
    if [ -f "$run/run.json" ]; then resume=(--resume); fi
    # shellcheck disable=SC2086
    medattn train "$recipe" --data "$out/$task/images/manifest.csv" --out "$run" --seeds $seeds "${settings[@]}" \
        "${resume[@]}"
    medattn evaluate "$run"
    touch "$run/done"
}

train plain model.mask=none
train pixels model.mask=pixels model.l1=1 train.backbone_rate=1.0
train mask_sum model.l1=0.001 model.reduction=sum
train mask_mean model.l1=0.001 model.reduction=mean

runs=()
for name in plain pixels mask_sum mask_mean; do runs+=("$name=$out/$task/$name"); done
for figure in accuracy auroc quadratic_kappa; do
    medattn compare "${runs[@]}" --figure $figure --out "$out/$task/compared_$figure"
done
for name in mask_sum mask_mean; do
    medattn explain "$out/$task/$name/seed0" --split test --most 4 --out "$out/$task/$name/explained"
done
