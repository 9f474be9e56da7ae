"""What Data-Juicer's operators make of rows: their numbers, whether they keep a row, and the texts that they change.

A row is plain JSON: `n`, its number; `turns`, the texts; `images`, each `[path]` or `[path, first byte, how many]`; `changed`, the
operators that changed a text; `dropped`, once an operator dropped it, and then nothing looks at it any more. Rows that an operator
made follow the row that they were made of, with the same `n` and `made`, a number from 1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .guard import NotAllowed, causes, import_data_juicer

Row = dict[str, Any]
IMAGE = "<image>"
CAPTION_QUESTION = "Describe the image."
"""What a caption answers where the operator has no `prompt`."""
STATS, META = "__dj__stats__", "__dj__meta__"
FATAL = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


def around_images(text: str) -> tuple[str, str, str]:
    """A text without the `<image>` at its ends, between what stands there: the part that an operator may change."""
    start, end = 0, len(text)
    while text[start:end].lstrip().startswith(IMAGE):
        start = text.index(IMAGE, start) + len(IMAGE)
    while text[start:end].rstrip().endswith(IMAGE):
        end = text.rindex(IMAGE, start, end)
    core = text[start:end].strip() if start or end < len(text) else text[start:end]
    if not core:
        return text, "", ""
    place = text.index(core, start)
    return text[:place], core, text[place + len(core) :]


def filter_text(turns: Sequence[str], marks: str = "") -> str:
    """The text of a whole row as filters see it: the turns, one a line, behind `marks`, and without `<image>`."""
    text = "\n".join(turn.replace(IMAGE, " ").strip() for turn in turns)
    return f"{marks} {text}" if marks else text


def plain(value: Any) -> Any:
    """A value of an operator's as JSON can say it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def deciding(stats: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the limits that a number exceeds; all of them where none does, as where a limit itself is excluded."""
    numbers = [number for value in stats.values() for number in _numbers(value)]
    broken = {
        name: limit
        for name, limit in limits.items()
        if isinstance(limit, int | float)
        and any(number < limit if name.startswith("min") else number > limit for number in numbers)
    }
    return broken or dict(limits)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


class Failed(Exception):
    """An operator raised on one row."""


