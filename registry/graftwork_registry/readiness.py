"""Whether this machine has what a component requires, asked without importing anything heavy."""

from __future__ import annotations

from functools import cache

from graftwork.component import Requires
from graftwork.machine import Machine, requires_reason


def obstacle(requires: Requires) -> str:
    """What is missing and how to get it, as a clause; empty when nothing is missing."""
    from graftwork.machine import missing_requirements

    if missing := missing_requirements(requires):
        arguments = requires.install or " ".join(f'"{requirement}"' for requirement in missing)
        return f"needs {' and '.join(missing)}: pip install {arguments}"
    if requires.cuda is None:
        return ""
    return requires_reason(requires, Machine(capability=cuda_capability())) or ""


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
