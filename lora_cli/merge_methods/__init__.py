"""One file is one merge method."""
