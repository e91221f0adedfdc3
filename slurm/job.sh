# shellcheck shell=bash disable=SC2034,SC2154  # code, stopping, ending, container and max_restarts are shared with the scripts
# What the job scripts share; they source it in the folder that they were submitted from.

. launch/env.sh || { echo "error: submit from the repository's folder" >&2; return 1; }

# start_step RANKS_PER_NODE MODULE [options …]: one launcher on each node, and wait for all. Sets code, the exit code of
# the step; stopping, not empty where a signal asked this script to make room; and ending, where SLURM is ending the job.
start_step() {
    local per_node=$1 host waiting
    export MDE_DIST_MODULE=$2
    shift 2
    # the first node's address as SLURM itself reaches it: a node's name need not be one that resolves
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    host=$(scontrol show --oneliner node "$host" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
    export PORT=$((20000 + SLURM_JOB_ID % 20000))
    code='' stopping=${stopping:-} ending='' step=''
    # signals reach the ranks by way of srun, which runs beside this shell: a shell that waits for a command in the
    # foreground would answer only when it is over
    trap 'waiting=1; stopping=1; [ -z "$step" ] || kill -USR2 "$step"' USR1 USR2
    trap 'waiting=1; ending=1' TERM
    echo "job: $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date +%FT%T)"
    # the number of a node is known on the node only, so that the inner shell has to look it up
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
        "${container[@]}" bash -c 'exec launch/several_nodes.sh "$SLURM_NNODES" "$SLURM_NODEID" "$@"' \
        launcher "$host" "$per_node" "$@" &
    step=$!
    [ -z "$stopping" ] || kill -USR2 "$step" # it came while there was no step to tell
    while waiting='' && { wait "$step"; code=$?; [ -n "$waiting" ]; }; do :; done # a signal ends the wait, not the step
}

# Whether all nodes of the job do what they are told.
nodes_answer() {
    timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true
}

# requeue REASON: the job goes back into the queue, unless it has been there too often; does not return.
requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
        echo "job: $1, but restarted $max_restarts times already (MAX_RESTARTS); submit it again to go on" >&2
        exit 1
    fi
    echo "job: $1; back into the queue"
    trap '' TERM # which ends this script as well
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "job: SLURM does not take it back; submit it again to go on" >&2
    exit 1
}
