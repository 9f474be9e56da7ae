"""The two contracts of data: sources, which read and write records, and operators, which filter, change or make them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from graftwork.contracts.component import Component, S
from graftwork.contracts.records import BadRecord, Record
from graftwork.contracts.writer import Writer
from graftwork.errors import DataError


class DataSource(Component[S]):
    """A reader of training data, and where it can, a writer of the same format."""

    kind: ClassVar[str] = "data_source"
    coordinates: str = ""
    """What `coordinates` of the run's `[[data.source]]` says of its records; core sets it, and no plugin has to read it."""

    @abstractmethod
    def records(self) -> Iterator[Record | BadRecord]:
        """The records in a fixed order; what is malformed as a BadRecord with its file and line."""

    def files(self) -> Sequence[Path] | None:
        """The files, other than images, that the records are read from: as long as none of them changes, the records are
        the same. None where that is not known, and then they are read anew each time."""
        return None

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder is what this source reads with no other setting than `path`, to be told without reading much:
        by the end of its name, or by the names of files in it. By default nothing is."""
        return False

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """Write records and their images into an empty folder, and return the file or folder that this source reads, with no
        other setting than `path`, as the same records; equal records give equal bytes. DataError for what the format cannot hold.
        """
        raise DataError(f"'{cls.name}' can be read, not written; choose another format")


class DataOperator(Component[S]):
    """A filter or changer of training data; one that needs a writer is a `DataMaker` or a `DataVerifier`."""

    kind: ClassVar[str] = "data_operator"
    evaluators: ClassVar[str | None] = None
    """The setting, a `dict[str, dict[str, Any]]` of names and their settings, by which it is told evaluators whose questions it has to
    know. Core checks them as it does a run's own, and lends the questions."""
    questions: Mapping[str, Callable[[], Iterable[Record | BadRecord]]] = MappingProxyType({})
    """Lent by core before `apply`, where `evaluators` names a setting: each evaluator's name with what reads its questions."""

    @abstractmethod
    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        """The records that stay, changed ones or new ones, lazily; what is dropped as `BadRecord.of(record, why, **numbers)`.

        A changed record keeps its id; a new one has `meta["made_by"]`, the operator's name, and `meta["of"]`, the ids that it
        was made from. Same seed, same result.
        """

    def files(self) -> Sequence[Path] | None:
        """The files, other than its records' images, that the result depends on; none for what depends on records and settings
        alone. None where that is not known, and then it is applied anew each time."""
        return None


class DataMaker(DataOperator[S]):
    """An operator that makes records of what a writer answers.

    `graftwork data synthesize` alone applies it, as nothing that a model wrote enters a data set unverified. The records that it is
    given stay; one that is made has the id of its prompts. What comes to nothing is dropped as a BadRecord of the record that would
    have been made.
    """


@dataclass(frozen=True)
class VerifiedGroup:
    """What a verifier found in the records of one group, and how it fared with wrong answers, the control."""

    group: str
    records: int
    """How many were asked about, each once."""
    affirmed: int
    """How many of their answers it called right."""
    control: int
    """How many wrong answers it was asked about."""
    control_affirmed: int
    """How many of these it called right."""
    kept: int
    unclear: int = 0
    """Of both, how many of its replies said neither yes nor no."""
    why: str = ""
    """Why it vouches for none of them, as a sentence; empty where it vouches for what it affirms."""
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """A few sentences on single records, under `kept`, `refused` and `control affirmed`."""


class DataVerifier(DataOperator[S]):
    """An operator that asks a writer whether answers are right, and keeps those that it can vouch for; named by `[verify]`, and applied
    after all others."""

    given: ClassVar[str | None] = None
    """The setting, a bool, by which it also asks about records that no maker made; None where it always does."""

    @abstractmethod
    def verdicts(self) -> Sequence[VerifiedGroup]:
        """What it found by group, after all that `apply` gives was taken."""
