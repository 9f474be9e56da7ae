"""An evaluation asks each question once, never twice, and its numbers follow from the answers that it wrote down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm import Quiz, TinyAssembly, TinyVlm, question, tiny_assembly
from torch import Tensor

from graftwork.conformance import specimens
from graftwork.contracts import BadRecord, Image, Prediction, Record, Turn
from graftwork.contracts.records import RecordCounts
from graftwork.errors import DataError, GraftworkError
from graftwork.evaluate.comparison import compare
from graftwork.evaluate.evaluation import Result, evaluate, image_features
from graftwork.evaluate.generation import answer, encode_prompt
from graftwork.evaluate.questions import read_questions
from graftwork.weights import sha256
from graftwork_lora import Lora, LoraSettings

HASHES = {"checkpoint": "c0ffee", "base": "ba5e"}
QUESTIONS = [
    question(
        f"q{number}",
        f"what is {'xyz'[number % 3]}",
        image=f"{number // 2 % 3}.png",
        group="abc"[number % 3],
        reference="a",
    )
    for number in range(12)
]
BOTH = ("base", "adapter")


def run(out: Path, assembly: TinyAssembly | None = None, quiz: Quiz | None = None, **changes: Any) -> Result:
    options = {"out": out, "hashes": HASHES, "batch_size": 4, "variants": BOTH} | changes
    return evaluate(assembly or tiny_assembly(), quiz or Quiz(*QUESTIONS), **options)  # type: ignore[arg-type]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_variant_gives_the_answers_that_the_model_gives_alone(tmp_path: Path) -> None:
    result = run(tmp_path)
    assembly = tiny_assembly()
    assert [one.record.id for one in result.answered] == [record.id for record in QUESTIONS]
    for one in result.answered:
        prompt = [encode_prompt(assembly, one.record, 4)]
        assert one.answers["adapter"] == answer(assembly, prompt, max_new_tokens=4).texts[0]
        with assembly.disable_adapter():
            assert one.answers["base"] == answer(assembly, prompt, max_new_tokens=4).texts[0]
    assert any(one.answers["base"] != one.answers["adapter"] for one in result.answered)


def test_an_image_is_encoded_once_for_all_its_questions_and_both_variants(tmp_path: Path) -> None:
    assembly = tiny_assembly()
    run(tmp_path, assembly)
    assert len(QUESTIONS) == 12
    assert assembly.model.seen == 3


def test_towers_that_are_trained_look_again_for_the_base(tmp_path: Path) -> None:
    assembly = tiny_assembly(changes_image_features=True)
    assert run(tmp_path / "again", assembly).scores == run(tmp_path / "once").scores
    assert assembly.model.seen == 6


@pytest.mark.parametrize(
    ("encoder", "changes"), [(("",), True), (("blocks.0",), True), (("embedding", "blocks.1"), False)]
)
def test_an_adapter_on_whatever_encodes_images_changes_their_features(encoder: tuple[str, ...], changes: bool) -> None:
    """Of a model without tower slots too: its base must not be answered from the adapter's image features."""
    assembly = specimens.adapt(specimens.assemble(peft=Lora(LoraSettings()), on=("first",)))
    assembly.structure = replace(assembly.structure, image_encoder=encoder)
    assert not assembly.towers
    assert assembly.changes_image_features is changes


def test_questions_with_and_without_images_may_be_mixed(tmp_path: Path) -> None:
    mixed = [QUESTIONS[0], question("plain", "what"), QUESTIONS[1], QUESTIONS[4], question("bare", "who is it")]
    result = run(tmp_path, quiz=Quiz(*mixed))
    assembly = tiny_assembly()
    for one in result.answered:
        prompt = [encode_prompt(assembly, one.record, 4)]
        assert one.answers["adapter"] == answer(assembly, prompt, max_new_tokens=4).texts[0]


class SeesInViews(TinyVlm):
    """Encodes each image in as many views as its pixels say, one after another."""

    def encode_images(self, pixels: Mapping[str, Tensor]) -> Sequence[Tensor]:
        self.seen += len(pixels["eye"])
        return list(pixels["views"].split(pixels["counts"].tolist()))


def test_images_in_different_numbers_of_views_share_an_encoding() -> None:
    assembly = tiny_assembly()
    assembly.model = SeesInViews()
    prompts = []
    for number, names in enumerate(["a", "bb", "ac", "a", "bb"]):
        record = Record(str(number), (Turn("user", "hm"),), tuple(Image(Path(name)) for name in names))
        prompt = assembly.processor.encode(record)
        counts = torch.tensor([1 + ord(name) - ord("a") for name in names])
        views = torch.cat([torch.full((int(n), 3), float(n)) for n in counts])
        prompts.append((record, replace(prompt, pixels={**prompt.pixels, "views": views, "counts": counts})))
    features = image_features(assembly, prompts)
    assert features is not None and assembly.model.seen == 5
    assert [(len(one), float(one[0, 0])) for one in features] == [
        (n, n) for names in ("a", "bb", "ac", "a", "bb") for n in (1 + ord(name) - ord("a") for name in names)
    ]


