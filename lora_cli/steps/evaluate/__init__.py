"""Evaluation: systems scored on a task."""
