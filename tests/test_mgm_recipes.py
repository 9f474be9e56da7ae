"""The run files in examples/mgm-2b: their counts at full size without weights, and both stages on tiny weights."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mgm_folders import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_runs import COMPONENTS

from graftwork.checkpoint.merging import merge
from graftwork.checkpoint.store import open_checkpoint
from graftwork.cli import main
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.config.restore import restore_component
from graftwork.contracts import DictLookup, Plan
from graftwork.evaluate.comparison import compare
from graftwork.evaluate.evaluation import evaluate
from graftwork.jobs.evaluate import hashes_of
from graftwork.train.loop import Outcome, train
from graftwork.weights import open_weights
from graftwork_chunked_loss import ChunkedLoss
from graftwork_mining_recompute import MiningRecompute
from graftwork_mmbench import MmBench
from graftwork_textvqa import TextVqa

RECIPES = Path(__file__).parents[1] / "examples" / "mgm-2b"
GOLDEN_EVAL = Path(__file__).parent / "golden_eval"
STAGE_1, STAGE_2, LORA = "stage1-10k", "stage2-12k", "lora-24gb"
LOOKUP = DictLookup(*COMPONENTS, ChunkedLoss, MiningRecompute, TextVqa, MmBench)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("recipe", [STAGE_1, STAGE_2, pytest.param(LORA, marks=pytest.mark.slow)])
def test_the_files_that_are_not_there_yet_are_named_and_training_is_refused_for_them(recipe: str) -> None:
    missing_files = planned(recipe)["missing_files"]
    assert missing_files[0].startswith(f"model.weights: there is no folder '{RECIPES}/")
    assert any(line.startswith("data.source.0: there is no file") for line in missing_files)
    assert not any(row["newly_initialised"] for row in planned(recipe)["roles"].values()), (
        "nobody knows what the weights lack"
    )
    done = CliRunner().invoke(main, ["train", str(RECIPES / f"{recipe}.toml")])
    assert done.exit_code == 1
    weights = [line for line in missing_files if ".weights: " in line]
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
    assert json.loads(done.stdout)["missing_files"] == [
        f"model: '{configs / 'gemma-2b-it'}' holds no tokenizer.json or tokenizer.model; copy the model's tokenizer there"
    ]


# What upstream's scripts say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "rate", "batch", "micro", "length", "aspect"),
    [
        (STAGE_1, 1e-3, 256, 4, 2048, "square"),
        (STAGE_2, 2e-5, 128, 4, 2048, "pad"),
        (LORA, 2e-5, 128, 8, 1024, "pad"),
    ],
)
def test_the_hyperparameters_are_upstreams(
    recipe: str, rate: float, batch: int, micro: int, length: int, aspect: str
) -> None:
    table = tomllib.loads((RECIPES / f"{recipe}.toml").read_text(encoding="utf-8"))
    wanted = {"learning_rate": rate, "batch_size": batch, "micro_batch_size": micro, "max_length": length}
    wanted |= {"epochs": 1, "schedule": "cosine", "warmup_ratio": 0.03, "precision": "bf16", "too_long": "cut"}
    assert table["train"].items() >= wanted.items()
    assert (table["model"]["aspect_ratio"], table["memory"]["use"][0]) == (aspect, "checkpointing")


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
    as_gemma = {"image_size_aux": 128, "max_position_embeddings": 8192}
    config = json.loads((GOLDEN / "base" / "config.json").read_text()) | as_gemma
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


TOWER_WEIGHTS = {
    "model.parts.low.weights": GOLDEN / "clip",
    "model.parts.high.weights": GOLDEN / "convnext",
}


@pytest.fixture(scope="module")
def stage_1(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that a merged stage 1 is."""
    folder = tmp_path_factory.mktemp("stage-1")
    run_recipe(STAGE_1, folder / "out", {**paths, **TOWER_WEIGHTS, "model.weights": GOLDEN / "base"})
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


