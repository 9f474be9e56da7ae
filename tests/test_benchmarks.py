"""The benchmarks run, their tables are those of the measurements beside them, and what got worse is said."""

from __future__ import annotations

import json
import signal
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


def a_report(tmp_path: Path, limit: float = 300, **found: Any) -> Any:
    """The report of a check `one`, of which `found` is known from before."""
    import kept
    from report import Report

    entry = {"ended": "begun", "seconds": 0.0, "found": found}
    kept.write(
        file := tmp_path / "measure.json", {"begun": "2026-11-30T00:00:00", "tiny": True, "checks": {"one": entry}}
    )
    return Report(file, "one", limit)


def found_in(folder: Path, check: str = "one") -> dict[str, Any]:
    """What the file of all checks has of one."""
    found: dict[str, Any] = json.loads((folder / "measure.json").read_text())["checks"][check]["found"]
    return found


@pytest.mark.parametrize("check", ["vlm memory", "vlm speed", "vlm answers"])
def test_a_check_for_a_gpu_runs_on_tiny_models(check: str, tmp_path: Path) -> None:
    import kept
    import measure
    import table

    told = {"begun": "2026-11-30T00:00:00", "tiny": True}
    kept.write(
        file := tmp_path / "measure.json", told | {"checks": {check: {"ended": "begun", "seconds": 1, "found": {}}}}
    )
    measure.carry_out(check, file, 300, tiny=True)
    found = found_in(tmp_path, check)
    assert found and not [case for case, value in found.items() if isinstance(value, dict) and "error" in value]
    lines = [*table.lines(kept.read(file))]
    assert f"### {check}" in lines[1] and all(any(line.startswith(f"| {case} |") for line in lines) for case in found)


def test_a_check_that_fails_or_has_no_time_left_stops_nothing(tmp_path: Path) -> None:
    report = a_report(tmp_path, limit=100)
    assert report.take("fails", lambda: 1 / 0) is None
    assert report.take("late", lambda: 1, needs=1000) is None
    assert report.take("works", lambda: {"number": 7}) == {"number": 7}
    found = found_in(tmp_path)
    assert found["fails"]["error"] == "ZeroDivisionError: division by zero"
    assert found["late"]["left out"].endswith(" s were left, and it takes 1000")
    assert found["works"] == {"number": 7}


def test_a_further_call_carries_out_only_what_is_missing(tmp_path: Path) -> None:
    report = a_report(tmp_path, was=3, failed={"error": "it did not end"}, late={"left out": "no time"})
    assert [report.take(case, lambda: 5) for case in ("was", "failed", "late", "new")] == [3, None, 5, 5]
    assert found_in(tmp_path) == {"was": 3, "failed": {"error": "it did not end"}, "late": 5, "new": 5}


def test_a_case_is_in_the_file_while_it_goes_on(tmp_path: Path) -> None:
    assert a_report(tmp_path).take("first", lambda: found_in(tmp_path)) == {"first": {"error": "it did not end"}}


def test_an_error_after_which_the_device_answers_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import report as module

    def clean() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module, "clean", clean)
    with pytest.raises(SystemExit):
        a_report(tmp_path).take("fails", lambda: 1 / 0)
    found = found_in(tmp_path)
    assert found["fails"]["error"] == "ZeroDivisionError: division by zero"
    assert "illegal memory access" in found["after fails"]["error"]


def test_a_measurement_is_kept_without_its_prediction() -> None:
    import memory

    def fails() -> int:
        raise TimeoutError("too slow")

    assert memory.beside({"allocated": 4}, fails) == {
        "predicted": None,
        "not predicted": "TimeoutError: too slow",
        "allocated": 4,
    }
    assert memory.beside({"allocated": 4}, lambda: 5)["predicted over allocated"] == 1.25


def test_plans_for_a_gpu_need_no_optional_package_but_that_of_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    from subject import Size

    from graftwork.contracts import component

    def missing(requires: component.Requires) -> list[str]:
        return [package for package in requires.packages if not package.startswith(("peft", "bitsandbytes"))]

    monkeypatch.setattr(component, "missing_requirements", missing)
    for subject in (each for tiny in (True, False) for each in (Size(tiny).mgm, Size(tiny).vlm)):
        for strategies, micro in subject.plans:
            assert subject.plan(strategies, micro).run_context.train.micro_batch_size == micro


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import measure
measure.__file__ = sys.argv[2]
from pathlib import Path
measure.run(measure.CHECKS[0], Path(sys.argv[3]), 300, True)
"""
CHILD = """
import os, subprocess, sys, time
sys.path.insert(0, {folder!r})
import measure
measure.end_with_parent()
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], stdin=subprocess.DEVNULL)
print(os.getpid(), other.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_check_ends_with_the_command_that_has_begun_it(number: signal.Signals, tmp_path: Path) -> None:
    (child := tmp_path / "child.py").write_text(CHILD.format(folder=str(BENCHMARKS / "gpu")))
    command = [sys.executable, "-c", PARENT, BENCHMARKS / "gpu", child, tmp_path / "measure.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        children = [int(each) for each in parent.stdout.readline().split()]
        parent.send_signal(number)
        parent.stdout.read()  # ends when nobody can write any more: the check and what it has started
    assert len(children) == 2 and parent.returncode == -number


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
