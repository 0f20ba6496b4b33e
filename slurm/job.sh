# shellcheck shell=bash
# What the batch scripts here have in common, on the first node of their job. Each step is one function:
#
#   settle     this cluster's settings (site.sh), the environment or image, the folder of the job
#   open_job   are the settings right, and is there anything left to do
#   preflight  what each node is; hostfile, address and port; then all ranks speak to each other
#   launch     DeepSpeed's launcher on each node, by srun; or over ssh, by pdsh
#   close_job  by what the run recorded: done, once more, or failed
#
# SLURM warns before the time is over or a job is preempted (--signal): a file tells the ranks, wherever they are.

set -uo pipefail
trap warn_ranks USR1 TERM # from here on, or a notice that comes early ends the script
# settings of people's own for these programs change what they print
unset "${!SQUEUE_@}" "${!SCONTROL_@}"
export PYTHONSAFEPATH=1 # or a folder named job, where it was submitted, would be the package

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
export demo=$here/../configs/smollm2-135m-demo.yaml # the run file when none is named

refuse() {
  echo "$*" >&2
  exit 2
}

warn_ranks() {
  [[ -n ${noticed:-} ]] || echo "$(date -Is) SLURM gives notice: the run is asked to save and end"
  noticed=1
  [[ -z ${folder:-} ]] || touch "$folder/warning"
}

