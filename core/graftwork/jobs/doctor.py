"""This environment as Graftwork finds it, what is wrong with it, and what to do."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import __version__

if TYPE_CHECKING:
    from graftwork.contracts.component import Component
    from graftwork_registry import Catalog, PluginRow

VARIABLES = re.compile(r"(CUDA|DS|GRAFTWORK|HF|NCCL|PYTORCH|TORCH)_\w+|OMP_NUM_THREADS|PYTHONPATH")
"""The environment variables that change what happens here."""
SECRET = re.compile(r"KEY|PASSWORD|SECRET|TOKEN")
COMPILERS = ("gcc", "nvcc", "ninja")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, what to do about it, and the evidence."""

    what: str
    remedy: str
    evidence: str = ""


@dataclass(frozen=True)
class Examined:
    """An environment: facts about it, its plugins, and what is wrong."""

    facts: Mapping[str, str]
    plugins: Sequence[PluginRow]
    problems: Sequence[Problem]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "facts": dict(self.facts),
            "plugins": [plugin.to_json() for plugin in self.plugins],
            "problems": [asdict(problem) for problem in self.problems],
        }


def examine_environment(catalog: Catalog) -> Examined:
    """Look at everything that the components of a catalogue need from this machine; imports run in another process."""
    plugins = catalog.plugins()
    imports = try_imports(modules_of(row.component for row in catalog.components()))
    torch = imports.get("torch", {})
    problems = [
        *problems_of_imports(imports),
        *problems_of_cuda(torch, os.environ, driver=NVIDIA_DRIVER.exists()),
        *problems_of_locks(extensions_folder(os.environ)),
        *problems_of_plugins(plugins),
    ]
    facts = {**_facts_of_machine(torch), **_facts_of_compilers(), **facts_of_variables(os.environ)}
    return Examined(facts, plugins, problems)


# Imports ----------------------------------------------------------------------------------------------------------------


def modules_of(components: Iterable[type[Component[Any]]]) -> list[str]:
    """The modules that must be importable: torch and transformers, and those of installed packages that matter."""
    from importlib.metadata import packages_distributions

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    required = {canonicalize_name(Requirement(text).name) for c in components for text in c.requires.packages}
    required.add(canonicalize_name("torchvision"))  # transformers imports it wherever it is installed
    found = [
        module
        for module, distributions in packages_distributions().items()
        if not module.startswith("_") and required.intersection(map(canonicalize_name, distributions))
    ]
    return ["torch", *sorted({"transformers", *found} - {"torch"})]


def try_imports(modules: Sequence[str], seconds: float = 300) -> dict[str, dict[str, Any]]:
    """Import every module in a process of its own; the version or the error of each. A crash there harms nothing here."""
    program = "import sys; from graftwork.jobs import doctor; doctor.report_imports(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(
        [sys.executable, "-c", program, *modules],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = child.communicate(timeout=seconds)
        end = f"Python ended with status {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
        end = f"the import did not end in {seconds:.0f} seconds"
    found = {line["module"]: line for line in map(json.loads, output.splitlines())}
    for module in [module for module in modules if module not in found][:1]:
        found[module] = {"module": module, "error": end, "evidence": errors}
    return found


def report_imports(modules: Sequence[str]) -> None:
    """Import modules one after another, and write a line of JSON about each; the child's part of `try_imports`."""
    import traceback
    from contextlib import redirect_stdout
    from importlib import import_module

    for module in modules:
        line: dict[str, Any] = {"module": module}
        try:
            with redirect_stdout(sys.stderr):
                line["version"] = str(getattr(import_module(module), "__version__", ""))
                line |= _describe_torch() if module == "torch" else {}
        except BaseException as error:
            line |= {"error": " ".join(f"{type(error).__name__}: {error}".split()), "evidence": traceback.format_exc()}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def _describe_torch() -> dict[str, Any]:
    import torch

    from graftwork.config.machine import detect_machine

    machine = detect_machine()
    refusal = ""
    if torch.version.cuda and not machine.cuda:
        try:
            torch.zeros((), device="cuda")
        except Exception as error:
            refusal = str(error)
    # The version that torch was built for takes the place of whether the machine has a device, which `devices` says.
    return {**asdict(machine), "cuda": torch.version.cuda, "refusal": refusal}


