"""The training loop: one, for every model, method and strategy."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import checkpoint, compose, manifest, proof
from graftwork.batch import IGNORED, Encoded, collate
from graftwork.errors import CheckpointError, DataError
from graftwork.events import CheckpointSaved, Event, RunEnded, RunStarted, StepTaken
from graftwork.health import Health, Verdict
from graftwork.lookup import Lookup
from graftwork.plan import Plan, TrainSettings
from graftwork.resuming import keep_log, resumable
from graftwork.sampling import Sampler, learning_rate_factor, steps_for
from graftwork.training_data import TrainingData, cut, gather

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from graftwork.batch import Batch
    from graftwork.compose import Assembly

LOG = "log.jsonl"


@dataclass
class Outcome:
    """How a run ended."""

    checkpoint: Path
    verdict: Verdict
    assembly: Assembly
    data: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)


def train(
    plan: Plan,
    lookup: Lookup,
    out: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    listen: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Train a plan, and write its log and its checkpoints into `out`.

    With `resume` it goes on from the newest checkpoint of `out`, exactly: on a CPU the losses equal, to the last bit,
    those of a run that was never interrupted. Raises GraftworkError; an unhealthy run is no error here: its verdict says so.
    """
    settings = plan.circumstance.train
    found = checkpoint.checkpoints(out)
    if found and not resume:
        raise CheckpointError(
            f"'{out}' already holds {found[-1].name}; go on with --resume, or name another folder with --out"
        )
    start = found[-1] if found else None
    saved = resumable(start, plan) if start else None
    checkpoint.sweep(out)

    assembly = compose.build(
        plan,
        lookup,
        device=device,
        trained=checkpoint.read_tensors(start / checkpoint.TENSORS) if start else None,
        processor_folder=start / checkpoint.PROCESSOR if start else None,
    )
    data = gather(plan, lookup, assembly.processor)
    steps = steps_for(len(data.records), settings.batch_size, settings.epochs, settings.steps)
    if not assembly.trained():
        raise CheckpointError("nothing is trained in this plan; set peft.use, or roles in peft.also_train")
    loop = Loop(plan, assembly, data, steps, out, lookup, listen)
    if start and saved:
        loop.restore(saved, start)
    return loop.run()


