"""`graftwork new`: a plugin package that works, to start from."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

import click

from graftwork import __version__
from graftwork.contracts.kinds import KINDS

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


@click.command()
@click.argument("kind", type=click.Choice([*KINDS]))
@click.argument("name")
@click.option(
    "--into", type=click.Path(file_okay=False, path_type=Path), default=".", help="The folder to write it to."
)
def new(kind: str, name: str, into: Path) -> None:
    """Write a plugin package with a working component of a KIND, called NAME, with its tests.

    What it does is small and real; replace it with your own.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise click.UsageError(f"'{name}' is no name for a component: lower case with hyphens, such as my-{kind}")
    package = into / f"graftwork-{name}"
    if package.exists():
        raise click.UsageError(f"'{package}' exists already; choose another name, or another folder with --into")
    files = render(kind, name)
    package.mkdir(parents=True)
    for file, text in files.items():
        (package / file).write_text(text, encoding="utf-8")
    module = next(file for file in files if file.endswith(".py"))
    click.echo(f"Wrote {', '.join(files)} into '{package}'. Try it without installing it, or install it:")
    click.echo(f"  graftwork --plugin {package / module} show {kind} {name}")
    click.echo(f"  pip install -e {package} && graftwork check {name}")


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
