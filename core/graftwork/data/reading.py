"""The records of a plan, read once and kept for the next command, and what else is computed of them and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from graftwork.config.restore import restore_component
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Plan, RunContext
from graftwork.data import cache, pipeline
from graftwork.data.measuring import has_same_images, image_states, keep_image_states, kept_image_states
from graftwork.data.pipeline import PipelineResult
from graftwork.data.samples import SampleOfEachAnswer, SampleSettings
from graftwork.data.store import Array
from graftwork.errors import NoRoom


class Saved(Protocol):
    """What can be kept in a folder."""

    def save(self, folder: Path) -> None:
        """Write everything into an empty folder."""
        ...


T = TypeVar("T", bound=Saved)


@dataclass(frozen=True)
class Reading:
    """Records that were read, new or kept from an earlier command."""

    result: PipelineResult
    images: Array
    """What `image_states` gave of them."""
    key: str | None
    """The hash of all that the records depend on but their images; None where they could not be kept."""

    def kept(self, compute: Callable[[], T], load: Callable[[Path], T], *depends: Any) -> T:
        """What is computed of these records, new or kept under all that it `depends` on besides them."""
        if self.key is not None:
            images = hashlib.sha256(self.images.tobytes()).hexdigest()
            try:
                return load(
                    cache.entry(
                        cache.key_of(self.key, images, *depends),
                        lambda folder: compute().save(folder),
                        lambda folder: bool(load(folder)),
                    )
                )
            except (OSError, NoRoom):
                pass  # There is no place to keep it: it is computed for this run alone.
        return compute()


def read(plan: Plan, lookup: Lookup, processor: Processor) -> Reading:
    """Read the records of a plan; those of an earlier command where nothing has changed since. A record becomes a sample for
    each answer that is trained on, where the processor writes earlier answers otherwise."""
    run_context = plan.run_context
    sources: list[Any] = [restore_component(choice, lookup) for choice in run_context.sources]
    operators: list[Any] = [restore_component(choice, lookup) for choice in run_context.operators]
    sample_each_answer: bool = getattr(processor, "trains_last_answer_only", False)
    if sample_each_answer:
        operators.append(SampleOfEachAnswer(SampleSettings(run_context.train_on)))

    def into(folder: Path | None) -> PipelineResult:
        return pipeline.read_records(
            sources, operators, seed=run_context.seed, strict=run_context.strict_data, folder=folder
        )

    def keep(folder: Path) -> None:
        into(folder)
        keep_image_states(folder)

    try:
        if (key := key_of(run_context, [*sources, *operators], sample_each_answer)) is not None:
            result = into(cache.entry(key, keep, has_same_images))
            return Reading(result, kept_image_states(result.folder), key)
    except (OSError, NoRoom):
        pass  # There is no place to keep it: it is read for this run alone.
    result = into(None)
    return Reading(result, image_states(result.folders[0]), None)


def key_of(run_context: RunContext, components: Sequence[Any], sample_each_answer: bool) -> str | None:
    """The hash of all that records depend on but their images; None where that is not known."""
    files = [each.files() for each in components]
    if None in files:
        return None
    choices = [asdict(choice) for choice in (*run_context.sources, *run_context.operators)]
    hashes = cache.known_hashes(file for each in files for file in each)
    samples = [run_context.train_on] * sample_each_answer
    return cache.key_of(choices, hashes, run_context.seed, run_context.strict_data, *samples)
