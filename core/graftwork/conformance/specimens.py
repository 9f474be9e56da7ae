"""What components are tried on: a small transformer in an assembly, records with images, and a vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.build import compose
from graftwork.build.sharding import complete
from graftwork.build.values import parameters_on_meta
from graftwork.contracts.anatomy import BuildContext, PixelSettings, Structure, TowerOutput, named_tensors
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.batch import Batch
from graftwork.contracts.kinds import MemoryStrategy, PeftMethod, VisionTower
from graftwork.contracts.loss import summed_loss
from graftwork.contracts.plan import Choice, ModelSpec, Plan, TrainSettings
from graftwork.contracts.records import Image, Record, Turn
from graftwork.contracts.stepper import Stepper, stepper_for

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCABULARY, WIDTH, TOKENS = 13, 8, 6
ROLES: Mapping[str, tuple[str, ...]] = {
    "first": ("blocks.0",),
    "second": ("blocks.1",),
    "rest": ("embedding", "norm", "head"),
}
"""The roles of the transformer."""


# A transformer ----------------------------------------------------------------------------------------------------------


def transformer(dropout: float = 0.0) -> nn.Module:
    """Two blocks of self-attention between an embedding and a head. Always the same weights."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.key = nn.Linear(WIDTH, WIDTH, bias=False)
            self.mlp_norm = nn.LayerNorm(WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
            self.dropout = nn.Dropout(dropout)

        def forward(self, hidden: Tensor) -> Tensor:
            normed = self.norm(hidden)
            shares = (self.query(normed) @ self.key(normed).mT * WIDTH**-0.5).softmax(-1)
            hidden = hidden + self.dropout(self.out(shares @ self.value(normed)))
            mixed: Tensor = self.down(nn.functional.gelu(self.up(self.mlp_norm(hidden))))
            return hidden + mixed

    class Fusion(nn.Module):
        def forward(self, coarse: Tensor, fine: Sequence[Tensor]) -> Tensor:
            return coarse + fine[0].tanh()

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fusion = nn.Embedding(VOCABULARY, WIDTH), Fusion()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

        def forward(self, batch: Batch) -> Tensor:
            embedded = self.embedding(batch.input_ids)
            hidden: Tensor = self.fusion(embedded, [embedded.flip(-1)])  # as if these were maps of two towers
            for block in self.blocks:
                hidden = block(hidden)
            return self.norm(hidden)  # type: ignore[no-any-return]

        def logits(self, hidden: Tensor) -> Tensor:
            return self.head(hidden)  # type: ignore[no-any-return]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer()
        with torch.no_grad():
            for parameter in model.parameters():  # no bias is zero and no scale is one, so that none can be forgotten
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assemble(
    *,
    peft: PeftMethod[Any] | None = None,
    strategies: Sequence[MemoryStrategy[Any]] = (),
    on: Sequence[str] = ("first",),
    also_train: Sequence[str] = (),
    dropout: float = 0.0,
    meta: bool = False,
) -> Assembly:
    """An assembly around the transformer, built as core builds one, up to where the PEFT method is injected."""
    import torch

    with ExitStack() as building:
        for strategy in strategies:
            building.enter_context(strategy.building())
        if meta:
            building.enter_context(parameters_on_meta())
        model = transformer(dropout).eval()
    nothing = cast(Any, None)  # neither PEFT methods nor memory strategies are given the rest of an assembly
    method = Choice("peft", peft.name, peft.name, "none", "0") if peft else None
    return Assembly(
        plan=Plan(
            ModelSpec(
                Choice("model", "none", "none", "none", "0"), {}, method, tuple(on) if peft else (), tuple(also_train)
            )
        ),
        architecture=nothing,
        towers={},
        outputs={},
        structure=Structure(model, ROLES, blocks={"language": ("blocks.0", "blocks.1"), "mining": ("fusion",)}),
        processor=nothing,
        peft=peft,
        strategies=strategies,
        bindings={},
        device=torch.device("meta" if meta else "cpu"),
        precision="fp32",
    )


def adapt(assembly: Assembly, *, fresh: bool = True, saved: Mapping[str, Tensor] | None = None) -> Assembly:
    """Inject the PEFT method, load `saved` values, and let the memory strategies prepare, as core does."""
    names = compose.adapt(assembly, named_tensors(assembly.model).keys(), fresh=fresh)
    sharders = [shard for each in assembly.strategies if (shard := each.sharder(assembly)) is not None]
    complete(assembly, sharders, saved, names, None)
    compose.prepare(assembly)
    return assembly


def batch() -> Batch:
    """Two rows of `TOKENS` tokens, of which all but the first are labels."""
    import torch

    ids = torch.arange(2 * TOKENS).view(2, TOKENS) * 5 % VOCABULARY
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, real, ~real, labels=ids, pixels={})


