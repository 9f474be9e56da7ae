"""The guard of the operator data-juicer: programs, hosts and variables that its processes do not get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import graftwork_data_juicer
from graftwork_data_juicer.isolation import environment


def guarded(code: str) -> str:
    """What a guarded process prints when it runs the code."""
    worker = Path(graftwork_data_juicer.__file__).parent / "worker"
    run = [sys.executable, "-c", f"import guard\n{code}"]
    variables = {**os.environ, "PYTHONPATH": str(worker)}
    return subprocess.run(run, env=variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "attempt",
    [
        "import subprocess; subprocess.run(['pip', 'install', 'x'])",
        "import os; os.system('pip install x')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import socket; socket.socket().bind(('0.0.0.0', 0))",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    ],
)
def test_a_guarded_process_starts_no_program_and_opens_no_socket(attempt: str) -> None:
    code = f"guard.install()\ntry:\n    {attempt}\nexcept guard.NotAllowed as error:\n    print(error)"
    assert guarded(code).startswith("Data-Juicer is not allowed to ")


def test_with_ray_loopback_alone_is_reached() -> None:
    code = (
        "import socket\nguard.install(guard.LOOPBACK)\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\n"
        "try:\n    socket.create_connection(('192.0.2.1', 9))\nexcept guard.NotAllowed as error:\n    print(error)"
    )
    assert guarded(code) == "Data-Juicer is not allowed to look up the host 192.0.2.1"


@pytest.mark.parametrize("host", ["localhost.evil.com", "127.evil.com", "10.0.0.17", "::ffff:8.8.8.8"])
def test_a_host_whose_name_begins_like_a_known_one_is_another(host: str) -> None:
    known = "'localhost', '127.0.0.1', '127.8.0.1', '::1', '::ffff:127.0.0.1', '10.0.0.1', b'localhost'"
    code = (
        "guard.install((*guard.LOOPBACK, '10.0.0.1'))\n"
        f"print(guard.GUARD.knows({host!r}), all(map(guard.GUARD.knows, ({known}))))"
    )
    assert guarded(code) == "False True"


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "GITHUB_TOKEN", "my_secret_id", "DB_PASSWORD_FILE", "GOOGLE_CREDENTIALS"]
)
def test_the_worker_inherits_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AN_OTHER", "y")
    found = environment(tmp_path, loopback=True)
    assert name not in found and found["AN_OTHER"] == "y"


def test_the_worker_inherits_nothing_that_undoes_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "no_proxy", "PYTHONPATH", "PYTHONSTARTUP", "PIP_INDEX_URL", "UV_INDEX", "HF_TOKEN"):
        monkeypatch.setenv(name, "x")
    found = environment(tmp_path, loopback=True)
    assert "x" not in found.values()
    assert found["PIP_NO_INDEX"] == found["HF_HUB_OFFLINE"] == found["PYTHONNOUSERSITE"] == "1"
    assert found["HOME"] == str(tmp_path / "home")


def test_the_login_of_a_cluster_is_for_that_cluster_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    assert "token" not in environment(tmp_path, loopback=True).values()
    assert environment(tmp_path, loopback=False)["RAY_AUTH_TOKEN"] == "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    assert environment(tmp_path, loopback=False)["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / ".ray" / "auth_token")
