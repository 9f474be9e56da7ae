"""What is compared with a tolerance is computed in fp32, also where a GPU would take TF32 for it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_runs import COMPONENTS, PlanOf

from graftwork.build import compose
from graftwork.checkpoint.verification import golden_inputs, golden_logits
from graftwork.contracts import DictLookup

LOOKUP = DictLookup(*COMPONENTS)


def test_golden_logits_are_computed_without_tf32(run: PlanOf) -> None:
    assembly = compose.build(run({}, LOOKUP), LOOKUP, device="cpu")
    source = LOOKUP.find("data_source", "shapes").component
    encoded = [assembly.processor.encode(record) for record in source(source.Settings(2)).records()]
    before, seen = torch.backends.cudnn.allow_tf32, list[Any]()
    assembly.model.register_forward_hook(
        lambda *_: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
    )
    golden_logits(assembly, golden_inputs(encoded, assembly.processor))
    assert set(seen) == {(False, False)}
    assert before and torch.backends.cudnn.allow_tf32 is before
