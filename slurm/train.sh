#!/bin/bash
# Train under Slurm. From the directory of the checkout:
#
#   sbatch --nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00 slurm/train.sh configs/burberry.yaml [key=value ...]
#
# Partition, account, QOS: flags of sbatch. What never changes on your cluster (container, NCCL, caches, staging):
# slurm/cluster.env, see slurm/cluster.env.example. docs/slurm.md tells the whole story.
#
# Before the time limit, on preemption and on `scontrol requeue` the ranks finish their step, write a checkpoint and
# exit 3; the job then puts itself back into the queue and goes on from there, in the same run directory and the
# same W&B run. `scancel` ends it: the ranks write a checkpoint, and the same command, submitted again, goes on from it.
# Exit codes: 0 done, 2 wrong input, 3 stopped (cancelled, or requeue limit reached), 4 diverged, 5 nodes that are not
# healthy (requeue limit reached), others a crash.

#SBATCH --job-name=phi3v
#SBATCH --nodes=1
# One task a node; its torchrun starts one process per GPU.
#SBATCH --ntasks-per-node=1
# Slurm may put the job back into the queue, and so does this script.
#SBATCH --requeue
# SIGUSR1 to the ranks so many seconds before the time limit: longer than a step and a checkpoint together.
#SBATCH --signal=USR1@300
# A requeued job goes on in the same log.
#SBATCH --open-mode=append

set -euo pipefail

die() { # exit code, message
    echo "slurm/train.sh: $2" >&2
    exit "$1"
}

[[ -n "${SLURM_JOB_ID:-}" ]] || die 2 "this is a batch script; submit it: sbatch slurm/train.sh CONFIG [key=value ...]"
(($# >= 1)) || die 2 "no config named; sbatch slurm/train.sh CONFIG [key=value ...]"

cluster_env="${PHI3V_CLUSTER_ENV:-${SLURM_SUBMIT_DIR:-.}/slurm/cluster.env}"
if [[ -f "$cluster_env" ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$cluster_env"
    set +a
fi

# The command line that runs on the nodes: PHI3V if set, else the checkout's own environment, else the PATH's.
phi3v="${PHI3V:-}"
if [[ -z "$phi3v" ]]; then
    phi3v=phi3v
    if [[ -z "${PHI3V_CONTAINER:-}" && -x .venv/bin/phi3v ]]; then phi3v="$PWD/.venv/bin/phi3v"; fi
fi
container=()                 # flags of srun (Pyxis)
command=("$phi3v")           # what each task runs
case "${PHI3V_CONTAINER:-}" in
    "") command -v "$phi3v" > /dev/null || die 2 "no phi3v on this node; run make in the checkout or set PHI3V in slurm/cluster.env" ;;
    *.sif) command=(apptainer exec --nv --bind "$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}" "$PHI3V_CONTAINER" "$phi3v") ;;
    *)
        container=(--container-image="$PHI3V_CONTAINER" --container-workdir="$PWD"
            --container-mounts="$PWD:$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}")
        ;;
esac

# The rendezvous is on the first node, at the address by which Slurm itself reaches it.
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
PHI3V_HEAD="$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export PHI3V_HEAD="${PHI3V_HEAD:-$first_node}"

# One task of an array has the number of the whole array, by which all of them would be requeued.
job="$SLURM_JOB_ID"
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
# Since Slurm 22.05 srun asks for one core unless it is told again.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

restarts="${SLURM_RESTART_COUNT:-0}"
echo "job $SLURM_JOB_ID, start $((restarts + 1)): $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, rendezvous on $PHI3V_HEAD"

# Whether the job was cancelled. Slurm calls a job that it ends COMPLETING, whatever it ends it for, and would requeue
# even one that was cancelled; what else ends jobs leaves a trace: a requeue counts, time limits are a reason.
cancelled() {
    local shown
    shown="$(scontrol show job --oneliner "$job")" || return 1
    [[ "$shown" == *" JobState=CANCELLED "* ]] && return
    [[ "$shown" == *" JobState=COMPLETING Reason=None "* && "$shown" == *" Restarts=$restarts "* \
        && "$shown" != *" PreemptTime="[0-9]* ]]
}

# Back into the queue, at most PHI3V_MAX_REQUEUES times. $1: exit code if that is over. $2: nodes to avoid from now on.
requeue() {
    if cancelled; then die "$1" "cancelled; submit the same command to go on"; fi
    if ((restarts >= ${PHI3V_MAX_REQUEUES:-50})); then
        die "$1" "requeued $restarts times, the most that PHI3V_MAX_REQUEUES allows; submit again to go on"
    fi
    trap '' TERM USR1 # ignored by the commands below as well: Slurm ends this job's processes now
    scontrol requeue "$job" || die "$1" "Slurm refused to requeue; submit the same command to go on"
    if [[ -n "${2:-}" ]]; then # possible once the job is pending; this script has KillWait seconds left
        local known
        known="$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')"
        [[ "$known" == "(null)" ]] && known=""
        scontrol update JobId="$job" ExcNodeList="${known:+$known,}$2" \
            || echo "slurm/train.sh: could not exclude $2; it may be chosen again" >&2
    fi
    exit "$1"
}

# Runs one step on all nodes; its exit code is the largest of its tasks. The trap keeps this shell alive when Slurm
# signals the whole job, so that it can requeue; `wait` returns early then, hence the loop.
trap : TERM USR1
on_all_nodes() {
    # --wait: seconds that the tasks of other nodes get to end after the first has.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=0 --wait=300 \
        "${container[@]}" "${command[@]}" "$@" &
    local step=$! code=0
    while kill -0 "$step" 2> /dev/null; do
        code=0
        wait "$step" || code=$?
    done
    return "$code"
}

# A look at the config (first node) and at every node, before anything large starts.
checks="$(mktemp)"
code=0
on_all_nodes launch check-node "$@" > "$checks" || code=$?
if grep -q '^refused' "$checks"; then
    rm -f "$checks"
    exit 2
fi
bad_nodes="$(sed -n 's/^unhealthy \([^ ]*\) .*/\1/p' "$checks" | sort -u | paste -sd, -)"
grep '^unhealthy ' "$checks" >&2 || true
rm -f "$checks"
if [[ -n "$bad_nodes" ]]; then
    echo "slurm/train.sh: not healthy: $bad_nodes; requeueing without" >&2
    requeue 5 "$bad_nodes"
fi
# SIGUSR1 before the ranks could listen to it; Slurm may send it a minute early.
((code != 128 + 10)) || requeue 3
((code == 0)) || exit "$code"

code=0
on_all_nodes launch node "$@" || code=$?
echo "job $SLURM_JOB_ID: exit code $code"
if ((code == 3 || code == 128 + 10)); then
    requeue 3
fi
exit "$code"
