"""A stand-in for a vLLM server: the same endpoints over HTTP, weights over the same process group, tokens
from our native engine. It tests errors of the protocol, and a run whose server dies."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM

from grpo.models.logprob_model import use_grpo_attention
from grpo.rollout.engine import build_engine
from grpo.rollout.vllm_worker import Parcel, Rendezvous, rendezvous, transfer_group
from grpo.types import Prompt, SamplingPlan
from tests.fakes import CharTokenizer


class FakeVLLM:
    """Server for `with FakeVLLM(model_folder) as server: server.url`.

    `fails` maps paths to faults: an int is a status, "drop" closes the connection, "hang" never answers.
    """

    def __init__(self, folder: Path | None = None, room: int = 4096):
        self.fails: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        self.room, self.version, self.resets = room, "as started", True
        self.received: dict[str, torch.Tensor] = {}
        self.lose: str | None = None
        """Part of the name of weights that it receives but never uses."""
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.model = None
        if folder is not None:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
            use_grpo_attention(self.model.eval())
            self.engine = build_engine("native", self.model, CharTokenizer(), slots=64, uses_packed_attention=True)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._answer(json.loads(self.rfile.read(length)) if length else None)

            def _answer(self, body: Any) -> None:
                path = urlsplit(self.path).path
                failure = fake.fails.get(path)
                if failure == "hang":
                    fake.closed.wait()
                if failure in ("drop", "hang"):
                    self.close_connection = True
                    return
                fake.asked.append((path, body))
                status, answer = (
                    (failure, {"error": {"message": "as asked"}}) if failure else (200, fake.answer(path, body))
                )
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "FakeVLLM":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "the-model", "max_model_len": self.room}]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/init_weight_transfer_engine":
            there = Rendezvous(**body["init_info"])
            store = rendezvous(there.host, there.port, there.world, there.seconds, master=False)
            self.group = transfer_group(store, there.transport, 1, there.world, there.seconds)
        if path == "/update_weights":
            parcel = Parcel(**body["update_info"])
            for name, dtype, shape in zip(parcel.names, parcel.dtypes, parcel.shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self.group.broadcast(tensor, 0).wait()
                self.received[name] = tensor
        if path == "/finish_weight_update":
            self.version = (body or {}).get("weight_version", self.version)
            if self.model is not None:
                used = {name: value for name, value in self.received.items() if not self.lose or self.lose not in name}
                self.model.load_state_dict(used, strict=False)
        if path == "/reset_prefix_cache":
            return {"success": self.resets}
        if path == "/v1/completions":
            return self.complete(body)
        return {}

    def complete(self, body: Any) -> Any:
        assert self.model is not None
        assert body["ignore_eos"] and body["logprobs"] == 0 and (body["top_p"], body["top_k"]) == (1.0, 0)
        plan = SamplingPlan(body["n"], body["max_tokens"], body["temperature"], body["seed"])
        with self.lock, torch.no_grad():
            (group,) = self.engine.generate([Prompt(0, "", tuple(body["prompt"]))], plan)
        choices = [
            {
                "index": index,
                "token_ids": one.token_ids,
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": one.logprobs},
            }
            for index, one in enumerate(group.completions)
        ]
        return {"choices": choices[::-1]}  # in whatever order
