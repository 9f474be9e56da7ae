"""Answers that do not end by themselves, and answers whose end was cut off in training, are counted and said wherever one looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from rich.console import Console
from tiny_runs import Run
from tiny_vlm import STOP, Quiz, question, tiny_assembly

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import open_checkpoint
from graftwork.cli import main
from graftwork.cli.printing import print_comparison, print_scores
from graftwork.contracts import DictLookup, Image, Record, Turn
from graftwork.evaluate.comparison import compare
from graftwork.evaluate.evaluation import Result, evaluate
from graftwork.evaluate.generation import answer, encode_prompt
from graftwork.jobs.outcome import data_notes, notes
from graftwork.report import ReportContent, write_report
from graftwork.train.loop import Outcome

QUESTIONS = [question(f"q{n}", f"what is {'xyz'[n % 3]}", image=f"{n}.png", reference="ab"[n % 2]) for n in range(6)]
HASHES = {"checkpoint": "c0ffee", "base": "ba5e"}


def evaluated(out: Path, stop: float, *variants: str) -> Result:
    """The quiz asked of a model whose answers, the larger `stop` is, end the sooner."""
    assembly: Any = tiny_assembly()
    with torch.no_grad():
        assembly.model.head.bias[STOP] = stop
    return evaluate(assembly, Quiz(*QUESTIONS), out=out, hashes=HASHES, variants=variants or ("base", "adapter"))


def printed(show: Callable[[Console, Any], None], what: Any) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        show(console, what)
    return capture.get()


def test_answers_that_do_not_end_are_in_the_scores_the_terminal_and_the_report(tmp_path: Path) -> None:
    result = evaluated(tmp_path, -1e3)
    saved = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert saved["answers_not_ended"] == {"base": 6, "adapter": 6}
    sentence = (
        "Of 6 answers 6 (base) and 6 (adapter) did not end by themselves: they were stopped at 4 tokens, or where the model's "
        "context ends."
    )
    assert sentence in printed(print_comparison, compare(result))
    write_report(tmp_path / "report", ReportContent("A quiz", comparisons=[compare(result)]))
    assert sentence in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert sentence in page.replace("&#x27;", "'")
    alone = evaluated(tmp_path / "alone", -1e3, "adapter")
    assert "Of 6 answers 6 (adapter) did not end by themselves" in printed(print_scores, alone)


def test_where_all_answers_end_nothing_is_said(tmp_path: Path) -> None:
    result = evaluated(tmp_path, 1e3)
    assert result.to_json()["answers_not_ended"] == {"base": 0, "adapter": 0}
    assert "did not end" not in printed(print_comparison, compare(result))
    alone = evaluated(tmp_path / "alone", 1e3, "adapter")
    assert "did not end" not in printed(print_scores, alone)


def test_a_continued_evaluation_counts_the_same_and_older_files_are_judged_by_their_tokens(tmp_path: Path) -> None:
    result = evaluated(tmp_path, 0.0)
    assert evaluated(tmp_path, 0.0).not_ended == result.not_ended
    file = tmp_path / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(set(line["ended"]) == {"base", "adapter"} for line in lines if "id" in line)
    older = [{key: value for key, value in line.items() if key != "ended"} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in older), encoding="utf-8")
    at_limit = {v: sum(line["tokens"][v] >= 4 for line in lines if "id" in line) for v in ("base", "adapter")}
    assert evaluated(tmp_path, 0.0).not_ended == at_limit


def test_ask_says_when_it_stopped_at_its_limit(trained: Run, lookup: DictLookup, tmp_path: Path) -> None:
    from PIL import Image as PILImage

    image = tmp_path / "red.png"
    PILImage.new("RGB", (40, 32), "red").save(image)
    assembly = open_checkpoint(trained.checkpoint, lookup, device="cpu").assembly
    record = Record("question", (Turn("user", "<image>\nwhat colour is it?"),), (Image(image),))
    said: dict[int, str] = {}
    for most in (1, 2, 5):
        prompt = [encode_prompt(assembly, record, most)]
        given = {"adapter": answer(assembly, prompt, max_new_tokens=most)}
        with assembly.disable_adapter():
            given = {"base": answer(assembly, prompt, max_new_tokens=most), **given}
        command = ["ask", str(trained.checkpoint), str(image), "what colour is it?", "--base", "--device", "cpu"]
        done = CliRunner().invoke(main, [*command, "--max-new-tokens", str(most)])
        assert done.exit_code == 0, done.output
        assert [line[:9] for line in done.stdout.splitlines()] == ["base:    ", "adapter: "]
        said[most] = done.stderr
        assert said[most] == "".join(
            f"the {variant}'s answer did not end by itself, and was stopped at {most} token{'s' * (most != 1)}; allow more, "
            "unless the model's context ends there\n"
            for variant, answers in given.items()
            if not answers.ended[0]
        )
    assert "base" in said[1]


def test_answers_that_training_cut_are_counted_in_the_outcome_the_checkpoint_and_the_notes(
    go: Callable[..., Outcome],
) -> None:
    outcome = go({"data.source": [{"use": "shapes", "long": [1, 5]}], "train.too_long": "cut", "train.steps": 1})
    assert outcome.data["answers_cut"] == manifest.read(outcome.checkpoint).data["answers_cut"] == 2
    sentence = (
        "2 answers were cut, so that where they end was not learned, and what the model learned of them may go on for ever; "
        'train.too_long = "skip" leaves such records out.'
    )
    assert sentence in notes(outcome.data) and sentence in list(data_notes(outcome.data))
    assert not any("answers were cut" in note for note in notes({**outcome.data, "answers_cut": 0}))
