"""Which code this is: the digest a hospital allow-lists once it has reviewed the code.

Flower 1.41 tells a ClientApp neither the hash of the bundle it came in nor who signed it: a `Context` has
run, node, settings and state, a `Message` ids and times. So the code looks at itself. That finds any version
the hospital did not review, also one that was changed by mistake or half updated. It cannot find code written
to lie about itself: against that a node runs its own installed copy for approved bundles only.
"""

import hashlib
from functools import lru_cache
from importlib import import_module
from pathlib import Path

PACKAGES = ("client", "encoders", "privacy", "strategies", "tasks")  # all of ours that a ClientApp imports
KINDS = {".json", ".py"}


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the source files of the packages that run here, taken once per process.

    Guarantees:
        The same for the same files, whether they were installed, bundled or checked out, and wherever.
    """
    return digest_of_folders({name: Path(import_module(name).__path__[0]) for name in PACKAGES})


def digest_of_folders(folders: dict[str, Path]) -> str:
    """SHA-256 over the paths below ``folders``, by name, and the bytes of every source file there."""
    total = hashlib.sha256()
    for name, folder in sorted(folders.items()):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in KINDS):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{name}/{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()
