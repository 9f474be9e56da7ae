"""`graftwork data value`: what is refused before anything is trained, what is said, and that resuming changes nothing."""

from __future__ import annotations

import io
import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

import graftwork as gw
from graftwork.cli import main
from graftwork.cli.value import print_value
from graftwork.contracts import CheckpointSaved, RunStarted
from graftwork.errors import DataError, PlanRefused, RunFileError
from graftwork.evaluate.seeds import DataComparison, SeedRow, SeedScores
from graftwork.evaluate.statistics import Interval
from graftwork.jobs.data_value import DataValue, value_data
from graftwork.report.value import ValueReport, render_fragment, render_markdown, write_value_report
from graftwork.report.value_wording import DataRuns, caveats, undecided, worse

SMALL = {
    'kind = "open"': 'kind = "open"\nlimit = 32',
    "epochs = 1": "steps = 5",
    "batch_size = 32": "batch_size = 4",
    "learning_rate = 2e-3": "learning_rate = 1e-2",
    "per_group = 200": "per_group = 2",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folder as the working directory, with other data: records that all have one answer, and none at all."""
    with as_file(files("graftwork_demo")) as source:
        shutil.copytree(source, tmp_path, ignore=shutil.ignore_patterns("*.py", "__pycache__"), dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    text = Path("demo.toml").read_text(encoding="utf-8")
    for large, small in SMALL.items():
        assert large in text
        text = text.replace(large, small)
    Path("demo.toml").write_text(text, encoding="utf-8")
    asked = {"from": "human", "value": "is it?"}
    same = [{"id": str(number), "conversations": [asked, {"from": "gpt", "value": "yes"}]} for number in range(16)]
    Path("same.jsonl").write_text("".join(json.dumps(each) + "\n" for each in same), encoding="utf-8")
    Path("empty.jsonl").write_text(json.dumps({**same[0], "image": "none.png"}) + "\n", encoding="utf-8")
    return tmp_path


def value(
    *data: str, events: list[Any] | None = None, changes: dict[str, Any] | None = None, **options: Any
) -> DataValue:
    run = gw.load_run("demo.toml", changes or {})
    return value_data(run, data, on_event=(events if events is not None else []).append, **options)


def started(events: list[Any]) -> list[tuple[str, int]]:
    """The runs that were carried out, by their folders, and the step from which each went on."""
    return [("/".join(each.out.parts[-2:]), each.step) for each in events if isinstance(each, RunStarted)]


def test_two_seeds_are_refused_because_of_the_noise_between_seeds(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 seeds cannot show the noise between seeds, .* give at least 3 with --seeds"
    ) as raised:
        value("same.jsonl", seeds=2)
    assert raised.value.details == () and not Path("data-value").exists()


def test_a_run_without_an_evaluator_is_refused(folder: Path) -> None:
    text = Path("demo.toml").read_text(encoding="utf-8")
    Path("blind.toml").write_text(text.partition("[evaluate]")[0], encoding="utf-8")
    with pytest.raises(DataError, match=r"the run names no evaluator, .* installed: .*easy-vqa"):
        value_data("blind.toml", ["same.jsonl"])


def test_data_without_records_is_refused_before_anything_is_trained(folder: Path) -> None:
    events: list[Any] = []
    with pytest.raises(DataError, match="'empty': no record is left of 1 that were read"):
        value("same.jsonl", "empty.jsonl", events=events)
    assert not started(events) and not Path("data-value").exists()


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").touch()
    Path("bad.toml").write_text('[[data.source]]\nuse = "llava-jsn"\npath = "x"\n', encoding="utf-8")
    with pytest.raises(PlanRefused, match="for 4 reasons") as raised:
        value("none.json", "bad.toml", out="out", seeds=1)
    told = "\n".join(raised.value.details)
    assert "1 seed cannot" in told and "no file or folder 'none.json'" in told
    assert "did you mean 'llava-json'" in told and "'out' is there already; go on with --resume" in told
    with pytest.raises(DataError, match=r"'out' holds 'notes\.txt', and no comparison of data"):
        value("same.jsonl", out="out", resume=True)
    with pytest.raises(RunFileError, match="there is no run file"):
        value_data("none.toml", ["same.jsonl"])
    with pytest.raises(DataError, match="there is no other data"):
        value()


def test_the_worth_of_data_is_said_and_resuming_does_no_run_twice(folder: Path) -> None:
    events: list[Any] = []

    def stop(event: object) -> None:
        events.append(event)
        if isinstance(event, CheckpointSaved) and event.out.parts[-2:] == ("own", "seed-19"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        value_data("demo.toml", ["same.jsonl"], on_event=stop)
    names = [f"{name}/seed-{seed}" for seed in (17, 18, 19) for name in ("own", "same")]
    assert started(events) == [(name, 0) for name in names[:-1]]
    with pytest.raises(DataError, match="'data-value' is there already; go on with --resume"):
        value("same.jsonl")

    events.clear()
    made = value("same.jsonl", resume=True, events=events)
    assert started(events) == [("own/seed-19", 5), ("same/seed-19", 0)]
    own, same = made.report.runs
    assert (own.healthy, own.records, own.steps) == ([17, 18, 19], 32, 5)
    assert (same.healthy, [*same.unhealthy], same.records) == ([], [17, 18, 19], 16)
    (compared,) = made.report.comparisons
    assert [*compared.rows[0].data] == ["own"] and compared.questions == 6 and compared.rows[0].base is not None
    whole = Path("data-value/report.json").read_text(encoding="utf-8")

    command = ["data", "value", "demo.toml", "--with", "same.jsonl", "-o", "data-value", "--resume", "--device", "cpu"]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {**json.loads(whole), "out": "data-value"}
    done = CliRunner().invoke(main, [*command, "--seeds", "2"])
    assert done.exit_code == 1 and done.stderr.startswith("Error: 2 seeds cannot show")

    with pytest.raises(DataError, match="was begun with another run, or with other data as 'own' and 'same'"):
        value("same.jsonl", resume=True, changes={"train.learning_rate": 1e-3})
    Path("same.jsonl").write_text(Path("same.jsonl").read_text(encoding="utf-8").replace("yes", "no"), encoding="utf-8")
    with pytest.raises(DataError, match="was begun with another run, or with other data as 'same'"):
        value("same.jsonl", resume=True)


def test_other_data_replaces_sources_and_operators_alone(folder: Path) -> None:
    """The other keys of [data] stay those of the run; a mix comes with its sources."""
    from graftwork.jobs.data_value import _Mistakes, _resolve
    from graftwork.jobs.run import installed

    text = '[data]\nstrict = true\ntrain_on = "last"\n[[data.source]]\nuse = "easy-vqa"\nweight = 0.5\n[[data.source]]\nuse = "easy-vqa"\n'
    for name in ("mine", "theirs"):
        Path(name).mkdir()
        Path(name, "mixed.toml").write_text(text, encoding="utf-8")
    run = gw.load_run("demo.toml", {"data.validation": 0.1})
    plans, given = _resolve(
        run, ["mine/mixed.toml", "theirs/mixed.toml", "mine/mixed.toml"], 3, installed(), _Mistakes()
    )
    assert [*plans] == ["own", "mixed", "theirs-mixed", "mine-mixed"] and given["mixed"] == "mine/mixed.toml"
    own, other = plans["own"].run_context, plans["mixed"].run_context
    assert (other.validation, other.strict_data, other.train_on) == (0.1, False, "all")
    assert len(other.sources) == 2 and not other.operators and other.mix[0].weight == 0.5
    assert len(own.sources) == 1 and own.operators and not own.mix


# What is said ---------------------------------------------------------------------------------------------------------


def scores(value: float, over_own: Interval | None, over_base: float = 0.3) -> SeedScores:
    by_seed = {seed: value + shift for seed, shift in ((17, -0.01), (18, 0.0), (19, 0.01))}
    base = Interval(over_base, over_base - 0.1, over_base + 0.1)
    return SeedScores(by_seed, Interval(value, value - 0.02, value + 0.02), base, over_own)


@pytest.fixture
def report() -> ValueReport:
    """A report on data that hurts shapes, and on colours of which nothing can be told."""
    own = {"accuracy": 0.9, "colour": 0.92, "shape": 0.88, "yes ratio": 0.5}
    changes = {
        "accuracy": Interval(-0.06, -0.08, -0.04),
        "colour": Interval(0.002, -0.03, 0.034),
        "shape": Interval(-0.123, -0.15, -0.096),
        "yes ratio": Interval(-0.2, -0.3, -0.1),
    }
    rows = tuple(
        SeedRow(
            name,
            100,
            name != "yes ratio",
            0.3,
            {
                "own": scores(own[name], None),
                "un|filtered": scores(own[name] + change.value, change, -0.2 if name == "shape" else 0.3),
            },
        )
        for name, change in changes.items()
    )
    compared = DataComparison("easy-vqa", "accuracy", "own", True, 300, 250, 4, rows)
    runs = [
        DataRuns("own", "the run itself", 1000, 30, [17, 18, 19]),
        DataRuns("un|filtered", "x.json", 4000, 120, [17, 18, 19]),
    ]
    return ValueReport("What data is worth: lora", runs, [17, 18, 19], [compared], {"graftwork": "0.1.0"})


def test_sentences_say_where_data_hurts_and_what_cannot_be_told(report: ValueReport) -> None:
    (compared,) = report.comparisons
    assert worse(compared) == [
        "accuracy: 'un|filtered' is 6.0 points worse than the run's own data [-8.0, -4.0].",
        "shape: 'un|filtered' is 12.3 points worse than the run's own data [-15.0, -9.6].",
        "shape: 'un|filtered' is 20.0 points below the base [-30.0, -10.0].",
    ]
    assert undecided(compared) == [
        "'un|filtered' cannot be told from the run's own data, for the noise: colour +0.2 [-3.0, +3.4]."
    ]
    told = "\n".join(report.caveats)
    assert "different numbers of steps (30 on 'own', 120 on 'un|filtered')" in told
    assert "4 of 304 questions of easy-vqa could not be asked" in told
    few = [DataRuns("own", "", 9, 9, [17, 18], {19: "did not learn: no loss changed"})]
    assert [*caveats(few, ())] == [
        "Run of 'own' with the seed 19 left out, for what is wrong: did not learn: no loss changed.",
        "'own' has 2 healthy runs, and so no interval: it takes 3 seeds to tell their noise.",
    ]
    assert ValueReport("", few, [17], []).findings == {"Nothing can be said": ["No run is healthy."]}


def test_the_page_holds_a_picture_and_says_what_the_table_says(report: ValueReport, tmp_path: Path) -> None:
    write_value_report(tmp_path, report)
    page, text = ((tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for said in (page, text):
        assert "12.3 points worse than the run" in said and "-12.3 [-15.0, -9.6]" in said
    rows, lanes, seeds = 4, 2, 3
    assert page.count('class="seed data-') == rows * lanes * seeds
    assert page.count('class="interval data-') == page.count('class="mean data-') == rows * lanes
    assert page.count('class="majority" x1') == rows and "<script" not in page
    assert "| shape | base | 30.0% |" in text and "un\\|filtered" in text
    assert "<svg" in render_fragment(report) and render_markdown(report) == text
    assert json.loads((tmp_path / "report.json").read_text())["seeds"] == [17, 18, 19]


def test_a_terminal_of_eighty_columns_shows_the_whole_table(report: ValueReport) -> None:
    output = io.StringIO()
    print_value(Console(file=output, width=80, highlight=False), report)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in output.getvalue()
    assert any(line.split()[:2] == ["shape", "base"] for line in lines)
    assert any("75.7%" in line and "74.7% to 76.7%" in line and "-12.3 [-15.0, -9.6]" in line for line in lines)
