"""Accelerate's YAML: how the job is spread and in which precision; the script says the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launchkit.errors import ConfigFileError
from launchkit.export import known_keys
from launchkit.export.lint import Tool
from launchkit.export.read.engines import read_deepspeed, read_deepspeed_file, read_fsdp, read_unsharded
from launchkit.export.read.reading import Draft, Place, Reading
from launchkit.export.read.section import Section
from launchkit.scenario import Fp8Backend, Precision, StrategyKind

_SPREADS = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU", "FSDP", "DEEPSPEED")
# Where processes run and how they find each other, and what is about TPUs and Megatron.
_UNRELATED = (
    *("compute_environment", "debug", "machine_rank", "main_", "rdzv", "same_network", "gpu_ids", "tpu_", "use_cpu"),
    *("downcast_bf16", "enable_cpu_affinity", "num_machines", "num_processes", "command", "mpirun", "megatron"),
    *("deepspeed_multinode", "deepspeed_hostfile", "deepspeed_exclusion", "deepspeed_inclusion", "zero3_init_flag"),
    *("dynamo_", "fsdp_ignored_modules"),
)


def read_accelerate(config: Mapping[str, Any], place: Place) -> Reading:
    """The reading of a file for ``accelerate launch --config_file``."""
    keys, draft = Section(config, file=place.file), Draft(tool=Tool.ACCELERATE)
    read_launch(keys, draft, place)
    return draft.finish(keys, known=known_keys.ACCELERATE, unrelated=_UNRELATED)


def read_launch(keys: Section, draft: Draft, place: Place) -> None:
    """How the processes of ``accelerate launch`` are joined, and in which precision."""
    kind = (keys.text("distributed_type") or _implied(keys)).upper()
    if kind not in _SPREADS:
        raise ConfigFileError(
            f"{place.file}: distributed_type {kind} is not modelled; launchkit check reads {', '.join(_SPREADS)}"
        )
    precision = _precision(keys, place)
    _split(keys.section("parallelism_config"), draft)
    dynamo = keys.section("dynamo_config", prefix="dynamo_").text("backend") or keys.text("dynamo_backend")
    draft.flag("compile", True if dynamo and dynamo.upper() != "NO" and dynamo != "no" else None)
    if kind == "DEEPSPEED":
        _deepspeed(keys, draft, place, precision=precision)
        return
    draft.flag("precision", precision)
    _assume_weights(draft, place, is_fsdp=kind == "FSDP")
    if kind == "FSDP":
        _fsdp(keys, draft, place)
    else:
        _unsharded(keys, draft, place)


def _implied(keys: Section) -> str:
    """What the section that is there is for, where the type is missing."""
    sections = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED"}
    return next((kind for section, kind in sections.items() if keys.has(section)), "MULTI_GPU")


def _precision(keys: Section, place: Place) -> Precision:
    """Autocast, as the file says it; in what the weights are loaded is the script's own.

    Adapters are taken to stand on bf16 weights, as transformers loads a bf16 checkpoint. A full fine-tune is counted
    with fp32 weights, which FSDP makes of them whatever is loaded.
    """
    formats = {"fp16": Precision.FP16, "bf16": Precision.BF16, "fp8": Precision.FP8}
    precision = formats.get((keys.text("mixed_precision") or "no").lower(), Precision.FP32)
    return Precision.BF16_PARAMS if precision is Precision.BF16 and place.adapts else precision


def _assume_weights(draft: Draft, place: Place, *, is_fsdp: bool) -> None:
    if place.given.precision is not None:
        return
    if draft.flags["precision"] is Precision.FP32:
        draft.assumed.append("without mixed_precision: weights in fp32 (--precision bf16-pure if they are loaded so)")
    elif draft.flags["precision"] is Precision.BF16 and not is_fsdp:
        draft.assumed.append("weights in fp32 under autocast (--precision bf16-params if they are loaded in bf16)")


_SPLITS = ("tp", "cp", "sp")
_MESH_DETAILS = (
    *("cp_backend", "cp_comm_strategy", "sp_backend", "sp_attn_implementation", "sp_seq_length", "tp_size"),
    "sp_seq_length_is_variable",
)


def _split(mesh: Section, draft: Draft) -> None:
    for name in _SPLITS:
        size = mesh.count(f"parallelism_config_{name}_size") or 1
        draft.flag(name, size if size > 1 else None)
    mesh.skip(*(f"parallelism_config_{name}" for name in _MESH_DETAILS))


def _mesh_sizes(keys: Section) -> tuple[int, int]:
    """Replicas, and the ranks that share one; 0 where nothing is said."""
    mesh = keys.section("parallelism_config")
    replicas = mesh.count("parallelism_config_dp_replicate_size") or 1
    return replicas, mesh.count("parallelism_config_dp_shard_size") or 0


def _fsdp(keys: Section, draft: Draft, place: Place) -> None:
    section = keys.section("fsdp_config", prefix="fsdp_")
    version = 2 if section.text("version") == "2" else 1
    replicas, shards = _mesh_sizes(keys)
    read_fsdp(section, draft, place, version=version, replicas=replicas, shards=shards)
    _float8(keys, draft)
    if draft.flags["precision"] is Precision.FP8 and draft.flags["fp8_backend"] is Fp8Backend.AO:
        gathers = keys.section("fp8_config", prefix="fp8_").switch("enable_fsdp_float8_all_gather")
        draft.flag("fp8_all_gather", gathers is not False)


# Of Transformer Engine's recipe: none of these changes what is held, but the length of the history, 20 bytes a layer.
_RECIPE = (
    *("margin", "interval", "format", "amax_history_len", "amax_compute_algo", "override_linear_precision"),
    *("use_autocast_during_eval", "use_mxfp8_block_scaling", "opt_level"),
)


def _float8(keys: Section, draft: Draft) -> None:
    """Whose layers; without a word accelerate takes torchao's where it is installed."""
    section = keys.section("fp8_config", prefix="fp8_")
    section.skip("pad_inner_dim", "enable_fsdp_float8_all_gather", *_RECIPE)
    backend = (section.text("backend") or "").upper()
    if draft.flags["precision"] is Precision.FP8:
        draft.flag("fp8_backend", Fp8Backend.TE if backend == "TE" else Fp8Backend.AO)


