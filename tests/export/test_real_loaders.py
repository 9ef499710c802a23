"""The tools themselves read what is written for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchkit.errors import IllegalScenarioError
from launchkit.export import config_files
from launchkit.export.accelerate import accelerate_config
from launchkit.export.deepspeed import deepspeed_config
from launchkit.export.layout import fsdp_layout
from launchkit.process.ports import free_port
from launchkit.scenario import Split, StrategyKind
from tests.export.cases import Case, case, strategy_cases

pytestmark = [pytest.mark.real_loader, pytest.mark.filterwarnings("ignore")]
CASES = strategy_cases()
ZERO_CASES = [each for each in CASES if each.candidate.scenario.strategy.kind.zero_stage]
FSDP_CASES = [each for each in CASES if each.candidate.scenario.strategy.kind.is_fsdp]


def named(each: Case) -> str:
    return each.name


@pytest.fixture
def restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def launch_arguments(each: Case, directory: Path, **changes: Any) -> Any:
    """What ``accelerate launch --config_file`` makes of the file, up to the point where it would start processes.

    ``changes`` are written over the YAML first.
    """
    launch = pytest.importorskip("accelerate.commands.launch")
    files = config_files(each.candidate, each.cluster, targets=("accelerate", "deepspeed"))
    for file in files:
        (directory / file.name).write_text(file.text)
    path = directory / "accelerate.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    arguments = ["--config_file", str(path), "--machine_rank", "0", "train.py"]
    if each.cluster.num_nodes > 1:
        arguments[:0] = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    parsed, defaults, has_precision = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(arguments)
    )
    fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
    parsed.deepspeed_fields_from_accelerate_config = ",".join(fields)  # as launch_command collects them
    return parsed


def deepspeed_plugin(arguments: Any, directory: Path) -> Any:
    """The plugin that a started process makes from its environment."""
    pytest.importorskip("deepspeed")
    launch = pytest.importorskip("accelerate.utils.launch")
    arguments.deepspeed_config_file = str(directory / "deepspeed.json")
    _, environment = launch.prepare_deepspeed_cmd_env(arguments)
    os.environ.update(environment)
    return pytest.importorskip("accelerate.utils").DeepSpeedPlugin()


@pytest.mark.parametrize("each", CASES, ids=named)
def test_accelerate_loads_every_file(each: Case, tmp_path: Path) -> None:
    arguments = launch_arguments(each, tmp_path)
    kind = each.candidate.scenario.strategy.kind
    processes = 1 if kind is StrategyKind.SINGLE else each.cluster.num_gpus
    assert arguments.num_processes == processes
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (kind.is_fsdp, bool(kind.zero_stage))
    assert arguments.multi_gpu == (kind is StrategyKind.DDP)


@pytest.mark.parametrize("each", FSDP_CASES, ids=named)
def test_accelerate_hands_fsdp_on_to_the_processes(each: Case, tmp_path: Path) -> None:
    launch = pytest.importorskip("accelerate.utils.launch")
    environment = launch.prepare_multi_gpu_env(launch_arguments(each, tmp_path))
    layout = fsdp_layout(each.candidate, each.cluster)
    assert environment["FSDP_VERSION"] == str(layout.version)
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "LlamaDecoderLayer"
    assert environment["FSDP_OFFLOAD_PARAMS"] == str(layout.offload_params).lower()
    assert environment["FSDP_ACTIVATION_CHECKPOINTING"] == "true"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if layout.version == 1:
        assert environment["FSDP_SHARDING_STRATEGY"] == layout.sharding.name
    if layout.num_replicas > 1:
        mesh = (environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"], environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"])
        assert mesh == ("2", "4")


@pytest.mark.usefixtures("restored_environment")
@pytest.mark.parametrize("each", ZERO_CASES, ids=named)
def test_accelerate_reads_the_deepspeed_file_without_complaint(each: Case, tmp_path: Path) -> None:
    """The plugin raises where the YAML says anything that the JSON says too."""
    plugin = deepspeed_plugin(launch_arguments(each, tmp_path), tmp_path)
    stage = each.candidate.scenario.strategy.kind.zero_stage
    assert (plugin.zero_stage, plugin.zero3_init_flag) == (stage, stage == 3)
    expected_device = {"none": "none", "optimizer": "cpu", "params": "none", "all": "cpu", "nvme": "nvme"}
    assert plugin.offload_optimizer_device == expected_device[each.candidate.scenario.strategy.offload]


@pytest.mark.parametrize("each", ZERO_CASES, ids=named)
def test_deepspeed_accepts_every_file(each: Case) -> None:
    """Numbers as they stand, without processes: DeepSpeed then takes the world for one, so the total follows."""
    config_module = pytest.importorskip("deepspeed.runtime.config")
    written = deepspeed_config(each.candidate, each.cluster, auto=False)
    config = config_module.DeepSpeedConfig({key: value for key, value in written.items() if key != "train_batch_size"})
    zero, settings = config.zero_config, each.candidate.scenario.strategy.zero
    assert config.bfloat16_config.enabled and not config.float16_config.enabled
    assert config.gradient_accumulation_steps == each.candidate.scenario.batch.gradient_accumulation_steps
    assert zero.stage == each.candidate.scenario.strategy.kind.zero_stage
    assert zero.reduce_bucket_size == settings.reduce_bucket_size
    assert zero.max_live_parameters == settings.stage3_max_live_parameters
    assert bool(zero.offload_param) == each.candidate.scenario.strategy.offload.params


def test_deepspeed_reads_every_size_that_the_plan_counts() -> None:
    """Each field of ``ZeroSettings`` reaches DeepSpeed, under whatever name."""
    zero_module = pytest.importorskip("deepspeed.runtime.zero.config")
    changed = {
        "reduce_bucket_size": 11,
        "allgather_bucket_size": 12,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "round_robin_gradients": True,
        "sub_group_size": 13,
        "stage3_prefetch_bucket_size": 14,
        "stage3_param_persistence_threshold": 15,
        "stage3_max_live_parameters": 16,
        "stage3_max_reuse_distance": 17,
        "gather_16bit_weights_on_model_save": False,
    }
    read: dict[str, Any] = {}
    for kind in ("zero2", "zero3"):
        each = case(kind, strategy=kind, **changed)
        section = deepspeed_config(each.candidate, each.cluster, auto=False)["zero_optimization"]
        parsed = zero_module.DeepSpeedZeroConfig(**section)
        names = {name.removeprefix("stage3_") for name in section}
        read |= {name: getattr(parsed, name) for name in names}
    assert {name.removeprefix("stage3_"): value for name, value in changed.items()}.items() <= read.items()


@pytest.mark.usefixtures("restored_environment")
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"deepspeed_config": {"deepspeed_config_file": "deepspeed.json", "zero_stage": 3}},
        {"deepspeed_config": {"deepspeed_config_file": "deepspeed.json", "gradient_accumulation_steps": 4}},
    ],
    ids=str,
)
def test_accelerate_refuses_the_keys_that_are_left_out_beside_the_deepspeed_file(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    arguments = launch_arguments(case("zero3", strategy="zero3"), tmp_path, **changes)
    with pytest.raises(ValueError, match="will be ignored"):
        deepspeed_plugin(arguments, tmp_path)


def test_fsdp_on_cpu_is_refused_because_accelerate_would_run_ddp() -> None:
    each = case("cpu", strategy="fsdp2", backend="cpu")
    with pytest.raises(IllegalScenarioError, match="becomes DDP under accelerate"):
        accelerate_config(each.candidate, each.cluster)


SPLIT_CASES = [
    (case("tp", strategy="single", split=Split(tp=4)), {"tp_size": 4}),
    (case("fsdp2-tp", strategy="fsdp2", split=Split(tp=2)), {"tp_size": 2, "dp_shard_size": 2}),
    (
        case("hsdp-tp", strategy="hsdp", split=Split(tp=2), num_nodes=2),
        {"tp_size": 2, "dp_shard_size": 4},  # as the Trainer tells accelerate of a model that transformers split
    ),
    (case("fsdp2-cp", strategy="fsdp2", split=Split(cp=2)), {"cp_size": 2, "dp_shard_size": 2}),
    (
        case("hsdp-cp", strategy="hsdp", split=Split(cp=2), num_nodes=2),
        {"cp_size": 2, "dp_shard_size": 2, "dp_replicate_size": 2},
    ),
    (case("zero3-sp", strategy="zero3", split=Split(sp=2)), {"sp_size": 2, "dp_shard_size": 2}),
]


@pytest.mark.usefixtures("restored_environment")
@pytest.mark.parametrize(("each", "expected"), SPLIT_CASES, ids=lambda value: getattr(value, "name", ""))
def test_accelerate_makes_the_mesh_that_was_planned(each: Case, expected: dict[str, int], tmp_path: Path) -> None:
    """What a started process reads from its environment; the product is the number of processes."""
    launch = pytest.importorskip("accelerate.utils.launch")
    parallelism = pytest.importorskip("accelerate.parallelism_config")
    arguments = launch_arguments(each, tmp_path)
    if each.candidate.scenario.strategy.kind.zero_stage:
        arguments.deepspeed_config_file = str(tmp_path / "deepspeed.json")
        environment = launch.prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = launch.prepare_multi_gpu_env(arguments)
    os.environ.update(environment)
    config = parallelism.ParallelismConfig()
    names = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    assert {name: getattr(config, name) for name in names} == dict.fromkeys(names, 1) | expected
    assert config.total_size == each.cluster.num_gpus
