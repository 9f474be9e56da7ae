"""What every model architecture must do, tried on one that is built with the kit's own tower in each of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.build import compose
from graftwork.build.filling import check_keys
from graftwork.config.sites import attention_sites
from graftwork.conformance.outcome import Check, Skipped, Subject
from graftwork.conformance.recorder import misfit, recorder
from graftwork.conformance.specimens import KitTower, distance, image, records
from graftwork.conformance.weighted import folder_of
from graftwork.contracts.anatomy import AttentionCase, named_tensors, within
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.batch import Batch, Encoded
from graftwork.contracts.kinds import ModelArchitecture
from graftwork.contracts.lookup import DictLookup, Lookup
from graftwork.contracts.model import batch_of, completed
from graftwork.contracts.plan import Plan, WeightsRef

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4
"""How far rounding may move a hidden state in fp32, relative to the largest."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}


@dataclass
class Built:
    """A model that was built on core's one construction path."""

    assembly: Assembly
    lookup: Lookup
    cases: list[AttentionCase]
    """What its attention sites have computed so far."""


def built(subject: Subject) -> Built:
    """The model with every part filled, built once."""

    def make() -> Built:
        kernel, cases = recorder()
        lookup = DictLookup(subject.component, KitTower, kernel)
        parts = dict.fromkeys(_model_class(subject).parts, KitTower.name)
        plan = plan_of(subject, parts, lookup, kernel.name)
        assembly = compose.build(plan, lookup, device="cpu")
        with_effect(assembly)
        assembly.model.eval()
        return Built(assembly, lookup, cases)

    made: Built = subject.once("building it", make)
    return made


def with_effect(assembly: Assembly) -> None:
    """Let nothing that starts at zero hide what it is for, such as Gemma 3's projector, without which images are not seen."""
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in assembly.model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.05)


def plan_of(subject: Subject, parts: Mapping[str, str], lookup: Lookup, kernel: str) -> Plan:
    """The plan of a run that would train this model in fp32."""
    from graftwork.config.resolve import resolve
    from graftwork.config.runfile import parse_run

    folder = folder_of(subject)
    table = {
        "model": {
            "use": subject.component.name,
            "parts": {part: {"use": use} for part, use in parts.items()},
            **({"config": str(folder)} if folder else {}),
            **subject.settings,
        },
        "attention": {"prefer": [kernel]},
        "train": {"precision": "fp32"},
    }
    return resolve(parse_run(table, Path.cwd()), lookup)


def _model_class(subject: Subject) -> type[ModelArchitecture[Any]]:
    return cast(type[ModelArchitecture[Any]], subject.component)


def hidden(assembly: Assembly, batch: Batch, *more: Any) -> Tensor:
    """The final hidden states, without gradients."""
    import torch

    with torch.no_grad():
        return assembly.model(batch, *more)  # type: ignore[no-any-return]


