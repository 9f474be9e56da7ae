"""The Python interface: the page about it runs, and a run in Python is the run of the command."""

from __future__ import annotations

import gc
import io
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image as PILImage

import graftwork as gw
from graftwork.cli import main
from graftwork.contracts import RunEnded
from graftwork.weights import sha256
from graftwork_hf_vlm.model import VisionLanguage

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
SMALL = {
    "train.steps": 3,
    "train.batch_size": 4,
    "data.source.0.limit": 12,
    "evaluate.easy-vqa.per_group": 2,
}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folder, as the working directory."""
    folder = tmp_path / "demo"
    with as_file(files("graftwork_demo")) as source:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(folder)
    return folder


def test_importing_graftwork_imports_no_torch() -> None:
    program = "import sys, graftwork as gw; gw.Run, gw.load_run; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(gw, name) for name in gw.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gw.trian  # type: ignore[attr-defined]  # noqa: B018


def test_the_page_runs(demo: Path) -> None:
    PILImage.new("RGB", (64, 64), "red").save("shapes.png")
    names: dict[str, Any] = {}
    output = io.StringIO()
    with redirect_stdout(output):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
    result, compared = names["result"], names["compared"]
    assert result.verdict.healthy
    scored = names["checkpoint"].evaluate("easy-vqa", limit=2, out="scores")
    assert (scored.folder, scored.result.limit) == (Path("scores"), 2)
    assert [loss for loss in names["losses"] if loss] == [row["loss"] for row in result.log]
    assert "<polyline" in result._repr_html_() and "<table" in result._repr_html_()
    assert "| accuracy |" in str(compared) and "<table" in compared._repr_html_()
    assert "train.epochs: found 'many'" in output.getvalue()


def test_a_run_in_python_gives_the_weights_of_the_command_to_the_last_bit(demo: Path) -> None:
    with suppress(gw.GraftworkError):  # three steps are too few to learn anything
        gw.train(gw.load_run("demo.toml", SMALL), "python")
    changes = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    CliRunner().invoke(main, ["train", "demo.toml", "--out", "command", *changes], catch_exceptions=False)
    tensors = "checkpoint-3/tensors.safetensors"
    assert sha256(Path("python", tensors)) == sha256(Path("command", tensors))


def test_mistakes_are_those_of_a_file() -> None:
    with pytest.raises(gw.GraftworkError) as raised:
        gw.Run(model={"use": "mgm-gemma"}, train={"epochs": "many"}, trian={})
    assert len(raised.value.details) == 2
    with pytest.raises(gw.GraftworkError, match="there is no variant 'adaptor'; the variants are 'base' and 'adapter'"):
        gw.Checkpoint.ask_variants(None, "x.png", "?", ("adaptor",), max_new_tokens=1)  # type: ignore[arg-type]


def test_the_trained_model_is_gone_before_its_checkpoint_is_opened_again(demo: Path) -> None:
    """Two models at once were not rehearsed."""

    def models() -> int:
        gc.collect()
        return sum(issubclass(type(each), VisionLanguage) for each in gc.get_objects())

    before, after = models(), list[int]()

    def listen(event: object) -> None:
        if after or isinstance(event, RunEnded):
            after.append(models())
        if len(after) == 2:
            raise Enough

    class Enough(Exception):
        """Nothing more is to be seen."""

    with pytest.raises(Enough):
        gw.train(gw.load_run("demo.toml", SMALL), "out", on_event=listen)
    assert after == [before + 1, before]
