"""Several processes as one run: joining them, and which of them speaks."""

from __future__ import annotations

import os

import jax

HEARTBEAT_SECONDS = 20  # silence after which the others give a process up
# What clusters set by which JAX finds its own place; without any of them a coordinator must be named.
CLUSTERS = (
    "SLURM_JOB_ID",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "JOB_COMPLETION_INDEX",
)


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join a run of several processes, before any other use of JAX.

    Args:
      coordinator: "host:port" of process 0; without it the cluster is asked (SLURM, Open MPI, Cloud TPU, Kubernetes).
      processes, process: how many there are, and which of them this is.
    Raises:
      ValueError: half of the three is given, or they contradict each other.
    """
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError("give --coordinator HOST:PORT, --processes N and --process-id I together, or none of them")
    if not any(given) and not any(name in os.environ for name in CLUSTERS):
        raise ValueError("no cluster was detected; give --coordinator HOST:PORT, --processes N and --process-id I")
    if coordinator is not None and processes is not None and process is not None:
        if ":" not in coordinator:
            raise ValueError(f"--coordinator {coordinator}: write HOST:PORT")
        if not 0 <= process < processes:
            raise ValueError(f"--process-id {process} must be between 0 and --processes {processes} - 1")
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=120
    )


def is_speaker() -> bool:
    """Whether this process prints what all of them have computed."""
    return jax.process_index() == 0
