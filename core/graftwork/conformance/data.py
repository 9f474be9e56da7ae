"""What every data source and data operator must do: yield records, the same ones each time, write what it reads, lose none in silence."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from graftwork.config.settings import names, parse
from graftwork.conformance.outcome import Check, Skipped, Subject
from graftwork.conformance.specimens import image, records
from graftwork.contracts.data import DataMaker, DataSource, DataVerifier, VerifiedGroup
from graftwork.contracts.records import BadRecord, Image, Record, Turn
from graftwork.contracts.writer import Reply
from graftwork.data.images import read_bytes
from graftwork.errors import GraftworkError

READ = 2_000
"""How many records of a source are read."""
SEED = 5
KIT = "conformance"
"""What the evaluator is called that the kit lends."""


def unlike_records(items: Iterable[Any]) -> Iterator[str]:
    """What is wrong with things that should be records or bad records."""
    for item in items:
        if isinstance(item, BadRecord):
            if not (item.where and item.why):
                yield f"a BadRecord must say where and why, and one says {item.where!r} and {item.why!r}; fill in both"
        elif not isinstance(item, Record):
            yield f"a Record or a BadRecord must come, and a {type(item).__name__} came; yield one of them"
            return
        elif not item.turns or not isinstance(item.id, str):
            yield f"a record must have turns and a text as its id, and {item.id!r} has not; yield a BadRecord instead"
        elif (places := sum(turn.text.count("<image>") for turn in item.turns)) != len(item.images):
            yield (
                f"a record must have one '<image>' for each image, and '{item.id}' has {places} for {len(item.images)}; "
                "put it into the text"
            )


def differences(first: Sequence[Any], second: Sequence[Any]) -> Iterator[int]:
    """The numbers, from 1, of the items that differ."""
    return (n for n, (one, other) in enumerate(zip_longest(first, second), 1) if one != other)


# Sources ----------------------------------------------------------------------------------------------------------------


def what_it_reads(subject: Subject) -> list[Any]:
    """The first records of a source; Skipped when there is none."""
    read: list[Any] = subject.once("reading", lambda: list(islice(subject.create_valid().records(), READ)))
    if not read:
        raise Skipped("it has no records with these settings")
    return read


def it_yields_records(subject: Subject) -> Iterator[str]:
    """Records and BadRecords, well made."""
    yield from unlike_records(what_it_reads(subject))


def it_reads_the_same_each_time(subject: Subject) -> Iterator[str]:
    """In the same order, from another instance and from the same one again."""
    first, source = what_it_reads(subject), subject.create_valid()
    for _ in range(2):
        for number in differences(first, list(islice(source.records(), READ))):
            yield f"a source must give the same records each time, and number {number} of two readings differs; sort, and draw nothing"


def telling_records() -> list[Record]:
    """Records that between them have everything that a record can hold."""
    turns = (
        Turn("system", "Be brief.\nBe kind."),
        Turn("user", "Is <image> like <image>? \u2028Größe, 你好 🙂 "),
        Turn("assistant", "No.\n", trained=False),
        Turn("user", "And <image>?"),
        Turn("assistant", "Yes", trained=True),
    )
    images = (image("red"), image("blue"), image("red"))
    meta = {"made_by": "kit", "of": ["red", "blue"], "score": {"x": [0.1, None, True]}}
    full = Record("näme/1", turns, images, "hard", ("Yes", "yes"), "kit:8 (record 3)", meta, 0.25, 1, "pair")
    return [*(each for each in sample_records() if each.id != "broken"), full]  # What is no image need not be copied.


def what_is_written_is_read_again(subject: Subject) -> Iterator[str]:
    """All that the records hold, and their images byte for byte, with no other setting than `path`; equal records as equal bytes."""
    component: Any = subject.component
    if component.write.__func__ is DataSource.write.__func__:  # type: ignore[attr-defined]
        raise Skipped("it says that it can be read, not written")
    if subject.unmet_requirement:
        raise Skipped(subject.unmet_requirement)
    first, second = subject.scratch / "first", subject.scratch / "second"
    path, given = component.write(iter(telling_records()), first), telling_records()
    settings: Any = parse(component.Settings, {"path": str(path)}, where=component.name, folder=first)
    for number in differences(given, [with_bytes(record) for record in component(settings).records()]):
        yield f"what a source writes it must read as the same records, and number {number} is another one; write all that a record holds"
    for file in component(settings).files() or ():
        if not file.is_file():
            yield f"'files' must name the files that records are read from, and there is no file '{file}'; correct it"
    component.write(given, second)
    one, other = contents(first), contents(second)
    for name in sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)):
        yield f"equal records must be written as equal bytes, and '{name}' differs when they are written twice; write no times or random names"


def with_bytes(record: Any) -> Any:
    """A record with its images as bytes, wherever they lie."""
    if not isinstance(record, Record):
        return record
    return replace(record, images=tuple(Image(data=read_bytes(each)) for each in record.images))


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


SOURCE_CHECKS: tuple[Check, ...] = (
    it_yields_records,
    it_reads_the_same_each_time,
    what_is_written_is_read_again,
)


# Operators --------------------------------------------------------------------------------------------------------------


class KitWriter:
    """A model that answers every question with its number of letters."""

    def answer(self, prompts: Iterable[Record], *, max_new_tokens: int) -> Iterator[tuple[Record, Reply]]:
        """Each prompt with its answer."""
        return ((prompt, Reply(f"{len(prompt.question)} letters")) for prompt in prompts)


def sample_records() -> list[Record]:
    """Records of many kinds: with and without images, equal images, a broken one, no words and many."""
    red = image("red")
    asked = Turn("user", "<image>\nWhat colour is it?")
    return [
        *records(),
        Record("twin", (asked, Turn("assistant", "red")), (Image(data=red.data),), where="kit:4", meta={"score": [1]}),
        Record("broken", (asked, Turn("assistant", "red")), (Image(data=b"no image"),), where="kit:5"),
        Record(
            "long", (Turn("user", "really " * 500 + "?"), Turn("assistant", "yes")), where="kit:6", meta={"score": [2]}
        ),
        Record("short", (Turn("user", "?"), Turn("assistant", "!")), group="short", where="kit:7"),
    ]


def setting_of(subject: Subject) -> str | None:
    """The setting that names evaluators, where an operator has one."""
    setting: str | None = getattr(subject.component, "evaluators", None)
    return setting


def operator_of(subject: Subject) -> Any:
    """A new instance; one that wants evaluators' questions is lent some, of the kit's own records."""
    if (setting := setting_of(subject)) and not subject.settings:
        subject = replace(subject, settings={setting: {KIT: {}}})
    operator = subject.create_valid()
    operator.questions = {KIT: questions}
    return operator


def questions() -> list[Record]:
    """What the evaluator that the kit lends asks: about an image that is among the records, and about one that is not."""
    asked = Turn("user", "<image>\nWhat is it?")
    return [Record("seen", (asked,), (image("red"),)), Record("unseen", (asked,), (image("green"),))]


def applied(subject: Subject, given: Iterable[Record]) -> list[Any]:
    """What a new instance makes of the records; with a writer if it does not work without one."""
    try:
        return list(operator_of(subject).apply(given, seed=SEED))
    except GraftworkError:
        return list(operator_of(subject).apply(sample_records(), seed=SEED, writer=KitWriter()))


def it_gives_records(subject: Subject) -> Iterator[str]:
    """Records and BadRecords, well made, also of no records at all."""
    yield from unlike_records(applied(subject, sample_records()))
    yield from unlike_records(applied(subject, []))


def the_same_seed_gives_the_same(subject: Subject) -> Iterator[str]:
    """In the same order, and whether the records come as a list or one after another."""
    first = applied(subject, sample_records())
    for number in differences(first, applied(subject, sample_records())):
        yield f"the same seed must give the same records, and number {number} of two applications differs; draw from Random(seed) only"
    for number in differences(first, applied(subject, iter(sample_records()))):
        yield f"an operator must take records that come one after another, and number {number} then differs; go through them once"


def it_changes_no_record(subject: Subject) -> Iterator[str]:
    """Neither the records that it is given nor their list."""
    given = sample_records()
    before = copy.deepcopy(given)
    applied(subject, given)
    for number in differences(before, given):
        yield f"an operator must not change what it is given, and record {number} is another one afterwards; use dataclasses.replace"


def nothing_is_lost_in_silence(subject: Subject) -> Iterator[str]:
    """As many records and BadRecords as went in, or more."""
    given, found = sample_records(), applied(subject, sample_records())
    if len(found) < len(given):
        yield (
            f"every dropped record must be given as a BadRecord, and of {len(given)} records {len(given) - len(found)} are gone; "
            "yield BadRecord(record.where, why)"
        )


def it_uses_the_questions_that_it_asks_for(subject: Subject) -> Iterator[str]:
    """Where it names a setting for evaluators: as a table, and what it gives depends on what is lent."""
    setting = setting_of(subject)
    if setting is None:
        raise Skipped("it says that it asks for no evaluator")
    if setting not in names(subject.component.Settings):
        yield f"'evaluators' must be the name of one of its settings, and there is no setting '{setting}'; correct it"
        return
    without = operator_of(subject)
    without.questions = {KIT: list}
    if not list(differences(applied(subject, sample_records()), list(without.apply(sample_records(), seed=SEED)))):
        yield "an operator that asks for evaluators must use their questions, and with and without them it gives the same"


def for_synthesis() -> list[Record]:
    """The kit's records, one without an answer among them, and some that a maker made, in two groups."""
    asked = Turn("user", "<image>\nWhat colour is it?")
    made = [
        Record(
            f"open/{number}",
            (asked, Turn("assistant", answer)),
            (image("red"),),
            group,
            where="kit:9",
            meta={"made_by": KIT, "of": ["open"]},
        )
        for number, (group, answer) in enumerate([("colour", "red"), ("colour", "blue"), ("shape", "round")])
    ]
    return [*sample_records(), Record("open", (asked,), (image("red"),), where="kit:9"), *made]


