"""Resolving: from a run file to a plan, with every reason why it cannot work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from graftwork import weights
from graftwork.config.choosing import Chooser, Resolved, choice_of, lines_of
from graftwork.config.machine import Machine
from graftwork.config.runfile import EMPTY, RunFile, Selection, mixed
from graftwork.config.sites import attention_sites, describe_towers, kernels_on
from graftwork.config.wording import count, join, suggestion
from graftwork.contracts.anatomy import AttentionSite
from graftwork.contracts.kinds import MemoryStrategy, ModelArchitecture, VisionTower
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import CheckpointRef, Choice, ModelSpec, Plan, RunContext, TrainSettings, config_of
from graftwork.errors import PlanRefused, WeightsError


def resolve(
    run: RunFile,
    lookup: Lookup,
    machine: Machine | None = None,
    *,
    kernels: Sequence[str] = (),
    fetch: bool = True,
    missing_files: list[str] | None = None,
) -> Plan:
    """The plan of a run. Reads configurations, but no weights, and imports no torch.

    `kernels` are the attention kernels to try, in order, where the run file sets none. Without a `machine` the
    hardware is not checked. Without `fetch`, weights that are named by a hub id must be in the local cache already.
    With a list `missing_files`, files that may still be added go into it and do not count against the plan: weights beside a
    `config`, and what a component reports as `MissingFile`. Raises PlanRefused whose details hold every reason, each with the
    dotted path of what it is about.
    """
    resolver = _Resolver(run, lookup, machine, fetch, missing_files)
    plan = resolver.plan(kernels)
    if plan is None or resolver.reasons:
        name = f"'{run.source}'" if run.source else "the run"
        reasons = list(dict.fromkeys(resolver.reasons))
        raise PlanRefused(f"{name} cannot work, for {count(reasons, 'reason')}", reasons)
    return plan


BROUGHT = {
    "stepper": "take the steps of a run",
    "optimizer": "bring the optimizer",
    "loss": "compute the loss",
    "full_params": "keep weights in a way of their own",
}
"""What a memory strategy may bring instead of core's own, by the hook that it overrides, and what it then does."""


