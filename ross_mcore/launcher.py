"""The program that started this process: refuses launchers without a rendezvous, and leaves errors for torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ross_mcore.errors import PlatformError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Name of the variable in which torchrun gives a process the file of its error."""

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets, from which processes find each other."""
LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun (PMI)": ("PMI_SIZE", "PMI_RANK"),
    "mpirun (MVAPICH2)": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "mpirun (PMIx)": ("PMIX_SIZE", "PMIX_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "flux run": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    "aprun or mpiexec (PALS)": ("PALS_SIZE", "PALS_RANKID"),
}
"""Launcher -> the variables with the number of its processes and the number of this one."""


def require_rendezvous(environment: Mapping[str, str] = os.environ) -> None:
    """Raises PlatformError when this is one of several processes that cannot find each other.

    Each would train alone. One process without a launcher, or several with all variables of torchrun, are good.
    """
    missing = [name for name in RENDEZVOUS if not environment.get(name)]
    if not missing:
        return
    start = (
        "Start one torchrun on every machine, which starts its processes: srun --ntasks-per-node 1 torchrun --nnodes N "
        "--nproc-per-node G --rdzv-backend c10d --rdzv-endpoint HOST:PORT pretrain_ross.py ... "
        "(examples/slurm/train.sbatch does), or on a single machine: torchrun --nproc-per-node G pretrain_ross.py ..."
    )
    if "RANK" in environment or _number(environment, "WORLD_SIZE", 1) > 1:
        given = ", ".join(f"{name}={environment[name]}" for name in RENDEZVOUS if environment.get(name))
        raise PlatformError(
            f"{given} is set and {', '.join(missing)} is not, so processes cannot find each other. {start} For one "
            "process, unset the former"
        )
    for name, (size, rank) in LAUNCHERS.items():
        count = _number(environment, size, _number(environment, rank, 0) + 1)
        if name == "srun" and size not in environment:
            count = _tasks_of_slurm(environment)
        if count > 1:
            raise PlatformError(
                f"{name} started this as one of at least {count} processes, without torchrun's variables "
                f"({', '.join(missing)}), so each would train alone. {start} For one process, start one task (srun "
                "--ntasks 1, mpirun -n 1)"
            )


def _tasks_of_slurm(environment: Mapping[str, str]) -> int:
    """The tasks of this process's step by the variables of older versions of Slurm, which a batch script has too."""
    number = _number(environment, "SLURM_PROCID", -1)
    if number < 0 or (number == 0 and environment.get("ENVIRONMENT") == "BATCH"):
        return 1
    return max(number + 1, _number(environment, "SLURM_NTASKS", _number(environment, "SLURM_NPROCS", 1)))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environment.get(name, default))
    except ValueError:
        return default


def is_first_of_machine() -> bool:
    """Whether this process prints what all processes of its machine would print."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def record_failure(message: str) -> None:
    """Writes the message that torchrun's summary shows for this process. Does nothing without torchrun.

    Format: torch/distributed/elastic/multiprocessing/errors/error_handler.py; the summary prints `py_callstack`.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
