"""What learns: a dry backward pass before the first step, every step's gradients, and how far each trained module moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.checkpoint.learning import LearningMap, ModuleLearning, RoleShape, matches, places, short_names
from graftwork.config.wording import suggestion
from graftwork.contracts.anatomy import Structure, modules_of, within
from graftwork.contracts.kinds import MemoryStrategy
from graftwork.contracts.model import batch_of
from graftwork.errors import PlanRefused

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly
    from graftwork.contracts.stepper import Stepper
    from graftwork.train.feeding import Feed

FIRST_STEPS = 3
"""The steps whose gradients are shown as the first ones: LoRA's A has none before its B has moved."""
FORGOTTEN = 0.1
"""The share of the mean of the last gradients that a step replaces."""
SAMPLED = 4096
"""How many evenly spaced values of a parameter are compared with where they began."""
TRIED_AT_ONCE, MOST_TRIED = 4, 4
"""How many records the dry pass takes at once, and how many times, where those before did not reach everything."""
SMALL = 1 << 16
"""A buffer of more values is no statistic that training writes to."""
ROUNDING = 1e-6
"""In fp32 a gradient that is so much smaller than others of its block, value by value, is nothing but rounding."""


class Learning:
    """Watches what is trained; everything here is the same on all processes."""

    def __init__(self, assembly: Assembly, stepper: Stepper, allowed: Sequence[str]) -> None:
        import torch

        self.assembly, self.stepper, self.allowed = assembly, stepper, allowed
        self.names = [*stepper.parameters]
        self.owners = owners(assembly, self.names)
        self.modules = trained_modules(assembly, self.owners, allowed)
        self.reached: frozenset[str] = frozenset(self.names)
        self.warnings: list[str] = []
        """What a person should know of what is trained and cannot learn, a sentence each."""
        self.since = self.steps = 0
        self.told = False
        # Without gradient, of the first steps, of the last; on the device, so that no step waits for it.
        self.counted, self.first, self.last = (torch.zeros(len(self.names)) for _ in range(3))
        self.before = sampled(assembly, self.names)

    # Before the first step --------------------------------------------------------------------------------------------

    def check(self, feed: Feed, micro_batch_size: int) -> None:
        """Run backward, without a step, on a few records at a time until everything is reached.

        PlanRefused for what should learn and cannot; `warnings` says what is allowed to stay unreached. Collective.
        """
        self.refuse_unknown_names()
        size = min(micro_batch_size, TRIED_AT_ONCE)
        examples = feed.some(size * MOST_TRIED)
        parts = [examples[start : start + size] for start in range(0, len(examples), size)][:MOST_TRIED]
        reached = set[str]()
        with without_trace(self.assembly):
            for part in parts:
                batch = batch_of(self.assembly.processor, part).to(self.assembly.device)
                found = processes.all_gather_object(self.stepper.reached(batch))
                reached |= frozenset().union(*found)
                if {self.owners[name] for name in reached} == self.modules.keys():
                    break
        self.reached = frozenset(reached)
        alive = {self.owners[name] for name in reached}
        self.modules = {name: replace(each, reached=name in alive) for name, each in self.modules.items()}
        images = any(example.pixels for part in parts for example in part)
        self.warnings = self.judge(images)

    def refuse_unknown_names(self) -> None:
        """PlanRefused for an entry of `train.allow_unreached` that names nothing that is trained, and no role that should be."""
        wanted, roles = self.wanted_roles(), self.assembly.structure.roles
        for entry in self.allowed:
            if not any(matches(entry, each.name, each.role) for each in self.modules.values()) and entry not in wanted:
                known = sorted({each.role for each in self.modules.values() if each.role} | {*wanted})
                why = "is not trained" if entry in roles else "names nothing that is trained"
                raise PlanRefused(f"train.allow_unreached: '{entry}' {why}{suggestion(entry, known)}")

    def wanted_roles(self) -> dict[str, str]:
        """The roles, or groups of roles, that the run names to be trained, and the key that names them."""
        spec = self.assembly.plan.model_spec
        return dict.fromkeys(spec.also_train, "peft.also_train") | dict.fromkeys(
            spec.on if spec.peft else (), "peft.on"
        )

    def judge(self, images: bool) -> list[str]:
        """Sentences on what cannot learn and need not; PlanRefused for what should. `images` is whether a record had some."""
        every = [*self.modules.values()]
        dead = [each for each in every if not each.reached]
        frozen = {role: key for role, key in self.wanted_roles().items() if not self.trains(role)}
        refused = [each for each in dead if not each.allowed]
        missing = [role for role in frozen if role not in self.allowed]
        if refused or missing:
            method = f"'{spec.label}'" if (spec := self.assembly.plan.model_spec.peft) else "the run"
            what = [f"{frozen[role]} names '{role}', in which {method} trains nothing" for role in missing]
            if refused:
                what.append(f"no gradient can reach {len(refused)} of the {len(every)} modules that are to be trained")
            entries = ", ".join(f'"{name}"' for name in [*missing, *short_names(refused, every)])
            raise PlanRefused(
                f"{', and '.join(what)}; leave them out of peft.on and peft.also_train, or say that it is meant: "
                f"train.allow_unreached = [{entries}]",
                [
                    ": ".join(
                        dict.fromkeys([row or role or "elsewhere", places(found, every), self.reason(found, images)])
                    )
                    for (row, role), found in by_row(refused).items()
                ],
            )
        said = [
            f"{len(dead)} of {len(every)} trained modules cannot learn, as train.allow_unreached allows: {places(dead, every)}"
        ][: len(dead)]
        said += [
            f"{key} names '{role}', and nothing in it is trained, as train.allow_unreached allows"
            for role, key in frozen.items()
        ]
        expected = {*self.reached, *self.assembly.structure.without_effect}
        single = [name for name in self.names if name not in expected and self.modules[self.owners[name]].reached]
        if single and not self.stepper.zero_is_unreached:
            more = f" and {len(single) - 1} more parameters" if len(single) > 1 else ""
            said.append(f"no gradient can reach '{single[0]}'{more}, although others of the same module learn")
        if still := self.without_rate():
            said.append(
                f"{len(still)} of {len(every)} trained modules have a learning rate of 0, and stay as they are: {places(still, every)}"
            )
        return said

    def trains(self, role: str) -> bool:
        """Whether anything of a role, or of a group of roles, is trained."""
        modules = modules_of(self.assembly.structure.roles, [role])
        return any(within(name, modules) for name in self.names)

    def without_rate(self) -> list[ModuleLearning]:
        """The modules all of whose parameters have a learning rate of 0 throughout."""
        optimizer = self.stepper.optimizer
        held = {
            id(p)
            for group, rate in zip(optimizer.param_groups, self.stepper.rates, strict=False)
            for p in group["params"]
            if rate
        }
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        moving = {self.owners[n] for n, p in self.stepper.parameters.items() if id(p) in held or id(p) not in known}
        return [each for name, each in self.modules.items() if name not in moving]

    def reason(self, dead: Sequence[ModuleLearning], images: bool) -> str:
        """Why nothing reaches modules of one row, as far as where they lie tells it, as a clause."""
        if not images and all(within(each.name, self.assembly.structure.image_encoder) for each in dead):
            return "they encode images, and no record that was tried has one"
        alive = [each.place for each in self.modules.values() if each.reached and each.row == dead[0].row]
        if dead[0].row and alive and min(each.place for each in dead) > max(alive):
            return "the model reads what an earlier block gives, so the loss does not depend on them"
        return "the loss does not depend on them, or what they give is detached on the way to it"

    # In every step ----------------------------------------------------------------------------------------------------

    def observe(self, norm: float) -> None:
        """Note the gathered gradients of a step, whose norm before clipping is `norm`."""
        norms = self.stepper.gradient_norms().float()
        if self.counted.device != norms.device:
            self.counted, self.first, self.last = (
                each.to(norms.device) for each in (self.counted, self.first, self.last)
            )
        squares = (norms * (norm / norms.norm().clamp(min=1e-30))).square()
        self.steps += 1
        if self.steps <= FIRST_STEPS:
            self.first += squares
        self.last += (squares - self.last) * max(FORGOTTEN, 1 / self.steps)
        self.counted += norms > 0

    def first_findings(self) -> tuple[str, ...]:
        """What has not learned so far, as clauses, once, when the first steps have been observed. Collective."""
        if self.told or self.steps < FIRST_STEPS:
            return ()
        self.told = True
        learned = self.map()
        return (*learned.faults(), *learned.idle())

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of it, as tensors."""
        import torch

        reached = torch.tensor([name in self.reached for name in self.names])
        numbers = torch.tensor([self.steps, self.since])
        told = {"counted": self.counted, "first": self.first, "last": self.last}
        return {f"learning/{key}": value.to("cpu", copy=True) for key, value in told.items()} | {
            "learning/before": torch.cat([*self.before, torch.zeros(0)]),
            "learning/reached": reached,
            "learning/steps": numbers,
        }

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `state` returned; a run that is older than maps is observed from `step` on."""
        import torch

        sizes = [len(each) for each in self.before]
        before = state.get("learning/before")
        if before is None or len(before) != sum(sizes):
            self.since = step
            return
        self.before = [*torch.split(before, sizes)]
        self.counted, self.first, self.last = (state[f"learning/{key}"] for key in ("counted", "first", "last"))
        self.steps, self.since = state["learning/steps"].tolist()
        self.told = self.steps >= FIRST_STEPS
        self.reached = frozenset(
            name for name, found in zip(self.names, state["learning/reached"].tolist(), strict=True) if found
        )
        alive = {self.owners[name] for name in self.reached}
        self.modules = {name: replace(each, reached=name in alive) for name, each in self.modules.items()}

    # At a checkpoint --------------------------------------------------------------------------------------------------

    def map(self) -> LearningMap:
        """What has been learned so far. Collective."""
        after = sampled(self.assembly, self.names)
        counted, first, last = (each.tolist() for each in (self.counted, self.first, self.last))
        sizes = [parameter_size(parameter) for parameter in self.stepper.parameters.values()]
        idle, expected = self.idle_parameters(counted, last, sizes), self.assembly.structure.without_effect
        modules = []
        for name, module in self.modules.items():
            mine = [place for place, each in enumerate(self.names) if self.owners[each] == name]
            moved = size_before = size_after = 0.0
            for place in mine:
                a, b, share = self.before[place], after[place], sizes[place] / max(1, len(after[place]))
                moved += share * float((b - a).square().sum())
                size_before += share * float(a.square().sum())
                size_after += share * float(b.square().sum())
            steps = int(max(counted[place] for place in mine))
            modules.append(
                replace(
                    module,
                    values=sum(sizes[place] for place in mine),
                    steps=steps,
                    first=math.sqrt(sum(first[place] for place in mine) / max(1, min(self.steps, FIRST_STEPS))),
                    last=math.sqrt(sum(last[place] for place in mine)),
                    moved=math.sqrt(moved / (max(size_before, size_after) or 1.0)),
                    # LoRA's A has no gradient before its B has moved.
                    idle=tuple(
                        self.names[place]
                        for place in mine
                        if steps >= FIRST_STEPS and place in idle and self.names[place] not in expected
                    ),
                )
            )
        return LearningMap(self.steps, tuple(modules), shapes_of(self.assembly.structure), self.since)

    def idle_parameters(self, counted: Sequence[float], last: Sequence[float], sizes: Sequence[int]) -> set[int]:
        """The places of parameters that never had a gradient, or, of the base's own and in fp32, nothing but rounding."""
        idle = {place for place, steps in enumerate(counted) if not steps}
        if self.assembly.precision != "fp32" or not self.steps:
            return idle
        groups: dict[str, dict[int, float]] = {}
        for place, name in enumerate(self.names):
            module = self.modules[self.owners[name]]
            groups.setdefault(module.block or module.name, {})[place] = math.sqrt(last[place] / max(1, sizes[place]))
        for found in groups.values():
            limit = ROUNDING * max(found.values())
            added = self.assembly.adaptation.adapter_parameters
            idle |= {place for place, typical in found.items() if typical < limit and self.names[place] not in added}
        return idle


