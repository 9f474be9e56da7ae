"""Making a checkpoint of a folder that Graftwork did not write: the same plan, construction path and verification."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork import weights
from graftwork.build import compose
from graftwork.build.copies import account_for, is_copy
from graftwork.build.filling import BaseWeights, all_finite, first_few, folders_of, not_finite, open_base
from graftwork.checkpoint import store, verification
from graftwork.checkpoint.manifest import Manifest
from graftwork.config.resolve import resolve
from graftwork.config.runfile import EMPTY, RunFile, Selection
from graftwork.contracts.accounting import Accounts, account, without_place
from graftwork.contracts.anatomy import modules_of, named_tensors, within
from graftwork.contracts.external import ImportPlan
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan, TrainSettings
from graftwork.contracts.records import Image, Record, Turn
from graftwork.contracts.verdict import Verdict
from graftwork.errors import CheckpointError, GraftworkError
from graftwork.foreign.diagnosis import BASE, Diagnosis

if TYPE_CHECKING:
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
    plan, values = importing.prepare(kernels)
    trained = {name: value() for name, value in values.items()}
    for name, value in trained.items():
        if value.is_floating_point() and not all_finite(value.float()):
            raise not_finite(name, value, value.dtype, [diagnosis.folder])
    trained = {name: value.float() if value.is_floating_point() else value for name, value in trained.items()}
    assembly = compose.build(plan, lookup, device="cpu", trained=trained, processor_folder=importing.processor_folder)
    golden = verification.golden_inputs([assembly.processor.encode(record) for record in records()], assembly.processor)
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
        accounts=importing.accounts,
    )
    return Imported(out, written, tuple(part for part, choice in plan.model_spec.parts.items() if not choice.weights))


def examine(diagnosis: Diagnosis, lookup: Lookup, kernels: Sequence[str] = ()) -> Diagnosis:
    """The diagnosis with what an import makes of every tensor, and why it would refuse the folder where only that shows it."""
    refused, import_plan = diagnosis.refused, diagnosis.import_plan
    if refused or import_plan is None or diagnosis.not_found:
        why = refused or f"not found: {', '.join(place.what for place in diagnosis.not_found) or 'its base'}"
        return replace(
            diagnosis,
            accounts=account(diagnosis.read, refused=dict.fromkeys(diagnosis.read, f"nothing is taken ({why})")),
        )
    accounts: Accounts = {}
    try:
        importing = _Importing(diagnosis, import_plan, lookup, "fp32")
        accounts = importing.accounts
        importing.prepare(kernels)
    except GraftworkError as error:
        refused = ": ".join([error.sentence, *["; ".join(error.details)] * bool(error.details)])
    if any(str(tensor.file) not in accounts for tensor in diagnosis.read):
        accounts |= account(diagnosis.read, refused=dict.fromkeys(diagnosis.read, "nothing is taken"))
    return replace(diagnosis, accounts=accounts, refused=refused)


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
        self.adapter = diagnosis.adapter
        self.base = diagnosis.places[BASE].found if BASE in diagnosis.places else None
        self.folder = diagnosis.folder.resolve()
        self.config = dict(import_plan.configure(self.base))
        self.base_weights = BaseWeights()
        self.besides: Mapping[str, LazyTensor] = {}
        """What the folder holds besides an adapter's own tensors, by names in the built model."""
        self.held: dict[str, LazyTensor] = {}
        self.accounts: Accounts = {}
        """What became of every tensor in the folder and in its base weights; filled by `prepare`."""

    @property
    def processor_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.folder if self.import_plan.has_processor or not self.base else self.base

    def prepare(self, kernels: Sequence[str]) -> tuple[Plan, dict[str, LazyTensor]]:
        """The plan whose training the folder is the result of, and every tensor of its checkpoint."""
        bare = self.shape(self.resolved((), (), None, kernels))
        if isinstance(bare.processor, compose.NoProcessor):
            raise bare.processor.reason
        if self.adapter and self.adapter.renamed:
            self.adapter = self.adapter.renamed(partial(built_module, bare))
        self.read(bare)
        if self.untie(bare):
            bare = self.shape(self.resolved((), (), None, kernels))
            self.read(bare)
        self.accounts |= account_for(self.base_weights, bare.structure, bare.plan.model_spec)
        plan = self.plan(bare, kernels)
        return plan, self.tensors(self.shape(plan))

    def shape(self, plan: Plan) -> Assembly:
        """The model of a plan without values."""
        return compose.build_shape(plan, self.lookup, processor_folder=self.processor_folder)

    def plan(self, bare: Assembly, kernels: Sequence[str]) -> Plan:
        """The plan with the adapter, from the shape of the model without it."""
        roles, also_train = bare.structure.roles, self.trained_roles(bare)
        if self.adapter is None:
            return self.resolved((), also_train, None, kernels)
        modules = self.adapter.modules
        on = tuple(role for role, held in roles.items() if any(within(module, held) for module in modules))
        chosen = modules_of(roles, on)
        leaves = [leaf for leaf in bare.adaptation.leaves if within(leaf, chosen)]
        offered = {leaf: bare.model.get_submodule(leaf) for leaf in leaves}
        peft = Selection(self.diagnosis.method, settings=self.adapter.settings(offered), where="peft")
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
        model = replace(plan.model_spec.model, config=self.config)
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

    def read(self, shape: Assembly) -> None:
        """Open the base weights, and the folder's tensors besides an adapter's own, but for those of a replaced tower."""
        spec, structure = shape.plan.model_spec, shape.structure
        self.base_weights = open_base(spec, shape.architecture, shape.towers, structure, shapes_only=True)
        replaced, base = self.replaced(shape), self.base_weights.tensors
        self.besides = as_built(self.import_plan.tensors, shape)
        held = {name: read for name, read in self.besides.items() if not within(name, replaced)}
        for published, rows in (self.adapter.rows if self.adapter else {}).items():
            for name in shape.architecture.tensors({published: rows.values}, shape.towers, shape.model):
                whole = held.get(name) or base.get(name) or base.get(structure.tied_weights.get(name, ""))
                if whole:
                    held[name] = rows.put_into(whole)
        self.held = held

    def replaced(self, shape: Assembly) -> list[str]:
        """The towers that the folder holds and that are taken from their own folders."""
        return [
            module
            for part, required in self.import_plan.parts.items()
            if required.source == "its folder" and not self.is_stored(part)
            for module in shape.structure.roles[f"vision.{part}"]
        ]

    def untie(self, shape: Assembly) -> bool:
        """Give tied weights of which an adapter trained one end apart a tensor each; whether there are such.

        CheckpointError where nothing says how they were used apart, or where the model cannot."""
        held, base, apart = self.held, self.base_weights.tensors, self.adapter.apart if self.adapter else ()
        for copy, original in shape.structure.tied_weights.items():
            of_original = held.get(original) or base.get(original)
            adapted = self.adapter is not None and copy.rpartition(".")[0] in self.adapter.modules
            copy_apart = copy in held and of_original is not None and differs(of_original, held[copy])
            original_apart = original in apart and copy not in held and differs(base.get(original), held[original])
            ends = [copy] * (adapted or copy_apart) + [original] * original_apart
            if not ends:
                continue
            said = f"{' and '.join(repr(end) for end in ends)} {'was' if len(ends) == 1 else 'were'} trained apart"
            untied = shape.architecture.untied(self.config) if self.adapter else None
            if untied is None:
                raise CheckpointError(
                    f"'{self.diagnosis.folder}' holds '{copy}' unlike '{original}', and by its configuration these are one tensor: "
                    f"{said}, which would be lost; if both count, its configuration has to say so"
                )
            self.config = dict(untied)
            return True
        return False

    def trained_roles(self, shape: Assembly) -> tuple[str, ...]:
        """The roles in which the folder has tensors that the base lacks, or that differ from the base's."""
        held, base, roles = self.held, self.base_weights.tensors, shape.structure.roles
        stored = [f"vision.{part}" for part in self.import_plan.parts if self.is_stored(part)]
        frozen = [role for role in stored if not any(within(name, roles[role]) for name in base)]
        missing_roles = [
            role
            for role in shape.adaptation.newly_initialised
            if any(n not in held for n in named_tensors(shape.model) if within(n, roles[role]))
        ]
        if missing_roles:
            raise CheckpointError(
                f"'{self.diagnosis.folder}' is {self.diagnosis.description}, and lacks {' and '.join(missing_roles)}, which its base does not "
                "have either; name the base that it was trained from with --base DIR",
                self.import_plan.missing,
            )
        return tuple(
            role
            for role, modules in roles.items()
            if role not in frozen and any(differs(base.get(n), read) for n, read in held.items() if within(n, modules))
        )

    def tensors(self, shape: Assembly) -> dict[str, LazyTensor]:
        """Every tensor of the checkpoint. CheckpointError unless the folder and its base have all of them, and unless
        everything in the folder has a place among them or is the base's."""
        base, held, own = self.base_weights.tensors, self.held, self.adapter.tensors if self.adapter else {}
        earlier = shape.adaptation.earlier
        sources = {
            name: found
            for name in shape.state_to_save()
            if (found := own.get(name) or held.get(earlier.get(name, name)) or base.get(earlier.get(name, name)))
        }
        self.accounts |= self.account(shape, sources.values())
        lost = [name for _, name in without_place(self.accounts)]
        missing = sorted(shape.state_to_save().keys() - sources.keys())
        if lost or missing:
            raise CheckpointError(
                f"'{self.diagnosis.folder}' does not fit '{self.diagnosis.architecture}': {len(lost)} of its tensors have no place "
                f"in the model, {len(missing)} are missing; nothing was saved",
                [*first_few(sorted(lost), "no place: "), *first_few(missing, "missing: ")],
            )
        return sources

    def account(self, shape: Assembly, used: Collection[LazyTensor]) -> Accounts:
        """What becomes of every tensor of the folder, where those of a checkpoint are `used`."""
        base, held, replaced = self.base_weights, self.held, self.replaced(shape)
        everything, taken = {**base.tensors, **held}, set(map(id, used))
        folders = [self.folder, *folders_of(shape.plan.model_spec)]
        equal, refused = [], {}
        for name, tensor in {**self.besides, **held}.items():
            if id(tensor) in taken:
                continue
            if name in base.tensors and not differs(base.tensors[name], tensor):
                equal.append(tensor)
            elif within(name, replaced):
                why = "the model used the tower in its own folder instead"
                refused.update(dict.fromkeys(weights.sources_of(tensor), why))
            elif name not in base.tensors and is_copy(name, tensor, shape.structure, everything, folders):
                equal.append(tensor)
        return account(self.diagnosis.read, used=used, equal=equal, refused=refused)

    def fingerprint(self) -> str:
        """The sha256 over the sha256 of every file with tensors in the folder, in the order of their names."""
        files = (file for file in self.folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        digests = (weights.sha256(file) for file in sorted(files))
        return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def as_built(tensors: Mapping[str, LazyTensor], shape: Assembly) -> dict[str, LazyTensor]:
    """Tensors under the names of a built model without a PEFT method, where other code has them under published ones."""
    places = shape.model.state_dict(keep_vars=True)
    others = {name: tensor for name, tensor in tensors.items() if name not in places}
    here = {name: tensor for name, tensor in tensors.items() if name in places}
    return {**here, **shape.architecture.tensors(others, shape.towers, shape.model)} if others else here


def built_module(shape: Assembly, published: str) -> str:
    """A module's name in a built model, from the one that an earlier version of its library gave it."""
    found = as_built({f"{published}.weight": lambda: shape.model.get_parameter(f"{published}.weight")}, shape)
    return next(iter(found), published).removesuffix(".weight")


def differs(base: LazyTensor | None, other: LazyTensor) -> bool:
    """Whether a tensor is not the base's."""
    return base is None or not base().float().equal(other().float())
