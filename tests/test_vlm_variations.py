"""Folders of one family differ in what their files say and where they say it: Graftwork reads of each what transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vlm_trial as trial
from safetensors.torch import load_file, save_file
from vlm_families import FAMILIES, PARTS

from graftwork.contracts import Record, Turn
from graftwork.data import load_image
from graftwork.errors import DataError
from graftwork_hf_vlm.template import message_of

TEMPLATE, TOKENIZER, PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "processor_config.json"
Change = Callable[[Path], object]


def changed(file: Path, **changes: Any) -> None:
    """Write other values into a JSON file; None removes one."""
    said = {**(json.loads(file.read_text()) if file.is_file() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def images(**changes: Any) -> Change:
    return lambda folder: changed(folder / "preprocessor_config.json", **changes)


def taken(file: Path) -> str:
    """The text of a file, which is there no longer."""
    text = file.read_text()
    file.unlink()
    return text


def images_in_the_processor(folder: Path) -> None:
    said = json.loads(taken(folder / "preprocessor_config.json"))
    changed(folder / PROCESSOR, image_processor={**said, "image_mean": [0.3] * 3})


def template_in(file: str, made: Callable[[str], Any] = str) -> Change:
    return lambda folder: changed(folder / file, chat_template=made(taken(folder / TEMPLATE)))


def among_others(template: str) -> list[dict[str, str]]:
    return [{"name": "tool_use", "template": "other"}, {"name": "default", "template": template}]


def template_twice(folder: Path) -> None:
    changed(folder / "chat_template.json", chat_template="Twice." + (folder / TEMPLATE).read_text())


def before(text: str) -> Change:
    return lambda folder: (folder / TEMPLATE).write_text(text + (folder / TEMPLATE).read_text())


def generation(folder: Path) -> None:
    text = (folder / TEMPLATE).read_text()
    begin, end = text.index(PARTS[:20]), text.index("{% endfor %}") + len("{% endfor %}")
    told = f"{{% generation %}}{text[begin:end]}{{% endgeneration %}}"
    choice = f"{{% if message['role'] == 'assistant' %}}{told}{{% else %}}{text[begin:end]}{{% endif %}}"
    (folder / TEMPLATE).write_text(text[:begin] + choice + text[end:])


def shards(folder: Path) -> None:
    model = trial.theirs(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1


def bf16(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: each.bfloat16() for name, each in load_file(file).items()}, file, metadata={"format": "pt"})
    changed(folder / "config.json", dtype="bfloat16")


def without(token: str) -> Change:
    return lambda folder: changed(folder / TOKENIZER, **{token: None})


SYSTEM = "{% if messages[0]['role'] != 'system' %}Be kind. {% endif %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system message.') }}{% endif %}"
VARIATIONS: dict[str, Change] = {
    "no resize": images(do_resize=False, do_center_crop=True),
    "mean and std": images(image_mean=[0.1, 0.2, 0.3], image_std=[0.7, 0.8, 0.9]),
    "no normalize": images(do_normalize=False),
    "no rescale": images(do_rescale=False),
    "rescale": images(rescale_factor=1 / 127.5),
    "bicubic": images(resample=3),
    "images in the processor": images_in_the_processor,
    "template in JSON": template_in("chat_template.json"),
    "template twice": template_twice,
    "template in the processor": template_in(PROCESSOR),
    "template in the tokenizer": template_in(TOKENIZER),
    "template among others": template_in(TOKENIZER, among_others),
    "default system prompt": before(SYSTEM),
    "no system prompt": before(REFUSING),
    "date": before("{{ strftime_now('%Y') }} "),
    "generation": generation,
    "shards": shards,
    "bf16": bf16,
    "no padding": without("pad_token"),
    "no first token": without("bos_token"),
}
TOGETHER = (
    ("gemma3", ("images in the processor", "template among others", "bf16", "no first token", "no padding")),
    ("llava", ("no resize", "template twice", "shards")),
)
"""Variations that are tried at once in every run of the tests; each of them alone in the long one."""
ALONE = [
    (name, (each,))
    for name in ("llava", "qwen2_5_vl", "gemma3")
    for each in VARIATIONS
    if each != "no resize" or name == "llava"  # the others do not make images one size where they do not resize
]
ASKED = tuple(Record(each.id, each.turns[:1], each.images) for each in trial.RECORDS)


def theirs_of(processor: Any, record: Record) -> Any:
    """What transformers' own processor makes of a question."""
    messages, shown = [message_of(turn) for turn in record.turns], iter(record.images)
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = load_image(next(shown))
    template = None if processor.chat_template else processor.tokenizer.get_chat_template()
    return processor.apply_chat_template(
        messages, template, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("name", "variations"),
    [*TOGETHER, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALONE)],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_folder_is_read_as_transformers_reads_it(
    name: str, variations: tuple[str, ...], folder_of: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of(name), tmp_path / "model"))
    for each in variations:
        VARIATIONS[each](folder)
    assembly = trial.built(folder)
    assert trial.logits_error(assembly, trial.theirs(folder)) < 1e-5
    read = [tuple(trial.labelled(assembly, each)) for each in trial.READ]
    assert read == list(FAMILIES[name].labels)
    if name == "qwen2_5_vl":
        return  # whose processor transformers itself reads only with torchvision, for videos
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    image = getattr(assembly.processor, "image_id", None)
    for record in ASKED:
        ours, wanted = assembly.processor.encode(record), theirs_of(processor, record)
        shown = zip(ours.input_ids, ours.image_token_mask, strict=True)
        assert [image if is_image else token for token, is_image in shown] == wanted["input_ids"][0].tolist()
        assert not record.images or torch.equal(ours.pixels["pixel_values"], wanted["pixel_values"])


def test_a_template_that_takes_no_system_turn_refuses_a_record_with_one(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen2_5_vl"), tmp_path / "model"))
    before(REFUSING)(folder)
    system = Record("told", (Turn("system", "Be brief."), *trial.READ[2].turns))
    with pytest.raises(DataError, match=r"record 'told' does not fit the model's chat template \(No system message.\)"):
        trial.built(folder).processor.encode(system)


def test_images_that_a_processor_without_resizing_does_not_take_are_refused(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen2_5_vl"), tmp_path / "model"))
    images(do_resize=False)(folder)
    assembly = trial.built(folder)
    fits = trial.record("fits", "<image>\nWhat?", trial.seen("red", 84, 56))
    assert trial.logits_error(assembly, trial.theirs(folder), [fits]) < 1e-5
    with pytest.raises(DataError, match=r"transformers' processor refuses record 'one' \(cannot reshape array"):
        assembly.processor.encode(trial.RECORDS[0])
