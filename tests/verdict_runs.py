"""Small runs that are sound, and runs that each have one planted fault, by which the verdict is measured.

As a program: `python tests/verdict_runs.py FOLDER` trains those that FOLDER does not hold yet, and prints the table.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_runs import COMPONENTS, LORA, METHODS, drawn, plan_of

from graftwork import NoSettings
from graftwork.build import compose
from graftwork.contracts import (
    IGNORED,
    Assembly,
    BadRecord,
    Batch,
    DataOperator,
    DataSource,
    DictLookup,
    Image,
    MemoryStrategy,
    Record,
    Stepper,
    TrainSettings,
    Turn,
    setting,
)
from graftwork.errors import DataError
from graftwork.train.loop import train

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo-base" / "base"
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = ("red", "blue", "gray", "teal", "black")
KINDS = ("circle", "square")


@dataclass(frozen=True)
class CountSettings:
    count: int = setting(100, "How many records", minimum=1)


class Captions(DataSource[CountSettings]):
    """Drawn shapes, described in one to twelve words: answers of very different lengths"""

    name = "captions"
    Settings = CountSettings

    def records(self) -> Iterator[Record]:
        chance = random.Random(7)
        for index in range(self.settings.count):
            colour = chance.choice(COLOURS)
            parts = [f"a {colour} {KINDS[index % 2]}"]
            parts += [f"a {chance.choice(COLOURS)} {chance.choice(KINDS)}" for _ in range(chance.choice((0, 0, 1, 3)))]
            asked = "<image>\ndescribe " + ("the shape" if len(parts) == 1 else f"the {NUMBERS[len(parts)]} shapes")
            turns = (Turn("user", asked), Turn("assistant", " and ".join(parts)))
            yield Record(f"captions/{index}", turns, (Image(data=drawn(index, colour)),), where=f"captions:{index}")


class Sums(DataSource[CountSettings]):
    """Sums of two digits in words, without images"""

    name = "sums"
    Settings = CountSettings

    def records(self) -> Iterator[Record]:
        for index in range(self.settings.count):
            a, b = index * 7 % 10, index * 3 // 10 % 10
            asked = f"what is {NUMBERS[a]} plus {NUMBERS[b]}?"
            yield Record(f"sums/{index}", (Turn("user", asked), Turn("assistant", f"{a + b}")), where=f"sums:{index}")


# Faults of the data ----------------------------------------------------------------------------------------------------


class OneAnswer(DataOperator[NoSettings]):
    """Every record gets the answer of the first"""

    name = "one-answer"

    def apply(self, records: Iterable[Record], *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        first = ""
        for record in records:
            first = first or record.turns[-1].text
            yield replace(record, turns=(*record.turns[:-1], Turn("assistant", first)))


class OneQuestion(DataOperator[NoSettings]):
    """Every record gets the question and the image of the first, so that one answer is all that can be learned"""

    name = "one-question"

    def apply(self, records: Iterable[Record], *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        first = None
        for record in records:
            first = first or record
            yield replace(record, turns=(*first.turns[:-1], record.turns[-1]), images=first.images)


class OneRecord(DataOperator[NoSettings]):
    """Every record is the first"""

    name = "one-record"

    def apply(self, records: Iterable[Record], *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        first = None
        for number, record in enumerate(records):
            first = first or record
            yield replace(first, id=f"{first.id}/{number}")


# Faults of the computation ----------------------------------------------------------------------------------------------


class ConstantLoss(MemoryStrategy[NoSettings]):
    """The loss is the same whatever the model says"""

    name = "constant-loss"

    def prepare(self, assembly: Assembly) -> None:
        assembly.cross_entropy = lambda model, hidden, labels: hidden.sum() * 0 + 2.0 * len(labels)


class Detached(MemoryStrategy[NoSettings]):
    """The adapter is cut off: nothing that is trained reaches the loss"""

    name = "detached"

    def prepare(self, assembly: Assembly) -> None:
        whole = assembly.cross_entropy
        assembly.cross_entropy = lambda model, hidden, labels: whole(model, hidden.detach(), labels)


class Unoptimized(MemoryStrategy[NoSettings]):
    """Gradients are computed, and the optimizer has other tensors than the model"""

    name = "unoptimized"

    def optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
        copies = [
            {**group, "params": [torch.zeros_like(p, requires_grad=True) for p in group["params"]]} for group in groups
        ]
        return torch.optim.AdamW(copies, lr=settings.learning_rate)


class MaskedLabels(MemoryStrategy[NoSettings]):
    """The processor masks every label"""

    name = "masked-labels"

    def prepare(self, assembly: Assembly) -> None:
        encode = assembly.processor.encode

        def masked(record: Record) -> Any:
            encoded = encode(record)
            return replace(encoded, labels=[IGNORED] * len(encoded.labels))

        assembly.processor.encode = masked  # type: ignore[method-assign]


class GrowingGradients(MemoryStrategy[NoSettings]):
    """Gradients are multiplied by more and more"""

    name = "growing-gradients"

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper:
        class Growing(Stepper):
            factor = 1.0

            def accumulate(self, batch: Batch, num_label_tokens: float, *, last: bool = True) -> torch.Tensor:
                loss = super().accumulate(batch, num_label_tokens, last=last)
                if last:
                    self.factor *= 1.5
                    for parameter in self.parameters.values():
                        if parameter.grad is not None:
                            parameter.grad *= self.factor
                return loss

        return Growing(assembly, settings)


LOOKUP = DictLookup(
    *COMPONENTS,
    *(Captions, Sums, OneAnswer, OneQuestion, OneRecord),
    *(ConstantLoss, Detached, Unoptimized, MaskedLabels, GrowingGradients),
)

# The runs ---------------------------------------------------------------------------------------------------------------

HEALTHY = "healthy"
DEMO_LORA = LORA | {"rank": 16, "alpha": 32.0}
DATA: dict[str, tuple[bool, dict[str, Any]]] = {
    "easy-vqa": (True, {"use": "easy-vqa", "split": "train", "kind": "open"}),
    "easy-vqa-all": (True, {"use": "easy-vqa", "split": "train"}),
    "shapes": (False, {"use": "shapes"}),
    "captions": (False, {"use": "captions"}),
    "sums": (False, {"use": "sums"}),
}
"""Each data set: whether it is learned by the tiny MGM-Gemma or by a random one, and its source."""
RATES = {"lora": 1e-2, "dora": 1e-2, "rslora": 1e-2, "full": 3e-3, "ia3": 3e-1}
FAULTS: dict[str, dict[str, Any]] = {
    "fp16 overflow": {"train.precision": "fp16", "train.force_precision": True, "scaled": "mlp."},
    "rate 100 times too high": {"rate": 100.0},
    "rate 100 times too low": {"rate": 0.01},
    "rate zero": {"rate": 0.0},
    "constant loss": {"memory": {"use": ["constant-loss"]}, "train.allow_unreached": ["*"]},
    "detached adapter": {"memory": {"use": ["detached"]}, "train.allow_unreached": ["*"]},
    "adapter not optimized": {"memory": {"use": ["unoptimized"]}},
    "all labels masked": {"memory": {"use": ["masked-labels"]}},
    "growing gradients": {"memory": {"use": ["growing-gradients"]}},
    "exploding activations": {"scaled": "model.norm.weight"},
    "one answer in the data": {"data.operator": [{"use": "one-answer"}]},
    "one answer for one question": {"data.operator": [{"use": "one-question"}]},
    "data of one record": {"data.operator": [{"use": "one-record"}]},
}
SCALED = {"mlp.": lambda tensor: tensor * 100.0, "model.norm.weight": lambda tensor: tensor + 1e4}
"""Part of a tensor's name, and what makes of the base's weights ones that overflow or explode."""
HEALTHY_RUNS, RUNS_OF_A_FAULT = 100, 8
HELD_OUT = 1000
"""The first seed of the half that is held out."""
REFUSED = "refused"
TABLE = "how the verdict judged"
"""The property of a test's report that holds the table."""


