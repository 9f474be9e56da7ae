"""The records of a run, measured in tokens: those that fit its context, and what happened to the rest."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from graftwork import processes
from graftwork.contracts.batch import Encoded
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Plan, RunContext
from graftwork.contracts.records import Record, RecordCounts
from graftwork.data import reading, splitting
from graftwork.data.digest import RECORD_FIELDS, image_hash
from graftwork.data.measuring import (
    ANY,
    LAST,
    MARKED,
    Measured,
    measure,
    processor_files,
)
from graftwork.data.pipeline import PipelineResult, StageCount
from graftwork.data.samples import marked
from graftwork.data.sampling import Sampler
from graftwork.data.store import Array, Joined, Mapped
from graftwork.errors import DataError

MAX_RECORDED = 100
"""How many bad records a checkpoint lists, so that its manifest stays small."""


@dataclass
class TrainingData:
    """The records of a run that fit its context, and what became of all others that were read."""

    records: Sequence[Record]
    """What batches are drawn from. Those that turn out to be unusable stay, so that every batch stays what it is."""
    measured: Measured
    """What is known of each of `records`; its length is what is used of it."""
    read: int
    bad: Sequence[str]
    """A line for each record that was left out before training."""
    stages: list[StageCount]
    """Who left them out."""
    too_long: int = 0
    """How many of them are longer than the run's limit."""
    cut: frozenset[int] = frozenset()
    """Which of `records` lose the end of their answer."""
    validation: Sequence[Record] = ()
    """The records that are kept for validation; no image of theirs is in `records`."""
    validation_fields: Array = ()
    """The `record_fields` of the records for validation."""
    validation_unusable: dict[int, str] = field(default_factory=dict)
    """Which of the records for validation could not be encoded: their lines by their places."""
    validation_losses: list[tuple[int, float | None]] = field(default_factory=list)
    """The steps after which the loss of `validation` was measured, and the mean over its labelled tokens, in nats;
    None where it was no finite number."""
    unusable: dict[int, str] = field(default_factory=dict)
    """Which of `records` could not be encoded when their batch came: their lines by their places."""

    def sampler(self, run_context: RunContext) -> Sampler:
        """What draws the batches of a run."""
        settings = run_context.train
        return Sampler(
            self.lengths,
            settings.batch_size,
            seed=run_context.seed,
            by_length=settings.group_by_length,
            sources=self.measured.sources,
            mix=run_context.mix,
        )

    @property
    def lengths(self) -> Array:
        """Of each record in tokens, as far as it is used."""
        return self.measured.lengths

    def leave_out(self, unusable: Mapping[int, str]) -> None:
        """Leave out records that could not be encoded; each counts once."""
        for index, line in unusable.items():
            self.unusable.setdefault(index, line)

    def leave_out_again(self, places: Sequence[int], recorded: Mapping[str, Any]) -> None:
        """Leave out what a run had left out in training when it saved the checkpoint that holds these `recorded` facts."""
        lines = recorded["bad"][recorded["left_out"] - len(places) :]
        lines += [f"{self.records[index].place}: left out earlier in this run" for index in places[len(lines) :]]
        self.leave_out(dict(zip(places, lines, strict=True)))

    @property
    def counts(self) -> RecordCounts:
        """How many records were read, used and left out, as far as is known by now."""
        used = len(self.records) + len(self.validation) - len(self.unusable)
        return RecordCounts(self.read, used, len(self.bad) + len(self.unusable))

    @property
    def usable(self) -> Array:
        """Whether each record can be used, as far as is known by now."""
        import numpy

        usable = numpy.ones(len(self.records), dtype=bool)
        usable[[*self.unusable]] = False
        return usable

    @property
    def summary(self) -> dict[str, Any]:
        """What became of the records, as plain data but for the lines on those left out, of which there may be many."""
        import numpy

        counts, cut, stages = self.counts, len(self.cut - self.unusable.keys()), [*self.stages]
        if self.unusable:
            stages.append(StageCount("training", counts.used + len(self.unusable), counts.used, len(self.unusable)))
        stages.append(StageCount("total", counts.read, counts.used, counts.left_out))
        names = self.measured.group_names
        sizes = numpy.bincount(self.measured.groups[self.usable], minlength=len(names)).tolist()
        groups = {name: size for name, size in zip(names, sizes, strict=True) if name and size}
        return {
            "read": counts.read,
            "records": counts.used,
            "left_out": counts.left_out,
            "left_out_in_training": len(self.unusable),
            "bad": Joined([self.bad, [self.unusable[index] for index in sorted(self.unusable)]]),
            "too_long": self.too_long + cut,
            "too_long_were": "cut" if cut else "left out",
            "answers_cut": cut,
            "stages": [stage._asdict() for stage in stages],
            "groups": dict(sorted(groups.items())),
            "validation": len(self.validation),
            "validation_losses": self.validation_losses,
            "validation_unusable": [*self.validation_unusable.values()][:MAX_RECORDED],
        }

    def recorded(self) -> dict[str, Any]:
        """The summary for a checkpoint, with the first lines alone of those on what was left out."""
        summary = self.summary
        return {**summary, "bad": summary["bad"][:MAX_RECORDED], "bad_in_all": summary["left_out"]}

    def digest(self) -> str:
        """The hash of which records are trained on and validated, and in which order, but for their images, whose files may differ
        in time between machines."""
        arrays = (self.measured.fields[:, :-1], self.measured.sources, self.validation_fields[:, :-1])
        return hashlib.sha256(b"|".join(each.tobytes() for each in arrays)).hexdigest()

    def faults(self) -> list[str]:
        """Why nothing but one answer can be learned from the records that can be used (see `faults_of`)."""
        usable = self.usable.nonzero()[0]
        return faults_of(self.measured.fields[usable], lambda place: self.records[int(usable[place])])


