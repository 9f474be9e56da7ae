"""Training in `transformers.Trainer` with `peft`, on a model and records of Graftwork's, for benchmarks to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graftwork.contracts import IGNORED, Assembly, Encoded, batch_of

TARGETS = ("language.attention", "language.mlp")


class HuggingFace(torch.nn.Module):
    """The same model as Trainer wants it: logits for all positions, and their loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean cross entropy of the labelled positions."""
        logits = self.model.logits(self.model(batch))
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        return {"loss": loss}


def inject_lora(assembly: Assembly) -> None:
    """`peft`'s LoRA of rank 16 on the linear layers of the language model, in fp32; what is trained beside it stays so."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        f"{name}.{leaf}" if leaf else name
        for role in TARGETS
        for name in assembly.structure.roles[role]
        for leaf, module in assembly.model.get_submodule(name).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    kept = {name for name, parameter in assembly.model.named_parameters() if parameter.requires_grad}
    with assembly.device:
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=targets), assembly.model)
    for name, parameter in assembly.model.named_parameters():
        parameter.requires_grad_(name in kept or "lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(
    assembly: Assembly,
    records: Sequence[Encoded],
    micro_batch: int,
    steps: int,
    folder: Path,
    *,
    clock: Callable[[], float] = time.perf_counter,
    **settings: Any,
) -> list[float]:
    """When each step ended, by the `clock`, of a model that has its adapter. `records` come in order; a sequence may encode them when it is
    asked. `settings` are those of TrainingArguments."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            if assembly.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(clock())

    class Records(torch.utils.data.Dataset[Encoded]):
        def __len__(self) -> int:
            return len(records)

        def __getitem__(self, index: int) -> Encoded:
            return records[index]

    def join(examples: Sequence[Encoded]) -> dict[str, Any]:
        batch = batch_of(assembly.processor, examples)
        return {"batch": batch, "labels": batch.labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments: Any, **others: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_input(self, data: Any) -> Any:
            return data.to(self.args.device) if hasattr(data, "pixels") else super()._prepare_input(data)

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=micro_batch,
        max_steps=steps,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **{"learning_rate": 2e-4, **settings},
    )
    model = HuggingFace(assembly.model)
    InOrder(model, arguments, train_dataset=Records(), data_collator=join, callbacks=[Clock()]).train()
    return ends
