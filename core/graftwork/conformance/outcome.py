"""One check of one component, and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from graftwork.contracts.component import Component
from graftwork.contracts.plan import Choice, ModelSpec, Plan
from graftwork.errors import GraftworkError


class Skipped(Exception):
    """A check that cannot be made here; the message is the reason, as a clause."""


@dataclass(eq=False)
class Subject:
    """A component under examination."""

    component: type[Component[Any]]
    scratch: Path
    """An empty folder of its own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings that differ from their defaults."""
    config: Path | None = None
    """The folder that a model or a tower is configured from."""
    unmet_requirement: str = ""
    """The requirement that this machine does not meet, as a clause; empty when it meets all."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What one check has built and others use."""

    def create(self) -> Any:
        """A new instance."""
        from graftwork.config.settings import parse

        where = self.component.name
        return self.component(parse(self.component.Settings, self.settings, where=where, folder=Path.cwd()))

    def ready(self) -> Any:
        """A new instance; Skipped where this machine does not meet its requirements."""
        if self.unmet_requirement:
            raise Skipped(self.unmet_requirement)
        return self.create()

    def create_valid(self) -> Any:
        """A new instance whose `validate` accepts its settings; Skipped with its reason otherwise."""
        instance = self.ready()
        model = Choice("model", "none", "none", "none", "0")
        for reason in instance.validate(Plan(ModelSpec(model))):
            raise Skipped(f"{reason} (set it with --set {self.component.name}.KEY=VALUE)")
        return instance

    def once(self, key: str, build: Callable[[], Any]) -> Any:
        """The result of `build`, computed once; where it failed, only the first check that needs it fails."""
        if key not in self.kept:
            try:
                self.kept[key] = build()
            except Exception as error:
                self.kept[key] = error
                raise
        kept = self.kept[key]
        if isinstance(kept, Exception):
            raise kept if isinstance(kept, Skipped) else Skipped(f"{key} failed, as reported above")
        return kept


Check = Callable[[Subject], Iterator[str]]
"""Something that a component must do, named as a sentence; yields a sentence for everything that is wrong."""


class Outcome(NamedTuple):
    """The outcome of a check."""

    kind: str
    component: str
    check: str
    state: Literal["passed", "failed", "skipped"]
    sentence: str = ""
    """What was required, what happened and what to do; or why the check was skipped."""


def run_check(check: Check, subject: Subject) -> Outcome:
    """Run one check, up to the first thing that is wrong. Whatever the component raises is a failure too."""
    state: Literal["passed", "failed", "skipped"] = "failed"
    try:
        sentence = next(check(subject), "")
        state = "failed" if sentence else "passed"
    except Skipped as reason:
        state, sentence = "skipped", str(reason)
    except (Exception, SystemExit) as error:
        sentence = blame(error, subject.component)
    kind, name = getattr(subject.component, "kind", ""), getattr(subject.component, "name", "")
    return Outcome(kind, name, check.__name__.replace("_", " "), state, " ".join(sentence.split()))


def blame(error: BaseException, component: type[Component[Any]]) -> str:
    """An error as a sentence, with the line of the component's own package that it passed last."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, GraftworkError):
        what = f"{error.sentence.rstrip('.')}{f' ({error.details[0]})' if error.details else ''}"
    package, place, step = component.__module__.partition(".")[0], "", error.__traceback__
    while step is not None:
        frame = step.tb_frame
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
            place = f" ({Path(frame.f_code.co_filename).name}, line {step.tb_lineno}, in '{frame.f_code.co_name}')"
        step = step.tb_next
    return f"it must work here, and it raised {what.rstrip('.')}{place}; fix it"
