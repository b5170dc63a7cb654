from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from strategies.settings import Settings, SettingsError


class Inner(Settings):
    learning_rate: float = Field(default=1e-3, gt=0)
    batch: int = 4


class Outer(Settings):
    name: str
    training: Inner = Inner()
    extra: Inner | None = None


def test_keys_are_kebab_case_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('name = "n"\n[training]\nlearning-rate = 0.5\n')
    assert Outer.load(path) == Outer(name="n", training=Inner(learning_rate=0.5))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no settings file at .*f\.toml"):
        Outer.load(tmp_path / "f.toml")


@pytest.mark.parametrize("content", [b"name = ", b"name = '\xff'"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"f\.toml is not TOML"):
        Outer.load(path)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"name": "n", "trainin": {}}, "unknown key 'trainin'; did you mean 'training'"),
        (
            {"name": "n", "training": {"learningrate": 1}},
            r"'training\.learningrate'; did you mean 'learning-rate'\? \(known here: learning-rate, batch\)",
        ),
        ({"name": "n", "extra": {"bach": 1}}, r"'extra\.bach'; did you mean 'batch'"),
        ({"name": "n", "training": {"learning-rate": 0}}, r"training\.learning-rate: .*greater than 0"),
        ({}, "name: Field required"),
    ],
)
def test_a_mistake_names_the_place_and_the_remedy(document: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        Outer.parse(document, source="f.toml")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Outer.parse({"training": {"batch": "many", "x": 1}}, source="f.toml")
    assert len(str(caught.value).splitlines()) == 4


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().batch = 5


@given(st.text(min_size=1, max_size=12))
def test_an_unknown_key_is_never_ignored(key: str) -> None:
    if key in {"learning-rate", "learning_rate", "batch"}:
        return
    with pytest.raises(SettingsError, match="unknown key"):
        Inner.parse({key: 1}, source="f.toml")
