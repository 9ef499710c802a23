"""What every strategy's rewrite is made of: what lies there before the step, accumulation, the optimizer's stage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple, TypeGuard, TypeVar

from launchkit.errors import TraceError
from launchkit.optimizers import (
    FP32_BYTES,
    LocalTensor,
    Optimizer,
    find,
    local_tensor,
    step_events,
    traffic_bytes,
)
from launchkit.program import (
    Alloc,
    Collective,
    Copy,
    Event,
    Free,
    FreeAll,
    Kernel,
    Moment,
    Owner,
    Parameter,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    local,
)
from launchkit.scenario import (
    Compute,
    DeviceKind,
    Fp8Backend,
    Method,
    Precision,
    Scenario,
    State,
    TraceKey,
    Trainer,
    Training,
)

_T = TypeVar("_T", bound=Hashable)

OPTIMIZER_STAGE = "optimizer"
ROOT_GROUP = "root"
HALF_BYTES = 2  # of an element in fp16 or bf16
FLOAT8_BYTES = 1


# Weights stay as they are and autocast casts in the forward pass: one GPU and DDP.
AUTOCAST_COMPUTE = {
    Precision.FP32: Compute.FP32,
    Precision.FP16: Compute.AUTOCAST_FP16,
    Precision.BF16: Compute.AUTOCAST_BF16,
    Precision.BF16_PARAMS: Compute.BF16_AUTOCAST,
    Precision.BF16_PURE: Compute.BF16,
    Precision.FP8: Compute.AUTOCAST_FP8,
}


def make_trace_key(training: Training, compute: Compute, device: DeviceKind, *, single_sequence: bool) -> TraceKey:
    """The key of the program in which ``training`` computes as ``compute``."""
    has_adapter = training.method is not Method.FULL
    is_te = compute.is_float8 and training.fp8_backend is Fp8Backend.TE
    return TraceKey(
        device=device,
        method=training.method,
        compute=compute,
        checkpointing=training.checkpointing,
        attention=training.attention,
        loss=training.loss,
        trainer=training.trainer,
        lora_targets=training.lora_targets if has_adapter else "",
        single_sequence=single_sequence,
        adapter_dropout=training.lora_dropout > 0 and has_adapter,
        cast_adapters=trl_narrows_adapters(training),
        dora=training.dora and has_adapter,
        modules_to_save=training.lora_modules_to_save if has_adapter else "",
        images=training.images,
        padded=training.padding,
        freeze="" if has_adapter else training.freeze,
        image_size=training.image_size,
        pads_float8=compute.is_float8 and not is_te and training.trainer is not Trainer.AXOLOTL,
        transformer_engine=is_te,
    )


def trl_narrows_adapters(training: Training) -> bool:
    """Whether adapters are bf16 whatever the engine: TRL casts those beside 4-bit weights, and leaves what is not
    quantised as it was loaded. Source: trl 1.16 ``SFTTrainer.__init__``."""
    return training.trainer is Trainer.TRL and training.method is Method.QLORA


class Located(NamedTuple):
    """A parameter with where it is: its group, its position there, and how often that group occurs in the model."""

    parameter: Parameter
    group: str
    position: int
    copies: int

    @property
    def in_block(self) -> bool:
        return self.group != ROOT_GROUP


def lora_rank(scenario: Scenario) -> int:
    """The rank to put into LoRA-sized parameters; 0 where nothing has one."""
    return 0 if scenario.training.method is Method.FULL else scenario.training.lora_rank


def located_parameters(program: StepProgram, *, trainable: bool | None = None) -> Iterator[Located]:
    """Each distinct parameter of the model once, of all or only of the trainable (or frozen) ones."""
    for name, group in program.groups.items():
        for index, parameter in enumerate(group.parameters):
            if trainable is None or parameter.trainable == trainable:
                yield Located(parameter, name, index, program.group_counts[name])


def weights(program: StepProgram, *, scenario: Scenario) -> tuple[Persistent, ...]:
    """The unsharded weights as the program's dtype holds them: one storage each, 4-bit scales beside them."""
    rank = lora_rank(scenario)
    found = []
    for parameter, _, _, count in located_parameters(program):
        found.append(Persistent(Size.constant(parameter.num_bytes(rank)), Owner.WEIGHTS, count))
        if parameter.extra_bytes:
            found.append(Persistent(Size.constant(parameter.extra_bytes), Owner.WEIGHTS, count))
    return tuple(found)


