"""Writing a whole MGM folder, as published ones are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from graftwork.contracts import VisionTower, config_of
from graftwork.errors import CheckpointError
from graftwork.weights import LazyTensor, open_weights, read_json, tensor_files
from graftwork_mgm import KEYS, NESTED, PUBLISHED, TOWERS, TRAINED, selected_layer
from graftwork_mgm.backbones import Backbone

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from graftwork.contracts import Assembly


NAMED = {"low": ("openai", "sharegpt4v"), "high": ("openclip",)}
"""What upstream's loader wants in the path of a part's tower, one of it, in whatever case."""
CONVNEXTS = (("convnext", "large", "d-320"), ("convnext", "base", "w-320"), ("convnext", "xxlarge"))
"""What it wants in the name of a ConvNeXt's folder besides, all of one row."""
FILES = {
    "low": ("config.json", "preprocessor_config.json"),
    "high": ("open_clip_config.json", "open_clip_pytorch_model.bin"),
}
"""What it opens in a part's folder, whatever else is there."""
PARTS = {"low": "CLIP", "high": "ConvNeXt"}
FP16 = 65504.0
"""The largest number in fp16, in which upstream computes."""


def write_for_upstream(backbone: Backbone, assembly: Assembly, folder: Path) -> Sequence[str]:
    """A whole MGM folder that upstream's loader accepts: its towers are in their own folders, which it is told of. Returns what
    it will make of the folder.

    Raises CheckpointError where it would use other weights, or would not open the folder at all.
    """
    refuse_what_upstream_lacks(backbone, assembly)
    places = {part: tower_folder(part, assembly) for part in assembly.towers}
    trained = not is_own(assembly, "high", Path(places["high"]))
    write(backbone, assembly, folder)
    config = read_json(folder / "config.json")
    base = assembly.plan.model_spec.model.weights
    named: dict[str, Any] = {KEYS[part]: place for part, place in places.items()} | (
        {"_name_or_path": base.path} if base else {}
    )
    if rope := config.get("rope_scaling"):
        named["rope_scaling"] = {"type": rope.get("rope_type", rope.get("type")), "factor": rope["factor"]}
    write_json(folder / "config.json", {**config, **named, TRAINED["high"]: trained})
    for part in places:
        shutil.rmtree(folder / part)
    write_old_tokenizer(backbone, folder)
    source = f"this folder, as {TRAINED['high']} says" if trained else f"'{places['high']}'"
    return [
        f"upstream chooses the model by the folder's name, which must have {backbone.folder_name}",
        f"it takes CLIP's weights from this folder, and the ConvNeXt's from {source}; both towers' folders must stay where they are",
        *too_large(assembly),
    ]


def refuse_what_upstream_lacks(backbone: Backbone, assembly: Assembly) -> None:
    """CheckpointError for a model that upstream's code, or the transformers 4.38 that it needs, does not build."""
    config = assembly.plan.model_spec.model.config or {}
    language = config["language"]
    rope = language.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type"))
    width = language["num_attention_heads"] * language.get("head_dim", 0)
    reasons = [
        *["it has no high part ('NoneType' object has no attribute 'is_loaded')"] * ("high" not in assembly.towers),
        *(
            f"its {part} part is '{tower.name}', and upstream has only {PARTS[part]}"
            for part, tower in assembly.towers.items()
            if tower.name != type(assembly.architecture).parts[part].default
        ),
        *[f"its heads are {width} wide together, and the model is {language['hidden_size']}"]
        * (width not in (0, language["hidden_size"])),
        *[f"its rope_scaling is '{scaling}'"] * (scaling not in (None, "linear", "dynamic")),
        *["its feed-forward layers have biases"] * bool(language.get("mlp_bias")),
    ]
    if reasons:
        raise CheckpointError(f"upstream's loader cannot open this model: {'; '.join(reasons)}. Merge it instead")


def is_own(assembly: Assembly, part: str, folder: Path) -> bool:
    """Whether the model's tower of a part is, bit for bit, the one in a folder."""
    own, state = own_tensors(assembly, part, folder), assembly.model.get_submodule(TOWERS[part]).state_dict()
    return all(own[name]().float().equal(tensor.float()) for name, tensor in state.items())


def fits(assembly: Assembly, part: str, folder: Path) -> bool:
    """Whether a folder has every tensor of a part's tower in its shape."""
    own, state = own_tensors(assembly, part, folder), assembly.model.get_submodule(TOWERS[part]).state_dict()
    return all(name in own and own[name]().shape == tensor.shape for name, tensor in state.items())


