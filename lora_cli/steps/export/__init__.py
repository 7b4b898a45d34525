"""An adapter in the form of another program."""
