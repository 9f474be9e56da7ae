"""The process that runs Data-Juicer: its environment, its end, and what its failures mean."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwork.errors import DataError

PACKAGE = "graftwork_juicer_worker"
"""What the worker's copy is called, so that it shadows nothing in the environment that runs it."""
GUARD = {
    **dict.fromkeys(("PIP_NO_INDEX", "PIP_DISABLE_PIP_VERSION_CHECK", "UV_OFFLINE", "UV_NO_INDEX"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"),
    **dict.fromkeys(("PYTHONNOUSERSITE", "RAY_DISABLE_IMPORT_WARNING"), "1"),
    # Sums of floats depend on the number of threads, and two engines must give the same bytes.
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The environment of every process that runs operators, on any machine."""
ON_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for listening on loopback alone, on Linux as well
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""The environment of a Ray that is started here."""
CACHES = ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "DATA_JUICER_CACHE_HOME", "UV_CACHE_DIR", "MPLCONFIGDIR")
"""What is a folder of its own for the worker, empty at first and removed in the end."""
DROPPED = ("proxy", "python", "pip_", "uv_", "ray_", "data_juicer", "hf_", "ld_preload")
"""How the names of variables begin or end that the worker does not inherit."""
SECRETS = ("token", "key", "secret", "password", "credential")
"""What the names of variables hold that it does not inherit either."""
LAST_WORDS = 300
PATIENCE = 100
"""How often, ten times a second, it is tried to end what is to end."""
SPACE = "free some space, or set TMPDIR to a folder that has some"


def environment(folder: Path, *, loopback: bool) -> dict[str, str]:
    """The worker's environment: this one's without what could undo the guard, with empty caches in `folder`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().startswith(DROPPED) and not name.lower().endswith(DROPPED[0])
        if not any(word in name.lower() for word in SECRETS)
    }
    return {
        **kept,
        **GUARD,
        **(ON_LOOPBACK if loopback else _ray_login()),
        **{name: str(folder / name.lower()) for name in CACHES},
        "PYTHONPATH": str(folder),
    }


def _ray_login() -> dict[str, str]:
    """What a cluster asks of those that use it: Ray's own variables, or the file in which it looks by default."""
    given = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    default = Path.home() / ".ray" / "auth_token"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & given.keys() and default.is_file():
        given["RAY_AUTH_TOKEN_PATH"] = str(default)
    return given


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for one task, with the worker's copy in it; DataError where it cannot be written."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="graftwork-juicer-")).resolve()
        shutil.copytree(
            Path(__file__).parent / "worker", folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in CACHES:
            (folder / name.lower()).mkdir()
        yield folder
    except OSError as error:
        raise DataError(
            f"what Data-Juicer needs cannot be kept in '{folder or tempfile.gettempdir()}' ({error.strerror or error}); {SPACE}"
        ) from error
    finally:
        if folder:
            _remove(folder)


def carry_out(task: Mapping[str, Any], python: Path | None, folder: Path) -> dict[str, Any]:
    """Have the worker carry out a task in its workplace, and return its outcome; DataError where there is none.

    When this returns or raises, no process of it is left.
    """
    interpreter = str(python or sys.executable)
    with _ray_folder(task) as ray_folder:
        (folder / "task.json").write_text(
            json.dumps({**task, "guard": GUARD, "ray_folder": ray_folder}), encoding="utf-8"
        )
        (folder / "result.json").unlink(missing_ok=True)
        status = _run(interpreter, folder, environment(folder, loopback=not task.get("address")))
    result = folder / "result.json"
    if status or not result.is_file():
        raise DataError(f"{_ending(status)}{_last_words(folder)}; no record was changed or lost")
    outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in outcome:
        raise DataError(f"Data-Juicer in '{interpreter}': {outcome['error']}")
    return outcome


def _run(interpreter: str, folder: Path, variables: Mapping[str, str]) -> int:
    """Run the worker to its end, and end all that it started; its exit status."""
    with (folder / "log").open("wb") as log:
        try:
            process = subprocess.Popen(
                [interpreter, "-m", PACKAGE],
                cwd=folder,
                env=variables,
                stdin=subprocess.PIPE,  # whose end tells the worker that this process is gone
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise DataError(
                f"'{interpreter}' cannot be started ({error.strerror}); set 'python' to the interpreter that has Data-Juicer"
            ) from None
        try:
            return process.wait()
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the worker and all processes of its group, to which those of Ray belong, and wait until they are gone."""
    for _ in range(PATIENCE):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        process.poll()
        time.sleep(0.1)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _remove(folder: Path) -> None:
    """Remove a folder, into which a process that is just ending may still write."""
    for _ in range(PATIENCE):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextmanager
def _ray_folder(task: Mapping[str, Any]) -> Iterator[str]:
    """A folder for a Ray that is started here: its path is short, as the names of sockets below it are limited."""
    if task.get("engine") != "ray" or task.get("address"):
        yield ""
        return
    short = Path("/tmp")
    folder = tempfile.mkdtemp(prefix="gw-", dir=short if short.is_dir() else None)
    try:
        yield folder
    finally:
        _remove(Path(folder))


def _ending(status: int) -> str:
    """How the worker ended, as the beginning of a sentence."""
    if status in (errno.ENOSPC, errno.EDQUOT):
        return f"the process of Data-Juicer found no space to write to ({os.strerror(status)}): {SPACE}"
    if status >= 0:
        return f"the process of Data-Juicer failed with status {status}"
    name = signal.Signals(-status).name
    memory = ", which the system does when memory runs out: set 'workers' to fewer" if name == "SIGKILL" else ""
    return f"the process of Data-Juicer was ended by {name}{memory}"


def _last_words(folder: Path) -> str:
    """What the worker said last, in brackets; empty where it said nothing."""
    try:
        lines = (folder / "log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({last[:LAST_WORDS]})" if last else ""
