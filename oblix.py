#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["psutil"]
# ///
"""Oblix: one OpenAI-compatible endpoint in front of the local model and the cloud.

A person copies this file onto a device and runs `python oblix.py`.  Any OpenAI client then talks to
http://localhost:62549/v1.  With model="auto" a request is answered by the local model (Ollama) while the device
can, and by a cloud model (OpenAI, Claude) when it cannot; every answer says who gave it and why.

The life of a request

    bytes -> parse -> ChatRequest -> rank -> Plan -> attempt: encode -> open upstream -> decode -> chunks -> bytes
             (3)                     (5)             (9)      (6)       (7)              (6)       (10)      (11)

The language inside is OpenAI's.  A request is an OpenAI chat request and the pieces of an answer are OpenAI
`chat.completion.chunk` objects, so there is no third vocabulary.  Two providers translate (Ollama, Claude) and are
always streamed; where the client wants a whole answer one function, `fold`, puts the chunks together.  OpenAI's own
answers pass through, with the model's name replaced and their streams tidied (`OpenAI._once`).

Promises, each held by a test of its name
  1. A client never sees two beginnings: targets change before the first content has been sent, never after.
  2. A cut answer is never reported as complete: a stream ends by its protocol's end mark, never by EOF.
  3. The same readings always give the same decision, and the response says why.
  4. A prompt goes to a cloud only when it may: `auto`, `cloud` or a cloud model was asked for, with its key set if it
     needs one.
  5. No thread waits for another, or for the network, while it holds something shared.
  6. /health and /v1/models never wait for the network.
  7. Nothing non-finite ever appears in JSON.
  8. A prompt is sent to an upstream once per counted attempt.

Who owns which state
  monitors' readings     each monitor's own thread writes its one attribute; everybody reads it without a lock (4)
  idle connections       deques of the transport, whose append and pop are atomic (7)
  ways to upstreams      a dict of the transport; two threads that miss an entry at once make the same one (7)
  TLS context            made by the first thread that needs it; a second one made at once is just dropped (7)
  evidence of requests   a monitor's deque of losses and its wake-up, whose operations are atomic (4)
  loads under way        a dict of the loader, whose setdefault and del are atomic (9)
  outlook                an attribute of the gateway, made anew by whoever finds it old (9)
  plans of an outlook    a dict whose get, setitem and clear are atomic; who finds none makes the same as another (9)
  contexts of loads      a dict of the gateway, whose entries the threads of loads replace (9)
  moment of next warm-up an attribute of the gateway; of two that read it at once the second joins the first's load (9)
  details of models      a dict of the prober with an entry for each endpoint, written by that one's monitor (9)
  ledger                 what is in flight, and what requests have shown of each target; behind its lock (8)
  lines of the log       a deque of its writer, whose operations are atomic (14)
  admission              clients' connections, how much is asked at once, whether it ends; behind its lock (11)
  how busy a client is   attributes of its guest, written by its thread, and once more by a thread that makes room (11)
  everything else        immutable, or local to the thread of one request

Contents
  1 Vocabulary   2 Settings   3 Request in   4 Monitors   5 Policy     6 Providers   7 Transport
  8 Ledger       9 Gateway   10 Response out  11 Server   12 Page     13 Demo       14 Command line

Each section's banner lists the sections it uses; "pure" ones do no IO.  A test holds both.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import copy
import dataclasses
import datetime
import email.utils
import enum
import errno
import functools
import glob
import http
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    NamedTuple,
    NoReturn,
    Optional,
    TextIO,
)

if TYPE_CHECKING:
    import ssl

# http.client imports ssl where it is there, used or not: 5 of 15 MiB.  Here an https: upstream alone needs it.  Whoever
# imports this file has it at once.
if __name__ == "__main__":
    sys.modules["ssl"] = None  # type: ignore[assignment]  # an import of it fails, which http.client allows for
import http.client
import http.server

if __name__ == "__main__":
    del sys.modules["ssl"]

__version__ = "0.1.0"

log = logging.getLogger("oblix")


# === 1. Vocabulary ====================================================================================================
# uses: nothing; pure
# Which words does the rest of the file speak?  Values are frozen, closed sets are enums.  Nothing here knows a
# socket, a clock or a provider's dialect.

Json = dict[str, Any]     # a JSON object
Chunk = dict[str, Any]    # an OpenAI chat.completion.chunk, or the part of one that says something


class TextEvent(NamedTuple):
    """How a provider writes an event of a stream that says a text and nothing else."""
    pattern: re.Pattern[bytes]    # of a whole event; its one group is the text, as JSON has it between its quotes
    end: bytes                    # of an event


class Texts(list[bytes]):
    """The texts, as JSON has them between its quotes, of events in a row that say nothing else."""


class Side(str, enum.Enum):
    """Where a target runs: on (or beside) the device, or in the cloud."""
    LOCAL = "local"
    CLOUD = "cloud"


class Level(enum.IntEnum):
    """How well a side can answer; each side shows it in its own words (`WORDS`)."""
    GOOD, STRAINED, OUT = range(3)


WORDS = {Side.LOCAL: ("available", "constrained", "critical"), Side.CLOUD: ("optimal", "degraded", "disconnected")}


class Fault(enum.Enum):
    """Why an attempt failed, as far as it decides what to do next."""
    DOWN = "transport"          # refused, reset, DNS, TLS, silence, no HTTP, a cut answer
    BUSY = "busy"               # 408 409 425 429 5xx: later it may work
    ACCOUNT = "account"         # 401 402 403, no money: a person must act
    MISSING = "not found"       # 404 of the model; 405, 410 and the like of the path
    CAPABILITY = "capability"   # this model can't do what the request needs
    TOO_LONG = "too long"       # only a larger window helps
    LOADING = "loading"         # the model is on its way into memory, which is no fault of anybody's
    CLIENT = "client"           # the request itself is wrong: no other target would do better
    LATE = "late"               # the time for the whole request is over

    @property
    def moves_on(self) -> bool:
        """Whether another target may do better."""
        return self not in (Fault.CLIENT, Fault.LATE)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One upstream server: the dialect it speaks, where it is, and what it wants to see."""
    provider: str
    base_url: str                                              # without a trailing slash
    key: str = dataclasses.field(default="", repr=False)
    headers: tuple[tuple[str, str], ...] = ()
    key_variable: str = ""                                     # named in advice; "" where no key is needed

    @property
    def lacks_key(self) -> bool:
        """Whether it wants a key that is not configured."""
        return bool(self.key_variable) and not self.key

    @functools.cached_property
    def on_device(self) -> bool:
        """Whether it runs on this device, as far as its address tells: then the device's load is its own."""
        return bool(re.match(r"https?://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", self.base_url))

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.provider, self.base_url, self.key))

    def __hash__(self) -> int:    # a decision looks targets up some 25 times, each of which would hash all fields anew
        return self._hash


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that can answer: a model at an endpoint."""
    endpoint: Endpoint
    model: str
    side: Side

    @property
    def id(self) -> str:
        """The name clients address it by, e.g. `ollama:llama3.2`."""
        return f"{self.endpoint.provider}:{self.model}"

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.endpoint, self.model, self.side))

    def __hash__(self) -> int:
        return self._hash


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that an endpoint says it has.  Zero and None mean that it does not say."""
    name: str
    created: int = 0                    # unix seconds
    remote: bool = False                # an Ollama name that is answered by ollama.com
    digest: str = ""
    size: int = 0                       # bytes on disk: about what its weights take in memory
    can: frozenset[str] | None = None   # "tools", "vision", …
    max_context: int = 0                # tokens that it was trained for
    token_bytes: int = 0                # memory that one token of context takes
    cold: bool = False                  # not in memory: the next request would wait for its load
    context: int = 0                    # tokens that it is loaded for
    gpu_share: float | None = None      # of a loaded model, 0 to 1
    spilled: bool = False               # mostly on the CPU now, and was on the GPU before

    @property
    def chats(self) -> bool:
        """False for embedding models."""
        return "completion" in self.can if self.can else "embed" not in self.name


@dataclasses.dataclass(frozen=True)
class Reading:
    """A monitor's verdict on one side, or on one endpoint of it, with the facts behind it."""
    side: Side
    level: Level
    reason: str                                 # "" while all is well
    facts: Json
    endpoint: Endpoint | None = None            # None: it speaks about the whole side
    models: tuple[Model, ...] | None = None     # what the endpoint has; None where it does not say
    known: bool = True                          # False before the first sample: optimism, not evidence

    def made_stale(self, monitor: str) -> Reading:
        """The same, with the fact that its monitor has failed to take a newer one."""
        return dataclasses.replace(self, facts={**self.facts, f"{monitor}_stale": True})


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A checked chat request: `body` holds OpenAI fields of the right types, without nulls and no-op defaults."""
    model: str
    body: Json
    stream: bool = False
    include_usage: bool = False
    around: tuple[bytes, bytes] | None = None    # the client's own bytes around the model's name, if they say `body`

    @property
    def messages(self) -> list[Json]:
        return self.body["messages"]  # type: ignore[no-any-return]

    def sent_on(self, payload: Json) -> bytes | None:
        """The payload as the client's own bytes but for the model's name, where it says nothing else."""
        if not self.around or len(payload) != len(self.body) + 1 or not all(
                payload.get(name) is value for name, value in self.body.items()):
            return None
        return dumps(payload["model"]).join(self.around)

    def most_tokens(self, usual: int) -> int:
        """How long the answer may be, in tokens."""
        return int(self.body.get("max_completion_tokens") or self.body.get("max_tokens") or usual)

    @functools.cached_property
    def size(self) -> int:
        """The prompt's length in bytes of UTF-8, an image counted as the 4 KB of text that a thousand tokens are."""
        texts = sum(len(text_of(message).encode("utf-8", "replace")) + 4 for message in self.messages)
        calls = [message["tool_calls"] for message in self.messages if "tool_calls" in message]
        images = sum(1 for _, part in self.parts() if part["type"] == "image_url")
        tools = self.body.get("tools", [])
        return texts + 4096 * images + len(dumps([calls, tools]) if calls or tools else b"[[],[]]")

    def parts(self) -> Iterator[tuple[str, Json]]:
        """Every content part, but for contents that are text alone, with the path that an error should name."""
        for m, message in enumerate(self.messages):
            if not isinstance(message.get("content"), str):
                for p, part in enumerate(parts_of(message)):
                    yield f"messages[{m}].content[{p}]", part


class Use(enum.Enum):
    """Whether a target may be asked."""
    YES, LAST_HOPE, NO = range(3)


@dataclasses.dataclass(frozen=True)
class Condition:
    """How a target is, in a word and in a line, and what that means for its use."""
    state: str
    reason: str = ""
    level: Level = Level.GOOD
    use: Use = Use.YES
    may_load: bool = True    # whether the device is well enough to load it, were it cold


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which targets to try in which order, which more when all of these have failed, what was left out, and why."""
    order: tuple[Target, ...]
    reason: str
    last_hope: tuple[Target, ...] = ()
    left_out: tuple[tuple[Target, str], ...] = ()
    conditions: Mapping[Target, Condition] = dataclasses.field(default_factory=dict)    # of them; none if named


MAX_RETRY_AFTER_S = 600.0
MOST_TOKENS = 1 << 32        # no window has so many
MAX_LINE_BYTES = 32 << 20    # of an event in an answer: as much as a request may have; more is an attack


class OblixError(Exception):
    """What a client is told, in OpenAI's shape; each subclass knows its status and type."""
    status, type = 500, "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None,
                 status: int | None = None, type: str | None = None, retry: bool | None = None,
                 retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        self.code, self.status, self.type = code or self.code, status or self.status, type or self.type
        self.retry = retry                      # x-should-retry; None leaves it to the client
        # seconds an upstream asked us to wait; a service that asks for more is looked at once in a while
        self.retry_after_s = None if retry_after_s is None else min(retry_after_s, MAX_RETRY_AFTER_S)


class BadRequest(OblixError):
    """The client's own mistake."""
    status, type = 400, "invalid_request_error"


class Unsupported(BadRequest):
    """A request that is right in itself, but that this provider can't honour."""
    code = "unsupported_parameter"


class NoTarget(OblixError):
    """Nothing that may answer can answer."""
    status, code = 503, "no_target_available"


class Busy(OblixError):
    """Oblix itself has too much to do, or is being stopped."""
    status, code = 503, "overloaded"


class UpstreamError(OblixError):
    """An attempt that failed at a target."""
    status, code = 502, "upstream_error"

    def __init__(self, message: str, fault: Fault = Fault.DOWN, **details: Any) -> None:
        super().__init__(message, **details)
        self.fault = fault

    @property
    def brief(self) -> str:
        """What may stand in a log or a header: our own words, never an upstream's, which may quote the prompt."""
        return self.message if self.fault is Fault.DOWN else f"{self.fault.value} ({self.status})"


class ClientGone(Exception):
    """The client hung up; nobody is left to tell."""


class UsageError(Exception):
    """A mistake on the command line or in the environment, told in one line."""


def parts_of(message: Json) -> list[Json]:
    """A message's content as a list of parts, whichever form it came in; empty for null."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content or []


def choices_of(chunk: Chunk) -> list[Json]:
    """The choices of a chunk that may have come from anywhere."""
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def has_content(chunk: Chunk) -> bool:
    """Whether a chunk, or a whole answer, says something that a client would miss."""
    for choice in choices_of(chunk):
        delta = choice.get("delta") or choice.get("message") or {}
        if isinstance(delta, dict) and any(delta.get(name) for name in CONTENT):
            return True
    return False


CONTENT = ("content", "tool_calls", "reasoning_content", "reasoning", "refusal", "audio", "function_call")


def is_empty(chunks: Iterable[Chunk]) -> bool:
    """Whether an answer ended well and yet says nothing.  `length` and `content_filter` say something by themselves."""
    return not any(has_content(chunk) or choice.get("finish_reason") not in ("stop", None)
                   for chunk in chunks for choice in choices_of(chunk))


def text_of(message: Json) -> str:
    """The text of a message's content, its parts on lines of their own; refusals count as text."""
    content = message.get("content")
    if isinstance(content, str):    # nearly always
        return content
    return "\n".join(part[part["type"]] for part in parts_of(message) if part["type"] in ("text", "refusal"))


def is_plain(text: str) -> bool:
    """Whether a text is of printable ASCII alone, so that it may stand in a header or a log as it is."""
    return text.isascii() and text.isprintable()


def finite(text: str) -> float:
    """The finite number in a text.  Raises ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number out of range: {text[:20]}")
    return number


def integer(digits: str) -> int:
    """The integer that JSON writes as these digits.  Raises ValueError."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"number out of range: {digits[:20]}")
    return int(digits)


MAX_DIGITS = 4300    # Python's own limit, which old patch releases lack: the work grows with the square
try:
    int("9" * (MAX_DIGITS + 1))
    _integer_of: Callable[[str], int] | None = integer
except ValueError:
    _integer_of = None    # the built-in one, which is faster
_JSON = json.JSONDecoder(parse_float=finite, parse_int=_integer_of, parse_constant=finite)


def loads(text: str | bytes) -> Any:
    """Parse JSON as RFC 8259 has it: UTF-8, no NaN or Infinity (json.loads lets both in, and writes them out again).

    Raises ValueError, RecursionError.
    """
    if too_rich(text):
        raise ValueError("too many values")
    text = text if isinstance(text, str) else text.decode()
    return _JSON.decode(text[1:] if text[:1] == "\ufeff" else text)    # a BOM


# Each comma, colon or bracket costs up to some 100 bytes of memory once it is parsed ("[[],[],…" 30 times its size);
# and one in a text is about a token, of which no model takes a million.
MAX_JSON_MARKS = 1 << 20


def too_rich(text: str | bytes) -> bool:
    """Whether JSON may have so many values that it is a trap."""
    marks: Any = ",:[{" if isinstance(text, str) else (b",", b":", b"[", b"{")
    return len(text) > MAX_JSON_MARKS and sum(map(text.count, marks)) > MAX_JSON_MARKS


def dumps(value: Any) -> bytes:
    """Compact ASCII JSON on one line; non-ASCII is escaped, so that a lone surrogate can't break the encoding."""
    return _COMPACT.encode(value).encode("ascii")


_COMPACT = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def around_model(raw: bytes, parsed: Json) -> tuple[bytes, bytes] | None:
    """What stands before and after the model's name in an object's JSON; None where that can't be told for sure.

    To put another name in between takes 1 us, and to write the object anew 200 us where it has 64 KiB.
    """
    if raw[:1] != b"{" or not isinstance(parsed.get("model"), str) or (
            raw.rfind(b"\\u00") >= 0 and _SPELT_OUT.search(raw)):    # rfind is five times as fast as find or `in`
        return None
    at = 0
    for name in ("stream", "n", "model"):    # they decide how the answer is read: the next reader may take the first
        if name in parsed:
            quoted = b'"%b"' % name.encode()
            at = raw.rfind(quoted)
            if raw.rfind(quoted, 0, max(at, 0)) >= 0:
                return None
    found = _MODEL_IN.match(raw, at)
    return (raw[:found.start(1)], raw[found.end(1):]) if found else None


