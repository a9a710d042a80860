#!/usr/bin/env bash
# Captures a teacher with a SLURM job array: one task, one whole teacher.
#
#   sbatch scripts/slurm_capture.sh CONFIG [section.field=value ...]
#
# The tasks share nothing but the folder of the cache, which all nodes must see (or a bucket:
# cache.folder=s3://...). Task I of N takes every N-th shard that is missing; the last to finish
# seals the cache. A task that is killed, preempted or requeued goes on where it stopped, and the
# same sbatch again does what is missing, with any number of tasks.
#
# Edit these lines for your cluster: how many teachers, and what one of them needs.
#SBATCH --job-name=distill-capture
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch scripts/slurm_capture.sh CONFIG [section.field=value ...]" >&2
    exit 2
fi
: "${SLURM_ARRAY_TASK_ID:?start this with sbatch --array; for one worker run: distill cache $1}"

# Environment of the tasks: edit, for example
# source /shared/distill/.venv/bin/activate
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Arrays may start anywhere and step (--array=1-15:2), but a share must not be left out.
first=${SLURM_ARRAY_TASK_MIN:-0} step=${SLURM_ARRAY_TASK_STEP:-1} count=$SLURM_ARRAY_TASK_COUNT
if ((SLURM_ARRAY_TASK_MAX != first + (count - 1) * step)); then
    echo "the array has gaps: give a range such as --array=0-$((count - 1)), all of it." >&2
    exit 2
fi
worker=$(((SLURM_ARRAY_TASK_ID - first) / step))

echo "worker $worker of $count on $(hostname), restart ${SLURM_RESTART_COUNT:-0}"
exec distill cache "$@" --worker "$worker/$count"
