"""How large a model's weights and optimizer states are at the moments that no step program describes: as they are
loaded, as they are gathered, as they are saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launchkit.model import ModelProfile
from launchkit.optimizers import FP32_BYTES, LocalTensor, find, local_tensor
from launchkit.program import Parameter, StepProgram
from launchkit.scenario import Method, Precision, Scenario, StrategyKind, Trainer
from launchkit.strategies.base import Located, located_parameters, lora_rank
from launchkit.strategies.weights import loaded_itemsize


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """One job's model in bytes, unsharded.

    ``stored_bytes`` are the files that ``from_pretrained`` reads, ``loaded_bytes`` what it makes of them (without
    adapters, 4-bit weights packed), ``state_dict_bytes`` everything as the engine holds it while training,
    ``trained_bytes`` the trained part of that. ``state_bytes`` are the optimizer's states, wherever they live, of
    whose tensors ``num_scalar_states`` are single numbers, which no rank shards.
    ``largest_tensor_bytes`` is of the largest weight in its held dtype, ``largest_unit_bytes`` of the largest block, or
    of all that lies outside blocks. ``largest_unpacked_bytes`` is the largest 4-bit weight in 16 bits.
    """

    stored_bytes: int
    loaded_bytes: int
    state_dict_bytes: int
    trained_bytes: int
    num_trained: int
    num_trained_tensors: int
    state_bytes: int
    num_state_tensors: int
    num_scalar_states: int
    largest_tensor_bytes: int
    largest_unit_bytes: int
    largest_unpacked_bytes: int

    @classmethod
    def of(cls, program: StepProgram, profile: ModelProfile, *, scenario: Scenario) -> ModelSizes:
        """The sizes of ``program``'s model in ``scenario``."""
        rank = lora_rank(scenario)
        held = [_Held(place, scenario) for place in located_parameters(program)]
        trained = [item for item in held if item.parameter.trainable]
        pretrained = [item for item in held if not item.is_adapter]
        units: dict[str, int] = {}
        for item in held:
            units[item.group] = units.get(item.group, 0) + item.num_bytes
        variants = find(scenario.training.optimizer).variant
        tensors = list(_state_tensors(trained, scenario, rank=rank))
        return cls(
            stored_bytes=profile.num_parameters * profile.checkpoint_itemsize,
            loaded_bytes=sum(item.num_bytes * item.copies for item in pretrained),
            state_dict_bytes=sum(item.num_bytes * item.copies for item in held),
            trained_bytes=sum(item.num_bytes * item.copies for item in trained),
            num_trained=sum(item.parameter.numel(rank) * item.copies for item in trained),
            num_trained_tensors=sum(item.copies for item in trained),
            state_bytes=sum(n * sum(s.num_bytes(tensor) for s in variants(tensor).states) for tensor, n in tensors),
            num_state_tensors=sum(n * len(variants(tensor).states) for tensor, n in tensors),
            num_scalar_states=sum(
                n * sum(s.num_bytes(tensor) <= FP32_BYTES for s in variants(tensor).states) for tensor, n in tensors
            ),
            largest_tensor_bytes=max((item.num_bytes for item in held), default=0),
            largest_unit_bytes=max(units.values(), default=0),
            largest_unpacked_bytes=max((item.unpacked_bytes for item in held), default=0),
        )


def saves_whole_weights(scenario: Scenario) -> bool:
    """Whether a checkpoint holds the weights in one piece, for which sharded ones are gathered: unless FSDP is told to
    save shards, or ZeRO-3 not to gather, which it does for adapters all the same."""
    strategy = scenario.strategy
    if strategy.kind.is_fsdp:
        return strategy.fsdp.full_state_dict
    if strategy.kind is StrategyKind.ZERO3:
        return strategy.zero.gather_16bit_weights_on_model_save or scenario.training.method is not Method.FULL
    return True


class _Held:
    """A distinct parameter, as the engine holds it."""

    def __init__(self, place: Located, scenario: Scenario) -> None:
        self.parameter: Parameter = place.parameter
        self.group, self.in_block, self.copies = place.group, place.in_block, place.copies
        self.is_adapter = self.parameter.trainable and scenario.training.method is not Method.FULL
        self.itemsize = _adapter_itemsize(self.parameter, scenario) if self.is_adapter else loaded_itemsize(scenario)
        numel = self.parameter.numel(lora_rank(scenario))
        packed = self.parameter.packed_bytes
        self.num_bytes = packed + self.parameter.extra_bytes if packed else numel * self.itemsize
        self.unpacked_bytes = 2 * numel if packed else 0


def _adapter_itemsize(parameter: Parameter, scenario: Scenario) -> int:
    """PEFT makes adapters in fp32. FSDP casts them only without mixed precision. DeepSpeed casts a module as a whole,
    but not one that ``from_pretrained`` has sharded already, which it does for ZeRO-3 (seen in what it saves)."""
    training, kind = scenario.training, scenario.strategy.kind
    if kind is StrategyKind.ZERO3 and training.trainer not in (Trainer.LOOP, Trainer.TRL):
        return FP32_BYTES
    keeps_fp32 = kind.is_fsdp and training.precision is not Precision.BF16_PURE
    return FP32_BYTES if keeps_fp32 else parameter.itemsize


def _state_tensors(trained: list[_Held], scenario: Scenario, *, rank: int) -> Iterator[tuple[LocalTensor, int]]:
    """What the ranks' optimizers update, taken together, and how many of each there are: ZeRO flattens it."""
    if scenario.strategy.kind.zero_stage:
        yield LocalTensor((sum(item.parameter.numel(rank) * item.copies for item in trained),), FP32_BYTES), 1
        return
    trainer = scenario.training.trainer
    for item in trained:
        tensor = local_tensor(
            item.parameter, lora_rank=rank, itemsize=item.itemsize, in_block=item.in_block, trainer=trainer
        )
        yield tensor, item.copies
