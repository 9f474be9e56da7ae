"""The run files in examples/mgm-2b: their counts at full size without weights, and both stages on tiny weights."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mgm_folders import GOLDEN
from tiny_runs import COMPONENTS

from graftwork import runfile
from graftwork.checkpoint import open_checkpoint
from graftwork.cli import main
from graftwork.cli.evaluate import identity_of
from graftwork.comparison import compare
from graftwork.evaluation import evaluate
from graftwork.lookup import DictLookup
from graftwork.merging import merge
from graftwork.plan import Plan
from graftwork.resolve import resolve, restore_component
from graftwork.training import Outcome, train
from graftwork.weights import open_weights
from graftwork_mmbench import MmBench
from graftwork_textvqa import TextVqa

RECIPES = Path(__file__).parents[1] / "examples" / "mgm-2b"
GOLDEN_EVAL = Path(__file__).parent / "golden_eval"
STAGE_1, STAGE_2, LORA = "stage1-10k", "stage2-12k", "lora-24gb"
LOOKUP = DictLookup(*COMPONENTS, TextVqa, MmBench)
EVALUATION = {
    "evaluate.textvqa.questions": GOLDEN_EVAL / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl",
    "evaluate.textvqa.annotations": GOLDEN_EVAL / "textvqa" / "TextVQA_0.5.1_val.json",
    "evaluate.textvqa.images": GOLDEN / "images",
    "evaluate.mmbench.path": GOLDEN_EVAL / "mmbench" / "mmbench_dev_tiny.tsv",
}


# At full size, without weights ----------------------------------------------------------------------------------------


@cache
def planned(recipe: str) -> dict[str, Any]:
    """What `graftwork plan` says of a recipe as it is shipped."""
    done = CliRunner().invoke(main, ["plan", str(RECIPES / f"{recipe}.toml"), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    found["roles"] = {row["role"]: row for row in found["outline"]["roles"]}
    return found


def test_the_lora_recipe_adapts_126_layers_and_trains_the_published_counts() -> None:
    found = planned(LORA)
    roles = found["roles"]
    linears = [roles["language.attention"], roles["language.mlp"]]
    assert sum(row["adapted"] for row in linears) == 126
    assert sum(row["trained"] for row in linears) == 19_611_648
    assert roles["connector"]["trained"] + roles["mining"]["trained"] == 13_259_008
    assert found["outline"]["trained"] == 19_611_648 + 13_259_008


def test_stage_1_trains_connector_and_mining_and_stage_2_all_but_the_towers() -> None:
    assert planned(STAGE_1)["outline"]["trained"] == 13_259_008
    whole = planned(STAGE_2)
    assert whole["outline"]["trained"] == 2_506_172_416 + 13_259_008
    assert not any(row["trained"] for role, row in whole["roles"].items() if role.startswith("vision."))


@pytest.mark.parametrize("recipe", [STAGE_1, STAGE_2, LORA])
def test_the_files_that_are_not_there_yet_are_named_and_training_is_refused_for_them(recipe: str) -> None:
    absent = planned(recipe)["absent"]
    assert absent[0].startswith(f"model.weights: there is no folder '{RECIPES}/")
    assert any(line.startswith("data.source.0: there is no file") for line in absent)
    assert not any(row["fresh"] for row in planned(recipe)["roles"].values()), "nobody knows what the weights lack"
    done = CliRunner().invoke(main, ["train", str(RECIPES / f"{recipe}.toml")])
    assert done.exit_code == 1
    weights = [line for line in absent if ".weights: " in line]
    assert f"cannot work, for {len(weights)} reason" in done.output
    assert all(line.partition(", and ")[0] in done.output for line in weights)


def test_a_plan_for_people_says_what_is_not_there_yet() -> None:
    done = CliRunner().invoke(main, ["plan", str(RECIPES / f"{LORA}.toml")])
    assert f"weights = {RECIPES / 'stage-1'} (not there yet)" in done.output
    assert f"config = {RECIPES / 'configs' / 'gemma-2b-it'}\n" in "\n".join(map(str.rstrip, done.output.splitlines()))
    assert "\nNot there yet, and needed to train or evaluate:\n  model.weights: there is no folder" in done.output


def test_configurations_alone_can_be_planned_and_the_missing_tokenizer_is_named(tmp_path: Path) -> None:
    configs = RECIPES / "configs"
    run = tmp_path / "run.toml"
    parts = {"low": "clip-vit-large-patch14-336", "high": "openclip-convnext-large-d-320"}
    tables = [("model", "gemma-2b-it", "mgm-gemma")]
    tables += [(f"model.parts.{part}", name, "") for part, name in parts.items()]
    run.write_text("\n".join(f'[{table}]\nuse = "{use}"\nconfig = "{configs / name}"' for table, name, use in tables))
    done = CliRunner().invoke(main, ["plan", str(run), "--json"])
    assert json.loads(done.stdout)["absent"] == [
        f"model: '{configs / 'gemma-2b-it'}' holds no tokenizer.json or tokenizer.model; copy the model's tokenizer there"
    ]


# What upstream's scripts say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "rate", "batch", "micro", "length", "aspect"),
    [
        (STAGE_1, 1e-3, 256, 4, 2048, "square"),
        (STAGE_2, 2e-5, 128, 4, 2048, "pad"),
        (LORA, 2e-5, 128, 1, 1024, "pad"),
    ],
)
def test_the_hyperparameters_are_upstreams(
    recipe: str, rate: float, batch: int, micro: int, length: int, aspect: str
) -> None:
    table = tomllib.loads((RECIPES / f"{recipe}.toml").read_text(encoding="utf-8"))
    wanted = {"learning_rate": rate, "batch_size": batch, "micro_batch_size": micro, "max_length": length}
    wanted |= {"epochs": 1, "schedule": "cosine", "warmup_ratio": 0.03, "precision": "bf16", "too_long": "cut"}
    assert table["train"].items() >= wanted.items()
    assert (table["model"]["aspect_ratio"], table["memory"]["use"]) == (aspect, ["checkpointing"])


# On tiny weights ------------------------------------------------------------------------------------------------------


def run_recipe(recipe: str, out: Path, paths: Mapping[str, Path]) -> tuple[Plan, Outcome]:
    """Train a recipe with other paths, and with nothing else changed."""
    overrides = [f"{key}={path}" for key, path in paths.items()]
    plan = resolve(runfile.load(RECIPES / f"{recipe}.toml", overrides), LOOKUP, kernels=("sdpa",))
    return plan, train(plan, LOOKUP, out, device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The paths of a recipe that differ for tiny weights in both stages."""
    folder = tmp_path_factory.mktemp("recipes")
    config = json.loads((GOLDEN / "base" / "config.json").read_text()) | {"image_size_aux": 128}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = [("circle", "square")[number % 2] for number in range(10)]
    records: list[dict[str, Any]] = [
        {
            "id": number,
            "image": f"{number:04}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich shape is it?"},
                {"from": "gpt", "value": f"It is a {shape}."},
            ],
        }
        for number, shape in enumerate(shapes)
    ]
    records.append(
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    )
    (folder / "data.json").write_text(json.dumps(records))
    return {
        "model.config": folder,
        "model.parts.low.config": GOLDEN / "clip",
        "model.parts.high.config": GOLDEN / "convnext",
        "data.source.0.path": folder / "data.json",
        "data.source.0.image_folder": GOLDEN / "images",
    }


