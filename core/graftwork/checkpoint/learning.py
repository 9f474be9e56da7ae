"""The learning map: of every module that a run trains, whether gradients reached it and how far it moved; `learning.json` in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from graftwork.errors import CheckpointError

FILE = "learning.json"
NAMED = 4
"""How many places are named in a sentence."""
Status = Literal["learned", "unreached", "no gradient", "unmoved"]
WORDS: Mapping[Status, str] = {
    "unreached": "no gradient gets there",
    "no gradient": "the gradient was exactly zero in every step",
    "unmoved": "gradients came, and the values stayed the same",
}
"""What it means that a module did not learn."""


@dataclass(frozen=True)
class ModuleLearning:
    """One module of the base that is trained, itself or by what a PEFT method added to it."""

    name: str
    role: str
    """Empty where it plays none."""
    row: str = ""
    """The row of blocks that it lies in, such as `language`; empty outside of all."""
    place: int = 0
    """The block's place in its row, from 0."""
    block: str = ""
    """The block's module."""
    values: int = 0
    """How many values are trained."""
    reached: bool = True
    """Whether the dry backward pass came to it."""
    steps: int = 0
    """The steps in which its gradient was not zero."""
    first: float = 0.0
    """The norm of its gradient, before clipping: the root mean square over the first steps."""
    last: float = 0.0
    """The same in the end, by a mean that forgets a tenth with each step."""
    moved: float = 0.0
    """How far its trained values are from where they began, relative to their size: ‖after - before‖ / max(‖before‖, ‖after‖)."""
    idle: tuple[str, ...] = ()
    """Its trained parameters whose gradient was zero in every step, or nothing but rounding, although others of it learned."""
    allowed: bool = False
    """Whether the run file allows that nothing reaches it."""

    @property
    def status(self) -> Status:
        """Whether it learned, and if not, how far it got."""
        if not self.steps:
            return "no gradient" if self.reached else "unreached"
        return "learned" if self.moved else "unmoved"


@dataclass(frozen=True)
class RoleShape:
    """Where a role of the model lies."""

    row: str = ""
    """The row of blocks that it has modules in; empty where it lies outside of all."""
    blocks: int = 0
    outside: bool = False
    """Whether it has modules outside of blocks."""


@dataclass(frozen=True)
class LearningMap:
    """What every trained module of a run learned, after a step."""

    steps: int
    """The steps that were observed; skipped ones do not count."""
    modules: tuple[ModuleLearning, ...]
    roles: Mapping[str, RoleShape] = field(default_factory=dict)
    """Every role of the model, the frozen ones too."""
    since: int = 0
    """The step from which on it was observed: not 0 where the run began before there were learning maps."""

    def of_role(self, role: str) -> list[ModuleLearning]:
        """The trained modules of a role."""
        return [module for module in self.modules if module.role == role]

    def not_learned(self, *, allowed: bool = False) -> list[ModuleLearning]:
        """The modules that did not learn: those of which the run file does not say that they need not, or only those."""
        return [module for module in self.modules if module.status != "learned" and module.allowed is allowed]

    def faults(self) -> Iterator[str]:
        """A clause for each way in which modules did not learn that should have; none before the first step."""
        if not self.steps:
            return
        for status, words in WORDS.items():
            if found := [module for module in self.not_learned() if module.status == status]:
                yield f"{len(found)} of {len(self.modules)} trained modules did not learn ({words}): {places(found, self.modules)}"

    def idle(self) -> Iterator[str]:
        """A clause on the parameters that cannot learn although others of the same module do; none where there are none."""
        if names := [name for module in self.modules for name in module.idle if module.status == "learned"]:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield (
                f"'{names[0]}'{others} cannot learn: the gradient is zero, or nothing but rounding, although other parameters of the same "
                "module learn"
            )


def to_json(learned: LearningMap) -> dict[str, Any]:
    """A map as plain data."""
    return {**dataclasses.asdict(learned), "modules": [plain(module) for module in learned.modules]}


