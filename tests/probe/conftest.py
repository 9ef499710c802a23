"""A management library of our own, so that the real detection runs where there is no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Detect = Callable[..., dict[str, Any]]

# Detection runs in a process of its own, since the dynamic loader reads LD_LIBRARY_PATH once, at the start. One process
# answers for many described machines: the library reads its variables anew whenever it is initialised.
_SCRIPT = """
import json, os, sys
from launchkit.catalog.hardware import hardware_table
from launchkit.probe.cluster import cluster_from
from launchkit.probe.detect import detect
from launchkit.probe.nvml import read_health
from launchkit.report.gpus import gpus_document
from launchkit.serialize import encode
table, outer = hardware_table(), dict(os.environ)
for line in sys.stdin:
    os.environ.clear()
    os.environ.update(outer | json.loads(line))
    detection = detect()
    cluster = cluster_from(detection, table)
    print(json.dumps({
        "detected": gpus_document(detection, table)["detected"],
        "health": encode(read_health()),
        "cluster": {
            "text": cluster.text, "backend": cluster.gpu.backend, "memory_bytes": cluster.gpu.memory_bytes,
            "reserved_by_driver_bytes": cluster.gpu.reserved_by_driver_bytes, "used_bytes": cluster.used_bytes,
            "bf16_flops_per_s": cluster.gpu.bf16_flops_per_s, "link": cluster.node.gpu_link,
            "link_bytes_per_s": cluster.node.gpu_link_bytes_per_s, "peer_to_peer": cluster.node.peer_to_peer,
            "detected": cluster.detected, "notes": cluster.notes,
        },
    }), flush=True)
"""


class Machine:
    """A process in which the driver says what the test wants."""

    def __init__(self, library_directory: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FAKE_"))}
        environment["LD_LIBRARY_PATH"] = str(library_directory)
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-W", "error", "-c", _SCRIPT]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def detect(self, **variables: str) -> dict[str, Any]:
        """What detection finds under these environment variables, and the cluster made of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(variables) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            pytest.fail(f"detection died: {self.process.communicate()[1]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def stop(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a compiled ``libnvidia-ml.so.1``."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux's dynamic loader")
    directory = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    library = str(directory / "libnvidia-ml.so.1")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, str(source)], check=True)
    return directory


@pytest.fixture(scope="session")
def machine(fake_nvml: Path) -> Iterator[Machine]:
    """The real detection code beside the compiled library."""
    started = Machine(fake_nvml)
    yield started
    started.stop()


@pytest.fixture
def bare_machine(tmp_path: Path) -> Iterator[Machine]:
    """The real detection code with whatever driver the system has."""
    started = Machine(tmp_path)
    yield started
    started.stop()


@pytest.fixture
def detect_with(machine: Machine) -> Detect:
    """``detect_with(FAKE_NVML="…", CUDA_VISIBLE_DEVICES="0")`` answers what was found."""
    return machine.detect
