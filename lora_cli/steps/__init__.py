"""What the tool does: functions usable from a notebook, which never print."""
