"""The rehearsal: a plan's own code takes steps on tensors that have a size and no content, and every byte is tracked."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.config.sites import attention_sites, kernels_on
from graftwork.contracts.batch import IGNORED, Batch, Encoded
from graftwork.contracts.device import standing_for
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor, batch_of
from graftwork.contracts.packing import MicroBatch
from graftwork.contracts.plan import Choice, Plan, config_of
from graftwork.contracts.stepper import Stepper, stepper_for
from graftwork.errors import GraftworkError
from graftwork.memory import cuda, fakes, images
from graftwork.memory.images import AN_IMAGE, SMALL_IMAGE, Shown
from graftwork.memory.timeline import BATCH, BUILD, FORWARD, PREPARATION, UPDATE, Footprint
from graftwork.memory.tracking import Tracker

if TYPE_CHECKING:
    from graftwork.contracts.assembly import Assembly

LARGEST_CONSTANT = 1 << 28
"""Of how many numbers a tensor may be that keeps them in a rehearsal: the tiles of 16 images are more than 1 << 26."""

READS_NUMBERS = (
    "the model or a memory strategy reads a number out of a tensor while it computes, which cannot be rehearsed; "
    "let it decide by shapes and settings"
)


@dataclass(frozen=True)
class Step:
    """What a step needs."""

    micro_batch: int
    tokens: int
    """Of each record."""
    labels: int
    """Of each record."""
    footprint: Footprint
    flops: int
    """Floating-point operations of matrix products and convolutions for each record."""
    shown: Shown = AN_IMAGE
    """The images of each record."""
    in_a_row: int = 1
    """How many records share a row; with several, tokens and labels are those of the row."""

    @property
    def records(self) -> str:
        """What the records are, as people read it."""
        if self.in_a_row > 1:
            return f"rows of {self.tokens:,} tokens, {self.labels:,} of them labelled, in {self.in_a_row} records with {self.shown} each"
        whose = f"from {self.shown}" if self.shown.what else "an image's"
        return (
            f"records of {self.tokens:,} tokens, {self.tokens - self.labels:,} of them {whose} and all others labelled"
        )


class Watched:
    """An assembly, on real tensors or on fake ones, whose steps are tracked."""

    def __init__(
        self,
        assembly: Assembly,
        stepper: Stepper,
        tracker: Tracker,
        examples: Sequence[tuple[Shown, Sequence[Encoded]]],
        block_bytes: int = 1,
    ) -> None:
        """`examples` are rows that may need the most: the images of their records, and the records, one unless they are packed; sizes are rounded up to multiples of
        `block_bytes`."""
        self.assembly, self.stepper, self.tracker, self.examples, self.block_bytes = (
            assembly,
            stepper,
            tracker,
            examples,
            block_bytes,
        )
        self._peaks: dict[tuple[int, int], int] = {}

    def take(self, micro_batch: int) -> Step:
        """The step of equal rows that needs the most: large images leave less text, whose labels may need more.

        Memory grows evenly with the micro-batch, so after steps of 1 and 2 only the rows that then need the most are taken."""
        packing, peaks, tried = self.stepper.settings.packing, self._peaks, [*range(len(self.examples))]
        if micro_batch > 2 and len(peaks) == 2 * len(tried):
            tried = [max(tried, key=lambda n: (micro_batch - 1) * peaks[n, 2] - (micro_batch - 2) * peaks[n, 1])]
        steps = []
        for number in tried:
            shown, row = self.examples[number]
            cut = MicroBatch([*row] * micro_batch, [len(row)] * micro_batch if packing else ())
            steps.append(self.step(cut, shown))
            if micro_batch <= 2:
                peaks[number, micro_batch] = steps[-1].footprint.peak
        return max(steps, key=lambda step: step.footprint.peak)

    def step(self, cut: MicroBatch, shown: Shown = AN_IMAGE, *, alone: bool | None = None) -> Step:
        """Measure a step from its last micro-batch on, when all that a step can hold is allocated: the optimizer's state,
        and, unless the micro-batch is `alone`, by default where it is a whole batch, the gradients of earlier ones."""
        stepper, tracker, rows = self.stepper, self.tracker, cut.by_row()
        count = len(rows)
        if not stepper.optimizer.state:
            self._first_update()
        if count == stepper.settings.batch_size if alone is None else alone:
            stepper.clear()
        since, flops_at_start = tracker.timeline.now + 1, tracker.flops
        self._accumulate(cut)
        flops = tracker.flops - flops_at_start
        self._update()
        return Step(
            count,
            max(sum(len(example.input_ids) for example in row) for row in rows),
            max(sum(example.num_label_tokens for example in row) for row in rows),
            tracker.timeline.footprint(since, self.block_bytes),
            flops // count,
            shown,
            len(rows[0]),
        )

    def _first_update(self) -> None:
        """A step without its forward and backward pass: gradients of zero allocate an optimizer's state too."""
        import torch

        for name, parameter in self.stepper.parameters.items():
            parameter.grad = torch.zeros_like(parameter)
            self.tracker.name_gradient(name, parameter)
        self._update()

    def _accumulate(self, cut: MicroBatch) -> None:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        self.tracker.phase = BATCH
        with self.tracker.paused(), unset_fake_temporarily():
            batch = batch_of(self.assembly.processor, cut.examples, rows=cut.rows)
        batch = with_numbers(batch)
        self.tracker.phase = FORWARD
        labels = sum(example.num_label_tokens for example in cut.examples)
        self.stepper.accumulate(batch.to(self.assembly.device), self.stepper.settings.batch_size * labels)

    def _update(self) -> None:
        self.tracker.phase = UPDATE
        self.stepper.gradient_norm()
        self.stepper.update()
        self.tracker.name_optimizer_state(self.stepper)


