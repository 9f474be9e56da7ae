"""A model's own chat template: a record as the text that it writes, and where in it the answers are."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from graftwork.contracts import Record, Turn
from graftwork.errors import DataError

PLACE = re.compile(r"[ \n]*<image>[ \n]*")
"""An image in a text. What space is around it is the template's business."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Written:
    """A conversation as the template writes it."""

    text: str
    answers: tuple[Span, ...] = ()
    """Where in the text the answers are that carry loss, each with the token that ends it."""


class Template:
    """What writes conversations."""

    def __init__(self, tokenizer: Any, template: Any, stops: Sequence[str], place: str) -> None:
        """`place` is what stands for a whole image in the text, and `stops` are the tokens that end an answer."""
        self.tokenizer, self.template, self.stops, self.place = tokenizer, template, stops, place
        # A template that does not write the first token leaves it to the tokenizer, as LLaVA-1.5's does.
        whole, (plain, *_) = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
        self.first = "".join(tokenizer.convert_ids_to_tokens(whole[: whole.index(plain)]))

    def render(self, record: Record, count: int, prompt: bool) -> str:
        """The first `count` turns as the template writes them, and with `prompt` what asks for an answer; DataError where it does not take
        them."""
        try:
            (text,) = self._rendered([[message_of(turn) for turn in record.turns[:count]]], prompt)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"record '{record.id}' does not fit the model's chat template ({error}); change its turns"
            ) from None
        return text

    def _rendered(self, conversations: Sequence[Sequence[dict[str, Any]]], prompt: bool) -> list[str]:
        """Each of the conversations, together: most of what it costs to write one is the same for all."""
        texts = self.tokenizer.apply_chat_template(
            conversations, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )
        return [text if text.startswith(self.first) else self.first + text for text in texts]

    @cached_property
    def rewrites(self) -> bool:
        """Whether the template writes an answer otherwise once another follows it."""
        for thought in ("", "<think>\n1\n</think>\n\n"):
            said = [("user", "A?"), ("assistant", f"{thought}B"), ("user", "C?"), ("assistant", "D")]
            record = Record("", tuple(Turn(role, text) for role, text in said))  # type: ignore[arg-type]
            try:
                whole, first = (self.render(record, count, prompt=False) for count in (4, 2))
            except DataError:
                continue  # It takes no such conversation, and says so where a record is one.
            if not whole.startswith(first.rstrip()):
                return True
        return False

    def written(self, record: Record) -> Written:
        """The conversation as text. Turn by turn, so that no marker has to say where answers are."""
        asks = record.turns[-1].role == "user"
        drafts = Drafts(self, record, asks)
        whole = drafts.text(len(record.turns), prompt=asks)
        self._check(record, whole)
        text, done, answers = "", 0, list[Span]()
        for number, turn in enumerate(record.turns):
            if turn.role != "assistant":
                continue
            head = drafts.text(number, prompt=True)
            until = len(whole) if number + 1 == len(record.turns) else self._end(drafts, number + 1, whole)
            if not whole.startswith(head) or until < len(head):
                if turn.trained is False or asks:
                    continue
                raise DataError(
                    f"the chat template writes answers in the middle of record '{record.id}' otherwise than as answers; a record can "
                    "train the last one only: make one for each answer, as a run does"
                )
            at = len(head)
            for piece in filter(None, (piece.strip() for piece in PLACE.split(turn.text))):
                at = whole.index(piece, at) + len(piece)
            place, stop = min(
                ((found, stop) for stop in self.stops if (found := whole.find(stop, at, until)) >= 0), default=(-1, "")
            )
            begin = len(text) + len(head) - done
            if stop:
                text, done = text + whole[done : place + len(stop)], place + len(stop)
            else:  # the template never ends an answer
                text, done = text + whole[done:at] + str(self.tokenizer.eos_token), at
            if turn.trained is not False and not asks:
                answers.append((begin, len(text)))
        return Written(text + whole[done:], tuple(answers))

    def _end(self, drafts: Drafts, count: int, whole: str) -> int:
        """Where the first `count` turns end in the whole text; -1 where the template writes them otherwise there."""
        text = drafts.text(count, prompt=False)
        return len(text) if whole.startswith(text) else -1

    def _check(self, record: Record, whole: str) -> None:
        """DataError where the template leaves out a turn or an image."""
        kept = [
            turn for turn in record.turns if not (self.rewrites and turn.trained is False)
        ]  # what a model thought is left out of earlier answers
        lost = [piece for turn in kept for piece in PLACE.split(turn.text) if piece.strip() not in whole]
        if lost or whole.count(self.place) != len(record.images):
            what = f"'{lost[0][:40]}'" if lost else "an image"
            raise DataError(f"the model's chat template leaves out {what} of record '{record.id}'; change its turns")


class Drafts:
    """A record as the template writes its first turns: all that is asked for of it, written together."""

    def __init__(self, template: Template, record: Record, asks: bool) -> None:
        self.template, self.record = template, record
        self.known: dict[tuple[int, bool], str] = {}
        messages, total = [message_of(turn) for turn in record.turns], len(record.turns)
        answers = [number for number, turn in enumerate(record.turns) if turn.role == "assistant"]
        ends = [total] + [number + 1 for number in answers if number + 1 < total]
        for prompt, counts in ((True, answers + [total] * asks), (False, ends[asks:])):
            try:
                texts = template._rendered([messages[:count] for count in counts], prompt) if counts else []
            except (TemplateError, TypeError):
                continue  # Said of the first that it does not take, when that is asked for.
            self.known |= {(count, prompt): text for count, text in zip(counts, texts, strict=True)}

    def text(self, count: int, *, prompt: bool) -> str:
        """The first `count` turns (see `Template.render`)."""
        found = self.known.get((count, prompt))
        return self.template.render(self.record, count, prompt) if found is None else found


def check(record: Record, controls: Collection[str]) -> None:
    """DataError for a record that no template can write, or with one of the `controls` in its text."""
    roles = [turn.role for turn in record.turns]
    turns = roles[roles[:1] == ["system"] :]
    if not turns or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
        raise DataError(
            f"in record '{record.id}' user and assistant do not take turns; correct the record or leave it out"
        )
    if (found := sum(turn.text.count("<image>") for turn in record.turns)) != len(record.images):
        raise DataError(
            f"record '{record.id}' has {len(record.images)} images and '<image>' {found} times; make them agree"
        )
    for turn in record.turns:
        plain = turn.text.replace("<image>", "")
        if control := next((control for control in controls if control in plain), None):
            raise DataError(
                f"record '{record.id}' has '{control}' in its text, which means something to the model; remove it"
            )


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates take one."""
    content: list[dict[str, str]] = []
    for number, piece in enumerate(PLACE.split(turn.text)):
        content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return {"role": turn.role, "content": content}
