"""ZeRO's configuration: what it may say, and every sentence for what contradicts the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, plan_of

from graftwork.build import compose
from graftwork.contracts import DictLookup, MemoryStrategy, Plan, RunContext, TrainSettings
from graftwork.errors import GraftworkError, PlanRefused
from graftwork.train.loop import train
from graftwork_ddp import Ddp
from graftwork_fsdp import Fsdp
from graftwork_zero import Zero, ZeroSettings, config, engine

INSTALLED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a DeepSpeed configuration."""

    def written(content: Any) -> Path:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    return written


def validate(base: Path, settings: ZeroSettings, **changes: Any) -> list[str]:
    plan = plan_of(base, base)
    run_context = RunContext(train=TrainSettings(**changes))
    return list(Zero(settings).validate(Plan(plan.model_spec, run_context)))


@pytest.mark.parametrize(
    ("given", "clause"),
    [
        (
            {"train_batch_size": 64},
            "says train_batch_size = 64, and train.batch_size is 32; make them agree, or leave it out",
        ),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "says train_micro_batch_size_per_gpu = 4, and train.micro_batch_size is null; make them agree, or leave it out",
        ),
        (
            {"gradient_clipping": 0.5},
            "says gradient_clipping = 0.5, and train.max_grad_norm is 1.0; make them agree, or leave it out",
        ),
        (
            {"fp16": {"enabled": True}},
            'says fp16.enabled = true, and train.precision is "bf16"; make them agree, or leave it out',
        ),
        (
            {"bf16": {"enabled": False}},
            'says bf16.enabled = false, and train.precision is "bf16"; make them agree, or leave it out',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "says optimizer.params.lr = 0.001, and train.learning_rate is 0.0002; make them agree, or leave it out",
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
            "says optimizer.params.betas = [0.9, 0.95], and train.adam_betas is [0.9, 0.999]; make them agree, or leave it out",
        ),
        ({"optimizer": {"type": "Lamb"}}, 'asks for the optimizer "Lamb", and a run trains with AdamW; leave it out'),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            'asks for the optimizer "Adam", and a run trains with AdamW; leave it out',
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "says zero_optimization.stage = 2, and memory.zero.stage is 3; make them agree, or leave it out",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "has offload_param to \"nvme\", for which DeepSpeed compiles; use 'cpu'",
        ),
        ({"scheduler": {}}, "has 'scheduler', which is not about memory or is the run's to say; leave it out"),
    ],
)
def test_every_contradiction_is_a_sentence(base: Path, write: Write, given: dict[str, Any], clause: str) -> None:
    file = write(given)
    assert validate(base, ZeroSettings(stage=3, config=file)) == [f"'{file}' {clause}"]


