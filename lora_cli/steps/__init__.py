"""The tool's operations as functions that a notebook can call; none of them prints."""
