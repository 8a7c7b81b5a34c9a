#!/usr/bin/env bash
# What this system does on a GPU, in nine minutes, without a network:  tests/bench/gpu/run.sh [--rehearse] [--out DIR]
#
# Runs in this repository's environment, or in any Python 3.10 or newer that has torch: what is missing there is
# installed from tests/bench/gpu/wheels/ if wheels.sh has filled it. PYTHON=… chooses another interpreter.
set -euo pipefail
began=$(date +%s)
cd "$(dirname "$0")/../../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# as make sets it: threads that wait by spinning take the processor from those they wait for
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
if [ -d tests/bench/gpu/wheels ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" tests/bench/gpu/wheels.py install --target "$site"
  export PYTHONPATH="$PYTHONPATH:$site" PATH="$site/bin:$PATH"
fi
export GPU_COMMAND_STARTED="${GPU_COMMAND_STARTED:-$began}"
"$PYTHON" tests/bench/gpu/command.py "$@"
