"""What data operators ask of a writer: texts that are filled in, prompts about images, and whether a reply says yes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from graftwork.contracts.records import Record, Turn
from graftwork.data.answering import plain
from graftwork.data.conversations import PLACE

YES, NO = ("yes",), ("no",)


def fill(template: str, **values: str) -> str:
    """A text in which each `{name}` of these has its value, at once: braces within values stay as they are."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda found: values[found[1]], template)


def ask_about(record: Record, text: str, **changes: Any) -> Record:
    """A record about the same images in which the user says this text and nothing else is said, with fields changed."""
    asked = Turn("user", "\n".join([*[PLACE] * len(record.images), text]))
    return replace(record, turns=(asked,), **{"reference": (), "meta": {}, "unit": ""} | changes)


def affirms(reply: str, *, yes: Sequence[str] = YES, no: Sequence[str] = NO) -> bool | None:
    """Whether a reply begins with a word for yes or for no; None for neither, and where it also has a word for the other."""
    said = f" {plain(reply)} "
    words = {True: [f" {plain(word)} " for word in yes], False: [f" {plain(word)} " for word in no]}
    for meant in (True, False):
        if said.startswith(tuple(words[meant])):
            return None if any(word in said for word in words[not meant]) else meant
    return None


def mistakes_in_words(yes: Sequence[str], no: Sequence[str]) -> Iterator[str]:
    """What is wrong with the words for yes and for no, as clauses for `validate`."""
    said = [{plain(word) for word in words} for words in (yes, no)]
    if not all(said) or "" in said[0] | said[1]:
        yield "'yes' and 'no' need at least one word each; give those that the writer begins with"
    yield from (f"'{word}' is in 'yes' and in 'no'; leave it in one of them" for word in sorted(said[0] & said[1]))
