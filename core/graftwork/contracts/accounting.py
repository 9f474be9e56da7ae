"""What becomes of every tensor in every file that is read: it is used, it equals another, or it is refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftwork.weights import LazyTensor, StoredTensor, sources_of

NO_PLACE = "the model has no place for it"


@dataclass(frozen=True)
class FileAccount:
    """What became of the tensors of one file, each by its name there."""

    found: int
    """How many the file holds."""
    used: tuple[str, ...] = ()
    """The model has these values, or its base has them and something trained lies over them."""
    equal: tuple[str, ...] = ()
    """Copies of what the base, or the model itself, has anyway."""
    refused: dict[str, str] = field(default_factory=dict)
    """Those that are not taken, and why."""

    def __post_init__(self) -> None:
        assert len(self.used) + len(self.equal) + len(self.refused) == self.found, "a tensor is not accounted for"

    def line(self) -> str:
        """The numbers, as a person reads them."""
        return f"{self.found} found: {len(self.used)} used, {len(self.equal)} equal, {len(self.refused)} refused"

    def reasons(self) -> list[str]:
        """Why tensors are refused, a line for each reason with how many they are and the first names."""
        grouped: dict[str, list[str]] = {}
        for name, why in self.refused.items():
            grouped.setdefault(why, []).append(name)
        return [
            f"{len(names)} refused, {why}: {', '.join(names[:3])}{', …' * (len(names) > 3)}"
            for why, names in grouped.items()
        ]


Accounts = dict[str, FileAccount]
"""By the path of the file."""


def account(
    found: Iterable[StoredTensor],
    *,
    used: Iterable[LazyTensor] = (),
    equal: Iterable[LazyTensor] = (),
    refused: Mapping[StoredTensor, str] | None = None,
) -> Accounts:
    """The account of all tensors that were `found`; one that nobody named has no place, and is refused."""
    taken = {stored for tensor in used for stored in sources_of(tensor)}
    copies = {stored for tensor in equal for stored in sources_of(tensor)} - taken
    files: dict[str, list[StoredTensor]] = {}
    for stored in found:
        files.setdefault(str(stored.file), []).append(stored)
    reasons = refused or {}
    return {
        file: FileAccount(
            found=len(tensors),
            used=tuple(t.name for t in tensors if t in taken),
            equal=tuple(t.name for t in tensors if t in copies),
            refused={t.name: reasons.get(t, NO_PLACE) for t in tensors if t not in taken | copies},
        )
        for file, tensors in files.items()
    }


def without_place(accounts: Accounts) -> list[tuple[str, str]]:
    """The tensors that are refused because nothing takes them, by file and name."""
    return [(file, name) for file, each in accounts.items() for name, why in each.refused.items() if why == NO_PLACE]
