"""The pocket models: a student and a teacher that one CPU core can train and run."""
