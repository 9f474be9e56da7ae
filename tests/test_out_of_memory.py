"""What a run does when the device's memory runs out: in its first steps, later, and before, to find out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import COMPONENTS, LORA, plan_of

from graftwork.checkpoint import manifest
from graftwork.contracts import DictLookup, Event, MemoryRanOut, MemoryStrategy, NoSettings, Stepper
from graftwork.train.loop import train
from graftwork.train.out_of_memory import OutOfMemory


class Greedy(MemoryStrategy[NoSettings]):
    """Runs out of memory in the second step of more than a record"""

    name: ClassVar[str] = "greedy"
    largest: ClassVar[int] = 0

    def stepper(self, assembly: Any, settings: Any) -> Stepper:
        largest = self.largest

        class Limited(Stepper):
            def accumulate(self, batch: Any, num_label_tokens: int, **options: Any) -> Any:
                if self.optimizer.state and len(batch.input_ids) > largest:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().accumulate(batch, num_label_tokens, **options)

        return Limited(assembly, settings)


class Frugal(Greedy):
    """Runs out of memory in the second step of more than two records"""

    name: ClassVar[str] = "frugal"
    largest: ClassVar[int] = 2


class Late(MemoryStrategy[NoSettings]):
    """Runs out of memory in the third step"""

    name: ClassVar[str] = "late"

    def stepper(self, assembly: Any, settings: Any) -> Stepper:
        class Third(Stepper):
            steps = 0

            def update(self) -> None:
                super().update()
                self.steps += 1

            def accumulate(self, batch: Any, num_label_tokens: int, **options: Any) -> Any:
                if self.steps == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().accumulate(batch, num_label_tokens, **options)

        return Third(assembly, settings)


class Tight(MemoryStrategy[NoSettings]):
    """Runs out of memory from the third step on, at more than a record"""

    name: ClassVar[str] = "tight"

    def stepper(self, assembly: Any, settings: Any) -> Stepper:
        class Late(Stepper):
            steps = 0

            def update(self) -> None:
                super().update()
                self.steps += 1

            def accumulate(self, batch: Any, num_label_tokens: float, **options: Any) -> Any:
                loss = super().accumulate(batch, num_label_tokens, **options)
                if self.steps >= 2 and len(batch.input_ids) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return loss

        return Late(assembly, settings)


LOOKUP = DictLookup(*COMPONENTS, Greedy, Frugal, Late, Tight)


def test_where_memory_runs_out_early_the_next_candidate_is_chosen_and_then_smaller_micro_batches(
    base: Path, tmp_path: Path
) -> None:
    memory = {"try": [["greedy"], ["frugal"]]}
    plan = plan_of(base, tmp_path, {"memory": memory, "train.steps": 3}, LOOKUP)
    events: list[Event] = []
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=events.append)
    assert [event.sentence for event in events if isinstance(event, MemoryRanOut)] == [
        "the device's memory ran out in step 2; beginning again with frugal, 4 records at a time",
        "the device's memory ran out in step 2; beginning again with frugal, 2 records at a time",
    ]
    assert [row["step"] for row in outcome.log] == [1, 2, 3]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3
    assert [choice.name for choice in outcome.assembly.plan.run_context.memory] == ["frugal"]


@pytest.mark.parametrize(("name", "step"), [("greedy", 2), ("late", 3)])
def test_where_nothing_is_left_to_try_or_it_is_too_late_the_run_ends_with_what_to_do(
    base: Path, tmp_path: Path, name: str, step: int
) -> None:
    changes = {"memory.use": [name], "train.batch_size": 1, "train.steps": 4}
    with pytest.raises(OutOfMemory) as caught:
        train(plan_of(base, tmp_path, changes, LOOKUP), LOOKUP, tmp_path / "out", device="cpu")
    assert str(caught.value) == (
        f"the device's memory ran out in step {step}; lower train.micro_batch_size or memory.budget, or name strategies in memory"
    )


def test_where_memory_runs_out_later_the_step_is_taken_again_in_smaller_micro_batches(
    base: Path, tmp_path: Path
) -> None:
    changes = {"memory.use": ["tight"], "train.batch_size": 4, "train.steps": 5, "peft": LORA | {"dropout": 0.0}}
    events: list[Event] = []
    plan = plan_of(base, tmp_path, changes, LOOKUP)
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=events.append)
    assert [event.sentence for event in events if isinstance(event, MemoryRanOut)] == [
        "the device's memory ran out in step 3; going on with tight, 2 records at a time",
        "the device's memory ran out in step 3; going on with tight, 1 records at a time",
    ]
    saved = manifest.read(outcome.checkpoint).plan.run_context
    assert saved.train.micro_batch_size == 1, "a resumed run begins with what its last steps needed"
    whole = plan_of(base, tmp_path, {**changes, "memory.use": []}, LOOKUP)
    other = train(whole, LOOKUP, tmp_path / "other", device="cpu")
    losses = [[row["loss"] for row in each.log] for each in (outcome, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"train.packing": True, "train.batch_size": 8}], ids=["rows", "packed"])
def test_on_cuda_the_largest_micro_batch_is_tried_before_much_is_lost_and_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    changes = {"train.steps": 3, "train.micro_batch_size": 2, **changes}
    plan, sizes = plan_of(base, tmp_path, changes), list[tuple[int, int]]()
    accumulate = Stepper.accumulate

    def watched(self: Stepper, batch: Any, weight: float, **options: Any) -> Any:
        sizes.append((len(batch.input_ids), len(self.optimizer.state)))
        return accumulate(self, batch, weight, **options)

    monkeypatch.setattr(Stepper, "accumulate", watched)
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu")
    taken = [*sizes]
    sizes.clear()
    monkeypatch.setattr("graftwork.train.accumulating.device_type", lambda device: "cuda")
    tried = train(plan, LOOKUP, tmp_path / "tried", device="cpu")
    assert [row["loss"] for row in tried.log] == [row["loss"] for row in outcome.log]
    first = next(place for place, (_, state) in enumerate(sizes) if state)
    assert [rows for rows, _ in sizes[first : first + 2]] == [2, 2], "both with the optimizer's state in memory"
    assert sizes[:first] + sizes[first + 2 :] == taken
