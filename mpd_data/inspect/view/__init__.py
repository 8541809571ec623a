"""`mpd-gen view`: the traces of rounds as one page that needs no network, or served."""

from mpd_data.inspect.view.page import write_view

__all__ = ["write_view"]
