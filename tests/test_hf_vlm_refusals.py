"""What `hf-vlm` cannot use is refused by name before anything is trained, each in one sentence with the way out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import Hub
from vlm_families import write
from vlm_folders import LANGUAGE
from vlm_trial import LOOKUP, run_table

from graftwork.build import compose
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.errors import GraftworkError

LORA = {"use": "lora", "on": ["language.attention"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen2_5_vl", tmp_path_factory.mktemp("base"))


def refusal(weights: str, folder: Path) -> str:
    """What a run on these weights is refused with."""
    table = run_table(Path(weights)) | {"peft": LORA}
    with pytest.raises(GraftworkError) as caught:
        compose.build(resolve(parse_run(table, folder), LOOKUP), LOOKUP, device="cpu")
    said, *others = (*caught.value.details, caught.value.sentence)
    assert len(others) < 2
    return str(said)


def setting(**changes: Any) -> Callable[[Path], None]:
    """A change of a folder's configuration."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def in_two_files_of_which_one_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


TIMM = {
    "model_type": "fast_vlm",
    "vision_config": {"model_type": "timm_wrapper", "architecture": "resnet18", "hidden_size": 512},
    "text_config": {**LANGUAGE, "model_type": "qwen2", "vocab_size": 320},
}


def processor_of_another_family(folder: Path) -> None:
    """One that reads charts, and has no token for an image."""
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "PPChart2TableProcessor"}))


QUANTIZED = "and only whole ones can be read; name the folder that they were made from"
OWN_CODE = {"model_type": "minicpmv", "auto_map": {"AutoModel": "modeling.MiniCPMV"}}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (setting(quantization_config={"quant_method": "awq", "bits": 4}), f"quantized by awq in 4 bits, {QUANTIZED}"),
        (setting(quantization_config={"quant_method": "gptq", "bits": 4}), f"quantized by gptq in 4 bits, {QUANTIZED}"),
        (
            setting(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            f"quantized by bitsandbytes in 4 bits, {QUANTIZED}",
        ),
        (setting(text_config={"quantization_config": {"quant_method": "awq"}}), f"quantized by awq, {QUANTIZED}"),
        (
            setting(**OWN_CODE),
            "a 'minicpmv' model in 'FOLDER' without code of its own, which is never run (The checkpoint you are trying to load has model "
            "type `minicpmv` but Transformers does not recognize this architecture); install a transformers that knows it, or name "
            "another folder",
        ),
        (without("config.json"), "'FOLDER' holds no config.json; is it the right folder?"),
        (
            without("model.safetensors"),
            "'FOLDER' holds no weights (*.safetensors or *.bin); fetch them, or name another folder",
        ),
        (
            in_two_files_of_which_one_is_missing,
            "'FOLDER' lacks the file 'model-00002-of-00002.safetensors'; fetch or copy the folder again",
        ),
        (
            without("preprocessor_config.json", "processor_config.json"),
            "the processor in 'FOLDER' cannot be read (Can't load image processor for 'FOLDER'); install what it names, or fetch its "
            "files again",
        ),
        (
            processor_of_another_family,
            "transformers' PPChart2TableProcessor does not say what text an image becomes, so 'hf-vlm' cannot train the model in 'FOLDER'; "
            "name a model of another family, or write a plugin for this one",
        ),
        pytest.param(
            setting(**TIMM),
            "transformers cannot build a 'fast_vlm' model here (TimmWrapperModel requires the timm library but it was not found in your "
            "environment); install that, or name a model of another family",
            marks=pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed"),
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    spoil: Callable[[Path], None], said: str, base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "folder"))
    spoil(folder)
    assert said.replace("FOLDER", str(folder)) in refusal(str(folder), tmp_path)


def test_a_folder_that_is_not_there_and_a_repository_that_is_not_given_are_refused(
    base: Path, hub_server: Hub, tmp_path: Path
) -> None:
    tried = re.escape(f"model.weights: there is no folder '{tmp_path / 'acme' / 'vlm'}', and ")
    missing = r"the hub at \S+ has no repository 'acme/vlm', or it is a private one that is read with a token only"
    assert re.match(tried + missing, refusal("acme/vlm", tmp_path))
    hub_server.push("acme/vlm", base, gated=True)
    gated = r"'acme/vlm' is gated on the hub: ask for access on \S+, and set HF_TOKEN to a token of your account$"
    assert re.match(tried + gated, refusal("acme/vlm", tmp_path))
    assert refusal("./vlm", tmp_path).endswith("is no hub id (owner/name or owner/name@revision); correct the path")
