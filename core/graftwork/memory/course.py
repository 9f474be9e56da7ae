"""The micro-batches of a run, in order, and how much each holds, counted from the headers of its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from graftwork.build import compose
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.packing import MicroBatch, rows_of_step
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import Record
from graftwork.data.image_sizes import UNKNOWN, Size, sizes_of
from graftwork.data.sampling import steps_for
from graftwork.data.store import Array
from graftwork.data.training_data import encode, load_training_data
from graftwork.errors import DataError
from graftwork.memory.images import length_of, with_blanks

Key = tuple[str, str]
NAMED = 3
"""How many records of a micro-batch are named, and images of a record."""


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


class Courses:
    """The courses of plans about the same data, whose images are measured and whose labels are counted once."""

    def __init__(self, lookup: Lookup, processes: int) -> None:
        self.lookup, self.processes = lookup, processes
        self.labels: dict[Key, int] = {}
        """Of each record, by its id, as the sizes of its images."""
        self.sizes: dict[Key, tuple[Size, ...]] = {}

    def of(self, plan: Plan) -> Course:
        """The micro-batches of a plan, as they come in training."""
        import numpy

        settings, processor = plan.run_context.train, compose.processor_of(plan, self.lookup)
        data = load_training_data(plan, self.lookup, processor)
        new = [record for record in data.records if key_of(record) not in self.sizes]
        self.sizes |= zip(map(key_of, new), sizes_of(new).of_records(), strict=True)
        sizes = [self.sizes[key_of(record)] for record in data.records]
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
        alone = -(-settings.batch_size // self.processes) <= per_step

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
        count = self.processes
        yield from filter(None, (places[rank::count] for rank in range(count)))

    def labels_of(self, processor: Processor, record: Record) -> int:
        """How many labels a record has: those of its text, without its images."""
        key = key_of(record)
        if key not in self.labels:
            turns = tuple(replace(turn, text=turn.text.replace("<image>", "")) for turn in record.turns)
            try:
                self.labels[key] = processor.encode(replace(record, turns=turns, images=())).num_label_tokens
            except DataError:
                self.labels[key] = 0
        return self.labels[key]


def key_of(record: Record) -> Key:
    """What tells a record of data from any other; ids alone need not."""
    return record.where, record.id


def micro_batch_of(plan: Plan) -> int:
    """The records of a micro-batch, at most."""
    return plan.run_context.train.micro_batch_size or plan.run_context.train.batch_size


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
