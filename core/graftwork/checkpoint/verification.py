"""The golden inputs: a few records whose logits a checkpoint must reproduce, and on which its adapter must have an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.contracts.batch import IGNORED, Batch, Encoded
from graftwork.contracts.model import Processor, batch_of
from graftwork.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

RECORDS = 4
POSITIONS = 16
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""How far rounding may move logits between two processes, relative to the largest logit: that of the precision, times the
depth of a model. A wrong weight, kernel or prompt moves them by orders of magnitude more in fp32."""
SHARE = 0.05
"""The share of what an adapter does by which logits may be off, whatever rounding would explain: a check that allowed more could
not tell a checkpoint that works from one that lost its adapter."""
PIXELS = "pixels."
TOKEN_FIELDS = "token_fields."


@dataclass(frozen=True)
class GoldenFacts:
    """What the manifest says of the golden inputs."""

    precision: str
    device: str
    distance: float
    """The largest difference that switching the adapter on makes to a logit."""
    largest: float
    """The largest absolute logit with the adapter on."""
    quantized: tuple[str, ...] = ()
    """The memory strategies that had rounded the weights (see `Assembly.quantized`)."""


@dataclass(frozen=True)
class Agreement:
    """How near a checkpoint is to what other code makes of the folder that it was imported from."""

    readers: tuple[str, ...]
    """The libraries that opened that folder, each with its version."""
    inputs: str
    """What was compared: `text`, or `text and images`."""
    error: float
    """The largest difference between a logit and theirs."""
    tolerance: float

    def clause(self) -> str:
        """For a person."""
        return f"{' and '.join(self.readers)} on {self.inputs}: logits differ by {self.error:.3g}, at most {self.tolerance:.3g} is rounding"


@dataclass(frozen=True)
class Verification:
    """What a checkpoint did with its golden inputs."""

    error: float
    """The largest difference between a logit now and the recorded one."""
    tolerance: float
    """Up to which `error` shows that this is the checkpoint (see `tolerance`)."""
    rounding: float
    """Up to which it may be rounding at the recorded precision; beyond `tolerance` that shows nothing."""
    distance: float
    recorded_distance: float
    comparable: bool
    """Whether they ran at the recorded precision, on the recorded kind of device and with the same weights rounded."""
    cannot_tell: str = ""
    """Why the logits show neither that this is the checkpoint nor that it is not, and what could; empty where they do."""
    agreements: tuple[Agreement, ...] = ()
    """With whom else it agrees; none where it was compared with itself alone."""
    not_compared: tuple[str, ...] = ()
    """With whom it was not compared although that was asked, and why: a clause each."""

    @property
    def compared(self) -> tuple[str, ...]:
        """How near it is to whom, and with whom it could not be compared: a clause each."""
        return (*(each.clause() for each in self.agreements), *self.not_compared)

    @property
    def undecided(self) -> str:
        """Why the logits do not show that it is the checkpoint, a clause; empty where they do."""
        other = "the logits cannot be compared: the precision, the device or the quantized weights are not the recorded ones"
        return self.cannot_tell or other * (not self.comparable)

    @property
    def words(self) -> str:
        """What it shows, in the words that are the same everywhere: with whom the checkpoint agrees, or whether it agrees with itself."""
        readers = dict.fromkeys(reader for agreement in self.agreements for reader in agreement.readers)
        alone = "not verified" if self.undecided else "reopens as saved"
        return f"verified against {' and '.join(readers)}" if readers else alone


def golden_inputs(examples: Sequence[Encoded], processor: Processor) -> dict[str, Tensor]:
    """The golden inputs, from the first few encoded records."""
    import torch

    batch = batch_of(processor, examples[:RECORDS])
    rows, positions = torch.nonzero(batch.labels[:, 1:] != IGNORED, as_tuple=True)
    if not len(rows):
        raise CheckpointError(
            "the first records carry no labels, so the checkpoint could not be verified with them; check the data"
        )
    chosen = torch.linspace(0, len(rows) - 1, min(POSITIONS, len(rows))).long()
    tensors = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "image_token_mask": batch.image_token_mask,
        "rows": rows[chosen],
        "positions": positions[chosen],
    }
    for prefix, held in ((PIXELS, batch.pixels), (TOKEN_FIELDS, batch.token_fields)):
        tensors |= {prefix + name: value.contiguous() for name, value in held.items()}
    return tensors


