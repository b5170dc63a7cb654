"""Small synthetic hospitals, made and packed once; every test that asks gets its own."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Hypothesis' own profile for CI has no time limit an example and draws the same examples every time.
if "CI" not in os.environ:
    settings.register_profile("here", deadline=None)
    settings.load_profile("here")


@pytest.fixture(scope="session")
def made_hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The originals: read them, never change them."""
    from client.site import Site
    from clipward.synthetic import synthesize
    from tests.encoders.micro import micro_encoder
    from tests.small_hospitals import PATIENTS, SITES, change_site

    root = tmp_path_factory.mktemp("made")
    for folder in synthesize(root / "hospitals", sites=SITES, patients=PATIENTS, seed=3, workers=1):
        change_site(folder, cohort={"image-size": 32}, policy={"min-patients": 10}, device={"threads": 1})
        Site.open(folder).cohort()
    micro_encoder().export(root / "micro")
    return root


@pytest.fixture
def hospitals(made_hospitals: Path, tmp_path: Path) -> Path:
    """A test's own folder: ``hospitals/site-1`` to ``site-3``, packed, nothing released yet; ``micro``.

    The DICOM files themselves are shared and must not be changed.
    """
    shutil.copytree(made_hospitals / "micro", tmp_path / "micro")
    for site in made_hospitals.glob("hospitals/site-*"):
        folder = tmp_path / "hospitals" / site.name
        shutil.copytree(site, folder, ignore=shutil.ignore_patterns("dicom"))
        (folder / "dicom").symlink_to(site / "dicom", target_is_directory=True)
    return tmp_path