# What stands between a JSON string's quotes, written so that it takes no stack for each character.
LITERAL = re.compile(rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*')
_SPELT_OUT = re.compile(rb"\\u00[3-7]")    # a letter or digit, which a name may so be hidden behind
_MODEL_IN = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("' + LITERAL.pattern + rb'")')


def deeper_than(value: Any, limit: int) -> bool:
    """Whether JSON nests more than `limit` levels deep."""
    level = [value]
    for _ in range(limit):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return True


def is_too_deep(text: str | bytes, value: Any) -> bool:
    """Whether JSON nests more than MAX_JSON_DEPTH levels deep; only that with many brackets is walked."""
    brackets: Any = "{[" if isinstance(text, str) else (b"{", b"[")
    rich = any(occurs(text, bracket, MAX_JSON_DEPTH // 2) for bracket in brackets)
    return rich and deeper_than(value, MAX_JSON_DEPTH)


def occurs(text: Any, mark: Any, times: int) -> bool:
    """Whether a mark occurs so often.  In a long text without many this is ten times faster than to count them all."""
    at = -1
    for _ in range(times):
        at = text.find(mark, at + 1)
        if at < 0:
            return False
    return True


MAX_JSON_DEPTH = 100    # tool schemas nest some 10-20 deep; json itself gives up near 1,000


# === 2. Settings ======================================================================================================
# uses: 1; pure
# What can a person set, and how?  Each setting is declared once; its flag, its variable, --help and the README's table
# derive from the declaration.  Secrets never print.

def setting(default: Any, help: str, *, env: str = "", secret: bool = False, choices: Any = None,
            low: float = 0, high: float = 1e6) -> Any:
    """Declare a setting.  `env` names a variable that other tools share and that has no flag of its own."""
    return dataclasses.field(default=default, repr=not secret, metadata={"help": help, "env": env, "choices": choices,
                                                                             "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a person can set.  A flag wins over its variable, and that over the default."""
    local_model: tuple[str, ...] = setting((), "local model, provider:name or openai:name@http://host:port/v1; "
                                               "repeat in order of preference; default: the newest model of Ollama")
    cloud_model: tuple[str, ...] = setting((), "cloud model, provider:name; repeat in order of preference; "
                                               "default: a cheap model of each provider with a key")
    cloud_api_key: str = setting("", "key for the first --cloud-model; `ps` shows flags: better its variable or "
                                     "file", secret=True)
    cloud_api_key_file: str = setting("", "file that holds it")
    host: str = setting("localhost", "address to listen on; localhost is 127.0.0.1 and ::1; any other that the network "
                                     "reaches needs --api-key")
    port: int = setting(62549, "port to listen on; 0 picks a free one", high=65535)
    api_key: str = setting("", "key that clients must send; `ps` shows flags: better its variable or file",
                           secret=True)
    api_key_file: str = setting("", "file that holds it")
    no_auth: bool = setting(False, "let everybody in who reaches --host, without a key")
    allow_origin: tuple[str, ...] = setting((), "origin of web pages that may ask, as https://chat.example, or * for "
                                                "all; repeat; those on localhost may")
    allow_host: tuple[str, ...] = setting((), "name by which clients reach it, beside localhost, addresses and the "
                                              "device's own name; repeat")
    demo: bool = setting(False, "serve two built-in scripted models, one local and one cloud, to try Oblix with "
                                "nothing installed")
    connect_timeout_s: float = setting(5.0, "seconds to reach an upstream: DNS, TCP and TLS together", low=0.1,
                                       high=3600)
    prefer: str = setting("local", "what auto prefers while both sides are well: local, cloud, or whichever is "
                                   "measured to answer sooner", choices=("local", "cloud", "fast"))
    local_slots: int = setting(1, "requests that the local model answers at once (Ollama's OLLAMA_NUM_PARALLEL); more "
                                  "overflow to the cloud", low=1)
    warm_up: str = setting("auto", "whether to load the local model at start, while the cloud is not well, and when "
                                   "the cloud answers in its place", choices=("auto", "never"))
    on_cut: str = setting("error", "what follows when a plain text stream breaks off: an error, or another model that "
                                   "continues it", choices=("error", "continue"))
    first_byte_timeout_s: float = setting(300.0, "seconds until an answer's first content; Ollama may load a model for "
                                                 "minutes", low=0.1, high=86_400)
    patience_s: float = setting(60.0, "seconds until a local answer's first content while another model could answer",
                                low=0.1, high=86_400)
    stall_timeout_s: float = setting(60.0, "seconds of silence that end an answer under way; comments don't count",
                                     low=0.1, high=86_400)
    request_timeout_s: float = setting(900.0, "seconds that a whole request may take, all attempts together", low=0.1,
                                       high=86_400)
    max_requests: int = setting(512, "chat requests answered at once, each on a thread; more get a 503 and are told to "
                                     "come again", low=1, high=65_536)
    max_body_mib: int = setting(32, "largest request, in MiB; images make 10 to 30 of them normal", low=1, high=128)
    drain: float = setting(8.0, "seconds that requests may go on after SIGTERM or Ctrl-C; docker stop waits for 10",
                           high=86_400)
    probe_every_s: float = setting(30.0, "seconds between probes of a cloud that is well; sooner after trouble", low=1,
                                   high=86_400)
    better_after_s: float = setting(10.0, "seconds that better readings must last before they count; a flapping link "
                                          "counts as down", high=86_400)
    cpu_constrained_percent: float = setting(80.0, "CPU use from which local is constrained")
    cpu_critical_percent: float = setting(95.0, "CPU use from which local is critical")
    memory_constrained_percent: float = setting(85.0, "memory use from which local is constrained")
    memory_critical_percent: float = setting(95.0, "memory use from which local is critical")
    load_constrained: float = setting(1.5, "load per core from which local is constrained")
    load_critical: float = setting(3.0, "load per core from which local is critical")
    gpu_constrained_percent: float = setting(85.0, "GPU or GPU memory use by others from which local is constrained")
    gpu_critical_percent: float = setting(95.0, "GPU or GPU memory use by others from which local is critical")
    battery_constrained_percent: float = setting(25.0, "charge down to which local is constrained while unplugged")
    battery_critical_percent: float = setting(10.0, "charge down to which local is critical while unplugged")
    latency_degraded_ms: float = setting(200.0, "probe latency above which a cloud is degraded")
    loss_degraded_percent: float = setting(10.0, "share of failed probes above which a cloud is degraded")
    log_level: str = setting("info", "what is logged; info is a line per request",
                             choices=("debug", "info", "warning", "error"))
    log_json: bool = setting(False, "log lines as JSON, for machines")
    ollama_host: str = setting("", "where Ollama listens, by Ollama's own rules", env="OLLAMA_HOST")
    openai_api_key: str = setting("", "key for OpenAI", env="OPENAI_API_KEY", secret=True)
    openai_base_url: str = setting("", "another OpenAI-compatible server, ending in /v1", env="OPENAI_BASE_URL")
    openai_org_id: str = setting("", "OpenAI organization", env="OPENAI_ORG_ID")
    openai_project_id: str = setting("", "OpenAI project", env="OPENAI_PROJECT_ID")
    anthropic_api_key: str = setting("", "key for Claude", env="ANTHROPIC_API_KEY", secret=True)
    anthropic_base_url: str = setting("", "another server that speaks Anthropic's API", env="ANTHROPIC_BASE_URL")

    @classmethod
    def parse(cls, argv: Sequence[str], env: Mapping[str, str]) -> Settings:
        """Settings from flags and variables.  Raises UsageError; SystemExit(0) after --help and --version."""
        parser = _parser(cls)
        found = vars(parser.parse_args(argv))
        for field in dataclasses.fields(cls):
            text = env.get(variable_of(field), "").strip()
            if text and field.name not in found:
                found.update(_from_variable(parser, field, text))
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        for name, value in found.items():
            if isinstance(value, tuple) and (not value or [] in value):    # argparse's reading of --flag=--
                raise UsageError(f"--{name.replace('_', '-')} needs a value; see --help")
        settings = cls(**found)
        for field in dataclasses.fields(cls):
            value = getattr(settings, field.name)
            if not field.repr and not (value.isascii() and value.isprintable()):    # repr=False: a secret
                raise UsageError(f"{variable_of(field)} holds characters that no key has: copy it again")
        return settings


def variable_of(field: dataclasses.Field[Any]) -> str:
    """The environment variable of a setting."""
    return field.metadata["env"] or "OBLIX_" + field.name.upper()


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag of a setting; "" where only a variable sets it."""
    return "" if field.metadata["env"] else "--" + field.name.replace("_", "-")


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _from_variable(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], text: str) -> Json:
    """What a variable's text sets: read as if it were the flag's, lists by commas.  Raises UsageError."""
    if not flag_of(field):
        return {field.name: text}
    if isinstance(field.default, bool):
        if text.lower() not in _BOOLEANS:
            raise UsageError(f"{variable_of(field)}: {text!r} is neither true nor false")
        return {field.name: _BOOLEANS[text.lower()]}
    values = [part.strip() for part in text.split(",")] if isinstance(field.default, tuple) else [text]
    try:
        return vars(parser.parse_args([f"{flag_of(field)}={value}" for value in values if value]))
    except UsageError as error:
        raise UsageError(f"{variable_of(field)}: {error}") from None


def _number_of(field: dataclasses.Field[Any]) -> Callable[[str], int | float]:
    """A converter for argparse: text to a number of the setting's type and range."""
    kind: Any = type(field.default)
    low, high = field.metadata["low"], field.metadata["high"]

    def number(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)  # type: ignore[no-any-return]
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
    return number


def shown(field: dataclasses.Field[Any]) -> str:
    """A default as --help and the README show it."""
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def _parser(cls: type[Settings]) -> argparse.ArgumentParser:
    """The command line, from the declarations."""
    parser = _OneLineParser(
        prog="oblix.py", usage="python oblix.py [check] [flags]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="One OpenAI-compatible endpoint that answers from the local model while the device can and from "
                    "the cloud\nwhen it cannot, and says which and why.\n\n`check` prints what Oblix finds, what it "
                    "would do and what to fix, and exits: 0 if a request\nwould be answered, 1 if not.",
        epilog="More variables:\n" + "\n".join(f"  {variable_of(field):<20} {field.metadata['help']}"
                                               for field in dataclasses.fields(cls) if not flag_of(field)))
    parser.add_argument("--version", action="version", version=f"oblix {__version__}")
    for field in filter(flag_of, dataclasses.fields(cls)):
        text = f"{field.metadata['help']} [{variable_of(field)}" + (
            "]" if field.default in ("", (), False) else f", default {shown(field)}]")
        how: Json = {"help": text.replace("%", "%%")}
        if isinstance(field.default, bool):
            how["action"] = "store_true"
        elif isinstance(field.default, tuple):
            how.update(action="append", metavar=field.name.rsplit("_", 1)[-1].upper())
        else:
            number = isinstance(field.default, (int, float))
            how.update(metavar="N" if number else field.name.rsplit("_", 1)[-1].upper(),
                       type=_number_of(field) if number else str, choices=field.metadata["choices"])
        parser.add_argument(flag_of(field), **how)
    return parser


# === 3. Request in ====================================================================================================
# uses: 1; pure
# What does the client want, and may it?  HTTP's heads and OpenAI's types and ranges are checked here and nowhere else:
# behind `parse_request` every known field has them, null means absent, and unknown fields are kept.  What a provider
# can't take it says itself (6).

# --- 3. The head of a request -----------------------------------------------------------------------------------------

MAX_REQUEST_LINE = 8 << 10    # bytes; nothing here has a long path
MAX_FIELD_LINE = 16 << 10     # bytes; the longest that browsers and proxies send are tokens of a few KB
MAX_FIELDS = 100              # as in http.client; the SDKs send some 20
MAX_HEAD_BYTES = 64 << 10
CHUNKED = -1                  # the size of a body that tells its size as it comes

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) (HTTP/[0-9]\.[0-9])\r\n")
FIELD_LINE = re.compile(_TOKEN + rb":[\t -~\x80-\xff]*\r\n")
_FIELD_LINES = re.compile(rb"(?:" + FIELD_LINE.pattern + rb")*")
# Two of these may be read differently by two servers in a row.
_ONCE = frozenset(["authorization", "content-length", "content-type", "host", "origin", "transfer-encoding"])


_PATH = re.compile(r"(?:(?i:https?)://[^/?#]*)?(?:/v1(?=[/?#]|$))?([^?#]*)")


@functools.lru_cache(32)
def _path_of(target: str) -> str:
    found = _PATH.match(target)
    return (found[1] if found else "").rstrip("/") or "/"


def is_size(text: str) -> bool:
    """Whether a text is a size in bytes, as Content-Length has it."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a request, in which two servers can't disagree.  Names of fields are in lower case."""
    method: str
    target: str
    version: str
    fields: Mapping[str, str]

    @property
    def path(self) -> str:
        """The path without query, /v1 and trailing slash; still percent-encoded."""
        return _path_of(self.target)

    @property
    def authority(self) -> str | None:
        """The host[:port] that it is addressed to, in lower case: a target that names one overrides Host."""
        found = None if self.target[:1] == "/" else re.match("(?i)https?://([^/?#]*)", self.target)
        authority = found[1] if found else self.fields.get("host")
        return None if authority is None else authority.lower()

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks what a page may send."""
        return self.method == "OPTIONS" and "origin" in self.fields and "access-control-request-method" in self.fields

    @property
    def keeps_open(self) -> bool:
        """Whether the client wants the connection for its next request (RFC 9112, 9.3)."""
        options = [option.strip(" \t") for option in self.fields.get("connection", "").lower().split(",")]
        return "close" not in options and (self.version != "HTTP/1.0" or "keep-alive" in options)

    @property
    def body_size(self) -> int:
        """The size of its body in bytes, or CHUNKED.  Raises BadRequest."""
        length, coding = self.fields.get("content-length"), self.fields.get("transfer-encoding")
        if coding is not None:
            if length is not None or coding.lower() != "chunked" or self.version == "HTTP/1.0":
                raise BadRequest("Send either a Content-Length or Transfer-Encoding: chunked.", code="bad_framing")
            return CHUNKED
        if length is not None and not is_size(length):
            raise BadRequest("Send the body's size as one decimal Content-Length.", code="bad_framing")
        return int(length or 0)


def parse_head(first: bytes, more: Iterable[bytes]) -> Head:
    """A request's head out of its first line and its fields' lines, each with its end.  Raises BadRequest.

    Strict where the stdlib, which reads them as e-mail, is not: what another server might read otherwise is refused, so
    that none in front of this one can be played against it (request smuggling; RFC 9112, 2.2, 5 and 11.2).
    """
    start = _REQUEST_LINE.fullmatch(first)
    if not start:
        raise BadRequest("This is no HTTP request line (RFC 9112, 3)." + (
            " It looks like TLS: use http:// instead of https://." if first[:1] == b"\x16" else ""), code="bad_request")
    method, target, version = (part.decode("ascii") for part in start.groups())
    if not version.startswith("HTTP/1."):
        raise BadRequest(f"{version} is not spoken here: use HTTP/1.1.", status=505, code="unsupported_http_version")
    lines, fields = list(more), dict[str, str]()
    if not _FIELD_LINES.fullmatch(b"".join(lines)):
        number = next(number for number, line in enumerate(lines, 2) if not FIELD_LINE.fullmatch(line))
        raise BadRequest(f"Line {number} of the request's head is no `name: value` that ends in CRLF.",
                         code="bad_request")
    for line in b"".join(lines).decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in _ONCE and name in fields:
            raise BadRequest(f"The request has two {name} headers.", code="bad_request")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    if version != "HTTP/1.0" and "host" not in fields:
        raise BadRequest("The request has no Host header.", code="bad_request")
    return Head(method, target, version, fields)


def body_kind_refusal(head: Head) -> BadRequest | None:
    """What is wrong with the kind of body, if anything.

    A page may send a text or a form to any address without asking first, but JSON only after a preflight.
    """
    kind = head.fields.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[!-.0-~]+\+json", kind):
        return BadRequest("Send the body as JSON, with the header `Content-Type: application/json`.", status=415,
                          code="unsupported_media_type")
    if head.fields.get("content-encoding", "identity").lower() not in ("identity", ""):
        return BadRequest("Send the body without a Content-Encoding.", status=415, code="unsupported_media_type")
    return None


# --- 3. Who may ask ---------------------------------------------------------------------------------------------------

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?")
EXPOSED = "x-oblix-model, x-oblix-side, x-oblix-reason, x-oblix-attempts, x-request-id, x-should-retry, retry-after"


@functools.lru_cache(32)    # of the few names that clients use
def _name_in(authority: str) -> str:
    """The host's name in a lower-case host[:port], or ""."""
    found = _AUTHORITY.fullmatch(authority)
    return found[1].strip("[]").rstrip(".") if found else ""


@functools.lru_cache(32)
def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host's name is; None for a name that has to be looked up."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


@functools.lru_cache(32)
def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this device whatever any DNS says (RFC 6761, 6.3)."""
    address = address_of(name)
    return name == "localhost" or name.endswith(".localhost") or address is not None and address.is_loopback


@dataclasses.dataclass(frozen=True)
class Guard:
    """Who may ask: who knows the key if there is one, calls by a name of ours, and is no page of somebody else's."""
    key: str = dataclasses.field(default="", repr=False)
    names: frozenset[str] = frozenset()      # of this server, in lower case, beside localhost and addresses
    origins: frozenset[str] = frozenset()    # of pages, in lower case, beside those on localhost; or "*"

    def check(self, head: Head) -> None:
        """Raises OblixError unless the request may be answered."""
        if not self.key and head.authority is not None and not self._is_ours(head.authority):
            # A page whose own name leads here (DNS rebinding) is of the same origin for the browser.
            raise BadRequest("The Host header is none of this server's names. Use localhost or an IP address, or start "
                             "Oblix with --allow-host NAME, or with an --api-key.", status=403, code="host_not_allowed")
        if "origin" in head.fields and not self.welcomes(head):
            raise BadRequest("Pages of this origin may not use this server. Start Oblix with --allow-origin "
                             f"{head.fields['origin'][:100]} if they should.", status=403, code="origin_not_allowed")
        if self.key and not head.is_preflight and not (self.is_public(head) or self._knows_key(head)):
            raise BadRequest("The key of this Oblix is missing or wrong: send what --api-key or OBLIX_API_KEY says as "
                             "`Authorization: Bearer …`.", status=401, type="authentication_error",
                             code="invalid_api_key", retry=False)

    def _is_ours(self, authority: str) -> bool:
        name = _name_in(authority)
        return name in self.names or is_loopback(name) or address_of(name) is not None

    def welcomes(self, head: Head) -> bool:
        """Whether the page that asks may: one of this device, of this server's own, or of an allowed origin."""
        origin = head.fields.get("origin", "").lower()
        place = origin.partition("://")[2]
        return bool(self.origins & {origin, "*"} or place and (place == head.authority or is_loopback(_name_in(place))))

    def is_public(self, head: Head) -> bool:
        """Whether it is asked, without the key that there is, if the server is up."""
        return bool(self.key) and head.method in ("GET", "HEAD") and head.path == "/health" and not _keys(head)

    def _knows_key(self, head: Head) -> bool:
        import hmac  # which loads libcrypto: see the imports
        key = self.key.encode()    # equal in constant time, so that it can't be found letter by letter
        return any(hmac.compare_digest(key, given) for given in _keys(head))

    def cors_headers(self, head: Head) -> dict[str, str]:
        """What a browser must read in the answer so that the page may (Fetch standard, 3.2)."""
        if "origin" not in head.fields or not self.welcomes(head):
            return {}
        asked, allowed = head.fields, {"Access-Control-Allow-Origin": head.fields["origin"], "Vary": "Origin"}
        if not head.is_preflight:
            return {**allowed, "Access-Control-Expose-Headers": EXPOSED}
        allowed.update({"Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS", "Access-Control-Max-Age": "600",
                        "Access-Control-Allow-Headers": asked.get("access-control-request-headers", "*")})
        if asked.get("access-control-request-private-network") == "true":    # a public page, a device at home
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return allowed


def _keys(head: Head) -> list[bytes]:
    """The keys that a request gives."""
    scheme, _, token = head.fields.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else [""] if scheme else []
    given += [head.fields["api-key"]] if "api-key" in head.fields else []
    return [key.encode("latin-1") for key in given]


# --- 3. The chat request ----------------------------------------------------------------------------------------------

Check = Callable[[Any], Optional[str]]    # a value -> what is wrong with it, or None

MAX_MODEL_NAME = 256    # the name goes into headers and logs


def _kind(kind: type, words: str) -> Check:
    return lambda value: None if isinstance(value, kind) else f"must be {words}"


def _number(low: float, high: float, kinds: tuple[type, ...] = (int, float), words: str = "a number") -> Check:
    def check(value: Any) -> str | None:
        # subtle: type(), not isinstance(): True is an int, and `"temperature": true` must not pass for 1
        fits = type(value) in kinds and low <= value <= high
        return None if fits else f"must be {words} from {low} to {high}"
    return check


def _integer(low: int, high: int) -> Check:
    return _number(low, high, (int,), "an integer")


def _one_of(*words: str) -> Check:
    return lambda value: None if value in words else f"must be one of {', '.join(words)}"


def _list_of(kind: type, words: str) -> Check:
    return lambda value: (None if isinstance(value, list) and all(isinstance(item, kind) for item in value)
                          else f"must be a list of {words}")


_string, _boolean, _object = _kind(str, "a string"), _kind(bool, "true or false"), _kind(dict, "an object")


def _stop(value: Any) -> str | None:
    return None if isinstance(value, str) or _list_of(str, "")(value) is None else "must be a string or a list of them"


def _stream_options(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    return None if isinstance(value.get("include_usage") or False, bool) else "must have a boolean include_usage"


def _response_format(value: Any) -> str | None:
    kinds = ("text", "json_object", "json_schema")
    if not isinstance(value, dict) or value.get("type") not in kinds:
        return f"must be an object whose type is one of {', '.join(kinds)}"
    schema = value.get("json_schema")
    if value["type"] == "json_schema" and not (isinstance(schema, dict) and isinstance(schema.get("name"), str)
                                               and isinstance(schema.get("schema") or {}, dict)):
        return "needs json_schema: {name, schema}"
    return None


def _inner(value: Any, usual: str = "") -> Json | None:
    """What {"type": kind, kind: {...}} holds, or None for any other value."""
    kind = value.get("type", usual) if isinstance(value, dict) else None
    return value.get(kind) or None if isinstance(kind, str) and isinstance(value.get(kind), dict) else None


def _tools(value: Any) -> str | None:
    if not isinstance(value, list):
        return "must be a list of tools"
    for tool in value:
        inner = _inner(tool)
        if not inner or not isinstance(inner.get("name"), str) or not inner["name"]:
            return 'must hold tools like {"type": "function", "function": {"name": …, "parameters": {…}}}'
        if not isinstance(inner.get("parameters") or {}, dict) or not isinstance(inner.get("description") or "", str):
            return f"has a tool {inner['name'][:64]!r} whose parameters are not an object, or description not a string"
    return None


def _tool_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return _one_of("none", "auto", "required")(value)
    inner = _inner(value)
    if inner and value["type"] == "allowed_tools":
        valid = inner.get("mode") in ("auto", "required") and _tools(inner.get("tools")) is None
    else:
        valid = inner is not None and isinstance(inner.get("name"), str)
    return None if valid else 'must be "none", "auto", "required" or name a tool'


FIELDS: dict[str, Check] = {
    "temperature": _number(0, 2), "top_p": _number(0, 1),
    "presence_penalty": _number(-2, 2), "frequency_penalty": _number(-2, 2),
    "max_tokens": _integer(1, 2**31 - 1), "max_completion_tokens": _integer(1, 2**31 - 1),
    "n": _integer(1, 128), "seed": _integer(-2**63, 2**63 - 1), "top_logprobs": _integer(0, 20),
    "stream": _boolean, "logprobs": _boolean, "parallel_tool_calls": _boolean, "store": _boolean,
    "stop": _stop, "response_format": _response_format, "tools": _tools, "tool_choice": _tool_choice,
    "reasoning_effort": _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "user": _string, "safety_identifier": _string, "service_tier": _string, "verbosity": _string,
    "stream_options": _stream_options, "logit_bias": _object, "metadata": _object, "audio": _object,
    "prediction": _object, "web_search_options": _object, "modalities": _list_of(str, "strings"),
    "functions": _list_of(dict, "objects"),
    "options": _object,    # not OpenAI's: Ollama's own options, sent by SDK users as extra_body
}

# Values that say the same as leaving the field out; many frameworks send them, and some upstreams refuse them.
NO_OPS = {"n": 1, "stream": False, "logprobs": False, "top_logprobs": 0, "stop": [], "tools": [], "functions": [],
          "logit_bias": {}, "modalities": ["text"], "response_format": {"type": "text"}}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

PARTS: dict[str, Callable[[Json], bool]] = {    # part type -> does it hold what it must?
    "text": lambda part: isinstance(part.get("text"), str),
    "refusal": lambda part: isinstance(part.get("refusal"), str),
    "image_url": lambda part: isinstance(part.get("image_url"), dict) and isinstance(part["image_url"].get("url"), str),
    "input_audio": lambda part: isinstance(part.get("input_audio"), dict),
    "file": lambda part: isinstance(part.get("file"), dict) and all(
        isinstance(part["file"].get(name) or "", str) for name in ("file_id", "file_data", "filename")),
}


def parse_request(raw: bytes) -> ChatRequest:
    """The request that a client's bytes ask for.

    Raises BadRequest, which names the parameter, for fields whose type or range is not that of OpenAI's reference.
    """
    body = _json_object(raw)
    model = _model_name(body.pop("model", None))
    for name, value in body.items():
        if value is not None and name in FIELDS:
            _refuse(name, FIELDS[name](value))
    kept = {name: value for name, value in body.items()
            if value is not None and not (name in NO_OPS and value == NO_OPS[name])}
    kept["messages"] = _messages(body.get("messages"))
    for name, needed in (("tool_choice", "tools"), ("parallel_tool_calls", "tools"), ("function_call", "functions")):
        if needed not in kept:    # OpenAI refuses the one without the other
            kept.pop(name, None)
    stream = kept.get("stream", False)
    options = kept.get("stream_options", {}) if stream else kept.pop("stream_options", {})
    around = around_model(raw, {**body, "model": model}) if kept == body else None
    return ChatRequest(model, kept, stream, bool(options.get("include_usage")), around)


def _refuse(param: str, complaint: str | None) -> None:
    if complaint:
        raise BadRequest(f"{param} {complaint}.", param=param, code="invalid_value")


def _json_object(raw: bytes) -> Json:
    """The body as an object.  Raises BadRequest for whatever else it is."""
    if too_rich(raw):
        raise BadRequest(f"The body has more than {MAX_JSON_MARKS:,} commas, colons and brackets.", code="invalid_json")
    try:
        body = loads(raw)
    except RecursionError:
        raise BadRequest("The body is JSON nested far too deeply.", code="invalid_json") from None
    except ValueError as error:    # not JSON, not UTF-8, a 5,000-digit integer, 1e999
        raise BadRequest(f"The body is not valid JSON: {_without_content(error)}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest('The body must be a JSON object like {"model": "auto", "messages": […]}.', code="invalid_json")
    if is_too_deep(raw, body):
        raise BadRequest(f"The body nests more than {MAX_JSON_DEPTH} levels deep.", code="invalid_json")
    return body


def _without_content(error: ValueError) -> str:
    """A parse error's text without the piece of prompt that some of them quote."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "it holds a number out of range"


def _model_name(model: Any) -> str:
    if model is None:
        raise BadRequest('model is missing: send "model": "auto", or see GET /v1/models.', param="model",
                         code="missing_required_parameter")
    # It ends up in headers: no control characters, line ends or lone surrogates.
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_NAME or not model.isprintable():
        raise BadRequest(f"model must be a printable string of 1 to {MAX_MODEL_NAME} characters.", param="model",
                         code="invalid_value")
    return model


def _messages(messages: Any) -> list[Json]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message.", param="messages",
                         code="invalid_value" if messages is not None else "missing_required_parameter")
    return [_message(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _message(where: str, message: Any) -> Json:
    """One checked message, without its nulls."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequest(f"{where} must be an object whose role is one of {', '.join(ROLES)}.", param=where,
                         code="invalid_value")
    checked: Json = {name: value for name, value in message.items() if value is not None or name == "content"}
    role, content = checked["role"], checked.get("content")
    if content is None and role in ("system", "developer", "user"):
        raise BadRequest(f"{where}.content is missing.", param=f"{where}.content", code="missing_required_parameter")
    if isinstance(content, list):
        checked["content"] = [_part(f"{where}.content[{number}]", part) for number, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        _refuse(f"{where}.content", "must be a string or a list of content parts")
    if role == "tool" or "tool_call_id" in checked:
        _refuse(f"{where}.tool_call_id", _string(checked.get("tool_call_id")))
    if "refusal" in checked:
        _refuse(f"{where}.refusal", _string(checked["refusal"]))
    if "function_call" in checked:
        _refuse(f"{where}.function_call", _tool_calls([{"id": "", "function": checked["function_call"]}]))
    if "tool_calls" in checked:
        _refuse(f"{where}.tool_calls", _tool_calls(checked["tool_calls"]))
        if not checked["tool_calls"]:
            del checked["tool_calls"]
    return checked


def _part(where: str, part: Any) -> Json:
    """One checked content part; an image_url that is a bare string becomes the object it should be."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequest(f"{where} must be an object with a type.", param=where, code="invalid_value")
    if part["type"] == "image_url" and isinstance(part.get("image_url"), str):
        part = {**part, "image_url": {"url": part["image_url"]}}
    checked: Json = part
    if checked["type"] in PARTS and not PARTS[checked["type"]](checked):
        raise BadRequest(f"{where} is not a well-formed {checked['type']} part.", param=where, code="invalid_value")
    return checked


def _tool_calls(calls: Any) -> str | None:
    if not isinstance(calls, list):
        return "must be a list"
    for call in calls:
        inner = _inner(call, "function") or {}
        if not (isinstance(inner.get("name"), str) and isinstance(inner.get("arguments", inner.get("input")), str)
                and isinstance(call.get("id"), str)):
            return 'must hold calls like {"id": …, "type": "function", "function": {"name": …, "arguments": "{}"}}'
    return None


def needs_of(request: ChatRequest) -> frozenset[str]:
    """What a model must be able to do for a request, in Ollama's words for it (/api/show, capabilities)."""
    pictures = any(part["type"] == "image_url" for _, part in request.parts())
    return frozenset({"vision"} if pictures else ()) | frozenset({"tools"} if "tools" in request.body else ())


# === 4. Monitors ======================================================================================================
# uses: 1 2
# How are the device and the network?  A monitor samples facts (IO) and judges them (pure); of requests it knows only
# whether they got through, and nothing of what its verdict leads to.  Each runs on a thread of its own, so that a probe
# which hangs delays no other.
# To add one: subclass Monitor, fill sample and judge, and name it in MONITORS; policy folds it in by its side.

@dataclasses.dataclass(frozen=True)
class Probe:
    """What the probe of an endpoint found."""
    status: int
    models: tuple[Model, ...] | None
    latency_ms: float    # from request to answer, without the time that the server says it worked


Fetch = Callable[[Endpoint], Probe]    # probes an endpoint; raises UpstreamError


class Steady:
    """A level that turns worse after `worse_after` samples in a row, and better only after `better_after_s` seconds of
    better ones: a spike reads as nothing, and a link that flaps as one that is down."""

    def __init__(self, worse_after: int, better_after_s: float) -> None:
        self._worse_after, self._better_after_s = worse_after, better_after_s
        self._level: Level | None = None
        self._worse: list[Level] = []                # the samples in a row that were worse than the level
        self._better: tuple[float, Level] | None = None    # since when all were better, and the worst of them

    def feed(self, level: Level, now: float) -> Level:
        """The level that counts after one more sample, taken at `now` (seconds of any clock)."""
        if self._level is None:
            self._level = level
        self._worse = [*self._worse, level] if level > self._level else []
        since, worst = self._better or (now, level)
        self._better = (since, max(worst, level)) if level < self._level else None
        if len(self._worse) >= self._worse_after:
            self._level, self._worse = min(self._worse), []
        elif self._better and now - since >= self._better_after_s:
            self._level, self._better = self._better[1], None
        return self._level


class Monitor:
    """One thing that is watched.  `reading` is written by the monitor's own thread only."""
    name: ClassVar[str] = ""
    worse_after: ClassVar[int] = 2    # samples in a row

    def __init__(self, settings: Settings, side: Side, endpoint: Endpoint | None = None) -> None:
        self.settings, self.side, self.endpoint = settings, side, endpoint
        self.reading = Reading(side, Level.GOOD, "", {}, endpoint, known=False)
        self.wake = threading.Event()    # set it to have the next sample at once
        self._steady, self._fresh = Steady(self.worse_after, settings.better_after_s), self.reading
        self._found: dict[str, Json] = {}    # the last facts of each function that `read` has called
        self._told: set[str] = set()         # kinds of failure that the log has

    def sample(self) -> Json:
        """Facts of now.  May block; any exception keeps the last reading."""
        raise NotImplementedError

    def judge(self, facts: Json) -> Reading:
        """The verdict on facts.  Pure."""
        raise NotImplementedError

    def every_s(self) -> float:
        """Seconds until the next sample."""
        raise NotImplementedError

    def read(self, function: Callable[..., Json], *given: Any) -> Json:
        """The facts that a function finds: none while it fails, as not every system has or allows what it asks for, but
        its last ones, marked as stale, once it has worked."""
        name = function.__name__
        try:
            self._found[name] = function(*given)
        except Exception as error:
            if name not in self._found:
                return {}
            self.say_once(error)
            return {**self._found[name], f"{self.name}_stale": True}
        return self._found[name]

    def say_once(self, error: Exception) -> None:
        """Log a failure, unless one of its kind has been logged: samples are taken every second."""
        kind = type(error).__name__
        if kind not in self._told:
            log.warning("monitor %s failed: %s: %s", self.name, kind, error)
        self._told.add(kind)

    def tell(self, lost: bool) -> None:
        """A real request to the endpoint found it gone, or there: evidence as good as a sample's."""

    def step(self, now: float) -> None:
        """Sample, judge, and publish a reading whose level is steady."""
        fresh, before = self.judge(self.sample()), self.reading.reason
        level = self._steady.feed(fresh.level, now)
        reason = fresh.reason if level else ""
        if level > fresh.level:
            reason = before if before.startswith("recovering") else f"recovering: {before}"
        self._fresh, self.reading = fresh, dataclasses.replace(fresh, level=level, reason=reason)

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        """The monitors of this kind that a server with these targets wants."""
        raise NotImplementedError


# --- 4. The device ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Threshold:
    """The values of a fact from which local is constrained and critical, and how a reason says it."""
    fact: str
    words: str
    constrained: float
    critical: float
    falling: bool = False    # low values are the bad ones

    def level(self, value: float) -> Level:
        sign = -1 if self.falling else 1
        return (Level.OUT if sign * value >= sign * self.critical else
                Level.STRAINED if sign * value >= sign * self.constrained else Level.GOOD)


def worst(facts: Json, limits: Iterable[Threshold]) -> tuple[Level, str]:
    """The worst level that a limit gives, and all that is not well.  A fact that is missing is no trouble."""
    found = [(limit.level(facts[limit.fact]), limit.words.format(facts[limit.fact]))
             for limit in limits if limit.fact in facts]
    return max((level for level, _ in found), default=Level.GOOD), ", ".join(words for level, words in found if level)


def local_is_here(targets: Iterable[Target]) -> bool:
    """Whether the state of this device matters: some local model runs on it."""
    return any(target.side is Side.LOCAL and target.endpoint.on_device for target in targets)


class ServerProcesses:
    """The processes of local model servers: what they use for our answers must not read as a busy machine.

    Those that the system does not let us see, as other users' on macOS, are not counted.
    """
    names = ("ollama", "llama", "lm studio", "lms", "vllm")
    afresh_s = 60.0    # until all are looked at again: exec changes a name, and so do vLLM's workers; pids are reused

    def __init__(self) -> None:
        self._pids: set[int] = set()                    # all there were at the last call
        self._found: dict[int, tuple[Any, float]] = {}  # pid -> its psutil.Process, its CPU seconds at the last call
        self._afresh_at = -math.inf

    @property
    def pids(self) -> frozenset[int]:
        """Those that the last cpu_s() found."""
        return frozenset(self._found)

    def cpu_s(self) -> float:
        """CPU seconds that they used since the last call."""
        import psutil
        self._look()
        used_s = 0.0
        for pid, (process, before_s) in self._found.items():
            with contextlib.suppress(psutil.Error):
                now_s = sum(process.cpu_times()[:2])    # user and system
                used_s += max(0.0, now_s - before_s)    # less: another process has got its pid
                self._found[pid] = process, now_s
        return used_s

    def private_bytes(self) -> int:
        """Memory of theirs alone.  Mapped weights are not: they are page cache (Linux), so available anyway."""
        import psutil
        total = 0
        for process, _ in self._found.values():
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                total += memory.rss - getattr(memory, "shared", 0)
        return total

    def _look(self) -> None:
        """Find new ones and forget the ended.  Only new pids are asked for their names: 60 us each, 300 a desktop."""
        import psutil
        pids, now = set(psutil.pids()), time.monotonic()
        afresh = now >= self._afresh_at
        kept = {pid: server for pid, server in self._found.items()
                if pid in pids and not (afresh and not server[0].is_running())}    # not running: its pid was given away
        before = (self._pids or pids) - (self._found.keys() - kept.keys())
        for pid in pids - (kept.keys() if afresh else before):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.name().lower().startswith(self.names):
                    # All that a new process used counts; one that was there before under another name counts from now.
                    kept[pid] = process, sum(process.cpu_times()[:2]) if pid in before else 0.0
        self._pids, self._found = pids, kept
        self._afresh_at = now + self.afresh_s if afresh else self._afresh_at


class ResourceMonitor(Monitor):
    """CPU, memory and load of the device, less what the model servers use, by psutil.

    Without psutil nothing is known and local counts as available.
    """
    name = "resources"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Side.LOCAL)
        self._limits = (
            Threshold("cpu_percent", "cpu {:.0f}%", settings.cpu_constrained_percent, settings.cpu_critical_percent),
            Threshold("memory_percent", "memory {:.0f}%", settings.memory_constrained_percent,
                  settings.memory_critical_percent),
            Threshold("load_per_core", "load {:g}", settings.load_constrained, settings.load_critical))
        self._servers = ServerProcesses()
        self._cpu_before: tuple[float, float] | None = None
        self._load_ours, self._load_at = 0.0, time.monotonic()

    def sample(self) -> Json:
        import psutil  # noqa: F401 - 31 ms to import: not on the way to the first answer; the server starts without it
        facts: Json = {}
        ours_s = 0.0
        with contextlib.suppress(Exception):
            ours_s = self._servers.cpu_s()
        for function in (self._cpu, self._memory, self._load):    # Android and some containers deny one or the other
            facts.update(self.read(function, ours_s))
        return facts

    def _cpu(self, ours_s: float) -> Json:
        """CPU use since the last call.  Not psutil.cpu_percent(): its idea of the last call is its own."""
        import psutil
        times = psutil.cpu_times()._asdict()
        total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)    # in user and nice too
        busy = total - times["idle"] - times.get("iowait", 0.0)
        before, self._cpu_before = self._cpu_before, (busy, total)
        if before is None or total <= before[1]:    # the first one, or one in the same tick
            return {}
        return {"cpu_percent": round(max(0.0, 100 * (busy - before[0] - ours_s) / (total - before[1])), 1)}

    def _memory(self, _: float) -> Json:
        import psutil
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        ours = min(self._servers.private_bytes(), used)
        return {"memory_percent": round(100 * (used - ours) / (memory.total - ours), 1),
                "memory_free_mb": memory.available >> 20}

    def _load(self, ours_s: float) -> Json:
        """The load of one minute, less the cores that the servers used, damped as the kernel damps it."""
        import psutil
        passed_s = time.monotonic() - self._load_at
        self._load_at += passed_s
        keep = math.exp(-passed_s / 60)
        self._load_ours = keep * self._load_ours + (1 - keep) * ours_s / max(passed_s, 0.01)
        others = max(0.0, psutil.getloadavg()[0] - self._load_ours)
        return {"load_per_core": round(others / (psutil.cpu_count() or 1), 2)}

    def judge(self, facts: Json) -> Reading:
        return Reading(self.side, *worst(facts, self._limits), facts)

    def every_s(self) -> float:
        return 1.0

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        return [cls(settings)] if local_is_here(targets) else []


class PowerMonitor(Monitor):
    """Battery and temperature, where the device has a battery and tells temperatures."""
    name = "power"
    worse_after = 1

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Side.LOCAL)
        self._battery = Threshold("battery_percent", "battery {:.0f}%", settings.battery_constrained_percent,
                              settings.battery_critical_percent, falling=True)

    def sample(self) -> Json:
        import psutil  # noqa: F401 - as above
        return {**self.read(self._charge), **self.read(self._heat)}

    @staticmethod
    def _charge() -> Json:
        import psutil
        battery = psutil.sensors_battery()
        if battery is None or not has_battery():
            return {}
        return {"battery_percent": round(battery.percent, 1), "battery_plugged": battery.power_plugged}

    @staticmethod
    def _heat() -> Json:
        import psutil
        return hottest(psutil.sensors_temperatures())

    def judge(self, facts: Json) -> Reading:
        limits = [self._battery] if facts.get("battery_plugged") is False else []    # None: the system does not say
        if "temperature_c" in facts:
            limits.append(Threshold("temperature_c", "temperature {:.0f} C", facts["temperature_high_c"],
                                facts["temperature_critical_c"]))
        return Reading(self.side, *worst(facts, limits), facts)

    def every_s(self) -> float:
        return 10.0

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        return [cls(settings)] if local_is_here(targets) else []


def has_battery(folder: str = "/sys/class/power_supply") -> bool:
    """False on a PC whose only battery is its mouse's: psutil takes it for the PC's, but Linux tells its scope."""
    scopes = [text_in(f"{path[:-len('capacity')]}scope") for path in glob.glob(f"{folder}/*/capacity")]
    return scopes == [] or any(scope != "Device" for scope in scopes)


_CPU_SENSOR = re.compile("cpu|soc|core|package", re.I)


def temperature_limits(chip: str, sensor: Any) -> tuple[float, float] | None:
    """From where a sensor of psutil's is high and critical; None for one that can't be judged."""
    high, critical = sensor.high or 0.0, sensor.critical or 0.0
    if chip == "acpitz":    # whatever the firmware's author wrote: 8.3 degrees of 31.3 in bpytop's issue 185
        return None
    if critical >= high >= 50:
        return high, critical
    if chip in ("k10temp", "zenpower"):    # AMD's desktop chips boost up to 95 degrees by design
        return 95.0, 100.0
    return (80.0, 90.0) if _CPU_SENSOR.search(f"{chip} {sensor.label}") else None


def hottest(sensors: Mapping[str, Iterable[Any]]) -> Json:
    """Facts of the sensor that is nearest to its limit, or past it the farthest; none where none can be judged."""
    found = []
    for chip, group in sensors.items():
        for sensor in group:
            limits = temperature_limits(chip, sensor)
            if limits and 0 < sensor.current < 150:    # beyond that it is broken
                level = Threshold("", "", *limits).level(sensor.current)
                found.append((level, sensor.current - limits[0], sensor.current, *limits))
    if not found:
        return {}
    _, _, current, high, critical = max(found)
    return {"temperature_c": round(current, 1), "temperature_high_c": high, "temperature_critical_c": critical}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What is known of a GPU; of memory only where it has its own."""
    busy_percent: float | None = None
    used_mb: float | None = None
    total_mb: float | None = None


# The pids of model servers -> the GPUs, and the MB of their memory that those pids hold, None where that is unknown
GpuSource = Callable[[frozenset[int]], tuple[list[Gpu], Optional[float]]]


class GpuMonitor(Monitor):
    """Use of the GPU and of its memory by others than the model servers."""
    name = "gpu"
    window_s = 0.3        # in which the servers' work tells whose the GPU's use is
    own_cores = 0.2       # servers that use more are at work
    share = 0.002         # of a core, that sampling may cost

    def __init__(self, settings: Settings, sources: Sequence[GpuSource]) -> None:
        super().__init__(settings, Side.LOCAL)
        limits = settings.gpu_constrained_percent, settings.gpu_critical_percent
        self._limits = (Threshold("gpu_percent", "gpu {:.0f}%", *limits),
                        Threshold("gpu_memory_percent", "gpu memory {:.0f}%", *limits))
        self._sources, self._servers, self._took_s = sources, ServerProcesses(), 0.0

    def sample(self) -> Json:
        self._servers.cpu_s()
        begun = time.monotonic()
        if self._servers.pids:
            time.sleep(self.window_s)
        asked = time.monotonic()
        gpus, own_mb = self._ask(self._servers.pids)
        done = time.monotonic()
        self._took_s = done - asked
        return gpu_facts(gpus, own_mb, self._servers.cpu_s() > self.own_cores * (done - begun))

    def _ask(self, servers: frozenset[int]) -> tuple[list[Gpu], float | None]:
        """What the first source says that knows anything."""
        for source in self._sources:
            gpus, own_mb = source(servers)
            if any(gpu != Gpu() for gpu in gpus):
                return gpus, own_mb
        return [], None

    def judge(self, facts: Json) -> Reading:
        return Reading(self.side, *worst(facts, self._limits), facts)

    def every_s(self) -> float:
        # nvidia-smi takes from 30 ms to seconds, most of them in the driver, so it paces itself: even if all of its
        # time were work, it would be 0.2% of a core.  One that hangs is asked again after 40 minutes.
        return max(5.0, self._took_s / self.share)

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        sources = gpu_sources() if local_is_here(targets) else []
        return [cls(settings, sources)] if sources else []


def gpu_facts(gpus: Iterable[Gpu], own_mb: float | None, own_use: bool) -> Json:
    """Facts of GPUs: the use of the least busy one, which is the model servers' own where they are at work."""
    facts: Json = {}
    busy = [gpu.busy_percent for gpu in gpus if gpu.busy_percent is not None]
    if busy:
        facts["gpu_own_percent" if own_use else "gpu_percent"] = min(busy)
    memory = [(gpu.used_mb, gpu.total_mb) for gpu in gpus if gpu.used_mb is not None and gpu.total_mb]
    if memory:
        used_mb, total_mb = (sum(column) for column in zip(*memory))
        facts["gpu_memory_free_mb"] = round(total_mb - used_mb)
        if own_mb is not None:
            facts["gpu_memory_percent"] = round(100 * max(0.0, used_mb - own_mb) / total_mb, 1)
    return facts


# Where Jetsons tell their GPU's load (jetson_stats' issue 360 and its gpu.py: Nano, Xavier, Orin; a devfreq otherwise).
JETSON_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/*gpu*/load", "sys/class/devfreq/*gpu*/device/load",
                "sys/class/devfreq/*.g[apv]1*b/device/load")
WSL = "/usr/lib/wsl/lib"    # where nvidia-smi is on WSL, on PATH or not; it knows of no processes there
APU_MB = 2048               # AMD's built-in GPUs have less of their own: a part of RAM, which models do not use


def gpu_sources(root: str = "/") -> list[GpuSource]:
    """How the GPUs of this device can be asked, best way first; empty where there is none."""
    sources: list[GpuSource] = []
    loads = [path for pattern in JETSON_LOADS for path in glob.glob(root + pattern)]
    if loads:    # before nvidia-smi, which is there too and says [N/A]
        sources.append(lambda _: (jetson_gpus(text_in(loads[0])), None))
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=root + WSL[1:])
    if smi:
        sources.append(lambda servers: ask_nvidia(smi, root, servers))
    cards = [os.path.dirname(path) for path in glob.glob(root + "sys/class/drm/card*/device/gpu_busy_percent")]
    if cards:
        sources.append(lambda _: (amd_gpus(map(ask_amd, cards)), None))
    if sys.platform == "darwin":
        sources.append(lambda _: (apple_gpus(output_of(*"ioreg -r -d 1 -w 0 -c IOAccelerator".split())), None))
    return sources


def ask_nvidia(smi: str, root: str, servers: frozenset[int]) -> tuple[list[Gpu], float | None]:
    """NVIDIA's GPUs by nvidia-smi, and what the servers hold of their memory."""
    devices = glob.glob(root + "sys/bus/pci/drivers/nvidia/*:*")
    if devices and all(map(asleep, devices)):
        return [Gpu(0.0)], None
    as_csv = "--format=csv,noheader,nounits"
    gpus = nvidia_gpus(output_of(smi, "--query-gpu=utilization.gpu,memory.used,memory.total", as_csv))
    if not servers or WSL in smi:    # one that we don't know, in a container say, may hold what is in use
        return gpus, None
    return gpus, nvidia_share(output_of(smi, "--query-compute-apps=pid,used_gpu_memory", as_csv), servers)


def ask_amd(device: str) -> Gpu:
    """One of AMD's GPUs by the files of its driver, which count memory in bytes."""
    if asleep(device):
        return Gpu(0.0)
    busy, used, total = (number_in(text_in(f"{device}/{name}"))
                         for name in ("gpu_busy_percent", "mem_info_vram_used", "mem_info_vram_total"))
    return Gpu(busy, None if used is None else used / 2**20, None if total is None else total / 2**20)


def asleep(device: str) -> bool:
    """Whether a PCI device is switched off until it is needed: then it is idle, and a question would wake it."""
    return text_in(f"{device}/power/runtime_status") == "suspended"


def nvidia_gpus(text: str | None) -> list[Gpu]:
    """GPUs from lines like "37, 2048, 24564"; DGX Spark: "0, [N/A], [N/A]" (nvitop's pull request 208)."""
    rows = [[number_in(cell) for cell in line.split(",")] for line in (text or "").splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 3]


def nvidia_share(text: str | None, servers: frozenset[int]) -> float | None:
    """MB that these processes hold, from lines like "1234, 4096"; None where it does not say (Windows: "[N/A]")."""
    held_mb = 0.0
    for line in ("?" if text is None else text).splitlines():
        pid, _, used_mb = map(number_in, line.partition(","))
        if pid is None or pid in servers and used_mb is None:
            return None
        held_mb += used_mb if used_mb and pid in servers else 0.0
    return held_mb


def amd_gpus(gpus: Iterable[Gpu]) -> list[Gpu]:
    """Those that models run on: built-in ones only where there is no other, and without their memory."""
    found = list(gpus)
    return [gpu for gpu in found if (gpu.total_mb or 0.0) >= APU_MB] or [Gpu(gpu.busy_percent) for gpu in found]


def jetson_gpus(text: str) -> list[Gpu]:
    """The GPU from its load per mille.  Other boards write "45@800000000Hz", and run no models on theirs."""
    return [Gpu(int(text) / 10)] if text.isdigit() and int(text) <= 1000 else []


def apple_gpus(text: str | None) -> list[Gpu]:
    """GPUs from what ioreg shows of IOAccelerators: {…,"Device Utilization %"=31,…}."""
    return [Gpu(float(percent)) for percent in re.findall(r'"Device Utilization %"\s*=\s*(\d+)', text or "")]


def number_in(text: str) -> float | None:
    """The number that a tool or a driver wrote, or None for "[N/A]", "[Not Supported]" and whatever else."""
    with contextlib.suppress(ValueError):
        return finite(text) if finite(text) >= 0 else None
    return None


def text_in(path: str) -> str:
    """What a small file says, "" where it can't be read."""
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        return file.read(4096).strip()
    return ""


COMMAND_S = 5.0    # and a command that takes longer is killed


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it fails or hangs."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=COMMAND_S, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("ascii", "replace") if done.returncode == 0 else None


# --- 4. Endpoints, and the watch over all -----------------------------------------------------------------------------

class ConnectivityMonitor(Monitor):
    """Whether an endpoint answers, how fast and how surely, and which models it says it has, in which state."""
    name = "connectivity"
    window = 10         # probes and requests that the share of losses is taken from
    outage = 2          # lost in a row are no loss but an outage
    soonest_s = 1.0     # the first probe after trouble; each further one waits twice as long,
    latest_s = 15.0     # up to this

    def __init__(self, settings: Settings, side: Side, endpoint: Endpoint, fetch: Fetch) -> None:
        super().__init__(settings, side, endpoint)
        self._watched, self._fetch = endpoint, fetch
        self._lost: collections.deque[bool] = collections.deque(maxlen=self.window)
        self._models: tuple[Model, ...] | None = None    # kept while it does not answer
        self._best_share: dict[str, float] = {}          # model -> the most of it that was seen on the GPU
        self._pause_s = self.soonest_s
        self._answered = False                           # it has answered a request since a probe found it unwell

    def sample(self) -> Json:
        facts: Json = {"url": self._watched.base_url}
        answered, self._answered = self._answered, False
        try:
            probe = self._fetch(self._watched)
            facts.update(status=probe.status, latency_ms=round(probe.latency_ms, 2))
            models = self._with_spills(probe.models)
            self._models = self._models if models is None else models
        except UpstreamError as error:
            facts["error"] = error.brief
        facts.update({"answers": True} if answered and "error" in facts else {})
        self._count("error" in facts)
        facts["loss_percent"] = round(100.0 * sum(self._lost) / self.window, 1)
        return {**facts, "models": self._models}

    def _with_spills(self, models: tuple[Model, ...] | None) -> tuple[Model, ...] | None:
        """The models, those marked that were on the GPU and have quietly gone to the CPU (Ollama does so)."""
        marked, shares = [], {}
        for model in models or ():
            best = self._best_share.get(model.name, 0.0)
            share = model.gpu_share if model.gpu_share is not None else best
            shares[model.name] = best = max(share, best)
            marked.append(dataclasses.replace(model, spilled=share < best / 2))
        if models is None:
            return None
        self._best_share = shares    # no longer of those that are gone
        return tuple(marked)

    def judge(self, facts: Json) -> Reading:
        facts = dict(facts)
        models = facts.pop("models", None)
        level, reason = self._verdict(facts)
        return Reading(self.side, level, reason, facts, self.endpoint, models)

    def _verdict(self, facts: Json) -> tuple[Level, str]:
        where = self._watched.base_url.split("//")[1]
        if "error" in facts:    # a key that must not list models, or a server that can't, may answer all the same
            return Level.STRAINED if "answers" in facts else Level.OUT, f"{where}: {facts['error']}"
        if facts["status"] == 401:    # 403 may just mean that this key must not list models
            return Level.OUT, f"{where}: its key was refused"
        if self.side is Side.LOCAL:     # on the device neither latency nor loss says anything about the network
            return Level.GOOD, ""
        if facts["latency_ms"] > self.settings.latency_degraded_ms:
            return Level.STRAINED, f"latency {facts['latency_ms']:.0f} ms"
        if facts["loss_percent"] > self.settings.loss_degraded_percent:
            return Level.STRAINED, f"{facts['loss_percent']:.0f}% of probes lost"
        return Level.GOOD, ""

    def _count(self, lost: bool) -> None:
        if not lost and self._lost and self._lost[-1] and [*self._lost][-self.outage:] == [True] * self.outage:
            self._lost.clear()    # an outage is over: how long it was says nothing of the link that is back
        self._lost.append(lost)

    def tell(self, lost: bool) -> None:
        self._count(lost)
        self._answered = not lost and self._fresh.level is not Level.GOOD
        if lost or self._fresh.level is Level.OUT:
            self._pause_s = self.soonest_s
            self.wake.set()

    def every_s(self) -> float:
        # The local server is asked often: it is near, and may be started or get a new model at any moment.
        usual = 5.0 if self.side is Side.LOCAL else self.settings.probe_every_s
        if self._fresh.level is Level.GOOD:
            self._pause_s = self.soonest_s
            return usual if self.reading.level is Level.GOOD else min(self.soonest_s, usual)
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, self.latest_s)
        return min(pause, usual)

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        sides: dict[Endpoint, Side] = {}    # one that serves both sides is watched as a local one
        for target in targets:
            if not target.endpoint.lacks_key:
                sides.setdefault(target.endpoint, target.side)
        return [cls(settings, side, endpoint, fetch) for endpoint, side in sides.items()]


