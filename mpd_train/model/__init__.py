"""Load the student: weights, attention, adapters."""
