"""What leaves a vision-language model of transformers is opened by plain transformers and plain peft, with nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Shapes
from vlm_families import UNREAD
from vlm_trial import RECORDS, inputs, run_table, theirs

from graftwork import weights
from graftwork.build import compose
from graftwork.checkpoint.merging import CERTIFICATE, export, merge
from graftwork.checkpoint.store import Opened, open_checkpoint
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DictLookup, batch_of
from graftwork.errors import AdapterError, CheckpointError
from graftwork.train.loop import train
from graftwork_full import Full
from graftwork_hf_vlm import HfVlm
from graftwork_ia3 import Ia3
from graftwork_lora import Lora
from graftwork_torch_attention import Eager, Sdpa

COMPONENTS = (HfVlm, Sdpa, Eager, Lora, Full, Ia3, Shapes)
LOOKUP = DictLookup(*COMPONENTS)
LORA = {"use": "lora", "on": ["language.attention"], "rank": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5


def trained(
    folder: Path,
    out: Path,
    method: dict[str, Any],
    lookup: DictLookup = LOOKUP,
    memory: Sequence[str] = (),
    unread: Sequence[str] = (),
) -> Opened:
    """Two steps on drawn shapes, opened again as an export does."""
    table = run_table(folder) | {"peft": method, "data": {"source": [{"use": "shapes", "count": 8}]}}
    table["train"] |= {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "max_length": 512}
    table["memory"] = {"use": [*memory]}
    table["train"]["allow_unreached"] = [*unread]
    train(resolve(parse_run(table, Path.cwd()), lookup), lookup, out, device="cpu")
    return open_checkpoint(out, lookup, device="cpu", precision="fp32")


def logits_of(opened: Opened) -> tuple[dict[str, Any], torch.Tensor]:
    """What transformers' own model is given for a record of two images, and what the checkpoint says of it."""
    assembly, record = opened.assembly, RECORDS[1]
    with torch.no_grad():
        batch = batch_of(assembly.processor, [assembly.processor.encode(record)])
        return inputs(assembly, record), assembly.model.logits(assembly.model(batch))


def far(model: Any, given: dict[str, Any], wanted: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(**given).logits - wanted).abs().max())


SLOW = pytest.mark.slow
ALSO = ("connector", "vision", "language.norms", "language.embeddings", "language.head")
QUICK = (("gemma3", "connector"), ("qwen2_5_vl", "language.embeddings"), ("llava", "vision"))
HELD = [
    *(
        pytest.param(name, {"also_train": [role]}, id=f"{name} {role}", marks=() if (name, role) in QUICK else SLOW)
        for name in ("llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3")
        for role in ALSO
        # A bare parameter of LLaVA-NeXT's, and heads that are the embeddings, have tests of their own.
        if (name, role) != ("llava_next", "connector") and (role != "language.head" or name.startswith("llava"))
    ),
    *(
        pytest.param(name, setting, id=f"{name} {' '.join(setting)}", marks=SLOW)
        for name in ("llava_next", "qwen2_5_vl", "gemma3")
        for setting in ({"use_dora": True}, {"init": "pissa"}, {"use_rslora": True})
    ),
]


@pytest.mark.parametrize(("name", "changes"), HELD)
def test_modules_that_were_trained_besides_are_in_a_peft_folder_and_in_a_merged_one(
    name: str, changes: dict[str, Any], folder_of: Any, tmp_path: Path
) -> None:
    besides = changes.get("also_train") == ["vision"] and name.startswith("llava")
    unread = (*UNREAD[name], "model.vision_tower.post_layernorm") if besides else ()
    opened = trained(folder_of(name), tmp_path / "out", LORA | changes, unread=unread)
    given, wanted = logits_of(opened)
    base = theirs(folder_of(name))
    assert far(base, given, wanted) > 1e-3
    export(opened, "peft", tmp_path / "peft", LOOKUP)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert far(adapted, given, wanted) < 1e-5
    assert far(adapted.merge_and_unload(), given, wanted) < 1e-5
    merge(opened, tmp_path / "merged", LOOKUP)
    assert far(theirs(tmp_path / "merged"), given, wanted) < 1e-5
    assert weights.shapes(tmp_path / "merged") == weights.shapes(folder_of(name))


