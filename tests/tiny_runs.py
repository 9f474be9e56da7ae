"""Small runs on a random MGM-Gemma of a million numbers: the components, the data, the plans; as a program, one run."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from PIL import ImageDraw
from torch import Tensor

from graftwork.build import compose
from graftwork.checkpoint import verification
from graftwork.checkpoint.store import newest
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.contracts import (
    Assembly,
    BadRecord,
    DataSource,
    DictLookup,
    Event,
    Image,
    Lookup,
    Plan,
    Record,
    StepTaken,
    Turn,
    setting,
)
from graftwork.train.loop import Outcome, train
from graftwork_checkpointing import Checkpointing
from graftwork_cleaning import DropBrokenImages
from graftwork_convnext import OpenClipConvNext
from graftwork_easy_vqa import EasyVqa, EasyVqaSource
from graftwork_full import Full
from graftwork_hf_vision.clip import Clip
from graftwork_ia3 import Ia3
from graftwork_llava_json import LlavaJson
from graftwork_lora import Lora
from graftwork_mgm import MgmGemma
from graftwork_torch_attention import Eager, Sdpa

CONFIGS = Path(__file__).parents[1] / "examples" / "demo-base"
COLOURS = ("red", "blue", "gray", "teal")


@dataclass(frozen=True)
class ShapesSettings:
    count: int = setting(24, "How many records", minimum=0)
    broken: tuple[int, ...] = setting((), "The records whose image is no image")
    long: tuple[int, ...] = setting((), "The records with a long answer")
    longest: tuple[int, ...] = setting((), "The records with an answer that no model here reads to its end")
    asking: tuple[int, ...] = setting((), "The records with a long question")
    bad: int = setting(0, "How many bad records come as well", minimum=0)


class Shapes(DataSource[ShapesSettings]):
    """Drawn squares and circles, with questions about their colour; every third record has no image"""

    name = "shapes"
    Settings = ShapesSettings

    def records(self) -> Iterator[Record | BadRecord]:
        for number in range(self.settings.bad):
            yield BadRecord(f"shapes:bad {number}", "it is bad")
        for index in range(self.settings.count):
            colour = COLOURS[index % len(COLOURS)]
            data = b"no image" if index in self.settings.broken else drawn(index, colour)
            seen = () if index % 3 == 2 else (Image(data=data),)
            asked = " really" * (60 if index in self.settings.asking else index % 5)
            question = "<image>\n" * bool(seen) + f"what colour is shape{asked} {index}?"
            times = 400 if index in self.settings.longest else 60 * (index in self.settings.long)
            answer = colour + " and red" * times
            yield Record(
                f"shapes/{index}",
                (Turn("user", question), Turn("assistant", answer)),
                seen,
                group="circle" if index % 2 else "square",
                where=f"shapes:{index}",
            )


def drawn(index: int, colour: str) -> bytes:
    """A small PNG."""
    image = PILImage.new("RGB", (40, 32), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if index % 2 else pen.rectangle)((4, 4, 12 + index % 16, 20), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


COMPONENTS = (
    *(MgmGemma, Clip, OpenClipConvNext, Lora, Ia3, Full, Eager, Sdpa, Checkpointing),
    *(Shapes, EasyVqaSource, LlavaJson, DropBrokenImages, EasyVqa),
)
LORA = {"use": "lora", "on": ["language.attention", "language.mlp"], "rank": 4, "alpha": 8.0}
NEVER_READ = ["*.vision_model.encoder.layers.2", "*.vision_model.post_layernorm"]
"""What the model does not read of CLIP: the last layer, and what comes after it."""
DROPOUT = LORA | {"dropout": 0.3}
STEPS = 6
CHANGES = {"peft": DROPOUT, "train.steps": STEPS, "train.save_every": 2, "train.keep": 9}
"""A run that is interrupted and goes on."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "rslora": LORA | {"use_rslora": True},
    "pissa": LORA | {"init": "pissa"},
    "lora-plus": LORA | {"plus_ratio": 4.0},
    "ia3": {"use": "ia3", "on": ["language.attention", "language.mlp"]},
    "full": {"use": "full", "on": ["language.mlp"]},
}
PlanOf = Callable[..., Plan]


