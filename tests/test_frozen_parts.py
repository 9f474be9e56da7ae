"""Gradients go only where they lead somewhere: what lies before everything that is trained keeps nothing, and gets no gradient."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, LORA, PlanOf
from torch.autograd.graph import saved_tensors_hooks
from vlm_families import write
from vlm_trial import run_table

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import Assembly, DictLookup, Lookup, batch_of, stepper_for
from graftwork.memory.rehearsal import rehearsing
from graftwork_chunked_loss import ChunkedLoss
from graftwork_hf_vlm import HfVlm
from graftwork_nf4 import Nf4

LOOKUP = DictLookup(*COMPONENTS, ChunkedLoss, Nf4)
LAST = LORA | {"target_modules": ["layers.3.self_attn.q_proj", "layers.3.mlp.down_proj"]}
"""LoRA in the last of four layers."""
STRATEGIES = ([], ["checkpointing"], ["checkpointing", "chunked-loss"], ["nf4"])


def kept(assembly: Assembly, lookup: Lookup, parts: dict[str, str]) -> tuple[Counter[str], set[str]]:
    """How many numbers each of these parts (name to module) keeps for a backward pass, and which parts give a result that gradients reach."""
    numbers, reached, inside = Counter[str](), set[str](), list[str]()
    for name, path in parts.items():
        module = assembly.model.get_submodule(path)

        def enter(*_: Any, name: str = name) -> None:
            inside.append(name)

        def leave(module: Any, args: Any, output: Any, name: str = name) -> None:
            inside.pop()
            results = output if isinstance(output, (list, tuple)) else [getattr(output, "last_hidden_state", output)]
            if any(isinstance(each, torch.Tensor) and each.requires_grad for each in results):
                reached.add(name)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside:
            numbers[inside[-1]] += tensor.numel()
        return tensor

    records = lookup.find("data_source", "shapes").component
    examples = [assembly.processor.encode(record) for record in records(records.Settings(3)).records()]
    stepper = stepper_for(assembly, assembly.plan.run_context.train)
    assembly.model.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper.accumulate(batch_of(assembly.processor, examples), 10.0)
    assert all(parameter.grad is not None for parameter in stepper.parameters.values())
    assert all(p.grad is None for p in assembly.model.parameters() if not p.requires_grad)
    return numbers, reached


@pytest.mark.parametrize("memory", STRATEGIES, ids=" ".join)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_below_the_trained_ones_keep_nothing(run: PlanOf, memory: list[str], precision: str) -> None:
    plan = run({"peft": LAST, "memory": {"use": memory}, "train.precision": precision}, LOOKUP)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    parts = {str(number): name for number, name in enumerate(assembly.structure.blocks["language"])}
    parts |= {
        name: name for name in (*assembly.structure.image_encoder, *assembly.structure.roles["language.embeddings"])
    }
    numbers, reached = kept(assembly, LOOKUP, parts)
    assert reached == {"3"}
    assert {*numbers} <= {"3"}


@pytest.mark.parametrize("memory", [[], ["checkpointing"]], ids=" ".join)
def test_a_frozen_image_encoder_of_transformers_keeps_nothing(tmp_path: Path, memory: list[str]) -> None:
    table = run_table(write("qwen2_5_vl", tmp_path / "model")) | {"peft": LORA, "memory": {"use": memory}}
    lookup = DictLookup(*COMPONENTS, HfVlm)
    assembly = compose.build(resolve(parse_run(table, Path.cwd()), lookup), lookup, device="cpu")
    parts = {name: name for name in assembly.structure.image_encoder}
    numbers, reached = kept(assembly, lookup, parts)
    assert not numbers and not reached


@pytest.mark.parametrize("memory", STRATEGIES, ids=" ".join)
def test_a_rehearsal_shows_it(run: PlanOf, memory: list[str]) -> None:
    activations = []
    for method in (LAST, LORA):
        plan = run({"peft": method, "memory": {"use": memory}}, LOOKUP)
        with rehearsing(plan, LOOKUP, Machine(), device="cuda") as watched:
            taken = watched.take(2).footprint
        activations.append(taken.categories["activations"])
    assert activations[0] < 0.75 * activations[1]
