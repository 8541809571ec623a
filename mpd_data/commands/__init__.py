"""The commands of mpd-gen. cli.py puts them together."""