def test_the_file_tells_who_answered_and_how_much_work_it_was(tmp_path: Path) -> None:
    result = run(tmp_path)
    header, first, described, *_ = lines(tmp_path)
    assert header["checkpoint"] == "c0ffee"
    assert header["evaluator"] == "quiz"
    assert first["run"]["attention"] == {"language": {"plain": 8}}, "both variants decoded four tokens by then"
    assert first["run"]["batch_size"] == 4
    assert described["question"] == "<image>what is x"
    assert described["reference"] == ["a"]
    assert described["answers"].keys() == described["scores"].keys() == described["tokens"].keys() == set(BOTH)
    assert result.provenance["tokens"]["base"] == sum(one.tokens["base"] for one in result.answered) > 0
    assert result.provenance["seconds"] > 0


def test_scores_json_holds_the_scores_of_the_answers(tmp_path: Path) -> None:
    result = run(tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in content["rows"]] == ["accuracy", "a", "b", "c"]
    for variant in BOTH:
        right = [one.answers[variant][:1] == "a" for one in result.answered]
        assert content["rows"][0]["scores"][variant]["value"] == pytest.approx(sum(right) / 12)
        assert content["rows"][0]["scores"][variant]["low"] <= content["rows"][0]["scores"][variant]["value"]
        assert result.scores[variant]["a"] == pytest.approx(sum(right[::3]) / 4)
    assert content["answered"] == 12


@pytest.mark.parametrize("cut", [1, 20, 400, 700])
def test_an_interrupted_evaluation_continues_and_ends_as_if_it_had_not_been(tmp_path: Path, cut: int) -> None:
    whole = run(tmp_path)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assembly = tiny_assembly()
    resumed = run(tmp_path, assembly)
    assert [(one.record.id, one.answers, one.tokens) for one in resumed.answered] == [
        (one.record.id, one.answers, one.tokens) for one in whole.answered
    ]
    assert resumed.rows == whole.rows
    asked = assembly.processor.encoded
    assert 0 < len(asked) < 12
    ids = [line["id"] for line in lines(tmp_path) if "id" in line]
    assert sorted(ids) == sorted(record.id for record in QUESTIONS)


def test_a_finished_evaluation_asks_nothing_again(tmp_path: Path) -> None:
    first, told = run(tmp_path), list[str]()
    assembly = tiny_assembly()
    again = run(tmp_path, assembly, say=told.append)
    assert assembly.model.rows == []
    assert again.rows == first.rows
    assert again.provenance["runs"] == first.provenance["runs"]
    assert "holds 12 answers already" in told[0]


def test_one_variant_is_read_from_a_file_that_holds_both(tmp_path: Path) -> None:
    both = run(tmp_path, limit=6)
    assembly = tiny_assembly()
    one = run(tmp_path, assembly, variants=("adapter",))
    assert one.scores.keys() == {"adapter"}
    assert len(assembly.processor.encoded) == 6
    assert [o.answers["adapter"] for o in one.answered][:6] == [o.answers["adapter"] for o in both.answered]


def test_a_variant_that_was_not_asked_for_is_not_asked_because_another_file_has_it(tmp_path: Path) -> None:
    run(tmp_path, hashes=HASHES | {"checkpoint": "other"})
    assembly = tiny_assembly()
    run(tmp_path, assembly, variants=("adapter",))
    assert lines(tmp_path)[0]["variants"] == ["adapter"]
    assert lines(tmp_path)[2]["answers"].keys() == {"adapter"}


def test_a_question_that_has_changed_is_asked_again(tmp_path: Path) -> None:
    run(tmp_path)
    changed = [question("q0", "something else", image="0.png", group="a", reference="a"), *QUESTIONS[1:]]
    assembly = tiny_assembly()
    result = run(tmp_path, assembly, Quiz(*changed))
    assert assembly.processor.encoded == ["q0"]
    assert result.answered[0].record.question == "<image>something else"


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"hashes": HASHES | {"checkpoint": "other"}}, "checkpoint"),
        ({"quiz": Quiz(*QUESTIONS, hard=True)}, "settings"),
        ({"assembly": tiny_assembly(precision="bf16")}, "precision"),
    ],
)
def test_answers_of_another_model_or_evaluator_are_set_aside(
    tmp_path: Path, changes: dict[str, Any], differing: str
) -> None:
    run(tmp_path)
    before, told = (tmp_path / "answers.jsonl").read_bytes(), list[str]()
    run(tmp_path, **changes, say=told.append)
    assert (tmp_path / "answers.1.jsonl").read_bytes() == before
    assert f"differs in {differing} from this evaluation, so it was set aside as 'answers.1.jsonl'" in told[0]
    assert sum("id" in line for line in lines(tmp_path)) == 12


