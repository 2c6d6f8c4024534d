#!/usr/bin/env bash
# Sourced by batch scripts: run the ranks of a Slurm job, hand signals on to them, and say what became of them.
#
#   python=.venv/bin/python
#   . launch/job.sh
#   run_job RUN_FOLDER srun ... "$python" -m moesys.train ...
#
# What ranks mean by their exit codes is in moesys/train/exit_codes.py: 0 done, 75 saved and to be started again.

: "${python:?the interpreter that finds moesys}"

# An array's task is requeued alone, by this name; $SLURM_JOB_ID can mean the whole array.
job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job_id=${job_id:-$SLURM_JOB_ID}

# record STATE REASON [OPTION...]: into RUN_FOLDER/status.json. That it cannot be written must not end a job.
record() {
  [[ -z $run_folder ]] || "$python" -m moesys.launch.status "$run_folder" "$1" --reason "$2" "${@:3}" || true
}

# Whether Slurm would take the job back: not one that someone cancels.
can_requeue() {
  local job
  job=$(scontrol --oneliner show job "$job_id" | head -n 1)
  [[ $job == *" JobState=RUNNING "* && $job == *" Requeue=1 "* ]]
}

# run_job RUN_FOLDER COMMAND...: ends the script with the exit code of the command, which is an srun.
run_job() {
  run_folder=$1
  shift
  local code=0 latest before submitted
  # For the time in the queue; of a requeued job, since it was requeued.
  submitted=$(scontrol --oneliner show job "$job_id" | sed -n '1s/.* SubmitTime=\([^ ]*\).*/\1/p')
  MOESYS_SUBMITTED_UNIX_S=${submitted:+$(date -d "$submitted" +%s)}
  export MOESYS_SUBMITTED_UNIX_S
  signals=0
  "$@" &
  ranks=$!
  # srun passes a signal on to every rank. A process that has just ended cannot take one, which is no error.
  for signal in TERM USR1 USR2; do
    # shellcheck disable=SC2064
    trap "signals=\$((signals + 1)); kill -$signal $ranks 2>/dev/null || true" "$signal"
  done
  # A trapped signal ends `wait` early, so wait until it ended by itself; 127 = its code was taken already.
  while :; do
    before=$signals
    latest=0
    wait "$ranks" || latest=$?
    ((latest == 127)) || code=$latest
    ((signals != before)) || break
  done

  if ((code == 0)); then
    record "done" ""
  elif ((code == 75)) && can_requeue; then
    record requeued "saved on request"
    if scontrol requeue "$job_id"; then
      # Slurm ends this script. Should it not, there is nothing left to do here.
      sleep 60
      exit 0
    fi
    record failed "saved on request, but scontrol requeue was refused: moesys runs resubmit goes on"
  elif ((code == 75)); then
    record failed "cancelled and saved: moesys runs resubmit goes on"
  elif ((code > 128)); then
    record failed "exit code $code of the ranks: ended by signal $((code - 128))"
  else
    record failed "exit code $code of the ranks"
  fi
  exit "$code"
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
