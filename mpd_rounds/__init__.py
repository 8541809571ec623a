"""Run all rounds of a pipeline, studies of several pipelines, and their reports."""
