"""What hardware and packages are here, and whether they are enough for a component."""

from __future__ import annotations

import subprocess
import sys

from graftwork.config.machine import Machine, detect_machine, unmet_requirement
from graftwork.contracts import Requires, missing_requirements


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
