"""Baking: an adapter becomes part of its base."""
