"""The card of a data set: what is in it, where it is from, who made it, how it was verified, and what it must not be used for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.report.markdown import escape, table

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""Up to how many records a size has which name on the Hugging Face hub."""
LARGER = "n>1M"
MAX_GROUPS = 30
"""How many groups are named."""


@dataclass(frozen=True)
class CardSource:
    """Where records come from."""

    name: str
    settings: Mapping[str, Any]
    license: str | None
    read: int
    dropped: int
    of: Sequence[CardSource] = ()
    """The sources of the data set that it is, if it is one."""


@dataclass(frozen=True)
class CardWriting:
    """Who wrote for a data set, and how that was verified."""

    data_set: str
    writer: Mapping[str, Any] | None
    verification: Mapping[str, Any] | None
    prompts: Mapping[str, Sequence[str]]
    """By operator, one of the prompts that it has sent: a line for each turn."""


@dataclass(frozen=True)
class DataCard:
    """What a card says; counts are of the records that are in the data set."""

    title: str
    description: str
    license: str | None
    records: int
    images: int
    copied: bool
    """Whether all images lie in the data set."""
    groups: Mapping[str, int]
    made_by: Mapping[str, int]
    """How many records which operator made."""
    sources: Sequence[CardSource]
    stages: Sequence[Mapping[str, Any]]
    written: Sequence[CardWriting] = ()
    """Of it, and of the data sets that it was read from."""
    checked_against: Sequence[str] = ()
    """The test sets that it was searched for."""
    not_for: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    """Of its manifest."""


def render_card(card: DataCard) -> str:
    """The card as Markdown, with what the Hugging Face hub reads at its head."""
    return _head(card) + "\n\n".join(filter(None, _blocks(card))) + "\n"


def _head(card: DataCard) -> str:
    size = next((name for limit, name in SIZES if card.records < limit), LARGER)
    facts = {"pretty_name": card.title, "size_categories": [size]}
    if card.license:
        facts = {"license": card.license, **facts}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()]  # JSON is YAML.
    return "\n".join(["---", *lines, "---", "", ""])


def _blocks(card: DataCard) -> Iterator[str]:
    yield f"# {escape(card.title)}"
    yield escape(card.description)
    yield "## What is in it"
    made = sum(card.made_by.values())
    yield (
        f"{card.records:,} records about {card.images:,} images; a model wrote {made:,} of them, and {card.records - made:,} are as their "
        "source gave them or as an operator changed them. "
        + ("All images are in `images/`." if card.copied else "Images are not in it: it names where they lay.")
    )
    if set(card.groups) - {""}:
        rows = [(name or "(none)", f"{count:,}") for name, count in [*card.groups.items()][:MAX_GROUPS]]
        left = len(card.groups) - MAX_GROUPS
        yield table(("group", "records"), rows + [(f"… and {left:,} more", "")] * (left > 0))
    yield "## Where it is from"
    yield table(("source", "where", "licence", "read", "left out"), _source_rows(card.sources))
    yield "## What was done"
    keys = ("name", "read", "made", "changed", "dropped", "kept")
    yield table(keys, [[f"{stage[key]:,}" if key != "name" else stage[key] for key in keys] for stage in card.stages])
    if card.made_by:
        yield "## What a model wrote"
        yield table(("operator", "records"), [(name, f"{count:,}") for name, count in card.made_by.items()])
    for each in card.written:
        yield from _writing(each)
    yield "## What it must not be used for"
    yield "\n".join(f"- {escape(sentence)}" for sentence in [*card.not_for, *_follows(card)])
    yield "## Versions"
    yield escape(", ".join(f"{name} {version}" for name, version in card.versions.items()))
    yield f"SHA-256 of its manifest, which holds those of its files: `{card.sha256}`"


def _source_rows(sources: Sequence[CardSource], depth: int = 0) -> Iterator[tuple[str, ...]]:
    for source in sources:
        known = {name: value for name, value in source.settings.items() if value not in (None, "", [], {})}
        where = ", ".join(f"{name} {_public(value)}" for name, value in known.items())
        name = "of it: " * depth + source.name
        yield name, where, source.license or "not given", f"{source.read:,}", f"{source.dropped:,}"
        yield from _source_rows(source.of, depth + 1)


def _public(value: Any) -> str:
    """A setting without the folders of somebody's machine."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_public(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_public, value))
    path = Path(str(value))
    return path.name if path.is_absolute() else str(value)


def _writing(written: CardWriting) -> Iterator[str]:
    if written.writer:
        yield f"### The writer of {escape(written.data_set)}"
        yield _json(written.writer)
    for name, prompt in written.prompts.items():
        yield f"One of the prompts of {escape(name)}:"
        yield _quoted(prompt)
    found = written.verification
    if found is None:
        return
    yield f"### How {escape(written.data_set)} was verified"
    own = "the writer itself, asked in another way" if found["by_itself"] else "another writer"
    yield (
        f"By {escape(found['use'])}: {own} was asked whether each answer is right, and, as a control, whether answers are right that are "
        "not. Where it called too many of these right, nothing of the group was kept."
    )
    yield _json(found["writer"])
    headers = ("group", "asked", "called right", "control", "called right", "kept", "")
    yield table(
        headers,
        [
            [
                group["group"] or "(none)",
                *(f"{group[key]:,}" for key in ("records", "affirmed", "control", "control_affirmed", "kept")),
                group["why"],
            ]
            for group in found["groups"]
        ],
    )


def _follows(card: DataCard) -> Iterator[str]:
    """What it must not be used for, by how it was made."""
    if card.checked_against:
        yield f"As a test set. It was searched for the questions and images of {', '.join(card.checked_against)}, and for no others."
    else:
        yield "As a test set, or to claim results on one: it was searched for no test set's questions or images."
    if card.made_by:
        yield "As what people said or saw: a model wrote answers in it."
        yield "To judge the models that wrote or verified it, or models trained from them."
    if lacking := sorted(set(_without_licence(card.sources))):
        yield f"To be given away before somebody has looked at the licence of {', '.join(lacking)}: none is given."


def _without_licence(sources: Sequence[CardSource]) -> Iterator[str]:
    """The names of sources for which nobody gives a licence, neither theirs nor that of the data set that they came by."""
    for source in sources:
        if not source.license:
            yield from _without_licence(source.of) if source.of else [source.name]


def _json(content: Any) -> str:
    return _quoted(json.dumps(content, ensure_ascii=False, indent=1).splitlines())


def _quoted(lines: Sequence[str]) -> str:
    """Lines as they are; none of them can end the block."""
    return "\n".join(f"    {line}" for text in lines for line in text.splitlines() or [""])
