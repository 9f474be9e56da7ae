"""Leaving Graftwork: merged weights with a certificate, and folders in foreign formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork import weights
from graftwork.build import compose, filling
from graftwork.checkpoint import verification
from graftwork.checkpoint.certificate import (
    Certificate,
    ReadBack,
    check,
    kept_by_logits,
    kept_by_weight,
    kept_by_weights,
)
from graftwork.checkpoint.store import Opened, contents, read_golden_inputs, rounding
from graftwork.checkpoint.writing import put_in_place, unfinished
from graftwork.config.restore import restore_component
from graftwork.contracts.anatomy import DTYPES, earlier_names, named_tensors
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.external import Reference
from graftwork.contracts.kinds import ModelArchitecture
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice, Plan, WeightsRef, folder_of
from graftwork.errors import CheckpointError, GraftworkError

if TYPE_CHECKING:
    from torch import Tensor

CERTIFICATE = "certificate.json"
CARRIED = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""Files of a base that stay true when its weights change, and that no architecture writes. Tokenizers are written anew, as the
checkpoint's processor has them."""
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def merge(
    opened: Opened,
    out: Path,
    lookup: Lookup,
    *,
    precision: str | None = None,
    write: Callable[[Assembly, Path], Sequence[str] | None] | None = None,
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
    wanted, off = verification.golden_logits(assembly, golden)
    rounded = _on_rounded_base(opened, lookup, golden)
    before = named_tensors(assembly.model)
    with assembly.disable_adapter():
        base = {
            name: tensor.detach().clone() for name, tensor in before.items() if name in assembly.adaptation.base_keys
        }
    if assembly.peft:
        assembly.peft.merge(assembly.model)
    stored = precision or _stored_precision(assembly.plan)
    originals = {
        name: base[earlier] for name, earlier in earlier_names(assembly.model, before).items() if earlier in base
    }
    shares = _round(assembly.model, stored, originals)
    merged = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in named_tensors(assembly.model).items()
    }
    changed = sum(not originals[name].equal(tensor) for name, tensor in merged.items() if name in originals)
    with unfinished(out) as work:
        notes = (write or assembly.architecture.write)(assembly, work) or ()
        carried, not_carried = _carry(assembly.plan, work)
        again = _reopen(assembly.plan, work, lookup, named_parts=write is not None)
        read = named_tensors(again.model)
        filling.check_keys(merged, {name: tuple(tensor.shape) for name, tensor in read.items()})
        if different := [name for name, tensor in merged.items() if not tensor.equal(read[name])]:
            raise CheckpointError(f"merging failed: {len(different)} tensors read back differently", different[:5])
        got, _ = verification.golden_logits(again, golden)
        largest, distance = float(wanted.abs().max()), float((wanted - off).abs().max())
        weights_kept, weakest = kept_by_weights(shares)
        certificate = Certificate(
            checkpoint=opened.sha256,
            precision=stored,
            tensors=len(read),
            changed=changed,
            new=len(merged) - len(originals),
            unchanged=len(originals) - changed,
            error=float((got - wanted).abs().max()),
            tolerance=verification.tolerance(stored, largest, distance),
            distance=distance,
            kept=kept_by_logits(wanted, off, got),
            weights_kept=weights_kept,
            weakest=weakest,
            rounded_in_training=[*opened.manifest.golden.quantized],
            from_rounded=float((got - rounded[0]).abs().max()) if rounded else None,
            base_from_rounded=float((off - rounded[1]).abs().max()) if rounded else None,
            carried=carried,
            not_carried=not_carried,
            notes=[*notes],
        )
        check(certificate, largest)
        (work / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=1) + "\n", encoding="utf-8")
        put_in_place(work, out)
    return certificate


