"""The page on which a physician sees what the model will see."""

import base64
import io
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from PIL import Image
from pydicom.uid import CTImageStorage
from typer.testing import CliRunner

from client.cohort import Cohort, CohortSettings, build_cohort
from client.site import Site
from clipward.cohort_inspect import inspect, write_page
from tests.client.cohort.conftest import dataset_of

EVIL = "<script>alert('x')</script> & more"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Ten patients with two images each, three texts in all, one that tries to run."""
    rows = ["image,text,patient_id,split,Edema"]
    for number in range(20):
        grey = np.add.outer(np.arange(24), np.arange(16)).astype(np.uint8) + number * 9
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
        text = ("No acute disease.", "Mild edema of both lungs on 3/4/2021, Dr. Doe.", EVIL)[
            min(number // 9, 2)
        ]
        split = "test" if number < 4 else "train"
        rows.append(f'{number}.png,"{text}",p{number // 2},{split},{("1", "0", "")[number % 3]}')
    rows.append("none.png,gone,p1,,")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (tmp_path / "site.toml").write_text(
        'version = 1\nname = "north"\n[cohort]\ntable = "t.csv"\npatients-declared = 10\nimage-size = 32\n'
    )
    return tmp_path


def page(site: Path, *options: str) -> tuple[Result, str]:
    program = typer.Typer()
    program.command()(inspect)
    result = CliRunner().invoke(program, [str(site), *options])
    path = site / "inspect.html"
    return result, path.read_text() if path.exists() else ""


def test_the_page_says_what_is_in_the_cohort(site: Path) -> None:
    result, html = page(site, "--images", "5")
    assert result.exit_code == 0
    assert "it holds patient data" in result.output
    text = " ".join(re.sub(r"<[^>]*>", " ", html).split())
    for words in (
        "Patient data: this page stays at the site",
        "Patients 10 2 held out",
        "Images 20 up to 2 of one patient",
        "Different texts 3",
        "21 inputs",
        "used 20",
        "E_FILE_MISSING 1",
        "9 of 20 rows have a mask in their text",
        "date 9",
        "name 9",
        "9 No acute disease.",
        "Edema 7 7 6 50.0 %",
        "5 random rows",
    ):
        assert words in text, words


def test_the_page_fetches_and_runs_nothing(site: Path) -> None:
    _, html = page(site)
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)


def test_only_the_owner_may_read_it(site: Path) -> None:
    page(site)
    assert stat.S_IMODE((site / "inspect.html").stat().st_mode) == 0o600


def test_the_sheet_shows_packed_pixels_chosen_by_the_seed(site: Path) -> None:
    cohort = build_cohort(CohortSettings(table=site / "t.csv", image_size=32, salt="s"), site / "again")
    _, html = page(site, "--images", "3")
    rows = [int(row) for row in re.findall(r'alt="row (\d+)"', html)]
    for row, data in zip(rows, re.findall(r"base64,([^\"]+)", html), strict=True):
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(data))), cohort.images[row])
    assert page(site, "--images", "3")[1] == html
    assert page(site, "--images", "3", "--seed", "1")[1] != html
    assert "<img" not in page(site, "--images", "0")[1]
    assert page(site, "--images", "99")[1].count("<img") == 20


def test_a_cohort_of_one_row_without_labels_has_a_page(tmp_path: Path) -> None:
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,text,patient_id\na.png,One.,p\n")
    settings = CohortSettings(table=tmp_path / "t.csv", image_size=16, salt="s")
    cohort: Cohort = build_cohort(settings, tmp_path / "cohort")
    write_page(tmp_path / "page.html", cohort, name="tiny")
    assert "<h2>Labels</h2>" not in (tmp_path / "page.html").read_text()


def test_channels_are_shown_beside_each_other_in_their_order(tmp_path: Path) -> None:
    """A slice of CT and a radiograph, with the windows of lungs, soft tissue and bone."""
    (tmp_path / "in").mkdir()
    ramp = np.tile(np.linspace(0, 2200, 32), (32, 1)).astype(np.uint16)
    told = {"RescaleSlope": 1, "RescaleIntercept": -1024, "SOPClassUID": CTImageStorage}
    dataset_of(ramp, **told).save_as(tmp_path / "in" / "ct", enforce_file_format=True)
    dataset_of().save_as(tmp_path / "in" / "x", enforce_file_format=True)
    (tmp_path / "reports.csv").write_text("accession_number,report\nA1,IMPRESSION: clear\n")
    windows = "[[-600, 1500], [40, 400], [600, 2800]]"
    (tmp_path / "site.toml").write_text(
        'version = 1\nname = "north"\n[cohort]\ndicom = "in"\nreports = "reports.csv"\n'
        f"patients-declared = 10\nimage-size = 32\nct-windows = {windows}\n"
    )
    result, html = page(tmp_path)
    assert result.exit_code == 0, result.output
    assert "pixels, 8 bit, in 3 channels" in html
    images = Site.open(tmp_path).cohort().images
    for row, data in enumerate(re.findall(r"base64,([^\"]+)", html)):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert shown.shape == (32, 96)
        for channel in range(3):
            np.testing.assert_array_equal(shown[:, 32 * channel :][:, :32], images[row, ..., channel])
    assert (images[0, ..., 0] != images[0, ..., 1]).any()


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    result, html = page(tmp_path / "absent")
    assert (result.exit_code, html) == (2, "")
