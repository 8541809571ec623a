"""`mpd-report`: what a run did, as one HTML page and Markdown."""
