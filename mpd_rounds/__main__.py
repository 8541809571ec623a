"""`python -m mpd_rounds` is `mpd-rounds`."""

from mpd_rounds.cli import main

main()