def test_a_file_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("my precious notes\n", encoding="utf-8")
    run(tmp_path)
    assert (tmp_path / "answers.1.jsonl").read_text(encoding="utf-8") == "my precious notes\n"


def test_without_resume_everything_is_asked_again(tmp_path: Path) -> None:
    run(tmp_path)
    assembly = tiny_assembly()
    run(tmp_path, assembly, resume=False)
    assert len(assembly.processor.encoded) == 12
    assert (tmp_path / "answers.1.jsonl").exists()


def test_when_memory_runs_out_the_batch_is_halved_until_it_fits(tmp_path: Path) -> None:
    told: list[str] = []
    assembly = tiny_assembly(memory=3)
    result = run(tmp_path / "small", assembly, batch_size=8, say=told.append)
    assert told == [
        "8 questions at a time do not fit into the device's memory; going on with 4",
        "4 questions at a time do not fit into the device's memory; going on with 2",
    ]
    assert max(assembly.model.rows) == 2
    assert result.rows == run(tmp_path / "large").rows
    assert result.provenance["runs"][0]["batch_size"] == 2


def test_a_device_that_holds_no_single_question_is_said_so(tmp_path: Path) -> None:
    assembly = tiny_assembly()
    assembly.model.memory = -1
    with pytest.raises(GraftworkError, match="does not hold even one question at a time"):
        run(tmp_path, assembly)


def test_progress_counts_to_the_end_and_includes_what_could_not_be_asked(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    quiz = Quiz(BadRecord("file:1", "no text"), *QUESTIONS[:5], question("bad", "unreadable"))
    run(tmp_path, quiz=quiz, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 6)
    assert told[-1] == (6, 6)
    assert told == sorted(told)


def test_questions_that_cannot_be_asked_are_counted_and_named(tmp_path: Path) -> None:
    long = question("long", "x" * 600)
    quiz = Quiz(BadRecord("file:1", "no text"), QUESTIONS[0], question("bad", "unreadable"), long)
    result = run(tmp_path, quiz=quiz)
    assert [one.record.id for one in result.answered] == ["q0"]
    assert [bad.where for bad in result.bad] == ["file:1", "quiz:bad", "quiz:long"]
    assert "the model reads 512, so there is no room" in result.bad[2].why
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (content["questions"], content["answered"], len(content["bad"])) == (4, 1, 3)
    assert result.counts == RecordCounts(4, 1, 3)
    assert result.unanswered().startswith("3 of 4 questions could not be asked; ")


def test_an_answer_that_gets_lost_is_a_bug_and_no_smaller_number_of_questions(tmp_path: Path) -> None:
    unlike_its_line = replace(QUESTIONS[1], reference=["a list"])  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="of 2 records 1 were used and 0 left out"):
        run(tmp_path, quiz=Quiz(QUESTIONS[0], unlike_its_line))


@pytest.mark.parametrize("broken", [BadRecord("file:1", "no text"), question("bad", "unreadable")])
def test_strict_data_ends_an_evaluation_at_a_bad_question(tmp_path: Path, broken: Record | BadRecord) -> None:
    with pytest.raises(DataError, match=r"malformed|cannot be read"):
        run(tmp_path, quiz=Quiz(*QUESTIONS, broken), strict=True)


def test_an_evaluator_without_questions_is_an_error() -> None:
    with pytest.raises(DataError, match="'quiz' holds no question; check where it reads its data"):
        read_questions(Quiz())
    with pytest.raises(DataError, match=r"holds no question \(the first of 1 malformed ones: file:1: no text\)"):
        read_questions(Quiz(BadRecord("file:1", "no text")))


def test_an_evaluation_in_which_nothing_could_be_asked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 questions of 'quiz' could be asked"):
        run(tmp_path, quiz=Quiz(question("bad", "unreadable")))


def test_two_questions_of_one_id_are_an_error() -> None:
    with pytest.raises(DataError, match="'quiz' has two questions with the id 'q0'"):
        read_questions(Quiz(QUESTIONS[0], QUESTIONS[0]))


def test_a_limit_takes_the_first_questions_and_reads_no_further() -> None:
    records, _ = read_questions(Quiz(*QUESTIONS[:3], QUESTIONS[0]), limit=3)
    assert [record.id for record in records] == ["q0", "q1", "q2"]


