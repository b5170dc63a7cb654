"""Which of the ready sites are asked in a round: a draw that nothing has to remember."""

import hashlib
from collections.abc import Sequence

from server.roster import Site


def select(
    sites: Sequence[Site], *, run: str, seed: int, server_round: int, count: int
) -> tuple[list[Site], list[Site]]:
    """Draw ``count`` of ``sites``.

    Guarantees:
        Every site's lot is a hash of run, seed, round and its own name, and the lowest lots are drawn: a
        resumed run draws as the uninterrupted one would, no state of a generator is kept anywhere, and a
        site that comes or goes changes the draw by at most one other site. Over the rounds every site is
        asked equally often, up to chance.

    The draw is public, so it hides nobody: no amplification of privacy by sampling may be claimed for it,
    least of all for a patient, who belongs to one site and is drawn with all of it.

    Args:
        sites: Those that are ready.
        run: Name of the run.
        seed: Of the run, public.
        server_round: From 1.
        count: How many to draw; all of them when there are not more.

    Returns:
        Those drawn and the others, both in the order of their names.

    Source:
        Lots by hash: Thaler and Ravishankar (1998), "Using name-based mappings to increase hit rates".
    """

    def lot(site: Site) -> bytes:
        return hashlib.sha256(f"{run}\0{seed}\0{server_round}\0{site.name}".encode()).digest()

    drawn = {site.name for site in sorted(sites, key=lot)[:count]}
    in_order = sorted(sites, key=lambda site: site.name)
    return (
        [site for site in in_order if site.name in drawn],
        [site for site in in_order if site.name not in drawn],
    )
