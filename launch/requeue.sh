#!/bin/bash
# Whether a stopped Slurm job goes back into the queue, and without which nodes. slurm/train.sh sources this file;
# launch/slurm_task.py (`phi3v launch slurm`) runs it as `bash requeue.sh may` and `bash requeue.sh now [NODES]`.
#
# This is shell, not Python, because of containers: there scontrol exists only outside the container and Python only
# inside, and once Slurm has begun to end a job no further step can be started to ask Python.

# What scontrol calls this job. A task of an array must not use SLURM_JOB_ID: for one of the tasks that is the number
# of the whole array, and all tasks would be requeued.
slurm_job() {
    if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Succeeds if the job was cancelled. While Slurm ends a job its state is COMPLETING, whatever the cause, and Slurm
# would requeue a cancelled job too. The other causes leave a trace: a requeue is counted, a time limit is given as
# the reason, a preemption has a time. If the controller does not answer, the job does not count as cancelled.
slurm_cancelled() {
    local shown
    shown="$(scontrol show job --oneliner "$(slurm_job)")" || return 1
    shown=" $shown "
    [[ "$shown" == *" JobState=CANCELLED "* ]] && return
    [[ "$shown" == *" JobState=COMPLETING "* && "$shown" == *" Reason=None "* \
        && "$shown" == *" Restarts=${SLURM_RESTART_COUNT:-0} "* && "$shown" != *" PreemptTime="[0-9]* ]]
}

# Succeeds if the job may go back into the queue: it was not cancelled, and was requeued fewer than
# PHI3V_MAX_REQUEUES times. Otherwise says why not.
may_requeue() {
    if slurm_cancelled; then
        echo "cancelled; submit the same command to resume" >&2
        return 1
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= ${PHI3V_MAX_REQUEUES:-50})); then
        echo "requeued ${SLURM_RESTART_COUNT:-0} times, as often as PHI3V_MAX_REQUEUES allows; submit again to resume" >&2
        return 1
    fi
}

# Puts the job back into the queue. $1: nodes to exclude from now on, separated by commas; may be empty.
requeue_now() {
    local job known
    job="$(slurm_job)"
    trap '' TERM USR1 # the commands below inherit this: from here on Slurm ends the processes of this job
    if ! scontrol requeue "$job"; then
        echo "Slurm refused to requeue the job; submit the same command to resume" >&2
        return 1
    fi
    [[ -n "${1:-}" ]] || return 0
    # Slurm accepts this once the job is pending. This process is killed after KillWait seconds.
    known="$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')"
    [[ "$known" == "(null)" ]] && known=""
    scontrol update JobId="$job" ExcNodeList="${known:+$known,}$1" \
        || echo "could not exclude $1; Slurm may choose it again" >&2
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    trap '' TERM USR1
    case "${1:-}" in
        may) may_requeue ;;
        now) requeue_now "${2:-}" ;;
        *) echo "usage: requeue.sh may | now [NODES]" >&2; exit 2 ;;
    esac
fi
