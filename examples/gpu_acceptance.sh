#!/usr/bin/env bash
# On a machine with 1, 2, 4 or 8 GPUs: does everything here work on it, and how fast?
#
#   examples/gpu_acceptance.sh                  on the GPUs there are; without any, the CPU form
#   examples/gpu_acceptance.sh --cpu            the CPU form: gloo, up to 4 ranks, six CPU minutes
#   examples/gpu_acceptance.sh --parts layouts,resume --out runs/acceptance
#   examples/gpu_acceptance.sh --help
#
# It ends with OUT/report.md, which is made to be attached to an issue, and the logs of all commands beside it. What the
# machine lacks something for is skipped and says why; what fails does not stop the rest. Exit status 1 if any failed.
# PYTHON chooses the interpreter; by default that of .venv, where there is one.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m examples.acceptance "$@"