def a_maker_keeps_what_it_is_given(subject: Subject) -> Iterator[str]:
    """As it is and in its order; what it makes says by whom and of what, and so does what it could not make."""
    if not issubclass(subject.component, DataMaker):
        raise Skipped("it says that it makes nothing")
    given = for_synthesis()
    ids = {record.id for record in given}
    found = list(operator_of(subject).apply(iter(given), seed=SEED, writer=KitWriter()))
    for number in differences(given, [item for item in found if isinstance(item, Record) and item.id in ids]):
        yield f"a maker must give back what it is given, and record {number} is missing or another one; yield it before what is made of it"
    for item in found:
        if item.id in ids and isinstance(item, BadRecord):
            yield f"a maker must drop none of the records that it is given, and it drops '{item.id}'; yield it"
        elif item.id not in ids and isinstance(item, Record):
            made_by, of = item.meta.get("made_by"), item.meta.get("of")
            if made_by != subject.component.name or not isinstance(of, list) or not of or not set(of) <= ids:
                yield (
                    f"a made record must say by whom and of what, and 'made_by' of '{item.id}' is {made_by!r} and 'of' {of!r}; give it the "
                    "maker's name and the ids that it was made from"
                )
        elif not item.id:
            yield "what a maker could not make must have an id, and a BadRecord has none; use BadRecord.of(record, why)"


