"""Talks to one HTTP server: bounded requests, retries of named failures, a circuit that stops when it is gone.

Any number of threads share one bound, one pool of connections and one view of whether the server is there. Retried are:
failures to connect, to send or to read, an answer that takes too long, and

    408, 425 (try again), 429 (too many requests), 500 (a crashing engine and a passing fault look the same from here)
    502, 503, 504 (nobody behind the proxy, overloaded or starting)

Everything else is an error at once, with the server's own words. A request that keeps failing ends `deadline` seconds
after its first failure, and not before its third. When the server seems to be away (no connection, a broken one, 502
to 504), nothing is sent but one small question at a time, until it answers or the deadline has passed; a success of any
request ends the wait.

The key travels in the Authorization header alone and is cut out of every message. Redirects are not followed. Proxies
come from the environment as usual (HTTPS_PROXY, NO_PROXY), but never for this machine itself. Units: seconds, bytes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import pydantic_core
import stamina

from fire_data.http_calls import Calls
from fire_data.http_dialect import Malformed
from fire_data.http_words import (
    authorization,
    base_url,
    is_certificate,
    is_this_machine,
    own_words,
    printable,
    retry_after_seconds,
)
from fire_data.schemas.config import HttpConfig
from fire_data.schemas.errors import ConfigError, EngineError, FireError

T = TypeVar("T")
Warn = Callable[[str], None]

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_AWAY = frozenset({502, 503, 504})
_BROKEN = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.ReadTimeout,
    httpx.WriteError,
    httpx.WriteTimeout,
    httpx.RemoteProtocolError,
)
_ATTEMPTS = 3  # at least, however late: a long answer may be hit by two restarts that are hours apart
_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 4.0  # uvicorn closes idle connections after 5: do not reuse one that is about to go
_SMALL = 1 << 20  # bytes of an answer that holds no tokens
# Retries are not news to be logged by a library; where logging is set up they still appear.
logging.getLogger("stamina").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Answer:
    """What the server said in the end. `status` is not one that is retried; `says` are its words where it refused."""

    status: int
    body: bytes
    says: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class _Failed(Exception):
    """One attempt failed in a way that the next may not. `away`: nobody seems to be there."""

    def __init__(self, text: str, *, away: bool, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.away = away
        self.retry_after = retry_after


class HttpClient:
    """One server. `warn` is told, from another thread, when the server goes away and when it is back."""

    def __init__(
        self, url: str, *, settings: HttpConfig, api_key: str | None, who: str, warn: Warn | None = None
    ) -> None:
        self.url = base_url(url, who)
        self.root = self.url.removesuffix("/v1")
        self.who = who
        self.settings = settings
        self._key = api_key
        self._warn = warn or (lambda _text: None)
        self._http = _connections(self.url, settings, authorization(api_key, who), who)
        self._waits = _waits(settings.deadline)
        self._reachable = asyncio.Event()
        self._reachable.set()
        self._recovery: asyncio.Task[None] | None = None
        self.calls = Calls(f"http: {who}", settings.concurrency, f"{who}: the connection to {self.url} was closed")

    async def post(
        self, url: str, body: dict[str, Any], read: Callable[[Any], T], *, where: str, limit: int = _SMALL
    ) -> T:
        """What `read` makes of the JSON that the server answers to `body`.

        Raises ConfigError or EngineError with the server's words if it refuses, EngineError if it cannot be reached
        in time, answers more than `limit` bytes, or something that is no JSON or that `read` calls Malformed.
        """
        answer = await self.ask("POST", url, body, where=where, limit=limit)
        if not answer.ok:
            raise self.refusal(answer, where)
        return await asyncio.to_thread(self.read, answer, read, where)

    async def ask(
        self, method: str, url: str, body: dict[str, Any] | None = None, *, where: str, limit: int = _SMALL,
        deadline: float | None = None,
    ) -> Answer:  # fmt: skip
        """The server's answer, whatever its status, after retries. With a `deadline` of its own the request neither
        waits for the circuit nor moves it: for the first question of all."""
        patience = self.settings.deadline if deadline is None else deadline
        failures: list[float] = []

        def again(error: Exception) -> bool | float:
            if not isinstance(error, _Failed):
                return False
            failures.append(time.monotonic())
            left = failures[0] + patience - failures[-1]
            if left <= 0 or error.retry_after is None:
                return left > 0 or len(failures) < _ATTEMPTS
            return min(error.retry_after * random.uniform(1.0, 1.25), left)

        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            async for attempt in stamina.retry_context(on=again, attempts=None, timeout=None, **self._waits):
                with attempt:
                    if deadline is None:
                        await self._reachable.wait()
                    try:
                        answer = await self._attempt(method, url, content, where, limit, self.settings.timeout)
                    except _Failed as failed:
                        if failed.away and deadline is None:
                            self._lost(str(failed))
                        raise
                    self._found()
                    return answer
        except _Failed as failed:
            spent = failures[-1] - failures[0] if failures else 0.0
            text = f"{self.who}: {self.url} failed {len(failures)} times in {spent:.0f} s to answer this: {failed}"
            fix = "look into the server's log; the same command continues with what is missing"
            raise EngineError(text, where=where, fix=fix) from None
        raise AssertionError("the loop above returns or raises")

    async def _attempt(
        self, method: str, url: str, content: bytes | None, where: str, limit: int, seconds: float
    ) -> Answer:
        try:
            async with asyncio.timeout(seconds), self._http.stream(method, url, content=content) as response:
                body = await self._body(response, where, limit)
        except TimeoutError:
            raise _Failed(f"no whole answer within {seconds:g} s (http.timeout)", away=True) from None
        except _BROKEN as error:
            if is_certificate(error):
                fix = "SSL_CERT_FILE=/path/to/ca.pem names a certificate authority of your own"
                raise EngineError(self._clean(f"{self.who}: {self.url}: {error}"), where=where, fix=fix) from None
            raise _Failed(self._clean(f"{type(error).__name__}: {error}"), away=True) from None
        except httpx.HTTPError as error:
            text = f"{self.who}: asking {self.url} failed: {type(error).__name__}: {error}"
            raise EngineError(self._clean(text), where=where) from None
        status = response.status_code
        says = "" if status < 300 else self._clean(f"{status} {response.reason_phrase}: {own_words(body)}")
        if status in _RETRIED:
            raise _Failed(
                says, away=status in _AWAY, retry_after=retry_after_seconds(response.headers.get("Retry-After"))
            )
        return Answer(status, body, says)

    async def _body(self, response: httpx.Response, where: str, limit: int) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > limit:
                raise EngineError(f"{self.who}: {self.url} answered more than {limit} bytes", where=where)
            parts.append(part)
        return b"".join(parts)

    def read(self, answer: Answer, read: Callable[[Any], T], where: str) -> T:
        """`read` of the JSON of an answer; EngineError where that is impossible."""
        try:
            return read(pydantic_core.from_json(answer.body))
        except Malformed as error:
            text = f"{self.who}: the answer of {self.url} cannot be used: {error}"
            raise EngineError(self._clean(text), where=where) from None
        except ValueError:
            text = f"{self.who}: {self.url} answered with something that is no JSON: {own_words(answer.body)!r}"
            raise EngineError(self._clean(text), where=where) from None

    def refusal(self, answer: Answer, where: str) -> FireError:
        """The error for an answer that is not a success."""
        text = f"{self.who}: {self.url} refused: {answer.says}"
        if answer.status in (401, 403):
            fix = "export the server's key and name its variable: api_key_env (of the student or teacher)"
            return ConfigError(text, where=where, fix=fix)
        if 300 <= answer.status < 400:
            text = f"{self.who}: {self.url} redirects elsewhere ({answer.status}), which is not followed"
            return ConfigError(text, where=where, fix="set url to the address that the server really has")
        if answer.status == 404:
            return ConfigError(text, where=where, fix="url is the base address, such as http://host:8000/v1")
        return EngineError(text, where=where)

    def _lost(self, why: str) -> None:
        if self._reachable.is_set():
            self._reachable.clear()
            self._recovery = self.calls.loop.create_task(self._recover(why))

    def _found(self) -> None:
        if self._reachable.is_set():
            return
        self._reachable.set()
        if self._recovery is not None and self._recovery is not asyncio.current_task():
            self._recovery.cancel()

    async def _recover(self, why: str) -> None:
        """Ask for the list of models until there is an answer of any kind, or else end all calls."""
        seconds = self.settings.deadline
        self._warn(f"{self.who}: {self.url} does not answer ({why}); waiting for it, {seconds:g} s at most")
        try:
            async with asyncio.timeout(seconds):
                async for attempt in stamina.retry_context(on=_Failed, attempts=None, timeout=None, **self._waits):
                    with attempt:
                        try:
                            await self._attempt("GET", f"{self.url}/models", None, "", _SMALL, _CONNECT_SECONDS)
                        except _Failed as failed:
                            why = str(failed)
                            if failed.away:
                                raise
                        except EngineError:
                            pass  # it talks: what it says is for the requests to judge
            self._warn(f"{self.who}: {self.url} is back")
            self._found()
        except TimeoutError:
            self._reachable = asyncio.Event()  # who waits for the old one is cancelled below
            self._reachable.set()
            text = f"{self.who}: nothing but failures from {self.url} for {seconds:g} s: {why}"
            fix = "start the server again; the same command continues where this one stopped"
            self.calls.end_all(EngineError(text, fix=fix))

    def close(self) -> None:
        """End all requests and the thread. More than once does no harm."""
        self.calls.close(self._http.aclose)

    def _clean(self, text: str) -> str:
        return printable(text, self._key)


def _connections(url: str, settings: HttpConfig, headers: dict[str, str], who: str) -> httpx.AsyncClient:
    size = settings.concurrency + 1
    try:
        return httpx.AsyncClient(
            headers={"Content-Type": "application/json", **headers},
            timeout=httpx.Timeout(settings.timeout, connect=min(_CONNECT_SECONDS, settings.timeout), pool=None),
            limits=httpx.Limits(max_connections=size, max_keepalive_connections=size, keepalive_expiry=_IDLE_SECONDS),
            follow_redirects=False,
            # The environment's certificates are for all servers, its proxies for other machines than this one.
            verify=httpx.create_ssl_context(),
            trust_env=not is_this_machine(httpx.URL(url).host),
        )
    except (ImportError, ValueError) as error:
        text = f"{who}: the proxy that the environment names for {url} cannot be used: {error}"
        raise ConfigError(text, fix="pip install 'httpx[socks]', or NO_PROXY with the server's name") from None


def _waits(deadline: float) -> dict[str, Any]:
    """Pauses between attempts, in seconds: doubling, with jitter, and short where the deadline is."""
    return {
        "wait_initial": min(0.5, deadline / 20),
        "wait_max": min(10.0, deadline / 4),
        "wait_jitter": min(1.0, deadline / 10),
    }
