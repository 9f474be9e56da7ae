"""Whether this machine has what a component requires, found out without importing anything heavy."""

from __future__ import annotations

from functools import cache

from graftwork.config import machine
from graftwork.contracts.component import Requires, missing_packages


def unmet_requirement(requires: Requires) -> str:
    """What is missing and how to get it, as a clause; empty when nothing is missing."""
    if (missing := missing_packages(requires)) or requires.cuda is None:
        return missing  # without asking the driver, which takes time
    return machine.unmet_requirement(requires, machine.Machine(capability=cuda_capability()))


@cache
def cuda_capability() -> tuple[int, int] | None:
    """The lowest compute capability among the visible CUDA devices, read from the driver; None without a device."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    capabilities = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), device)
        capabilities.append((major.value, minor.value))
    return min(capabilities, default=None)
