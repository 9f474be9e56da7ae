"""Parts of the work around and in a step, beside the same parts of another version of the project: ratios of processor time.

    python benchmarks/parts.py --other-tree FOLDER [--rounds 9] [PART …]

Each version has a process of its own that stays, on one thread; the rounds alternate between them, so that what else the machine does falls on
both. The ratio is taken round by round: above 1, this version is quicker. Results are compared by their content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from inputs import Timed, conversations, lora_blocks, mgm_images, qwen_encoder


def opening(folder: Path) -> Timed:
    """Every tensor of a file of 2,000, 31 MiB."""
    import torch
    from safetensors.torch import save_file

    from graftwork.weights import open_weights

    torch.manual_seed(0)
    save_file({f"layer.{number}.weight": torch.randn(64, 64) for number in range(2000)}, folder / "model.safetensors")
    return lambda: [read() for read in open_weights(folder).values()]


def hashing(folder: Path) -> Timed:
    """The hash of 256 MiB of base weights, asked for as often as a run of four checkpoints does."""
    from graftwork.weights import fingerprint

    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (1 << 20))
    return lambda: [fingerprint(folder) for _ in range(4)]


def collation(folder: Path) -> Timed:
    """The texts of eight records of about 1,024 tokens, 576 of them of an image."""
    from graftwork.contracts import IGNORED, Encoded, collate

    tokens, seen = list(range(1024)), [*[False] * 100, *[True] * 576, *[False] * 348]
    labels = [*[IGNORED] * 700, *range(324)]
    examples = [Encoded(tokens[n:], seen[n:], labels[n:], {}) for n in range(8)]

    def timed() -> Any:
        for _ in range(20):
            batch = collate(examples, pad_id=0)
        return [batch.input_ids, batch.attention_mask, batch.image_token_mask, batch.labels, batch.label_positions]

    return timed


def lengths(folder: Path) -> Timed:
    """How many tokens 256 conversations about an image have, with a LLaVA's template."""
    from transformers import AutoConfig

    from graftwork.data.measuring import lengths_of
    from graftwork_hf_vlm import HfVlmSettings
    from graftwork_hf_vlm.processor import HfProcessor

    records = conversations(folder)
    processor = HfProcessor(folder, AutoConfig.from_pretrained(folder), HfVlmSettings())
    return lambda: lengths_of(processor, records)


def as_seen(images: Any, pixels: Any) -> Any:
    """What towers see of pixels, which some versions send in 8 bits and have the model normalise."""
    return images.parts(pixels) if hasattr(images, "parts") else pixels


def image(folder: Path) -> Timed:
    """A JPEG of 1,024 x 768 pixels, as the host prepares it for MGM-2B, which sees it at 768 and at 336 pixels."""
    images, jpeg = mgm_images(folder)

    def timed() -> Any:
        found = [images.pixels(jpeg) for _ in range(5)]
        return lambda: [as_seen(images, each) for each in found]

    return timed


def pixels(folder: Path) -> Timed:
    """The images of eight records of MGM-2B joined in a batch."""
    from graftwork.contracts import Encoded, collate

    images, jpeg = mgm_images(folder)
    one = Encoded([5], [True], [5], images.pixels(jpeg))

    def timed() -> Any:
        batch = collate([one] * 8, pad_id=0)
        return lambda: as_seen(images, {name: each[:1] for name, each in batch.pixels.items()})

    return timed


def mining(folder: Path) -> Timed:
    """Patch-info mining of 8 x 8 patches of 8 x 8 pixels with ConvNeXt-L's widths, and its gradients."""
    import torch
    from torch import nn

    from graftwork_mgm.model import Mining

    torch.manual_seed(0)
    widths, low, owner = (192, 384, 768, 1536), 1024, nn.Module()
    for name, taken in (("query", low), ("aux", sum(widths)), ("val", sum(widths))):
        owner.add_module(f"vlm_uni_{name}_projector", nn.Sequential(nn.LayerNorm(taken), nn.Linear(taken, low)))
    fusion = Mining(owner, 1, False)
    coarse = torch.randn(1, 1, low, 8, 8)
    fine = [torch.randn(1, width, 64 >> level, 64 >> level) for level, width in enumerate(widths)]

    def timed() -> Any:
        owner.zero_grad()
        tokens = fusion(coarse, fine)
        tokens.square().mean().backward()
        return [tokens, owner.vlm_uni_aux_projector[1].weight.grad, owner.vlm_uni_val_projector[1].weight.grad]

    return timed


def optimizer(folder: Path) -> Timed:
    """Ten steps of the optimizer on 424 tensors, as LoRA of rank 16 on SmolLM2-135M has."""
    from types import SimpleNamespace
    from typing import cast

    import torch

    from graftwork.contracts import Assembly, Stepper, TrainSettings

    torch.manual_seed(0)
    model = torch.nn.Module()
    for number in range(424):
        model.register_parameter(f"lora_{number}", torch.nn.Parameter(torch.randn(16, 576 if number % 3 else 1536)))
    facts = {"model": model, "peft": None, "strategies": (), "device": torch.device("cpu"), "precision": "fp32"}
    assembly = SimpleNamespace(**facts, trained=lambda: dict(model.named_parameters()))
    stepper = Stepper(cast(Assembly, assembly), TrainSettings(batch_size=1, steps=1))
    for parameter in stepper.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    start = [parameter.detach().clone() for parameter in stepper.parameters.values()]

    def timed() -> Any:
        with torch.no_grad():
            for parameter, value in zip(stepper.parameters.values(), start, strict=True):
                parameter.copy_(value)
        stepper.optimizer.state.clear()
        for _ in range(10):
            stepper.optimizer.step()
        return list(stepper.parameters.values())

    return timed