MONITORS: tuple[type[Monitor], ...] = (ResourceMonitor, PowerMonitor, GpuMonitor, ConnectivityMonitor)


class Watch:
    """Runs the monitors, each on its own thread."""
    apart_s = 0.1    # between two samples at least, however often one is woken

    def __init__(self, monitors: Sequence[Monitor], sampled: Callable[[], None] = lambda: None) -> None:
        """`sampled` is called after each probe, on its monitor's thread, once all monitors have had their first sample.
        """
        self.monitors, self._after, self._settled = tuple(monitors), sampled, False
        self._of = {endpoint: [monitor for monitor in monitors if monitor.endpoint == endpoint]
                    for endpoint in {monitor.endpoint for monitor in monitors}}
        self._stop = threading.Event()
        self._sampled = [threading.Event() for _ in self.monitors]
        self._threads = [threading.Thread(target=self._run, args=pair, name=f"watch-{pair[0].name}", daemon=True)
                         for pair in zip(self.monitors, self._sampled)]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What is known now; never waits."""
        return tuple([monitor.reading for monitor in self.monitors])

    def tell(self, endpoint: Endpoint, lost: bool) -> None:
        """Pass on what a real request found at an endpoint; never waits."""
        for monitor in self._of.get(endpoint, ()):
            monitor.tell(lost)

    def look(self, endpoint: Endpoint, seen: Callable[[Reading], bool]) -> None:
        """Have an endpoint probed until its reading shows something that has just changed, for a second at most."""
        deadline = time.monotonic() + 1
        for monitor in self.monitors:
            while monitor.endpoint == endpoint and not seen(monitor.reading) and time.monotonic() < deadline:
                monitor.wake.set()
                self._stop.wait(0.02)

    def first(self, endpoint: Endpoint) -> threading.Event:
        """What is set once an endpoint has been probed; at once for one that is not watched."""
        for monitor, sampled in zip(self.monitors, self._sampled):
            if monitor.endpoint == endpoint:
                return sampled
        return _SET

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def settle(self, limit_s: float) -> None:
        """Wait until every monitor has sampled once, `limit_s` seconds at most."""
        deadline = time.monotonic() + limit_s
        for sampled in self._sampled:
            sampled.wait(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """End the threads; one that is stuck in a probe ends when its probe does."""
        self._stop.set()
        for monitor in self.monitors:
            monitor.wake.set()
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(0.2)

    def _run(self, monitor: Monitor, sampled: threading.Event) -> None:
        while not self._stop.is_set():
            monitor.wake.clear()
            try:
                try:
                    monitor.step(time.monotonic())
                finally:
                    sampled.set()
                self._announce(monitor)
            except Exception as error:  # whatever psutil or a platform comes up with: the last reading stays
                monitor.reading = monitor.reading.made_stale(monitor.name)
                monitor.say_once(error)
            if monitor.wake.wait(monitor.every_s()):
                self._stop.wait(self.apart_s)

    def _announce(self, monitor: Monitor) -> None:
        """Tell of a sample that may matter to others: of an endpoint's models, or the last one that was missing."""
        settled, self._settled = self._settled, all(event.is_set() for event in self._sampled)
        if self._settled and (monitor.endpoint or not settled):
            self._after()


_SET = threading.Event()
_SET.set()


# === 5. Policy ========================================================================================================
# uses: 1; pure
# Which target first?  Decides from a snapshot of the readings and of what requests have shown.  It has no clock and no
# memory, so a decision can be replayed; what it decides from is remembered elsewhere (8), as the values defined here.

REST_S, MAX_REST_S = 1.0, 60.0                      # after a fault, doubled for each further one in a row
ACCOUNT_REST_S, MAX_ACCOUNT_REST_S = 600.0, 3600.0    # a person must act: not soon
MISSING_REST_S = 60.0                               # the model may be pulled or named rightly at any time

_RESTS = {Fault.DOWN: (REST_S, MAX_REST_S), Fault.BUSY: (REST_S, MAX_REST_S),
          Fault.ACCOUNT: (ACCOUNT_REST_S, MAX_ACCOUNT_REST_S), Fault.MISSING: (MISSING_REST_S, MISSING_REST_S)}


@dataclasses.dataclass(frozen=True)
class Breaker:
    """A target's circuit breaker: closed; open while it rests; then half-open, until a trial has shown how it is."""
    failures: int = 0         # in a row
    until: float = 0.0        # when its rest ends, in the seconds of the ledger's clock
    reason: str = ""
    fault: Fault | None = None    # the last one
    last_hope: bool = True    # whether it may be tried even while it rests, when everything else has failed

    def rest_s(self, now: float) -> float:
        """Seconds that it rests from now on."""
        return max(0.0, self.until - now)

    def failed(self, error: UpstreamError, now: float) -> Breaker:
        """The breaker after a fault.  Only what tells of the target's health counts (`_RESTS`).

        Requests that fail together count as one: those that come in while it rests don't make the rest longer.
        """
        if error.fault not in _RESTS:
            return self
        first_s, most_s = _RESTS[error.fault]
        resting = self.rest_s(now) > 0
        failures = self.failures if resting else self.failures + 1
        rest_s = min(first_s * 2.0 ** min(failures - 1, 60), most_s)
        asked_s = error.retry_after_s or 0.0
        hopeless = error.fault is Fault.ACCOUNT or asked_s > 0 or resting and not self.last_hope
        return Breaker(failures, max(self.until, now + max(rest_s, asked_s)), error.brief, error.fault, not hopeless)

    def succeeded(self) -> Breaker:
        """The breaker after an answer: closed."""
        return Breaker()


class Pace(NamedTuple):    # made anew with each answer, as the record is: a dataclass takes more than twice as long
    """How fast a target has answered lately."""
    firsts_s: tuple[float, ...] = ()    # seconds to the first content
    tokens_per_s: float = 0.0           # after it, a moving average
    load_s: float = 0.0                 # the model's last load into memory

    def learned(self, first_s: float | None, tokens: int, seconds: float) -> Pace:
        """The pace after one more answer: its first content came after `first_s`, its tokens took `seconds` more."""
        firsts = (*self.firsts_s, first_s)[-20:] if first_s is not None else self.firsts_s
        rate = tokens / seconds if tokens > 1 and seconds > 0.001 else self.tokens_per_s
        rate = 0.7 * self.tokens_per_s + 0.3 * rate if self.tokens_per_s else rate
        return Pace(firsts, rate, self.load_s)    # _replace takes three times as long

    def first_s(self, share: float) -> float:
        """The time within which this share of the first contents came, in seconds."""
        return sorted(self.firsts_s)[int(share * (len(self.firsts_s) - 1) + 0.5)] if self.firsts_s else 0.0


class Record(NamedTuple):
    """What requests have shown of a target."""
    breaker: Breaker = Breaker()
    trial: bool = False                      # a request is finding out whether it is well again
    refused: frozenset[str] = frozenset()    # parameters that the model refuses
    pace: Pace = Pace()
    context: int = 0                         # the context that it was last asked to load, in tokens; 0: its own


UNTRIED = Record()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All that a decision is made from."""
    readings: tuple[Reading, ...]
    targets: tuple[Target, ...]
    records: Mapping[Target, Record] = dataclasses.field(default_factory=dict)
    in_flight: Mapping[Target, int] = dataclasses.field(default_factory=dict)
    loading: frozenset[Target] = frozenset()
    now: float = 0.0              # of the clock by which breakers rest
    prefer: str = "local"
    slots: int = 1                # requests that a local target answers at once

    def record(self, target: Target) -> Record:
        """What requests have shown of a target."""
        return self.records.get(target, UNTRIED)


class Standing(NamedTuple):
    """What requests show of a target now, as far as its condition depends on it."""
    rest: Condition | None    # while its breaker is not closed and lets nobody through but a trial
    load_s: float
    busy: bool                # a local one that answers as many requests as it does at once


def standing(target: Target, snapshot: Snapshot) -> Standing:
    """How a target stands with requests."""
    record, rest = snapshot.record(target), None
    breaker = record.breaker
    resting = breaker.until > snapshot.now
    if resting or record.trial:
        rest = Condition("resting", f"rests after: {breaker.reason}", Level.OUT,
                         Use.LAST_HOPE if breaker.last_hope or not resting else Use.NO)
    busy = target.side is Side.LOCAL and snapshot.in_flight.get(target, 0) >= snapshot.slots
    return Standing(rest, record.pace.load_s, busy)


def condition(target: Target, snapshot: Snapshot) -> Condition:
    """How a target is, from all that speaks of it: the readings, what is loading, and its standing."""
    reading, stands = reading_of(target, snapshot.readings), standing(target, snapshot)
    model = model_of(target, reading)
    blocked = _obstacle(target, reading, model, snapshot.readings)
    if blocked and not (blocked[0] == "too large" and target in snapshot.loading):    # its load takes that memory
        return Condition(*blocked, Level.OUT, Use.NO)
    if stands.rest:
        return stands.rest
    speaking = [one for one in snapshot.readings if _speaks_of(one, target)]
    level = max((one.level for one in speaking), default=Level.GOOD)
    reasons = [one.reason for one in speaking if one.level == level and one.reason]
    if reading and reading.level is Level.OUT:
        return Condition("unreachable", reading.reason, level)
    state, burden = _burden(target, model, snapshot, stands)
    if burden:
        worse = Level.OUT if state in ("cold", "loading") else Level(min(level + 1, Level.OUT))
        return Condition(state, "; ".join([*reasons, burden]), worse, may_load=level < Level.OUT)
    known = state != "ready" or reading is not None and reading.known
    return Condition(state if known else "unknown", "; ".join(reasons), level, may_load=level < Level.OUT)


def reading_of(target: Target, readings: Iterable[Reading]) -> Reading | None:
    """The reading of the target's endpoint."""
    return next((reading for reading in readings if reading.endpoint == target.endpoint), None)


def _speaks_of(reading: Reading, target: Target) -> bool:
    """Whether a reading counts for a target: the device's load says nothing of a model on another machine."""
    if reading.endpoint:
        return reading.endpoint == target.endpoint
    return reading.side is target.side and (target.side is Side.CLOUD or target.endpoint.on_device)


def model_of(target: Target, reading: Reading | None) -> Model | None:
    """What its endpoint says of a target's model."""
    return next((model for model in (reading and reading.models) or () if same_model(target.model, model.name)), None)


def same_model(asked: str, installed: str) -> bool:
    """Whether two Ollama names mean one model: case does not count, and `:latest` is implied."""
    return asked == installed or full_name(asked) == full_name(installed)


def full_name(name: str) -> str:
    """What the Ollama names of one model have in common."""
    return name.lower() if ":" in name.rsplit("/", 1)[-1] else name.lower() + ":latest"


def _obstacle(target: Target, reading: Reading | None, model: Model | None,
              readings: Sequence[Reading]) -> tuple[str, str] | None:
    """Why a target can't answer as (state, advice), or None: what no order of targets can make good."""
    if target.endpoint.lacks_key:
        return "no key", f"no key: set {target.endpoint.key_variable}"
    if target.endpoint.provider != "ollama" or reading is None or reading.models is None:
        return None
    if not model:
        return "not installed", f"not installed: run `ollama pull {target.model}`"
    if model.remote and target.side is Side.LOCAL:
        return "remote", "answered by ollama.com, so it is not a local model: name it with --cloud-model"
    free = free_bytes(target, readings) if model.cold else None
    if free is not None and model.size > free:
        return "too large", f"would not fit: it takes {model.size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def free_bytes(target: Target, readings: Sequence[Reading]) -> float | None:
    """Memory that a target's model could be loaded into; None where nothing is known of it.

    The GPU's counts too, and what Ollama's other models take, as it makes room for one that is asked for.
    """
    facts: Json = {}
    for reading in readings:
        if reading.side is Side.LOCAL and reading.endpoint is None:
            facts.update(reading.facts)
    if not target.endpoint.on_device or "memory_free_mb" not in facts:
        return None
    own = reading_of(target, readings)
    loaded = [model.size for model in (own and own.models) or () if not model.cold]
    free: float = (facts["memory_free_mb"] + facts.get("gpu_memory_free_mb", 0)) * 2**20
    return free + sum(loaded) if max(loaded, default=0) < 1 << 60 else None    # more than there is: nothing is known


def _burden(target: Target, model: Model | None, snapshot: Snapshot, stands: Standing) -> tuple[str, str]:
    """(state, why a local target now acts worse than its readings say, or "")."""
    if target.side is Side.CLOUD:
        return "ready", ""
    # With --prefer fast `predicted_s` has it anyway.
    quick = 0 < stands.load_s < (math.inf if snapshot.prefer == "fast" else QUICK_LOAD_S)
    if target in snapshot.loading:
        return "loading", "" if quick else f"{target.model} is loading"
    if model and model.cold:
        return "cold", "" if quick else f"{target.model} is not loaded"
    if stands.busy:
        return "busy", "busy"
    if model and model.spilled:
        return "ready", f"{target.model} went from GPU to CPU"
    return "ready", ""


QUICK_LOAD_S = 3.0    # a load that takes no longer is not worth leaving the device for


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How well a side can answer: as well as the best of its targets."""
    level: Level
    reason: str
    known: bool = True

    def describe(self, side: Side) -> str:
        """The level as users know it, with the reason where there is one."""
        return self.word(side) + (f" ({self.reason})" if self.reason else "")

    def word(self, side: Side) -> str:
        """The level as users know it."""
        return WORDS[side][self.level] if self.known else "unknown"


def judge_side(side: Side, snapshot: Snapshot, conditions: Mapping[Target, Condition],
               refusals: Mapping[Target, str]) -> Verdict:
    """One verdict on a side: who refuses the request says nothing for a side that has others."""
    mine = [target for target in conditions if target.side is side]
    if not mine:
        awaited = [reading for reading in snapshot.readings if reading.side is side and reading.endpoint]
        return Verdict(Level.OUT, f"no {side.value} model", all(reading.known for reading in awaited))
    able = [target for target in mine if target not in refusals] or mine
    best = min(able, key=lambda target: (conditions[target].use is Use.NO, conditions[target].level))
    known = all(reading.known for reading in snapshot.readings if _speaks_of(reading, best))
    found = conditions[best]
    return Verdict(found.level, found.reason if known or found.level else "", known or bool(found.level))


_LOCAL_FIRST, _CLOUD_FIRST, _LOCAL_ONLY = (Side.LOCAL, Side.CLOUD), (Side.CLOUD, Side.LOCAL), (Side.LOCAL,)

TABLE: dict[tuple[Level, Level], tuple[Side, ...]] = {    # (local, cloud) -> the order of the sides
    (Level.GOOD, Level.GOOD): _LOCAL_FIRST,
    (Level.GOOD, Level.STRAINED): _LOCAL_FIRST,
    (Level.GOOD, Level.OUT): _LOCAL_ONLY,
    (Level.STRAINED, Level.GOOD): _CLOUD_FIRST,
    (Level.STRAINED, Level.STRAINED): _LOCAL_FIRST,
    (Level.STRAINED, Level.OUT): _LOCAL_ONLY,
    (Level.OUT, Level.GOOD): _CLOUD_FIRST,
    (Level.OUT, Level.STRAINED): _CLOUD_FIRST,
    (Level.OUT, Level.OUT): _LOCAL_ONLY,    # the last resort
}
PREFER_CLOUD = {**TABLE, (Level.GOOD, Level.GOOD): _CLOUD_FIRST, (Level.STRAINED, Level.STRAINED): _CLOUD_FIRST}

TYPICAL_TOKENS = 200    # of an answer whose length nobody knows
SWITCH_BELOW = 0.75     # --prefer fast leaves the table's order only for less than this share of the time


def predicted_s(target: Target, found: Condition, snapshot: Snapshot, tokens: int) -> float:
    """Seconds to a whole answer of so many tokens; 0 where nothing is measured: asking is how to find out.

    Of a cloud the slow tail counts, as its usual time is not what makes people wait.  A local model loads and works off
    its queue first, and a constrained device is about half as fast as it was measured.
    """
    pace = snapshot.record(target).pace
    writing_s = tokens / pace.tokens_per_s if pace.tokens_per_s else 0.0
    if target.side is Side.CLOUD:
        return pace.first_s(0.9) + writing_s
    waves = snapshot.in_flight.get(target, 0) // snapshot.slots
    load_s = pace.load_s if found.state in ("cold", "loading") else 0.0
    return load_s + (1 + waves) * (1 + found.level) * (pace.first_s(0.5) + writing_s)


def rank(snapshot: Snapshot, refusals: Mapping[Target, str], only: Side | None = None, tokens: int = TYPICAL_TOKENS,
         last: Target | None = None) -> Plan:
    """The order in which to try targets, and why.

    `refusals` says what targets can't do of this request; `only` keeps to one side, whatever its level; `tokens` may
    be answered at most; `last` answered this conversation before, so that its prompt may still be in a cache.
    """
    conditions = {target: condition(target, snapshot) for target in snapshot.targets}
    verdicts = {side: judge_side(side, snapshot, conditions, refusals) for side in Side}
    table = PREFER_CLOUD if snapshot.prefer == "cloud" else TABLE
    sides = (only,) if only else table[verdicts[Side.LOCAL].level, verdicts[Side.CLOUD].level]
    usable = [target for target in snapshot.targets if target not in refusals and only in (None, target.side)
              and conditions[target].use is not Use.NO]
    planned = [target for target in usable if conditions[target].use is Use.YES and target.side in sides]
    fast = snapshot.prefer == "fast"
    seconds = {target: predicted_s(target, conditions[target], snapshot, tokens) for target in planned if fast}
    turns = {replica(target): turn for turn, target in reversed([*enumerate(snapshot.targets)])}

    def place(target: Target) -> tuple[Any, ...]:
        """Within its side: how well it is; then its time or its turn, shared by replicas; then its cache."""
        turn = seconds[target] if fast else turns[replica(target)]
        return sides.index(target.side), conditions[target].level, turn, target != last

    order = sorted(planned, key=place)
    if fast and verdicts[Side.LOCAL].level is not Level.OUT:
        order = _sooner_first(order, seconds)
    left_out = [(target, _why_not(target, conditions[target], refusals, only))
                for target in snapshot.targets if target not in usable]
    return Plan(tuple(order), _reason(verdicts, only, [(target, seconds[target]) for target in order if fast]),
                tuple(target for target in usable if target not in order), tuple(left_out), conditions)


def replica(target: Target) -> tuple[Side, str, str]:
    """What is the same for all endpoints of a side that have one model."""
    return target.side, target.endpoint.provider, target.model


def _why_not(target: Target, found: Condition, refusals: Mapping[Target, str], only: Side | None) -> str:
    """Why a target is left out."""
    if only and target.side is not only:
        return f"{target.side.value} models were not asked for"
    return found.reason if found.use is Use.NO else refusals[target]


def _reason(verdicts: Mapping[Side, Verdict], only: Side | None, times: Iterable[tuple[Target, float]]) -> str:
    """Why the order is as it is, in a line."""
    levels = ", ".join(f"{side.value} {verdicts[side].describe(side)}" for side in Side if only in (None, side))
    predicted = ", ".join(f"{target.id} {seconds:.1f} s" for target, seconds in times if seconds)
    return levels + (f"; kept to {only.value}" if only else "") + (f"; {predicted}" if predicted else "")


def _sooner_first(order: list[Target], seconds: Mapping[Target, float]) -> list[Target]:
    """The order with the other side first where its first target is clearly sooner."""
    other = next((target for target in order if target.side is not order[0].side), None)
    if other and seconds[other] < SWITCH_BELOW * seconds[order[0]]:
        return sorted(order, key=lambda target: target.side is not other.side)
    return order


# === 6. Providers =====================================================================================================
# uses: 1 2; pure
# How does each vendor say it?  A provider turns a ChatRequest into its own words, its answer's lines into chunks, and
# its errors into a Fault.  It never sees a socket: a list of byte lines is a full fake.
# To add one: subclass Provider, fill what differs, declare its key in Settings, and name it in PROVIDERS; the contract
# tests do the rest.

Lines = Iterable[Any]    # bytes without their ends, or Texts

# What may not be dropped to please a model: without it the answer would be to another question.
ESSENTIAL = frozenset({"model", "messages", "tools", "tool_choice", "response_format", "format", "output_config", "n",
                       "stream", "system", "max_tokens", "max_completion_tokens", "modalities", "functions",
                       "function_call", "audio"})

# What several models have in common and no upstream can be asked for beforehand.  Anything else is learned from their
# 400s at run time.  Source: wire formats of 2026-11; a model too new to be listed counts as the newest.
_NO_FORCED_TOOLS = re.compile(r"claude-(?:(?:opus|sonnet)-5-5|(?:fable|mythos)-5-[12])")
_NO_TOOLS_WHILE_REASONING = re.compile(r"gpt-(?:5\.6|6(?:\.1-terra|-sol|-luna))")
_THINKING_OFF = {"claude-haiku-5-5": "disabled", "claude-opus-5": "disabled", "claude-sonnet-5-5": "between_tools"}
_THINKING_BUDGETS = {"minimal": 1024, "low": 2048, "medium": 4096, "high": 8192, "xhigh": 16384, "max": 16384}
_CLAUDE_MAX_TOKENS = 16384    # Claude wants a limit; thinking is taken from it, so a small one gives empty answers

# Words by which upstreams' errors are told apart where status and code do not tell: OpenAI's, Anthropic's, llama.cpp's.
_CONTEXT_MARKS = ("prompt is too long", "context_length_exceeded", "context size", "context length",
                  "input tokens exceed")
_MONEY_MARKS = ("insufficient_quota", "credit_balance", "credit balance", "api usage limits", "spend_limit",
                "billing_error")
_UNSUPPORTED = re.compile(r"unsupported|not support|unrecognized|unknown.parameter|not permitted|deprecated")
_PERMANENT = re.compile(r"unsupported_parameter|unsupported_value|unknown_parameter|deprecated|not permitted|"
                       r"unrecognized|not support thinking")

_NEITHER_HAS = {    # what neither Ollama nor Claude has
    "n": "it gives one answer per request", "logit_bias": "it has no such option", "audio": "it answers in text",
    "modalities": "it answers in text", "web_search_options": "it does not search",
    "functions": "it is deprecated, send tools", "function_call": "it is deprecated, send tool_choice",
}


class Provider:
    """A vendor's dialect."""
    name: ClassVar[str]
    label: ClassVar[str]
    key_variable: ClassVar[str] = ""
    default_model: ClassVar[str] = ""       # cheap and current; "" where only the endpoint knows
    official: ClassVar[str]                 # the vendor's own address
    chat_path: ClassVar[str]
    probe_path: ClassVar[str]               # free of cost, answers JSON, and lists the models
    state_path: ClassVar[str] = ""          # says which models are in memory; "" where nobody does
    details_path: ClassVar[str] = ""        # says more of one model
    translates: ClassVar[bool] = True       # and is then always asked for a stream
    refuses: ClassVar[dict[str, str]] = {}  # parameter -> why it can't be honoured
    renames: ClassVar[dict[str, str]] = {}  # parameter -> what to call it for a model that refuses it by this name
    text_event: ClassVar[TextEvent]

    def endpoint(self, settings: Settings) -> Endpoint:
        """Where the provider is by default, with the key that belongs there."""
        raise NotImplementedError

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        """Headers that every request to the endpoint carries beside its content type."""
        raise NotImplementedError

    def encode(self, request: ChatRequest, target: Target, context: int = 0) -> Json:
        """The body of the upstream request, for a request that `refusal` has nothing against.

        `context`: the window to load the model for, in tokens, where the provider can; 0 leaves it as it is.
        """
        raise NotImplementedError

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        """Chunks of the streamed answer to a request; the Texts among the lines as they are.

        Raises UpstreamError for an error among the lines and for an early end, and whatever a line that is not in the
        provider's own format makes Python raise.
        """
        raise NotImplementedError

    def passes_text(self, request: ChatRequest) -> bool:
        """Return True if an event that says a text says it to this request's client as it is."""
        return True

    def models(self, listing: Json) -> tuple[Model, ...] | None:
        """The models that the probe's answer lists; None where it lists none."""
        return None

    def load(self, target: Target, context: int) -> Json:
        """The body of a request to `chat_path` that has the model loaded and nothing said; only where models load."""
        raise NotImplementedError

    def context_for(self, request: ChatRequest, model: Model, asked: int, free: float | None) -> int:
        """The window to have the model loaded for, in tokens, or 0 to leave it as it is.  Raises Unsupported.

        `asked` was asked for last; `free` bytes of memory could hold a larger one, None where nobody knows.
        """
        return 0

    def with_state(self, models: Sequence[Model], state: Json) -> tuple[Model, ...]:
        """The models with what `state_path` answered."""
        return tuple(models)

    def with_details(self, model: Model, details: Json) -> Model:
        """The model with what `details_path` answered."""
        return model

    def refuse_part(self, part: Json) -> str | None:
        """Why a content part can't be sent, or None."""
        return None

    def refusal(self, request: ChatRequest) -> Unsupported | None:
        """What of the request this provider can't honour."""
        if not self.refuses.keys().isdisjoint(request.body):
            param = next(param for param in self.refuses if param in request.body)
            return Unsupported(f"{self.label} does not support {param}: {self.refuses[param]}.", param=param)
        for where, part in request.parts():
            why = self.refuse_part(part) or ""
            if why:
                return Unsupported(f"{self.label} can't take {where}: {why}.", param=where)
        if self.translates and any(tool["type"] != "function" for tool in request.body.get("tools", [])):
            return Unsupported(f"{self.label} supports tools of type function only.", param="tools")
        return None

    def adapt(self, payload: Json, refused: frozenset[str]) -> Json:
        """The payload without what the model is known to refuse."""
        return {name: value for name, value in payload.items() if name not in refused} if refused else payload

    def refused_parameter(self, error: UpstreamError, payload: Json) -> str | None:
        """The parameter of our payload that an error complains of and that may be left out."""
        if error.fault is not Fault.CAPABILITY:
            return None
        quoted: list[str] = re.findall(r"[`'\"]([\w.]+)[`'\"]", error.message)
        rest: list[str] = re.findall(r"\w+", error.message.rpartition("supplied:")[2])    # "Unrecognized … supplied: x"
        for name in [error.param] if error.param else [*quoted, error.message.split(":")[0], *rest]:
            name = name.split(".")[0]
            if name in payload and (name not in ESSENTIAL or name in self.renames):
                return name
        return None


def is_permanent(param: str, error: UpstreamError) -> bool:
    """Whether a model refuses a parameter as such.  Of efforts each model knows some, and fewer beside tools."""
    return param != "reasoning_effort" and bool(_PERMANENT.search(f"{error.code} {error.message}".lower()))


def classify(status: int, text: str, retry_after_s: float | None = None,
             endpoint: Endpoint | None = None) -> UpstreamError:
    """The error behind an upstream's answer of status >= 300, whichever vendor's shape it has."""
    if status < 400:
        return UpstreamError(f"redirected elsewhere ({status}), which is refused: configure the final address")
    key = endpoint.key if endpoint else ""
    fields = _error_fields(redact(text, key))
    message, code = fields.get("message") or f"the upstream answered {status} without a message", fields.get("code")
    marks = f"{message} {code} {fields.get('type')}".lower()
    fault = _fault_of(status, marks)
    if fault is Fault.TOO_LONG:
        return UpstreamError(message, fault, status=413 if status == 413 else 400, type="invalid_request_error",
                             code="context_length_exceeded", param="messages", retry=False)
    if fault is Fault.ACCOUNT and any(mark in marks for mark in _MONEY_MARKS):
        code = "insufficient_quota"
    elif status == 401 and key:
        message = f"The upstream refused the key that Oblix has for it: {message}"
    status = 400 if fault is Fault.CLIENT and status >= 500 else 503 if status == 529 else status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return UpstreamError(message, fault, status=status, param=fields.get("param"), code=code or _CODES.get(status),
                         type=fields.get("type") or kind, retry=None if fault is Fault.BUSY else False,
                         retry_after_s=retry_after_s)


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded", 503: "server_is_overloaded"}


