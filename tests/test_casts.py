"""Under autocast no activation is cast that autocast would cast back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_runs import COMPONENTS, LORA, PlanOf
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.contracts import Assembly, DictLookup, batch_of, stepper_for
from graftwork.memory.rehearsal import rehearsing
from graftwork_lora import Lora, is_layer

LOOKUP = DictLookup(*COMPONENTS)


class Casts(TorchDispatchMode):
    """Counts the numbers that are cast from one floating-point type to another while it is entered."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].is_floating_point() and found.dtype != args[0].dtype:
            self.count += found.numel()
        return found


def cast_by_peft(assembly: Assembly) -> None:
    """Let peft cast what enters an adapter, as it does by default."""
    for module in assembly.model.modules():
        if is_layer(module):
            module.cast_input_dtype_enabled = True


def stepped(assembly: Assembly) -> tuple[int, list[torch.Tensor]]:
    """How many numbers a micro-batch casts, and its loss and gradients."""
    records = LOOKUP.find("data_source", "shapes").component
    examples = [assembly.processor.encode(record) for record in records(records.Settings(4)).records()]
    stepper = stepper_for(assembly, assembly.plan.run_context.train)
    assembly.model.train()
    for parameter in stepper.parameters.values():
        parameter.data += 0.01  # or no gradient comes to the first matrices
    with Casts() as casts:
        loss = stepper.accumulate(batch_of(assembly.processor, examples), 10.0)
    return casts.count, [loss, *stepper.gradients()]


def test_a_bf16_step_is_the_same_to_the_last_bit_with_fewer_casts(run: PlanOf) -> None:
    plan = run({"peft": LORA, "train.precision": "bf16"}, LOOKUP)
    found, by_peft = (compose.build(plan, LOOKUP, device="cpu") for _ in range(2))
    cast_by_peft(by_peft)
    (few, ours), (many, theirs) = stepped(found), stepped(by_peft)
    assert few < many / 2
    assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))


def test_dora_takes_its_norms_in_fp32(run: PlanOf) -> None:
    plan = run({"peft": LORA | {"use_dora": True}, "train.precision": "bf16"}, LOOKUP)
    found, by_peft = (compose.build(plan, LOOKUP, device="cpu") for _ in range(2))
    cast_by_peft(by_peft)
    (_, ours), (_, theirs) = stepped(found), stepped(by_peft)
    assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))


class CastByPeft(Lora):
    """LoRA with peft's casts"""

    name = "lora-cast-by-peft"

    def inject(self, model: torch.nn.Module, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        for module in model.modules():
            if is_layer(module):
                module.cast_input_dtype_enabled = True  # type: ignore[assignment]


def test_a_rehearsed_step_needs_less_without_them(run: PlanOf) -> None:
    lookup, peaks = DictLookup(*COMPONENTS, CastByPeft), []
    for method in ("lora", "lora-cast-by-peft"):
        plan = run({"peft": LORA | {"use": method, "dropout": 0.1}, "train.precision": "bf16"}, lookup)
        with rehearsing(plan, lookup, Machine(), device="cpu", longest=512) as watched:
            peaks.append(watched.take(2).footprint.peak)
    assert peaks[0] < 0.95 * peaks[1]