def logits(assembly: Assembly) -> Tensor:
    """What the transformer computes of `batch`, without dropout or gradients."""
    import torch

    model = assembly.model.eval()
    with torch.no_grad():
        return model.logits(model(batch())).clone()  # type: ignore[no-any-return]


def loss(assembly: Assembly) -> Tensor:
    """The summed cross entropy of the labels."""
    with assembly.autocast():
        return summed_loss(assembly.model, batch(), assembly.cross_entropy)


def stepper(assembly: Assembly) -> Stepper:
    """What takes the steps of a run, as core does."""
    return stepper_for(assembly, TrainSettings(learning_rate=0.05, weight_decay=0.01))


def train(assembly: Assembly, steps: int = 3, by: Stepper | None = None) -> list[float]:
    """Train for a few steps, with a new optimizer or one in use; returns the losses. Dropout is the same in each call."""
    import torch

    by = by or stepper(assembly)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assembly.model.train()
        for _ in range(steps):
            losses.append(float(by.accumulate(batch(), num_label_tokens=2 * (TOKENS - 1))))
            by.gradient_norm()
            by.update()
            by.clear()
    assembly.model.eval()
    return losses


@contextmanager
def calls_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """While entered, records the inputs and the output of each named module's first call."""
    calls: dict[str, tuple[Any, Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, inputs, output: calls.setdefault(name, (inputs, output)) and None

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def distance(first: Tensor, second: Tensor) -> float:
    """The largest difference between two tensors; infinite where their shapes differ or one is not finite."""
    if first.shape != second.shape:
        return float("inf")
    difference = float((first.detach().float() - second.detach().float()).abs().max())
    return difference if difference == difference else float("inf")


# Records ----------------------------------------------------------------------------------------------------------------


def image(colour: str, size: tuple[int, int] = (40, 32)) -> Image:
    """A PNG of one colour, as bytes."""
    from io import BytesIO

    from PIL import Image as PILImage

    file = BytesIO()
    PILImage.new("RGB", size, colour).save(file, "PNG")
    return Image(data=file.getvalue())


def records() -> list[Record]:
    """Conversations with and without an image, with their answers; the last has two questions."""
    asked = "<image>\nWhat colour is it?"
    return [
        Record("red", (Turn("user", asked), Turn("assistant", "red")), (image("red"),), where="kit:1"),
        Record("text", (Turn("user", "Say yes."), Turn("assistant", "yes")), where="kit:2"),
        Record(
            "blue",
            (
                Turn("user", asked + " Is it the sea?"),
                Turn("assistant", "blue"),
                Turn("user", "Is it round?"),
                Turn("assistant", "no"),
            ),
            (image("blue", (32, 48)),),
            where="kit:3",
        ),
    ]


# A vision tower ---------------------------------------------------------------------------------------------------------


class KitTower(VisionTower[Any]):
    """One map of width 16 with a row and a column for every 8 pixels; 32 pixels, or any other multiple of 8"""

    name = "conformance-tower"

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """Always the same."""
        return {"size": 32, "patch": 8, "width": 16}

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """One map."""
        size = size or config["size"]
        side = size // config["patch"]
        pixels = PixelSettings(size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        return TowerOutput((config["width"],), ((side, side),), pixels)

    def build(self, config: Mapping[str, Any], context: BuildContext) -> nn.Module:
        """A convolution."""
        from torch import nn

        class Tower(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patches = nn.Conv2d(3, config["width"], config["patch"], stride=config["patch"])

            def forward(self, pixels: Tensor) -> list[Tensor]:
                return [self.patches(pixels).tanh()]

        return Tower()

    def module_name(self, name: str) -> str | None:
        """The module's own names."""
        return name if name.startswith("patches.") else None