def _fault_of(status: int, marks: str) -> Fault:
    """The class of an upstream's error; by status first and by its words last."""
    if status == 413 or status not in (401, 403, 429) and any(mark in marks for mark in _CONTEXT_MARKS):
        return Fault.TOO_LONG
    if status in (401, 402, 403) or status in (400, 429) and any(mark in marks for mark in _MONEY_MARKS):
        return Fault.ACCOUNT
    if status == 500 and re.search(r'option ".*" must be of type', marks):    # Ollama's status for a client's mistake
        return Fault.CLIENT
    if status in (400, 422):
        return Fault.CAPABILITY if _UNSUPPORTED.search(marks) else Fault.CLIENT
    return Fault.BUSY if status in (408, 409, 425, 429) or status >= 500 else Fault.MISSING


def _error_fields(text: str) -> dict[str, str]:
    """What there is of message, type, code and param in an error body, in any of the shapes seen in the wild."""
    try:
        body = loads(text)
    except (ValueError, RecursionError):
        return {} if "<" in text else {"message": text.strip()[:300]}    # a page of HTML helps nobody
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return {"message": error if isinstance(error, str) else text[:300]}
    details = error.get("details")
    inner = details.get("error_code") if isinstance(details, dict) else None
    fields = {"type": error.get("type"), "code": error.get("code") or inner, "param": error.get("param")}
    named = {name: str(value) for name, value in fields.items()
            if re.fullmatch(r"[\w.\[\]-]{1,100}", str(value or ""))}    # a name, and no sentence that quotes a prompt
    message = error.get("message", error.get("detail"))
    return {**named, "message": message if isinstance(message, str) else text[:300]}


def redact(text: str, key: str) -> str:
    """The text without the key, and without whatever else looks like one."""
    return re.sub(r"\bsk-[\w*-]{4,}", "sk-…", text.replace(key, "…") if key else text)


def chunk_of(finish_reason: str | None = None, logprobs: Json | None = None, **delta: Any) -> Chunk:
    """A chunk of choice 0.  Raises TypeError where a broken upstream sent something else for text."""
    if not all(isinstance(text, str) for name, text in delta.items() if name != "tool_calls"):
        raise TypeError("text expected")
    return {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]}


def usage_chunk(prompt: int, completion: int, **details: Any) -> Chunk:
    """The chunk that ends a stream.  Raises ValueError for counts that none can be."""
    if max(prompt, completion) >= MOST_TOKENS:
        raise ValueError("a count of tokens out of range")
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
                                     "total_tokens": prompt + completion, **details}}


def tool_chunk(index: int, arguments: str, id: str = "", name: str = "") -> Chunk:
    """A tool call's first chunk, which alone has id and name, or a later one.  Raises TypeError as `chunk_of` does."""
    if not all(isinstance(text, str) for text in (arguments, id, name)) or bool(id) != bool(name):
        raise TypeError("a tool call needs id and name")
    head: Json = {"id": id, "type": "function"} if name else {}
    return chunk_of(tool_calls=[{"index": index, **head,
                                 "function": {**({"name": name} if name else {}), "arguments": arguments}}])


class _Fence:
    """Strips, piece by piece, the Markdown fence that models like to put around JSON."""

    def __init__(self) -> None:
        self._held = ""                       # text that may turn out to be fence
        self._fenced: bool | None = None      # None: not known yet

    def feed(self, text: str, last: bool = False) -> str:
        """What of the text so far can be said now; with `last`, all that is left."""
        self._held += text
        start = self._held.lstrip()
        if self._fenced is None:
            if not last and "```".startswith(start[:3]) and "\n" not in start:
                return ""
            self._fenced = start.startswith("```") and "\n" in start
            self._held = start.partition("\n")[2] if self._fenced else self._held
        end = re.search(r"\s*(```)?\s*$" if last else r"\s*`{0,3}\s*$", self._held) if self._fenced else None
        ready, self._held = (self._held[:end.start()], self._held[end.start():]) if end else (self._held, "")
        return ready