def with_numbers(batch: Batch) -> Batch:
    """The batch where tensors are fake, with its numbers kept: models decide by grids, counts, masks, and by which tiles of an image are
    none."""
    import torch

    def lifted(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: lifted(each) for name, each in value.items()}
        return torch.ops.aten.lift_fresh(value) if isinstance(value, torch.Tensor) else value

    return replace(batch, **{field.name: lifted(getattr(batch, field.name)) for field in fields(batch)})


@contextmanager
def watching(
    plan: Plan, lookup: Lookup, *, longest: int | None = None, shown: Shown | None = None, fake: bool = False
) -> Iterator[Watched]:
    """Build a plan's model on the CPU and track its memory; on `fake` tensors no number may be read."""
    tracker = Tracker()
    with tracker.following(answer if fake else None):
        assembly = compose.build(
            plan, lookup, device="cpu", fake_pretrained=fake or plan.model_spec.model.weights is None
        )
        if isinstance(assembly.processor, compose.NoProcessor):
            assembly.processor = stand_in(assembly)
        assembly.model.train()
        tracker.name_weights(assembly)
        tracker.phase = PREPARATION
        stepper = stepper_for(assembly, plan.run_context.train)
        tracker.name_optimizer_state(stepper)
        with tracker.paused():  # the records that batches are made of are in main memory
            settings = plan.run_context.train
            examples = longest_rows(assembly.processor, longest or settings.max_length, shown, packing=settings.packing)
        yield Watched(assembly, stepper, tracker, examples)


@contextmanager
def rehearsing(
    plan: Plan, lookup: Lookup, machine: Machine, *, device: str, longest: int | None = None, shown: Shown | None = None
) -> Iterator[Watched]:
    """Build a plan's model on fake tensors; no weight is read, and nothing is allocated.

    `device` is `cuda` or `cpu`, whether it is here or not. `longest` is the length of the records in tokens, by default
    the longest that the plan allows; every token outside an image is a label. `shown` are their images, by default the largest that such a
    record can hold.
    """
    import torch
    from torch import _meta_registrations as meta
    from torch._subclasses import fake_tensor

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # a run on real tensors gives them
        stack.enter_context(standing_for(device))
        # What no weight enters keeps its numbers beside it, whatever its size: models decide by grids, counts and masks.
        stack.callback(setattr, fake_tensor, "CONSTANT_NUMEL_LIMIT", fake_tensor.CONSTANT_NUMEL_LIMIT)
        fake_tensor.CONSTANT_NUMEL_LIMIT = LARGEST_CONSTANT
        stack.callback(setattr, meta, "_meta_grouped_mm_common", meta._meta_grouped_mm_common)
        meta._meta_grouped_mm_common = partial(grouped_products, meta._meta_grouped_mm_common)
        converter: Any = stack.enter_context(fakes.mode()).fake_tensor_converter
        # A fake tensor that is remembered by a weak reference cannot be swapped, which `Module.to` wants to do.
        converter.set_tensor_memo = lambda *_: None
        watched = stack.enter_context(watching(without_weights(plan), lookup, longest=longest, shown=shown, fake=True))
        # Scaling the loss for fp16 changes no size, but reads whether a number is finite.
        watched.stepper.scaler = torch.amp.GradScaler("cpu", enabled=False)
        if device == "cuda":
            stack.enter_context(cuda.stand_in())
            watched.block_bytes = cuda.BLOCK_BYTES
            assembly = watched.assembly
            sites = attention_sites(plan, assembly.architecture, assembly.towers, assembly.outputs)
            chosen = {site.name: chosen.kernel for site, chosen in kernels_on(plan, sites, lookup, machine, "cuda")}
            cuda.imitate_cuda(assembly, watched.stepper, chosen)
        gc.freeze()  # the model stays, and searching it for garbage again and again takes a good part of the time
        stack.callback(gc.unfreeze)
        try:
            yield watched
        except (fake_tensor.DynamicOutputShapeException, fake_tensor.DataDependentOutputException) as error:
            raise GraftworkError(READS_NUMBERS) from error


