"""The import rule of the house: who may import whom, what breaks it, and the diagram of it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("processes", "weights"),
    ("hub",),
    ("contracts",),
    ("attention",),
    ("config",),
    ("data", "build"),
    ("checkpoint",),
    ("memory",),
    ("train",),
    ("evaluate",),
    ("writers",),
    ("foreign",),
    ("report",),
    ("conformance",),
    ("jobs",),
    ("cli",),
)
"""The packages of the core from the ground up. Each imports only packages of the floors below it."""
LEVEL = {package: level for level, floor in enumerate(FLOORS) for package in floor}
ENTRANCES = {"graftwork", "graftwork.__main__"}
"""What stands outside the rule: the facade, and the command `python -m graftwork`."""
MUTUAL = {"kinds", "assembly", "stepper", "external"}
"""The modules of `contracts` that may name one another for type checking: a strategy is handed the assembly that holds it."""
FOR_PLUGINS = {
    *("graftwork", "graftwork.contracts", "graftwork.attention", "graftwork.data"),
    *("graftwork.weights", "graftwork.processes", "graftwork.errors"),
}
"""All that a plugin may import of the project."""


def tracked(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """The files below these folders: those that git tracks, or all where this is no checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        files = [file for folder in folders for file in (ROOT / folder).rglob("*") if "__pycache__" not in file.parts]
    else:
        files = [ROOT / name for name in listed.stdout.split("\0")]
    return sorted(file for file in files if file.suffix in suffixes and file.is_file())


def module_name(file: Path) -> str:
    """The dotted name of a module of the core."""
    return ".".join(file.relative_to(ROOT / "core").with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, str]:
    """Every module of the core, and its text."""
    return {module_name(file): file.read_text(encoding="utf-8") for file in tracked("core")}


@cache
def bound_names(text: str) -> set[str]:
    """The names that a package's `__init__` binds; they win over its modules of the same name."""
    return {
        alias.asname or alias.name
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@cache
def import_statements(text: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every statement that imports, wherever it is, each with whether for type checking only."""
    tree = ast.parse(text)
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return [(node, id(node) in checking) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(module: str, text: str, known: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """The modules of the project that a module imports anywhere, each with whether for type checking only."""
    for node, checking in import_statements(text):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            start = module.rsplit(".", node.level)[0] if node.level else ""
            source = ".".join(filter(None, [start, node.module]))
            bound = bound_names(known.get(source, ""))
            inner = [f"{source}.{alias.name}" for alias in node.names]
            names = [
                name if name in known and alias.name not in bound else source
                for name, alias in zip(inner, node.names, strict=True)
            ]
        yield from ((name, checking) for name in names if name.partition(".")[0] == "graftwork")


def package_of(module: str) -> str:
    """The package, or the single module on the ground, that a module belongs to; empty for the entrances."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else ""


def violations(modules: Mapping[str, str]) -> list[str]:
    """What is against the rule in these modules, name to text; empty when nothing is."""
    found = []
    for module, text in modules.items():
        package = package_of(module)
        if not package and module not in ENTRANCES:
            found.append(f"{module} has no place in the rule")
        for other, _ in imported_modules(module, text, modules) if package else ():
            target = package_of(other)
            if target and target != package and LEVEL[target] >= LEVEL[package]:
                found.append(f"{module} imports {other}")
    return found + circles(modules)


def circles(modules: Mapping[str, str]) -> list[str]:
    """Every module of a package that imports itself by way of others of that package."""
    arrows = {
        module: {
            other
            for other, checking in imported_modules(module, text, modules)
            if other in modules
            and other != module
            and package_of(other) == package_of(module) != ""
            and not (checking and {other.rpartition(".")[2], module.rpartition(".")[2]} <= MUTUAL)
        }
        for module, text in modules.items()
    }

    def reach(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*arrows[module]]
        while waiting:
            if (other := waiting.pop()) not in seen:
                seen.add(other)
                waiting += arrows[other]
        return seen

    return [f"{module} imports itself by way of others" for module in modules if module in reach(module)]


def package_arrows(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Package to the packages that it imports."""
    arrows: dict[str, set[str]] = {package: set() for package in LEVEL}
    for module, text in modules.items():
        if package := package_of(module):
            arrows[package] |= {package_of(other) for other, _ in imported_modules(module, text, modules)} - {
                package,
                "",
            }
    return arrows


def mermaid(modules: Mapping[str, str]) -> str:
    """The packages as a Mermaid flowchart: what each imports, without what it already reaches by way of another."""
    arrows = package_arrows(modules)
    lines = ["flowchart BT"]
    for package in LEVEL:
        implied = {far for near in arrows[package] for far in reached(near, arrows)}
        lines += [f"    {package} --> {other}" for other in LEVEL if other in arrows[package] - implied]
    return "\n".join(lines)


def reached(package: str, arrows: Mapping[str, set[str]]) -> set[str]:
    """All that a package imports, directly or by way of others."""
    return {far for near in arrows[package] for far in {near, *reached(near, arrows)}}
