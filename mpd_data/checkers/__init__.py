"""Extract final answers and compare them with gold answers.

A checker of your own subclasses `mpd_data.checkers.Checker`.
"""

from mpd_data.checkers.formats import Checker

__all__ = ["Checker"]
