"""Filling a model from its base weights: everything, or a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import plan_of

from graftwork.build import compose
from graftwork.build.filling import check_keys, fill
from graftwork.build.values import put
from graftwork.contracts import DTYPES, Assembly, DictLookup, named_tensors, within
from graftwork.errors import AdapterError, WeightsError

CONNECTOR = "model.mm_projector.0.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def altered(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base without some tensors and with others."""

    def alter(without: str | tuple[str, ...] = (), **changed: torch.Tensor) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(base, folder)
        tensors = load_file(base / "model.safetensors")
        tensors = {name: t for name, t in tensors.items() if not (without and name.startswith(without))}
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.safetensors").unlink()
        save_file(tensors | changed, folder / "model.safetensors")
        return folder

    return alter


def built(folder: Path, lookup: DictLookup, **options: Any) -> Assembly:
    changes = options.pop("changes", {"peft": None})
    return compose.build(plan_of(folder, folder, changes), lookup, device="cpu", **options)


def refusal(folder: Path, lookup: DictLookup) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        built(folder, lookup)
    return caught.value


def test_every_tensor_of_the_model_is_the_one_in_the_file(base: Path, lookup: DictLookup) -> None:
    assembly = built(base, lookup)
    stored = {
        name: read()
        for name, read in assembly.architecture.tensors(
            {name: lambda tensor=tensor: tensor for name, tensor in load_file(base / "model.safetensors").items()},
            assembly.towers,
        ).items()
    }
    found = named_tensors(assembly.model)
    assert found.keys() == stored.keys() == assembly.adaptation.base_keys
    assert all(found[name].equal(stored[name]) for name in stored)
    assert assembly.adaptation.newly_initialised == ()
    assert not assembly.trained()


def test_a_missing_tensor_is_refused(altered: Any, lookup: DictLookup) -> None:
    error = refusal(altered(without=QUERY), lookup)
    assert error.sentence == "the weights lack 1 tensors that 'mgm-gemma' needs; name complete weights"
    assert error.details == (QUERY,)


def test_a_tensor_without_a_place_is_refused(altered: Any, lookup: DictLookup) -> None:
    extra = {f"model.layers.{number}.self_attn.extra": torch.zeros(1) for number in range(7)}
    error = refusal(altered(**extra), lookup)
    assert error.sentence == ("the weights hold 7 tensors that 'mgm-gemma' has no place for; name the right weights")
    assert len(error.details) == 6
    assert error.details[-1] == "… and 2 more"


def test_a_tensor_of_another_shape_is_refused(altered: Any, lookup: DictLookup) -> None:
    error = refusal(altered(**{QUERY: torch.zeros(128, 64)}), lookup)
    assert error.sentence == (
        f"the weights hold '{QUERY}' as (128, 64), and 'mgm-gemma' needs (128, 128); name weights that fit the "
        "configuration"
    )


@pytest.mark.parametrize(("number", "what"), [("nan", "1 NaN and 0"), ("inf", "0 NaN and 1"), ("-inf", "0 NaN and 1")])
def test_a_number_of_the_base_that_is_not_finite_is_named_with_its_file(
    base: Path, altered: Any, lookup: DictLookup, number: str, what: str
) -> None:
    weight = load_file(base / "model.safetensors")[QUERY]
    weight[3, 5] = float(number)
    folder = altered(**{QUERY: weight})
    assert refusal(folder, lookup).sentence == (
        f"the weights hold NaN or infinite values, in '{QUERY}' in '{folder / 'model.safetensors'}' ({what} infinite of 16,384); "
        "fetch them again, or name others"
    )


def test_of_several_tensors_that_are_not_finite_some_are_listed(base: Path, altered: Any, lookup: DictLookup) -> None:
    stored = load_file(base / "model.safetensors")
    broken = {name: torch.full_like(stored[name], torch.nan) for name in (CONNECTOR, QUERY)}
    error = refusal(altered(**broken), lookup)
    assert " and 1 more tensors; " in error.sentence
    assert [line.split("'")[1] for line in error.details] == sorted(broken)


