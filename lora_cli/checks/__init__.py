"""What makes an adapter usable or not."""
