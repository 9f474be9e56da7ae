"""Leaving Graftwork: merged weights with a certificate, and folders in foreign formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import weights
from graftwork.build import compose, filling
from graftwork.checkpoint import verification
from graftwork.checkpoint.store import Opened, put_in_place, read_golden_inputs, unfinished
from graftwork.contracts.anatomy import DTYPES, earlier_names, named_tensors
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice, Plan, WeightsRef, folder_of
from graftwork.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

CERTIFICATE = "certificate.json"
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class Certificate:
    """What shows that merged weights are the checkpoint: a check_keys of tensors, and equal logits."""

    checkpoint: str
    """The checkpoint's sha256."""
    precision: str
    """What the merged weights are stored in."""
    tensors: int
    """In the merged model; as many as in the unmerged one without what the method added."""
    changed: int
    """How many of them differ from the base."""
    new: int
    """How many of them the base lacks."""
    unchanged: int
    error: float
    """The largest difference between a logit of the merged and of the unmerged model on the golden inputs, both in fp32."""
    tolerance: float


def merge(
    opened: Opened,
    out: Path,
    lookup: Lookup,
    *,
    precision: str | None = None,
    write: Callable[[Assembly, Path], None] | None = None,
) -> Certificate:
    """Fold a checkpoint's adapter into its base and write the whole model into `out`, with a certificate.

    The checkpoint must be opened in fp32. The merged weights are stored in `precision`, by default the base's own, read
    back, and compared. `write` is how they are written, by default as the architecture does. Raises CheckpointError when
    the merged model is another one than the checkpoint.
    """
    assembly = opened.assembly
    refuse_existing(out)
    if assembly.quantized:
        raise CheckpointError(
            f"an adapter is merged into the whole base, and here {' and '.join(assembly.quantized)} rounded it; open the "
            "checkpoint without as_trained"
        )
    golden = read_golden_inputs(opened.folder, opened.manifest)
    wanted, _ = verification.golden_logits(assembly, golden)
    before = named_tensors(assembly.model)
    with assembly.disable_adapter():
        base = {
            name: tensor.detach().clone() for name, tensor in before.items() if name in assembly.adaptation.base_keys
        }
    if assembly.peft:
        assembly.peft.merge(assembly.model)
    stored = precision or _stored_precision(assembly.plan)
    merged = _round(assembly.model, stored)
    changed = new = 0
    names = earlier_names(assembly.model, before)
    for name, tensor in named_tensors(assembly.model).items():
        original = base.get(names.get(name, ""))
        new += original is None
        changed += original is not None and not original.equal(tensor)
    with unfinished(out) as work:
        (write or assembly.architecture.write)(assembly, work)
        again = _reopen(assembly.plan, work, lookup)
        read = named_tensors(again.model)
        filling.check_keys(merged, {name: tuple(tensor.shape) for name, tensor in read.items()})
        if different := [name for name, tensor in merged.items() if not tensor.equal(read[name])]:
            raise CheckpointError(f"merging failed: {len(different)} tensors read back differently", different[:5])
        got, _ = verification.golden_logits(again, golden)
        certificate = Certificate(
            checkpoint=opened.sha256,
            precision=stored,
            tensors=len(read),
            changed=changed,
            new=new,
            unchanged=len(read) - changed - new,
            error=float((got - wanted).abs().max()),
            tolerance=verification.TOLERANCE[stored] * max(1.0, opened.manifest.golden.largest),
        )
        if not certificate.error <= certificate.tolerance:
            raise CheckpointError(
                f"merging failed: the merged model's logits differ by {certificate.error:.3g}, at most "
                f"{certificate.tolerance:.3g} is rounding; nothing was written"
            )
        (work / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=1) + "\n", encoding="utf-8")
        put_in_place(work, out)
    return certificate


def _stored_precision(plan: Plan) -> str:
    """The precision that the base's own weights are stored in; fp32 where it is mixed or unknown."""
    folder = folder_of(plan.model_spec.model)
    files = [file for file in weights.tensor_files(folder) if file.suffix == ".safetensors"] if folder else []
    found = {PRECISIONS.get(dtype) for file in files for dtype in weights.dtypes_in(file)} - {None}
    return found.pop() or "fp32" if len(found) == 1 else "fp32"


def _round(model: Any, precision: str) -> dict[str, Tensor]:
    """Round every tensor of a model to a precision; returns them in fp32 as they will be read back."""
    import torch

    dtype = getattr(torch, DTYPES[precision])
    rounded = {}
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
        rounded[name] = tensor.data.float() if tensor.is_floating_point() else tensor.data
    return rounded


def _reopen(plan: Plan, folder: Path, lookup: Lookup) -> Assembly:
    """A merged folder, built as the base of a run would be, in fp32 and on the CPU."""
    model_spec = plan.model_spec

    def bare(choice: Choice) -> Choice:
        return replace(choice, weights=None, folder=None)

    model = replace(model_spec.model, weights=WeightsRef(given=str(folder), path=str(folder)), folder=str(folder))
    whole = replace(
        model_spec,
        model=model,
        parts={p: bare(c) for p, c in model_spec.parts.items()},
        peft=None,
        on=(),
        also_train=(),
    )
    return compose.build(replace(plan, model_spec=whole), lookup, device="cpu", precision="fp32")


def export(opened: Opened, to: str, out: Path, lookup: Lookup, *, precision: str = "fp32") -> Certificate | None:
    """Write a checkpoint in a foreign format into the new folder `out`.

    A format of the PEFT method holds the adapter. One of the architecture holds the whole model: the adapter is folded in,
    and what was written is certified as `merge` does.
    """
    refuse_existing(out)
    assembly = opened.assembly
    adapter_parameters, of_model = assembly.peft.exports() if assembly.peft else {}, assembly.architecture.exports()
    if to in of_model:
        return merge(opened, out, lookup, precision=precision, write=of_model[to])
    if to not in adapter_parameters:
        known = ", ".join(sorted([*adapter_parameters, *of_model])) or "none"
        raise CheckpointError(f"this checkpoint has no format '{to}'; it can be exported to {known}")
    with unfinished(out) as work:
        adapter_parameters[to](assembly, work)
        put_in_place(work, out)
    return None


def refuse_existing(out: Path) -> None:
    """CheckpointError when `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"'{out}' exists already; name a new folder")