def golden_logits(assembly: Assembly, golden: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The golden inputs' logits with the adapter on and off, `[positions, vocabulary]`, fp32, on the CPU. Collective."""
    import torch

    def held(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}

    batch = Batch(
        input_ids=golden["input_ids"],
        attention_mask=golden["attention_mask"],
        image_token_mask=golden["image_token_mask"],
        labels=torch.full_like(golden["input_ids"], IGNORED),
        pixels=held(PIXELS),
        token_fields=held(TOKEN_FIELDS),
    ).to(assembly.device)
    model = assembly.model
    training = model.training
    model.eval()

    def logits() -> Tensor:
        # Autocast for each by itself: it keeps the rounded weights for as long as it is entered.
        with assembly.autocast():
            hidden = model(batch)[golden["rows"], golden["positions"]]
            return model.logits(hidden).float().cpu()  # type: ignore[no-any-return]

    try:
        # Not in inference mode: what sharding strategies fetch here may be kept for training.
        with torch.no_grad(), whole_fp32():
            on = assembly.run_forward(logits)
            with assembly.disable_adapter():
                return on, assembly.run_forward(logits)
    finally:
        model.train(training)


@contextmanager
def whole_fp32() -> Iterator[None]:
    """While entered, a GPU computes products and convolutions of fp32 in fp32, not in TF32: that rounds more than is allowed here."""
    import torch

    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def measure(assembly: Assembly, golden: dict[str, Tensor]) -> GoldenFacts:
    """Run the golden inputs, and put the logits that they must give beside them."""
    on, off = golden_logits(assembly, golden)
    golden["logits"] = on
    return GoldenFacts(
        precision=assembly.precision,
        device=assembly.device.type,
        distance=float((on - off).abs().max()),
        largest=float(on.abs().max()),
        quantized=assembly.quantized,
    )


def rounding(precision: str, largest: float) -> float:
    """How far rounding at a precision may move logits of which the largest is `largest`."""
    return TOLERANCE[precision] * max(1.0, largest)


def tolerance(precision: str, largest: float, distance: float) -> float:
    """Up to which difference logits are those of the same model: what rounding may do, and at most `SHARE` of the `distance` by
    which the adapter moves them. Where there is no adapter to switch off (0), rounding alone counts."""
    allowed = rounding(precision, largest)
    return min(allowed, SHARE * distance) if distance else allowed


def verify(assembly: Assembly, golden: Mapping[str, Tensor], facts: GoldenFacts) -> Verification:
    """Run a checkpoint's golden inputs on the model rebuilt from it.

    Raises AdapterError when the adapter changes nothing, CheckpointError when the logits are not the recorded ones. At
    another precision, on another kind of device or with other weights rounded only the first can be judged.
    """
    on, off = golden_logits(assembly, golden)
    refuse_without_effect(assembly, on, off)
    error = float((on - golden["logits"]).abs().max())
    allowed, rounded = (
        tolerance(facts.precision, facts.largest, facts.distance),
        rounding(facts.precision, facts.largest),
    )
    comparable = (facts.precision, facts.device, facts.quantized) == (
        assembly.precision,
        assembly.device.type,
        assembly.quantized,
    )
    if comparable and not error <= rounded:
        raise CheckpointError(
            f"the rebuilt model is not the one that was saved: its logits differ by {error:.3g}, at most {rounded:.3g} is rounding; "
            "use the versions that the checkpoint records"
        )
    return Verification(
        error=error,
        tolerance=allowed,
        rounding=rounded,
        distance=float((on - off).abs().max()),
        recorded_distance=facts.distance,
        comparable=comparable,
        cannot_tell=_undecided(facts, error) if comparable and error > allowed else "",
    )


def _undecided(facts: GoldenFacts, error: float) -> str:
    """What a difference means that may be rounding, and may be a part of the adapter."""
    finer = "import it with --precision fp32, or train it with train.precision = 'fp32'"
    return (
        f"the logits differ by {error:.3g} from those recorded, rounding in {facts.precision} explains up to "
        f"{rounding(facts.precision, facts.largest):.3g}, and the adapter moves them by {facts.distance:.3g}: this cannot tell whether "
        f"it is the checkpoint; verify it on the machine that wrote it, where they are normally equal, or {finer if facts.precision != 'fp32' else 'train it longer'}"
    )


def refuse_without_effect(assembly: Assembly, on: Tensor, off: Tensor) -> None:
    """CheckpointError for logits that are not finite, AdapterError for an adapter that moves none of them."""
    if not on.isfinite().all():
        raise CheckpointError(
            "the rebuilt model's logits are not finite numbers: its run was unhealthy; use an earlier checkpoint"
        )
    if assembly.can_disable and on.equal(off):
        raise AdapterError(
            "the adapter has no effect: switching it on changes no logit of the golden inputs (distance 0); train it longer or with a "
            "higher learning rate, or use the base itself"
        )
