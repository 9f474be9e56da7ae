"""Attention: which kernel computes it, what is recorded of that, and transformers' models on top."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import SUPPORTED, GraftworkError, NoSettings, Support, unsupported
from graftwork.attention.definition import attend, plain_attention
from graftwork.attention.kernels import Binding, Chosen, bind, choose
from graftwork.attention.transformers import ATTN_IMPLEMENTATION, register
from graftwork.contracts import AttentionCase, AttentionKernel, AttentionSite
from graftwork.contracts.assembly import Assembly
from graftwork_torch_attention import Sdpa

SITE = AttentionSite("language", head_dim=8, heads=4, kv_heads=1, causal=True, padding=True)


class Plain(AttentionKernel[NoSettings]):
    """Computes everything"""

    name = "plain"

    def supports(self, case: AttentionCase) -> Support:
        return SUPPORTED

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return plain_attention(q, k, v, **options)


class Unpadded(Plain):
    """Refuses padding"""

    name = "unpadded"

    def supports(self, case: AttentionCase) -> Support:
        return unsupported("some keys are padding") if case.site.padding else SUPPORTED


class Misbuilt(Plain):
    """Promises everything, and its library does not load"""

    name = "misbuilt"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        raise ImportError("undefined symbol: _ZN3c10\nand more lines")


def binding(*kernels: type[AttentionKernel[NoSettings]]) -> Binding:
    return Binding(SITE, [(kernel.name, kernel(NoSettings())) for kernel in kernels])


def tensors(dtype: torch.dtype = torch.float32, queries: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 1, 5, 8, dtype=dtype)
    return torch.randn(2, 4, queries, 8, dtype=dtype), k, v


PADDING = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])


# Choosing and binding -------------------------------------------------------------------------------------------------


def test_the_first_kernel_that_supports_the_case_is_chosen_and_the_others_say_why() -> None:
    case = AttentionCase(SITE, "float32", "cpu")
    kernels = binding(Unpadded, Plain, Misbuilt).kernels
    chosen = choose(case, kernels)
    assert (chosen.name, chosen.passed_over) == ("plain", (("unpadded", "some keys are padding"),))
    assert choose(case, kernels[:1]) == Chosen(None, None, (("unpadded", "some keys are padding"),))


def test_a_bound_module_uses_its_kernels_and_is_otherwise_unchanged() -> None:
    module, bound = nn.Linear(2, 2), binding(Plain)
    before = list(module.state_dict()), list(module.children())
    bind([module], bound)
    output = attend(module, *tensors(), causal=True)
    assert (list(module.state_dict()), list(module.children())) == before
    torch.testing.assert_close(output, attend(nn.Linear(2, 2), *tensors(), causal=True))
    copied = attend(copy.deepcopy(module), *tensors(), causal=True)
    torch.testing.assert_close(copied, output)
    assert bound.ran == {"plain": 1}


def test_a_kernel_that_refuses_the_case_at_hand_is_passed_over_and_its_usage_says_so() -> None:
    module, bound = nn.Identity(), binding(Unpadded, Plain)
    bind([module], bound)
    for _ in range(3):
        attend(module, *tensors(), padding=PADDING, causal=True)
    attend(module, *tensors(), causal=True)
    assembly: Any = SimpleNamespace(bindings={"language": bound}, own_attention={})
    assert Assembly.kernel_usage(assembly) == {
        "language": {
            "ran": {"plain": 3, "unpadded": 1},
            "fallbacks": ["unpadded passed over at language: some keys are padding"],
        }
    }


def test_a_kernel_whose_library_does_not_load_is_passed_over() -> None:
    module, bound = nn.Identity(), binding(Misbuilt, Plain)
    bind([module], bound)
    attend(module, *tensors())
    attend(module, *tensors())
    assert bound.ran == {"plain": 2}
    assert bound.fallbacks == ["misbuilt passed over at language: undefined symbol: _ZN3c10"]


def test_without_a_kernel_for_the_case_the_error_gives_every_reason() -> None:
    module = nn.Identity()
    bind([module], binding(Misbuilt, Unpadded))
    with pytest.raises(GraftworkError) as caught:
        attend(module, *tensors(), padding=PADDING)
    assert str(caught.value) == (
        "no kernel under 'attention' computes what 'language' needs; list one more that does\n"
        "  misbuilt: undefined symbol: _ZN3c10\n"
        "  unpadded: some keys are padding"
    )


def test_the_kernels_are_asked_about_the_tensors_that_really_come() -> None:
    asked = []

    class Curious(Plain):
        """Remembers what it is asked"""

        def supports(self, case: AttentionCase) -> Support:
            asked.append(case)
            return SUPPORTED

    module = nn.Identity()
    bind([module], binding(Curious))
    q, k, v = tensors(torch.float64)
    attend(module, q, k, v, padding=PADDING, causal=True, dropout=0.5)
    attend(module, q[:, :, -1:].requires_grad_(), k, v, causal=True)
    assert asked == [
        AttentionCase(AttentionSite("language", 8, 4, 1, True, True, 0.5), "float64", "cpu", None, backward=False),
        AttentionCase(AttentionSite("language", 8, 4, 1, False, False, 0.0), "float64", "cpu", None, backward=True),
    ]


def test_under_autocast_all_tensors_get_its_dtype_and_otherwise_that_of_the_values() -> None:
    q, k, v = tensors()
    assert attend(nn.Identity(), q, k, v.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(nn.Identity(), q, k, v.bfloat16()).dtype == torch.bfloat16


# Models of transformers -----------------------------------------------------------------------------------------------


def gemma(implementation: str, kernel: type[AttentionKernel[NoSettings]] = Plain) -> tuple[Any, Binding]:
    """A tiny Gemma whose eight heads share one key head, bound to one kernel."""
    from transformers import GemmaConfig, GemmaForCausalLM

    register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = GemmaConfig(**sizes, num_attention_heads=8, num_key_value_heads=1, pad_token_id=0)
    model = GemmaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    bound = binding(kernel)
    bind(model.modules(), bound)
    return model, bound


def test_a_padded_gemma_gives_the_logits_and_gradients_of_transformers_own_attention() -> None:
    ids = torch.randint(1, 50, (2, 7), generator=torch.manual_seed(1))
    for side in ("left", "right", "none"):
        real = torch.ones(2, 7, dtype=torch.int64)
        if side != "none":
            real[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
        results = []
        for implementation in ("eager", ATTN_IMPLEMENTATION):
            model, bound = gemma(implementation)
            logits = model(ids, attention_mask=real).logits * real[..., None]
            logits.square().sum().backward()
            results.append((logits, [parameter.grad for parameter in model.parameters()]))
        assert bound.ran == {"plain": 2}
        torch.testing.assert_close(*results)


def test_right_padding_never_reaches_the_kernels_and_left_padding_does() -> None:
    ids, real = torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model, bound = gemma(ATTN_IMPLEMENTATION, Unpadded)
    model(ids, attention_mask=real)
    assert bound.ran == {"unpadded": 2}
    with pytest.raises(GraftworkError, match="some keys are padding"):
        model(ids, attention_mask=real.flip(1))


def test_a_gemma_generates_the_same_with_a_cache_after_left_padding() -> None:
    ids = torch.randint(1, 50, (2, 5), generator=torch.manual_seed(2))
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    results = []
    for implementation in ("eager", ATTN_IMPLEMENTATION):
        model, bound = gemma(implementation)
        generated = model.generate(ids, attention_mask=real, **options)
        results.append((generated.sequences, generated.logits))
    assert bound.ran == {"plain": 8}
    torch.testing.assert_close(*results)


def test_several_queries_after_a_cache_see_it_and_their_own_past() -> None:
    from transformers import DynamicCache

    ids = torch.randint(1, 50, (2, 7), generator=torch.manual_seed(3))
    for hidden in (0, 2):
        real = torch.ones(2, 7, dtype=torch.int64)
        real[1, :hidden] = 0
        model, _ = gemma(ATTN_IMPLEMENTATION)
        whole = model(ids, attention_mask=real).logits
        cache = DynamicCache()
        model(ids[:, :4], attention_mask=real[:, :4], past_key_values=cache)
        positions = torch.arange(4, 7)[None]
        rest = model(ids[:, 4:], attention_mask=real, past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(rest, whole[:, 4:])


def test_clip_sees_all_patches_with_transformers_own_result() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    register()
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    pixels = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(4))
    results = []
    for implementation in ("eager", ATTN_IMPLEMENTATION):
        torch.manual_seed(0)
        model = CLIPVisionModel._from_config(config, attn_implementation=implementation)
        bound = binding(Unpadded)
        bind(model.modules(), bound)
        results.append(model(pixels).last_hidden_state)
    torch.testing.assert_close(*results)
    assert bound.ran == {"unpadded": 2}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sliding_window_of_transformers_reaches_the_kernels_as_a_mask(side: str) -> None:
    from transformers import DynamicCache, MistralConfig, MistralModel

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=3)
    ids = torch.randint(50, (2, 9), generator=torch.manual_seed(0))
    real = torch.arange(9).expand(2, -1) >= torch.tensor([[0], [2]])
    real = real if side == "left" else real.flip(1)
    results = []
    for implementation in ("eager", ATTN_IMPLEMENTATION):
        torch.manual_seed(0)
        model = MistralModel._from_config(config, attn_implementation=implementation)
        bound = binding(Unpadded, Sdpa)
        bind(model.modules(), bound)
        cache = DynamicCache(config=config)
        first = model(ids[:, :6], attention_mask=real[:, :6], past_key_values=cache).last_hidden_state
        then = model(ids[:, 6:], attention_mask=real, past_key_values=cache).last_hidden_state
        results.append(torch.cat([first, then], 1)[real])
    torch.testing.assert_close(*results)
    assert bound.ran == {"sdpa": 4} and "unpadded passed over" in bound.fallbacks[0]


def test_what_the_kernels_cannot_express_is_refused_in_words() -> None:
    from transformers import StaticCache

    ids = torch.ones(1, 4, dtype=torch.int64)
    model, _ = gemma(ATTN_IMPLEMENTATION)
    with pytest.raises(GraftworkError, match=r"uses attention_mask of shape \(1, 1, 4, 4\) in torch.float32, which"):
        model(ids, attention_mask=torch.zeros(1, 1, 4, 4))
    with pytest.raises(GraftworkError, match="a static cache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=9))


def test_fake_tensors_pass_as_in_training() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model, bound = gemma(ATTN_IMPLEMENTATION, Unpadded)
        ids = torch.ones(2, 4, dtype=torch.int64)
        model(ids, attention_mask=torch.ones(2, 4, dtype=torch.bool)).logits.sum().backward()
    assert bound.ran == {"unpadded": 2}


# Windows, soft caps, and attention that is the model's own --------------------------------------------------------------


@pytest.mark.parametrize("queries", [5, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_hides_what_lies_further_away(queries: int, causal: bool) -> None:
    q, k, v = tensors(queries=queries)
    found = plain_attention(q, k, v, padding=None, causal=causal, scale=0.3, dropout=0.0, window=2)
    for query in range(queries):
        place = 5 - queries + query
        near = [key for key in range(5) if abs(place - key) < 2 and (key <= place or not causal)]
        alone = plain_attention(
            q[:, :, [query]], k[:, :, near], v[:, :, near], padding=None, causal=False, scale=0.3, dropout=0.0
        )
        torch.testing.assert_close(found[:, :, [query]], alone)


def test_a_soft_cap_bends_the_scores() -> None:
    q, k, v = tensors()
    scores = (0.5 * (q @ k.mT * 0.3 / 0.5).tanh()).softmax(-1)
    found = attend(torch.nn.Module(), q, k, v, scale=0.3, softcap=0.5)
    torch.testing.assert_close(found, scores @ v)


def test_a_kernel_is_not_asked_for_what_it_does_not_say_that_it_computes() -> None:
    site = replace(SITE, window=4, softcap=30.0, mask=True)
    chosen = choose(AttentionCase(site, "float32", "cpu"), [("sdpa", Sdpa(NoSettings()))])
    assert (chosen.name, chosen.passed_over) == (
        None,
        (
            (
                "sdpa",
                "it does not compute scores capped at 30",
            ),
        ),
    )
    windowed = AttentionCase(replace(SITE, window=4), "float32", "cpu")
    assert choose(windowed, [("plain", Plain(NoSettings())), ("sdpa", Sdpa(NoSettings()))]).name == "sdpa"


def test_the_kernel_that_runs_gets_the_window() -> None:
    q, k, v = tensors()
    module = torch.nn.Module()
    bind([module], bound := binding(Plain, Sdpa))
    found = attend(module, q, k, v, causal=True, scale=0.3, window=2)
    expected = plain_attention(q, k, v, padding=None, causal=True, scale=0.3, dropout=0.0, window=2)
    torch.testing.assert_close(found, expected)
    assert dict(bound.ran) == {"sdpa": 1}
    assert bound.fallbacks == ["plain passed over at language: it does not compute a sliding window of 2 keys"]