@pytest.fixture(scope="module")
def stage_1(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that a merged stage 1 is."""
    folder = tmp_path_factory.mktemp("stage-1")
    weights = {
        "model.weights": GOLDEN / "base",
        "model.parts.low.weights": GOLDEN / "clip",
        "model.parts.high.weights": GOLDEN / "convnext",
    }
    run_recipe(STAGE_1, folder / "out", {**paths, **weights})
    merge(open_checkpoint(folder / "out", LOOKUP, device="cpu", precision="fp32"), folder / "stage-1", LOOKUP)
    return folder / "stage-1"


def test_stage_1_leaves_the_language_model_and_the_towers_as_they_were(stage_1: Path) -> None:
    merged, base = open_weights(stage_1), open_weights(GOLDEN / "base")
    assert all(merged[name]().equal(tensor()) for name, tensor in base.items() if name in merged)
    assert {name.split(".")[1] for name in merged.keys() - base.keys()} == {
        *("vision_tower", "vision_tower_aux", "mm_projector"),
        *(f"vlm_uni_{name}_projector" for name in ("query", "aux", "val")),
    }
    assert json.loads((stage_1 / "config.json").read_text())["image_aspect_ratio"] == "square"


@pytest.mark.parametrize("recipe", [STAGE_2, LORA])
def test_stage_2_starts_from_the_merged_stage_1_and_is_evaluated_against_it(
    recipe: str, stage_1: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    plan, outcome = run_recipe(recipe, tmp_path / "out", {**paths, **EVALUATION, "model.weights": stage_1})
    assert outcome.assembly.fresh == (), "the merged stage 1 has connector and mining"
    assert (outcome.data["records"], outcome.data["bad"]) == (11, [])
    trained = outcome.assembly.trained()
    assert {name.split(".")[1] for name in trained} >= {"mm_projector", "vlm_uni_query_projector", "layers"}
    assert not any("vision_tower" in name for name in trained)
    opened = open_checkpoint(tmp_path / "out", LOOKUP, device="cpu")
    assert opened.assembly.plan.identity.model.config is not None
    assert opened.assembly.plan.identity.model.config["aspect_ratio"] == "pad"
    assert [choice.name for choice in plan.circumstance.evaluate] == ["textvqa", "mmbench"]
    for choice in plan.circumstance.evaluate[: 2 if recipe == LORA else 1]:
        evaluator = restore_component(choice, LOOKUP)
        result = evaluate(
            opened.assembly,
            evaluator,  # type: ignore[arg-type]
            arms=("base", "adapter"),
            out=tmp_path / choice.name,
            identity=identity_of(opened),
        )
        assert compare(result).questions == {"textvqa": 8, "mmbench": 13}[choice.name]
        assert result.bad == ()


def test_full_as_a_method_and_roles_trained_whole_are_the_same_training(
    stage_1: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    named = {**paths, **EVALUATION, "model.weights": stage_1}
    _, method = run_recipe(STAGE_2, tmp_path / "method", named)
    overrides = [f"{key}={path}" for key, path in named.items()]
    run = runfile.load(RECIPES / f"{STAGE_2}.toml", [*overrides, 'peft={also_train=["language","connector","mining"]}'])
    roles = train(resolve(run, LOOKUP, kernels=("sdpa",)), LOOKUP, tmp_path / "roles", device="cpu")
    others = roles.assembly.trained()
    assert others.keys() == method.assembly.trained().keys()
    assert all(tensor.equal(others[name]) for name, tensor in method.assembly.trained().items())
