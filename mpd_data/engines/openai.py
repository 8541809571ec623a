"""The server engine: a running vLLM server, through its OpenAI-compatible HTTP interface.

The stages need token ids in both directions and a prompt's log-probabilities, which vLLM adds to
that interface (`return_token_ids`, `prompt_logprobs`). A server without them is refused at the
start. Requests run on an event loop in a thread of its own, at most `max_num_seqs` at a time; their
results are queued for `step`. A failed connection is retried for two minutes, a refusal is not. The
API key goes into one header and nowhere else.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import queue
import random
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np

from mpd_data.common.errors import EngineError, requires
from mpd_data.common.models import ModelFiles, load_tokenizer
from mpd_data.common.positions import has_longrope
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines.protocol import Completion, Refused, RequestError, Scores
from mpd_data.prompts.special import Spelling, turn_of

with requires("openai", "--backend openai"):
    import httpx

_KEYS = ("MPD_API_KEY", "OPENAI_API_KEY")
# A failing request is retried for this long, counted from its first failure.
_RETRY_SECONDS = 120.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 20.0
# A long completion is answered only after its last token; TCP notices a dead server sooner.
_SECONDS_PER_ANSWER = 3600.0
_SECONDS_PER_STEP = 0.1
_PROBED_IDS = 256
_LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_BUSY = (429, 502, 503, 504)
_REFUSED = (400, 413, 422)
_SCORING = {"max_tokens": 1, "temperature": 0.0}
# JSON has no -inf; vLLM writes this.
_NO_PROBABILITY = -9999.0

_log = logging.getLogger(__name__)

Result = Completion | Scores | Refused


class OpenAIEngine:
    """A model on a server. Raise EngineError where the server cannot do what the stages need."""

    def __init__(
        self,
        model: ModelFiles,
        config: EngineConfig,
        trust_remote_code: bool,
        context: int,
        max_logprobs: int,
    ) -> None:
        assert config.base_url is not None and model.served is not None
        self.max_model_len = context
        self.max_in_flight = 2 * config.max_num_seqs
        self._url = config.base_url
        self._files = model
        self._model = model.served
        self._max_logprobs = max_logprobs
        self._key = _api_key()
        tokenizer = load_tokenizer(model, trust_remote_code)
        self._end_ids = turn_of(model, tokenizer, trust_remote_code).stop_ids
        self.in_flight = 0
        self._finished: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._warned = False
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        # A score is some 100 bytes of JSON for each of K x tokens log-probabilities: one answer is
        # read and parsed at a time, the others wait in the sockets.
        self._reading = asyncio.Lock()
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(_SECONDS_PER_ANSWER, connect=10.0, write=60.0, pool=None),
            transport=httpx.AsyncHTTPTransport(
                limits=httpx.Limits(max_keepalive_connections=config.max_num_seqs),
                socket_options=_keep_alive(),
            ),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._start(self._check_server(tokenizer)).result()
        except BaseException:
            self.close()
            raise

    # -- the protocol -------------------------------------------------------------------

    def underway(self) -> None:
        """Return None: an answer comes when its request has ended."""

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int,
        logprobs: bool = False, k: int = 0,
    ) -> None:  # fmt: skip
        self._submit(key, self._generate(key, prompt_ids, sampling, seed, logprobs))

    def submit_score(self, key: str, context_ids: list[int], target_ids: list[int], k: int) -> None:
        self._submit(key, self._score(key, context_ids, target_ids, k))

    def step(self) -> list[Result]:
        results: list[Result] = []
        with contextlib.suppress(queue.Empty):
            item = self._finished.get(timeout=_SECONDS_PER_STEP)
            while True:
                self.in_flight -= 1
                if isinstance(item, BaseException):
                    self._failure = self._failure or item
                else:
                    results.append(item)
                item = self._finished.get_nowait()
        # Results from before the failure are returned first.
        if self._failure is not None and not results:
            raise self._failure
        return results

    def forget(self) -> None:
        pass

    def close(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()

        self._start(end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- requests, on the event loop ----------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _submit(self, key: str, work: Coroutine[Any, Any, Result]) -> None:
        def deliver(future: concurrent.futures.Future[Result]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            is_refusal = isinstance(error, RequestError)
            self._finished.put(Refused(key, str(error)) if is_refusal else error or future.result())

        self.in_flight += 1
        self._start(work).add_done_callback(deliver)

    async def _generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int, logprobs: bool
    ) -> Result:
        limit = min(sampling.max_tokens, self.max_model_len - len(prompt_ids))
        settings = {
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stop_token_ids": self._end_ids,
            # All are sent: a server's defaults come from the model's generation config.
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": 0.0,
        }
        if sampling.stop:
            settings["stop"] = sampling.stop
        if logprobs:
            settings["logprobs"] = 0
        choice = await self._complete(prompt_ids, settings)
        token_ids, reason = self._token_ids(choice), choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise EngineError(f"{self._url}: request {key} ended by {reason!r}")
        has_end = bool(token_ids) and token_ids[-1] in self._end_ids
        # Whether it was a stop string, guard.py sees.
        if reason == "stop" and not has_end and not sampling.stop:
            raise EngineError(
                f"{self._url}: a completion stopped at the token {token_ids[-1:]}, which is none of"
                f" {self._model}'s end tokens {sorted(self._end_ids)}. Start the server with the"
                " model's own generation config, without other stop tokens."
            )
        if reason == "length" and len(token_ids) != limit:
            raise EngineError(
                f"{self._url}: a completion was cut at {len(token_ids)} tokens; the limit is"
                f" {limit}. The server has a lower limit of its own: start it without one (vllm"
                " serve --generation-config vllm)."
            )
        # A gateway may leave them out.
        sampled = (choice.get("logprobs") or {}).get("token_logprobs") if logprobs else None
        fits = isinstance(sampled, list) and len(sampled) == len(token_ids) and None not in sampled
        return Completion(key, token_ids, reason, sampled if fits else None)

    async def _score(
        self, key: str, context_ids: list[int], target_ids: list[int], k: int
    ) -> Result:
        settings = {**_SCORING, "prompt_logprobs": k}
        choice = await self._complete(context_ids + target_ids, settings)
        return self._scores(key, choice, len(context_ids), target_ids, k)

    async def _complete(
        self, ids: list[int], settings: dict[str, Any], patient: bool = True
    ) -> Any:
        """Return the one choice in the server's answer. Raise RequestError and EngineError."""
        body = {"model": self._model, "prompt": ids, **settings}
        async with self._slots:
            answer = await self._ask("/v1/completions", body, patient)
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise self._unexpected("/v1/completions", "no choices") from error

    async def _ask(self, path: str, body: Any = None, patient: bool = True) -> Any:
        """Return the JSON of the server's answer to a POST of `body`, or to a GET without one.
        `patient`: retry a connection that fails. Raise RequestError where the server refuses the
        request, EngineError for everything else."""
        begun: float | None = None
        wait = _FIRST_WAIT
        method = "GET" if body is None else "POST"
        while True:
            cause: Exception | None = None
            try:
                async with self._client.stream(method, path, json=body) as response, self._reading:
                    content = await response.aread()
                if response.status_code == 200:
                    self._warned = False
                    return json.loads(content)
                reason = f"HTTP {response.status_code}: {self._reason(content)}"
                if response.status_code in _REFUSED:
                    raise RequestError(reason)
                if response.status_code not in _BUSY:
                    raise _StatusError(response.status_code, f"{self._url}{path}: {reason}")
            except _LOST as error:
                cause, reason = error, self._without_key(f"{type(error).__name__}: {error}")
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise self._unexpected(path, "no JSON") from error
            now = time.monotonic()
            begun = begun or now
            if not patient:
                raise EngineError(
                    f"{self._url}{path}: {reason}. Is the server running, and is that its URL?"
                ) from cause
            if now + wait > begun + _RETRY_SECONDS:
                raise EngineError(
                    f"{self._url}{path}: {reason}; tried for {now - begun:.0f} s. Finished rows are"
                    " committed; run the same command again to continue when the server is back. If"
                    " it is too busy, lower --max-num-seqs."
                ) from cause
            if not self._warned:
                self._warned = True
                _log.warning("%s: %s; retrying for %.0f s", self._url, reason, _RETRY_SECONDS)
            # Random, or all requests come back at the same time.
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)

    # -- the server's answers -----------------------------------------------------------

    def _reason(self, content: bytes) -> str:
        """Return the reason that the body of an error gives."""
        text = content.decode(errors="replace")
        try:
            body = json.loads(text)
            body = body.get("error", body.get("detail", body))
            text = str(body.get("message", body))
        except (ValueError, AttributeError, TypeError):
            pass  # not vLLM's form: the text itself
        return self._without_key(text.strip()[:500])

    def _without_key(self, text: str) -> str:
        """Return `text` without the API key, which a server may repeat."""
        return text if self._key is None else text.replace(self._key, "***")

    def _unexpected(self, path: str, problem: str) -> EngineError:
        return EngineError(
            f"{self._url}{path}: the answer is not vLLM's ({problem}). Expected a server of vLLM"
            " 0.32 or newer, or one that answers like it."
        )

    def _token_ids(self, choice: Any) -> list[int]:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise EngineError(
                f"{self._url}: the server returns no token ids (return_token_ids), and encoding its"
                " text gives other ids than the model's. Use a vLLM server."
            )
        return ids

    def _scores(self, key: str, choice: Any, start: int, target_ids: list[int], k: int) -> Scores:
        """Return scores from the answer's `prompt_logprobs`: for each position but the first a
        dictionary, token id -> logprob and rank, of the K best and of the sequence's own token."""
        positions = choice.get("prompt_logprobs")
        if positions is None:
            raise EngineError(
                f"{self._url}: the server returns no log-probabilities of the prompt"
                " (prompt_logprobs), and scoring needs them. Use a vLLM server."
            )
        n = len(target_ids)
        topk_ids = np.empty((n, k), np.int32)
        topk_logprobs = np.empty((n, k), np.float32)
        target_logprobs = np.empty(n, np.float32)
        try:
            if len(positions) != start + n:
                raise ValueError(f"{len(positions)} positions of {start + n}")
            for i, (position, target) in enumerate(zip(positions[start:], target_ids, strict=True)):
                best = sorted(
                    (entry["rank"], int(token), entry["logprob"])
                    for token, entry in position.items()
                )[:k]
                ranks, topk_ids[i], topk_logprobs[i] = zip(*best, strict=True)
                if ranks != tuple(range(1, k + 1)):
                    raise ValueError(f"ranks {ranks[:3]} to {ranks[-1]}")
                target_logprobs[i] = position[str(target)]["logprob"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unexpected("/v1/completions", f"prompt_logprobs: {error}") from error
        for logprobs in (topk_logprobs, target_logprobs):
            logprobs[logprobs <= _NO_PROBABILITY] = -np.inf
        return Scores(key, topk_ids, topk_logprobs, target_logprobs)

    # -- the start ----------------------------------------------------------------------

    async def _check_server(self, tokenizer: Any) -> None:
        """Find the model on the server and try what the stages will need. Raise EngineError."""
        try:
            await self._find_model()
            # A text of tokens from all over the vocabulary.
            size = len(tokenizer)
            some = list(range(0, size, max(1, size // _PROBED_IDS)))
            spelling = Spelling(tokenizer)
            text = spelling.decode(some)
            ids = spelling.encode(text)
            await self._compare_tokenizer(text, ids)
            await self._try_scoring(ids[:8])
        except RequestError as error:
            raise EngineError(f"{self._url}: refuses a first request: {error}") from error

    async def _find_model(self) -> None:
        """Choose the model of that name, or the one that was loaded by it. Raise EngineError."""
        answer = await self._ask("/v1/models", patient=False)
        try:
            entries = {entry["id"]: entry for entry in answer["data"]}
        except (KeyError, TypeError) as error:
            raise self._unexpected("/v1/models", "no list of models") from error
        by_root = {entry.get("root"): entry for entry in entries.values()}
        entry = entries.get(self._model) or by_root.get(self._model)
        if entry is None:
            raise EngineError(
                f"{self._url} serves {', '.join(map(repr, entries)) or 'nothing'}, not"
                f" {self._model!r}. If one of these is the model, name it: --served-model NAME."
            )
        self._model = entry["id"]
        room = entry.get("max_model_len")
        if has_longrope(self._files.text_config) and (room or 0) > self._files.context:
            raise EngineError(
                f"{self._url}: the server runs {self._model} with a context of {room} tokens, and"
                f" here it has {self._files.context_text}. Start the server with --max-model-len"
                f" {self._files.context}."
            )
        if room is not None and room < self.max_model_len:
            raise EngineError(
                f"{self._url}: the server runs {self._model} with a context of {room} tokens, and"
                f" this stage needs {self.max_model_len}. Give --max-model-len {room} here, or a"
                " larger one to the server."
            )

    async def _compare_tokenizer(self, text: str, ids: list[int]) -> None:
        """Raise EngineError where the server encodes a text of many tokens differently."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            answer = await self._ask("/tokenize", body, patient=False)
        except _StatusError as error:
            if error.status in (404, 405):
                return  # a gateway that forwards /v1 alone
            raise
        if not isinstance(answer, dict) or answer.get("tokens") != ids:
            raise EngineError(
                f"{self._url}: {self._model} has another tokenizer on the server than in the files"
                " here, so token ids would mean other text. Serve the model that is named here, in"
                " the same revision."
            )

    async def _try_scoring(self, ids: list[int]) -> None:
        k = self._max_logprobs
        settings = {**_SCORING, "prompt_logprobs": k, "return_token_ids": True}
        try:
            choice = await self._complete(ids, settings, patient=False)
        except RequestError as error:
            raise EngineError(
                f"{self._url}: the server does not score with {k} log-probabilities a token:"
                f" {error}. Start it with --max-logprobs {k} or more, or lower --num-logprobs."
            ) from error
        self._token_ids(choice)
        self._scores("probe", choice, 1, ids[1:], k)


class _StatusError(EngineError):
    """An answer of the server with an HTTP status that ends the job."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _api_key() -> str | None:
    """Return the API key of the environment, None without one. Raise EngineError for a bad one."""
    for name in _KEYS:
        if key := os.environ.get(name):
            # httpx's own error would show the header's value, which is the key.
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise EngineError(f"{name}: has spaces or other characters that no key has.")
            return key
    return None


def _keep_alive() -> list[tuple[int, int, int]]:
    """Return socket options with which TCP notices within two minutes that a machine is gone."""
    wanted = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    tcp = [(getattr(socket, name, None), value) for name, value in wanted]  # not on all systems
    options = [(socket.IPPROTO_TCP, name, value) for name, value in tcp if name is not None]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options]
