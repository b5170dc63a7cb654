"""One hospital's side: cohort, local training, policy. The only place that sees patient data."""
