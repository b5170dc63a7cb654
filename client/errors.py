"""How a site says no: with a code of the closed list and nothing else."""

from strategies.messages import RefusalCode


class Refused(RuntimeError):
    """The site will not do what was asked. Only `code` is for others; the text stays in the site's log."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
