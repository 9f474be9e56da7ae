"""An import compared with what other code makes of the same folder, by that code's own reader."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.build import compose
from graftwork.build.filling import open_base
from graftwork.checkpoint import store
from graftwork.checkpoint.store import Opened
from graftwork.checkpoint.verification import Agreement, Verification
from graftwork.contracts.anatomy import within
from graftwork.contracts.batch import IGNORED, Batch, Encoded
from graftwork.contracts.external import ExternalFolder, ImportPlan, Reference
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import batch_of
from graftwork.contracts.plan import folder_of
from graftwork.errors import AdapterError, CheckpointError, GraftworkError
from graftwork.foreign.importing import differs, records

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly
    from graftwork.weights import LazyTensor

TOLERANCE = 1e-4
"""How far a logit may be from that of other code, in fp32; where logits are larger than 10, a hundred-thousandth of the largest."""
ROUNDING = 1e-6
"""What two ways to the same logit differ by in fp32, relative to the largest one."""
SHARE = 20
"""How many times the tolerance an adapter moves the logits at least: else a part of it could be lost unseen."""
SPREAD = 64
"""How many token ids from all over the vocabulary are compared beside the golden inputs' conversations."""


def compare(opened: Opened, folder: Path, lookup: Lookup) -> Verification:
    """What was verified of a checkpoint, with what other code makes of the `folder` that it was imported from.

    They are compared in fp32 on the CPU, and both models lie in memory meanwhile. Raises CheckpointError where the
    checkpoint is another model, or where the other code does not read all of the folder's adapter.
    """
    assembly, found = opened.assembly, opened.verification
    if assembly.can_disable and found.distance < SHARE * ROUNDING * opened.manifest.golden.largest:
        weak = f"with itself alone: its adapter moves no logit by more than {found.distance:.3g}, too little to tell from rounding"
        return replace(found, not_compared=(weak,))
    if (assembly.precision, assembly.device.type) != ("fp32", "cpu"):
        assembly = store.open_checkpoint(opened.folder, lookup, device="cpu", precision="fp32").assembly
    comparing = _Comparing(assembly, opened.folder, folder, lookup, found.distance or math.inf)
    agreements, reasons = [], []
    for open_reference in (comparing.on_another_base, comparing.on_the_built_base):
        try:
            reference = open_reference()
        except GraftworkError as error:
            reasons.append(error.sentence)
        else:
            if reference:
                agreements.append(comparing.agreement(reference))
            del reference  # before the next one is built
    if not agreements and not reasons:
        reasons.append("with itself alone: no library that is known here opens such a folder")
    return replace(found, agreements=(*agreements,), not_compared=(*reasons,))


