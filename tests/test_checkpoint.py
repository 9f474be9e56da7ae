"""Checkpoints: they open wherever they are, and whatever is wrong with one is a sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import COMPONENTS, METHODS, Run, logits_of, plan_of

from graftwork.checkpoint import learning, manifest, store
from graftwork.checkpoint.store import (
    GOLDEN_INPUTS,
    OPTIMIZER,
    PROCESSOR,
    TENSORS,
    checkpoints,
    newest,
    open_checkpoint,
)
from graftwork.contracts import Choice, DictLookup
from graftwork.errors import AdapterError, CheckpointError, GraftworkError, WeightsError
from graftwork.train.loop import train
from graftwork_lora import Lora

FILES = (
    manifest.FILE,
    TENSORS,
    GOLDEN_INPUTS,
    f"{PROCESSOR}/tokenizer.json",
    f"{PROCESSOR}/tokenizer_config.json",
    f"{OPTIMIZER}/state.safetensors",
    learning.FILE,
)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(trained: Run, tmp_path: Path) -> Path:
    """A copy of a trained checkpoint, to be damaged."""
    return Path(shutil.copytree(trained.checkpoint, tmp_path / "copy"))


@pytest.fixture
def opened(lookup: DictLookup) -> Callable[..., store.Opened]:
    """Opens a checkpoint on the CPU."""
    return lambda folder, **options: open_checkpoint(folder, lookup, device="cpu", **options)


Opening = Callable[..., store.Opened]


def refusal(opening: Opening, folder: Path, kind: type[GraftworkError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        opening(folder, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    content = change(file.read_bytes())
    file.unlink()  # what was read from it may still be mapped
    file.write_bytes(content)


def seal_again(folder: Path, **changes: Any) -> None:
    """Make a manifest fit its folder again, as an attacker or a careless tool would."""
    read = manifest.read(folder)
    (folder / manifest.FILE).unlink()
    found = manifest.describe_files(folder)
    stored = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
    entries = {n: manifest.TensorEntry(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in stored.items()}
    manifest.write(replace(read, files=found, tensors=entries, **changes), folder)


def seal_json(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as JSON and give it a seal that fits."""
    content = json.loads((folder / manifest.FILE).read_text(encoding="utf-8"))
    change(content)
    (folder / manifest.FILE).write_text(json.dumps(content | {"seal": manifest.seal(content)}), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    (folder / TENSORS).unlink()
    save_file(change(tensors), folder / TENSORS)


# It opens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_reopened_model_computes_the_same_bits(run_of: Callable[[str], Run], opened: Opening, method: str) -> None:
    run = run_of(method)
    again = opened(run.checkpoint)
    assert again.verification.error == 0.0
    assert again.verification.comparable
    assert again.verification.distance == again.manifest.golden.distance > 0.0
    (on, off), (expected, without) = logits_of(again.assembly), logits_of(run.outcome.assembly)
    assert on.equal(expected)
    assert off.equal(without)
    assert not again.assembly.model.training


def test_the_folder_of_a_run_opens_as_its_newest_checkpoint(trained: Run, opened: Opening) -> None:
    assert opened(trained.out).folder == trained.checkpoint


def test_what_identifies_a_checkpoint_is_the_hash_of_its_manifest(trained: Run, opened: Opening) -> None:
    content = (trained.checkpoint / manifest.FILE).read_bytes()
    assert opened(trained.checkpoint).sha256 == hashlib.sha256(content).hexdigest()


def test_a_checkpoint_can_be_moved(copy: Path, opened: Opening) -> None:
    assert opened(copy).verification.error == 0.0


def test_a_checkpoint_opens_from_any_working_directory_by_a_relative_path(
    copy: Path, opened: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert opened(Path("copy")).verification.error == 0.0


def test_another_kernel_computes_the_same(trained: Run, lookup: DictLookup, opened: Opening) -> None:
    eager = Choice("attention", "eager", "dictionary", "dictionary", "0")
    again = opened(trained.checkpoint, attention={"*": [eager]})
    assert 0.0 <= again.verification.error <= again.verification.tolerance
    assert again.assembly.kernel_usage()["language"]["ran"].keys() == {"eager"}


def test_checkpoints_are_sorted_by_their_step(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-last", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert newest(tmp_path).name == "checkpoint-10"


# Its base -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(base: Path, lookup: DictLookup, tmp_path: Path) -> Path:
    """A folder with a base of its own and a run on it, whose tower's weights lie in a third folder."""
    place = tmp_path / "place"
    shutil.copytree(base, place / "base")
    low = place / "low"
    shutil.move(place / "base" / "low", low)
    tensors = load_file(base / "model.safetensors")
    own = {n.removeprefix("model.vision_tower."): t for n, t in tensors.items() if n.startswith("model.vision_tower.")}
    save_file(own, low / "model.safetensors")
    changes = {
        "model.parts.low": {"use": "clip", "weights": str(low)},
        "model.parts.high.config": str(base / "high"),
        "train.steps": 2,
    }
    train(plan_of(place / "base", place, changes), lookup, place / "out", device="cpu")
    return place


def test_checkpoint_and_base_can_be_moved_together(beside: Path, opened: Opening) -> None:
    moved = Path(shutil.move(beside, beside.with_name("moved")))
    assert opened(moved / "out").verification.error == 0.0


def test_a_base_that_was_moved_alone_must_be_named(beside: Path, opened: Opening) -> None:
    elsewhere = Path(shutil.move(beside / "base", beside.with_name("elsewhere")))
    folder = newest(beside / "out")
    assert refusal(opened, folder, WeightsError) == (
        f"the base weights '{beside / 'base'}' are not at '{folder}/../../base' or '{beside / 'base'}'; name their folder "
        "with --base-weights DIR"
    )
    assert opened(folder, base=elsewhere).verification.error == 0.0
    said = refusal(opened, folder, WeightsError, base=beside / "nowhere")
    assert f"are not at '{beside / 'nowhere'}'; name their folder with --base-weights DIR" in said


def test_a_part_that_was_moved_alone_must_be_named(beside: Path, opened: Opening) -> None:
    elsewhere = Path(shutil.move(beside / "low", beside.with_name("elsewhere")))
    folder = newest(beside / "out")
    assert refusal(opened, folder, WeightsError).endswith("; name their folder with --part low=DIR")
    assert opened(folder, parts={"low": elsewhere}).verification.error == 0.0
    said = refusal(opened, folder, parts={"lwo": elsewhere})
    assert said == "the model has no part 'lwo'; its parts are low, high"


def test_a_base_that_differs_in_one_byte_is_refused(beside: Path, opened: Opening) -> None:
    file = beside / "base" / "model.safetensors"
    rewrite(file, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    sha256 = manifest.read(newest(beside / "out")).plan.model_spec.model.weights.sha256  # type: ignore[union-attr]
    wanted = (
        f"'{beside / 'base'}' does not hold the base weights that the checkpoint was trained on ('{beside / 'base'}', "
        f"sha256 {sha256[:12]}…); name the right folder with --base-weights DIR"
    )
    assert refusal(opened, beside / "out", WeightsError) == wanted
    assert refusal(opened, beside / "out", WeightsError, base=beside / "base") == wanted


def test_the_original_place_serves_where_something_else_lies_at_the_relative_one(
    base: Path, trained: Run, opened: Opening, tmp_path: Path
) -> None:
    relative = manifest.read(trained.checkpoint).plan.model_spec.model.weights.relative  # type: ignore[union-attr]
    copy = tmp_path / "a" / "b" / "c"
    shutil.copytree(trained.checkpoint, copy)
    other = (copy / relative).resolve()
    assert other != base
    other.mkdir(parents=True)
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert opened(copy).verification.error == 0.0


# It is not intact -----------------------------------------------------------------------------------------------------


def test_these_are_all_the_files_of_a_checkpoint(trained: Run) -> None:
    found = {
        path.relative_to(trained.checkpoint).as_posix() for path in trained.checkpoint.rglob("*") if path.is_file()
    }
    assert found == set(FILES)


@pytest.mark.parametrize("place", [0.0, 0.4, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_refused(copy: Path, opened: Opening, name: str, place: float) -> None:
    def flip(content: bytes) -> bytes:
        at = round(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    rewrite(copy / name, flip)
    with pytest.raises(GraftworkError) as caught:
        opened(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_refused(copy: Path, opened: Opening, name: str) -> None:
    (copy / name).unlink()
    assert refusal(opened, copy) == f"'{copy}' lacks '{name}'; restore the checkpoint from a copy"


@pytest.mark.parametrize("name", FILES[1:])
def test_an_empty_file_is_refused(copy: Path, opened: Opening, name: str) -> None:
    rewrite(copy / name, lambda content: b"")
    with pytest.raises(GraftworkError, match=name):
        opened(copy)


def test_an_extra_file_is_refused(copy: Path, opened: Opening) -> None:
    (copy / PROCESSOR / "added.py").write_text("import os")
    assert (
        refusal(opened, copy) == f"'{copy}' holds '{PROCESSOR}/added.py', which its manifest does not know; remove it"
    )


def test_a_folder_without_a_manifest_is_no_checkpoint(copy: Path, opened: Opening, tmp_path: Path) -> None:
    (copy / manifest.FILE).unlink()
    assert refusal(opened, copy).startswith(f"'{copy}' is not a Graftwork checkpoint and holds none")
    assert refusal(opened, tmp_path / "nowhere").startswith(f"there is no folder '{tmp_path / 'nowhere'}'")


def test_a_link_out_of_the_folder_is_refused(copy: Path, opened: Opening) -> None:
    shutil.move(copy / GOLDEN_INPUTS, copy.parent / GOLDEN_INPUTS)
    (copy / GOLDEN_INPUTS).symlink_to(copy.parent / GOLDEN_INPUTS)
    assert refusal(opened, copy) == f"'{copy / GOLDEN_INPUTS}' is a link that leads out of its folder; refused"


@pytest.mark.parametrize("name", ["../copy/golden.safetensors", "/etc/hostname", "a/../../b"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(copy: Path, opened: Opening, name: str) -> None:
    seal_json(copy, lambda content: content["files"].update({name: {"bytes": 3, "sha256": "0" * 64}}))
    assert refusal(opened, copy) == f"the manifest of '{copy}' names '{name}', which leads out of its folder; refused"


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""], ids=["with a NUL", "too long", "empty"])
def test_a_manifest_that_names_what_cannot_be_a_file_is_refused(copy: Path, opened: Opening, name: str) -> None:
    seal_json(copy, lambda content: content["files"].update({name: {"bytes": 3, "sha256": "0" * 64}}))
    assert f"lacks '{name}'" in refusal(opened, copy)


def test_a_future_format_is_refused_with_the_way_to_read_it(copy: Path, opened: Opening) -> None:
    seal_json(copy, lambda content: content.update(format=3, graftwork="9.1", new={"a": 1}))
    assert refusal(opened, copy) == (
        f"'{copy}' has format 3, written by Graftwork 9.1; this version reads formats up to 2: pip install --upgrade "
        "graftwork"
    )


def test_a_component_that_is_not_installed_is_refused_with_the_line_that_installs_it(trained: Run) -> None:
    without = DictLookup(*(component for component in COMPONENTS if component is not Lora))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(trained.checkpoint, without, device="cpu")
    assert caught.value.sentence == (
        "this needs 'lora' (peft) of plugin 'dictionary', which is not installed or does not work: pip install "
        '"dictionary==0"'
    )


# Its adapter does not fit ---------------------------------------------------------------------------------------------

FIRST = "model.layers.0.self_attn.q_proj.lora_A.default.weight"


def without_one(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != FIRST}


def with_one_more(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.9.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 128)}


def of_another_shape(tensors: Tensors) -> Tensors:
    return tensors | {FIRST: torch.zeros(8, 128)}


def of_other_names(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def empty(tensors: Tensors) -> Tensors:
    return {}


@pytest.mark.parametrize("resealed", [False, True], ids=["caught by the manifest", "sealed again"])
@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (without_one, "55 of 56 expected tensors match, 1 are missing, 0 are unknown, 0 have another shape"),
        (with_one_more, "56 of 56 expected tensors match, 0 are missing, 1 are unknown, 0 have another shape"),
        (of_another_shape, "55 of 56 expected tensors match, 0 are missing, 0 are unknown, 1 have another shape"),
        (of_other_names, "0 of 56 expected tensors match, 56 are missing, 56 are unknown, 0 have another shape"),
        (empty, "0 of 56 expected tensors match, 56 are missing, 0 are unknown, 0 have another shape"),
    ],
)
def test_an_adapter_that_does_not_fit_in_every_tensor_is_refused(
    copy: Path, opened: Opening, change: Callable[[Tensors], Tensors], counts: str, resealed: bool
) -> None:
    change_tensors(copy, change)
    if resealed:
        seal_again(copy)
    said = refusal(opened, copy, AdapterError)
    assert said.startswith(f"the adapter does not fit its model: {counts}; nothing was loaded\n  ")


def test_an_adapter_that_changes_nothing_is_refused(copy: Path, opened: Opening) -> None:
    change_tensors(copy, lambda tensors: {n: t * (".lora_B." not in n) for n, t in tensors.items()})
    assert "was changed after it was written" in refusal(opened, copy)
    seal_again(copy)
    assert refusal(opened, copy, AdapterError).startswith(
        "the adapter has no effect: switching it on changes no logit of the golden inputs (distance 0)"
    )


def test_one_number_that_is_not_the_recorded_one_shows_in_the_logits(copy: Path, opened: Opening) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors[FIRST][0, 0] += 0.5
        return tensors

    change_tensors(copy, change)
    seal_again(copy)
    said = refusal(opened, copy)
    assert said.startswith("the rebuilt model is not the one that was saved: its logits differ by ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_of_no_numbers_is_refused(copy: Path, opened: Opening, value: float) -> None:
    change_tensors(copy, lambda tensors: {n: torch.full_like(t, value) for n, t in tensors.items()})
    seal_again(copy)
    assert refusal(opened, copy).startswith("the rebuilt model's logits are not finite numbers")


def test_numbers_of_less_precision_than_was_trained_show_in_the_logits(copy: Path, opened: Opening) -> None:
    change_tensors(copy, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    seal_again(copy)
    assert "the rebuilt model is not the one that was saved" in refusal(opened, copy)
