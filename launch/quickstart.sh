#!/usr/bin/env bash
# The first run: makes the environment, then tunes a small model; see experiments/quickstart/README.md.
#
#   bash launch/quickstart.sh                   on CPU
#   EXTRA=cuda bash launch/quickstart.sh        on NVIDIA GPUs; EXTRA=tpu on Cloud TPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh "${EXTRA:-}"
python experiments/quickstart/run.py "$@"
