"""Starting a command on several processes of this machine, and ending all of them when one ends early."""

from __future__ import annotations

import logging
import signal
import tempfile
import uuid
from collections.abc import Sequence

from graftwork.errors import GraftworkError


def launch(command: Sequence[str], count: int) -> int:
    """Run a command on `count` processes, with torchrun's own launcher; returns the exit status of the first that failed.

    A process that fails by itself has printed why; GraftworkError reports one that a signal ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            why = " (the system does that when main memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
            raise GraftworkError(
                f"process {rank} of {count} was ended by {failure.signal_name()}{why}, so the others were ended too; what was "
                "saved before is intact: give the same command again, with --resume if it trains"
            ) from None
        except SignalException as error:
            raise KeyboardInterrupt from error
    return 0
