# shellcheck shell=bash
# What slurm/train.sh, evaluate.sh and shards.sh have in common: the settings of the cluster, and how phi3v is started.
# They source this file. It reads `script` (their name in messages) and defines:
#   command    array: the words that run phi3v, inside the container if there is one
#   container  array: flags that srun needs in front of `command` (Pyxis); empty without a container image

die() { # exit code, message
    echo "${script:?}: $2" >&2
    exit "$1"
}

cluster_env="${PHI3V_CLUSTER_ENV:-${SLURM_SUBMIT_DIR:-.}/slurm/cluster.env}"
if [[ -f "$cluster_env" ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$cluster_env"
    set +a
fi

# The command line on the node: PHI3V if it is set, else .venv of the submit directory, else phi3v on the PATH. In a
# container: PHI3V, else phi3v on its PATH.
phi3v="${PHI3V:-phi3v}"
if [[ -z "${PHI3V:-}${PHI3V_CONTAINER:-}" && -x .venv/bin/phi3v ]]; then phi3v="$PWD/.venv/bin/phi3v"; fi
mounts="${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}"
command=("$phi3v")
container=()
case "${PHI3V_CONTAINER:-}" in
    "") command -v "$phi3v" > /dev/null || die 2 "no phi3v on this node; run make in the checkout or set PHI3V in slurm/cluster.env" ;;
    *.sif) command=(apptainer exec --nv --bind "$PWD$mounts" "$PHI3V_CONTAINER" "$phi3v") ;;
    *)
        container=(--container-image="$PHI3V_CONTAINER" --container-workdir="$PWD"
            --container-mounts="$PWD:$PWD$mounts")
        ;;
esac

# Runs `phi3v ARGUMENTS` as the one task of the job, in place of this script.
exec_phi3v() {
    if ((${#container[@]})); then
        exec srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none "${container[@]}" "${command[@]}" "$@"
    fi
    exec "${command[@]}" "$@"
}
