"""Readiness: what a machine lacks for a component, found without torch."""

from __future__ import annotations

import pytest

from graftwork import Requires
from graftwork_registry.readiness import cuda_capability, unmet_requirement


def test_what_a_machine_lacks_is_said_in_a_clause() -> None:
    assert unmet_requirement(Requires()) == ""
    assert unmet_requirement(Requires(("pluggy>=1", "click; python_version < '3'"))) == ""
    assert unmet_requirement(Requires(("no-such-package",), install="--pre no-such")).endswith(
        ": pip install --pre no-such"
    )
    assert "pluggy>=999" in unmet_requirement(Requires(("pluggy>=999",)))


@pytest.mark.skipif(cuda_capability() is not None, reason="this machine has a CUDA device")
def test_without_a_cuda_device_a_component_for_one_is_not_ready() -> None:
    assert "no CUDA device" in unmet_requirement(Requires(cuda=(8, 0)))


@pytest.mark.gpu
@pytest.mark.skipif(cuda_capability() is None, reason="no CUDA device")
def test_the_driver_says_the_same_capability_as_torch() -> None:
    import torch

    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    assert cuda_capability() == min(capabilities)
    assert unmet_requirement(Requires(cuda=(99, 0)))
