"""The optimizer table against the real optimizers, and against itself."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchkit.errors import IllegalScenarioError
from launchkit.optimizers import (
    ALIASES,
    OPTIMIZERS,
    UNPLANNED,
    LocalTensor,
    Place,
    find,
    local_tensor,
    step_events,
    traffic_bytes,
)
from launchkit.program import Alloc, Event, Free, Owner, Parameter, Point
from launchkit.scenario import DeviceKind, Trainer

CPU, CUDA = DeviceKind.CPU, DeviceKind.CUDA
SHAPES = ((300, 200), (200,), (128, 512), (700, 100), (512,))
POINT = Point(1, 1)


def live_bytes(events: Iterable[Event]) -> tuple[int, int]:
    """Peak and final live bytes of ``events``; a free without its allocation fails."""
    live: dict[int, int] = {}
    peak = 0
    for event in events:
        if isinstance(event, Alloc):
            assert event.slot not in live
            live[event.slot] = event.size.at(POINT)
        elif isinstance(event, Free):
            assert live.pop(event.ref.slot) == event.size.at(POINT)
        peak = max(peak, sum(live.values()))
    return peak, sum(live.values())


def test_split_tensors_are_updated_apart_from_others() -> None:
    """A multi-tensor kernel takes tensors of one device mesh, so that its temporaries are of one kind at a time."""
    whole, split = LocalTensor((300, 200), 4), LocalTensor((300, 200), 4, is_split=True)
    together, apart = (
        live_bytes(step_events(find("adamw_torch"), tensors, device=CUDA, first_step=False))[0]
        for tensors in ((whole, whole), (whole, split))
    )
    assert 0 < apart < together


def profiled(torch: Any, function: Callable[[], object]) -> tuple[int, int]:
    """Peak and final change in the CPU allocator's live bytes while ``function`` runs."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    allocations = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(allocations, key=lambda pair: pair[0]):
        live += size
        peak = max(peak, live)
    return peak, live


