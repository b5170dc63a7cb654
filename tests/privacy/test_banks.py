"""A bank of prototypes is what its file says, or nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from privacy.banks import PrototypeBank
from privacy.errors import PrivacyError

sentences = st.text(min_size=1, max_size=8).filter(str.strip)


def facts_of(**changes: Any) -> dict[str, Any]:
    return {"concepts": ["effusion present"], "wordings": [["pleural effusion"]], **changes}


def arrays_of(**changes: Any) -> dict[str, Any]:
    unit = np.eye(1, 4, dtype=np.float32)
    return {"image": unit, "text": -unit, **changes}


@given(said=st.dictionaries(sentences, st.lists(sentences, min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_saved_bank_comes_back_as_itself(
    said: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(5, len(said))).astype(np.float32).T for _ in range(2))
    kept = PrototypeBank(
        concepts=tuple(said),
        wordings=tuple(map(tuple, said.values())),
        image=image / np.linalg.norm(image, axis=1, keepdims=True),
        text=text / np.linalg.norm(text, axis=1, keepdims=True),
    )
    path = tmp_path_factory.mktemp("bank") / "prototypes.safetensors"
    kept.save(path)
    loaded = PrototypeBank.load(path)
    assert loaded.facts() == kept.facts()
    assert (loaded.concepts, loaded.wordings) == (kept.concepts, kept.wordings)
    for name, vectors in kept.arrays().items():
        np.testing.assert_array_equal(loaded.arrays()[name], vectors)


@pytest.mark.parametrize(
    ("facts", "arrays", "text"),
    [
        (facts_of(concepts=[]), {}, "names of at least one concept"),
        (facts_of(concepts=[" "]), {}, "names of at least one concept"),
        (facts_of(concepts=[7]), {}, "names of at least one concept"),
        (facts_of(concepts=["a", "a"]), {}, "each once and none blank"),
        (facts_of(wordings=[]), {}, "wordings of 1 concepts, a sentence or more for each"),
        (facts_of(wordings=[[]]), {}, "a sentence or more for each"),
        (facts_of(wordings=[["x", "\n"]]), {}, "a sentence or more for each"),
        (facts_of(wordings=["pleural effusion"]), {}, "the wordings of a concept to be a list of sentences"),
        ({"concepts": ["a"]}, {}, "need concepts, wordings, image and text"),
        (None, {}, "need concepts, wordings, image and text"),
        (
            facts_of(),
            {"image": np.eye(2, 4, dtype=np.float32)},
            "image prototypes of 1 concepts in rows of D",
        ),
        (facts_of(), {"text": np.eye(1, 3, dtype=np.float32)}, "text prototypes of 1 concepts in rows of D"),
        (facts_of(), {"text": np.eye(1, 4)}, "text prototypes in float32, got float64"),
        (facts_of(), {"text": np.full((1, 4), 1e38, dtype=np.float32)}, "text prototypes of length 1"),
        (facts_of(), {"image": np.full((1, 4), np.nan, dtype=np.float32)}, "image prototypes of length 1"),
        (facts_of(), {"image": np.full((1, 4), np.inf, dtype=np.float32)}, "image prototypes of length 1"),
    ],
)
def test_what_is_no_bank_is_refused(facts: Any, arrays: dict[str, Any], text: str) -> None:
    with pytest.raises(PrivacyError, match=text):
        PrototypeBank.parse(facts, arrays_of(**arrays))


def test_a_bank_without_its_vectors_is_refused() -> None:
    with pytest.raises(PrivacyError, match="need concepts, wordings, image and text"):
        PrototypeBank.parse(facts_of(), {"image": arrays_of()["image"]})


def test_a_bank_for_another_model_is_refused() -> None:
    bank = PrototypeBank.parse(facts_of(), arrays_of())
    bank.require_width(4)
    with pytest.raises(PrivacyError, match="prototypes of width 4, and the model embeds in 8: release them"):
        bank.require_width(8)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"no prototypes at .*none\.safetensors"):
        PrototypeBank.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("metadata", [None, {"version": "1"}, {"prototypes": "{"}])
def test_a_safetensors_file_of_something_else_is_refused(metadata: Any, tmp_path: Path) -> None:
    save_file(arrays_of(), tmp_path / "weights.safetensors", metadata=metadata)
    with pytest.raises(PrivacyError, match=r"weights\.safetensors holds no prototypes"):
        PrototypeBank.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_file_of_no_tensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(content)
    with pytest.raises(PrivacyError, match=r"junk holds no prototypes: write it by PrototypeBank\.save"):
        PrototypeBank.load(tmp_path / "junk")
    with pytest.raises(PrivacyError, match="holds no prototypes"):
        PrototypeBank.load(tmp_path)


@pytest.mark.parametrize("facts", [[], {"version": 2}])
def test_a_file_of_another_version_is_refused(facts: Any, tmp_path: Path) -> None:
    save_file(arrays_of(), tmp_path / "p", metadata={"prototypes": json.dumps(facts)})
    with pytest.raises(PrivacyError, match="holds prototypes of another version: expected 1"):
        PrototypeBank.load(tmp_path / "p")


def test_an_error_inside_a_file_names_the_file(tmp_path: Path) -> None:
    facts = {"version": 1, **facts_of(wordings=[])}
    save_file(arrays_of(), tmp_path / "p.st", metadata={"prototypes": json.dumps(facts)})
    with pytest.raises(PrivacyError, match=r"p\.st: expected wordings of 1 concepts"):
        PrototypeBank.load(tmp_path / "p.st")
