"""Joins the other processes that were started for the same run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from qinit.errors import LostError, ProcessesError, RecipeError, StoppedError
from qinit.processes.group import ALONE, Processes
from qinit.processes.launch import count, number, rank
from qinit.processes.meeting import meeting_place

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=7)  # the first process polishes and measures while the others wait for it
INSTEAD = "start it with torchrun, see docs/cluster.md"


@contextmanager
def joined() -> Iterator[Processes]:
    """Give the processes of this run: one alone, or those that torchrun has started. An error inside is raised in all
    of them. Where torch.distributed is started already, as Ray Train does it, that is used. Raises ProcessesError where
    they do not find each other."""
    if count() == 1:
        yield ALONE
        return
    found = dist.is_initialized()
    processes = _started()
    try:
        yield processes
        processes.meet("the end")
    except (StoppedError, LostError):  # all were interrupted, or there is nobody to wait for
        raise
    except Exception as error:
        try:
            processes.fail(error)
        finally:
            _let_the_first_go(processes)
    if not found:
        dist.destroy_process_group()


def require_device(name: str) -> None:
    """Raise RecipeError where this process, one of several, has no device of its own under the `name` that a recipe
    has: a CPU, or the GPU of its number on its machine."""
    if count() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return
    if ":" in name:
        raise RecipeError(
            f"device: '{name}' is one GPU for {count()} processes; leave its number out, and each takes its own"
        )
    seen, own = torch.cuda.device_count(), number("LOCAL_RANK")
    if own >= seen:
        raise RecipeError(
            f"device: process {rank()} is number {own} of its machine, where torch sees {seen} CUDA devices; start as "
            "many processes as there are GPUs (--nproc-per-node), all of them visible to each, or use --device cpu"
        )


def _let_the_first_go(processes: Processes) -> None:
    """Wait until the first process has cleaned up, has said what there is to say, and is gone: torchrun ends all others
    as soon as one has failed."""
    if processes.first or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes.wait_for_the_end_of_the_first()


def _started() -> Processes:
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and not dist.is_initialized():
        raise ProcessesError(f"WORLD_SIZE is {count()}, but {', '.join(missing)} is not set; {INSTEAD}")
    has_gpu = torch.cuda.is_available() and number("LOCAL_RANK") < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(number("LOCAL_RANK"))
    try:
        if not dist.is_initialized():
            store, own, others = next(iter(dist.rendezvous("env://")))
            store = meeting_place(store, own, others)
            dist.init_process_group("gloo", store=store, rank=own, world_size=others, timeout=PATIENCE)
        hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
        everywhere: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(everywhere, has_gpu, group=hosts)
        devices = dist.new_group(backend="nccl") if all(everywhere) else None
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"the {count()} processes of this run do not find each other ({' '.join(str(error).split())[:200]}); "
            f"{INSTEAD}"
        ) from None
    return Processes(dist.get_rank(), dist.get_world_size(), hosts, devices)
