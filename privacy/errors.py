"""What the privacy package refuses, by name; every text names the thing, its value and the remedy."""


class PrivacyError(ValueError):
    """A mechanism cannot be built as asked: a precondition of its guarantee does not hold."""


class NoiseOutOfRange(PrivacyError):
    """No noise multiplier in the supported range meets the target epsilon."""


class ImpossiblePlan(PrivacyError):
    """No run follows from the constants as given; the text names the one that is wrong and the remedy."""


class NoiseCopied(RuntimeError):
    """A noise source was about to be used twice, which would repeat its noise."""


class AccountantDisagreement(RuntimeError):
    """Two accountants contradict each other, so no epsilon may be claimed."""


class LedgerError(RuntimeError):
    """A ledger refused; parent of every refusal below."""


class WrongLedger(LedgerError):
    """The file is not the ledger that was asked for: another cohort, version or format."""


class LedgerTampered(LedgerError):
    """The rows are not the ones that were written; the text names the first that is wrong."""


class HistoryLost(LedgerError):
    """The ledger lacks a row that somebody else remembers: it was cut short, or restored from a back-up."""


class KeyUnusable(LedgerError):
    """The site's key is missing, unreadable, or open to others; the text says how to get on."""


class BudgetExceeded(LedgerError):
    """The release would take the cohort past its epsilon_max; nothing was charged."""


class ReservationClosed(LedgerError):
    """The reservation cannot be released or abandoned: it is not this ledger's, or already has an outcome."""


class AlreadyReleased(LedgerError):
    """The request was released before; the stored bytes may be sent again, which costs nothing.

    Attributes:
        output_digest: Digest of the stored release, as recorded.
    """

    def __init__(self, message: str, *, output_digest: str) -> None:
        super().__init__(message)
        self.output_digest = output_digest


class UnsoundTraining(ValueError):
    """Training as set up cannot carry a privacy claim; the text names what breaks it and the remedy."""
