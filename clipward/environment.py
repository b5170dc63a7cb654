"""Nothing calls home, and nothing is written outside the project's folder."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def stay_at_home() -> None:
    """Set what Flower, Ray, Hugging Face and matplotlib read when they start; what is set already stays."""
    kept = Path.cwd() / ".clipward"
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "FLWR_HOME": str(kept / "flwr"),
        "HF_HOME": str(kept / "huggingface"),
        "MPLCONFIGDIR": str(kept / "matplotlib"),
    }.items():
        os.environ.setdefault(name, value)
