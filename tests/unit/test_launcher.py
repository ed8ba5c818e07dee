"""Processes of launchers without a rendezvous."""

from __future__ import annotations

import pytest

from ross_mcore.errors import PlatformError
from ross_mcore.launcher import require_rendezvous

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"},
            "srun started this as one of at least 2",
        ),
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "8"}, "srun started"),
        ({**BATCH, "SLURM_PROCID": "3"}, "srun started"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "srun started"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, r"mpirun \(Open MPI\) started .* at least 4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpirun .PMI. started"),
        ({"PMIX_RANK": "1"}, "mpirun .PMIx. started"),
        ({**BATCH, "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun .Open MPI. started"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set and RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR, MASTER_PORT is not"),
    ],
)
def test_one_of_several_processes_without_torchruns_variables_is_refused(
    environment: dict[str, str], launcher: str
) -> None:
    with pytest.raises(PlatformError, match=f"{launcher}.*torchrun --nnodes"):
        require_rendezvous(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TORCHRUN,
        {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
        BATCH,  # one process in a batch script
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},  # in the shell of salloc
        {**BATCH, "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks 1 --pty
        {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "unknown"},
    ],
)
def test_one_process_or_torchruns_are_good(environment: dict[str, str]) -> None:
    require_rendezvous(environment)
