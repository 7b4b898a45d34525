"""Base models: what their classes are made of, how updates act on them, and how text becomes their tokens."""
