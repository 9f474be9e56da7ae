"""What keeps Data-Juicer from installing packages, starting programs and reaching the network, in every process that runs it.

An audit hook sees every such attempt of Python code, whichever library makes it, and cannot be taken away again.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts of this machine; with the first of them all other numbers of its loopback."""
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
NAMES = ("socket.getaddrinfo", "socket.gethostbyname")
ADDRESSES = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")


class InstallRefused(BaseException):
    """An attempt to install a package; no operator can catch it, so that none goes on without what it wanted."""


class NotAllowed(PermissionError):
    """An attempt to start a program or to reach the network; an error that code which only probes expects."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came of."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


class Guard:
    """What is allowed at the moment."""

    def __init__(self) -> None:
        self.hosts: tuple[str, ...] | None = ()
        """The hosts that may be reached; None while Ray itself starts, which also starts programs."""

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook; NotAllowed for what is not allowed."""
        if self.hosts is None:
            return
        if event in PROGRAMS:
            self.refuse(f"start the program {_shown(arguments)}")
        elif event in NAMES:
            if arguments[0] not in (None, "", socket.gethostname()) and not self.knows(arguments[0]):
                self.refuse(f"look up the host {_shown(arguments)}")
        elif event in ADDRESSES:
            address = arguments[1]
            if isinstance(address, tuple) and not self.knows(address[0]):
                self.refuse(f"use the network address {address[0]}")

    def knows(self, host: object) -> bool:
        """Whether a host may be reached."""
        name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
        hosts = self.hosts or ()
        return name in hosts or (LOOPBACK[0] in hosts and _is_loopback(name))

    def refuse(self, what: str) -> None:
        """Refuse an attempt."""
        raise NotAllowed(f"Data-Juicer is not allowed to {what}")


GUARD = Guard()


def _is_loopback(name: str) -> bool:
    """Whether a name is a numeric address of this machine's loopback, also as IPv6 writes those of IPv4."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _shown(arguments: tuple[Any, ...]) -> str:
    first = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list | tuple) else arguments[0]
    words = map(str, first) if isinstance(first, list | tuple) else [str(first)]
    return " ".join(words)[:120]


def install(hosts: Iterable[str] = ()) -> None:
    """Begin to guard this process, once; nothing but `hosts` is reached from now on."""
    GUARD.hosts = tuple(hosts)
    if not getattr(sys, "_graftwork_guarded", False):
        sys._graftwork_guarded = True  # type: ignore[attr-defined]
        sys.addaudithook(GUARD.watch)


def import_data_juicer() -> Any:
    """Data-Juicer's registry of operators, with its installer replaced; ImportError where it is not installed."""
    import data_juicer.utils.lazy_loader as lazy

    def refuse(cls: type, specification: str, pip_args: object = None) -> None:
        raise InstallRefused(str(specification))

    lazy.LazyLoader._install_package = classmethod(refuse)
    from data_juicer.ops import OPERATORS
    from loguru import logger
    from PIL import ImageFile

    logger.remove()
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing Data-Juicer sets it, and a cut image would pass
    return OPERATORS
