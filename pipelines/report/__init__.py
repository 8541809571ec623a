"""`mpd-report`: what a run did, on one page."""
