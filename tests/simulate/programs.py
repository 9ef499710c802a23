"""Random step programs that contradict nothing, for the property tests."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from launchkit.program import (
    Alloc,
    Anchor,
    Event,
    Free,
    FreeAll,
    Kernel,
    Owner,
    ParameterGroup,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    Term,
    local,
)

OWNERS = (Owner.ACTIVATIONS, Owner.TEMPORARIES, Owner.LOGITS, Owner.GRADIENTS)
KERNEL = Kernel(2, Size((Term(10_000_000, 1, 1),)), Size((Term(100_000, 1, 1),)), True)


def random_size(random: Random) -> Size:
    """Constant, linear, quadratic or over a denominator; now and then nothing at all."""
    shape = random.choice([(), ((0, 0, 0),), ((1, 1, 0),), ((0, 0, 1), (1, 1, 0)), ((1, 2, 0), (1, 1, 0), (0, 0, 0))])
    terms = tuple(Term(random.randrange(1, 5000), *powers) for powers in shape)
    return Size(terms, random.choice([1, 1, 1, 3, 7]))


def section(*events: Event) -> Section:
    return Section(events=events, kernels=(KERNEL,))


def random_forward(random: Random, stage: str, kept: int) -> list[Event]:
    """``kept`` storages that stay, among as many temporaries that die, each after a while."""
    events: list[Event] = [Alloc(slot, random_size(random), random.choice(OWNERS)) for slot in range(2 * kept)]
    for slot in range(kept, 2 * kept):
        allocation = events[slot]
        assert isinstance(allocation, Alloc)
        events.append(Free(local(stage, slot), allocation.size))
    return _shuffled(random, events)


def _shuffled(random: Random, events: list[Event]) -> list[Event]:
    """A random order in which every slot's allocation still comes before its free."""
    keyed: list[tuple[float, Event]] = []
    times: dict[int, float] = {}
    for event in events:
        start = 0.0
        if isinstance(event, Free):
            start = times[event.ref.slot]
        time = random.uniform(start, 1.0)
        if isinstance(event, Alloc):
            times[event.slot] = time
        keyed.append((time, event))
    return [event for _, event in sorted(keyed, key=lambda pair: pair[0])]


def frees_of(forward: list[Event], stage: str, kept: int, anchor: Anchor = Anchor.RELATIVE) -> Iterator[Event]:
    for event in forward:
        if isinstance(event, Alloc) and event.slot < kept and event.owner is not Owner.GRADIENTS:
            yield Free(TensorRef(stage, anchor, 0, event.slot), event.size)


def random_program(seed: int) -> StepProgram:
    """Two kinds of layers in random order, their backward in reverse, gradients freed in the end, with one layer's
    input freed by its neighbour's backward now and then."""
    random = Random(seed)
    kinds = [
        (random_forward(random, "forward", kept), kept) for kept in (random.randrange(1, 8), random.randrange(1, 8))
    ]
    sections = [section(*events) for events, _ in kinds]
    for events, kept in kinds:
        gradient = [Alloc(100 + slot, random_size(random), Owner.GRADIENTS) for slot in range(random.randrange(3))]
        temporary = Alloc(200, random_size(random), Owner.TEMPORARIES)
        release = [Free(local("backward", 200), temporary.size)]
        backward: list[Event] = [*frees_of(events, "forward", kept), *gradient]
        random.shuffle(backward)
        sections.append(section(temporary, *backward, *release))
    logits = Alloc(0, random_size(random), Owner.LOGITS)
    head = section(logits, Alloc(1, random_size(random), Owner.GRADIENTS), Free(local("head", 0), logits.size))
    carried = Alloc(1, random_size(random), Owner.OPTIMIZER_STATES)
    optimizer = section(carried, FreeAll(Owner.GRADIENTS), Free(local("optimizer", 1), carried.size))
    sections += [head, optimizer]
    depth = random.randrange(1, 12)
    kinds_by_layer = [random.randrange(2) for _ in range(depth)]
    return StepProgram(
        stages=(
            Stage(name="forward", phase=Phase.FORWARD, layers=tuple(kinds_by_layer), stack="model.layers"),
            Stage(name="head", phase=Phase.LOSS, layers=(4,)),
            Stage(
                name="backward",
                phase=Phase.BACKWARD,
                layers=tuple(2 + kind for kind in kinds_by_layer),
                stack="model.layers",
                reverse=True,
            ),
            Stage(name="optimizer", phase=Phase.OPTIMIZER, layers=(5,) * random.randrange(1, 3)),
        ),
        sections=tuple(sections),
        groups={"root": ParameterGroup(name="root", parameters=())},
        group_counts={"root": 1},
        persistent=(
            Persistent(Size.constant(random.randrange(1, 10**6)), Owner.WEIGHTS, random.randrange(1, 5)),
            Persistent(random_size(random), random.choice((Owner.GRADIENTS, Owner.INPUTS)), random.randrange(3)),
        ),
    )


def tiny_program(*, free: Free | None = None, freed_stage_layers: int = 3) -> StepProgram:
    """Three equal layers of 1000·b·s bytes kept and 600 dropped, then 5000 of logits; all freed in reverse."""
    kept, dropped = Size((Term(1000, 1, 1),)), Size.constant(600)
    forward = section(
        Alloc(0, kept, Owner.ACTIVATIONS), Alloc(1, dropped, Owner.TEMPORARIES), Free(local("forward", 1), dropped)
    )
    logits = Size.constant(5000)
    head = section(Alloc(0, logits, Owner.LOGITS), Free(local("head", 0), logits))
    backward = section(free or Free(TensorRef("forward", Anchor.RELATIVE, 0, 0), kept))
    return StepProgram(
        stages=(
            Stage(name="forward", phase=Phase.FORWARD, layers=(0, 0, 0), stack="layers"),
            Stage(name="head", phase=Phase.LOSS, layers=(1,)),
            Stage(
                name="backward", phase=Phase.BACKWARD, layers=(2,) * freed_stage_layers, stack="layers", reverse=True
            ),
        ),
        sections=(forward, head, backward),
        groups={"root": ParameterGroup(name="root", parameters=())},
        group_counts={"root": 1},
        persistent=(Persistent(Size.constant(700), Owner.WEIGHTS, 2),),
    )
