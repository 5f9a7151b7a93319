#!/usr/bin/env bash
# Takes a training from a Google Cloud project to Cloud TPUs and back; docs/tpu.md explains the steps.
#
#     export PROJECT=my-project BUCKET=my-bucket REPO=https://example.com/ddpm.git
#     docs/tpu_vm.sh [--dry-run] setup | create | install | data | check | train | keep
#     docs/tpu_vm.sh [--dry-run] status | logs | stop | delete | run --mode=sample ...
#
# --dry-run, which must come first, or DRY_RUN=1 prints the commands, one a line, and runs none.
set -euo pipefail

NAME=${NAME:-ddpm}                            # of the TPU and of the run: gs://BUCKET/runs/NAME
ZONE=${ZONE:-us-west4-a}                      # one that has TYPE
TYPE=${TYPE:-v5litepod-16}                    # 16 chips of TPU v5e: four hosts of four
SPOT=${SPOT-1}                                # empty: on demand
CONFIG=${CONFIG:-configs/cifar10.py:bfloat16} # --config
ARGS=${ARGS:-}                                # further flags of main.py
ARCHIVE=${ARCHIVE:-}                          # images for `data`; empty: download
REF=${REF:-}                                  # branch, tag or commit of REPO; empty: the newest
case $TYPE in                                 # the image of the hosts
  v5litepod-*) VERSION=${VERSION:-v2-alpha-tpuv5-lite} ;;
  v5p-*) VERSION=${VERSION:-v2-alpha-tpuv5} ;;
  v6e-*) VERSION=${VERSION:-v2-alpha-tpuv6e} ;;
  *) VERSION=${VERSION:-tpu-ubuntu2204-base} ;;
esac
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1 && shift; fi
export DRY_RUN=${DRY_RUN:-}
exec 3>&1 # where a dry run prints

show() { # prints a command as one would type it
  local word line='' quote="'" escaped="'\\''"
  for word; do
    if [[ $word == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
      word=${word//$quote/$escaped}
      if [[ $word == --*=* ]]; then word="${word%%=*}='${word#*=}'"; else word="'$word'"; fi
    fi
    line="$line $word"
  done
  echo "${line# }" >&3
}

execute() { if [ -n "$DRY_RUN" ]; then show "$@"; else "$@"; fi; }

ask() { # executes a command for its output; in a dry run that is the first argument
  if [ -n "$DRY_RUN" ]; then show "${@:2}" && echo "$1"; else "${@:2}"; fi
}

on() { # runs a shell command on one worker, or on `all`
  execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --quiet --command="$2"
}

setup() {
  local number role
  execute gcloud services enable compute.googleapis.com tpu.googleapis.com --project="$PROJECT"
  if ! { execute gcloud storage buckets describe "gs://$BUCKET" && [ -z "$DRY_RUN" ]; } >/dev/null 2>&1; then
    execute gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" \
      --location="${ZONE%-*}" --uniform-bucket-level-access
  fi
  number=$(ask NUMBER gcloud projects describe "$PROJECT" --format="value(projectNumber)")
  for role in objectAdmin legacyBucketReader; do # the second for storage.buckets.get
    execute gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role="roles/storage.$role" \
      --member="serviceAccount:$number-compute@developer.gserviceaccount.com"
  done
}

state() { # prints the state of the queued resource, or NONE; in a dry run the argument
  ask "$NAME $1" gcloud compute tpus queued-resources list "${WHERE[@]}" \
    --format="value(name.basename(),state.state)" |
    awk -v name="$NAME" '$1 == name { state = $2 } END { print state ? state : "NONE" }'
}

create() { # asks for the TPU, unless that was done before, and waits
  local found
  found=$(state NONE)
  [ "$found" != NONE ] || execute gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" \
    --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" ${SPOT:+--spot}
  until found=$(state ACTIVE) && [ "$found" = ACTIVE ]; do
    echo "$(date +%T) $NAME: $found" >&2
    case $found in FAILED | SUSPENDED | NONE) return 1 ;; esac
    sleep 30
  done
}

install() { # uv brings Python 3.12; the images' own may be too old
  on all "([ -d ddpm ] || git clone $REPO ddpm) && cd ddpm &&\
 git fetch origin ${REF:-HEAD} && git checkout --detach FETCH_HEAD"
  on all "cd ddpm && ([ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh) &&\
 ~/.local/bin/uv venv --allow-existing --python=3.12 .venv &&\
 ~/.local/bin/uv pip install -r requirements.txt \"jax[tpu]>=0.10,<0.13\" gcsfs google-cloud-storage"
}

data() { on 0 "cd ddpm && $PROGRAM --mode=prepare${ARCHIVE:+ --config.data.archive=$ARCHIVE}"; }
run() { on all "cd ddpm && $PROGRAM $*"; }
check() { run --mode=check; }
train() { on all "cd ddpm && bash docs/tpu_vm.sh worker start $PROGRAM"; }
status() { on all 'cd ddpm 2>/dev/null && bash docs/tpu_vm.sh worker status || echo "not running"'; }
stop() { on all "cd ddpm && bash docs/tpu_vm.sh worker stop"; }
logs() { on 0 "tail -n 50 -F ddpm/train.log"; }
delete() { execute gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet; }

keep() { # trains to the end on TPUs that may be taken away, then deletes the TPU
  local found report step steps refused=0
  while :; do
    found=$(state NONE) || found=UNKNOWN
    report='' steps=''
    case $found in
      ACTIVE) refused=0 && report=$(status) || report='' ;;
      NONE) refused=$((refused + 1)) && steps="create install train" ;;
      FAILED | SUSPENDED) refused=0 && steps="delete create install train" ;;
    esac
    [ "$refused" -le 10 ] || { echo "$NAME: expected a TPU, found ten refused requests" >&2 && return 1; }
    case $report in
      *"ended with code "[1-9]*)
        echo "$report; see \`logs\`, then \`train\` and \`keep\`, or \`delete\` the TPU, which is paid for" >&2
        return 1 ;;
      *"not running"*) steps="install train" ;;
      *running*) ;;
      *"ended with code 0"*) delete && return ;;
    esac
    for step in $steps; do "$0" "$step" || break; done
    [ -z "$DRY_RUN" ] || return 0
    sleep 60
  done
}

