#!/usr/bin/env bash
# Runs one command on every host of a TPU VM or pod slice, in the environment of
# setup.sh.
#
#   tpu_scripts/run.sh NAME ZONE python -m experiments.train_sft --model=... --mesh=...
#
# The hosts find each other through jax.distributed, which knows a TPU slice. A run that
# was cut off goes on when the same command is given again.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo 'usage: tpu_scripts/run.sh NAME ZONE COMMAND...' >&2
  exit 2
fi
name=$1 zone=$2
shift 2
# Quoted for the shell over there: --data=gsm8k:train?size=5&seed=1 stays one word.
command="cd mrjax && . .venv/bin/activate && exec $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="$command"
