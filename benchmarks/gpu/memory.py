"""Whether the memory that was predicted is what a step takes: each plan rehearsed, then carried out on the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import active_children, get_context
from typing import Any

import torch
from report import Report
from subject import CATALOG, CUDA, Size, Subject, build, clean

from graftwork.config.machine import cores, detect_machine
from graftwork.contracts import batch_of, stepper_for
from graftwork.memory.rehearsal import longest_rows, rehearsing


def predict(subject: Subject, number: int) -> int:
    """The peak that a rehearsal for CUDA finds of one of the subject's plans, in bytes."""
    memory, micro = subject.plans[number]
    with rehearsing(subject.plan(memory, micro), CATALOG, detect_machine(), device="cuda") as watched:
        return watched.take(micro).footprint.peak


def carry_out(subject: Subject, number: int) -> dict[str, Any]:
    """Two steps of the same records as in the rehearsal, of which the second has all that a step can have in memory."""
    memory, micro = subject.plans[number]
    plan = subject.plan(memory, micro)
    assembly = build(plan)
    assembly.model.train()
    stepper = stepper_for(assembly, plan.run_context.train)
    rows = longest_rows(assembly.processor, subject.length)
    clean()
    for _, row in rows * 2:
        for last in (True,) if micro == subject.batch else (False, True):  # as in the rehearsal
            batch = batch_of(assembly.processor, row * micro).to(assembly.device)
            stepper.accumulate(batch, 1.0, last=last)
        stepper.gradient_norm()
        stepper.update()
        stepper.clear()
    if not CUDA:
        return {}
    torch.cuda.synchronize()
    facts = torch.cuda.memory_stats()
    return {
        # What tensors asked for is what a rehearsal can know; the allocator gives a block whole where little of it is left.
        "requested": facts["requested_bytes.all.peak"],
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "retries": facts["num_alloc_retries"],
        "kernels": {site: told.get("ran") for site, told in assembly.kernel_usage().items()},
    }


def compare(subject: Subject, report: Report) -> None:
    """All plans of a subject, predicted in other processes while they are carried out here; on a CPU one after the other."""
    cases = {
        f"{subject.name}, {', '.join(memory) or 'no strategy'}, {micro} at a time": number
        for number, (memory, micro) in enumerate(subject.plans)
    }
    with ExitStack() as stack:
        if CUDA:
            pool = stack.enter_context(ProcessPoolExecutor(max(1, cores() // 2), get_context("spawn")))
            stack.callback(end_children)
            futures = {n: pool.submit(predict, subject, n) for case, n in cases.items() if not report.has(case)}
        for case, number in cases.items():

            def predicted(number: int = number) -> int:
                return futures[number].result(max(0.0, report.left)) if CUDA else predict(subject, number)

            report.take(case, lambda n=number, of=predicted: beside(carry_out(subject, n), of), needs=8)


def beside(measured: dict[str, Any], predicted: Callable[[], int]) -> dict[str, Any]:
    """What was measured, beside what was `predicted`, or why nothing was."""
    try:
        peak = predicted()
    except Exception as error:  # a measurement on a device is worth more than its prediction, which needs none
        return {"predicted": None, "not predicted": f"{type(error).__name__}: {str(error)[:600]}", **measured}
    ratio = {"predicted over allocated": round(peak / measured["allocated"], 4)} if measured else {}
    return {"predicted": peak, **measured, **ratio}


def end_children() -> None:
    """Kill those that predict what was not reached when time was up: the interpreter would wait for them."""
    for process in active_children():
        process.kill()


def memory(size: Size, report: Report) -> None:
    """MGM-2B."""
    compare(size.mgm, report)


def vlm_memory(size: Size, report: Report) -> None:
    """A vision-language model of Hugging Face."""
    compare(size.vlm, report)
