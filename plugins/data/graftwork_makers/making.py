"""What all makers do: records pass, their images are asked about once, and every made or failed record is accounted for."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from graftwork.contracts import BadRecord, DataMaker, Record, Reply, Turn, Writer, image_key, setting
from graftwork.data import PLACE, HashTable, ask_about, hash64, text_key
from graftwork.errors import DataError

AT_A_TIME = 1000
"""How many records wait at most for replies about others."""
NO_TEXT = re.compile(
    rf"{PLACE}|<\|[^|\s]*\|>|</?(?i:s|eos|bos|pad|unk)>|(?i:<(start|end)_of_turn>|\[/?INST\])|[\x00-\x08\x0b-\x1f\x7f]"
    r"|(?i:^\s*(system|human|user|gpt|assistant)\s*:)|\b(SYSTEM|HUMAN|USER|ASSISTANT)\s*:",
    re.M,
)
"""What stands in no text of a turn: places of images, what marks turns in models' templates, and what moves a terminal's cursor."""
NAMED_BY: Mapping[str, str] = {
    "ask-templates": "templates",
    "answer-questions": "questions",
    "describe": "group",
    "question-answer": "group",
}
"""By a maker's name, the setting that says what the ids end in of what it makes."""
Phrasings = str | tuple[str, ...]


@dataclass(frozen=True)
class MakerSettings:
    """What is asked about."""

    also_answered: bool = setting(False, "Also ask about images whose records have answers")
    max_new_tokens: int = setting(64, "The longest reply, in tokens", minimum=1)


S = TypeVar("S", bound=MakerSettings)


@dataclass(frozen=True)
class Asking:
    """A record that is to be made, and what is asked for it."""

    made: Record
    """Without its answer."""
    prompts: Sequence[Record]


class Maker(DataMaker[S]):
    """Makes records of images; each distinct image is asked about once, by its first record."""

    @abstractmethod
    def askings(self, record: Record, seed: int) -> Sequence[Asking]:
        """What is to be made of a record."""

    @abstractmethod
    def judge(self, made: Record, replies: Sequence[Reply]) -> Record | BadRecord:
        """The record with its answer, of the replies to its prompts, or why there is none."""

    def wants(self, record: Record) -> bool:
        """Whether a record about images is asked about, if it is the first about these."""
        return self.settings.also_answered or not any(turn.role == "assistant" for turn in record.turns)

    def once_for(self, record: Record) -> str:
        """What is asked about once: the record's images."""
        return image_key(record)

    def texts(self) -> Iterable[tuple[str, str, str]]:
        """The settings that are texts, each with its value and with the place that it must have, such as `{value}`."""
        return ()

    def validate(self, plan: Any) -> Iterable[str]:
        """What is wrong with texts, and whether another maker of the plan makes records of the same ids."""
        for name, text, place in self.texts():
            if not text.strip():
                yield f"'{name}' is empty; write what is asked"
            elif place not in text:
                yield f"'{name}' has no {place}; write {place} where it is to stand"
            elif PLACE in text:
                yield f"'{name}' has '{PLACE}', and the image is put in front of it; remove it"
        for end, times in Counter(_ends(plan.run_context.operators)).items():
            if times > 1 and end in _ends_of(self.name, vars(self.settings)):
                yield f"several makers make records whose ids end in '/{end}'; call one of them otherwise"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        """Each record, and behind it what was made of it."""
        if writer is None:
            raise DataError(f"'{self.name}' asks a writer, and there is none; use graftwork data synthesize")
        # What is there under the id of a record that would be made was made before.
        known = HashTable()
        for record in records if isinstance(records, Sequence) else ():
            known.setdefault(hash64(record.id), 0)
        rest, waiting, images = iter(records), deque[tuple[Record, Sequence[Asking]]](), HashTable()
        left = True

        def prompts() -> Iterator[Record]:
            nonlocal left
            for record in rest:
                asked = self.askings(record, seed) if self._is_asked_about(record, images) else ()
                askings = [asking for asking in asked if known.get(hash64(asking.made.id)) is None]
                waiting.append((record, askings))
                for asking in askings:
                    yield from asking.prompts
                if len(waiting) >= AT_A_TIME:  # Few of them are asked about; the others are not to pile up.
                    return
            left = False

        while left:
            replies: list[Reply] = []
            for _, reply in writer.answer(prompts(), max_new_tokens=self.settings.max_new_tokens):
                replies.append(reply)
                yield from self._complete(waiting, replies)
            yield from self._complete(waiting, replies)

    def files(self) -> Sequence[Path]:
        """None: it depends on records and the writer alone."""
        return ()

    def make(self, parent: Record, end: str, group: str, question: str, prompts: Iterable[str]) -> Asking:
        """What is made of a record under an id with that end: a question of the user, for which these prompts are asked."""
        meta = {"made_by": self.name, "of": [parent.id]}
        made = ask_about(parent, question, id=f"{parent.id}/{end}", group=group, meta=meta)
        return Asking(made, [ask_about(made, prompt) for prompt in prompts])

    def _is_asked_about(self, record: Record, images: HashTable) -> bool:
        if not record.images or not self.wants(record):
            return False
        before = len(images)
        images.setdefault(hash64(self.once_for(record)), 0)
        return len(images) > before

    def _complete(
        self, waiting: deque[tuple[Record, Sequence[Asking]]], replies: list[Reply]
    ) -> Iterator[Record | BadRecord]:
        """The first records, up to one with prompts that are not replied to; the replies that were used are taken away."""
        while waiting and sum(len(asking.prompts) for asking in waiting[0][1]) <= len(replies):
            record, askings = waiting.popleft()
            yield record
            for asking in askings:
                own = replies[: len(asking.prompts)]
                del replies[: len(asking.prompts)]
                yield self.judge(asking.made, own)


def answered(made: Record, text: str) -> Record:
    """The record with its answer."""
    return replace(made, turns=(*made.turns, Turn("assistant", text)))


def fault_of(reply: Reply, max_new_tokens: int) -> str:
    """Why a reply is no text of a turn, as a clause; empty where it is one."""
    if reply.fault:
        return reply.fault
    if not reply.ended:
        return f"the reply was cut off at {max_new_tokens} tokens; raise 'max_new_tokens', or ask for less"
    if not reply.text.strip():
        return "the reply is empty"
    if found := NO_TEXT.search(reply.text):
        return f"the reply has {found[0].strip()!r}, which marks turns or images, or is no text"
    return ""


def one_of(phrasings: Phrasings, seed: int, id: str) -> str:
    """The phrasing that the seed draws for an id."""
    choices = (phrasings,) if isinstance(phrasings, str) else phrasings
    return choices[text_key(str(seed), id) % len(choices)]


def each_of(name: str, phrasings: Phrasings) -> Iterator[tuple[str, str, str]]:
    """The phrasings of a setting, for `texts`; one that is missing is empty."""
    for phrasing in (phrasings,) if isinstance(phrasings, str) else phrasings or ("",):
        yield name, phrasing, ""


def _ends(operators: Iterable[Any]) -> Iterator[str]:
    """What the ids end in that these operators of a plan make, where they are of this plugin."""
    for choice in operators:
        yield from _ends_of(choice.name, choice.settings)


def _ends_of(maker: str, settings: Mapping[str, Any]) -> Sequence[str]:
    """The end of ids that a maker of this name makes with these settings."""
    if maker not in NAMED_BY:
        return ()
    named = settings.get(NAMED_BY[maker])
    if isinstance(named, str):
        return (named,)
    return [*named] if named else ("answer",)
