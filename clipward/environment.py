"""Nothing calls home, and nothing is written outside the project's folder."""

import os
from pathlib import Path

from strategies.offline import OFFLINE

PROJECT = Path(__file__).resolve().parent.parent


def stay_at_home() -> None:
    """Set what Flower, Ray, Hugging Face and matplotlib read when they start; what is set already stays."""
    kept = Path.cwd() / ".clipward"
    for name, value in {
        **OFFLINE,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "FLWR_HOME": str(kept / "flwr"),
        "HF_HOME": str(kept / "huggingface"),
        "MPLCONFIGDIR": str(kept / "matplotlib"),
    }.items():
        os.environ.setdefault(name, value)
