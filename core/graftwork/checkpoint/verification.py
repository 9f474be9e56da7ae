"""The probe: a few inputs whose logits a checkpoint must reproduce, and proof that its adapter is alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftwork.contracts.batch import IGNORED, Batch, Encoded, collate
from graftwork.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

RECORDS = 4
POSITIONS = 16
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""How far logits may move between two processes, relative to the largest logit: rounding of the precision, times the
depth of a model. A wrong weight, kernel or prompt moves them by orders of magnitude more in fp32."""
PIXELS = "pixels."


@dataclass(frozen=True)
class ProbeFacts:
    """What the manifest says of the probe."""

    precision: str
    device: str
    distance: float
    """The largest difference that switching the adapter on makes to a logit."""
    largest: float
    """The largest absolute logit with the adapter on."""
    rounded: tuple[str, ...] = ()
    """The memory strategies that had rounded the weights (see `Assembly.rounded`)."""


@dataclass(frozen=True)
class Proof:
    """What running a checkpoint's probe showed."""

    error: float
    """The largest difference between a logit now and the recorded one."""
    tolerance: float
    distance: float
    recorded_distance: float
    comparable: bool
    """Whether the probe ran at the recorded precision, on the recorded kind of device and with the same weights rounded."""


def probe_tensors(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """The probe's inputs, from the first few encoded records that fit."""
    import torch

    batch = collate(examples[:RECORDS], pad_id=pad_id)
    rows, positions = torch.nonzero(batch.labels[:, 1:] != IGNORED, as_tuple=True)
    if not len(rows):
        raise CheckpointError("the probe's records carry no labels, so nothing could be proven; check the data")
    chosen = torch.linspace(0, len(rows) - 1, min(POSITIONS, len(rows))).long()
    tensors = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "picture_positions": batch.picture_positions,
        "rows": rows[chosen],
        "positions": positions[chosen],
    }
    return tensors | {PIXELS + part: pixels for part, pixels in batch.pixels.items()}


def probe_logits(assembly: Assembly, probe: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The probe's logits with the adapter on and off, `[positions, vocabulary]`, fp32, on the CPU. Collective."""
    import torch

    batch = Batch(
        input_ids=probe["input_ids"],
        attention_mask=probe["attention_mask"],
        picture_positions=probe["picture_positions"],
        labels=torch.full_like(probe["input_ids"], IGNORED),
        pixels={name.removeprefix(PIXELS): value for name, value in probe.items() if name.startswith(PIXELS)},
    ).to(assembly.device)
    model = assembly.model
    training = model.training
    model.eval()

    def logits() -> Tensor:
        # Autocast for each by itself: it keeps the rounded weights for as long as it is entered.
        with assembly.autocast():
            hidden = model(batch)[probe["rows"], probe["positions"]]
            return model.logits(hidden).float().cpu()  # type: ignore[no-any-return]

    try:
        # Not in inference mode: what sharding strategies fetch here may be kept for training.
        with torch.no_grad():
            on = assembly.running(logits)
            with assembly.off():
                return on, assembly.running(logits)
    finally:
        model.train(training)


def measure(assembly: Assembly, probe: dict[str, Tensor]) -> ProbeFacts:
    """Run the probe and put the logits that it must give into it."""
    on, off = probe_logits(assembly, probe)
    probe["logits"] = on
    return ProbeFacts(
        precision=assembly.precision,
        device=assembly.device.type,
        distance=float((on - off).abs().max()),
        largest=float(on.abs().max()),
        rounded=assembly.rounded,
    )


def prove(assembly: Assembly, probe: Mapping[str, Tensor], facts: ProbeFacts) -> Proof:
    """Run a checkpoint's probe on the model rebuilt from it.

    Raises AdapterError when the adapter changes nothing, CheckpointError when the logits are not the recorded ones. At
    another precision, on another kind of device or with other weights rounded only the first can be judged.
    """
    on, off = probe_logits(assembly, probe)
    proof = Proof(
        error=float((on - probe["logits"]).abs().max()),
        tolerance=TOLERANCE[facts.precision] * max(1.0, facts.largest),
        distance=float((on - off).abs().max()),
        recorded_distance=facts.distance,
        comparable=(facts.precision, facts.device, facts.rounded)
        == (assembly.precision, assembly.device.type, assembly.rounded),
    )
    refuse_dead(assembly, on, off)
    if proof.comparable and not proof.error <= proof.tolerance:
        raise CheckpointError(
            f"the rebuilt model is not the one that was saved: its logits differ by {proof.error:.3g}, at most "
            f"{proof.tolerance:.3g} is rounding; use the versions that the checkpoint records"
        )
    return proof


def refuse_dead(assembly: Assembly, on: Tensor, off: Tensor) -> None:
    """CheckpointError for logits that are not finite, AdapterError for an adapter that moves none of them."""
    if not on.isfinite().all():
        raise CheckpointError(
            "the rebuilt model's logits are not finite numbers: its run was unhealthy; use an earlier checkpoint"
        )
    if assembly.switchable and on.equal(off):
        raise AdapterError(
            "the adapter is dead: switching it on changes no logit of the probe (distance 0); train it longer or with a "
            "higher learning rate, or use the base itself"
        )
