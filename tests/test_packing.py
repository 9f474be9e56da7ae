"""Packing: records that share a row are trained as if each had its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PlanOf, Shapes, ShapesSettings, plan_of
from torch import Tensor
from vlm_families import write
from vlm_trial import LOOKUP, RECORDS, run_table

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import IGNORED, Assembly, Batch, DictLookup, Encoded, batch_of, collate, summed_loss
from graftwork.contracts.events import Event, RunStarted
from graftwork.contracts.packing import MicroBatch, micro_batches, packed, rows_of, rows_of_step
from graftwork.errors import PlanRefused
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork.train.loop import train
from graftwork.train.packing import check_packing, padded_size
from graftwork_hf_vlm import HfVlm, HfVlmSettings

# Rows -----------------------------------------------------------------------------------------------------------------


def test_records_fill_rows_and_none_is_longer_than_the_limit() -> None:
    lengths = [3, 9, 5, 1, 7, 2, 5, 10]
    rows = rows_of(lengths, 10)
    assert sorted(n for row in rows for n in row) == list(range(8))
    assert [sum(lengths[n] for n in row) for row in rows] == [10, 9, 8, 8, 7]
    assert rows_of([], 10) == []


def test_micro_batches_count_rows() -> None:
    def example(tokens: int) -> Encoded:
        return Encoded([5] * tokens, [False] * tokens, [IGNORED] * tokens, {})

    of = {tokens: example(tokens) for tokens in (2, 3, 4, 6)}
    assert micro_batches([*of.values()], 2, 8) == [MicroBatch([of[6], of[2], of[4], of[3]], [2, 2])]
    assert micro_batches([*of.values()], 1, 8) == [MicroBatch([of[6], of[2]], [2]), MicroBatch([of[4], of[3]], [2])]
    assert micro_batches([*of.values()], 3, None) == [MicroBatch([of[6], of[4], of[3]]), MicroBatch([of[2]])]
    assert micro_batches([*of.values()], 4, None) == [MicroBatch([*of.values()])]
    assert micro_batches([], None, None) == []
    assert padded_size([2, 3, 4, 6], None) == 24 and padded_size([2, 3, 4, 6], 2) == 18


def test_a_step_has_the_same_records_and_less_padding_where_they_are_cut_by_length() -> None:
    lengths = [2, 9, 3, 8, 2, 9, 3, 8]
    rows = rows_of_step(lengths, 2, None)
    assert sorted(rows) == [[n] for n in range(8)]
    ordered = [lengths[n] for (n,) in rows]
    assert padded_size(ordered, 2) == sum(lengths) < padded_size(lengths, 2)


def test_a_packed_batch_begins_each_record_anew() -> None:
    one = Encoded([7, 8, 9], [False, True, False], [7, IGNORED, 9], {}, token_fields={"kind": [0, 1, 2]})
    two = Encoded([3, 4], [False, False], [IGNORED, 4], {}, token_fields={"kind": [5, 6]})
    batch = packed(collate([one, two, two], pad_id=1), (2, 1), 1)
    assert batch.input_ids.tolist() == [[7, 8, 9, 3, 4], [3, 4, 1, 1, 1]]
    assert batch.attention_mask.sum(1).tolist() == [5, 2]
    assert batch.image_token_mask.nonzero().tolist() == [[0, 1]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 9, IGNORED, 4], [IGNORED, 4, IGNORED, IGNORED, IGNORED]]
    assert batch.positions is not None and batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.label_positions is not None and batch.label_positions.tolist() == [1, 3, 5]
    assert batch.token_fields["kind"].tolist() == [[0, 1, 2, 5, 6], [5, 6, 0, 0, 0]]


# Losses and gradients -------------------------------------------------------------------------------------------------


def gradients(assembly: Assembly, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    assembly.model.zero_grad()
    loss = torch.stack([summed_loss(assembly.model, batch) for batch in batches]).sum()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}


def equals_unpacked(assembly: Assembly, encoded: list[Encoded], limit: int) -> list[int]:
    """How many records each row has; their losses and gradients are those of the records one by one."""
    assembly.model.requires_grad_(True)
    loss, apart = gradients(assembly, [batch_of(assembly.processor, [each]) for each in encoded])
    cut = micro_batches(encoded, None, limit)
    found, together = gradients(assembly, [batch_of(assembly.processor, each.examples, rows=each.rows) for each in cut])
    assert found == pytest.approx(loss, rel=1e-6)
    size = max(float(each.abs().max()) for each in apart.values())
    assert together.keys() == apart.keys()
    assert max(float((together[name] - apart[name]).abs().max()) for name in apart) < 1e-6 * size
    return [count for each in cut for count in each.rows]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "gemma3"])
def test_a_model_of_transformers_learns_the_same(name: str, tmp_path: Path) -> None:
    plan = resolve(parse_run(run_table(write(name, tmp_path)), Path.cwd()), LOOKUP)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    encoded = [assembly.processor.encode(record) for record in RECORDS]
    assert max(equals_unpacked(assembly, encoded, 420)) > 1


def test_mgm_learns_the_same(base: Path, lookup: DictLookup) -> None:
    assembly = compose.build(plan_of(base, base), lookup, device="cpu")
    encoded = [assembly.processor.encode(record) for record in Shapes(ShapesSettings(6)).records()]
    assert equals_unpacked(assembly, encoded, 128) == [2, 2, 2]


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_packed_run_is_the_run_and_says_what_it_saves(run: PlanOf, lookup: DictLookup, tmp_path: Path) -> None:
    told: list[Event] = []
    plain = train(run({"train.micro_batch_size": 2}), lookup, tmp_path / "plain", device="cpu")
    packing = run({"train.packing": True, "train.micro_batch_size": 2})
    found = train(packing, lookup, tmp_path / "packed", device="cpu", listen=told.append)
    assert [line["loss"] for line in found.log] == [pytest.approx(line["loss"], rel=1e-5) for line in plain.log]
    (started,) = [event for event in told if isinstance(event, RunStarted)]
    assert started.notes == ("packing: 0.8% of the tokens are padding, and 2.0% would be without it",)


def test_a_model_that_mixes_the_records_of_a_row_is_refused(base: Path, lookup: DictLookup) -> None:
    assembly = compose.build(plan_of(base, base), lookup, device="cpu")
    encoded = [assembly.processor.encode(record) for record in Shapes(ShapesSettings(2)).records()]
    check_packing(assembly, encoded)
    forward = assembly.model.forward

    def careless(batch: Batch, *others: Any) -> Tensor:
        batch.positions = None
        return forward(batch, *others)  # type: ignore[no-any-return]

    assembly.model.forward = careless
    with pytest.raises(PlanRefused, match=r"'mgm-gemma' does not keep them apart here: .* leave train.packing out"):
        check_packing(assembly, encoded)


def test_attention_of_the_models_own_and_layers_with_a_state_are_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    table = run_table(write("llava_next", tmp_path))
    table["model"]["attention"] = "own"
    table["train"]["packing"] = True
    with pytest.raises(PlanRefused) as caught:
        resolve(parse_run(table, Path.cwd()), LOOKUP)
    assert [*caught.value.details] == [
        "train.packing: 'language' is computed by transformers' sdpa, which cannot keep records apart (the run file asks for it); leave it out"
    ]
    from transformers import Qwen3_5Config

    config = json.loads(Qwen3_5Config().to_json_string(use_diff=False))
    assert HfVlm(HfVlmSettings()).bars_packing(config) == (
        "its layers of the kind linear_attention would see one record's tokens from another"
    )


def test_a_packed_step_takes_what_was_rehearsed(tmp_path: Path) -> None:
    table = run_table(write("llava_next", tmp_path))
    table["train"] |= {"packing": True, "batch_size": 4, "micro_batch_size": 2, "max_length": 400}
    table["peft"] = {"use": "lora", "on": ["language.attention", "vision"], "rank": 4}
    plan = resolve(parse_run(table, Path.cwd()), LOOKUP)
    with rehearsing(plan, LOOKUP, Machine(), device="cpu") as watched:
        predicted = watched.take(2)
    with watching(plan, LOOKUP) as watched:
        found = watched.take(2)
    assert predicted.tokens == 400
    assert predicted.footprint.peak == pytest.approx(found.footprint.peak, rel=0.01)
    (images, many), (_, one) = watched.examples
    assert images.what and len(many) > 1 and len(one) == 1
    assert [sum(len(each.input_ids) for each in row) for row in (many, one)] == [400, 400]
    assert one[0].num_label_tokens > sum(each.num_label_tokens for each in many)
