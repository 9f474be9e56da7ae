"""easy-VQA, the small synthetic data set of the PyPI package `easy-vqa`: a data source and an evaluator.

4,000 images with 38,575 questions to train on, 1,000 with 9,673 to test: one shape on a plain ground, 13 answers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from graftwork.contracts import DataSource, Evaluator, Image, Record, Requires, Score, Turn, hookimpl, setting
from graftwork.errors import DataError

REQUIRES = Requires(packages=("easy-vqa>=1.0",))
PROMPT = "<image>\n{question}"
GROUPS = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape", "triangle": "shape"}
"""The group of an answer; every other answer is a colour."""

Split = Literal["train", "test"]
Kind = Literal["all", "yes-no", "open"]
T = TypeVar("T")


@dataclass(frozen=True)
class EasyVqaSourceSettings:
    """Which questions to learn from."""

    split: Split = setting("train", "Which part of the data set")
    kind: Kind = setting("all", "Which questions; open ones ask for a colour or a shape")
    pictures: int | None = setting(None, "Use only the questions about so many images, from the first", minimum=1)
    limit: int | None = setting(None, "Use only so many questions, from the first", minimum=1)


@dataclass(frozen=True)
class EasyVqaSettings:
    """Which questions to ask."""

    split: Split = setting("test", "Which part of the data set")
    kind: Kind = setting("all", "Which questions; open ones ask for a colour or a shape")
    per_group: int | None = setting(None, "Ask at most so many of each group, spread over the images", minimum=1)
    limit: int | None = setting(None, "Ask at most so many in all, spread over the images", minimum=1)


class EasyVqaSource(DataSource[EasyVqaSourceSettings]):
    """easy-VQA's questions about one coloured shape, with their answers"""

    name = "easy-vqa"
    requires = REQUIRES
    Settings = EasyVqaSourceSettings

    def records(self) -> Iterator[Record]:
        """The questions in the order of the data set, image by image."""
        settings = self.settings
        for record in islice(_questions(settings.split, settings.kind, settings.pictures), settings.limit):
            yield replace(record, turns=(*record.turns, Turn("assistant", record.reference[0])), reference=())


class EasyVqa(Evaluator[EasyVqaSettings]):
    """easy-VQA's questions about one coloured shape, scored by exact match"""

    name = "easy-vqa"
    requires = REQUIRES
    Settings = EasyVqaSettings
    max_new_tokens: ClassVar[int] = 8

    def records(self) -> Iterator[Record]:
        """The questions in the order of the data set, each with its answer as the reference."""
        records = list(_questions(self.settings.split, self.settings.kind))
        groups = defaultdict(list)
        for record in records:
            groups[record.group].append(record.id)
        chosen = {id for ids in groups.values() for id in _spread(ids, self.settings.per_group)}
        yield from _spread([record for record in records if record.id in chosen], self.settings.limit)

    def score(self, record: Record, answer: str) -> Score:
        """1 when the answer is the reference, but for case, surrounding space and a full stop at the end."""
        plain = answer.strip().lower().removesuffix(".").rstrip()
        return Score(float(plain in record.reference), record.group)


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [EasyVqaSource]


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [EasyVqa]


def _questions(split: Split, kind: Kind, pictures: int | None = None) -> Iterator[Record]:
    """The questions of that kind about the first `pictures` images, without assistant turns."""
    folder = _data() / split
    try:
        rows: list[tuple[str, str, int]] = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the package 'easy-vqa' is damaged ({error}); install it again") from error
    for number, (question, answer, image) in enumerate(rows):
        group = GROUPS.get(answer, "colour")
        wanted = kind == "all" or (kind == "yes-no") == (group == "yes/no")
        if wanted and (pictures is None or image < pictures):  # Images are numbered from 0 without gaps.
            yield Record(
                id=f"easy-vqa/{split}/{number}",
                turns=(Turn("user", PROMPT.format(question=question)),),
                images=(Image(folder / "images" / f"{image}.png"),),
                group=group,
                reference=(answer,),
                where=f"easy-vqa {split}, question {number}",
            )


def _data() -> Path:
    spec = find_spec("easy_vqa")  # Finds the package without importing it.
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the package 'easy-vqa' is not installed; run: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def _spread(items: Sequence[T], count: int | None) -> Sequence[T]:
    """At most `count` items at even distances, in their order."""
    if count is None or count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]
