"""What a folder is that Graftwork did not write, what is wrong with it, and which command imports it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from graftwork import hub, weights
from graftwork.contracts.accounting import Accounts
from graftwork.contracts.external import Adapter, ExternalFolder, ImportPlan, RequiredTower, broken
from graftwork.contracts.kinds import ModelArchitecture, PeftMethod, VisionTower
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.verdict import Verdict
from graftwork.errors import CheckpointError, GraftworkError, WeightsError
from graftwork.foreign.searching import Search
from graftwork.train.health import Health
from graftwork.weights import StoredTensor

BASE = "base"
"""The place of what a folder was trained from; the others are the model's parts."""


@dataclass(frozen=True)
class Place:
    """Something that a folder needs from elsewhere."""

    what: str
    recorded: str
    """The path or hub id that the folder names."""
    found: Path | None
    given: bool = False
    """Whether the user named its place, so that it was not searched for."""
    instead: str = ""
    """What was found instead, a clause."""

    def line(self) -> str:
        """For a person."""
        named = f"'{self.recorded}'" if self.recorded else "not recorded"
        if self.found is None:
            return named + ", not found" * bool(self.recorded) + (f": {self.instead}" if self.instead else "")
        return named if str(self.found) == self.recorded else f"{named}, here {self.found}"


@dataclass(frozen=True)
class Diagnosis:
    """What a foreign folder is."""

    folder: Path
    description: str
    """What it is, as a noun phrase."""
    architecture: str = ""
    """The model that reads it, as `Lookup.find` knows it; empty where none does."""
    method: str = ""
    import_plan: ImportPlan | None = None
    adapter: Adapter | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    """`base` and every part of the model, where they are elsewhere."""
    steps: int = 0
    losses: tuple[float, ...] = ()
    verdict: Verdict | None = None
    """What its losses say; None where none were logged."""
    inconsistent: tuple[str, ...] = ()
    refused: str = ""
    """Why it cannot be imported, and what would help: a sentence; empty when it can."""
    search: tuple[Path, ...] = ()
    """The folders that were searched."""
    read: tuple[StoredTensor, ...] = ()
    """Every tensor of the files in it that were read."""
    accounts: Accounts = field(default_factory=dict)
    """What an import makes of each of these, and of those of its base and towers (see `importing.examine`)."""

    @property
    def command(self) -> str:
        """The command that makes a checkpoint of it; empty when none does."""
        if self.refused:
            return ""
        words = [
            "graftwork",
            "import",
            shlex.quote(str(self.folder)),
            "-o",
            shlex.quote(f"{self.folder.name}-graftwork"),
        ]
        for path in self.search:
            words.append(f"--search {shlex.quote(str(path))}")
        for what, place in self.places.items():
            if place.given or place in self.not_found:
                option = "--base" if what == BASE else f"--part {what}="
                words.append(f"{option}{' ' * (what == BASE)}{shlex.quote(str(place.found)) if place.found else 'DIR'}")
        return " ".join(words)

    @property
    def not_found(self) -> list[Place]:
        """What has to be found before it can be imported; a whole model needs no base."""
        is_full_model = self.import_plan is not None and self.import_plan.is_full_model
        return [p for p in self.places.values() if p.found is None and not (is_full_model and p.what == BASE)]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        import_plan = self.import_plan
        return {
            "folder": str(self.folder),
            "what": self.description,
            "model": self.architecture or None,
            "method": self.method or None,
            "facts": dict(import_plan.facts) if import_plan else {},
            "trained_from": {
                what: {"recorded": p.recorded, "found": str(p.found) if p.found else None, "instead": p.instead}
                for what, p in self.places.items()
            },
            "steps": self.steps,
            "losses": {"first": self.losses[0], "last": self.losses[-1], "logged": len(self.losses)}
            if self.losses
            else None,
            "healthy": self.verdict.healthy if self.verdict else None,
            "failure": (self.verdict.failure or None) if self.verdict else None,
            "missing": list(import_plan.missing) if import_plan else [],
            "inconsistent": list(self.inconsistent),
            "tensors": {file: asdict(account) for file, account in self.accounts.items()},
            "refused": self.refused or None,
            "command": self.command or None,
        }


