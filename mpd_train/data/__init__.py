"""Read rounds, pack rows, and stream batches."""
