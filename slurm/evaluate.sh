#!/bin/bash
# Let a trained model answer a split and score its answers, on one GPU:
#
#   sbatch --gpus=1 slurm/evaluate.sh runs/burberry data/burberry [options of phi3v evaluate]

#SBATCH --job-name=phi3v-evaluate
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
script=slurm/evaluate.sh
# sbatch runs a copy of this script in another directory; Slurm knows where the original is.
here="$(dirname "${BASH_SOURCE[0]}")"
if [[ ! -f "$here/common.sh" ]]; then
    shown="$(scontrol show job "${SLURM_JOB_ID:-}")" || true
    here="${shown#*Command=}" && here="${here%%/evaluate.sh*}"
fi
[[ -f "$here/common.sh" ]] || here="${SLURM_SUBMIT_DIR:-.}/slurm"
# shellcheck source=slurm/common.sh
source "$here/common.sh"

(($# >= 2)) || die 2 "sbatch slurm/evaluate.sh MODEL DATASET [options of phi3v evaluate]"
exec_phi3v evaluate "$@"
