"""The commands: each parses its arguments, calls one step and shows the result."""