def unfenced(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks of a translated answer without a Markdown fence around their content."""
    fence = _Fence()
    for chunk in chunks:
        for choice in choices_of(chunk):
            rest = fence.feed(choice["delta"].pop("content", ""), last=bool(choice["finish_reason"]))
            if rest or "role" in choice["delta"]:
                yield chunk_of(**{**choice["delta"], "content": rest})
                choice["delta"] = {}
            if choice["delta"] or choice["finish_reason"]:
                yield chunk
        if not choices_of(chunk):    # usage
            yield chunk


def sse_data(lines: Lines) -> Iterator[Any]:
    """The data of each server-sent event, and Texts as they are.

    An event that the stream's end cuts off is dropped (WHATWG HTML, 9.2.6).
    """
    data: list[str] = []
    size = 0    # of the event
    for number, line in enumerate(lines):
        if isinstance(line, Texts):
            yield line
        elif not line:
            if data:
                yield "\n".join(data)
            data, size = [], 0
        elif line.startswith((b"data:", b"\xef\xbb\xbfdata:") if number == 0 else b"data:"):
            text = line.partition(b":")[2].decode("utf-8", "replace")
            data.append(text[1:] if text.startswith(" ") else text)
            size += len(text) + 1
            if size > MAX_LINE_BYTES:
                raise UpstreamError(f"a piece of the answer is larger than {MAX_LINE_BYTES >> 20} MiB")


def event_of(text: str | bytes) -> Json:
    """The JSON object of one event.  Raises UpstreamError for anything else, and for an error inside the answer."""
    try:
        event = loads(text)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or is_too_deep(text, event):
        raise UpstreamError("a piece of the answer is not a JSON object", code="bad_upstream_answer")
    if event.get("object") == "error":    # so do vLLM's older versions write it
        event = {"error": event}
    if event.get("error"):
        raise _error_event(event)
    return event


def _error_event(event: Json) -> UpstreamError:
    """An error sent inside an answer: its status is told by its words, or by a code that is one."""
    error = event["error"] if isinstance(event["error"], dict) else {}
    code = error.get("code")
    number = code if isinstance(code, int) and 400 <= code < 600 else 502
    return classify(_STATUS_OF.get(str(code)) or _STATUS_OF.get(str(error.get("type"))) or number,
                    dumps(event).decode())


_STATUS_OF = {"invalid_request_error": 400, "context_length_exceeded": 400, "authentication_error": 401,
              "billing_error": 402, "permission_error": 403, "not_found_error": 404, "model_not_found": 404,
              "rate_limit_error": 429, "rate_limit_exceeded": 429, "insufficient_quota": 429,
              "server_is_overloaded": 503, "overloaded_error": 529}


def cut() -> UpstreamError:
    """The error of a stream that ends without its protocol's end mark."""
    return UpstreamError("the connection was closed before the answer was complete", code="upstream_cut")


def arguments_of(text: str) -> Json:
    """A tool call's arguments as the object that Ollama and Claude want, whatever the model once wrote."""
    with contextlib.suppress(ValueError, RecursionError):
        value = loads(text or "{}")
        if isinstance(value, dict) and not deeper_than(value, MAX_JSON_DEPTH):
            return value
    return {"_raw": text}


def modernised(messages: Sequence[Json]) -> list[Json]:
    """The messages with what is deprecated said in today's words: function_call, role function, a refusal apart."""
    converted = []
    for number, message in enumerate(messages):
        message = dict(message)
        if message.get("refusal") and not message.get("content"):
            message["content"] = message["refusal"]
        if "function_call" in message:    # it had no id; the message's place makes one
            message["tool_calls"] = [{"id": f"call_{number}", "type": "function", "function": message["function_call"]}]
        if message["role"] == "function":
            message.update(role="tool", tool_call_id=f"call_{number - 1}")
        converted.append(message)
    return converted


def name_of(tool: Json) -> str:
    """The name in a tool, or in the choice of one: {"type": kind, kind: {"name": ...}}."""
    return str(tool[tool["type"]]["name"])


def chosen_tools(body: Json) -> tuple[list[Json], str | Json]:
    """The tools that tool_choice leaves, and the choice among them: a word, or the named tool."""
    tools, choice = body.get("tools", []), body.get("tool_choice", "auto")
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        allowed = {name_of(tool) for tool in choice["allowed_tools"]["tools"]}
        return [tool for tool in tools if name_of(tool) in allowed], choice["allowed_tools"]["mode"]
    return ([] if choice == "none" else tools), choice


def data_url(url: str) -> tuple[str, str] | None:
    """(media type, base64) of a data: URL; None for any other."""
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        return None
    return head[5:].split(";")[0].lower().replace("image/jpg", "image/jpeg"), data


# An event that says a text and nothing else, in each provider's own form.  Such events pass unread, which takes a tenth
# of the time (2 us for 20).  So a pattern must match no event of which `decode` would make anything but the text.
# U+0085, U+2028 and U+2029 are line ends to clients that use str.splitlines (httpx does): a text with one is read.
_IN_TEXT = rb'[^"\\\x00-\x1f\xc2\xe2]*'
_TEXT = (rb'"((?!")' + _IN_TEXT + rb'(?:(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\xc2(?!\x85)|\xe2(?!\x80[\xa8\xa9]))'
         + _IN_TEXT + rb')*)"')
_WORD = rb'"[^"\\\x00-\x1f\x7f-\xff]*"'
# What stands around an OpenAI text, in any order: vLLM, llama.cpp and OpenAI itself differ in it.
_AROUND = (rb'(?:"(?:id|model|system_fingerprint|service_tier|obfuscation)": ?(?:null|' + _WORD
           + rb')|"object": ?"chat\.completion\.chunk"|"created": ?[0-9]+|"(?:usage|prompt_token_ids)": ?null)')
_BESIDE = rb'(?:"index": ?0|"(?:logprobs|finish_reason|stop_reason|token_ids|matched_stop)": ?null)'
_OPENAI_TEXT = re.compile(
    rb'data: ?\{(?:' + _AROUND + rb', ?)*"choices": ?\[\{(?:' + _BESIDE
    + rb', ?)*"delta": ?\{(?:"role": ?"assistant", ?)?"content": ?' + _TEXT + rb'\}(?:, ?' + _BESIDE
    + rb')*\}\](?:, ?' + _AROUND + rb')*\}\n\n')
_OLLAMA_TEXT = re.compile(
    rb'\{"model": ?' + _WORD + rb', ?"created_at": ?' + _WORD + rb', ?"message": ?\{"role": ?"assistant", ?"content": ?'
    + _TEXT + rb'\}, ?"done": ?false\}\n')
_CLAUDE_TEXT = re.compile(
    rb'event: ?content_block_delta\ndata: ?\{"type": ?"content_block_delta", ?"index": ?[0-9]+, ?"delta": ?\{"type": ?'
    rb'"text_delta", ?"text": ?' + _TEXT + rb'\} *\}\n\n')


class OpenAI(Provider):
    """OpenAI's own API, and every server that is compatible with it: nearly nothing to translate."""
    name, label = "openai", "OpenAI"
    key_variable, default_model = "OPENAI_API_KEY", "gpt-6-luna"
    chat_path, probe_path = "/chat/completions", "/models"
    translates = False
    text_event = TextEvent(_OPENAI_TEXT, b"\n\n")
    renames = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
    official = "https://api.openai.com/v1"

    def endpoint(self, settings: Settings) -> Endpoint:
        url = (settings.openai_base_url or self.official).rstrip("/")
        extra = (("OpenAI-Organization", settings.openai_org_id), ("OpenAI-Project", settings.openai_project_id))
        return Endpoint(self.name, url, settings.openai_api_key, tuple(pair for pair in extra if pair[1]),
                        self.key_variable if url == self.official else "")

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        return {**({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}), **dict(endpoint.headers)}

    def encode(self, request: ChatRequest, target: Target, context: int = 0) -> Json:
        payload = {"model": target.model, **request.body}
        if target.endpoint.base_url == self.official:    # its models all know the new name, and none of Ollama's fields
            payload = self.adapt(payload, frozenset({"max_tokens", "options", "keep_alive", "think"}))
        if "tools" in payload and _NO_TOOLS_WHILE_REASONING.match(target.model):
            payload.setdefault("reasoning_effort", "none")
        return payload

    def adapt(self, payload: Json, refused: frozenset[str]) -> Json:
        kept = super().adapt(payload, refused)
        if kept is payload:
            return kept
        for old, new in self.renames.items():
            if old in payload and old not in kept and new not in refused:
                kept.setdefault(new, payload[old])
        if "reasoning_effort" in payload.keys() - kept.keys() and "tools" in payload:
            kept["reasoning_effort"] = "none"    # these models take tools only without reasoning, and would reason
        return kept

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        seen: set[Any] = set()            # what must be said once: roles and tool calls
        finished: dict[int, bool] = {}    # choice -> whether its finish_reason came
        for data in sse_data(lines):
            if isinstance(data, Texts):
                yield data
                continue
            if data.startswith("[DONE]") and finished:
                return
            chunk = event_of(data)
            chunk.pop("obfuscation", None)    # padding, of no use on this side of TLS
            chunk["choices"] = choices_of(chunk)
            for choice in chunk["choices"]:
                self._once(choice, seen)
                index = choice.get("index", 0)
                finished[index] = finished.get(index, False) or bool(choice.get("finish_reason"))
            yield chunk
        if list(finished.values()) != [True] * request.body.get("n", 1):    # some servers leave [DONE] out
            raise cut()

    def passes_text(self, request: ChatRequest) -> bool:
        return bool(request.body.get("n", 1) == 1)

    @staticmethod
    def _once(choice: Json, seen: set[Any]) -> None:
        """Leave out what was seen before: the SDKs' helpers join a role, id or name that is repeated."""
        index, delta = choice.get("index", 0), choice.get("delta") or {}
        role = {} if index in seen else {"role": "assistant"}
        seen.add(index)
        choice["delta"] = {**role, **{name: value for name, value in delta.items() if name != "role"}}
        for place, call in enumerate(delta.get("tool_calls") or ()):
            which = (index, call.setdefault("index", place))
            if which in seen:
                for name in ("id", "type"):
                    call.pop(name, None)
                (call.get("function") or {}).pop("name", None)
            seen.add(which)

    def models(self, listing: Json) -> tuple[Model, ...] | None:
        items = listing["data"] if isinstance(listing.get("data"), list) else []
        return tuple(Model(str(item["id"]), created_at(item.get("created"))) for item in items)


class Ollama(Provider):
    """Ollama's native API.  Its own /v1 can't set num_ctx, truncate or think, and takes images out of their message."""
    name, label = "ollama", "Ollama"
    chat_path, probe_path, state_path, details_path = "/api/chat", "/api/tags", "/api/ps", "/api/show"
    refuses = _NEITHER_HAS
    official = "https://ollama.com:443"
    text_event = TextEvent(_OLLAMA_TEXT, b"\n")
    _options = {"temperature": "temperature", "top_p": "top_p", "seed": "seed", "stop": "stop",
                "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
                "max_tokens": "num_predict", "max_completion_tokens": "num_predict"}
    _as_they_are = ("logprobs", "top_logprobs", "keep_alive", "think")    # the last two by extra_body of the SDKs
    _think = {"none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "max",
              "max": "max"}

    def endpoint(self, settings: Settings) -> Endpoint:
        return Endpoint(self.name, ollama_url(settings.ollama_host))

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        return {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}    # ollama.com wants one

    def refuse_part(self, part: Json) -> str | None:
        if part["type"] == "image_url":
            return None if data_url(part["image_url"]["url"]) else "images must be base64 data: URLs"
        return None if part["type"] in ("text", "refusal") else f"parts of type {part['type']} are not supported"

    def refusal(self, request: ChatRequest) -> Unsupported | None:
        refused = super().refusal(request)
        if not refused and chosen_tools(request.body)[1] not in ("none", "auto"):
            refused = Unsupported("Ollama can't be made to call a tool: only auto and none work.", param="tool_choice")
        return refused

    def encode(self, request: ChatRequest, target: Target, context: int = 0) -> Json:
        body = request.body
        payload: Json = {"model": target.model, "messages": self._messages(modernised(request.messages)),
                         "stream": True, "truncate": False}    # without it the oldest messages are forgotten silently
        options = {theirs: body[ours] for ours, theirs in self._options.items() if ours in body}
        if "stop" in options:
            options["stop"] = [stop for stop in as_list(options["stop"]) if stop]
        if context:
            options["num_ctx"] = context
        options.update(body.get("options", {}))
        tools = chosen_tools(body)[0]
        if options:
            payload["options"] = options
        if tools:
            payload["tools"] = tools
        payload.update({name: body[name] for name in self._as_they_are if name in body})
        if "reasoning_effort" in body:
            payload.setdefault("think", self._think[body["reasoning_effort"]])
        form = body.get("response_format", {"type": "text"})
        if form["type"] == "json_schema":
            payload["format"] = form["json_schema"].get("schema") or "json"
        elif form["type"] == "json_object":
            payload["format"] = "json"
        return payload

    def _messages(self, messages: Sequence[Json]) -> list[Json]:
        names: dict[str, str] = {}    # tool call id -> the tool's name, which Ollama wants with the result
        return [self._message(message, names) for message in messages]

    def _message(self, message: Json, names: dict[str, str]) -> Json:
        role = "system" if message["role"] == "developer" else message["role"]
        converted: Json = {"role": role, "content": text_of(message)}
        images = [data_url(part["image_url"]["url"]) for part in parts_of(message) if part["type"] == "image_url"]
        if images:
            converted["images"] = [image[1] for image in images if image]
        if message.get("tool_calls"):
            converted["tool_calls"] = [self._call(call, names) for call in message["tool_calls"]]
        if message["role"] == "tool":
            converted["tool_call_id"] = message["tool_call_id"]
            converted["tool_name"] = names.get(message["tool_call_id"], "")
        return converted

    def _call(self, call: Json, names: dict[str, str]) -> Json:
        name, arguments = name_and_arguments(call)
        names[call["id"]] = name
        return {"id": call["id"], "function": {"name": name, "arguments": arguments_of(arguments)}}

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        yield chunk_of(role="assistant", content="")
        calls = 0
        for line in filter(None, lines):
            if isinstance(line, Texts):
                yield line
                continue
            event = event_of(line)
            message = event.get("message", {})
            logprobs = {"content": list(event["logprobs"]), "refusal": None} if event.get("logprobs") else None
            if message.get("thinking"):
                yield chunk_of(reasoning_content=message["thinking"])
            if message.get("content"):
                yield chunk_of(content=message["content"], logprobs=logprobs)
            for call in message.get("tool_calls") or []:
                function = call["function"]
                yield tool_chunk(calls, "", call.get("id") or f"call_{calls}", function["name"])
                yield tool_chunk(calls, dumps(function.get("arguments") or {}).decode())
                calls += 1
            if event.get("done"):
                reason = "length" if event.get("done_reason") == "length" else "tool_calls" if calls else "stop"
                yield chunk_of(reason)
                yield usage_chunk(event.get("prompt_eval_count", 0), event.get("eval_count", 0))
                return
        raise cut()    # a runaway repetition ends without done: true as well

    def refused_parameter(self, error: UpstreamError, payload: Json) -> str | None:
        if "does not support thinking" in error.message and "think" in payload:
            return "think"
        return super().refused_parameter(error, payload)

    def models(self, listing: Json) -> tuple[Model, ...] | None:
        found = [Model(str(item["name"]), created_at(item.get("modified_at")),
                       is_remote(str(item["name"])) or bool(item.get("remote_host")), str(item.get("digest") or ""),
                       int(item.get("size") or 0), _able(item))
                 for item in listing.get("models") or []]
        return tuple(sorted(found, key=lambda model: -model.created))

    def with_state(self, models: Sequence[Model], state: Json) -> tuple[Model, ...]:
        loaded = {str(item["name"]).lower(): item for item in state["models"]}

        def stated(model: Model) -> Model:
            item = loaded.get(model.name.lower())
            if item is None:
                return dataclasses.replace(model, cold=not model.remote)
            size, on_gpu = int(item.get("size") or 0), int(item.get("size_vram") or 0)
            return dataclasses.replace(model, context=int(item.get("context_length") or 0), size=size or model.size,
                                       gpu_share=min(1.0, on_gpu / size) if size else None)
        return tuple(map(stated, models))

    def with_details(self, model: Model, details: Json) -> Model:
        info = details.get("model_info") or {}
        kind = info.get("general.architecture")

        def fact(name: str) -> int:
            value = info.get(f"{kind}.{name}")
            return value if isinstance(value, int) else 0    # some are lists, one number a layer
        heads = fact("attention.head_count")
        usual = fact("embedding_length") // heads if heads else 0
        row = (fact("attention.key_length") or usual) + (fact("attention.value_length") or usual)
        # a key and a value of 16 bits each for every layer and head, as llama.cpp keeps them
        token_bytes = 2 * fact("block_count") * fact("attention.head_count_kv") * row
        return dataclasses.replace(model, can=_able(details) or model.can, max_context=fact("context_length"),
                                   token_bytes=token_bytes)

    def load(self, target: Target, context: int) -> Json:
        return {"model": target.model, "messages": [], **({"options": {"num_ctx": context}} if context else {})}

    def context_for(self, request: ChatRequest, model: Model, asked: int, free: float | None) -> int:
        """As in Provider.  The steps are few, since each change reloads the model; one that was asked for is asked for
        again, as leaving it out would reload it too."""
        if "num_ctx" in request.body.get("options", {}) or not model.max_context:
            return 0
        size = request.size
        if size // 8 > model.max_context:    # no language has 8 bytes a token
            raise Unsupported(f"the prompt has over {size // 8} tokens, and its context {model.max_context}",
                              param="messages", code="context_length_exceeded")
        answer = min(request.most_tokens(512), 4096)
        now = model.context or asked or DEFAULT_CONTEXT
        if size // 3 + answer <= now:    # English has 4 bytes a token, code and other languages about 3
            return now if now == asked else 0
        wanted = max(now, min(next((step for step in CONTEXTS if step >= size // 3 + answer), CONTEXTS[-1]),
                              model.max_context))
        # the size of a loaded model is with its context, and `free` counts it as free
        if free is None or model.size + (wanted - model.context) * model.token_bytes <= free:
            return wanted if wanted > now or wanted == asked else 0
        if size // 5 + answer <= now:    # it may fit all the same; Ollama counts exactly, and refuses if not
            return 0
        raise Unsupported(f"a context of {wanted} tokens does not fit in memory", param="messages",
                          code="context_length_exceeded")


DEFAULT_CONTEXT = 4096    # what Ollama loads on a machine with less than 23 GiB of GPU memory
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)


def _able(item: Json) -> frozenset[str] | None:
    """The capabilities that Ollama lists; None from one that lists none."""
    return frozenset(map(str, item["capabilities"])) if item.get("capabilities") else None


def is_remote(name: str) -> bool:
    """Whether an Ollama name is answered by ollama.com: tag `cloud`, or a tag that ends in `-cloud`."""
    tag = name.lower().rsplit("/", 1)[-1].partition(":")[2]
    return tag == "cloud" or tag.endswith("-cloud")


def created_at(value: Any) -> int:
    """Unix seconds of a number or an RFC 3339 time; 0 for anything else."""
    if isinstance(value, (int, float)):
        return int(value)
    try:
        moment = datetime.datetime.strptime(str(value)[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return 0
    return int(moment.replace(tzinfo=datetime.timezone.utc).timestamp())


def ollama_url(host: str) -> str:
    """The address that OLLAMA_HOST means to a client, by Ollama's own rules (envconfig.Host).

    The variable is the server's bind address too, so an unspecified address becomes loopback.
    """
    text = host.strip().strip("\"'")
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = ("https" if text == "ollama.com" else "http"), text
    default = 11434 if not found and scheme == "http" else 443 if scheme == "https" else 80
    place, slash, path = rest.partition("/")
    name, _, port = place.rpartition(":") if re.search(r"^[^:]*:[^:]*$|\]:", place) else (place, "", "")
    name = name.strip("[]") or "127.0.0.1"
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
    number = int(port) if port.isdecimal() and int(port) < 65536 else default
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{number}{slash}{path}".rstrip("/")


def name_and_arguments(call: Json) -> tuple[str, str]:
    """(name, arguments) of a message's tool call, function or custom."""
    inner = call[call.get("type", "function")]
    return inner["name"], inner.get("arguments", inner.get("input", ""))


class Claude(Provider):
    """Anthropic's Messages API, in both directions."""
    name, label = "claude", "Claude"
    key_variable, default_model = "ANTHROPIC_API_KEY", "claude-haiku-5-5"
    chat_path, probe_path = "/v1/messages", "/v1/models?limit=1000"
    official = "https://api.anthropic.com"
    text_event = TextEvent(_CLAUDE_TEXT, b"\n\n")
    refuses = {**_NEITHER_HAS, "logprobs": "it does not tell them", "top_logprobs": "it does not tell them"}
    _finish = {"max_tokens": "length", "model_context_window_exceeded": "length", "pause_turn": "length",
               "tool_use": "tool_calls", "refusal": "content_filter"}

    def endpoint(self, settings: Settings) -> Endpoint:
        url = (settings.anthropic_base_url or self.official).rstrip("/")
        url = url[:-3] if url.endswith("/v1") else url
        return Endpoint(self.name, url, settings.anthropic_api_key, (),
                        self.key_variable if url == self.official else "")

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        # 2023-06-01 and not 2026-10-21: the later version refuses temperature and top_p for every model.
        return {"anthropic-version": "2023-06-01", **({"x-api-key": endpoint.key} if endpoint.key else {})}

    def refuse_part(self, part: Json) -> str | None:
        if part["type"] == "image_url":
            url = part["image_url"]["url"]
            fits = url.startswith("https://") or (data_url(url) or [""])[0] in _CLAUDE_IMAGES
            return None if fits else "images must be https: URLs or data: URLs of JPEG, PNG, GIF or WebP"
        if part["type"] == "file":
            kind, data = data_url(part["file"].get("file_data") or "") or ("", "")
            with contextlib.suppress(ValueError):    # text is decoded on the way, so its base64 must be whole
                if kind == "application/pdf" or kind.startswith("text/") and base64.b64decode(data):
                    return None
            return "files must be sent as base64 data: URLs of a PDF or of text"
        return None if part["type"] in ("text", "refusal") else f"parts of type {part['type']} are not supported"

    def encode(self, request: ChatRequest, target: Target, context: int = 0) -> Json:
        body, version = request.body, claude_version(target.model)
        system, turns = claude_conversation(modernised(request.messages), prefills=version < (4, 6))
        form = body.get("response_format", {})
        schema = form.get("type") == "json_schema" and form["json_schema"].get("schema")
        if form.get("type", "text") != "text" and not schema:
            system = [*system, "Answer with one JSON object and nothing else: no prose, no Markdown fence."]
        forced = chosen_tools(body)[1]
        if forced not in ("auto", "none") and _NO_FORCED_TOOLS.match(target.model):
            which = name_of(forced) if isinstance(forced, dict) else "that fits best"
            system = [*system, f"Answer with a call of the tool {which}."]
        payload: Json = {
            "model": target.model, "messages": turns, "stream": True,
            "max_tokens": min(body.get("max_completion_tokens") or body.get("max_tokens") or _CLAUDE_MAX_TOKENS,
                              128_000 if version >= (4, 6) else 64_000),    # more is refused
            **({"system": "\n\n".join(system)} if system else {}), **self._sampling(body, version),
            **self._identity(body), **self._tools(body, turns, target.model),
        }
        if schema:
            payload["output_config"] = {"format": {"type": "json_schema", "schema": closed_schema(schema)}}
        self._think(payload, body.get("reasoning_effort"), target.model, version)
        return payload

    @staticmethod
    def _sampling(body: Json, version: tuple[int, int]) -> Json:
        stops = [stop for stop in as_list(body.get("stop", [])) if stop.strip()]
        sampling: Json = {"stop_sequences": stops} if stops else {}
        if version < (4, 7) and "temperature" in body:    # later models refuse both
            sampling["temperature"] = min(1.0, body["temperature"])
        if version < (4, 7) and "top_p" in body and ("temperature" not in sampling or version == (4, 6)):
            sampling["top_p"] = body["top_p"]                 # 4.5 and earlier refuse the two together
        return sampling

    @staticmethod
    def _identity(body: Json) -> Json:
        user = body.get("safety_identifier") or body.get("user") or ""
        tier = {"auto": "auto", "default": "standard_only"}.get(body.get("service_tier", ""))
        opaque = user and "@" not in user and not re.fullmatch(r"[+\d ()./-]{7,}", user)    # no e-mail, no telephone
        return {**({"metadata": {"user_id": user}} if opaque else {}), **({"service_tier": tier} if tier else {})}

    @staticmethod
    def _tools(body: Json, turns: Sequence[Json], model: str) -> Json:
        tools, choice = chosen_tools(body)
        if not tools:    # none offered or allowed; but those that the history calls must be known
            offered = [tool["function"] for tool in body.get("tools", [])]
            known = offered or [{"name": name} for name in _tools_used(turns)]
            return {"tools": list(map(claude_tool, known)), "tool_choice": {"type": "none"}} if known else {}
        theirs: Json = {"type": "auto"}
        if choice != "auto" and not _NO_FORCED_TOOLS.match(model):
            theirs = {"type": "tool", "name": name_of(choice)} if isinstance(choice, dict) else {"type": "any"}
        if body.get("parallel_tool_calls") is False:
            theirs["disable_parallel_tool_use"] = True
        return {"tools": [claude_tool(tool["function"]) for tool in tools],
                **({"tool_choice": theirs} if theirs != {"type": "auto"} else {})}

    @staticmethod
    def _think(payload: Json, effort: str | None, model: str, version: tuple[int, int]) -> None:
        """Add to the payload what `reasoning_effort` means to the model."""
        if effort is None:
            return
        if effort == "none":
            if model in _THINKING_OFF:
                payload["thinking"] = {"type": _THINKING_OFF[model]}
        elif version >= (4, 6):
            effort = {"minimal": "low", "xhigh": "xhigh" if version >= (4, 7) else "high"}.get(effort, effort)
            payload["thinking"] = {"type": "adaptive", "display": "summarized"}
            payload.setdefault("output_config", {})["effort"] = effort
        elif payload.get("tool_choice", {}).get("type") in ("any", "tool") or _tools_used(payload["messages"]):
            return    # thinking goes neither with a forced tool nor with calls whose own thinking is lost
        else:
            budget = _THINKING_BUDGETS[effort]
            payload["thinking"] = {"type": "enabled", "budget_tokens": budget}
            payload["max_tokens"] = max(payload["max_tokens"], budget + 1024)
            for name in ("temperature", "top_p"):    # neither goes with thinking
                payload.pop(name, None)

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        chunks = self._chunks(lines)
        return chunks if self.passes_text(request) else unfenced(chunks)

    def passes_text(self, request: ChatRequest) -> bool:
        return bool(request.body.get("response_format", {}).get("type") != "json_object")    # which is by instruction

    def _chunks(self, lines: Lines) -> Iterator[Any]:
        usage: Json = {}
        stop: Json = {}
        calls, fresh = -1, False    # fresh: a tool call whose arguments have not begun
        block: Json = {}            # the one that is open
        for data in sse_data(lines):
            if isinstance(data, Texts):
                yield data
                continue
            event = event_of(data)
            kind, delta = event.get("type"), event.get("delta") or {}
            if kind == "message_start":
                usage.update(event["message"].get("usage") or {})
                yield chunk_of(role="assistant", content="")
            elif kind == "content_block_start":
                block = event["content_block"]
                if block["type"] == "tool_use":
                    calls, fresh = calls + 1, True
                    yield tool_chunk(calls, "", block["id"], block["name"])
                elif block["type"] == "text" and block.get("text"):
                    yield chunk_of(content=block["text"])
            elif kind == "content_block_delta":
                fresh = fresh and not delta.get("partial_json")
                yield from self._delta(delta, calls if block.get("type") == "tool_use" else None)
            elif kind == "content_block_stop" and fresh:
                fresh = False
                yield tool_chunk(calls, "{}")
            elif kind == "message_delta":
                stop.update(delta)
                usage.update({name: count for name, count in (event.get("usage") or {}).items() if count is not None})
            elif kind == "message_stop":
                yield from self._end(stop, usage)
                return
        raise cut()

    @staticmethod
    def _delta(delta: Json, call: int | None) -> Iterator[Chunk]:
        if delta.get("text"):
            yield chunk_of(content=delta["text"])
        elif delta.get("thinking"):
            yield chunk_of(reasoning_content=delta["thinking"])
        elif delta.get("partial_json") and call is not None:    # not of a block that is no call of ours
            yield tool_chunk(call, delta["partial_json"])

    def _end(self, stop: Json, usage: Json) -> Iterator[Chunk]:
        explanation = (stop.get("stop_details") or {}).get("explanation")
        if stop.get("stop_reason") == "refusal" and explanation:
            yield chunk_of(refusal=explanation)
        yield chunk_of(self._finish.get(stop.get("stop_reason") or "", "stop"))
        read, written = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
        thinking = (usage.get("output_tokens_details") or {}).get("thinking_tokens")
        yield usage_chunk(
            (usage.get("input_tokens") or 0) + read + written, usage.get("output_tokens") or 0,
            prompt_tokens_details={"cached_tokens": read, "cache_write_tokens": written},
            **({"completion_tokens_details": {"reasoning_tokens": thinking}} if thinking else {}))

    def models(self, listing: Json) -> tuple[Model, ...] | None:
        return tuple(Model(str(item["id"]), created_at(item.get("created_at"))) for item in listing.get("data") or [])


def _tools_used(turns: Sequence[Json]) -> list[str]:
    """The names of the tools that the turns call, each once."""
    return list(dict.fromkeys(block["name"] for turn in turns for block in turn["content"]
                              if block["type"] == "tool_use"))


_CLAUDE_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def as_list(value: str | list[str]) -> list[str]:
    """One or several, as several."""
    return [value] if isinstance(value, str) else value


def claude_version(model: str) -> tuple[int, int]:
    """(major, minor) in a Claude model's name; a name that does not tell counts as the newest."""
    found = re.match(r"claude-[a-z]+-(\d+)(?:-(\d{1,2}))?(?=-\d{8}$|$)", model)
    return (int(found[1]), int(found[2] or 0)) if found else (99, 0)


def claude_tool(function: Json) -> Json:
    """A tool definition in Claude's shape; `strict` stays behind, as few schemas qualify for it there."""
    described = {"description": function["description"]} if function.get("description") else {}
    return {"name": function["name"], **described,
            "input_schema": {"properties": {}, **(function.get("parameters") or {}), "type": "object"}}


def closed_schema(schema: Any) -> Any:
    """A JSON schema within what Claude's structured output takes: closed objects, no bounds, anyOf for oneOf."""
    if isinstance(schema, list):
        return [closed_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: Json = {}
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            kept[name] = {inner: closed_schema(one) for inner, one in value.items()}
        elif name not in _NOT_IN_SCHEMAS:
            kept["anyOf" if name == "oneOf" else name] = closed_schema(value)
    kind = kept.get("type")
    is_object = kind == "object" or isinstance(kind, list) and "object" in kind or "properties" in kept
    return {**kept, "additionalProperties": False} if is_object else kept


_NOT_IN_SCHEMAS = frozenset({
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
    "minItems", "maxItems", "minProperties", "maxProperties", "not", "if", "then", "else"})


def claude_conversation(messages: Sequence[Json], prefills: bool) -> tuple[list[str], list[Json]]:
    """(system texts, turns) as Claude wants them.

    Turns alternate and begin with the user; each tool call is answered at the very start of the next user turn, where
    need be by a placeholder; results of calls that nobody made become text.  `prefills`: whether the model may be
    handed the beginning of its own answer.
    """
    is_system = [message["role"] in ("system", "developer") for message in messages]
    system = [text_of(message) for message, so in zip(messages, is_system) if so and text_of(message).strip()]
    waiting = collections.deque(message for message, so in zip(messages, is_system) if not so)
    turns: list[Json] = []
    used: set[str] = set()
    while waiting:
        message = waiting.popleft()
        if message["role"] == "assistant":
            calls = [(call["id"], _claude_call(call, used)) for call in message.get("tool_calls") or ()]
            _add_turn(turns, "assistant", [*_text_block(text_of(message)), *(block for _, block in calls)])
            if calls:
                _add_turn(turns, "user", _claude_results(calls, waiting))
        else:
            _add_turn(turns, "user", claude_content(message))
    return system, _completed(turns, prefills)


def _add_turn(turns: list[Json], role: str, blocks: list[Json]) -> None:
    """Add blocks to the last turn if its role is the same, else as a new one; an assistant without any says nothing."""
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"].extend(blocks)
    elif blocks or role == "user":
        turns.append({"role": role, "content": blocks})


def _claude_call(call: Json, used: set[str]) -> Json:
    """A tool call as a block, under an id that Claude allows and that the conversation has not used before."""
    name, arguments = name_and_arguments(call)
    id = re.sub(r"[^A-Za-z0-9_-]", "_", call["id"]) or "call"
    while id in used:
        id += "_"
    used.add(id)
    return {"type": "tool_use", "id": id, "name": name, "input": arguments_of(arguments)}


def _claude_results(calls: list[tuple[str, Json]], waiting: collections.deque[Json]) -> list[Json]:
    """The blocks that answer (client's id, call)s, from the tool messages that come next; others' results go last."""
    calls, results, others = list(calls), [], []
    while waiting and waiting[0]["role"] == "tool":
        message = waiting.popleft()
        blocks = claude_content(message)
        pair = next((pair for pair in calls if pair[0] == message["tool_call_id"]), None)
        if pair:
            calls.remove(pair)
            plain = blocks[0]["text"] if len(blocks) == 1 and blocks[0]["type"] == "text" else blocks
            results.append({"type": "tool_result", "tool_use_id": pair[1]["id"], "content": plain or ""})
        else:
            others.extend(blocks)
    return results + [{"type": "tool_result", "tool_use_id": call["id"], "content": "(no result)"}
                      for _, call in calls] + others


def _completed(turns: list[Json], prefills: bool) -> list[Json]:
    """The turns without what Claude refuses: an assistant to begin with, empty turns, a prefill that it can't take."""
    if not turns or turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": []})
    for turn in turns:
        turn["content"] = turn["content"] or _text_block(".")
    last = turns[-1]
    if last["role"] == "assistant" and not prefills:
        turns.append({"role": "user", "content": _text_block("Continue.")})
    elif last["role"] == "assistant" and last["content"][-1]["type"] == "text":
        last["content"][-1]["text"] = last["content"][-1]["text"].rstrip()
    return turns


def _text_block(text: str) -> list[Json]:
    """A text block, or nothing: Claude refuses empty ones."""
    return [{"type": "text", "text": text}] if text.strip() else []


def claude_content(message: Json) -> list[Json]:
    """A message's parts as blocks."""
    return [block for part in parts_of(message) for block in claude_blocks(part)]


def claude_blocks(part: Json) -> list[Json]:
    """The content blocks of one part.  Raises nothing: `refuse_part` has seen the part before."""
    if part["type"] in ("text", "refusal"):
        return _text_block(part[part["type"]])
    if part["type"] == "image_url":
        url = part["image_url"]["url"]
        media_type, data = data_url(url) or ("", "")
        return [{"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data} if data
                 else {"type": "url", "url": url}}]
    media_type, data = data_url(part["file"]["file_data"]) or ("", "")
    if media_type.startswith("text/"):
        return [{"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                                "data": base64.b64decode(data).decode("utf-8", "replace")}}]
    return [{"type": "document", "source": {"type": "base64", "media_type": media_type, "data": data}}]


PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (Ollama(), OpenAI(), Claude())}
ALIASES = {"anthropic": "claude"}


def split_id(text: str) -> tuple[str, str]:
    """(provider, model) of `provider:model`; ("", text) where no provider is named."""
    name, colon, model = text.partition(":")
    name = ALIASES.get(name.lower(), name.lower())
    return (name, model) if colon and name in PROVIDERS else ("", text)


def configured_targets(settings: Settings) -> tuple[Target, ...]:
    """The targets that flags and variables name, local ones first.

    Without --local-model there is none of these here: which one it is depends on what Ollama has.  Raises UsageError.
    """
    if settings.cloud_api_key and not settings.cloud_model:
        raise UsageError("--cloud-api-key needs the --cloud-model that it is for")
    local = [_target(settings, spec, Side.LOCAL, "") for spec in settings.local_model]
    keys = itertools.chain([settings.cloud_api_key], itertools.repeat(""))
    cloud = [_target(settings, spec, Side.CLOUD, key) for spec, key in zip(settings.cloud_model, keys)]
    if not cloud:
        usual = [_target(settings, f"{provider.name}:{provider.default_model}", Side.CLOUD, "")
                 for provider in PROVIDERS.values() if provider.default_model]
        cloud = [target for target in usual if not target.endpoint.lacks_key]
    return tuple(dict.fromkeys(local + cloud))


def _target(settings: Settings, spec: str, side: Side, key: str) -> Target:
    """The target of `provider:model` or `provider:model@http://host:port/v1`.  Raises UsageError."""
    flag = f"--{side.value}-model {spec}"
    provider, rest = split_id(spec)
    if not provider:
        raise UsageError(f"{flag}: start with one of {', '.join(name + ':' for name in PROVIDERS)}")
    model, at, url = rest.partition("@") if not rest.startswith("@") else (rest, "", "")
    if not model or not model.isprintable():
        raise UsageError(f"{flag}: name a model, like {provider}:NAME or {provider}:NAME@http://host:port/v1")
    usual = PROVIDERS[provider].endpoint(settings)
    # Another server than the usual one: the usual key is not meant for it.
    endpoint = Endpoint(provider, url.rstrip("/"), key) if at else dataclasses.replace(usual, key=key or usual.key)
    if not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[!-~]*)?", endpoint.base_url):
        raise UsageError(f"{endpoint.base_url} is no address like https://host/v1")
    if side is Side.LOCAL and not may_be_local(endpoint, model):
        raise UsageError(f"{flag}: a cloud answers this model; name it with --cloud-model, or say where it runs, like "
                         f"{provider}:NAME@http://127.0.0.1:8080/v1")
    return Target(endpoint, model, side)


def may_be_local(endpoint: Endpoint, model: str) -> bool:
    """Whether a model may count as local: its endpoint is not its vendor's own, and does not pass it on to there."""
    return endpoint.base_url != PROVIDERS[endpoint.provider].official and not (
        endpoint.provider == "ollama" and is_remote(model))


# === 7. Transport =====================================================================================================
# uses: 1 3
# How do bytes get to an upstream and back?  http.client connects, by the way that urllib knows (proxies), and HTTP/1.1
# is written and read here, over connections that stay open between requests.  It knows addresses and deadlines, and
# nothing of what the bytes mean.  Four rules hold here and in 11:
#   A wait is a blocking call that ends by itself after a tick; then one callback looks at the clock and the client.
#   A stream belongs to its own thread from head to end: what one read brought goes out in one write.
#   Events that say a text and nothing else are known by one static pattern, and pass as values of their own type.
#   The kernel schedules threads, not Oblix: those of requests are held on one core.

MAX_BODY_BYTES = 64 << 20     # of a whole answer
MAX_STREAM_BYTES = 256 << 20  # of a streamed one: 128,000 tokens take some 30 MiB
MAX_IDLE = 64                 # connections kept open to one host: as many as Oblix is meant to serve at once
IDLE_S = 55.0                 # below the 60 s after which many load balancers drop an idle connection
STALE_S = 1.0                 # within which a kept connection that has died shows it
PIECE_BYTES = 1 << 16         # of one read or write
DRAIN_S = 0.05                # wait for the few bytes behind an end mark, so that the connection can be kept

# --- 7. Waiting -------------------------------------------------------------------------------------------------------

# The longest that a call may block.  After it the thread looks at the clock, at the client, and whether Oblix stops.
TICK_S = 0.25
NOT_YET = (socket.timeout, BlockingIOError)    # what a blocking call raises when its time is over

# A thread that waits for something calls its look before each wait and after each tick.  The look sees to the client.
# It raises ClientGone when the client has left, and OblixError when Oblix ends the request.
Look = Callable[[], None]


def no_look() -> None:
    """See to nobody: no client waits."""


class Limits(NamedTuple):
    """How long each phase of an exchange may take, in seconds."""
    connect_s: float        # DNS, TCP, TLS and a proxy's tunnel together
    first_byte_s: float     # from the request's last byte to the answer's first content
    stall_s: float          # silence between two events of a stream, or between two bytes of a whole answer
    until: float = math.inf    # when the time for the whole request is over, by time.monotonic


def limit_waits(connection: socket.socket, limit_s: float) -> None:
    """Have each read and each write of a connection raise one of NOT_YET after so many seconds.

    Python's settimeout adds two system calls to every wait, and each of them hands the interpreter to another thread:
    30 us of CPU with 16 clients on two cores (measured).  The kernel limits the waits of a blocking socket itself: on
    Linux, where that was tried, and not with TLS, as the ssl module repeats what was cut short.
    """
    if sys.platform != "linux" or hasattr(connection, "pending"):    # TLS
        return connection.settimeout(limit_s)
    connection.settimeout(None)
    value = struct.pack(_timeval(), int(limit_s), int(limit_s % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, value)


@functools.lru_cache(1)
def _timeval() -> str:
    """Return how a struct timeval is packed; on 32-bit systems that depends on how the C library was built."""
    with socket.socket() as one:
        return {16: "qq", 8: "ii"}[len(one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))]


def wait_for(event: threading.Event, limit_s: float, look: Look) -> bool:
    """Return True if an event of ours comes within the limit.  Raise what the look raises."""
    deadline = time.monotonic() + limit_s
    look()
    while not event.wait(min(TICK_S, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
        look()
    return True


def send_all(connection: socket.socket, data: bytes, limit_s: float, look: Look = no_look) -> None:
    """Send data.  Raise OSError, one of NOT_YET where the other side takes nothing of it for `limit_s`."""
    left, deadline = memoryview(data), time.monotonic() + limit_s
    while left:    # not sendall, whose timeout is for all of the data together
        try:
            left = left[connection.send(left[:PIECE_BYTES]):]
            deadline = time.monotonic() + limit_s
        except NOT_YET:
            if time.monotonic() >= deadline:
                raise
        look()


def has_left(client: socket.socket) -> bool:
    """Return True if a client has closed its side of a connection.  Do not wait."""
    if _HUNG_UP:    # Linux tells a hang-up apart from the next request, which may wait there unread
        return _has_come(client, _HUNG_UP)
    try:
        return _has_come(client, _READABLE) and not client.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def _has_come(connection: socket.socket, event: int) -> bool:
    """Return True if an event, or a failure, has come on a connection.  Do not wait."""
    if not hasattr(select, "poll"):    # Windows; elsewhere select fails from descriptor 1,024 on
        return bool(select.select([connection], [], [], 0)[0])
    poller = select.poll()
    poller.register(connection, event)
    return bool(poller.poll(0))


_READABLE, _HUNG_UP = getattr(select, "POLLIN", 1), getattr(select, "POLLRDHUP", 0)


# --- 7. Connecting ----------------------------------------------------------------------------------------------------

class _Way(NamedTuple):
    """How an upstream is reached."""
    upstream: str             # its host[:port]
    tls: bool
    host: str                 # host[:port] to connect to: the upstream, or a proxy
    tunnel: str               # the upstream's host[:port] where a proxy passes bytes through to it, else ""
    head: str                 # the request line's target and version, and fields
    secret: dict[str, str]    # what the proxy wants to see of a tunnel


def is_near(host: str) -> bool:
    """Return True if a host[:port] is the device itself or a private address: nothing has to be looked up."""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    address = address_of(name)
    return is_loopback(name) or address is not None and address.is_private    # link-local included


def _proxy_for(scheme: str, host: str) -> str:
    """Return the URL of the system's proxy to a host[:port], or "" where there is none or the host is near."""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    if is_near(host) or "." not in name or name.endswith((".local", ".lan", ".internal", ".home.arpa")):
        return ""
    from urllib.request import getproxies, proxy_bypass  # takes 1 MiB, which a local model alone does not need
    proxy = getproxies().get(scheme, "")
    return "" if not proxy or proxy_bypass(host) else proxy if "://" in proxy else f"http://{proxy}"


def way_to(url: str) -> _Way:
    """Return how a URL is reached: as it is, or by the system's proxy."""
    there = urllib.parse.urlsplit(url)
    tls, host, proxy = there.scheme == "https", there.netloc, _proxy_for(there.scheme, there.netloc)
    path = urllib.parse.urlunsplit(("", "", there.path or "/", there.query, ""))
    if not proxy:
        return _Way(host, tls, host, "", f"{path} HTTP/1.1\r\nHost: {host}\r\n", {})
    by = urllib.parse.urlsplit(proxy)
    user, password = (urllib.parse.unquote(part or "") for part in (by.username, by.password))
    known = base64.b64encode(f"{user}:{password}".encode()).decode()
    secret = {"Proxy-Authorization": f"Basic {known}"} if user else {}
    middle = by.netloc.rpartition("@")[2]
    if tls:
        return _Way(host, True, middle, host, f"{path} HTTP/1.1\r\nHost: {host}\r\n", secret)
    fields = "".join(f"{name}: {value}\r\n" for name, value in {"Host": host, **secret}.items())
    return _Way(host, by.scheme == "https", middle, "", f"{url} HTTP/1.1\r\n{fields}", {})


class _TlsConnection(http.client.HTTPConnection):
    """A connection whose other side speaks TLS; http.client's own is not there where ssl was not imported with it."""
    default_port = 443


def _connect(way: _Way, limit_s: float, tls_context: Callable[[], ssl.SSLContext]) -> socket.socket:
    """Return a new connection, on which TLS has been set up."""
    connection = (_TlsConnection if way.tls else http.client.HTTPConnection)(way.host, timeout=limit_s)
    if way.tunnel:
        connection.set_tunnel(way.tunnel, headers=way.secret)
    connection.connect()
    upstream: socket.socket = connection.sock
    _notice_death(upstream)
    if way.tls:
        name = urllib.parse.urlsplit(f"//{way.tunnel or way.host}").hostname
        upstream = tls_context().wrap_socket(upstream, server_hostname=name)
    limit_waits(upstream, TICK_S)
    return upstream


DEAD_S = 15    # after which a silent network has failed, and not a slow model: the peer's kernel answers at once


def _notice_death(upstream: socket.socket) -> None:
    """Have the kernel fail a connection whose other end has vanished, as it does when a device changes networks.

    Else a request on a kept connection would wait there for as long as a model may think.
    """
    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPALIVE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2),
                        ("TCP_USER_TIMEOUT", 1000 * DEAD_S)):    # each where the system has it
        with contextlib.suppress(AttributeError, OSError):
            upstream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _connect_within(limit_s: float, connect: Callable[[], socket.socket], look: Look) -> socket.socket:
    """Return the connection that `connect` makes on a thread of its own, or raise what it raises.

    The thread is the only bound on the resolver, which has no timeout.  Raise UpstreamError after `limit_s` seconds.
    """
    made: list[Any] = []    # the connection or an error, behind None if the caller has given up before
    done = threading.Event()

    def run() -> None:
        try:
            made.append(connect())
        except Exception as error:
            made.append(error)
        done.set()
        if made[0] is None and isinstance(made[1], socket.socket):
            made[1].close()

    try:
        threading.Thread(target=run, name="connect", daemon=True).start()
    except RuntimeError:
        raise UpstreamError("no thread is left to connect", status=503, code="out_of_threads") from None
    try:
        wait_for(done, limit_s, look)
    finally:
        made.append(None)
    if made[0] is None:
        raise UpstreamError("no connection within the time limit", status=504, code="upstream_timeout")
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]  # type: ignore[no-any-return]


# --- 7. Reading an answer ---------------------------------------------------------------------------------------------

MAX_ANSWER_HEAD = 64 << 10    # bytes
MAX_CHUNK_LINE = 1024         # bytes of a chunk's size and extensions, of which nobody is known to send any
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?(?:\n|$)")
_FIELDS_USED = re.compile(r"(?i)\n(connection|content-length|content-type|openai-processing-ms|retry-after(?:-ms)?|"
                          r"transfer-encoding):([^\n]*)")
_CHUNK_SIZE = re.compile(rb"(?:\r\n)?([0-9a-fA-F]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")    # with the end of the chunk before


class Answer:
    """An upstream's answer: its status and headers, and the body as it comes.  To be closed.

    HTTP/1.1 is read here and not by http.client: its heads go through a parser for e-mail and its bodies through three
    buffers, which halves the requests a second of a bare relay (measured: 12,400 and 5,600).
    """

    def __init__(self, upstream: socket.socket, limits: Limits, look: Look, keep: Callable[[], None]) -> None:
        """`keep` is called when the connection is free for the next request."""
        self._upstream, self._limits, self._look, self._keep = upstream, limits, look, keep
        self._until, self._deadline = limits.until, math.inf
        self.text_event: TextEvent | None = None    # of events that need not be read
        self._held = b""    # what has come and is not used yet
        self._left = self._size = 0    # bytes of the chunk, or of the body, that are still to come; of all that came
        self.silent = True             # nothing has come
        self._begun = self._trailing = self._ended = self.complete = False    # the last one: the body has come

    def watch(self) -> None:
        """See to the client and to the clock.  Raise UpstreamError where the time is over, and what the look raises."""
        before = time.monotonic()
        self._look()
        now = time.monotonic()
        self._deadline += now - before    # a client that takes what it is sent slowly is no silence of the upstream
        if now >= self._until:
            raise time_is_up()
        if now >= self._deadline:
            raise UpstreamError("the answer stalled" if self._begun else "no answer began within the time limit",
                                status=504, code="upstream_timeout")

    def _receive(self) -> bytes:
        """Return what comes next, and nothing at the end.  Raise OSError, and what `watch` raises."""
        while True:
            self.watch()
            try:
                piece = self._upstream.recv(PIECE_BYTES)
            except NOT_YET:
                continue
            self.silent = self.silent and not piece
            return piece

    def read_head(self) -> None:
        """Wait for the answer's head.  Raise as `_receive`, and ValueError for what is not HTTP."""
        sent = time.monotonic()
        self._deadline = sent + self._limits.first_byte_s
        self._read_head()
        while self.status < 200:    # 100, 102, 103: the answer is still to come
            self._read_head()
        self.waited_s = time.monotonic() - sent    # from the request's last byte: neither connecting nor TLS
        self.content_type = self._fields.get("content-type", "").partition(";")[0].strip().lower()
        self._set_framing()

    def _read_head(self) -> None:
        """Take the next head.  Raise ConnectionResetError where there is no more, ValueError."""
        end = _HEAD_END.search(self._held)
        while not end:
            if len(self._held) > MAX_ANSWER_HEAD:
                raise ValueError("too long a head")
            piece = self._receive()
            if not piece:
                raise ConnectionResetError("no whole head")
            self._held += piece
            end = _HEAD_END.search(self._held)
        head = self._held[:end.start()].decode("latin-1").replace("\r\n", "\n")
        self._held = self._held[end.end():]
        found = _STATUS_LINE.match(head)
        if not found or "\n " in head or "\n\t" in head:
            raise ValueError("no status line, or a folded line")
        self._version, self.status = found[1], int(found[2])
        self._fields: dict[str, str] = {}
        for name, value in _FIELDS_USED.findall(head):
            name, value = name.lower(), value.strip(" \t")
            if name in ("content-length", "transfer-encoding") and self._fields.get(name, value) != value:
                raise ValueError("two framings")
            self._fields[name] = value

    def _set_framing(self) -> None:
        """Find out where the body ends (RFC 9112, 6.3).  Raise ValueError for what two readers might not agree on."""
        length, coding = self._fields.get("content-length"), self._fields.get("transfer-encoding", "").lower()
        if coding not in ("", "identity", "chunked") or not is_size(length or "0"):
            raise ValueError("unknown framing")
        option, self._chunked = self._fields.get("connection", "").lower(), coding == "chunked"
        self._counted = not self._chunked and (length is not None or self.status in (204, 304))
        if self._counted:
            self._left = int(length or 0) if self.status not in (204, 304) else 0
            self.complete = not self._left
        self._keeps_open = "close" not in option and (self._version == "1" or "keep-alive" in option) and not (
            self._chunked and length)

    @property
    def worked_s(self) -> float:
        """The seconds that the server says it worked on the request, as OpenAI does; 0 where it does not say."""
        with contextlib.suppress(ValueError):
            return max(0.0, finite(self._fields.get("openai-processing-ms", "0")) / 1000)
        return 0.0

    @property
    def retry_after_s(self) -> float | None:
        """The seconds that the server asks to wait."""
        return _retry_after(self._fields)

    def begin(self) -> None:
        """From now on limit silence: the first content has come."""
        self._begun = True
        self._progress()

    def _progress(self) -> None:
        """Something has come that is more than a sign of life: the silence after it counts."""
        if self._begun:
            self._deadline = time.monotonic() + self._limits.stall_s

    def _pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes.  Raise UpstreamError where it breaks off or has no end."""
        with _upstream_faults():
            piece = self._taken(b"") if self._held else b""    # what came with the head
            while True:
                if piece:
                    yield piece
                if self.complete:
                    return
                piece = self._taken(self._receive() or None)

    def _taken(self, come: bytes | None) -> bytes:
        """Return the body's next bytes, when these have come, or with None the connection's end.

        Raise ConnectionResetError or UpstreamError where it breaks off or is too long, ValueError for no chunk.
        """
        if come is None and self._chunked:
            raise ConnectionResetError("cut between or inside chunks")
        if come is None and self._counted:
            raise UpstreamError("the connection was closed before the answer was complete", code="upstream_cut")
        self._held += come or b""
        if self._chunked:
            piece = self._unframed()
        elif self._counted:
            piece, self._held = self._held[:self._left], self._held[self._left:]
            self._left -= len(piece)
            self.complete = not self._left
        else:
            piece, self._held, self.complete = self._held, b"", come is None
        self._size += len(piece)
        if self._size > MAX_STREAM_BYTES:
            raise UpstreamError(f"the answer is larger than {MAX_STREAM_BYTES >> 20} MiB")
        return piece

    def _unframed(self) -> bytes:
        """Return what has come of a body in chunks (RFC 9112, 7.1), without their frames."""
        held, found, at = self._held, list[bytes](), 0
        while not self._trailing:
            if self._left and at < len(held):
                found.append(held[at:at + self._left])
                at += len(found[-1])
                self._left -= len(found[-1])
            line = None if self._left else _CHUNK_SIZE.match(held, at)
            if not line:
                break
            at, self._left = line.end(), int(line[1], 16)
            self._trailing = not self._left
        self._held = held[at:]
        self.complete = self._trailing and self._pass_trailers()
        if not self.complete and (len(self._held) > MAX_CHUNK_LINE
                                  or not self._trailing and self._held.find(b"\n", 2) >= 0):
            raise ValueError("no chunk")
        return b"".join(found)

    def _pass_trailers(self) -> bool:
        """Drop trailers.  Return True if the empty line has come that ends a body in chunks."""
        while b"\n" in self._held:
            line, _, self._held = self._held.partition(b"\n")
            if not line.strip():
                return True
        return False

    def body(self, within_first_byte: bool = False) -> bytes:
        """Return the whole body, which has to come `within_first_byte`'s limit if that is set.

        Raise UpstreamError where it breaks off or is too large.
        """
        pieces, size = [], 0
        for piece in self._pieces():
            if not within_first_byte:
                self.begin()
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise UpstreamError(f"the answer is larger than {MAX_BODY_BYTES >> 20} MiB")
        return b"".join(pieces)

    def lines(self) -> Iterator[bytes | Texts]:
        """Yield the body's lines without their ends: LF, CRLF or CR, and no other (bytes.splitlines knows just these).

        Comments and empty lines are no progress.  Claude's pings are: it thinks silently, and may do so for long.
        Where `text_event` is set a read that brought nothing but such events is one item, `Texts`.
        """
        held: list[bytes] = []    # the pieces of a line whose end has not come
        size, fresh = 0, True     # of these; whether an event begins with them
        for piece in self._pieces():
            held.append(piece)
            size += len(piece)
            if size > MAX_LINE_BYTES + len(piece):
                raise UpstreamError(f"a piece of the answer is larger than {MAX_LINE_BYTES >> 20} MiB")
            if b"\n" not in piece and b"\r" not in piece:
                continue
            whole, rest = self._whole(b"".join(held), fresh)
            held, size = [rest] if rest else [], len(rest)
            texts = self._texts(whole) if fresh else None
            lines = [] if texts else whole.splitlines(True)
            if texts:
                yield texts
            for line in lines:
                yield line.rstrip(b"\r\n")
            if lines:
                fresh = not lines[-1].strip(b"\r\n") or self.text_event is not None and self.text_event.end == b"\n"
            if texts or any(line[:1] not in b":\r\n" for line in lines):    # counted from when the client has taken it
                self._progress()
        yield from b"".join(held).splitlines()    # nothing more can follow a CR

    def _whole(self, come: bytes, fresh: bool) -> tuple[bytes, bytes]:
        """Return (the whole lines of what has come, the rest), or the whole events where these may pass unread."""
        if fresh and self.text_event:
            end = self.text_event.end
            at = come.rfind(end) + len(end) if end in come else 0
            if b"\r" not in come[at:] and len(come) - at <= PIECE_BYTES:    # else it may have whole events, or is none
                return come[:at], come[at:]
        # the last line may go on, and so may a CR that an LF could follow
        at = len(come) if come.endswith(b"\n") else max(come.rfind(b"\n"), come.rfind(b"\r", 0, -1)) + 1
        return come[:at], come[at:]

    def _texts(self, whole: bytes) -> Texts | None:
        """Return the texts of whole events, if each of them says one and nothing else."""
        between = self.text_event.pattern.split(whole) if self.text_event else ()    # gap, text, gap, text, gap
        with contextlib.suppress(UnicodeDecodeError):
            if len(between) > 1 and not any(between[::2]) and (whole.isascii() or whole.decode()):
                return Texts(between[1::2])
        return None

    def mark_complete(self) -> None:
        """Know that the protocol's end mark has come; only the end of the framing may still be missing."""
        self._ended = True

    def close(self) -> None:
        """Keep the connection if the answer has been read to its end, else break it off, which stops the upstream."""
        if self._ended and not self.complete:
            self._drain()
        if self.complete and self._keeps_open and not self._held:
            self._keep()
        else:
            self._upstream.close()

    def _drain(self) -> None:
        """Read what is behind the end mark, if it comes at once."""
        self._look, self._until, self._deadline = no_look, math.inf, time.monotonic() + DRAIN_S
        limit_waits(self._upstream, DRAIN_S)
        with contextlib.suppress(UpstreamError):
            collections.deque(self._pieces(), 0)
        limit_waits(self._upstream, TICK_S)


def time_is_up() -> UpstreamError:
    """Return the error of a request that has taken all the time that it may."""
    return UpstreamError("the time limit of the whole request is over (--request-timeout-s)", Fault.LATE, status=504,
                         code="request_timeout", retry=False)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by `retry-after-ms` or `retry-after`, a number or an HTTP date (RFC 9110, 10.2.3)."""
    text = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if headers.get("retry-after-ms"):
            return max(0.0, finite(headers["retry-after-ms"]) / 1000)
        if re.fullmatch(r"\s*[\d.]+\s*", text):
            return finite(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    return None


_FAULTS: tuple[tuple[Any, str, int, str], ...] = (    # the first that fits; socket.timeout is TimeoutError since 3.10
    (NOT_YET, "no connection, or the request was not accepted, within the time limit", 504, "upstream_timeout"),
    (socket.gaierror, "its host name can't be resolved", 503, "upstream_unreachable"),
    (ConnectionRefusedError, "connection refused", 503, "upstream_unreachable"),
    (ConnectionError, "the connection broke off", 502, "upstream_cut"),
    (OSError, "unreachable: {}", 503, "upstream_unreachable"),
    ((http.client.HTTPException, ValueError), "it does not answer in HTTP", 502, "bad_upstream_answer"),
)


@contextlib.contextmanager
def _upstream_faults() -> Iterator[None]:
    """Turn all that sockets, TLS, DNS and http.client raise into an UpstreamError, here and nowhere else."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        words, status, code = next(fault[1:] for fault in _FAULTS if isinstance(error, fault[0]))
        if hasattr(error, "library") and not isinstance(error, NOT_YET):    # of ssl, which need not be imported
            words, status, code = "TLS failed: {}", 502, "upstream_tls"
        raise UpstreamError(words.format(why), status=status, code=code) from error


# --- 7. Exchanges -----------------------------------------------------------------------------------------------------

class Transport:
    """Opens exchanges with upstreams, over connections that stay open between requests.

    Proxies are as in the environment, but never for hosts that are near.  No redirect is followed: nothing here does
    it, so that no key can be carried anywhere by one.
    """

    def __init__(self) -> None:
        self._idle: dict[Any, collections.deque[tuple[socket.socket, float]]] = {}    # by way[:4]
        self._ways: dict[str, _Way] = {}    # by URL, of which there are a few for each endpoint: proxies take 0.05 ms
        self._tls: ssl.SSLContext | None = None    # made when first needed: it reads every certificate there is
        self._closed = False

    def open(self, url: str, headers: Mapping[str, str], payload: bytes | None, limits: Limits,
             look: Look = no_look) -> Answer:
        """Send a request (POST with a payload of JSON, else GET) and return the answer, whatever its status.

        Raise UpstreamError, and what the look raises.
        """
        with _upstream_faults():
            way = self._way(url)
            lines = [f"{'GET' if payload is None else 'POST'} {way.head}User-Agent: oblix/{__version__}", "Accept: */*",
                     "Accept-Encoding: identity", *(f"{name}: {value}" for name, value in headers.items())]
            if payload is not None:
                lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
            head = "\r\n".join([*lines, "", ""]).encode("latin-1")
            return self._exchange(way, head + (payload or b""), limits, look)

    def _way(self, url: str) -> _Way:
        """Return how a URL is reached, which is found out once."""
        way = self._ways.get(url)
        if way is None:
            way = self._ways[url] = way_to(url)
        return way

    def _exchange(self, way: _Way, raw: bytes, limits: Limits, look: Look) -> Answer:
        """Send a request, and return its answer when the head has come.

        A kept connection may have died while it was idle.  That shows at once, so only then is the request sent again:
        a model that has worked on it may be paid for it.
        """
        begun, kept = time.monotonic(), self._kept(way)
        while True:
            upstream = kept or _connect_within(
                limits.connect_s, lambda: _connect(way, limits.connect_s, self._tls_context), look)
            answer = Answer(upstream, limits, look, functools.partial(self._keep, way, upstream))
            try:
                send_all(upstream, raw, limits.stall_s, answer.watch)
                answer.read_head()
                return answer
            except BaseException as error:
                upstream.close()
                dead = isinstance(error, OSError) and not isinstance(error, NOT_YET) and answer.silent
                if not kept or not dead or time.monotonic() - begun > STALE_S:
                    raise
            kept = None

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            import ssl
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    def _kept(self, way: _Way) -> socket.socket | None:
        """Return an idle connection on which nothing has come: neither its end, nor bytes that nobody asked for."""
        idle = self._idle.get(way[:4])
        while idle:
            try:
                upstream, since = idle.pop()
            except IndexError:    # another thread was quicker
                break
            if time.monotonic() - since < IDLE_S and not _has_come(upstream, _READABLE):
                return upstream
            upstream.close()
        return None

    def _keep(self, way: _Way, upstream: socket.socket) -> None:
        """Keep a connection for the next request, and close those that nobody has used for long."""
        now = time.monotonic()
        self._idle.setdefault(way[:4], collections.deque()).append((upstream, now))
        for idle in tuple(self._idle.values()):
            with contextlib.suppress(IndexError):    # none is left
                while self._closed or len(idle) > MAX_IDLE or now - idle[0][1] > IDLE_S:
                    idle.popleft()[0].close()

    def forget(self, url: str = "") -> None:
        """Close the idle connections to a URL's server, as one of its kind was found dead, or all of them."""
        host = urllib.parse.urlsplit(url).netloc
        for place, idle in tuple(self._idle.items()):
            with contextlib.suppress(IndexError):    # none is left
                while not host or host in place:
                    idle.popleft()[0].close()

    def close(self) -> None:
        """Close the idle connections, and from now on each one that becomes idle."""
        self._closed = True
        self.forget()


# === 8. Ledger ========================================================================================================
# uses: 1 5
# What does the process remember from one request to the next?  It is shared and changes, so it is behind a lock, which
# is held for a few dictionary operations and never while anything slow happens.

MAX_REMEMBERED = 256    # targets and conversations: clients name the ones and begin the others, so it must have an end


class _Flight:
    """Counts a request while a block runs.  A generator made into a context manager takes twice as long."""
    __slots__ = ("_count", "_target")

    def __init__(self, count: Callable[[Target, int], int], target: Target) -> None:
        self._count, self._target = count, target

    def __enter__(self) -> int:
        return self._count(self._target, 1)

    def __exit__(self, *_: object) -> None:
        self._count(self._target, -1)


class Ledger:
    """Requests in flight, what requests have shown of each target, and who answered which conversation."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[Target, int] = {}    # guarded by _lock; no zeros
        self._records: dict[Target, Record] = {}    # guarded by _lock; in the order in which they were last changed
        self._last: collections.OrderedDict[int, Target] = collections.OrderedDict()    # guarded by _lock

    def flight(self, target: Target) -> contextlib.AbstractContextManager[int]:
        """Count a request as in flight while the block runs; gives how many there are with it."""
        return _Flight(self._count, target)

    def _count(self, target: Target, step: int) -> int:
        with self._lock:
            number = self._in_flight[target] = self._in_flight.get(target, 0) + step
            if not number:
                del self._in_flight[target]
        return number

    def in_flight(self) -> dict[Target, int]:
        """Requests in flight by target."""
        with self._lock:
            return dict(self._in_flight)

    def records(self) -> dict[Target, Record]:
        """What is known of each target."""
        with self._lock:
            return dict(self._records)

    def record(self, target: Target) -> Record:
        """What is known of one target."""
        with self._lock:
            return self._records.get(target, UNTRIED)

    def _update(self, target: Target, change: Callable[[Record], Record]) -> tuple[Record, Record]:
        """Replace a target's record; returns (before, after).  `change` does nothing but make a value."""
        with self._lock:
            before = self._records.get(target, UNTRIED)
            after = change(before)
            self._records.pop(target, None)
            self._records[target] = after
            if len(self._records) > MAX_REMEMBERED:
                del self._records[next(iter(self._records))]
        return before, after

    def admit(self, target: Target) -> tuple[bool, bool]:
        """(may this request try it, as the one trial after a rest).  Whoever has the trial must release it."""
        if not self.record(target).breaker.failures:    # nearly always
            return True, False
        before, after = self._update(target, lambda record: record._replace(
            trial=record.trial or bool(record.breaker.failures)))
        return not before.trial, after.trial and not before.trial

    def release(self, target: Target) -> None:
        """A trial has ended, whatever it has shown."""
        self._update(target, lambda record: record._replace(trial=False))

    def settle(self, target: Target, error: UpstreamError | None) -> Breaker:
        """An attempt has failed, or with None succeeded; returns the target's breaker of before."""
        now, known = self.clock(), self.record(target).breaker
        if not error and not known.failures:    # nearly always
            return known
        before, _ = self._update(target, lambda record: record._replace(
            breaker=record.breaker.failed(error, now) if error else record.breaker.succeeded()))
        return before.breaker

    def learn_refusal(self, target: Target, param: str) -> None:
        """Remember that this model refuses a parameter of the upstream's dialect."""
        self._update(target, lambda record: record._replace(refused=record.refused | {param}))

    def learn_pace(self, target: Target, first_s: float | None, tokens: int, seconds: float) -> None:
        """Remember how fast an answer was."""
        self._update(target, lambda old: Record(
            old.breaker, old.trial, old.refused, old.pace.learned(first_s, tokens, seconds), old.context))

    def learn_load(self, target: Target, load_s: float, context: int) -> None:
        """Remember how long the model took to load, and for which context."""
        self._update(target, lambda record: record._replace(pace=record.pace._replace(load_s=load_s), context=context))

    def last_of(self, conversation: int) -> Target | None:
        """Who answered this conversation last."""
        with self._lock:
            return self._last.get(conversation)

    def learn_last(self, conversation: int, target: Target) -> None:
        """Remember who answered this conversation."""
        with self._lock:
            self._last[conversation] = target
            self._last.move_to_end(conversation)
            while len(self._last) > MAX_REMEMBERED:
                self._last.popitem(last=False)


# === 9. Gateway =======================================================================================================
# uses: 1 2 3 4 5 6 7 8 10
# How does one request become one answer?  Composes the sections above: resolve the model, rank the targets, try them
# until one has content, and tell why.  It knows nothing of the client's HTTP but the socket to watch.

PROBE_LIMITS = Limits(connect_s=5.0, first_byte_s=5.0, stall_s=5.0)
SECOND_TRY_S = 0.5           # sooner nothing will have changed
LAST_HOPE_CONNECT_S = 1.5    # where nobody else is left to answer, but hardly this one either
WARM_AGAIN_S = 300.0         # as long as Ollama keeps a model by itself
LOAD_S = 300.0               # Ollama gives up a load after 5 minutes by itself (OLLAMA_LOAD_TIMEOUT)
MAX_MODELS = 4096            # of an endpoint; the largest catalogue known has some 500
DETAILS_AT_ONCE = 4          # models that one probe asks the details of: each takes Ollama some milliseconds


# What code that takes a well-formed answer for granted trips over in another one.
NOT_IN_ITS_FORMAT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def new_id(prefix: str) -> str:
    """A fresh random id.  It is no secret, so no system call is made for it."""
    return f"{prefix}{random.getrandbits(96):024x}"


class Prober:
    """Asks endpoints how they are, on the same way that requests take: same proxy, same TLS."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._details: dict[Endpoint, dict[str, Json]] = {}    # each endpoint has one thread that asks

    def __call__(self, endpoint: Endpoint) -> Probe:
        """Raises UpstreamError: a captive portal's page is not a cloud."""
        provider = PROVIDERS[endpoint.provider]
        answer, text = self._ask(endpoint, provider.probe_path)
        latency_ms = 1000 * max(0.0, answer.waited_s - answer.worked_s)
        if answer.status in (404, 405):    # a compatible server without a list of models is there all the same
            return Probe(answer.status, None, latency_ms)
        try:
            listing = loads(text)
        except (RecursionError, ValueError):
            raise UpstreamError(f"what answers there is no {provider.label} (a login page?)") from None
        if answer.status >= 500 or 300 <= answer.status < 400:
            raise classify(answer.status, text.decode("utf-8", "replace"), None, endpoint)
        models = None
        with contextlib.suppress(*NOT_IN_ITS_FORMAT):    # a list in no shape we know
            models = (provider.models(listing) or ())[:MAX_MODELS] if answer.status == 200 else None
        return Probe(answer.status, self._described(endpoint, provider, models) if models else models, latency_ms)

    def _ask(self, endpoint: Endpoint, path: str, payload: Json | None = None) -> tuple[Answer, bytes]:
        """(the answer, its body); the answer is closed."""
        answer = self._transport.open(endpoint.base_url + path, PROVIDERS[endpoint.provider].headers(endpoint),
                                      None if payload is None else dumps(payload), PROBE_LIMITS)
        with contextlib.closing(answer):
            return answer, answer.body(within_first_byte=True)

    def _described(self, endpoint: Endpoint, provider: Provider, models: Sequence[Model]) -> tuple[Model, ...]:
        """The models with what the endpoint says of their state, and of a few new ones in detail."""
        with contextlib.suppress(UpstreamError, RecursionError, *NOT_IN_ITS_FORMAT):
            if provider.state_path:
                models = provider.with_state(models, loads(self._ask(endpoint, provider.state_path)[1]))
        known, current = self._details.get(endpoint, {}), {model.digest or model.name for model in models}
        details = self._details[endpoint] = {key: known[key] for key in known.keys() & current}
        new = [model for model in models if (model.digest or model.name) not in details and not model.remote]
        for model in new[:DETAILS_AT_ONCE] if provider.details_path else ():
            with contextlib.suppress(UpstreamError, AttributeError, ValueError, RecursionError):
                said = loads(self._ask(endpoint, provider.details_path, {"model": model.name})[1])
                details[model.digest or model.name] = {name: said.get(name) for name in ("model_info", "capabilities")}
        described = []
        for model in models:
            with contextlib.suppress(*NOT_IN_ITS_FORMAT):
                model = provider.with_details(model, details.get(model.digest or model.name, {}))
            described.append(model)
        return tuple(described)


class Load:
    """A model on its way into memory: `done` is set at its end, and `error` tells why it failed."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: UpstreamError | None = None


class Loader:
    """Loads models by requests of its own, so that no client that hangs up can abort a load."""

    def __init__(self, load: Callable[[Target, int], None]) -> None:
        self._load = load
        self._loads: dict[Target, Load] = {}    # setdefault and del are atomic

    @property
    def loading(self) -> frozenset[Target]:
        """What is being loaded."""
        return frozenset(tuple(self._loads))

    def under_way(self, target: Target) -> Load | None:
        """The load of a target that has not ended."""
        return self._loads.get(target)

    def begin(self, target: Target, context: int) -> Load:
        """Load a target's model for a context (0: its own), or join the load that is under way.  Does not wait."""
        fresh = Load()
        load = self._loads.setdefault(target, fresh)
        if load is fresh:
            thread = threading.Thread(target=self._run, args=(target, context, load), name="load", daemon=True)
            try:
                thread.start()
            except RuntimeError:    # no more threads
                self._end(target, load, UpstreamError("no thread is left to load the model"))
        return load

    def _run(self, target: Target, context: int, load: Load) -> None:
        error: UpstreamError | None = UpstreamError("loading the model failed")    # of a bug, which stderr tells
        try:
            self._load(target, context)
            error = None
        except UpstreamError as failure:
            error = failure
        finally:
            self._end(target, load, error)

    def _end(self, target: Target, load: Load, error: UpstreamError | None) -> None:
        load.error = error
        del self._loads[target]
        load.done.set()


@dataclasses.dataclass
class Served:
    """An answer on its way to the client: either `whole`, or `chunks` whose first ones have content."""
    target: Target
    reason: str = ""
    attempts: int = 1
    whole: Json | None = None
    raw: bytes = b""    # the whole answer in JSON, where the upstream's own could be taken
    chunks: Iterator[Any] = iter(())
    held: int = 0       # how many of the chunks have come; the last of them has content


class Outlook(NamedTuple):
    """What follows from the readings and the loads alone, and is therefore the same for many requests in a row.

    Readings change about once a second.  A plan for `auto` takes 75 µs where one has, and else 20 (Python 3.11).
    """
    readings: tuple[Reading, ...]
    loading: frozenset[Target]
    targets: tuple[Target, ...]    # what `auto` may choose from
    installed: dict[str, tuple[Model, ...]]    # Ollama's by their full names; none while it has not listed them
    plans: dict[Any, Plan]         # made from it so far, by what else they go by


MAX_PLANS = 64    # of one outlook: each target may be busy or not, loads take their time, and faults have their reasons


class Gateway:
    """One per process: what is configured and known, and what to do with a request.  Any thread may call it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger, self.transport, self.loader = Ledger(), Transport(), Loader(self._load)
        self._started = settings.prefer == "cloud"    # what is the second choice is loaded only when it may be needed
        self._warm_from = 0.0    # no sooner again: what did not stay in memory may not be able to, or not be wanted
        self._said: dict[Target, tuple[int, int]] = {}    # of a target's last load: context asked, context said
        self._configured = configured_targets(settings)
        self.replicated = len({*map(replica, self._configured)}) < len(self._configured)
        self._default_endpoints = {name: provider.endpoint(settings) for name, provider in PROVIDERS.items()}
        # Ollama is watched in any case: whatever it has installed can be asked for by name
        watched = (Target(self._default_endpoints["ollama"], "", Side.LOCAL), *self._configured)
        prober = Prober(self.transport)
        self.watch = Watch([monitor for kind in MONITORS for monitor in kind.needed(settings, watched, prober)],
                           sampled=self._stand_by)
        self._outlook = Outlook((), frozenset(), (), {}, {})

    def close(self) -> None:
        self.watch.stop()
        self.transport.close()

    def snapshot(self) -> Snapshot:
        """All that a decision is made from, as it is now; never waits."""
        return self._seen(self.outlook())

    def _seen(self, outlook: Outlook) -> Snapshot:
        """An outlook with what requests show now."""
        return Snapshot(outlook.readings, outlook.targets, self.ledger.records(), self.ledger.in_flight(),
                        outlook.loading, self.ledger.clock(), self.settings.prefer, self.settings.local_slots)

    def outlook(self) -> Outlook:
        """What follows from the readings and the loads of now: the last one until one of them is another object."""
        readings, loading, last = self.watch.readings, self.loader.loading, self._outlook
        if [*map(id, readings)] == [*map(id, last.readings)] and loading == last.loading:
            return last
        listed = next((reading.models for reading in readings
                       if reading.endpoint == self._default_endpoints["ollama"] and reading.models), ())
        installed: dict[str, tuple[Model, ...]] = {}
        for model in listed:
            name = full_name(model.name)
            installed[name] = (*installed.get(name, ()), model)
        now = self._outlook = Outlook(readings, loading, self._targets(readings, loading, listed), installed, {})
        return now

    def _stand_by(self) -> None:
        """Load the local model if it is cold and may soon be needed: once at start, and while a cloud is not well."""
        snapshot = self.snapshot()
        conditions = {target: condition(target, snapshot) for target in snapshot.targets}
        clouds = [found.level for target, found in conditions.items() if target.side is Side.CLOUD]
        local = next((target for target in conditions if target.side is Side.LOCAL), None)
        if local and conditions[local].state in ("cold", "ready"):
            wanted = not self._started or min(clouds, default=Level.GOOD) > Level.GOOD
            self._started = True
            if wanted:
                self.warm_up(local, conditions[local])

    def warm_up(self, target: Target, found: Condition) -> None:
        """Have a target's model loaded if it is cold and the device is well enough; does not wait."""
        now = self.ledger.clock()
        if self.settings.warm_up == "auto" and found.state == "cold" and found.may_load and now >= self._warm_from:
            self._warm_from = now + WARM_AGAIN_S
            self.loader.begin(target, self.ledger.record(target).context)

    def _load(self, target: Target, context: int) -> None:
        """Have a model loaded.  Raises UpstreamError."""
        log.info("%s is loading", target.id)
        provider, endpoint, started = PROVIDERS[target.endpoint.provider], target.endpoint, time.monotonic()
        limits = self.limits()._replace(first_byte_s=max(LOAD_S, self.settings.first_byte_timeout_s))
        try:
            answer = self.transport.open(endpoint.base_url + provider.chat_path, provider.headers(endpoint),
                                         dumps(provider.load(target, context)), limits)
            with contextlib.closing(answer):
                text = answer.body(within_first_byte=True).decode("utf-8", "replace")
            if answer.status >= 300:
                raise classify(answer.status, text, answer.retry_after_s, endpoint)
            for line in text.splitlines() or [text]:    # an error, or a login page, may come with any status
                event_of(line)
        except UpstreamError as error:
            log.info("%s was not loaded: %s", target.id, error.brief)
            self.ledger.settle(target, error)    # it rests before it is tried again
            raise
        load_s = time.monotonic() - started
        log.info("%s is loaded, %.1f s", target.id, load_s)
        self.ledger.learn_load(target, load_s, context)
        self.watch.look(endpoint, lambda reading: _shows_loaded(target, context, reading))
        model = model_of(target, reading_of(target, self.watch.readings))
        self._said[target] = context, model.context if model else 0

    def context_of(self, target: Target, model: Model) -> int:
        """Return the context that a model is loaded for.

        Some servers don't say it, or say another one than they were asked for (clamped, times the parallel slots): what
        they said after the last load stands for what that asked for, as another load would change nothing.
        """
        asked, said = self._said.get(target, (0, 0))
        return asked if asked and said == model.context else model.context

    def limits(self, until: float = math.inf) -> Limits:
        """The configured limits of an exchange."""
        return Limits(self.settings.connect_timeout_s, self.settings.first_byte_timeout_s,
                      self.settings.stall_timeout_s, until)

    def _targets(self, readings: tuple[Reading, ...], loading: frozenset[Target],
                 installed: Sequence[Model]) -> tuple[Target, ...]:
        """What `auto` may choose from, local first: what is configured, or else Ollama's newest model that fits."""
        if self.settings.local_model:
            return self._configured
        ollama = self._default_endpoints["ollama"]
        found = [Target(ollama, _short(model.name), Side.LOCAL) for model in installed
                 if model.chats and not model.remote and may_be_local(ollama, model.name)]
        known = Snapshot(readings, (), loading=loading)
        fitting = (target for target in found if condition(target, known).use is Use.YES)
        local = [next(fitting, found[0])] if found else []
        return (*local, *self._configured)

    def resolve(self, name: str, outlook: Outlook) -> Target:
        """The one target that a model's name stands for.  Raises BadRequest (404)."""
        provider, model = split_id(name)
        for target in outlook.targets:
            if (provider in ("", target.endpoint.provider)) and (
                    model == target.model or target.endpoint.provider == "ollama" and same_model(model, target.model)):
                return target
        installed = outlook.installed.get(full_name(model), ())
        if not model or not (provider or installed):
            examples = ", ".join(["auto", "local", "cloud", *(target.id for target in outlook.targets)])
            raise BadRequest(f"There is no model {name!r}. Choose one of {examples}, or any other as provider:name "
                             f"with {', '.join(PROVIDERS)} as the provider; see GET /v1/models.", param="model",
                             status=404, code="model_not_found")
        endpoint = self._default_endpoints[provider or "ollama"]
        local = endpoint.provider == "ollama" and may_be_local(endpoint, model) and not any(
            found.remote for found in installed)
        model = _short(installed[0].name) if installed else model    # one target for all spellings
        return Target(endpoint, model, Side.LOCAL if local else Side.CLOUD)

    def plan(self, request: ChatRequest) -> Plan:
        """What to try for a request.  Raises OblixError: an unknown model, no key, nothing that can answer."""
        outlook = self.outlook()
        if request.model not in ("auto", "local", "cloud"):
            return self._plan_of_one(request, outlook)
        snapshot = self._seen(outlook)
        refusals = self._refusals(request, snapshot)
        last = self.ledger.last_of(conversation_of(request)) if self.replicated else None
        plan = self._ranked(request, snapshot, refusals, last, outlook.plans)
        if not plan.order and not plan.last_hope:
            raise self._nothing_left(plan, refusals, snapshot, [target for target in snapshot.targets
                                                                if request.model in ("auto", target.side.value)])
        return plan

    def _ranked(self, request: ChatRequest, snapshot: Snapshot, refusals: Mapping[Target, Unsupported],
                last: Target | None, plans: dict[Any, Plan]) -> Plan:
        """The plan of `rank`, made once for all requests that are alike in what it goes by: the outlook, whose `plans`
        these are, and how each target stands.

        It is made anew where a target refuses the request, and with --prefer fast, which goes by the last paces.
        """
        only = None if request.model == "auto" else Side(request.model)
        if refusals or snapshot.prefer == "fast":
            tokens = min(request.most_tokens(TYPICAL_TOKENS), TYPICAL_TOKENS)
            return rank(snapshot, {target: refused.message for target, refused in refusals.items()}, only, tokens, last)
        alike = only, last, *[standing(target, snapshot) for target in snapshot.targets]
        plan = plans.get(alike)
        if plan is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            plan = plans[alike] = rank(snapshot, {}, only, last=last)
        return plan

    def _plan_of_one(self, request: ChatRequest, outlook: Outlook) -> Plan:
        """The plan for a model that was named: it alone, whatever is known of it."""
        target = self.resolve(request.model, outlook)
        refused = PROVIDERS[target.endpoint.provider].refusal(request)
        if refused:
            raise refused
        if target.endpoint.lacks_key:
            raise OblixError(f"{target.id} needs a key: set {target.endpoint.key_variable} where Oblix runs.",
                             status=401, type="authentication_error", code="no_api_key", retry=False)
        return Plan((target,), "the request named the model")

    def _refusals(self, request: ChatRequest, snapshot: Snapshot) -> dict[Target, Unsupported]:
        """What of the request each target can't do."""
        refusals = {}
        for target in snapshot.targets:
            refused = PROVIDERS[target.endpoint.provider].refusal(request)
            if not refused and target.endpoint.provider == "ollama":
                refused = self._model_refusal(request, target, snapshot)
            if refused:
                refusals[target] = refused
        return refusals

    def _model_refusal(self, request: ChatRequest, target: Target, snapshot: Snapshot) -> Unsupported | None:
        """What of the request a model can't do, from what its server says of it."""
        model = model_of(target, reading_of(target, snapshot.readings))
        lacking = needs_of(request) - model.can if model and model.can else ()
        if lacking:
            return Unsupported(f"the model has no {' and no '.join(sorted(lacking))}", param="model")
        try:
            self._context(request, target, model, snapshot)
        except Unsupported as error:
            return error
        return None

    def context(self, request: ChatRequest, target: Target, snapshot: Snapshot) -> int:
        """The context to load the target's model for, or 0 to leave it as it is.  Raises Unsupported."""
        return self._context(request, target, model_of(target, reading_of(target, snapshot.readings)), snapshot)

    def _context(self, request: ChatRequest, target: Target, model: Model | None, snapshot: Snapshot) -> int:
        if not model or not model.max_context:
            return 0
        model = dataclasses.replace(model, context=self.context_of(target, model))
        return PROVIDERS[target.endpoint.provider].context_for(
            request, model, snapshot.record(target).context, free_bytes(target, snapshot.readings))

    @staticmethod
    def _nothing_left(plan: Plan, refusals: Mapping[Target, Unsupported], snapshot: Snapshot,
                      asked: Sequence[Target]) -> OblixError:
        """The error of a plan without a target: the client's, if it is the request that rules all of them out."""
        text = _listing(f"{target.id}: {reason}" for target, reason in plan.left_out)
        if asked and all(target in refusals for target in asked):
            codes = {refused.code for refused in refusals.values()}
            return Unsupported(f"No model can take this request: {text}.", param=refusals[asked[0]].param,
                               code=codes.pop() if len(codes) == 1 else None)
        breakers = [snapshot.record(target).breaker for target in asked if target not in refusals]
        wait_s = min((breaker.rest_s(snapshot.now) for breaker in breakers
                      if breaker.rest_s(snapshot.now) and breaker.fault is not Fault.ACCOUNT), default=None)
        return NoTarget(f"No model can answer: {plan.reason}. {text or 'Nothing is configured'}."
                        + ("" if wait_s else " Start Ollama and pull a model, or set OPENAI_API_KEY or "
                                             "ANTHROPIC_API_KEY."), retry=None if wait_s else False,
                        retry_after_s=wait_s)

    def answer(self, request: ChatRequest, look: Look = no_look) -> Served:
        """Return the first answer that a target of the plan gives.  Raise OblixError, and what the look raises.

        Before the first content every fault moves on to the next target; what is returned has content, and whatever
        happens later is told in its chunks' UpstreamError.
        """
        return Course(self, request, look).run()

    def note(self, target: Target, error: UpstreamError | None) -> None:
        """Learn from an attempt that has failed, or with None succeeded."""
        before = self.ledger.settle(target, error)
        if error and error.fault is Fault.ACCOUNT and before.fault is not Fault.ACCOUNT:
            log.error("%s won't answer until somebody acts: %s", target.id, error.brief)
        if error and error.code in _LOST:
            self.watch.tell(target.endpoint, lost=True)
            self.transport.forget(target.endpoint.base_url)

    def health(self) -> Json:
        """The state of everything, from memory alone."""
        snapshot = self.snapshot()
        plan = rank(snapshot, {})
        able = any(plan.conditions[target].state != "unreachable" for target in plan.order)
        waiting = any(reading.endpoint and not reading.known for reading in snapshot.readings)    # no evidence yet
        targets = [_target_report(target, plan.conditions[target], snapshot) for target in snapshot.targets]
        reasons = [f"{target['id']}: {target['reason']}" for target in targets] or [_NOTHING]
        return {
            "status": "healthy" if able or waiting else "unhealthy", "version": __version__,
            **{side.value: _side_report(side, snapshot, plan.conditions) for side in Side},
            "plan": {"order": [target.id for target in plan.order], "reason": plan.reason}, "targets": targets,
            **({} if able or waiting else {"reasons": reasons}),
        }

    def models(self) -> list[tuple[str, int, str]]:
        """(id, created, owner) of all that can be asked for, from memory alone."""
        outlook, found = self.outlook(), dict.fromkeys(("auto", "local", "cloud"), (0, "oblix"))
        found.update({target.id: (0, target.endpoint.provider) for target in outlook.targets})
        found.update({f"ollama:{_short(model.name)}": (model.created, "ollama")
                      for models in outlook.installed.values() for model in models})
        return [(id, *rest) for id, rest in found.items()]


# Codes of faults that tell of the way to an endpoint, so that it is worth a probe at once.
_LOST = ("upstream_unreachable", "upstream_tls", "upstream_timeout", "upstream_cut")
def _shows_loaded(target: Target, context: int, reading: Reading) -> bool:
    """Whether a reading knows of a load that has ended."""
    model = model_of(target, reading)
    return model is None or not model.cold and (not context or model.context in (0, context))


_NOTHING = "no model is configured: start Ollama and pull a model, or set OPENAI_API_KEY or ANTHROPIC_API_KEY"


def _short(name: str) -> str:
    return name[:-len(":latest")] if name.endswith(":latest") else name


def _target_report(target: Target, found: Condition, snapshot: Snapshot) -> Json:
    breaker, model = snapshot.record(target).breaker, model_of(target, reading_of(target, snapshot.readings))
    memory = {"context": model.context, "gpu_share": model.gpu_share} if model and model.context else {}
    reason = found.reason or ("not probed yet" if found.state == "unknown" else None)
    return {"id": target.id, "side": target.side.value, "state": found.state, "reason": reason,
            "in_flight": snapshot.in_flight.get(target, 0), "failures": breaker.failures,
            "rest_s": round(breaker.rest_s(snapshot.now), 1), **memory}


def _side_report(side: Side, snapshot: Snapshot, conditions: Mapping[Target, Condition]) -> Json:
    verdict, facts = judge_side(side, snapshot, conditions, {}), {}
    mine = [reading for reading in snapshot.readings if reading.side is side]
    for reading in mine:
        if reading.endpoint is None:
            facts.update(reading.facts)
    return {"level": verdict.word(side), "reason": verdict.reason,
            "facts": {**facts, "endpoints": [reading.facts for reading in mine if reading.endpoint and reading.facts]}}


class _Failure(NamedTuple):
    """An attempt that failed."""
    target: Target
    error: UpstreamError
    at: float        # by time.monotonic
    hurried: bool    # it was given less time than it would have had alone

    def may_be_back(self) -> bool:
        """Whether the target was only slow, or was gone and that long enough ago: others took their time to fail."""
        slow = self.error.fault is Fault.LOADING or self.hurried and self.error.code == "upstream_timeout"
        gone = self.error.code in ("upstream_unreachable", "upstream_cut")
        return slow or gone and time.monotonic() - self.at >= SECOND_TRY_S


class _Overtaken(Exception):
    """Another request has taken the target's last slot since the plan was made."""


class Course:
    """One request on its way through its plan, on the thread of its client."""

    def __init__(self, gateway: Gateway, request: ChatRequest, look: Look) -> None:
        self._gateway, self._request, self._look = gateway, request, look
        self._settings, self.ledger = gateway.settings, gateway.ledger
        self._until = time.monotonic() + self._settings.request_timeout_s
        self._plan = gateway.plan(request)
        self._named = request.model not in ("auto", "local", "cloud")
        self._queue, self._hope = collections.deque(self._plan.order), collections.deque(self._plan.last_hope)
        self._hoping = self._asked_again = self._trial = self._hurried = False
        self._failed: list[_Failure] = []

    def run(self) -> Served:
        """The first answer.  Raises OblixError, ClientGone."""
        self._warm_up()
        while True:
            target = self._next()
            if target is None:
                raise _all_failed(self._plan, self._failed)
            try:
                served = self._attempt(target)
            except _Overtaken:
                self._queue.append(target)    # where nobody else answers it waits for its turn
            except UpstreamError as error:
                self._fail(target, error)
            else:
                self._gateway.watch.tell(target.endpoint, lost=False)
                if served.whole is not None:    # a stream may still break off
                    self._gateway.note(target, None)
                served.attempts = len(self._failed) + 1
                served.reason = "; ".join([f"{tried.target.id}: {tried.error.brief}" for tried in self._failed]
                                          + [self._plan.reason])
                return served
            finally:
                if self._trial:
                    self.ledger.release(target)

    def _warm_up(self) -> None:
        """While the cloud answers in the place of a cold local model, that model is loaded for the next request."""
        order = self._plan.order
        local = next((target for target in order if target.side is Side.LOCAL), None)
        if local and order[0].side is Side.CLOUD and self._settings.prefer != "cloud":
            self._gateway.warm_up(local, self._plan.conditions[local])

    def _next(self) -> Target | None:
        """The next target to try: of the order, and when that is over of the last hope."""
        while self._queue:
            target = self._queue.popleft()
            allowed, self._trial = (True, False) if self._named else self.ledger.admit(target)
            if allowed:
                return target
            self._hope.append(target)
        self._trial, self._hoping = False, True
        if not self._hope and not self._asked_again and not self._named:
            self._asked_again = True
            self._hope.extend(tried.target for tried in self._failed if tried.may_be_back())
        return self._hope.popleft() if self._hope else None

    def _fail(self, target: Target, error: UpstreamError) -> None:
        log.info("%s failed: %s", target.id, error.brief)
        self._gateway.note(target, error)
        self._failed.append(_Failure(target, error, time.monotonic(), self._hurried))
        if not error.fault.moves_on:    # nobody else would do better
            self._asked_again = True
            self._queue.clear()
            self._hope.clear()

    def _limits(self, target: Target) -> Limits:
        """How long this attempt may take: a slow local model is waited for longer where nobody else could answer.

        Raises UpstreamError when no time is left.
        """
        usual, left_s = self._gateway.limits(self._until), self._until - time.monotonic()
        if left_s <= 0:
            raise time_is_up()
        connect_s, patience_s = min(usual.connect_s, left_s), usual.first_byte_s
        if self._hoping:
            connect_s = min(connect_s, LAST_HOPE_CONNECT_S)
        if target.side is Side.LOCAL and self._queue:
            patience_s = max(self._settings.patience_s, 3 * self.ledger.record(target).pace.first_s(0.9))
        self._hurried = patience_s < usual.first_byte_s
        return Limits(connect_s, min(patience_s, usual.first_byte_s), usual.stall_s, usual.until)

    def _attempt(self, target: Target) -> Served:
        """One try of one target, up to its first content, or to its end where the client wants a whole answer.

        An empty answer is a fault as long as there is another target to ask.
        """
        request, limits = self._request, self._limits(target)
        context = self._loaded(request, target, limits)
        if request.stream:
            stream = self._stream(request, target, context, limits)
            held = _until_content(stream)
            served = Served(target, chunks=self._relayed(target, _chained(held, stream)), held=len(held))
        elif PROVIDERS[target.endpoint.provider].translates:
            served = Served(target, whole=fold(self._stream(request, target, context, limits)))
            held = [served.whole or {}]
        else:
            whole, raw = self._whole(request, target, limits)
            served, held = Served(target, whole=whole, raw=raw), [whole]
        if self._queue and is_empty(held):
            raise UpstreamError("the answer was empty", code="empty_answer")
        if self._gateway.replicated:
            self.ledger.learn_last(conversation_of(request), target)
        return served

    def _loaded(self, request: ChatRequest, target: Target, limits: Limits) -> int:
        """Have a local model in memory, for a context that is large enough, which is returned (0: its own).

        Raises UpstreamError where that takes too long; the load then goes on.
        """
        if target.endpoint.provider != "ollama":
            return 0
        context, loader = 0, self._gateway.loader
        self._know(target)
        for _ in range(2):    # the load that was joined may have been for a smaller context
            load, snapshot = loader.under_way(target), self._gateway.snapshot()
            model = model_of(target, reading_of(target, snapshot.readings))
            if not load and model and not model.remote:
                context = self._context(request, target, snapshot)
                if model.cold or context not in (0, self._gateway.context_of(target, model)):
                    load = loader.begin(target, context)
            if not load:
                break
            self._await(load, limits.first_byte_s)
        return context

    def _know(self, target: Target) -> None:
        """Make sure that what counts as local is not a name that Ollama passes on to a cloud.  Raises UpstreamError."""
        if self._request.model == "local":    # for `auto` a cloud is as good
            self._wait(self._gateway.watch.first(target.endpoint), PROBE_LIMITS.connect_s)
        model = model_of(target, reading_of(target, self._gateway.watch.readings))
        if model and model.remote and target.side is Side.LOCAL and not self._named:
            raise UpstreamError("answered by ollama.com, so it is not a local model", Fault.MISSING, status=404)

    def _wait(self, event: threading.Event, limit_s: float) -> bool:
        """Return True if the event comes within the limit.  Raise what the look raises."""
        limit_s = min(limit_s, self._until - time.monotonic())
        return wait_for(event, limit_s, self._look)

    def _context(self, request: ChatRequest, target: Target, snapshot: Snapshot) -> int:
        """As Gateway.context, for a plan that is under way.  Raises UpstreamError."""
        try:
            return self._gateway.context(request, target, snapshot)
        except Unsupported as error:
            raise UpstreamError(error.message, Fault.TOO_LONG, status=error.status, type=error.type, code=error.code,
                                param=error.param, retry=False) from None

    def _await(self, load: Load, limit_s: float) -> None:
        """Wait for a load.  Raises UpstreamError where it fails or takes too long, ClientGone on a hang-up."""
        done = self._wait(load.done, limit_s)
        if not done and time.monotonic() >= self._until:
            raise time_is_up()
        if not done:
            raise UpstreamError("the model is still loading", Fault.LOADING, status=503, code="model_loading",
                                retry_after_s=LOAD_RETRY_S)
        if load.error:
            raise copy.copy(load.error)    # others wait for the same load

    def _stream(self, request: ChatRequest, target: Target, context: int, limits: Limits) -> Generator[Any, None, None]:
        """Yield the chunks of a target's streamed answer, all with one id, time and model.

        After the first content, events that say a text and nothing else come as bytes that are ready for the client.
        """
        envelope = {"id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": int(time.time())}
        provider, started, begun, tokens = PROVIDERS[target.endpoint.provider], time.monotonic(), 0.0, 0
        frame: tuple[bytes, bytes] | None = None
        may_pass = request.stream and self._settings.on_cut != "continue" and provider.passes_text(request)
        with _Exchange(self, request, target, context, limits) as answer:
            if answer.content_type == "application/json" and not provider.translates:
                event_of(answer.body())
                raise UpstreamError("it answered whole where a stream was asked for", code="bad_upstream_answer")
            for chunk in _decoded(answer, provider, request):
                if isinstance(chunk, Texts) and frame:
                    before, after = frame
                    yield before + (after + before).join(chunk) + after
                    continue
                told = {**envelope, **chunk, "model": target.id}
                if not begun and has_content(chunk):
                    begun = time.monotonic()
                    answer.begin()
                    frame = text_frame(told, request.include_usage) if may_pass else None
                    answer.text_event = provider.text_event if frame else None
                tokens = tokens_of(chunk) or tokens
                yield told
            answer.mark_complete()
        if begun:
            self.ledger.learn_pace(target, begun - started, tokens, time.monotonic() - begun)

    def _whole(self, request: ChatRequest, target: Target, limits: Limits) -> tuple[Json, bytes]:
        """Return the whole answer of a target that was asked for one, and its JSON if that can be taken as it came."""
        started = time.monotonic()
        with _Exchange(self, request, target, 0, limits) as answer:
            raw = answer.body()
            with _in_its_format():
                whole = event_of(raw)
                if not isinstance(choices_of(whole)[0]["message"], dict):
                    raise TypeError("message")
        self.ledger.learn_pace(target, None, tokens_of(whole), time.monotonic() - started)
        around = around_model(raw, whole)
        return {**whole, "model": target.id}, dumps(target.id).join(around) if around else b""

    def open(self, request: ChatRequest, target: Target, context: int, limits: Limits, number: int) -> Answer:
        """The upstream's answer, for a request that is the `number`th there.  Raises UpstreamError, ClientGone."""
        if number > self._settings.local_slots and self._queue and self._took_a_free_slot(target):
            raise _Overtaken
        return self._open(request, target, context, limits)

    def _took_a_free_slot(self, target: Target) -> bool:
        """Whether the plan counted on a free slot of this target, in a side that another one could stand in for."""
        return (target.side is Side.LOCAL and self._plan.conditions[target].state != "busy"
                and self._queue[0].side is Side.CLOUD)

    def _open(self, request: ChatRequest, target: Target, context: int, limits: Limits) -> Answer:
        """The upstream's answer of status 2xx.

        Parameters that the model refuses are left out one by one; those that it refuses as such are remembered.
        """
        provider, endpoint = PROVIDERS[target.endpoint.provider], target.endpoint
        encoded = provider.encode(request, target, context)
        dropped: frozenset[str] = frozenset()
        while True:
            refused = self.ledger.record(target).refused | dropped
            payload = provider.adapt(encoded, refused)
            answer = self._gateway.transport.open(endpoint.base_url + provider.chat_path, provider.headers(endpoint),
                                                  request.sent_on(payload) or dumps(payload), limits, self._look)
            if answer.status < 300 and answer.content_type != "text/html":
                return answer
            with contextlib.closing(answer):
                if answer.status < 300:
                    raise UpstreamError(f"a web page answered instead of {provider.label} (a login page?)",
                                        code="bad_upstream_answer")
                text = answer.body().decode("utf-8", "replace")
            error = classify(answer.status, text, answer.retry_after_s, endpoint)
            param = provider.refused_parameter(error, payload)
            if not param or param in refused:
                raise error
            log.info("%s refuses %s: left out", target.id, param)
            dropped |= {param}
            if is_permanent(param, error):
                self.ledger.learn_refusal(target, param)

    def _relayed(self, target: Target, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks of an answer; where they break off, with --on-cut continue, those of one more target."""
        said: list[Chunk] = []
        keep = self._settings.on_cut == "continue"
        noted = self._noted(target, chunks)
        try:
            with contextlib.closing(noted):
                for chunk in noted:
                    keep = keep and len(said) < MAX_SAID
                    said.extend([chunk] if keep else ())
                    yield chunk
        except UpstreamError as error:
            follower = self._follower(said, error) if keep else None
            if follower is None:
                raise
            yield from follower

    def _noted(self, target: Target, chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        """The chunks, whose end or break the ledger learns of."""
        try:
            yield from chunks
        except UpstreamError as error:
            self._gateway.note(target, error)
            raise
        self._gateway.note(target, None)

    def _follower(self, said: Sequence[Chunk], error: UpstreamError) -> Iterator[Chunk] | None:
        """The rest of an answer that broke off, from the next target that gives one; None where nobody may or does."""
        text = continuable_text(self._request, said)
        request = continuation(self._request, text, len(said)) if text and error.fault.moves_on else None
        while request and self._queue:
            target = self._queue.popleft()
            try:
                limits = self._limits(target)
                stream = self._stream(request, target, self._loaded(request, target, limits), limits)
                held = _until_content(stream)
                if is_empty(held):
                    raise UpstreamError("the answer was empty", code="empty_answer")
            except (UpstreamError, _Overtaken) as failure:
                log.info("%s could not continue: %s", target.id, getattr(failure, "brief", "it can't now"))
                if isinstance(failure, UpstreamError):
                    self._gateway.note(target, failure)
                continue
            log.warning("%s continues an answer that broke off: %s", target.id, error.brief)
            return continued(self._noted(target, _chained(held, stream)), said[0], text, target.id)
        return None


class _Exchange:
    """The upstream's answer, in flight while a block reads it; its errors are told without its key."""

    def __init__(self, course: Course, request: ChatRequest, target: Target, context: int, limits: Limits) -> None:
        self._open = functools.partial(course.open, request, target, context, limits)
        self._flight, self._key = course.ledger.flight(target), target.endpoint.key

    def __enter__(self) -> Answer:
        number = self._flight.__enter__()
        try:
            self._answer = self._open(number)
        except BaseException:
            self._flight.__exit__(*sys.exc_info())
            raise
        return self._answer

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._answer.close()
        finally:
            self._flight.__exit__(kind, error, trace)
        if isinstance(error, UpstreamError):
            for name in ("message", "code", "type", "param"):
                if getattr(error, name):
                    setattr(error, name, redact(getattr(error, name), self._key))


@contextlib.contextmanager
def _in_its_format() -> Iterator[None]:
    """Turn the errors of a block that reads an answer into a fault of the upstream."""
    try:
        yield
    except NOT_IN_ITS_FORMAT as error:
        raise UpstreamError("the answer is not in its own format", code="bad_upstream_answer") from error


def _decoded(answer: Answer, provider: Provider, request: ChatRequest) -> Iterator[Any]:
    """Yield the chunks of a streamed answer, and the Texts in it."""
    with _in_its_format():
        yield from provider.decode(answer.lines(), request)


MAX_SAID = 32_768     # chunks of a stream that are kept to be continued, some 1 KB each; a longer one is not
MAX_HELD = 4096       # chunks that say nothing before the first that does; a few are usual
LOAD_RETRY_S = 5.0    # what a client is told to wait whom only a loading model could have answered


def conversation_of(request: ChatRequest) -> int:
    """What tells a conversation from others, as far as a prompt cache goes: its beginning."""
    messages = request.messages
    first_user = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    return hash(tuple(text_of(message) for message in messages[:first_user + 1]))


def _chained(held: list[Chunk], stream: Generator[Chunk, None, None]) -> Iterator[Chunk]:
    """The held chunks and the rest; whoever closes it closes the upstream."""
    with contextlib.closing(stream):
        yield from held
        yield from stream


def _listing(lines: Iterable[str]) -> str:
    return "; ".join(line.rstrip(".") for line in lines)


def _until_content(stream: Generator[Chunk, None, None]) -> list[Chunk]:
    """The chunks up to the first with content: the commit point.  The stream's faults before it come out here."""
    held: list[Chunk] = []
    for chunk in stream:
        held.append(chunk)
        if has_content(chunk):
            break
        if len(held) > MAX_HELD:
            stream.close()
            raise UpstreamError(f"no content in {MAX_HELD} pieces", code="bad_upstream_answer")
    return held


def _all_failed(plan: Plan, failed: Sequence[_Failure]) -> OblixError:
    """The most useful error when no target answered: the only one, or one that lists all of them."""
    target, last = failed[-1].target, failed[-1].error
    if not last.fault.moves_on or (len(failed) == 1 and not plan.left_out):
        if last.fault is Fault.DOWN:    # our own words: say of whom
            last.message = f"{target.id}: {last.message}"
        return last
    errors = [tried.error for tried in failed]
    waits = [error.retry_after_s for error in errors if error.retry_after_s is not None]
    text = f"No model could answer ({plan.reason}). " + _listing(
        [f"{tried.target.id}: {tried.error.message}" for tried in failed]
        + [f"{target.id}: {reason}" for target, reason in plan.left_out])
    if all(error.fault is Fault.TOO_LONG for error in errors):
        return BadRequest(text, code="context_length_exceeded", param="messages")
    again: Json = {"retry": None if waits else False, "retry_after_s": min(waits, default=None)}
    if last.fault is not Fault.DOWN and {error.status for error in errors} == {last.status}:
        return NoTarget(text, status=last.status, type=last.type, **again)
    return NoTarget(text, **again)


# === 10. Response out =================================================================================================
# uses: 1; pure
# What does the client read?  Chunks become server-sent events or one completion, errors become OpenAI's error object.

DONE = b"data: [DONE]\n\n"    # exactly so: some clients reject an extra space


def sse(event: Json) -> bytes:
    """Return one server-sent event."""
    return b"data: " + dumps(event) + b"\n\n"


def text_frame(chunk: Chunk, include_usage: bool) -> tuple[bytes, bytes] | None:
    """Return what a client sees around the text of each event that says nothing else, in a stream with this chunk.

    Return None where the chunk is of another choice than the first, which such events are of.
    """
    choices = choices_of(chunk)
    if [choice.get("index", 0) for choice in choices] != [0]:
        return None
    choice = {name: None if name in ("logprobs", "finish_reason") else value for name, value in choices[0].items()}
    told = for_client({**chunk, "choices": [{**choice, "delta": {"content": "\0"}}]}, include_usage) or {}
    before, mark, after = sse(told).partition(rb'"delta":{"content":"\u0000"')    # no string can hold such quotes
    return before + mark[:-len(rb'\u0000"')], b'"' + after


def for_client(chunk: Chunk, include_usage: bool) -> Chunk | None:
    """Return the chunk as a client may see it: usage only when asked, as many clients index choices[0] unseen."""
    if include_usage or "usage" not in chunk:
        return chunk
    return {name: value for name, value in chunk.items() if name != "usage"} if choices_of(chunk) else None


def fold(chunks: Iterable[Chunk]) -> Json:
    """Return one chat.completion out of a translated stream of at least one chunk and of choice 0 alone."""
    message: Json = {"role": "assistant", "content": "", "refusal": None}
    choice: Json = {"index": 0, "message": message, "logprobs": None, "finish_reason": None}
    whole: Json = {}
    for chunk in chunks:
        whole = whole or {"id": chunk["id"], "object": "chat.completion", "created": chunk["created"],
                          "model": chunk["model"], "choices": [choice]}
        if "usage" in chunk:
            whole["usage"] = chunk["usage"]
        for piece in chunk["choices"]:
            _fold_piece(choice, piece)
    if "tool_calls" in message:
        message["content"] = message["content"] or None
    return whole


def tokens_of(answer: Json) -> int:
    """Return the completion tokens that an answer or a chunk tells of, or 0."""
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return tokens if isinstance(tokens, int) and 0 <= tokens < MOST_TOKENS else 0


# What asks another model to go on.  A prefill would be shorter, but the newer Claude models refuse one.
CONTINUE = ("Your last message was cut off. Continue it exactly where it ends: repeat nothing of it, and say nothing "
            "about the interruption.")
_NOT_CONTINUED = {"tools", "functions", "response_format", "logprobs", "n", "modalities", "audio", "prediction"}
LEAST_OVERLAP, OVERLAP = 8, 200    # characters of what was said that a continuation may repeat at its beginning


def continuable_text(request: ChatRequest, said: Sequence[Chunk]) -> str:
    """Return what a stream said before it broke off, if another model may continue it: plain text without its end."""
    deltas = [choice.get("delta") or {} for chunk in said for choice in choices_of(chunk)]
    ended = any(choice.get("finish_reason") for chunk in said for choice in choices_of(chunk))
    plain = all(name in ("role", "content", "refusal") and isinstance(delta[name], str)
                for delta in deltas for name in delta if delta[name])
    if ended or not plain or _NOT_CONTINUED & request.body.keys():
        return ""
    return "".join(delta.get("content") or "" for delta in deltas)


def continuation(request: ChatRequest, text: str, tokens: int) -> ChatRequest | None:
    """Return the request for the rest of an answer that said `text` in so many tokens; None where none is left."""
    body = {**request.body, "messages": [*request.messages, {"role": "assistant", "content": text},
                                         {"role": "user", "content": CONTINUE}]}
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            body[name] -= tokens
            if body[name] < 1:
                return None
    return dataclasses.replace(request, body=body, around=None)


def continued(chunks: Iterable[Chunk], first: Chunk, text: str, by: str) -> Iterator[Chunk]:
    """Yield the chunks of a continuation as if they were the first target's: its id, time and model, no second role,
    nothing of `text` said again.  The first of them says who continues."""
    envelope: Json = {**{name: first[name] for name in ("id", "created", "model")}, "oblix": {"continued_by": by}}
    held: str | None = ""    # what may repeat the end of the text; None when that is settled
    for chunk in chunks:
        for choice in choices_of(chunk):
            delta = {name: value for name, value in (choice.get("delta") or {}).items() if name != "role"}
            if held is not None:
                content = delta.pop("content", None)
                held += content if isinstance(content, str) else ""
                if len(held) >= min(OVERLAP, len(text)) or choice.get("finish_reason"):
                    rest, held = without_overlap(text, held), None
                    delta.update({"content": rest} if rest else {})
            choice["delta"] = delta
        if any(choice["delta"] or choice.get("finish_reason") for choice in choices_of(chunk)) or "usage" in chunk:
            yield {**chunk, **envelope}
            envelope.pop("oblix", None)


def without_overlap(said: str, more: str) -> str:
    """Return `more` without the longest beginning that repeats the end of `said`; a few characters do so by chance."""
    for size in range(min(OVERLAP, len(said), len(more)), LEAST_OVERLAP - 1, -1):
        if said.endswith(more[:size]):
            return more[size:]
    return more


def _fold_piece(choice: Json, piece: Json) -> None:
    """Add what a chunk says to the choice."""
    message, delta = choice["message"], piece["delta"]
    for name in ("content", "reasoning_content", "refusal"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if piece["logprobs"]:
        choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        choice["logprobs"]["content"].extend(piece["logprobs"]["content"])
    choice["finish_reason"] = piece["finish_reason"] or choice["finish_reason"]


def error_body(error: OblixError) -> Json:
    """Return the error object that the SDKs read (OpenAI API reference, errors)."""
    return {"error": {"message": error.message or type(error).__name__, "type": error.type, "param": error.param,
                      "code": error.code}}


def error_headers(error: OblixError) -> dict[str, str]:
    """Return the headers that tell an SDK whether and when to try again."""
    headers = {} if error.retry is None else {"x-should-retry": str(error.retry).lower()}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"    # RFC 9110, 15.5.2
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return headers


def answer_headers(target: Target, reason: str, attempts: int) -> dict[str, str]:
    """Return the headers that tell who answered, and why."""
    return {"x-oblix-model": target.id, "x-oblix-side": target.side.value, "x-oblix-reason": reason,
            "x-oblix-attempts": str(attempts)}


def models_body(models: Iterable[tuple[str, int, str]]) -> Json:
    """Return the answer to GET /v1/models."""
    return {"object": "list", "data": [{"id": id, "object": "model", "created": created, "owned_by": owner}
                                       for id, created, owner in models]}


# === 11. Server =======================================================================================================
# uses: 1 2 3 7 9 10 12
# How do clients reach the gateway?  HTTP on the stdlib's threading server: connections, routes, bodies, one write per
# event, and the end.  It knows nothing of targets.

HEAD_S = 20.0                   # from the first byte of a head to its last; they come in one packet
BODY_S = 30.0                   # for a body's first byte, and between any two
BODY_BYTES_PER_S = 8 << 10      # the slowest that one may come after that, on average: a poor mobile link
IDLE_CLIENT_S = 75.0            # between requests; SDKs drop idle connections after 4-5 s, proxies after 60
SEND_S = 60.0                   # in which a client takes nothing of its answer
LINGER_S = 2.0                  # for the rest of a body that is refused
GRACE_S = 1.0                   # for a request that is on its way when Oblix is being stopped
MAX_BODIES_BYTES = 128 << 20    # of requests under way, each of which takes some times its size
LARGE_BODY_BYTES = 64 << 10     # smaller ones are not counted: --max-requests limits them
FIRST_BYTES = 8 << 10           # of a request that are read at once: so large a buffer waits for each idle client
AGAIN_S = 1.0                   # after which a client that was sent away may ask again


# --- 11. Who is here --------------------------------------------------------------------------------------------------

class Guest:
    """A client's connection, and what the client sends on it.  However slowly that comes, its time is limited."""

    def __init__(self, connection: socket.socket, admission: Admission) -> None:
        self.connection, self._admission = connection, admission
        self.silent = True               # nothing of the next request has come
        self.busy = False                # a chat request is being answered
        self.since = time.monotonic()    # when it was last busy, or began to send its next request
        self._held = bytearray()         # what has come and is not used yet
        self._deadline, self._bytes_per_s = 0.0, math.inf

    def await_request(self) -> None:
        """Expect a head from now on: its first byte within IDLE_CLIENT_S, the rest within HEAD_S after that."""
        self.since, self.silent, self._bytes_per_s = time.monotonic(), not self._held, math.inf
        self._deadline = self.since + (IDLE_CLIENT_S if self.silent else HEAD_S)

    def await_body(self) -> None:
        """Expect a body from now on, at BODY_BYTES_PER_S at least."""
        self._deadline, self._bytes_per_s = time.monotonic() + BODY_S, BODY_BYTES_PER_S

    def line(self, limit: int) -> bytes:
        """Return the next line with its end, or one byte too much of one that is too long.  Raise as `_receive`."""
        while True:
            end = self._held.find(b"\n", 0, limit + 1) + 1
            if end or len(self._held) > limit:
                return self._take(end or limit + 1)
            self._receive()

    def some(self, most: int) -> bytes:
        """Return what comes next, so many bytes at most.  Raise as `_receive`."""
        if not self._held:
            self._receive()
        return self._take(most)

    def _take(self, size: int) -> bytes:
        piece = bytes(self._held[:size])
        del self._held[:size]
        return piece

    def _receive(self) -> None:
        """Wait for more.  Raise ClientGone where none comes, and what `_look` raises."""
        while True:
            try:
                piece = self.connection.recv(FIRST_BYTES if self.silent else PIECE_BYTES)
            except NOT_YET:
                self._look()
                continue
            except OSError:
                raise ClientGone from None
            if not piece:
                raise ClientGone
            break
        now = time.monotonic()
        if self.silent:
            self.silent, self._deadline = False, now + HEAD_S
        self._look()    # bytes may drip, each within the tick
        self._deadline = min(self._deadline + len(piece) / self._bytes_per_s, now + BODY_S)
        self._held += piece

    def _look(self) -> None:
        """Raise ClientGone if nothing of a request has come in its time, BadRequest if it comes too slowly.

        Raise Busy if Oblix ends before it has come.
        """
        now = time.monotonic()
        if self.silent and now >= min(self._deadline, self._admission.idle_until):
            raise ClientGone
        if not self.silent and self._admission.ended:
            raise shutting_down()
        if not self.silent and now >= self._deadline:
            raise BadRequest("The request came too slowly.", status=408, code="request_too_slow")

    def linger(self) -> None:
        """Take the rest of a request whose body was not read, within reason.

        Closed over unread bytes TCP resets the connection, and the client never sees the reply.
        """
        self.since = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < self.since + LINGER_S:
                with contextlib.suppress(*NOT_YET):
                    if not self.connection.recv(PIECE_BYTES):
                        return


class Admission:
    """Which clients are connected, and how much they may ask at once; shared by all listeners, and by all threads."""

    def __init__(self, max_requests: int, max_body_bytes: int) -> None:
        self._max_requests, self._max_connections = max_requests, 2 * max_requests
        self.max_body_bytes = min(max_body_bytes, MAX_BODIES_BYTES)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, Guest] = {}    # guarded by _lock, as the next two
        self._requests = self._bytes = 0
        self.stopping = self.ended = False    # no new client is let in; what runs is being ended
        self.idle_until = math.inf            # when connections close on which nothing is being asked

    def enter(self, connection: socket.socket) -> None:
        """Count a client that has connected.  One more than there may be takes another's place."""
        guest = Guest(connection, self)
        with self._lock:
            self._open[connection] = guest
            crowded = len(self._open) > self._max_connections
        if crowded:
            self.make_room()

    def guest(self, connection: socket.socket) -> Guest:
        """Return the guest on a connection."""
        return self._open[connection]

    def make_room(self) -> None:
        """Close the connection that has gone longest without a chat request: idle, sending slowly, reading nothing."""
        waiting = [guest for guest in self._guests() if not guest.busy]
        slowest = min(waiting, key=lambda guest: guest.since, default=None)
        if slowest:
            slowest.since = math.inf    # another one is next
            _hang_up(slowest.connection)

    def _guests(self) -> tuple[Guest, ...]:
        with self._lock:
            return tuple(self._open.values())

    def leave(self, connection: socket.socket) -> None:
        """Forget a client whose connection has been closed."""
        with self._lock:
            self._open.pop(connection, None)

    def take(self, requests: int, size: int) -> None:
        """Count chat requests and bytes of bodies; negative ones have ended.  Raise Busy if that is too much."""
        with self._lock:
            full = requests > 0 and self.full or size > 0 and self._bytes + size > MAX_BODIES_BYTES
            if not full:
                self._requests, self._bytes = self._requests + requests, self._bytes + size
        if full:
            raise too_much("--max-requests" if requests > 0 else "all requests under way are too large")

    @property
    def full(self) -> bool:
        """Return True if one more chat request would be too many."""
        return self._requests >= self._max_requests

    @property
    def empty(self) -> bool:
        """Return True if nobody is connected."""
        return not self._open

    def stop(self) -> None:
        """Have each connection close with its answer, and those on which nothing is being asked after GRACE_S."""
        self.stopping, self.idle_until = True, time.monotonic() + GRACE_S

    def end(self) -> None:
        """Have every request that runs end at its next look."""
        self.ended, self.idle_until = True, 0.0

    def close(self) -> None:
        """Cut every connection."""
        for guest in self._guests():
            _hang_up(guest.connection)


def too_much(what: str) -> Busy:
    """Return the error for a client that asks when Oblix has enough to do."""
    return Busy(f"Oblix has as much to do as it takes on at once ({what}); ask again in a moment.",
                retry_after_s=AGAIN_S)


def shutting_down() -> Busy:
    """Return the error for a client whose request ends because Oblix does."""
    return Busy("Oblix is being stopped; ask again in a moment.", code="shutting_down", retry_after_s=AGAIN_S)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):    # it was closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


# --- 11. A connection -------------------------------------------------------------------------------------------------

class _Handler(socketserver.BaseRequestHandler):
    """One client connection, on a thread of its own: requests in and replies out."""
    server: _Listener

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)    # else a second small write waits 40 ms
        limit_waits(self.request, TICK_S)
        self.admission, self.guard = self.server.admission, self.server.guard
        self.guest = self.admission.guest(self.request)

    def handle(self) -> None:
        with contextlib.suppress(ClientGone):    # nobody is left to tell
            while self._answer_next():
                pass

    def _answer_next(self) -> bool:
        """Read a request and answer it.  Return True if another one may follow."""
        self.close_connection, self._unread = True, True
        self.head, self._cors, self.told = _NO_HEAD, dict[str, str](), dict[str, Any]()
        self.id, self._come, self._held = new_id("req_"), 0, 0
        self.guest.await_request()
        try:
            asked = self._serve()
        finally:
            if self._held:
                self.admission.take(0, -self._held)
        if asked:
            self._tell()
            if self._unread:
                self.guest.linger()
        return not self.close_connection

    def _serve(self) -> bool:
        """Answer the next request, whatever it is.  Return False if none came."""
        self.started = time.monotonic()
        try:
            self._read_head()
            self._route()
        except ClientGone:
            self.close_connection, self.told["error"] = True, "client hung up"
            return self.head is not _NO_HEAD
        except OblixError as error:
            self._refuse(error)
        except Exception:  # a bug of ours takes down one request and is told in the log
            log.exception("%s internal error", self.id)
            self.close_connection, self.told["error"] = True, "internal error"
            if "status" not in self.told:
                self._refuse(OblixError(f"Oblix failed internally; its log tells more at {self.id}."))
        return True

    def _read_head(self) -> None:
        """Read a request's head, and see whether it may be asked.  Raise OblixError, ClientGone."""
        first = self.guest.line(MAX_REQUEST_LINE)
        if first == b"\r\n":    # one is let pass: RFC 9112, 2.2
            first = self.guest.line(MAX_REQUEST_LINE)
        self.started = time.monotonic()
        if len(first) > MAX_REQUEST_LINE:
            raise BadRequest(f"The request line is longer than {MAX_REQUEST_LINE} bytes.", status=414,
                             code="uri_too_long")
        self.head = parse_head(first, self._fields())
        self._unread = self.head.body_size != 0
        self.close_connection = not self.head.keeps_open
        self._cors = self.guard.cors_headers(self.head)
        self.guard.check(self.head)

    def _fields(self) -> Iterator[bytes]:
        """Yield the lines of the head's fields.  Raise OblixError, ClientGone."""
        size = 0
        for _ in range(MAX_FIELDS + 1):
            line = self.guest.line(MAX_FIELD_LINE)
            if line == b"\r\n":
                return
            size += len(line)
            if len(line) > MAX_FIELD_LINE or size > MAX_HEAD_BYTES:
                break
            yield line
        raise BadRequest(f"The request's head has more than {MAX_FIELDS} fields, or one that is too long.", status=431,
                         code="headers_too_large")

    def body(self) -> bytes:
        """Return the request's body.  Raise OblixError, ClientGone."""
        refused = body_kind_refusal(self.head)
        if refused:
            raise refused
        size, expected = self.head.body_size, self.head.fields.get("expect", "").lower()
        if expected not in ("", "100-continue"):
            raise BadRequest("The only Expect that is honoured is 100-continue.", status=417, code="expectation_failed")
        if not size and "content-length" not in self.head.fields:
            raise BadRequest("Send the body's size as one decimal Content-Length.", status=411, code="bad_framing")
        if self.admission.full:
            raise too_much("--max-requests")    # before the body is waited for
        self._check_size(size)
        if expected and self.head.version != "HTTP/1.0":
            self.write(CONTINUE_NOW)
        self.guest.await_body()
        body = self._chunked_body() if size == CHUNKED else self._exactly(size)
        self._unread = False
        self.told["bytes_in"] = len(body)
        return body

    def _check_size(self, size: int) -> None:
        """Raise BadRequest if a body of this size is too large."""
        if size > self.admission.max_body_bytes:
            raise BadRequest(f"The body is larger than {self.admission.max_body_bytes >> 20} MiB (--max-body-mib).",
                             status=413, code="request_too_large")

    def _exactly(self, size: int) -> bytes:
        """Return so many bytes, counted as they come.  Raise Busy, ClientGone."""
        body = bytearray()
        while len(body) < size:
            piece = self.guest.some(size - len(body))
            body += piece
            self._come += len(piece)
            if self._come > LARGE_BODY_BYTES:
                self.admission.take(0, self._come - self._held)
                self._held = self._come
        return bytes(body)

    def _chunked_body(self) -> bytes:
        """Return a body in chunks (RFC 9112, 7.1), which the stdlib leaves to us."""
        body = bytearray()
        while True:
            start = _CHUNK_START.fullmatch(self.guest.line(MAX_CHUNK_LINE))
            if not start:
                raise BadRequest("The chunked body is malformed.", code="bad_framing")
            size = int(start[1], 16)
            if not size:
                break
            self._check_size(len(body) + size)
            body += self._exactly(size)
            if self.guest.line(2) != b"\r\n":
                raise BadRequest("The chunked body is malformed.", code="bad_framing")
        for _ in range(MAX_FIELDS):    # trailers, of which none is of use
            line = self.guest.line(MAX_FIELD_LINE)
            if line == b"\r\n":
                return bytes(body)
            if not FIELD_LINE.fullmatch(line):
                break
        raise BadRequest("The chunked body's trailers are malformed or too many.", code="bad_framing")

    def json(self, status: int, body: Json, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, dumps(body), {**JSON_HEADERS, **(headers or {})})

    def _refuse(self, error: OblixError) -> None:
        """Answer with an error."""
        self.told["error"] = error.code or error.type
        methods = ROUTES.get(self.head.path, ("GET", "HEAD", "POST")) if error.status == 405 else ()
        allow = {"Allow": ", ".join(methods)} if methods else {}
        self.json(error.status, error_body(error), {**error_headers(error), **allow})

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a whole reply in one write."""
        length = {} if status == 204 else {"Content-Length": str(len(body))}
        head = self._reply_head(status, {**headers, **length})
        body = b"" if self.head.method == "HEAD" else body
        self.told["bytes_out"] = len(body)
        self.write(head + body)

    def stream_head(self, headers: Mapping[str, str]) -> bytes:
        """Return the head of a stream.  Only a framed body shows its end without closing the connection."""
        self.close_connection = self.close_connection or not self.frames
        return self._reply_head(200, headers)

    @property
    def frames(self) -> bool:
        """Return True if the client reads chunked bodies."""
        return self.head.version != "HTTP/1.0"

    def _reply_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the head of a reply, whose values are made safe for a header line."""
        self.told["status"] = status
        if self._unread or self.admission.stopping:    # unread bytes are not a next request
            self.close_connection = True
        fields = {**headers, **self._cors, "x-request-id": self.id, "Server": f"oblix/{__version__}",
                  "Date": http_date(int(time.time())), "Connection": "close" if self.close_connection else "keep-alive"}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        if not is_plain("".join(lines)):
            lines = [re.sub("[^ -~]+", " ", line) for line in lines]
        return "\r\n".join([f"HTTP/1.1 {status} {_PHRASES.get(status, 'Status')}", *lines, "", ""]).encode("ascii")

    def write(self, data: bytes) -> None:
        """Send data.  Raise ClientGone, also where the client takes nothing of it for SEND_S."""
        try:
            send_all(self.request, data, SEND_S)
        except OSError:
            raise ClientGone from None

    def _tell(self) -> None:
        """Write the one line that the log has of a request."""
        quiet = self.told.get("status") == 200 and self.head.path in ("/health", "/")
        level = logging.DEBUG if quiet else logging.INFO
        if log.isEnabledFor(level):
            facts = {"id": self.id, "method": self.head.method[:20], "path": self.head.path[:64], **self.told,
                     "seconds": time.monotonic() - self.started}
            facts.update(tokens_per_s(facts))
            log.log(level, log_text(facts), extra={"facts": facts})

    # The routes.

    def _route(self) -> None:
        """Answer the request.  Raise OblixError, ClientGone."""
        head, path = self.head, self.head.path
        model = urllib.parse.unquote(path[len("/models/"):]) if path.startswith("/models/") else ""
        methods = ROUTES.get("/models" if model else path)
        if head.method == "OPTIONS":
            return self.reply(204, b"", {"Allow": ", ".join([*(methods or ("GET", "HEAD", "POST")), "OPTIONS"])})
        if methods is None:
            raise BadRequest(f"There is nothing at {head.method[:20]} {path[:100]}. Oblix serves POST "
                             "/v1/chat/completions, GET /v1/models and GET /health; use the chat completions API.",
                             status=404, code="unknown_url")
        if head.method not in methods:
            raise BadRequest(f"{path[:100]} takes {' or '.join(methods)}, not {head.method[:20]}.",
                             status=405, code="method_not_allowed")
        if path == "/chat/completions":
            return self._chat()
        if path == "/":
            return self.reply(200, PAGE.encode(), PAGE_HEADERS)
        if path == "/health":
            return self._health()
        return self._models(model)

    def _health(self) -> None:
        health = self.server.gateway.health()
        status = 200 if health["status"] == "healthy" else 503
        if self.guard.is_public(self.head):
            health = {name: health[name] for name in ("status", "version")}
        self.json(status, health)

    def _models(self, wanted: str) -> None:
        models = self.server.gateway.models()
        if not wanted:
            return self.json(200, models_body(models))
        found = [model for model in models if model[0] == wanted]
        if not found:
            raise BadRequest(f"There is no model {wanted[:100]!r}; GET /v1/models lists them.", param="model",
                             status=404, code="model_not_found")
        return self.json(200, models_body(found)["data"][0])

    def _chat(self) -> None:
        """Answer a chat request.  Raise OblixError, ClientGone."""
        request = parse_request(self.body())
        self.told["asked"] = request.model
        self.admission.take(1, 0)
        events = _Events(self)
        self._streaming, self._looked, self.guest.busy = events if request.stream else None, time.monotonic(), True
        try:
            self._answer(request, events)
        except OblixError as error:
            if not events.begun:
                raise
            events.fail(error)
            self.told["error"] = error.code or error.type
        except ClientGone:
            raise
        except Exception:    # a bug of ours: what was said before it may be seen
            events.flush()
            raise
        finally:
            self.guest.busy, self.guest.since = False, time.monotonic()    # it may be sent away now
            self.admission.take(-1, 0)

    def _answer(self, request: ChatRequest, events: _Events) -> None:
        """Pass on what the gateway answers.  Raise OblixError, ClientGone."""
        served = self.server.gateway.answer(request, self._look)
        headers = answer_headers(served.target, served.reason, served.attempts)
        self.told.update(served=served.target.id, side=served.target.side.value, attempts=served.attempts,
                         reason=served.reason)
        if served.whole is not None:
            self.told["tokens"] = tokens_of(served.whole)
            return self.reply(200, served.raw or dumps(served.whole), {**JSON_HEADERS, **headers})
        self.told["first_token_s"] = time.monotonic() - self.started
        events.headers.update(headers)
        with contextlib.closing(served.chunks):  # type: ignore[type-var]
            self._stream(served, request.include_usage, events)

    def _look(self) -> None:
        """See to the client, as its thread does before it waits for something else, and at each tick.

        Raise ClientGone where it has left, Busy where Oblix has to end.
        """
        if self._streaming:
            self._streaming.flush()
        now = time.monotonic()
        if now - self._looked < TICK_S:
            return
        self._looked = now
        if self.admission.ended:
            raise shutting_down()
        if has_left(self.request):
            raise ClientGone
        if self._streaming:
            self._streaming.keep_alive(now)

    def _stream(self, served: Served, include_usage: bool, events: _Events) -> None:
        """Pass on the chunks, the first content at once.  Raise UpstreamError where they are cut off."""
        try:
            for number, chunk in enumerate(served.chunks, 1):
                if isinstance(chunk, bytes):
                    events.add(chunk)
                    continue
                self.told["tokens"] = tokens_of(chunk) or self.told.get("tokens", 0)
                shown = for_client(chunk, include_usage)
                if shown is not None:
                    events.add(sse(shown))
                if number == served.held:
                    events.flush()
        except UpstreamError as error:
            log.warning("%s cut: %s", self.id, error.brief)
            raise
        events.add(DONE)
        events.flush(last=True)


ROUTES = {"/chat/completions": ("POST",), "/models": ("GET", "HEAD"), "/health": ("GET", "HEAD"),
          "/": ("GET", "HEAD")}    # path without /v1 -> methods; OPTIONS goes everywhere

JSON_HEADERS = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}
_NO_HEAD = Head("-", "-", "HTTP/1.1", {})    # of a request whose own can't be read
_CHUNK_START = re.compile(rb"([0-9a-fA-F]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
CONTINUE_NOW = b"HTTP/1.1 100 Continue\r\n\r\n"
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}


@functools.lru_cache(1)
def http_date(second: int) -> str:
    """Return a unix time as HTTP has it (RFC 9110, 5.6.7)."""
    return email.utils.formatdate(second, usegmt=True)


# --- 11. The log line -------------------------------------------------------------------------------------------------

def told_of_request(facts: Json) -> Json:
    """Return what a log line for machines says of a request: numbers rounded, in the order of lines."""
    told = {name: facts[name] for name in (*_LOG_WORDS, *facts) if name in facts}
    if not told.get("tokens"):    # the upstream has not said
        told.pop("tokens", None)
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in told.items()}


def tokens_per_s(facts: Json) -> Json:
    """Return how fast an answer was, in tokens a second, if its upstream said how many there were."""
    tokens, answering_s = facts.get("tokens"), facts["seconds"] - facts.get("first_token_s", 0.0)
    return {"tokens_per_s": round(tokens / answering_s, 1)} if tokens and answering_s > 0 else {}


# How a fact of a request reads in the log, in this order; one that is not known is left out.
_LOG_WORDS = {"id": "%s", "method": " %s", "path": " %s", "status": " %s", "asked": " %s", "served": " -> %s",
              "side": " (%s)", "first_token_s": ", first %.2f s", "tokens_per_s": ", %.1f tokens/s",
              "bytes_in": ", in %s B", "bytes_out": ", out %s B", "seconds": ", %.2f s", "error": ": %s",
              "reason": ": %s"}


def log_text(facts: Json) -> str:
    """Return the log's line of a request, without control characters that it may quote."""
    line = "".join([words % facts[name] for name, words in _LOG_WORDS.items() if name in facts])
    return line if is_plain(line) else re.sub("[^ -~]", "?", line)


# --- 11. A stream of events ------------------------------------------------------------------------------------------

class _Events:
    """A stream of server-sent events to a client.  Those that are there are sent together, with the head if need be,
    before anything is waited for: a write takes 20 us, and what a model says comes in pieces of several events."""

    def __init__(self, handler: _Handler) -> None:
        self._handler, self._frames = handler, handler.frames
        self._last = time.monotonic()    # when the client last got something
        self._held = b""                 # events that are to be sent
        self.begun = self._head_sent = False    # there are events, so the status is 200
        self.headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                        "X-Accel-Buffering": "no", **({"Transfer-Encoding": "chunked"} if self._frames else {})}

    def add(self, events: bytes) -> None:
        """Have events sent before the next wait.  Raise ClientGone."""
        self._held += events
        self.begun = True
        if len(self._held) > MAX_HELD_BYTES:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Send what is to be sent; with `last`, end the stream well.  Raise ClientGone."""
        if not self._held and not last:
            return
        held, self._held, self._last = self._held, b"", time.monotonic()
        head = b"" if self._head_sent else self._handler.stream_head(self.headers)
        self._head_sent = True
        self._handler.told["bytes_out"] = self._handler.told.get("bytes_out", 0) + len(held)
        if self._frames:
            held = (b"%x\r\n%b\r\n" % (len(held), held) if held else b"") + (END_OF_CHUNKS if last else b"")
        self._handler.write(head + held)

    def keep_alive(self, now: float) -> None:
        """Send a comment after a long silence, which keeps clients and proxies waiting.  Raise ClientGone.

        It commits the status 200, but no answer: another target may still give that.
        """
        if now - self._last >= KEEP_ALIVE_S:
            self.add(b": keep-alive\n\n")
            self.flush()

    def fail(self, error: OblixError) -> None:
        """End with an error event and a connection that breaks off: the framing, too, must not look complete."""
        self._handler.close_connection = True
        self.add(sse(error_body(error)))
        self.flush()


END_OF_CHUNKS = b"0\r\n\r\n"
MAX_HELD_BYTES = 64 << 10
KEEP_ALIVE_S = 15.0    # proxies give up on a silent connection after 30 to 60 s


# --- 11. Listening, and the end ---------------------------------------------------------------------------------------

class QuickServer(http.server.ThreadingHTTPServer):
    """The stdlib's server without its traps."""
    daemon_threads = True
    request_queue_size = 1024                   # the default of 5 drops bursts: clients then wait 1, 3, 7 s for TCP
    allow_reuse_address = os.name == "posix"    # on Windows it would let two programs share the port

    def server_bind(self) -> None:
        # Not the base class's: it looks its own name up in DNS, which takes seconds on an offline device.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Listener(QuickServer):
    """One listening socket."""

    def __init__(self, address: tuple[str, int], gateway: Gateway, admission: Admission, guard: Guard) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.gateway, self.admission, self.guard = gateway, admission, guard
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6 and self.server_address[0] != "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in _NO_ROOM:    # the client stays in the queue, which would be looked at without end
                self.admission.make_room()
                time.sleep(NO_ROOM_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self.admission.enter(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:    # no thread is left
            log.warning("a client was sent away: %s", error)
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.admission.leave(request)

    def run(self) -> None:
        """Serve until `shutdown`, which wakes the loop: it need not wake up by itself while nothing happens."""
        hold_on_one_core()
        self.serve_forever(poll_interval=5)

    def shutdown(self) -> None:
        stopping = threading.Thread(target=super().shutdown, name="stop", daemon=True)
        stopping.start()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.server_name, self.server_name)
        while stopping.is_alive():
            with contextlib.suppress(OSError):
                socket.create_connection((host, self.server_port), 0.2).close()
            stopping.join(0.02)

    def stop_listening(self) -> None:
        """Let in the clients that have already connected, and nobody after that."""
        self.shutdown()
        self.socket.settimeout(0)
        with contextlib.suppress(OSError):
            while True:
                self.process_request(*self.get_request())
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):    # a client that left while its connection was set up
            log.exception("a connection failed")