def grouped_products(known: Any, one: Any, other: Any, **given: Any) -> Any:
    """What a model's experts compute, in the precisions that torch computes but knows no fake tensors for."""
    import torch
    from torch import _meta_registrations as meta

    if given["scale_a"] is not None or one.dtype == torch.bfloat16:
        return known(one, other, **given)
    empty: Any = meta._create_grouped_mm_output_tensor
    return empty(one, other, given["offs"], given["out_dtype"])


def answer(phase: str) -> float:
    """The number that is read out of a tensor without content: an optimizer asks which step it takes, and what draws initial
    values whether one has to be drawn again.

    Raises GraftworkError anywhere else, because what a model or strategy then does would depend on it.
    """
    if phase in (UPDATE, BUILD):
        return 1.0 if phase == UPDATE else 0.0
    raise GraftworkError(READS_NUMBERS)


def without_weights(plan: Plan) -> Plan:
    """The plan with the same structure and random weights."""

    def unweighted(choice: Choice) -> Choice:
        return replace(choice, weights=None)

    model_spec = plan.model_spec
    parts = {part: unweighted(choice) for part, choice in model_spec.parts.items()}
    return replace(plan, model_spec=replace(model_spec, model=unweighted(model_spec.model), parts=parts))


def stand_in(assembly: Assembly) -> Processor:
    """The processor that the model puts in the place of its own, where that is not there."""
    from tempfile import TemporaryDirectory

    from torch._subclasses.fake_tensor import unset_fake_temporarily

    choice = assembly.plan.model_spec.model
    source = Path(choice.folder) if choice.folder else None
    with TemporaryDirectory() as folder, unset_fake_temporarily():
        return assembly.architecture.stand_in(config_of(choice), Path(folder), assembly.outputs, source)


def longest_rows(
    processor: Processor, longest: int, shown: Shown | None = None, *, packing: bool = False
) -> list[tuple[Shown, list[Encoded]]]:
    """Rows of `longest` tokens that may need the most: one of as much image as can be, with what is `shown`, by default the largest image
    that fits, and with `packing` as many records as fit, each with its images; and one of as much labelled text, with a small image."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        shown = shown or images.largest_allowed(processor, longest)
        tried = dict.fromkeys([(shown, packing), (SMALL_IMAGE if shown.what else shown, False)])
        return [(each, filled(processor, each, longest, many)) for each, many in tried]


def filled(processor: Processor, shown: Shown, longest: int, packing: bool) -> list[Encoded]:
    """A row of records with these images, the last with as many labelled text tokens as still fit into `longest`."""
    example = processor.encode(images.blank_record(shown.sizes))
    if len(example.input_ids) > longest:
        raise GraftworkError(
            f"train.max_length is {longest}, and {shown} with a short question already takes "
            f"{len(example.input_ids)} tokens; allow more"
        )
    short = [example] * (longest // len(example.input_ids) - 1 if packing else 0)
    filler = longest - len(example.input_ids) * (len(short) + 1)
    ids = [*example.input_ids, *[example.input_ids[-1]] * filler]
    image_token_mask = [*example.image_token_mask, *[False] * filler]
    labels = [IGNORED if is_image else token for is_image, token in zip(image_token_mask, ids, strict=True)]
    told = {name: [*values, *[0] * filler] for name, values in example.token_fields.items()}
    return [*short, Encoded(ids, image_token_mask, labels, example.pixels, token_fields=told)]
