"""The doctor: it names what is wrong and what to do, and survives what it examines."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from graftwork.cli import main
from graftwork.jobs import doctor


def test_a_locked_extension_build_is_a_problem(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "adam" / "lock"
    lock.parent.mkdir(parents=True)
    assert not [*doctor.problems_of_locks(tmp_path)]
    lock.touch()
    os.utime(lock, (0, time.time() - 7200))
    (problem,) = doctor.problems_of_locks(tmp_path)
    assert problem.what == f"'{lock}' has locked the compilation of an extension for 120 minutes"
    assert "delete it" in problem.remedy


def test_the_folder_of_extension_builds_is_where_torch_has_it(tmp_path: Path) -> None:
    assert doctor.extensions_folder({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == tmp_path
    assert doctor.extensions_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "torch_extensions"
    assert doctor.extensions_folder({}) == Path.home() / ".cache" / "torch_extensions"


def test_the_cuda_that_torch_was_built_for_is_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = doctor._describe_torch()
    assert found["cuda"] == "13.0" and isinstance(found["devices"], tuple)


def test_secrets_are_not_shown() -> None:
    variables = {"HF_TOKEN": "hf_x", "HF_HOME": "cache", "CUDA_HOME": "cuda", "OMP_NUM_THREADS": "1", "HOME": "me"}
    facts = doctor.facts_of_variables(variables)
    assert facts == {"CUDA_HOME": "cuda", "HF_HOME": "cache", "HF_TOKEN": "(set)", "OMP_NUM_THREADS": "1"}


CPU_BUILD = {"version": "2.9", "cuda": None, "devices": []}
CUDA_BUILD = {"version": "2.9", "cuda": "13.0", "devices": [], "refusal": "the driver is too old"}


@pytest.mark.parametrize(
    ("torch", "variables", "driver", "what"),
    [
        (CPU_BUILD, {}, False, None),
        (CPU_BUILD, {}, True, "there is an NVIDIA driver, but torch 2.9 is a build without CUDA"),
        (CPU_BUILD, {"CUDA_VISIBLE_DEVICES": ""}, True, None),
        (CUDA_BUILD, {}, True, "there is an NVIDIA driver, but torch finds no device: the driver is too old"),
        ({**CUDA_BUILD, "devices": ["H200"]}, {}, True, None),
        ({"error": "ImportError: no"}, {}, True, None),
        (
            CPU_BUILD,
            {"CUDA_HOME": "/no/such/folder"},
            False,
            "CUDA_HOME is '/no/such/folder', and there is no such folder",
        ),
    ],
)
def test_a_device_that_torch_cannot_use_is_a_problem(
    torch: dict[str, object], variables: dict[str, str], driver: bool, what: str | None
) -> None:
    problems = [problem.what for problem in doctor.problems_of_cuda(torch, variables, driver=driver)]
    assert problems == ([what] if what else [])


def test_modules_that_fail_or_crash_or_hang_on_import_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "acme_sound.py").write_text("__version__ = '3.1'; print('noise')")
    (tmp_path / "acme_failing.py").write_text("raise RuntimeError('operator nms\\ndoes not exist')")
    (tmp_path / "acme_crashing.py").write_text("import os; os._exit(9)")
    (tmp_path / "acme_hanging.py").write_text("import time; time.sleep(60)")
    imports = doctor.try_imports(["acme_sound", "acme_failing", "acme_crashing", "acme_sound"])
    assert imports["acme_sound"] == {"module": "acme_sound", "version": "3.1"}
    problems = [*doctor.problems_of_imports(imports)]
    assert [problem.what for problem in problems] == [
        "'acme_failing' cannot be imported: RuntimeError: operator nms does not exist",
        "'acme_crashing' cannot be imported: Python ended with status 9",
    ]
    assert "acme_failing.py" in problems[0].evidence
    assert "pip uninstall acme_failing" in problems[0].remedy
    assert "did not end in 2 seconds" in doctor.try_imports(["acme_hanging"], seconds=2)["acme_hanging"]["error"]


def test_an_installed_torchvision_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "torchvision-0.99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99\n")
    (info / "top_level.txt").write_text("torchvision\n")
    assert doctor.modules_of([]) == ["torch", "torchvision", "transformers"]
    (problem,) = doctor.problems_of_imports({"torchvision": {"error": "RuntimeError: operator torchvision::nms"}})
    assert problem.remedy.endswith("pip uninstall torchvision, which Graftwork does not use")


def test_doctor_ends_with_status_1_and_shows_the_traceback_of_a_broken_plugin(tmp_path: Path) -> None:
    broken = tmp_path / "acme.py"
    broken.write_text("import acme_dora")
    done = CliRunner().invoke(main, ["--disable", "*", "--plugin", str(broken), "doctor"])
    assert done.exit_code == 1
    assert "plugin 'acme' could not be loaded: ModuleNotFoundError: No module named 'acme_dora'" in done.output
    assert "What to do: fix or uninstall 'acme.py', or leave the plugin out: --disable acme" in done.output
    assert f'File "{broken}", line 1' in done.output


def test_doctor_says_the_same_in_json_and_ends_with_status_0_where_nothing_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    done = CliRunner().invoke(main, ["--disable", "*", "doctor", "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == (1 if said["problems"] else 0)
    assert said["facts"]["torch"].startswith("2.")
    assert said["facts"]["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