def hold_on_one_core(cpufreq: str = "/sys/devices/system/cpu/cpu%d/cpufreq/cpuinfo_max_freq") -> None:
    """Hold this thread, and those that it starts, on the fastest core it may use, the last of equals.

    The interpreter runs one thread at a time, and two cores hand it to and fro: a bare relay answers 8,400 requests a
    second on two cores, and 19,600 held on one.  Monitors and commands start from other threads and stay free.
    """
    def speed(core: int) -> int:
        with contextlib.suppress(OSError, ValueError), open(cpufreq % core, encoding="ascii") as told:
            return int(told.read())
        return 0
    with contextlib.suppress(AttributeError, OSError):    # only Linux has affinities, and a sandbox may forbid them
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0), key=lambda core: (speed(core), core))})


_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_ROOM_S = 0.1    # until some descriptor may be free again


def guard_of(settings: Settings) -> Guard:
    """Return who may ask.  Raise UsageError where everybody could who reaches this device."""
    host = settings.host.strip("[]").lower()
    if settings.api_key and settings.no_auth:
        raise UsageError("--no-auth and --api-key exclude each other")
    if not (settings.api_key or settings.no_auth or is_loopback(host)):
        raise UsageError(f"--host {host} lets others use this device's models and keys: set OBLIX_API_KEY to a key "
                         "that they must send, or say --no-auth")
    own = socket.gethostname().lower()
    names = [host, own, f"{own}.local", *map(str.lower, settings.allow_host)]
    return Guard(settings.api_key, frozenset(filter(None, names)), frozenset(map(str.lower, settings.allow_origin)))


