"""The house: who may import whom, what stays lazy, and that the core knows no component."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import FOR_PLUGINS, ROOT, imported_modules, mermaid, sources, tracked, violations

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENTRY_POINTS: dict[str, str] = PROJECT["entry-points"]["graftwork.plugins"]

CORE, REGISTRY, PLUGINS, TESTS = tracked("core"), tracked("registry"), tracked("plugins"), tracked("tests")

COMPOSITION_ROOTS = ("graftwork/cli", "graftwork/conformance", "graftwork/jobs")
"""The only parts of the core that may know the registry."""
HEAVY = {
    *("accelerate", "huggingface_hub", "numpy", "peft", "PIL", "pydantic"),
    *("safetensors", "tokenizers", "torch", "transformers"),
}
"""What takes long to import, and so waits for a function that needs it."""
OF_PLUGINS = {"bitsandbytes", "deepspeed", "flash_attn", "peft", "timm", "xformers"}
"""Libraries that only plugins know."""
FOREIGN_WORDS = {"eager", "images"}
"""Names of components that are words of transformers, or keys of data files, as well."""
VAGUE = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """The absolute names of what is imported."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_packages_import_only_packages_below_them_and_modules_form_no_circle() -> None:
    assert violations(sources()) == []


RUN_TIME = "\nfrom graftwork.cli.console import open_console\n"
CHECKING = "\nif TYPE_CHECKING:\n    from graftwork.jobs.train import train\n"
IN_FUNCTION = "\ndef late():\n    from graftwork import evaluate\n"
RELATIVE = "\nfrom ..cli import console\n"


@pytest.mark.parametrize("arrow", [RUN_TIME, CHECKING, IN_FUNCTION, RELATIVE])
def test_an_arrow_against_the_rule_is_found_wherever_it_is(arrow: str) -> None:
    modules = sources()
    modules["graftwork.data.images"] += arrow
    (found,) = violations(modules)
    assert found.startswith("graftwork.data.images imports graftwork.")


def test_a_package_without_a_place_in_the_rule_is_found() -> None:
    assert violations({"graftwork.attic.boxes": ""}) == ["graftwork.attic.boxes has no place in the rule"]


def test_a_circle_within_a_package_is_found() -> None:
    modules = sources()
    modules["graftwork.data.images"] += "\nfrom graftwork.data.sampling import Sampler\n"
    modules["graftwork.data.sampling"] += "\nfrom graftwork.data.images import load_image\n"
    assert "graftwork.data.images imports itself by way of others" in violations(modules)


