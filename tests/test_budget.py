"""The budget: sizes, candidates, micro-batches, and that none of it changes what is learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import COMPONENTS, LORA, plan_of, run_table

from graftwork.cli import main
from graftwork.config.machine import Machine
from graftwork.config.runfile import parse_run
from graftwork.config.sizes import format_size
from graftwork.contracts import DictLookup, MemoryStrategy, NoSettings, Plan
from graftwork.errors import GraftworkError
from graftwork.jobs.messages import Message
from graftwork.jobs.outcome import memory_facts
from graftwork.jobs.train import fitted
from graftwork.memory import budget
from graftwork.memory.rehearsal import Step
from graftwork.memory.timeline import CATEGORIES, Footprint
from graftwork.report import ReportContent
from graftwork.report.markdown import render_markdown
from graftwork.report.memory import memory_course
from graftwork.report.page import render_page
from graftwork.train.loop import train
from graftwork.train.resuming import comparable

CPU = Machine()
MIB = 1 << 20


class Odd(MemoryStrategy[NoSettings]):
    """Does not bear fake tensors"""

    name: ClassVar[str] = "odd"

    def prepare(self, assembly: Any) -> None:
        raise TypeError("what is this?\nAnd why?")


class Shared(MemoryStrategy[NoSettings]):
    """Shares the optimizer's state among processes"""

    name: ClassVar[str] = "shared"

    def prepare(self, assembly: Any) -> None:
        raise AssertionError("it is not run, because it says what it saves")

    def footprint(self, alone: Mapping[str, int], processes: int, assembly: Any) -> Mapping[str, int]:
        return {"optimizer state": alone["optimizer state"] // processes}


LOOKUP = DictLookup(*COMPONENTS, Odd, Shared)


# The run file ---------------------------------------------------------------------------------------------------------


def test_a_run_file_holds_a_budget_and_candidates_with_the_settings_of_their_strategies(tmp_path: Path) -> None:
    memory = {"budget": "24 GiB", "try": [[], ["checkpointing"]], "checkpointing": {"of": ["language", "vision.low"]}}
    run = parse_run(run_table(None) | {"memory": memory}, tmp_path)
    assert (run.budget, run.candidates) == (24 << 30, ((), ("checkpointing",)))
    plan = plan_of(None, tmp_path, {"memory": memory})
    assert plan.run_context.memory == [] and plan.run_context.budget == 24 << 30
    assert [[choice.name for choice in candidate] for candidate in plan.run_context.candidates] == [
        [],
        ["checkpointing"],
    ]
    assert plan.run_context.candidates[1][0].settings == {"of": ["language", "vision.low"]}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("memory", "mistake"),
    [
        ({"use": ["a"], "try": [["b"]]}, "memory: 'use' and 'try' exclude each other; keep one of them"),
        ({"budget": "much"}, "memory: budget: 'much' is not a memory size; write one such as '24 GiB'"),
        ({"try": ["a"]}, "memory.try: found ['a'], wanted list of lists of strings"),
        ({"try": [["a"]], "b": {}}, "memory.b: 'memory.try' does not name it; did you mean 'a'?"),
    ],
)
def test_mistakes_in_the_memory_table_are_said(tmp_path: Path, memory: dict[str, Any], mistake: str) -> None:
    with pytest.raises(GraftworkError) as caught:
        parse_run(run_table(None) | {"memory": memory}, tmp_path)
    assert mistake.partition(";")[0] in str(caught.value)


# The search -----------------------------------------------------------------------------------------------------------


def footprint(peak: int) -> Footprint:
    return Footprint(peak, dict.fromkeys(CATEGORIES, 0) | {"activations": peak}, "backward", "model", "mm", ())


class Linear:
    """Steps of 10 bytes and 5 for each record, or what `bends` says."""

    def __init__(self, bends: dict[int, int] | None = None) -> None:
        self.taken: list[int] = []
        self.bends = bends or {}

    def __call__(self, size: int) -> Step:
        self.taken.append(size)
        return Step(size, 8, 4, footprint(self.bends.get(size, 10 + 5 * size)), 7)


@pytest.mark.parametrize(
    ("batch", "limit", "taken"),
    [
        (128, 9, [1]),  # not even one record fits
        (128, 15, [1, 2]),  # one fits
        (1, 100, [1]),
        (128, 34, [1, 2]),  # four would need 30, eight 50
        (128, 97, [1, 2, 16]),
        (12, 97, [1, 2, 12]),  # the whole batch
    ],
)
def test_the_largest_micro_batch_is_found_in_few_steps(batch: int, limit: int, taken: Sequence[int]) -> None:
    take = Linear()
    steps = budget.largest(take, batch, limit)
    expected = [*taken, 4] if limit == 34 else taken
    assert take.taken == list(expected)
    fitting = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, batch) if size <= batch and 10 + 5 * size <= limit]
    assert steps[-1].micro_batch == max(fitting, default=1)


