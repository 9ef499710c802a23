"""Texts that are no configuration, or mean harm, end in one line; nothing is ever constructed from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchkit.errors import ConfigFileError
from launchkit.export.read import MAXIMUM_FILE_BYTES, parse_config, repeated_keys

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = [
    ("", "f.yml is empty, not keys with values"),
    ("- a\n- b", "f.yml is a list, not keys"),
    ("just words", "f.yml is a single value"),
    ("a: [1, 2", "f.yml is not YAML (line 1:"),
    ("a:\n\t- b", "f.yml is not YAML (line 2:"),
    ('{"a": 1,}', "f.yml is not JSON ("),
    ("a: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor for the tag"),
    ("a: !!python/name:os.system ''", "could not determine a constructor for the tag"),
    ("a: !custom x", "could not determine a constructor for the tag '!custom'"),
    ("a: &a [*a]", "f.yml is nested more than 30 deep"),
    ("a: " + "[" * 5000 + "]" * 5000, "f.yml is "),
    ('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}", "f.yml is "),
    (LAUGHS, "f.yml unfolds to more than 20,000 values"),
    ("a: x\n" * MAXIMUM_FILE_BYTES, "too many for a configuration"),
    ("a: \x00", "f.yml is not YAML"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=lambda value: value[:25])
def test_what_is_no_configuration_is_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigFileError) as caught:
        parse_config(text, name="f.yml")
    line = str(caught.value)
    assert message in line
    assert "\n" not in line and len(line) < 350
    assert list(tmp_path.iterdir()) == []


def test_anchors_and_merge_keys_are_plain_yaml() -> None:
    config = parse_config("x: &x {stage: 2}\nzero_optimization:\n  <<: *x\n  overlap_comm: true", name="f.yml")
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}


def test_json_keeps_its_numbers() -> None:
    assert parse_config(' {"a": 1e5}', name="f.json") == {"a": 100_000.0}


@pytest.mark.parametrize(("text", "keys"), [("a: 1\nb: 2\na: 3", ("a",)), ("a: 1\nb: 2", ()), ('{"a": 1}', ())])
def test_keys_that_stand_twice_are_found(text: str, keys: tuple[str, ...]) -> None:
    assert repeated_keys(text) == keys
