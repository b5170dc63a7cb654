"""A table of images with texts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.cohort.errors import ColumnMissingError, EmptyCohortError, SourceMissingError
from client.cohort.image_table import ImageTable
from client.cohort.outcomes import Code, Rejected, Rendered, State
from client.cohort.sources import Candidate
from client.cohort.workers import Workers
from client.reports.report import Report


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / f"images/{name}.png")
    path = tmp_path / "metadata.csv"
    path.write_text(
        "image,text,patient_id,fl_client,split,edema\n"
        "images/a.png,Edema.,p1,ward,train,1\n"
        "images/b.png,Normal.,p1,ward,test,0\n"
        "images/c.png,Normal.,p2,lab,test,\n"
        "images/c.png,Normal.,p2,lab,test,\n"
        "images/d.png,Normal.,p3,lab,,0\n"
        "images/c.png,Other.,p3,lab,,0\n"
        "images/c.png,Third.,p4,lab,training set,0\n"
    )
    return path


def outcomes(table: ImageTable) -> list[Candidate | Report | Rejected]:
    return [entry.outcome for entry in table.scan(Workers(1, items=0).map)]


def test_every_row_ends_somewhere(table: Path) -> None:
    found = [
        outcome.code if isinstance(outcome, Rejected) else outcome.text
        for outcome in outcomes(ImageTable(table))
    ]
    assert found == [
        "Edema.",
        "Normal.",
        "Normal.",
        Code.E_DUPLICATE_ROW,
        Code.E_FILE_MISSING,
        "Other.",
        Code.E_BAD_SPLIT,
    ]
    assert len(ImageTable(table)) == 7


def test_images_alone_need_no_text_and_texts_alone_no_image(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 9, dtype=np.uint8)).save(tmp_path / "a.png")
    images, texts = tmp_path / "images.csv", tmp_path / "texts.csv"
    images.write_text("image,patient_id,edema\na.png,p1,1\na.png,p1,1\nb.png,p2,0\n")
    texts.write_text("text,patient_id,edema\nNormal.,p1,0\nNormal.,p2,0\n,p3,1\nEdema.,p4,1\n")
    first, *others = outcomes(ImageTable(images, {}, "images"))
    assert isinstance(first, Candidate)
    assert (first.text, first.patient, first.labels) == ("", "p1", {"edema": 1.0})
    assert [one.code for one in others if isinstance(one, Rejected)] == [
        Code.E_DUPLICATE_ROW,
        Code.E_FILE_MISSING,
    ]
    alone = ImageTable(texts, {}, "texts")
    found = outcomes(alone)
    assert [one.text for one in found if isinstance(one, Candidate)] == ["Normal.", "Normal.", "", "Edema."]
    assert len({one.study for one in found if isinstance(one, Candidate)}) == 4
    assert [line.split("\0")[0] for line in alone.stamps()] == ["texts.csv"]
    rendered = alone.renderer(16)(texts)
    assert isinstance(rendered, Rendered)
    assert not rendered.pixels.any()


def test_a_cell_that_can_be_no_files_name_names_none(tmp_path: Path) -> None:
    """A report with a stray quotation mark slips into the column of images whole."""
    path = tmp_path / "t.csv"
    path.write_text("image,text,patient_id\n" + "x" * 5000 + ",Edema.,p\na\0b,Edema.,p\n../..,Edema.,p\n")
    table = ImageTable(path)
    assert [outcome.code for outcome in outcomes(table) if isinstance(outcome, Rejected)] == [
        Code.E_FILE_MISSING
    ] * 3
    assert [line.endswith("absent") for line in table.stamps()] == [False, True, True, True]


def test_a_patient_in_both_splits_goes_to_training(table: Path) -> None:
    first, second, third, *_ = outcomes(ImageTable(table))
    for row in (first, second):
        assert isinstance(row, Candidate)
        assert row.is_test is False
        assert row.remarks == (Code.W_SPLIT_CONFLICT,)
    assert isinstance(third, Candidate)
    assert third.is_test is True
    assert third.remarks == ()


def test_an_empty_split_is_left_to_the_hash(table: Path) -> None:
    row = outcomes(ImageTable(table))[5]
    assert isinstance(row, Candidate)
    assert row.is_test is None


def test_validation_rows_are_held_out(table: Path) -> None:
    table.write_text("image,text,patient_id,split\nimages/a.png,x,p1,Validation\n")
    (row,) = outcomes(ImageTable(table))
    assert isinstance(row, Candidate)
    assert row.is_test is True


def test_labels_are_numbers_and_unknown_is_nan(table: Path) -> None:
    labels = [row.labels["edema"] for row in outcomes(ImageTable(table)) if isinstance(row, Candidate)]
    np.testing.assert_array_equal(labels, [1, 0, np.nan, 0])


def test_where_cuts_one_table_into_sites(table: Path) -> None:
    assert len(ImageTable(table, {"fl_client": "ward"})) == 2
    assert len(ImageTable(table, {"fl_client": "lab", "patient_id": "p3"})) == 2


def test_where_that_matches_nothing_says_so(table: Path) -> None:
    with pytest.raises(EmptyCohortError, match="has no row with fl_client = 'heart'"):
        len(ImageTable(table, {"fl_client": "heart"}))


def test_where_with_an_unknown_column_names_the_nearest(table: Path) -> None:
    with pytest.raises(ColumnMissingError, match="did you mean 'fl_client'"):
        len(ImageTable(table, {"fl_clients": "ward"}))


@pytest.mark.parametrize("missing", ["image", "text", "patient_id"])
def test_needed_columns_are_named(table: Path, missing: str) -> None:
    table.write_text(table.read_text().replace(missing, "zzz", 1))
    with pytest.raises(ColumnMissingError, match=f"no column '{missing}'"):
        outcomes(ImageTable(table))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"none\.csv"):
        len(ImageTable(tmp_path / "none.csv"))


def test_stamps_change_with_an_image(table: Path) -> None:
    before = list(ImageTable(table).stamps())
    assert before == list(ImageTable(table).stamps())
    (table.parent / "images/d.png").write_bytes(b"x")
    assert before != list(ImageTable(table).stamps())


def rendered(path: Path, size: int = 16) -> Rendered:
    outcome = ImageTable.render(path, size)
    assert isinstance(outcome, Rendered)
    return outcome


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "CMYK"])
def test_any_mode_becomes_grey(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16))
    grey.convert(mode).save(path := tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    assert np.abs(rendered(path).pixels - np.asarray(grey).astype(int)).max() <= 1


def test_sixteen_bit_images_are_scaled_rather_than_clipped(tmp_path: Path) -> None:
    levels = np.linspace(1000, 30000, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(path := tmp_path / "x.png")
    image = rendered(path)
    assert len(np.unique(image.pixels)) > 240
    assert image.remarks == [Code.W_WINDOW_FALLBACK]


def test_large_jpegs_look_like_their_full_decoding(tmp_path: Path) -> None:
    blocks = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8)), np.ones((64, 64))).astype(np.uint8)
    Image.fromarray(blocks).save(path := tmp_path / "x.jpg", quality=95)
    reduced = Image.open(path).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(rendered(path, 32).pixels - np.asarray(reduced).astype(int)).mean() < 1


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", Code.E_DECODE), (b"\x89PNG\r\n\x1a\nxxxx", Code.E_DECODE), (b"text", Code.E_DECODE)],
)
def test_unreadable_images_are_quarantined(tmp_path: Path, content: bytes, code: Code) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert ImageTable.render(tmp_path / "x.png", 16) == Rejected(State.QUARANTINED, code)


def test_truncated_images_are_quarantined(table: Path) -> None:
    path = table.parent / "images/a.png"
    path.write_bytes(path.read_bytes()[:50])
    assert isinstance(ImageTable.render(path, 16), Rejected)


def test_blank_images_are_quarantined(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 77).save(tmp_path / "x.png")
    assert ImageTable.render(tmp_path / "x.png", 16) == Rejected(State.QUARANTINED, Code.E_BLANK)
