#!/bin/bash
# Answer a split with a trained model and score the answers, on one GPU:
#
#   sbatch --gpus=1 slurm/evaluate.sh runs/burberry data/burberry [options of phi3v evaluate]

#SBATCH --job-name=phi3v-evaluate
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

(($# >= 2)) || { echo "slurm/evaluate.sh: sbatch slurm/evaluate.sh MODEL DATASET [options of phi3v evaluate]" >&2; exit 2; }

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
        command -v "$phi3v" > /dev/null || { echo "slurm/evaluate.sh: no phi3v on this node; set PHI3V in slurm/cluster.env" >&2; exit 2; }
        ;;
    *.sif) command=(apptainer exec --nv --bind "$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}" "$PHI3V_CONTAINER" "$phi3v") ;;
    *)
        command=(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none
            --container-image="$PHI3V_CONTAINER" --container-workdir="$PWD"
            --container-mounts="$PWD:$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}" "$phi3v")
        ;;
esac

exec "${command[@]}" evaluate "$@"
