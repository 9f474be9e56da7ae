"""The base model of the demo as a writer, and easy-VQA's labels, some of them spoiled: what makers and verifiers are measured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from graftwork.build import compose
from graftwork.contracts import Lookup, Record, Turn
from graftwork.jobs.run import Run
from graftwork.writers.local import ModelSource
from graftwork.writers.replies import RecordedWriter, ReplyCache
from graftwork_easy_vqa import EasyVqaSource, EasyVqaSourceSettings

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ASK_BACK = {"colour": "does the image contain a {answer} shape?", "shape": "does the image contain a {answer}?"}
"""How the tiny MGM-Gemma is asked, which knows yes and no, about colours."""


@contextmanager
def demo_writer(folder: Path, lookup: Lookup) -> Iterator[RecordedWriter]:
    """The tiny MGM-Gemma, without an adapter; its replies are kept in the cache, and written down in the folder."""
    base = Path(__file__).parents[1] / "examples" / "demo-base" / "base"
    parts = {
        "low": {"use": "clip", "config": str(base / "low")},
        "high": {"use": "openclip-convnext", "config": str(base / "high")},
    }
    plan = Run(model={"use": "mgm-gemma", "weights": str(base), "parts": parts}).plan(lookup)
    source = ModelSource(
        lambda: compose.build(plan, lookup, device="cpu"), {"model": "the tiny MGM-Gemma"}, batch_size=32
    )
    with (
        closing(ReplyCache()) as cache,
        closing(RecordedWriter(source, cache, folder, "1", "writer", lambda replies, asked: None)) as asked,
    ):
        yield asked


def labels(images: int) -> list[Record]:
    """What easy-VQA says of the colour and the shape in its first images, each once, as if an operator had made it."""
    found: dict[tuple[str, str], Record] = {}
    for record in EasyVqaSource(EasyVqaSourceSettings(kind="open", pictures=images)).records():
        found.setdefault((str(record.images[0]), record.group), record)
    return [replace(record, meta={"made_by": "labels", "of": []}) for record in found.values()]


def spoiled(records: list[Record], share: float, seed: int = 3) -> tuple[list[Record], set[str]]:
    """The records, that share of them with another answer of their group; and the ids of those that are still right."""
    random, right, given = Random(seed), set[str](), []
    for record in records:
        answer = record.turns[-1].text
        if random.random() < share:
            others = [value for value in (COLOURS if record.group == "colour" else SHAPES) if value != answer]
            record = replace(record, turns=(record.turns[0], Turn("assistant", random.choice(others))))
        else:
            right.add(record.id)
        given.append(record)
    return given, right


def unlabelled(records: list[Record]) -> list[Record]:
    """The images alone, each once."""
    first = {str(record.images[0]): record for record in reversed(records)}
    return [
        Record(Path(path).name, (Turn("user", "<image>"),), record.images, where=path) for path, record in first.items()
    ]