settle() {
  local given log site=${QLORA_SITE:-$here/site.sh}
  if [[ -r $site ]]; then
    given=$(export -p | sed -n 's/^declare -x QLORA_/declare -gx QLORA_/p') # by `qlora submit` or the user: it wins
    set +u # modules and people's own files look at variables that may not be there
    # shellcheck source=/dev/null
    . "$site" || refuse "$site failed"
    set -u
    eval "$given"
  elif [[ -n ${QLORA_SITE:-} ]]; then
    refuse "QLORA_SITE: there is no file $site"
  fi
  launcher=${QLORA_LAUNCHER:-srun}
  [[ $launcher == srun || $launcher == pdsh ]] || refuse "QLORA_LAUNCHER is $launcher, expected srun or pdsh"
  if [[ $launcher == pdsh && $PWD == *[^[:alnum:]/._+,:@%~-]* ]]; then # deepspeed does not quote it for the shell there
    refuse "QLORA_LAUNCHER=pdsh cannot start in $PWD. Use srun, or submit from a folder whose path has plain letters"
  fi
  export SLURM_EXPORT_ENV=ALL # after sbatch --export=..., steps would get no more than that
  # the number of an array's last task is the array's, too: 17 means all tasks, 17_3 is one
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  wanted=$((12000 + SLURM_JOB_ID % 20000)) # the port, below those that systems give out themselves
  folder=$PWD/qlora-$job
  mkdir -p "$folder" || refuse "$folder cannot be made. Submit from a folder that all nodes share and that is yours"
  rm -f "$folder/warning" "$folder/verdict.json" "$folder"/facts.*
  [[ -z ${noticed:-} ]] || touch "$folder/warning"
  export QLORA_WARNING_FILE=$folder/warning
  scontrol show hostnames "$SLURM_JOB_NODELIST" >"$folder/names"
  scontrol --oneliner show node "$SLURM_JOB_NODELIST" |
    sed -nE 's/^NodeName=([^ ]+) .*Gres=([^ ]+) .*NodeAddr=([^ ]+) .*/\1 \3 \2/p' >"$folder/known"
  # in the order of the job's list: name, address, GPUs and the like; where SLURM does not tell, there may be GPUs
  awk 'FILENAME == ARGV[1] { known[$1] = $0; next } { print ($1 in known) ? known[$1] : $1 " " $1 " gpu:unknown" }' \
    "$folder/known" "$folder/names" >"$folder/allocation"
  rm "$folder/names" "$folder/known"
  # tells when the time is over, so that a run whose steps are long stops before the notice
  if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    local end
    end=$(scontrol --oneliner show job "$job" | sed -nE 's/.* EndTime=([^ ]+) .*/\1/p')
    [[ -z $end ]] || { end=$(date -d "$end" +%s 2>/dev/null) && export SLURM_JOB_END_TIME=$end; }
  fi
  for log in "$folder"/*.log; do
    [[ ! -e $log ]] || echo "--- start ${SLURM_RESTART_COUNT:-0}, $(date -Is)" >>"$log"
  done
  find_python
}

# Sets python, steps (options of srun) and inside (what goes in front of a command to run it in the image).
find_python() {
  steps=(--export=ALL --ntasks-per-node=1 --kill-on-bad-exit=1)
  local cpus=${SLURM_CPUS_PER_TASK:-}
  [[ ${SLURM_JOB_CPUS_PER_NODE:-,} == *,* ]] || cpus=${cpus:-${SLURM_CPUS_ON_NODE:-}}
  # srun takes none over from sbatch; on nodes of several sizes a task is not bound to a part of what the job has there
  if [[ -n $cpus ]]; then steps+=(--cpus-per-task="$cpus"); else steps+=(--cpu-bind=none); fi
  # what sbatch was told by the GPU or task excludes what steps are told here
  unset SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU SLURM_NTASKS SLURM_NPROCS SLURM_TRES_PER_TASK
  inside=()
  if [[ -n ${QLORA_CONTAINER:-} ]]; then
    python=${QLORA_PYTHON:-python3}
    local options=()
    read -ra options <<<"${QLORA_CONTAINER_OPTIONS:-}"
    case ${QLORA_CONTAINER_RUNTIME:-apptainer} in
      apptainer | singularity)
        inside=("${QLORA_CONTAINER_RUNTIME:-apptainer}" exec --nv --bind "$PWD,$root" "${options[@]}" "$QLORA_CONTAINER") ;;
      pyxis) steps+=(--container-image="$QLORA_CONTAINER" --container-mounts="$PWD:$PWD,$root:$root"
        --container-workdir="$PWD"
        "${options[@]}") ;;
      *) refuse "QLORA_CONTAINER_RUNTIME is $QLORA_CONTAINER_RUNTIME, expected apptainer, singularity or pyxis" ;;
    esac
    [[ $launcher == srun ]] || refuse "QLORA_LAUNCHER=pdsh starts ranks outside of the image. Use srun"
    return
  fi
  local venv=${QLORA_VENV:-$here/../.venv}
  python=${QLORA_PYTHON:-$venv/bin/python}
  [[ -x $python ]] || refuse "There is no $python. Set QLORA_VENV in $here/site.sh to an environment on all nodes"
  PATH=$(dirname "$python"):$PATH
}

# Runs a module on this node.
on_first() {
  if [[ ${QLORA_CONTAINER:+${QLORA_CONTAINER_RUNTIME:-}} == pyxis ]]; then
    srun "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "$python" -m "$@"
  else
    "${inside[@]}" "$python" -m "$@"
  fi
}

# Waits for a command as long as it takes; a trapped signal ends `wait`, not the command.
attended() {
  "$@" &
  local launching=$! code
  while
    wait "$launching"
    code=$?
    ((code > 128)) && kill -0 "$launching" 2>/dev/null
  do :; done
  return "$code"
}

open_job() {
  local answer
  answer=$(on_first job.launch.slurm open "$folder" "$@") || exit
  [[ $answer != "done" ]] || exit 0
}

# Over in QLORA_PREFLIGHT_S and a few seconds, however many nodes there are and whatever hangs: reports have half of the
# time, ranks what is left of it. Both end somewhat earlier by themselves, to say whom they waited for.
preflight() {
  local checks=${QLORA_PREFLIGHT:-full} options=() all_s=${QLORA_PREFLIGHT_S:-50} ends
  [[ $all_s =~ ^[1-9][0-9]+$ ]] || refuse "QLORA_PREFLIGHT_S is $all_s, expected whole seconds, 10 or more"
  ends=$(($(date +%s) + all_s))
  case $checks in
    full | nodes) [[ -z ${QLORA_LEAVE_OUT:-} ]] || options+=(--leave-out) ;;
    off) options+=(--only-warn) ;;
    *) refuse "QLORA_PREFLIGHT is $checks, expected full, nodes or off" ;;
  esac
  limited $((all_s / 2)) srun "${steps[@]}" --kill-on-bad-exit=0 \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --output="$folder/facts.%t" \
    "${inside[@]}" "$python" -m job preflight "$@" --report --timeout $((all_s / 3)) --port "$wanted" \
    # a file each: long lines would mix
  choose_nodes "${options[@]}"
  [[ $checks == full && ! -e $folder/warning ]] || return 0
  if [[ -z ${QLORA_LEAVE_OUT:-} ]]; then
    exchange "$ends" || exit 1
    return
  fi
  exchange $((($(date +%s) + ends) / 2)) && return
  [[ -e $folder/verdict.json ]] || exit 1
  choose_nodes --leave-out # those that the others could not speak to
  exchange "$ends" || exit 1
}

# exchange ENDS: all ranks speak to each other, until then (Unix seconds)
exchange() {
  local left_s=$(($1 - $(date +%s)))
  local waits=(limited $((left_s > 1 ? left_s : 1)))
  launch preflight --nodes "$names" --verdict "$folder/verdict.json" --until $(($1 - 4))
}

# limited SECONDS COMMAND ...: `attended`, and no longer than that
limited() {
  attended timeout --kill-after=5 "$@"
  local code=$?
  ((code != 124 && code != 137)) ||
    echo "The check took more than $1 s, its part of QLORA_PREFLIGHT_S. Raise it where nodes start slowly" >&2
  return "$code"
}

# Sets address, port and names of the nodes that the run gets; writes the hostfile.
choose_nodes() {
  local answer
  answer=$(on_first job.launch.slurm nodes "$folder" "$wanted" "$@") || exit
  read -r address port names <<<"$answer"
}

# launch VERB [OPTION ...]: runs `qlora VERB` with the job's words in all ranks, and waits for them as `waits` says.
waits=(attended)
launch() {
  local common=(--hostfile "$folder/hostfile" --master_addr "$address" --master_port "$port" --quiet)
  local ranks=(--module job.launch.slurm.rank "$folder" "$@")
  count=$(wc -l <"$folder/hostfile")
  if [[ $launcher == pdsh ]]; then
    on_first job.launch.slurm keep "$folder" >/dev/null || return
    # else deepspeed starts the ranks of a single node here
    [[ ,$names, == *,$SLURMD_NODENAME,* ]] || common+=(--force_multi)
    # deepspeed writes these and the file .deepspeed_env into the command lines of ssh, where everybody reads them
    local secrets=("${!MLFLOW@}")
    "${waits[@]}" env "${secrets[@]/#/--unset=}" DS_ENV_FILE=no-such-file "$python" -m job.launch.slurm.node "$folder" \
      deepspeed "${common[@]}" "${ranks[@]}"
    local code=$?
    end_ranks
    return $code
  fi
  "${waits[@]}" srun "${steps[@]}" --nodes="$count" --ntasks="$count" --nodelist="$names" "${inside[@]}" \
    "$python" -m job.launch.slurm.node "$folder" \
    deepspeed "${common[@]}" --no_ssh '--node_rank={node_rank}' "${ranks[@]}"
}

# What ssh started is not SLURM's to end. This job's processes alone name its folder: launchers, ranks, and who writes
# down what they say.
end_ranks() {
  [[ ${launcher:-} == pdsh && -n ${count:-} ]] || return 0
  rm -f "$folder/environment.json"
  local escaped
  escaped=$(printf %s "$folder" | sed 's/[][\.*^$+?(){}|]/\\&/g')
  # shellcheck disable=SC2016 # there
  srun --overlap "${steps[@]}" --kill-on-bad-exit=0 --nodes="$count" --ntasks="$count" --nodelist="$names" \
    bash -c 'pkill -KILL -f -- "$0"; true' "([j]ob[.]launch[.]slurm[.]rank .*|[q]lora_job=)$escaped "
  count=
}

# The job's state; when SLURM does not answer for a while, what it must be.
state_now() {
  local state
  for _ in 1 2 3 4 5 6; do
    state=$(squeue --noheader --states=all --jobs="$job" --format=%T) && [[ -n $state ]] && break
    sleep 5
  done
  echo "${state:-RUNNING}"
}

close_job() {
  local answer verdict code
  answer=$(on_first job.launch.slurm close "$folder" "$1") || exit 1
  read -r verdict code <<<"$answer"
  # on a signal of its own the job is over, whoever sent it, and SLURM has decided what becomes of it
  if [[ $verdict != "done" && $(state_now) != RUNNING ]]; then
    exit 75
  fi
  case $verdict in
    again)
      trap '' USR1 TERM # requeuing sends TERM, too
      echo "$(date -Is) start again: requeued"
      scontrol requeue "$job" || echo "SLURM does not requeue this job. Submit it again: it goes on where it was" >&2
      ;;
    failed) on_first job.launch.slurm faults "$folder" >&2 ;;
  esac
  exit "$code"
}

# run_job CONFIG [section.key=value ...]
run_job() {
  trap end_ranks EXIT
  settle
  if [[ $1 == "$demo" ]]; then
    cd "$here/.." || exit 2 # its rows and model are named from there
    # it is a run of one rank; here one a node, whatever GPUs they have
    set -- "$1" parallel.processes=1 train.global_batch_size="$SLURM_JOB_NUM_NODES" "${@:2}"
  fi
  echo "$(date -Is) job $job on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}: $*"
  open_job "$@"
  preflight "$@"
  echo "$(date -Is) starts on $names; follow it with: tail -f $folder/*.log"
  if [[ -e $folder/warning ]]; then
    close_job 75
  fi
  launch train
  close_job $?
}

# sweep_job CONFIG SWEEP [section.key=value ...]: run_job with the settings of this task
sweep_job() {
  local answer settings
  settle
  answer=$(on_first job.launch.slurm sweep "$1" "$2" "$SLURM_ARRAY_TASK_ID" "${@:3}") || exit
  mapfile -t settings <<<"$answer"
  run_job "$1" "${settings[@]}"
}
