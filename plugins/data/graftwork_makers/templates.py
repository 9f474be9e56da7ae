"""Questions whose answer is one of a few values: a writer that knows yes and no is asked about every one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from graftwork.contracts import BadRecord, Record, Reply, setting
from graftwork.data import NO, PLACE, YES, affirms, fill, mistakes_in_words, plain
from graftwork_makers.making import Asking, Maker, MakerSettings, Phrasings, answered, each_of, one_of


@dataclass(frozen=True)
class Template:
    """A question and the answers that it may have."""

    question: Phrasings = field(metadata={"help": "What is asked in the record; of several phrasings one is drawn"})
    ask: str = field(metadata={"help": "The yes/no question that the writer gets about each {value}"})
    values: tuple[str, ...] = field(metadata={"help": "What the answer may be"})
    answer: str = setting("{value}", "The answer, of the {value} that is affirmed")


@dataclass(frozen=True)
class AskTemplatesSettings(MakerSettings):
    """What is asked."""

    max_new_tokens: int = setting(8, "The longest reply, in tokens", minimum=1)
    templates: dict[str, Template] = setting(
        {}, "Templates by the name of the group that their records get: question, ask, values, answer"
    )
    yes: tuple[str, ...] = setting(YES, "The words that a reply begins with that affirms")
    no: tuple[str, ...] = setting(NO, "The words that a reply begins with that denies")


class AskTemplates(Maker[AskTemplatesSettings]):
    """Asks a writer about every value that an answer may have, and keeps what it affirms of exactly one

    A question such as "What colour is it?" is asked as "Is it red?", "Is it blue?" and so on. A writer that says yes to several, or
    to none, does not know, and nothing is made.
    """

    name = "ask-templates"
    Settings = AskTemplatesSettings

    def texts(self) -> Iterable[tuple[str, str, str]]:
        for name, template in self.settings.templates.items():
            yield from each_of(f"templates.{name}.question", template.question)
            yield f"templates.{name}.ask", template.ask, "{value}"
            yield f"templates.{name}.answer", template.answer, "{value}"

    def validate(self, plan: object) -> Iterable[str]:
        yield from super().validate(plan)
        yield from mistakes_in_words(self.settings.yes, self.settings.no)
        if not self.settings.templates:
            yield "'templates' is not set; give at least one, with 'question', 'ask' and 'values'"
        for name, template in self.settings.templates.items():
            where, known = f"'templates.{name}.values'", list(map(plain, template.values))
            if len(known) < 2:
                yield f"{where} has {'one value' if known else 'no value'}; give at least two, of which one can be affirmed"
            yield from (
                f"{where} has '{value}' twice; keep one"
                for place, value in enumerate(template.values)
                if known[place] in known[:place]
            )
            if not all(value.strip() and PLACE not in value for value in template.values):
                yield f"{where} has a value that is empty or has '{PLACE}'; remove it"

    def askings(self, record: Record, seed: int) -> Sequence[Asking]:
        return [
            self.make(
                record,
                name,
                name,
                one_of(template.question, seed, record.id),
                (fill(template.ask, value=value) for value in template.values),
            )
            for name, template in self.settings.templates.items()
        ]

    def judge(self, made: Record, replies: Sequence[Reply]) -> Record | BadRecord:
        template, settings = self.settings.templates[made.group], self.settings
        for value, reply in zip(template.values, replies, strict=True):
            if reply.fault:
                return BadRecord.of(made, f"asked about '{value}', {reply.fault}")
        said = [affirms(reply.text, yes=settings.yes, no=settings.no) for reply in replies]
        affirmed = [value for value, meant in zip(template.values, said, strict=True) if meant]
        if len(affirmed) == 1:
            return answered(made, fill(template.answer, value=affirmed[0]))
        which = f"{len(affirmed)} of {len(said)} values are affirmed: {', '.join(affirmed)}"
        why = which if affirmed else f"none of {len(said)} values is affirmed"
        return BadRecord.of(made, why, affirmed=affirmed, unclear=said.count(None))
