"""The operator data-juicer with Data-Juicer and Ray: thresholds, single failures, the guard, killed processes, equal bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.data import load_image
from graftwork.errors import DataError
from graftwork_data_juicer import DataJuicer, DataJuicerSettings

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (find_spec("data_juicer") and find_spec("ray")), reason="needs the extra data-juicer: make test-data"
    ),
]
LENGTH = {"op": "text_length_filter", "min_len": 12}
RATIO = {"op": "image_aspect_ratio_filter", "max_ratio": 5.0}
SPACES = {"op": "whitespace_normalization_mapper"}
ENGINES = ("local", "ray")
SECONDS = 120
"""Far more than a process takes to start or to end."""


def png(width: int, height: int = 10) -> bytes:
    stream = BytesIO()
    PILImage.effect_noise((width, height), 50).save(stream, "PNG")
    return stream.getvalue()


def record(id: str, *images: Image, question: str = "What is it?", answer: str = "A cat.") -> Record:
    turns = (Turn("user", f"{'<image>' * len(images)}\n{question}".lstrip()), Turn("assistant", answer))
    return Record(id, turns, images, where=f"a.json:{id}", meta={"known": id})


def apply(
    given: list[Record], *process: dict[str, Any], engine: str = "local", **others: Any
) -> list[Record | BadRecord]:
    settings = DataJuicerSettings(process=process, engine=engine, workers=2, **others)  # type: ignore[arg-type]
    return list(DataJuicer(settings).apply(given, seed=3))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Records with images in files, spans and memory, one of them broken, and with texts of many lengths."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "square.png").write_bytes(png(10))
    (folder / "cut.png").write_bytes(png(40, 40)[:-400])
    (folder / "shard.bin").write_bytes(b"head" + png(10) + png(300))
    square, cut, shard = (Image(folder / name) for name in ("square.png", "cut.png", "shard.bin"))
    first = (4, len(png(10)))
    assert shard.path
    wide = Image(shard.path, span=(sum(first), shard.path.stat().st_size - sum(first)))
    return [
        record("square", square),
        record("cut", cut),
        record("first", Image(shard.path, span=first)),
        record("wide", wide),
        record("bytes", Image(data=png(10)), question="What  is\u00a0it?"),
        record("text only"),
        record("short", question="?", answer="!"),
        *(record(f"many {number}", square, answer="word " * (number % 7 + 1)) for number in range(600)),
    ]


@pytest.fixture(scope="module")
def found(mixed: list[Record]) -> dict[str, Record | BadRecord]:
    return {item.id: item for item in apply(mixed, SPACES, LENGTH, RATIO)}


def test_every_dropped_record_says_the_number_that_dropped_it(found: dict[str, Record | BadRecord]) -> None:
    assert found["wide"] == BadRecord(
        "a.json:wide",
        "image_aspect_ratio_filter: aspect_ratios [30.0], max_ratio 5.0",
        "wide",
        {"aspect_ratios": [30.0]},
    )
    assert found["short"] == BadRecord(
        "a.json:short", "text_length_filter: text_len 3, min_len 12", "short", {"text_len": 3}
    )


def test_one_broken_image_costs_one_record(mixed: list[Record], found: dict[str, Record | BadRecord]) -> None:
    bad = found["cut"]
    assert isinstance(bad, BadRecord)
    assert bad.why.startswith("image_aspect_ratio_filter: OSError: ")
    assert [id for id, item in found.items() if isinstance(item, BadRecord)] == ["cut", "wide", "short"]
    assert list(found) == [each.id for each in mixed]


def test_a_cut_image_is_still_refused_here(mixed: list[Record], found: dict[str, Record | BadRecord]) -> None:
    assert "data_juicer" not in sys.modules
    with pytest.raises(DataError, match="cannot be read"):
        load_image(mixed[1].images[0])


def test_a_mapper_changes_texts_alone(mixed: list[Record], found: dict[str, Record | BadRecord]) -> None:
    changed, before = found["bytes"], mixed[4]
    assert isinstance(changed, Record)
    assert [turn.text for turn in changed.turns] == ["<image>\nWhat  is it?", "A cat."]
    assert (changed.images, changed.meta, changed.where) == (before.images, before.meta, before.where)
    assert found["square"] is mixed[0]


def test_ray_gives_the_same_and_neither_changes_the_environment(
    mixed: list[Record], found: dict[str, Record | BadRecord]
) -> None:
    def frozen() -> str:
        command = [sys.executable, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    before = frozen()
    assert apply(mixed, SPACES, LENGTH, RATIO, engine="ray") == list(found.values())
    for engine in ENGINES:
        with pytest.raises(
            DataError, match=r"'image_subplot_filter' needs opencv-contrib-python, which Graftwork never"
        ):
            apply(mixed[:1], {"op": "image_subplot_filter"}, engine=engine)
    assert frozen() == before


def test_all_mistakes_are_named_at_once() -> None:
    process = (
        {"op": "image_aspect_ratio_filter", "max_ration": 5.0, "any_or_all": 3},
        {"op": "text_length_filter", "min_len": 1.5, "text_key": "meta"},
        {"op": "image_shape_filter", "any_or_all": "some"},
    )
    with pytest.raises(DataError, match="for 5 reasons") as caught:
        apply([record("1")], *process)
    first, second, third, fourth, fifth = caught.value.details
    assert first == ("process.0: 'image_aspect_ratio_filter' has no parameter 'max_ration'; did you mean 'max_ratio'?")
    assert second == "process.0: 'any_or_all' of 'image_aspect_ratio_filter' is 3, wanted string"
    assert third.startswith("process.1: 'min_len' of 'text_length_filter' is 1.5, wanted integer")
    assert fourth.startswith("process.1: 'text_length_filter' has no parameter 'text_key'; ")
    assert fifth.startswith(
        "process.2: 'image_shape_filter' refuses its parameters: Keep strategy [some] is not supported"
    )


def test_what_a_broken_image_says_is_the_same_each_time() -> None:
    broken = record("1", Image(data=b"no image"))
    (first,), (second,) = apply([broken], RATIO), apply([broken], RATIO)
    assert isinstance(first, BadRecord)
    assert first == second
    assert first.why.startswith("image_aspect_ratio_filter: UnidentifiedImageError: ")


def test_an_operator_that_raises_on_a_record_costs_that_record() -> None:
    given = [record(str(number), answer="a" if number else "\ud800") for number in range(5)]
    process = {"op": "document_deduplicator"}
    bad = [item.id for item in apply(given, process) if isinstance(item, BadRecord)]
    assert bad == ["0", "2", "3", "4"]  # One that cannot be hashed, and the same text three times more.


def test_texts_that_a_mapper_empties_or_takes_images_out_of_are_dropped() -> None:
    image = Image(data=png(10))
    emptied = record("1", answer="https://example.org/a")
    middle = Record("2", (Turn("user", "Is <image> it?"), Turn("assistant", "Yes.")), (image,), where="a.json:2")
    links, letters = {"op": "clean_links_mapper"}, {"op": "remove_specific_chars_mapper", "chars_to_remove": "<>"}
    one, two = apply([emptied, middle], links, letters)
    assert isinstance(one, BadRecord) and isinstance(two, BadRecord)
    assert one.why == "clean_links_mapper: nothing is left of turn 2, 'https://example.org/a'"
    assert two.why == "remove_specific_chars_mapper: changed the '<image>' within turn 1"


def test_what_an_operator_would_fetch_stops_it(tmp_path: Path) -> None:
    (tmp_path / "flagged_words.json").write_text("{}")  # Data-Juicer takes an empty list for none, and would fetch one.
    with pytest.raises(DataError, match="not allowed to look up the host"):
        apply([record("1")], {"op": "flagged_words_filter", "flagged_words_dir": str(tmp_path)})


def processes() -> dict[int, tuple[int, str]]:
    """All processes: their parents and command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = (parent, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # It has just ended.
                continue
    return found


def descendants(command: str) -> list[int]:
    """The processes with this in their command line that come of this one."""
    everyone = processes()

    def comes_of_this(pid: int) -> bool:
        return pid == os.getpid() or (pid in everyone and comes_of_this(everyone[pid][0]))

    return [pid for pid, (parent, line) in everyone.items() if command in line and comes_of_this(parent)]


def killed(command: str, given: list[Record], engine: str) -> str:
    """The sentence that a run ends with when its process with this in its command line is killed."""
    sentence: list[str] = []

    def run() -> None:
        try:
            apply(given, LENGTH, engine=engine)
        except DataError as error:
            sentence.append(error.sentence)

    thread = threading.Thread(target=run)
    thread.start()
    victim, end = 0, time.monotonic() + SECONDS
    while not victim and thread.is_alive() and time.monotonic() < end:
        victim = next(iter(descendants(command)), 0)
        time.sleep(0.05)
    assert victim, "no such process was there"
    os.kill(victim, signal.SIGKILL)
    thread.join(SECONDS)
    assert not thread.is_alive()
    return sentence[0]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made, which is empty afterwards; no process has one of them in its command line."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_is_one_sentence_and_leaves_nothing(own_folder: Path) -> None:
    sentence = killed("graftwork_juicer_worker", [record("1")], "local")
    assert sentence.startswith(
        "the process of Data-Juicer was ended by SIGKILL, which the system does when memory runs out"
    )
    assert sentence.endswith("no record was changed or lost")
    assert not descendants("graftwork_juicer_worker")


@pytest.mark.parametrize(
    ("victim", "why"),
    [
        ("/raylet/raylet ", "Ray"),
        ("/gcs/gcs_server ", "the process of Data-Juicer failed with status"),
        ("ray::Judge", "a process of Ray ended (The actor died unexpectedly"),
    ],
)
def test_a_killed_ray_is_one_sentence_and_leaves_nothing(own_folder: Path, victim: str, why: str) -> None:
    assert why in killed(victim, [record(str(number)) for number in range(20_000)], "ray")
    end = time.monotonic() + SECONDS
    while (left := [line for _, line in processes().values() if "/tmp/gw-" in line]) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left
