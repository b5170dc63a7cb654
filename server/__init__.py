"""The coordinator: federation file, rounds, checkpoints, metrics. It alone sees more than one hospital."""
