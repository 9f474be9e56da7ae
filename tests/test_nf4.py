"""Frozen layers in 4 bits: near the weights, a fraction of their size, and nothing of it in a checkpoint."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import COMPONENTS, LORA, METHODS, PlanOf, logits_of
from torch import nn

from graftwork import GraftworkError
from graftwork.build import compose
from graftwork.checkpoint.merging import merge
from graftwork.checkpoint.store import TENSORS, Opened, open_checkpoint, read_golden_inputs, read_tensors
from graftwork.checkpoint.verification import golden_logits
from graftwork.cli import main
from graftwork.contracts import Adaptation, Assembly, DictLookup, Event, Plan, RunStarted
from graftwork.errors import CheckpointError
from graftwork.jobs.outcome import notes
from graftwork.train.loop import Outcome, train
from graftwork_nf4 import BLOCK, OUTER, Nf4

pytest.importorskip("bitsandbytes")

LOOKUP = DictLookup(*COMPONENTS, Nf4)
MEMORY = {"memory": {"use": ["nf4"]}}


def built(run: PlanOf, **changes: Any) -> Assembly:
    return compose.build(run(MEMORY | changes, LOOKUP), LOOKUP, device="cpu")


def rounded(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "RoundedLinear"}


def test_frozen_linear_layers_of_the_base_are_rounded_and_nothing_else_is(run: PlanOf) -> None:
    plain = compose.build(run({"peft.also_train": ["connector"]}), LOOKUP, device="cpu")
    small = built(run, **{"peft.also_train": ["connector"]})
    layers = rounded(small.model)
    linears = {
        name
        for name, module in plain.model.named_modules()
        if type(module) is nn.Linear and "lora_" not in name and "mm_projector" not in name
    }
    assert set(layers) == linears
    assert {name.split(".")[1] for name in layers} >= {"layers", "vision_tower", "vlm_uni_query_projector"}
    for name, layer in layers.items():
        weight = plain.model.get_submodule(name).weight
        assert (layer.weight - weight).norm() < 0.12 * weight.norm()
        assert layer.weight.dtype == weight.dtype
        bytes_of = sum(buffer.nbytes for key, buffer in layer.named_buffers() if key != "code")
        assert bytes_of < 0.54 * weight.numel()
    assert small.adaptation.counts == plain.adaptation.counts
    assert small.state_to_save().keys() == plain.state_to_save().keys()


@pytest.mark.parametrize("shape", [(24, 96), (24, 64), (24, 40)])
def test_every_row_length_is_read_back_as_it_was_packed(shape: tuple[int, int]) -> None:
    """Against 4-bit NormalFloat written out in plain torch, so that no processor's kernel is its own judge."""
    from bitsandbytes.functional import get_4bit_type

    torch.manual_seed(0)
    layer: Any = nn.Linear(shape[1], shape[0])
    layer.requires_grad_(False)
    weight, bias = layer.weight.detach().clone(), layer.bias
    assembly: Any = SimpleNamespace(
        model=nn.ModuleDict({"base": layer}),
        structure=SimpleNamespace(roles={"language.mlp": ("base",)}),
        adaptation=Adaptation(base_keys=frozenset({"base.weight"})),
        device=torch.device("cpu"),
    )
    Nf4(Nf4.Settings()).quantize(assembly)
    # Rows that are not a multiple of a block must not reach the kernels that differ between processors.
    assert layer.as_column == (shape[1] % BLOCK > 0)
    assert (layer.state.shape == (weight.numel(), 1)) == layer.as_column
    scales = layer.code[layer.scales.long()] * layer.outer.repeat_interleave(OUTER)[: len(layer.scales)] + layer.offset
    packed = layer.packed.flatten().long()
    levels = get_4bit_type("nf4", device="cpu")[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    expected = (levels * scales.repeat_interleave(BLOCK)[: len(levels)]).view(shape)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-6)
    assert (layer.weight - weight).norm() < 0.12 * weight.norm()
    inputs = torch.randn(3, shape[1])
    torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, expected, bias), rtol=1e-2, atol=1e-2)


