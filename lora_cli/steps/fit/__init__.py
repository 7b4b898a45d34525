"""Fitting coefficients."""
