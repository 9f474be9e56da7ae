"""The data operator `data-juicer`: operators of Data-Juicer, run beside Graftwork in a guarded process.

Data-Juicer installs packages while it runs, fetches models, and lets cut images pass in every process that imports it. So it is never
imported here: `worker` is started by the interpreter that has it, and says only which rows it keeps and what it made of their texts.
"""

from __future__ import annotations

from typing import Any

from graftwork.contracts import DataOperator, hookimpl
from graftwork_data_juicer.operator import DataJuicer, DataJuicerSettings

__all__ = ["DataJuicer", "DataJuicerSettings"]


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [DataJuicer]
