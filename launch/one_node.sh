#!/usr/bin/env bash
# Several processes on this machine, one per GPU (or as many as you say on a CPU):
#     launch/one_node.sh PROCESSES [mde_dist.train options …]
set -euo pipefail
. "$(dirname "$0")/env.sh"
processes=${1:?"usage: launch/one_node.sh PROCESSES [options of mde_dist.train]"}
shift
# a lone process needs no launcher, which would die at the signals that it is to answer
[ "$processes" -gt 1 ] || exec python -m mde_dist.train "$@"
exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$processes" --main_process_port 0 \
    --mixed_precision no --dynamo_backend no -m mde_dist.train "$@"