def real_steps(torch: Any, make: Callable[[list[Any]], Any], itemsize: int) -> list[tuple[int, int]]:
    """(peak, kept) bytes of the first and the second step of a real optimizer."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[itemsize]
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameters)
    return [profiled(torch, optimizer.step) for _ in range(2)]


def predicted_steps(name: str, itemsize: int, device: DeviceKind) -> list[tuple[int, int]]:
    tensors = [LocalTensor(shape, itemsize) for shape in SHAPES]
    return [live_bytes(step_events(find(name), tensors, device=device, first_step=first)) for first in (True, False)]


def adafactor(parameters: list[Any]) -> Any:
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


def torch_class(name: str, **arguments: object) -> Callable[[list[Any]], Any]:
    return lambda parameters: getattr(pytest.importorskip("torch").optim, name)(parameters, lr=1e-3, **arguments)


def schedule_free(name: str) -> Callable[[list[Any]], Any]:
    def make(parameters: list[Any]) -> Any:
        optimizer = getattr(pytest.importorskip("schedulefree"), name)(parameters, lr=1e-3)
        optimizer.train()
        return optimizer

    return make


def stable_adamw(parameters: list[Any]) -> Any:
    return pytest.importorskip("optimi").StableAdamW(parameters, lr=1e-3)


def grokadamw(parameters: list[Any]) -> Any:
    return pytest.importorskip("grokadamw").GrokAdamW(parameters, lr=1e-3)


def galore_adafactor(parameters: list[Any]) -> Any:
    """As the Trainer groups parameters and sets it."""
    module = pytest.importorskip("galore_torch")
    projection = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    matrices = {"params": [parameter for parameter in parameters if parameter.dim() == 2], **projection}
    groups = [{"params": [parameter for parameter in parameters if parameter.dim() != 2]}, matrices]
    return module.GaLoreAdafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)


def projecting(module: str, name: str, **arguments: object) -> Callable[[list[Any]], Any]:
    """As the Trainer groups parameters: first what is not a linear layer."""

    def make(parameters: list[Any]) -> Any:
        matrices = [parameter for parameter in parameters if parameter.dim() == 2]
        rest = [parameter for parameter in parameters if parameter.dim() != 2]
        settings = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"} | arguments
        groups = [{"params": rest}, {"params": matrices, **settings}]
        return getattr(pytest.importorskip(module), name)(groups, lr=1e-3, no_deprecation_warning=True)

    return make


galore = projecting("galore_torch", "GaLoreAdamW")
apollo = projecting("apollo_torch", "APOLLOAdamW", proj="random", scale_type="channel", scale=1.0)

REAL = [
    ("adamw_torch", CPU, torch_class("AdamW")),
    ("adamw_torch", CUDA, torch_class("AdamW", foreach=True)),
    ("adamw_torch_fused", CPU, torch_class("AdamW", fused=True)),
    ("sgd", CPU, torch_class("SGD")),
    ("sgd", CUDA, torch_class("SGD", foreach=True)),
    ("sgd_momentum", CPU, torch_class("SGD", momentum=0.9)),
    ("sgd_momentum", CUDA, torch_class("SGD", momentum=0.9, foreach=True)),
    ("rmsprop", CPU, torch_class("RMSprop")),
    ("rmsprop", CUDA, torch_class("RMSprop", foreach=True)),
    ("adagrad", CPU, torch_class("Adagrad")),
    ("adagrad", CUDA, torch_class("Adagrad", foreach=True)),
    ("adafactor", CPU, adafactor),
    ("schedule_free_adamw", CPU, schedule_free("AdamWScheduleFree")),
    ("schedule_free_sgd", CPU, schedule_free("SGDScheduleFree")),
    ("stable_adamw", CPU, stable_adamw),
    ("grokadamw", CPU, grokadamw),
]


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast", "ignore:CUDA is not available or torch_xla")
@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize(("name", "device", "make"), REAL, ids=[f"{row[0]}-{row[1]}" for row in REAL])
def test_step_allocates_what_the_real_optimizer_does(
    name: str, device: DeviceKind, make: Callable[[list[Any]], Any], itemsize: int
) -> None:
    """Peak and kept bytes of both steps agree to a kilobyte: the scalars of norms and step counts."""
    torch = pytest.importorskip("torch")
    for real, predicted in zip(real_steps(torch, make, itemsize), predicted_steps(name, itemsize, device), strict=True):
        assert predicted == pytest.approx(real, abs=1024)


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize(
    ("name", "make"), [("galore_adamw", galore), ("galore_adafactor", galore_adafactor), ("apollo_adamw", apollo)]
)
def test_projected_states_and_steps(name: str, make: Callable[[list[Any]], Any], itemsize: int) -> None:
    """What both steps keep and a steady one allocates agree to a kilobyte. The first makes the projections, by a
    decomposition whose workspace is the library's: an eighth more at most."""
    torch = pytest.importorskip("torch")
    (first, kept), steady = real_steps(torch, make, itemsize)
    (first_predicted, kept_predicted), steady_predicted = predicted_steps(name, itemsize, CPU)
    assert kept_predicted == pytest.approx(kept, abs=1024)
    assert steady_predicted == pytest.approx(steady, abs=1024)
    assert first_predicted == pytest.approx(first, rel=1 / 8)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("itemsize", [4, 2])
def test_muon_allocates_what_torch_does(itemsize: int) -> None:
    """Muon's matrices; oneDNN is off, since its products take scratch that no GPU does; 7 KiB of packing remain."""
    torch = pytest.importorskip("torch")
    dtype = {4: torch.float32, 2: torch.bfloat16}[itemsize]
    shapes = ((256, 512), (512, 256), (256, 256))
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Muon(parameters)
    tensors = [LocalTensor(shape, itemsize) for shape in shapes]
    for first in (True, False):
        with torch.backends.mkldnn.flags(enabled=False):
            real = profiled(torch, optimizer.step)
        predicted = live_bytes(step_events(find("muon"), tensors, device=CPU, first_step=first))
        assert predicted == pytest.approx(real, abs=8192)


