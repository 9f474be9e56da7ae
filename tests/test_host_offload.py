"""Offloading to the host: the same gradients, from copies that were made once and are let go.

A CPU stands for the device here: what is moved, and that the original is let go, is the same on both.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, PlanOf
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import graftwork_host_offload
from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.contracts import Assembly, Batch, DictLookup, collate, summed_loss
from graftwork.contracts.device import standing_for
from graftwork.memory import cuda
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork_host_offload import (
    Away,
    Copies,
    CopiesOnStream,
    HostOffload,
    HostOffloadSettings,
    Moved,
    forward,
    unpack,
)

LOOKUP = DictLookup(*COMPONENTS, HostOffload)
LEAST = 1 << 12
CPU = torch.device("cpu")


def built(run: PlanOf, memory: tuple[str, ...] = (), least: int | None = LEAST) -> tuple[Assembly, Batch]:
    """A tiny MGM-Gemma whose "device" is offloaded, unless `least` is None, and a batch."""
    plan = run({"peft.also_train": ["connector", "mining"], "memory": {"use": list(memory)}}, LOOKUP)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    model = assembly.model
    if least is not None:
        model.forward = partial(forward, model, model.forward, least, CPU)
    records = LOOKUP.find("data_source", "shapes").component
    encoded = [assembly.processor.encode(record) for record in records(records.Settings(6)).records()]
    return assembly, collate(encoded, pad_id=assembly.processor.pad_id)


def step(assembly: Assembly, batch: Batch) -> dict[str, Tensor]:
    """The loss and the gradients of a step."""
    torch.manual_seed(0)
    loss = summed_loss(assembly.model.train(), batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in assembly.trained().items()}}


@pytest.mark.parametrize("memory", [(), ("checkpointing",)], ids=str)
def test_the_step_is_exactly_the_same(run: PlanOf, memory: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    pack = Away.pack

    def watched(self: Away, tensor: Tensor) -> Tensor | Moved:
        kept = pack(self, tensor)
        if isinstance(kept, Moved):
            moved.append(kept.host)
        return kept

    monkeypatch.setattr(Away, "pack", watched)
    plain, offloaded = step(*built(run, memory, None)), step(*built(run, memory))
    torch.testing.assert_close(offloaded, plain, rtol=0.0, atol=0.0)
    assert min(host.nbytes for host in moved) >= LEAST
    if not memory:
        assert len({id(host) for host in moved}) < len(moved)


def test_what_was_moved_is_let_go_and_what_is_small_or_a_weight_stays() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU())
    seen: dict[str, list[Any]] = {"large": [], "small": []}
    model[1].register_forward_hook(lambda module, inputs, output: seen["large"].append(output.untyped_storage()))
    kept = []

    def watched(away: Away) -> Any:
        return lambda tensor: kept.append(away.pack(tensor)) or kept[-1]

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    away = Away(Copies(CPU), 1 << 12, weights)
    with torch.autograd.graph.saved_tensors_hooks(watched(away), unpack):
        output = model(torch.randn(64, 64, requires_grad=True))
        model(torch.randn(2, 64, requires_grad=True))
    away.copies.settle()
    (storage, _) = seen["large"]
    reference = StorageWeakRef(storage)
    seen.clear()
    del storage
    assert reference.expired()
    stayed = [tensor for tensor in kept if isinstance(tensor, Tensor)]
    assert {tensor.untyped_storage()._cdata in weights or tensor.nbytes < 1 << 12 for tensor in stayed} == {True}
    assert [tensor for tensor in stayed if tensor.untyped_storage()._cdata in weights]
    output.sum().backward()
    assert model[0].weight.grad is not None


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    away = Away(Copies(CPU), 0, set())
    first = torch.ones(1000)
    kept = away.pack(first)
    assert away.pack(first) is kept
    key = next(iter(away.moved))
    first.add_(1)
    changed = away.pack(first)
    second = torch.zeros(1000)
    away.moved[second.untyped_storage()._cdata, key[1]] = kept  # type: ignore[assignment]
    del first
    away.copies.settle()
    assert (unpack(kept)[0], unpack(changed)[0], unpack(away.pack(second))[0]) == (1.0, 2.0, 0.0)
    expanded = torch.ones(1).expand(1000)
    assert away.pack(expanded) is expanded


def test_a_tensor_is_fetched_once_while_it_is_in_use() -> None:
    kept = Away(Copies(CPU), 0, set()).pack(torch.ones(1000))
    tensor = unpack(kept)
    assert unpack(kept) is tensor
    del tensor
    assert torch.equal(unpack(kept), torch.ones(1000))


def test_without_gradients_nothing_is_moved(run: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Away, "pack")
    assembly, batch = built(run)
    with torch.no_grad():
        assert assembly.model(batch).isfinite().all()


def test_on_a_cpu_it_does_nothing_and_says_so_and_on_a_gpu_it_is_in_the_way() -> None:
    (kind,) = graftwork_host_offload.memory_strategies()
    strategy, model = kind(HostOffloadSettings(least_kib=2)), torch.nn.Linear(2, 2)
    here: Any = SimpleNamespace(device=torch.device("cpu"), structure=SimpleNamespace(model=model))
    strategy.prepare(here)
    assert "forward" not in vars(model)
    assert strategy.note(here) == "does nothing, for the model is on the CPU already"
    here.device = torch.device("cuda")
    strategy.prepare(here)
    assert vars(model)["forward"].args[2:] == (2048, torch.device("cuda"))
    assert strategy.note(here) == ""


@pytest.mark.parametrize("use", [(), ("checkpointing",)], ids=str)
def test_a_rehearsal_of_a_device_sees_what_is_moved(
    use: tuple[str, ...], run: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exactly as all else: a step on real tensors comes to the same peak, where a CPU's stand for the device's in both."""
    offload = {"host-offload": {"least_kib": 4}, "checkpointing": {"of": ["language"]}}
    settings = {name: table for name, table in offload.items() if name in use or name == "host-offload"}
    plan = run({"memory": {"use": [*use, "host-offload"], **settings}}, LOOKUP)
    plain = run({"memory": {"use": [*use]}}, LOOKUP)
    with rehearsing(plan, LOOKUP, Machine(), device="cuda") as watched:
        moving = watched.take(4).footprint
    with rehearsing(plain, LOOKUP, Machine(), device="cuda") as watched:
        staying = watched.take(4).footprint
    assert moving.categories["activations"] < 0.9 * staying.categories["activations"]
    assert moving.categories["frozen weights"] == staying.categories["frozen weights"]
    # What CUDA computes otherwise than a CPU is left out, to compare with a CPU.
    monkeypatch.setattr(cuda, "stand_in", nullcontext)
    monkeypatch.setattr(cuda, "imitate_cuda", lambda *_: None)
    monkeypatch.setattr(cuda, "BLOCK_BYTES", 1)
    with rehearsing(plan, LOOKUP, Machine(), device="cuda") as watched:
        rehearsed = watched.take(4).footprint
    with standing_for("cuda"), watching(plan, LOOKUP) as watched:
        real = watched.take(4).footprint
    assert (rehearsed.peak, rehearsed.categories) == (real.peak, real.categories)


