"""How a site says no: with a code of the closed list and nothing else."""

from strategies.messages import RefusalCode


class Refused(RuntimeError):
    """The site will not do what was asked. Only ``code`` is for others; the text stays in the site's log.

    Args:
        code: What the coordinator is told.
        reason: What the hospital is told: the value, the rule, the remedy.
        rule: Key of the ``[policy]`` table that decided, if one did.
    """

    def __init__(self, code: RefusalCode, reason: str, *, rule: str | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.rule = rule
