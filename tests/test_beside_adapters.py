"""What peft saves beside an adapter's matrices: it is in the checkpoint, and tied weights stay what they were trained as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mgm_folders import GOLDEN, LOOKUP, TOWER_FOLDERS
from safetensors.torch import load_file, save_file
from tiny_runs import plan_of

from graftwork import weights
from graftwork.build import compose
from graftwork.checkpoint import manifest
from graftwork.checkpoint.merging import merge
from graftwork.checkpoint.store import open_checkpoint
from graftwork.contracts import Assembly, Batch
from graftwork.errors import GraftworkError
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import examine, import_folder

HEAD, EMBEDDINGS, CONNECTOR = "lm_head.weight", "model.embed_tokens.weight", "model.mm_projector.0.weight"
BIAS = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def base() -> dict[str, torch.Tensor]:
    """The tensors of the whole small MGM folder, in fp32."""
    return {name: read().float() for name, read in weights.open_weights(GOLDEN / "full").items()}


def adapter(folder: Path, more: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter of four layers as peft saves it, on the whole folder, with more tensors and settings."""
    torch.manual_seed(1)
    folder.mkdir()
    tensors = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            out, taken = base()[f"model.layers.{layer}.self_attn.{name}.weight"].shape
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, taken) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, 4) * 0.1
    save_file({**tensors, **more}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(GOLDEN / "full"), "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def opened(folder: Path, out: Path) -> Assembly:
    """The checkpoint of an adapter."""
    import_folder(diagnose(folder, LOOKUP, parts=TOWER_FOLDERS), LOOKUP, out, kernels=["sdpa"])
    return open_checkpoint(out, LOOKUP, device="cpu", precision="fp32").assembly


def logits(assembly: Assembly) -> torch.Tensor:
    """The scores of a text."""
    ids = torch.arange(5, 17)[None]
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        scores: torch.Tensor = assembly.model.logits(assembly.model(Batch(ids, ~nothing, nothing, ids, {})))
    return scores


def test_connector_biases_and_rows_are_in_the_checkpoint(tmp_path: Path) -> None:
    whole, rows = base(), torch.randn(2, 64)
    beside = {CONNECTOR: whole[CONNECTOR] + 0.5, BIAS: whole[BIAS] + 0.5}
    folder = adapter(
        tmp_path / "adapter",
        {**{f"base_model.model.{name}": tensor for name, tensor in beside.items()}, ROWS: rows},
        modules_to_save=["mm_projector"],
        bias="all",
        trainable_token_indices=[7, 8],
    )
    opened(folder, tmp_path / "out")
    saved, read = load_file(tmp_path / "out" / "tensors.safetensors"), manifest.read(tmp_path / "out")
    assert saved[CONNECTOR].equal(beside[CONNECTOR])
    assert saved[BIAS.replace("vision_tower.vision_tower.", "vision_tower.")].equal(beside[BIAS])
    assert saved[EMBEDDINGS][7:9].equal(rows)
    assert saved[EMBEDDINGS][:7].equal(whole[EMBEDDINGS][:7]) and saved[EMBEDDINGS][9:].equal(whole[EMBEDDINGS][9:])
    assert set(read.plan.model_spec.also_train) == {"language.embeddings", "connector", "vision.low"}
    accounts = read.accounts[str(folder / "adapter_model.safetensors")]
    assert (accounts.found, len(accounts.used), accounts.equal, accounts.refused) == (11, 11, (), {})


@pytest.mark.parametrize("end", [HEAD, EMBEDDINGS])
def test_an_end_of_tied_weights_that_was_trained_apart_is_kept_apart(tmp_path: Path, end: str) -> None:
    whole = base()
    trained = whole[EMBEDDINGS] + torch.randn(whole[EMBEDDINGS].shape) * 0.1
    module = end.split(".")[-2]
    folder = adapter(tmp_path / "adapter", {f"base_model.model.{end}": trained}, modules_to_save=[module])
    assembly = opened(folder, tmp_path / "out")
    state = assembly.model.state_dict()
    assert state[end].equal(trained)
    assert state[HEAD if end == EMBEDDINGS else EMBEDDINGS].equal(whole[EMBEDDINGS])
    plain = opened(adapter(tmp_path / "plain", {}), tmp_path / "plain-out")
    with assembly.disable_adapter(), plain.disable_adapter():
        assert logits(assembly).equal(logits(plain))
    assert not torch.allclose(logits(assembly), logits(plain), atol=0.01)
    expected = logits(assembly)
    merge(open_checkpoint(tmp_path / "out", LOOKUP, device="cpu", precision="fp32"), tmp_path / "merged", LOOKUP)
    merged = compose.build(
        plan_of(tmp_path / "merged", tmp_path), LOOKUP, device="cpu"
    )  # with a fresh adapter, of no effect
    assert torch.allclose(logits(merged), expected, atol=1e-4)


def test_ends_that_follow_one_another_stay_tied(tmp_path: Path) -> None:
    more = base()[EMBEDDINGS] + 0.1
    both = {f"base_model.model.{name}": more.clone() for name in (HEAD, EMBEDDINGS)}
    for number, (tensors, settings) in enumerate(
        [
            (both, {"modules_to_save": ["lm_head", "embed_tokens"]}),
            (
                {f"base_model.model.{EMBEDDINGS}": more},
                {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            ),
        ]
    ):
        folder = adapter(tmp_path / f"adapter-{number}", tensors, **settings)
        found = examine(diagnose(folder, LOOKUP, parts=TOWER_FOLDERS), LOOKUP, ["sdpa"])
        account = found.accounts[str(folder / "adapter_model.safetensors")]
        assert (found.refused, account.equal) == ("", (f"base_model.model.{HEAD}",) * (number == 0))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", (4, 64)),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 640)),
        ("base_model.model.model.mm_projector.0.router", (3,)),
    ],
)
def test_what_has_no_place_in_the_model_is_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    more = {name: torch.ones(shape)}
    if ".lora_A." in name:
        more[name.replace("lora_A", "lora_B")] = torch.ones(64, 4)
    folder = adapter(tmp_path / "adapter", more)
    wanted = "model.layers.9.self_attn.q_proj" if ".lora_A." in name else name
    with pytest.raises(GraftworkError, match=wanted):
        opened(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_stored_twice_has_one_value(tmp_path: Path) -> None:
    values = {"a": lambda: torch.ones(2), "b": lambda: torch.zeros(2)}
    with pytest.raises(GraftworkError, match=r"'x' is stored twice, in .* with different values"):
        weights.agreeing("x", values["a"], values["b"])()
    assert weights.agreeing("x", values["a"], values["a"])().equal(torch.ones(2))


def test_rows_that_the_embedding_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {ROWS: torch.ones(2, 64)}, trainable_token_indices=[7, 8000])
    with pytest.raises(GraftworkError, match="trainable_token_indices names 2 of 640, up to 8000"):
        opened(folder, tmp_path / "out")


def test_a_tower_that_an_adapter_run_trained_is_in_the_checkpoint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "lora", tmp_path / "lora"))
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    tower = {
        f"model.vision_tower.vision_tower.{n}": r().float() + 1
        for n, r in weights.open_weights(GOLDEN / "clip").items()
    }
    torch.save({**beside, **tower}, folder / "non_lora_trainables.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "unfreeze_mm_vision_tower": True}))
    found = diagnose(folder, LOOKUP, base=GOLDEN / "base", parts=TOWER_FOLDERS)
    import_folder(found, LOOKUP, tmp_path / "out", kernels=["sdpa"])
    assert "vision.low" in manifest.read(tmp_path / "out").plan.model_spec.also_train
