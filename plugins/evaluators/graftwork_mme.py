"""MME (Fu et al., MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models, arXiv:2306.13394):
two questions about each image, one to be answered with yes and one with no, in fourteen tasks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from graftwork.contracts import BadRecord, Evaluator, Image, Record, Score, Turn, hookimpl, plain_sum, setting
from graftwork.data import missing_files, read_text, required
from graftwork.errors import DataError

TASKS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
SUFFIXES = (".jpg", ".png", ".jpeg")
ORIGINAL, LLAVA = "Please answer yes or no.", "Answer the question using a single word or phrase."
"""How the benchmark's questions end, and how LLaVA's and MGM's do."""


@dataclass(frozen=True)
class MmeSettings:
    """Where the questions and the images are."""

    folder: Path | None = setting(None, "The folder with one folder for each task: MME_Benchmark_release_version")


class Asked(NamedTuple):
    """What the totals have to know of a question."""

    image: str
    number: int


class Mme(Evaluator[MmeSettings]):
    """MME's fourteen tasks of yes and no: perception of 2000 points, cognition of 800"""

    name = "mme"
    Settings = MmeSettings
    metric: ClassVar[str] = "points"
    max_new_tokens: ClassVar[int] = 128

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "folder")

    def records(self) -> Iterator[Record | BadRecord]:
        """The questions task by task, image by image; DataError when the folder has no task at all."""
        folder = required(self.settings, "folder")
        tasks = [task for tasks in TASKS.values() for task in tasks]
        if not any((folder / task).is_dir() for task in tasks):
            raise DataError(f"'{folder}' has no folder of a task, such as '{tasks[0]}'; set 'folder' to their parent")
        for task in tasks:
            if (folder / task).is_dir():
                yield from _task(folder / task)
            else:
                yield BadRecord(str(folder / task), "the task's folder is missing, and so are its points")

    def score(self, record: Record, answer: str) -> Score:
        """1 when the answer is taken for the right one of yes and no."""
        return Score(float(parse(answer) == record.reference[0]), record.group, record.meta["asked"])

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """Points of at most 2800: those of perception and cognition, which are sums over tasks, and each task's of 200.

        A task has 100 points times the share of right answers, and 100 times the share of images with both right.
        """
        right, answered = Counter[str](), Counter[str]()
        images: dict[tuple[str, str], list[float]] = {}
        for (task, asked, value), times in Counter((s.group, s.detail, s.value) for s in scores).items():
            answered[task] += times
            right[task] += int(value) * times
            images.setdefault((task, asked.image), [times, 0.0])[1] += value
        both: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for (task, _), (drawn, rights) in images.items():
            both[task][0] += drawn * (rights == 2)
            both[task][1] += drawn
        points = {task: 100 * (right[task] / answered[task] + both[task][0] / both[task][1]) for task in answered}
        sums = {
            name: plain_sum(points.get(task, 0.0) for task in tasks)
            for name, tasks in TASKS.items()
            if points.keys() & set(tasks)
        }
        return {self.metric: plain_sum(sums.values()), **sums, **points}


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [Mme]


def parse(answer: str) -> str:
    """`yes` or `no` where it stands within the first four characters, yes before no; otherwise `other`."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def _task(folder: Path) -> Iterator[Record | BadRecord]:
    """The questions of a task, whose files lie in two folders or all in one."""
    apart = (folder / "images").is_dir()
    images, questions = (folder / "images", folder / "questions_answers_YN") if apart else (folder, folder)
    files = sorted(questions.glob("*.txt"))
    if not files:
        yield BadRecord(str(questions), "there is no file of questions, and so the task has no points")
    for file in files:
        image = next((path for end in SUFFIXES if (path := images / (file.stem + end)).is_file()), None)
        try:
            if image is None:
                raise DataError(f"there is no image '{images / file.stem}' with one of {', '.join(SUFFIXES)}")
            yield from _questions(file, image, folder.name)
        except DataError as error:
            yield BadRecord(str(file), error.sentence)


def _questions(file: Path, image: Path, task: str) -> Iterator[Record]:
    """The two questions of a file; DataError when it has not two good ones."""
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    if len(lines) != 2:
        raise DataError(f"the file has {len(lines)} questions, and an image has two")
    pairs = [line.strip().split("\t") for line in lines]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2 or pair[1].lower() not in ("yes", "no"):
            raise DataError(f"question {number} is not a question, a tab and Yes or No")
    for number, (question, answer) in enumerate(pairs, start=1):
        plain = question.strip().removesuffix(ORIGINAL).rstrip()
        yield Record(
            id=f"{task}/{file.stem}/{number}",
            turns=(Turn("user", f"<image>\n{plain}\n{LLAVA}"),),
            images=(Image(image),),
            group=task,
            reference=(answer.lower(),),
            where=f"{file}:{number}",
            meta={"asked": Asked(file.stem, number)},
            unit=f"{task}/{file.stem}",
        )