def _on_rounded_base(opened: Opened, lookup: Lookup, golden: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The logits with the adapter and without it on the base as it was rounded in training; None where it was not, or cannot be here."""
    memory, plan = rounding(opened.manifest, lookup), opened.assembly.plan
    if not memory or len(memory) < len(opened.manifest.golden.quantized):
        return None
    plan = replace(plan, run_context=replace(plan.run_context, memory=memory))
    try:
        as_trained = compose.build(plan, lookup, device="cpu", precision="fp32", **contents(opened.folder))
        return verification.golden_logits(as_trained, golden)
    except (GraftworkError, RuntimeError, NotImplementedError):  # what rounds may need a device that is not here
        return None


def _stored_precision(plan: Plan) -> str:
    """The precision that the base's own weights are stored in; fp32 where it is mixed or unknown."""
    folder = folder_of(plan.model_spec.model)
    files = [file for file in weights.tensor_files(folder) if file.suffix == ".safetensors"] if folder else []
    found = {PRECISIONS.get(dtype) for file in files for dtype in weights.dtypes_in(file)} - {None}
    return found.pop() or "fp32" if len(found) == 1 else "fp32"


def _round(model: Any, precision: str, originals: Mapping[str, Tensor]) -> dict[str, float]:
    """Round every tensor of a model to a precision; returns, for each that differs from its original, the share of the change
    that is left."""
    import torch

    dtype, shares = getattr(torch, DTYPES[precision]), {}
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        whole = tensor.data
        tensor.data = whole.to(dtype)
        if name in originals and not originals[name].equal(whole):
            shares[name] = kept_by_weight(originals[name], whole, tensor.data)
    return shares


def _carry(plan: Plan, folder: Path) -> tuple[list[str], list[str]]:
    """Copy what a base's folder holds besides weights and the architecture does not write; the files' names, and those of files
    that have no counterpart in the merged folder."""
    base = folder_of(plan.model_spec.model)
    if base is None:
        return [], []
    known = {CERTIFICATE, *(file.name for file in weights.tensor_files(base))}
    there = sorted(f.name for f in base.iterdir() if f.is_file() and not f.name.startswith("."))
    there = [name for name in there if name not in known and not name.endswith(".index.json")]
    absent = [name for name in there if not (folder / name).exists()]
    carried = [name for name in absent if name in CARRIED]
    for name in carried:
        shutil.copyfile(base / name, folder / name)
    return carried, [name for name in absent if name not in CARRIED]


def _reopen(plan: Plan, folder: Path, lookup: Lookup, *, named_parts: bool) -> Assembly:
    """A written folder, built as the base of a run would be, in fp32 and on the CPU, with what it says itself of its model. With
    `named_parts` the parts' own folders are named, as whoever opens the format takes weights from them."""
    model_spec = plan.model_spec

    def part(choice: Choice) -> Choice:
        own = choice.folder if named_parts else None
        return replace(choice, weights=WeightsRef(given=own, path=own) if own else None, folder=own)

    architecture = cast(ModelArchitecture[Any], restore_component(model_spec.model, lookup))
    model = replace(
        model_spec.model,
        weights=WeightsRef(given=str(folder), path=str(folder)),
        folder=str(folder),
        config=dict(architecture.configuration(folder)),
    )
    whole = replace(
        model_spec,
        model=model,
        parts={p: part(c) for p, c in model_spec.parts.items()},
        peft=None,
        on=(),
        also_train=(),
    )
    return compose.build(replace(plan, model_spec=whole), lookup, device="cpu", precision="fp32")


def export(opened: Opened, to: str, out: Path, lookup: Lookup, *, precision: str = "fp32") -> Certificate | ReadBack:
    """Write a checkpoint in a foreign format into the new folder `out`.

    A format of the PEFT method holds the adapter, and is read back by the tool that it is of. One of the architecture holds the
    whole model: the adapter is folded in, and what was written is certified as `merge` does, with the parts from where that
    tool takes them.
    """
    refuse_existing(out)
    assembly = opened.assembly
    adapter_formats, of_model = assembly.peft.exports() if assembly.peft else {}, assembly.architecture.exports()
    if to in of_model:
        return merge(opened, out, lookup, precision=precision, write=of_model[to])
    if to not in adapter_formats:
        known = ", ".join(sorted([*adapter_formats, *of_model]))
        others = f", or export it to {known}" if known else ", which writes the whole model"
        raise CheckpointError(f"this checkpoint has no format '{to}'; merge it{others}")
    with unfinished(out) as work:
        notes = [*(adapter_formats[to](assembly, work) or ())]
        if (beside := getattr(assembly.processor, "save_beside_adapter", None)) and (note := beside(work)):
            notes.append(note)
        read_back = _read_back(opened, work, lookup, notes)
        put_in_place(work, out)
    return read_back


def _read_back(opened: Opened, folder: Path, lookup: Lookup, notes: Sequence[str]) -> ReadBack:
    """What the tool of a format computes with an exported adapter on the plain base; CheckpointError unless it is the same."""
    assembly = opened.assembly
    golden = read_golden_inputs(opened.folder, opened.manifest)
    wanted, off = verification.golden_logits(assembly, golden)
    spec = replace(assembly.plan.model_spec, peft=None, on=(), also_train=())
    plain = compose.build(replace(assembly.plan, model_spec=spec), lookup, device="cpu", precision="fp32")
    as_built = Reference(plain.model, lambda batch: plain.model.logits(plain.model(batch)))
    taken = plain.architecture.reference(plain) or as_built
    reference = assembly.peft.open_elsewhere(taken, folder, ()) if assembly.peft else None
    reader = " and ".join(reference.readers) if reference else ""
    if reference and (odd := (*reference.unexpected, *reference.missing)):
        raise CheckpointError(
            f"exporting failed: {reader} does not read '{odd[0]}' as it was written; nothing was written: merge it instead"
        )
    got, _ = verification.golden_logits(plain, golden)
    distance = float((wanted - off).abs().max())
    read_back = ReadBack(
        reader=reader,
        error=float((got - wanted).abs().max()),
        tolerance=verification.tolerance("fp32", float(wanted.abs().max()), distance),
        distance=distance,
        notes=[*notes],
    )
    if reader and not read_back.error <= read_back.tolerance:
        raise CheckpointError(
            f"exporting failed: with what was written {reader} gives other logits, by {read_back.error:.3g} where the adapter moves "
            f"them by {distance:.3g}; nothing was written: merge it instead"
        )
    return read_back


def refuse_existing(out: Path) -> None:
    """CheckpointError when `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"'{out}' exists already; name a new folder")
