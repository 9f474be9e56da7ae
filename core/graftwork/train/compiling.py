"""Compilation in a run: each of the language model's repeated blocks, in training alone, where a compiler works."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.contracts.model import batch_of
from graftwork.contracts.stepper import Stepper
from graftwork.train.feeding import Feed

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts.assembly import Assembly

BACKEND = "inductor"
TRIED = 2
"""Records in the micro-batch that compilation is tried on: the graph of a single one serves no other number."""


def try_compiling(stepper: Stepper, feed: Feed, say: Callable[[str], None]) -> tuple[str, ...]:
    """Compile the language model's blocks, if the run file asks for it; what came of it, as clauses. A model that a compiler cannot take whole, or
    a machine without a compiler, goes on uncompiled. `say` gets a sentence where a compiler fails later. Collective."""
    assembly = stepper.assembly
    if not stepper.settings.compile:
        return ()
    blocks = [assembly.model.get_submodule(name) for name in assembly.structure.blocks.get("language", ())]
    begun, later = time.perf_counter(), False
    said = set[str]()

    def failed(error: Exception) -> None:
        if not later:
            raise error
        sentence = f"train.compile: {described(error)}; blocks that it fails for go on uncompiled"
        if sentence not in said:
            say(sentence)
        said.add(sentence)

    compile_blocks(blocks, BACKEND, failed)
    problems = [each for each in processes.all_gather_object(problem(assembly, stepper, feed)) if each]
    if not blocks or problems:
        undo(blocks)
        why = problems[0] if problems else "this model does not say which blocks its language model repeats"
        return (f"train.compile: nothing is compiled, as {why}",)
    later, took = True, f"which took {time.perf_counter() - begun:.0f} s"
    return (f"train.compile: {len(blocks)} blocks of the language model are compiled for training, {took}",)


def _raised(error: Exception) -> None:
    raise error


def compile_blocks(
    blocks: Sequence[nn.Module], backend: str | Callable[..., Any], failed: Callable[[Exception], None] = _raised
) -> None:
    """Compile what blocks compute where gradients are asked for, in place: modules, names and hooks stay as they are. Blocks alike share one graph,
    which serves any length. A block for which the compiler fails goes on as it was, unless `failed`, which is told why, raises."""
    import torch

    compiled = torch.compile(_uncompiled, backend=backend, dynamic=True)
    for each in blocks:
        block: Any = each
        block.uncompiled_forward = block.forward
        block.forward = partial(_forward, block, compiled, failed)


def undo(blocks: Sequence[nn.Module]) -> None:
    """What `compile_blocks` did, undone."""
    for each in blocks:
        block: Any = each
        if hasattr(block, "uncompiled_forward"):
            block.forward = block.uncompiled_forward
            del block.uncompiled_forward


def _forward(
    block: nn.Module, compiled: Callable[..., Any], failed: Callable[[Exception], None], *args: Any, **kwargs: Any
) -> Any:
    """The block's own forward, compiled where gradients are asked for."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    if block.training and torch.is_grad_enabled():
        try:
            return compiled(block, *args, **kwargs)
        except TorchDynamoException as error:  # Nothing was computed yet.
            failed(error)
        undo([block])
        return block.forward(*args, **kwargs)
    return _uncompiled(block, *args, **kwargs)


def _uncompiled(block: Any, *args: Any, **kwargs: Any) -> Any:
    return block.uncompiled_forward(*args, **kwargs)


def problem(assembly: Assembly, stepper: Stepper, feed: Feed) -> str:
    """Why compiled blocks cannot be trained with, found by a micro-batch, as a clause; empty where they can. Nothing is left of it."""
    import torch
    from torch._dynamo.utils import counters

    examples, device = feed.some(TRIED), assembly.device
    rows = [1] * len(examples) if stepper.settings.packing else ()
    batch = batch_of(assembly.processor, examples, rows=rows).to(device)
    assembly.model.train()
    counters.clear()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with torch.compiler.set_stance("force_eager"):
            stepper.reached(batch)  # kernels are chosen
        try:
            stepper.reached(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, or a library that it calls, raises
            return described(error)
    breaks = [str(reason).strip().partition("\n")[0] for reason in counters["graph_break"]]
    return f"a block cannot be compiled whole ({breaks[0]})" if breaks else ""


def described(error: Exception) -> str:
    """What a compiler failed with, as a clause."""
    inner = getattr(error, "inner_exception", error)  # of what dynamo wraps
    first = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")[:200]
    return f"the compiler failed ({type(inner).__name__}: {first})"
