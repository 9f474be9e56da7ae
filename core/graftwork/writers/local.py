"""A model on this machine as a writer: greedy answers, so that the same prompt gets the same reply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftwork.contracts.records import Record
from graftwork.contracts.writer import Reply
from graftwork.data.digest import image_hash
from graftwork.errors import DataError
from graftwork.evaluate.evaluation import Prompt, image_features
from graftwork.evaluate.generation import answer, encode_prompt
from graftwork.writers.replies import Arrived, Keep

if TYPE_CHECKING:
    from graftwork.contracts.assembly import Assembly

BATCHES = 8
"""How many batches are handed over at a time."""


class ModelSource:
    """A model, with its adapter or without; it is built when something is asked of it that is not known."""

    form = 1

    def __init__(
        self, build: Callable[[], Assembly], identity: Mapping[str, Any], *, base: bool = False, batch_size: int
    ) -> None:
        self.identity, self.window = identity, batch_size * BATCHES
        self._build, self._base, self._batch_size = build, base, batch_size
        self._hash_of = image_hash()

    @cached_property
    def assembly(self) -> Assembly:
        """The model."""
        return self._build()

    def request(self, prompt: Record, max_new_tokens: int) -> Mapping[str, Any]:
        """The turns, the hashes of the images and the limit of tokens."""
        turns = [[turn.role, turn.text] for turn in prompt.turns]
        return {"turns": turns, "images": list(map(self._hash_of, prompt.images)), "max_new_tokens": max_new_tokens}

    def ask(
        self, requests: Sequence[tuple[Record, Mapping[str, Any]]], keep: Keep, known: Collection[int] = ()
    ) -> None:
        """Keep, batch by batch, the text of each reply, how many tokens it was made of, and whether it ended by itself."""
        waiting: list[tuple[int, Prompt]] = []
        for number, (prompt, request) in enumerate(requests):
            try:
                encoded = encode_prompt(self.assembly, prompt, request["max_new_tokens"])
            except DataError as error:
                keep([(number, {"fault": error.sentence})])
                continue
            waiting.append((number, (prompt, encoded)))
            if len(waiting) == self._batch_size:
                keep(self._replies(waiting, request["max_new_tokens"]))
                waiting = []
        if waiting:
            keep(self._replies(waiting, requests[0][1]["max_new_tokens"]))

    def _replies(self, waiting: Sequence[tuple[int, Prompt]], max_new_tokens: int) -> Arrived:
        import torch

        prompts = [prompt for _, prompt in waiting]
        encoded = [one for _, one in prompts]
        try:
            with self.assembly.disable_adapter() if self._base else nullcontext():
                features = image_features(self.assembly, prompts)
                given = answer(self.assembly, encoded, max_new_tokens=max_new_tokens, features=features)
        except torch.OutOfMemoryError:
            raise DataError(
                f"the device's memory does not hold {len(waiting)} prompts at a time; make the writer's batch_size smaller"
            ) from None
        replies = zip(given.texts, given.ended, given.tokens, encoded, strict=True)
        return [
            (number, {"text": text, "ended": ended, "tokens": [len(prompt.input_ids), written]})
            for (number, _), (text, ended, written, prompt) in zip(waiting, replies, strict=True)
        ]

    def read(self, raw: Mapping[str, Any]) -> Reply:
        """The text of a reply."""
        return Reply(raw["text"], ended=raw["ended"])

    def usage(self, raw: Mapping[str, Any]) -> tuple[int, int]:
        """How many tokens the prompt had, and the reply."""
        read, written = raw["tokens"]
        return read, written
