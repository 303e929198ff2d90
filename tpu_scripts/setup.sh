#!/usr/bin/env bash
# Puts this checkout and its environment on every host of a TPU VM or pod slice.
#
#   tpu_scripts/setup.sh NAME ZONE
#
# Sends what is committed (git HEAD) to ~/mrjax and installs mrjax[tpu] into
# ~/mrjax/.venv. Run it again after a commit: the environment is kept.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo 'usage: tpu_scripts/setup.sh NAME ZONE' >&2
  exit 2
fi
name=$1 zone=$2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:mrjax.tar.gz" \
  --zone="$zone" --worker=all

# Runs on the hosts. Ubuntu 22.04 images come with Python 3.10, so uv fetches a newer
# one; later images have one that lacks only its venv module.
read -r -d '' install <<'REMOTE' || true
set -eu
mkdir -p mrjax
tar -xzf mrjax.tar.gz -C mrjax
apt_get='sudo apt-get -o DPkg::Lock::Timeout=600 --quiet'
$apt_get update
$apt_get install --yes make git python3-venv
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python=python3
else
  python3 -m pip install --quiet --user uv
  "$HOME/.local/bin/uv" python install 3.12
  python=$("$HOME/.local/bin/uv" python find 3.12)
fi
cd mrjax
make PYTHON="$python" .venv/installed.tpu
REMOTE
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$install"
