"""Every tensor of every file that is read: used, equal to another, or refused by name; and every setting."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_folders import edit
from mgm_folders import GOLDEN, LOOKUP, TOWER_FOLDERS
from safetensors.torch import load_file, save_file

from graftwork import weights
from graftwork.contracts.accounting import Accounts
from graftwork.errors import GraftworkError
from graftwork.foreign.diagnosis import Diagnosis, diagnose
from graftwork.foreign.importing import examine

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
EXTRA = "model.layers.0.self_attn.extra"
MAIN = {
    "lora": "non_lora_trainables.bin",
    "stage1": "mm_projector.bin",
    "full": "model-00001-of-00002.safetensors",
    "merged": "model-00001-of-00001.safetensors",
    "adapter": "adapter_model.safetensors",
}
"""Every form that an import takes, and a file of tensors in it. `adapter` is what peft alone saves."""
READ = {
    "lora": ["adapter_model.bin", "non_lora_trainables.bin"],
    "stage1": ["mm_projector.bin"],
    "full": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "merged": ["model-00001-of-00001.safetensors"],
    "adapter": ["adapter_model.safetensors"],
}


def copy_of(form: str, folder: Path) -> Path:
    """A folder of one of the forms, to be changed; without a path from elsewhere in it."""
    if form != "adapter":
        return Path(shutil.copytree(GOLDEN / form, folder / form))
    (made := folder / form).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(GOLDEN / "lora" / "checkpoint-240" / name, made)
    return made


def examined(folder: Path, *, base: Path | None = None) -> Diagnosis:
    """What an import would make of a folder."""
    alone = "config.json" not in {file.name for file in folder.iterdir()}
    base = base or GOLDEN / ("full" if alone else "base")
    return examine(diagnose(folder, LOOKUP, base=base, parts=TOWER_FOLDERS), LOOKUP, ["sdpa"])


def refusal(folder: Path, **options: Any) -> str:
    """Why a folder is refused, when it is looked at or read."""
    try:
        return examined(folder, **options).refused
    except GraftworkError as error:
        return str(error)


def check(accounts: Accounts) -> None:
    """Each file is accounted for, tensor by tensor, by what its own header says."""
    for file, found in accounts.items():
        names = [*found.used, *found.equal, *found.refused]
        assert sorted(names) == sorted(weights.open_file(Path(file)))
        assert found.found == len(names)


@pytest.mark.parametrize("form", MAIN)
def test_every_tensor_of_every_form_is_accounted_for(tmp_path: Path, form: str) -> None:
    found = examined(copy_of(form, tmp_path))
    assert found.refused == ""
    check(found.accounts)
    own = {Path(file).name: each for file, each in found.accounts.items() if Path(file).parent == tmp_path / form}
    assert sorted(own) == READ[form]
    replaced = {name for each in own.values() for name in each.refused}
    assert all(name.startswith("model.vision_tower") for name in replaced)
    read = {Path(file).parent.name for file in found.accounts}
    assert read == {form, "full" if form == "adapter" else "base", "clip", "convnext"} - (
        {"clip"} if form in ("full", "merged", "adapter") else set()
    )


@pytest.mark.parametrize("form", MAIN)
def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path, form: str) -> None:
    folder = copy_of(form, tmp_path)
    add(folder / MAIN[form], EXTRA, torch.ones(3))
    assert EXTRA in refusal(folder)


@pytest.mark.parametrize(("form", "value"), [*zip(MAIN, (3, "yes", True, {"rank": 0}, [0]), strict=True)])
def test_an_unknown_setting_is_refused_by_name(tmp_path: Path, form: str, value: Any) -> None:
    folder = copy_of(form, tmp_path)
    for name in ("config.json", "adapter_config.json"):
        if (file := folder / name).is_file():
            kept = file.read_bytes()
            edit(file, gating_of_experts=value)
            assert "gating_of_experts" in refusal(folder), name
            file.write_bytes(kept)


@pytest.mark.parametrize("form", ["stage1", "full", "merged"])
def test_a_head_that_is_not_its_embeddings_is_refused_by_name(tmp_path: Path, form: str) -> None:
    folder = copy_of(form, tmp_path)
    add(folder / MAIN[form], HEAD, embeddings() + 1)
    assert f"holds '{HEAD}' unlike '{EMBEDDINGS}'" in refusal(folder)
    assert f"'{HEAD}' was trained apart" in refusal(folder)


@pytest.mark.parametrize("form", MAIN)
def test_a_copy_of_the_embeddings_counts_as_equal(tmp_path: Path, form: str) -> None:
    folder = copy_of(form, tmp_path)
    add(
        folder / MAIN[form],
        HEAD,
        embeddings("base" if form in ("lora", "stage1") else "merged" if form == "merged" else "full"),
    )
    found = examined(folder)
    assert found.refused == ""
    assert HEAD in found.accounts[str(folder / MAIN[form])].equal


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("base", "model-00001-of-00004.safetensors"),
        ("clip", "model.safetensors"),
        ("convnext", "open_clip_pytorch_model.bin"),
    ],
)
def test_base_and_towers_are_read_as_strictly(tmp_path: Path, source: str, file: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / source, tmp_path / source))
    places = {"base": GOLDEN / "base", "clip": GOLDEN / "clip", "convnext": GOLDEN / "convnext", source: folder}

    def said() -> str:
        parts = {"low": places["clip"], "high": places["convnext"]}
        try:
            found = diagnose(GOLDEN / "lora", LOOKUP, base=places["base"], parts=parts)
            return examine(found, LOOKUP, ["sdpa"]).refused
        except GraftworkError as error:
            return str(error)

    (settings,) = [*folder.glob("*config.json")][:1] if source == "convnext" else [folder / "config.json"]
    kept = settings.read_bytes()
    edit(settings, gating_of_experts=2)
    assert "gating_of_experts" in said()
    settings.write_bytes(kept)
    kept = (folder / file).read_bytes()
    add(folder / file, "router.temperature", torch.ones(1))
    assert "router.temperature" in said()
    (folder / file).write_bytes(kept)
    if source == "base":
        add(folder / file, HEAD, embeddings() + 1)
        assert f"the weights hold '{HEAD}' unlike '{EMBEDDINGS}'" in said()
        (folder / file).write_bytes(kept)
        frequencies = 1.0 / 10_000 ** (torch.arange(0, 16, 2) / 16)
        add(folder / file, "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies.bfloat16())
        assert said() == ""
        add(folder / file, "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies / 2)
        assert "inv_freq' unlike what the model computes for it" in said()


def embeddings(source: str = "base") -> torch.Tensor:
    """The embeddings in one of the small folders."""
    return weights.open_weights(GOLDEN / source)[EMBEDDINGS]()


def add(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Put one more tensor into a file."""
    if file.suffix == ".bin":
        torch.save({**torch.load(file, weights_only=True), name: tensor}, file)
    else:
        save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})
