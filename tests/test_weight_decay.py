"""Weight decay: what it falls on, whichever method, strategy and optimizer is used, and what of it a resumed run may change."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import COMPONENTS, LORA, Interrupted, PlanOf, interrupt_at, plan_of
from transformers import Trainer

from graftwork.build import compose
from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import OPTIMIZER
from graftwork.contracts import CheckpointSaved, DictLookup, MemoryStrategy, NoSettings, TrainSettings, stepper_for
from graftwork.contracts.stepper import decays
from graftwork.errors import CheckpointError
from graftwork.train.loop import train
from graftwork_adam8bit import Adam8bit
from graftwork_ddp import Ddp
from graftwork_fsdp import Fsdp


class OwnAdam(MemoryStrategy[NoSettings]):
    """An optimizer that is told of the run's weight decay as of everything else"""

    name = "own-adam"

    def optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, foreach=False)


LOOKUP = DictLookup(*COMPONENTS, Adam8bit, Ddp, Fsdp, OwnAdam)
EVERYTHING = {"use": "full", "on": ["language", "connector", "mining", "vision"]}
CONNECTOR = LORA | {"plus_ratio": 4.0, "also_train": ["connector", "mining", "language.norms"]}


@pytest.mark.parametrize("strategy", ["", "adam8bit", "ddp", "fsdp", "own-adam"])
@pytest.mark.parametrize("peft", [EVERYTHING, CONNECTOR], ids=["full", "lora-plus"])
def test_it_falls_on_what_hugging_faces_trainer_lets_it_fall_on(run: PlanOf, strategy: str, peft: Any) -> None:
    if strategy == "adam8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    plan = run({"peft": peft, "train.weight_decay": 0.5, "memory": {"use": [strategy] if strategy else []}}, LOOKUP)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    for parameter in assembly.trained().values():
        parameter.data += 1.0  # so that none is zero, which decay would leave alone
    stepper = stepper_for(assembly, plan.run_context.train)
    before = values(assembly)
    for parameter in stepper.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    stepper.update()
    moved = {name for name, value in values(assembly).items() if not value.equal(before[name])}
    trainers = Trainer.get_decay_parameter_names(None, compose.build(plan, LOOKUP, device="cpu").model)  # type: ignore[arg-type]
    assert moved == before.keys() & set(trainers)
    assert {name for name in before if name.endswith("bias")} and not any(name.endswith("bias") for name in moved)
    assert not any("norm" in name for name in moved)


def values(assembly: Any) -> dict[str, torch.Tensor]:
    with assembly.full_params(assembly.trained()):
        return {name: parameter.detach().clone() for name, parameter in assembly.trained().items()}


@pytest.mark.parametrize(
    ("name", "falls"),
    [
        ("linear.weight", True),
        ("linear.bias", False),
        ("seq.0.weight", False),
        ("scale.weight", False),
        ("norm.weight", False),
        ("batch.weight", False),
        ("ln_norm.weight", False),
        ("abnormal.weight", True),
    ],
)
def test_a_normalisation_layer_is_known_by_its_class_or_by_its_name(name: str, falls: bool) -> None:
    class TinyRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

    class Scaled(TinyRMSNorm):
        """A norm that does not say so itself"""

    linear, modules = torch.nn.Linear(2, 2), torch.nn.ModuleDict()
    modules.update({"linear": linear, "seq": torch.nn.Sequential(torch.nn.LayerNorm(2), linear), "scale": Scaled()})
    modules.update({"norm": torch.nn.Embedding(2, 2), "ln_norm": torch.nn.Embedding(2, 2), "abnormal": linear})
    modules["batch"] = torch.nn.BatchNorm2d(2)
    assert decays(modules, name) is falls


def test_a_run_in_which_it_fell_on_everything_is_not_resumed_in_silence(base: Path, tmp_path: Path) -> None:
    def begun(name: str, changes: dict[str, Any]) -> Any:
        """A run that was interrupted, as one that recorded nothing of weight decay."""
        plan = plan_of(base, tmp_path, {"train.save_every": 2, **changes}, LOOKUP)
        with pytest.raises(Interrupted):
            train(plan, LOOKUP, tmp_path / name, device="cpu", listen=interrupt_at(CheckpointSaved, 2))
        folder = tmp_path / name / "checkpoint-2"
        file = folder / OPTIMIZER / "state.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if key != "decays"}, file)
        read = manifest.read(folder)
        read.files[f"{OPTIMIZER}/state.safetensors"] = manifest.describe_files(folder)[f"{OPTIMIZER}/state.safetensors"]
        manifest.write(read, folder)
        return plan

    plan = begun("connector", {"peft": CONNECTOR, "train.weight_decay": 0.1})
    with pytest.raises(CheckpointError) as caught:
        train(plan, LOOKUP, tmp_path / "connector", resume=True, device="cpu")
    assert str(caught.value) == (
        f"weight decay fell on other parameters in the run of '{tmp_path / 'connector' / 'checkpoint-2'}' than it does here: 20 "
        "biases and weights of normalisation layers; go on with the Graftwork that it began with, or start a new run with --out"
    )
    for name, changes in {"lora": {"train.weight_decay": 0.1}, "no decay": {"peft": CONNECTOR}}.items():
        assert train(begun(name, changes), LOOKUP, tmp_path / name, resume=True, device="cpu").verdict.healthy
