"""Results on their way to the Hub."""
