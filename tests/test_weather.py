"""Rehearsals show the largest images of the data, and the weather says which of its batches would not fit and what helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from tiny_runs import plan_of
from vlm_families import FAMILIES, write

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DataSource, DictLookup, Image, Plan, Record, Turn, setting
from graftwork.contracts.packing import micro_batches
from graftwork.data.training_data import encode, load_training_data
from graftwork.memory import budget, images
from graftwork.memory.images import AN_IMAGE, Shown
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork.memory.weather import Forecast, Weather, with_pixels
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
            yield Record(f"sized/{number % 5}", turns, seen, where=f"sized:{number}")

    def files(self) -> Sequence[Path]:
        return ()


LOOKUP = DictLookup(HfVlm, Sdpa, Eager, Lora, Sized)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of one layer each that sees images of up to a megapixel."""
    family = FAMILIES["qwen2_5_vl"]

    def table(id: Callable[[str], int]) -> dict[str, Any]:
        made = family.table(id)
        vision = {**made["vision_config"], "depth": 1, "fullatt_block_indexes": [0]}
        return {**made, "text_config": {**made["text_config"], "num_hidden_layers": 1}, "vision_config": vision}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "small", replace(family, table=table, resizing={"max_pixels": 1_000_000}))
        return write("small", tmp_path_factory.mktemp("qwen"))


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


