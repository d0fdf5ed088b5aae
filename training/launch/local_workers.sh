#!/usr/bin/env bash
# Trains with N workers on this machine, each on a GPU of its own where it has some: what several machines do,
# to be tried on one. What the others print goes to worker1.log, ... here.
#
#   training/launch/local_workers.sh N RECIPE --data DATA --out RUN [further arguments of medattn train]
set -euo pipefail

count=${1:?how many workers?}
shift
first=${PORT:-23450} # of N ports in a row
addresses=$(for ((i = 0; i < count; i++)); do printf '"localhost:%d",' $((first + i)); done)

worker() {
    export TF_CONFIG="{\"cluster\": {\"worker\": [${addresses%,}]}, \"task\": {\"type\": \"worker\", \"index\": $1}}"
    export CUDA_VISIBLE_DEVICES="$1"
    exec medattn train "${@:2}"
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
others=()
for ((i = 1; i < count; i++)); do
    worker "$i" "$@" >"worker$i.log" 2>&1 &
    others+=($!)
done
(worker 0 "$@")
for other in "${others[@]}"; do wait "$other"; done
