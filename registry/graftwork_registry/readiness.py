"""Whether this machine has what a component requires, asked without importing anything heavy."""

from __future__ import annotations

from functools import cache

from graftwork.config.machine import Machine, unmet_requirement
from graftwork.contracts.component import Requires


def obstacle(requires: Requires) -> str:
    """What is missing and how to get it, as a clause; empty when nothing is missing."""
    machine = Machine(capability=cuda_capability()) if requires.cuda else None
    return unmet_requirement(requires, machine)


@cache
def cuda_capability() -> tuple[int, int] | None:
    """The least compute capability among the visible CUDA devices, asked of the driver; None without a device."""
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
