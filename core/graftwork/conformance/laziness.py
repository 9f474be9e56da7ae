"""Which heavy libraries a plugin imports where it should import none, found out in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from graftwork.conformance.outcome import Outcome

HEAVY = ("torch", "transformers")


def examine_imports(plugin: str, files: Sequence[Path], disable: Sequence[str]) -> list[Outcome]:
    """What loading the plugin imports, and what its kernels import when `supports` is called.

    `files` are the plugins that were named by their files, and `disable` the plugins to leave out: all others.
    """
    program = "import sys; from graftwork.conformance.laziness import report_imports; report_imports(sys.argv[1:])"
    arguments = json.dumps({"plugin": plugin, "files": [str(file) for file in files], "disable": list(disable)})
    done = subprocess.run(
        [sys.executable, "-c", program, arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        return [
            Outcome("plugin", plugin, "loading imports nothing heavy", "failed", f"it must load, and failed: {last}")
        ]
    loaded_by = json.loads(done.stdout.splitlines()[-1])
    demands = {
        "loading imports nothing heavy": "listing must be quick, and loading this plugin imports {}; import it inside methods",
        "supports imports nothing heavy": "plans must be quick, and 'supports' imports {}; import it in 'forward'",
    }
    return [
        Outcome("plugin", plugin, check, "failed", demand.format(" and ".join(loaded_by[check])))
        if loaded_by[check]
        else Outcome("plugin", plugin, check, "passed")
        for check, demand in demands.items()
        if check in loaded_by
    ]


def report_imports(arguments: Sequence[str]) -> None:
    """The child's part of `examine_imports`: a line of JSON."""
    from graftwork.conformance.attention import questions
    from graftwork_registry import Catalog

    request = json.loads(arguments[0])
    catalog = Catalog.discover(files=[Path(file) for file in request["files"]], disable=request["disable"])
    found = {"loading imports nothing heavy": loaded()}
    kernels = [row.component for row in catalog.components("attention") if row.plugin == request["plugin"]]
    for kernel in kernels if not loaded() else ():
        with suppress(Exception):  # what it raises is another check's business
            instance = kernel(kernel.Settings())
            for case in questions():
                instance.supports(case)  # type: ignore[attr-defined]
        found["supports imports nothing heavy"] = loaded()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def loaded() -> list[str]:
    """The heavy libraries of this process."""
    return [name for name in HEAVY if name in sys.modules]
