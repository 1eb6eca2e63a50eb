#!/usr/bin/env bash
#SBATCH --job-name=mmdit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# One torchrun per node. Five minutes before the time limit this script passes SIGUSR1 on to every process: the run saves
# after its step and ends with status 0, so that torchrun does not start it again, and the job is queued again. It goes on
# from its checkpoint, on another number of nodes if need be. A process that dies restarts all of them, three times.
set -uo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
REQUEUE=0
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m -- train run d24-256 --cache cache/256 --run runs/d24-256 --parallel.checkpointing selective &
PID=$!
trap 'REQUEUE=1; srun --overlap --ntasks-per-node 1 pkill -USR1 -f "[-]m train run"' USR1      # not torchrun
while kill -0 "$PID" 2>/dev/null; do wait "$PID"; CODE=$?; done
[ "$REQUEUE" -eq 1 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$CODE"
