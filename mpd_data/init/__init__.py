"""`mpd-gen init`: write a pipeline for the user's models and prompts."""
