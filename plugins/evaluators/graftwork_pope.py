"""POPE (Li et al., Evaluating Object Hallucination in Large Vision-Language Models, arXiv:2305.10355): is there a …?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from graftwork.contracts import BadRecord, Evaluator, Record, Score, Turn, hookimpl, plain_sum, setting
from graftwork.data import find_image, make_records, member, missing_files, read_json_lines, required
from graftwork.errors import DataError

LABELS = "coco_pope_*.json"


@dataclass(frozen=True)
class PopeSettings:
    """Where the questions, the right answers and the images are."""

    questions: Path | None = setting(None, "LLaVA's questions: llava_pope_test.jsonl")
    labels: Path | None = setting(None, "The folder of coco_pope_random.json and its like")
    images: Path | None = setting(None, "The folder of the images: COCO's val2014")


class Pope(Evaluator[PopeSettings]):
    """POPE's questions about objects that are, or are not, in an image"""

    name = "pope"
    Settings = PopeSettings
    max_new_tokens: ClassVar[int] = 128

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "questions", "labels", "images")

    def records(self) -> Iterator[Record | BadRecord]:
        """The questions in the order of their file; DataError when a file as a whole cannot be read."""
        questions = required(self.settings, "questions")
        reading = _Reading(_labels(required(self.settings, "labels")), required(self.settings, "images"))
        yield from make_records(read_json_lines(questions), reading.record)

    def score(self, record: Record, answer: str) -> Score:
        """1 when the answer, taken for a yes or a no, is right."""
        label = record.reference[0]
        return Score(float(is_yes(answer) == (label == "yes")), record.group, label)

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """Accuracy, precision, recall and F1 of the answer yes, and the share of yes: of all questions, then of each
        category, whose bare name is its accuracy. `mean F1`, which papers quote, is the mean of the categories' F1."""
        tables: dict[str, Counter[tuple[str, float]]] = defaultdict(Counter)
        for (group, label, value), times in Counter((s.group, s.detail, s.value) for s in scores).items():
            tables[group][label, value] += times
        totals = _measure(sum(tables.values(), Counter()))
        each = {group: _measure(table) for group, table in sorted(tables.items())}
        totals["mean F1"] = plain_sum(measured["F1"] for measured in each.values()) / len(each)
        for group, measured in each.items():
            totals[group] = measured.pop("accuracy")
            totals |= {f"{group}: {name}": value for name, value in measured.items()}
        return totals


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [Pope]


def is_yes(answer: str) -> bool:
    """Whether an answer is taken for a yes: its first sentence has none of the words No, no and not."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _measure(table: Mapping[tuple[str, float], int]) -> dict[str, float]:
    """The measures of a table of label and score; those that have nothing to divide by are zero."""
    right_yes, missed = table.get(("yes", 1.0), 0), table.get(("yes", 0.0), 0)
    right_no, wrong_yes = table.get(("no", 1.0), 0), table.get(("no", 0.0), 0)
    count, said_yes = right_yes + missed + right_no + wrong_yes, right_yes + wrong_yes
    precision = right_yes / said_yes if said_yes else 0.0
    recall = right_yes / (right_yes + missed) if right_yes + missed else 0.0
    return {
        "accuracy": (right_yes + right_no) / count,
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if right_yes else 0.0,
        "yes ratio": said_yes / count,
    }


# The files ------------------------------------------------------------------------------------------------------------


def _labels(folder: Path) -> dict[str, list[tuple[str, Any]]]:
    """Place and content of each label, in order, by category."""
    files = sorted(folder.glob(LABELS))
    if not files:
        raise DataError(f"'{folder}' has no file {LABELS}; set 'labels' to the folder that has them")
    return {file.stem.removeprefix("coco_pope_"): list(read_json_lines(file)) for file in files}


@dataclass
class _Reading:
    """What turns a line of the question file into a record."""

    labels: Mapping[str, Sequence[tuple[str, Any]]]
    images: Path
    asked: Counter[str] = field(default_factory=Counter)
    """How many questions of each category were read."""

    def record(self, where: str, content: Mapping[str, Any]) -> Record:
        category, text, image = (member(content, name, str) for name in ("category", "text", "image"))
        labels = self.labels.get(category, ())
        number = self.asked[category]
        self.asked[category] += 1
        if number >= len(labels):
            raise DataError(f"there are {len(labels)} labels for '{category}', and this is question {number + 1}")
        place, label = labels[number]
        # Labels belong to questions by their order alone, so a file of another release would go unnoticed.
        if not isinstance(label, Mapping) or (label.get("image"), label.get("text")) != (image, text.split("\n")[0]):
            raise DataError(f"the label in {place} is not about this image and question")
        if label.get("label") not in ("yes", "no"):
            raise DataError(f"the label in {place} is neither yes nor no")
        return Record(
            id=f"{category}/{number + 1}",
            turns=(Turn("user", f"<image>\n{text}"),),
            images=(find_image(self.images, image),),
            group=category,
            reference=(label["label"],),
            where=where,
        )
