"""Gathering what ``launchkit doctor`` judges. Nothing is changed; the network is asked only on demand."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

from launchkit.catalog.cache import cache_directory
from launchkit.checkup.facts import Directory, Facts, Hub, Limits, System, Tools, Torch
from launchkit.children import environment_of_child
from launchkit.hub.remote import endpoint
from launchkit.probe.detect import detect
from launchkit.probe.nvml import read_health
from launchkit.probe.packages import installed_versions, needs
from launchkit.process.extensions import extensions_root, stale_locks
from launchkit.serialize import decode

TORCH_SECONDS = 120.0  # a cold import from a network disk takes a minute
HUB_SECONDS = 5.0
COMPILERS = ("c++", "g++", "clang++")
_CONTAINER_FILES = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}
_CONTAINER_VARIABLES = {
    "KUBERNETES_SERVICE_HOST": "kubernetes",
    "APPTAINER_CONTAINER": "apptainer",
    "SINGULARITY_CONTAINER": "singularity",
}


def gather(*, online: bool = False) -> Facts:
    """Looks at everything; ``online`` asks the hub for an answer."""
    detection, versions = detect(), installed_versions()
    return Facts(
        system=_system(),
        detection=detection,
        health=read_health(),
        versions=versions,
        needs=needs(versions),
        torch=_torch(),
        limits=_limits(),
        directories=directories(os.environ),
        tools=_tools(os.environ),
        hub=_hub(os.environ, online=online),
        environment=dict(os.environ),
        hidden_files=hidden_files(os.environ, directory=Path.cwd()),
        interfaces=tuple(psutil.net_if_addrs()),
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        bitsandbytes_cuda=_bitsandbytes_cuda(),
    )


def _system() -> System:
    return System(
        python=platform.python_version(),
        python_prefix=sys.prefix,
        platform=platform.system(),
        machine=platform.machine(),
        is_wsl="microsoft" in platform.release().lower(),
        container=_container(os.environ),
    )


def _container(environment: Mapping[str, str]) -> str:
    by_variable = [kind for name, kind in _CONTAINER_VARIABLES.items() if name in environment]
    by_file = [kind for path, kind in _CONTAINER_FILES.items() if Path(path).exists()]
    return next(iter((*by_variable, *by_file)), "")


def _torch() -> Torch | None:
    """What torch says in a process of its own; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    command = [sys.executable, "-m", "launchkit.probe.torch_child"]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=TORCH_SECONDS, env=environment_of_child(), check=False
        )
    except subprocess.TimeoutExpired:
        return Torch(error=f"no answer within {TORCH_SECONDS:.0f} s")
    try:
        torch = decode(Torch, json.loads(child.stdout), path="")
    except ValueError:
        last = child.stderr.strip().split("\n")[-1]
        return Torch(error=f"exit code {child.returncode}: {last}")
    assert isinstance(torch, Torch)
    return torch


def _limits() -> Limits:
    if sys.platform == "win32":
        return Limits()
    import resource  # not on Windows

    def soft(kind: int) -> int:
        value = resource.getrlimit(kind)[0]
        return -1 if value == resource.RLIM_INFINITY else value

    shared = Path("/dev/shm")
    return Limits(
        shared_memory_bytes=psutil.disk_usage(str(shared)).total if shared.is_dir() else 0,
        open_files=soft(resource.RLIMIT_NOFILE),
        locked_memory_bytes=soft(resource.RLIMIT_MEMLOCK),
        processes=soft(resource.RLIMIT_NPROC),
    )


def directories(environment: Mapping[str, str]) -> tuple[Directory, ...]:
    """The places that a run writes to."""
    hub = environment.get("HF_HUB_CACHE") or str(hugging_face_home(environment) / "hub")
    places = (
        ("models of the hub", Path(hub).expanduser(), "HF_HOME=/another/disk"),
        ("runs and checkpoints", Path.cwd(), "launchkit launch --run-dir /another/disk"),
        ("launchkit's traces", cache_directory(), "LAUNCHKIT_HOME=/another/disk"),
        ("built extensions", extensions_root(environment), "TORCH_EXTENSIONS_DIR=/another/disk"),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR=/another/disk"),
    )
    return tuple(_directory(purpose, path, setting=setting) for purpose, path, setting in places)