def test_a_towers_own_folder_is_named_too(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    stored, start = load_file(base / "model.safetensors"), "model.vision_tower."
    tower = {name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)}
    name = next(name for name in tower if name.endswith("q_proj.weight"))
    tower[name] = torch.full_like(tower[name], torch.inf)
    shutil.copytree(base / "low", tmp_path / "low")
    save_file(tower, tmp_path / "low" / "model.safetensors")
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    (plain / "model.safetensors.index.json").unlink()
    save_file({n: t for n, t in stored.items() if not n.startswith(start)}, plain / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        built(
            plain, lookup, changes={"peft": None, "model.parts.low": {"use": "clip", "weights": str(tmp_path / "low")}}
        )
    assert f"'{name}' in '{tmp_path / 'low' / 'model.safetensors'}' (" in caught.value.sentence


def test_a_number_that_the_precision_cannot_hold_is_no_fault_of_the_file(
    base: Path, altered: Any, lookup: DictLookup
) -> None:
    weight = load_file(base / "model.safetensors")[QUERY]
    weight[3, 5] = 1e6
    folder = altered(**{QUERY: weight})
    built(folder, lookup)
    with pytest.raises(
        WeightsError, match=f"values up to 1e\\+06 in '{QUERY}', which float16 cannot hold; set train.prec"
    ):
        built(folder, lookup, precision="fp16")


def test_a_mask_of_a_module_may_be_infinite_and_not_nan() -> None:
    module = torch.nn.Module()
    module.register_buffer("mask", torch.zeros(2))
    for number in (float("-inf"), float("nan")):
        values = {"mask": lambda number=number: torch.tensor([0.0, number])}
        if number == number:
            fill(named_tensors(module), values, torch.float32, "it")
            assert module.mask.tolist() == [0, number]
        else:
            with pytest.raises(WeightsError, match="NaN or infinite values, in 'mask'; fetch"):
                fill(named_tensors(module), values, torch.float32, "it")


def test_a_role_that_may_be_missing_starts_fresh_and_is_reported(altered: Any, lookup: DictLookup) -> None:
    folder = altered(without=("model.mm_projector.", "model.vlm_uni_"))
    assembly = built(folder, lookup)
    assert assembly.adaptation.newly_initialised == ("connector", "mining")
    weight = assembly.model.get_parameter(CONNECTOR)
    assert weight.std() > 0
    assert weight.isfinite().all()
    assert built(folder, lookup).model.get_parameter(CONNECTOR).equal(weight)
    other = built(folder, lookup, changes={"peft": None, "seed": 6})
    assert not other.model.get_parameter(CONNECTOR).equal(weight)


def test_half_of_such_a_role_is_refused(altered: Any, lookup: DictLookup) -> None:
    assert refusal(altered(without=CONNECTOR), lookup).details == (CONNECTOR,)


def test_what_a_fresh_role_starts_with_is_in_the_checkpoint_even_when_frozen(altered: Any, lookup: DictLookup) -> None:
    assembly = built(altered(without="model.mm_projector."), lookup, changes={})
    assert CONNECTOR in assembly.state_to_save()
    assert CONNECTOR not in assembly.trained()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_all_frozen_numbers_get_the_precision_and_trained_ones_are_fp32(
    base: Path, lookup: DictLookup, precision: str
) -> None:
    assembly = built(base, lookup, precision=precision, changes={"peft.also_train": ["connector"]})
    dtype = getattr(torch, DTYPES[precision])
    trained = assembly.trained()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert CONNECTOR in trained
    frozen = [t for name, t in named_tensors(assembly.model).items() if name not in trained]
    assert {tensor.dtype for tensor in frozen if tensor.is_floating_point()} == {dtype}


def test_towers_can_come_from_folders_of_their_own(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    stored = load_file(base / "model.safetensors")
    places = {"low": "model.vision_tower.", "high": "model.vision_tower_aux."}
    changes: dict[str, Any] = {"peft": None}
    rest = {name: t for name, t in stored.items() if not name.startswith(tuple(places.values()))}
    for part, prefix in places.items():
        shutil.copytree(base / part, tmp_path / part)
        own = {
            n.removeprefix(prefix).removeprefix("vision_tower."): t for n, t in stored.items() if n.startswith(prefix)
        }
        if part == "low":
            save_file(own, tmp_path / part / "model.safetensors")
        else:
            torch.save(own, tmp_path / part / "open_clip_pytorch_model.bin")
        changes[f"model.parts.{part}.weights"] = str(tmp_path / part)
    shutil.copytree(base, tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").unlink()
    (tmp_path / "plain" / "model.safetensors.index.json").unlink()
    save_file(rest, tmp_path / "plain" / "model.safetensors")
    apart = named_tensors(built(tmp_path / "plain", lookup, changes=changes).model)
    whole = named_tensors(built(base, lookup).model)
    assert apart.keys() == whole.keys()
    assert all(apart[name].equal(whole[name]) for name in whole)


def test_training_does_not_change_the_base_that_is_read_next(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(base, folder)
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    first = built(folder, lookup)
    for tensor in named_tensors(first.model).values():
        tensor.data.zero_()
    assert built(folder, lookup).model.get_parameter(QUERY).any()


def test_a_model_without_weights_starts_from_its_seed(tmp_path: Path, lookup: DictLookup) -> None:
    def query(seed: int) -> torch.Tensor:
        plan = plan_of(None, tmp_path, {"peft": None, "seed": seed})
        weight: torch.Tensor = compose.build(plan, lookup, device="cpu").model.get_parameter(QUERY)
        return weight

    assert query(1).equal(query(1))
    assert not query(1).equal(query(2))


def test_meta_reads_nothing_and_knows_every_shape(base: Path, lookup: DictLookup) -> None:
    changes = {"peft.also_train": ["connector"]}
    shaped = compose.build_shape(plan_of(base, base, changes), lookup)
    whole = built(base, lookup, changes=changes)
    assert all(parameter.is_meta for parameter in shaped.model.parameters())
    assert {n: t.shape for n, t in shaped.state_to_save().items()} == {
        n: t.shape for n, t in whole.state_to_save().items()
    }
    assert (shaped.adaptation.newly_initialised, shaped.adaptation.base_keys, shaped.adaptation.adapter_parameters) == (
        whole.adaptation.newly_initialised,
        whole.adaptation.base_keys,
        whole.adaptation.adapter_parameters,
    )


def test_tied_tensors_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(3, 2, device="meta")
            self.head = torch.nn.Linear(2, 3, bias=False, device="meta")
            self.head.weight = self.embedding.weight
            self.register_buffer("kept", torch.zeros(1))
            self.register_buffer("computed", torch.zeros(1), persistent=False)

    model = Tied()
    assert set(named_tensors(model)) == {"embedding.weight", "kept"}
    put(model.embedding.weight, torch.ones(3, 2))
    put(model.kept, torch.ones(1))
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.tolist() == torch.ones(3, 2).tolist()
    assert model.kept.tolist() == [1.0]
    assert set(dict(model.named_buffers())) == {"kept", "computed"}


def test_a_name_lies_within_a_module_only_at_a_dot() -> None:
    assert within("model.layers.1.weight", ["model.layers.1"])
    assert not within("model.layers.10.weight", ["model.layers.1"])
    assert within("model.layers.1", ["model.layers.1"])


def test_a_census_counts_what_is_missing_unknown_and_of_another_shape() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    check_keys(expected, {"a": (2,), "b": (2, 3), "c": (1,)})
    with pytest.raises(AdapterError) as caught:
        check_keys(expected, {"a": (2,), "b": (3, 2), "d": (1,)})
    assert caught.value.sentence == (
        "the adapter does not fit its model: 1 of 3 expected tensors match, 1 are missing, 1 are unknown, 1 have another "
        "shape; nothing was loaded"
    )
    assert caught.value.details == (
        "missing: c",
        "unknown: d",
        "shape: b: (3, 2) in the checkpoint, (2, 3) in the model",
    )


def test_the_index_of_a_written_base_names_every_tensor(base: Path) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == load_file(base / "model.safetensors").keys()
