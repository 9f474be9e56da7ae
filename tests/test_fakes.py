"""A rehearsal's fake tensors are those of PyTorch: the same operators make the same of them, whatever the cache was asked before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graftwork.memory import fakes

ALIKE: dict[str, Callable[[], Iterator[Tensor]]] = {
    "numbers of other types": lambda: (torch.ones(2, dtype=torch.int64) * factor for factor in (2, 2.0, True)),
    "shapes": lambda: (torch.ones(*shape).sum(0) for shape in ((2, 3), (3, 2), (6,), (1, 2, 3))),
    "strides": lambda: (x + 1 for x in (torch.ones(3, 3), torch.ones(3, 3).t(), torch.ones(1, 3).expand(3, 3))),
    "offsets": lambda: (x.view(2, 2) for x in (torch.ones(4), torch.ones(8)[4:])),
    "precisions": lambda: (torch.ones(2, dtype=kind) + 1 for kind in (torch.float32, torch.bfloat16, torch.int8)),
    "channels last": lambda: (
        x.clone() for x in (torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last))
    ),
    "lists": lambda: (torch.cat([torch.ones(2)] * count) for count in (1, 2, 3)),
    "sizes": lambda: (torch.ones(6).reshape(shape) for shape in ([6], [2, 3], [3, 2], [1, 6])),
    "devices": lambda: (torch.ones(2, device="cpu").to(other) for other in (torch.float64, "cpu")),
    "keywords": lambda: (torch.ones(2).to(dtype=kind) for kind in (torch.float64, torch.float16)),
    "parameters": lambda: (torch.nn.Parameter(torch.ones(2), requires_grad=trained) * 2 for trained in (True, False)),
}


def looked_at(mode: Any, make: Callable[[], Iterator[Tensor]]) -> list[tuple[Any, ...]]:
    with mode:
        made = [tensor for _ in range(2) for tensor in make()]  # the second time from the cache
        return [
            (x.shape, x.stride(), x.dtype, x.device, x.storage_offset(), x.untyped_storage().nbytes(), x.requires_grad)
            for x in made
        ]


@pytest.mark.parametrize("what", ALIKE)
def test_operators_make_the_same(what: str) -> None:
    FakeTensorMode.cache_clear()
    found = looked_at(fakes.mode(), ALIKE[what])
    FakeTensorMode.cache_clear()
    assert found == looked_at(FakeTensorMode(), ALIKE[what])


def test_the_cache_is_asked() -> None:
    FakeTensorMode.cache_clear()
    looked_at(fakes.mode(), ALIKE["shapes"])
    assert FakeTensorMode.cache_info().hits >= 4
