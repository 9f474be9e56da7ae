"""A data set with planted faults: each kind is dropped for its own reason, and no healthy record is dropped.

PYTHONPATH=tests python tests/planted_data.py [--records 3000] > benchmarks/planted.md
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from PIL import Image as PILImage

from graftwork.jobs.data_sets import process_data

HEALTHY = "healthy"
SEED = 11


class Planted(NamedTuple):
    """A kind of fault: which stage has to drop it, and the words by which it says why."""

    stage: str
    words: str


SOURCE = "llava-json"
FAULTS = {
    "a line that is cut off": Planted(SOURCE, "not JSON"),
    "a line that is a list": Planted(SOURCE, "not an object"),
    "an image that is missing": Planted(SOURCE, "there is no image"),
    "a path that leads out of the folder": Planted(SOURCE, "leads out of"),
    "an image that is an address": Planted(SOURCE, "download it"),
    "a video": Planted(SOURCE, "frames"),
    "two answers in a row": Planted(SOURCE, "do not alternate"),
    "a question without an answer": Planted(SOURCE, "is not an answer"),
    "an empty answer": Planted(SOURCE, "no text"),
    "an image that the text does not show": Planted(SOURCE, "they must be equal"),
    "half a surrogate pair": Planted(SOURCE, "surrogate"),
    "the turn of a tool": Planted(SOURCE, "'tool'"),
    "a system turn in the middle": Planted(SOURCE, "only the first may be one"),
    "a weight below zero": Planted(SOURCE, "weight"),
    "an image that is cut off": Planted("drop-broken-images", "cannot be read"),
    "an image that is a web page": Planted("drop-broken-images", "it is a web page"),
    "an image that is a git-lfs pointer": Planted("drop-broken-images", "git-lfs pointer"),
    "an image that is empty": Planted("drop-broken-images", "it is empty"),
    "an image of 20,000 x 20,000 pixels": Planted("drop-broken-images", "megapixels"),
    "the same pixels in another file": Planted("deduplicate-images", "same pixels"),
    "the same photograph, smaller": Planted("near-duplicate-images", ""),
    "the same photograph, as JPEG of quality 20": Planted("near-duplicate-images", ""),
    "the same question about the same image": Planted("duplicate-questions", ""),
    "an image of a test set, under another name": Planted("leaks", ""),
    "too few words": Planted("limit-length", "fewer than 4"),
    "too many words": Planted("limit-length", "more than 60"),
}
OPERATORS: list[dict[str, Any]] = [
    {"use": "drop-broken-images"},
    {"use": "leaks", "against": {"easy-vqa": {"split": "test"}}},
    {"use": "deduplicate-images"},
    {"use": "near-duplicate-images"},
    {"use": "duplicate-questions"},
    {"use": "limit-length", "min_words": 4, "max_words": 60},
]


class Planter:
    """Writes records and images into a folder, and remembers which fault each record has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.kinds = folder, list[str](), list[str]()
        self.draw, self.numbers = random.Random(SEED), numpy.random.default_rng(SEED)
        (folder / "pics").mkdir()
        self.count = 0

    def photograph(self) -> PILImage.Image:
        """A smooth field of colours, different from all others, as photographs are to a perceptual hash."""
        # As in photographs, light differs more than colour.
        light = self.numbers.integers(20, 236, (6, 6, 1)) + self.numbers.integers(-20, 20, (6, 6, 3))
        small = PILImage.fromarray(light.clip(0, 255).astype(numpy.uint8))
        return small.resize((256, 256), PILImage.Resampling.BICUBIC)

    def put(self, data: bytes | PILImage.Image, suffix: str = "png", **options: Any) -> str:
        """Write an image file, and return its name."""
        self.count += 1
        name = f"pics/{self.count}.{suffix}"
        if isinstance(data, bytes):
            (self.folder / name).write_bytes(data)
        else:
            data.save(self.folder / name, **options)
        return name

    def talk(self, image: str | list[str] | None, *, answer: str = "", **more: Any) -> dict[str, Any]:
        """A conversation about an image, several or none."""
        self.count += 1
        names = [image] if isinstance(image, str) else image or []
        asked = "<image>\n" * len(names) + f"What is in picture {self.count}, and why?"
        said = answer or f"It is number {self.count}, as anybody can see."
        content: dict[str, Any] = {"id": f"r{self.count}"} | ({"image": image} if names else {})
        return content | {"conversations": [turn("human", asked), turn("gpt", said)]} | more

    def add(self, kind: str, content: Any) -> None:
        """Plant a record, an object or a line as it is."""
        self.lines.append(content if isinstance(content, str) else json.dumps(content))
        self.kinds.append(kind)

    def plant_healthy(self) -> None:
        """A record that nothing is wrong with, of one of several kinds."""
        kind, picture = self.draw.randrange(6), self.put(self.photograph())
        if kind == 0:
            self.add(HEALTHY, self.talk(None))
        elif kind == 1:
            self.add(HEALTHY, self.talk([picture, self.put(self.photograph())]))
        elif kind == 2:
            content = self.talk(picture)
            content["conversations"] += [
                turn("human", "And then – wirklich?"),
                turn("gpt", "Ja, \u2028 wirklich: 本当."),
            ]
            self.add(HEALTHY, content)
        elif kind == 3:
            content = self.talk(picture)
            content["conversations"].insert(0, turn("system", "Be brief and honest."))
            self.add(HEALTHY, content)
        elif kind == 4:
            name = self.put(self.photograph(), "jpg", quality=90)
            self.add(HEALTHY, self.talk(name))
            self.add(HEALTHY, self.talk(name))  # Another question about the same image.
        else:
            self.add(HEALTHY, self.talk(picture, weight=0.5))

    def plant(self, kind: str) -> None:
        """A record with a fault."""
        MAKERS[kind](self, kind)


