"""Rehearsals show the largest images of the data, and the weather says which of its batches would not fit and what helps."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from tiny_runs import plan_of
from vlm_families import write

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DataSource, DictLookup, Image, Plan, Record, Turn, setting
from graftwork.data.training_data import encode, load_training_data
from graftwork.memory import budget, images
from graftwork.memory.images import Shown
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork.memory.weather import Forecast, Weather
from graftwork_hf_vlm import HfVlm
from graftwork_lora import Lora
from graftwork_torch_attention import Eager, Sdpa

CPU = Machine()


@dataclass(frozen=True)
class SizedSettings:
    folder: str = setting("", "Where the images are")
    sizes: tuple[tuple[tuple[int, int], ...], ...] = setting((), "The sizes of the images of each record")


class Sized(DataSource[SizedSettings]):
    """Questions about images of given sizes"""

    name = "sized"
    Settings = SizedSettings

    def records(self) -> Iterator[Record]:
        for number, sizes in enumerate(self.settings.sizes):
            asked = "<image>\n" * len(sizes) + "What is it?" + " Why?" * (number % 3)
            seen = tuple(Image(Path(self.settings.folder) / f"{width}x{height}.png") for width, height in sizes)
            turns = (Turn("user", asked), Turn("assistant", "a thing" + " or two" * (number % 4)))
            yield Record(f"sized/{number}", turns, seen, where=f"sized:{number}")

    def files(self) -> Sequence[Path]:
        return ()


LOOKUP = DictLookup(HfVlm, Sdpa, Eager, Lora, Sized)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL that sees images of up to a megapixel."""
    folder = write("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_pixels": 1_000_000}))
    return folder


def plan_for(folder: Path, sizes: Sequence[tuple[tuple[int, int], ...]], images: Path, **train: Any) -> Plan:
    for width, height in {size for each in sizes for size in each}:
        PILImage.new("RGB", (width, height), "teal").save(images / f"{width}x{height}.png")
    table = {
        "model": {"use": "hf-vlm", "weights": str(folder)},
        "peft": {"use": "lora", "on": ["language.attention", "vision"], "rank": 4},
        "attention": {"prefer": ["sdpa"]},
        "data": {"source": [{"use": "sized", "folder": str(images), "sizes": [*sizes]}]},
        "train": {"precision": "fp32", "batch_size": 2, "micro_batch_size": 2, "max_length": 512, **train},
    }
    return resolve(parse_run(table, images), LOOKUP)


def measured(plan: Plan) -> list[int]:
    """The peak of each batch on real tensors, as training would make it."""
    with watching(plan, LOOKUP) as watched:
        processor, train = watched.assembly.processor, plan.run_context.train
        with watched.tracker.paused():
            data = load_training_data(plan, LOOKUP, processor)
            sampler = data.sampler(plan.run_context)
            count = sampler.records // train.batch_size
            batches = [
                [encode(data.records[place], processor, train.max_length) for place in sampler.batch(number)]
                for number in range(count)
            ]
        return [watched.step(batch).footprint.peak for batch in batches]


def told(plan: Plan, room: int) -> Weather:
    with budget.counting(plan, LOOKUP, CPU, "cpu") as counted:
        return Forecast(plan, LOOKUP, counted, room).weather()


SMALL, LARGE = (112, 84), (420, 364)


def test_three_of_forty_batches(qwen: Path, tmp_path: Path) -> None:
    sizes = [((LARGE,) if number in (3, 20, 21, 40, 60, 77) else (SMALL,)) for number in range(80)]
    import time
    a = time.time()
    plan = plan_for(qwen, sizes, tmp_path)
    peaks = measured(plan)
    b = time.time()
    print(b - a, sorted(peaks))
    room = (sorted(peaks)[-3] + sorted(peaks)[-4]) // 2
    found = told(plan, room)
    print(time.time() - b, found, found.sentences())