def examples(assembly: Assembly, *, prompts: bool = False) -> list[Encoded]:
    """The kit's records, encoded; as prompts without their last answers."""
    return [assembly.processor.encode(record.without_answer() if prompts else record) for record in records()]


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; 0 where it is rounding."""
    apart = distance(found, expected) / max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    return apart if apart > TOLERANCE else 0.0


# The structure ----------------------------------------------------------------------------------------------------------


def every_parameter_has_one_role(subject: Subject) -> Iterator[str]:
    """Roles are declared, what they name exists, and together they hold each parameter once; so does each part."""
    structure, component = built(subject).assembly.structure, _model_class(subject)
    known = {name for name, _ in (*structure.model.named_modules(), *structure.model.named_parameters())}
    for role, names in structure.roles.items():
        if role not in component.roles:
            yield f"every role must be declared, and '{role}' is not in 'roles'; add it with a line on what it is"
        for name in names:
            if name not in known:
                yield f"a role must name modules or parameters, and there is no '{name}' for '{role}'; fix 'build'"
    for role in component.newly_initialised_roles:
        if role not in component.roles:
            yield f"'newly_initialised_roles' must be roles, and '{role}' is none; add it to 'roles', or remove it"
    for part in component.parts:
        if len(structure.roles.get(f"vision.{part}", ())) != 1:
            yield f"a filled part must be one module, and 'vision.{part}' names none or several; add the role with the tower's name"
    for name, _ in structure.model.named_parameters():
        holders = [role for role, names in structure.roles.items() if within(name, names)]
        if len(holders) != 1:
            named = " and ".join(f"'{role}'" for role in holders) or "no role"
            yield f"every parameter must be in one role, and '{name}' is in {named}; fix the roles in 'build'"


def blocks_and_sites_exist(subject: Subject) -> Iterator[str]:
    """Every block and every module of an attention site is there, and every site of `sites` has modules."""
    assembly = built(subject).assembly
    structure, modules = assembly.structure, dict(assembly.model.named_modules())
    for kind, rows in (("block", structure.blocks), ("site", structure.attention_modules)):
        for row, names in rows.items():
            for name in names:
                if name not in modules:
                    yield f"a {kind} must be a module, and '{row}' names '{name}', which there is not; fix 'build'"
    for site in attention_sites(assembly.plan, assembly.architecture, assembly.towers, assembly.outputs):
        if not site.own and site.name not in structure.attention_modules:
            yield f"'build' must say where every site is, and '{site.name}' has no modules; add it to Structure(attention_modules=…)"


def attention_is_where_the_sites_say(subject: Subject) -> Iterator[str]:
    """Each site runs through Graftwork's kernels, with the shapes that it declares."""
    made = built(subject)
    assembly = made.assembly
    hidden(assembly, batch_of(assembly.processor, examples(assembly)))
    sites = attention_sites(assembly.plan, assembly.architecture, assembly.towers, assembly.outputs)
    if not sites:
        raise Skipped("it says that it computes no attention")
    for site in sites:
        computed = [case.site for case in made.cases if case.site.name == site.name]
        if site.own:
            if computed:
                yield f"site '{site.name}' says that it is the model's own, and a kernel computed it; leave 'own' empty"
            continue
        if not computed:
            yield f"site '{site.name}' must run through Graftwork's kernels, and nothing did; build with context.attn_implementation, or call attend"
        for each in computed:
            if why := misfit(each, [site]):
                yield f"'sites' must say what is computed, and {why}; fix 'sites'"


def optional_parts_may_be_empty(subject: Subject) -> Iterator[str]:
    """Without the parts that a run may leave out the model has its shape, and its roles have modules."""
    from graftwork.config.runfile import EMPTY

    made = built(subject)
    slots = _model_class(subject).parts
    if not slots:
        raise Skipped("it says that it has no parts")
    empty = [part for part, slot in slots.items() if slot.optional or slot.default is None]
    if not empty:
        raise Skipped("it needs all of its parts")
    parts = {part: EMPTY if part in empty else KitTower.name for part in slots}
    reduced = compose.build_shape(plan_of(subject, parts, made.lookup, "conformance-recorder"), made.lookup)
    known = {name for name, _ in (*reduced.model.named_modules(), *reduced.model.named_parameters())}
    for role, names in reduced.structure.roles.items():
        for name in names:
            if name not in known:
                yield f"without {' and '.join(empty)} a role must still name what is there, and there is no '{name}' for '{role}'; leave it out"


def its_shape_is_known_without_weights(subject: Subject) -> Iterator[str]:
    """On the meta device it has the same names and shapes, as when a checkpoint is checked."""
    made = built(subject)
    shaped = compose.build_shape(made.assembly.plan, made.lookup)
    real = {name: tuple(tensor.shape) for name, tensor in named_tensors(made.assembly.model).items()}
    check_keys(named_tensors(shaped.model), real)
    for name, parameter in shaped.model.named_parameters():
        if not parameter.is_meta:
            yield f"'build' must leave parameters where they are made, and '{name}' has values on 'meta'; read no weights"


# What it computes -------------------------------------------------------------------------------------------------------


def hidden_states_and_logits_have_their_shapes(subject: Subject) -> Iterator[str]:
    """`[rows, tokens, width]`, and as many scores as the processor's vocabulary."""
    assembly = built(subject).assembly
    batch = batch_of(assembly.processor, examples(assembly))
    states = hidden(assembly, batch)
    if states.dim() != 3 or states.shape[:2] != batch.input_ids.shape:
        yield f"hidden states must be [rows, tokens, width] for {tuple(batch.input_ids.shape)} ids, and they are {tuple(states.shape)}; fix 'forward'"
        return
    found, vocabulary = tuple(assembly.model.logits(states[0, 0]).shape), assembly.processor.vocabulary
    if found != (vocabulary,):
        yield f"logits of one hidden state must be ({vocabulary},) as the processor's vocabulary, and they are {found}; make them agree"