@dataclass(frozen=True)
class Run:
    """A run that ended: its folder and its outcome."""

    out: Path
    plan: Plan
    outcome: Outcome

    @property
    def checkpoint(self) -> Path:
        """Its newest checkpoint."""
        return newest(self.out)


def run_table(base: Path | None) -> dict[str, Any]:
    """A run of four LoRA steps on `base`, or on the configurations that it was made from."""
    if base:
        model: dict[str, Any] = {"weights": str(base)}
        parts = {"low": {"config": str(base / "low")}, "high": {"config": str(base / "high")}}
    else:
        model = {"config": str(CONFIGS / "language"), "image_size_aux": 64, "aspect_ratio": "square"}
        parts = {"low": {"config": str(CONFIGS / "low")}, "high": {"config": str(CONFIGS / "high")}}
    return {
        "seed": 5,
        "model": {
            "use": "mgm-gemma",
            **model,
            "parts": {"low": {"use": "clip", **parts["low"]}, "high": {"use": "openclip-convnext", **parts["high"]}},
        },
        "peft": dict(LORA),
        "attention": {"prefer": ["sdpa"]},
        "data": {"source": [{"use": "shapes"}]},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "max_length": 128,
        },
    }


def plan_of(
    base: Path | None, folder: Path, changes: dict[str, Any] | None = None, lookup: Lookup | None = None
) -> Plan:
    """The plan of `run_table` with dotted keys changed; None removes a key."""
    table = run_table(base)
    for dotted, value in (changes or {}).items():
        here = table
        *path, last = dotted.split(".")
        for key in path:
            here = here.setdefault(key, {})
        if value is None:
            del here[last]
        else:
            here[last] = deepcopy(value)
    return resolve(runfile.parse_run(table, folder), lookup or DictLookup(*COMPONENTS))


def random_base(folder: Path) -> Path:
    """Write the weights of a random MGM-Gemma into a folder, with the configurations of its towers in `low/` and `high/`."""
    folder.mkdir(parents=True, exist_ok=True)
    assembly = compose.build(plan_of(None, folder, {"peft": None}), DictLookup(*COMPONENTS), device="cpu")
    assembly.architecture.write(assembly, folder)
    return folder


def logits_of(assembly: Assembly, records: int = 4) -> tuple[Tensor, Tensor]:
    """The logits of an assembled model at the labels of a few records, with its adapter on and off."""
    encoded = [assembly.processor.encode(record) for record in Shapes(ShapesSettings(records)).records()]
    return verification.golden_logits(assembly, verification.golden_inputs(encoded, assembly.processor))


class Interrupted(Exception):
    """What `interrupt_at` raises."""


def interrupt_at(kind: type[Event], step: int) -> Callable[[Event], None]:
    """A listener that ends a run at an event of a step, as a person would with Ctrl-C."""

    def listen(event: Event) -> None:
        if isinstance(event, kind) and getattr(event, "step", None) == step:
            raise Interrupted

    return listen


TOUCHES = ("open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
"""What Python reports of file systems, and tests can be killed at."""


def die() -> None:
    """Be killed, as by the system: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_touches(folder: Path, touched: Callable[[], None]) -> None:
    """Call a function whenever Python is about to touch something below a folder."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in TOUCHES and isinstance(args[0], str | Path) and str(args[0]).startswith(str(folder)):
            touched()

    sys.addaudithook(hook)


def die_at(folder: Path, touch: int) -> None:
    """Be killed when something below a folder is touched for the so many-th time."""
    left = iter(range(1, touch))

    def count() -> None:
        if next(left, None) is None:
            die()

    on_touches(folder, count)


def main() -> None:
    """Train or go on with the plan in a file: `python tiny_runs.py PLAN.json OUT step|touch N`; it is killed there."""
    torch.set_num_threads(1)
    plan = Plan.from_json(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    out, what, number = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

    def listen(event: Event) -> None:
        if what == "step" and isinstance(event, StepTaken) and event.step == number:
            die()

    if what == "touch":
        die_at(out, number)
    train(plan, DictLookup(*COMPONENTS), out, resume=True, device="cpu", listen=listen)


if __name__ == "__main__":
    main()
