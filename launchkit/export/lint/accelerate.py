"""Traps in accelerate's YAML."""

from __future__ import annotations

from launchkit.export import known_keys
from launchkit.export.lint.findings import (
    REFUSED,
    Check,
    Config,
    Finding,
    Findings,
    Severity,
    choice,
    is_true,
    section_of,
    unknown_keys,
)
from launchkit.hardware import Cluster

_DISTRIBUTED_TYPES = (
    *("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU"),
    *("MULTI_NEURON", "DEEPSPEED", "FSDP", "XLA", "MEGATRON_LM"),
)
_SHARDING_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
_FSDP1_ONLY = ("sharding_strategy", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states")
_BESIDE_DEEPSPEED_FILE = (
    *("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "zero3_save_16bit_model"),
    *("offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
)
_OLD_FP8_NAMES = {
    "amax_history_length": "amax_history_len",
    "amax_compute_algorithm": "amax_compute_algo",
    "optimization_level": "opt_level",
}


def _keys(config: Config) -> Findings:
    for section, known, prefix in (
        ("fsdp_config", known_keys.ACCELERATE_FSDP, "fsdp_"),
        ("deepspeed_config", known_keys.ACCELERATE_DEEPSPEED, ""),
        ("parallelism_config", known_keys.ACCELERATE_PARALLELISM, ""),
        ("dynamo_config", known_keys.ACCELERATE_DYNAMO, "dynamo_"),
        ("fp8_config", known_keys.ACCELERATE_FP8 | set(_OLD_FP8_NAMES), "fp8_"),
    ):
        yield from unknown_keys(config.get(section), known, path=f"{section}.", prefix=prefix)
    yield from unknown_keys(config, known_keys.ACCELERATE, effect=REFUSED)


def _processes(config: Config) -> Findings:
    if "distributed_type" not in config:
        yield Finding(path="distributed_type", problem="is missing", fix="write MULTI_GPU, FSDP, DEEPSPEED or NO")
    yield from choice(config, "distributed_type", _DISTRIBUTED_TYPES)
    yield from choice(config, "mixed_precision", ("no", "fp16", "bf16", "fp8", "False"))
    processes, machines = config.get("num_processes", 1), config.get("num_machines", 1)
    if not (isinstance(processes, int) and isinstance(machines, int)):
        return
    if machines > 0 and processes % machines:
        problem = f"is the total over {machines} machines, and {processes} does not divide by them"
        yield Finding(path="num_processes", problem=problem, fix="write GPUs per machine × machines")
    if config.get("distributed_type") == "MULTI_CPU" and processes > 1:
        problem = f"starts one process, not {processes}, without mpirun"
        yield Finding(path="distributed_type", problem=problem, fix="write MULTI_GPU and use_cpu: true")
    if is_true(config.get("use_cpu")) and config.get("distributed_type") == "FSDP":
        yield Finding(
            path="use_cpu", problem="turns FSDP into DDP", fix="write distributed_type: DEEPSPEED, or torchrun"
        )


def _fsdp(config: Config) -> Findings:
    if config.get("distributed_type") != "FSDP":
        return
    fsdp = {str(key).removeprefix("fsdp_"): value for key, value in section_of(config, "fsdp_config").items()}
    version = 2 if str(fsdp.get("version", 1)) == "2" else 1
    if fsdp.get("auto_wrap_policy", "NO_WRAP") == "NO_WRAP":
        problem = "makes the whole model one unit, which is gathered at once and saves nothing"
        yield Finding(path="fsdp_config.fsdp_auto_wrap_policy", problem=problem, fix="write TRANSFORMER_BASED_WRAP")
    yield from choice(fsdp, "fsdp_config.auto_wrap_policy", ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"))
    if " " in str(fsdp.get("transformer_layer_cls_to_wrap", "")):
        problem = "has a space, which becomes part of a class name"
        yield Finding(path="fsdp_config.fsdp_transformer_layer_cls_to_wrap", problem=problem, fix="write A,B")
    yield from (_fsdp1(fsdp) if version == 1 else _fsdp2(fsdp))


def _fsdp1(fsdp: Config) -> Findings:
    if "reshard_after_forward" in fsdp:
        yield Finding(
            path="fsdp_config.fsdp_reshard_after_forward",
            problem="is ignored by FSDP1, which then shards fully",
            fix="write fsdp_sharding_strategy, or fsdp_version: 2",
        )
    strategies = (*_SHARDING_STRATEGIES, "1", "2", "3", "4", "5")
    yield from choice(fsdp, "fsdp_config.sharding_strategy", strategies)
    loads_on_one = is_true(fsdp.get("cpu_ram_efficient_loading", True))
    if loads_on_one and not is_true(fsdp.get("sync_module_states", True)):
        problem = "must be true where fsdp_cpu_ram_efficient_loading is"
        yield Finding(path="fsdp_config.fsdp_sync_module_states", problem=problem, fix="write true")


def _fsdp2(fsdp: Config) -> Findings:
    for key in _FSDP1_ONLY:
        if key in fsdp:
            problem = "belongs to FSDP1, and does nothing here"
            fix = "write fsdp_reshard_after_forward" if key == "sharding_strategy" else "remove it"
            yield Finding(path=f"fsdp_config.fsdp_{key}", problem=problem, fix=fix)
    if str(fsdp.get("reshard_after_forward", True)).lower() not in ("true", "false"):
        problem = "is true or false under FSDP2"
        yield Finding(path="fsdp_config.fsdp_reshard_after_forward", problem=problem, fix="write true")
    yield from choice(fsdp, "fsdp_config.state_dict_type", ("FULL_STATE_DICT", "SHARDED_STATE_DICT"))


def _deepspeed(config: Config) -> Findings:
    section = section_of(config, "deepspeed_config")
    if "deepspeed_config_file" in section:
        refused = [f"deepspeed_config.{key}" for key in _BESIDE_DEEPSPEED_FILE if key in section]
        refused += ["mixed_precision"] if config.get("mixed_precision") is not None else []
        for path in refused:
            problem = "is refused beside deepspeed_config_file"
            yield Finding(path=path, problem=problem, fix="say it in DeepSpeed's file only")
    for kind in ("optimizer", "param"):
        if section.get(f"offload_{kind}_device") == "nvme":
            problem = "loses its path: accelerate does not pass it on"
            fix = "write deepspeed_config_file, and the path in that file"
            yield Finding(path=f"deepspeed_config.offload_{kind}_device", problem=problem, fix=fix)
    is_stage3 = str(section.get("zero_stage")) == "3"
    if is_stage3 and not is_true(section.get("zero3_save_16bit_model")):
        problem = "is off, so checkpoints hold no weights that from_pretrained can read"
        yield Finding(path="deepspeed_config.zero3_save_16bit_model", problem=problem, fix="write true")


def _sections(config: Config) -> Findings:
    """Sections of another strategy than the one in force."""
    for section, kind in (("fsdp_config", "FSDP"), ("deepspeed_config", "DEEPSPEED")):
        if config.get(section) and config.get("distributed_type") != kind:
            problem = f"does nothing with distributed_type: {config.get('distributed_type')}"
            yield Finding(path=section, problem=problem, fix=f"write distributed_type: {kind}, or remove it")


def _mesh(config: Config) -> Findings:
    mesh = section_of(config, "parallelism_config")
    if not mesh:
        return
    fsdp = section_of(config, "fsdp_config")
    is_fsdp2 = config.get("distributed_type") == "FSDP" and str(fsdp.get("fsdp_version", fsdp.get("version", 1))) == "2"
    # Tensor parallelism is the model's own, and Ulysses DeepSpeed's: accelerate need not shard anything.
    others = {"MULTI_GPU": "tp", "DEEPSPEED": "sp"}.get(str(config.get("distributed_type")))
    is_other = others is not None and mesh.get(f"parallelism_config_{others}_size", 1) != 1
    if not is_fsdp2 and not is_other:
        yield Finding(path="parallelism_config", problem="needs FSDP2", fix="write fsdp_version: 2")
    sizes = [mesh.get(f"parallelism_config_{kind}_size", 1) for kind in ("dp_replicate", "dp_shard", "tp", "cp", "sp")]
    product = 1
    for size in sizes:
        product *= size if isinstance(size, int) else 1
    if product != config.get("num_processes", product):
        problem = f"is a mesh of {product}, with num_processes {config.get('num_processes')}"
        yield Finding(path="parallelism_config", problem=problem, fix="make the product of the sizes num_processes")


_GATHER = "enable_fsdp_float8_all_gather"


def _fp8(config: Config) -> Findings:
    section = {str(key).removeprefix("fp8_"): value for key, value in section_of(config, "fp8_config").items()}
    yield from _backend(section)
    # Without a backend accelerate takes torchao where it is installed.
    backend = str(section.get("backend", "AO")).upper()
    if config.get("mixed_precision") == "fp8" and backend in ("AO", "NO"):
        yield from _torchao(config, section)
    if config.get("mixed_precision") == "fp8" and backend == "TE":
        yield from _transformer_engine(config, section)
    for key in section_of(config, "fp8_config"):
        old = str(key).removeprefix("fp8_")
        if old in _OLD_FP8_NAMES:
            problem = "is the questionnaire's name, which the launcher ignores"
            yield Finding(path=f"fp8_config.{key}", problem=problem, fix=f"write {_OLD_FP8_NAMES[old]}")


def _backend(section: Config) -> Findings:
    """Source: accelerate 1.15 ``FP8BackendType``, ``_prepare_msamp``."""
    backend = str(section.get("backend", "")).upper()
    if backend == "MSAMP":
        problem, fix = "is MS-AMP, which accelerate is about to drop", "write AO"
        yield Finding(path="fp8_config.backend", problem=problem, fix=fix, severity=Severity.WARNING)
    elif backend not in ("", "AO", "NO", "TE"):
        yield from choice(section, "fp8_config.backend", ("AO", "TE", "MSAMP"))


def _torchao(config: Config, section: Config) -> Findings:
    """Source: accelerate 1.15 ``Accelerator.__init__``, ``_prepare_ao``; torchao 0.18 ``Float8Linear.from_float``."""
    fsdp = {str(key).removeprefix("fsdp_"): value for key, value in section_of(config, "fsdp_config").items()}
    is_fsdp = config.get("distributed_type") == "FSDP"
    if not is_fsdp and is_true(section.get(_GATHER, True)):
        problem = "is on unless written, and gives the layers parameters that the optimizer does not have"
        yield Finding(path=f"fp8_config.{_GATHER}", problem=problem, fix="write false")
    if is_fsdp and is_true(fsdp.get("cpu_ram_efficient_loading", True)):
        problem = "is refused with torchao's fp8"
        yield Finding(path="fsdp_config.fsdp_cpu_ram_efficient_loading", problem=problem, fix="write false")


_GONE: dict[str, object] = {"interval": 1, "override_linear_precision": None}
_OF_DELAYED_SCALING = ("amax_history_len", "amax_compute_algo")


def _transformer_engine(config: Config, section: Config) -> Findings:
    """Source: accelerate 1.15 ``Accelerator._prepare_te``, ``_prepare_fsdp2``, ``apply_fp8_autowrap``,
    ``TERecipeKwargs.to_kwargs``; Transformer Engine 2.18 ``common/recipe``, where ``DelayedScaling`` has no
    ``interval``, and asserts that nothing overrides the precision of its products."""
    fsdp = {str(key).removeprefix("fsdp_"): value for key, value in section_of(config, "fsdp_config").items()}
    if config.get("distributed_type") == "FSDP" and str(fsdp.get("version", 1)) == "2":
        problem = "is put in under FSDP2, which never turns its 8 bits on: the layers multiply in bf16"
        yield Finding(path="fp8_config.backend", problem=problem, fix="write AO")
    elif config.get("distributed_type") == "FSDP":
        problem = "wants model and optimizer together, which the Trainer hands over apart under FSDP1"
        yield Finding(path="fp8_config.backend", problem=problem, fix="write AO, and fsdp_version: 2")
    if is_true(section.get("use_mxfp8_block_scaling", False)):
        problem = "is not modelled: delayed scaling is counted"
        fix = "remove it, or take the estimate for one with more scales"
        yield Finding(path="fp8_config.use_mxfp8_block_scaling", problem=problem, fix=fix, severity=Severity.WARNING)
        for name in (name for name in _OF_DELAYED_SCALING if name in section):
            problem = "is refused beside use_mxfp8_block_scaling where it is not the default"
            yield Finding(path=f"fp8_config.{name}", problem=problem, fix="remove it")
    for name, default in _GONE.items():
        if section.get(name, default) not in (default, None):
            problem = "is an argument that Transformer Engine's recipe no longer has"
            yield Finding(path=f"fp8_config.{name}", problem=problem, fix="remove it")


def against_cluster(config: Config, cluster: Cluster) -> Findings:
    processes = config.get("num_processes")
    if isinstance(processes, int) and processes > cluster.num_gpus:
        problem = f"is {processes}, more than the {cluster.num_gpus} of {cluster.text}, so that GPUs are shared"
        yield Finding(path="num_processes", problem=problem, fix=f"write {cluster.num_gpus}")


CHECKS: tuple[Check, ...] = (
    _keys,
    _processes,
    _fsdp,
    _deepspeed,
    _sections,
    _mesh,
    _fp8,
)
