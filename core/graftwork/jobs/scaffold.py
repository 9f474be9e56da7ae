"""A plugin package that works, to start from."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from graftwork import __version__
from graftwork.errors import GraftworkError

TEMPLATES = Path(__file__).parent / "templates"

SUMMARIES = {
    "model": "A recurrent language model over bytes that sees images through one tower",
    "vision_tower": "Patches of pixels, projected by two convolutions",
    "peft": "Trains the biases of the chosen roles, as BitFit does (arXiv:2106.10199)",
    "memory": "Keeps in main memory what the backward pass needs of the forward pass",
    "attention": "Exact attention, computed for one block of queries after the other",
    "evaluator": "Questions of a JSON Lines file, scored by exact match",
    "data_source": "Questions and answers of a JSON Lines file",
    "data_operator": "Keeps a random share of the records",
}
"""What `new` writes for each kind."""

SUFFIXES = {
    "model": "Model",
    "vision_tower": "Tower",
    "peft": "Method",
    "memory": "Strategy",
    "attention": "Kernel",
    "evaluator": "Evaluator",
    "data_source": "Source",
    "data_operator": "Operator",
}
"""What the names of classes end in."""

EXAMPLES = {
    "model": '[model]\nuse = "$name"',
    "vision_tower": '[model.parts.PART]\nuse = "$name"',
    "peft": '[peft]\nuse = "$name"\non = ["language"]',
    "memory": '[memory]\nuse = ["$name"]',
    "attention": '[attention]\nprefer = ["$name"]',
    "evaluator": '[evaluate]\non = ["$name"]\n[evaluate.$name]\npath = "quiz.jsonl"',
    "data_source": '[[data.source]]\nuse = "$name"\npath = "data.jsonl"',
    "data_operator": '[[data.operator]]\nuse = "$name"\nshare = 0.1',
}
"""How a run file uses the component."""


def write_plugin(kind: str, name: str, into: Path) -> list[Path]:
    """Write a package with a working component into a new folder below `into`; its files, the module first."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise GraftworkError(f"'{name}' is no name for a component: lower case with hyphens, such as my-{kind}")
    package = into / f"graftwork-{name}"
    if package.exists():
        raise GraftworkError(f"'{package}' exists already; choose another name, or another folder")
    files = render(kind, name)
    package.mkdir(parents=True)
    for file, text in files.items():
        (package / file).write_text(text, encoding="utf-8")
    return [package / file for file in files]


def render(kind: str, name: str) -> dict[str, str]:
    """The files of a new package: name to text, its module first."""
    module = f"graftwork_{name.replace('-', '_')}"
    values = {
        "kind": kind,
        "name": name,
        "module": module,
        "distribution": f"graftwork-{name}",
        "Class": "".join(map(str.capitalize, name.split("-"))) + SUFFIXES[kind],
        "summary": SUMMARIES[kind],
        "version": __version__,
        "example": Template(EXAMPLES[kind]).substitute(name=name),
    }
    templates = {
        f"{module}.py": f"{kind}.py.txt",
        f"test_{module}.py": f"{kind}_test.py.txt",
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
    }
    return {
        file: Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
        for file, template in templates.items()
    }
