"""Rooms of base models that import neither torch nor transformers."""
