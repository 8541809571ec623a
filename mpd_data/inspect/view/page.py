"""Write the trace browser: one HTML file that holds its rows, compressed, and needs no network."""

import base64
import gzip
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpd_data.common.files import atomic_file
from mpd_data.inspect.view.rows import pairs_of, rewrites_of


def write_view(
    rounds: Sequence[Path],
    out: Path,
    evaluations: tuple[Path, Path] | None = None,
    rows: int = 2000,
) -> None:
    """Write the page of `rounds` to `out`, with `rows` of each at most, and the problems of two
    `evaluations` side by side: of the base, and of a new model on the same prompts. Raise DataError
    for a damaged shard, ConfigError for a folder without rollouts."""
    data: dict[str, Any] = {
        "rounds": [{"name": str(path), **rewrites_of(path, rows)} for path in rounds],
        "pairs": [] if evaluations is None else pairs_of(*evaluations, rows),
        "names": [str(path) for path in evaluations or ()],
    }
    for shown in data["rounds"]:
        if shown["note"]:
            print(f"{shown['name']}: {shown['note']}", file=sys.stderr)
    with atomic_file(out) as file:
        file.write(render(data))


def render(data: dict[str, Any]) -> str:
    """Return the page that shows `data`. Texts in it stay text: they are in a compressed block that
    the script reads, and the script makes text nodes of them."""
    # Half of a surrogate pair, which a tokenizer can leave, is no UTF-8.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    block = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    here = resources.files("mpd_data.inspect.view")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("mpd_data.inspect", "view"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        block=block,
    )
