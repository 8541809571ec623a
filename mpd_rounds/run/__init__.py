"""The steps of a pipeline, run as processes."""
