"""A site's reports: read from whatever holds them, and found by the keys of an image."""

import client.cohort  # noqa: F401  the two packages read each other's modules; this one has to be first
