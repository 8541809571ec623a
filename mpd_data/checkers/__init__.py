"""Extract final answers and compare them with gold answers.

To add a checker, subclass `mpd_data.checkers.Checker` and name it as --checker package.module:Name.
"""

from mpd_data.checkers.formats import Checker

__all__ = ["Checker"]
