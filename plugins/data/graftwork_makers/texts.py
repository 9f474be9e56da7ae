"""Records whose answer, or question and answer, a writer writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from graftwork.contracts import BadRecord, MissingFile, Record, Reply, Turn, setting
from graftwork.data import PLACE, ask_about, fill, plain, read_text
from graftwork.errors import DataError
from graftwork_makers.making import (
    Asking,
    Maker,
    MakerSettings,
    Phrasings,
    answered,
    each_of,
    fault_of,
    one_of,
)

PROMPT = Path(__file__).with_name("question_answer.txt")
LEADING = re.compile(rf"\A(\s*{PLACE}\s*)+")
"""Places of images in front of a question."""
FORMS = (
    re.compile(
        r"\[question\]\s*(?P<question>.*?)\s*\[answer\][ \t]*(?P<answer>.*?)\s*(?=\[question\]|\Z)", re.I | re.S
    ),
    re.compile(
        r"^[*\s]*question\s*:[* \t]*(?P<question>.*?)\s*^[*\s]*answer\s*:[* \t]*(?P<answer>.*?)\s*(?=^[*\s]*question\s*:|\Z)",
        re.I | re.S | re.M,
    ),
)
"""How a question and its answer are written."""

# Answers ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerQuestionsSettings(MakerSettings):
    """What is asked, and how."""

    questions: dict[str, Phrasings] = setting(
        {},
        "Questions by the name of the group that their records get, each a text or several phrasings; by default those of records without an answer",
    )
    prompt: str = setting("{question}", "What the writer gets, with {question} in it; the record has the bare question")
    answers: dict[str, tuple[str, ...]] = setting(
        {}, "The only answers that a group may have, by its name; any other reply is dropped"
    )


class AnswerQuestions(Maker[AnswerQuestionsSettings]):
    """Lets a writer answer questions about images, the records' own or given ones"""

    name = "answer-questions"
    Settings = AnswerQuestionsSettings

    def wants(self, record: Record) -> bool:
        """A record's own question is asked if it has no answer, whatever was answered before."""
        return super().wants(record) if self.settings.questions else bool(_open_question(record))

    def once_for(self, record: Record) -> str:
        """The images, where the same is asked about all of them; else the record."""
        return super().once_for(record) if self.settings.questions else record.id

    def texts(self) -> Iterable[tuple[str, str, str]]:
        yield "prompt", self.settings.prompt, "{question}"
        for name, question in self.settings.questions.items():
            yield from each_of(f"questions.{name}", question)

    def askings(self, record: Record, seed: int) -> Sequence[Asking]:
        prompt = self.settings.prompt
        if not self.settings.questions:
            return [self._own(record)]
        asked = {name: one_of(question, seed, record.id) for name, question in self.settings.questions.items()}
        return [
            self.make(record, name, name, question, [fill(prompt, question=question)])
            for name, question in asked.items()
        ]

    def _own(self, record: Record) -> Asking:
        """What is to be made of a record's own question."""
        *before, last = record.turns
        places = last.text[: len(last.text) - len(LEADING.sub("", last.text))]
        text = places + fill(self.settings.prompt, question=last.text[len(places) :])
        meta = {"made_by": self.name, "of": [record.id]}
        made = replace(record, id=f"{record.id}/answer", meta=meta, reference=(), unit="")
        return Asking(made, [replace(made, turns=(*before, Turn("user", text)))])

    def validate(self, plan: object) -> Iterable[str]:
        yield from super().validate(plan)
        for name in self.settings.answers:
            if self.settings.questions and name not in self.settings.questions:
                yield f"'answers.{name}' is for a group that 'questions' does not name; correct it"

    def judge(self, made: Record, replies: Sequence[Reply]) -> Record | BadRecord:
        """An answer of a few that there may be is written as these are."""
        text = replies[0].text
        if why := fault_of(replies[0], self.settings.max_new_tokens):
            return BadRecord.of(made, why)
        if allowed := self.settings.answers.get(made.group):
            known = {plain(each): each for each in allowed}
            if plain(text) not in known:
                return BadRecord.of(
                    made, f"the reply is none of the answers that '{made.group}' may have: '{text[:80]}'"
                )
            text = known[plain(text)]
        return answered(made, text)


def _open_question(record: Record) -> str:
    """The question that a record ends with, without places of images; empty where it ends with an answer, or asks nothing."""
    last = record.turns[-1]
    return last.text.replace(PLACE, " ").strip() if last.role == "user" else ""


