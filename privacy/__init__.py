"""Clipping, noise, budgets and the ledger: mathematics and its book-keeping."""