def measured(plan: Plan) -> Iterator[int]:
    """The peak of each batch on real tensors, as training would make it."""
    with watching(plan, LOOKUP, shown=AN_IMAGE) as watched:
        processor, train = watched.assembly.processor, plan.run_context.train
        with watched.tracker.paused():
            data = load_training_data(plan, LOOKUP, processor)
            sampler = data.sampler(plan.run_context)
        for number in range(sampler.records // train.batch_size):
            with watched.tracker.paused():
                batch = [encode(data.records[place], processor, train.max_length) for place in sampler.batch(number)]
            limit = train.max_length if train.packing else None
            peaks = [watched.step(cut).footprint.peak for cut in micro_batches(batch, train.micro_batch_size, limit)]
            yield max(peaks)


def told(plan: Plan, room: int) -> Weather:
    with budget.counting(plan, LOOKUP, CPU, "cpu", shown=AN_IMAGE) as counted:
        return Forecast(plan, LOOKUP, counted, room).weather()


SMALL, LARGE = (60, 50), (224, 200)
FEW_LARGE = [(LARGE if number in (3, 20, 21, 40, 60, 77) else SMALL,) for number in range(80)]
"""Records of which those with a large image make three batches, as they are grouped by length."""


def test_three_of_forty_batches_would_not_fit_and_what_is_said_makes_all_fit(qwen: Path, tmp_path: Path) -> None:
    plan = plan_for(qwen, FEW_LARGE, tmp_path)
    peaks = [*measured(plan)]
    *_, room, least, _, most = sorted(peaks)
    room = (2 * room + least) // 3
    found = told(plan, room)
    assert found.too_large == tuple(number for number, peak in enumerate(peaks, 1) if peak > room)
    assert (found.share, found.undecided) == (0.075, 0) and found.rehearsals < 40
    assert (found.peak, peaks[found.worst - 1]) == (pytest.approx(most, rel=0.001), pytest.approx(most, rel=0.001))
    sentence, remedy, *_ = found.sentences()
    assert sentence.startswith("weather: 3 of 40 batches (7.5 %) would not fit into ") and "(224 x 200)" in sentence
    assert remedy.startswith(f"model.max_pixels = {found.max_pixels} makes all of them fit; the largest then needs ")
    then = [*measured(with_pixels(plan, found.max_pixels or 0))]
    assert len(then) == 40 and max(then) == pytest.approx(found.peak_then, rel=0.001) and max(then) <= room


def test_a_smaller_micro_batch_helps_where_images_cannot_be_smaller(tmp_path: Path) -> None:
    """What is told of batches without rehearsing them is true on real tensors, of images that are cut into tiles too."""
    sizes = [(SMALL,), (), (LARGE, (60, 300)), (LARGE,)]
    plan = plan_for(write("llava_next", tmp_path / "model"), sizes, tmp_path, max_length=1024)
    peaks = [*measured(plan)]
    room = max(peaks) - (max(peaks) - sorted(peaks)[-2]) // 4
    found = told(plan, room)
    assert found.too_large == tuple(number for number, peak in enumerate(peaks, 1) if peak > room)
    assert (found.max_pixels, found.smaller_micro_batch) == (None, 1)
    assert (
        max(measured(plan_for(tmp_path / "model", sizes, tmp_path, max_length=1024, batch_size=1, micro_batch_size=1)))
        <= room
    )


def test_packed_rows_are_told_as_they_come(qwen: Path, tmp_path: Path) -> None:
    sizes = [(LARGE if number in (1, 6) else SMALL,) for number in range(16)]
    plan = plan_for(qwen, sizes, tmp_path, packing=True, batch_size=4, group_by_length=False)
    peaks = [*measured(plan)]
    room = (min(peaks) + max(peaks)) // 2
    found = told(plan, room)
    assert 0 < len(found.too_large) < 4
    assert found.too_large == tuple(number for number, peak in enumerate(peaks, 1) if peak > room)


def test_where_all_fit_nothing_is_to_be_done(qwen: Path, tmp_path: Path) -> None:
    plan = plan_for(qwen, [(SMALL,), (SMALL, SMALL), (), (LARGE,)] * 2, tmp_path)
    found = told(plan, 1 << 30)
    assert (found.too_large, found.max_pixels, found.smaller_micro_batch) == ((), None, None)
    assert len(found.sentences()) == 1


# What is rehearsed ----------------------------------------------------------------------------------------------------


def shown(plan: Plan) -> Shown | None:
    return images.of_data(plan, LOOKUP, compose.processor_of(plan, LOOKUP))


def test_the_largest_images_of_the_data_are_rehearsed(qwen: Path, tmp_path: Path) -> None:
    found = shown(plan_for(qwen, [(SMALL,), (LARGE,), (SMALL, SMALL), ()], tmp_path))
    assert str(found) == "the largest image of the data (224 x 200)"
    several = shown(plan_for(qwen, [(SMALL,), (LARGE,), (SMALL, LARGE, (100, 100))], tmp_path))
    assert str(several) == "the 3 images that a record of the data has (60 x 50, 224 x 200, 100 x 100)"
    assert shown(plan_for(qwen, [()], tmp_path)) is None


def test_records_that_are_not_trained_on_are_not_rehearsed(qwen: Path, tmp_path: Path) -> None:
    sizes = [(SMALL,), ((140, 140),), (LARGE,), (LARGE, LARGE)]
    assert shown(plan_for(qwen, sizes, tmp_path, max_length=110)) == Shown(
        ((140, 140),), "the largest image of the data"
    )


def test_an_image_that_cannot_be_read_is_passed_over(qwen: Path, tmp_path: Path) -> None:
    plan = plan_for(qwen, [(SMALL,), (LARGE,)], tmp_path)
    (tmp_path / "224x200.png").write_bytes(b"no image")
    assert shown(plan) == Shown((SMALL,), "the largest image of the data")


def test_headers_are_read_once_and_kept(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(qwen, [(SMALL,), (LARGE,)], tmp_path)
    first = shown(plan)
    monkeypatch.setattr(images, "sizes_of", lambda records: pytest.fail("they are known"))
    assert shown(plan) == first
    PILImage.new("RGB", (300, 200)).save(tmp_path / "224x200.png")
    monkeypatch.undo()
    assert shown(plan) == Shown(((300, 200),), "the largest image of the data")


def test_large_images_are_rehearsed_and_the_step_takes_what_was(qwen: Path, tmp_path: Path) -> None:
    plan = plan_for(qwen, [(SMALL,), (LARGE,)], tmp_path)
    with rehearsing(plan, LOOKUP, CPU, device="cpu", shown=shown(plan)) as watched:
        predicted = watched.take(2)
    with watching(plan, LOOKUP, shown=shown(plan)) as watched:
        assert watched.take(2).footprint.peak == pytest.approx(predicted.footprint.peak, rel=0.001)
    assert predicted.records == (
        "records of 512 tokens, 56 of them from the largest image of the data (224 x 200) and all others labelled"
    )
    with rehearsing(plan, LOOKUP, CPU, device="cpu", shown=Shown((SMALL,), "x")) as watched:
        assert watched.take(2).footprint.peak < predicted.footprint.peak


def test_what_needs_less_by_two_steps_is_not_rehearsed_with_more_records(qwen: Path, tmp_path: Path) -> None:
    plan = plan_for(qwen, [(LARGE,)], tmp_path)
    with rehearsing(plan, LOOKUP, CPU, device="cpu", shown=shown(plan)) as watched:
        found = [watched.take(micro_batch) for micro_batch in (1, 2, 3)]
        start = watched.tracker.timeline.now
        again = watched.take(3)
        one_image = watched.tracker.timeline.now - start
    with rehearsing(plan, LOOKUP, CPU, device="cpu", shown=shown(plan)) as watched:
        watched.take(1)
        start = watched.tracker.timeline.now
        both = watched.take(3)
        assert watched.tracker.timeline.now - start > 1.5 * one_image
    assert again.footprint.peak == pytest.approx(both.footprint.peak, rel=0.0001)
    assert (again.shown, again.flops) == (both.shown, both.flops) == (found[-1].shown, found[-1].flops)


@pytest.mark.parametrize(
    ("name", "max_length", "said"),
    [
        ("qwen2_5_vl", 512, "an image at the model's full resolution (128 x 128)"),
        ("llava", 512, "an image"),
        ("llava_next", 512, "an image at the model's full resolution (a square of any size)"),
        ("gemma3", 512, "an image"),
    ],
)
def test_without_data_the_largest_image_is_rehearsed(name: str, max_length: int, said: str, tmp_path: Path) -> None:
    plan = plan_for(write(name, tmp_path / name), [], tmp_path)
    assert str(images.largest_allowed(compose.processor_of(plan, LOOKUP), max_length)) == said


def test_without_data_no_image_is_rehearsed_that_max_length_does_not_allow(qwen: Path, tmp_path: Path) -> None:
    processor = compose.processor_of(plan_for(qwen, [], tmp_path), LOOKUP)
    found = images.largest_allowed(processor, 300)
    assert found.what == "the largest image that train.max_length allows"
    assert 280 < images.length_of(processor, found.sizes) <= 300


def test_an_mgm_shows_what_it_always_showed(base: Path, tmp_path: Path, lookup: DictLookup) -> None:
    plan = plan_of(base, tmp_path)
    processor = compose.processor_of(plan, lookup)
    assert images.largest_allowed(processor, 128) == images.of_data(plan, lookup, processor) == Shown(((64, 64),))