@dataclass(frozen=True)
class DescribeSettings(MakerSettings):
    """What is asked, and how long a description may be."""

    prompt: str = setting("Describe the image in one sentence of at most 30 words.", "What the writer gets")
    question: Phrasings = setting(
        "Describe the image briefly.", "What is asked in the record; of several phrasings one is drawn"
    )
    max_words: int = setting(30, "Drop descriptions of more words", minimum=1)
    group: str = setting("describe", "The group of what is made, and what its ids end in")


class Describe(Maker[DescribeSettings]):
    """Lets a writer describe images, briefly

    Short by default: long captions made a model of 2B parameters worse in three of three published reports of the Better Synth
    challenge.
    """

    name = "describe"
    Settings = DescribeSettings

    def texts(self) -> Iterable[tuple[str, str, str]]:
        yield "prompt", self.settings.prompt, ""
        yield "group", self.settings.group, ""
        yield from each_of("question", self.settings.question)

    def askings(self, record: Record, seed: int) -> Sequence[Asking]:
        group, question = self.settings.group, one_of(self.settings.question, seed, record.id)
        return [self.make(record, group, group, question, [self.settings.prompt])]

    def judge(self, made: Record, replies: Sequence[Reply]) -> Record | BadRecord:
        if why := fault_of(replies[0], self.settings.max_new_tokens):
            return BadRecord.of(made, why)
        words, most = len(replies[0].text.split()), self.settings.max_words
        if words > most:
            return BadRecord.of(made, f"the description has {words} words, more than {most}", words=words)
        return answered(made, replies[0].text)


# Questions and answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionAnswerSettings(MakerSettings):
    """What the writer is told."""

    max_new_tokens: int = setting(128, "The longest reply, in tokens", minimum=1)
    prompt: Path | None = setting(None, "The file of the prompt; by default one that comes with this plugin")
    group: str = setting("question-answer", "The group of what is made, and what its ids end in")


class QuestionAnswer(Maker[QuestionAnswerSettings]):
    """Lets a writer ask and answer a question about each image, by a prompt in a file that anyone can edit

    The reply has to be `[question] … [answer] …`, or lines that begin with `Question:` and `Answer:`.
    """

    name = "question-answer"
    Settings = QuestionAnswerSettings

    @property
    def file(self) -> Path:
        """The file of the prompt."""
        return self.settings.prompt or PROMPT

    def files(self) -> Sequence[Path]:
        """The file of the prompt."""
        return (self.file,)

    def texts(self) -> Iterable[tuple[str, str, str]]:
        yield "group", self.settings.group, ""

    def validate(self, plan: object) -> Iterable[str]:
        yield from super().validate(plan)
        if not self.file.is_file():
            yield MissingFile(f"there is no file '{self.file}'; correct 'prompt'")
            return
        try:
            text = read_text(self.file)
        except DataError as error:
            yield error.sentence
            return
        if not text.strip():
            yield f"the prompt in '{self.file}' is empty; write what the writer is to do"
        elif PLACE in text:
            yield f"the prompt in '{self.file}' has '{PLACE}', and the image is put in front of it; remove it"

    def askings(self, record: Record, seed: int) -> Sequence[Asking]:
        return [self.make(record, self.settings.group, self.settings.group, "", [self.prompt])]

    def judge(self, made: Record, replies: Sequence[Reply]) -> Record | BadRecord:
        """The question is part of the reply, too."""
        if why := fault_of(replies[0], self.settings.max_new_tokens):
            return BadRecord.of(made, why)
        found = list(pairs_in(replies[0].text))
        if len(found) != 1 or not all(found[0]):
            what = f"the reply holds {len(found)} questions with answers" if len(found) > 1 else "the reply is not one"
            return BadRecord.of(made, f"{what}, and '[question] … [answer] …' is wanted: '{replies[0].text[:80]}'")
        question, answer = found[0]
        if (plain(question), plain(answer)) in self.examples:
            return BadRecord.of(made, f"the reply repeats the example of the prompt: '{question}'")
        return answered(replace(ask_about(made, question), meta=made.meta), answer)

    @cached_property
    def prompt(self) -> str:
        """What the writer is told."""
        return read_text(self.file).strip()

    @cached_property
    def examples(self) -> set[tuple[str, str]]:
        """The questions and answers in the prompt."""
        return {(plain(question), plain(answer)) for question, answer in pairs_in(self.prompt)}


def pairs_in(text: str) -> Iterator[tuple[str, str]]:
    """The questions in a text, each with its answer."""
    for form in FORMS:
        for found in form.finditer(text):
            yield found["question"].strip(), found["answer"].strip()
