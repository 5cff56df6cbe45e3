#!/usr/bin/env bash
# Slurm: an array job, each task of which is a worker of a sweep. `tuning sweep --runner=slurm` fills in what stands in ${...} in small
# letters, writes the file to the sweep's directory, and submits it with sbatch.
#SBATCH --job-name=${name}
#SBATCH --array=0-${last}
#SBATCH --nodes=${nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --output=${log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@${grace}

# Before the time limit, and when it preempts, Slurm sends SIGTERM to the worker, which saves its run and ends; the task is queued again
# below. Where this script gets the signal too, Slurm is ending the task: it queues again by itself what it preempted, and leaves what was
# cancelled.
trap 'exit 143' TERM

${setup}
srun --kill-on-bad-exit=1 ${srun} ${command} --worker="slurm-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"
status=$?
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt ${restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
