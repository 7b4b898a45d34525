"""Selections and evaluations of a whole pool that load the base."""
