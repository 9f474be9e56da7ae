"""Making a checkpoint of a folder that Graftwork did not write: the same plan, construction path and verification."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork import weights
from graftwork.build import compose
from graftwork.build.filling import all_finite, base_tensors, not_finite
from graftwork.checkpoint import store, verification
from graftwork.checkpoint.manifest import Manifest
from graftwork.config.resolve import resolve
from graftwork.config.runfile import EMPTY, RunFile, Selection
from graftwork.contracts.anatomy import modules_of, named_tensors, within
from graftwork.contracts.external import ImportPlan
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan, TrainSettings
from graftwork.contracts.records import Image, Record, Turn
from graftwork.contracts.verdict import Verdict
from graftwork.errors import CheckpointError
from graftwork.foreign.diagnosis import BASE, Diagnosis

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly
    from graftwork.weights import LazyTensor

TEXTS = (("<image>\nWhat is it?", "It is an image."), ("<image>\n1 2 3", "4 5 6"), ("What is it?", "I see nothing."))
"""The conversations of the golden inputs; they mean nothing, and reach every part of a model."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was made of a foreign folder."""

    folder: Path
    manifest: Manifest
    stored_parts: tuple[str, ...]
    """The parts whose weights the checkpoint holds itself."""


def import_folder(
    diagnosis: Diagnosis, lookup: Lookup, out: Path, *, precision: str = "fp32", kernels: Sequence[str] = ()
) -> Imported:
    """Save what was diagnosed as a checkpoint in the new folder `out`.

    `precision` is the one to verify it in, and to evaluate it in by default. `kernels` are the attention kernels to try.
    Raises CheckpointError with the reason where it cannot be saved; nothing is ever left out silently.
    """
    import_plan = diagnosis.import_plan
    if diagnosis.refused:
        raise CheckpointError(
            f"'{diagnosis.folder}' is {diagnosis.description}, and cannot be imported: {diagnosis.refused}"
        )
    if import_plan is None or diagnosis.not_found:
        lines = [f"{place.what}: {place.line()}" for place in diagnosis.not_found]
        raise CheckpointError(
            f"'{diagnosis.folder}' is {diagnosis.description}, and what it was trained from was not found: {diagnosis.command}",
            lines,
        )
    importing = _Importing(diagnosis, import_plan, lookup, precision)
    plan = importing.plan(kernels)
    assembly = compose.build(
        plan, lookup, device="cpu", trained=importing.tensors(plan), processor_folder=importing.processor_folder
    )
    golden = verification.golden_inputs(
        [assembly.processor.encode(record) for record in records()], assembly.processor.pad_id
    )
    verification.refuse_without_effect(assembly, *verification.golden_logits(assembly, golden))
    written = store.save(
        assembly,
        out,
        lookup,
        step=diagnosis.steps,
        steps=diagnosis.steps,
        golden=golden,
        health=diagnosis.verdict or Verdict(True, ("its losses were not recorded, so its health is not known",)),
        data={"records": 0, "bad": [], "too_long": 0, "too_long_were": "left out", "stages": [], "groups": {}},
        origin={"imported from": str(diagnosis.folder.resolve()), "imported tensors": importing.fingerprint()},
    )
    return Imported(out, written, tuple(part for part, choice in plan.model_spec.parts.items() if not choice.weights))


def records() -> list[Record]:
    """The golden inputs' conversations, the first ones about an image with different pixels everywhere."""
    from PIL import Image as PILImage

    image = PILImage.linear_gradient("L").resize((120, 80))
    gradients = PILImage.merge(
        "RGB", (image, image.rotate(180), image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT).rotate(45))
    )
    buffer = BytesIO()
    gradients.save(buffer, "PNG")
    return [
        Record(
            f"golden-{index}",
            (Turn("user", question), Turn("assistant", answer)),
            (Image(data=buffer.getvalue()),) * question.count("<image>"),
        )
        for index, (question, answer) in enumerate(TEXTS)
    ]