def windows(folder: Path) -> Timed:
    """Four layers of Qwen2.5-VL's image encoder, a quarter as wide, on an image of 1,008 x 756 pixels, and their gradients."""
    from graftwork.attention import transformers as bridge
    from graftwork.attention.kernels import Binding, bind
    from graftwork.contracts import AttentionSite, NoSettings
    from graftwork_torch_attention import Sdpa

    bridge.register()
    encoder, timed = qwen_encoder(getattr(bridge, "WINDOWED", bridge.ATTN_IMPLEMENTATION))
    site = AttentionSite("vision", head_dim=80, heads=4, kv_heads=4, causal=False, padding=False)
    bind(encoder.modules(), Binding(site, [("sdpa", Sdpa(NoSettings()))]))
    return timed


def lora(folder: Path) -> Timed:
    """LoRA of rank 16 on the seven linear layers of three blocks as wide as SmolLM2-135M's, bf16, 512 tokens, and its gradients."""
    from graftwork_lora import Lora, LoraSettings

    method = Lora(LoraSettings(rank=16, alpha=32.0))
    return lora_blocks(lambda blocks, names: method.inject(blocks, names, fresh=True))


def efficientnet(folder: Path) -> Timed:
    """A frozen EfficientNet-Lite0 on an image of 768 pixels, bf16."""
    import torch

    from graftwork.contracts import BuildContext
    from graftwork_efficientnet import EfficientNetLite, EfficientNetSettings

    torch.manual_seed(0)
    tower = EfficientNetLite(EfficientNetSettings()).build({"image_size": 768}, BuildContext())
    tower, pixels = tower.bfloat16().eval().requires_grad_(False), torch.randn(1, 3, 768, 768)
    return lambda: [tower(pixels)[0].float()]


PARTS: dict[str, Callable[[Path], Timed]] = {
    part.__name__: part
    for part in (opening, hashing, collation, lengths, image, pixels, mining, optimizer, windows, lora, efficientnet)
}


def numbers(result: Any) -> Any:
    """Everything in a result as one array; what is no number, as its hash."""
    import numpy

    if callable(result):
        return numbers(result())
    if isinstance(result, dict):
        return numbers([result[name] for name in sorted(result)])
    if isinstance(result, (list, tuple)):
        return numpy.concatenate([numbers(each) for each in result])
    if isinstance(result, str):
        result = int.from_bytes(hashlib.sha256(result.encode()).digest()[:6], "big")
    return numpy.asarray(result.detach() if hasattr(result, "detach") else result, dtype=numpy.float64).reshape(-1)


def serve() -> None:
    """Answer each name of a part on standard input with its processor seconds and the file of its result."""
    import numpy

    warnings.filterwarnings("ignore")
    ready: dict[str, Timed] = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            name = line.strip()
            if name not in ready:
                (place := Path(folder) / name).mkdir()
                ready[name] = PARTS[name](place)
                ready[name]()
            begun = time.process_time()
            result = ready[name]()
            used = time.process_time() - begun
            numpy.save(file := Path(folder) / f"{name}.npy", numbers(result))
            print(json.dumps({"seconds": used, "result": str(file)}), flush=True)


def tree_on_path(tree: Path) -> str:
    """The PYTHONPATH with which a process runs the version of the project in `tree`."""
    return os.pathsep.join(map(str, [tree / "core", tree / "registry", *sorted((tree / "plugins").iterdir())]))


class Version:
    """A process that measures parts in one version of the project: this one, or that in another tree."""

    def __init__(self, tree: Path | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if tree:
            environment["PYTHONPATH"] = tree_on_path(tree)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, part: str) -> dict[str, Any]:
        """The processor seconds of one run of a part, and the numbers of its result."""
        import numpy

        assert self.process.stdin and self.process.stdout
        print(part, file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer | {"result": numpy.load(answer["result"])}


def difference(one: Any, other: Any) -> str:
    """How far two results are from one another, relative to their size."""
    import numpy

    if one.shape != other.shape:
        return "of other sizes"
    far = numpy.linalg.norm(one - other) / (numpy.linalg.norm(one) or 1.0)
    return f"{far:.0e} apart" if far else "equal"


def spread(values: Iterable[float], digits: int = 1) -> str:
    """A median with its range."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def main() -> None:
    """Print a table of the parts: both versions' times, their ratio, and whether the results are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--other-tree", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if not options.other_tree:
        parser.error("name the other version's folder with --other-tree")
    versions = Version(options.other_tree.resolve()), Version(None)
    print("| part | before, CPU ms | after | ratio | results |\n| --- | --- | --- | --- | --- |", flush=True)
    for part in options.parts or PARTS:
        rounds = [[version.measure(part) for version in versions] for _ in range(options.rounds)]
        before, after = ([each["seconds"] * 1e3 for each in column] for column in zip(*rounds, strict=True))
        ratio = spread((b / max(a, 1e-6) for b, a in zip(before, after, strict=True)), 2)
        apart = difference(*(each["result"] for each in rounds[-1]))
        print(f"| {part} | {spread(before)} | {spread(after)} | {ratio} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
