#!/usr/bin/env bash
#SBATCH --job-name=mmdit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
# One torchrun per node. Five minutes before the time limit every process gets SIGUSR1, the run saves after its step and
# ends, and the job is put into the queue again; it goes on from its checkpoint, on another number of nodes if need be.
set -uo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m train run d24-256 --cache cache/256 --run runs/d24-256 --parallel.checkpointing selective &
PID=$!
trap 'pkill -USR1 -P "$PID" -f "train run"; wait "$PID"' USR1
wait "$PID"
CODE=$?
[ "$CODE" -eq 138 ] && scontrol requeue "$SLURM_JOB_ID"          # 128 + SIGUSR1: saved, with work left
exit "$CODE"
