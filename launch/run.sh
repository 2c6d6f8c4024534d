#!/usr/bin/env bash
# Train: one torchrun per machine. The rest of the line are keys of the configuration.
#
#   launch/run.sh [--nproc RANKS_PER_MACHINE] experiment=quickstart train.steps=50
#   srun --ntasks-per-node=1 launch/run.sh experiment=...      # the same on every node of a Slurm job
#   srun --ntasks-per-node=8 launch/run.sh experiment=...      # every task is a rank; no torchrun
#
# RANKS_PER_MACHINE defaults to the machine's GPUs, or 2 without any. PYTHON names the interpreter.
# PET_MAX_RESTARTS=3 lets torchrun start the ranks again in place when one dies.
set -euo pipefail

nproc_per_node=
if [[ ${1:-} == --nproc ]]; then
  nproc_per_node=${2:-}
  [[ $nproc_per_node =~ ^[1-9][0-9]*$ ]] || { echo "run.sh: --nproc needs a number of ranks, got '$nproc_per_node'" >&2; exit 2; }
  shift 2
fi
# Only srun sets SLURM_STEP_*: a script under sbatch that calls this without srun trains on its one machine.
nodes=${SLURM_STEP_NUM_NODES:-1} tasks=${SLURM_STEP_NUM_TASKS:-1}
if ((tasks != nodes)); then
  [[ -z $nproc_per_node ]] || { echo "run.sh: --nproc $nproc_per_node beside $tasks tasks of srun on $nodes nodes: every task is a rank; leave --nproc out, or use --ntasks-per-node=1" >&2; exit 2; }
  nproc_per_node=$(((tasks + nodes - 1) / nodes))
fi
if [[ -z $nproc_per_node ]]; then
  gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)}
  nproc_per_node=$((gpus > 0 ? gpus : 2))
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

# Ranks of one machine share its cores; torch would give all of them to each.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}

if ((tasks != nodes)); then
  exec "$python" -m moesys.train "$@"
fi
if ((nodes > 1)); then
  # Every node works out the same meeting point: the step's first node, a port from the job's id.
  first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
  host=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  meeting=(--nnodes "$nodes" --node-rank "$SLURM_NODEID"
    --master-addr "$host" --master-port $((20000 + SLURM_JOB_ID % 10000)))
else
  meeting=(--standalone)
fi

# After SIGTERM the ranks end their step, evaluate where that is due, and save: more than torchrun's 30 s may pass.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# exec: a signal from the scheduler or the keyboard reaches torchrun, which passes it to the ranks.
exec "$python" -m torch.distributed.run --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
  "${meeting[@]}" --nproc-per-node "$nproc_per_node" -m moesys.train "$@"
