"""`python -m mpd_train` is `mpd-train`."""

from mpd_train.cli import main

main()
