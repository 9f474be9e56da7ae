"""The benchmarks run, their tables are those of the measurements beside them, and what got worse is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import one another by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")


def test_the_tables_of_both_pages_are_those_of_the_measurement() -> None:
    import bench

    told = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    for page in bench.PAGES:
        text = page.read_text(encoding="utf-8")
        assert bench.BEGIN in text and bench.with_table(text, bench.table(told)) == text, (
            "run benchmarks/bench.py --pages"
        )
    assert {row["what"] for row in told["parts"]} >= {"`graftwork ask`", "a step: SmolLM2-135M, 2 long records"}


def measured(**ratios: list[float]) -> dict[str, Any]:
    return {"parts": [{"what": name, "beside": "another", "ratios": values} for name, values in ratios.items()]}


def test_a_ratio_is_worse_when_it_fell_by_more_than_it_varied() -> None:
    import bench

    before = measured(steady=[2.0, 2.1, 2.2], wide=[1.0, 2.0, 3.0], gone=[5.0])
    now = measured(steady=[1.8, 1.8, 1.8], wide=[0.5, 0.5, 1.1], new=[0.1])
    assert bench.worse(now, before) == [
        "steady, beside another: the ratio was 2.10 (2.00 to 2.20) and is 1.80 (1.80 to 1.80)"
    ]
    assert bench.worse(before, before) == []


def test_each_part_has_a_reference_and_both_run(tmp_path: Path) -> None:
    import bench
    from parts import PARTS
    from references import REFERENCES

    assert PARTS.keys() - {"efficientnet"} == REFERENCES.keys(), "only where channels lie is decided there"
    (tmp_path / "collation").mkdir()
    ours, other = PARTS["collation"](tmp_path), REFERENCES["collation"](tmp_path)
    assert [each.tolist() for each in ours()[:4]] == [each.tolist() for each in other()]
    row = bench.measure(bench.Compared("collation", "another", bench.timed(ours), bench.timed(other), 2))
    assert len(row["ratios"]) == len(row["seconds"]) == 2 and min(row["seconds"]) > 0


@pytest.mark.parametrize("check", ["vlm memory", "vlm speed", "vlm answers"])
def test_a_check_for_a_gpu_runs_on_tiny_models(check: str, tmp_path: Path) -> None:
    import measure
    import table

    measure.carry_out(check, tmp_path, 300, tiny=True)
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found and not [case for case, value in found.items() if isinstance(value, dict) and "error" in value]
    told = {
        "begun": "2026-11-30T00:00:00",
        "tiny": True,
        "checks": {check: {"ended": "done", "seconds": 1, "found": found}},
    }
    lines = [*table.lines(told)]
    assert f"### {check}" in lines[1] and all(any(line.startswith(f"| {case} |") for line in lines) for case in found)


def test_a_check_that_fails_or_has_no_time_left_stops_nothing(tmp_path: Path) -> None:
    from report import Report

    report = Report(tmp_path / "found.json", limit=100)
    assert report.take("fails", lambda: 1 / 0) is None
    assert report.take("late", lambda: 1, needs=1000) is None
    assert report.take("works", lambda: {"number": 7}) == {"number": 7}
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fails"]["error"] == "ZeroDivisionError: division by zero"
    assert found["late"]["left out"].endswith(" s were left, and it takes 1000")
    assert found["works"] == {"number": 7}


@pytest.mark.slow
def test_all_checks_for_a_gpu_run_on_tiny_models(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu" / "measure.py", "--tiny", "--seconds", "1200", "--out", tmp_path]
    subprocess.run(command, check=True)
    checks = json.loads((tmp_path / "measure.json").read_text())["checks"]
    assert {check["ended"] for check in checks.values()} == {"done"}
    failed = [
        case
        for name, check in checks.items()
        for case, value in check["found"].items()
        if isinstance(value, dict) and "error" in value and not case.startswith("import for")
    ]
    assert failed == []


@pytest.mark.slow
def test_the_whole_bench_runs(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "bench.py", "--rounds", "1", "--json", tmp_path / "bench.json"]
    subprocess.run(command, check=True)
    assert len(json.loads((tmp_path / "bench.json").read_text())["parts"]) > 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "strategies.py --rounds 1 --steps 1",
        "throughput.py --rounds 1 --steps 2 --batch-size 2",
        "records.py --records 500",
        "packing.py --rounds 1",
        "fixed_costs.py --measure saving",
        "feeding.py --images 8 --rounds 1",
        "memory_targets.py chunked-loss",
    ],
)
def test_the_other_scripts_run(command: str) -> None:
    script, *options = command.split()
    subprocess.run([sys.executable, BENCHMARKS / script, *options], check=True)
