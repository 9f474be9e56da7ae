"""transformers' processor of a folder, part by part: without torchvision, and without the code that a folder may bring."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from graftwork.errors import WeightsError
from graftwork.weights import read_json

TEMPLATE = "chat_template.jinja"
SETTINGS = (
    *("config.json", "generation_config.json", "*preprocessor_config.json", "processor_config.json", "chat_template.*"),
)
"""What a processor is read from besides its tokenizer."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")
"""Of which a tokenizer has one. transformers makes one without any words where there is none."""


class Unused:
    """Stands for what a processor has for videos or sound, and answers None to whatever it asks of it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def load_processor(folder: Path, model_type: str) -> Any:
    """transformers' processor, with stand-ins for what it has for videos and sound; WeightsError where it has no means to read images
    without torchvision, or no chat template."""
    own = settings_in(folder, "processor_config.json")
    name = own.get("processor_class") or settings_in(folder, "preprocessor_config.json").get("processor_class")
    try:
        kind = processor_class(name or PROCESSOR_MAPPING_NAMES.get(model_type) or "")
    except (ImportError, AttributeError, KeyError):
        kind = None
    if kind is None:
        raise WeightsError(
            f"'{folder}' names the processor '{name}' for a '{model_type}' model, and transformers {transformers.__version__} has none "
            "of that name; install a transformers that has it"
        )
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        raise WeightsError(f"'{folder}' holds no tokenizer.json or tokenizer.model; copy the model's tokenizer there")
    makers: dict[str, Any] = {
        "tokenizer": lambda: transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ),
        "image_processor": lambda: load_images(folder),
    }

    def check(self: Any, name: str, part: Any) -> Any:
        """transformers' own check asks for classes that need torchvision."""
        known = name in ("tokenizer", "image_processor")
        return kind.check_argument_for_proper_class(self, name, part) if known else type(part)

    members = {"check_argument_for_proper_class": check, "__module__": kind.__module__}
    try:
        left_out = {"processor_class", "auto_map", "chat_template", *kind.get_attributes()}
        settings = {key: value for key, value in own.items() if key not in left_out}
        parts = {part: makers.get(part, Unused)() for part in kind.get_attributes()}
        made = constructed(type(kind.__name__, (kind,), members), parts, settings)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise WeightsError(
            f"the processor in '{folder}' cannot be read ({str(error).strip().splitlines()[0].partition('. ')[0][:160]}); install what it names, or fetch its "
            "files again; images are read without torchvision here, so a model that needs it cannot be trained"
        ) from None
    made.chat_template = template_in(folder) or default_of(getattr(parts["tokenizer"], "chat_template", None))
    if not made.chat_template:
        raise WeightsError(
            f"'{folder}' has no chat template, so it is not known how a conversation is written for this model; put one into "
            f"'{TEMPLATE}' there"
        )
    return made


def processor_class(name: str) -> Any:
    """The class of that name; None where there is none. Where transformers gives a stand-in, because what it does to images asks for
    torchvision, it is taken out of its module, which then finds the image processor's twin that reads with Pillow."""
    found = getattr(transformers, name, None)
    if not getattr(found, "is_dummy", False):
        return found
    home = f"transformers.{transformers._class_to_module[name]}"
    asked, twin = (home.replace(".processing_", f".image_processing_{kind}") for kind in ("", "pil_"))
    loaded = sys.modules.get(asked)
    sys.modules[asked] = import_module(twin)
    try:
        return getattr(import_module(home), name)
    finally:
        del sys.modules[asked]
        if loaded is not None:
            sys.modules[asked] = loaded


def constructed(kind: Any, parts: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The processor; of one that asks for a package that only videos need, what it had set by then and its parts."""
    made = kind.__new__(kind)
    try:
        made.__init__(**parts, **settings)
    except ImportError:
        ProcessorMixin.__init__(made, **parts)
    return made


def load_images(folder: Path, **changes: Any) -> Any:
    """transformers' image processor of a folder, as if its file said the changes too."""
    return transformers.AutoImageProcessor.from_pretrained(
        folder, backend="pil", local_files_only=True, trust_remote_code=False, **changes
    )


def settings_in(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of a folder says; nothing where there is none."""
    return dict(read_json(folder / name)) if (folder / name).is_file() else {}


def template_in(folder: Path) -> str | None:
    """The chat template in a file of its own or the processor's, whichever transformers' processors take."""
    for name in ("processor_config.json", "chat_template.json"):
        if found := default_of(settings_in(folder, name).get("chat_template")):
            return found
    return file.read_text(encoding="utf-8") if (file := folder / TEMPLATE).is_file() else None


def default_of(template: Any) -> str | None:
    """The template for conversations, where there are several for several uses; None where there is none."""
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    found = template.get("default") if isinstance(template, dict) else template
    return found if isinstance(found, str) else None
