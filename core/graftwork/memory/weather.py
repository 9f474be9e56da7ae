"""The memory weather: which batches of a run's own data would not fit, and what makes all of them fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from graftwork.build import compose
from graftwork.config.sizes import format_size
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan
from graftwork.data.store import Array
from graftwork.errors import GraftworkError
from graftwork.memory.budget import Counted
from graftwork.memory.course import Course, Courses, micro_batch_of

MAX_REHEARSALS = 40
"""How many micro-batches are rehearsed to tell which fit; what is not decided then counts as what does not."""
PIXELS = "max_pixels"
"""The setting of a model that bounds the pixels of an image."""
SIDE = 28
"""`max_pixels` is a square of so many pixels, or of a multiple: two patches of 14, of which many encoders make a token."""


@dataclass(frozen=True)
class Weather:
    """What a run's batches need."""

    budget: int
    """In bytes, as are all peaks."""
    micro_batch: int
    batches: int
    """Of the whole run."""
    too_large: tuple[int, ...]
    """The batches that would not fit, counted from 1, those that are not decided among them."""
    undecided: int
    peak: int
    """Of the batch that needs the most of those that were rehearsed."""
    worst: int
    """That batch, counted from 1."""
    records: tuple[str, ...]
    """Where some of its records were read, those with the most tokens first, with the sizes of their images."""
    rehearsals: int
    max_pixels: int | None = None
    """The setting of the model that makes all fit; None where it has none, or all fit, or none does."""
    peak_then: int | None = None
    smaller_micro_batch: int | None = None
    """The micro-batch that makes all fit without it; None where all fit, or none does."""

    @property
    def share(self) -> float:
        """The share of the batches that would not fit, 0 to 1."""
        return len(self.too_large) / self.batches

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "share": self.share, "sentences": self.sentences()}

    def sentences(self) -> list[str]:
        """The same as people read it."""
        count, room = len(self.too_large), format_size(self.budget)
        of = f"{count:,} of {self.batches:,} batches ({self.share:.1%})".replace("%", " %")
        most = "at most " if self.undecided else ""
        found = [
            f"weather: {most}{of} would not fit into {room}, {self.micro_batch} records at a time; of those rehearsed "
            f"batch {self.worst:,} needs the most, {format_size(self.peak)}: {'; '.join(self.records)}"
        ]
        if self.max_pixels is not None:
            found.append(
                f"model.{PIXELS} = {self.max_pixels} makes all of them fit; the largest then needs {format_size(self.peak_then or 0)}"
            )
        if self.smaller_micro_batch is not None:
            found.append(f"train.micro_batch_size = {self.smaller_micro_batch} makes all of them fit")
        if count and len(found) == 1:
            found.append("smaller images do not make all of them fit; lower train.max_length, or add memory strategies")
        return found


class Known:
    """What rehearsals have shown. More of everything needs no less memory, so a micro-batch that has no more of anything than one that
    fits, fits, and one that has no less of anything than one that does not, does not."""

    def __init__(self) -> None:
        self.points: list[Array] = []
        self.peaks: list[int] = []

    def decided(self, points: Array, budget: int) -> tuple[Array, Array]:
        """Which of these points are known to fit, and which not to: bool each."""
        import numpy

        fits, exceeds = (numpy.zeros(len(points), dtype=bool) for _ in range(2))
        for known, peak in zip(self.points, self.peaks, strict=True):
            if peak <= budget:
                fits |= (points <= known).all(1)
            else:
                exceeds |= (points >= known).all(1)
        return fits, exceeds & ~fits

    def estimates(self, points: Array) -> Array:
        """Roughly how much each needs, to choose what to rehearse next; nothing is decided by it."""
        import numpy

        if len(self.points) <= points.shape[1]:
            return (points / numpy.maximum(points.max(0), 1)).sum(1)
        known = numpy.column_stack([numpy.array(self.points), numpy.ones(len(self.points))])
        scale = numpy.maximum(known.max(0), 1)
        weights = numpy.linalg.lstsq(known / scale, numpy.array(self.peaks, dtype=float), rcond=None)[0]
        return points @ (weights / scale)[:-1] + weights[-1]


