"""MMBench (Liu et al., MMBench: Is Your Multi-modal Model an All-around Player?, arXiv:2307.06281): every question is
asked once for each rotation of its options, and counts only if all the answers are right. Choices are told from answers as
VLMEvalKit tells them without a judge (its `exact_matching`, as published in ms-vlmeval 0.0.20)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graftwork.contracts import BadRecord, Evaluator, Record, Requires, Score, hookimpl, missing_packages, setting
from graftwork.data import missing_files, required
from graftwork.errors import DataError, GraftworkError
from graftwork_mmbench.answers import choose, choose_cautiously
from graftwork_mmbench.submission import write_submission
from graftwork_mmbench.table import ROUND, Pass, Row, make_record, read, rotations

if TYPE_CHECKING:
    from graftwork.contracts import Prediction

__all__ = ["MmBench", "MmBenchSettings", "Pass", "choose"]

WRITING = Requires(packages=("openpyxl>=3.1",))
"""What only the file to submit needs."""
DIRECTLY = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}


@dataclass(frozen=True)
class MmBenchSettings:
    """Which questions to ask, and how often."""

    path: Path | None = setting(None, "The tab separated file, such as mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv")
    circular: Literal["file", "make", "off"] = setting(
        "file", "The rounds: those in the file, all rotations of its first rows, or the first rows alone"
    )
    language: Literal["en", "cn"] = setting("en", "The language of the line that asks for a letter")


class MmBench(Evaluator[MmBenchSettings]):
    """MMBench's multiple-choice questions, right only if right in every rotation of their options"""

    name = "mmbench"
    Settings = MmBenchSettings
    max_new_tokens: ClassVar[int] = 1024

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        """Question by question, each with its rounds; first what is malformed. DataError for a file of another kind."""
        path = required(self.settings, "path")
        table = read(path, with_images=True)
        rows = [row for row in table.rows if row.index < ROUND or self.settings.circular == "file"]
        if self.settings.circular == "file" and not any(row.index >= ROUND for row in rows):
            raise DataError(f"'{path}' has no rotated rows; set 'circular' to 'make' or to 'off'")
        if not any(row.letter for row in rows):
            raise DataError(f"'{path}' has no answers, so it is a test split that only MMBench's server can score")
        yield from table.bad
        questions: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            questions[row.question].append(row)
        for rounds in questions.values():
            if self.settings.circular == "make":
                rounds = [rotated for row in rounds for rotated in rotations(row)]
            for row in sorted(rounds, key=lambda row: row.index):
                yield make_record(row, len(rounds), table.images, DIRECTLY[self.settings.language])

    def score(self, record: Record, answer: str) -> Score:
        """1 when the choice that VLMEvalKit tells from the answer is the right one."""
        right, options = record.reference[0], record.meta["options"]
        detail = record.meta["pass"]._replace(
            literal=answer == right, cautious=choose_cautiously(answer, options) == right
        )
        return Score(float(choose(answer, options) == right), record.group, detail)

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The share of questions with every round right, then what that is by the simpler rules and by category.

        `vanilla` looks at the unrotated question alone; `cautious` reads the answer of every round by the paper's two steps,
        `strict` wants the bare letter there. A round that was not answered is not right. A question that comes several
        times, as in a resample, counts as often.
        """
        first, questions = [0.0, 0.0], dict[int, list[Any]]()
        for (group, detail, value), times in Counter((s.group, s.detail, s.value) for s in scores).items():
            tally = questions.setdefault(detail.question, [times, group, detail.branch, detail.rounds, 0, 0, 0])
            for place, right in enumerate((value, detail.cautious, detail.literal), start=4):
                tally[place] += right
            if detail.round == 0:
                first[0] += value * times
                first[1] += times
        hits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for times, group, branch, rounds, right, cautious, literal in questions.values():
            by_name = dict.fromkeys({self.metric, branch and f"l2: {branch}", group} - {""}, right)
            for name, rights in {**by_name, "cautious": cautious, "strict": literal}.items():
                hits[name][0] += times * (rights == rounds)
                hits[name][1] += times
        if first[1]:
            hits["vanilla"] = first
        order = (self.metric, "vanilla", "cautious", "strict")
        names = [name for name in order if name in hits] + sorted(hits.keys() - set(order), key=_branches_first)
        return {name: hits[name][0] / hits[name][1] for name in names}

    def write(self, answered: Sequence[Prediction], folder: Path) -> None:
        """`submission-VARIANT.xlsx` for each variant: the rows of the file with what was answered, as MMBench's server wants.

        GraftworkError where the package that writes it is missing.
        """
        if missing := missing_packages(WRITING):
            raise GraftworkError(f"the file to submit was not written, which {missing}")
        table = read(required(self.settings, "path"), with_images=False)
        for variant in answered[0].answers:
            replies = {int(one.record.id): one.answers[variant] for one in answered}
            if self.settings.circular == "make":  # These rounds are not the file's.
                replies = {index: text for index, text in replies.items() if index < ROUND}
            write_submission(table, replies, folder / f"submission-{variant}.xlsx")


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [MmBench]


def _branches_first(name: str) -> tuple[bool, str]:
    return not name.startswith("l2: "), name