@dataclass(frozen=True)
class Case:
    """One run."""

    kind: str
    seed: int
    demo: bool
    """Whether it starts from the tiny MGM-Gemma, and not from a random one."""
    changes: dict[str, Any]
    scaled: str = ""

    @property
    def held_out(self) -> bool:
        """Whether no run of its seed was looked at while the rules were made."""
        return self.seed >= HELD_OUT


def case(kind: str, seed: int) -> Case:
    """A run of a kind; everything else about it is drawn by the seed."""
    chance = random.Random(str(seed) if kind == HEALTHY else f"{kind} {seed}")
    demo, source = DATA[chance.choice(list(DATA))]
    method = "lora" if demo else chance.choice(list(RATES))
    rate = chance.choice((1e-3, 3e-3)) if demo else RATES[method]
    batch = chance.choice((2, 4, 8, 12))
    fault = dict(FAULTS.get(kind, {}))
    scaled, factor = fault.pop("scaled", ""), fault.pop("rate", 1.0)
    changes: dict[str, Any] = {
        "seed": seed,
        "peft": DEMO_LORA if demo else METHODS[method],
        "data.source": [source | {"limit" if demo else "count": chance.choice((32, 64, 100, 300))}],
        "train.steps": chance.choice((24, 40, 80) if batch < 8 else (24, 40)),
        "train.batch_size": batch,
        "train.group_by_length": chance.random() < 0.5,
        "train.schedule": chance.choice(("cosine", "linear", "constant")),
        "train.learning_rate": rate * factor,
    }
    return Case(kind, seed, demo, changes | fault, scaled)


