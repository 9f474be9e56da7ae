"""Bases that come from the hub: in runs, in checkpoints, and as what adapters of other code name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from foreign_folders import edit, run_folder, zoo
from hub_stand_in import Hub
from mgm_folders import GOLDEN, LOOKUP
from safetensors.torch import load_file, save
from tiny_runs import plan_of

from graftwork import hub
from graftwork.build import compose
from graftwork.checkpoint.store import find_weights, with_fingerprints
from graftwork.contracts import DictLookup
from graftwork.contracts.plan import WeightsRef
from graftwork.errors import WeightsError
from graftwork.foreign.diagnosis import BASE, diagnose
from graftwork.foreign.searching import Search

CONFIG = b'{"model_type": "tiny"}'
WHOLE = {"config.json": CONFIG, "model.safetensors": b""}


def recorded(hub_server: Hub, base: Path, tmp_path: Path, given: str) -> WeightsRef:
    """What a checkpoint in `out` records of base weights that a run names by a hub id."""
    plan = plan_of(base, tmp_path, {"model.weights": given})
    found = with_fingerprints(plan, tmp_path / "out").model_spec.model.weights
    assert found is not None
    return found


def other(base: Path) -> dict[str, bytes]:
    """A base with another value in it."""
    tensors = load_file(base / "model.safetensors")
    return {
        "config.json": CONFIG,
        "model.safetensors": save(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}),
    }


def found_again(ref: WeightsRef, tmp_path: Path, given: Path | None = None) -> Path:
    return find_weights(ref, tmp_path / "out", given, "--base-weights DIR")


def test_a_checkpoint_records_the_commit_of_its_base_and_finds_it_again(
    hub_server: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub_server.push("owner/base", base, "v1")
    hub_server.push("owner/base", other(base))
    ref = recorded(hub_server, base, tmp_path, "owner/base@v1")
    assert (ref.given, ref.commit, hub.commit_of(Path(ref.path))) == ("owner/base@v1", first, first)
    assert found_again(ref, tmp_path) == Path(ref.path)
    shutil.rmtree(tmp_path / "hf")  # on another machine
    hub_server.repositories["owner/base"].refs["v1"] = hub_server.repositories["owner/base"].refs["main"]
    assert hub.commit_of(found_again(ref, tmp_path)) == first
    assert found_again(ref, tmp_path, Path(f"owner/base@{first}"))
    shutil.rmtree(tmp_path / "hf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError) as caught:
        found_again(ref, tmp_path)
    assert f"'owner/base@v1' at commit {first} are not at" in str(caught.value)
    assert f"'owner/base@{first}' could not be fetched: HF_HUB_OFFLINE is set" in str(caught.value)


def test_another_commit_of_a_base_is_used_only_with_equal_weights(hub_server: Hub, base: Path, tmp_path: Path) -> None:
    first = hub_server.push("owner/base", base)
    ref = recorded(hub_server, base, tmp_path, "owner/base")
    del hub_server.repositories["owner/base"].commits[first]  # the owner has rewritten the history
    equal = hub_server.push(
        "owner/base", {"config.json": CONFIG, "model.safetensors": (base / "model.safetensors").read_bytes()}
    )
    shutil.rmtree(tmp_path / "hf")
    assert hub.commit_of(found_again(ref, tmp_path)) == equal
    unequal = hub_server.push("owner/base", other(base))
    for given in (Path("owner/base"), None):
        shutil.rmtree(tmp_path / "hf")
        with pytest.raises(WeightsError) as caught:
            found_again(ref, tmp_path, given)
        said = str(caught.value)
        assert f"at commit {unequal} does not hold the base weights" in said
        assert f"('owner/base' at commit {first}, sha256 {ref.sha256[:12]}…)" in said


def test_a_base_of_the_hub_that_other_code_named_is_searched_for_at_its_revision(
    hub_server: Hub, tmp_path: Path
) -> None:
    first = hub_server.push("owner/name", WHOLE, "v1")
    second = hub_server.push("owner/name", WHOLE)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "name").mkdir()
    search = Search(tmp_path / "adapter")

    def anything(place: Path) -> str:
        return ""

    named = hub.with_revision("owner/name", "v1")
    assert named == "owner/name@v1"
    assert hub.with_revision("/models/name", "v1") == "/models/name"
    assert search.find(named, anything, anything) == (tmp_path / "name", "")  # nothing else is here
    newer = hub.snapshot("owner/name")
    assert (
        hub.other_revision(newer, f"owner/name@{first}")
        == f"it is commit {second} of the hub's, and '{first}' is commit {first}"
    )
    older = hub.snapshot("owner/name@v1")
    assert hub.commit_of(older) == first
    assert hub.other_revision(older, named) == hub.other_revision(newer, "owner/name") == ""
    assert hub.other_revision(newer, named) == f"it is commit {second} of the hub's, and 'v1' is commit {first}"
    assert search.find(named, anything, anything) == (older, "")
    (tmp_path / "name").rmdir()
    assert search.find("owner/name", anything, anything) == (newer, "")
    place, why = search.find("owner/name@v9", anything, anything)
    assert place is None
    assert why.endswith("'owner/name@v9' with --base or --part fetches it")


def test_an_adapters_own_revision_of_its_base_is_the_one_that_is_used(hub_server: Hub, tmp_path: Path) -> None:
    models = zoo(tmp_path, "clip", "convnext")
    first = hub_server.push("owner/gemma", GOLDEN / "base", "v1")
    second = hub_server.push("owner/gemma", GOLDEN / "base")
    run = run_folder(tmp_path)
    edit(run / "adapter_config.json", base_model_name_or_path="owner/gemma", revision="v1")
    found = diagnose(run, LOOKUP, search=[models])
    assert found.places[BASE].line() == (
        "'owner/gemma@v1', not found: it is not, or not whole, in the cache of the Hugging Face hub; 'owner/gemma@v1' with "
        "--base or --part fetches it"
    )
    fetched = diagnose(run, LOOKUP, base=Path("owner/gemma@v1"), search=[models])
    assert hub.commit_of(fetched.places[BASE].found or Path()) == first
    assert diagnose(run, LOOKUP, search=[models]).places[BASE].found == fetched.places[BASE].found
    with pytest.raises(WeightsError) as caught:
        diagnose(run, LOOKUP, base=Path("owner/gemma"), search=[models])
    assert str(caught.value).endswith(f"it is commit {second} of the hub's, and 'v1' is commit {first}")
    here = diagnose(run, LOOKUP, base=GOLDEN / "base", search=[models])
    assert f"it was trained on revision 'v1' of its base, and '{GOLDEN / 'base'}' records none" in here.inconsistent


def test_a_clip_that_is_published_as_a_pickle_can_be_named_by_its_hub_id(
    hub_server: Hub, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    clip = {"config.json": (base / "low" / "config.json").read_bytes()}
    tensors = load_file(base / "model.safetensors")
    names = {n.partition("vision_tower.")[2]: t for n, t in tensors.items() if "vision_tower." in n and "_aux" not in n}
    torch.save({name.removeprefix("vision_tower."): t for name, t in names.items()}, tmp_path / "pickle")
    commit = hub_server.push(
        "openai/clip", clip | {"pytorch_model.bin": (tmp_path / "pickle").read_bytes(), "tf_model.h5": b""}
    )
    plan = plan_of(base, tmp_path, {"model.parts.low": {"use": "clip", "weights": "openai/clip"}})
    ref = plan.model_spec.parts["low"].weights
    assert ref is not None
    assert (ref.given, ref.commit) == ("openai/clip", commit)
    assert sorted(file.name for file in Path(ref.path).iterdir()) == ["config.json", "pytorch_model.bin"]
    compose.build(plan, lookup, device="cpu")
