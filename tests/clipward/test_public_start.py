import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.cohort import EmptyCohortError
from clipward.public_start import prepare_start
from server.banks import label_prompts
from server.federation import Federation
from server.start import Prepared, start_folder
from tests.small_hospitals import federation

PAIRS = 12


@pytest.fixture
def root(made_hospitals: Path, tmp_path: Path) -> Path:
    """A small model and twelve public pairs of ten texts."""
    (tmp_path / "micro").symlink_to(made_hospitals / "micro")
    write_table(tmp_path / "public")
    return tmp_path


def write_table(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [("image", "text", "patient_id", "effusion")]
    for number in range(PAIRS):
        pixels = rng.integers(0, 256, size=(40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"Finding {max(number - 2, 0)} is seen", f"p{number}", str(number % 2)))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "table.csv"


def asked(root: Path, **changes: Any) -> Federation:
    start = {"table": str(root / "public" / "table.csv"), "epochs": 1, "batch": 4}
    return federation(root, **{"public_start": start, **changes})


def prepared(federation: Federation, root: Path) -> tuple[Prepared, list[str]]:
    """The start, and what was done for it."""
    told: dict[str, int] = {}
    made = prepare_start(
        federation, cache=root / "cache", on_progress=lambda what, done, total: told.update({what: total})
    )
    return made, list(told)


def test_a_start_is_trained_on_public_data_once(root: Path) -> None:
    made, done = prepared(asked(root), root)
    assert done == ["read public data", "train the public start"]
    plain, _ = prepared(federation(root), root)
    assert made.public_start
    assert not plain.public_start
    assert any(np.any(made.bundle.weights[name] != value) for name, value in plain.bundle.weights.items())
    again, done = prepared(asked(root), root)
    assert done == []
    assert again.bundle.digest == made.bundle.digest


def test_the_same_data_and_settings_give_the_same_bits(root: Path) -> None:
    made, _ = prepared(asked(root), root)
    other = prepare_start(asked(root), cache=root / "another cache")
    assert other.bundle.digest == made.bundle.digest


def test_changed_public_data_make_it_anew(root: Path) -> None:
    made, _ = prepared(asked(root), root)
    table = root / "public" / "table.csv"
    table.write_text(table.read_text().replace("Finding 3 ", "Something else "))
    changed, done = prepared(asked(root), root)
    assert done == ["read public data", "train the public start"]
    assert changed.bundle.digest != made.bundle.digest
    assert changed.source != made.source


def test_anchors_are_public_pairs_and_no_text_comes_twice(root: Path) -> None:
    made, _ = prepared(asked(root), root)
    texts = made.bundle.anchor_texts
    assert len(texts) == len({text.lower() for text in texts}) == PAIRS - 2
    assert made.bundle.anchor_images.shape == (PAIRS - 2, 32, 32)
    few, _ = prepared(asked(root, objective={"anchors": 4}), root)
    assert len(few.bundle.anchor_texts) == 4


@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 10])
def test_a_start_of_any_length_is_trained(epochs: int, root: Path) -> None:
    table = str(root / "public" / "table.csv")
    _, done = prepared(asked(root, public_start={"table": table, "epochs": epochs, "batch": PAIRS}), root)
    assert done[-1] == "train the public start"


def test_without_public_data_the_settings_make_the_start(root: Path) -> None:
    made, done = prepared(federation(root), root)
    assert done == []
    assert (made.public_start, made.evaluation) == (False, None)


def test_public_evaluation_data_are_packed_beside_the_start(root: Path) -> None:
    table = {"table": str(root / "public" / "table.csv")}
    made, done = prepared(federation(root, evaluation={"data": table}), root)
    assert done == ["read public data"]
    assert made.evaluation is not None
    assert len(made.evaluation.texts) == PAIRS
    assert made.evaluation.labels["effusion"].tolist() == [0.0, 1.0] * (PAIRS // 2)
    again, _ = prepared(federation(root, evaluation={"data": table}), root)
    assert again.evaluation is not None
    assert np.array_equal(again.evaluation.images, made.evaluation.images)


def test_a_start_that_was_interrupted_is_made_again(root: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "train the public start":
            raise Stopped

    with pytest.raises(Stopped):
        prepare_start(asked(root), cache=root / "cache", on_progress=stop)
    assert not (start_folder(asked(root), root / "cache") / "start.json").exists()
    assert prepared(asked(root), root)[1] == ["train the public start"]


def test_public_data_without_a_usable_pair_are_refused(root: Path) -> None:
    for image in (root / "public").glob("*.png"):
        image.unlink()
    with pytest.raises(EmptyCohortError, match="no usable pair among 12 inputs"):
        prepared(asked(root), root)


def test_anchors_come_from_synthetic_pairs_without_any_data(root: Path) -> None:
    asked = federation(root, objective={"anchors": 6, "anchors-from": ["synthetic", "prompts"]})
    made, done = prepared(asked, root)
    assert done == ["draw synthetic anchors"]
    assert len(made.bundle.anchor_texts) == 6
    assert made.bundle.anchor_texts[1] == label_prompts().texts[0]
    assert all("\n" not in text for text in made.bundle.anchor_texts)
    assert made.bundle.anchor_images.shape == (6, 32, 32)
    assert np.std(made.bundle.anchor_images, axis=0).mean() > 1
    again, done = prepared(asked, root)
    assert done == []
    assert again.bundle.digest == made.bundle.digest


def test_public_pairs_may_share_the_bank_with_prompts(root: Path) -> None:
    made, _ = prepared(asked(root, objective={"anchors": 6, "anchors-from": ["prompts", "public"]}), root)
    texts, public = made.bundle.anchor_texts, prepared(asked(root), root)[0].bundle
    assert texts[::2] == label_prompts().texts[:3]
    assert texts[1::2] == public.anchor_texts[:3]
    assert np.array_equal(made.bundle.anchor_images, public.anchor_images[:6])
