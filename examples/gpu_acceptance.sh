#!/usr/bin/env bash
# Checks on a machine with 1, 2, 4 or 8 GPUs that everything works, and measures its speed: in at most an hour on 8, in
# ten minutes on one.
#
#   examples/gpu_acceptance.sh                  on all GPUs; without GPUs, the CPU form
#   examples/gpu_acceptance.sh --cpu            the CPU form: gloo, up to 4 ranks
#   examples/gpu_acceptance.sh --parts layouts,resume --out runs/acceptance
#   examples/gpu_acceptance.sh --help
#
# It writes OUT/report.md, to be attached to an issue, and the logs of all commands. A part that the machine cannot run
# is skipped with the reason; a failed part does not stop the others. Exit status 1 if a part failed. PYTHON selects the
# interpreter; the default is that of .venv, if there is one.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m examples.acceptance "$@"