def own_tensors(assembly: Assembly, part: str, folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a tower's own folder by the built tower's names."""
    tower = assembly.towers[part]
    named = ((tower.module_name(name), tensor) for name, tensor in open_weights(folder).items())
    return {name: tensor for name, tensor in named if name}


def too_large(assembly: Assembly) -> Iterator[str]:
    """What of the weights upstream cannot hold, which computes in fp16."""
    largest = max(float(tensor.abs().max()) for tensor in assembly.model.state_dict().values() if tensor.numel())
    if largest > FP16:
        yield f"it computes in fp16, in which the weights overflow: the largest is {largest:.3g}"


def write_old_tokenizer(backbone: Backbone, folder: Path) -> None:
    """Change a tokenizer's files so that transformers 4.38 reads them, which upstream needs: it looks the class up by
    its name, and knows the merges of a vocabulary as "left right" only."""
    config = read_json(folder / "tokenizer_config.json")
    special = {"additional_special_tokens": config.pop("extra_special_tokens", [])}
    write_json(folder / "tokenizer_config.json", {**config, **special, "tokenizer_class": backbone.tokenizer})
    tokenizer = read_json(folder / "tokenizer.json")
    merges = tokenizer["model"].get("merges", [])
    tokenizer["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def tower_folder(part: str, assembly: Assembly) -> str:
    """The folder that upstream's loader will read a part's tower from."""
    choice, tower = assembly.plan.model_spec.parts[part], assembly.towers[part]
    option = f"--part {part}=DIR"
    if not choice.folder or not tensor_files(folder := Path(choice.folder)):
        raise CheckpointError(
            f"upstream reads the {part} part's tower from a folder of its own, and this checkpoint knows none with weights; name "
            f"{PARTS[part]}'s own with {option}, or merge it instead"
        )
    path, name = choice.folder.lower(), folder.name.lower()
    known = any(word in path for word in NAMED[part])
    if part == "high" and known:
        known = any(all(word in name for word in words) for words in CONVNEXTS)
    if not known:
        wanted = "openai" if part == "low" else "openclip, convnext, large and d-320"
        raise CheckpointError(
            f"upstream knows a tower by its folder's name, and would not know '{choice.folder}' as the {part} part's; give it a "
            f"name with {wanted} in it, and name that with {option}"
        )
    if missing := [file for file in FILES[part] if not (folder / file).is_file()]:
        raise CheckpointError(
            f"upstream reads {' and '.join(missing)} of the {part} part's folder, and '{folder}' lacks it; name {PARTS[part]}'s own "
            f"folder with {option}"
        )
    size = assembly.outputs[part].pixels.size
    if tower.describe(tower.configuration(folder), size) != assembly.outputs[part] or not fits(assembly, part, folder):
        raise CheckpointError(
            f"'{folder}' holds another {PARTS[part]} than the model's {part} part; name the right one with {option}"
        )
    return choice.folder


def write(backbone: Backbone, assembly: Assembly, folder: Path) -> None:
    """Tokenizer, weights with an index, config.json, and each tower's configuration in a folder of its part's name."""
    assembly.processor.save(folder)
    tensors = {published(name, assembly.towers): tensor for name, tensor in assembly.model.state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)  # Upstream's loader wants one, even for a single file.
    write_json(folder / "config.json", configuration(backbone, assembly, tensors))
    for part, choice in assembly.plan.model_spec.parts.items():
        (folder / part).mkdir()
        write_json(folder / part / "config.json", choice.config)


def published(name: str, towers: Mapping[str, VisionTower[Any]]) -> str:
    """The name of the built model's tensor `name` in a published folder."""
    for part, tower in towers.items():
        if name.startswith(f"{TOWERS[part]}."):
            return f"{TOWERS[part]}.{NESTED[part]}{tower.published_name(name.removeprefix(f'{TOWERS[part]}.'))}"
    return name


def configuration(backbone: Backbone, assembly: Assembly, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a published folder."""
    config = assembly.plan.model_spec.model.config or {}
    outputs, high = assembly.outputs, "high" in assembly.towers
    return {
        **config["language"],
        "architectures": [backbone.architecture],
        "model_type": backbone.model_types[1],
        "torch_dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
        **{key: config[name] for name, (key, _, _) in PUBLISHED.items() if name in config},
        KEYS["low"]: "low",
        "mm_hidden_size": outputs["low"].widths[0],
        **({KEYS["high"]: "high", "mm_hidden_size_aux": sum(outputs["high"].widths)} if high else {}),
        "mm_vision_select_layer": selected_layer(
            assembly.towers["low"], config_of(assembly.plan.model_spec.parts["low"])
        ),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        TRAINED["low"]: False,
        TRAINED["high"]: config.get("high_from") == "here" or trains_high(assembly),
    }


def trains_high(assembly: Assembly) -> bool:
    """Whether the run trains the high tower, so that whoever opens the folder must take its weights from there."""
    spec = assembly.plan.model_spec
    return not {"vision", "vision.high"}.isdisjoint((*spec.on, *spec.also_train))


def write_json(file: Path, content: Any) -> None:
    """Write JSON as people read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
