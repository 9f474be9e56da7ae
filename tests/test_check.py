"""`graftwork check`: what it prints, its exit status, and that every installed plugin passes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from graftwork.cli import main
from graftwork.conformance import examine
from graftwork_lora import Lora
from graftwork_mgm import MgmGemma

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENTRY_POINTS: dict[str, str] = PROJECT["entry-points"]["graftwork.plugins"]

GOLDEN = ROOT / "tests" / "golden_eval"
QUESTIONS = GOLDEN / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl"
SETTINGS = {
    "llava-json": ["llava-json.path=records.json"],
    "mmbench": [f"mmbench.path={GOLDEN / 'mmbench' / 'mmbench_dev_tiny.tsv'}"],
    "textvqa": [
        f"textvqa.questions={QUESTIONS}",
        f"textvqa.annotations={GOLDEN / 'textvqa' / 'TextVQA_0.5.1_val.json'}",
        "textvqa.images=images",
    ],
}
"""What installed plugins are told with `--set`, beside their defaults."""
RECORDS = [{"id": 1, "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]}]

SOURCE = '''
"""A data source."""
{top}
from graftwork import Record, Turn, hookimpl
from graftwork.contracts.data import DataSource

class Letters(DataSource):
    """One record for each letter"""
    name = "acme-letters"
    def records(self):
        {body}

@hookimpl
def data_sources():
    return [Letters]
'''
SOUND = "for letter in 'ab': yield Record(letter, (Turn('user', letter), Turn('assistant', letter)))"

KERNEL = '''
"""A kernel."""
from graftwork import SUPPORTED, hookimpl
from graftwork.contracts.kinds import AttentionKernel

class Heavy(AttentionKernel):
    """It asks torch what it supports"""
    name = "acme-heavy"
    def supports(self, case):
        import torch
        return SUPPORTED
    def forward(self, q, k, v, *, padding, causal, scale, dropout):
        from graftwork.attention import plain_attention
        return plain_attention(q, k, v, padding=padding, causal=causal, scale=scale, dropout=dropout)

@hookimpl
def attention_kernels():
    return [Heavy]
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_DISABLE", raising=False)
    return tmp_path


def graftwork(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, [*arguments])


def check(text: str, *arguments: str, name: str = "acme_plugin.py") -> Result:
    """Write a plugin and check it, without the installed ones."""
    Path(name).write_text(text, encoding="utf-8")
    return graftwork("--disable", "*", "check", name, *arguments)


def test_a_sound_plugin_has_a_line_for_each_check_and_status_zero() -> None:
    done = check(SOURCE.format(top="", body=SOUND))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "plugin acme-plugin",
        "  passed   it loads and registers",
        "  passed   loading imports nothing heavy",
        "data_source acme-letters",
        "  passed   the metadata is complete",
        "  passed   every setting has a line of help",
        "  passed   settings survive a checkpoint",
        "  passed   it yields records",
        "  passed   it reads the same each time",
        "  skipped  what is written is read again: it says that it can be read, not written",
        "",
        "7 passed, 1 skipped",
    ]


def test_a_failure_is_one_sentence_with_its_place_and_status_one() -> None:
    done = check(SOURCE.format(top="", body="yield open('nowhere.txt')"))
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-5:] == [
        "  failed   it yields records: it must work here, and it raised FileNotFoundError: [Errno 2] No such file or "
        "directory: 'nowhere.txt' (acme_plugin.py, line 11, in 'records'); fix it",
        "  skipped  it reads the same each time: reading failed, as reported above",
        "  skipped  what is written is read again: it says that it can be read, not written",
        "",
        "5 passed, 1 failed, 2 skipped",
    ]


def test_a_plugin_that_is_slow_to_load_is_found_out() -> None:
    done = check(SOURCE.format(top="import torch", body=SOUND))
    assert done.exit_code == 1
    sentence = "listing must be quick, and loading this plugin imports torch; import it inside methods"
    assert f"  failed   loading imports nothing heavy: {sentence}" in done.stdout.splitlines()


def test_a_kernel_that_is_slow_to_answer_is_found_out() -> None:
    done = check(KERNEL)
    assert done.exit_code == 1
    assert "  passed   loading imports nothing heavy" in done.stdout.splitlines()
    sentence = "plans must be quick, and 'supports' imports torch; import it in 'forward'"
    assert f"  failed   supports imports nothing heavy: {sentence}" in done.stdout.splitlines()


def test_a_plugin_that_does_not_load_fails_with_the_registrys_sentence() -> None:
    done = check("import acme_nowhere")
    assert done.exit_code == 1
    assert "  failed   it loads and registers: a plugin must load and bring sound components, and plugin" in done.stdout
    assert "No module named 'acme_nowhere'" in done.stdout


def test_json_holds_every_outcome() -> None:
    said = json.loads(check(SOURCE.format(top="", body="yield {}"), "--json").stdout)
    assert (said["plugin"], said["passed"], said["failed"]) == ("acme-plugin", 6, 1)
    (failed,) = [outcome for outcome in said["outcomes"] if outcome["state"] == "failed"]
    assert failed == {
        "kind": "data_source",
        "component": "acme-letters",
        "check": "it yields records",
        "state": "failed",
        "sentence": "a Record or a BadRecord must come, and a dict came; yield one of them",
    }


def test_a_plugin_is_named_as_in_the_list_or_as_its_file_and_nothing_else() -> None:
    Path("acme_plugin.py").write_text(SOURCE.format(top="", body=SOUND))
    for name in ("acme-plugin", "acme_plugin"):
        done = graftwork("--disable", "*", "--plugin", "acme_plugin.py", "check", name)
        assert done.exit_code == 0
    done = graftwork("--disable", "*", "--plugin", "acme_plugin.py", "check", "acme-plugins")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: no plugin is called 'acme-plugins'; did you mean 'acme-plugin'?\n"
    done = graftwork("check", "nowhere.py")
    assert done.stderr == "Error: there is no file 'nowhere.py'; name a plugin, or its file\n"
    done = graftwork("--disable", "acme-plugin", "check", "acme_plugin.py")
    assert "is disabled by --disable or GRAFTWORK_DISABLE; enable it to check it" in done.stderr


def test_settings_are_set_for_a_component_by_its_name() -> None:
    module = str(ROOT / "plugins" / "data" / "graftwork_llava_json.py")
    alone = graftwork("--disable", "*", "check", module)
    assert "  skipped  it yields records: 'path' is not set" in alone.stdout
    assert "(set it with --set llava-json.KEY=VALUE)" in alone.stdout
    Path("records.json").write_text(json.dumps(RECORDS))
    done = graftwork("--disable", "*", "check", module, "--set", "llava-json.path=records.json")
    assert "  passed   it yields records" in done.stdout
    wrong = graftwork("--disable", "*", "check", module, "--set", "path=records.json")
    assert wrong.exit_code == 2
    assert "--set takes NAME.KEY=VALUE, not 'path=records.json'" in wrong.stderr
    wrong = graftwork("--disable", "*", "check", module, "--set", "llava.limit=0")
    assert wrong.exit_code == 1
    assert "has no component 'llava' to set anything of; it has llava-json" in wrong.stderr
    wrong = graftwork("--disable", "*", "check", module, "--set", "llava-json.limit=0")
    assert wrong.exit_code == 1
    assert "llava-json.limit: found 0, wanted integer ≥ 1" in wrong.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """The entry points of this project, as after an installation."""
    info = tmp_path / "site" / f"graftwork-{PROJECT['version']}.dist-info"
    info.mkdir(parents=True)
    lines = ["[graftwork.plugins]", *(f"{name} = {value}" for name, value in ENTRY_POINTS.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: graftwork\nVersion: {PROJECT['version']}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(info.parent)
        yield


@pytest.mark.parametrize("plugin", ENTRY_POINTS)
def test_every_installed_plugin_passes(plugin: str, installed: None) -> None:
    Path("records.json").write_text(json.dumps(RECORDS))
    Path("images").mkdir()
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        Path("images", json.loads(line)["image"]).touch()
    done = graftwork("check", plugin, "--json", *(f"--set={override}" for override in SETTINGS.get(plugin, [])))
    said = json.loads(done.stdout)
    assert not [outcome for outcome in said["outcomes"] if outcome["state"] == "failed"]
    assert done.exit_code == 0
    reasons = {outcome["sentence"] for outcome in said["outcomes"] if outcome["state"] == "skipped"}
    assert all(re.search(r"^needs .* pip install |^it says that |\(set it with --set ", reason) for reason in reasons)


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dora": (Lora, {"use_dora": True}),
    "rslora": (Lora, {"use_rslora": True}),
    "pissa": (Lora, {"init": "pissa", "rank": 4}),
    "lora-plus": (Lora, {"plus_ratio": 4.0}),
    "mgm in tiles": (MgmGemma, {"image_grid": 2, "image_global": True}),
    "mgm cutting squares": (MgmGemma, {"aspect_ratio": "square", "projector_type": "linear"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_that_change_much_pass_as_well(variant: str) -> None:
    component, settings = VARIANTS[variant]
    wrong = [outcome for outcome in examine(component, settings=settings) if outcome.state != "passed"]
    assert not wrong
