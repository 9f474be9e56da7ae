"""How fast steps are: images a second, the share of what products reach, the milliseconds of each part, beside Trainer + peft, and what
single changes bring."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from report import Report
from subject import ALL, CUDA, DEVICE, Size, Subject, build, clean, peak_gib, records, seconds, sync

from graftwork.contracts import batch_of, stepper_for, summed_loss
from graftwork.train import compiling

sys.path.append(str(Path(__file__).parents[1]))
import trainer

STEPS = 4
"""How many steps Trainer takes."""


class Running:
    """A model under training, and its steps."""

    def __init__(self, subject: Subject, memory: Sequence[str], micro: int, **changes: Any) -> None:
        self.plan = subject.plan(memory, micro, **changes)
        self.assembly = build(self.plan)
        self.assembly.model.train()
        self.stepper = stepper_for(self.assembly, self.plan.run_context.train)
        self.micro, self.batch = micro, subject.batch
        self.examples = records(self.assembly, subject, micro)
        self.labels = sum(each.num_label_tokens for each in self.examples) * (self.batch / micro)
        if self.plan.run_context.train.compile:
            blocks = map(self.assembly.model.get_submodule, self.assembly.structure.blocks["language"])
            compiling.compile_blocks([*blocks], compiling.BACKEND)
            with torch.compiler.set_stance("force_eager"):  # kernels are chosen
                self.stepper.reached(batch_of(self.assembly.processor, self.examples).to(self.assembly.device))

    def step(self) -> None:
        """A step as the training loop takes it, without reading records from files."""
        count = max(1, self.batch // self.micro)
        losses = []
        for number in range(1, count + 1):
            batch = batch_of(self.assembly.processor, self.examples).to(self.assembly.device)
            losses.append(self.stepper.accumulate(batch, self.labels, last=number == count))
        torch.stack(losses).tolist()
        float(self.stepper.gradient_norm())
        self.stepper.update()
        self.stepper.clear()

    def rate(self) -> dict[str, float]:
        """Images a second, and the peak."""
        clean()
        taken = seconds(self.step, warm=1, times=3)
        return {"images/s": round(self.batch / taken, 2), "peak GiB": round(peak_gib(), 2)}

    def loss(self) -> float:
        """Of a micro-batch."""
        with torch.no_grad(), self.assembly.autocast():
            batch = batch_of(self.assembly.processor, self.examples).to(self.assembly.device)
            return float(summed_loss(self.assembly.model, batch, self.assembly.cross_entropy))

    def parts(self) -> dict[str, float]:
        """The milliseconds of a micro-batch's parts, each waited for; collating and moving are the host's."""
        found, began = dict[str, float](), time.perf_counter()

        def done(part: str) -> None:
            nonlocal began
            sync()
            found[part] = round((time.perf_counter() - began) * 1e3, 2)
            began = time.perf_counter()

        for _ in range(2):  # the first time warms up
            sync()
            began = time.perf_counter()
            batch = batch_of(self.assembly.processor, self.examples)
            done("collating")
            batch = batch.to(self.assembly.device)
            done("moving")
            with self.assembly.autocast():
                features = self.assembly.model.encode_images(batch.pixels)
                done("images")
                # Not quite a step: the features lie there, so this is the language model and the loss alone.
                loss = (
                    summed_loss(_With(self.assembly.model, features), batch, self.assembly.cross_entropy) / self.labels
                )
                done("language model and loss")
            loss.backward()  # type: ignore[no-untyped-call]
            done("backward")
            self.stepper.gradient_norm()
            self.stepper.update()
            self.stepper.clear()
            done("norm and update")
        return found

    def operations(self) -> int:
        """Floating-point operations of a record, forward and backward; attention should be `eager`, as older versions of PyTorch cannot count that of
        fewer keys than queries."""
        from torch.utils.flop_counter import FlopCounterMode

        batch = batch_of(self.assembly.processor, self.examples).to(self.assembly.device)
        with FlopCounterMode(display=False) as counter:
            self.stepper.accumulate(batch, self.labels)
        self.stepper.clear()
        return int(counter.get_total_flops() // self.micro)


class _With:
    """A model whose images are encoded already."""

    def __init__(self, model: Any, features: Any) -> None:
        self.model, self.features = model, features

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, batch: Any) -> Any:
        return self.model(batch, self.features)


def measure(size: Size, subject: Subject, report: Report) -> None:
    """The plans of a subject."""
    side = 512 if size.tiny else 8192

    def ceiling() -> float:
        a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / seconds(lambda: a @ b, warm=3, times=10)

    reached = report.take("bf16 products, FLOP/s", ceiling)
    eager = {"prefer": ["eager"]}
    operations = report.take(
        "operations of a record", lambda: Running(subject, (), 1, attention=eager).operations(), needs=15
    )
    for memory, micro in subject.plans:

        def one(memory: Sequence[str] = memory, micro: int = micro) -> dict[str, Any]:
            running = Running(subject, memory, micro)
            found: dict[str, Any] = running.rate()
            if reached and operations:
                found["share of the products' rate"] = round(found["images/s"] * operations / reached, 4)
            return {**found, "ms": running.parts()}

        report.take(f"{subject.name}, {', '.join(memory) or 'no strategy'}, {micro} at a time", one, needs=10)


def beside_trainer(subject: Subject, report: Report, cases: Sequence[tuple[Sequence[str], int]]) -> None:
    """The same model and records in `transformers.Trainer` with `peft`, at the same micro-batch; `checkpointing` in both."""
    for memory, micro in cases:

        def theirs(memory: Sequence[str] = memory, micro: int = micro) -> dict[str, float]:
            others = {"also_train": list(subject.also_train)} if subject.also_train else None
            assembly = build(subject.plan(micro=micro, peft=others))
            trainer.inject_lora(assembly)
            if memory:
                assembly.model.model.gradient_checkpointing_enable({"use_reentrant": False})
            examples = records(assembly, subject, micro)
            clean()
            with tempfile.TemporaryDirectory() as folder:
                count = max(1, subject.batch // micro)
                settings = {"gradient_accumulation_steps": count, "bf16": CUDA, "use_cpu": not CUDA}
                ends = trainer.train(assembly, examples * count * STEPS, micro, STEPS, Path(folder), **settings)
            taken = sorted(after - before for before, after in pairwise(ends))
            rate = subject.batch / taken[len(taken) // 2]
            return {"images/s": round(rate, 2), "peak GiB": round(peak_gib(), 2)}

        name = f"{subject.name}, {', '.join(memory) or 'no strategy'}, {micro} at a time"
        ours = report.take(f"{name}: Graftwork", lambda m=memory, n=micro: Running(subject, m, n).rate(), needs=10)
        chunked = (*memory, "chunked-loss")
        report.take(
            f"{name}: Graftwork with chunked-loss", lambda m=chunked, n=micro: Running(subject, m, n).rate(), needs=10
        )
        peer = report.take(f"{name}: Trainer + peft", theirs, needs=10)
        if ours and peer:
            report.take(f"{name}: ratio", lambda o=ours, p=peer: round(o["images/s"] / p["images/s"], 3))


CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "kernel flash": {"attention": {"prefer": ["flash", "sdpa"]}},
    "kernel xformers": {"attention": {"prefer": ["xformers", "sdpa"]}},
    "kernel eager": {"attention": {"prefer": ["eager"]}},
    "host-offload": {"strategies": ["chunked-loss", "host-offload"]},
    "kernel flash-4": {"attention": {"prefer": ["flash-4", "sdpa"]}},
    "blocks compiled": {"train": {"compile": True}},
}
"""What of a run file is otherwise, and which memory strategies there are but `chunked-loss`; last those that compile, which may take the longest."""


def changes(size: Size, report: Report) -> None:
    """Where a step's time goes; then what single changes bring, and that they leave the loss what it is."""
    subject, micro = size.mgm, 2 if size.tiny else 8
    for memory, at_once in ((("chunked-loss",), micro), (ALL, 2 * micro)):
        case = f"profile, {', '.join(memory)}, {at_once} at a time"
        report.take(case, lambda m=memory, n=at_once: profiled(Running(subject, m, n).step), needs=10)
    for name, changed in CHANGES.items():

        def one(changed: dict[str, Any] = changed) -> dict[str, Any]:
            tables = {table: value for table, value in changed.items() if table != "strategies"}
            running = Running(subject, changed.get("strategies", ["chunked-loss"]), micro, **tables)
            loss = running.loss()
            found = {"loss": loss, **running.rate()}
            return found | {
                "kernels": {site: told.get("ran") for site, told in running.assembly.kernel_usage().items()}
            }

        report.take(f"{subject.name}, {name}, {micro} at a time", one, needs=60 if "compiled" in name and CUDA else 10)


