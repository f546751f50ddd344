"""Client of a vLLM server: requests over HTTP, weights over a process group. Needs httpx and torch, no vLLM.

Server          one request, or many at once; an EngineError says what to do when no answer comes
WeightSender    weights -> the server's workers, through vLLM's weight-transfer endpoints (grpo/rollout/vllm_worker.py)
"""

import asyncio
import ctypes
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from grpo.errors import ConfigError, EngineError
from grpo.rollout.vllm_worker import rendezvous, transfer_group
from grpo.runtime.device import bind_thread, synchronize

T = TypeVar("T")
CONNECTIONS = 256
"""Largest number of concurrent requests. vLLM queues them itself."""
LIMITS = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=0)
"""One connection per request. The server closes idle connections after a few seconds, and a request on a connection
that is being closed would look like a dead server."""
PARCEL_BYTES = 512 * 2**20
"""Size of the parts in which weights are sent: bounds the memory that sending takes."""
LOOK_EVERY = 5.0
"""Seconds between two health checks of a server that has not answered yet."""


class Server:
    """The server at `url`. It counts as dead after `patience` seconds without an answer."""

    def __init__(self, url: str, patience: float):
        self.url, self.patience = url.rstrip("/"), patience
        # A transport of its own: proxies of the environment (HTTP_PROXY) lead to the internet, not to this server.
        transport = httpx.HTTPTransport(limits=LIMITS)
        self.client = httpx.Client(base_url=self.url, timeout=httpx.Timeout(None, connect=10.0), transport=transport)

    def wait(self) -> None:
        """Wait until the server is up. Raises ConfigError if that takes longer than `patience`."""
        deadline = time.monotonic() + self.patience
        while not self._alive():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no vLLM server answers at {self.url} after {self.patience:g} s. Start one: python "
                    f"launch/vllm_server.py --model THE_SAME_MODEL; or say where it is: --rollout.vllm_server_host, "
                    "--rollout.vllm_server_port"
                )
            time.sleep(1.0)

    def get(self, path: str) -> Any:
        return self._answer(path, lambda: self.client.get(path, timeout=self.patience))

    def post(self, path: str, body: dict | None = None, **query: Any) -> Any:
        return self._answer(path, lambda: self.client.post(path, json=body, params=query, timeout=self.patience))

    def ask_all(self, path: str, bodies: list[dict]) -> list[Any]:
        """Send one POST for each body, many at a time, and return the answers in the order of the bodies.

        There is no timeout as long as the server answers health checks.
        """
        # In a thread of its own: a notebook's has an event loop that is running already.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._ask_all(path, bodies)).result()

    async def _ask_all(self, path: str, bodies: list[dict]) -> list[Any]:
        timeout = httpx.Timeout(None, connect=self.patience)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=timeout, transport=_direct()) as client,
            httpx.AsyncClient(base_url=self.url, timeout=self.patience, transport=_direct()) as watching,
        ):

            async def ask(body: dict) -> Any:
                try:
                    return self._read(path, await client.post(path, json=body))
                except httpx.HTTPError as error:
                    raise self._lost(path, error) from error

            async def watch() -> None:
                while True:
                    await asyncio.sleep(LOOK_EVERY)
                    try:
                        self._read("/health", await watching.get("/health"))
                    except httpx.HTTPError as error:
                        raise self._lost("/health", error) from error

            asked = asyncio.gather(*map(ask, bodies))
            watcher: asyncio.Future[None] = asyncio.ensure_future(watch())
            both: set[asyncio.Future[Any]] = {asked, watcher}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if watcher.done():
                    watcher.result()
                return list(await asked)
            finally:
                for one in both:
                    one.cancel()
                await asyncio.gather(*both, return_exceptions=True)

    def _alive(self) -> bool:
        try:
            return self.client.get("/health", timeout=5.0).is_success
        except httpx.HTTPError:
            return False

    def _answer(self, path: str, call: Callable[[], httpx.Response]) -> Any:
        try:
            return self._read(path, call())
        except httpx.HTTPError as error:
            raise self._lost(path, error) from error

    def _read(self, path: str, response: httpx.Response) -> Any:
        if response.status_code == 404:
            raise EngineError(
                f"the server at {self.url} has no {path}: it was not started for training. Use launch/vllm_server.py, "
                f"which sets VLLM_SERVER_DEV_MODE=1 and the weight transfer"
            )
        if response.status_code >= 500:
            raise EngineError(
                f"vLLM at {self.url} failed ({path}: {_message(response)}). See its own output for the reason, and "
                f"start it again"
            )
        if not response.is_success:
            raise EngineError(f"vLLM at {self.url} refused {path} ({response.status_code}): {_message(response)}")
        return response.json() if response.content else None

    def _lost(self, path: str, error: Exception) -> EngineError:
        return EngineError(
            f"the vLLM server at {self.url} died or does not answer ({path}: {type(error).__name__} {error}). "
            f"See its own output for the reason, and start it again"
        )


def _direct() -> httpx.AsyncHTTPTransport:
    """Return a transport that uses no proxy of the environment."""
    return httpx.AsyncHTTPTransport(limits=LIMITS)