def padding_and_neighbours_change_nothing(subject: Subject) -> Iterator[str]:
    """A row of a batch, padded on either side, computes what it computes alone."""
    assembly = built(subject).assembly
    encoded = examples(assembly)
    for side in ("right", "left"):
        together = hidden(assembly, batch_of(assembly.processor, encoded, side=side))
        for row, example in enumerate(encoded):
            n = len(example.input_ids)
            own = together[row, :n] if side == "right" else together[row, -n:]
            if apart := far(own, hidden(assembly, batch_of(assembly.processor, [example]))[0]):
                yield (
                    f"padding on the {side} and other rows must change nothing, and record '{records()[row].id}' is {apart:.3g} "
                    "away; take positions from attention_mask, and hide the padding"
                )


def a_cache_changes_nothing(subject: Subject) -> Iterator[str]:
    """Token by token from a cache the hidden states are those of the whole."""
    import torch

    assembly = built(subject).assembly
    prompts = batch_of(assembly.processor, examples(assembly, prompts=True), side="left")
    rows = len(prompts.input_ids)
    extra = torch.tensor([[11, 12, 13]] * rows) % assembly.processor.vocabulary
    real = torch.ones_like(extra, dtype=torch.bool)

    def extended(n: int) -> Batch:
        new = extra[:, :n]
        return Batch(
            torch.cat([prompts.input_ids, new], 1),
            torch.cat([prompts.attention_mask, real[:, :n]], 1),
            torch.cat([prompts.image_token_mask, ~real[:, :n]], 1),
            torch.cat([prompts.labels, new], 1),
            prompts.pixels,
            token_fields={
                name: torch.cat([field, torch.zeros_like(field[..., :1]).expand(*field.shape[:-1], n)], -1)
                for name, field in prompts.token_fields.items()
            },
        )

    whole = hidden(assembly, completed(assembly.processor, extended(3)))
    cache = assembly.model.new_cache()
    states = [hidden(assembly, prompts, None, cache)]
    for n in range(3):
        token, nothing = extra[:, n : n + 1], ~real[:, :1]
        longer = extended(n + 1)
        fields = {name: field[..., -1:] for name, field in longer.token_fields.items()}
        step = Batch(token, longer.attention_mask, nothing, token, {}, token_fields=fields)
        states.append(hidden(assembly, step, None, cache))
    where = extended(3).attention_mask[..., None]
    if apart := far(torch.cat(states, 1) * where, whole * where):
        yield f"with a cache the model must compute the same, and it is {apart:.3g} away; use the cached keys, and positions that go on"


def features_can_be_kept(subject: Subject) -> Iterator[str]:
    """What `encode_images` returned stands for the pixels, with an entry for each image, so that some can be chosen."""
    import torch

    assembly = built(subject).assembly
    encoded = examples(assembly)
    batch, count = batch_of(assembly.processor, encoded), sum(len(record.images) for record in records())
    with torch.no_grad():
        features = assembly.model.encode_images(batch.pixels)
        alone = [
            feature
            for example in encoded
            if example.pixels
            for feature in assembly.model.encode_images(batch_of(assembly.processor, [example]).pixels)
        ]
    if len(features) != count:
        yield f"'encode_images' must return an entry for each image, and for {count} it returns {len(features)}; split what it computes"
        return
    for feature, own in zip(features, alone, strict=True):
        if any(far(*pair) for pair in zip(tensors_in(feature), tensors_in(own), strict=True)):
            yield "each entry of 'encode_images' must be of its own image, in order, and beside other images one is another than alone; put images first"
    # What the images show goes; whole numbers of more than 8 bits, which say how they lie in the batch, stay.
    shows = {name for name, p in batch.pixels.items() if p.is_floating_point() or p.dtype == torch.uint8}
    blind = {name: torch.zeros_like(p) if name in shows else p for name, p in batch.pixels.items()}
    if apart := far(hidden(assembly, replace(batch, pixels=blind), features), hidden(assembly, batch)):
        yield f"'features' must stand for the pixels, and with them the output is {apart:.3g} away; use them instead of calling 'encode_images'"


