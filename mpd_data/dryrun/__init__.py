"""Plan a stage without running it: tokens, disk, time."""
