#!/usr/bin/env bash
# IDRiD, referable retinopathy: two systems that read the photograph of 4288 x 2848 pixels, against the same frozen
# EfficientNet-Lite0 on the photograph shrunk to 512 and 224 pixels; the set's own split, 3 seeds.
#
#   bash training/studies/idrid_referable.sh IDRiD runs/idrid_referable [LESION_MASKS]
#
# IDRiD holds `B. Disease Grading` as distributed; LESION_MASKS masks SPLIT_IDRiD_NNN_KIND.png, to see where each
# looked: RUN/seed0/explained_test and explained_train. It may be stopped and started again. The answers are in
# OUT/comparison; seconds and memory an image in each run's evaluation/metrics.json, `timing`.
set -euo pipefail
data=$1 out=$2 masks=${3:-}
recipes=$(dirname "$0")/../recipes

row() { # NAME RECIPE [further arguments of train]
    local run=$out/$1 resume=() truth=()
    [ -f "$run/done" ] && return
    [ -f "$run/run.json" ] && resume=(--resume)
    medattn train "$recipes/$2.toml" --data "$data" --out "$run" --seeds 0 1 2 --cache "$out/cache" \
        --set data.disk_gb=9 "${@:3}" "${resume[@]}"
    medattn evaluate "$run"
    [ -n "$masks" ] && truth=(--truth "$masks" --truth-class MA,HE,EX,SE)
    for side in test train; do # few of the test photographs have masks; no model was ever shown one
        medattn explain "$run/seed0" --split $side --most 6 "${truth[@]}" --out "$run/seed0/explained_$side"
    done
    touch "$run/done"
}

shrunk=(--set data.set=idrid_referable --set 'data.classes=[]' --set 'model.kernels=[]' --set model.aggregation=mean)
row shrunk_224 bccd_frozen "${shrunk[@]}" --set 'data.image_size=[224, 224]'
row shrunk_512 bccd_frozen "${shrunk[@]}" --set 'data.image_size=[512, 512]'
row fusion idrid_referable_fusion
row sampling idrid_referable_sampling
row uniform idrid_referable_sampling --set model.attention=uniform

runs=()
for name in shrunk_224 shrunk_512 fusion sampling uniform; do runs+=("$name=$out/$name"); done
medattn compare "${runs[@]}" --figure auroc --out "$out/comparison"
