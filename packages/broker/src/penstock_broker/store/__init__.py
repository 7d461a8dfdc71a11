"""The inflight store: SQLite is the truth, memory is the index."""
