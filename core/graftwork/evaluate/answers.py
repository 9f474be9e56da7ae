"""An evaluation's answers: the file of them, which can be continued, and what a process sends of them to the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.checkpoint import format1
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.records import BadRecord, Record
from graftwork.contracts.score import Prediction

ANSWERS = "answers.jsonl"
"""The file of an evaluation's answers."""


class AnswerFile:
    """`answers.jsonl`: a header that says whose answers these are, lines of answers, and lines about each run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        """How each run answered, the first first: batch size, device, attention kernels that ran."""

    def begin(self, header: Mapping[str, Any], *, resume: bool, say: Callable[[str], None]) -> None:
        """Continue if the file has this header, else set it aside and start a new one; `say` gets a sentence on which.

        A file that holds the answers of more variants than asked for is continued with all of them. A line that an
        interruption left half-written is cut off.
        """
        new_header: dict[str, Any] = json.loads(json.dumps(header, default=str))
        content = self.path.read_bytes() if self.path.exists() else b""
        found, good = _entries(content)
        self.header = found[0] if found else {}
        fits = {**self.header, "variants": None} == {**new_header, "variants": None}
        if resume and fits and set(new_header["variants"]) <= set(self.header.get("variants", ())):
            self.runs = [entry["run"] for entry in found[1:] if "run" in entry]
            self.lines = [entry for entry in found[1:] if "run" not in entry]
            with self.path.open("r+b") as file:
                file.truncate(good)
            return
        if content:
            differing = [
                name for name in {**new_header, **self.header} if new_header.get(name) != self.header.get(name)
            ]
            why = f"differs in {', '.join(differing)} from this evaluation" if resume else "is of an earlier evaluation"
            aside = self._free_name()
            self.path.rename(aside)
            say(f"'{self.path}' {why}, so it was set aside as '{aside.name}'")
        self.header, self.lines, self.runs = new_header, [], []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.append([new_header])

    def _free_name(self) -> Path:
        number = 1
        while (name := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
            number += 1
        return name

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write entries that are safe once this returns, unless the machine itself stops."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of answers in a file, which stays as it is; empty where there is no such file."""
    found, _ = _entries(path.read_bytes() if path.exists() else b"")
    return [entry for entry in found[1:] if "run" not in entry]


def _entries(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole lines at the beginning of a file, and how many bytes they take."""
    entries, good = [], 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        entries.append(entry)
        good += len(line)
    return format1.read_answers(entries), good


@dataclass
class BatchResult:
    """What a process sends to the others after a batch."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] | None = None
    bad: list[BadRecord] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Make room for those of the next batch, in the same lists."""
        self.lines, self.run = [], None
        self.bad.clear()
        self.messages.clear()


def line_of(one: Prediction, asked: str) -> dict[str, Any]:
    """The line of an answer; `asked` is the digest of its question."""
    return {
        "id": one.record.id,
        "asked": asked,
        "group": one.group,
        "question": one.record.question,
        "reference": list(one.record.reference),
        "images": [str(image) for image in one.record.images],
        "answers": dict(one.answers),
        "scores": {variant: score.value for variant, score in one.scores.items()},
        "tokens": dict(one.tokens),
        "ended": dict(one.ended),
        "seconds": round(one.seconds, 4),
    }


def predictions(
    evaluator: Evaluator[Any],
    asked: Mapping[str, Record],
    lines: Sequence[Mapping[str, Any]],
    digest: Callable[[Record], str] | None = None,
) -> dict[str, Prediction]:
    """The answers that lines of the file hold, scored anew; those to a question that has changed since are left out.

    `digest` says what a question holds, images by content too. Files of before it was recorded are compared without, and so
    are answers that were just given.
    """
    done: dict[str, Prediction] = {}
    for line in lines:
        record = asked.get(line["id"])
        if (
            record
            and (line["question"], tuple(line["reference"])) == (record.question, record.reference)
            and (digest is None or line.get("asked", "") in ("", digest(record)))
        ):
            scores = {variant: evaluator.score(record, text) for variant, text in line["answers"].items()}
            # Files of before it was recorded: at the limit an answer may have ended, and mostly has not.
            shorter = {variant: count < evaluator.max_new_tokens for variant, count in line["tokens"].items()}
            ended = line.get("ended", shorter)
            done[record.id] = Prediction(record, line["answers"], scores, line["tokens"], line["seconds"], ended)
    return done


def describe_reuse(
    path: Path, asked: Mapping[str, Record], lines: Sequence[Mapping[str, Any]], done: Mapping[str, Prediction]
) -> str:
    """What becomes of the answers that a file holds already, as a sentence."""
    ids = {line["id"] for line in lines}
    sentence = f"'{path}' holds {len(ids)} answers already"
    if changed := sum(id in asked and id not in done for id in ids):
        sentence += f"; {changed} of their questions have another text, image or reference now, and are asked again"
    else:
        sentence += "; they are not asked for again"
    if unknown := sum("asked" not in line for line in lines):
        sentence += f" (of {unknown} the images cannot be compared, as their Graftwork was older)"
    return sentence


def only(one: Prediction, variants: Sequence[str]) -> Prediction:
    """A prediction without the answers of other variants."""

    def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
        return {variant: values[variant] for variant in variants}

    tokens, ended = chosen(one.tokens), chosen(one.ended)
    return Prediction(one.record, chosen(one.answers), chosen(one.scores), tokens, one.seconds, ended)