def profiled(work: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of a call that take the longest, and the share of the time in which the device is at work."""
    from torch.profiler import ProfilerActivity, profile

    work()
    sync()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as found:
        began = time.perf_counter()
        work()
        sync()
        wall = time.perf_counter() - began
    # An annotation, as the optimizer's, is the time of the kernels in it, once more.
    events = [event for event in found.key_averages() if not getattr(event, "is_user_annotation", False)]
    events = [event for event in events if not CUDA or "CUDA" in str(event.device_type)]
    spent = [
        ((e.self_device_time_total if CUDA else e.self_cpu_time_total) / 1e3, e.count, e.key[:120]) for e in events
    ]
    busy = sum(each[0] for each in spent)
    return {
        "wall ms": round(wall * 1e3, 1),
        "busy": round(busy / wall / 1e3, 3),
        "longest": sorted(spent, reverse=True)[:25],
    }


def speed(size: Size, report: Report) -> None:
    """MGM-2B."""
    measure(size, size.mgm, report)


def vlm_speed(size: Size, report: Report) -> None:
    """A vision-language model of Hugging Face."""
    measure(size, size.vlm, report)


def peer(size: Size, report: Report) -> None:
    """MGM-2B: at the same micro-batch, with and without checkpointing."""
    beside_trainer(size.mgm, report, (((), 2),) if size.tiny else (((), 2), (("checkpointing",), 4)))


def vlm_peer(size: Size, report: Report) -> None:
    """A vision-language model of Hugging Face."""
    beside_trainer(size.vlm, report, (((), 2),))
