"""Base models: the modules of their classes, the application of updates, and the encoding of text."""
