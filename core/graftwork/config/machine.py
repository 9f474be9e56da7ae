"""What hardware this machine has, detected once, and whether a component can use it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.contracts.component import Requires, missing_packages

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """The hardware that a run can use."""

    devices: tuple[str, ...] = ()
    """The names of the CUDA devices."""
    capability: tuple[int, int] | None = None
    """The lowest compute capability among them; None without one."""
    device_bytes: int = 0
    """The memory of the smallest of them; 0 without one."""
    cuda: bool = False
    bf16: bool = True
    """Whether bfloat16 is computed natively; a CPU computes it, however slowly."""
    cores: int = 1
    """The CPU cores that this process may use."""
    memory_bytes: int = 0
    """The main memory; 0 where it is unknown."""


@cache
def detect_machine() -> Machine:
    """This machine, as torch and the operating system describe it, detected once in a process."""
    import torch

    indices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Machine(
        devices=tuple(torch.cuda.get_device_name(index) for index in indices),
        capability=min((torch.cuda.get_device_capability(index) for index in indices), default=None),
        device_bytes=min((torch.cuda.get_device_properties(index).total_memory for index in indices), default=0),
        cuda=bool(indices),
        bf16=not indices or torch.cuda.is_bf16_supported(including_emulation=False),
        cores=cores(),
        memory_bytes=_memory_bytes(),
    )


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, by default CUDA where there is one; a CUDA device always has its index.

    Some functions of `torch.cuda` refuse a device without one.
    """
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def free_bytes(name: str | None = None) -> int:
    """The bytes of the CUDA device of that name that nobody else has taken, with those that PyTorch keeps there for this process and does not
    use; 0 on a CPU."""
    import torch

    device = chosen_device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where Linux says what a container may take, and has taken."""


def available_memory() -> int:
    """How many bytes of main memory are free, without those that files take; 0 where that is unknown."""
    free = _memory_bytes("SC_AVPHYS_PAGES")
    for limit, used in CGROUPS:  # A container may have less than the machine.
        with suppress(OSError, ValueError):
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return free


def _memory_bytes(pages: str = "SC_PHYS_PAGES") -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, and other systems may not know these names
        return 0


def unmet_requirement(requires: Requires, machine: Machine | None) -> str:
    """What a component requires and this environment or the machine does not have, as a clause; empty when all is there.

    Without a machine the hardware is not checked.
    """
    if (missing := missing_packages(requires)) or requires.cuda is None or machine is None:
        return missing
    wanted = f"needs a CUDA device of compute capability {_dotted(requires.cuda)} or more"
    if machine.capability is None:
        return f"{wanted}, and this machine has no CUDA device"
    if machine.capability < requires.cuda:
        return f"{wanted}, and this machine's has {_dotted(machine.capability)}"
    return ""


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