def test_the_base_s_own_roles_can_be_chosen_and_unknown_ones_are_named(run: PlanOf) -> None:
    memory = {"use": ["nf4"], "nf4": {"on": ["language.mlp"]}}
    assert {name.split(".")[3] for name in rounded(built(run, memory=memory).model)} == {"mlp"}
    memory["nf4"] = {"on": ["tongue"]}
    with pytest.raises(GraftworkError, match="'nf4' is asked for the role 'tongue', and this model has 'lang"):
        built(run, memory=memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_and_learns_with_the_weight_that_it_shows(run: PlanOf, dtype: torch.dtype) -> None:
    layer = next(iter(rounded(built(run).model).values()))
    inputs = torch.randn(3, 5, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = layer(inputs)
        wanted = nn.functional.linear(inputs, layer.weight, layer.bias)
    assert output.dtype == wanted.dtype == dtype
    torch.testing.assert_close(output, wanted, rtol=1e-2, atol=1e-2)
    (found,), (gradient,) = (torch.autograd.grad(result.square().sum(), inputs) for result in (output, wanted))
    torch.testing.assert_close(found, gradient, rtol=2e-2, atol=2e-2 * float(gradient.abs().max()))


def test_a_copy_has_its_own_weights(run: PlanOf) -> None:
    layer = next(iter(rounded(built(run).model).values()))
    twin = copy.deepcopy(layer)
    twin.packed.zero_()
    assert not torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "ia3"])
def test_methods_learn_on_a_rounded_base_as_on_the_whole_one(run: PlanOf, tmp_path: Path, method: str) -> None:
    def losses(changes: dict[str, Any], out: str) -> list[float]:
        outcome = train(run({"peft": METHODS[method], **changes}, LOOKUP), LOOKUP, tmp_path / out, device="cpu")
        return [line["loss"] for line in outcome.log]

    whole, small = losses({}, "whole"), losses(MEMORY, "small")
    assert small != whole
    assert small == pytest.approx(whole, rel=0.05)
    assert small[-1] < small[0]


@pytest.fixture
def trained(run: PlanOf, tmp_path: Path) -> tuple[Plan, Outcome, list[Event]]:
    """A LoRA run on a rounded base, and what was told of it."""
    told: list[Event] = []
    plan = run(MEMORY | {"peft": LORA, "train.precision": "bf16"}, LOOKUP)
    return plan, train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=told.append), told


def test_a_checkpoint_holds_the_adapter_and_is_verified_with_the_rounded_base(trained: Any) -> None:
    _, outcome, told = trained
    assert isinstance(told[0], RunStarted)
    assert told[0].notes == ("nf4: frozen linear weights are kept in 4 bits",)
    assert all("lora_" in name for name in read_tensors(outcome.checkpoint / TENSORS))
    again = open_checkpoint(outcome.checkpoint, LOOKUP, device="cpu", as_trained=True)
    assert (again.verification.comparable, again.verification.error, again.note) == (True, 0.0, "")
    assert rounded(again.assembly.model)


def test_opened_otherwise_its_base_is_whole_and_that_is_said(trained: Any) -> None:
    _, outcome, _ = trained
    opened = open_checkpoint(outcome.checkpoint, LOOKUP, device="cpu")
    assert not rounded(opened.assembly.model)
    assert not opened.verification.comparable
    assert opened.note == "Trained on a base that nf4 rounded; the base is whole here, so outputs differ a little."
    assert notes(outcome.data, (), opened.manifest.golden.quantized) == [
        "Trained on a base that nf4 quantized, and evaluated on the unquantized one."
    ]
    without = open_checkpoint(outcome.checkpoint, DictLookup(*COMPONENTS), device="cpu", as_trained=True)
    assert without.note == opened.note


