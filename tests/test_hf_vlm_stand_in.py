"""A model of which configurations alone are there is planned with its own image processor, chat template and special tokens."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from pictures import encoded, picture
from PIL import Image as PILImage
from tiny_runs import Shapes
from vlm_families import FAMILIES, write

from graftwork.build.outline import outline
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DictLookup, Record, Turn
from graftwork.errors import WeightsError
from graftwork.memory.rehearsal import rehearsing
from graftwork_hf_vlm import HfVlm, HfVlmSettings
from graftwork_hf_vlm.loading import load_processor
from graftwork_lora import Lora
from graftwork_torch_attention import Sdpa

LOOKUP = DictLookup(HfVlm, Sdpa, Lora, Shapes)


@pytest.fixture(params=tuple(FAMILIES))
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A family's folder with the special tokens in the tokenizer's settings, as published folders have them."""
    folder = write(request.param, tmp_path / "published")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    file = folder / "tokenizer_config.json"
    added = {str(number): {"content": str(token)} for number, token in words.added_tokens_decoder.items()}
    begins = words("x")["input_ids"][0] == words.bos_token_id
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "added_tokens_decoder": added, "add_bos_token": begins})
    )
    return folder


def configurations_of(published: Path, without: str = "") -> Path:
    """A folder with what is no weights and no tokenizer."""
    folder = published.parent / "configurations"
    folder.mkdir()
    for file in published.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("tokenizer.json", without):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of transformers' GLM
def test_an_image_takes_the_tokens_that_it_takes_with_the_own_tokenizer(published: Path, tmp_path: Path) -> None:
    model, source, empty = HfVlm(HfVlmSettings()), configurations_of(published), tmp_path / "empty"
    empty.mkdir()
    config = model.configuration(published)
    own, stand_in = model.processor(config, published, {}), model.stand_in(config, empty, {}, source)
    assert (stand_in.pad_id, stand_in.stop_ids) == (own.pad_id, own.stop_ids)
    for size in ((30, 20), (100, 300)):
        image = encoded(picture(1, size))
        record = Record("1", (Turn("user", "<image> What?"), Turn("assistant", "A car.")), (image,))
        one, other = own.encode(record), stand_in.encode(record)
        assert ([*one.image_token_mask], one.pixels.keys()) == ([*other.image_token_mask], other.pixels.keys())
        assert [label >= 0 for label in one.labels] == [label >= 0 for label in other.labels]


def planned(folder: Path) -> Any:
    table = {
        "model": {"use": "hf-vlm", "config": str(folder)},
        "attention": {"prefer": ["sdpa"]},
        "peft": {"use": "lora", "on": ["language.attention"]},
        "train": {"max_length": 2000},
    }
    return resolve(parse_run(table, Path.cwd()), LOOKUP)


@pytest.mark.parametrize("published", ["qwen2_5_vl", "gemma3"], indirect=True)
def test_configurations_alone_are_rehearsed_and_the_tokenizer_is_named(published: Path) -> None:
    folder = configurations_of(published)
    plan = planned(folder)
    assert outline(plan, LOOKUP, Machine()).no_processor == (
        f"'{folder}' holds no tokenizer.json or tokenizer.model; copy the model's tokenizer there"
    )
    with rehearsing(plan, LOOKUP, Machine(), device="cuda") as watched:
        assert watched.take(1).footprint.peak > 0


@pytest.mark.parametrize("published", ["llava"], indirect=True)
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("preprocessor_config.json", "put preprocessor_config.json beside the configuration"),
        ("tokenizer_config.json", "put tokenizer_config.json with its added_tokens_decoder beside the configuration"),
        ("chat_template.jinja", "put the chat template beside the configuration"),
    ],
)
def test_what_a_rehearsal_lacks_is_named(lacking: str, said: str, published: Path) -> None:
    plan = planned(configurations_of(published, without=lacking))
    with (
        pytest.raises(WeightsError, match=re.escape(said)),
        rehearsing(plan, LOOKUP, Machine(), device="cuda"),
    ):
        pass


@pytest.mark.parametrize("published", ["idefics3"], indirect=True)
def test_a_package_that_only_videos_need_is_not_asked_for(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = transformers.SmolVLMProcessor
    monkeypatch.setattr(sys.modules[kind.__module__], "num2words", None)
    for file, named in (
        ("preprocessor_config.json", {"image_processor_type": "SmolVLMImageProcessor"}),
        ("processor_config.json", {"processor_class": "SmolVLMProcessor"}),
    ):
        (published / file).write_text(json.dumps({**json.loads((published / file).read_text()), **named}))
    processor = load_processor(published, "smolvlm")
    made = processor(text=["<image>"], images=[[PILImage.new("RGB", (64, 64))]])
    assert isinstance(processor, kind)
    assert processor.image_token_id in made["input_ids"][0]
    assert sys.modules[kind.__module__].num2words is None
