"""CT on request: slices by fixed windows, localizers not, and nothing of it without the setting."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForProcessing

from client.cohort import (
    Code,
    CohortSettings,
    CohortSettingsError,
    State,
    StoredCohortError,
    build_cohort,
    display,
    open_cohort,
)
from client.cohort.build import _display_rules
from client.cohort.dicom_folder import DicomFolder, read_header
from client.cohort.outcomes import Rejected
from client.cohort.sources import Candidate
from client.site import CohortTable
from encoders import preprocessing

Dicom = Callable[..., Dataset]
Pair = tuple[float, float]
LUNG, MEDIASTINUM, BONE = (-600.0, 1500.0), (40.0, 400.0), (600.0, 2800.0)


def ct_slice(dicom: Dicom, **attributes: object) -> Dataset:
    pixels = np.tile(np.linspace(0, 2200, 32), (32, 1)).astype(np.uint16)
    told = {"RescaleSlope": 1, "RescaleIntercept": -1024, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}
    dataset = dicom(pixels, SOPClassUID=CTImageStorage, **{**told, **attributes})
    del dataset.ViewPosition
    return dataset


@pytest.fixture
def hospital(dicom: Dicom, tmp_path: Path) -> CohortSettings:
    folder = tmp_path / "in"
    folder.mkdir()
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    files = {
        "ct": ct_slice(dicom),
        "localizer": ct_slice(dicom, ImageType=localizer),
        "cr": dicom(WindowCenter=2000, WindowWidth=3000),
    }
    for name, dataset in files.items():
        dataset.save_as(folder / name, enforce_file_format=True)
    (tmp_path / "reports.csv").write_text("accession_number,report\nA1,IMPRESSION: clear\n")
    return CohortSettings(dicom=folder, reports=tmp_path / "reports.csv", image_size=32, salt="s")


def test_ct_is_unsupported_unless_asked_for(hospital: CohortSettings, tmp_path: Path) -> None:
    cohort = build_cohort(hospital, tmp_path / "cohort", workers=1)
    assert cohort.counts[State.USED] == 1
    assert cohort.codes[Code.E_SOP_CLASS] == 2


@pytest.mark.parametrize(
    ("windows", "channels"),
    [
        ((LUNG, MEDIASTINUM), (LUNG, MEDIASTINUM, MEDIASTINUM)),
        ((MEDIASTINUM, BONE, LUNG), (MEDIASTINUM, BONE, LUNG)),
    ],
)
def test_slices_are_packed_by_their_windows_and_localizers_are_not(
    windows: tuple[Pair, ...], channels: tuple[Pair, ...], hospital: CohortSettings, tmp_path: Path
) -> None:
    """A cohort of grey images is packed anew with channels, and a radiograph has its grey in each."""
    plain = build_cohort(hospital, tmp_path / "cohort", workers=1)
    radiograph = plain.images[0].copy()
    both = build_cohort(replace(hospital, ct_windows=windows), tmp_path / "cohort", workers=1)
    assert both.counts[State.USED] == 2
    assert both.codes == {Code.E_LOCALIZER: 1}
    assert both.images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(both.images[0], np.stack([radiograph] * 3, axis=-1))
    hounsfield = np.linspace(0, 2200, 32).astype(np.uint16) - 1024.0
    for channel, (centre, width) in enumerate(channels):
        shown = np.clip((hounsfield - centre + 0.5) / (width - 1) + 0.5, 0, 1)
        assert np.abs(both.images[1, 0, :, channel] - shown * 255).max() <= 1


def test_the_rules_and_the_identity_of_grey_images_are_those_of_before(
    hospital: CohortSettings, tmp_path: Path
) -> None:
    """Else every site would decode its archive once more, for the same pixels."""
    rules = [json.loads(_display_rules(replace(hospital, ct_windows=windows))) for windows in ((), (LUNG,))]
    assert [len(each) for each in rules] == [4, 4]
    assert len(json.loads(_display_rules(replace(hospital, ct_windows=(LUNG, BONE))))) == 5


def test_a_cohort_of_an_older_version_is_packed_anew_from_its_own_pixels(
    hospital: CohortSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "cohort", replace(hospital, ct_windows=(LUNG,))
    identity = build_cohort(settings, out, workers=1).identity
    manifest = json.loads((out / "cohort.json").read_text())
    (out / "cohort.json").write_text(json.dumps(manifest | {"version": 4}))
    with pytest.raises(StoredCohortError, match="has version 4, expected 5; build it again"):
        open_cohort(out)
    monkeypatch.setattr(DicomFolder, "render", staticmethod(pytest.fail))  # nothing is decoded again
    assert build_cohort(settings, out, workers=1).identity == identity


def test_other_windows_make_another_cohort(hospital: CohortSettings, tmp_path: Path) -> None:
    images = [
        build_cohort(replace(hospital, ct_windows=windows), tmp_path / "cohort", workers=1).images[1].copy()
        for windows in ((LUNG,), (MEDIASTINUM,), (LUNG,))
    ]
    assert (images[0] != images[1]).any()
    np.testing.assert_array_equal(images[0], images[2])


def test_windows_go_to_other_processes(hospital: CohortSettings, tmp_path: Path) -> None:
    settings = replace(hospital, ct_windows=(LUNG,))
    alone = build_cohort(settings, tmp_path / "one", workers=1)
    together = build_cohort(settings, tmp_path / "two", workers=2)
    np.testing.assert_array_equal(alone.images, together.images)


def test_an_image_has_no_more_channels_than_a_tower_takes(hospital: CohortSettings) -> None:
    with pytest.raises(CohortSettingsError, match=r"at most 3 windows in cohort\.ct_windows"):
        replace(hospital, ct_windows=(LUNG, MEDIASTINUM, BONE, LUNG))
    assert display.CHANNELS == preprocessing.CHANNELS


@pytest.mark.parametrize("window", [(0.0, 0.5), (float("nan"), 10.0), (0.0, float("inf"))])
def test_a_window_that_shows_nothing_is_refused(tmp_path: Path, window: tuple[float, float]) -> None:
    with pytest.raises(CohortSettingsError, match=r"expected a window in cohort\.ct_windows, got"):
        CohortSettings(dicom=tmp_path, ct_windows=(LUNG, window), salt="s")


def test_a_table_of_pictures_has_no_hounsfield_units(tmp_path: Path) -> None:
    with pytest.raises(CohortSettingsError, match=r"cohort\.ct_windows only with cohort\.dicom"):
        CohortSettings(table=tmp_path / "x.csv", ct_windows=(LUNG,), salt="s")


def test_the_sites_file_names_windows_as_pairs() -> None:
    table: dict[str, Any] = {"dicom": "in", "patients-declared": 10, "ct-windows": [[-600, 1500], [40, 400]]}
    assert CohortTable.model_validate(table).ct_windows == (LUNG, MEDIASTINUM)


def test_raw_detector_data_says_what_to_export_instead(dicom: Dicom, tmp_path: Path) -> None:
    raw = dicom(SOPClassUID=DigitalXRayImageStorageForProcessing, PresentationIntentType="FOR PROCESSING")
    raw.save_as(tmp_path / "x", enforce_file_format=True)
    assert read_header(tmp_path / "x") == Rejected(State.UNSUPPORTED, Code.E_FOR_PROCESSING)


def test_a_slice_without_a_kind_is_a_slice(dicom: Dicom, tmp_path: Path) -> None:
    dataset = ct_slice(dicom)
    del dataset.ImageType
    dataset.save_as(tmp_path / "x", enforce_file_format=True)
    assert isinstance(read_header(tmp_path / "x", with_ct=True), Candidate)
