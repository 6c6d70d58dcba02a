"""What the world sees of a SuperLink: TLS, and of its HTTP interfaces the nodes' alone.

Flower serves nodes, control and running apps at one port, and control and apps are open to whoever reaches
it: a stranger could start an app of his own on the server. So the SuperLink listens on this machine only, and
this process hands the requests of known nodes on, none longer than a limit. Whom it turns away it says in a
line, which `federa serve` tells on.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from federa.flower.certs import node_keys

NODES = "/v1/fleet"
REFUSED = "refused"  # how a line about a caller begins
MOST_REFUSALS = 100  # that are told; strangers can make as many as they like
KEY = "flwr-public-key"  # the header in which a node says its own
STAMP = "flwr-timestamp"  # and that which it signs: when it asks
REMEMBERED = 400.0  # seconds; the SuperLink takes what was signed up to 305 seconds ago, or 5 ahead
SMALL = 1 << 16  # bytes of a request that is read before it is handed on: nearly all are
AT_ONCE = (
    4  # small requests at the SuperLink, which works at one at a time: the server's own wait behind these
)
KEEP_ALIVE = 60  # seconds; a TLS handshake for every look at the post would be most of the work
HOP = {"host", "connection", "transfer-encoding", "keep-alive", "upgrade"}  # of one connection alone
HOP_BACK = HOP - {"host"}


_told: set[str] = set()


def _refused(who: str, why: str) -> None:
    line = f"{REFUSED} {who}: {why}"
    if line not in _told and len(_told) < MOST_REFUSALS:
        _told.add(line)
        print(line, flush=True)


class LoudTLS(ssl.SSLObject):
    """TLS that says why a handshake failed; asyncio keeps it to itself."""

    def do_handshake(self) -> None:
        """See `ssl.SSLObject.do_handshake`."""
        with self._loud():
            super().do_handshake()

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """See `ssl.SSLObject.read`; with TLS 1.3 the caller's refusal comes after the handshake."""
        with self._loud():
            return super().read(len, buffer) if buffer is not None else super().read(len)

    @staticmethod
    @contextmanager
    def _loud() -> Iterator[None]:
        try:
            yield
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            _refused("a caller", f"no TLS with it ({reason})")
            raise


class _TooLongError(Exception):
    """A request's body is longer than the limit."""


async def _body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield a request's body as it comes; stop where it gets too long.

    Raises:
        _TooLongError: it does.
    """
    length = 0
    async for part in request.stream():
        length += len(part)
        if length > limit:
            raise _TooLongError
        yield part


def _length(request: Request, limit: int) -> int:
    """Return how long a request says its body is; the limit, if it does not say.

    Raises:
        _TooLongError: longer than the limit.
    """
    length = request.headers.get("content-length", "")
    if length and (not length.isdigit() or int(length) > limit):
        raise _TooLongError
    return int(length or limit)


def _who(request: Request) -> str:
    return request.client.host if request.client is not None else "a caller"


def _key(request: Request) -> bytes:
    """Return the key that a caller says it has; that it has it, the SuperLink finds out."""
    try:
        return base64.b64decode(request.headers.get(KEY, ""), validate=True)
    except ValueError:
        return b""


class Once:
    """Knows what was signed a short while ago: the SuperLink would take it again."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[bytes, str], float] = OrderedDict()

    def take(self, key: bytes, stamp: str) -> bool:
        """Return whether a caller has not signed this before."""
        now = time.monotonic()
        while self._seen and now - next(iter(self._seen.values())) > REMEMBERED:
            self._seen.popitem(last=False)
        new = (key, stamp) not in self._seen
        self._seen.setdefault((key, stamp), now)
        return new

    def forget(self, key: bytes, stamp: str) -> None:
        """Forget what had no effect: whoever makes it up, and signs nothing, could fill this memory."""
        self._seen.pop((key, stamp), None)


def make_gateway(upstream: str, ca: Path, limit: int, keys: Collection[bytes]) -> Starlette:
    """Return the application.

    Args:
        upstream: host and port of the SuperLink, on this machine.
        ca: the certificate that it is signed by.
        limit: of a request's body, in bytes.
        keys: the nodes' public ones, in PEM.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Each node has connections of its own: httpx looks at all of a pool's for every request.
        trusted = ssl.create_default_context(cafile=str(ca))
        kept = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE)
        url = f"https://{upstream}"
        async with AsyncExitStack() as stack:
            app.state.clients = {}
            for key in keys:
                client = httpx.AsyncClient(base_url=url, verify=trusted, timeout=120, limits=kept)
                app.state.clients[key] = await stack.enter_async_context(client)
            yield

    slots, once = asyncio.Semaphore(AT_ONCE), Once()

    async def ask(client: httpx.AsyncClient, request: Request, length: int) -> httpx.Response:
        headers = {name: value for name, value in request.headers.items() if name not in HOP}
        small = length <= SMALL
        body = b"".join([part async for part in _body(request, SMALL)]) if small else _body(request, limit)
        asked = client.build_request("POST", request.url.path, content=body, headers=headers)
        async with slots if small else nullcontext():  # a long one takes as long as its sender's link does
            return await client.send(asked, stream=True)

    async def forward(request: Request) -> Response:
        key, stamp = _key(request), request.headers.get(STAMP, "")
        client: httpx.AsyncClient | None = request.app.state.clients.get(key)
        if client is None:
            _refused(_who(request), "it has no key of a node of this federation")
            return PlainTextResponse("no key of a node of this federation", 401)
        if stamp and not once.take(key, stamp):
            _refused(_who(request), "what it says was said before, with the same signature")
            return PlainTextResponse("said before, with the same signature", 401)
        answer = await hand_on(client, request)
        if answer.status_code != 200:
            once.forget(key, stamp)
        return answer

    async def hand_on(client: httpx.AsyncClient, request: Request) -> Response:
        try:
            answer = await ask(client, request, _length(request, limit))
        except _TooLongError:
            _refused(_who(request), f"a request longer than {limit} bytes")
            return PlainTextResponse(f"longer than {limit} bytes", 413)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink is not there", 503)
        if answer.status_code in (401, 403):
            _refused(_who(request), "its signature is not that of its key, or too old")
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BACK}
        whole = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=whole)

    return Starlette(routes=[Route(NODES + "/{name}", forward, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="federa-gateway")
    for name in ("host", "upstream", "certs"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True)
    words = parser.parse_args()
    certs = Path(words.certs)
    config = uvicorn.Config(
        make_gateway(words.upstream, certs / "ca.crt", words.limit, set(node_keys(certs).values())),
        host=words.host,
        port=words.port,
        ssl_certfile=certs / "server.crt",
        ssl_keyfile=certs / "server.key",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.sslobject_class = LoudTLS
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