def load_training_data(plan: Plan, lookup: Lookup, processor: Processor) -> TrainingData:
    """Read the records of a plan and measure them in tokens; what is too long is cut or left out, and counted.

    Both are done once, and kept for the next run (see `data.cache`). Collective: the first process reads, and the others open
    what it has read where they share its cache, else read for themselves; DataError where they do not come to the same.
    """
    found = processes.first_alone(lambda: _read_and_measured(plan, lookup, processor))
    result, measured = found or _read_and_measured(plan, lookup, processor)
    data = _fitting(plan.run_context, result, measured)
    if len(set(processes.all_gather_object(data.digest()))) > 1:
        raise DataError(
            "the processes do not read the same data; let the data and GRAFTWORK_CACHE lie in folders that all machines share"
        )
    return data


def _read_and_measured(plan: Plan, lookup: Lookup, processor: Processor) -> tuple[PipelineResult, Measured]:
    """The records of a plan, and what is known of them, new or kept from an earlier run."""
    read = reading.read(plan, lookup, processor)
    with tempfile.TemporaryDirectory() as folder:
        files = processor_files(processor, Path(folder))
    choices = [asdict(each) for each in (plan.model_spec.model, *plan.model_spec.parts.values())]
    measured = read.kept(lambda: measure(read.result.records, processor, read.images), Measured.load, choices, files)
    return read.result, measured


def _fitting(run_context: RunContext, result: PipelineResult, measured: Measured) -> TrainingData:
    """The records that fit the run, and a line for each other."""
    import numpy

    # What the lines below hold lives as long as the run: not all that was measured of every record.
    records, lengths, reasons, settings = result.records, measured.lengths, measured.unfit, run_context.train
    max_length, cuts = settings.max_length, settings.too_long == "cut"
    marked_enough = measured.marks & {"all": ANY, "last": LAST, "marked": MARKED}[run_context.train_on] > 0

    def unfit_line(place: int) -> str:
        why = reasons.get(
            int(place),
            f'no answer of it is to be trained on: data.train_on is "{run_context.train_on}", or its weight is 0',
        )
        return f"{records[int(place)].place}: {why}"

    def long_line(place: int) -> str:
        return f"{records[int(place)].place}: {lengths[place]} tokens, and train.max_length is {max_length}"

    def record_at(place: int) -> Record:
        return marked(records[int(place)], run_context.train_on)

    fits = (lengths >= 0) & marked_enough
    unfit, long = (~fits).nonzero()[0], (fits & (lengths > max_length)).nonzero()[0]
    if run_context.strict_data:
        _refuse_any(records, measured, unfit, long, unfit_line, max_length)
    places = (fits & (cuts | (lengths <= max_length))).nonzero()[0]
    too_long = 0 if cuts else len(long)
    bad = Joined([Mapped(_dropped_line, result.bad), Mapped(unfit_line, unfit), Mapped(long_line, long[:too_long])])
    if not len(places):
        others = len(bad) - too_long
        raise DataError(
            f"no record is left to train on: {result.read} were read, {too_long} are longer than "
            f"train.max_length = {max_length} tokens" + (f", {others} could not be used" if others else ""),
            [*map(long_line, long[:3]), *bad[: min(others, 3)]],
        )
    fit = len(records) - len(unfit)
    stages = [
        *result.counts,
        *([StageCount("processor", len(records), fit, len(unfit))] if len(unfit) else []),
        *([StageCount("train.max_length", fit, len(places), too_long)] if too_long else []),
    ]
    places, held_out = _split(run_context, Mapped(record_at, places), places, measured)
    chosen = replace(measured.select(places), lengths=lengths[places].clip(max=max_length))
    return TrainingData(
        Mapped(record_at, places),
        chosen,
        result.read,
        bad,
        stages,
        too_long,
        frozenset(numpy.flatnonzero(numpy.isin(places, long)).tolist()),
        Mapped(record_at, held_out),
        measured.fields[held_out],
    )


