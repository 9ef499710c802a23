"""The trace cache: what was traced is found again, by the same toolchain only, and damage counts as absence."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from launchkit.catalog.cache import TraceCache, cache_directory, toolchain_versions, write_atomically
from launchkit.errors import LaunchkitError, MissingExtraError, OutOfMemoryError, TraceError
from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind, Loss, Method, TraceKey, Trainer
from tests.builders import profile, smallest_program

PROFILE = profile(attentions=(Attention.SDPA,))
PROGRAM = smallest_program()
KEY = TraceKey(
    device=DeviceKind.CPU,
    method=Method.LORA,
    compute=Compute.FP32,
    checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.PLAIN,
    trainer=Trainer.LOOP,
    lora_targets="q_proj,v_proj",
)
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture
def cache(tmp_path: Path) -> TraceCache:
    return TraceCache("f", directory=tmp_path, versions=VERSIONS)


def test_what_was_stored_is_found(cache: TraceCache, tmp_path: Path) -> None:
    cache.store_program(KEY, PROGRAM, profile=PROFILE)
    cache.store_profile(PROFILE)
    again = TraceCache("f", directory=tmp_path, versions=dict(VERSIONS))
    assert again.load_program(KEY) == PROGRAM
    assert again.load_profile() == PROFILE


def test_an_empty_cache_holds_nothing(cache: TraceCache) -> None:
    assert cache.load_program(KEY) is None
    assert cache.load_profile() is None


@pytest.mark.parametrize(
    "other",
    [
        {"torch": "2.14.0", "transformers": "5.23.0"},
        {"torch": "2.13.0", "transformers": "5.24.0"},
        {"torch": "2.13.0"},
        VERSIONS | {"peft": "0.21"},
    ],
)
def test_another_toolchain_finds_nothing(cache: TraceCache, tmp_path: Path, other: dict[str, str]) -> None:
    cache.store_program(KEY, PROGRAM, profile=PROFILE)
    cache.store_profile(PROFILE)
    changed = TraceCache("f", directory=tmp_path, versions=other)
    assert changed.load_program(KEY) is None
    assert changed.load_profile() is None


def test_another_architecture_or_key_finds_nothing(cache: TraceCache, tmp_path: Path) -> None:
    cache.store_program(KEY, PROGRAM, profile=PROFILE)
    assert TraceCache("g", directory=tmp_path, versions=VERSIONS).load_program(KEY) is None
    assert cache.load_program(replace(KEY, single_sequence=True)) is None


def test_keys_that_share_a_file_name_are_told_apart(cache: TraceCache) -> None:
    cache.store_program(replace(KEY, lora_targets="a/b"), PROGRAM, profile=PROFILE)
    assert cache.program_path(replace(KEY, lora_targets="a_b")).is_file()
    assert cache.load_program(replace(KEY, lora_targets="a_b")) is None


def test_a_long_key_makes_a_name_that_a_disk_takes(cache: TraceCache) -> None:
    long = replace(KEY, freeze=",".join(f"part{index}" for index in range(100)))
    cache.store_program(long, PROGRAM, profile=PROFILE)
    assert cache.load_program(long) == PROGRAM
    assert cache.load_program(replace(long, freeze=f"{long.freeze},more")) is None
    assert len(cache.program_path(long).name) < 255


def test_a_key_cannot_leave_its_directory(cache: TraceCache) -> None:
    path = cache.program_path(replace(KEY, lora_targets="../../../etc/passwd"))
    assert path.parent == cache.directory


@pytest.mark.parametrize("data", [b"", b"damaged", b"\x1f\x8b\x08\x00damaged"])
def test_damage_counts_as_absence(cache: TraceCache, data: bytes) -> None:
    cache.store_program(KEY, PROGRAM, profile=PROFILE)
    cache.store_profile(PROFILE)
    cache.program_path(KEY).write_bytes(data)
    (cache.directory / "profile.json").write_bytes(data)
    assert cache.load_program(KEY) is None
    assert cache.load_profile() is None


@pytest.mark.parametrize("reason", [TraceError("no such op; use --attention eager"), MissingExtraError("not here")])
def test_why_there_is_no_program_is_found(cache: TraceCache, tmp_path: Path, reason: LaunchkitError) -> None:
    cache.store_refusal(KEY, reason)
    found = TraceCache("f", directory=tmp_path, versions=VERSIONS).load_refusal(KEY)
    assert (type(found), str(found)) == (type(reason), str(reason))
    assert cache.holds(KEY)
    assert cache.load_program(KEY) is None
    assert cache.load_refusal(replace(KEY, single_sequence=True)) is None


@pytest.mark.parametrize("version", ["0.50.2", None])
def test_a_package_that_has_come_or_changed_is_asked_again(tmp_path: Path, version: str | None) -> None:
    before = VERSIONS | ({} if version is None else {"bitsandbytes": "0.50.1"})
    TraceCache("f", directory=tmp_path, versions=before).store_refusal(KEY, MissingExtraError("not here"))
    now = TraceCache("f", directory=tmp_path, versions=VERSIONS | {"bitsandbytes": version or "0.50.2"})
    assert now.load_refusal(KEY) is None
    assert not now.holds(KEY)


def test_what_another_try_may_not_find_again_is_not_remembered(cache: TraceCache) -> None:
    cache.store_refusal(KEY, OutOfMemoryError("not here"))
    assert not cache.holds(KEY)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file where the directory should be")
    cache = TraceCache("f", directory=tmp_path, versions=VERSIONS)
    cache.store_program(KEY, PROGRAM, profile=PROFILE)
    assert cache.load_program(KEY) is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "any").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "any")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LAUNCHKIT_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"LAUNCHKIT_HOME": "~/a"}, "/home/me/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/launchkit"),
        ({}, "/home/me/.cache/launchkit"),
    ],
)
def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("LAUNCHKIT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)


def test_the_toolchain_names_the_tracer() -> None:
    assert {"launchkit", "tracer"} <= toolchain_versions().keys()


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_another_version_of_what_traces_is_another_toolchain(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    TraceCache("f", directory=tmp_path).store_program(KEY, PROGRAM, profile=PROFILE)
    assert TraceCache("f", directory=tmp_path).load_program(KEY) == PROGRAM
    installed[package] = "9.9"
    assert TraceCache("f", directory=tmp_path).load_program(KEY) is None
