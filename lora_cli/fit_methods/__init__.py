"""One file is one way to fit coefficients to a task."""