class Judge:
    """A list of operators, applied to rows in turn. `steps` are the entries of a task."""

    def __init__(self, steps: Sequence[Mapping[str, Any]], seed: int, rank: int = 0) -> None:
        registry = import_data_juicer()
        from data_juicer.ops.base_op import Filter

        self.seed, self.rank = seed, rank
        self.steps = [(step, registry.modules[step["op"]](**step["params"])) for step in steps]
        self._filter_class = Filter

    def __call__(self, lines: str) -> str:
        """The rows of JSON lines as the operators leave them, as JSON lines."""
        rows = [json.loads(line) for line in lines.splitlines()]
        with Files() as files:
            for place, (step, operator) in enumerate(self.steps):
                alive = [row for row in rows if "dropped" not in row]
                if step["captions"]:
                    rows = self._caption(step, operator, rows, place, files)
                elif isinstance(operator, self._filter_class):
                    self._filter(step, operator, alive, files)
                else:
                    self._map(step, operator, alive)
        return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)

    def _filter(self, step: Mapping[str, Any], operator: Any, rows: list[Row], files: Files) -> None:
        """Drop the rows that a filter does not keep, each with its numbers."""

        def measure(batch: list[Row]) -> list[tuple[dict[str, Any], bool]]:
            images = [files.of(row) if step["images"] else [] for row in batch]
            texts = [
                filter_text(row["turns"], " ".join([_image_token()] * len(names)) if step["marks"] else "")
                for row, names in zip(batch, images, strict=True)
            ]
            samples: dict[str, Any] = {
                "text": texts,
                "images": images,
                STATS: [{} for _ in batch],
                META: [{} for _ in batch],
            }
            if not operator.is_batched_op():
                samples = {key: values[0] for key, values in samples.items()}
                found = operator.compute_stats_single(samples, **self._rank(operator))
                return [(plain(found[STATS]), bool(operator.process_single(found)))]
            samples = operator.compute_stats_batched(samples, **self._rank(operator))
            keep = list(operator.process_batched(samples))
            return [(plain(stats), bool(kept)) for stats, kept in zip(samples[STATS], keep, strict=True)]

        for row, outcome in self._each(operator, rows, measure, files):
            if isinstance(outcome, Failed):
                row["dropped"] = {"op": step["op"], "error": str(outcome)}
            elif not outcome[1]:
                stats = outcome[0]
                row["dropped"] = {"op": step["op"], "stats": stats, "limits": deciding(stats, step["limits"])}

    def _map(self, step: Mapping[str, Any], operator: Any, rows: list[Row]) -> None:
        """Change the texts of rows, turn by turn; a row of which a turn was lost is dropped."""
        parts = [(row, turn, *around_images(text)) for row in rows for turn, text in enumerate(row["turns"])]
        asked = [part for part in parts if part[3]]

        def change(batch: list[Any]) -> list[str]:
            if not operator.is_batched_op():
                return [operator.process_single({"text": batch[0][3], META: {}})["text"]]
            samples = {"text": [part[3] for part in batch], META: [{} for _ in batch]}
            texts = list(operator.process_batched(samples)["text"])
            if len(texts) != len(batch):
                raise RuntimeError(f"made {len(texts)} texts of {len(batch)}")
            return texts

        for (row, turn, before, text, after), outcome in self._each(operator, asked, change):
            why = str(outcome) if isinstance(outcome, Failed) else ""
            if not why and not outcome.strip():
                why = f"nothing is left of turn {turn + 1}, {text[:60]!r}"
            elif not why and outcome.count(IMAGE) != text.count(IMAGE):
                why = f"changed the '{IMAGE}' within turn {turn + 1}"
            if why:
                row.setdefault("dropped", {"op": step["op"], "error": why})
            elif outcome != text:
                row["turns"][turn] = before + outcome + after
                if step["op"] not in row["changed"]:
                    row["changed"].append(step["op"])

    def _caption(self, step: Mapping[str, Any], operator: Any, rows: list[Row], place: int, files: Files) -> list[Row]:
        """The rows with those that captions make, each behind the row whose images it is about."""
        keep, question = step["keeps"], step["params"].get("prompt") or CAPTION_QUESTION
        operator.keep_original_sample = False
        found: list[Row] = []
        for row in rows:
            found.append(row)
            if "dropped" in row or not row["images"]:
                continue
            self._seed(row, place)
            try:
                captions = self._captions(operator, filter_text(row["turns"]), files.of(row))
            except Exception as error:
                row["dropped"] = {"op": step["op"], "error": describe(error, files.written)}
                continue
            marks = "\n".join([IMAGE] * len(row["images"]))
            taken = sum(1 for other in rows if other["n"] == row["n"] and "made" in other)
            for number, caption in enumerate(captions, start=taken + 1):
                made = {"n": row["n"], "made": number, "images": row["images"], "changed": [], "op": step["op"]}
                found.append(made | {"turns": [f"{marks}\n{question}", caption]})
                if not caption:
                    found[-1]["dropped"] = {"op": step["op"], "error": "the caption is empty"}
            if not keep:
                why = "keep_original_sample is false: the caption stands in its place"
                row["dropped"] = {"op": step["op"], "error": why}
        return found

    def _captions(self, operator: Any, text: str, images: list[str]) -> list[str]:
        from data_juicer.utils.mm_utils import remove_special_tokens

        marked = f"{' '.join([_image_token()] * len(images))} {text}"
        samples = {"text": [marked], "images": [images], META: [{}]}
        made = operator.process_batched(samples, **self._rank(operator))["text"]
        return [" ".join(remove_special_tokens(caption).split()) for caption in made]

    def _seed(self, row: Row, place: int) -> None:
        """Make what is drawn for a row a function of the seed and the row alone."""
        import numpy as np
        import torch

        drawn = hashlib.sha256(f"{self.seed} {row['n']} {row.get('made', 0)} {place}".encode()).digest()
        number = int.from_bytes(drawn[:4], "big")
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    def _rank(self, operator: Any) -> dict[str, int]:
        return {"rank": self.rank} if operator.use_cuda() else {}

    def _each(
        self, operator: Any, items: list[Any], work: Callable[[list[Any]], list[Any]], files: Files | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Each item with its outcome; together where the operator can and none fails, one by one otherwise."""
        if operator.is_batched_op() and items:
            try:
                yield from zip(items, work(items), strict=True)
                return
            except Exception as error:
                raise_if_fatal(error)
        for item in items:
            try:
                (outcome,) = work([item])
            except Exception as error:
                outcome = Failed(describe(error, files.written if files else ()))
            yield item, outcome


class Files:
    """The files of images: those that lie within other files are written out, and removed in the end."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._known: dict[tuple[str, int, int], str] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def written(self) -> Collection[str]:
        """The files that were written out."""
        return self._known.values()

    def of(self, row: Row) -> list[str]:
        """The files of a row's images."""
        return [image[0] if len(image) == 1 else self._written(*image) for image in row["images"]]

    def _written(self, path: str, first: int, count: int) -> str:
        if (name := self._known.get((path, first, count))) is None:
            self._folder = self._folder or Path(tempfile.mkdtemp(prefix="images-"))
            with Path(path).open("rb") as file:
                file.seek(first)
                (written := self._folder / str(len(self._known))).write_bytes(file.read(count))
            name = self._known[path, first, count] = str(written)
        return name


def describe(error: BaseException, temporary: Collection[str] = ()) -> str:
    """An error in one line, the same in every run: without addresses and the names of `temporary` files.

    It is raised again where it is not about a row but about the machine.
    """
    raise_if_fatal(error)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))
    for name in temporary:
        text = text.replace(name, "its image")
    return f"{type(error).__name__}: {text[:300]}"


def raise_if_fatal(error: BaseException) -> None:
    """Raise an error that is none of a row's: no memory, no space on the disk, a package
    that is not there, or what the guard refused."""
    for cause in causes(error):
        if isinstance(cause, MemoryError | ImportError | NotAllowed) or getattr(cause, "errno", None) in FATAL:
            raise cause


def _image_token() -> str:
    from data_juicer.utils.mm_utils import SpecialTokens

    return str(SpecialTokens.image)


def limits_of(operator_class: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """What an operator's numbers are compared with: what its parameters and their defaults call least, most or threshold."""
    import inspect

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(operator_class.__init__).parameters.items()
        if parameter.default is not parameter.empty
    }
    return {
        name: value
        for name, value in {**defaults, **params}.items()
        if name.startswith(("min_", "max_")) or "threshold" in name
        if not isinstance(value, bool) and isinstance(value, int | float | str) and value != sys.maxsize
    }
