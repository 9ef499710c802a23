"""The peaks of a whole run, phase by phase: loading, the first step, a steady one, an evaluation, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launchkit.hardware import Cluster
from launchkit.plan import PhasePeak, RunPhase
from launchkit.planner.host import HostUse, host_while_loading, host_while_saving, host_while_training
from launchkit.planner.load import LoadJob, LoadPeak, load_peak
from launchkit.planner.sizes import ModelSizes, saves_whole_weights
from launchkit.program import Owner, Point, StepProgram
from launchkit.scenario import Scenario, StrategyKind
from launchkit.simulate.memory import MemoryReading
from launchkit.simulate.overheads import device_peak
from launchkit.strategies.fsdp2 import shard_group_size


@dataclass(frozen=True, kw_only=True)
class Run:
    """One scenario's whole run. ``steady_bytes`` is what a device holds between steps, ``room_bytes`` what torch may
    allocate there."""

    program: StepProgram
    point: Point
    sizes: ModelSizes
    scenario: Scenario
    cluster: Cluster
    checkpoint_itemsize: int
    steady_bytes: int
    room_bytes: int
    num_communicators: int

    def load(self) -> LoadPeak:
        return load_peak(
            LoadJob(
                sizes=self.sizes,
                scenario=self.scenario,
                checkpoint_itemsize=self.checkpoint_itemsize,
                num_shards=shard_group_size(self.scenario.strategy, self.cluster),
                resident_bytes=self.steady_bytes,
                unwritten_bytes=self._unwritten_bytes(),
                room_bytes=self.room_bytes,
            )
        )

    def _unwritten_bytes(self) -> int:
        """Buffers that lie ready for gradients."""
        waiting = (Owner.GRADIENTS, Owner.COMMUNICATION)
        point = Point(1, 1)  # what lies between steps depends on no batch
        return sum(p.size.at(point) * p.count for p in self.program.persistent if p.owner in waiting)

    def host_loading(self) -> HostUse:
        return host_while_loading(self.load(), self.scenario, cluster=self.cluster)

    def host_training(self, device_bytes: int) -> HostUse:
        return host_while_training(self.program, cluster=self.cluster, device_bytes=device_bytes, point=self.point)

    def host_saving(self) -> HostUse:
        return host_while_saving(
            self.sizes, self.scenario, self.host_training(0), cluster=self.cluster, device_bytes=self.saving_bytes()
        )

    def hosts(self) -> Mapping[str, HostUse]:
        """What a node of GPUs needs, by what it is doing."""
        return {
            "while loading": self.host_loading(),
            "while training": self.host_training(0),
            "while saving": self.host_saving(),
        }

    def saving_bytes(self) -> int:
        """Device memory while a checkpoint is written: what lies between steps, and what is gathered at a time.

        FSDP2 gathers a weight or a state at a time and moves it to the host, FSDP1 a unit, beside it the one around it;
        ZeRO-3 a module. Without shards nothing is gathered. Source: as for ``host_while_saving``.
        """
        kind = self.scenario.strategy.kind
        gathered = 0
        if kind.is_fsdp and saves_whole_weights(self.scenario):
            is_flat = kind is StrategyKind.FSDP
            gathered = 2 * self.sizes.largest_unit_bytes if is_flat else self.sizes.largest_tensor_bytes
        elif kind is StrategyKind.ZERO3:
            gathered = self.sizes.largest_tensor_bytes
        return self.steady_bytes + gathered


@dataclass(frozen=True, kw_only=True)
class StepPeak:
    """Peaks of one kind of step. ``resident_bytes`` is what a process that computes on the host keeps of it."""

    phase: RunPhase
    allocated_bytes: int
    reserved_bytes: int
    resident_bytes: int = 0


def phase_peaks(run: Run, reading: MemoryReading, steps: Sequence[StepPeak]) -> tuple[PhasePeak, ...]:
    """Every phase in the order of a run; ``reading`` is of a step, ``steps`` are the peaks of each kind of step."""
    load, save = run.load().device_bytes, run.saving_bytes()
    # What the cache holds after training, it keeps while saving; not every run evaluates.
    cached = max(step.reserved_bytes for step in steps if step.phase is not RunPhase.EVALUATION)
    loading = StepPeak(phase=RunPhase.LOAD, allocated_bytes=load, reserved_bytes=load)
    saving = StepPeak(phase=RunPhase.SAVE, allocated_bytes=save, reserved_bytes=max(save, cached))
    hosts = [run.host_training(step.resident_bytes) for step in steps]
    peaks = zip((loading, *steps, saving), (run.host_loading(), *hosts, run.host_saving()), strict=True)
    return tuple(_peak(run, reading, step, host) for step, host in peaks)


def _peak(run: Run, reading: MemoryReading, step: StepPeak, host: HostUse) -> PhasePeak:
    reading = replace(reading, allocated_peak_bytes=step.allocated_bytes, reserved_peak_bytes=step.reserved_bytes)
    device = device_peak(reading, run.cluster, num_communicators=run.num_communicators)
    return PhasePeak(
        phase=step.phase,
        allocated_peak_bytes=step.allocated_bytes,
        device_peak_bytes=device.typical_bytes,
        device_peak_high_bytes=device.high_bytes,
        host_peak_bytes=host.resident_bytes,
        host_needed_bytes=host.needed_bytes,
    )
