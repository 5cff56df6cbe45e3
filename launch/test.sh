#!/usr/bin/env bash
# All checks, on CPU and without network: style, types, tests. With arguments, only pytest, with those arguments:
#
#   bash launch/test.sh
#   bash launch/test.sh tests/data -k chat
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test

if [ $# -eq 0 ]; then
    ruff check
    ruff format --check
    pyright
    set -- --numprocesses=auto --maxprocesses=4 --max-worker-restart=0 --dist=loadgroup
fi
python -m pytest "$@"
