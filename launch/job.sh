#!/usr/bin/env bash
# Sourced by batch scripts: run the ranks of a Slurm job, start them again in place where one was lost, hand signals on to
# them, and say what became of them.
#
#   python=.venv/bin/python restarts=3
#   . launch/job.sh
#   run_job RUN_FOLDER srun ... "$python" -m moesys.train ...
#
# What ranks mean by their exit codes is in moesys/train/exit_codes.py: 0 done, 75 saved and to be started again, 76 left
# because of another rank.

: "${python:?the interpreter that finds moesys}"
# How often the ranks are started again in place without a new checkpoint in between.
restarts=${restarts:-3}

# An array's task is requeued alone, by this name; $SLURM_JOB_ID can mean the whole array.
job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job_id=${job_id:-$SLURM_JOB_ID}

# record STATE REASON [OPTION...]: into RUN_FOLDER/status.json. That it cannot be written must not end a job.
record() {
  [[ -z $run_folder ]] || "$python" -m moesys.launch.status "$run_folder" "$1" --reason "$2" "${@:3}" || true
}

# fact NAME: what Slurm says of this job, as in `scontrol show job`.
fact() {
  scontrol --oneliner show job "$job_id" | sed -n "1s/.* $1=\([^ ]*\).*/\1/p"
}

# run_job RUN_FOLDER COMMAND...: ends the script with the exit code of the command, which is an srun.
run_job() {
  run_folder=$1
  shift
  local submitted left=$restarts newest seen why
  # For the time in the queue; of a requeued job, since it was requeued.
  submitted=$(fact SubmitTime)
  MOESYS_SUBMITTED_UNIX_S=${submitted:+$(date -d "$submitted" +%s)}
  export MOESYS_SUBMITTED_UNIX_S
  signals=0
  while :; do
    newest=$(newest_checkpoint) seen=$(log_bytes)
    run_ranks "$@"
    why="exit code $code of the ranks"
    ((code <= 128)) || why+=": ended by signal $((code - 128))"
    if ! was_lost || ((signals)) || [[ -n $(lack_of_memory "$seen") || $(fact JobState) != RUNNING ]]; then break; fi
    [[ $(newest_checkpoint) == "$newest" ]] || left=$restarts
    ((left)) || break
    left=$((left - 1))
    unset MOESYS_SUBMITTED_UNIX_S # this start did not wait in the queue
    record requeued "$why; started again in place, $left more times unless it saves"
    end_steps || share_nodes
  done

  local short
  short=$(lack_of_memory "$seen")
  if ((code == 0)); then
    record "done" ""
  elif ((code != 75)) && [[ -n $short ]]; then
    record oom "$short: ask for more (cluster.memory_gib_per_node), or make train.micro_batch_tokens smaller"
  elif ((code == 75)) || { was_lost && { ((signals)) || [[ $(fact JobState) != RUNNING ]]; }; }; then
    end_stopped
  else
    record failed "$why"
  fi
  exit "$code"
}

# run_ranks COMMAND...: once; its exit code into $code; signals are handed on as USR1 and counted in $signals.
run_ranks() {
  local latest before ranks
  code=0
  "$@" &
  ranks=$!
  # srun passes USR1 on to every process of a rank's task; at TERM it kills them. One that has just ended takes none,
  # which is no error.
  # shellcheck disable=SC2064
  trap "signals=\$((signals + 1)); kill -USR1 $ranks 2>/dev/null || true" TERM USR1 USR2
  # A trapped signal ends `wait` early, so wait until it ended by itself; 127 = its code was taken already.
  while :; do
    before=$signals
    latest=0
    wait "$ranks" || latest=$?
    ((latest == 127)) || code=$latest
    ((signals != before)) || break
  done
}

# Whether a rank, or what carries them, was killed or cut off: a new start may do better.
was_lost() {
  ((code == 76 || code > 128))
}

# The ranks were asked to stop, and have saved or died of it: start again, if Slurm lets us.
end_stopped() {
  local what="saved"
  ((code == 75)) || what="asked to stop, $why"
  case "$(fact JobState) $(fact Requeue)" in
    "RUNNING 1")
      record requeued "$what"
      if scontrol requeue "$job_id"; then
        # Slurm ends this script. Should it not, there is nothing left to do here.
        sleep 60
        exit 0
      fi
      record failed "$what, but scontrol requeue was refused: moesys runs resubmit goes on"
      ;;
    "RUNNING "*) record failed "cancelled, $what: moesys runs resubmit goes on" ;;
    *)
      # Slurm has ended this job, or has put it into the queue again.
      if (($(fact Restarts) > ${SLURM_RESTART_COUNT:-0})); then
        record requeued "by Slurm, $what"
      else
        record failed "ended by Slurm, $what: moesys runs resubmit goes on"
      fi
      ;;
  esac
}

# The name of the newest checkpoint; nothing without one.
newest_checkpoint() {
  [[ ! -d $run_folder/checkpoints ]] || find "$run_folder/checkpoints" -maxdepth 1 -printf '%f\n' |
    { grep -E '^step_[0-9]+$' || true; } | sort | tail -n 1
}

# log_bytes: how long the file is that this script prints into; 0 if it is none.
log_bytes() {
  stat --dereference --format=%s "/proc/$$/fd/2" 2>/dev/null || echo 0
}

# lack_of_memory OFFSET: the first line that Slurm or torch printed behind it about a rank without memory.
lack_of_memory() {
  [[ -f /proc/$$/fd/2 ]] || return 0
  tail --bytes="+$(($1 + 1))" "/proc/$$/fd/2" |
    grep --text --max-count=1 -E 'oom[-_]kill event|: Out Of Memory$|exceeded memory limit|OutOfMemoryError' || true
}

# end_steps: an srun that was killed leaves its ranks behind, who would keep the run folder. False if Slurm cannot end them.
end_steps() {
  local steps step
  for _ in {1..60}; do
    steps=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -E '\.[0-9]+$') || return 0
    for step in $steps; do
      scancel --signal=KILL "$step" 2>/dev/null || true
    done
    sleep 0.5
  done
  return 1
}

# share_nodes: of a step whose slurmstepd is dead Slurm goes on to believe, for minutes, that it holds its cores and memory.
share_nodes() {
  unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
  export SLURM_OVERLAP=1 SLURM_MEM_PER_NODE=0 # 0 = all that the job has
}

# preflight SCRIPT RUN_FOLDER COMMAND...: a look at all nodes before the ranks start. If the command fails and names nodes
# in RUN_FOLDER/exclude that it did not before, SCRIPT is submitted again without them; this job ends either way.
preflight() {
  local script=$1 before after next code=0
  run_folder=$2
  shift 2
  before=$(cat "$run_folder/exclude" 2>/dev/null || true)
  "$@" || code=$?
  ((code)) || return 0
  after=$(cat "$run_folder/exclude" 2>/dev/null || true)
  if [[ $after != "$before" ]] && next=$(sbatch --parsable --exclude="$after" \
    ${SLURM_ARRAY_TASK_ID:+"--array=$SLURM_ARRAY_TASK_ID"} "$script"); then
    next=${next%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    record queued "preflight: without $after as job $next" --job-id "$next"
    exit 0
  fi
  record failed "preflight: exit code $code, its findings are in the log"
  exit "$code"
}

# run_folder_of OVERRIDE...: what the words say about the run's folder; nothing if they leave it to the configuration.
run_folder_of() {
  local word folder=
  for word; do
    [[ $word != run.dir=* ]] || folder=${word#run.dir=}
  done
  echo "$folder"
}
