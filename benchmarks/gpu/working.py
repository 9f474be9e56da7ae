"""Whether it works: what the device reaches, which libraries load, the tests that need a GPU, and the main job under a budget."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from report import Report
from subject import CUDA, DEVICE, EXAMPLES, Size, seconds

PACKAGES = (
    *(
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "xformers",
        "flash-attn",
        "flash-attn-4",
    ),
    *("deepspeed", "safetensors", "tokenizers", "numpy", "pillow"),
)
LIBRARIES = {
    "flash": "flash_attn",
    "flash-4": "flash_attn.cute",
    "xformers": "xformers.ops.fmha",
    "nf4": "bitsandbytes",
}


def ceilings(size: Size, report: Report) -> None:
    """Versions, what products and copies reach, and whether each library can be imported."""
    report.take("versions", versions)
    side, elements = (512, 1 << 20) if size.tiny else (8192, 1 << 29)

    def products() -> float:
        a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / seconds(lambda: a @ b, warm=3, times=10) / 1e12

    def copies() -> float:
        source = torch.randn(elements, device=DEVICE)
        into = torch.empty_like(source)
        return 2 * source.nbytes / seconds(lambda: into.copy_(source), warm=3, times=10) / 1e12

    def to_device(pinned: bool) -> float:
        host = torch.empty(elements // 8, pin_memory=pinned and CUDA)
        there = torch.empty_like(host, device=DEVICE)
        return host.nbytes / seconds(lambda: there.copy_(host, non_blocking=True), warm=2, times=5) / 1e9

    report.take("bf16 products, TFLOP/s", products)
    report.take("copies on the device, TB/s", copies)
    report.take("from pageable memory to the device, GB/s", lambda: to_device(False))
    report.take("from page-locked memory to the device, GB/s", lambda: to_device(True))
    for name, module in LIBRARIES.items():
        report.take(f"import for {name}", lambda module=module: bool(importlib.import_module(module)))
    report.take("doctor", lambda: command("doctor").stdout[-3000:])


def versions() -> dict[str, Any]:
    """Of the device and of what is installed."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "-"

    device = torch.cuda.get_device_name() if CUDA else "cpu"
    return {"device": device, "python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def command(*arguments: str, limit: float = 60) -> subprocess.CompletedProcess[str]:
    """A command of Graftwork's."""
    whole = [sys.executable, "-W", "ignore", "-m", "graftwork", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=limit, check=False)


def tests(size: Size, report: Report) -> None:
    """The tests that need a GPU; of the tiny ones a file."""
    chosen = ["tests/test_attention_kernels.py"] if size.tiny else ["tests"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rfEs", *chosen]

    def run() -> dict[str, Any]:
        root = EXAMPLES.parent
        ended = subprocess.run(pytest, capture_output=True, text=True, timeout=report.left, cwd=root, check=False)
        return {"status": ended.returncode, "said": ended.stdout[-6000:]}

    report.take("tests under the marker gpu", run)


def job(size: Size, report: Report) -> None:
    """The demo's run in bf16 under a budget: rehearsal, training, verification in a fresh process, comparison."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(str(importlib.import_module("graftwork_demo").__file__)).parent
        shutil.copytree(source, folder := Path(name) / "demo", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        few = ["train.steps=4", "evaluate.easy-vqa.per_group=4"] if size.tiny else []
        changes = ["train.precision=bf16", 'memory={budget="2 GiB", try=[[], ["checkpointing"]]}', *few]
        options = [option for change in changes for option in ("--set", change)]

        def run() -> dict[str, Any]:
            out = folder / "mine"
            ended = command("train", str(folder / "demo.toml"), "--out", str(out), *options, limit=report.left)
            found: dict[str, Any] = {
                "status": ended.returncode,
                "said": ended.stdout[-4000:],
                "errors": ended.stderr[-1500:],
            }
            if (log := out / "log.jsonl").exists():
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                found["losses"] = [round(lines[n]["loss"], 4) for n in (0, -1)]
                found["images/s"] = [round(line["images"] / line["seconds"], 1) for line in lines[2:]]
            found["verified"] = bool(re.search("(?i)verified", ended.stdout))
            return found

        report.take("the demo in bf16 within 2 GiB", run)
