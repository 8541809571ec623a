"""Pocket models: a student and a teacher small enough to train and run on one CPU core."""