def diagnose(
    folder: Path,
    lookup: Lookup,
    *,
    base: Path | None = None,
    parts: Mapping[str, Path] | None = None,
    search: Sequence[Path] = (),
) -> Diagnosis:
    """Diagnose a folder. `base` and `parts` are where its base and its towers are, where that is known; `search` are
    folders to search. Raises CheckpointError where there is no folder, WeightsError for files that cannot be read."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder '{folder}'; correct the path")
    found = _Diagnosing(ExternalFolder(folder), lookup, base, dict(parts or {}), Search(folder, search)).diagnosis()
    return replace(found, search=tuple(search))


class _Diagnosing:
    """The diagnosis of one folder."""

    def __init__(
        self, folder: ExternalFolder, lookup: Lookup, base: Path | None, parts: dict[str, Path], search: Search
    ) -> None:
        self.folder, self.lookup, self.base, self.parts, self.search = folder, lookup, base, parts, search

    def diagnosis(self) -> Diagnosis:
        method, adapter = self.adapter()
        architecture, import_plan = self.import_plan(self.folder, adapter)
        if import_plan is None and adapter is not None:
            return self.adapter_only(method, adapter)
        if import_plan is None:
            return Diagnosis(self.folder.path, self.unknown(), refused=self.unreadable())
        recorded = (base_of(adapter) if adapter else "") or import_plan.base
        return self.build_diagnosis(
            architecture, method, import_plan, adapter, self.places(architecture, import_plan, recorded)
        )

    def adapter(self) -> tuple[str, Adapter | None]:
        """The first method that finds an adapter, and the adapter."""
        for name in self.lookup.names("peft"):
            if found := self.method(name).import_from(self.folder):
                return name, found
        return "", None

    def import_plan(self, folder: ExternalFolder, adapter: Adapter | None) -> tuple[str, ImportPlan | None]:
        """The first model that can read a folder, and its import plan."""
        for name in self.lookup.names("model"):
            model = self.model(name)
            if found := model.import_from(folder, self.towers(model), adapter):
                return name, found
        return "", None

    def method(self, name: str) -> PeftMethod[Any]:
        method = cast(type[PeftMethod[Any]], self.lookup.find("peft", name).component)
        return method(method.Settings())

    def model(self, name: str) -> ModelArchitecture[Any]:
        architecture = cast(type[ModelArchitecture[Any]], self.lookup.find("model", name).component)
        return architecture(architecture.Settings())

    def towers(self, model: ModelArchitecture[Any]) -> dict[str, VisionTower[Any]]:
        """The default tower of each part of a model, as far as they are installed."""
        installed = self.lookup.names("vision_tower")
        return {part: self.tower(slot.default) for part, slot in model.parts.items() if slot.default in installed}

    def tower(self, name: str, settings: Mapping[str, Any] | None = None) -> VisionTower[Any]:
        tower = cast(type[VisionTower[Any]], self.lookup.find("vision_tower", name).component)
        return tower(tower.Settings(**settings or {}))

    def places(self, architecture: str, import_plan: ImportPlan, recorded: str) -> dict[str, Place]:
        """Where everything is that the folder needs from elsewhere."""
        places = {}
        fits = self.fits_base(import_plan)
        if not import_plan.refused or recorded:

            def guess(place: Path) -> str:
                _, other = self.import_plan(ExternalFolder(place), None)
                return fits(place) or ("" if other and other.refused else "it was trained itself")

            places[BASE] = self.place(BASE, recorded, self.base, fits, guess)
        for part, required in import_plan.parts.items():
            fitting = self.fits_part(self.model(architecture).parts[part].default or "", required)
            places[part] = self.place(part, required.recorded, self.parts.get(part), fitting, fitting)
        if unknown := sorted(self.parts.keys() - import_plan.parts.keys()):
            known = ", ".join(import_plan.parts) or "none"
            raise CheckpointError(
                f"--part: the model in '{self.folder.path}' has no part '{unknown[0]}'; its parts are {known}"
            )
        return places

    def place(
        self, what: str, recorded: str, given: Path | None, fits: Callable[[Path], str], guess: Callable[[Path], str]
    ) -> Place:
        def fits_recorded(place: Path) -> str:
            return hub.other_revision(place, recorded) or fits(place)

        if given is None:
            found, instead = self.search.find(recorded, fits_recorded, guess)
            return Place(what, recorded, found, instead=instead)
        option = "--base" if what == BASE else f"--part {what}"
        where = hub.locate(str(given), Path.cwd(), where=option)
        if reason := fits_recorded(where):
            raise WeightsError(f"{option}: '{given}' is not what '{self.folder.path}' was trained with: {reason}")
        return Place(what, recorded, where, given=True)

    def fits_base(self, import_plan: ImportPlan) -> Callable[[Path], str]:
        def fits(place: Path) -> str:
            try:
                import_plan.configure(place)
                return "" if weights.tensor_files(place) else "it holds no weights"
            except GraftworkError as error:
                return error.sentence

        return fits

    def fits_part(self, name: str, required: RequiredTower) -> Callable[[Path], str]:
        def fits(place: Path) -> str:
            try:
                tower = self.tower(name, required.settings)
                width = sum(tower.describe(tower.configuration(place)).widths)
            except GraftworkError as error:
                return error.sentence
            if required.width not in (None, width):
                return f"its maps are {width} wide, and the folder was trained with {required.width}"
            return "" if required.held or weights.tensor_files(place) else "it holds no weights"

        return fits

    def adapter_only(self, method: str, adapter: Adapter) -> Diagnosis:
        """An adapter without its model's configuration: everything else comes from its base."""
        if (refused := self.unfinished(method)) is not None:
            description = f"an intermediate save of a run: {adapter.description}, and nothing else that the run trained"
            return replace(self.build_diagnosis("", method, None, adapter, {}, description), refused=refused)
        description = f"an adapter alone: {adapter.description}"

        def fits(place: Path) -> str:
            _, found = self.import_plan(ExternalFolder(place), None)
            return "" if found else "no installed model reads it"

        place = self.place(BASE, base_of(adapter), self.base, fits, fits)
        if place.found is None:
            return self.build_diagnosis("", method, None, adapter, {BASE: place}, description)
        architecture, of_base = self.import_plan(ExternalFolder(place.found), None)
        assert of_base is not None
        if of_base.refused and of_base.tensors:
            refused = f"its base '{place.found}' cannot be used: {of_base.refused}"
            return replace(self.build_diagnosis("", method, None, adapter, {BASE: place}, description), refused=refused)
        if of_base.refused:
            refused = (
                f"its base '{place.found}' is {of_base.description}, so it has no connector to see images with; if it comes from a run "
                "that trained one, import the folder in which that run ended, else name a whole model with --base DIR"
            )
            return replace(self.build_diagnosis("", method, None, adapter, {BASE: place}, description), refused=refused)
        model = self.model(architecture)
        beside = model.tensors(adapter.others, self.towers(model))
        import_plan = replace(
            of_base,
            description=description,
            configure=model.configuration,
            parts={part: required.of_base(place.found) for part, required in of_base.parts.items()},
            facts=[("adapter", adapter.description), *[("beside it", f"{len(beside)} tensors")] * bool(beside)],
            tensors=beside,
            is_full_model=False,
            has_processor=False,
            missing=("everything else: it is its base's",),
            inconsistent=(),
        )
        parts = {
            part: place
            for part, place in self.places(architecture, import_plan, base_of(adapter)).items()
            if part != BASE
        }
        return self.build_diagnosis(architecture, method, import_plan, adapter, {BASE: place, **parts})

    def unfinished(self, method: str) -> str | None:
        """Why an intermediate save of transformers' Trainer cannot be used; None where the folder is no such save."""
        parent = ExternalFolder(self.folder.path.resolve().parent)
        if not (LEFT_BY_TRAINER & self.folder.files and "config.json" in parent.files):
            return None
        reason = "it lacks the configuration and what the run trained besides its adapter, which are saved only when a run ends"
        if any(path.is_dir() for path in self.folder.path.glob("global_step*")):
            reason += "; DeepSpeed's own states lie in it, from which its zero_to_fp32.py gathers all tensors"
        _, final = self.import_plan(parent, self.method(method).import_from(parent))
        if final is None or final.refused:
            return f"{reason}; this run did not end, so there is nothing to import: resume it with what trained it"
        return f"{reason}; import the run's own folder, '{parent.path}'"

    def build_diagnosis(
        self,
        architecture: str,
        method: str,
        import_plan: ImportPlan | None,
        adapter: Adapter | None,
        places: Mapping[str, Place],
        description: str = "",
    ) -> Diagnosis:
        """The diagnosis, with what is inconsistent in tensors, losses and paths."""
        steps, losses = self.folder.history
        verdict = judge(losses, import_plan.vocabulary if import_plan else 0)
        faults = [*(import_plan.inconsistent if import_plan else ()), *(adapter.inconsistent if adapter else ())]
        broken_paths = [
            "base" if place.what == BASE else f"{place.what} part"
            for place in places.values()
            if place.recorded and not Path(place.recorded).is_dir() and not hub.ID.fullmatch(place.recorded)
        ]
        if broken_paths:
            faults.append(f"the paths that it records lead nowhere from here: {', '.join(broken_paths)}")
        base = places[BASE].found if BASE in places else None
        if adapter and adapter.revision and base and not hub.commit_of(base):
            faults.append(f"it was trained on revision '{adapter.revision}' of its base, and '{base}' records none")
        if unread := self.folder.unread:
            faults.append(f"it holds {', '.join(map(repr, unread[:5]))}, of which nothing is read")
        if verdict and not verdict.healthy:
            faults += [f"its losses are not those of a working model: {reason}" for reason in verdict.reasons]
        refused = (adapter.refused if adapter else "") or (import_plan.refused if import_plan else "")
        if not refused and import_plan and import_plan.refused_on_plain and self.on_plain(places[BASE]):
            refused = import_plan.refused_on_plain
        if not refused and import_plan and not import_plan.is_full_model:
            refused = broken(import_plan.tensors)
        return Diagnosis(
            folder=self.folder.path,
            description=description or (import_plan.description if import_plan else ""),
            architecture=architecture,
            method=method if adapter else "",
            import_plan=import_plan,
            adapter=adapter,
            places=places,
            steps=steps,
            losses=tuple(losses),
            verdict=verdict,
            inconsistent=tuple(faults),
            refused=refused,
            read=tuple(tensor for held in self.folder.read.values() for tensor in held.values()),
        )

    def on_plain(self, base: Place) -> bool:
        """Whether a folder's base is a plain language model, as far as is known."""
        if base.found is None:
            return True
        _, found = self.import_plan(ExternalFolder(base.found), None)
        return found is None or bool(found.refused)

    def unknown(self) -> str:
        """A description of a folder that no component knows."""
        config = self.folder.json("config.json")
        if kind := config.get("model_type"):
            named = ", ".join(map(str, config.get("architectures") or [])) or "no class"
            return f"a folder of the model type '{kind}' ({named})"
        return "a folder that no installed model or method knows"

    def unreadable(self) -> str:
        """Why a folder that no component knows cannot be imported."""
        models = ", ".join(self.lookup.names("model")) or "none"
        return f"no installed model or method reads it (models: {models}); name another folder, or install a plugin that reads it"


def base_of(adapter: Adapter) -> str:
    """The path or hub id that an adapter names as its base, with the revision that it names."""
    return hub.with_revision(adapter.base, adapter.revision)


LEFT_BY_TRAINER = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""Files that transformers' Trainer leaves in an intermediate save."""


def judge(losses: Sequence[float], vocabulary: int) -> Verdict | None:
    """What the losses of a run say of it; None where they say nothing."""
    if not losses or not vocabulary:
        return None
    health = Health(vocabulary)
    for loss in losses:
        health.update(loss)
    return health.verdict()
