"""Generate and score tokens: one protocol, three engines."""
