"""What a run begins with: the trained tensors of an earlier checkpoint, and the chain of those that came before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork import weights
from graftwork.build import compose, filling
from graftwork.checkpoint import manifest, store
from graftwork.checkpoint.manifest import Ancestor
from graftwork.config import settings
from graftwork.config.restore import restore_component
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice, ModelSpec, Plan, WeightsRef
from graftwork.errors import AdapterError, CheckpointError


@dataclass(frozen=True)
class Beginning:
    """The checkpoint whose tensors a run begins with."""

    folder: Path
    ancestors: tuple[Ancestor, ...]
    """The checkpoint itself at the end, before it what its own run began with, the oldest first."""


def beginning(plan: Plan, lookup: Lookup, *, hashed: bool = True) -> Beginning | None:
    """What a plan begins with, compared with the plan; None where everything begins anew.

    Other data and other ways to train are what it is for. CheckpointError, in one sentence, where the base, the model, the
    method, settings that say what its tensors are, or roles differ, and where its files are not as they were written. Without
    `hashed` no file of weights is read for it.
    """
    ref = plan.run_context.init_from
    if ref is None:
        return None
    where = f"peft.init_from '{ref.given}'"
    try:
        folder = store.newest(Path(ref.path))
        read = manifest.read(folder)
        if hashed:
            manifest.check_files(read, folder)
            plan = store.with_fingerprints(plan, folder)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.sentence}", error.details) from None
    if differing := list(_differences(read.plan.model_spec, plan.model_spec, lookup)):
        raise CheckpointError(
            f"{where}: the tensors of '{folder}' do not fit this run: {'; '.join(differing)}; make them equal, or begin without "
            "init_from"
        )
    if hashed:
        shape = compose.build_shape(plan, lookup, processor_folder=folder / store.PROCESSOR)
        try:
            filling.check_keys(shape.state_to_save(), weights.shapes_in(folder / store.TENSORS))
        except AdapterError as error:
            raise CheckpointError(f"{where}: {error.sentence}", error.details) from None
    seal = weights.sha256(folder / manifest.FILE)
    return Beginning(folder, (*read.initialised_from, Ancestor(seal, ref.given, read.step)))


def _differences(then: ModelSpec, now: ModelSpec, lookup: Lookup) -> Iterator[str]:
    """What gives an adapter's tensors another shape or meaning in another run, as clauses."""
    yield from _of_component("model", then.model, now.model, lookup)
    for part in sorted(then.parts.keys() | now.parts.keys()):
        yield from _of_component(f"model.parts.{part}", then.parts.get(part), now.parts.get(part), lookup)
    yield from _of_component("peft", then.peft, now.peft, lookup)
    for key in ("on", "also_train"):
        before, after = (sorted(set(getattr(spec, key))) for spec in (then, now))
        if before != after:
            yield _clause(f"peft.{key}", ", ".join(before) or "empty", ", ".join(after) or "empty")


def _of_component(where: str, then: Choice | None, now: Choice | None, lookup: Lookup) -> Iterator[str]:
    if then is None or now is None:
        if then is not now:
            yield _clause(f"{where}.use", *(choice.name if choice else "none" for choice in (then, now)))
        return
    if then.name != now.name:
        yield _clause(f"{where}.use", then.name, now.name)
        return
    component = restore_component(then, lookup)
    free = getattr(component, "learning_settings", ())
    before, after = (settings.dump(restore_component(choice, lookup).settings) for choice in (then, now))
    yield from _of_tables(where, *({k: v for k, v in each.items() if k not in free} for each in (before, after)))
    yield from _of_tables(f"the configuration of {where}: ", then.config or {}, now.config or {})
    if (then.weights is None) != (now.weights is None) or (
        then.weights and now.weights and now.weights.sha256 not in ("", then.weights.sha256)
    ):
        yield _clause(f"{where}.weights", *map(_of_weights, (then.weights, now.weights)))


def _of_tables(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    separator = "" if where.endswith(" ") else "."
    for key in {**then, **now}:
        if (before := then.get(key)) != (after := now.get(key)):
            yield _clause(f"{where}{separator}{key}", before, after)


def _of_weights(ref: WeightsRef | None) -> str:
    return f"'{ref.given}' (sha256 {ref.sha256[:12]}…)" if ref else "none"


def _clause(what: str, then: Any, now: Any) -> str:
    return f"{what} is {then} there, and {now} here"