def test_its_adapter_is_merged_into_the_whole_base(trained: Any, tmp_path: Path) -> None:
    _, outcome, _ = trained
    opened = open_checkpoint(outcome.checkpoint, LOOKUP, device="cpu", precision="fp32")
    wanted, base = logits_of(opened.assembly)
    certificate = merge(opened, tmp_path / "merged", LOOKUP, precision="fp32")
    assert certificate.error <= certificate.tolerance
    assert json.loads((tmp_path / "merged" / "certificate.json").read_text())["changed"] == certificate.changed > 0
    assert not torch.equal(wanted, base)


def test_a_certificate_measures_what_the_whole_base_changes(trained: Any, tmp_path: Path) -> None:
    _, outcome, _ = trained

    def whole() -> Opened:
        return open_checkpoint(outcome.checkpoint, LOOKUP, device="cpu", precision="fp32")

    merge(whole(), tmp_path / "merged", LOOKUP, precision="fp32")
    golden = read_golden_inputs(outcome.checkpoint, whole().manifest)
    on, off = golden_logits(whole().assembly, golden)
    rounded = open_checkpoint(outcome.checkpoint, LOOKUP, device="cpu", precision="fp32", as_trained=True).assembly
    on_rounded, off_rounded = golden_logits(rounded, golden)
    written = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert written["rounded_in_training"] == ["nf4"]
    assert written["from_rounded"] > 0.01 and written["from_rounded"] == pytest.approx(
        float((on - on_rounded).abs().max()), rel=1e-3
    )
    assert written["base_from_rounded"] > 0.01 and written["base_from_rounded"] == pytest.approx(
        float((off - off_rounded).abs().max()), rel=1e-3
    )
    without = merge(whole(), tmp_path / "without", DictLookup(*COMPONENTS), precision="fp32")
    assert (without.from_rounded, without.base_from_rounded) == (None, None)
    assert without.rounded == "nf4 rounded the base in training, and cannot here, so what that changes was not measured"


def test_merging_into_a_rounded_base_is_refused(trained: Any, tmp_path: Path) -> None:
    opened = open_checkpoint(trained[1].checkpoint, LOOKUP, device="cpu", as_trained=True)
    with pytest.raises(CheckpointError) as caught:
        merge(opened, tmp_path / "merged", LOOKUP)
    assert str(caught.value) == (
        "an adapter is merged into the whole base, and here nf4 rounded it; open the checkpoint without as_trained"
    )


def test_it_works_on_fake_tensors(run: PlanOf) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assembly = compose.build(run(), LOOKUP, device="cpu")
    numbers = sum(module.weight.numel() for module in Nf4(Nf4.Settings())._linears(assembly))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in assembly.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = mode.from_tensor(parameter.data)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        Nf4(Nf4.Settings()).quantize(assembly)
        layers = rounded(assembly.model)
        assert numbers / 2 <= sum(layer.packed.nbytes for layer in layers.values()) < 0.51 * numbers
        layer = next(iter(layers.values()))
        inputs = torch.empty(2, layer.in_features, requires_grad=True)
        layer(inputs).sum().backward()
        assert inputs.grad is not None


def test_the_command_line_says_what_is_rounded_and_where_it_is_not(trained: Any, tmp_path: Path) -> None:
    _, outcome, _ = trained

    def said(*arguments: str | Path) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "approximates frozen linear weights are kept in 4 bits: a step is within 50% of a plain one" in said(
        "show", "memory", "nf4"
    )
    assert "logits    differ by 0 from those recorded" in said("verify", outcome.checkpoint)
    note = "Trained on a base that nf4 rounded; the base is whole here, so outputs differ a little.\n"
    merged = " ".join(said("merge", outcome.checkpoint, tmp_path / "merged", "--precision", "fp32").split())
    assert re.search(
        r" rounded nf4 rounded the base in training: on that one logits differ by 0\.\d+ with the adapter, and by 0\.\d+ without it ",
        merged,
    )
    assert said("export", outcome.checkpoint, tmp_path / "peft", "--to", "peft").startswith(note)
