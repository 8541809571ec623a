"""`mpd-study`: several pipelines that differ in some settings, with intervals."""