def whole_tensors(program: StepProgram, *, scenario: Scenario) -> tuple[LocalTensor, ...]:
    """What the optimizer updates where nothing is sharded: every parameter with a gradient, in the model's order.

    That is what the forward pass reads ahead of the blocks, layer after layer, and the rest; the Trainer gives norms
    and biases, which do not decay, a group of their own behind all others. Omits: what stands between two stacks of
    blocks, and that blocks of several kinds may alternate.
    """
    rank, trainer = lora_rank(scenario), scenario.training.trainer

    def trained(name: str) -> list[tuple[int, Parameter]]:
        parameters = enumerate(program.groups[name].parameters)
        return [(index, parameter) for index, parameter in parameters if parameter.trainable and parameter.has_gradient]

    def tensor(parameter: Parameter, *, in_block: bool) -> LocalTensor:
        return local_tensor(parameter, lora_rank=rank, in_block=in_block, trainer=trainer)

    blocks = [
        (parameter, tensor(parameter, in_block=True))
        for name in program.groups
        if name != ROOT_GROUP
        for _, parameter in trained(name) * program.group_counts[name]
    ]
    early = _read_ahead_of_blocks(program)
    root = trained(ROOT_GROUP) if ROOT_GROUP in program.groups else []
    placed = [(index in early, (parameter, tensor(parameter, in_block=False))) for index, parameter in root]
    ordered = [*(pair for is_early, pair in placed if is_early), *blocks]
    ordered += [pair for is_early, pair in placed if not is_early]
    if trainer is not Trainer.LOOP:
        ordered.sort(key=lambda pair: not _decays(pair[0]))
    return tuple(pair[1] for pair in ordered)


_NOT_DECAYING = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)", re.IGNORECASE)


def _decays(parameter: Parameter) -> bool:
    """Whether the Trainer lets a parameter decay: not by its name, nor a vector, such as ``nn.LayerNorm`` has.

    Source: transformers 5.24 ``Trainer.get_decay_parameter_names``. Omits: vectors that are none of a norm, which do.
    """
    return len(parameter.shape) > 1 and not _NOT_DECAYING.search(parameter.name)


def _read_ahead_of_blocks(program: StepProgram) -> frozenset[int]:
    """Which parameters outside all blocks the step reads before it enters the first block."""
    stage = next(iter(program.stages), None)
    if stage is None or stage.stack:
        return frozenset()
    return frozenset(index for layer in stage.order() for index in program.section_of(stage, layer).uses)


def optimizer_states(
    optimizer: Optimizer, tensors: Sequence[LocalTensor], *, device: DeviceKind
) -> tuple[Persistent, ...]:
    """States on the device as they lie there between steps, equal neighbours counted together."""
    sizes: Counter[int] = Counter()
    for tensor, count in Counter(tensors).items():
        for size in optimizer.state_bytes(tensor, device=device):
            sizes[size] += count
    sizes.update(optimizer.shared_state_bytes if tensors else ())
    return tuple(_persistent(sizes, Owner.OPTIMIZER_STATES))


def persistent_run(sizes: Iterable[int], owner: Owner) -> Iterator[Persistent]:
    """Storages of ``sizes`` bytes, in order of first appearance, with equal ones counted."""
    return _persistent(Counter(sizes), owner)


def _persistent(counts: Mapping[int, int], owner: Owner) -> Iterator[Persistent]:
    """``counts`` storages of each size; empty ones are none."""
    return (Persistent(Size.constant(size), owner, count) for size, count in counts.items() if size)


def states_exist_before_step(optimizer: Optimizer, scenario: Scenario) -> bool:
    return scenario.state is State.STEADY or optimizer.states_before_step


def clip_norm(scenario: Scenario) -> float:
    """The gradient norm that the trainer clips to; 0 where it does not clip (the plain loop never does)."""
    return 0.0 if scenario.training.trainer is Trainer.LOOP else scenario.training.max_grad_norm


def accumulates(scenario: Scenario) -> bool:
    """Whether gradients of earlier micro-batches are there when the last one runs."""
    return scenario.batch.gradient_accumulation_steps > 1


