"""Look at rounds: statistics, comparison, validation, contamination, status. No torch."""