def test_copies_lie_on_a_stream_of_their_own_and_nothing_is_used_or_given_away_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked of CUDA's streams, recorded: a copy begins after what was queued, and what uses it waits for it."""
    queued: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name, self.events = str(name), 0

        def wait_stream(self, other: Stream) -> None:
            queued.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            self.events += 1
            return f"copy {self.events}"

        def wait_event(self, event: str) -> None:
            queued.append(f"{self.name} waits for {event}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    away = Away(CopiesOnStream(CPU), 0, set())
    kept = [away.pack(torch.full((1000,), float(number))) for number in range(4)]
    begun, copy = "copies waits for compute", "compute waits for copy {}".format
    assert queued == [begun, begun, begun, copy(1), begun, copy(2)], "two may be under way"
    away.copies.settle()
    del queued[:]
    assert unpack(kept[3])[0] == 3.0
    assert queued == [begun, copy(5), begun], "what is needed next is fetched ahead"
    del queued[:]
    assert unpack(kept[2])[0] == 2.0
    assert queued == [copy(6), copy(6), begun]
    del queued[:]
    assert unpack(kept[0])[0] == 0.0
    assert queued == [copy(7), begun, copy(8)], "what was fetched in vain is waited for before its memory is another's"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_step_is_the_same_and_the_peak_is_lower() -> None:
    def peak(least: int | None) -> tuple[int, Tensor]:
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU()) for _ in range(16)]
        model = torch.nn.Sequential(*layers).cuda()
        if least is not None:
            model.forward = partial(forward, model, model.forward, least, torch.device("cuda"))  # type: ignore[method-assign]
        torch.cuda.reset_peak_memory_stats()
        model(torch.randn(8192, 1024, device="cuda")).square().mean().backward()
        return torch.cuda.max_memory_allocated(), layers[0][0].weight.grad

    much, wanted = peak(None)
    little, gradient = peak(1 << 20)
    torch.testing.assert_close(gradient, wanted)
    assert little < 0.6 * much