def write(learned: LearningMap, folder: Path) -> None:
    """Write a map into the folder of a checkpoint."""
    (folder / FILE).write_text(json.dumps(to_json(learned), indent=1) + "\n", encoding="utf-8")


def plain(module: ModuleLearning) -> dict[str, Any]:
    """A module as a table without what is as usual, and with its status for readers."""
    usual = ModuleLearning("", "")
    table = {
        name: value
        for name, value in dataclasses.asdict(module).items()
        if value != getattr(usual, name, None) or name == "role"
    }
    return {**table, "status": module.status}


def read(folder: Path) -> LearningMap | None:
    """The map in the folder of a checkpoint; None where there is none, as in imports and in checkpoints that are older than maps."""
    from pydantic import TypeAdapter, ValidationError

    if not (folder / FILE).is_file():
        return None
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for module in content["modules"]:
            module.pop("status", None)
        return TypeAdapter(LearningMap).validate_json(json.dumps(content), strict=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError) as error:
        raise CheckpointError(
            f"'{folder / FILE}' is damaged ({str(error).splitlines()[0][:120]}); restore the checkpoint from a copy"
        ) from None


def pattern(entry: str) -> re.Pattern[str]:
    """What an entry of `train.allow_unreached` means besides a role: a module and all below it, in which `*` stands for anything and
    `6-23`, as a part between dots, for these numbers."""

    def part(text: str) -> str:
        if span := re.fullmatch(r"(\d{1,4})-(\d{1,4})", text):
            return f"(?:{'|'.join(map(str, range(int(span[1]), int(span[2]) + 1))) or '(?!)'})"
        return ".*".join(map(re.escape, text.split("*")))

    return re.compile(rf"{'[.]'.join(map(part, entry.split('.')))}([.].*)?")


def matches(entry: str, name: str, role: str) -> bool:
    """Whether an entry of `train.allow_unreached` names a module, by its role, a group of roles, its own name or a pattern."""
    return role == entry or role.startswith(f"{entry}.") or bool(pattern(entry).fullmatch(name))


def places(modules: Sequence[ModuleLearning], among: Sequence[ModuleLearning]) -> str:
    """Where modules lie, in as few names as say it, the first few of them."""
    names = short_names(modules, among)
    more = f" and {len(names) - NAMED} more places" if len(names) > NAMED + 1 else ""
    return ", ".join(names[:NAMED] if more else names) + more


def short_names(modules: Iterable[ModuleLearning], among: Iterable[ModuleLearning]) -> list[str]:
    """The shortest entries of `train.allow_unreached` that name these modules and no other trained ones: a role, a block or a run of
    blocks where all that is trained there is meant, else a module."""
    chosen, rest = list(modules), list(among)
    meant = {module.name for module in chosen}

    def whole(key: str) -> set[str]:
        return {
            value
            for value in {getattr(m, key) for m in chosen} - {""}
            if all(m.name in meant for m in rest if getattr(m, key) == value)
        }

    roles, names = whole("role"), list[str]()
    names += sorted(roles, key=[m.role for m in chosen].index)
    left = [module for module in chosen if module.role not in roles]
    blocks = whole("block")
    names += _runs(dict.fromkeys(module.block for module in left if module.block in blocks))
    return names + [module.name for module in left if module.block not in blocks]


def _runs(blocks: Collection[str]) -> Iterator[str]:
    """`layers.2`, `layers.3`, `layers.4` as `layers.2-4`."""

    def numbered(numbers: tuple[int, str]) -> tuple[str, int]:
        place, (parent, _, last) = numbers[0], numbers[1].rpartition(".")
        return (parent, int(last) - place) if last.isdecimal() else (numbers[1], 0)

    for (parent, _), found in groupby(enumerate(blocks), key=numbered):
        run = [block for _, block in found]
        first, last = run[0], run[-1].rpartition(".")[2]
        yield first if len(run) == 1 else f"{parent}.{first.rpartition('.')[2]}-{last}"
