"""Codes that name the section of a report, and the heading a section gets in plain text.

Sources: DICOM PS3.16 annex D (DCM), CID 7001 and TID 2000 (which codes name sections); LOINC; HL7 v2.5
section 7.1.4 (the suffixes of OBX-3).
"""

from collections.abc import Mapping

FINDINGS, IMPRESSION, RECOMMENDATION = "FINDINGS", "IMPRESSION", "RECOMMENDATION"
COMPARISON, INDICATION, HISTORY, PROCEDURE = "COMPARISON", "INDICATION", "HISTORY", "PROCEDURE"
ADDENDUM = "ADDENDUM"

# Code values do not collide between the schemes, and exports misspell the schemes' names.
HEADINGS: Mapping[str, str] = {
    "121060": HISTORY,
    "121062": INDICATION,  # Request
    "121064": PROCEDURE,  # Current Procedure Descriptions
    "121065": PROCEDURE,
    "121066": COMPARISON,  # Prior Procedure Descriptions
    "121067": COMPARISON,
    "121068": COMPARISON,  # Previous Findings: they are not this study's
    "121069": COMPARISON,
    "121070": FINDINGS,
    "121071": FINDINGS,
    "121072": IMPRESSION,
    "121073": IMPRESSION,
    "121074": RECOMMENDATION,
    "121075": RECOMMENDATION,
    "121076": IMPRESSION,  # Conclusions
    "121077": IMPRESSION,
    "121078": ADDENDUM,
    "121109": INDICATION,
    "121111": IMPRESSION,  # Summary
    "18782-3": FINDINGS,  # Radiology Study observation
    "59776-5": FINDINGS,  # Procedure findings
    "19005-8": IMPRESSION,  # Radiology Imaging study impression
    "18783-1": RECOMMENDATION,
    "18834-2": COMPARISON,
    "18785-6": INDICATION,  # Radiology Reason for study
    "11329-0": HISTORY,
    "55111-9": PROCEDURE,
    "55114-3": COMPARISON,
    "GDT": FINDINGS,
    "IMP": IMPRESSION,
    "REC": RECOMMENDATION,
    "ADT": ADDENDUM,
}
KNOWN = frozenset(HEADINGS.values())