def listen(settings: Settings, gateway: Gateway) -> list[_Listener]:
    """Return listening sockets: one, or for localhost one for each of its two addresses.  Raise UsageError."""
    host, port = settings.host.strip("[]"), settings.port
    parts = gateway, Admission(settings.max_requests, settings.max_body_mib << 20), guard_of(settings)
    first = _listener("127.0.0.1" if host == "localhost" else host, port, *parts)
    if host != "localhost":
        return [first]
    try:
        return [first, _Listener(("::1", first.server_port), *parts)]
    except OSError as error:
        if error.errno != errno.EADDRINUSE:    # no IPv6 here
            return [first]
        first.server_close()
        if not port:
            return listen(settings, gateway)    # another free port
        # Clients that try ::1 first for `localhost` would send their prompts to that program.
        raise UsageError(f"port {port} of ::1 is in use by another program: choose one with --port") from error


def _listener(host: str, port: int, *parts: Any) -> _Listener:
    try:
        return _Listener((host, port), *parts)
    except (OSError, OverflowError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use, perhaps by another Oblix: choose one with --port") from error
        raise UsageError(f"can't listen on {host} port {port}: {error}") from error


def with_keys_from_files(settings: Settings) -> Settings:
    """Return the settings with the keys that files hold.  Raise UsageError."""
    for name in ("api_key", "cloud_api_key"):
        path, flag = getattr(settings, f"{name}_file"), f"--{name.replace('_', '-')}-file"
        if path and getattr(settings, name):
            raise UsageError(f"{flag} and the key itself are both set: choose one")
        if path:
            try:
                with open(path, encoding="ascii") as file:
                    key = file.read(MAX_KEY_FILE).strip()
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or "it is no plain text"
                raise UsageError(f"{flag}: {path} can't be read: {why}") from error
            if not key.isprintable() or not key:
                raise UsageError(f"{flag}: {path} holds no key")
            settings = dataclasses.replace(settings, **{name: key, f"{name}_file": ""})  # type: ignore[arg-type]
    return settings


MAX_KEY_FILE = 1 << 16


class Server:
    """A running gateway with its listeners."""

    def __init__(self, gateway: Gateway, listeners: Sequence[_Listener]) -> None:
        self.gateway, self._listeners, self.admission = gateway, tuple(listeners), listeners[0].admission
        self.port = listeners[0].server_port
        host = listeners[0].server_name
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        """Begin to watch, and to answer."""
        self.gateway.watch.start()
        for listener in self._listeners:
            threading.Thread(target=listener.run, name="listen", daemon=True).start()

    def drain(self, limit_s: float, pause: Callable[[], int]) -> int:
        """Let in nobody any more, let what runs end by itself within the limit, and end the rest in-band.

        `pause` waits for a moment; if it returns something else than 0 the wait is over, and that is returned.
        """
        self.admission.stop()
        for listener in self._listeners:
            listener.stop_listening()
        for seconds, at_its_end in ((limit_s, self.admission.end), (LAST_WORDS_S, self.admission.close)):
            deadline = time.monotonic() + seconds
            while not self.admission.empty and time.monotonic() < deadline:
                hurried = pause()
                if hurried:
                    return hurried
            at_its_end()
        return 0

    def close(self) -> None:
        """End at once."""
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
        self.admission.close()
        self.gateway.close()


LAST_WORDS_S = 1.0    # for the threads of requests that are being ended to say so: each looks after a tick


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Server]:
    """Serve until the block ends.  Raise UsageError."""
    settings = with_keys_from_files(settings)
    gateway = Gateway(settings)
    server = Server(gateway, listen(settings, gateway))
    server.start()
    try:
        yield server
    finally:
        server.close()


