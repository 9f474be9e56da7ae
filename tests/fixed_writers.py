"""Writers whose replies are fixed by a function of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from zlib import crc32

from graftwork.contracts import Record, Reply


class FixedWriter:
    """Says what a function makes of each prompt, one after another, and remembers what it was asked."""

    def __init__(self, says: Callable[[Record], str | Reply]) -> None:
        self.says = says
        self.asked: list[Record] = []

    def answer(self, prompts: Iterable[Record], *, max_new_tokens: int) -> Iterator[tuple[Record, Reply]]:
        """Each prompt with its reply."""
        for prompt in prompts:
            self.asked.append(prompt)
            reply = self.says(prompt)
            yield prompt, reply if isinstance(reply, Reply) else Reply(reply)


def always(text: str) -> FixedWriter:
    """One that says the same to everything."""
    return FixedWriter(lambda prompt: text)


def at_random(share: float) -> FixedWriter:
    """One that affirms this share of what it is asked, whatever it is."""
    return FixedWriter(lambda prompt: _yes(crc32(f"{prompt.id} {prompt.question}".encode()) % 1000 < 1000 * share))


def by_word(*words: str) -> FixedWriter:
    """One that affirms whatever has one of these words, and never looks at the image."""
    return FixedWriter(lambda prompt: _yes(any(word in prompt.question for word in words)))


def by_image() -> FixedWriter:
    """One that affirms whatever it is asked about half of the images."""
    return FixedWriter(lambda prompt: _yes(crc32(str(prompt.images[0]).encode()) % 2 == 0))


def _yes(is_so: bool) -> str:
    return "Yes." if is_so else "No."
