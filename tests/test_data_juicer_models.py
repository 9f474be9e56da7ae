"""The operators of Data-Juicer's that judge images by models, with tiny random weights in the layouts of the published ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import judging_models
import pytest
from PIL import Image as PILImage

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork_data_juicer import DataJuicer, DataJuicerSettings

pytestmark = [
    pytest.mark.data,
    pytest.mark.filterwarnings("default"),  # transformers' own
    pytest.mark.skipif(not find_spec("data_juicer"), reason="needs the extra data-juicer: make test-data"),
]


def picture(colour: str) -> Image:
    stream = BytesIO()
    PILImage.new("RGB", (20, 20), colour).save(stream, "PNG")
    return Image(data=stream.getvalue())


GIVEN = [
    Record("red", (Turn("user", "<image>\nWhat colour?"), Turn("assistant", "red")), (picture("red"),)),
    Record("none", (Turn("user", "What?"), Turn("assistant", "nothing"))),
    Record("blue", (Turn("user", "<image>\nWhat colour?"), Turn("assistant", "blue, I think")), (picture("blue"),)),
]


def apply(folder: Path, *process: dict[str, Any], engine: str = "local", seed: int = 1) -> list[Record | BadRecord]:
    settings = DataJuicerSettings(process=process, folder=folder, workers=1, engine=engine)  # type: ignore[arg-type]
    return list(DataJuicer(settings).apply(GIVEN, seed=seed))


SCORES = {"min_score": 2.0, "max_score": 3.0}
FILTERS: list[tuple[Callable[[Path], Path], dict[str, Any], dict[str, Any], str]] = [
    (
        judging_models.clip,
        {"op": "image_text_similarity_filter", "hf_clip": "v2-linear"},
        SCORES,
        "image_text_similarity",
    ),
    (
        judging_models.blip,
        {"op": "image_text_matching_filter", "hf_blip": "v2-linear"},
        SCORES,
        "image_text_matching_score",
    ),
    (judging_models.vit, {"op": "image_nsfw_filter", "hf_nsfw_model": "v2-linear"}, SCORES, "image_nsfw_score"),
    (
        judging_models.vit,
        {"op": "image_watermark_filter", "hf_watermark_model": "v2-linear"},
        {"prob_threshold": -1.0},
        "image_watermark_prob",
    ),
]
AESTHETICS = pytest.param(
    judging_models.aesthetics,
    {"op": "image_aesthetics_filter", "hf_scorer_model": "v2-linear"},
    SCORES,
    "image_aesthetics_scores",
    marks=pytest.mark.skipif(
        not find_spec("aesthetics_predictor"), reason="needs simple-aesthetics-predictor: make test-data"
    ),
)


@pytest.mark.parametrize(("make", "process", "limits", "name"), [*FILTERS, AESTHETICS])
def test_a_model_gives_the_number_that_drops_a_record(
    tmp_path: Path, make: Callable[[Path], Path], process: dict[str, Any], limits: dict[str, Any], name: str
) -> None:
    make(tmp_path / "v2-linear")
    red, none, blue = apply(tmp_path, {**process, **limits})
    assert isinstance(red, BadRecord) and isinstance(blue, BadRecord)
    assert none is GIVEN[1]
    assert red.stats[name] != blue.stats[name]
    assert all(-1 <= number <= 1 for number in (*red.stats[name], *blue.stats[name]))
    assert red.why.startswith(f"{process['op']}: {name} [")


def test_models_keep_what_is_within_their_limits_and_tokens_are_counted(tmp_path: Path) -> None:
    judging_models.clip(tmp_path / "clip")
    judging_models.blip(tmp_path / "blip")
    judging_models.tokenizer(tmp_path / "tokenizer")
    every = {"min_score": -1.0, "max_score": 1.0}
    red, none, blue = apply(
        tmp_path,
        {"op": "image_text_similarity_filter", "hf_clip": "clip", **every},
        {"op": "image_text_matching_filter", "hf_blip": "blip", **every},
        {"op": "token_num_filter", "hf_tokenizer": "tokenizer", "min_num": 1, "max_num": 17},
    )
    assert (red, none) == (GIVEN[0], GIVEN[1])
    assert isinstance(blue, BadRecord)
    assert blue.why == "token_num_filter: num_token 26, max_num 17"


def test_captions_are_new_records_the_same_for_the_same_seed_and_on_ray(tmp_path: Path) -> None:
    judging_models.blip2(tmp_path / "blip2")
    process = {"op": "image_captioning_mapper", "hf_img2seq": "blip2"}
    two = {**process, "caption_num": 2, "keep_candidate_mode": "all"}
    found = apply(tmp_path, two)
    ids = ["red", "red/caption/1", "red/caption/2", "none", "blue", "blue/caption/1", "blue/caption/2"]
    assert [item.id for item in found] == ids
    made = found[1]
    assert isinstance(made, Record)
    assert made.turns[0].text == "<image>\nDescribe the image."
    assert made.turns[1].text
    assert (made.images, dict(made.meta)) == (GIVEN[0].images, {"made_by": "data-juicer", "of": ["red"]})
    assert apply(tmp_path, two, engine="ray") == found
    alone = apply(tmp_path, {**process, "keep_original_sample": False, "prompt": "What is there?"}, seed=2)
    assert [(item.id, isinstance(item, BadRecord)) for item in alone] == [
        ("red", True),
        ("red/caption/1", False),
        ("none", False),
        ("blue", True),
        ("blue/caption/1", False),
    ]
    other = alone[1]
    assert isinstance(other, Record)
    assert other.turns[0].text == "<image>\nWhat is there?"
    assert other.turns[1].text != made.turns[1].text