@contextmanager
def without_trace(assembly: Assembly) -> Iterator[None]:
    """While entered the model is as in training; afterwards random numbers and statistics are what they were."""
    import torch

    model, training = assembly.model, assembly.model.training
    devices = [assembly.device] if assembly.device.type == "cuda" else []
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.numel() <= SMALL}
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            yield
        finally:
            model.train(training)
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.data.copy_(kept[name])


def owners(assembly: Assembly, names: Sequence[str]) -> dict[str, str]:
    """For each trained parameter the module of the base that it belongs to: what held parameters before the PEFT method came."""
    leaves = frozenset(assembly.adaptation.leaves)

    def owner(name: str) -> str:
        parts = name.split(".")[:-1]
        found = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((each for each in found if each in leaves), ".".join(parts))

    return {name: owner(name) for name in names}


def trained_modules(assembly: Assembly, owned: Mapping[str, str], allowed: Sequence[str]) -> dict[str, ModuleLearning]:
    """The trained modules by name, with where they lie."""
    structure = assembly.structure
    blocks = {block: (row, place) for row, found in structure.blocks.items() for place, block in enumerate(found)}
    modules: dict[str, ModuleLearning] = {}
    for name, module in owned.items():
        if module in modules:
            continue
        parts = module.split(".")
        block = next((each for end in range(len(parts), 0, -1) if (each := ".".join(parts[:end])) in blocks), "")
        row, place = blocks.get(block, ("", 0))
        role = next(
            (role for role, found in structure.roles.items() if within(name, found) or within(module, found)), ""
        )
        meant = any(matches(entry, module, role) for entry in allowed)
        modules[module] = ModuleLearning(module, role, row, place, block, allowed=meant)
    return modules