class Loop:
    """One run of optimizer steps over an assembled model."""

    def __init__(
        self,
        plan: Plan,
        assembly: Assembly,
        data: TrainingData,
        steps: int,
        out: Path,
        lookup: Lookup,
        listen: Callable[[Event], None],
    ) -> None:
        import torch

        self.plan, self.assembly, self.data, self.steps, self.out, self.lookup = (
            plan,
            assembly,
            data,
            steps,
            out,
            lookup,
        )
        self.settings: TrainSettings = plan.circumstance.train
        self.step = 0
        self._listen = listen
        self.parameters = assembly.trained()
        groups = self._groups()
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.settings.learning_rate,
            betas=self.settings.adam_betas,
            eps=self.settings.adam_epsilon,
            weight_decay=self.settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(assembly.device.type, enabled=assembly.precision == "fp16")
        self.health = Health(assembly.processor.vocabulary, assembly.precision, assembly.architecture.overflows_in)
        self.sampler = Sampler(
            data.lengths,
            min(self.settings.batch_size, len(data.records)),
            seed=plan.circumstance.seed,
            by_length=self.settings.group_by_length,
        )
        self.log: list[dict[str, Any]] = []
        self.probe = proof.probe_tensors(self.encode_step(0), assembly.processor.pad_id)

    def _groups(self) -> list[dict[str, Any]]:
        peft, rate = self.assembly.peft, self.settings.learning_rate
        if peft is None:
            return [{"params": list(self.parameters.values()), "lr": rate}]
        return [group for group in peft.groups(self.parameters, rate) if group["params"]]

    def run(self) -> Outcome:
        """Take the remaining steps, save, and judge."""
        import torch

        self.tell(RunStarted(self.out, self.step, self.steps, self.plan))
        self.assembly.model.train()
        # Dropout starts from the seed, and goes on from the saved state when resuming.
        if self.step == 0:
            torch.manual_seed(self.plan.circumstance.seed)
        folder = self.out / f"checkpoint-{self.step}"
        self.out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as ahead, (self.out / LOG).open("a" if self.step else "w", encoding="utf-8") as log:
            upcoming = ahead.submit(self.encode_step, self.step)
            while self.step < self.steps and not self.health.hopeless:
                began = time.perf_counter()  # Waiting for data is part of a step's time.
                examples = upcoming.result()
                upcoming = ahead.submit(self.encode_step, self.step + 1)
                line = self.take_step(examples, began)
                if self.step % self.settings.log_every == 0 or self.step == self.steps:
                    self.log.append(line)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                last = self.step == self.steps or self.health.hopeless
                if last or (self.settings.save_every and self.step % self.settings.save_every == 0):
                    folder = self.save()
        verdict = self.health.verdict()
        self.tell(RunEnded(self.out, self.step, verdict.healthy, verdict.reasons))
        return Outcome(folder, verdict, self.assembly, self.data.summary, self.log)

    def encode_step(self, step: int) -> list[Encoded]:
        """The encoded records of a step, or of the next one that has any that can be used; nothing after the last."""
        if step >= self.steps:
            return []
        for later in range(step, step + len(self.data.records)):
            if encoded := self.encode(self.sampler.batch(later)):
                return encoded
        raise DataError("no record of the data can be used", self.data.summary["bad"][-3:])

    def encode(self, indices: Sequence[int]) -> list[Encoded]:
        """Records by index, encoded; one whose picture cannot be read, or of which too little is left, is left out and
        counted once."""
        encoded = []
        for index in indices:
            record = self.data.records[index]
            try:
                encoded.append(cut(self.assembly.processor.encode(record), self.settings.max_length))
            except DataError as error:
                if self.plan.circumstance.strict_data:
                    raise
                self.data.leave_out([f"{record.where or record.id}: {error}"])
        return encoded

    def take_step(self, examples: Sequence[Encoded], began: float) -> dict[str, Any]:
        """One optimizer step, which `began` at that time, on encoded records; returns its line of the log."""
        import torch

        factor = learning_rate_factor(self.step, self.steps, self.settings.warmup_ratio, self.settings.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        labelled = sum(int(example.labelled) for example in examples)
        loss = 0.0
        size = self.settings.micro_batch_size or len(examples)
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size], pad_id=self.assembly.processor.pad_id).to(
                self.assembly.device
            )
            with self.assembly.autocast():
                part = summed_loss(self.assembly.model, batch) / max(1, labelled)
            self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or math.inf)
        skipped = not (math.isfinite(loss) and math.isfinite(float(norm)))
        if not skipped:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.health.saw(loss, skipped=skipped)
        self.step += 1
        event = StepTaken(
            self.out,
            step=self.step,
            steps=self.steps,
            loss=loss,
            learning_rate=self.settings.learning_rate * factor,
            gradient_norm=float(norm),
            images=sum(len(pixels) for e in examples for pixels in list(e.pixels.values())[:1]),
            tokens=sum(len(e.input_ids) for e in examples),
            seconds=time.perf_counter() - began,
        )
        self.tell(event)
        return {key: getattr(event, key) for key in LOGGED} | ({"skipped": True} if skipped else {})

    def tell(self, event: Event) -> None:
        """Tell the caller and every observer."""
        self._listen(event)
        self.lookup.emit(event)

    def save(self) -> Path:
        """Save a complete checkpoint of now, and let the oldest go."""
        folder = self.out / f"checkpoint-{self.step}"
        checkpoint.save(
            self.assembly,
            folder,
            self.lookup,
            step=self.step,
            steps=self.steps,
            probe=self.probe,
            health=self.health.verdict(),
            data=self.data.recorded(),
            optimizer=self.state(),
        )
        for old in checkpoint.checkpoints(self.out)[: -self.settings.keep]:
            checkpoint.remove(old)
        self.tell(CheckpointSaved(self.out, self.step, folder))
        return folder

    def state(self) -> dict[str, Tensor]:
        """Everything that resuming needs besides the trained tensors, as tensors."""
        import torch

        names = {id(parameter): name for name, parameter in self.parameters.items()}
        state = {
            f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        state["random/cpu"] = torch.get_rng_state()
        if self.assembly.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.assembly.device)
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        state["losses"] = torch.tensor(self.health.losses, dtype=torch.float64)
        state["skipped"] = torch.tensor([self.health.skipped, self.health.skipped_in_a_row])
        return state

    def restore(self, saved: manifest.Manifest, start: Path) -> None:
        """Go on from a checkpoint: its step, optimizer, random numbers, health and log."""
        import torch

        state = checkpoint.read_tensors(start / checkpoint.OPTIMIZER / "state.safetensors")
        self.step = saved.step
        for name, parameter in self.parameters.items():
            keys = [key for key in state if key.rpartition("/")[0] == name]
            self.optimizer.state[parameter] = {
                key.rpartition("/")[2]: state[key] if key.endswith("/step") else state[key].to(parameter.device)
                for key in keys
            }
        torch.set_rng_state(state["random/cpu"])
        if "random/cuda" in state and self.assembly.device.type == "cuda":
            torch.cuda.set_rng_state(state["random/cuda"], self.assembly.device)
        if "scaler" in state:
            scale, growth = state["scaler"].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
        self.health.losses = state["losses"].tolist()
        self.health.skipped, self.health.skipped_in_a_row = state["skipped"].tolist()
        self.data.leave_out(saved.data["bad"])
        self.log = keep_log(self.out / LOG, self.step)


LOGGED = ("step", "loss", "learning_rate", "gradient_norm", "images", "tokens", "seconds")


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The cross entropy in nats, summed over the labelled positions, and computed only there.

    Most positions are picture or prompt; logits for them are never made (their size is tokens x vocabulary).
    """
    import torch

    hidden = model(batch)[:, :-1]
    labels = batch.labels[:, 1:]
    kept = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.logits(hidden[kept]).float(), labels[kept], reduction="sum")
