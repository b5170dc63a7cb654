"""How a site says no: with a code of the closed list and nothing else."""

from strategies.messages import RefusalCode


class Refused(RuntimeError):
    """The site will not do what was asked. Only ``code`` is for others; the text stays in the site's log.

    Args:
        code: What the coordinator is told.
        reason: What the hospital is told: the value, the rule.
        rule: Key of the ``[policy]`` table that decided, if one did.
        remedy: What the hospital can do about it, where ``reason`` does not say so; it is told that too.
    """

    def __init__(
        self, code: RefusalCode, reason: str, *, rule: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(reason if remedy is None else f"{reason}; {remedy}")
        self.code = code
        self.reason = reason
        self.rule = rule
