"""Catalogue, select, merge, fit and evaluate pools of LoRA adapters."""
