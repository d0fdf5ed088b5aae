#!/usr/bin/env bash
# Megapixel MNIST at 256 pixels: attention sampling by each estimator, uniform patches, and the same CNN on the image
# shrunk to as many pixels as the patches have; 3 seeds each.
#
#   training/studies/megapixel_mnist.sh [OUT] [further arguments of train]       # default: runs/megapixel_mnist
#
# About 45 minutes on 2 idle cores, from the processor time of single steps: 2.5 minutes a run of 30 epochs, 18 runs.
# It may be stopped and started again: what is finished is skipped, a run that was stopped goes on from its last epoch.
# The answers are in OUT/comparison: errors (1 - accuracy), intervals, learning curves, epochs of the plateau; where they
# looked in OUT/NAME/seed0/explanations. Seconds mean something on an idle machine alone: benchmarks/run_steps.py.
set -euo pipefail
out=${1:-runs/megapixel_mnist}
further=("${@:2}")
recipes=$(dirname "$0")/../recipes
digits=$out/digits

train() { # RECIPE NAME [further arguments of train]
    local recipe=$recipes/$1.toml run=$out/$2 resume=()
    [ -f "$run/evaluation/metrics.json" ] && return
    [ -f "$run/run.json" ] && resume=(--resume)
    medattn train "$recipe" --data "$digits/manifest.csv" --out "$run" --seeds 0 1 2 \
        "${@:3}" "${further[@]}" "${resume[@]}"
}

sampled() { # NAME [further arguments of train]
    train megapixel_mnist_small "$@"
    [ -f "$out/$1/evaluation/metrics.json" ] || medattn evaluate "$out/$1" --draws 16
}

expectation=(--set model.estimator=expectation --set model.aggregation=mean)

if [ ! -f "$digits/manifest.csv" ]; then
    medattn make megapixel-mnist --out "$digits" --size 256 --train 2000 --val 200 --test 500
fi
sampled expectation "${expectation[@]}"
sampled expectation_without "${expectation[@]}" --set model.replacement=false
sampled reinforce_patch
sampled reinforce_image --set model.reward=image
sampled uniform --set model.attention=uniform
train megapixel_mnist_shrunk shrunk
[ -f "$out/shrunk/evaluation/metrics.json" ] || medattn evaluate "$out/shrunk"

medattn compare uniform="$out/uniform" shrunk="$out/shrunk" reinforce_patch="$out/reinforce_patch" \
    reinforce_image="$out/reinforce_image" expectation="$out/expectation" \
    expectation_without="$out/expectation_without" --figure accuracy --out "$out/comparison"
for name in expectation reinforce_image; do
    [ -d "$out/$name/seed0/explanations" ] ||
        medattn explain "$out/$name/seed0" --split test --most 6 --truth "$digits/boxes.csv" --truth-class target
done
