"""Rewrite templates: TOML files that say how the teacher is asked and how it is read.

See templates/rewrite-v1.toml for the format.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from mpd_data.config import Strict
from mpd_data.errors import ConfigError
from mpd_data.schema import content_key

DEFAULT_TEMPLATE = Path(__file__).parent / "templates" / "rewrite-v1.toml"

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Puts values in place of {{names}} in one pass: what a value contains is never expanded."""
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], text)


class RewriteTemplate(Strict):
    """The content of a template file."""

    name: str
    version: int
    prompt: str
    output: str
    trace: str

    def hash(self) -> str:
        return content_key(self.model_dump())

    def message(self, problem: str, draft: str) -> str:
        """What the user says to the teacher."""
        return fill(self.prompt, {"problem": problem, "draft": draft}).strip()

    def trace_of(self, rewrite: str) -> str | None:
        """The teacher's turn laid out as the student's own trace, without the end token; None
        where the turn is not in the template's format."""
        match = re.fullmatch(self.output, rewrite, re.DOTALL)
        if match is None:
            return None
        return fill(self.trace, {name: text.strip() for name, text in match.groupdict("").items()})


def load_template(path: Path | None) -> RewriteTemplate:
    """Reads and checks a template file. Raises ConfigError naming what is wrong in it."""
    path = path or DEFAULT_TEMPLATE
    try:
        template = RewriteTemplate(**tomllib.loads(path.read_text(encoding="utf-8")))
        groups = set(re.compile(template.output).groupindex)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError, TypeError) as error:
        raise ConfigError(f"{path}: not a rewrite template: {error}") from error
    except re.error as error:
        raise ConfigError(f"{path}: `output` is not a regular expression: {error}") from error
    for field, text, known in (
        ("prompt", template.prompt, {"problem", "draft"}),
        ("trace", template.trace, groups),
    ):
        unknown = set(_PLACEHOLDER.findall(text)) - known
        if unknown:
            raise ConfigError(
                f"{path}: `{field}` uses {sorted(unknown)}; it can use {sorted(known)}."
            )
    if "{{draft}}" not in template.prompt:
        raise ConfigError(f"{path}: `prompt` never shows the teacher the {{{{draft}}}}.")
    return template
