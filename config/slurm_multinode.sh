#!/bin/bash
# One run on several nodes of a Slurm cluster: sbatch config/slurm_multinode.sh train.py config/xl_owt.py --fsdp --out_dir=out/big
# Nodes and GPUs: --nodes=8 --gpus-per-node=8 before the name of this file, in place of those below.
#SBATCH --job-name=diffusion-lm
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

# The repository and out_dir are on a file system that all nodes see; --resume_from=auto needs --out_dir.
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate
gpus=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-$gpus} / gpus))
export PET_SHUTDOWN_TIMEOUT=240  # seconds that torchrun gives the ranks to save in; 30 by itself
export RANK_TIMEOUT=900  # seconds after which a rank that hangs ends the run; a state takes less to be written
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Slurm tells the shell, the shell tells torchrun on each node, torchrun the ranks, which save at the next step and end
# together; the same command then goes on from there, on as many ranks as there are. USR1 comes 300 s before the time is
# up, where an evaluation may last longer: its state is saved. TERM comes with a preemption, after which Slurm requeues by
# itself. --max_restarts=0: a run that failed is not started again.
again=
trap 'again=yes; kill -TERM $run; (sleep 270; scontrol requeue "$SLURM_JOB_ID") & late=$!' USR1
trap 'kill -TERM $run' TERM
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --max_restarts=0 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_endpoint="$head:29500" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 "$@" --resume_from=auto &
run=$!
wait $run; status=$?
while kill -0 $run 2> /dev/null; do wait $run; status=$?; done  # a signal ends a wait before the run ends
if [ -n "$again" ]; then
    kill $late
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
