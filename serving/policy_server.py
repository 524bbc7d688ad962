"""A policy behind openpi's websocket protocol, for robot clients and for evaluators of policies.

On connecting a client gets the metadata. Then each of its messages is answered: with a chunk, or, as a text, with the
sentence that says what is wrong with the message, after which the connection goes on. `GET /healthz` is answered at any
time: decisions are made in a thread of their own, one after the other in the order in which they were asked for.
"""

import asyncio
import errno
import hmac
import http
import ipaddress
import logging
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HandshakeRequest
from websockets.http11 import Response

from errors import BadInput, is_out_of_memory
from serving.libero_message import Request, RequestReader
from serving.messages import BadMessage, packed, unpacked

HEALTH = "/healthz"
MOST_CLIENTS = 64
SECONDS_TO_CLOSE = 2.0  # that a client has to answer a goodbye

Decide = Callable[[Request], np.ndarray]  # one connection's requests -> chunks (H, 7)


class PolicyServer:
    """`async with PolicyServer(...) as server` listens until the block ends; `server.port` says where."""

    def __init__(
        self,
        begin: Callable[[], Decide],
        reader: RequestReader,
        metadata: dict,
        host: str,
        port: int,
        api_key: str | None = None,
    ):
        """begin: what decides for a new connection. api_key: what a client has to name, None for nothing."""
        self.begin, self.reader, self.metadata = begin, reader, metadata
        self.host, self.asked_port, self.api_key = host, port, api_key
        self.clients = self.most_clients = self.decisions = 0
        self.thread = ThreadPoolExecutor(1, "decisions")  # one thread: a decision's bits do not depend on others
        self.listening: Server | None = None

    async def __aenter__(self) -> "PolicyServer":
        """Raises BadInput where it cannot listen."""
        logging.getLogger("websockets").setLevel(logging.CRITICAL)  # a client that gives up is no news
        try:
            self.listening = await serve(
                self._converse, self.host, self.asked_port, process_request=self._admit, compression=None,
                max_size=self.reader.largest_message, max_queue=2, close_timeout=SECONDS_TO_CLOSE,
                origins=[None],  # no browser's page: any website could speak to this machine through one
            )  # fmt: skip
        except OSError as problem:
            raise BadInput(_cannot_listen(self.host, self.asked_port, problem)) from None
        return self

    async def __aexit__(self, *problem) -> None:
        assert self.listening is not None
        self.listening.close()
        await self.listening.wait_closed()
        self.thread.shutdown()

    @property
    def port(self) -> int:
        assert self.listening is not None
        return next(iter(self.listening.sockets)).getsockname()[1]

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ws://{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether other machines are kept out."""
        assert self.listening is not None
        return all(ipaddress.ip_address(one.getsockname()[0]).is_loopback for one in self.listening.sockets)

    def _admit(self, connection: ServerConnection, request: HandshakeRequest) -> Response | None:
        if request.path == HEALTH:
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self.api_key is not None:
            found = request.headers.get_all("Authorization")
            expected = f"Api-Key {self.api_key}"
            if len(found) != 1 or not hmac.compare_digest(found[0].encode(errors="replace"), expected.encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected Authorization: Api-Key <key>\n")
        if self.clients >= MOST_CLIENTS:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_CLIENTS} clients are connected\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        self.clients += 1
        self.most_clients = max(self.most_clients, self.clients)
        try:
            await connection.send(packed(self.metadata))
            decide, previous_ms = self.begin(), None
            async for message in connection:
                start = time.perf_counter()
                answer = await self._answer(decide, message, previous_ms)
                await connection.send(answer)
                if isinstance(answer, bytes):
                    previous_ms = _ms_since(start)
        except ConnectionClosed:
            pass  # without a goodbye
        except Exception:  # a mistake of this program's: the other clients are served on
            traceback.print_exc(file=sys.stderr)
            await connection.close(1011, "internal error; the server's own output has it")
        finally:
            self.clients -= 1

    async def _answer(self, decide: Decide, message: str | bytes, previous_ms: float | None) -> str | bytes:
        """A chunk as bytes, or one sentence."""
        try:
            if isinstance(message, str):
                raise BadMessage("the message is a text, expected msgpack in a binary one")
            request = self.reader.read(unpacked(message))
            chunk, ms = await asyncio.get_running_loop().run_in_executor(self.thread, _timed, decide, request)
        except (BadMessage, BadInput) as mistake:
            return f"{mistake}"
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            return "the server is out of memory; ask again later"
        self.decisions += 1
        timing = {"infer_ms": ms} | ({} if previous_ms is None else {"prev_total_ms": previous_ms})
        return packed({"actions": chunk, "server_timing": timing})


@contextmanager
def in_background(server: PolicyServer) -> Iterator[PolicyServer]:
    """Listens in a thread of its own until the block ends. Raises BadInput where it cannot."""
    listens, problems = threading.Event(), []

    async def listen() -> None:
        try:
            async with server:
                ended.set_result((asyncio.Event(), asyncio.get_running_loop()))
                listens.set()
                await ended.result()[0].wait()
        except BadInput as problem:
            problems.append(problem)
            listens.set()

    ended: Future = Future()
    thread = threading.Thread(target=lambda: asyncio.run(listen()), name="policy server")
    thread.start()
    listens.wait()
    try:
        if problems:
            raise problems[0]
        yield server
    finally:
        if not problems:
            event, loop = ended.result()
            loop.call_soon_threadsafe(event.set)
        thread.join()


def _timed(decide: Decide, request: Request) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    chunk = decide(request)
    return chunk, _ms_since(start)


def _ms_since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)


def _cannot_listen(host: str, port: int, problem: OSError) -> str:
    if isinstance(problem, socket.gaierror):
        return f"--host {host}: no address of this machine is known by that name"
    if problem.errno == errno.EADDRINUSE:
        return f"--port {port}: another program listens there already; choose another, or 0 for any that is free"
    if problem.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: is no address of this machine"
    if problem.errno == errno.EACCES:
        return f"--port {port}: may not be used by this user; choose one from 1024 on"
    return f"--host {host} --port {port}: cannot listen there ({problem.strerror or problem})"
