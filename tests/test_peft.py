"""The PEFT methods: they change nothing at first, can be switched off, folded in, and save what they trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import LORA, METHODS, Run, logits_of, plan_of

from graftwork.build import compose
from graftwork.build.outline import outline
from graftwork.checkpoint.store import TENSORS, open_checkpoint
from graftwork.config.machine import Machine
from graftwork.contracts import Assembly, DictLookup, named_tensors
from graftwork.errors import AdapterError
from graftwork.train.loop import train

RunOf = Callable[[str], Run]
EXACT = ("lora", "rslora", "lora-plus", "ia3", "full")
"""Methods whose fresh adapter changes not a single bit."""
EVERYWHERE = ["language.attention", "language.mlp", "connector", "mining", "vision"]
LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
ADAPTED = [f"model.layers.{layer}.{name}" for layer in range(4) for name in LINEARS]


@pytest.fixture(scope="module")
def plain(base: Path, lookup: DictLookup) -> Assembly:
    """The base without any method."""
    return compose.build(plan_of(base, base, {"peft": None}), lookup, device="cpu")


def built(base: Path, lookup: DictLookup, peft: dict[str, Any], **options: Any) -> Assembly:
    return compose.build(plan_of(base, base, {"peft": peft}), lookup, device="cpu", **options)


def moved(assembly: Assembly, by: float = 0.02) -> Assembly:
    """The assembly after its trained parameters were moved at random."""
    generator = torch.Generator().manual_seed(3)
    for parameter in assembly.trained().values():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return assembly


@pytest.mark.parametrize("on", [["language.attention", "language.mlp"], EVERYWHERE], ids=["language", "everywhere"])
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_method_changes_nothing(
    base: Path, lookup: DictLookup, plain: Assembly, method: str, on: list[str]
) -> None:
    # Mining whose projections something is put around calls them for every pixel, which rounds otherwise.
    around = plain.structure.roles["mining"] if "mining" in on and method != "full" else ()
    modules = [plain.model.get_submodule(name) for name in around]
    hooks = [module[1].register_forward_hook(lambda *_: None) for module in modules]
    expected, _ = logits_of(plain)
    for hook in hooks:
        hook.remove()
    on_logits, off_logits = logits_of(built(base, lookup, METHODS[method] | {"on": on}))
    assert off_logits.equal(expected)
    if method in EXACT:
        assert on_logits.equal(expected)
    else:
        torch.testing.assert_close(on_logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_after_training_off_is_the_base_to_the_last_bit(run_of: RunOf, plain: Assembly, method: str) -> None:
    on, off = logits_of(run_of(method).outcome.assembly)
    assert off.equal(logits_of(plain)[0])
    assert (on - off).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_switching_off_and_on_again_leaves_everything_as_it_was(run_of: RunOf, method: str) -> None:
    assembly = run_of(method).outcome.assembly
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in assembly.model.named_parameters()}
    on, _ = logits_of(assembly)
    with pytest.raises(ZeroDivisionError), assembly.disable_adapter():
        raise ZeroDivisionError
    for name, parameter in assembly.model.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert parameter.equal(before[name][1]), name
    assert logits_of(assembly)[0].equal(on)


@pytest.mark.parametrize("on", [["language.attention", "language.mlp"], EVERYWHERE], ids=["language", "everywhere"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_changes_the_weights_and_not_the_logits(
    base: Path, lookup: DictLookup, plain: Assembly, method: str, on: list[str]
) -> None:
    assembly = moved(built(base, lookup, METHODS[method] | {"on": on}))
    expected, off = logits_of(assembly)
    assert (expected - off).abs().max() > 0.03
    assert assembly.peft
    assembly.peft.merge(assembly.model)
    merged = named_tensors(assembly.model)
    assert list(merged) == list(named_tensors(plain.model))
    assembly.peft, assembly.adaptation = None, replace(assembly.adaptation, base_copy={})
    torch.testing.assert_close(logits_of(assembly)[0], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def saved_by(method: str) -> set[str]:
    """What a checkpoint of a method on the language model must hold, spelled out."""
    if method == "full":
        return {f"{name}.weight" for name in ADAPTED if ".mlp." in name}
    if method == "ia3":
        return {f"{name}.ia3" for name in ADAPTED}
    kinds = ["lora_A.default.weight", "lora_B.default.weight"]
    kinds += {"dora": ["lora_magnitude_vector.default.weight"]}.get(method, [])
    kinds += {"pissa": ["lora_A.start.weight", "lora_B.start.weight"]}.get(method, [])
    return {f"{name}.{kind}" for name in ADAPTED for kind in kinds}


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_what_was_trained_or_is_new_and_nothing_else(run_of: RunOf, method: str) -> None:
    run = run_of(method)
    assert load_file(run.checkpoint / TENSORS).keys() == saved_by(method)
    trained = run.outcome.assembly.trained()
    assert trained.keys() == {name for name in saved_by(method) if ".start." not in name}


def test_what_pissa_started_from_is_not_trained(run_of: RunOf, base: Path, lookup: DictLookup) -> None:
    fresh = named_tensors(built(base, lookup, METHODS["pissa"]).model)
    ended = named_tensors(run_of("pissa").outcome.assembly.model)
    for name in ADAPTED:
        for matrix in ("lora_A", "lora_B"):
            assert ended[f"{name}.{matrix}.start.weight"].equal(fresh[f"{name}.{matrix}.start.weight"])
            assert not ended[f"{name}.{matrix}.default.weight"].equal(fresh[f"{name}.{matrix}.default.weight"])


def test_pissa_starts_from_the_principal_components(base: Path, lookup: DictLookup) -> None:
    assembly = built(base, lookup, METHODS["pissa"])
    name = ADAPTED[0]
    tensors = named_tensors(assembly.model)
    product = tensors[f"{name}.lora_B.default.weight"] @ tensors[f"{name}.lora_A.default.weight"]
    u, s, vh = torch.linalg.svd(tensors[f"{name}.base_layer.weight"])
    torch.testing.assert_close(2.0 * product, u[:, :4] * s[:4] @ vh[:4], atol=1e-5, rtol=0)  # alpha / rank is 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_pissa_starts_from_cancels_what_it_trains(base: Path, lookup: DictLookup, precision: str) -> None:
    tensors = named_tensors(built(base, lookup, METHODS["pissa"], precision=precision).model)
    for name in ADAPTED:
        assert tensors[f"{name}.lora_A.start.weight"].equal(tensors[f"{name}.lora_A.default.weight"])
        assert tensors[f"{name}.lora_B.start.weight"].equal(-tensors[f"{name}.lora_B.default.weight"])


def test_pissa_takes_a_rank_that_is_larger_than_a_layer(base: Path, lookup: DictLookup) -> None:
    on, off = logits_of(built(base, lookup, METHODS["pissa"] | {"rank": 48, "on": ["language.attention"]}))
    torch.testing.assert_close(on, off, atol=1e-5, rtol=0)  # the key projection has 32 outputs


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_what_was_trained_in_bf16_reopens_in_bf16_and_in_fp32(
    base: Path, lookup: DictLookup, tmp_path: Path, method: str
) -> None:
    plan = plan_of(base, tmp_path, {"peft": METHODS[method], "train.precision": "bf16"})
    trained = train(plan, lookup, tmp_path / "out", device="cpu")
    assert {tensor.dtype for tensor in load_file(trained.checkpoint / TENSORS).values()} == {torch.float32}
    opened = open_checkpoint(trained.checkpoint, lookup, device="cpu")
    assert opened.verification.comparable
    assert opened.verification.error == 0.0
    wider = open_checkpoint(trained.checkpoint, lookup, device="cpu", precision="fp32")
    assert not wider.verification.comparable
    assert wider.verification.error < 0.05 * opened.manifest.golden.largest


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_role_without_linear_layers_is_refused(base: Path, lookup: DictLookup, method: str) -> None:
    with pytest.raises(AdapterError) as caught:
        built(base, lookup, METHODS[method] | {"on": ["language.norms"]})
    assert str(caught.value) == f"'{method}' adapts linear layers, and the chosen roles have none; choose other roles"


@pytest.mark.parametrize("key", ["on", "also_train"])
def test_a_role_that_this_model_leaves_empty_is_refused(base: Path, lookup: DictLookup, key: str) -> None:
    changes = {"model.parts.high": {"use": "none"}, "peft": METHODS["lora"] | {key: ["language.mlp", "mining"]}}
    plan = plan_of(None, base, changes)
    said = rf"^peft.{key}: this model has nothing in the role 'mining' \(query, .* needs a high part\); choose among language.att"
    with pytest.raises(AdapterError, match=said):
        compose.build(plan, lookup, device="cpu")
    with pytest.raises(AdapterError, match=said):
        outline(plan, lookup, Machine())


def test_full_trains_what_is_no_linear_layer(base: Path, lookup: DictLookup) -> None:
    assembly = built(base, lookup, {"use": "full", "on": ["language.norms", "language.embeddings"]})
    assert len(assembly.trained()) == 4 * 2 + 1 + 1
    assert assembly.can_disable


def test_a_role_can_be_adapted_and_trained_itself(base: Path, lookup: DictLookup, plain: Assembly) -> None:
    assembly = built(base, lookup, LORA | {"on": ["language.attention"], "also_train": ["language.attention"]})
    name = ADAPTED[0]
    assert {f"{name}.base_layer.weight", f"{name}.lora_A.default.weight"} <= assembly.trained().keys()
    on, off = logits_of(moved(assembly))
    assert off.equal(logits_of(plain)[0])
    assert not on.equal(off)
    assert f"{name}.base_layer.weight" in assembly.trained()
    assert logits_of(assembly)[0].equal(on)


def test_lora_plus_lets_b_learn_faster(base: Path, lookup: DictLookup) -> None:
    assembly = built(base, lookup, METHODS["lora-plus"] | {"also_train": ["connector"]})
    assert assembly.peft
    slow, fast = assembly.peft.param_groups(assembly.trained(), 1e-3)
    names = {id(parameter): name for name, parameter in assembly.trained().items()}
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    assert {names[id(p)] for p in fast["params"]} == {f"{name}.lora_B.default.weight" for name in ADAPTED}
    assert len(slow["params"]) + len(fast["params"]) == len(names)
    assert {"model.mm_projector.0.weight"} < {names[id(p)] for p in slow["params"]}


def test_plain_lora_has_one_group(base: Path, lookup: DictLookup) -> None:
    assembly = built(base, lookup, LORA)
    assert assembly.peft
    (group,) = assembly.peft.param_groups(assembly.trained(), 1e-3)
    assert (group["lr"], len(group["params"])) == (1e-3, 2 * len(ADAPTED))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(
    base: Path, lookup: DictLookup, rslora: bool, scale: float
) -> None:
    layer = built(base, lookup, LORA | {"use_rslora": rslora}).model.get_submodule(ADAPTED[0])
    x = torch.randn(2, 128)
    layer.lora_B["default"].weight.data.normal_()
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * update, atol=1e-4, rtol=1e-4)


def test_dora_and_pissa_together_are_refused(base: Path) -> None:
    from graftwork.errors import PlanRefused

    with pytest.raises(PlanRefused, match="use_dora and init = 'pissa' cannot be combined; choose one"):
        plan_of(base, base, {"peft": LORA | {"use_dora": True, "init": "pissa"}})


def test_a_checkpoint_does_not_pretend_to_be_more_than_json(run_of: RunOf) -> None:
    text = (run_of("dora").checkpoint / "graftwork.json").read_text(encoding="utf-8")
    assert json.loads(text)["plan"]["model_spec"]["peft"]["settings"]["use_dora"] is True
