"""Two cohorts compared without showing either."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from client.cohort.errors import OverlapError
from client.cohort.origins import Origin
from client.cohort.overlap import ROUND_TO, Key, exported, shared
from client.cohort.similar import perceptual_hashes

SIZE = 64


@pytest.fixture
def key(tmp_path: Path) -> Key:
    (tmp_path / "key").write_text("0123456789abcdef\n")
    return Key.read(tmp_path / "key")


def pictures(*seeds: int) -> NDArray[np.uint8]:
    noise = [
        ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(SIZE, SIZE)), 6) for seed in seeds
    ]
    return np.stack([np.interp(one, (one.min(), one.max()), (20, 220)) for one in noise]).astype(np.uint8)


def origin(uid: str) -> Origin:
    return Origin(name=f"x/{uid}.dcm", uid=uid, ids=frozenset({uid, f"{uid}.dcm"} - {""}))


def compare(
    tmp_path: Path, key: Key, theirs: str, rows: list[Origin], images: NDArray[np.uint8]
) -> list[int]:
    (tmp_path / "theirs.json").write_text(theirs)
    return list(shared(tmp_path / "theirs.json", key, rows, images))


def test_shared_uids_and_pictures_are_found(tmp_path: Path, key: Key) -> None:
    theirs = exported(key, [origin("1"), origin("2"), origin("")], pictures(1, 2, 3))
    rows = [origin("9"), origin("2"), origin(""), origin("")]
    assert compare(tmp_path, key, theirs, rows, pictures(9, 8, 7, 3)) == [1, 3]


def test_a_picture_with_a_few_unsure_bits_is_found(tmp_path: Path, key: Key) -> None:
    images = pictures(*range(20))
    changed = np.clip(255 * (images / 255) ** 1.1, 0, 255).astype(np.uint8)
    theirs = exported(key, [origin("")] * 20, images)
    same = int((perceptual_hashes(images) == perceptual_hashes(changed)).sum())
    found = compare(tmp_path, key, theirs, [origin("")] * 20, changed)
    assert same < len(found)
    assert len(found) >= 18
    assert compare(tmp_path, key, theirs, [origin("")] * 20, pictures(*range(50, 70))) == []


def test_the_list_tells_nothing_without_the_key(key: Key) -> None:
    uid = "1.2.826.0.1"
    lists = [json.loads(exported(key, [origin(uid)] * count, pictures(*range(count)))) for count in (1, 7)]
    for document in lists:
        assert uid not in json.dumps(document)
        assert len(document["uids"]) == len(document["pictures"]) == ROUND_TO
        assert document["pictures"] == sorted(document["pictures"])
    other = Key(b"another key of 24 bytes.")
    assert not set(json.loads(exported(other, [origin(uid)], pictures(0)))["uids"]) & set(lists[0]["uids"])


def test_another_key_is_an_error_and_not_an_empty_answer(tmp_path: Path, key: Key) -> None:
    theirs = exported(Key(b"another key of 24 bytes."), [origin("1")], pictures(1))
    with pytest.raises(OverlapError, match=r"theirs.json was made under another key"):
        compare(tmp_path, key, theirs, [origin("1")], pictures(1))
    with pytest.raises(OverlapError, match="holds keyed marks: name the key"):
        shared(tmp_path / "theirs.json", None, [origin("1")], pictures(1))


@pytest.mark.parametrize("text", ["image,finding\n2.dcm,x\n", "1\n2\n3", '"2";', "[1, 2]", '{"key": "2"}'])
def test_a_public_list_is_any_text_with_ids(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    rows = [origin("2"), origin("22")]
    assert shared(tmp_path / "list.csv", None, rows, pictures(0, 1)) == [0]
    (tmp_path / "list.csv").write_text(" , ;\n")
    assert shared(tmp_path / "list.csv", None, rows, pictures(0, 1)) == []


def test_what_cannot_be_read_is_named(tmp_path: Path, key: Key) -> None:
    with pytest.raises(OverlapError, match=r"expected the other side's list in .*none"):
        shared(tmp_path / "none", key, [], pictures(0))
    with pytest.raises(OverlapError, match=r"expected the key that both sides share in .*none"):
        Key.read(tmp_path / "none")
    (tmp_path / "short").write_text("fifteen bytes..\n")
    with pytest.raises(
        OverlapError, match=r"expected 16 bytes or more in .*short, got 15; make one with: openssl"
    ):
        Key.read(tmp_path / "short")


def test_keys_and_origins_are_not_shown(key: Key) -> None:
    assert "0123" not in repr(key)
    assert "1.2.3" not in repr(origin("1.2.3"))
