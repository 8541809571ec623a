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
from mpd_data.inspect.view.rows import divergences, pairs_of, rewrites_of


def write_view(
    rounds: Sequence[Path],
    out: Path,
    evaluations: tuple[Path, Path] | None = None,
    rows: int = 2000,
    trainings: Sequence[Path] = (),
) -> None:
    """Write the page of `rounds` to `out`, with `rows` of each at most, and the problems of two
    `evaluations` side by side: of the base, and of a new model on the same prompts. `trainings` on
    the rounds add the rows' divergences. Raise DataError for a damaged shard, ConfigError for a
    folder without rollouts."""
    trained = divergences(trainings, rounds)
    shown = [{"name": str(path), **rewrites_of(path, rows, trained)} for path in rounds]
    page = render(shown, evaluations, rows)
    with atomic_file(out) as file:
        file.write(page)


def render(
    rounds: Sequence[dict[str, Any]],
    evaluations: tuple[Path, Path] | None,
    most_pairs: int,
    facets: dict[str, Any] | None = None,
) -> str:
    """Return the page of `rounds`. With `facets` it has not their rows and asks its server for
    them. Texts in it stay text: they are in a compressed block that the script reads, and the
    script makes text nodes of them."""
    data: dict[str, Any] = {
        "rounds": rounds,
        "pairs": [] if evaluations is None else pairs_of(*evaluations, most_pairs),
        "names": [str(path) for path in evaluations or ()],
        "facets": facets,
    }
    for shown in rounds:
        if shown["note"]:
            print(f"{shown['name']}: {shown['note']}", file=sys.stderr)
    # Half of a surrogate pair, which a tokenizer can leave, is no UTF-8.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    block = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    here = resources.files("mpd_data.inspect.view")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("mpd_data.inspect", "view"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=Markup(policy(facets is not None)),
        block=block,
    )


def policy(asks: bool) -> str:
    """Return the Content-Security-Policy of a page: it runs the one script, and reaches nothing, or
    its own server where it `asks` one."""
    script = resources.files("mpd_data.inspect.view").joinpath("page.js").read_bytes()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    reached = "connect-src 'self'; " if asks else ""
    return (
        f"default-src 'none'; {reached}style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
        " base-uri 'none'; form-action 'none'"
    )
