"""The TensorBoard observer: what it writes, and that it is silent but for one line where the package is missing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import graftwork_tensorboard
from graftwork.contracts import Evaluated, RunEnded, RunStarted, StepTaken


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    """The question whether the package is here is asked anew in every test."""
    graftwork_tensorboard._is_installed.cache_clear()
    yield
    graftwork_tensorboard._is_installed.cache_clear()


def run(out: Path) -> None:
    """The events of a short run."""
    graftwork_tensorboard.happened(RunStarted(out, 0, 2, plan=None))
    for step, loss in ((1, 3.0), (2, 2.5)):
        graftwork_tensorboard.happened(
            StepTaken(out, step, 2, loss, learning_rate=0.1, gradient_norm=1.5, images=4, tokens=100, seconds=2.0)
        )
    graftwork_tensorboard.happened(
        RunEnded(out, 2, healthy=False, reasons=("the loss rose", "no learning"), failure="broke")
    )
    graftwork_tensorboard.happened(
        Evaluated(out, "easy-vqa", {"adapter": {"accuracy": 0.75}, "base": {"accuracy": 0.5}})
    )


def test_a_run_is_written_where_tensorboard_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    run(tmp_path)
    assert not graftwork_tensorboard._writers
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        reader = EventMultiplexer({"run": str(file)}).Reload().GetAccumulator("run")
        for tag in reader.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["tensors"]:
            (event,) = reader.Tensors(tag)
            assert (tag, event.tensor_proto.string_val) == (
                "verdict/text_summary",
                [b"broke: the loss rose; no learning"],
            )
    assert found["train/loss"] == [(1, 3.0), (2, 2.5)]
    assert found["train/gradient_norm"] == [(1, 1.5), (2, 1.5)]
    assert found["speed/tokens_per_second"] == [(1, 50.0), (2, 50.0)]
    assert found["speed/images_per_second"] == [(1, 2.0), (2, 2.0)]
    assert found["train/learning_rate"] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.1))]
    assert found["easy-vqa/accuracy/adapter"] == [(0, 0.75)]
    assert found["easy-vqa/accuracy/base"] == [(0, 0.5)]


def test_without_the_package_one_line_says_so_and_nothing_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level(logging.WARNING):
        run(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "no TensorBoard logs are written, as the package is missing: pip install 'graftwork[tensorboard]'"
    ]
    assert not list(tmp_path.iterdir())
