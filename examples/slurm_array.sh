#!/usr/bin/env bash
# A cohort as an array of jobs: sbatch examples/slurm_array.sh SCANS MODEL OUT
# Every job does every eighth case, on a GPU of its own. The same command again does what is missing.
#SBATCH --job-name=seg3dcam
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail

# In place of the shell, so that the signal before the end of its time reaches it.
exec seg3dcam cohort "$1" --model "$2" --out "$3" \
    --num-parts "${SLURM_ARRAY_TASK_COUNT:-1}" --part-id "${SLURM_ARRAY_TASK_ID:-0}"
