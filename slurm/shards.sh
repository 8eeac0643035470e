#!/bin/bash
# Build shards with a job array, each task its part:
#
#   job=$(sbatch --parsable --array=0-15 --cpus-per-task=2 slurm/shards.sh products.csv --out data/shards [options of build])
#   sbatch --dependency=afterok:$job slurm/shards.sh --close data/shards
#
# The second job checks every byte and writes dataset.json, which says that the data set is complete. A task that is
# stopped or lost goes on where it was when it runs again: `scontrol requeue`, or the same sbatch line. Without
# --array one task builds everything.

#SBATCH --job-name=phi3v-shards
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

(($# >= 1)) || { echo "slurm/shards.sh: no source named; sbatch slurm/shards.sh SOURCE --out DIR" >&2; exit 2; }

cluster_env="${PHI3V_CLUSTER_ENV:-${SLURM_SUBMIT_DIR:-.}/slurm/cluster.env}"
if [[ -f "$cluster_env" ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$cluster_env"
    set +a
fi
# The command line on the node: PHI3V if set, else the checkout's own environment, else the PATH's; in a container its own.
phi3v="${PHI3V:-phi3v}"
if [[ -z "${PHI3V:-}${PHI3V_CONTAINER:-}" && -x .venv/bin/phi3v ]]; then phi3v=.venv/bin/phi3v; fi
case "${PHI3V_CONTAINER:-}" in
    "")
        command=("$phi3v")
        command -v "$phi3v" > /dev/null || { echo "slurm/shards.sh: no phi3v on this node; set PHI3V in slurm/cluster.env" >&2; exit 2; }
        ;;
    *.sif) command=(apptainer exec --bind "$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}" "$PHI3V_CONTAINER" "$phi3v") ;;
    *)
        command=(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none
            --container-image="$PHI3V_CONTAINER" --container-workdir="$PWD"
            --container-mounts="$PWD:$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}" "$phi3v")
        ;;
esac

if [[ "$1" == --close ]]; then
    (($# == 2)) || { echo "slurm/shards.sh: --close takes the data set's directory" >&2; exit 2; }
    exec "${command[@]}" shards verify "$2"
fi

part=()
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    # Counted from the array's first index, so that --array=1-16 works as well.
    first="${SLURM_ARRAY_TASK_MIN:-0}"
    part=(--task "$((SLURM_ARRAY_TASK_ID - first))/$SLURM_ARRAY_TASK_COUNT")
fi
exec "${command[@]}" shards build "$@" "${part[@]}"
