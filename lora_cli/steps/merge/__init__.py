"""Merging: requested, planned, computed, written, rebuilt."""