class _Comparing:
    """One checkpoint, and the folder that it was made of."""

    def __init__(self, assembly: Assembly, checkpoint: Path, folder: Path, lookup: Lookup, effect: float) -> None:
        self.assembly, self.checkpoint, self.folder, self.lookup = assembly, checkpoint, folder, lookup
        self.effect = effect
        """How far the adapter moves logits."""

    def on_another_base(self) -> Reference | None:
        """The model as other code opens base and adapter; None where none does. GraftworkError says why it cannot."""
        architecture, method = self.assembly.architecture, self.assembly.peft
        if method is None:
            return architecture.open_elsewhere(self.folder) if self.beside and self.beside.is_full_model else None
        base = folder_of(self.assembly.plan.model_spec.model)
        if base is None or not (reference := architecture.open_elsewhere(base)):
            return None
        if changed := self.changed_in_base():
            raise AdapterError(
                f"{' and '.join(reference.readers)} was not tried: '{changed[0]}' of the base was trained besides the adapter"
            )
        opened = method.open_elsewhere(reference, self.folder, ())
        if opened and (odd := (*opened.unexpected, *opened.missing)):
            raise AdapterError(
                f"{' and '.join(opened.readers)} cannot open the adapter alone: '{odd[0]}' is not of both adapter and language model"
            )
        return opened

    def on_the_built_base(self) -> Reference | None:
        """The assembled base with the adapter as other code opens it; None where none does. GraftworkError says why it cannot."""
        if (method := self.assembly.peft) is None:
            return None
        base = self.base()
        as_built = Reference(base.model, lambda batch: base.model.logits(base.model(batch)))
        taken = base.architecture.reference(base) or as_built
        return method.open_elsewhere(taken, self.folder, base.tower_modules)

    def agreement(self, reference: Reference) -> Agreement:
        """How near the checkpoint is to what other code opened; CheckpointError where it is another model."""
        readers = " and ".join(reference.readers)
        if odd := (*reference.unexpected, *reference.missing):
            raise CheckpointError(
                f"'{self.folder}' opened by {readers}: {len(reference.unexpected)} of its tensors have no place, and {len(reference.missing)} "
                "are missing; save it again with the library that trained it",
                odd[:5],
            )
        batch = self.inputs(reference)
        wanted = logits_of(reference.logits, batch)
        found = logits_of(lambda batch: self.assembly.model.logits(self.assembly.model(batch)), batch)
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"'{self.folder}' opened by {readers} is another model than the import: it has {wanted.shape[1]:,} tokens, and the import "
                f"{found.shape[1]:,}; merge it with the library that trained it, and import that"
            )
        largest, error = float(wanted.abs().max()), float((found - wanted).abs().max())
        tolerance = max(ROUNDING * largest, min(max(TOLERANCE, 10 * ROUNDING * largest), self.effect / SHARE))
        inputs = "text and images" if batch.pixels else "text"
        if not error <= tolerance:
            raise CheckpointError(
                f"'{self.folder}' opened by {readers} is another model than the import: on {inputs}, logits of up to {largest:.3g} "
                f"differ by {error:.3g}, and {tolerance:.3g} is allowed; merge it with the library that trained it, and import that"
            )
        return Agreement(reference.readers, inputs, error, tolerance)

    def inputs(self, reference: Reference) -> Batch:
        """The conversations of the golden inputs that a reference can read, and tokens from all over the vocabulary."""
        processor, vocabulary = self.assembly.processor, self.vocabulary()
        encoded = [processor.encode(record) for record in records()]
        spread = {*range(0, vocabulary, max(1, vocabulary // SPREAD)), *reference.tokens[:SPREAD]}
        ids = sorted(spread.difference(reference.reserved))
        readable = [one for one in encoded if reference.reads_images or not any(one.image_token_mask)]
        tokens = Encoded(ids, [False] * len(ids), [IGNORED] * len(ids), {})
        return batch_of(processor, [*readable, tokens])

    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(store.read_tensors(self.checkpoint / store.GOLDEN_INPUTS)["logits"].shape[-1])

    @cached_property
    def beside(self) -> ImportPlan | None:
        """What the folder is without what its adapter's own file holds; None where the architecture makes nothing of that."""
        external, method = ExternalFolder(self.folder), self.assembly.peft
        adapter = method.import_from(external) if method else None
        without = replace(adapter, tensors={}, others={}, rows={}, apart=frozenset()) if adapter else None
        return self.assembly.architecture.import_from(external, self.assembly.towers, without)

    def besides(self) -> Mapping[str, LazyTensor]:
        """The tensors that the folder holds besides its adapter's own file."""
        return self.beside.tensors if self.beside else {}

    def changed_in_base(self) -> list[str]:
        """Tensors of the base that the folder holds in another form, besides its adapter."""
        held = self.besides()
        one = self.assembly
        read = open_base(one.plan.model_spec, one.architecture, one.towers, one.structure, shapes_only=True)
        base = read.tensors
        return [name for name, tensor in held.items() if name in base and differs(base[name], tensor)]

    def base(self) -> Assembly:
        """The base as the folder's adapter was trained on it, without that adapter."""
        model = self.assembly.plan.model_spec.model
        # Weights that the import took apart are one tensor again, as they were when the adapter was trained.
        configure = self.beside.configure if self.beside else self.assembly.architecture.configuration
        model = replace(model, config=dict(configure(folder_of(model))))
        spec = replace(self.assembly.plan.model_spec, model=model, peft=None, on=(), also_train=())
        plan, processor = replace(self.assembly.plan, model_spec=spec), self.checkpoint / store.PROCESSOR
        saved, besides = store.read_tensors(self.checkpoint / store.TENSORS), self.besides()
        new = compose.build_shape(plan, self.lookup, processor_folder=processor).state_to_save()
        if lacking := [name for name in new if name not in besides and name not in saved]:
            raise CheckpointError(f"the base alone cannot be built: '{lacking[0]}' is in neither it nor the folder")
        trained = {name: besides[name]().float() if name in besides else saved[name] for name in new}
        base = compose.build(
            plan, self.lookup, device="cpu", precision="fp32", trained=trained, processor_folder=processor
        )
        # A tower's tensors that the folder holds count only where the checkpoint took them.
        towers, places = base.tower_modules, base.model.state_dict()
        rest = {
            n: read().float() for n, read in besides.items() if n in places and (n in saved or not within(n, towers))
        }
        base.model.load_state_dict(rest, strict=False)
        base.model.eval()
        return base


def logits_of(forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """The logits of all tokens of a batch, `[tokens, vocabulary]`, in fp32."""
    import torch

    with torch.no_grad():
        return forward(batch)[batch.attention_mask].float()
