"""Serve the trace browser of rounds that are too large for one page, to this machine alone.

    /         the page of `mpd-gen view`, with what its filters can choose among
    /rows     a list of rows: filters as in the page's address, and a `key` or a `number`
    /row      a row with its texts, by its `key`

Needs the extra `serve`.
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from anyio import from_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.text import plain_lines
from mpd_data.inspect.view.index import Index
from mpd_data.inspect.view.page import policy, render
from mpd_data.inspect.view.rows import divergences

_HOST = "127.0.0.1"


class _Gone(Exception):
    """Nobody waits for the answer, or the server ends."""


def serve_view(
    rounds: Sequence[Path],
    port: int,
    evaluations: tuple[Path, Path] | None = None,
    most_pairs: int = 2000,
    trainings: Sequence[Path] = (),
) -> None:
    """Serve the page of `rounds` on a `port` of this machine (0: a free one) until an interrupt.
    `trainings` on the rounds add the rows' divergences.
    Raise DataError for a damaged shard, ConfigError for a folder without rollouts and for a port
    that is taken."""
    try:
        listener = socket.create_server((_HOST, port))
    except OSError as error:
        raise ConfigError(
            f"--port {port}: {error.strerror}. Choose another, or 0 for one that is free."
        ) from error
    with listener:
        index = Index(rounds, divergences(trainings, rounds))
        page = render(index.rounds, evaluations, most_pairs, index.facets())
        app = _app(index, page, f"http://{_HOST}:{listener.getsockname()[1]}/")
        app.state.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        app.state.server.run(sockets=[listener])


def _app(index: Index, page: str, address: str) -> Starlette:
    headers = {
        "Content-Security-Policy": f"{policy(asks=True)}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }
    searching = asyncio.Lock()  # searches read all texts: one after another

    async def answer(work: Callable[..., dict[str, Any]], *given: Any) -> Response:
        try:
            said, status = await run_in_threadpool(work, *given), 200
        except _Gone:
            said, status = {"error": "The search was given up."}, 503
        except (MPDError, OSError) as error:
            print(f"error: {plain_lines(str(error))}", file=sys.stderr, flush=True)
            said, status = {"error": str(error)}, 500
        # Half of a surrogate pair is no UTF-8.
        return Response(json.dumps(said), status, headers, "application/json")

    async def get_page(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def get_rows(request: Request) -> Response:
        given = dict(request.query_params)

        def go_on() -> None:
            if request.app.state.server.should_exit or from_thread.run(request.is_disconnected):
                raise _Gone

        if "search" not in given:
            return await answer(index.find, given)
        async with searching:
            return await answer(index.find, given, go_on)

    async def get_row(request: Request) -> Response:
        return await answer(index.whole, request.query_params.get("key", ""))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Earlier, an interrupt would meet a server that does not handle it yet.
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        yield

    return Starlette(
        lifespan=lifespan,
        routes=[Route("/", get_page), Route("/rows", get_rows), Route("/row", get_row)],
        # A page elsewhere whose name leads here (DNS rebinding) must not read the rows.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])],
    )
