"""Base models: so far, what they read. No room here imports torch when it is itself imported."""