def hugging_face_home(environment: Mapping[str, str]) -> Path:
    """Where the hub's libraries and accelerate keep their files. Source: ``huggingface_hub/constants.py``."""
    cache = environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(environment.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()


def _directory(purpose: str, path: Path, *, setting: str) -> Directory:
    """A place as it is, or as the nearest directory above it that exists."""
    existing = next(parent for parent in (path, *path.parents, Path("/")) if parent.exists())
    return Directory(
        purpose=purpose,
        path=str(path),
        free_bytes=psutil.disk_usage(str(existing)).free,
        is_writable=existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        setting=setting,
    )


def _tools(environment: Mapping[str, str]) -> Tools:
    homes = (environment.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH"))
    wanted = [*(str(Path(home, "bin", "nvcc")) for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = _which(wanted)
    own = environment.get("CXX", "")
    return Tools(
        nvcc=nvcc,
        nvcc_version=_nvcc_version(nvcc) if nvcc else "",
        ninja=_which([str(Path(sys.executable).with_name("ninja")), "ninja"]),
        compiler=_which([own] if own else COMPILERS),
        stale_locks=tuple(map(str, stale_locks(environment))),
    )


def _which(names: list[str] | tuple[str, ...]) -> str:
    return next((found for name in names if (found := shutil.which(name))), "")


def _nvcc_version(nvcc: str) -> str:
    """``12.4`` out of ``Cuda compilation tools, release 12.4, V12.4.131``."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return text.partition("release ")[2].partition(",")[0].strip()


def _hub(environment: Mapping[str, str], *, online: bool) -> Hub:
    return Hub(
        endpoint=endpoint(),
        token_from=token_source(environment),
        was_asked=online,
        answer=_ask_hub() if online else "",
    )


def token_source(environment: Mapping[str, str]) -> str:
    """Where a token of the hub comes from: a variable or a file. The token itself is not read."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name):
            return name
    path = Path(environment.get("HF_TOKEN_PATH") or hugging_face_home(environment) / "token").expanduser()
    return str(path) if path.is_file() and path.stat().st_size else ""


def _ask_hub() -> str:
    """Empty where the hub answers, whatever it says; else why not."""
    try:
        request = urllib.request.Request(endpoint(), method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def hidden_files(environment: Mapping[str, str], *, directory: Path) -> dict[str, str]:
    """Files that tools read when they are given none, with what they do.

    Sources: accelerate/commands/config/config_args.py, deepspeed/launcher/runner.py, NCCL's "Environment Variables".
    """
    accelerate = hugging_face_home(environment) / "accelerate"
    home = Path(environment.get("HOME", "~")).expanduser()
    known = {
        accelerate / "default_config.yaml": "accelerate launch without --config_file obeys it",
        accelerate / "default_config.json": "accelerate launch without --config_file obeys it",
        home / ".deepspeed_env": "deepspeed sets its variables on every node",
        directory / ".deepspeed_env": "deepspeed sets its variables on every node",
        Path("/job/hostfile"): "deepspeed starts processes on the hosts in it",
        Path("/etc/nccl.conf"): "NCCL reads its settings",
        home / ".nccl.conf": "NCCL reads its settings",
    }
    return {str(path): effect for path, effect in known.items() if path.is_file()}


def _bitsandbytes_cuda() -> tuple[str, ...]:
    """CUDA versions that the installed bitsandbytes has a library for: ``("118", "128")``."""
    try:
        files = metadata.files("bitsandbytes") or []
    except metadata.PackageNotFoundError:
        return ()
    names = (Path(str(file)).name for file in files)
    found = {name.removeprefix("libbitsandbytes_cuda").split(".")[0] for name in names if "_cuda" in name}
    return tuple(sorted(number for number in found if number.isdecimal()))