@pytest.mark.skipif(not os.environ.get("LAUNCHKIT_LONG_TESTS"), reason="compiles the update, which takes a minute")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize(("name", "class_name"), [("adamw_torch_8bit", "AdamW8bit"), ("adamw_torch_4bit", "AdamW4bit")])
def test_torchao_keeps_and_allocates_what_its_class_does(name: str, class_name: str, itemsize: int) -> None:
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("torchao.optim")
    make = lambda parameters: getattr(optim, class_name)(parameters, lr=1e-3, block_size=256)  # noqa: E731
    (_, kept), steady = real_steps(torch, make, itemsize)
    (_, kept_predicted), steady_predicted = predicted_steps(name, itemsize, CPU)
    assert kept_predicted == kept
    assert steady_predicted == pytest.approx(steady, rel=0.01)


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize(
    ("name", "class_name", "bits"),
    [
        ("adamw_bnb_8bit", "AdamW", 8),
        ("paged_adamw_32bit", "AdamW", 32),
        ("lion_8bit", "Lion", 8),
        ("lion_32bit", "Lion", 32),
        ("rmsprop_bnb_8bit", "RMSprop", 8),
        ("rmsprop_bnb", "RMSprop", 32),
        ("ademamix_8bit", "AdEMAMix", 8),
        ("ademamix", "AdEMAMix", 32),
    ],
)
def test_bitsandbytes_on_a_cpu(name: str, class_name: str, bits: int, itemsize: int) -> None:
    """Its updates are torch code there, and hold several copies of a tensor in fp32. Code books come with the class."""
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("bitsandbytes").optim

    def make(parameters: list[Any]) -> Any:
        return getattr(optim, class_name)(parameters, lr=1e-3, optim_bits=bits)

    books = sum(find(name).shared_state_bytes)
    (first, kept), steady = real_steps(torch, make, itemsize)
    (first_predicted, kept_predicted), steady_predicted = predicted_steps(name, itemsize, CPU)
    assert (first_predicted - books, kept_predicted - books) == pytest.approx((first, kept), abs=64)
    assert steady_predicted == pytest.approx(steady, abs=64), "but for scalars"
    in_place = [live_bytes(step_events(find(name), [LocalTensor((64, 100), itemsize)], device=CUDA, first_step=False))]
    assert in_place == [(0, 0)], "CUDA has kernels for it"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("shape", [(300, 200), (512,)])
@pytest.mark.parametrize(("name", "class_name"), [("lomo", "Lomo"), ("adalomo", "AdaLomo")])
def test_lomo_holds_what_its_hook_does(
    name: str, class_name: str, shape: tuple[int, ...], itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook's own temporaries, and AdaLomo's states, which it makes on a GPU: here on the CPU."""
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.randn(shape, dtype={4: torch.float32, 2: torch.bfloat16}[itemsize]))
    optimizer = getattr(optim, class_name)(model)
    optimizer.lr, optimizer.step_num = 1e-3, 2
    gradient = model.weight.grad = torch.randn_like(model.weight)
    tensor, row = LocalTensor(shape, itemsize), find(name)
    real = profiled(torch, lambda: optimizer.grad_func(0))
    assert model.weight.grad is None
    assert gradient is not None  # held, so that its end is in neither
    assert live_bytes(step_events(row, [tensor], device=CPU, first_step=False)) == pytest.approx(real, abs=64)
    held = [getattr(optimizer, f"exp_avg_sq{side}", {}) for side in ("", "_row", "_col")]
    assert sum(row.state_bytes(tensor, device=CPU)) == sum(state.nbytes for states in held for state in states.values())


def test_grokadamw_fetches_its_states_from_the_host() -> None:
    """Three copies of one parameter's at a time, where the parameters are on a GPU."""
    tensors, row = [LocalTensor((300, 200), 4)] * 3, find("grokadamw")
    assert row.state_bytes(tensors[0], device=CUDA) == ()
    assert row.host_state_bytes(tensors, device=CUDA) == 3 * 3 * 240_000
    peaks = [live_bytes(step_events(row, tensors, device=device, first_step=False))[0] for device in (CUDA, CPU)]
    assert peaks[0] - peaks[1] == 3 * 240_000


def test_every_name_the_trainer_knows_is_a_row_or_says_what_to_use() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    for member in training_args.OptimizerNames:
        assert (member.value in UNPLANNED) is not (member.value in {*OPTIMIZERS, *ALIASES})
    for name in UNPLANNED:
        with pytest.raises(IllegalScenarioError, match=rf"^{name} .*; use --optimizer \w+"):
            find(name)


def test_every_trainer_name_is_one_the_trainer_knows() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    known = {member.value for member in training_args.OptimizerNames}
    assert {row.hf_name for row in OPTIMIZERS.values() if row.hf_name} <= known


@pytest.mark.parametrize(
    ("name", "place", "expected_bytes"),
    [
        ("adamw_torch", Place.DEVICE, 2 * 4 * 1_000_000),
        ("adamw_torch", Place.HOST, 4),
        ("adamw_torch_fused", Place.DEVICE, 2 * 4 * 1_000_000 + 4),
        ("paged_adamw_32bit", Place.PAGED, 2 * 4 * 1_000_000),
        ("paged_adamw_8bit", Place.PAGED, 2 * 1_000_000),
        ("paged_adamw_8bit", Place.DEVICE, 2 * 4 * 3907),
        ("adamw_bnb_8bit", Place.DEVICE, 2 * (1_000_000 + 4 * 3907)),
        ("adamw_torch_4bit", Place.DEVICE, 2 * 4 * 1_000_000),
        ("adafactor", Place.DEVICE, 2 * 4 * 1000),
        ("sgd", Place.DEVICE, 0),
        ("muon", Place.DEVICE, 4 * 1_000_000),
    ],
)
def test_state_bytes_on_a_gpu(name: str, place: Place, expected_bytes: int) -> None:
    """A million fp32 parameters (a count that torchao does not quantise: no multiple of 256)."""
    assert sum(find(name).state_bytes(LocalTensor((1000, 1000), 4), device=CUDA, place=place)) == expected_bytes


def test_torchao_quantises_multiples_of_its_block() -> None:
    tensor = LocalTensor((1024, 1024), 2)
    assert sum(find("adamw_torch_8bit").state_bytes(tensor, device=CUDA)) == 2 * (2**20 + 4 * 2**12 + 1024)
    assert sum(find("adamw_torch_4bit").state_bytes(tensor, device=CUDA)) == 2 * (2**19 + 4 * 2**12 + 64)


def test_muon_leaves_embeddings_to_adamw() -> None:
    embedding = LocalTensor((1000, 1000), 4, in_block=False)
    assert sum(find("muon").state_bytes(embedding, device=CUDA)) == 2 * 4 * 1_000_000 + 4


@pytest.mark.parametrize(("typed", "name"), [("adamw_8bit", "adamw_bnb_8bit"), ("lion", "lion_32bit")])
def test_aliases(typed: str, name: str) -> None:
    assert find(typed).name == name


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("adamw_fused", "adamw_torch_fused"), ("paged_adam8bit", "paged_adamw_8bit"), ("zzz", "adamw_torch_fused")],
)
def test_unknown_optimizer_says_what_to_try(typed: str, hint: str) -> None:
    with pytest.raises(IllegalScenarioError, match=rf"unknown optimizer '{typed}'; try --optimizer .*{hint}"):
        find(typed)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@given(first=st.booleans(), itemsize=st.sampled_from([2, 4]), rows=st.integers(1, 3000))
