"""What is tried of each family: that Graftwork computes with it what transformers and peft compute, and that what it writes opens in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny_runs import Shapes

from graftwork.build import compose
from graftwork.build.outline import outline
from graftwork.checkpoint.merging import export, merge
from graftwork.checkpoint.store import Opened, newest, open_checkpoint
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.conformance import specimens
from graftwork.contracts import IGNORED, Assembly, DictLookup, Image, Plan, Record, Turn, batch_of
from graftwork.data import load_image
from graftwork.evaluate.evaluation import image_features
from graftwork.evaluate.generation import answer
from graftwork.jobs.verify import FreshProcess
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork.train.loop import train
from graftwork_hf_vlm import HfVlm
from graftwork_lora import Lora
from graftwork_torch_attention import Eager, Sdpa

LOOKUP = DictLookup(HfVlm, Sdpa, Eager, Lora, Shapes)


def seen(colour: str, width: int, height: int) -> Image:
    """A drawn image."""
    return specimens.image(colour, (width, height))


def record(name: str, asked: str, *images: Image) -> Record:
    """A record of two questions and two answers."""
    said = [("user", asked), ("assistant", "yes"), ("user", "And now?"), ("assistant", "no thanks")]
    return Record(name, tuple(Turn(role, text) for role, text in said), images)  # type: ignore[arg-type]


RECORDS = (
    record("one", "<image>\nWhat colour is it?", seen("red", 64, 64)),
    record("wide and tall", "<image><image>\nAre they the same?", seen("blue", 150, 70), seen("lime", 60, 130)),
    record("text", "Say yes."),
    record(
        "three",
        "Are <image> and <image> as <image>?",
        seen("red", 40, 32),
        seen("teal", 120, 120),
        seen("pink", 99, 64),
    ),
)

READ = (
    RECORDS[0],
    Record(
        "between",
        (Turn("user", "What is in <image> and <image>?"), Turn("assistant", "Two shapes: 1, 2")),
        RECORDS[1].images,
    ),
    Record("lines", (Turn("user", "Say yes\ntwice."), Turn("assistant", "Yes,\nyes."))),
)
"""Records whose labels are written out for each family."""


def run_table(folder: Path) -> dict[str, Any]:
    """A run file's table for a model in a folder."""
    return {
        "model": {"use": "hf-vlm", "weights": str(folder)},
        "attention": {"prefer": ["sdpa"]},
        "train": {"precision": "fp32"},
    }


def lora_plan(folder: Path, unread: Sequence[str] = ()) -> Plan:
    """Three steps of LoRA on the language model's attention, vision and connector, of which some modules are `unread`."""
    table = run_table(folder)
    table["peft"] = {"use": "lora", "on": ["language.attention", "vision", "connector"], "rank": 4}
    table["data"] = {"source": [{"use": "shapes", "count": 8}]}
    table["train"] |= {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "max_length": 512}
    table["train"]["allow_unreached"] = [*unread]
    return resolve(parse_run(table, Path.cwd()), LOOKUP)


def built(folder: Path) -> Assembly:
    """The model as Graftwork builds it."""
    assembly = compose.build(resolve(parse_run(run_table(folder), Path.cwd()), LOOKUP), LOOKUP, device="cpu")
    assembly.model.eval()
    return assembly


