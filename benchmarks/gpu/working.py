"""Whether it works: what the device reaches, which libraries load, the tests that need a GPU, and the main job under a budget."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from report import Report
from subject import CUDA, DEVICE, EXAMPLES, Size, seconds

ROOT = EXAMPLES.parent

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
    *("deepspeed", "safetensors", "tokenizers", "huggingface-hub", "numpy", "pillow", "easy-vqa", "pytest"),
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
    report.take("what pyproject.toml asks for, and is not there", unmet)
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
    report.take("doctor", lambda: told("graftwork", "doctor", limit=60)["said"][-3000:])


def version(name: str) -> str:
    """That of an installed package, else a dash."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def versions() -> dict[str, Any]:
    """Of the device and of what is installed."""
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    return {"device": device, "python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def unmet() -> dict[str, str]:
    """The versions of packages that are not those that `pyproject.toml` asks for, a dash for one that is not there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, [*project["dependencies"], *extras["bitsandbytes"], *extras["demo"]])
    there = [(each, version(each.name)) for each in asked]
    return {str(e): has for e, has in there if has == "-" or not e.specifier.contains(has, prereleases=True)}


def told(*arguments: str, limit: float) -> dict[str, Any]:
    """What a module of Python said at last, and its status; also one that is killed as it takes more than `limit` seconds."""
    command = [sys.executable, "-u", "-W", "ignore", "-m", *arguments]
    status: int | str
    with tempfile.TemporaryFile("w+") as said:
        try:
            status = subprocess.call(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            status = f"killed after {limit:.0f} s"
        said.seek(0)
        return {"status": status, "said": said.read()[-6000:]}


def tests(size: Size, report: Report) -> None:
    """The tests that need a GPU; of the tiny ones a file."""
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    names = ["tests/test_attention_kernels.py"] if size.tiny else [str(file.relative_to(ROOT)) for file in files]
    options = ["-v", "-rfEs", "-W", "ignore", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "gpu"]
    # flash-4 compiles its kernels, which may take longer than all others.
    for case, chosen in (("tests that need a GPU", "not flash-4"), ("those of flash-4", "flash-4")):
        report.take(case, lambda k=chosen: told("pytest", *options, "-k", k, *names, limit=report.left), needs=15)


def job(size: Size, report: Report) -> None:
    """The demo's run in bf16 under a budget: rehearsal, training, verification in a fresh process, comparison."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(str(importlib.import_module("graftwork_demo").__file__)).parent
        shutil.copytree(source, folder := Path(name) / "demo", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        few = ["train.steps=4", "evaluate.easy-vqa.per_group=4"] if size.tiny else ["train.steps=100"]
        changes = ["train.precision=bf16", 'memory={budget="2 GiB", try=[[], ["checkpointing"]]}', *few]
        options = [option for change in changes for option in ("--set", change)]

        def run() -> dict[str, Any]:
            out = folder / "mine"
            found = told(
                "graftwork", "train", str(folder / "demo.toml"), "--out", str(out), *options, limit=report.left
            )
            if (log := out / "log.jsonl").exists() and (lines := log.read_text().split("\n")[:-1]):  # whole ones
                steps = [json.loads(line) for line in lines]
                found["losses"] = [round(steps[n]["loss"], 4) for n in (0, -1)]
                found["images/s"] = [round(step["images"] / step["seconds"], 1) for step in steps[2:]]
            return found | {"verified": "reopens as saved" in found["said"]}

        report.take("the demo in bf16 within 2 GiB", run, needs=30)