class _Importing:
    """The plan and the tensors of one folder's checkpoint."""

    def __init__(self, diagnosis: Diagnosis, import_plan: ImportPlan, lookup: Lookup, precision: str) -> None:
        self.diagnosis, self.import_plan, self.lookup, self.precision = diagnosis, import_plan, lookup, precision
        self.base = diagnosis.places[BASE].found if BASE in diagnosis.places else None
        self.folder = diagnosis.folder.resolve()

    @property
    def processor_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.folder if self.import_plan.has_processor or not self.base else self.base

    def plan(self, kernels: Sequence[str]) -> Plan:
        """The plan whose training the folder is the result of."""
        adapter = self.diagnosis.adapter
        without_adapter = self.resolved((), (), None, kernels)
        shape = compose.build_shape(without_adapter, self.lookup, processor_folder=self.processor_folder)
        roles = shape.structure.roles
        also_train = self.trained_roles(shape)
        if adapter is None:
            return self.resolved((), also_train, None, kernels)
        on = tuple(role for role, modules in roles.items() if any(within(f"{m}.", modules) for m in adapter.modules))
        chosen = modules_of(roles, on)
        leaves = [leaf for leaf in shape.adaptation.leaves if leaf in chosen or within(leaf, chosen)]
        offered = {leaf: shape.model.get_submodule(leaf) for leaf in leaves}
        peft = Selection(self.diagnosis.method, settings=adapter.settings(offered), where="peft")
        return self.resolved(on, also_train, peft, kernels)

    def resolved(
        self, on: tuple[str, ...], also_train: tuple[str, ...], peft: Selection | None, kernels: Sequence[str]
    ) -> Plan:
        """The plan with this PEFT method and these roles, configured as the folder and its base say."""
        slots = self.lookup.find("model", self.diagnosis.architecture).component.parts  # type: ignore[attr-defined]
        configured = self.folder if (self.folder / "config.json").is_file() else self.base
        run = RunFile(
            source=None,
            folder=self.folder,
            out=self.folder,
            seed=0,
            model=Selection(
                self.diagnosis.architecture,
                weights=str(self.base) if self.base else None,
                config=str(configured),
                where="model",
            ),
            parts={part: self.part(part) for part in slots},
            peft=peft,
            on=on,
            also_train=also_train,
            train=TrainSettings(precision=self.precision, force_precision=True),  # type: ignore[arg-type]
        )
        plan = resolve(run, self.lookup, kernels=kernels)
        model = replace(plan.model_spec.model, config=dict(self.import_plan.configure(self.base)))
        return replace(plan, model_spec=replace(plan.model_spec, model=model))

    def part(self, part: str) -> Selection:
        """A part's tower, with its own folder's weights unless those in the foreign folder are what was used."""
        where = f"model.parts.{part}"
        if part not in self.import_plan.parts:
            return Selection(EMPTY, where=where)
        place = str(self.diagnosis.places[part].found)
        settings = dict(self.import_plan.parts[part].settings)
        if self.is_stored(part):
            return Selection("", settings, config=place, where=where)
        return Selection("", settings, weights=place, where=where)

    def is_stored(self, part: str) -> bool:
        """Whether a part has no base weights, so that the checkpoint holds it."""
        required, place = self.import_plan.parts[part], self.diagnosis.places[part].found
        return required.held and (required.source == "here" or not (place and weights.tensor_files(place)))

    def folder_tensors(self, shape: Assembly) -> dict[str, LazyTensor]:
        """The folder's tensors besides an adapter's own, without those that come from a tower's own folder."""
        replaced = [
            module
            for part, required in self.import_plan.parts.items()
            if required.source == "its folder" and not self.is_stored(part)
            for module in shape.structure.roles[f"vision.{part}"]
        ]
        return {name: read for name, read in self.import_plan.tensors.items() if not within(name, replaced)}

    def trained_roles(self, shape: Assembly) -> tuple[str, ...]:
        """The roles in which the folder has tensors that the base lacks, or that differ from the base's."""
        held, base = self.folder_tensors(shape), base_tensors_of(shape)
        frozen = {f"vision.{part}" for part in self.import_plan.parts if self.is_stored(part)}
        missing_roles = [
            role
            for role in shape.adaptation.newly_initialised
            if any(n not in held for n in named_tensors(shape.model) if within(n, shape.structure.roles[role]))
        ]
        if missing_roles:
            raise CheckpointError(
                f"'{self.diagnosis.folder}' is {self.diagnosis.description}, and lacks {' and '.join(missing_roles)}, which its base does not "
                "have either; name the base that it was trained from with --base DIR",
                self.import_plan.missing,
            )
        return tuple(
            role
            for role, modules in shape.structure.roles.items()
            if role not in frozen and any(differs(base.get(n), read) for n, read in held.items() if within(n, modules))
        )

    def tensors(self, plan: Plan) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, in fp32. CheckpointError unless the folder and its base have all of them, and
        unless everything in the folder has a place among them or is the base's."""
        shape = compose.build_shape(plan, self.lookup, processor_folder=self.processor_folder)
        expected, base, held = shape.state_to_save(), base_tensors_of(shape), self.folder_tensors(shape)
        adapter = self.diagnosis.adapter
        saved = {**held, **(adapter.tensors if adapter else {})}
        sources = {**base, **saved}
        lost = sorted(name for name, read in saved.items() if name not in expected and differs(base.get(name), read))
        missing = sorted(expected.keys() - sources.keys())
        if lost or missing:
            raise CheckpointError(
                f"'{self.diagnosis.folder}' does not fit '{self.diagnosis.architecture}': {len(lost)} of its tensors have no place "
                f"in the model, {len(missing)} are missing; nothing was saved",
                [*(f"no place: {name}" for name in lost[:5]), *(f"missing: {name}" for name in missing[:5])],
            )
        values = {name: sources[name]() for name in expected}
        for name, value in values.items():
            if value.is_floating_point() and not all_finite(value.float()):
                raise not_finite(name, value, value.dtype, [self.folder])
        return {name: value.float() if value.is_floating_point() else value for name, value in values.items()}

    def fingerprint(self) -> str:
        """The sha256 over the sha256 of every file with tensors in the folder, in the order of their names."""
        files = (file for file in self.folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        digests = (weights.sha256(file) for file in sorted(files))
        return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def base_tensors_of(shape: Assembly) -> Mapping[str, LazyTensor]:
    """The base's tensors by names in the model."""
    return base_tensors(shape.plan.model_spec, shape.architecture, shape.towers, shape.structure, shapes_only=True)


def differs(base: LazyTensor | None, other: LazyTensor) -> bool:
    """Whether a tensor is not the base's."""
    return base is None or not base().float().equal(other().float())
