"""The learning map in words: how many modules learned, how far those of a role moved, and what did not learn."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from graftwork.checkpoint.learning import WORDS, LearningMap, places


def percent(share: float) -> str:
    """A share in per cent with two digits that mean something."""
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def summary(learned: LearningMap) -> str:
    """How many of the trained modules learned, as a sentence."""
    number = sum(module.status == "learned" for module in learned.modules)
    moved = sorted(module.moved for module in learned.modules if module.status == "learned")
    by = f", half of them by {percent(median(moved))} of their size or more" if moved else ""
    return f"{number} of {len(learned.modules)} trained modules learned{by}."


def role_lines(learned: LearningMap) -> Iterator[tuple[str, str]]:
    """Each role of which something is trained, and what became of it."""
    for role in dict.fromkeys(module.role for module in learned.modules):
        modules = learned.of_role(role)
        moved = sorted(module.moved for module in modules if module.status == "learned")
        said = f"{len(moved)} of {len(modules)} moved"
        if moved:
            low, high = percent(moved[0]), percent(moved[-1])
            said += f", by {low}" if low == high else f", by {low} to {high}"
        yield role or "elsewhere", said


def findings(learned: LearningMap) -> Iterator[str]:
    """A sentence for whatever did not learn, whether that is allowed or not."""
    yield from (f"{fault[:1].upper()}{fault[1:]}." for fault in learned.faults())
    for status, words in WORDS.items():
        if found := [module for module in learned.not_learned(allowed=True) if module.status == status]:
            yield (
                f"{len(found)} of {len(learned.modules)} trained modules did not learn, as train.allow_unreached allows ({words}): "
                f"{places(found, learned.modules)}."
            )
    yield from (f"{clause}." for clause in learned.idle())
    if learned.since:
        yield f"Observed from step {learned.since + 1:,} on: the run began before there were learning maps."