def _message(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


class WeightSender:
    """Sends weights to every worker of a server. Built on the main process only."""

    def __init__(self, server: Server, transport: str, device: torch.device, port: int = 0):
        """Connect to the workers. `transport` is nccl or gloo; port 0 = any free one."""
        self.server, self.transport = server, transport
        self._abandoned = threading.Event()
        self.place = device if transport == "nccl" else torch.device("cpu")
        world = 1 + int(server.get("/get_world_size")["world_size"])
        host = _address_towards(server.url)
        try:
            store = rendezvous(host, port, world, server.patience, master=True)
        except (RuntimeError, OSError) as error:
            raise EngineError(f"rollout.vllm_group_port {port} cannot be opened on {host}: {error}") from error
        body = {
            "host": host,
            "port": store.port,  # type: ignore[attr-defined]
            "world": world,
            "transport": transport,
            "seconds": server.patience,
        }
        self.group = self._alongside(
            lambda: server.post("/init_weight_transfer_engine", {"init_info": body}),
            lambda: transfer_group(store, transport, 0, world, server.patience),
        )

    def send(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Send all weights, clear the server's prefix cache and set its version. Raises EngineError."""
        self._start()
        parcel: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in weights:
            parcel.append((name, tensor.detach().to(self.place).contiguous()))
            size += tensor.numel() * tensor.element_size()
            if size >= PARCEL_BYTES:
                self._send(parcel)
                parcel, size = [], 0
        if parcel:
            self._send(parcel)
        self.server.post("/finish_weight_update", {"weight_version": version})
        forget_prefixes(lambda: self.server.post("/reset_prefix_cache")["success"])
        check_version(self.server, version)

    def _start(self) -> None:
        try:
            self.server.post("/start_weight_update")
        except EngineError as error:
            if "already active" not in str(error):
                raise
            self.server.post("/finish_weight_update")  # of a trainer that died during an update
            self.server.post("/start_weight_update")

    def _send(self, parcel: list[tuple[str, Tensor]]) -> None:
        info = {
            "names": [name for name, _ in parcel],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in parcel],
            "shapes": [list(tensor.shape) for _, tensor in parcel],
        }

        def broadcast() -> None:
            bind_thread(self.place)  # this runs in a thread of its own
            for work in [self.group.broadcast(tensor, 0) for _, tensor in parcel]:
                # Asked again and again: a thread that waits inside torch while the program ends would abort it.
                while not work.is_completed():
                    if self._abandoned.wait(0.0005):
                        return
                work.wait()
            synchronize(self.place)

        self._alongside(lambda: self.server.post("/update_weights", {"update_info": info}), broadcast)

    def _abandon(self) -> None:
        """Stop sending. The destructor of a gloo group waits for pending work, so this group is never destroyed."""
        self._abandoned.set()
        if hasattr(self, "group"):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))

    def _alongside(self, request: Callable[[], Any], ours: Callable[[], T]) -> T:
        """Run two calls that wait for each other, in threads. If one fails, its error is raised at once; the other is
        abandoned, and its thread ends by itself or with the process."""
        answers: dict[str, Any] = {}
        changed = threading.Condition()

        def run(name: str, half: Callable[[], Any]) -> None:
            try:
                result: Any = (half(), None)
            except Exception as error:
                result = (None, error)
            with changed:
                answers[name] = result
                changed.notify()

        for name, half in (("request", request), ("ours", ours)):
            threading.Thread(target=run, args=(name, half), daemon=True).start()
        with changed:
            changed.wait_for(lambda: len(answers) == 2 or any(error for _, error in answers.values()))
            if "ours" in answers and answers["ours"][1] is not None and "request" not in answers:
                changed.wait_for(lambda: "request" in answers, timeout=5.0)  # its reason is usually the better one
        if any(error for _, error in answers.values()):
            self._abandon()
        for name in ("request", "ours"):
            error = answers.get(name, (None, None))[1]
            if isinstance(error, EngineError):
                raise error
            if error is not None:
                raise EngineError(
                    f"the weights did not reach the vLLM server at {self.server.url} over {self.transport}: {error}"
                ) from error
        return answers["ours"][0]


def forget_prefixes(reset: Callable[[], bool], tries: int = 20) -> None:
    """Clear the prefix cache, whose keys and values belong to the old weights. Raises EngineError."""
    for _ in range(tries):
        if reset():
            return
        time.sleep(0.25)  # blocks of a request that has just ended are given back a moment later
    raise EngineError(
        "vLLM did not reset its prefix cache, since something is still using it: the server must serve this run alone"
    )


def check_version(server: Server, version: str) -> None:
    """Raise EngineError unless the server holds the weights that this run sent last."""
    found = server.get("/weight_info")["weight_version"]
    if found != version:
        raise EngineError(
            f"the vLLM server at {server.url} holds weights '{found}', not '{version}', which this run sent last: it "
            f"was started again meanwhile, or another run uses it. Give each run a server of its own"
        )


def check_server(server: Server, longest: int | None) -> str:
    """Check a server before a run and return the name under which it serves the model.

    Raises:
        ConfigError: says how to start the server.
    """
    server.wait()
    try:
        served = server.get("/v1/models")["data"][0]
        server.get("/weight_info")
    except EngineError as error:
        raise ConfigError(str(error)) from error
    room = served.get("max_model_len")
    if room is not None and longest is not None and longest > room:
        raise ConfigError(
            f"the vLLM server at {server.url} has room for {room} tokens, but data.max_prompt_length + "
            f"sampling.max_completion_length is {longest}: start it with --max-model-len {longest}"
        )
    return str(served["id"])


def _address_towards(url: str) -> str:
    """Return the address of this machine in the network of the server."""
    place = urlsplit(url)
    try:
        with socket.create_connection((place.hostname or "127.0.0.1", place.port or 80), timeout=10) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise EngineError(f"the vLLM server at {url} does not answer: {error}") from error
