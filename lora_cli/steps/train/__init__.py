"""Training: a new adapter, and the loop that fit shares."""