def images_are_encoded_where_the_structure_says(subject: Subject) -> Iterator[str]:
    """Other values outside `Structure.image_encoder` change nothing in what `encode_images` returns: where nothing in those
    modules is trained, the base's answers are given from the adapter's image features."""
    import torch

    assembly = built(subject).assembly
    structure, pixels = assembly.structure, batch_of(assembly.processor, examples(assembly)).pixels
    outside = [p for n, p in assembly.model.named_parameters() if not within(n, structure.image_encoder)]
    kept = [parameter.data for parameter in outside]
    with torch.no_grad():
        expected = list(tensors_in(assembly.model.encode_images(pixels)))
        try:
            for parameter in outside:
                parameter.data = parameter.data + 1
            found = list(tensors_in(assembly.model.encode_images(pixels)))
        finally:
            for parameter, value in zip(outside, kept, strict=True):
                parameter.data = value
    if any(distance(*pair) > 0 for pair in zip(found, expected, strict=True)):
        yield "'encode_images' must depend on the modules of Structure(image_encoder=…) alone, and it depends on others; name all that it runs"


def tensors_in(features: Any) -> Iterator[Tensor]:
    """Every tensor in what `encode_images` returned."""
    if isinstance(features, Mapping | list | tuple):
        for value in features.values() if isinstance(features, Mapping) else features:
            yield from tensors_in(value)
    else:
        yield features


def images_are_seen(subject: Subject) -> Iterator[str]:
    """Another image changes the answer to it, at and after the image's tokens, and no other row."""
    assembly = built(subject).assembly
    first, text, _ = records()
    other = replace(first, images=(image("lime"),))
    pairs = [[assembly.processor.encode(record) for record in pair] for pair in ((first, text), (other, text))]
    red, lime = (hidden(assembly, batch_of(assembly.processor, pair)) for pair in pairs)
    places = pairs[0][0].image_token_mask
    if not any(places):
        yield "a record with an image must have image positions, and there is none; set them in 'encode'"
        return
    last = len(places) - 1
    for at, where in (([*places].index(True), "at its first token"), (last, "at the last token of its record")):
        if not distance(red[0, at], lime[0, at]) > 0:
            yield f"another image must change the hidden states, and {where} nothing changes; put the features at image_token_mask"
    n = len(pairs[0][1].input_ids)
    if far(red[1, :n], lime[1, :n]):
        yield "another image must not change other rows, and it does; give each row the features of its own images"


def what_is_written_reads_back(subject: Subject) -> Iterator[str]:
    """The folder that `write` fills is base weights with equal logits, and holds no pickle."""
    made = built(subject)
    assembly, folder = made.assembly, subject.scratch / "written"
    folder.mkdir()
    assembly.architecture.write(assembly, folder)
    if pickled := [file.name for file in folder.rglob("*") if file.suffix in PICKLES]:
        yield f"'write' must write no pickle, and it wrote '{pickled[0]}'; use safetensors"
    model_spec = assembly.plan.model_spec
    model = replace(model_spec.model, weights=WeightsRef(str(folder), str(folder)), folder=str(folder))
    again = compose.build(
        replace(assembly.plan, model_spec=replace(model_spec, model=model)), made.lookup, device="cpu"
    )
    again.model.eval()
    if again.adaptation.newly_initialised:
        yield f"'write' must write the whole model, and of '{again.adaptation.newly_initialised[0]}' nothing is read back; write every tensor"
    batch = batch_of(assembly.processor, examples(assembly))
    found, expected = (each.model.logits(hidden(each, batch)) for each in (again, assembly))
    if apart := far(found, expected):
        yield f"what 'write' wrote must read back the same, and the logits are {apart:.3g} away; write every tensor and every setting"
    if dict(again.architecture.configuration(folder)) != dict(model_spec.model.config or {}):
        yield "the written folder must have the same configuration, and it has another one; write all that 'configuration' reads"


CHECKS: tuple[Check, ...] = (
    every_parameter_has_one_role,
    blocks_and_sites_exist,
    optional_parts_may_be_empty,
    its_shape_is_known_without_weights,
    hidden_states_and_logits_have_their_shapes,
    attention_is_where_the_sites_say,
    padding_and_neighbours_change_nothing,
    a_cache_changes_nothing,
    features_can_be_kept,
    images_are_encoded_where_the_structure_says,
    images_are_seen,
    what_is_written_reads_back,
)
