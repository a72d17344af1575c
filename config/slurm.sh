#!/bin/bash
# One run on a Slurm cluster. Filled in by sweep.py; further {{fields}} come from --fields.
#SBATCH --job-name={job_name}
#SBATCH --time={timeout}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --gres=gpu:{gpus}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

cd {cwd}
source {root}/.venv/bin/activate
export OMP_NUM_THREADS={threads}
export PET_SHUTDOWN_TIMEOUT=140  # seconds that torchrun gives the ranks to save in; 30 by itself

# Slurm tells the shell, the shell tells the script, which saves at the next step and exits; the same command then
# goes on from there. USR1 comes 180 s before the time is up, where an evaluation may last longer: its state is saved.
# TERM comes with a preemption, after which Slurm requeues by itself.
task=${{SLURM_ARRAY_TASK_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}  # of an array this task alone
requeue() {{ scontrol requeue "${{task:-$SLURM_JOB_ID}}"; }}
again= stopped=
trap 'again=yes; kill -TERM $run; (sleep 150; requeue) & late=$!' USR1
trap 'stopped=yes; kill -TERM $run' TERM
{launch} {script} {args} >> {log} 2>&1 &
run=$!
wait $run; status=$?
while kill -0 $run 2> /dev/null; do wait $run; status=$?; done  # a signal ends a wait before the run ends
if [ -n "$again" ]; then
    kill $late
    requeue
elif [ -z "$stopped" ] && [ "$status" = 0 ]; then
    echo '{{}}' > {done}
fi
exit "$status"
