#!/usr/bin/env bash
# Gather the wheels that a GPU machine without a network lacks:  tests/bench/gpu/wheels.sh [--have FILE] [--part-mib N]
#
# For Python 3.12 on x86-64, into tests/bench/gpu/wheels/part-N/, each of at most 60 MiB. Run it where this project is
# installed: the versions are those of the environment. --have names what the machine has, one package a line.
set -euo pipefail
cd "$(dirname "$0")/../../.."
exec "${PYTHON:-.venv/bin/python}" tests/bench/gpu/wheels.py gather "$@"
