#!/usr/bin/env bash
# One call per node, each with its own RANK; HOST is the first node's address, as the others reach it:
#     launch/several_nodes.sh NODES RANK HOST PROCESSES_PER_NODE [mde_dist.train options …]
# The run directory and the shards have to be visible on all nodes. PORT (29500) may be set in the environment.
set -euo pipefail
. "$(dirname "$0")/env.sh"
usage="usage: launch/several_nodes.sh NODES RANK HOST PROCESSES_PER_NODE [options of mde_dist.train]"
nodes=${1:?$usage} rank=${2:?$usage} host=${3:?$usage} per_node=${4:?$usage}
shift 4
module=${MDE_DIST_MODULE:-mde_dist.train}
# a lone process needs no launcher, which would die at the signals that it is to answer
[ $((nodes * per_node)) -gt 1 ] || exec python -m "$module" "$@"
exec accelerate launch --multi_gpu --same_network --num_machines "$nodes" --num_processes $((nodes * per_node)) \
    --machine_rank "$rank" --main_process_ip "$host" --main_process_port "${PORT:-29500}" \
    --mixed_precision no --dynamo_backend no -m "$module" "$@"