def shapes_of(structure: Structure) -> dict[str, RoleShape]:
    """Where every role of a model lies."""
    shapes = {}
    for role, modules in structure.roles.items():
        # A role may stand for whole blocks, or have modules within them.
        rows = {
            row: blocks
            for row, blocks in structure.blocks.items()
            if any(within(block, modules) for block in blocks) or any(within(module, blocks) for module in modules)
        }
        row = next(iter(rows), "")
        outside = not row or any(not within(module, rows[row]) for module in modules)
        shapes[role] = RoleShape(row, len(rows.get(row, ())), outside)
    return shapes


def by_row(modules: Sequence[ModuleLearning]) -> dict[tuple[str, str], list[ModuleLearning]]:
    """Modules by the row of blocks that they lie in, or else by their role."""
    found: dict[tuple[str, str], list[ModuleLearning]] = {}
    for module in modules:
        found.setdefault((module.row, "" if module.row else module.role), []).append(module)
    return found


def sampled(assembly: Assembly, names: Sequence[str]) -> list[Tensor]:
    """Some evenly spaced values of each of these parameters, fp32 on the CPU. Collective."""
    import torch

    # One by one where an engine keeps parts: all of them at once may be more than fits.
    apart = any(type(each).full_params is not MemoryStrategy.full_params for each in assembly.strategies)
    found = []
    for group in [[name] for name in names] if apart else [names]:
        with torch.no_grad(), assembly.full_params(group) if apart else nullcontext():
            for name in group:
                values = assembly.model.get_parameter(name).detach().flatten()
                found.append(values[:: -(-len(values) // SAMPLED) or 1][:SAMPLED].float().cpu().clone())
    return found


def parameter_size(parameter: Any) -> int:
    """How many values a parameter has in all, of which a process may have a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
