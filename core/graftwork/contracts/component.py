"""A component: the class that authors write for every exchangeable thing."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from graftwork.contracts.plan import Plan

S = TypeVar("S")


@dataclass(frozen=True)
class Requires:
    """What a component needs from the machine before it can work."""

    packages: tuple[str, ...] = ()
    """Distributions as PEP 508 requirements, such as `peft>=0.19`; asked of metadata, never imported."""
    cuda: tuple[int, int] | None = None
    """The least compute capability, such as `(8, 0)`; None where no CUDA device is needed."""
    install: str | None = None
    """The pip arguments to suggest when a package is missing; by default the missing requirements themselves."""
    module: str | None = None
    """A module that must also import beside what else is installed, where that is in doubt: it is tried in a child process, once for
    each set of versions of `packages`."""
    advice: str = ""
    """What to do where it does not import, as a clause."""


def missing_requirements(requires: Requires) -> list[str]:
    """Those of the required packages that are not installed here in a version that will do, by their metadata."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    def is_met(wanted: Requirement) -> bool:
        if wanted.marker and not wanted.marker.evaluate():
            return True
        try:
            return wanted.specifier.contains(version(wanted.name), prereleases=True)
        except PackageNotFoundError:
            return False

    return [package for package in requires.packages if not is_met(Requirement(package))]


def missing_packages(requires: Requires) -> str:
    """Which required packages are missing or do not work, and what to do about it, as a clause; empty when none is."""
    missing = missing_requirements(requires)
    if not missing:
        from packaging.requirements import Requirement

        from graftwork.contracts.importing import import_failure

        names = tuple(Requirement(package).name for package in requires.packages)
        failure = import_failure(requires.module, names) if requires.module else ""
        return failure and f"'{requires.module}' is installed and cannot be imported ({failure}): {requires.advice}"
    arguments = requires.install or " ".join(f'"{requirement}"' for requirement in missing)
    return f"needs {' and '.join(missing)}: pip install {arguments}"


@dataclass(frozen=True)
class Support:
    """Yes, or no with a reason that a person reads."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


SUPPORTED = Support(True)


class MissingFile(str):
    """Why a plan cannot be carried out yet: a file is not there. The plan can be shown without it."""


def unsupported(reason: str) -> Support:
    """The answer no, with its reason: a clause such as `head_dim is 256, at most 128 works`."""
    return Support(False, reason)


@dataclass(frozen=True)
class Approximation:
    """What a memory strategy approximates, and how far that moves a step away from a plain one."""

    reason: str
    """What is approximated, as a clause: `the frozen weights are kept in 4 bits`."""
    tolerance: float
    """The largest distance that the conformance kit accepts, relative to the size of what is compared."""
    outputs: bool
    """Whether the model's outputs move at once; if not, only what it learns does."""


@dataclass(frozen=True)
class NoSettings:
    """The settings of a component that has none."""


class Component(ABC, Generic[S]):
    """A class whose attributes are its metadata and whose methods do the work.

    An instance holds validated settings and nothing heavy; torch is imported inside methods. The first line of the
    class's docstring is its summary in every list.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    requires: ClassVar[Requires] = Requires()
    Settings: ClassVar[type] = NoSettings
    settings_version: ClassVar[int] = 1

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring, without a full stop."""
        return (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")

    @classmethod
    def migrate(cls, settings: Mapping[str, Any], version: int) -> Mapping[str, Any]:
        """Settings that an older `version` of this component wrote, as this version wants them."""
        return settings

    def validate(self, plan: Plan) -> Iterable[str]:
        """Why this component cannot work in this plan, a clause each; nothing when it can. A file that may yet come is
        `MissingFile`."""
        return ()

    def exports(self) -> Mapping[str, Callable[[Any, Path], Sequence[str] | None]]:
        """The formats of other tools that a PEFT method or a model writes: name to a function of (Assembly, empty folder), which
        may return clauses on what that tool will make of it, and raises CheckpointError for what it would not open.

        A method is given the model with its adapter in place, a model itself with the adapter folded in."""
        return {}
