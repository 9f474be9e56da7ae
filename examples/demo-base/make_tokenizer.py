"""Make the tokenizer of the tiny MGM-Gemma: byte-level BPE over easy-VQA's questions, with Gemma's special tokens.

Run it once, in this folder: it writes language/tokenizer.json and language/tokenizer_config.json.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
HERE = Path(__file__).parent


def main() -> None:
    """Train on the questions and answers of the training split, and write the two files."""
    spec = find_spec("easy_vqa")
    assert spec and spec.submodule_search_locations, "pip install easy-vqa"
    data = Path(spec.submodule_search_locations[0]) / "data" / "train" / "questions.json"
    texts = sorted(
        {text for question, answer, _ in json.loads(data.read_text()) for text in (question, answer, f" {answer}")}
    )
    size = json.loads((HERE / "language" / "config.json").read_text())["vocab_size"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts * 4,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=2),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    assert tokenizer.get_vocab_size() <= size, tokenizer.get_vocab_size()
    tokenizer.save(str(HERE / "language" / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "model_max_length": 512,
    }
    (HERE / "language" / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(
        f"{tokenizer.get_vocab_size()} tokens; 'What color is the shape?' is {tokenizer.encode('What color is the shape?').tokens}"
    )


if __name__ == "__main__":
    main()