# === 12. Page =========================================================================================================
# uses: nothing; pure
# What does a person see who opens the address in a browser?  /health, in words; the page asks for nothing else.

PAGE_HEADERS = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy":
                "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
                "frame-ancestors 'none'"}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Oblix</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem 1rem .2rem 0 }
code { background: #8882; padding: .1rem .3rem } @media (prefers-color-scheme: dark) { :root { color-scheme: dark } }
</style>
<h1>Oblix</h1>
<p>OpenAI-compatible API at <code id="base"></code>; the model is <code>auto</code>.</p>
<p id="plan">…</p>
<table id="sides"></table>
<h2>Models</h2>
<table id="targets"></table>
<script>
const row = (...cells) => {
  const line = document.createElement("tr");
  for (const cell of cells) line.appendChild(document.createElement("td")).textContent = cell ?? "";
  return line;
};
async function show() {
  const health = await (await fetch("/health")).json();
  base.textContent = location.origin + "/v1";
  plan.textContent = "auto now: " + (health.plan.order.join(", then ") || "nothing") + " (" + health.plan.reason + ")";
  sides.replaceChildren(...["local", "cloud"].map(side => row(side, health[side].level, health[side].reason)));
  targets.replaceChildren(...health.targets.map(t => row(t.id, t.side, t.state, t.reason)));
}
show(); setInterval(show, 3000);
</script>
"""


# === 13. Demo =========================================================================================================
# uses: 1 2 11
# What can a newcomer run who has neither Ollama nor a key?  Two upstreams that speak Ollama's and OpenAI's formats on
# loopback ports, and answer from a script.

DEMO_TEXT = "A scripted answer by the demo's {side} model, in {dialect}'s wire format, to {count} message(s)."
DEMO_PAUSE_S = 0.02    # between words, so that a stream looks like one


class _DemoHandler(http.server.BaseHTTPRequestHandler):
    """What both scripted upstreams share."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    facts: ClassVar[dict[str, Json]]    # path -> what is answered there

    def do_GET(self) -> None:
        self._send("application/json", [dumps(self.facts[self.path])])

    def do_POST(self) -> None:
        asked = loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, lines = ("application/json", [dumps(self.facts[self.path])]) if self.path in self.facts else (
            self.script(asked))
        with contextlib.suppress(ConnectionError):    # Oblix hung up because its client did
            self._send(kind, lines)

    def script(self, asked: Json) -> tuple[str, Iterable[bytes]]:
        """(content type, pieces) of the answer to a request."""
        raise NotImplementedError

    def _send(self, kind: str, pieces: Iterable[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in itertools.chain(pieces, [b""]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    @staticmethod
    def words(side: str, dialect: str, asked: Json) -> Iterator[str]:
        """The script, a word at a time."""
        for word in re.findall(r"\S+\s*", DEMO_TEXT.format(side=side, dialect=dialect, count=len(asked["messages"]))):
            time.sleep(DEMO_PAUSE_S)
            yield word

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: Oblix's own log tells the story."""


class _DemoOllama(_DemoHandler):
    _model: ClassVar[Json] = {"name": "demo-local:latest", "size": 1, "digest": "demo", "details": {},
                              "modified_at": "2026-11-01T00:00:00Z", "capabilities": ["completion", "tools"]}
    facts = {"/api/tags": {"models": [_model]},
             "/api/ps": {"models": [{**_model, "size_vram": 0, "context_length": 32768}]},
             "/api/show": {"capabilities": _model["capabilities"]}}

    def script(self, asked: Json) -> tuple[str, Iterable[bytes]]:
        return "application/x-ndjson", (dumps(event) + b"\n" for event in self._events(asked))

    def _events(self, asked: Json) -> Iterator[Json]:
        head = {"model": asked["model"], "created_at": "2026-11-01T00:00:00Z"}
        count = 0
        for word in self.words("local", "Ollama", asked):
            count += 1
            yield {**head, "message": {"role": "assistant", "content": word}, "done": False}
        yield {**head, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop",
               "prompt_eval_count": 10 * len(asked["messages"]), "eval_count": count}


class _DemoOpenAI(_DemoHandler):
    facts = {"/v1/models": {"object": "list", "data": [
        {"id": "demo-cloud", "object": "model", "created": 0, "owned_by": "demo"}]}}

    def script(self, asked: Json) -> tuple[str, Iterable[bytes]]:
        head = {"id": "chatcmpl-demo", "created": int(time.time()), "model": asked["model"]}
        words = list(self.words("cloud", "OpenAI", asked)) if not asked.get("stream") else []
        usage = {"prompt_tokens": 10 * len(asked["messages"]), "completion_tokens": len(words),
                 "total_tokens": 10 * len(asked["messages"]) + len(words)}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "".join(words), "refusal": None}
            return "application/json", [dumps({**head, "object": "chat.completion", "usage": usage, "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]})]
        head["object"] = "chat.completion.chunk"
        return "text/event-stream", self._events(head, asked)

    def _events(self, head: Json, asked: Json) -> Iterator[bytes]:
        deltas = itertools.chain([{"role": "assistant", "content": ""}],
                                 ({"content": word} for word in self.words("cloud", "OpenAI", asked)), [{}])
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None if delta else "stop"}
            yield b"data: " + dumps({**head, "choices": [choice]}) + b"\n\n"
        yield b"data: [DONE]\n\n"


@contextlib.contextmanager
def demo(settings: Settings) -> Iterator[Settings]:
    """Settings that point to the two scripted upstreams while the block runs; unchanged without --demo."""
    if not settings.demo:
        yield settings
        return
    servers = [QuickServer(("127.0.0.1", 0), kind) for kind in (_DemoOllama, _DemoOpenAI)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), name="demo", daemon=True).start()
    local, cloud = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield dataclasses.replace(settings, ollama_host=local, local_model=(),
                                  cloud_model=(f"openai:demo-cloud@{cloud}/v1",), cloud_api_key="",
                                  openai_api_key="", openai_base_url="", anthropic_api_key="",
                                  anthropic_base_url="")    # without keys nothing can leave the device
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


# === 14. Command line =================================================================================================
# uses: 1 2 9 11 13
# What does a person see who starts it?  In ten seconds: the address, what was found, what `auto` will do, what to fix.

SETTLE_S = 0.5    # how long the start waits for the monitors' first word; offline they have none to wait for
CHECK_S = 6.0     # longer than a probe may take
CPU_S = 1.3       # until the second sample, the first that knows the CPU's use


def start_text(settings: Settings, server: Server) -> str:
    """Return the lines that a start prints."""
    host = server.url.split("//")[1].rsplit(":", 1)[0]
    host = {"0.0.0.0": socket.gethostname(), "[::]": socket.gethostname()}.get(host, host)
    base = f"http://{'localhost' if settings.host == 'localhost' else host}:{server.port}/v1"
    key = "the key of --api-key" if settings.api_key else "placeholder"
    lines = [f"Oblix {__version__} at {base}" + ("  (demo: the answers are scripted)" if settings.demo else ""), "",
             *findings(server.gateway.health())]
    if settings.no_auth:
        lines += ["Everybody who can reach this address may use it, with the keys that it has (--no-auth).", ""]
    lines += ["Use it:", "  from openai import OpenAI", f'  client = OpenAI(base_url="{base}", api_key="{key}")',
              '  print(client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hello"}])'
              ".choices[0].message.content)", ""]
    return "\n".join(lines)


def findings(health: Json) -> list[str]:
    """Return what was found, what `auto` does now and why, and what to fix."""
    lines = [line for side in Side for line in _side_lines(side, health)]
    first, *others = (health["status"] == "healthy" and health["plan"]["order"]) or ["nothing"]
    order = f"{first} answers now" + (f", and {' then '.join(others)} if it fails" if others else "")
    lines += [f"  auto    {order}", ""]
    return lines + (["Fix:", *(f"  {advice}" for advice in advices(health)), ""] if advices(health) else [])


FACT_WORDS = {"cpu_percent": "CPU {}%", "memory_percent": "memory {}%", "load_per_core": "load {} per core",
              "gpu_percent": "GPU {}%", "battery_percent": "battery {}%", "temperature_c": "{} C"}


def _side_lines(side: Side, health: Json) -> list[str]:
    report = health[side.value]
    known = {name: value for name, value in report["facts"].items() if name.split("_")[0] not in report["reason"]}
    facts = ", ".join(words.format(known[name]) for name, words in FACT_WORDS.items() if name in known)
    level = report["level"] + (f": {report['reason']}" if report["reason"] else "")
    lines = [f"  {side.value:<7} {level}" + (f" ({facts})" if facts else "")]
    return lines + [f"          {target['id']} is {target['state']}" for target in health["targets"]
                    if target["side"] == side.value]


def advices(health: Json) -> list[str]:
    """Return what a person could do to have both sides answer, a line each."""
    found = [f"{target['id']} {target['state']}: {target['reason']}" for target in health["targets"]
             if target["state"] in ("no key", "not installed", "remote", "too large", "unreachable", "resting")]
    sides = {target["side"] for target in health["targets"]}
    if "local" not in sides:
        endpoints = health["local"]["facts"]["endpoints"]
        silent = [endpoint for endpoint in endpoints if "error" in endpoint]
        found += [f"no local model: nothing answers at {endpoint['url']} ({endpoint['error']}); install Ollama "
                  "(https://ollama.com), or name another server with --local-model" for endpoint in silent]
        found += [] if silent else ["no local model: run `ollama pull llama3.2`" if endpoints else
                                    "no local model yet: Ollama has not answered so far"]
    if "cloud" not in sides:
        found.append("no cloud model: set OPENAI_API_KEY or ANTHROPIC_API_KEY")
    if "memory_percent" not in health["local"]["facts"]:
        found.append("the device's load is unknown: python -m pip install psutil")
    return found


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None, script: bool = False) -> int:
    """Run the server until SIGTERM or Ctrl-C, or `check`.  Return the exit status: 2 for a mistake in what was set.

    As a script it returns when the server begins, which ends the process itself: see `leave_server`.
    """
    argv = sys.argv[1:] if argv is None else argv
    checks = argv[:1] == ["check"]

    def run() -> int:
        settings = Settings.parse(argv[1:] if checks else argv, os.environ if env is None else env)
        settings = with_keys_from_files(settings)    # before anything else is done with a mistake in them
        start_log(settings, os.environ.get("JOURNAL_STREAM", ""))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")    # a terminal need not know a model's name
        return (run_check if checks else leave_server if script else run_server)(settings)

    return _status_of(run)


def _status_of(run: Callable[[], int]) -> int:
    """Return what `run` returns, or 2 after a line on stderr for a mistake in what was set."""
    try:
        return run()
    except UsageError as error:
        print(f"oblix: {error}", file=sys.stderr)
        return 2


class _LogFormatter(logging.Formatter):
    """Lines for people, for machines (--log-json), or for journald, which has the time already and wants priorities."""

    def __init__(self, as_json: bool, journal: bool) -> None:
        super().__init__()
        self._as_json, self._journal = as_json, journal

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if not is_plain(message):
            message = re.sub("[^ -~]", "?", message)    # else what it quotes could forge a line
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        if self._as_json:
            at = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
            time_ = {} if self._journal else {"time": at.isoformat(timespec="milliseconds")}
            return dumps({**time_, "level": record.levelname, "message": "\n".join([message, *trace]),
                          **told_of_request(getattr(record, "facts", {}))}).decode()
        lines = [f"{record.levelname} {message}", *trace]
        if not self._journal:
            return f"{local_time(int(record.created))},{record.msecs:03.0f} " + "\n".join(lines)
        priority = next(number for level, number in SYSLOG if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in lines)    # each line is an entry of its own there

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name for it
        """Return where it happened, and of which kind; its own text may quote a prompt."""
        return "".join(traceback.format_tb(ei[2])) + str(ei[0].__name__)


@functools.lru_cache(1)
def local_time(second: int) -> str:
    """Return a unix time as logs have it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class _LogWriter(logging.Handler):
    """Writes the lines of LOG_S together, on a thread of its own: no request waits for the disk or the terminal.

    Where nobody takes the log any more its oldest lines are dropped.  (A buffered stream would be simpler; but when its
    buffer is full each request would wait, and a write to it holds the lock of all that log.)
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream, self._come, self._writing = stream, threading.Event(), False
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_LOG_LINES)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record) + "\n")
        self._come.set()

    def _run(self) -> None:
        while self._come.wait():
            time.sleep(LOG_S)
            self._come.clear()
            self._writing = True
            with contextlib.suppress(OSError, ValueError):    # nobody reads it, or it is closed
                self.stream.write("".join([self._lines.popleft() for _ in range(len(self._lines))]))
                self.stream.flush()
            self._writing = False

    def flush(self) -> None:
        """Wait until all that has come is written, but no longer than LOG_END_S."""
        deadline = time.monotonic() + LOG_END_S
        while (self._lines or self._writing) and time.monotonic() < deadline:
            time.sleep(LOG_S / 10)


LOG_S = 0.1
LOG_END_S = 1.0
MAX_LOG_LINES = 10_000
SYSLOG = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))    # level -> priority (sd-daemon(3))


def start_log(settings: Settings, journal_stream: str) -> None:
    """Log to stderr; `journal_stream` is systemd's word for where that goes (systemd.exec(5), JOURNAL_STREAM)."""
    # None where it is closed, as pythonw has it.
    handler = _LogWriter(sys.stderr or open(os.devnull, "w", encoding="ascii"))
    journal = False
    with contextlib.suppress(OSError, ValueError):    # a stderr that is no file
        stderr = os.fstat(handler.stream.fileno())
        journal = journal_stream == f"{stderr.st_dev}:{stderr.st_ino}"
    handler.setFormatter(_LogFormatter(settings.log_json, journal))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    # What no line shows need not be found out for each (logging's documentation, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def run_server(settings: Settings) -> int:
    """Answer requests until a signal comes, then let them end.  Raise UsageError.

    Return 0, or 128 more than a second signal that ended them.
    """
    waiting, woken = catch_signals()
    with waiting, woken:
        try:
            return _serve(settings, waiting)
        finally:
            signal.set_wakeup_fd(-1)


def leave_server(settings: Settings) -> int:
    """Do as `run_server` on a thread, which ends the process with that status.  Return 0 at once: the script ends.

    Python keeps a script's syntax tree for as long as the script runs, and this one's takes 13 of 36 MiB.
    """
    if (3, 12) <= sys.version_info < (3, 12, 3):    # no thread could start after that (python/cpython#113964)
        return run_server(settings)
    waiting, woken = catch_signals()    # which only the main thread may do; when the script has ended it waits for ours

    def run() -> None:
        status = 1
        with waiting, woken:
            try:
                status = _status_of(lambda: _serve(settings, waiting))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            logging.shutdown()    # os._exit leaves it out: the last lines are to be written
            os._exit(status)

    threading.Thread(target=run, name="main").start()
    return 0


def catch_signals() -> tuple[socket.socket, socket.socket]:
    """Return two sockets: from now on the first one gets the number of each signal that asks for the end."""
    # Python itself writes to the other when a signal comes: no handler of ours that another signal could interrupt.
    waiting, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):    # the last one is Windows' word for both
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: None)
    return waiting, woken


def _serve(settings: Settings, waiting: socket.socket) -> int:
    raise_file_limit(4 * settings.max_requests + 256)    # for each two connections of clients, and two upstream
    with demo(settings) as settings, running(settings) as server:
        server.gateway.watch.settle(SETTLE_S)
        print(start_text(settings, server), flush=True)
        while not signal_within(waiting, TIDY_S):
            _malloc_trim()(0)
        log.info("stopping; what runs has %g s (--drain), and a second signal ends it at once", settings.drain)
        again = server.drain(settings.drain, lambda: signal_within(waiting, DRAIN_LOOK_S))
    return 128 + again if again else 0


# After the start it gives back 13 of 32 MiB, after 500 streams 6 of 42; a look takes 0.1 ms.
TIDY_S: float | None = 2.0 if sys.platform == "linux" else None


@functools.cache
def _malloc_trim() -> Callable[[int], Any]:
    """Return glibc's malloc_trim, which gives freed memory back to the system, or what does nothing in its place."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        return ctypes.CDLL(None).malloc_trim
    return lambda _: None


DRAIN_LOOK_S = 0.05    # between two looks whether all has ended


def signal_within(waiting: socket.socket, limit_s: float | None) -> int:
    """Return the number of the signal that comes within the limit (None: whenever it comes), or 0."""
    waiting.settimeout(limit_s)
    try:
        return waiting.recv(1)[0]
    except socket.timeout:
        return 0


def raise_file_limit(wanted: int) -> None:
    """Let the process open so many files, or as many as it may; many systems give 1,024 unless asked for more."""
    try:
        import resource
    except ImportError:    # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):    # macOS may allow less than it says
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def run_check(settings: Settings) -> int:
    """Print what is found and what `auto` would do.  Return 0 if a request would be answered, else 1.

    Raise UsageError.
    """
    settings = with_keys_from_files(settings)
    guard_of(settings)    # a mistake in who may ask is one that a start would find
    with demo(settings) as settings:
        gateway = Gateway(dataclasses.replace(settings, warm_up="never"))
        gateway.watch.start()
        try:
            gateway.watch.settle(CHECK_S)
            time.sleep(CPU_S)
            health = gateway.health()
        finally:
            gateway.close()
    print("\n".join([f"Oblix {__version__} would do this now ({health['plan']['reason']}):", "", *findings(health)]))
    return 0 if health["status"] == "healthy" and health["plan"]["order"] else 1


if __name__ == "__main__":
    sys.exit(main(script=True))