def test_steady_steps_leave_nothing_behind(name: str, first: bool, itemsize: int, rows: int) -> None:
    """Temporaries are all freed; only a first step keeps something, and what it keeps are the states."""
    row = find(name)
    tensors = [LocalTensor((rows, 64), itemsize), LocalTensor((rows,), itemsize)]
    for device in DeviceKind:
        events = step_events(row, tensors, device=device, first_step=first)
        kept = sum(sum(row.state_bytes(tensor, device=device)) for tensor in tensors) + sum(row.shared_state_bytes)
        _, left = live_bytes(events)
        assert left == (kept if first and not row.states_before_step else 0)
        owners = {event.owner for event in events if isinstance(event, Alloc)}
        assert owners <= {Owner.OPTIMIZER_STATES, Owner.TEMPORARIES}


def test_local_tensor_puts_the_lora_rank_in() -> None:
    parameter = Parameter(name="lora_A", shape=(1, 64), itemsize=2, lora_rank_axis=0)
    assert local_tensor(parameter, lora_rank=16, itemsize=4) == LocalTensor((16, 64), 4)


def test_traffic_counts_gradient_parameter_and_states() -> None:
    assert traffic_bytes(find("adamw_torch"), [LocalTensor((1000,), 4)], device=CUDA) == 4000 * (3 + 4)


@pytest.mark.parametrize(
    ("name", "trainer", "bytes_per_element"),
    [
        ("model.embed_tokens.weight", Trainer.LOOP, 1 + 4 / 256),
        ("model.embed_tokens.weight", Trainer.HF, 4),
        ("base_model.model.model.embed_tokens.modules_to_save.default.weight", Trainer.TRL, 4),
        ("lm_head.weight", Trainer.HF, 1 + 4 / 256),
        ("model.layers.0.mlp.up_proj.weight", Trainer.HF, 1 + 4 / 256),
    ],
)
def test_the_trainer_keeps_states_of_embeddings_in_fp32(name: str, trainer: Trainer, bytes_per_element: float) -> None:
    """Twice, for the two moments. Large ones are paged all the same."""
    table = Parameter(name=name, shape=(1000, 256), itemsize=2)
    expected = int(2 * 256_000 * bytes_per_element)
    tensor = local_tensor(table, trainer=trainer)
    assert sum(find("adamw_bnb_8bit").state_bytes(tensor, device=CUDA)) == expected
    paged = find("paged_adamw_8bit").state_bytes(tensor, device=CUDA, place=Place.PAGED)
    assert sum(paged) == 2 * 256_000 * (4 if bytes_per_element == 4 else 1)
