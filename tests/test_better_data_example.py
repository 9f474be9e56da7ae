"""The example from images without labels to what verified labels are worth, shortened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "better-data" / "better_data.py"


@pytest.mark.slow
def test_verified_labels_are_right_and_their_worth_is_said_by_group(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--images", "400", "--steps", "100", "--questions", "40", "--out", tmp_path]
    # One thread: other tests run at the same time, and threads that wait for each other take their time away.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    work = tmp_path / "out"
    verified = json.loads((work / "verified" / "manifest.json").read_text())
    groups = {group["group"]: group for group in verified["verification"]["groups"]}
    assert groups["shape"]["kept"] == 0 and groups["shape"]["why"], "the base knows nothing of shapes"
    assert groups["colour"]["kept"] == verified["records"] and groups["colour"]["control_affirmed"] == 0
    kept = next(line for line in done.stdout.splitlines() if line.startswith("| colour | kept |"))
    assert float(kept.split("|")[4].strip().rstrip("%")) >= 98
    report = json.loads((work / "value" / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["own", "unfiltered", "human"] and len(report["seeds"]) == 3
    assert (work / "verified" / "README.md").is_file() and (work / "value" / "report.html").is_file()