class _Resolver(Chooser):
    """Resolves one run. What cannot work becomes None and adds to `reasons`."""

    def __init__(
        self, run: RunFile, lookup: Lookup, machine: Machine | None, fetch: bool, missing_files: list[str] | None
    ) -> None:
        super().__init__(run.folder, lookup, machine, fetch=fetch, missing_files=missing_files)
        self.run = run

    def plan(self, kernels: Sequence[str]) -> Plan | None:
        run = self.run
        model = self.choose("model", run.model)
        architecture = self.architecture()
        parts = self.parts(architecture)
        peft = self.choose("peft", run.peft) if run.peft else None
        self.check_roles(architecture)
        self.check_precision(architecture)
        wanted = run.attention if "*" in run.attention or not kernels else {**run.attention, "*": tuple(kernels)}
        attention = {site: self.kernels(site, names) for site, names in wanted.items()}
        memory = self.choose_all("memory", run.memory)
        sources = self.choose_all("data_source", run.sources)
        operators = self.operators(run.operators)
        evaluators = self.choose_all("evaluator", run.evaluate)
        if model is None or not self.complete:
            return None
        strategies = {each.where: each.choice for each in memory}
        candidates = [
            [strategies[where] for name in candidate if (where := join("memory", name)) in strategies]
            for candidate in run.candidates
        ]
        run_context = RunContext(
            seed=run.seed,
            attention=attention,
            memory=candidates[0] if candidates else [each.choice for each in memory],
            candidates=candidates,
            budget=run.budget,
            sources=[each.choice for each in sources],
            operators=[each.choice for each in operators],
            strict_data=run.data.strict,
            train_on=run.data.train_on,
            validation=run.data.validation,
            mix=mixed(run.mix),
            train=self.train(model),
            evaluate=[each.choice for each in evaluators],
            init_from=self.init_from(),
        )
        towers = {part: tower.choice for part, tower in parts.items()}
        model_spec = ModelSpec(model.choice, towers, peft.choice if peft else None, run.on, run.also_train)
        plan = Plan(model_spec, run_context)
        self.check_sites(plan, model, parts)
        for candidate in candidates or [run_context.memory]:
            self.check_collisions([each for each in memory if each.choice in candidate])
            candidate_plan = replace(plan, run_context=replace(run_context, memory=candidate))
            for each in self.resolved:
                if each.choice.kind == "memory" and each.choice not in candidate:
                    continue
                self.validate(each, candidate_plan)
        return plan

    def init_from(self) -> CheckpointRef | None:
        """The checkpoint that the run begins with; it is not read here, as a resumed run no longer needs it."""
        given = self.run.init_from
        if given == "":
            self.reasons.append("peft.init_from: is empty; name a checkpoint, or the folder of a run")
        return CheckpointRef(given, str(weights.absolute(Path(given), self.run.folder))) if given else None

    def train(self, model: Resolved) -> TrainSettings:
        """The settings of training, in which records are no longer than what the model reads."""
        train, where = self.run.train, "train.max_length"
        context = cast(ModelArchitecture[Any], model.component).context_length(model.choice.config or {})
        if context is None or train.max_length <= context:
            return train
        if "max_length" in self.run.train_given:
            found = f"{where}: is {train.max_length}, and '{model.choice.name}' reads {context} tokens at most"
            self.reasons.append(f"{found}; set it to {context} or less, or leave it out")
        return replace(train, max_length=context)

    def architecture(self) -> type[ModelArchitecture[Any]] | None:
        """The class of the model, which is known even when its settings or weights are wrong."""
        found = self.find("model", self.run.model.use, self.run.model.where)
        return cast(type[ModelArchitecture[Any]], found.component) if found else None

    def parts(self, architecture: type[ModelArchitecture[Any]] | None) -> dict[str, Resolved]:
        """The towers of the model's parts, in the model's order."""
        if architecture is None:
            return {}
        slots = architecture.parts
        for name, selection in self.run.parts.items():
            if name not in slots:
                self.refuse(f"{selection.where}: '{architecture.name}' has no such part{suggestion(name, [*slots])}")
        towers = {}
        for name, slot in slots.items():
            selection = self.run.parts.get(name, Selection("", where=f"model.parts.{name}"))
            use = selection.use or slot.default
            if use == EMPTY and slot.default is not None and not slot.optional:
                self.refuse(f"{selection.where}.use: '{architecture.name}' cannot do without this part; name a tower")
            elif use is None and name in self.run.parts:
                self.refuse(f"{selection.where}.use: is missing, wanted the name of a vision tower")
            elif use not in (None, EMPTY) and (tower := self.choose("vision_tower", replace(selection, use=use))):
                towers[name] = tower
        return towers

    def kernels(self, site: str, names: Iterable[str]) -> list[Choice]:
        """The kernels to try at a site. One that does not work here is passed over when the site is bound, and is no error."""
        where = "attention.prefer" if site == "*" else f"attention.sites.{site}"
        found = [kernel for name in names if (kernel := self.find("attention", name, where))]
        return [choice_of(kernel, kernel.component(kernel.component.Settings())) for kernel in found]

    def check_collisions(self, memory: Sequence[Resolved]) -> None:
        """Of what strategies bring instead of core's own, there can be one only."""
        told: set[str] = set()
        for hook, clause in BROUGHT.items():
            plain = getattr(MemoryStrategy, hook)
            brings = [each for each in memory if getattr(type(each.component), hook) is not plain]
            found = [each.where.removeprefix("memory.").strip('"') for each in brings]  # as the run file writes them
            names = " and ".join(map(repr, found))
            if len(found) > 1 and names not in told:
                told.add(names)
                keep = f"keep one of them, and remove {'the other' if len(found) == 2 else 'the others'} from memory"
                self.reasons.append(f"memory: {names} {'both' if len(found) == 2 else 'all'} {clause}; {keep}")

    def check_roles(self, architecture: type[ModelArchitecture[Any]] | None) -> None:
        """The roles that the run names must be the model's."""
        if architecture is None:
            return
        name, roles = architecture.name, architecture.roles
        groups = {role[:end] for role in roles for end, letter in enumerate(role) if letter == "."}
        known = sorted({*roles, *groups})
        for key, wanted in (("on", self.run.on), ("also_train", self.run.also_train)):
            for role in wanted:
                if role not in known:
                    self.reasons.append(f"peft.{key}: '{role}' is no role of '{name}'{suggestion(role, known)}")
        if self.run.peft and not self.run.on:
            self.reasons.append(f"peft.on: is missing, wanted roles of '{name}' to adapt; known: {', '.join(known)}")

    def check_precision(self, architecture: type[ModelArchitecture[Any]] | None) -> None:
        """The precision must be one that the model and the machine bear."""
        train, machine = self.run.train, self.machine
        overflows = architecture.overflows_in if architecture else ()
        if train.precision in overflows and not train.force_precision:
            others = " or ".join(p for p in ("bf16", "fp32", "fp16") if p not in overflows)
            mistake = f"'{self.run.model.use}' is known to overflow in {train.precision}"
            self.reasons.append(f"train.precision: {mistake}; use {others}, or set train.force_precision = true")
        if machine and train.precision == "fp16" and not machine.cuda:
            self.reasons.append(
                "train.precision: fp16 needs a CUDA device, and this machine has none; use bf16 or fp32"
            )
        if machine and train.precision == "bf16" and not machine.bf16:
            devices = ", ".join(dict.fromkeys(machine.devices))
            self.reasons.append(f"train.precision: this machine ({devices}) does not compute in bf16; use fp32 or fp16")

    def bars_packing(self, model: Resolved, sites: Iterable[AttentionSite]) -> list[str]:
        """Why records cannot share a row, a clause each."""
        own = [site for site in sites if site.causal and site.own]
        barred = cast(ModelArchitecture[Any], model.component).bars_packing(config_of(model.choice))
        return [
            *([f"'{model.choice.name}' cannot keep records apart: {barred}"] if barred else []),
            *(
                f"'{site.name}' is computed by {site.own}, which cannot keep records apart ({site.why_own})"
                for site in own
            ),
        ]

    def check_sites(self, plan: Plan, model: Resolved, parts: Mapping[str, Resolved]) -> None:
        """The towers must fit the model, and every attention site must exist and have a kernel that computes it."""

        architecture = cast(ModelArchitecture[Any], model.component)
        towers = {part: cast(VisionTower[Any], tower.component) for part, tower in parts.items()}
        try:
            outputs = describe_towers(plan, architecture, towers)
            sites = attention_sites(plan, architecture, towers, outputs)
        except WeightsError as error:
            self.reasons += lines_of("model", error)
            return
        if plan.run_context.train.packing:
            self.reasons += [f"train.packing: {why}; leave it out" for why in self.bars_packing(model, sites)]
        known = [site.name for site in sites]
        for name in sorted(plan.run_context.attention.keys() - {"*", *known}):
            problem = f"'{model.choice.name}' has no attention site '{name}'{suggestion(name, known)}"
            self.reasons.append(f"attention.sites.{name}: {problem}")
        if self.machine is None:
            return
        for site, chosen in kernels_on(plan, sites, self.lookup, self.machine):
            if chosen.name is None and chosen.passed_over:
                why = "; ".join(f"{name}: {reason}" for name, reason in chosen.passed_over)
                self.reasons.append(f"attention: no kernel computes what '{site.name}' needs ({why}); name one more")
