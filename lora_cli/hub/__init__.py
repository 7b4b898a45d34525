"""The only door to huggingface_hub."""