def test_a_single_parameter_that_peft_cannot_hold_is_refused_by_name_and_merged(folder_of: Any, tmp_path: Path) -> None:
    opened = trained(folder_of("llava_next"), tmp_path / "out", LORA | {"also_train": ["connector"]})
    with pytest.raises(AdapterError, match=r"1 of the 5 tensors .* would be lost: merge it instead") as caught:
        export(opened, "peft", tmp_path / "peft", LOOKUP)
    assert caught.value.details == ("model.image_newline",)
    assert not (tmp_path / "peft").exists()
    given, wanted = logits_of(opened)
    merge(opened, tmp_path / "merged", LOOKUP)
    assert far(theirs(tmp_path / "merged"), given, wanted) < 1e-5


@pytest.mark.parametrize(
    "method",
    [
        {"use": "full", "on": ["language.mlp", "connector"]},
        pytest.param({"use": "ia3", "on": ["language.attention", "vision"]}, marks=SLOW),
    ],
)
def test_a_method_that_peft_has_not_is_merged(method: dict[str, Any], folder_of: Any, tmp_path: Path) -> None:
    opened = trained(folder_of("qwen2_5_vl"), tmp_path / "out", method)
    with pytest.raises(
        CheckpointError, match=r"^this checkpoint has no format 'peft'; merge it, which writes the whole model$"
    ):
        export(opened, "peft", tmp_path / "peft", LOOKUP)
    given, wanted = logits_of(opened)
    merge(opened, tmp_path / "merged", LOOKUP)
    assert far(theirs(tmp_path / "merged"), given, wanted) < 1e-5


def test_a_head_that_is_the_embeddings_is_no_role_to_train(folder_of: Any) -> None:
    table = run_table(folder_of("qwen2_5_vl")) | {"peft": LORA | {"also_train": ["language.head"]}}
    with pytest.raises(
        AdapterError,
        match=r"^peft.also_train: this model has nothing in the role 'language.head' \(from hidden states to tokens, where it is not "
        r"the embeddings\); choose among language.attention, ",
    ):
        compose.build(resolve(parse_run(table, Path.cwd()), LOOKUP), LOOKUP, device="cpu")


def test_a_layer_of_the_image_encoder_has_its_published_name(folder_of: Any, tmp_path: Path) -> None:
    opened = trained(folder_of("qwen2_5_vl"), tmp_path / "out", LORA | {"on": ["vision"]})
    assert export(opened, "peft", tmp_path / "peft", LOOKUP).notes == []


# Merged folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_a_merged_folder_says_of_itself_what_its_base_says(
    precision: str | None, folder_of: Any, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(folder_of("llava"), tmp_path / "base"))
    stored = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"dtype": "bfloat16", "text_config": {**config["text_config"], "torch_dtype": "bfloat16"}, "ours": 1}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()  # as of a model that leaves this to its configuration
    (base / "video_preprocessor_config.json").write_text("{}")
    (base / "LICENSE").write_text("theirs")
    merge(trained(base, tmp_path / "out", LORA), tmp_path / "merged", LOOKUP, precision=precision)
    files = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == files | {CERTIFICATE}
    dtype = {None: "bfloat16", "fp32": "float32"}[precision]
    tensors = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}
    found = json.loads((tmp_path / "merged" / "config.json").read_text())
    config["text_config"]["torch_dtype"] = config["dtype"] = dtype
    assert found == config
    for file in files - {"model.safetensors"} - ({"config.json"} if precision else set()):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes(), file


def test_a_certificate_measures_what_the_base_that_nf4_had_rounded_would_give(folder_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from graftwork_nf4 import Nf4

    lookup = DictLookup(*COMPONENTS, Nf4)
    merge(trained(folder_of("qwen2_5_vl"), tmp_path / "out", LORA, lookup, ["nf4"]), tmp_path / "merged", lookup)
    certificate = json.loads((tmp_path / "merged" / CERTIFICATE).read_text())
    assert certificate["rounded_in_training"] == ["nf4"]
    assert certificate["error"] < 1e-5 < 1e-3 < certificate["base_from_rounded"]
    assert certificate["from_rounded"] > 1e-3
