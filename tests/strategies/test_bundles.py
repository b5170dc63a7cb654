import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.banks import PrototypeBank
from strategies import bundles
from strategies.bundles import BundleMissing, BundleStore
from strategies.messages import PublicBundle, digest_of


def bundle(**changes: Any) -> PublicBundle:
    facts: dict[str, Any] = {
        "model": {"kind": "fake", "sizes": [1, 2]},
        "weights": {"w": np.arange(4, dtype=np.float32), "ids": np.arange(2)},
        "anchor_texts": ("clear lungs", "größer"),
        "anchor_images": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    }
    return PublicBundle(**{**facts, **changes})


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(folder=tmp_path / "bundles")


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
    model=st.dictionaries(st.text(st.characters(codec="utf-8")), st.none() | st.integers() | st.text("ab")),
    side=st.integers(0, 3),
)
def test_a_stored_bundle_comes_back_as_itself(
    texts: list[str], model: Mapping[str, Any], side: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = BundleStore(folder=tmp_path_factory.mktemp("store"))
    images = np.zeros((len(texts), side, side), dtype=np.uint8)
    kept = bundle(anchor_texts=tuple(texts), anchor_images=images, model=model)
    loaded = store.load(store.store(kept))
    assert (loaded.digest, loaded.anchor_texts, loaded.model) == (kept.digest, tuple(texts), model)
    assert digest_of(loaded.weights) == digest_of(kept.weights)


def test_prototypes_are_stored_with_their_bundle(store: BundleStore) -> None:
    unit = np.eye(2, 3, dtype=np.float32)
    prototypes = PrototypeBank(
        concepts=("a", "größer"), wordings=(("x", "y"), ("z",)), image=unit, text=unit[::-1]
    )
    digest = store.store(bundle(prototypes=prototypes))
    loaded = store.load(digest)
    assert digest != bundle().digest
    assert loaded.prototypes is not None
    assert loaded.prototypes.facts() == prototypes.facts()
    assert np.array_equal(loaded.prototypes.text, unit[::-1])
    assert digest_of(loaded.weights) == digest_of(bundle().weights)
    assert store.load(store.store(bundle())).prototypes is None


def test_storing_again_changes_nothing(store: BundleStore) -> None:
    digest = store.store(bundle())
    before = (store.folder / digest / "bundle.json").stat().st_mtime_ns
    assert store.store(bundle()) == digest
    assert (store.folder / digest / "bundle.json").stat().st_mtime_ns == before
    assert [path.name for path in store.folder.iterdir()] == [digest]


def test_what_was_never_stored_is_missing(store: BundleStore) -> None:
    assert not store.has("0" * 64)
    with pytest.raises(BundleMissing, match="public bundle 000000000000 was never stored here"):
        store.load("0" * 64)


def test_a_bundle_changed_on_the_disk_is_refused(store: BundleStore) -> None:
    digest = store.store(bundle())
    other = store.store(bundle(weights={"w": np.ones(4, dtype=np.float32), "ids": np.arange(2)}))
    shutil.copy(store.folder / other / "arrays.safetensors", store.folder / digest / "arrays.safetensors")
    with pytest.raises(BundleMissing, match="was changed on disk; delete its folder"):
        store.load(digest)


def test_a_failure_while_storing_leaves_nothing(store: BundleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            store.store(bundle())
    assert not store.has(bundle().digest)
    assert list(store.folder.iterdir()) == []


def test_a_process_that_comes_second_finds_the_work_done(
    store: BundleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = BundleStore(folder=tmp_path / "other")
    digest = other.store(bundle())
    replace = os.replace

    def too_late(source: Path, target: Path) -> None:
        shutil.copytree(other.folder / digest, store.folder / digest)
        replace(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    assert store.store(bundle()) == digest
    assert [path.name for path in store.folder.iterdir()] == [digest]