worker() { # what the steps above run on a host of the TPU, in the folder of the clone
  local action=$1 code=0 stopped=''
  shift
  alive() { grep -qs loop "/proc/$(cat train.pid 2>/dev/null)/cmdline"; }
  case $action in
    start)
      if alive; then echo "running already" && return; fi
      rm -f train.exit
      setsid bash "$0" worker loop "$@" </dev/null >>train.log 2>&1 &
      echo $! >train.pid ;;
    loop) # 75: stopped; 7 and 134: another host was lost; the same command goes on
      trap stopped=yes TERM # heard when the command has ended
      while [ -z "$stopped" ]; do
        code=0 && "$@" || code=$?
        case $code in 7 | 75 | 134) [ -n "$stopped" ] || sleep "${PAUSE:-10}" || true ;; *) break ;; esac
      done
      [ "$stopped$code" = yes75 ] || echo "$code" >train.exit ;; # a host that is shut down has not ended
    status)
      if alive; then echo running && return; fi
      if [ -f train.exit ]; then echo "ended with code $(cat train.exit)"; else echo "not running"; fi ;;
    stop)
      if alive; then kill -TERM "$(cat train.pid)" && { pkill -TERM -P "$(cat train.pid)" || true; }; fi
      while alive; do sleep 1; done
      [ -f train.exit ] || echo 75 >train.exit
      worker status ;;
  esac
}

for word in "${@:2}"; do
  case $1,$word in
    run,--dry-run) ;;
    worker,* | run,*) continue ;;
  esac
  echo "$1: expected no $word after it; --dry-run comes before, flags of main.py are in ARGS" >&2 && exit 2
done
case ${1:-} in
  worker) ;;
  setup | create | install | data | check | train | keep | status | logs | stop | delete | run)
    case $1 in create | install | keep) : "${REPO:?the address of the repository}" ;; esac
    WHERE=(--project="${PROJECT:?the id of a Google Cloud project}" --zone="$ZONE")
    PROGRAM="env JAX_COMPILATION_CACHE_DIR=gs://${BUCKET:?the name of the bucket}/cache .venv/bin/python main.py"
    PROGRAM="$PROGRAM --config=$CONFIG --workdir=gs://$BUCKET/runs/$NAME"
    PROGRAM="$PROGRAM --config.data.data_dir=gs://$BUCKET/data${ARGS:+ $ARGS}" ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
"$@"