def test_what_agrees_or_is_left_to_the_run_is_accepted(base: Path, write: Write) -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False},
        "steps_per_print": 10,
    }
    settings = ZeroSettings(offload_optimizer=True, config=write(given))
    assert validate(base, settings, micro_batch_size=4) == []
    assert config.combined(config.read(settings.config), settings, TrainSettings()) == {
        "steps_per_print": 10,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    train_settings = TrainSettings(micro_batch_size=4)
    assert config.steps_contradiction(given, settings, train_settings, 2) == ""
    assert config.steps_contradiction(given, settings, train_settings, 4) == (
        f"'{settings.config}' says gradient_accumulation_steps = 4, and each of 4 processes has 2 micro-batches of a step; make "
        "them agree, or leave it out"
    )


def test_files_and_settings_that_cannot_work_are_refused(base: Path, write: Write, tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    (clause,) = validate(base, ZeroSettings(config=missing))
    assert clause.startswith(f"'{missing}' cannot be read as JSON (") and clause.endswith(
        "; correct the path or the file"
    )
    (clause,) = validate(base, ZeroSettings(config=write("[]")))
    assert clause == f"'{tmp_path / 'ds.json'}' holds no JSON object; write one, as DeepSpeed's documentation says"
    assert validate(base, ZeroSettings(offload_parameters=True)) == [
        "only stage 3 can keep weights in main memory; set stage = 3, or leave offload_parameters out"
    ]
    assert validate(base, ZeroSettings(), precision="fp16") == [
        "'zero' does not scale losses, which fp16 needs; set train.precision to 'bf16' or 'fp32'"
    ]
    plan = Plan(plan_of(base, base).model_spec, RunContext(train=TrainSettings(precision="fp16")))
    assert list(Fsdp(Fsdp.Settings()).validate(plan)) == [
        "'fsdp' does not scale losses, which fp16 needs; set train.precision to 'bf16' or 'fp32'"
    ]


def test_two_strategies_that_take_the_steps_are_refused(base: Path) -> None:
    with pytest.raises(PlanRefused) as caught:
        plan_of(base, base, {"memory": {"use": ["ddp", "fsdp"]}}, DictLookup(*COMPONENTS, Ddp, Fsdp))
    assert caught.value.details == (
        "memory: 'ddp' and 'fsdp' both take the steps of a run; keep one of them, and remove the other from memory",
    )


def test_fsdp_refuses_quantised_weights(base: Path, lookup: DictLookup) -> None:
    assembly = compose.build(plan_of(base, base), lookup, device="cpu")
    layer = assembly.model.get_submodule("model.layers.0.mlp.up_proj")
    layer.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    shard = Fsdp(Fsdp.Settings()).sharder(assembly)
    with pytest.raises(PlanRefused) as caught:
        shard(assembly.model.get_submodule("model.layers.0"))
    assert str(caught.value) == (
        "'fsdp' shards floating-point weights, and 'model.layers.0.mlp.up_proj.packed' is quantised; use one or the other"
    )


def test_compiling_is_refused_with_the_locks_that_are_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    builder = type("Builder", (), {"name": "cpu_adam"})()
    with pytest.raises(GraftworkError) as caught:
        engine.refuse_to_compile(builder)
    assert str(caught.value) == (
        "DeepSpeed wants to compile its 'cpu_adam'; leave out of its configuration what needs that, or install DeepSpeed with "
        f"DS_BUILD_CPU_ADAM=1\n  a compilation that was killed, or is running, holds '{lock}'"
    )


class OwnOptimizer(MemoryStrategy[Any]):
    """Brings an optimizer"""

    name = "own-optimizer"

    def optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Any:
        return torch.optim.Adamax(groups)


@INSTALLED
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_alone_it_takes_plain_steps_and_drops_those_that_are_not_finite(
    base: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.contracts import Stepper

    lookup = DictLookup(*COMPONENTS, Zero)
    taken = []
    for kind in (Stepper, engine.Engine):
        accumulate = kind.accumulate

        def poison(self: Any, *arguments: Any, real: Any = accumulate, **options: Any) -> Any:
            usual = self.assembly.cross_entropy
            taken.append(self)
            if taken.count(self) == 3:
                self.assembly.cross_entropy = lambda *inputs: usual(*inputs) * float("nan")
            try:
                return real(self, *arguments, **options)
            finally:
                self.assembly.cross_entropy = usual

        monkeypatch.setattr(kind, "accumulate", poison)
    changes: dict[str, Any] = {"train.steps": 6, "peft.also_train": ["connector"]}
    plain = train(plan_of(base, tmp_path, changes), lookup, tmp_path / "plain", device="cpu")
    with_zero = changes | {"memory": {"use": ["zero"], "zero": {"stage": stage}}}
    zero = train(plan_of(base, tmp_path, with_zero, lookup), lookup, tmp_path / "zero", device="cpu")
    assert [line.get("skipped", False) for line in zero.log] == [False, False, True, False, False, False]
    for one, other in zip(plain.log, zero.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4, nan_ok=True)


def test_optimizers_and_quantised_weights_of_other_strategies_are_refused(base: Path, lookup: DictLookup) -> None:
    plan = plan_of(base, base)
    assembly = compose.build(plan, lookup, device="cpu")
    settings = plan.run_context.train

    def refused(strategy: MemoryStrategy[Any]) -> str:
        with pytest.raises(PlanRefused) as caught:
            strategy.stepper(assembly, settings)
        return str(caught.value)

    assembly.strategies = [OwnOptimizer(OwnOptimizer.Settings())]
    assert refused(Zero(ZeroSettings())) == (
        "'zero' shares out the state of AdamW, and another memory strategy brings Adamax; use one or the other"
    )
    assert refused(Fsdp(Fsdp.Settings())) == (
        "'fsdp' shards the state of AdamW, and another memory strategy brings Adamax; use one or the other"
    )
    assembly.strategies = []
    assembly.model.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    shard = Zero(ZeroSettings(stage=3)).sharder(assembly)
    assert shard is not None
    with pytest.raises(PlanRefused) as caught:
        shard(assembly.model)
    assert str(caught.value) == (
        "'zero' shares out floating-point weights in stage 3, and 'packed' is quantised; use stage 2"
    )


@INSTALLED
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_does_not_know_is_refused(base: Path, tmp_path: Path, write: Write, stage: int) -> None:
    lookup = DictLookup(*COMPONENTS, Zero)
    file = write({"zero_optimization": {"stage": stage, "no_such_key": 1}})
    plan = plan_of(base, tmp_path, {"memory": {"use": ["zero"], "zero": {"config": str(file)}}}, lookup)
    with pytest.raises(PlanRefused) as caught:
        train(plan, lookup, tmp_path / "out", device="cpu")
    assert caught.value.sentence == f"DeepSpeed refuses the configuration '{file}'; correct it"
    assert "no_such_key" in "\n".join(caught.value.details)
