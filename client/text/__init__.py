"""From a radiologist's report to text a model may learn from: sections, sentences, masks and labels.

Nothing in this package ever writes, logs or raises a report's words; its results mask their ``repr``.
"""
