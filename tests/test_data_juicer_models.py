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


def apply(folder: Path, engine: str = "local", seed: int = 1, **process: Any) -> list[Record | BadRecord]:
    settings = DataJuicerSettings(process=(process,), folder=folder, workers=1, engine=engine)  # type: ignore[arg-type]
    return list(DataJuicer(settings).apply(GIVEN, seed=seed))


@pytest.mark.parametrize(
    ("make", "process", "name"),
    [
        (judging_models.clip, {"op": "image_text_similarity_filter", "hf_clip": "v2-linear"}, "image_text_similarity"),
        (
            judging_models.blip,
            {"op": "image_text_matching_filter", "hf_blip": "v2-linear"},
            "image_text_matching_score",
        ),
        (judging_models.vit, {"op": "image_nsfw_filter", "hf_nsfw_model": "v2-linear"}, "image_nsfw_score"),
        (
            judging_models.vit,
            {"op": "image_watermark_filter", "hf_watermark_model": "v2-linear"},
            "image_watermark_prob",
        ),
        pytest.param(
            judging_models.aesthetics,
            {"op": "image_aesthetics_filter", "hf_scorer_model": "v2-linear"},
            "image_aesthetics_scores",
            marks=pytest.mark.skipif(
                not find_spec("aesthetics_predictor"), reason="needs simple-aesthetics-predictor: make test-data"
            ),
        ),
    ],
)
def test_a_model_gives_the_number_that_drops_a_record(
    tmp_path: Path, make: Callable[[Path], Path], process: dict[str, Any], name: str
) -> None:
    make(tmp_path / "v2-linear")
    limit = {"prob_threshold": -1.0} if "watermark" in process["op"] else {"min_score": 2.0, "max_score": 3.0}
    red, none, blue = apply(tmp_path, **process, **limit)
    assert isinstance(red, BadRecord) and isinstance(blue, BadRecord)
    assert none is GIVEN[1]
    assert red.stats[name] != blue.stats[name]
    assert all(-1 <= number <= 1 for number in (*red.stats[name], *blue.stats[name]))
    assert red.why.startswith(f"{process['op']}: {name} [")
    every = {"prob_threshold": 1.0} if "watermark" in process["op"] else {"min_score": -1.0, "max_score": 1.0}
    assert apply(tmp_path, **process, **every) == GIVEN


def test_tokens_are_counted_by_a_tokenizer(tmp_path: Path) -> None:
    judging_models.tokenizer(tmp_path / "tokenizer")
    red, none, blue = apply(tmp_path, op="token_num_filter", hf_tokenizer="tokenizer", min_num=1, max_num=17)
    assert (red, none) == (GIVEN[0], GIVEN[1])
    assert isinstance(blue, BadRecord)
    assert blue.why == "token_num_filter: num_token 26, max_num 17"


def test_captions_are_new_records_the_same_for_the_same_seed(tmp_path: Path) -> None:
    judging_models.blip2(tmp_path / "blip2")
    process = {"op": "image_captioning_mapper", "hf_img2seq": "blip2", "caption_num": 2, "keep_candidate_mode": "all"}
    found = apply(tmp_path, **process)
    assert [item.id for item in found] == [
        "red",
        "red/caption/1",
        "red/caption/2",
        "none",
        "blue",
        "blue/caption/1",
        "blue/caption/2",
    ]
    made = found[1]
    assert isinstance(made, Record)
    assert made.turns[0].text == "<image>\nDescribe the image."
    assert made.turns[1].text
    assert (made.images, dict(made.meta)) == (GIVEN[0].images, {"made_by": "data-juicer", "of": ["red"]})
    assert apply(tmp_path, **process) == found
    assert apply(tmp_path, seed=2, **process) != found


def test_a_caption_may_stand_in_the_place_of_a_record_the_same_on_ray(tmp_path: Path) -> None:
    judging_models.blip2(tmp_path / "blip2")
    process = {"op": "image_captioning_mapper", "hf_img2seq": "blip2", "keep_original_sample": False}
    found = apply(tmp_path, **process)
    assert [(item.id, isinstance(item, BadRecord)) for item in found] == [
        ("red", True),
        ("red/caption/1", False),
        ("none", False),
        ("blue", True),
        ("blue/caption/1", False),
    ]
    assert apply(tmp_path, engine="ray", **process) == found
