"""What a site should look at before it trains."""

import json
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from typer.testing import CliRunner

from client.cohort import pairing
from client.text.scrub import Scrubbed
from clipward.cohort_check import check
from clipward.synthetic.pairs import synthetic_pairs

LONG = "There is a small right pleural effusion with adjacent atelectasis and a normal heart size today."


@pytest.fixture(scope="module")
def phantoms() -> NDArray[np.uint8]:
    return synthetic_pairs(12, seed=5)[0]


@pytest.fixture
def site(tmp_path: Path, phantoms: NDArray[np.uint8]) -> Path:
    """Eight patients with nothing to look at."""
    return write_site(tmp_path / "here", phantoms[:8], [f"Edema of grade {number}." for number in range(8)])


def write_site(folder: Path, images: NDArray[np.uint8], texts: list[str], *, first: int = 0) -> Path:
    (folder / "dicom").mkdir(parents=True)
    rows = ["accession_number,report"]
    for number, (image, text) in enumerate(zip(images, texts, strict=True), start=first):
        write_image(folder / "dicom" / f"{number}.dcm", number, image)
        rows.append(f'A{number},"{text}"')
    (folder / "reports.csv").write_text("\n".join(rows))
    (folder / "site.toml").write_text(
        f'version = 1\nname = "{folder.name}"\n[cohort]\ndicom = "dicom"\nreports = "reports.csv"\n'
        "patients-declared = 10\n"
    )
    return folder


def write_image(path: Path, number: int, pixels: NDArray[np.uint8]) -> None:
    image = Dataset()
    image.SOPClassUID = ComputedRadiographyImageStorage
    image.SOPInstanceUID, image.StudyInstanceUID = f"1.2.3.{number}", f"1.2.4.{number}"
    image.PatientID, image.AccessionNumber, image.ViewPosition = f"P{number}", f"A{number}", "PA"
    image.PhotometricInterpretation, image.SamplesPerPixel = "MONOCHROME2", 1
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    image.WindowCenter, image.WindowWidth = 128, 256
    image.PixelData = pixels.tobytes()
    image["PixelData"].VR = "OB"
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save_as(path, enforce_file_format=True)


def run(site: Path, *options: str | Path) -> Result:
    program = typer.Typer()
    program.command()(check)
    return CliRunner().invoke(program, [str(site), *map(str, options)])


def found(site: Path, *options: str | Path) -> dict[str, Any]:
    result = run(site, "--json", *options)
    findings = json.loads(result.stdout)["findings"]
    assert result.exit_code == (1 if findings else 0)
    return {one["kind"]: one for one in findings}


def test_nothing_found_is_no_proof(site: Path) -> None:
    result = run(site)
    assert (result.exit_code, result.stdout) == (
        0,
        "nothing was found; that is no proof that nothing is there\n",
    )
    assert found(site) == {}


def test_everything_that_is_planted_is_found(
    site: Path, phantoms: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pairing, "scrub", lambda text, known: Scrubbed(text=text)
    )  # a build that masks nothing
    picture = Image.fromarray(phantoms[8])
    ImageDraw.Draw(picture).text((8, 6), "DOE JOHN 12.03.1956", fill=255, font=ImageFont.load_default(14))
    write_image(site / "dicom" / "50.dcm", 50, np.asarray(picture))
    write_image(site / "dicom" / "51.dcm", 51, np.clip(phantoms[3] * 0.97 + 3, 0, 255).astype(np.uint8))
    write_image(site / "dicom" / "52.dcm", 52, phantoms[9])
    write_image(site / "dicom" / "53.dcm", 53, phantoms[10])
    with open(site / "reports.csv", "a") as file:
        file.write(f'\nA50,"Call Dr. Smith, 03/12/2020."\nA51,Mass.\nA52,"{LONG}"\nA53,"{LONG.upper()}"\n')
    findings = found(site)
    assert findings["writing in the image"]["files"] == ["50.dcm"]
    assert findings["name in the text"]["files"] == findings["date in the text"]["files"] == ["50.dcm"]
    assert findings["one image of several patients"]["files"] == ["3.dcm"]
    assert findings["one long text of several patients"]["files"] == ["52.dcm"]
    kinds = {kind for kind in findings if "held out" not in kind}
    assert len(kinds) == 5
    result = run(site)
    assert result.exit_code == 1
    assert "patient data, stays at this site" in result.stdout


def test_an_overlap_is_told_to_one_side_without_showing_the_other(
    site: Path, tmp_path: Path, phantoms: NDArray[np.uint8]
) -> None:
    (tmp_path / "shared.key").write_text("0123456789abcdef0123456789abcdef")
    there = write_site(tmp_path / "there", phantoms[6:10], ["Mass."] * 4, first=7)  # one UID, two pictures
    exported = run(there, "--export-hashes", tmp_path / "there.json", "--key-file", tmp_path / "shared.key")
    assert exported.exit_code == 0
    assert stat.S_IMODE((tmp_path / "there.json").stat().st_mode) == 0o600
    assert "1.2.3" not in (tmp_path / "there.json").read_text()
    shutil.rmtree(there)
    findings = found(site, "--against", tmp_path / "there.json", "--key-file", tmp_path / "shared.key")
    assert findings["images that there.json has too"]["files"] == ["6.dcm", "7.dcm"]
    (tmp_path / "shared.key").write_text("another key of more than sixteen bytes")
    refused = run(site, "--against", tmp_path / "there.json", "--key-file", tmp_path / "shared.key")
    assert refused.exit_code == 2
    assert "made under another key" in refused.output


def test_a_public_list_needs_no_key(site: Path, tmp_path: Path) -> None:
    (tmp_path / "benchmark.csv").write_text("id,label\n1.2.3.4,x\n2.dcm,y\n1.2.4.5,z\nA6,w\n1.2,v\n")
    findings = found(site, "--against", tmp_path / "benchmark.csv")
    assert findings["images that benchmark.csv has too"]["rows"] == [2, 4, 5, 6]


def test_hashes_without_a_key_are_refused(site: Path, tmp_path: Path) -> None:
    result = run(site, "--export-hashes", tmp_path / "x.json")
    assert result.exit_code == 2
    assert "needs --key-file" in result.output
    assert not (tmp_path / "x.json").exists()
