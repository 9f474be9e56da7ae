"""What tests of data formats share: an image, messages, and what a file or a line is read as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import drawn

from graftwork.contracts import BadRecord, DataSource, Record
from graftwork.errors import DataError

PNG = drawn(1, "red")
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
FRAMES = "save frames of them as images, such as by 'ffmpeg -i x.mp4 -vf fps=1 frames/%04d.jpg', and give these"
NO_TOOLS = "calls of tools are not learned here; leave such records out"
GOOD = {"messages": [QUESTION, ANSWER]}


def read(source: type[DataSource[Any]], path: Path, **settings: Any) -> list[Record | BadRecord]:
    return list(source(source.Settings(path=path, **settings)).records())


def read_line(source: type[DataSource[Any]], folder: Path, content: object, **settings: Any) -> Record | BadRecord:
    """What a line of a file is read as, in a folder with an image `x.png`."""
    (folder / "x.png").write_bytes(PNG)
    path = folder / "data.jsonl"
    path.write_text(json.dumps(content))
    [item] = read(source, path, **settings)
    return item


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def messages(*contents: Any, **rest: Any) -> dict[str, Any]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": each} for n, each in enumerate(contents)], **rest}


def asked(*parts: Any, **rest: Any) -> dict[str, Any]:
    return messages(list(parts), "A", **rest)
