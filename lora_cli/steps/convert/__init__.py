"""Adapters of other programs as PEFT folders."""
