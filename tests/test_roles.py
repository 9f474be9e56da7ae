"""A role may name a single parameter, such as LLaVA-Next's `image_newline`, which lies in a module of several roles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import broken_models as models
import pytest
import torch

from graftwork.conformance import examine, specimens
from graftwork.contracts import modules_of, within
from graftwork.errors import AdapterError
from graftwork_lora import Lora, LoraSettings

SCALE = "blocks.0.norm.weight"
ROLES = {"scale": (SCALE,), "embedding": ("embedding",)}


def with_newline(structure: Any) -> Any:
    """The model with a parameter of its own beside its modules."""
    structure.model.newline = torch.nn.Parameter(torch.ones(3))
    return replace(structure, roles={**structure.roles, "connector": ("connector", "newline")})


def test_a_parameter_lies_in_a_role_that_names_it_and_in_no_other() -> None:
    assert within(SCALE, modules_of(ROLES, ["scale"])) and not within(SCALE, ["blocks.0.norm.weigh", "embedding"])


def test_a_single_parameter_is_trained_and_saved() -> None:
    assembly = specimens.assemble(also_train=("scale",))
    assembly.structure = replace(assembly.structure, roles=ROLES)
    specimens.adapt(assembly)
    assert list(assembly.trained()) == [SCALE] == list(assembly.state_to_save())
    specimens.train(assembly)
    changed = assembly.model.get_parameter(SCALE) - assembly.adaptation.base_copy[SCALE]
    assert changed.abs().max() > 0


def test_no_method_adapts_a_single_parameter() -> None:
    assembly = specimens.assemble(peft=Lora(LoraSettings()), on=("scale",))
    assembly.structure = replace(assembly.structure, roles=ROLES)
    with pytest.raises(AdapterError):
        specimens.adapt(assembly)


def test_the_kit_takes_parameters_for_what_roles_name() -> None:
    outcomes = {outcome.check: outcome for outcome in examine(models.built_with(with_newline))}
    assert outcomes["every parameter has one role"].state == "passed", outcomes
