"""What plugin authors write against, and what the engine speaks in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftwork.contracts.anatomy import (
    DTYPES,
    AttentionCase,
    AttentionSite,
    BuildContext,
    PixelSettings,
    Structure,
    TowerOutput,
    TowerSlot,
    earlier_names,
    modules_of,
    named_tensors,
    within,
)
from graftwork.contracts.batch import IGNORED, Batch, Encoded, collate, find_label_positions
from graftwork.contracts.component import (
    SUPPORTED,
    Approximation,
    Component,
    MissingFile,
    NoSettings,
    Requires,
    Support,
    missing_packages,
    missing_requirements,
    unsupported,
)
from graftwork.contracts.configuration import (
    OF_TRANSFORMERS,
    refuse_quantized,
    refuse_unknown_settings,
    unknown_settings,
)
from graftwork.contracts.data import DataMaker, DataOperator, DataSource, DataVerifier, VerifiedGroup
from graftwork.contracts.device import device_type, in_main_memory
from graftwork.contracts.hookspecs import hookimpl
from graftwork.contracts.kinds import (
    KINDS,
    AttentionKernel,
    Evaluator,
    MemoryStrategy,
    ModelArchitecture,
    PeftMethod,
    VisionTower,
    Weighted,
)
from graftwork.contracts.lookup import DictLookup, Found, Lookup
from graftwork.contracts.loss import cross_entropy, summed_loss
from graftwork.contracts.model import Processor, VisionLanguageModel, batch_of
from graftwork.contracts.records import BadRecord, Image, Record, Turn, image_key
from graftwork.contracts.score import Prediction, Score, plain_sum
from graftwork.contracts.setting import setting
from graftwork.contracts.stepper import Stepper, stepper_for
from graftwork.contracts.writer import Reply, Writer

if TYPE_CHECKING:
    from graftwork.contracts.assembly import Adaptation, Assembly, KernelBinding
    from graftwork.contracts.events import (
        CheckpointSaved,
        Evaluated,
        Event,
        MemoryRanOut,
        NotLearning,
        RunEnded,
        RunStarted,
        RunStopped,
        RunWarned,
        StepTaken,
    )
    from graftwork.contracts.external import (
        HISTORY,
        Adapter,
        ExternalFolder,
        ImportPlan,
        Reference,
        RequiredTower,
        Rows,
        broken,
    )
    from graftwork.contracts.plan import (
        Choice,
        ModelSpec,
        Plan,
        RunContext,
        TrainSettings,
        WeightsRef,
        config_of,
        folder_of,
    )
    from graftwork.contracts.verdict import Verdict

LATE = {
    **dict.fromkeys(("Adaptation", "Assembly", "KernelBinding"), "assembly"),
    **dict.fromkeys(
        (
            "CheckpointSaved",
            "Evaluated",
            "Event",
            "MemoryRanOut",
            "NotLearning",
            "RunEnded",
            "RunStarted",
            "RunStopped",
            "RunWarned",
            "StepTaken",
        ),
        "events",
    ),
    **dict.fromkeys(
        ("HISTORY", "Adapter", "ExternalFolder", "ImportPlan", "Reference", "RequiredTower", "Rows", "broken"),
        "external",
    ),
    **dict.fromkeys(
        ("Choice", "ModelSpec", "Plan", "RunContext", "TrainSettings", "WeightsRef", "config_of", "folder_of"), "plan"
    ),
    **dict.fromkeys(("Verdict",), "verdict"),
}
"""Name to module: what listing does not need is imported when it is asked for, so that it costs no time at start-up."""


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{LATE[name]}"), name)


__all__ = [
    "DTYPES",
    "HISTORY",
    "IGNORED",
    "KINDS",
    "OF_TRANSFORMERS",
    "SUPPORTED",
    "Adaptation",
    "Adapter",
    "Approximation",
    "Assembly",
    "AttentionCase",
    "AttentionKernel",
    "AttentionSite",
    "BadRecord",
    "Batch",
    "BuildContext",
    "CheckpointSaved",
    "Choice",
    "Component",
    "DataMaker",
    "DataOperator",
    "DataSource",
    "DataVerifier",
    "DictLookup",
    "Encoded",
    "Evaluated",
    "Evaluator",
    "Event",
    "ExternalFolder",
    "Found",
    "Image",
    "ImportPlan",
    "KernelBinding",
    "Lookup",
    "MemoryRanOut",
    "MemoryStrategy",
    "MissingFile",
    "ModelArchitecture",
    "ModelSpec",
    "NoSettings",
    "NotLearning",
    "PeftMethod",
    "PixelSettings",
    "Plan",
    "Prediction",
    "Processor",
    "Record",
    "Reference",
    "Reply",
    "RequiredTower",
    "Requires",
    "Rows",
    "RunContext",
    "RunEnded",
    "RunStarted",
    "RunStopped",
    "RunWarned",
    "Score",
    "StepTaken",
    "Stepper",
    "Structure",
    "Support",
    "TowerOutput",
    "TowerSlot",
    "TrainSettings",
    "Turn",
    "Verdict",
    "VerifiedGroup",
    "VisionLanguageModel",
    "VisionTower",
    "Weighted",
    "WeightsRef",
    "Writer",
    "batch_of",
    "broken",
    "collate",
    "config_of",
    "cross_entropy",
    "device_type",
    "earlier_names",
    "find_label_positions",
    "folder_of",
    "hookimpl",
    "image_key",
    "in_main_memory",
    "missing_packages",
    "missing_requirements",
    "modules_of",
    "named_tensors",
    "plain_sum",
    "refuse_quantized",
    "refuse_unknown_settings",
    "setting",
    "stepper_for",
    "summed_loss",
    "unknown_settings",
    "unsupported",
    "within",
]