def with_an_end(program: StepProgram) -> StepProgram:
    """The program with a stage behind the blocks' backward, where frozen embeddings left none: there an engine has what
    it does once the root's backward is over.

    Raises ``TraceError`` where one stack of several has no backward at all, nothing ahead of it being trained: FSDP's
    units are gathered for a backward that such a stack does not have.
    """
    last, known = program.stages[-1], {stage.name for stage in program.stages}
    stacks = [stage.stack for stage in program.stages if stage.phase is Phase.FORWARD and stage.stack]
    idle = next((stack for stack in stacks if len(stacks) > 1 and f"backward.{stack}" not in known), None)
    if idle is not None:
        raise TraceError(
            f"{idle}, which is frozen with all ahead of it, is not modelled under FSDP; use --strategy zero3 or ddp"
        )
    if not last.stack or last.phase is not Phase.BACKWARD:
        return program
    end = Stage(name="backward.0", phase=Phase.BACKWARD, layers=(len(program.sections),))
    return replace(program, stages=(*program.stages, end), sections=(*program.sections, Section(events=())))


def accumulate_gradients(program: StepProgram) -> StepProgram:
    """The last of several micro-batches: each parameter's gradient is added to the one that is there, and freed.

    The program of the first micro-batch holds no more than this one at any time, so it need not be told apart.
    """
    return map_sections(program, Phase.BACKWARD, gradients_die_when_ready)


def gradients_die_when_ready(stage: Stage, section: Section) -> Section:
    """``section`` with each parameter's gradient copied or added elsewhere as soon as it is complete."""
    if not section.gradients:
        return section
    events: list[Event] = []
    for event, ready in with_ready_gradients(section.events):
        events.append(event._replace(owner=Owner.TEMPORARIES, parameter=-1) if is_gradient(event) else event)
        events.extend(Free(local(stage.name, alloc.slot), alloc.size) for alloc in ready)
    return replace(section, events=tuple(events))


def with_ready_gradients(events: Sequence[Event]) -> Iterator[tuple[Event, tuple[Alloc, ...]]]:
    """Each event with the gradients that autograd hands over right behind it.

    A gradient is accumulated, and hooks see it, once the operator that made it has let go of its inputs: behind the
    frees that follow the allocation.
    """
    pending: list[Alloc] = []
    freed = False
    for event, following in zip_longest(events, events[1:]):
        if is_gradient(event):
            pending.append(event)
            freed = False
        freed = freed or isinstance(event, Free)
        if pending and (following is None or (freed and not isinstance(following, Free))):
            yield event, tuple(pending)
            pending.clear()
        else:
            yield event, ()


def is_gradient(event: Event) -> TypeGuard[Alloc]:
    """Whether ``event`` brings the gradient of one of its section's parameters into being."""
    return isinstance(event, Alloc) and event.parameter >= 0


def map_sections(program: StepProgram, phase: Phase, change: Callable[[Stage, Section], Section]) -> StepProgram:
    """``program`` with ``change`` made to the sections of every stage of ``phase``, each template once per stage."""
    sections = list(program.sections)
    stages = []
    for stage in program.stages:
        if stage.phase is phase:
            changed = {number: change(stage, program.sections[number]) for number in dict.fromkeys(stage.layers)}
            numbers = {number: len(sections) + place for place, number in enumerate(changed)}
            sections.extend(changed.values())
            stage = replace(stage, layers=tuple(numbers[number] for number in stage.layers))
        stages.append(stage)
    return compact(replace(program, stages=tuple(stages), sections=tuple(sections)))


def map_layers(
    program: StepProgram,
    phase: Phase,
    decide: Callable[[Stage, int, Section], _T],
    change: Callable[[Stage, int, Section, _T], Section],
) -> StepProgram:
    """Like ``map_sections``, but layers may differ: ``decide`` says, for every layer in execution order, all that
    ``change`` makes of it; layers of one section for which it says the same are changed once, and stay alike."""
    sections = list(program.sections)
    stages = []
    for stage in program.stages:
        if stage.phase is phase:
            numbers: dict[tuple[int, Hashable], int] = {}
            layers = list(stage.layers)
            for layer in stage.order():
                section = program.section_of(stage, layer)
                decision = decide(stage, layer, section)
                key = (stage.layers[layer], decision)
                if key not in numbers:
                    numbers[key] = len(sections)
                    sections.append(change(stage, layer, section, decision))
                layers[layer] = numbers[key]
            stage = replace(stage, layers=tuple(layers))
        stages.append(stage)
    return compact(replace(program, stages=tuple(stages), sections=tuple(sections)))