def problems_of_imports(imports: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """The modules that are installed, or needed, and cannot be imported."""
    for module, found in imports.items():
        if "error" in found:
            what = f"'{module}' cannot be imported: {found['error']}"
            yield Problem(what, _remedy_for_import(module), found.get("evidence", ""))


def _remedy_for_import(module: str) -> str:
    if module in ("torch", "transformers"):
        return f"install it again: pip install --force-reinstall {module}"
    if module == "torchvision":
        return "transformers fails with it: pip uninstall torchvision, which Graftwork does not use"
    return f"install the build that fits this torch and this CUDA, or leave it out: pip uninstall {module}"


# The machine ------------------------------------------------------------------------------------------------------------


def problems_of_cuda(torch: Mapping[str, Any], variables: Mapping[str, str], *, driver: bool) -> Iterator[Problem]:
    """A device that torch cannot use, and a CUDA toolkit that is not where CUDA_HOME says."""
    home = variables.get("CUDA_HOME")
    if home and not Path(home).is_dir():
        yield Problem(f"CUDA_HOME is '{home}', and there is no such folder", "unset it, or set it to the CUDA toolkit")
    if "error" in torch or not driver or torch.get("devices") or variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if torch.get("cuda"):
        what = f"there is an NVIDIA driver, but torch finds no device: {torch.get('refusal') or 'it does not say why'}"
        yield Problem(what, "see what nvidia-smi says, and install the torch build for a CUDA that this driver can do")
    else:
        what = f"there is an NVIDIA driver, but torch {torch.get('version')} is a build without CUDA"
        yield Problem(what, "install the build for your CUDA: https://pytorch.org/get-started/locally")


def extensions_folder(variables: Mapping[str, str]) -> Path:
    """Where torch compiles extensions when they are first used."""
    if folder := variables.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    return Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def problems_of_locks(folder: Path) -> Iterator[Problem]:
    """Locks of extension builds; a build that was killed leaves one, and the next waits for it forever."""
    for lock in sorted(folder.glob("**/lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        what = f"'{lock}' has locked the compilation of an extension for {minutes:.0f} minutes"
        yield Problem(
            what, "unless a compiler is running, delete it: whatever needs the extension waits for it without a message"
        )


def _facts_of_machine(torch: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "graftwork": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "platform": platform.platform(),
    }
    if "error" in torch:
        return {**facts, "torch": torch["error"]}
    build = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"
    devices = ", ".join(torch["devices"]) or "no CUDA device"
    memory = f"{torch['cores']} cores, {torch['memory_bytes'] / 2**30:.0f} GiB of memory"
    return {**facts, "torch": f"{torch['version']}, {build}", "devices": f"{devices}; {memory}"}


def _facts_of_compilers() -> dict[str, str]:
    return {name: _compiler(name) for name in COMPILERS}


def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"\d+\.\d+(\.\d+)?", output)
    return f"{version[0]} at {path}" if version else path


def facts_of_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, those that hold secrets without their values."""
    return {
        name: "(set)" if SECRET.search(name) else variables[name]
        for name in sorted(variables)
        if VARIABLES.fullmatch(name)
    }


# Plugins --------------------------------------------------------------------------------------------------------------


def problems_of_plugins(plugins: Sequence[PluginRow]) -> Iterator[Problem]:
    """The plugins that are broken."""
    for plugin in plugins:
        if plugin.state == "broken":
            remedy = f"fix or uninstall '{plugin.distribution}', or leave the plugin out: --disable {plugin.name}"
            yield Problem(plugin.sentence, remedy, plugin.traceback)
