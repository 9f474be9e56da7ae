"""Kernels, towers, evaluators, sources and operators that break one promise each, next to sound ones that they extend."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftwork import SUPPORTED, BadRecord, NoSettings, Record, Requires, Support, Turn, setting, unsupported
from graftwork.attention.definition import plain_attention
from graftwork.conformance.specimens import KitTower
from graftwork.contracts import (
    AttentionCase,
    AttentionKernel,
    AttentionSite,
    BuildContext,
    DataOperator,
    DataSource,
    Evaluator,
    Image,
    Score,
    TowerOutput,
)
from graftwork.data import (
    ImageFiles,
    from_object,
    missing_files,
    read_json_lines,
    required,
    to_object,
    write_json_lines,
)

# Attention kernels ------------------------------------------------------------------------------------------------------


class Plain(AttentionKernel[NoSettings]):
    """The definition"""

    name = "plain"

    def supports(self, case: AttentionCase) -> Support:
        return SUPPORTED

    def forward(self, q: Any, k: Any, v: Any, *, padding: Any, causal: bool, scale: float, dropout: float) -> Any:
        return plain_attention(q, k, v, padding=padding, causal=causal, scale=scale, dropout=dropout)


class IgnoresPadding(Plain):
    """It sees padding"""

    def forward(self, q: Any, k: Any, v: Any, *, padding: Any, **options: Any) -> Any:
        return super().forward(q, k, v, padding=None, **options)


class ClaimsAnyHeadDim(Plain):
    """It says yes to what it cannot do"""

    def forward(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        if q.shape[-1] > 128:
            raise RuntimeError("head_dim must be at most 128")
        return super().forward(q, k, v, **options)


class DropsAGradient(Plain):
    """Its keys learn nothing"""

    def forward(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return super().forward(q, k.detach() + 0 * k, v, **options)


class IgnoresDropout(Plain):
    """It drops nothing"""

    def forward(self, q: Any, k: Any, v: Any, *, dropout: float, **options: Any) -> Any:
        return super().forward(q, k, v, dropout=0.0, **options)


class GivesNan(Plain):
    """A query that sees nothing gets NaN"""

    def forward(self, q: Any, k: Any, v: Any, *, padding: Any, **options: Any) -> Any:
        output = super().forward(q, k, v, padding=padding, **options)
        return output if padding is None else output.masked_fill(~padding.any(1)[:, None, None, None], float("nan"))


class GivesNoReason(Plain):
    """It says no and not why"""

    def supports(self, case: AttentionCase) -> Support:
        return SUPPORTED if case.device == "cpu" else unsupported("")


class ForgetsItsCard(Plain):
    """It says yes without the GPU that it requires"""

    requires = Requires(cuda=(8, 0))


# Vision towers ----------------------------------------------------------------------------------------------------------


class LiesAboutItsWidth(KitTower):
    """It describes another width"""

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        return replace(super().describe(config, size), widths=(2 * config["width"],))


class ForgetsItsNames(KitTower):
    """It does not know its own bias"""

    def module_name(self, name: str) -> str | None:
        return name if name.endswith("weight") else None


class HasAPairInItsConfiguration(KitTower):
    """A pair is a list when it is read back"""

    def configuration(self, folder: Any) -> Mapping[str, Any]:
        return {**super().configuration(folder), "grid": (4, 4)}


class InventsASite(KitTower):
    """It says that it attends, and does not"""

    def sites(self, config: Mapping[str, Any]) -> Sequence[AttentionSite]:
        return [AttentionSite("vision", 8, 2, 2, False, False)]


class ReadsWhileBuilding(KitTower):
    """It fills itself"""

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Any:
        tower = super().build(config, context)
        # As a parameter that is filled in after it was made.
        tower.patches._parameters["bias"] = torch.nn.Parameter(torch.tensor([0.0] * config["width"]))
        return tower


# Evaluators -------------------------------------------------------------------------------------------------------------


class Quiz(Evaluator[NoSettings]):
    """Three questions"""

    name = "quiz"

    def records(self) -> Iterator[Record | BadRecord]:
        for id, answer in (("1", "yes"), ("2", "no"), ("3", "two")):
            yield Record(
                id, (Turn("user", f"Question {id}?"),), reference=(answer,), group="numbers" if id == "3" else ""
            )

    def score(self, record: Record, answer: str) -> Score:
        return Score(float(answer in record.reference), record.group)


class RepeatsIds(Quiz):
    """All are called one"""

    def records(self) -> Iterator[Record | BadRecord]:
        return (replace(record, id="1") for record in super().records() if isinstance(record, Record))


class Shuffles(Quiz):
    """Another order each time"""

    turns = itertools.count()

    def records(self) -> Iterator[Record | BadRecord]:
        return iter([*super().records()][:: 1 if next(self.turns) % 2 else -1])


class ScoresBackwards(Quiz):
    """Wrong is right"""

    def score(self, record: Record, answer: str) -> Score:
        return Score(float(answer not in record.reference), record.group)


class ScoresInPercent(Quiz):
    """From 0 to 100"""

    def score(self, record: Record, answer: str) -> Score:
        return replace(super().score(record, answer), value=100.0 * (answer in record.reference))


class LosesItsMetric(Quiz):
    """Its total has no metric"""

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        return {"numbers": 1.0}


class InPairs(Quiz):
    """Two questions to each of three images, right only together"""

    name = "pairs"

    def records(self) -> Iterator[Record | BadRecord]:
        for image in "abc":
            for id in (f"{image}1", f"{image}2"):
                yield Record(id, (Turn("user", f"Question {id}?"),), reference=("yes",), meta={"of": image}, unit=image)

    def score(self, record: Record, answer: str) -> Score:
        return Score(float(answer in record.reference), detail=record.meta["of"])

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        right = Counter[str]()
        for score in scores:
            right[score.detail] += int(score.value)
        return {self.metric: sum(count == 2 for count in right.values()) / len(right)}


class ForgetsItsUnits(InPairs):
    """Pairs, and no word of it"""

    def records(self) -> Iterator[Record | BadRecord]:
        return (replace(record, unit="") for record in super().records() if isinstance(record, Record))


class TearsItsUnits(InPairs):
    """The first questions of all pairs, then the second ones"""

    def records(self) -> Iterator[Record | BadRecord]:
        return iter(sorted((one for one in super().records() if isinstance(one, Record)), key=lambda one: one.id[1]))


# Data -------------------------------------------------------------------------------------------------------------------


class Lines(DataSource[NoSettings]):
    """Two records"""

    name = "lines"

    def records(self) -> Iterator[Record | BadRecord]:
        for id in ("a", "b"):
            yield Record(id, (Turn("user", id), Turn("assistant", id)), where=f"lines:{id}")
        yield BadRecord("lines:c", "it is empty")


class YieldsTables(Lines):
    """Tables instead of records"""

    def records(self) -> Iterator[Any]:
        yield {"id": "a"}


class ForgetsThePlace(Lines):
    """An image without its place in the text"""

    def records(self) -> Iterator[Record | BadRecord]:
        yield Record("a", (Turn("user", "<image>?"), Turn("assistant", "a")))


class ReadsOnce(Lines):
    """A second reading gives nothing"""

    def __init__(self, settings: NoSettings) -> None:
        super().__init__(settings)
        self.items = Lines.records(self)

    def records(self) -> Iterator[Record | BadRecord]:
        return self.items


@dataclass(frozen=True)
class ShelfSettings:
    """Where the records are."""

    path: Path | None = setting(None, "The file")


class Shelf(DataSource[ShelfSettings]):
    """Records in a file of lines, which it writes too"""

    name = "shelf"
    Settings = ShelfSettings

    def validate(self, plan: object) -> Iterator[str]:
        return missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        file = required(self.settings, "path")
        return (from_object(content, lambda name: Image(file.parent / name)) for _, content in read_json_lines(file))

    def files(self) -> Sequence[Path]:
        return [required(self.settings, "path")]

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        name_of = ImageFiles(folder).name_of
        return write_json_lines(folder / "records.jsonl", (to_object(record, name_of) for record in records))


class ForgetsTheWeight(Shelf):
    """Every record weighs the same"""

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        return super().write((replace(record, weight=1.0) for record in records), folder)


class CountsItsWritings(Shelf):
    """It leaves a number behind"""

    numbers = itertools.count()

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        path = super().write(records, folder)
        (folder / "number.txt").write_text(str(next(cls.numbers)))
        return path


class NamesOtherFiles(Shelf):
    """It reads another file than it says"""

    def files(self) -> Sequence[Path]:
        return [Path("elsewhere.jsonl")]


class Keep(DataOperator[NoSettings]):
    """Everything stays"""

    name = "keep"

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        yield from records


class GivesTables(Keep):
    """Tables instead of records"""

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Any]:
        return (vars(record) for record in records)


class Mutates(Keep):
    """It writes into its records"""

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        for record in records:
            record.meta["seen"] = True
            yield record


class DropsSilently(Keep):
    """It drops every third record without a word"""

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        return (record for number, record in enumerate(records) if number % 3)


class Draws(Keep):
    """It draws without the seed"""

    numbers = itertools.count()

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        return (replace(record, group=str(next(self.numbers))) for record in records)


class GoesThroughTwice(Keep):
    """It counts first, and then there is nothing left"""

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        total = sum(1 for _ in records)
        return (replace(record, group=str(total)) for record in records)


class NamesNoSetting(Keep):
    """It asks for evaluators by a setting that it has not"""

    evaluators = "against"


@dataclass(frozen=True)
class AgainstSettings:
    against: dict[str, dict[str, Any]] = setting({}, "Evaluators with their settings")


class IgnoresTheQuestions(Keep):
    """It asks for evaluators, and does not look at what they ask"""

    Settings = AgainstSettings
    evaluators = "against"