def _refuse_any(
    records: Sequence[Record],
    measured: Measured,
    unfit: Array,
    long: Array,
    unfit_line: Callable[[int], str],
    most: int,
) -> None:
    """DataError for the first record that strict data may not have."""
    if len(unfit):
        raise DataError(measured.unfit.get(int(unfit[0])) or unfit_line(int(unfit[0])))
    if len(long):
        place = int(long[0])
        raise DataError(
            f"{records[place].place}: the record has {measured.lengths[place]} tokens, train.max_length is {most}"
        )


def _split(
    run_context: RunContext, records: Sequence[Record], places: Array, measured: Measured
) -> tuple[Array, Array]:
    """The places of the records to train on, and of those that are kept for validation."""
    if not run_context.validation:
        return places, places[:0]
    content_of = image_hash() if measured.by_content else None
    is_held_out = splitting.held_out(records, run_context.validation, run_context.seed, content_of)
    train, held_out = places[~is_held_out], places[is_held_out]
    if not len(train) or not len(held_out):
        raise DataError(
            f"data.validation = {run_context.validation:g} leaves nothing on one side: {len(train)} records to train on, "
            f"{len(held_out)} to validate, as records about the same image stay together; change the share, or set it to 0"
        )
    return train, held_out


def _dropped_line(dropped: Any) -> str:
    return f"{dropped.where}: {dropped.why}"


ONE_ANSWER = 0.95
"""The share of records from which one answer is all that can be learned."""


def faults_of(fields: Array, record_at: Callable[[int], Record]) -> list[str]:
    """Why nothing but one answer can be learned from records, as clauses; none for data that is as it should be.

    `fields` are their `record_fields`, and `record_at` gives the one at a place, to name its answer.
    """
    import numpy

    questions, answers, images = (fields[:, RECORD_FIELDS.index(name)] for name in ("questions", "answers", "images"))
    total = len(fields)
    _, firsts, counts = numpy.unique(answers, return_index=True, return_counts=True)
    most = int(counts.argmax())
    one_question = (questions == questions[0]).all() and (images == images[0]).all()
    if one_question and len(counts) == 1:
        return [f"the data is one record, {total} times: there is nothing to learn but that record"]
    if one_question:
        return [f"all {total} records ask the same of the same image, so that no answer can depend on it"]
    if counts[most] >= ONE_ANSWER * total:
        answer = [turn.text for turn in record_at(int(firsts[most])).turns if turn.role == "assistant"][-1]
        return [f"{counts[most]} of {total} records have the same answer, '{answer[:40]}', and no other can be learned"]
    return []


def encode(record: Record, processor: Processor, max_length: int) -> Encoded:
    """The first `max_length` tokens of a record, with its weight; DataError when it cannot be encoded, or nothing to learn is left."""
    return replace(cut(processor.encode(record), max_length), weight=record.weight)


def cut(example: Encoded, max_length: int) -> Encoded:
    """The first `max_length` tokens of a record; DataError when no label, or not the whole image, is among them."""
    if not example.num_label_tokens:
        raise DataError("nothing is to be learned from a record without a labelled token")
    if len(example.input_ids) <= max_length:
        return example
    shorter = replace(
        example,
        input_ids=example.input_ids[:max_length],
        image_token_mask=example.image_token_mask[:max_length],
        labels=example.labels[:max_length],
        token_fields={name: values[:max_length] for name, values in example.token_fields.items()},
    )
    if any(example.image_token_mask[max_length:]) or not shorter.num_label_tokens:
        raise DataError(f"nothing to learn is left of a record of {len(example.input_ids)} tokens cut to {max_length}")
    return shorter