def turn(role: str, text: str) -> dict[str, str]:
    """A turn in LLaVA's words."""
    return {"from": role, "value": text}


def _spoiled(spoil: Callable[[Planter, dict[str, Any]], Any]) -> Callable[[Planter, str], None]:
    """Plants a healthy record of which one thing is spoiled."""

    def plant(to: Planter, kind: str) -> None:
        content = to.talk(to.put(to.photograph()))
        to.add(kind, spoil(to, content) or content)

    return plant


def _file(make: Callable[[Planter], bytes]) -> Callable[[Planter, str], None]:
    """Plants a healthy record whose image file is something else."""
    return lambda to, kind: to.add(kind, to.talk(to.put(make(to))))


def _twin(make: Callable[[Planter, PILImage.Image], str]) -> Callable[[Planter, str], None]:
    """Plants a healthy record, and one about what is made of its image."""

    def plant(to: Planter, kind: str) -> None:
        photograph = to.photograph()
        to.add(HEALTHY, to.talk(to.put(photograph)))
        to.add(kind, to.talk(make(to, photograph)))

    return plant


def _turns(*turns: dict[str, str]) -> Callable[[Planter, str], None]:
    return _spoiled(lambda to, content: content["conversations"].extend(turns))


def _repeat(to: Planter, kind: str) -> None:
    content = to.talk(to.put(to.photograph()))
    to.add(HEALTHY, content)
    to.add(kind, content | {"id": f"{content['id']}-again"})


def _of_test_set(to: Planter, kind: str) -> None:
    spec = find_spec("easy_vqa")
    assert spec and spec.submodule_search_locations
    pictures = Path(spec.submodule_search_locations[0]) / "data" / "test" / "images"
    number = sum(each == kind for each in to.kinds)
    to.add(kind, to.talk(to.put((pictures / f"{number}.png").read_bytes())))


