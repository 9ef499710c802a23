"""What a training run writes to disk: one checkpoint by its parts, and how many there are at once."""

from __future__ import annotations

from launchkit.optimizers import FP32_BYTES
from launchkit.plan import CheckpointFiles
from launchkit.planner.sizes import ModelSizes, saves_whole_weights
from launchkit.recipe import KEPT_CHECKPOINTS
from launchkit.scenario import Scenario, StrategyKind

# What a file adds per tensor. safetensors: name, dtype, shape and offsets as JSON. torch.save: an entry in a zip with
# its padding, and the pickled description. Measured on adapters of 84 tensors: 130 and 273 bytes.
SAFETENSORS_ENTRY_BYTES = 130
TORCH_ENTRY_BYTES = 273

# Of shards a distributed checkpoint writes every piece as a file of its own within each rank's, and describes it once
# more. Measured: 2,046 bytes a piece of a whole model, 2,060 of adapters.
SHARD_ENTRY_BYTES = 2_050

# DeepSpeed adds a script, and describes each tensor in each rank's file under ZeRO-3, in one file below.
DEEPSPEED_SCRIPT_BYTES = 38_580
DEEPSPEED_ENTRY_BYTES = 775

# One process writing weights from host memory: 0.44 GB/s measured (safetensors, a virtual disk); local NVMe is several
# times as fast, network file systems are often slower.
WRITE_BYTES_PER_S = 0.5e9


def checkpoint_files(sizes: ModelSizes, scenario: Scenario, *, num_ranks: int) -> CheckpointFiles:
    """One checkpoint of transformers' Trainer: the model, the engine's own copy of it, the optimizer.

    Of a model that transformers splits as it loads it the Trainer saves the weights alone, and resumes nothing.

    Source: transformers 5.23 ``Trainer.__init__`` and ``_save_checkpoint``, accelerate 1.15 ``save_fsdp_model`` and
    ``save_fsdp_optimizer``, DeepSpeed 0.19.8 ``save_checkpoint``; within 1 % of what two processes write.
    Omits: the tokenizer, training arguments and random states (some 10 kB per rank and the tokenizer's files).
    """
    weights = _weights_bytes(sizes, scenario)
    engine = _engine_weights_bytes(sizes, scenario, num_ranks=num_ranks)
    optimizer = sizes.state_bytes + TORCH_ENTRY_BYTES * (sizes.num_state_tensors + sizes.num_trained_tensors)
    if scenario.strategy.kind.zero_stage:
        optimizer = sizes.state_bytes + sizes.num_trained * FP32_BYTES
    if scenario.strategy.split.tp > 1:
        engine = optimizer = 0
    if scenario.strategy.kind.is_fsdp and not saves_whole_weights(scenario):
        num_sharded = sizes.num_state_tensors - sizes.num_scalar_states
        optimizer = sizes.state_bytes + SHARD_ENTRY_BYTES * (num_ranks * num_sharded + sizes.num_scalar_states)
    total = weights + engine + optimizer
    return CheckpointFiles(
        weights_bytes=weights,
        engine_weights_bytes=engine,
        optimizer_bytes=optimizer,
        total_bytes=total,
        num_kept=KEPT_CHECKPOINTS,
        disk_peak_bytes=(KEPT_CHECKPOINTS + 1) * total + weights,
        write_seconds=_serial_bytes(weights, engine, optimizer, scenario, num_ranks=num_ranks) / WRITE_BYTES_PER_S,
    )


def _weights_bytes(sizes: ModelSizes, scenario: Scenario) -> int:
    """What ``from_pretrained`` reads back: nothing where shards are saved instead."""
    if not saves_whole_weights(scenario):
        return 0
    return sizes.trained_bytes + SAFETENSORS_ENTRY_BYTES * sizes.num_trained_tensors


def _engine_weights_bytes(sizes: ModelSizes, scenario: Scenario, *, num_ranks: int) -> int:
    """FSDP writes the trained weights once more, to resume from; ZeRO-1 and 2 too. ZeRO-3's are its fp32 masters."""
    kind, num_tensors = scenario.strategy.kind, sizes.num_trained_tensors
    if kind.is_fsdp and not saves_whole_weights(scenario):
        return sizes.trained_bytes + SHARD_ENTRY_BYTES * num_ranks * num_tensors
    if kind.is_fsdp:
        return sizes.trained_bytes + TORCH_ENTRY_BYTES * num_tensors
    if kind is StrategyKind.ZERO3:
        return DEEPSPEED_SCRIPT_BYTES + num_ranks * DEEPSPEED_ENTRY_BYTES * num_tensors
    if kind.zero_stage:
        return DEEPSPEED_SCRIPT_BYTES + sizes.trained_bytes + DEEPSPEED_ENTRY_BYTES * num_tensors
    return 0


def _serial_bytes(weights: int, engine: int, optimizer: int, scenario: Scenario, *, num_ranks: int) -> int:
    """Bytes that the busiest rank writes: shards are written side by side, everything else by the first rank."""
    kind = scenario.strategy.kind
    if kind.is_fsdp and not saves_whole_weights(scenario):
        return (engine + optimizer) // num_ranks
    if kind.zero_stage:
        return weights + engine + optimizer // num_ranks
    return weights + engine + optimizer