def test_a_micro_batch_that_needs_more_than_it_should_is_halved() -> None:
    take = Linear({16: 200})
    assert budget.largest(take, 128, 97)[-1].micro_batch == 8
    assert take.taken == [1, 2, 16, 8]


def climbed(
    base: Path, folder: Path, limit: int | None, memory: dict[str, Any], **train: Any
) -> budget.CandidateSearch:
    changes = {"memory": memory, "train.batch_size": 16} | {f"train.{key}": value for key, value in train.items()}
    return budget.search_candidates(plan_of(base, folder, changes, LOOKUP), LOOKUP, CPU, device="cpu", budget=limit)


def test_the_first_candidate_that_fits_is_chosen_with_the_largest_micro_batch(base: Path, tmp_path: Path) -> None:
    memory = {"try": [[], ["checkpointing"]]}
    free = climbed(base, tmp_path, None, memory, micro_batch_size=4)
    assert free.fits is None and free.chosen == 0
    plain, saving = (candidate.peak for candidate in free.candidates)
    assert plain and saving and saving < plain
    tight = climbed(base, tmp_path, (plain + saving) // 2, memory, micro_batch_size=4)
    assert (tight.fits, tight.chosen) == (True, 1)
    assert tight.why.startswith("checkpointing (the first that fits into ")
    assert ", 4 of 16 records at a time, 4 times for each step: " in tight.why
    wide = climbed(base, tmp_path, 1 << 30, memory)
    assert wide.chosen == 0 and [candidate.steps[-1].micro_batch for candidate in wide.candidates] == [16, 16]
    assert wide.why.startswith(
        "no memory strategy (the fastest, and it fits into 1.0 GiB), 16 of 16 records at a time: "
    )


def test_where_nothing_fits_the_least_is_said_and_what_to_do(base: Path, tmp_path: Path) -> None:
    search = climbed(base, tmp_path, 1 * MIB, {"try": [[], ["checkpointing"]]})
    assert search.fits is False and search.best
    assert search.why == f"no candidate fits into 1.0 MiB: the smallest needs {format_size(search.best.peak or 0)}"
    with pytest.raises(GraftworkError) as caught:
        budget.chosen_plan(plan_of(base, tmp_path), search)
    sentence, *lines = str(caught.value).splitlines()
    assert sentence == f"{search.why}; add strategies to memory.try, shorten train.max_length, or use a larger device"
    assert [line.split(":")[0].strip() for line in lines] == ["none", "checkpointing"]


def test_a_candidate_that_cannot_be_rehearsed_is_passed_over_with_its_reason(base: Path, tmp_path: Path) -> None:
    search = climbed(base, tmp_path, 1 << 30, {"try": [["odd"], []]}, micro_batch_size=1)
    assert search.chosen == 1
    assert search.candidates[0].problem == "its code does not run on fake tensors (TypeError: what is this?)"


def test_what_one_process_cannot_show_is_said_by_the_strategys_arithmetic(base: Path, tmp_path: Path) -> None:
    changes = {"memory.use": ["shared", "checkpointing"], "train.micro_batch_size": 1}
    plan = plan_of(base, tmp_path, changes, LOOKUP)
    alone, four = (budget.rehearse(plan, LOOKUP, CPU, "cpu", None, processes=processes) for processes in (1, 4))
    assert alone.not_rehearsed == ("shared",) and alone.strategies == ("shared", "checkpointing")
    saved = alone.steps[-1].footprint.categories["optimizer state"] * 3 / 4
    assert (alone.peak or 0) - (four.peak or 0) == pytest.approx(saved, abs=1024)


def test_a_budget_and_what_is_free_of_a_card_both_limit(tmp_path: Path) -> None:
    plan, limited = plan_of(None, tmp_path), plan_of(None, tmp_path, {"memory.budget": "12 GiB"})
    assert budget.budget_bytes(plan) is None
    assert budget.budget_bytes(plan, 24 << 30) == 23 << 30
    assert budget.budget_bytes(limited, 24 << 30) == budget.budget_bytes(limited) == 12 << 30
    assert budget.budget_bytes(limited, 8 << 30) == 7 << 30


def test_a_run_fits_into_what_others_left_of_a_card_and_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, told = Machine(devices=("a CUDA device",), device_bytes=80 << 30, cuda=True), list[Any]()
    monkeypatch.setattr("graftwork.jobs.train.free_bytes", lambda device: budget.RESERVE + 60 * MIB)
    _, search = fitted(plan_of(base, tmp_path), LOOKUP, gpu, "cuda", listen=told.append)
    assert told[0] == Message("of a device's 80.0 GiB only 1.1 GiB are free; others have the rest", "warning")
    assert search and search.budget == 60 * MIB


# What is trained ------------------------------------------------------------------------------------------------------


def test_the_result_is_the_same_on_every_candidate_and_with_every_micro_batch(base: Path, tmp_path: Path) -> None:
    memory = {"try": [[], ["checkpointing"]]}
    plan = plan_of(base, tmp_path, {"memory": memory, "train.steps": 2, "peft": LORA | {"dropout": 0.0}})
    results = []
    for number, (candidate, size) in enumerate(((0, 4), (0, 2), (1, 1))):
        chosen = budget.with_candidate(plan, plan.run_context.candidates[candidate], size)
        assert chosen.model_spec == plan.model_spec and chosen.run_context.train.batch_size == 4
        outcome = train(chosen, LOOKUP, tmp_path / str(number), device="cpu")
        results.append({name: value.detach().clone() for name, value in outcome.assembly.trained().items()})
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-5)


