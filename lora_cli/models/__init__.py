"""Base models: what their classes are made of."""
