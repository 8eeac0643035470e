#!/bin/bash
# Build shards with a job array; each task builds its part:
#
#   job=$(sbatch --parsable --array=0-15 --cpus-per-task=2 slurm/shards.sh products.csv --out data/shards [options of build])
#   sbatch --dependency=afterok:$job slurm/shards.sh --close data/shards
#
# The second job checks every byte and writes dataset.json, which marks the dataset as complete. A task that was
# stopped or lost resumes when it runs again: `scontrol requeue`, or the same sbatch line. Without --array one task
# builds everything.

#SBATCH --job-name=phi3v-shards
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
script=slurm/shards.sh
# sbatch runs a copy of this script in another directory; Slurm knows where the original is.
here="$(dirname "${BASH_SOURCE[0]}")"
if [[ ! -f "$here/common.sh" ]]; then
    shown="$(scontrol show job "${SLURM_JOB_ID:-}")" || true
    here="${shown#*Command=}" && here="${here%%/shards.sh*}"
fi
[[ -f "$here/common.sh" ]] || here="${SLURM_SUBMIT_DIR:-.}/slurm"
# shellcheck source=slurm/common.sh
source "$here/common.sh"

(($# >= 1)) || die 2 "no source given; sbatch slurm/shards.sh SOURCE --out DIR"
if [[ "$1" == --close ]]; then
    (($# == 2)) || die 2 "--close takes the dataset's directory"
    exec_phi3v shards verify "$2"
fi

part=()
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    # Counted from the array's first index, so that --array=1-16 works as well.
    first="${SLURM_ARRAY_TASK_MIN:-0}"
    part=(--task "$((SLURM_ARRAY_TASK_ID - first))/$SLURM_ARRAY_TASK_COUNT")
fi
exec_phi3v shards build "$@" "${part[@]}"
