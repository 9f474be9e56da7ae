"""What a tensor starts with that the weights lack, and what is left alone beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from graftwork.build.filling import fill, fill_rest
from graftwork.build.values import initialise, parameters_on_meta
from graftwork.contracts import named_tensors
from graftwork.errors import WeightsError


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module as models are built: parameters without values, buffers with theirs."""
    with parameters_on_meta():
        return make()


def filled(module: torch.nn.Module, *names: str) -> dict[str, torch.Tensor]:
    """Give the tensors of these names sevens, and everything else what it starts with; returns all tensors."""
    values = {name: torch.full(tensor.shape, 7.0) for name, tensor in module.state_dict().items() if name in names}
    fill_rest(module, values, torch.float32, {})
    fill(
        named_tensors(module), {name: lambda value=value: value for name, value in values.items()}, torch.float32, "it"
    )
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert not any(tensor.is_meta or tensor.isnan().any() for tensor in found.values())
    assert all((found[name] == 7).all() for name in names)
    return found


class Queries(torch.nn.Module):
    """A bare parameter, as a resampler has one, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = torch.nn.Parameter(torch.empty(3, 2))
        self.layer = torch.nn.Linear(2, 2)


class OwnQueries(Queries):
    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.queries)
        torch.nn.init.zeros_(self.layer.weight)


class ListedQueries(torch.nn.Module):
    """Bare parameters in a list, which knows no initial values."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = torch.nn.ParameterList([torch.empty(2), torch.empty(2)])

    def reset_parameters(self) -> None:
        for queries in self.queries:
            queries.data = torch.ones(2)


class Statistics(torch.nn.Module):
    """Parameters beside buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2))
        self.register_buffer("kept", torch.full((2,), 3.0))
        self.register_buffer("computed", torch.full((2,), 4.0), persistent=False)

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)
        self.kept.zero_()
        self.computed.zero_()


def pretrained(module: torch.nn.Module) -> torch.nn.Module:
    """A transformers model around a module, whose `_init_weights` knows bare queries."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Around(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig(initializer_range=0.5))
            self.inner = module
            self.norm = GemmaRMSNorm(4)

        def _init_weights(self, module: torch.nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, Queries):
                torch.nn.init.constant_(module.queries, 2.0)
                torch.nn.init.zeros_(module.layer.weight)

    return Around()


@pytest.mark.parametrize("layer_in_file", [True, False])
def test_a_bare_parameter_starts_as_its_module_says(layer_in_file: bool) -> None:
    names = ["layer.weight", "layer.bias"] if layer_in_file else []
    found = filled(on_meta(OwnQueries), *names)
    assert (found["queries"] == 1).all()
    assert found["layer.weight"].any()


@pytest.mark.parametrize("layer_in_file", [True, False])
def test_a_bare_parameter_starts_as_the_transformers_model_around_it_says(layer_in_file: bool) -> None:
    names = ["inner.layer.weight", "inner.layer.bias"] if layer_in_file else []
    found = filled(on_meta(lambda: pretrained(Queries())), *names)
    assert (found["inner.queries"] == 2).all()
    assert (found["norm.weight"] == 1).all()
    assert found["inner.layer.weight"].any()


@pytest.mark.parametrize(
    ("make", "name"),
    [(ListedQueries, "queries.1"), (lambda: torch.nn.MultiheadAttention(4, 2), "in_proj_weight")],
)
def test_a_bare_parameter_starts_as_a_module_further_out_or_pytorch_itself_says(
    make: Callable[[], torch.nn.Module], name: str
) -> None:
    assert filled(on_meta(make))[name].any()


def test_a_bare_parameter_that_nothing_sets_is_refused() -> None:
    with pytest.raises(WeightsError) as caught:
        filled(on_meta(lambda: torch.nn.Sequential(Queries())), "0.layer.weight", "0.layer.bias")
    assert str(caught.value) == (
        "the weights lack '0.queries', and nothing sets what it starts with: neither a 'reset_parameters' nor the "
        "'_init_weights' of a transformers model; give 'Queries' a reset_parameters that does, or name weights that hold it"
    )


@pytest.mark.parametrize("in_file", [(), ("weight",), ("kept",), ("weight", "kept")])
def test_buffers_keep_their_values_whatever_is_initialised_beside_them(in_file: tuple[str, ...]) -> None:
    found = filled(on_meta(Statistics), *in_file)
    assert (found["weight"] == (7 if "weight" in in_file else 1)).all()
    assert (found["kept"] == (7 if "kept" in in_file else 3)).all()
    assert (found["computed"] == 4).all()


def test_buffers_that_follow_parameters_to_meta_start_as_their_module_says() -> None:
    class Following(Statistics):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("computed", torch.zeros_like(self.weight), persistent=False)

        def reset_parameters(self) -> None:
            super().reset_parameters()
            self.computed.fill_(5.0)

    assert (filled(on_meta(Following))["computed"] == 5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Linear(3, 2),
        lambda: torch.nn.LayerNorm(3),
        lambda: torch.nn.Conv2d(2, 2, 1),
        lambda: torch.nn.BatchNorm1d(3),
        lambda: torch.nn.Embedding(3, 2, padding_idx=0),
    ],
)
def test_half_of_a_layer_keeps_what_the_file_holds_and_the_rest_starts_new(make: Callable[[], torch.nn.Module]) -> None:
    names = [name for name, _ in make().named_parameters()]
    for chosen in ([], *([name] for name in names), names):
        torch.manual_seed(3)
        found = filled(on_meta(make), *chosen)
        torch.manual_seed(3)
        wholly = filled(on_meta(make))
        for name in names if not chosen else set(names) - set(chosen):
            assert found[name].abs().max() <= 4 and (chosen or found[name].equal(wholly[name]))


@pytest.mark.parametrize("in_file", [True, False])
def test_tied_weights_have_one_value(in_file: bool) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(3, 2)
            self.head = torch.nn.Linear(2, 3)
            self.head.weight = self.embedding.weight

    model: Any = on_meta(Tied)
    torch.manual_seed(3)
    found = filled(model, *["embedding.weight"] * in_file)
    torch.manual_seed(3)
    assert model.head.weight is model.embedding.weight
    assert in_file or found["embedding.weight"].equal(torch.nn.Embedding(3, 2).weight)


def test_initialising_leaves_alone_what_has_values() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    before = model[0].weight.clone()
    initialise(model)
    assert model[0].weight.equal(before)
    assert not model[1].weight.is_meta
    assert model[1].weight.abs().max() <= 2**-0.5