def gradient_bytes(program: StepProgram, section: Section, *, rank: int) -> tuple[int, ...]:
    """Bytes of each parameter's gradient that ``section`` completes, in order of arrival."""
    parameters = program.groups[section.group].parameters
    return tuple([parameters[event.parameter].num_bytes(rank) for event in section.gradients])


def arriving_gradients(program: StepProgram, *, rank: int) -> Iterator[tuple[int, int]]:
    """(item size, bytes) of every gradient in the order in which the backward pass completes them."""
    for stage in program.stages:
        if stage.phase is not Phase.BACKWARD:
            continue
        for layer in stage.order():
            section = program.section_of(stage, layer)
            parameters = program.groups[section.group].parameters
            for event in section.gradients:
                parameter = parameters[event.parameter]
                yield parameter.itemsize, parameter.num_bytes(rank)


def compact(program: StepProgram) -> StepProgram:
    """``program`` without the sections that no stage runs."""
    used = sorted({number for stage in program.stages for number in stage.layers})
    renumbered = {number: position for position, number in enumerate(used)}
    return replace(
        program,
        sections=tuple(program.sections[number] for number in used),
        stages=tuple(replace(s, layers=tuple(renumbered[number] for number in s.layers)) for s in program.stages),
    )


def gradient_storages(program: StepProgram, *, scenario: Scenario) -> tuple[Persistent, ...]:
    """A gradient per trainable parameter, in the parameter's dtype, as accumulation leaves them."""
    rank = lora_rank(scenario)
    sizes: Counter[int] = Counter()
    for place in located_parameters(program, trainable=True):
        if place.parameter.has_gradient:
            sizes[place.parameter.gradient_bytes(rank)] += place.copies
    return tuple(_persistent(sizes, Owner.GRADIENTS))


def narrowed_bytes(parameters: Iterable[Located], *, rank: int) -> int:
    """Bytes of the copies that are made of wide gradients' own parts before they are used."""
    wide = [place for place in parameters if place.parameter.gradient_numel]
    return sum(place.parameter.num_bytes(rank) * place.copies for place in wide)


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """What the optimizer's stage does, from the tensors that one rank updates.

    ``before`` are events ahead of the update, ``after`` events behind it, ahead of ``zero_grad``; both with slots of
    their own. ``on_host`` when the update runs on the CPU, so that the device sees none of its allocations;
    ``zeroes_gradients`` false where an engine keeps gradients in buffers of its own.
    """

    tensors: tuple[LocalTensor, ...]
    before: tuple[Event, ...] = ()
    after: tuple[Event, ...] = ()
    collectives: tuple[Collective, ...] = ()
    copies: tuple[Copy, ...] = ()
    on_host: bool = False
    zeroes_gradients: bool = True
    extra_kernels: tuple[Kernel, ...] = field(default=())


def clip_events(num_gradients: int, *, slot: int = 0) -> tuple[Event, ...]:
    """``clip_grad_norm_``: a norm per gradient, the norms stacked, their norm. Gradients are scaled in place."""
    per_gradient = Size.constant(num_gradients * FP32_BYTES)
    norms = (Alloc(slot, per_gradient, Owner.TEMPORARIES), Alloc(slot + 1, per_gradient, Owner.TEMPORARIES))
    frees = (
        Free(local(OPTIMIZER_STAGE, slot), per_gradient),
        Free(local(OPTIMIZER_STAGE, slot + 1), per_gradient),
    )
    return (*norms, *frees)


def next_slot(events: Iterable[Event]) -> int:
    return 1 + max([event.slot for event in events if isinstance(event, Alloc)], default=-1)


