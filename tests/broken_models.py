"""Model architectures that break one promise each; they extend the one that `graftwork new model` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch

from graftwork.conformance.specimens import KitTower
from graftwork.contracts import IGNORED, AttentionSite, Batch, Record, TowerSlot
from graftwork.jobs.scaffold import render
from graftwork_registry import Catalog


@cache
def sound() -> Any:
    """The model that `graftwork new model` writes."""
    file, text = next(iter(render("model", "acme").items()))
    with TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_text(text, encoding="utf-8")
        return Catalog.discover(files=[path], disable=["*"]).find("model", "acme").component


def importing(import_plan: Any) -> Any:
    """The model that gives this answer to every foreign folder."""

    class Changed(sound()):
        """A model that claims folders"""

        def import_from(self, folder: Any, towers: Any, adapter: Any) -> Any:
            return import_plan

    return Changed


def built_with(change: Callable[[Any], Any]) -> Any:
    """The model with its built structure changed."""

    class Changed(sound()):
        """A model with another structure"""

        def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
            return change(super().build(config, towers, outputs, context))

    return Changed


def computing(change: Callable[[Callable[..., Any]], Callable[..., Any]], method: str = "forward") -> Any:
    """The model with a method of the built module wrapped."""

    def changed(structure: Any) -> Any:
        setattr(structure.model, method, change(getattr(structure.model, method)))
        return structure

    return built_with(changed)


def processing(**methods: Callable[..., Any]) -> Any:
    """The model with methods of its processor replaced; each is given the sound processor first."""

    class Changed(sound()):
        """A model with another processor"""

        def processor(self, config: Any, folder: Any, outputs: Any) -> Any:
            processor = super().processor(config, folder, outputs)
            own = type("Changed", (type(processor),), {})
            other = own(outputs["eye"])
            for name, method in methods.items():
                setattr(own, name, lambda self, *given, method=method: method(processor, *given))
            return other

    return Changed


def roles(change: Callable[[dict[str, tuple[str, ...]]], Mapping[str, tuple[str, ...]]]) -> Any:
    """The model with other roles."""
    return built_with(lambda structure: replace(structure, roles=change(dict(structure.roles))))


def ignores_padding(forward: Any) -> Any:
    """Every token is taken for a real one."""
    return lambda batch, features=None, cache=None: forward(
        replace(batch, attention_mask=torch.ones_like(batch.attention_mask)), features, cache
    )


def forgets_the_cache(forward: Any) -> Any:
    """It begins anew with each token."""
    return lambda batch, features=None, cache=None: forward(batch, features, None)


def ignores_features(forward: Any) -> Any:
    """It looks again."""
    return lambda batch, features=None, cache=None: forward(batch, None, cache)


def sees_nothing(forward: Any) -> Any:
    """Images are grey."""

    def grey(batch: Batch) -> Batch:
        return replace(batch, pixels={part: torch.zeros_like(pixels) for part, pixels in batch.pixels.items()})

    return lambda batch, features=None, cache=None: forward(grey(batch), None, cache)


def puts_images_last(see: Any) -> Any:
    """The entries of its features are places."""
    return lambda pixels: list(torch.stack([*see(pixels)], 1))


def shifts_features(see: Any) -> Any:
    """The features of an image are those of the one before."""
    return lambda pixels: [*see(pixels)[-1:], *see(pixels)[:-1]]


def flat(logits: Any) -> Any:
    """One score too few."""
    return lambda hidden: logits(hidden)[..., 1:]


def labels_everything(processor: Any, record: Record) -> Any:
    """The question is to be learned as well."""
    encoded = processor.encode(record)
    return replace(encoded, labels=list(encoded.input_ids))


def labels_what_is_not_trained(processor: Any, record: Record) -> Any:
    """It does not ask which answers are to be learned."""
    return processor.encode(replace(record, turns=tuple(replace(turn, trained=None) for turn in record.turns)))


def labels_no_stop(processor: Any, record: Record) -> Any:
    """It never learns to end."""
    encoded = processor.encode(record)
    return replace(encoded, labels=[IGNORED if label in processor.stop_ids else label for label in encoded.labels])


def labels_the_system(processor: Any, record: Record) -> Any:
    """What the system says is to be learned as well."""
    encoded = processor.encode(record)
    if record.turns[0].role != "system":
        return encoded
    return replace(encoded, labels=[encoded.input_ids[0], *encoded.labels[1:]])


def forgets_the_system(processor: Any, record: Record) -> Any:
    """What the system says is lost."""
    return processor.encode(replace(record, turns=tuple(turn for turn in record.turns if turn.role != "system")))


def prompts_otherwise(processor: Any, record: Record) -> Any:
    """A prompt ends in a space, which training does not have."""
    encoded = processor.encode(record)
    if record.turns[-1].role == "assistant":
        return encoded
    more = {"input_ids": 34, "labels": IGNORED, "image_token_mask": False}
    return replace(encoded, **{name: [*getattr(encoded, name), value] for name, value in more.items()})


def shrinks_pixels(processor: Any, record: Record) -> Any:
    """Images are half as large as the tower takes."""
    encoded = processor.encode(record)
    return replace(encoded, pixels={part: pixels[..., ::2, ::2] for part, pixels in encoded.pixels.items()})


def swallows_broken_images(processor: Any, record: Record) -> Any:
    """What cannot be read is left out."""
    try:
        return processor.encode(record)
    except Exception:
        return None


class WritesHalf(sound()):
    """It writes every second tensor"""

    def write(self, assembly: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        super().write(assembly, folder)
        state = assembly.model.state_dict()
        save_file({name: state[name].contiguous() for name in list(state)[::2]}, folder / "model.safetensors")


class WritesRounded(sound()):
    """It writes what bf16 makes of the numbers"""

    def write(self, assembly: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        super().write(assembly, folder)
        state = assembly.model.state_dict()
        save_file({name: tensor.bfloat16().float() for name, tensor in state.items()}, folder / "model.safetensors")


class ForgetsASetting(sound()):
    """The folder that it writes says another thing"""

    def write(self, assembly: Any, folder: Path) -> None:
        super().write(assembly, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "more": 1}))


class InventsASite(sound()):
    """It says that it attends, and does not"""

    def sites(self, config: Any, towers: Any) -> Any:
        return [AttentionSite("language", 8, 2, 2, True, True)]

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        return replace(super().build(config, towers, outputs, context), attention_modules={"language": ("gate",)})


class HidesASite(InventsASite):
    """It does not say where it attends"""

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        return replace(super().build(config, towers, outputs, context), attention_modules={})


class WithoutParts(sound()):
    """A model with an image encoder of its own, whose connector starts at zero"""

    parts: ClassVar = {}
    roles: ClassVar = {("vision" if role == "vision.eye" else role): line for role, line in sound().roles.items()}

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        tower, own = KitTower(None), KitTower(None).configuration(None)
        made = super().build(config, {"eye": tower.build(own, context)}, {"eye": tower.describe(own)}, context)
        with torch.no_grad():
            made.model.connector.weight.zero_()
        return replace(made, roles={("vision" if role == "vision.eye" else role): n for role, n in made.roles.items()})

    def processor(self, config: Any, folder: Any, outputs: Any) -> Any:
        return super().processor(config, folder, {"eye": KitTower(None).describe(KitTower(None).configuration(None))})

    def write(self, assembly: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({n: t.contiguous() for n, t in assembly.model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(assembly.plan.model_spec.model.config))


class WithoutPartsAndBlind(WithoutParts):
    """A model with an image encoder of its own that sees nothing"""

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        structure = super().build(config, towers, outputs, context)
        structure.model.forward = sees_nothing(structure.model.forward)
        return structure


class NeedsWhatItCallsOptional(sound()):
    """Its only part may be empty, and then there is a role without a module"""

    parts: ClassVar = {"eye": TowerSlot("What looks", default=None)}

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        if towers:
            return super().build(config, towers, outputs, context)
        from graftwork.contracts import Structure

        return Structure(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"connector": ("connector",)})

    def processor(self, config: Any, folder: Any, outputs: Any) -> Any:
        return super().processor(config, folder, outputs) if outputs else None


class ReadsWhileBuilding(sound()):
    """It makes its connector on the CPU whatever is asked"""

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        structure = super().build(config, towers, outputs, context)
        connector = structure.model.connector
        connector._parameters["bias"] = torch.nn.Parameter(torch.zeros_like(connector.bias, device="cpu"))
        return structure
