"""The training loop: one, for every model, method and strategy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.build import compose
from graftwork.checkpoint import ancestry, manifest, store, verification, writing
from graftwork.contracts import events
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.packing import MicroBatch
from graftwork.contracts.plan import Plan, TrainSettings
from graftwork.contracts.stepper import stepper_for
from graftwork.contracts.verdict import Verdict
from graftwork.data.sampling import steps_for
from graftwork.data.training_data import TrainingData, load_training_data
from graftwork.errors import AdapterError, CheckpointError, RunInterrupted
from graftwork.memory import budget
from graftwork.train import data_parallel, progress, resuming
from graftwork.train.accumulating import Accumulator
from graftwork.train.compiling import try_compiling
from graftwork.train.feeding import Feed
from graftwork.train.health import Health
from graftwork.train.interrupting import Signals
from graftwork.train.learning import Learning
from graftwork.train.log import Log, line_of
from graftwork.train.out_of_memory import OutOfMemory, free_memory, out_of_memory_told, peak_memory
from graftwork.train.packing import try_packing
from graftwork.train.preparing import Ahead
from graftwork.train.progress import Measurement
from graftwork.train.saving import Saving
from graftwork.train.schedule import learning_rate_factor, warmup_steps

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

EARLY_STEPS = 2
"""The steps after which the memory of all others is known: from the second on there is an optimizer's state."""


@dataclass
class Outcome:
    """How a run ended."""

    checkpoint: Path
    verdict: Verdict
    assembly: Assembly | None
    """The trained model, until whoever goes on without it lets it go."""
    data: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    peak: int | None = None
    """The most bytes that tensors took of the device; None on a device that does not count them."""


def train(
    plan: Plan,
    lookup: Lookup,
    out: Path,
    *,
    resume: bool = False,
    accept_data: bool = False,
    device: str | None = None,
    listen: Callable[[events.Event], None] = lambda event: None,
) -> Outcome:
    """Train a plan, and write its log and its checkpoints into `out`.

    With `resume` it goes on from the newest checkpoint of `out`, exactly: on a CPU the losses equal, to the last bit,
    those of a run that was never interrupted; with `accept_data` on other data than it began with, too. Where the device's memory does not hold the first steps, it begins again on
    the plan's next candidate, or with smaller micro-batches. Raises GraftworkError; an unhealthy run raises nothing: its
    verdict says so. SIGTERM and SIGINT raise RunInterrupted after the step, when it is saved. Collective: several processes share each step's records, and only the first writes and reports.
    """
    while True:
        try:
            return attempt(plan, lookup, out, resume=resume, accept_data=accept_data, device=device, listen=listen)
        except OutOfMemory as error:
            fallback = budget.next_fallback(plan) if error.early and processes.count() == 1 else None
            if fallback is None:
                raise
            message = f"{error.sentence.partition(';')[0]}; beginning again with {budget.describe_memory(fallback)}"
        listen(events.MemoryRanOut(out, message))
        plan = fallback
        free_memory()


def attempt(
    plan: Plan,
    lookup: Lookup,
    out: Path,
    *,
    resume: bool,
    accept_data: bool,
    device: str | None,
    listen: Callable[[events.Event], None],
) -> Outcome:
    """One try of `train`; OutOfMemory where the device's memory does not hold it."""
    import torch

    settings = plan.run_context.train
    start = resuming.starting_point(out, resume=resume)
    saved = resuming.resumable(start, plan) if start else None
    beginning = None if start else ancestry.beginning(plan, lookup)
    source = beginning.folder if beginning else start
    if processes.is_first():
        writing.sweep(out)
    budget.enforce(plan, device)
    try:
        assembly = compose.build(plan, lookup, device=device, **store.contents(source))
    except torch.OutOfMemoryError:
        raise OutOfMemory("while the model was built", early=start is None) from None
    data = load_training_data(plan, lookup, assembly.processor)
    steps = steps_for(data.sampler(plan.run_context).records, settings.batch_size, settings.epochs, settings.steps)
    if not assembly.trained():
        raise CheckpointError("nothing is trained in this plan; set peft.use, or roles in peft.also_train")
    loop = Loop(plan, assembly, data, steps, out, lookup, listen)
    loop.ancestors = beginning.ancestors if beginning else ()
    if start and saved:
        loop.restore(saved, start, accept_data=accept_data)
    else:
        with out_of_memory_told("in the dry backward pass", early=lambda: loop.is_early):
            loop.learning.check(loop.feed, loop.accumulate.size)
    with loop.signals:
        return loop.run()