PAIRS = [replace(record, unit=f"u{number // 2}") for number, record in enumerate(QUESTIONS)]


@pytest.mark.parametrize(("limit", "read"), [(1, 2), (2, 4), (6, 12), (7, 12), (None, 12)])
def test_a_limit_takes_whole_questions(limit: int | None, read: int) -> None:
    assert len(read_questions(Quiz(*PAIRS), limit=limit)[0]) == read


def test_a_whole_and_a_question_alone_count_one_each() -> None:
    mixed = [QUESTIONS[0], *PAIRS[2:4], QUESTIONS[4], PAIRS[6]]
    for limit, ids in ((1, ["q0"]), (2, ["q0", "q2", "q3"]), (3, ["q0", "q2", "q3", "q4"])):
        assert [record.id for record in read_questions(Quiz(*mixed), limit=limit)[0]] == ids


def test_scores_json_and_the_notes_say_what_they_were_limited_to(tmp_path: Path) -> None:
    result = run(tmp_path, quiz=Quiz(*PAIRS), limit=2)
    said = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (said["limit"], said["answered"]) == (2, 4)
    assert said["notes"][0] == "By a limit, the scores are of the first 2 whole questions alone (4 prompts)."
    assert compare(result).notes[1] == said["notes"][0]
    assert compare(result).to_json()["limit"] == 2
    for limit in (None, 7):
        assert run(tmp_path, quiz=Quiz(*PAIRS), limit=limit).limit is None
        assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["limit"] is None


class Handing(Quiz):
    """A benchmark with a file to hand in"""

    def write(self, answered: Sequence[Prediction], folder: Path) -> None:
        (folder / "hand-in.txt").write_text(" ".join(one.record.id for one in answered), encoding="utf-8")


def test_a_benchmark_writes_its_own_file_once_all_is_answered(tmp_path: Path) -> None:
    run(tmp_path, quiz=Handing(*QUESTIONS[:3]))
    assert (tmp_path / "hand-in.txt").read_text(encoding="utf-8") == "q0 q1 q2"


class CannotHandIn(Quiz):
    """A benchmark whose file cannot be written"""

    def write(self, answered: Sequence[Prediction], folder: Path) -> None:
        raise GraftworkError("the file was not written, which needs a pen: pip install pen")


def test_scores_stand_where_the_benchmarks_own_file_cannot_be_written(tmp_path: Path) -> None:
    said: list[str] = []
    result = run(tmp_path, quiz=CannotHandIn(*QUESTIONS[:3]), say=said.append)
    assert said == ["quiz: the file was not written, which needs a pen: pip install pen"]
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["answered"] == len(result.answered) == 3


def test_scores_json_tells_the_mean_with_unanswered_questions_as_zero(tmp_path: Path) -> None:
    result = run(tmp_path, quiz=Quiz(*QUESTIONS, *[BadRecord(f"f:{n}", "odd") for n in range(4)]))
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    for variant in BOTH:
        assert content["mean_with_unanswered_as_zero"][variant] == pytest.approx(
            result.scores[variant]["accuracy"] * 12 / 16
        )


def test_that_answers_are_cut_where_the_model_reads_no_further_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, tiny_assembly(context=13), say=said.append)
    assert said == [
        "the model reads 13 tokens, which leaves 2 of 4 for the answer to 'q0'; longer answers are cut there"
    ]
    assert max(line["tokens"]["base"] for line in lines(tmp_path)[2:]) == 2


def test_scores_name_the_models_the_tokens_the_time_and_the_hash_of_the_answers(tmp_path: Path) -> None:
    run(tmp_path)
    said = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["provenance"]
    assert {name: said[name] for name in HASHES} == HASHES
    written = lines(tmp_path)[2:]
    assert said["tokens"] == {variant: sum(line["tokens"][variant] for line in written) for variant in BOTH}
    assert min(said["tokens"].values()) >= len(QUESTIONS)
    assert said["seconds"] == pytest.approx(sum(line["seconds"] for line in written), abs=0.01)
    file = tmp_path / said["answers"]["file"]
    assert said["answers"]["sha256"] == sha256(file)
    file.write_text(file.read_text(encoding="utf-8").replace('"adapter": "', '"adapter": "forged', 1), encoding="utf-8")
    assert said["answers"]["sha256"] != sha256(file), "scores whose answers were changed afterwards do not match them"


def test_there_is_no_score_without_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 questions of 'quiz' could be asked"):
        run(tmp_path, quiz=Quiz(question("bad", "unreadable")))
    assert not (tmp_path / "scores.json").exists()