def _unsharded(keys: Section, draft: Draft, place: Place) -> None:
    """Plain copies, unless transformers splits the model, whose shards the mesh counts."""
    _float8(keys, draft)
    replicas, shards = _mesh_sizes(keys)
    if "tp" not in draft.flags:
        read_unsharded(draft, place)
    elif max(shards, replicas) > 1:
        draft.flag("strategy", StrategyKind.FSDP2)
    else:
        draft.flag("strategy", StrategyKind.SINGLE)


def _deepspeed(keys: Section, draft: Draft, place: Place, *, precision: Precision) -> None:
    """DeepSpeed's file, which says the precision, or the few keys of accelerate's own that stand for one. A trainer's
    own precision, where its file was read before, goes before the launcher's."""
    _mesh_sizes(keys)
    section = keys.section("deepspeed_config")
    name = section.text("deepspeed_config_file")
    if name is not None:
        read_deepspeed_file(name, draft, place, key="deepspeed_config.deepspeed_config_file", shipped={})
        return
    offloads = {kind: section.text(f"offload_{kind}_device") or "none" for kind in ("optimizer", "param")}
    zero: dict[str, object] = {"stage": section.count("zero_stage", least=0) or 0}
    zero |= {f"offload_{kind}": {"device": device} for kind, device in offloads.items() if device != "none"}
    saves = section.switch("zero3_save_16bit_model")
    zero |= {"stage3_gather_16bit_weights_on_model_save": bool(saves)}
    precision = Precision(str(draft.flags.get("precision", precision)))
    formats = {Precision.BF16: "bf16", Precision.BF16_PARAMS: "bf16", Precision.FP16: "fp16"}
    config = {
        "zero_optimization": zero,
        "gradient_clipping": section.get("gradient_clipping") or "auto",
        "gradient_accumulation_steps": section.get("gradient_accumulation_steps") or "auto",
        **({formats[precision]: {"enabled": True}} if precision in formats else {}),
    }
    read_deepspeed(Section(config, file=place.file, path="deepspeed_config."), draft, place)
