#!/usr/bin/env bash
# Train: one torchrun per machine. The rest of the line are keys of the configuration.
#
#   launch/run.sh [--nproc RANKS_PER_MACHINE] [--relaunch TIMES] experiment=quickstart train.steps=50
#   launch/run.sh --nodes 2:4 --meeting HOST:29400 train.elastic=true ...   # on each machine; machines may be lost and come
#   srun --ntasks-per-node=1 launch/run.sh experiment=...      # the same on every node of a Slurm job
#   srun --ntasks-per-node=8 launch/run.sh experiment=...      # every task is a rank; no torchrun
#
# RANKS_PER_MACHINE defaults to the machine's GPUs, or 2 without any. PYTHON names the interpreter.
# PET_MAX_RESTARTS=3 lets torchrun start the ranks again in place when one dies. If torchrun itself, or a rank that it starts no
# more, is killed or crashes, the job is started again, at most TIMES (default: 3; 0 = never). Not under srun: there Slurm
# sees the end of the step.
# With --nodes MIN:MAX ranks are started again in place as long as MIN machines are there: docs/launch.md. Exit codes: 0 done,
# 75 stopped and saved (start it again to go on), 76 another machine is lost, anything else has failed.
set -euo pipefail
trap 'exit 75' TERM USR1 USR2 # nothing has begun

nproc_per_node='' relaunch=3 elastic='' endpoint=''
while [[ ${1:-} == --nproc || ${1:-} == --relaunch || ${1:-} == --nodes || ${1:-} == --meeting ]]; do
  case $1 in
    --nproc)
      nproc_per_node=${2:-}
      [[ $nproc_per_node =~ ^[1-9][0-9]*$ ]] || { echo "run.sh: --nproc needs a number of ranks, got '$nproc_per_node'" >&2; exit 2; }
      ;;
    --nodes)
      elastic=${2:-}
      [[ $elastic =~ ^[1-9][0-9]*:[1-9][0-9]*$ && ${elastic%:*} -le ${elastic#*:} ]] || { echo "run.sh: --nodes needs the least and the most machines as MIN:MAX, got '$elastic'" >&2; exit 2; }
      ;;
    --meeting)
      endpoint=${2:-}
      [[ $endpoint =~ ^.+:[0-9]+$ ]] || { echo "run.sh: --meeting needs HOST:PORT of a machine that all others reach, got '$endpoint'" >&2; exit 2; }
      ;;
    *)
      relaunch=${2:-}
      [[ $relaunch =~ ^[0-9]{1,6}$ ]] || { echo "run.sh: --relaunch needs how often torchrun may be started again, got '$relaunch'" >&2; exit 2; }
      ;;
  esac
  shift 2
done
[[ -z $endpoint || -n $elastic ]] || { echo "run.sh: --meeting $endpoint without --nodes MIN:MAX: say how many machines meet there" >&2; exit 2; }
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
  [[ -z $elastic ]] || { echo "run.sh: --nodes $elastic beside $tasks tasks of srun on $nodes nodes: only torchrun starts ranks again in place; use --ntasks-per-node=1" >&2; exit 2; }
  exec "$python" -m moesys.train "$@"
fi
if ((nodes > 1)) && [[ -z $endpoint ]]; then
  # Every node works out the same meeting point: the step's first node, a port from the job's id.
  first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
  host=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  port=$((20000 + SLURM_JOB_ID % 10000))
  endpoint=$host:$port
fi
if [[ -n $elastic ]]; then
  [[ -n $endpoint ]] || { echo "run.sh: --nodes $elastic needs --meeting HOST:PORT, the same on every machine" >&2; exit 2; }
  # A machine is taken for lost after 10 s without a beat (they come every 2 to 4 s); then 3 s are left for others to come.
  meeting=(--nnodes "$elastic" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "moesys${SLURM_JOB_ID:-}"
    --rdzv-conf "${PET_RDZV_CONF:-keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=3}"
    --max-restarts "${PET_MAX_RESTARTS:-20}")
  # Else machines that come later are told no store, and others that of a lost one (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
elif ((nodes > 1)); then
  meeting=(--nnodes "$nodes" --node-rank "$SLURM_NODEID" --master-addr "$host" --master-port "$port")
else
  meeting=(--standalone)
fi

torchrun() {
  exec "${kept[@]}" "$python" -m moesys.train.torchrun \
    "${meeting[@]}" --nproc-per-node "$nproc_per_node" -m moesys.train "$@"
}

kept=()
# exec: a signal from the scheduler or the keyboard reaches torchrun, which passes it to the ranks.
if [[ -n ${SLURM_STEP_NUM_NODES:-} ]] || ((relaunch == 0)); then
  torchrun "$@"
fi

# torchrun in a process group of its own: what is typed at the terminal comes to this script alone, which hands it on once.
set -m
# Should this script be killed, the ranks save and stop: nobody would see to them any more.
if command -v setpriv >/dev/null; then kept=(setpriv --pdeathsig TERM); fi
signals=0 asked='' agent=''
for signal in TERM INT HUP QUIT USR1 USR2; do
  # shellcheck disable=SC2064
  trap "signals=\$((signals + 1)) asked=$signal; [[ -z \$agent ]] || kill -$signal \$agent 2>/dev/null || true" "$signal"
done
for ((launched = 1; ; launched++)); do
  torchrun "$@" &
  agent=$! code=127
  [[ -z $asked ]] || kill -"$asked" "$agent" 2>/dev/null || true # it came before there was an agent
  # A signal ends `wait` early, so wait until it ended by itself; 127 = its code was taken already.
  while :; do
    before=$signals latest=0
    wait "$agent" || latest=$?
    ((latest == 127)) || code=$latest
    ((signals == before)) || continue
    kill -0 "$agent" 2>/dev/null || break
    sleep 0.2 # it is stopped, not ended
  done
  case $((code - 128)) in
    4 | 6 | 7 | 8 | 9 | 11) ;; # ILL ABRT BUS FPE KILL SEGV: not its own choice. Else it has said what was wrong, as 1 or 2
    *) exit "$code" ;;
  esac
  if ((signals)); then exit "$code"; fi
  if ((launched > relaunch)); then
    echo "run.sh: torchrun, or a rank of it, was ended by signal $((code - 128)), and had been started again $relaunch times (--relaunch)" >&2
    exit "$code"
  fi
  echo "run.sh: torchrun (process $agent), or a rank of it, was ended by signal $((code - 128)); started again, $launched of $relaunch" >&2
done
