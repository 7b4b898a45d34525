"""The SQLite database: adapters, selections, runs."""
