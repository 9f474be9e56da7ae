"""Who writes for data operators: a model, a checkpoint or an endpoint, lent by core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from graftwork.contracts.records import Record


@dataclass(frozen=True)
class Reply:
    """What a writer wrote."""

    text: str
    """Without the space around it; empty where `fault` says why."""
    fault: str = ""
    """Why there is no text, as a clause, such as that an endpoint answered 500."""
    ended: bool = True
    """Whether it ended by itself, and not at the limit of its tokens."""


class Writer(Protocol):
    """What writes text about images. Core keeps every prompt and raw reply, and asks nothing twice."""

    def answer(self, prompts: Iterable[Record], *, max_new_tokens: int) -> Iterator[tuple[Record, Reply]]:
        """Each prompt, in its order, with the reply to its last user turn.

        A prompt has the id of the record that the reply is for, which leads to it afterwards. An answer at its end is not shown. Raises
        DataError where the writer cannot go on at all.
        """
        ...
