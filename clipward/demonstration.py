"""What the demo is made of; its settings are configs/demo.toml."""

from pathlib import Path
from typing import TypedDict

from clipward.environment import PROJECT
from server.federation import Federation


class Hospitals(TypedDict):
    """Arguments of `clipward.synthetic.synthesize`."""

    sites: int
    patients: int
    public_patients: int
    seed: int


HOSPITALS = Hospitals(sites=4, patients=1000, public_patients=1200, seed=7)


def settings(folder: Path) -> Federation:
    """configs/demo.toml over the hospitals in ``folder``."""
    federation = Federation.load(PROJECT / "configs" / "demo.toml")
    public, simulation = federation.public_start, federation.simulation
    if public is None or simulation is None:
        raise ValueError("configs/demo.toml needs [public-start] and [simulation]")
    own = {"dicom": folder / "public" / "dicom", "reports": (folder / "public" / "reports.csv",)}
    return federation.model_copy(
        update={
            "public_start": public.model_copy(update=own),
            "simulation": simulation.model_copy(update={"sites": folder}),
        }
    )
