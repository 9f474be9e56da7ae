"""Teach the demo's towers, mining and connector to see, before there is a language model to talk to.

As CLIP's tower is trained before it is put into a larger model, these are trained to answer the yes/no questions about
easy-VQA's training pictures without reading them: every distinct question is one output of a linear head on the mean of
the picture tokens. The head is thrown away.

    python examples/demo-base/pretrain_vision.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from graftwork import compose, runfile
from graftwork.resolve import restore_component, resolve
from graftwork_registry import Catalog

HERE = Path(__file__).resolve().parent
STEPS, BATCH, RATE = 1200, 64, 2e-3


def main() -> None:
    """Train, and write a whole model, whose language model is still random, into FOLDER."""
    catalog = Catalog.discover()
    plan = resolve(runfile.load(HERE / "vision.toml"), catalog)
    assembly = compose.build(plan, catalog)
    (source,) = (restore_component(choice, catalog) for choice in plan.circumstance.sources)
    records = list(source.records())
    questions = sorted({record.question for record in records})
    pictures = sorted({record.pictures[0] for record in records}, key=str)
    place = {picture: row for row, picture in enumerate(pictures)}
    # -1: this question was not asked about this picture.
    answers = torch.full((len(pictures), len(questions)), -1.0)
    first = {}
    for record in records:
        first.setdefault(record.pictures[0], record)
        answers[place[record.pictures[0]], questions.index(record.question)] = float(record.turns[-1].text == "yes")
    encoded = [assembly.processor.encode(first[picture]).pixels for picture in pictures]
    pixels = {part: torch.cat([one[part] for one in encoded]) for part in encoded[0]}

    model = assembly.model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale_parameter"):
                parameter.fill_(0.1)  # From 1e-6, which suits deep ConvNeXts, a shallow one learns no shapes for long.
    head = torch.nn.Linear(plan.identity.model.config["language"]["hidden_size"], len(questions))
    optimizer = torch.optim.AdamW([*assembly.trained().values(), *head.parameters()], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        rows = torch.randint(len(pictures), (BATCH,))
        tokens = model.picture_tokens(model.see({part: values[rows] for part, values in pixels.items()}))
        wanted = answers[rows]
        asked = wanted >= 0
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(tokens.mean(1))[asked], wanted[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.4f} (0.44 without looking)", flush=True)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    assembly.architecture.write(assembly, folder)


if __name__ == "__main__":
    main()