def cases() -> Iterator[Case]:
    """All runs."""
    for kind, runs in {HEALTHY: HEALTHY_RUNS, **dict.fromkeys(FAULTS, RUNS_OF_A_FAULT)}.items():
        yield from (case(kind, start + number) for start in (0, HELD_OUT) for number in range(runs // 2))


def verdict_on(case: Case, base: Path, folder: Path) -> tuple[str, str]:
    """How a run ended, trained in an empty folder, and what was said of it; `base` holds the weights of a random model."""
    start = DEMO if case.demo else base
    if case.scaled:
        start = scaled_base(start, folder / "base", case.scaled)
    try:
        outcome = train(plan_of(start, folder, case.changes, LOOKUP), LOOKUP, folder / "out", device="cpu")
    except DataError as error:
        return REFUSED, str(error)
    return outcome.verdict.failure or HEALTHY, outcome.verdict.sentence()


def scaled_base(base: Path, folder: Path, part: str) -> Path:
    """A copy of a base whose weights of some name are changed as `SCALED` says."""
    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: SCALED[part](t) if part in name else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def campaign(folder: Path) -> list[tuple[Case, str, str]]:
    """Every run with how it ended and what was said; those that `folder` holds, of this state of the code, are not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (base := folder / "base").exists():
        with TemporaryDirectory(dir=folder) as unfinished:
            assembly = compose.build(plan_of(None, folder, {"peft": None}), LOOKUP, device="cpu")
            assembly.architecture.write(assembly, Path(unfinished))
            shutil.copytree(unfinished, base)
    state, found = digest(), []
    for one in cases():
        file = folder / f"{one.kind} {one.seed}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if known.get("state") != state:
            with TemporaryDirectory(dir=folder) as work:
                ended, said = verdict_on(one, base, Path(work))
            known = {"state": state, "ended": ended, "said": said}
            file.write_text(json.dumps(known), encoding="utf-8")
        found.append((one, known["ended"], known["said"]))
    return found


def digest() -> str:
    """What identifies the code that decides on a verdict."""
    files = [Path(__file__), *sorted((ROOT / "core" / "graftwork" / "train").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def table(found: Iterable[tuple[Case, str, str]]) -> list[str]:
    """Lines of Markdown: for each kind of run, how many ended how, and in parentheses how many of these were held out."""
    ends = (HEALTHY, "did not learn", "broke", REFUSED)
    counts: dict[str, Counter[tuple[str, bool]]] = {}
    for one, ended, _ in found:
        for kind in (one.kind, *(["all planted failures"] if one.kind != HEALTHY else [])):
            counts.setdefault(kind, Counter())[ended, one.held_out] += 1
    totals = counts.pop("all planted failures")
    lines = [
        "| kind | runs | called healthy | did not learn | broke | refused |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, count in [*counts.items(), ("all planted failures", totals)]:
        cells = [f"{count[end, True] + count[end, False]} ({count[end, True]})" for end in ends]
        held_out = sum(count[end, True] for end in ends)
        lines.append(f"| {' | '.join([kind, f'{count.total()} ({held_out})', *cells])} |")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = campaign(Path(sys.argv[1]))
    for one, ended, said in results:
        if (one.kind == HEALTHY) != (ended == HEALTHY):
            sys.stdout.write(f"{one.kind} {one.seed}: {said}\n")
    sys.stdout.write("\n".join(table(results)) + "\n")
