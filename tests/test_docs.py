"""The documents: their code runs, their plugins conform, their commands and settings exist, their links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from click.testing import CliRunner

from graftwork.cli import COMMANDS, main
from graftwork.config import runfile, settings
from graftwork.config.runfile import TABLES, Selection
from graftwork.conformance import examine
from graftwork.contracts import KINDS
from graftwork.errors import ComponentNotFound
from graftwork_registry import Catalog

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").glob("*/README.md")),
    )
    if page.is_file()
]
SHELLS = ("sh", "bash", "console")
CHEAP = {"list", "show", "schema", "new", "check"}
"""The commands that are run; the others are only looked up."""
PLACEHOLDER = re.compile(r"^[A-Z]+(\.[a-z]+)?$")
"""NAME, FILE.py: what a reader is to fill in."""
FILES = {
    "pairs.tsv": "Is it?\tYes.\nbroken\n",
    "captions.csv": "a.png,A cat.\n",
}
"""What the plugins of the documents read by default."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def label(self) -> str:
        """Where it is."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str:
        """The name to save a plugin under: that of its first component."""
        found = re.search(r'^ +name = "([a-z0-9-]+)"', self.text, re.MULTILINE)
        return f"{found[1].replace('-', '_') if found else 'plugin'}.py"


def blocks() -> Iterator[Block]:
    """The fenced blocks of all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[2], found[3])


BLOCKS = list(blocks())
PYTHON = [block for block in BLOCKS if block.language == "python"]
PLUGINS = [block for block in PYTHON if "@hookimpl" in block.text]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `graftwork …` of the shell blocks and of indented lines, with its place, in words."""
    for page in PAGES:
        shell = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip().startswith("```"):
                shell = line.strip()[3:] in SHELLS
            if (shell or line.startswith("    ")) and (found := re.match(r"\s*(?:\$ )?(graftwork .*)", line)):
                yield f"{page.relative_to(ROOT)}:{number}", shlex.split(found[1], comments=True)[1:]


def looked_up(arguments: list[str]) -> str:
    """The name of a command, whose options and arguments exist; a failure or a usage error otherwise."""
    group = click.Context(main, info_name="graftwork")
    _, (name, *given), _ = main.make_parser(group).parse_args([*arguments])
    assert name in COMMANDS, f"there is no command '{name}'"
    command = main.get_command(group, name)
    assert command
    command.make_context(name, given, parent=group)
    return name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the documents name: their plugins and the files that these read."""
    monkeypatch.chdir(tmp_path)
    for block in PLUGINS:
        (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """The plugins of this project, as after an installation, and those of the documents."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = tmp_path_factory.mktemp("documents")
    info = folder / f"graftwork-{project['version']}.dist-info"
    info.mkdir()
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["graftwork.plugins"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[graftwork.plugins]", *lines]))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: graftwork\nVersion: {project['version']}\n")
    for block in PLUGINS:
        (folder / block.file).write_text(block.text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delenv("GRAFTWORK_DISABLE", raising=False)
        yield Catalog.discover(files=[folder / block.file for block in PLUGINS])


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.label)
def test_python_can_be_read(block: Block) -> None:
    ast.parse(block.text)
    assert max(map(len, block.text.splitlines())) <= 130


@pytest.mark.parametrize("block", PLUGINS, ids=lambda block: block.label)
def test_a_plugin_of_the_documents_does_what_its_kind_demands(block: Block, folder: Path) -> None:
    catalog = Catalog.discover(files=[folder / block.file], disable=["*"])
    (plugin,) = [plugin for plugin in catalog.plugins() if plugin.state != "disabled"]
    assert (plugin.state, plugin.sentence) == ("ok", "")
    assert catalog.components() or "def happened" in block.text
    for row in catalog.components():
        for outcome in examine(row.component, unmet_requirement=row.reason):
            assert outcome.state != "failed", outcome
            assert outcome.state == "passed" or outcome.sentence == row.reason or outcome.sentence.startswith("it "), (
                outcome
            )


def test_each_kind_has_a_plugin_in_the_guide_and_a_method_takes_40_lines() -> None:
    guide = [block for block in PLUGINS if block.page.name == "writing-plugins.md"]
    (method,) = [block for block in guide if "def peft_methods" in block.text]
    assert len([line for line in method.text.splitlines() if line.strip()]) <= 40
    for hook in (*KINDS.values(), "happened"):
        assert [block for block in guide if f"def {hook}" in block.text], hook


@pytest.mark.parametrize(
    ("place", "arguments"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_and_its_options_exist_and_a_cheap_one_runs(
    place: str, arguments: list[str], folder: Path, catalog: Catalog
) -> None:
    name = looked_up(arguments)
    if name in CHEAP and not any(PLACEHOLDER.match(argument) for argument in arguments):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=lambda block: block.label)
def test_a_run_file_can_be_read_and_its_components_have_these_settings(block: Block, catalog: Catalog) -> None:
    table = tomllib.loads(block.text)
    if not table.keys() <= {*settings.names(runfile.RunTable), *TABLES}:
        return  # it is of another file, such as pyproject.toml
    table.setdefault("model", {}).setdefault("use", "mgm-gemma")
    if "on" not in table.get("evaluate", {"on": []}):
        table["evaluate"]["on"] = [*table["evaluate"]]
    run = runfile.parse_run(table, Path.cwd())
    chosen: list[tuple[str, Selection | None]] = [("model", run.model), ("peft", run.peft)]
    chosen += [("vision_tower", part) for part in run.parts.values() if part.use]
    for kind, items in (("memory", run.memory), ("data_source", run.sources), ("data_operator", run.operators)):
        chosen += [(kind, item) for item in items]
    chosen += [("evaluator", item) for item in run.evaluate]
    chosen += [("attention", Selection(name)) for names in run.attention.values() for name in names]
    problems: list[str] = []
    for kind, selection in chosen:
        if selection is not None:
            found = component_of(catalog, kind, selection.use)
            settings.read(found.Settings, selection.settings, where=kind, folder=None, problems=problems)
    assert not problems


def component_of(catalog: Catalog, kind: str, name: str) -> Any:
    """A component that the documents name; a failure when there is none."""
    try:
        return catalog.find(kind, name).component
    except ComponentNotFound as error:
        raise AssertionError(str(error)) from None


def test_the_architecture_names_every_file_of_core_and_registry() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {file.name for root in ("core", "registry") for file in (ROOT / root).rglob("*.py")}
    assert not sorted(name for name in files if not name.startswith("__") and f"`{name}`" not in text)
    named = {name.rpartition("/")[2] for name in re.findall(r"`([a-z_/0-9]+\.py)`", text)}
    assert named <= files | {file.name for file in (ROOT / "tests").glob("test_*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}, (
                target
            )
