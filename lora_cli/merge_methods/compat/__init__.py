"""PEFT's per-factor combination types, to reproduce results obtained with them."""
