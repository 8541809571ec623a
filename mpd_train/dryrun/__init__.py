"""Plan a training without running it: steps, memory, time."""
