"""What torch's cache adds to the allocated peak, over catalogued models: ``python -m bench.cache [--alloc-conf TEXT]``.

Without what loading leaves of 4-bit weights. Source of ``launchkit.simulate.overheads.cache_share``. Every strategy of
the search and FSDP1, with and without checkpointing, at one sequence and at four per device.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from launchkit import strategies
from launchkit.alloc_conf import AllocatorSettings
from launchkit.api import find_cluster
from launchkit.catalog.models import find_model
from launchkit.planner.evaluate import Bench
from launchkit.planner.point import point_of
from launchkit.planner.search import Search
from launchkit.request import Request
from launchkit.scenario import Checkpointing, DeviceKind, Scenario, StrategyKind
from launchkit.simulate.loading import left_by_loading
from launchkit.simulate.memory import read_memory, simulate_memory

JOBS = (
    ("Qwen/Qwen3-8B", "4x4090"),
    ("meta-llama/Llama-3.1-8B", "8xA100-80GB"),
    ("Qwen/Qwen3-0.6B", "2x3090"),
    ("meta-llama/Llama-3.1-70B", "8xH100"),
    ("mistralai/Mixtral-8x7B-v0.1", "8xH100"),
    ("Qwen/Qwen3-1.7B", "1x4090"),
)


def scenarios(search: Search) -> Iterator[Scenario]:
    """All that the search may come to, of those whose programs ship."""
    bench = search.bench
    for method in search.methods():
        for strategy in search.strategies():
            base = search.base(method, strategy)
            for checkpointing in (Checkpointing.FULL, Checkpointing.NONE):
                scenario = replace(base, training=replace(base.training, checkpointing=checkpointing))
                refused = strategies.refusal(scenario, bench.source.profile, bench.cluster_of(scenario))
                if refused is None and bench.source.has_program(bench.key(scenario)):
                    yield scenario


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--alloc-conf", default="", metavar="TEXT", help="PYTORCH_ALLOC_CONF [torch's defaults]")
    settings = AllocatorSettings.parse(parser.parse_args().alloc_conf)
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    misread = 0.0
    for model, gpus in JOBS:
        source, cluster = find_model(model), find_cluster(gpus)
        for micro_batch, strategy in product((None, 4), (None, StrategyKind.FSDP)):
            request = Request(seq_len=2048, micro_batch=micro_batch, strategy=strategy)
            search = Search(bench=Bench(source=source, cluster=cluster), request=request)
            for scenario in scenarios(search):
                program, point = search.bench.program(scenario), point_of(scenario)
                run = simulate_memory(program, point, device_kind=DeviceKind.CUDA, settings=settings)
                allocated = run.allocated_peak_bytes
                misread = max(misread, allocated / read_memory(program, point).allocated_peak_bytes - 1)
                key = scenario.strategy.name, scenario.training.checkpointing.value
                shares[key].append((run.reserved_peak_bytes - left_by_loading(program)) / allocated - 1)
    for (strategy, checkpointing), found in sorted(shares.items()):
        least, median, most = min(found), sorted(found)[len(found) // 2], max(found)
        print(f"{strategy:28} {checkpointing:5} {len(found):4}  {least:6.1%} {median:6.1%} {most:6.1%}")
    print(f"allocated at most {misread:.2%} above the live bytes")


if __name__ == "__main__":
    main()
