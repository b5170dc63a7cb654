"""Synthetic hospitals: chest-radiograph phantoms as DICOM, with reports, ground truth and a site file."""

from clipward.synthetic.findings import FINDINGS
from clipward.synthetic.generate import SyntheticError, synthesize
from clipward.synthetic.wording import all_wording

__all__ = ["FINDINGS", "SyntheticError", "all_wording", "synthesize"]
