"""What a training run is fed: records encoded batch by batch, those that cannot be used left out and counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from graftwork import processes
from graftwork.config.machine import available_memory
from graftwork.contracts.batch import Encoded
from graftwork.contracts.model import Processor
from graftwork.contracts.packing import MicroBatch, micro_batches
from graftwork.contracts.plan import RunContext
from graftwork.data.training_data import TrainingData, encode
from graftwork.errors import DataError
from graftwork.train import data_parallel

Found: TypeAlias = Encoded | DataError
"""A record, encoded, or why it cannot be."""

MAX_KEPT, SHARE = 2 << 30, 8
"""The most bytes of encoded records that are kept, and into how many parts what is free of main memory is divided for that."""


def room() -> int:
    """The bytes that encoded records may take of main memory; 0 where it is not known what is free."""
    return min(MAX_KEPT, available_memory() // SHARE) // processes.on_this_machine()


def size_of(encoded: Encoded) -> int:
    """The bytes of a record, but for a few."""
    arrays: list[Any] = [encoded.input_ids, encoded.image_token_mask, encoded.labels, *encoded.token_fields.values()]
    return sum(each.nbytes for each in (*arrays, *encoded.pixels.values()))


class Feed:
    """The data of a run, encoded."""

    def __init__(self, run_context: RunContext, processor: Processor, data: TrainingData) -> None:
        self.settings, self.strict = run_context.train, run_context.strict_data
        self.processor, self.data = processor, data
        self.sampler = data.sampler(run_context)
        settings, records = run_context.train, len(data.records)
        again = settings.steps * settings.batch_size > records if settings.steps else settings.epochs > 1
        self.room = room() if again else 0
        """The bytes that encoded records may take; 0 where none comes again, or there is one so large that not all might fit."""
        self.kept: dict[int, Encoded] = {}

    def indices(self, batch: int) -> list[int]:
        """This process's records of a batch."""
        return data_parallel.strided_slice(self.sampler.batch(batch))

    def share(self, batch: int, found: Iterable[tuple[int, Found]] | None = None) -> data_parallel.Share:
        """This process's encoded records of a batch, in micro-batches; what was `found` of its records, where that was done elsewhere."""
        settings, indices = self.settings, self.indices(batch)
        encoded, unusable = self._encode(indices, found)
        examples = [
            encoded[index] for index in indices if index in encoded
        ]  # One may come twice, where sources are mixed.
        images = {index: len(self.data.records[index].images) for index in encoded}
        return data_parallel.Share(
            micro_batches(examples, settings.micro_batch_size, settings.max_length if settings.packing else None),
            sum(images[index] for index in indices if index in encoded),
            unusable,
        )

    def first_usable(self) -> list[Encoded]:
        """All encoded records of the first batch that has any that can be used."""
        for batch in range(len(self.data.records)):
            if encoded := self.encode(self.sampler.batch(batch)):
                return [*encoded.values()]
        raise self.nothing_usable()

    def shortest_with_images(self) -> Encoded:
        """The shortest record with an image that can be used; without images where there are none."""
        import numpy

        for index in numpy.lexsort((self.data.lengths, ~self.data.measured.has_images)).tolist():
            if encoded := self.encode([index]):
                return encoded[index]
        raise self.nothing_usable()

    def some(self, count: int) -> list[Encoded]:
        """A few records that can be used, the shortest one with an image first, if there is any; none is counted here."""
        import numpy

        measured, chosen = self.data.measured.has_images, list[Encoded]()
        with_images = numpy.flatnonzero(measured)
        by_length = with_images[numpy.argsort(self.data.lengths[with_images], kind="stable")].tolist()
        for indices in ([index] for index in by_length):
            if chosen := [*self._encode(indices)[0].values()]:
                break
        for batch in range(len(self.data.records)):
            if len(chosen) >= count:
                break
            chosen += self._encode(self.sampler.batch(batch)[: count - len(chosen)])[0].values()
        return chosen

    def largest(self, rows: int) -> MicroBatch:
        """A micro-batch of so many rows: the longest record that can be used, and the longest with images, if there are any; with packing as many as
        fill the rows. None is counted here."""
        import numpy

        settings, packing = self.settings, self.settings.packing
        shortest_first = numpy.argsort(self.data.lengths, kind="stable")
        with_images = shortest_first[self.data.measured.has_images[shortest_first]]
        order = [*shortest_first[::-1][:1], *with_images[::-1], *shortest_first[::-1]]
        found, left = list[Encoded](), rows * settings.max_length if packing else rows
        for index in dict.fromkeys(map(int, order)):
            if left <= 0:
                break
            for each in self._encode([index])[0].values():
                found.append(each)
                left -= len(each.input_ids) if packing else 1
        return micro_batches(found, rows, settings.max_length if packing else None)[0]

    def two_different(self) -> list[Encoded]:
        """Two records of different text, with images where there are some; the same twice where all have the same."""
        import numpy

        first = self.shortest_with_images()
        others = [each for each in self.first_usable() if not numpy.array_equal(each.input_ids, first.input_ids)]
        return [first, min(others, key=lambda each: (not each.pixels, len(each.input_ids)), default=first)]

    def validation(self, count: int, seed: int) -> list[Encoded]:
        """At most `count` records for validation, encoded, drawn by the seed; those that cannot be used are counted."""
        import torch

        records, found = self.data.validation, list[Encoded]()
        for index in torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist():
            if len(found) == count:
                break
            try:
                found.append(encode(records[index], self.processor, self.settings.max_length))
            except DataError as error:
                if self.strict:
                    raise
                self.data.validation_unusable.setdefault(index, f"{records[index].place}: {error}")
        return found

    def nothing_usable(self) -> DataError:
        """What to raise when no record can be encoded."""
        return DataError("no record of the data can be used", self.data.summary["bad"][-3:])

    def encode(self, indices: Sequence[int]) -> dict[int, Encoded]:
        """Records, encoded, by index; one whose image cannot be read, or that keeps no label after the cut, is left out
        and counted once."""
        encoded, unusable = self._encode(indices)
        self.data.leave_out(unusable)
        return encoded

    def found(self, index: int) -> Found:
        """A record, encoded, or why it cannot be; kept for when it comes again, where memory allows."""
        if (known := self.kept.get(index)) is not None:
            return known
        found = self.made(index)
        if not self.room or not isinstance(found, Encoded):
            return found
        if size_of(found) * len(self.data.records) <= self.room:
            self.kept[index] = found
        else:
            self.room = 0
            self.kept.clear()
        return found

    def made(self, index: int) -> Found:
        """A record, encoded anew, or why it cannot be."""
        try:
            return encode(self.data.records[index], self.processor, self.settings.max_length)
        except DataError as error:
            return DataError(error.sentence, error.details)  # As such it can be sent to another process.

    def _encode(
        self, indices: Sequence[int], found: Iterable[tuple[int, Found]] | None = None
    ) -> tuple[dict[int, Encoded], dict[int, str]]:
        """Records, encoded, and a line for each that cannot be, by index."""
        encoded, unusable = dict[int, Encoded](), dict[int, str]()
        for index, each in found or ((index, self.found(index)) for index in dict.fromkeys(indices)):
            if isinstance(each, Encoded):
                encoded[index] = each
            elif self.strict:
                raise each
            else:
                unusable[index] = f"{self.data.records[index].place}: {each}"
        return encoded, unusable
