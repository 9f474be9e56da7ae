"""Where a template writes earlier answers otherwise, a record becomes a sample for each answer that is trained on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vlm_families import CHATML, PARTS, write
from vlm_trial import built, labelled, run_table, seen

from graftwork import NoSettings
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DataSource, DictLookup, Plan, Record, Turn
from graftwork.data.samples import SampleOfEachAnswer, SampleSettings
from graftwork.data.splitting import held_out
from graftwork.data.training_data import load_training_data
from graftwork_hf_vlm import HfVlm
from graftwork_lora import Lora
from graftwork_torch_attention import Eager, Sdpa

THINKING = CHATML.replace(
    PARTS,
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}" + PARTS,
).replace("IMAGE", "<|image_pad|>")


class Talks(DataSource[NoSettings]):
    """Two conversations"""

    name = "talks"
    Settings = NoSettings

    def records(self) -> Iterator[Record]:
        """One with an image in each question, and one of three answers, of which the data excludes one."""
        asked = [("user", "<image>\nWhat is it?"), ("assistant", "red"), ("user", "<image>\nAnd it?")]
        turns = tuple(Turn(role, text) for role, text in [*asked, ("assistant", "blue")])  # type: ignore[arg-type]
        yield Record("images", turns, (seen("red", 64, 64), seen("blue", 64, 64)))
        said = tuple(
            turn
            for number in range(3)
            for turn in (
                Turn("user", f"Say {number}."),
                Turn("assistant", f"{number}", trained=False if number == 1 else None),
            )
        )
        yield Record("text", said)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write("qwen2_5_vl", tmp_path_factory.mktemp("thinking"))
    (folder / "chat_template.jinja").write_text(THINKING)
    return folder


def plan_of(folder: Path, train_on: str) -> tuple[Plan, DictLookup]:
    lookup = DictLookup(HfVlm, Sdpa, Eager, Lora, Talks)
    table = run_table(folder)
    table["data"] = {"source": [{"use": "talks"}], "train_on": train_on}
    table["train"] |= {"max_length": 512}
    return resolve(parse_run(table, Path.cwd()), lookup), lookup


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("all", {"images": "red", "images/answer 2": "blue", "text": "0", "text/answer 2": "2"}),
        ("last", {"images": "blue", "text": "2"}),
    ],
)
def test_each_answer_is_the_last_of_a_sample_of_its_own(train_on: str, wanted: dict[str, str], thinking: Path) -> None:
    assembly = built(thinking)
    data = load_training_data(*plan_of(thinking, train_on), assembly.processor)
    found = {record.id: labelled(assembly, record) for record in data.records}
    assert found == {name: [f"<think>\n\n</think>\n\n{answer}<|im_end|>"] for name, answer in wanted.items()}
    assert [len(record.images) for record in data.records][:1] == [1 if train_on == "all" else 2]
    assert data.counts.used == len(wanted) and not data.bad
    assert data.stages[-1] == ("sample-of-each-answer", len(wanted), len(wanted), 0)
    encoded = [assembly.processor.encode(record) for record in data.records]
    assert data.lengths.tolist() == [len(each.input_ids) for each in encoded]


def test_other_templates_train_all_answers_of_a_record_at_once(tmp_path: Path) -> None:
    processor: Any = built(write("qwen2_5_vl", tmp_path)).processor
    assert not processor.trains_last_answer_only
    data = load_training_data(*plan_of(tmp_path, "all"), processor)
    assert [record.id for record in data.records] == ["images", "text"]


def test_a_template_that_leaves_out_earlier_thoughts_is_found(tmp_path: Path) -> None:
    folder = write("qwen2_5_vl", tmp_path / "base")
    shutil.copytree(folder, tmp_path / "strip")
    template = (folder / "chat_template.jinja").read_text()
    stripping = template.replace(
        "part['text']", "part['text'] if loop.length > 1 or last else part['text'].split('</think>\\n\\n')[-1]"
    ).replace("{% for part", "{% set last = loop.last %}{% for part")
    (tmp_path / "strip" / "chat_template.jinja").write_text(stripping)
    processor: Any = built(tmp_path / "strip").processor
    assert processor.trains_last_answer_only
    said = [("user", "A?"), ("assistant", "<think>\n1\n</think>\n\nB"), ("user", "C?"), ("assistant", "D")]
    record = Record("thought", tuple(Turn(role, text) for role, text in said))  # type: ignore[arg-type]
    first, second = SampleOfEachAnswer(SampleSettings("all")).apply([record], seed=0)
    assembly = built(tmp_path / "strip")
    assert labelled(assembly, first) == ["<think>\n1\n</think>\n\nB<|im_end|>"]
    assert labelled(assembly, second) == ["D<|im_end|>"]


def test_samples_of_a_record_without_images_stay_on_one_side() -> None:
    records = [
        each
        for number in range(40)
        for each in (
            Record(f"{number}", (Turn("user", "A?"),)),
            Record(f"{number}/answer 2", (Turn("user", "A?"),), meta={"made_by": "x", "of": [f"{number}"]}),
        )
    ]
    sides = held_out(records, 0.5, seed=1)
    assert sides.any() and not sides.all()
    assert (sides[0::2] == sides[1::2]).all()
