"""ScienceQA (Lu et al., Learn to Explain, NeurIPS 2022), asked and scored as LLaVA and MGM do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from graftwork.contracts import BadRecord, Evaluator, Record, Score, Turn, hookimpl, setting
from graftwork.data import find_image, make_records, member, missing_files, read_json, required
from graftwork.errors import DataError

LETTERS = "ABCDE"
DIRECTLY = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class ScienceQaSettings:
    """Where the questions, the right answers and the images are."""

    questions: Path | None = setting(None, "LLaVA's questions: llava_test_CQM-A.json")
    folder: Path | None = setting(None, "The folder of problems.json and pid_splits.json")
    images: Path | None = setting(None, "The folder of the images, such as images/test")
    split: str = setting("test", "The split of pid_splits.json to ask")


class ScienceQa(Evaluator[ScienceQaSettings]):
    """ScienceQA's multiple-choice questions, a part of them with an image"""

    name = "scienceqa"
    Settings = ScienceQaSettings
    max_new_tokens: ClassVar[int] = 1024

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "questions", "folder", "images")

    def records(self) -> Iterator[Record | BadRecord]:
        """The split's questions in the order of their file; DataError when a file as a whole cannot be read."""
        questions, folder = required(self.settings, "questions"), required(self.settings, "folder")
        images = required(self.settings, "images")
        problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
        listed, wanted = read_json(questions), splits.get(self.settings.split) if isinstance(splits, Mapping) else None
        if not isinstance(problems, Mapping) or not isinstance(wanted, list) or not isinstance(listed, list):
            raise DataError(
                f"'{questions}' is no list, 'problems.json' in '{folder}' no object, or 'pid_splits.json' without a list "
                f"'{self.settings.split}'; set 'questions', 'folder' and 'split' to ScienceQA's"
            )
        left = dict.fromkeys(map(str, wanted))

        def make(where: str, content: Mapping[str, Any]) -> Record:
            return _record(where, content, problems, images)

        for number, content in enumerate(listed, start=1):
            name = content.get("id") if isinstance(content, Mapping) else None
            if name is None or str(name) in left:
                yield from make_records([(f"{questions} (question {number})", content)], make)
            left.pop(str(name), None)
        for name in left:
            yield BadRecord(str(questions), f"there is no question about the problem '{name}' of the split")

    def score(self, record: Record, answer: str) -> Score:
        """1 when the letter that the answer gives is the right one."""
        return Score(float(parse(answer) == record.reference[0]), record.group)


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [ScienceQa]


def parse(answer: str) -> str | None:
    """The letter that is the answer, that it begins with before a full stop and a space, or that follows the words
    `The answer is ` and precedes any character, in one place only."""
    if answer in LETTERS and len(answer) == 1:
        return answer
    if answer[:1] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def _record(where: str, content: Mapping[str, Any], problems: Mapping[str, Any], images: Path) -> Record:
    name = str(content.get("id"))
    problem = problems.get(name)
    if not isinstance(problem, Mapping):
        raise DataError(f"problems.json has no problem '{name}'")
    right, choices = member(problem, "answer", int), member(problem, "choices", list)
    if not 0 <= right < min(len(choices), len(LETTERS)):
        raise DataError(f"the answer of the problem '{name}' is {right}, and it has {len(choices)} choices")
    turns = member(content, "conversations", list)
    if not turns or not isinstance(turns[0], Mapping):
        raise DataError("'conversations' has no first turn")
    text = member(turns[0], "value", str).replace("<image>", "").strip()
    shown = (find_image(images, member(content, "image", str)),) if "image" in content else ()
    return Record(
        id=name,
        turns=(Turn("user", "<image>\n" * len(shown) + f"{text}\n{DIRECTLY}"),),
        images=shown,
        group="IMG" if shown else "no image",
        reference=(LETTERS[right],),
        where=where,
    )
