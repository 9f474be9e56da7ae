"""The plain stepper's AdamW: one kernel for all parameters, with the steps of its definition."""

from __future__ import annotations

import torch
from tiny_runs import COMPONENTS, PlanOf

from graftwork.build import compose
from graftwork.contracts import DictLookup, Stepper, stepper_for

LOOKUP = DictLookup(*COMPONENTS)


def made(run: PlanOf) -> Stepper:
    """The stepper of a tiny run that decays weights."""
    plan = run({"train.weight_decay": 0.1, "train.learning_rate": 0.01, "train.max_grad_norm": 0.0}, LOOKUP)
    return stepper_for(compose.build(plan, LOOKUP, device="cpu"), plan.run_context.train)


def take(stepper: Stepper, steps: int, seed: int = 0) -> None:
    """Some steps along gradients drawn by the seed."""
    torch.manual_seed(seed)
    for _ in range(steps):
        for parameter in stepper.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        stepper.gradient_norm()
        stepper.update()
        stepper.clear()


def test_the_fused_optimizer_takes_the_steps_of_adamw(run: PlanOf) -> None:
    fused, plain = made(run), made(run)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    plain.optimizer = torch.optim.AdamW([{**group, "fused": False} for group in plain.optimizer.param_groups])
    for each in (fused, plain):
        take(each, 20)
    for name, parameter in fused.parameters.items():
        assert (parameter - plain.parameters[name]).norm() <= 1e-6 * parameter.norm(), name


def test_it_goes_on_from_the_state_of_one_that_was_not(run: PlanOf) -> None:
    fused, plain = made(run), made(run)
    plain.optimizer = torch.optim.AdamW([{**group, "fused": False} for group in plain.optimizer.param_groups])
    for each in (fused, plain):
        take(each, 3)
    resumed = made(run)
    for name, parameter in plain.parameters.items():
        resumed.parameters[name].data.copy_(parameter)
    resumed.restore(plain.state())
    for each in (fused, resumed):
        take(each, 3, seed=1)
    for name, parameter in fused.parameters.items():
        assert (parameter - resumed.parameters[name]).norm() <= 1e-6 * parameter.norm(), name
