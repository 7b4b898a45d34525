"""A sequence: tasks that come one after another, and how the LoRAs trained on them join into one."""
