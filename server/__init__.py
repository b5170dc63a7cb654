"""The coordinator: federation file, rounds, checkpoints, metrics. The only place that sees more than one hospital."""
