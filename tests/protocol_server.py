"""A server that speaks the completions protocol of vLLM over a tiny model, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fire_data.sampling import Sampling, processed_logprobs

Body = dict[str, Any]
Reply = tuple[int, dict[str, str], bytes]

VOCAB = 290


def byte_tokenizer(text: str = "the quick brown fox", **roles: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: knows any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|user|>"],
        show_progress=False,
    )
    backend.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **roles)


def byte_model(seed: int = 0) -> Any:
    """A random Qwen3 over the ids of `byte_tokenizer`, neither flat nor certain of anything."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.25, tie_word_embeddings=False,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return Qwen3ForCausalLM(config).eval()


class ProtocolServer:
    """One model on a port of 127.0.0.1. Attributes are switches and may be changed while it runs.

    Attributes:
        dialect: vllm, echo (without prompt_logprobs) or none.
        exact: it runs the extension that gives entropies.
        processed: sampled logprobs are those of the distribution sampled from.
        gives_ids: answers hold token ids.
        tokenizes: /tokenize exists; counts: usage is told.
        shift: 1 or -1: prompt logprobs are off by a position, ids and all; `shift_values`: the values alone.
        end: the id that ends a response, unless it is told to ignore it.
        key: the key that it wants. slow: seconds before every answer of /completions.
        replies: sent instead of the next answers of /completions, first come, first served.
        refuse: body -> a reply instead of the answer, or None.
        mangle: what is done to every answer of /completions before it is sent.
        die_after: answers of /completions after which it is gone, with whatever is in flight.
        away: 503 for everything, as from a proxy with nobody behind it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "tiny") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.root: str | None = None
        self.max_model_len: int | None = 256
        self.dialect, self.exact, self.processed = "vllm", False, False
        self.gives_ids, self.tokenizes, self.counts = True, True, True
        self.shift = self.shift_values = 0
        self.key: str | None = None
        self.end = 0
        self.slow = 0.0
        self.replies: list[Reply] = []
        self.refuse: Callable[[Body], Reply | None] = lambda _body: None
        self.mangle: Callable[[Body], Any] = lambda answer: answer
        self.die_after: int | None = None
        self.away = False
        self.asked: list[tuple[str, Body]] = []  # path and body of all requests
        self.headers: list[dict[str, str]] = []
        self._answered: list[Body] = []
        self.most = 0  # requests of /completions at the same time
        self._now = self._granted = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Listen, on the port of before if there was one."""
        self._http = _Http(("127.0.0.1", self.port), _handler(self))
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """Stop listening and break every connection."""
        with self._lock:
            http, self._http = self._http, None
            connections = list(self._connections)
        if http is None:
            return
        http.socket.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=http.shutdown, daemon=True).start()

    def _is_over(self) -> bool:
        return self.die_after is not None and self._granted >= self.die_after

    def _die_when_answered(self) -> None:
        _ = self.answered
        self.die()

    @property
    def answered(self) -> list[Body]:
        """Bodies of /completions that got their answer; waits for those whose answer is being sent."""
        while len(self._answered) < self._granted:
            time.sleep(0.001)
        return self._answered

    def scored(self) -> list[tuple[int, ...]]:
        """Prompts that were answered."""
        return [tuple(body["prompt"]) for body in self.answered]

    @contextlib.contextmanager
    def request(self, path: str, body: Body, headers: dict[str, str]) -> Iterator[Reply]:
        """The reply to a request, counted while it is worked on and sent."""
        with self._lock:
            self.asked.append((path, body))
            self.headers.append(headers)
        if self.away:
            yield _json({"error": "no backend"}, 503)
            return
        if path != "/v1/completions":
            yield self._other(path, body)
            return
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            reply = self._completions(body, headers)
            if self._http is None:
                raise ConnectionResetError
            with self._lock:
                if self._is_over():
                    threading.Thread(target=self._die_when_answered, daemon=True).start()
                    raise ConnectionResetError
                self._granted += reply[0] == 200
            sent = False
            try:
                yield reply
                sent = True
            finally:
                with self._lock:
                    if reply[0] == 200 and sent:
                        self._answered.append(body)
                    elif reply[0] == 200:
                        self._granted -= 1
        finally:
            with self._lock:
                self._now -= 1

    def _other(self, path: str, body: Body) -> Reply:
        if path == "/v1/models":
            if self._is_over():
                raise ConnectionResetError
            entry = {"id": self.name, "object": "model", "root": self.root, "max_model_len": self.max_model_len}
            return _json({"object": "list", "data": [entry]})
        if path == "/tokenize" and self.tokenizes:
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))
            return _json({"count": len(ids), "tokens": ids, "max_model_len": self.max_model_len})
        return _json({"detail": "Not Found"}, 404)

    def _completions(self, body: Body, headers: dict[str, str]) -> Reply:
        with self._lock:
            reply = self.replies.pop(0) if self.replies else None
        reply = reply or self.refuse(body)
        if reply is not None:
            return reply
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return _json({"error": {"message": f"wrong key {headers.get('Authorization')}", "code": 401}}, 401)
        if body["model"] != self.name:
            return _json({"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404)
        time.sleep(self.slow)
        with self._lock:
            answer = self.mangle(self._answer(body))
        return answer if isinstance(answer, tuple) else _json(answer)

    def _answer(self, body: Body) -> Body:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        echo = bool(body.get("echo")) and self.dialect in ("vllm", "echo")
        ids, logprobs_TV = self._generate(prompt, body) if body["max_tokens"] else ([], torch.zeros(0, VOCAB))
        choice: Body = {"index": 0, "text": "", "finish_reason": "stop" if ids[-1:] == [self.end] else "length"}
        if body.get("prompt_logprobs") is not None and self.dialect == "vllm":
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt, body["prompt_logprobs"])
        if body.get("logprobs") is not None and (not body.get("echo") or echo):
            k = body["logprobs"]
            shown, rows_TV = ids, logprobs_TV
            if echo:
                shown, rows_TV = prompt + ids, torch.cat([self._logprobs(prompt)[:-1], logprobs_TV])
                rows_TV = torch.cat([torch.full((1, VOCAB), torch.nan), rows_TV])
            choice["logprobs"] = self._legacy(shown, rows_TV, k, echo)
        if body.get("return_token_ids") and self.gives_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        answer: Body = {"object": "text_completion", "model": self.name, "choices": [choice]}
        if self.counts:
            answer["usage"] = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return answer

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logprobs: torch.Tensor = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return logprobs

    def _generate(self, prompt: list[int], body: Body) -> tuple[list[int], torch.Tensor]:
        """Ids and the rows of logprobs that are reported of them."""
        random = torch.Generator().manual_seed(body.get("seed") or 0)
        greedy = body.get("temperature") == 0
        top_k = max(0, body.get("top_k", 0))
        sampling = Sampling(0, body.get("temperature") or 1.0, body.get("top_p", 1.0), top_k)
        ids: list[int] = []
        rows = []
        while len(ids) < body["max_tokens"]:
            raw_1V = self._logprobs(prompt + ids)[-1:]
            drawn_1V = processed_logprobs(raw_1V, sampling)
            token = raw_1V.argmax() if greedy else torch.multinomial(drawn_1V[0].exp(), 1, generator=random)
            ids.append(int(token))
            rows.append(drawn_1V.float() if self.processed and not greedy else raw_1V)
            if ids[-1] in body.get("stop_token_ids", ()) or (ids[-1] == self.end and not body.get("ignore_eos")):
                break
        return ids, torch.cat(rows)

    def _prompt_logprobs(self, prompt: list[int], k: int) -> list[Any]:
        logprobs_TV = self._logprobs(prompt)
        logprobs_TV = logprobs_TV.roll(self.shift_values, 0) if self.shift_values else logprobs_TV
        entries: list[Any] = [None]
        for token, row_V in zip(prompt[1:], logprobs_TV, strict=False):
            rank = int((row_V >= row_V[token]).sum())
            entry = {str(token): _entry(row_V[token], rank)}
            top = row_V.topk(1 if self.exact and k == 2 else k)
            for place, (value, i) in enumerate(zip(top.values, top.indices.tolist(), strict=True), 1):
                entry.setdefault(str(i), _entry(value, place))
            if self.exact and k == 2:
                slot = next(i for i in ("0", "1", "2") if i not in entry)
                entry[slot] = _entry(-(row_V.exp() * row_V).sum(), 2)
            entries.append(entry)
        return self._shifted(entries)

    def _shifted(self, values: list[Any]) -> list[Any]:
        if not self.shift:
            return values
        return [*values[1:], None] if self.shift > 0 else [None, *values[:-1]]

    def _legacy(self, ids: list[int], rows_TV: torch.Tensor, k: int, echo: bool) -> Body:
        name = "token_id:{}".format if self.gives_ids else self.tokenizer.decode
        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for token, row_V in zip(ids, rows_TV, strict=True):
            if row_V.isnan().any():
                own.append(None)
                top.append(None)
                continue
            best = row_V.topk(k)
            own.append(max(float(row_V[token]), -9999.0))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top.append({name(token): own[-1]} | {name(i): max(v, -9999.0) for i, v in pairs})
        own, top = (self._shifted(values) if echo else values for values in (own, top))
        return {"tokens": [name(i) for i in ids], "token_logprobs": own, "top_logprobs": top}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A broken connection is nothing to print."""


def _entry(value: torch.Tensor, rank: int) -> Body:
    return {"logprob": float(value), "rank": rank, "decoded_token": "x"}


def _json(answer: Any, status: int = 200) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def _handler(server: ProtocolServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and content in one packet: two would wait for each other's acknowledgement

        def setup(self) -> None:
            super().setup()
            server._connections.add(self.connection)

        def finish(self) -> None:
            server._connections.discard(self.connection)
            with contextlib.suppress(OSError):
                super().finish()

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Body) -> None:
            try:
                with server.request(self.path, body, dict(self.headers)) as (status, headers, content):
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(content))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                    self.wfile.flush()
            except OSError:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: Any) -> None:
            """Tests are quiet."""

    return Handler
