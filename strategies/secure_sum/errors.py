"""Why a secure sum, or one site's part in it, cannot go on."""


class SecureSumError(ValueError):
    """Base: something in a secure sum is not what was agreed."""


class TermsRefused(SecureSumError):
    """The terms are malformed, or not such as this site takes part in."""


class OutOfRange(SecureSumError):
    """A value does not fit into the agreed fixed-point range."""


class PeerRefused(SecureSumError):
    """What came from a site, or is said to come from it, does not verify; the text names the site."""


class StepRefused(SecureSumError):
    """A step was asked out of order, again with another content, or against the rules of the protocol."""


class TooFewSites(SecureSumError):
    """Fewer sites than the threshold are left, so the attempt ends and nothing is unmasked."""


class Malformed(SecureSumError):
    """A message's field is not of its form."""
