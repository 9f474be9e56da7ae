"""The memory weather: which batches of a run's own data would not fit, and what makes all of them fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from graftwork.build import compose
from graftwork.config.sizes import format_size
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.packing import MicroBatch, rows_of_step
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import Record
from graftwork.data.image_sizes import UNKNOWN, Size, sizes_of
from graftwork.data.sampling import steps_for
from graftwork.data.store import Array
from graftwork.data.training_data import encode, load_training_data
from graftwork.errors import DataError, GraftworkError
from graftwork.memory.budget import Counted
from graftwork.memory.images import length_of, with_blanks

MAX_REHEARSALS = 40
"""How many micro-batches are rehearsed to tell which fit; what is not decided then counts as what does not."""
PIXELS = "max_pixels"
"""The setting of a model that bounds the pixels of an image."""
SIDE = 28
"""`max_pixels` is a square of so many pixels, or of a multiple: two patches of 14, of which many encoders make a token."""
Key = tuple[str, str]
NAMED = 3
"""How many records of the worst batch are named."""


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


@dataclass(frozen=True)
class Course:
    """The micro-batches of a run, in order."""

    processor: Processor
    records: Sequence[Record]
    sizes: Sequence[tuple[Size, ...]]
    members: Sequence[Sequence[Sequence[int]]]
    """The rows of each micro-batch: the records of each, by their places."""
    steps: Array
    """Which batch each belongs to, counted from 0."""
    points: Array
    """What each has: padded tokens, the tokens of its longest row, those of its images, those of its largest image, labels, its images times the tokens of the largest, and whether gradients
    are there before it; `[micro-batches, 7]`."""
    batches: int
    max_length: int
    packing: bool
    alone: bool
    """Whether each is a whole batch."""

    def micro_batch(self, number: int) -> MicroBatch:
        """A micro-batch with black images in the place of its own."""
        rows = self.members[number]
        examples = [
            encode(with_blanks(self.records[place], self.sizes[place]), self.processor, self.max_length)
            for row in rows
            for place in row
        ]
        return MicroBatch(examples, [len(row) for row in rows] if self.packing else ())

    def names(self, number: int) -> tuple[str, ...]:
        """Some records of a micro-batch, those with the largest images first."""

        def pixels(place: int) -> int:
            return sum(width * height for width, height in self.sizes[place])

        places = sorted(dict.fromkeys(place for row in self.members[number] for place in row), key=pixels, reverse=True)
        sizes = [", ".join(f"{w} x {h}" for w, h in self.sizes[place][:NAMED]) for place in places]
        named = [
            f"{self.records[place].place} ({each})" if each else self.records[place].place
            for place, each in zip(places, sizes, strict=True)
        ]
        return (*named[:NAMED], *([f"{len(named) - NAMED} more"] if len(named) > NAMED else []))


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
        self.labels: dict[Key, int] = {}
        """Of each record, by its id, as the sizes of its images."""
        self.sizes: dict[Key, tuple[Size, ...]] = {}

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
            return self._course(plan)

    def _course(self, plan: Plan) -> Course:
        import numpy

        settings, processor = plan.run_context.train, compose.processor_of(plan, self.lookup)
        data = load_training_data(plan, self.lookup, processor)
        new = [record for record in data.records if (record.where, record.id) not in self.sizes]
        self.sizes |= zip(((each.where, each.id) for each in new), sizes_of(new).of_records(), strict=True)
        sizes = [self.sizes[(record.where, record.id)] for record in data.records]
        sampler, per_step = data.sampler(plan.run_context), micro_batch_of(plan)
        batches = steps_for(sampler.records, settings.batch_size, settings.epochs, settings.steps)
        tokens, largest = image_tokens(processor, sizes)
        labels = numpy.array([self.labels_of(processor, record) for record in data.records])
        for place in data.cut:  # of which less is left the more its images take
            cut = encode(with_blanks(data.records[place], sizes[place]), processor, settings.max_length)
            labels[place] = cut.num_label_tokens
        members: list[list[list[int]]] = []
        steps: list[int] = []
        for step in range(batches):
            for share in self.shares(sampler.batch(step)):
                share = [place for place in share if UNKNOWN not in sizes[place]]
                limit = settings.max_length if settings.packing else None
                order = rows_of_step(data.lengths[share].tolist(), per_step, limit)
                rows = [[share[n] for n in row] for row in order]
                members += [rows[start : start + per_step] for start in range(0, len(rows), per_step)]
                steps += [step] * (len(members) - len(steps))
        alone = -(-settings.batch_size // self.counted.processes) <= per_step

        def point(rows: list[list[int]]) -> tuple[int, ...]:
            places = [place for row in rows for place in row]
            longest = max(int(data.lengths[row].sum()) for row in rows)
            images, most = sum(len(sizes[place]) for place in places), int(largest[places].max())
            # Images are padded to the one with the most tiles.
            seen = int(tokens[places].sum()), most, int(labels[places].sum()), images * most
            return (len(rows) * longest, longest, *seen, int(not alone))

        points = numpy.array([point(rows) for rows in members], dtype=numpy.int64)
        return Course(
            processor,
            data.records,
            sizes,
            members,
            numpy.array(steps),
            points,
            batches,
            settings.max_length,
            settings.packing,
            alone,
        )

    def shares(self, places: list[int]) -> Iterator[list[int]]:
        """What each process has of a batch."""
        count = self.counted.processes
        yield from filter(None, (places[rank::count] for rank in range(count)))

    def labels_of(self, processor: Processor, record: Record) -> int:
        """How many labels a record has: those of its text, without its images."""
        key = (record.where, record.id)
        if key not in self.labels:
            turns = tuple(replace(turn, text=turn.text.replace("<image>", "")) for turn in record.turns)
            try:
                self.labels[key] = processor.encode(replace(record, turns=turns, images=())).num_label_tokens
            except DataError:
                self.labels[key] = 0
        return self.labels[key]


def micro_batch_of(plan: Plan) -> int:
    """The records of a micro-batch, at most."""
    return plan.run_context.train.micro_batch_size or plan.run_context.train.batch_size


def with_micro_batch(plan: Plan, size: int) -> Plan:
    """The plan with another micro-batch."""
    train = replace(plan.run_context.train, micro_batch_size=size)
    return replace(plan, run_context=replace(plan.run_context, train=train))


def with_pixels(plan: Plan, pixels: int) -> Plan:
    """The plan whose model sees images of at most so many pixels."""
    model = replace(plan.model_spec.model, settings={**plan.model_spec.model.settings, PIXELS: pixels})
    return replace(plan, model_spec=replace(plan.model_spec, model=model))


def image_tokens(processor: Processor, sizes: Sequence[tuple[Size, ...]]) -> tuple[Array, Array]:
    """How many tokens the images of each record take, and the largest of them: int64 each."""
    import numpy

    without = length_of(processor, ())
    taken: dict[tuple[Size, ...], int] = {}

    def tokens(each: tuple[Size, ...]) -> int:
        if each not in taken:
            length = 0.0 if not each or UNKNOWN in each else length_of(processor, each) - without
            taken[each] = int(length) if length < float("inf") else 0
        return taken[each]

    whole = [tokens(each) for each in sizes]
    return numpy.array(whole), numpy.array([max((tokens((size,)) for size in each), default=0) for each in sizes])