def a_verifier_gives_verdicts(subject: Subject) -> Iterator[str]:
    """Each record stays or is dropped, once; nothing is kept of a writer that says neither yes nor no; the numbers of a group fit one another."""
    if not issubclass(subject.component, DataVerifier):
        raise Skipped("it says that it verifies nothing")
    given, verifier = for_synthesis(), operator_of(subject)
    found = list(verifier.apply(iter(given), seed=SEED, writer=KitWriter()))
    if sorted(record.id for record in given) != sorted(item.id for item in found):
        yield "a verifier must give each record once, as a Record or a BadRecord of its id, and it does not; use BadRecord.of(record, why)"
    for item in found:
        if isinstance(item, Record) and item.meta.get("made_by"):
            yield f"a verifier must keep no made record that no reply affirms, and it keeps '{item.id}'; drop it"
    verdicts = list(verifier.verdicts())
    if not verdicts or not all(isinstance(each, VerifiedGroup) for each in verdicts):
        yield f"'verdicts' must give a VerifiedGroup for each group that was asked about, and it gives {verdicts!r}; give them after 'apply'"
    for each in verdicts:
        if not each.kept <= each.affirmed <= each.records or each.control_affirmed > each.control:
            yield f"the numbers of a verdict must fit one another, and those of group '{each.group}' do not: {each}; count each record once"


OPERATOR_CHECKS: tuple[Check, ...] = (
    it_gives_records,
    the_same_seed_gives_the_same,
    it_changes_no_record,
    nothing_is_lost_in_silence,
    it_uses_the_questions_that_it_asks_for,
    a_maker_keeps_what_it_is_given,
    a_verifier_gives_verdicts,
)