def with_optimizer(program: StepProgram, step: OptimizerStep, *, scenario: Scenario, device: DeviceKind) -> StepProgram:
    """``program`` with the optimizer's stage behind it, and its states in place where the step begins with them.

    ``zero_grad(set_to_none=True)`` is the stage's last event: every gradient that is left dies there.
    """
    optimizer = find(scenario.training.optimizer)
    before = step.before
    if clip_norm(scenario) and not step.on_host and step.tensors:
        before += clip_events(len(step.tensors), slot=next_slot((*before, *step.after)))
    update: tuple[Event, ...] = ()
    states: tuple[Persistent, ...] = ()
    if not step.on_host:
        exist = states_exist_before_step(optimizer, scenario)
        update = step_events(
            optimizer,
            step.tensors,
            device=device,
            first_step=not exist,
            stage=OPTIMIZER_STAGE,
            slot=next_slot((*before, *step.after)),
        )
        states = optimizer_states(optimizer, step.tensors, device=device) if exist else ()
    zero_grad = (FreeAll(Owner.GRADIENTS),) if step.zeroes_gradients else ()
    section = Section(
        events=(*before, *update, *step.after, *zero_grad),
        kernels=(*update_kernels(optimizer, step, device=device), *step.extra_kernels),
        collectives=step.collectives,
        copies=(*step.copies, *_fetched_states(optimizer, step, device=device)),
    )
    stage = Stage(name=OPTIMIZER_STAGE, phase=Phase.OPTIMIZER, layers=(len(program.sections),))
    return replace(
        program,
        stages=(*program.stages, stage),
        sections=(*program.sections, section),
        persistent=program.persistent + states,
        host_persistent_bytes=program.host_persistent_bytes + optimizer.host_state_bytes(step.tensors, device=device),
    )


def _fetched_states(optimizer: Optimizer, step: OptimizerStep, *, device: DeviceKind) -> tuple[Copy, ...]:
    """States that wait on the host: there and back in every step, on the stream that computes."""
    if step.on_host or not optimizer.fetches_states or device is DeviceKind.CPU:
        return ()
    size = Size.constant(optimizer.host_state_bytes(step.tensors, device=device))
    return tuple(Copy(to_device, size, Moment.BLOCKING) for to_device in (True, False))


def update_in_backward(program: StepProgram, *, scenario: Scenario, device: DeviceKind) -> StepProgram:
    """Each parameter updated by an optimizer of its own as soon as its gradient is complete, and the gradient dropped.
    What is left of the optimizer's stage is its traffic; nothing is clipped.

    Source: transformers 5.23 ``trainer_optimizer.py``, ``optimizer_hook``.
    """
    optimizer = find(scenario.training.optimizer)
    tensors = whole_tensors(program, scenario=scenario)
    exist = states_exist_before_step(optimizer, scenario)
    states = optimizer_states(optimizer, tensors, device=device) if exist else ()

    def change(stage: Stage, section: Section) -> Section:
        events: list[Event] = []
        slot = next_slot(section.events)

        def update(gradient: Alloc) -> None:
            nonlocal slot
            parameter = program.groups[section.group].parameters[gradient.parameter]
            tensor = local_tensor(parameter, lora_rank=lora_rank(scenario), in_block=section.group != ROOT_GROUP)
            updated = step_events(
                optimizer, (tensor,), device=device, first_step=not exist, stage=stage.name, slot=slot
            )
            slot = max(slot, next_slot(updated))
            copies = optimizer.updates_late and tensor.itemsize < FP32_BYTES
            at = 1 if copies else len(updated)
            events.extend((*updated[:at], Free(local(stage.name, gradient.slot), gradient.size), *updated[at:]))

        waiting: tuple[Alloc, ...] = ()
        for event, ready in with_ready_gradients(section.events):
            events.append(event)
            if optimizer.updates_late and ready:
                waiting, ready = ready, waiting
            for gradient in ready:
                update(gradient)
        for gradient in waiting:
            update(gradient)
        return replace(section, events=tuple(events))

    kernels = update_kernels(optimizer, OptimizerStep(tensors=tensors), device=device)
    changed = map_sections(program, Phase.BACKWARD, change)
    changed = replace(changed, persistent=program.persistent + states)
    return with_optimizer(changed, OptimizerStep(tensors=(), extra_kernels=kernels), scenario=scenario, device=device)


def update_kernels(optimizer: Optimizer, step: OptimizerStep, *, device: DeviceKind) -> tuple[Kernel, ...]:
    """The update as one pass over parameters, gradients and states. None on the device when it runs on the host."""
    if step.on_host or not step.tensors:
        return ()
    moved = traffic_bytes(optimizer, step.tensors, device=device)
    return (Kernel(1, Size.constant(0), Size.constant(moved), False),)
