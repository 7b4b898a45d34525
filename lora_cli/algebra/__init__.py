"""The algebra of updates, on tensors alone."""
