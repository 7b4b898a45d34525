"""An adapter's files and algebra: configuration, header, checks, location, factors, writing."""