class Loop:
    """One run of optimizer steps over an assembled model."""

    def __init__(
        self,
        plan: Plan,
        assembly: Assembly,
        data: TrainingData,
        steps: int,
        out: Path,
        lookup: Lookup,
        listen: Callable[[events.Event], None],
    ) -> None:
        self.plan, self.assembly, self.data = plan, assembly, data
        self.steps, self.out, self.lookup = steps, out, lookup
        self.settings: TrainSettings = plan.run_context.train
        self.step, self.ancestors = 0, tuple[manifest.Ancestor, ...]()
        self.signals = Signals()
        self.stopped_by = 0
        """The signal that ends the run before its next step, as all processes agree; 0 where none does."""
        self.history = resuming.DataHistory(data, plan.run_context)
        self.measured = -1
        """The step after which progress was measured last."""
        self.passed_over = 0
        """Batches so far that were no steps, as none of their records can be used."""
        self._listen = listen
        self.stepper = stepper_for(assembly, self.settings)
        self.accumulate = Accumulator(self.stepper, lambda: self.is_early, self.use_smaller)
        vocabulary, overflows_in = assembly.processor.vocabulary, assembly.architecture.overflows_in
        self.health = Health(vocabulary, assembly.precision, overflows_in, data.faults())
        self.measured_steps = progress.steps_to_measure(steps, warmup_steps(steps, self.settings.warmup_ratio))
        self.feed = Feed(plan.run_context, assembly.processor, data)
        self.learning = Learning(assembly, self.stepper, self.settings.allow_unreached)
        self.log = Log(out)
        self.saving = Saving(out, self.settings.keep, lookup, self.tell)
        self.golden = verification.golden_inputs(self.feed.first_usable(), assembly.processor)
        self.filler = self.feed.shortest_with_images() if self.stepper.needs_equal_micro_batches else None

    def run(self) -> Outcome:
        """Take the remaining steps, save, and return the verdict."""
        import torch

        built = self.assembly
        messages = tuple(f"{each.name}: {note}" for each in built.strategies if (note := each.note(built)))
        messages += try_packing(built, self.feed, self.steps)
        messages += try_compiling(self.stepper, self.feed, lambda why: self.tell(events.RunWarned(self.out, why)))
        warnings = (*self.history.messages, *self.learning.warnings)
        self.tell(events.RunStarted(self.out, self.step, self.steps, self.plan, messages, warnings))
        self.assembly.model.train()
        # Dropout starts from the seed, differs between processes, and goes on from the saved state when resuming.
        if self.step == 0:
            torch.manual_seed(self.plan.run_context.seed + processes.rank())
        if self.assembly.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.assembly.device)
        self.log.begin()
        begun, self.saving.step, line = self.step, self.step, dict[str, Any]()
        with Ahead(self.feed, self.assembly.device) as encoder, self.saving:
            if self.step == 0:
                self.measure_progress(encoder)
            for share, totals, started in self.shares(encoder):
                with out_of_memory_told(f"in step {self.step + 1}", early=lambda: self.is_early):
                    line = self.take_step(share.micro_batches, totals, started)
                    if self.step == 1:
                        self.accumulate.try_largest(lambda rows: encoder.submit(self.feed.largest, rows).result())
                if self.step % self.settings.log_every == 0:
                    self.log.write(line)
                self.saving.poll()
                if self.is_over:
                    break
                if self.step in self.measured_steps:
                    self.measure_progress(encoder)
                    if found := self.learning.first_findings():
                        self.tell(events.NotLearning(self.out, self.step, found))
                if self.settings.save_every and self.step % self.settings.save_every == 0:
                    self.save()
            if self.step != begun and not self.stopped_by:
                self.log.write(line)
                self.measure_progress(encoder)
            if self.stopped_by:
                raise self.stop()
            self.save()
            self.saving.wait()
        verdict = self.health.verdict()
        self.tell(events.RunEnded(self.out, self.step, verdict.healthy, verdict.reasons, verdict.failure))
        if number := max(processes.all_gather_object(self.signals.number)):
            raise RunInterrupted(number, self.step, self.steps, self.folder)
        peak = peak_memory(built.device) or None
        return Outcome(self.folder, verdict, built, self.data.summary, self.log.lines, peak)

    def stop(self) -> RunInterrupted:
        """Save the step that a signal ended the run after; what to raise."""
        why = ""
        try:
            self.save()
        except AdapterError as error:
            why = error.sentence  # So early that there is nothing to save.
        self.saving.wait()
        folder = self.folder if self.step and not why else None
        interrupted = RunInterrupted(self.stopped_by, self.step, self.steps, folder, why)
        self.tell(events.RunStopped(self.out, self.step, self.steps, interrupted.signal, folder))
        return interrupted

    @property
    def folder(self) -> Path:
        """The checkpoint of the last step."""
        return self.out / f"checkpoint-{self.step}"

    @property
    def is_over(self) -> bool:
        """Whether there is no further step."""
        return self.step >= self.steps or self.health.should_abort

    def shares(self, encoder: Ahead) -> Iterator[tuple[data_parallel.Share, data_parallel.Tally, float]]:
        """This process's share of each step to come, what all processes have of it, and when it was begun. Collective.

        The next batch is encoded during a step. One none of whose records can be used is passed over for good, so that no
        other record comes twice in an epoch; a run whose length is counted in epochs is then a step shorter.
        """
        upcoming = encoder.share(self.step + self.passed_over)
        in_a_row, started = 0, time.perf_counter()
        while not self.is_over:
            totals = data_parallel.tally(share := upcoming.result(), self.signals.number)
            self.stopped_by = totals.signal
            if self.stopped_by:
                return
            self.data.leave_out(totals.unusable)
            usable = totals.records > 0
            if not usable:
                self.passed_over, in_a_row = self.passed_over + 1, in_a_row + 1
                self.steps -= self.settings.steps is None
                if not self.steps or in_a_row == len(self.data.records):
                    raise self.feed.nothing_usable()
            if self.step + usable < self.steps:
                upcoming = encoder.share(self.step + usable + self.passed_over)
            if usable:
                yield share, totals, started
                in_a_row, started = 0, time.perf_counter()  # Waiting for data is part of a step's time.

    @property
    def is_early(self) -> bool:
        """Whether nothing is lost by beginning again."""
        return self.step < EARLY_STEPS and not (self.saving.step or store.checkpoints(self.out))

    def measure_progress(self, encoder: Executor) -> None:
        """Measure the validation loss and the followed records, once after a step; `encoder` encodes all. Collective."""
        if self.measured == self.step:
            return
        self.measured, seed, count = self.step, self.plan.run_context.seed, len(self.data.records)
        if held_out := encoder.submit(self.feed.validation, progress.VALIDATED, seed).result():
            with out_of_memory_told(f"after step {self.step}", early=lambda: self.is_early):
                loss = progress.mean_loss(self.assembly, held_out, self.accumulate.size)
            self.data.validation_losses.append((self.step, loss if math.isfinite(loss) else None))
        if self.step and not self.health.measurements:
            return  # It began before there were measurements, or with other data: there is nothing to compare with.
        examples = encoder.submit(progress.followed, count, seed, self.feed.encode).result()
        with out_of_memory_told(f"after step {self.step}", early=lambda: self.is_early):
            losses = progress.measure(self.assembly, examples, self.accumulate.size)
        travelled, weights = sum(map(self.rate_factor, range(self.step))), progress.size_of_weights(self.assembly)
        self.health.guessing = progress.loss_of_guessing(examples)
        self.health.measurements.append(Measurement(self.step, travelled, weights, losses))

    def rate_factor(self, step: int) -> float:
        """The learning rate of a step, from 0, as a share of the highest."""
        return learning_rate_factor(step, self.steps, self.settings.warmup_ratio, self.settings.schedule)

    def take_step(
        self, micro_batches: Sequence[MicroBatch], totals: data_parallel.Tally, started: float
    ) -> dict[str, Any]:
        """One optimizer step on this process's share of it; `started` is when it began. Returns its line of the log."""
        import torch

        self.stepper.set_rate(factor := self.rate_factor(self.step))
        if self.filler:
            micro_batches = data_parallel.pad_micro_batches(micro_batches, totals, self.filler)
        losses = self.accumulate(micro_batches, totals.loss_weight)
        # Read once, when all is queued: the host waits for a device at every number that it reads.
        loss = sum(processes.all_gather_object(sum(torch.stack(losses).tolist() if losses else (), 0.0)))
        norm = float(self.stepper.gradient_norm())
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            self.learning.observe(norm)
            self.stepper.update()
        self.stepper.clear()
        self.health.update(loss, norm, skipped=skipped)
        self.step += 1
        event = events.StepTaken(
            self.out,
            self.step,
            self.steps,
            loss=loss,
            learning_rate=self.settings.learning_rate * factor,
            gradient_norm=norm,
            images=totals.images,
            tokens=totals.tokens,
            seconds=time.perf_counter() - started,
            memory=peak_memory(self.assembly.device),
        )
        self.tell(event)
        return line_of(event, skipped)

    def use_smaller(self, size: int) -> None:
        """Record that micro-batches have `size` rows from this step on, also when the run is resumed, and say so."""
        self.assembly.plan = self.plan = budget.with_candidate(self.plan, self.plan.run_context.memory, size)
        self.feed.settings = self.plan.run_context.train
        what = f"the device's memory ran out in step {self.step + 1}; going on with {budget.describe_memory(self.plan)}"
        self.tell(events.MemoryRanOut(self.out, what))

    def tell(self, event: events.Event) -> None:
        """Tell the caller and every observer, once for all processes."""
        if processes.is_first():
            self._listen(event)
            self.lookup.emit(event)

    def save(self) -> None:
        """Begin to save a complete checkpoint of this step, unless it is saved; it is written while the next ones are taken. Collective."""
        if self.step == self.saving.step:
            return
        self.saving.wait()
        self.health.data_faults = self.data.faults()
        learned = self.learning.map()
        self.health.unlearned = [*learned.faults()]
        captured = store.capture(
            self.assembly,
            step=self.step,
            steps=self.steps,
            golden=self.golden,
            health=self.health.verdict(ended=self.is_over),
            data={**self.data.recorded(), **self.history.recorded()},
            optimizer=self.state(),
            initialised_from=self.ancestors,
            learned=learned,
        )
        self.saving.begin(captured, self.step, self.folder)

    def state(self) -> dict[str, Tensor]:
        """Everything that resuming needs besides the trained tensors, as tensors."""
        import torch

        state = self.stepper.state()
        state |= resuming.random_states(self.assembly.device)
        state["passed_over"] = torch.tensor(self.passed_over)
        state["left_out"] = torch.tensor(sorted(self.data.unusable), dtype=torch.int64)
        state["decays"] = resuming.decayed(self.stepper)
        return state | self.history.digest.tensors() | self.health.state() | self.learning.state()

    def restore(self, saved: manifest.Manifest, start: Path, *, accept_data: bool) -> None:
        """Go on from a checkpoint: its step, optimizer, random numbers, health and log."""
        import torch

        state = store.read_tensors(start / store.OPTIMIZER / "state.safetensors")
        if self.settings.weight_decay:
            resuming.refuse_other_decay(state, resuming.decayed(self.stepper), start)
        self.step, self.ancestors = saved.step, saved.initialised_from
        self.passed_over = int(state.get("passed_over", 0))
        self.steps -= self.passed_over if self.settings.steps is None else 0
        self.stepper.restore(state)
        # A process that had no counterpart then starts from the seed, and differs from the others.
        torch.manual_seed(self.plan.run_context.seed + self.step + processes.rank())
        resuming.restore_random_states(state, self.assembly.device)
        self.health.restore(state)
        self.learning.restore(state, self.step)
        if self.history.restore(saved, state, start, accept=accept_data):
            self.health.measurements.clear()  # They were of other records.
        elif "left_out" in state:
            self.data.leave_out_again(state["left_out"].tolist(), saved.data)
            self.data.validation_losses = [(step, loss) for step, loss in saved.data.get("validation_losses", ())]
        self.log.keep(self.step)