def test_the_diagram_of_the_packages_shows_what_they_import() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{mermaid(sources())}\n```" in page


@pytest.mark.parametrize("file", CORE + REGISTRY + PLUGINS, ids=name_of)
def test_a_function_fits_on_a_screen(file: Path) -> None:
    functions = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80]


def test_every_plugin_lies_in_the_folder_of_a_kind_that_is_a_source_root() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    roots = {f"plugins/{file.relative_to(ROOT / 'plugins').parts[0]}" for file in PLUGINS}
    for listed in (build["dev-mode-dirs"], build["targets"]["wheel"]["sources"]):
        assert set(listed) == {"core", "registry", *roots}


@pytest.mark.parametrize("file", CORE, ids=name_of)
def test_the_core_imports_no_plugin_and_only_its_roots_the_registry(file: Path) -> None:
    imported = packages(imports(ast.walk(tree_of(file))))
    allowed = {"graftwork_registry"} if any(root in file.as_posix() for root in COMPOSITION_ROOTS) else set()
    assert {name for name in imported if name.startswith("graftwork_")} <= allowed
    assert not imported & OF_PLUGINS
    if "graftwork/cli" not in file.as_posix():
        assert not imported & {"click", "rich"}


@pytest.mark.parametrize("file", REGISTRY, ids=name_of)
def test_the_registry_imports_only_the_core_pluggy_and_packaging(file: Path) -> None:
    imported = imports(ast.walk(tree_of(file)))
    assert packages(imported) - sys.stdlib_module_names <= {"graftwork", "graftwork_registry", "packaging", "pluggy"}
    assert not {name for name in imported if name.startswith(("graftwork.cli", "graftwork.conformance"))}


@pytest.mark.parametrize("file", PLUGINS, ids=name_of)
def test_a_plugin_imports_no_other_plugin_no_registry_and_no_command_line(file: Path) -> None:
    own = file.relative_to(ROOT / "plugins").parts[1].removesuffix(".py")
    imported = imports(ast.walk(tree_of(file)))
    assert {name for name in packages(imported) if name.startswith("graftwork_")} <= {own}
    assert from_the_core(file.read_text(encoding="utf-8")) <= FOR_PLUGINS


@pytest.mark.parametrize("name", ["graftwork.jobs", "graftwork.data.pipeline", "graftwork.contracts.kinds"])
def test_a_plugin_that_reaches_deeper_is_found(name: str) -> None:
    package, _, module = name.rpartition(".")
    assert name in from_the_core(f"def late():\n    from {package} import {module}\n")


def from_the_core(text: str) -> set[str]:
    """The modules of the core that a plugin's text imports."""
    return {module for module, _ in imported_modules("graftwork_plugin", text, sources())}


@pytest.mark.parametrize("file", CORE + REGISTRY, ids=name_of)
def test_nothing_heavy_is_imported_at_the_top_of_a_module(file: Path) -> None:
    assert not packages(imports(at_import(tree_of(file)))) & HEAVY


def test_importing_everything_that_listing_needs_leaves_torch_out() -> None:
    core = [name_of(file).removeprefix("core/").removesuffix(".py").replace("/", ".") for file in CORE]
    modules = [module.removesuffix(".__init__") for module in core if not module.endswith("__main__")]
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n" + (
        f"print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *modules, "graftwork_registry", *ENTRY_POINTS.values()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.fixture(scope="module")
def component_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all components of this repository, asked of the registry as after an installation."""
    from graftwork_registry import Catalog

    site = tmp_path_factory.mktemp("site")
    info = site / f"graftwork-{PROJECT['version']}.dist-info"
    info.mkdir()
    lines = ["[graftwork.plugins]", *(f"{name} = {value}" for name, value in ENTRY_POINTS.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: graftwork\nVersion: {PROJECT['version']}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.delenv("GRAFTWORK_DISABLE", raising=False)
        catalog = Catalog.discover()
    assert {row.name for row in catalog.plugins() if row.state == "ok"} >= set(ENTRY_POINTS)
    return {row.name for row in catalog.components() if row.distribution == "graftwork"}


@pytest.mark.parametrize("file", CORE, ids=name_of)
def test_the_core_names_no_component(file: Path, component_names: set[str]) -> None:
    tree = tree_of(file)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not texts & (component_names - FOREIGN_WORDS)


@pytest.mark.parametrize("file", CORE, ids=name_of)
def test_everything_public_in_the_core_says_what_it_is(file: Path) -> None:
    tree = tree_of(file)
    assert ast.get_docstring(tree)
    silent = []
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for thing in (node, *members):
            public = isinstance(thing, ast.FunctionDef | ast.ClassDef) and not thing.name.startswith("_")
            if public and not ast.get_docstring(thing):
                silent.append(thing.name)
    assert not silent


@pytest.mark.parametrize("file", CORE + REGISTRY + PLUGINS + TESTS, ids=name_of)
def test_a_file_has_at_most_400_lines_and_a_telling_name(file: Path) -> None:
    assert file.read_text(encoding="utf-8").count("\n") <= 400
    assert not {file.stem, file.parent.name} & VAGUE


def test_the_wheel_holds_the_three_roots_without_their_names(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0].removesuffix(".py") for name in files if ".dist-info" not in name}
    assert {"graftwork", "graftwork_registry", *(value.partition(".")[0] for value in ENTRY_POINTS.values())} <= top
    assert all(name.startswith("graftwork") for name in top)
    roots = [ROOT / "core", ROOT / "registry", *(ROOT / "plugins").iterdir()]
    kept = tracked("core", "registry", "plugins", suffixes=(".py", ".txt"))
    names = {file.relative_to(root).as_posix() for file in kept for root in roots if file.is_relative_to(root)}
    assert names <= set(files)


def test_every_name_of_the_contracts_is_there() -> None:
    from graftwork import contracts

    assert all(getattr(contracts, name) is not None for name in contracts.__all__)
    assert set(contracts.LATE) <= set(contracts.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Picture'"):
        _ = contracts.Picture


def test_the_installed_entry_points_are_those_of_the_project() -> None:
    try:
        installed = importlib.metadata.distribution("graftwork").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("graftwork is not installed")
    found = {point.name: point.value for point in installed.select(group="graftwork.plugins")}
    assert found == ENTRY_POINTS, "the entry points have changed: run `pip install -e .` again"


def test_no_file_of_the_project_names_a_folder_of_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(rb"(?<![\w.:-])/(root|work|Users)/\w|" + re.escape(os.fsencode(ROOT)))
    files = [ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("tests/golden/")]
    assert not [str(file) for file in files if file.is_file() and private.search(file.read_bytes())]


FOR_CLI = ("click", "rich", "graftwork.cli", "graftwork.jobs", "graftwork.errors", "graftwork.processes")
DRAWN_BY_CLI = {
    *("graftwork.__version__", "graftwork.config.sizes", "graftwork.contracts.events", "graftwork.contracts.kinds"),
    *(
        "graftwork.evaluate.scores",
        "graftwork.report.data_wording",
        "graftwork.report.learning_wording",
        "graftwork.report.wording",
        "graftwork_registry",
    ),
}
"""Besides: words and sizes as people read them, the events that are drawn, the names of kinds, the catalogue of a session."""


@pytest.mark.parametrize("file", [file for file in CORE if "graftwork/cli" in file.as_posix()], ids=name_of)
def test_the_command_line_only_parses_calls_jobs_and_draws(file: Path) -> None:
    """Whatever a function of it calls comes from a job, from click and rich, from its own package or the standard library."""
    tree = tree_of(file)
    checking = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in checking]
    assert [n.lineno for n in imported if not all(map(may_import, modules_named(n)))] == []


def modules_named(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement imports, or imports from."""
    if isinstance(node, ast.ImportFrom) and node.module != "graftwork":
        return [node.module or ""]
    return [f"graftwork.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name for alias in node.names]


def may_import(module: str) -> bool:
    """Whether the command line may call what is in a module."""
    own = any(module == root or module.startswith(f"{root}.") for root in FOR_CLI)
    return own or module in DRAWN_BY_CLI or module.partition(".")[0] in sys.stdlib_module_names