def test_a_resumed_run_may_be_cut_otherwise_and_must_have_the_same_strategies(tmp_path: Path) -> None:
    memory = {"try": [[], ["checkpointing"]]}
    plan = plan_of(None, tmp_path, {"memory": memory})
    plain, saving = plan.run_context.candidates
    assert comparable(budget.with_candidate(plan, plain, 1)) == comparable(plan_of(None, tmp_path))
    assert comparable(budget.with_candidate(plan, saving)) != comparable(plan)


# What people see ------------------------------------------------------------------------------------------------------


def run_file(folder: Path, memory: str) -> Path:
    table = run_table(None)
    parts = {part: tower["config"] for part, tower in table["model"]["parts"].items()}
    file = folder / "run.toml"
    file.write_text(
        f"""
[model]
use = "mgm-gemma"
config = "{table["model"]["config"]}"
image_size_aux = 64
[model.parts.low]
config = "{parts["low"]}"
[model.parts.high]
config = "{parts["high"]}"
[peft]
use = "lora"
on = ["language"]
[memory]
{memory}
[[data.source]]
use = "easy-vqa"
[train]
batch_size = 4
max_length = 128
"""
    )
    return file


def test_a_plan_says_what_fits_and_its_exit_status_whether(tmp_path: Path) -> None:
    file = run_file(tmp_path, 'try = [[], ["checkpointing"]]')
    result = CliRunner().invoke(main, ["plan", str(file), "--device-memory", "2 GiB"])
    assert result.exit_code == 0, result.output
    for said in (
        "memory of a step, rehearsed for a CUDA device with records of 128 tokens, 16 of them an image's and all others labelled",
        "fits, chosen",
        "fullest: ",
        "frozen weights",
        "model.layers.*.mlp.gate_proj",
        "chosen: no memory strategy (the fastest, and it fits into 1.0 GiB), 4 of 4 records at a time: ",
    ):
        assert said in result.output
    result = CliRunner().invoke(main, ["plan", str(file), "--set", "memory.budget=1 MiB", "--json"])
    assert result.exit_code == 3
    memory = json.loads(result.output)["memory"]
    assert (memory["fits"], memory["chosen"], memory["budget"]) == (False, None, MIB)
    assert [candidate["strategies"] for candidate in memory["candidates"]] == [[], ["checkpointing"]]
    assert set(memory["candidates"][0]["steps"][0]["footprint"]["categories"]) == set(CATEGORIES)


def test_a_size_that_is_none_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(run_file(tmp_path, "")), "--device-memory", "big"])
    assert (result.exit_code, result.output) == (1, "Error: 'big' is not a memory size; write one such as '24 GiB'\n")


def test_the_report_draws_a_step_and_says_what_was_predicted_and_measured() -> None:
    sizes = [dict.fromkeys(CATEGORIES, 0) | {"frozen weights": 2 << 30, "activations": n << 29} for n in (0, 1, 2)]
    found = Footprint(
        3 << 30, sizes[-1], "backward", "", "mm", (), tuple(zip(("forward", "forward", "backward"), sizes, strict=True))
    )
    drawn = memory_course(found)
    assert drawn.count("<polygon") == len(CATEGORIES) and "3.0 GiB where it is fullest" in drawn
    assert all(f"</i>{name}</span>" in drawn for name in CATEGORIES)
    assert 'points="0.0,100.0 500.0,100.0 1000.0,100.0 1000.0,300.0 500.0,300.0 0.0,300.0"' in drawn  # frozen weights
    search = budget.CandidateSearch("cuda", None, (budget.Candidate((), (Step(1, 8, 4, found, 7),)),), 0, "it fits")
    assert memory_facts(search, 3 << 30) == {
        "rehearsed": "it fits",
        "rehearsed with": "records of 8 tokens, 4 of them an image's and all others labelled",
        "predicted peak": "3.0 GiB",
        "measured peak": "3.0 GiB",
    }
    assert memory_facts(search, None)["measured peak"] == "not measured: PyTorch does not track a CPU's memory"
    assert memory_facts(None, None) == {}
    content = ReportContent("a run", memory=memory_facts(search, 3 << 30), footprint=found)
    assert drawn in render_page(content) and "predicted peak" in render_page(content)
    assert "measured peak" in render_markdown(content)
    assert json.loads(json.dumps(content.to_json()))["footprint"]["peak"] == 3 << 30
