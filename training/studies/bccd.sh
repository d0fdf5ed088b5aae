#!/usr/bin/env bash
# BCCD blood smears: all five systems and plain pooling on a frozen EfficientNet-Lite0, the same 5 folds of one seed.
#
#   bash training/studies/bccd.sh BCCD runs/bccd       # BCCD holds manifest.csv (path,label) and boxes.csv
#
# It may be stopped and started again: what is finished is skipped, a run that was stopped goes on from its last epoch.
# Rows share their folds, but not their cost: each recipe says what its system reads. The answers are in
# OUT/comparison, and in RUN/fold1/explanations/localisation.json where the first fold's model looked in its true positives.
set -euo pipefail
data=$1 out=$2
recipes=$(dirname "$0")/../recipes

row() { # NAME RECIPE [further arguments of train]
    local run=$out/$1 resume=() features=()
    [ -f "$run/done" ] && return
    [ -f "$run/run.json" ] && resume=(--resume)
    case $2 in bccd_frozen | bccd_attn) features=(--cache "$out/cache") ;; esac # what these were trained on
    medattn train "$recipes/$2.toml" --data "$data/manifest.csv" --out "$run" --folds 5 --cache "$out/cache" "${@:3}" \
        "${resume[@]}"
    medattn evaluate "$run" "${features[@]}"
    medattn explain "$run/fold1" --split test --most 8 --truth "$data/boxes.csv" --truth-class Platelets
    touch "$run/done"
}

plain=(--set 'model.kernels=[]')
row average bccd_frozen "${plain[@]}" --set model.aggregation=mean
row max bccd_frozen "${plain[@]}" --set model.aggregation=max
row mims bccd_frozen
row attn bccd_attn
row fusion bccd_gated_fusion
row sampling bccd_sampling
row mask bccd_mask
row unmasked bccd_mask --set model.mask=none

runs=()
for name in average max mims attn fusion sampling unmasked mask; do runs+=("$name=$out/$name"); done
medattn compare "${runs[@]}" --figure auroc --out "$out/comparison"
