#!/bin/bash
# Train under Slurm. From the directory of the checkout:
#
#   sbatch --nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00 slurm/train.sh configs/burberry.yaml [key=value ...]
#
# Partition, account, QOS: flags of sbatch. What never changes on your cluster (container, NCCL, caches, staging):
# slurm/cluster.env, see slurm/cluster.env.example. docs/slurm.md explains the rest.
#
# Before the time limit, on preemption and on `scontrol requeue` the ranks finish their step, write a checkpoint and
# exit with 3. The job then puts itself back into the queue and resumes from the checkpoint, in the same run directory
# and the same W&B run. `scancel` ends it: the ranks write a checkpoint, and the same command, submitted again, resumes.
# Exit codes: 0 done, 2 wrong input, 3 stopped (cancelled, or requeue limit reached), 4 diverged, 5 unhealthy nodes
# (requeue limit reached), others a crash.

#SBATCH --job-name=phi3v
#SBATCH --nodes=1
# One task per node; its torchrun starts one process per GPU.
#SBATCH --ntasks-per-node=1
# Slurm may put the job back into the queue, and so does this script.
#SBATCH --requeue
# Slurm sends SIGUSR1 to the ranks this many seconds before the time limit: more than a step plus a checkpoint takes.
#SBATCH --signal=USR1@300
# A requeued job appends to the same log.
#SBATCH --open-mode=append

set -euo pipefail
script=slurm/train.sh
# sbatch runs a copy of this script in another directory; Slurm knows where the original is.
here="$(dirname "${BASH_SOURCE[0]}")"
if [[ ! -f "$here/common.sh" ]]; then
    shown="$(scontrol show job "${SLURM_JOB_ID:-}")" || true
    here="${shown#*Command=}" && here="${here%%/train.sh*}"
fi
[[ -f "$here/common.sh" ]] || here="${SLURM_SUBMIT_DIR:-.}/slurm"
# shellcheck source=slurm/common.sh
source "$here/common.sh"
# shellcheck source=launch/requeue.sh
source "$here/../launch/requeue.sh"

[[ -n "${SLURM_JOB_ID:-}" ]] || die 2 "this is a batch script; submit it: sbatch slurm/train.sh CONFIG [key=value ...]"
(($# >= 1)) || die 2 "no config given; sbatch slurm/train.sh CONFIG [key=value ...]"

# The rendezvous is on the first node, at the address by which Slurm itself reaches it.
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
PHI3V_HEAD="$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export PHI3V_HEAD="${PHI3V_HEAD:-$first_node}"

# Since Slurm 22.05 srun no longer inherits --cpus-per-task and would ask for one core.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, rendezvous on $PHI3V_HEAD"

# Requeues the job if it may be requeued, then exits. $1: exit code. $2: nodes to exclude from now on.
requeue() {
    if may_requeue; then requeue_now "${2:-}" || true; fi
    exit "$1"
}

# Runs one step on all nodes; its exit code is the largest of its tasks. The trap keeps this shell alive when Slurm
# signals the whole job, so that it can requeue. `wait` then returns early, hence the loop.
trap : TERM USR1
on_all_nodes() {
    # --wait: seconds that the tasks of other nodes have after the first task has ended.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=0 --wait=300 \
        "${container[@]}" "${command[@]}" "$@" &
    local step=$! code=0
    while kill -0 "$step" 2> /dev/null; do
        code=0
        wait "$step" || code=$?
    done
    return "$code"
}

# Checks the config (first node) and every node before anything large starts.
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
# SIGUSR1 came before the ranks could receive it; Slurm may send it up to a minute early.
((code != 128 + 10)) || requeue 3
((code == 0)) || exit "$code"

code=0
on_all_nodes launch node "$@" || code=$?
echo "job $SLURM_JOB_ID: exit code $code"
if ((code == 3 || code == 128 + 10)); then
    requeue 3
fi
exit "$code"
