"""Windows that lie one after another in a row are computed together, as each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_synchronizing import Reads
from torch import Tensor, nn
from vlm_families import FAMILIES
from vlm_folders import write_family
from vlm_trial import RECORDS, built, theirs

from graftwork.attention import plain_attention
from graftwork.attention.definition import BOUND
from graftwork.attention.windows import attend_within
from graftwork.contracts import Assembly, batch_of

LENGTHS = (
    pytest.param([4, 4, 4], [(3, 4)], id="equal"),
    pytest.param([4, 2, 4, 1, 2], [(1, 1), (2, 2), (2, 4)], id="edges"),
    pytest.param([2, 0, 5], [(1, 2), (1, 5)], id="in order, and one empty"),
)


class Recorded(nn.Module):
    """A module that is bound to a kernel which remembers the shapes of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[tuple[int, int]]()
        setattr(self, BOUND, self.compute)

    def compute(self, q: Tensor, *others: Tensor, **options: Any) -> Tensor:
        self.calls.append((q.shape[0], q.shape[2]))
        return plain_attention(q, *others, **options)


@pytest.mark.parametrize(("lengths", "groups"), LENGTHS)
def test_a_call_for_each_length_gives_what_each_window_gives_alone(
    lengths: list[int], groups: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    boundaries, module = torch.tensor([0, *lengths]).cumsum(0).int(), Recorded()
    row = [torch.randn(1, 2, sum(lengths), 8, requires_grad=True) for _ in range(3)]
    found = attend_within(module, *row, boundaries)
    assert module.calls == groups
    pieces = zip(*(tensor.split(lengths, 2) for tensor in row), strict=True)
    plain = {"padding": None, "causal": False, "scale": 8**-0.5, "dropout": 0.0}
    wanted = torch.cat([plain_attention(*piece, **plain) for piece in pieces if piece[0].shape[2]], 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    weights = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad((output * weights).sum(), row) for output in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def deep(name: str, depth: int, folder: Path) -> Path:
    """The folder of a family whose image encoder has so many layers."""
    family = FAMILIES[name]

    def table(id: Any) -> dict[str, Any]:
        made = family.table(id)
        return made | {"vision_config": made["vision_config"] | {"depth": depth}}

    return write_family(family.__class__(**{**vars(family), "table": table}), folder)


def pixels_of(assembly: Assembly) -> dict[str, Tensor]:
    """The images of all records, as transformers takes them."""
    batch = batch_of(assembly.processor, [assembly.processor.encode(each) for each in RECORDS if each.images])
    return {name: batch.pixels[name] for name in ("pixel_values", "image_grid_thw")}


def seen(model: Any, pixels: dict[str, Tensor]) -> Tensor:
    """What an image encoder makes of them."""
    return torch.cat([*model.base_model.get_image_features(**pixels).pooler_output])


def test_an_image_encoder_reads_where_its_windows_lie_once_for_all_layers(tmp_path: Path) -> None:
    counts = []
    for depth in (3, 6):
        assembly = built(deep("qwen2_5_vl", depth, tmp_path / str(depth)))
        pixels = pixels_of(assembly)
        with Reads() as reads:
            seen(assembly.model, pixels)
        counts.append((reads.count, *assembly.bindings["vision"].ran.values()))
    (few, calls), (more, twice) = counts
    # One layer sees whole images, of five sizes; the others windows, of two.
    assert few == more and (calls, twice) == (5 + 2 * 2, 5 + 5 * 2)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of transformers, with numpy 2
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "glm4v"])
def test_windows_have_transformers_gradients(name: str, tmp_path: Path) -> None:
    folder = deep(name, 3, tmp_path / "model")
    assembly, model = built(folder), theirs(folder)
    model.set_attn_implementation("eager")
    (site,) = assembly.structure.attention_modules["vision"]
    ours, plain = assembly.model.get_submodule(site), model.get_submodule(site)
    for module in (ours, plain):
        module.requires_grad_(True)
    pixels = pixels_of(assembly)
    found, wanted = seen(assembly.model, pixels), seen(model, pixels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    weights = torch.randn_like(wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
