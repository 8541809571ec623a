"""`python -m mpd_data` is `mpd-gen`."""

from mpd_data.cli import main

main()