class Forecast:
    """Tells the weather of a plan by rehearsals of some of its micro-batches on one model."""

    def __init__(
        self,
        plan: Plan,
        lookup: Lookup,
        counted: Counted,
        budget: int,
        listen: Callable[[str], None] = lambda what: None,
    ) -> None:
        """`counted` is the plan's model; `listen` is called with what is looked at before it takes a while."""
        self.plan, self.lookup, self.counted, self.budget, self.listen = plan, lookup, counted, budget, listen
        self.known, self.rehearsals = Known(), 0
        self.courses = Courses(lookup, counted.processes)

    def weather(self) -> Weather:
        """The weather of the plan, and what clears it up."""
        course = self.course(self.plan)
        peaks = self.rehearse_until_decided(course, MAX_REHEARSALS)
        fits, exceeds = self.known.decided(course.points, self.budget)
        worst = max(peaks, key=peaks.__getitem__)
        found = Weather(
            self.budget,
            micro_batch_of(self.plan),
            course.batches,
            tuple(sorted({int(step) + 1 for step in course.steps[~fits]})),
            len({*course.steps[~fits].tolist()} - {*course.steps[exceeds].tolist()}),
            peaks[worst],
            int(course.steps[worst]) + 1,
            course.names(worst),
            self.rehearsals,
        )
        if not found.too_large:
            return found
        pixels, peak = self.largest_pixels(course)
        return replace(
            found,
            max_pixels=pixels,
            peak_then=peak,
            smaller_micro_batch=self.largest_micro_batch(),
            rehearsals=self.rehearsals,
        )

    def rehearse_until_decided(self, course: Course, limit: int, *, all_or_none: bool = False) -> dict[int, int]:
        """Rehearse micro-batches, the largest first and then one in the middle of what is open, until all are decided or `limit` is
        reached, and with `all_or_none` until one does not fit. Returns the peaks of what was rehearsed, by number."""
        import numpy

        found: dict[int, int] = {}
        while len(found) < limit:
            fits, exceeds = self.known.decided(course.points, self.budget)
            estimates = self.known.estimates(course.points)
            largest, unsure = int(estimates.argmax()), numpy.flatnonzero(~fits & ~exceeds)
            if all_or_none and exceeds.any():
                break
            if not found:
                number = largest
            elif len(unsure):
                number = int(unsure[estimates[unsure].argsort()[len(unsure) // 2]])
            elif largest not in found and not all_or_none:
                number = largest
            else:
                break
            found[number] = self.peak(course, number)
        return found

    def peak(self, course: Course, number: int) -> int:
        """What a micro-batch needs, rehearsed."""
        self.listen(f"batch {int(course.steps[number]) + 1:,} of {course.batches:,}")
        with self.on_real_tensors():
            cut = course.micro_batch(number)
        step = self.counted.whole(self.counted.watched.step(cut, alone=course.alone))
        self.rehearsals += 1
        self.known.points.append(course.points[number])
        self.known.peaks.append(step.footprint.peak)
        return step.footprint.peak

    def largest_pixels(self, course: Course) -> tuple[int | None, int | None]:
        """The largest `max_pixels` with which all batches fit, to a side of `SIDE` pixels, and the peak then; None where the model has no
        such setting, or no value helps."""
        settings = self.plan.model_spec.model.settings
        if PIXELS not in settings:
            return None, None
        area = max((width * height for each in course.sizes for width, height in each), default=0)
        low, high = 0, int(min(area, settings[PIXELS] or area) ** 0.5 / SIDE)
        try:
            compose.processor_of(with_pixels(self.plan, area), self.lookup)
        except GraftworkError:
            return None, None  # The model has the setting, and its processor does not follow it.
        peak = None
        while low < high:
            middle = (low + high + 1) // 2
            if (found := self.peak_if_all_fit(with_pixels(self.plan, (middle * SIDE) ** 2))) is not None:
                low, peak = middle, found
            else:
                high = middle - 1
        return ((low * SIDE) ** 2, peak) if low else (None, None)

    def largest_micro_batch(self) -> int | None:
        """The largest micro-batch, the present one halved again and again, with which all batches fit."""
        size = micro_batch_of(self.plan)
        while size > 1:
            size = (size + 1) // 2
            if self.peak_if_all_fit(with_micro_batch(self.plan, size)) is not None:
                return size
        return None

    def peak_if_all_fit(self, plan: Plan) -> int | None:
        """The most that was rehearsed of a plan whose batches all fit; None where one does not, or the plan is refused."""
        try:
            course = self.course(plan)
        except GraftworkError:
            return None
        peaks = self.rehearse_until_decided(course, MAX_REHEARSALS, all_or_none=True)
        fits, _ = self.known.decided(course.points, self.budget)
        return max(peaks.values()) if fits.all() and peaks else None

    @contextmanager
    def on_real_tensors(self) -> Iterator[None]:
        """While entered, nothing is fake, and nothing is tracked."""
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with self.counted.watched.tracker.paused(), unset_fake_temporarily():
            yield

    def course(self, plan: Plan) -> Course:
        """The micro-batches of a plan, as they come in training."""
        with self.on_real_tensors():
            return self.courses.of(plan)


def with_micro_batch(plan: Plan, size: int) -> Plan:
    """The plan with another micro-batch."""
    train = replace(plan.run_context.train, micro_batch_size=size)
    return replace(plan, run_context=replace(plan.run_context, train=train))


def with_pixels(plan: Plan, pixels: int) -> Plan:
    """The plan whose model sees images of at most so many pixels."""
    model = replace(plan.model_spec.model, settings={**plan.model_spec.model.settings, PIXELS: pixels})
    return replace(plan, model_spec=replace(plan.model_spec, model=model))
