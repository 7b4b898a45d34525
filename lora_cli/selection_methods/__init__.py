"""One file is one selection method."""