def _png(image: PILImage.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _huge(to: Planter) -> bytes:
    # Only the header says so: nothing may be decoded to find out.
    data = bytearray(_png(to.photograph()))
    data[16:24] = (20_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


MAKERS: dict[str, Callable[[Planter, str], None]] = {
    "a line that is cut off": _spoiled(lambda to, content: json.dumps(content)[:-9]),
    "a line that is a list": _spoiled(lambda to, content: json.dumps([content])),
    "an image that is missing": lambda to, kind: to.add(kind, to.talk("pics/nowhere.png")),
    "a path that leads out of the folder": lambda to, kind: to.add(kind, to.talk("../../etc/passwd")),
    "an image that is an address": lambda to, kind: to.add(kind, to.talk("https://example.org/cat.png")),
    "a video": lambda to, kind: to.add(kind, to.talk(None, video="cat.mp4")),
    "two answers in a row": _turns(turn("gpt", "Once more.")),
    "a question without an answer": _turns(turn("human", "And now what is it?")),
    "an empty answer": _turns(turn("human", "And now what is it?"), turn("gpt", "  ")),
    "an image that the text does not show": _spoiled(
        lambda to, content: content["conversations"][0].update(value="What is to be seen there?")
    ),
    "half a surrogate pair": _turns(turn("human", "And now?"), turn("gpt", "\ud83d is what it is.")),
    "the turn of a tool": _turns(turn("human", "And now?"), turn("tool", "{}")),
    "a system turn in the middle": _turns(turn("system", "Be brief.")),
    "a weight below zero": _spoiled(lambda to, content: content.update(weight=-1)),
    "an image that is cut off": _file(lambda to: _png(to.photograph())[:400]),
    "an image that is a web page": _file(lambda to: b"<!DOCTYPE html><html></html>"),
    "an image that is a git-lfs pointer": _file(lambda to: b"version https://git-lfs.github.com/spec/v1\n"),
    "an image that is empty": _file(lambda to: b""),
    "an image of 20,000 x 20,000 pixels": _file(_huge),
    "the same pixels in another file": _twin(lambda to, image: to.put(image, "bmp")),
    "the same photograph, smaller": _twin(lambda to, image: to.put(image.resize((160, 160)))),
    "the same photograph, as JPEG of quality 20": _twin(lambda to, image: to.put(image, "jpg", quality=20)),
    "the same question about the same image": _repeat,
    "an image of a test set, under another name": _of_test_set,
    "too few words": _spoiled(
        lambda to, content: content.update(conversations=[turn("human", "<image>\nWhat?"), turn("gpt", "That.")])
    ),
    "too many words": _spoiled(lambda to, content: content["conversations"][1].update(value="very " * 70)),
}


class Found(NamedTuple):
    """What became of the records of a kind."""

    planted: int
    dropped: int
    rightly: int
    """For their own reason."""


def campaign(folder: Path, records: int, lookup: Any = None) -> tuple[dict[str, Found], dict[str, int]]:
    """Plant so many records, a third of them with faults, process them, and count: by kind, and in all."""
    planter, each = Planter(folder), max(1, records // 3 // len(FAULTS))
    for kind in FAULTS:
        for _ in range(each):
            planter.plant(kind)
    while len(planter.lines) < records:
        planter.plant_healthy()
    order = [*range(len(planter.lines))]
    twins = {place for place, kind in enumerate(planter.kinds) if kind != HEALTHY}
    planter.draw.shuffle(order)
    # What a record doubles has to come before it.
    order = [place for place in order if place not in twins] + [place for place in order if place in twins]
    (folder / "data.jsonl").write_text("\n".join(planter.lines[place] for place in order), encoding="utf-8")
    kinds = [planter.kinds[place] for place in order]
    table = {"data": {"source": [{"use": SOURCE, "path": str(folder / "data.jsonl")}], "operator": OPERATORS}}
    made = process_data(table, folder / "out", lookup=lookup)
    dropped = {}
    for line in (folder / "out" / "dropped.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        dropped[int(row["where"].rpartition(":")[2])] = row
    found = {}
    for kind in (HEALTHY, *FAULTS):
        places = [number for number, known in enumerate(kinds, 1) if known == kind]
        rows = [dropped[number] for number in places if number in dropped]
        wanted = FAULTS.get(kind)
        rightly = sum(bool(wanted) and row["stage"] == wanted.stage and wanted.words in row["why"] for row in rows)
        found[kind] = Found(len(places), len(rows), rightly)
    totals = {"read": len(kinds), "kept": made.records, "dropped": len(dropped)}
    return found, totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=3_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, totals = campaign(Path(folder), options.records)
    print("# Planted faults\n\nWhat `graftwork data process` makes of a data set with planted faults:")
    print(
        "`PYTHONPATH=tests python tests/planted_data.py`. The operators: "
        + ", ".join(f"`{o['use']}`" for o in OPERATORS)
        + ".\n"
    )
    print(f"{totals['read']:,} records read = {totals['kept']:,} kept + {totals['dropped']:,} dropped.\n")
    print("| kind | planted | dropped | for its own reason | by |\n| --- | --- | --- | --- | --- |")
    for kind, each in found.items():
        by = f"`{FAULTS[kind].stage}`" if kind in FAULTS else ""
        print(f"| {kind} | {each.planted:,} | {each.dropped:,} | {each.rightly:,} | {by} |")


if __name__ == "__main__":
    main()
