"""Read prompts from files and data sets, and render them for a model."""
