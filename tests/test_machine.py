"""What hardware and packages are here, and whether they are enough for a component."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import PlanOf

from graftwork.config.machine import Machine, chosen_device, detect_machine, free_bytes, unmet_requirement
from graftwork.contracts import Requires, missing_requirements
from graftwork.memory import budget

ROOT = Path(__file__).parents[1]


def test_requirements_are_asked_of_metadata() -> None:
    packages = ("pytest>=1", "pytest<1", "no-such-package-at-all", "no-such-package-at-all; python_version < '3'")
    assert missing_requirements(Requires(packages)) == ["pytest<1", "no-such-package-at-all"]
    assert missing_requirements(Requires()) == []


def test_a_component_without_requirements_suits_every_machine() -> None:
    assert unmet_requirement(Requires(), Machine()) == ""
    assert unmet_requirement(Requires(cuda=(9, 0)), Machine(("NVIDIA H100",), (9, 0), cuda=True)) == ""


def test_this_machine_is_detected_once() -> None:
    machine = detect_machine()
    assert machine is detect_machine()
    assert machine.cuda == bool(machine.devices) == (machine.capability is not None)
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 28


def test_resolving_imports_no_torch() -> None:
    program = "import sys, graftwork.config.resolve, graftwork.config.machine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """As if there were two CUDA devices of 80 GiB, the second the current one: what PyTorch's own functions set as limits.

    They refuse a device without an index, as on a machine with CUDA; what they would then call in C++ takes notes instead.
    """
    set_limits: list[tuple[float, int]] = []
    properties = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda index: properties, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *limit: set_limits.append(limit), raising=False)
    return set_limits


@pytest.mark.parametrize(("device", "index"), [(None, 1), ("cuda", 1), ("cuda:0", 0)])
def test_a_budget_is_a_limit_of_the_device_that_is_meant(
    limits: list[Any], run: PlanOf, device: str | None, index: int
) -> None:
    plan = run()
    budget.enforce(replace(plan, run_context=replace(plan.run_context, budget=20 << 30)), device)
    assert limits == [((20 + 1) / 80, index)], "the budget is of tensors, and the limit of all that PyTorch reserves"
    budget.enforce(plan, device)
    budget.enforce(replace(plan, run_context=replace(plan.run_context, budget=20 << 30)), "cpu")
    assert len(limits) == 1


def test_what_is_free_of_a_device_is_what_others_have_not_taken_and_pytorch_does_not_use(
    limits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the device that is meant: another may be full."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (((10, 50)[device.index]) << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 30)
    assert [free_bytes(name) for name in (None, "cuda:0", "cpu")] == [54 << 30, 14 << 30, 0]


def test_pytorch_refuses_a_cuda_device_without_an_index_there(limits: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"(?i)index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))


def test_a_cuda_device_always_has_its_index(limits: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [chosen_device(name) for name in (None, "cuda", "cuda:0", "cpu")] == [
        torch.device("cuda", 1),
        torch.device("cuda", 1),
        torch.device("cuda", 0),
        torch.device("cpu"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device(None) == torch.device("cpu")


def test_devices_are_made_of_names_in_one_place() -> None:
    made = {
        file.relative_to(ROOT).as_posix()
        for folder in ("core", "plugins")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"torch\.device\((?!\"(meta|cpu)\"\)|\"meta\" if)", file.read_text(encoding="utf-8"))
    }
    assert made == {"core/graftwork/config/machine.py"}
