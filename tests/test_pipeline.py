"""The pipeline: sources and operators in order, with every loss counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import pytest

from graftwork.contracts import BadRecord, DataMaker, DataOperator, DataSource, NoSettings, Record, Reply, Turn, Writer
from graftwork.data.pipeline import StageCount, read_records
from graftwork.errors import DataError


def record(id: str, answer: str = "yes") -> Record:
    return Record(id, (Turn("user", "Is it?"), Turn("assistant", answer)), where=f"file:{id}")


class Listed(DataSource[list[object]]):
    """Gives its settings."""

    name = "listed"

    def records(self) -> Iterator[Record | BadRecord]:
        yield from self.settings  # type: ignore[misc]


class Failing(DataSource[NoSettings]):
    """Fails after a record."""

    name = "failing"

    def records(self) -> Iterator[Record | BadRecord]:
        yield record("1")
        raise KeyError("colour")


class OnlyYes(DataOperator[NoSettings]):
    """Drops records whose answer is not yes."""

    name = "only-yes"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        for each in records:
            yield each if each.turns[-1].text == "yes" else BadRecord(each.where, "the answer is not yes")


class Asked(DataOperator[NoSettings]):
    """Adds a copy of each record that the writer answered, and the seed."""

    name = "asked"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        for each in records:
            yield each
            assert writer
            ((_, reply),) = writer.answer([each], max_new_tokens=4)
            yield record(each.id, f"{reply.text} {seed}")


class Parrot:
    """Answers with the question."""

    def answer(self, prompts: Iterable[Record], *, max_new_tokens: int) -> Iterator[tuple[Record, Reply]]:
        return ((each, Reply(each.question)) for each in prompts)


def test_stages_run_in_order_and_every_loss_is_counted() -> None:
    first = Listed([record("1"), BadRecord("file:2", "no turns"), record("3", "no")])
    second = Listed([record("4")])
    gathered = read_records([first, second], [OnlyYes(NoSettings())], seed=0, strict=False)
    assert [each.id for each in gathered.records] == ["1", "4"]
    assert [*gathered.bad] == [BadRecord("file:2", "no turns"), BadRecord("file:3", "the answer is not yes", "3")]
    assert gathered.counts == [
        StageCount("listed", 3, 2, 1),
        StageCount("listed", 1, 1, 0),
        StageCount("only-yes", 3, 2, 1),
    ]
    assert gathered.read == 4 == len(gathered.records) + len(gathered.bad)


def test_operators_get_the_seed_and_the_writer() -> None:
    asked = [Asked(NoSettings())]
    gathered = read_records(
        [Listed([record("1")])], asked, seed=5, strict=False, lend=lambda operator, folder: nullcontext(Parrot())
    )
    assert [each.turns[-1].text for each in gathered.records] == ["yes", "Is it? 5"]
    assert [each.id for each in gathered.records] == ["1", "1#2"]


class Careless(DataMaker[NoSettings]):
    """Makes a record without a word about that."""

    name = "careless"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        for each in records:
            yield each
            yield record(f"{each.id}/made")


class Meddling(Careless):
    """Changes what it is given."""

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        yield from (record(each.id, "no") for each in records)


@pytest.mark.parametrize(
    ("maker", "words"), [(Careless, "does not say that it made '1/made'"), (Meddling, "makes records, and changed '1'")]
)
def test_what_a_maker_makes_is_known_to_be_made(maker: type[DataMaker[NoSettings]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_records([Listed([record("1")])], [maker(NoSettings())], seed=0, strict=False)


def test_repeated_ids_are_made_distinct() -> None:
    ids = ["a", "a", "a#2", "a", "b", "a#2"]
    gathered = read_records([Listed([record(id) for id in ids]), Listed([record("b")])], [], seed=0, strict=False)
    assert [each.id for each in gathered.records] == ["a", "a#3", "a#2", "a#4", "b", "a#2#2", "b#2"]


def test_strict_data_stops_at_the_first_bad_record_of_a_source() -> None:
    source = Listed([record("1"), BadRecord("file:2", "no turns"), BadRecord("file:3", "worse")])
    with pytest.raises(DataError, match=r"^file:2: no turns; fix it, or set data.strict to false$"):
        read_records([source], [], seed=0, strict=True)


def test_strict_data_lets_operators_drop() -> None:
    source = Listed([record("1"), record("2", "no")])
    assert len(read_records([source], [OnlyYes(NoSettings())], seed=0, strict=True).records) == 1


def test_an_empty_result_says_where_the_records_went() -> None:
    source = Listed([BadRecord("file:1", "no turns"), record("2", "no")])
    with pytest.raises(DataError) as caught:
        read_records([source], [OnlyYes(NoSettings())], seed=0, strict=False)
    sentence = "no record is left of 2 that were read: 'listed' dropped 1, 'only-yes' dropped 1"
    assert caught.value.sentence == sentence
    assert caught.value.details == ("file:1: no turns", "file:2: the answer is not yes")
    bad = [BadRecord(f"file:{number}", "broken") for number in range(1, 2001)]
    with pytest.raises(DataError) as caught:
        read_records([Listed(bad)], [], seed=0, strict=False)
    assert caught.value.details[-2:] == ("file:5: broken", "… and 1,995 more")
    with pytest.raises(DataError, match="no record is left of 0 that were read: no source has any"):
        read_records([Listed([])], [], seed=0, strict=False)


def test_a_failing_component_is_named_and_its_error_kept() -> None:
    with pytest.raises(DataError, match=r"^data source 'failing' failed with KeyError: 'colour'$") as caught:
        read_records([Failing(NoSettings())], [], seed=0, strict=False)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DataError, match=r"^data operator 'asked' failed with AssertionError"):
        read_records([Listed([record("1")])], [Asked(NoSettings())], seed=0, strict=False)


def test_a_component_that_gives_something_else_is_named() -> None:
    with pytest.raises(DataError, match="data source 'listed' gave a dict, not a Record or a BadRecord"):
        read_records([Listed([{"id": 1}])], [], seed=0, strict=False)


def test_an_error_that_a_person_can_mend_passes_unchanged() -> None:
    class Missing(Failing):
        def records(self) -> Iterator[Record | BadRecord]:
            raise DataError("there is no file 'x.json'")

    with pytest.raises(DataError, match=r"^there is no file 'x.json'$"):
        read_records([Missing(NoSettings())], [], seed=0, strict=False)