@pytest.mark.parametrize("recipe", [STAGE_2, pytest.param(LORA, marks=pytest.mark.slow)])
def test_stage_2_starts_from_the_merged_stage_1_and_is_evaluated_against_it(
    recipe: str, stage_1: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    plan, outcome = run_recipe(recipe, tmp_path / "out", {**paths, **EVALUATION, "model.weights": stage_1})
    assert outcome.assembly.adaptation.newly_initialised == (), "the merged stage 1 has connector and mining"
    assert (outcome.data["records"], outcome.data["bad"]) == (11, [])
    trained = outcome.assembly.trained()
    assert {name.split(".")[1] for name in trained} >= {"mm_projector", "vlm_uni_query_projector", "layers"}
    assert not any("vision_tower" in name for name in trained)
    opened = open_checkpoint(tmp_path / "out", LOOKUP, device="cpu")
    assert opened.assembly.plan.model_spec.model.config is not None
    assert opened.assembly.plan.model_spec.model.config["aspect_ratio"] == "pad"
    assert [choice.name for choice in plan.run_context.evaluate] == ["textvqa", "mmbench"]
    for choice in plan.run_context.evaluate[: 2 if recipe == LORA else 1]:
        evaluator = restore_component(choice, LOOKUP)
        result = evaluate(
            opened.assembly,
            evaluator,  # type: ignore[arg-type]
            variants=("base", "adapter"),
            out=tmp_path / choice.name,
            hashes=hashes_of(opened),
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


# Runs that must end badly ---------------------------------------------------------------------------------------------


def scaled_base(folder: Path, part: str, factor: float) -> Path:
    """The tiny base with some of its tensors multiplied."""
    shutil.copytree(GOLDEN / "base", folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor * (factor if part in name else 1) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_fp16_is_refused_with_the_reason_unless_it_is_forced() -> None:
    run = ["plan", str(RECIPES / f"{LORA}.toml"), "--set", "train.precision=fp16"]
    reason = "'mgm-gemma' is known to overflow in fp16; use bf16 or fp32, or set train.force_precision = true"
    refused = CliRunner().invoke(main, run)
    assert refused.exit_code == 1
    assert f"  train.precision: {reason}" in refused.output
    assert reason not in CliRunner().invoke(main, [*run, "--set", "train.force_precision=true"]).output


def test_forced_fp16_that_overflows_is_an_unhealthy_run_where_bf16_is_not_skipped(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    base = scaled_base(tmp_path / "base", "mlp.", 100.0)  # fp16 ends at 65,504
    named = {**paths, **TOWER_WEIGHTS, "model.weights": base}
    overrides = [*(f"{key}={path}" for key, path in named.items()), "train.epochs=2", "train.force_precision=true"]
    ended = {}
    for precision in ("fp16", "bf16"):
        run = runfile.load(RECIPES / f"{STAGE_1}.toml", [*overrides, f"train.precision={precision}"])
        ended[precision] = train(resolve(run, LOOKUP, kernels=("sdpa",)), LOOKUP, tmp_path / precision, device="cpu")
    assert not any("skipped" in line for line in ended["bf16"].log)
    assert [line["skipped"] for line in ended["fp16"].log] == [True, True]
    assert ended["fp16"].verdict.reasons == (
        "2 of 2 losses are not finite numbers",
        "2 of 2 steps were skipped for gradients that are not finite",
        "fp16 is known to overflow in this model; train in bf16 or fp32",
    )


def test_a_run_whose_loss_is_absurd_ends_in_a_plain_verdict_and_a_status_that_is_not_zero(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    base = scaled_base(tmp_path / "base", "model.norm.weight", 1e11)
    named = {**paths, **TOWER_WEIGHTS, "model.weights": base, "train.precision": "fp32", "train.epochs": 3}
    overrides = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
    recipe = str(RECIPES / f"{STAGE_1}.toml")
    done = CliRunner().invoke(main, ["train", recipe, "--out", str(tmp_path / "out"), *overrides])
    assert done.exit_code == 1
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 1e10 for line in log)
    assert "broke: the loss starts at" in done.output
    assert "the weights, the prompt or the precision are wrong" in done.output
    assert "Error: the run broke, and its result should not be used; the checkpoint is kept at" in done.output
    assert "Broke" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