def theirs(folder: Path) -> Any:
    """The model as transformers opens it, with nothing missing, unexpected or of another shape."""
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def inputs(assembly: Assembly, record: Record) -> Any:
    """What transformers' own processor makes of what the template writes."""
    processor: Any = assembly.processor
    images = [load_image(image) for image in record.images] or None
    text = processor.written(record).text
    try:
        return processor.hf(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    except ValueError:  # GOT-OCR's reads no text without an image
        assert not images
        return processor.tokenizer([text], return_tensors="pt", add_special_tokens=False)


def logits_error(assembly: Assembly, model: Any, records: Sequence[Record] = RECORDS) -> float:
    """The largest difference of a logit in one batch, such as of records with one, two, three and no images."""
    encoded = [assembly.processor.encode(each) for each in records]
    assert [assembly.processor.length(each) for each in records] == [len(each.input_ids) for each in encoded]
    worst = 0.0
    with torch.no_grad():
        hidden = assembly.model(batch_of(assembly.processor, encoded))
        for row, each in enumerate(records):
            wanted = model(**inputs(assembly, each)).logits[0]
            worst = max(worst, far(assembly.model.logits(hidden[row, : len(wanted)]), wanted))
    return worst


def answers(assembly: Assembly, model: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Graftwork's greedy answers in one batch, each with transformers' alone."""
    prompts = [(each, assembly.processor.encode(each.without_answer())) for each in (*RECORDS, RECORDS[0])]
    only = [prompt for _, prompt in prompts]
    found = answer(assembly, only, max_new_tokens=8, features=image_features(assembly, prompts))
    assert found == answer(assembly, only, max_new_tokens=8)
    for (each, _), ids in zip(prompts, found.token_ids, strict=True):
        given = inputs(assembly, each.without_answer())
        made = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
        end = next((place for place, token in enumerate(made) if token in assembly.processor.stop_ids), len(made))
        yield list(ids), made[:end]


def labelled(assembly: Assembly, record: Record) -> list[str]:
    """Each stretch of labels as text, special tokens included."""
    encoded, found = assembly.processor.encode(record), [list[int]()]
    for label in encoded.labels:
        if label != IGNORED:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [assembly.processor.tokenizer.decode(ids) for ids in found if ids]  # type: ignore[attr-defined]


def trained(folder: Path, out: Path, unread: Sequence[str] = ()) -> Opened:
    """A checkpoint of a run on LoRA, verified in a fresh process and opened here."""
    outcome = train(lora_plan(folder, unread), LOOKUP, out, device="cpu")
    assert all(torch.tensor(line["loss"]).isfinite() for line in outcome.log)
    with FreshProcess(LOOKUP) as fresh:
        facts = fresh.verify(newest(out))
    opened = open_checkpoint(out, LOOKUP, device="cpu", precision="fp32")
    assert opened.verification.error < 1e-5 and opened.verification.distance > 1e-4, facts
    assert opened.assembly.changes_image_features
    return opened


def base_error(opened: Opened, model: Any) -> float:
    """The largest difference of a logit between the base, with an adapter on vision and connector disabled, and transformers' model."""
    each = RECORDS[1]
    batch = batch_of(opened.assembly.processor, [opened.assembly.processor.encode(each)])
    with torch.no_grad(), opened.assembly.disable_adapter():
        found = opened.assembly.model.logits(opened.assembly.model(batch))
        return far(found, model(**inputs(opened.assembly, each)).logits)


def exports_error(opened: Opened, model: Any, folder: Path, work: Path) -> tuple[float, float]:
    """How far the logits of plain transformers with a merged folder, and of plain peft, are from those of the checkpoint."""
    each = RECORDS[1]
    given = inputs(opened.assembly, each)
    with torch.no_grad():
        batch = batch_of(opened.assembly.processor, [opened.assembly.processor.encode(each)])
        learned = opened.assembly.model.logits(opened.assembly.model(batch))
        export(opened, "peft", work / "peft", LOOKUP)
        merge(opened, work / "merged", LOOKUP)
        merged = far(theirs(work / "merged")(**given).logits, learned)
        for file in {file.name for file in folder.iterdir()} - {"model.safetensors"}:
            assert (work / "merged" / file).read_bytes() == (folder / file).read_bytes(), file
        plain = peft.PeftModel.from_pretrained(model, work / "peft").eval()
        return merged, far(plain(**given).logits, learned)


def peaks(folder: Path) -> tuple[int, int]:
    """The peak of a step in bytes, rehearsed on fake tensors and tracked on real ones."""
    table = run_table(folder)
    table["peft"] = {"use": "lora", "on": ["language.attention", "vision"], "rank": 4}
    table["train"] |= {"batch_size": 2, "max_length": 512}
    plan = resolve(parse_run(table, Path.cwd()), LOOKUP)
    with rehearsing(plan, LOOKUP, Machine(), device="cpu") as watched:
        predicted = watched.take(2).footprint.peak
    with watching(plan, LOOKUP) as watched:
        return predicted, watched.take(2).footprint.peak


def attention(folder: Path) -> list[str]:
    """Whose attention is computed at each site, and why it is not Graftwork's."""
    found = outline(resolve(parse_run(run_table(folder), Path.cwd()), LOOKUP), LOOKUP, Machine())
    return [f"{row.site}: {row.kernel}" + "".join(f" ({why})" for _, why in row.passed_over) for row in found.kernels]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())
