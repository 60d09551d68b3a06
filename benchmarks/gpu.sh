#!/usr/bin/env bash
# Proves on a machine with an accelerator what nothing else can; see benchmarks/README.md#gpu.
#
#   benchmarks/gpu.sh [FOLDER]
#
# Needs this repository, its dependencies, and torch for the accelerator; installs nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # for the processes of Ray too
exec python -m benchmarks.gpu "$@"
