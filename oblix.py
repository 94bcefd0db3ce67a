#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["psutil"]
# ///
"""Oblix: one OpenAI-compatible endpoint in front of the local model and the cloud.

A person copies this file onto a device and runs `python oblix.py`.  Any OpenAI client then talks to
http://localhost:62549/v1, and clients of Anthropic's and Ollama's APIs to http://localhost:62549.  With model="auto"
a request is answered by the local model (Ollama) while the device can, and by a cloud model (OpenAI, Claude) when it
cannot; every answer says who gave it and why.

The life of a request

    bytes -> parse -> ChatRequest -> rank -> Plan -> attempt: encode -> open upstream -> decode -> chunks -> bytes
            (3, 11)                  (5)             (9)      (6)       (7)              (6)       (11)      (12)

The language inside is OpenAI's.  A request is an OpenAI chat request and the pieces of an answer are OpenAI
`chat.completion.chunk` objects, so there is no third vocabulary.  Fronts translate between it and the API that a client
speaks, providers between it and the API that a server speaks.  Two providers translate (Ollama, Claude) and are always
streamed; Claude gets its own clients' requests as they came.  Whichever server answers, `in_order` makes OpenAI's
reference of what it says, and `fold` a whole answer of a stream.  All answers, whole or not, take this one way.

Promises, each held by a test of its name
  1. A client never sees two beginnings: targets change before the first content has been sent, never after.
  2. A cut answer is never reported as complete: a stream ends by its protocol's end mark, never by EOF.
  3. The same readings always give the same decision, and the response says why.
  4. A prompt goes to a cloud only when it may: `auto`, `cloud` or a cloud model was asked for, by its name or by an
     alias, with its key set if it needs one.
  5. No thread waits for another, or for the network, while it holds something shared.
  6. /health and /v1/models never wait for the network.
  7. Nothing non-finite ever appears in JSON.
  8. A prompt is sent to an upstream once per counted attempt.

Who owns which state
  monitors' readings     each monitor's own thread writes its one attribute; everybody reads it without a lock (4)
  idle connections       deques of the transport, whose append and pop are atomic (7)
  ways to upstreams      a cache of the transport, as its TLS context; two threads that miss at once make the same (7)
  evidence of requests   a monitor's deque of losses and its wake-up, whose operations are atomic (4)
  latencies              a deque of each monitor of an endpoint, which its own thread appends to (4)
  loads and look-ups     a dict for each of the two kinds of errands, whose setdefault and del are atomic (7)
  what readings mean     caches of pure functions (lru_cache); two threads that miss at once put in the same (5, 9)
  what loads showed      a dict of the gateway, whose entries loads replace and monitors remove, atomically (9)
  the embedding model    an attribute of the gateway, set once; of two that set it at once both found the same (9)
  moment of next warm-up an attribute of the gateway; of two that read it at once the second joins the first's load (9)
  details of models      a dict of the prober with an entry for each endpoint, written by that one's monitor (9)
  ledger                 what is in flight, and what requests have shown of each target; behind its lock (8)
  journal                sums over the requests that have ended, behind its lock; a deque of the last ones and a set of
                         names, whose operations are atomic (8)
  items of answers       a deque of the Responses front, whose operations are atomic, as its counter's are (11)
  lines of the log       a deque of its writer, whose operations are atomic (15)
  admission              a set of guests, whose operations are atomic; how much is asked at once, behind its lock (12)
  how busy a client is   attributes of its guest, written by its thread, and once more by a thread that makes room (12)
  everything else        immutable, or local to the thread of one request

Contents
  1 Vocabulary   2 Settings   3 Request in   4 Monitors   5 Policy     6 Providers   7 Transport
  8 Ledger       9 Gateway   10 Response out  11 Fronts   12 Server   13 Page       14 Demo     15 Command line

Each section's banner lists the sections it uses; "pure" ones do no IO.  A test holds both.
"""
from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import collections
import contextlib
import copy
import dataclasses
import datetime
import email.utils
import enum
import errno
import fnmatch
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
import selectors
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
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, ClassVar, NamedTuple, NoReturn, Optional, TextIO, Union

if TYPE_CHECKING:
    import ssl  # at run time imported where it is needed, as hmac is: each takes 5 of 15 MiB

if __name__ == "__main__":
    sys.modules["ssl"] = None  # type: ignore[assignment]  # else http.server has it imported; this makes that fail
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
Chunk = dict[str, Any]    # an OpenAI chat.completion.chunk, or the part of one that has content


class TextEvent(NamedTuple):
    """The form of a provider's stream events that contain a text and nothing else."""
    pattern: re.Pattern[bytes]    # of a whole event; its one group is the text, as JSON has it between its quotes
    end: bytes                    # of an event


class Texts(list[bytes]):
    """The texts of events in a row that contain nothing else, as JSON has them between its quotes."""


class Side(str, enum.Enum):
    """The place where a target runs: on or near the device, or in the cloud."""
    LOCAL = "local"
    CLOUD = "cloud"


class Level(enum.IntEnum):
    """A side's ability to answer; each side has its own words for it (`WORDS`)."""
    GOOD, STRAINED, OUT = range(3)


WORDS = {Side.LOCAL: ("available", "constrained", "critical"), Side.CLOUD: ("optimal", "degraded", "disconnected")}


class Fault(enum.Enum):
    """The reason why an attempt failed, as far as it decides the next step."""
    TRANSPORT = "transport"     # refused, reset, DNS, TLS, silence, no HTTP, a cut answer
    BUSY = "busy"               # 408 409 425 429 5xx: later it may work
    ACCOUNT = "account"         # 401 402 403, no money: a person must act
    NOT_FOUND = "not found"     # 404 of the model; 405, 410 and the like of the path
    REFUSED = "refused"         # this target does not take this request; it may take others, and others may take it
    TOO_LONG = "too long"       # only a larger window helps
    LOADING = "loading"         # the model is on its way into memory
    CLIENT = "client"           # the request itself is wrong, by OpenAI's own rules: no other target would do better
    LATE = "late"               # the time for the whole request is over

    @property
    def moves_on(self) -> bool:
        """True if another target may do better."""
        return self not in (Fault.CLIENT, Fault.LATE)


class Endpoint(NamedTuple):
    """One upstream server: its dialect, its address, and the headers it wants."""
    provider: str
    base_url: str                               # without a trailing slash
    key: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    key_variable: str = ""                      # named in advice; "" where no key is needed

    def __repr__(self) -> str:    # without the key
        return f"Endpoint({self.provider} at {self.base_url})"

    @property
    def lacks_key(self) -> bool:
        """True if it wants a key that is not configured."""
        return bool(self.key_variable) and not self.key

    @property
    def on_device(self) -> bool:
        """True if it runs on this device, as its address tells: then the device's load is its own."""
        host = host_in(self.base_url)
        return is_loopback(host) or host in ("0.0.0.0", "::")    # what servers print as where they listen


class Target(NamedTuple):
    """Something that can answer: a model at an endpoint."""
    endpoint: Endpoint
    model: str
    side: Side

    @property
    def id(self) -> str:
        """The name clients address it by, e.g. `ollama:llama3.2`."""
        return f"{self.endpoint.provider}:{self.model}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that an endpoint lists, or what is known of those that a name stands for.  Empty means unknown."""
    name: str
    created: int = 0                    # unix seconds
    remote: bool = False                # an Ollama name that is answered by ollama.com
    digest: str = ""
    size: int = 0                       # bytes on disk: about what its weights take in memory
    capabilities: frozenset[str] | None = None    # "tools", "vision", …
    max_context: int = 0                # tokens that it was trained for
    own_context: int = 0                # tokens that a person has set, or that it was seen loaded for
    token_bytes: int = 0                # memory that one token of context takes
    cold: bool = False                  # not in memory: the next request would wait for its load
    context: int = 0                    # tokens that it is loaded for
    gpu_share: float | None = None      # of a loaded model, 0 to 1
    moved_to_cpu: bool = False          # mostly on the CPU now, and was on the GPU before
    provider: str = ""                  # that has it, where that is known
    title: str = ""                     # its name for people
    max_output: int = 0                 # tokens of an answer
    parameters: tuple[str, ...] = ()    # that it takes, by OpenAI's and OpenRouter's names
    entry: Json = dataclasses.field(default_factory=dict, compare=False)     # its one in Ollama's /api/tags,
    loaded: Json = dataclasses.field(default_factory=dict, compare=False)    # and in /api/ps

    @property
    def is_chat_model(self) -> bool:
        """False for embedding models."""
        return "completion" in self.capabilities if self.capabilities else not self.embeds

    @property
    def embeds(self) -> bool:
        """True for embedding models."""
        return "embedding" in self.capabilities if self.capabilities else "embed" in self.name.lower()


@dataclasses.dataclass(frozen=True, eq=False)    # each is one of a kind: what follows from it is remembered by it
class Reading:
    """A monitor's verdict on this device, or on one endpoint, with the facts behind it."""
    side: Side
    level: Level
    reason: str                                 # "" while all is well
    facts: Json
    endpoint: Endpoint | None = None            # None: it is about this device
    models: tuple[Model, ...] | None = None     # of the endpoint; None if it lists none
    known: bool = True                          # False before the first sample: optimism, not evidence


class Native(NamedTuple):
    """A request in the dialect of one provider, which gets it as its client wrote it, with another model's name."""
    provider: str
    path: str                                   # at the provider, of what answers it
    body: Json
    headers: tuple[tuple[str, str], ...] = ()
    only: str = ""                              # what of it no other provider can be asked for


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A checked chat request: `body` holds OpenAI fields of the right types, without nulls and no-op defaults."""
    model: str
    body: Json
    stream: bool = False
    include_usage: bool = False
    origin: Json = dataclasses.field(default_factory=dict)    # the body in the API that the client speaks
    native: Native | None = None
    left_out: tuple[str, ...] = ()              # what of it no target can be asked for: the client is told

    def native_to(self, provider: str) -> Native | None:
        """Return the request in a provider's own dialect, if its client wrote it so."""
        return self.native if self.native and self.native.provider == provider else None

    @property
    def messages(self) -> list[Json]:
        return self.body["messages"]  # type: ignore[no-any-return]

    def max_output_tokens(self, usual: int) -> int:
        """Return the most tokens that the answer may have; -1 is no limit, as LM Studio and Ollama have it."""
        asked: int = self.body.get("max_completion_tokens") or self.body.get("max_tokens") or usual
        return asked if asked > 0 else usual

    @functools.cached_property
    def blocks(self) -> tuple[int, ...]:
        """The hashes of the prompt's full blocks of BLOCK characters, in the order in which chat templates write it.

        Two prompts whose first n hashes are equal begin with the same n blocks (vLLM finds shared prefixes so).
        """
        parts = [dumps(self.body["tools"]).decode()] if "tools" in self.body else []
        for message in self.messages:
            calls = message.get("tool_calls")
            parts += [message["role"], text_of(message), dumps(calls).decode() if calls else ""]
        text = "\n".join(parts)
        most = min(len(text) // BLOCK, MAX_BLOCKS)
        return tuple([hash(text[number * BLOCK:(number + 1) * BLOCK]) for number in range(most)])

    @functools.cached_property
    def size(self) -> int:
        """The prompt's length in bytes of UTF-8.  An image counts as a thousand tokens, which are 4 KB of text."""
        texts = sum(len(text_of(message).encode("utf-8", "replace")) + 4 for message in self.messages)
        calls = [message["tool_calls"] for message in self.messages if "tool_calls" in message]
        images = sum(1 for _, part in self.parts() if part["type"] == "image_url")
        return texts + 4096 * images + len(dumps([calls, self.body.get("tools", [])]))

    def parts(self) -> Iterator[tuple[str, Json]]:
        """Yield each content part, except for contents that are one text, with the path for an error's param."""
        for m, message in enumerate(self.messages):
            if not isinstance(message.get("content"), str):
                for p, part in enumerate(parts_of(message)):
                    yield f"messages[{m}].content[{p}]", part


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
    """A checked request for the vectors of texts, or of lists of tokens."""
    model: str
    inputs: Sequence[Any]
    in_base64: bool = False    # the vectors, as little-endian float32
    body: Json = dataclasses.field(default_factory=dict)      # more of OpenAI's fields
    native: Json = dataclasses.field(default_factory=dict)    # more of Ollama's


class Eligibility(enum.Enum):
    """A target's place in the plan: it may be asked, as a last resort only, or not at all."""
    YES, LAST_RESORT, NO = range(3)


@dataclasses.dataclass(frozen=True)
class Condition:
    """The state of a target, or of a side's best target, in a word and in a line, and what that means for its use."""
    state: str
    reason: str = ""
    level: Level = Level.GOOD
    use: Eligibility = Eligibility.YES
    may_load: bool = True    # True if the device is well enough to load it, were it unloaded
    known: bool = True       # False while it seems well to monitors of which one has not sampled yet

    def word(self, side: Side) -> str:
        """Return the level as users know it."""
        return WORDS[side][self.level] if self.known else "unknown"

    def describe(self, side: Side) -> str:
        """Return the level as users know it, with the reason where there is one."""
        return self.word(side) + (f" ({self.reason})" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The targets in order, the last resorts after them, and the excluded ones, with reasons."""
    order: tuple[Target, ...]
    reason: str
    last_resort: tuple[Target, ...] = ()
    excluded: tuple[tuple[Target, str], ...] = ()
    conditions: Mapping[Target, Condition] = dataclasses.field(default_factory=dict)    # of them; none if named


OWN_NAMES = ("auto", "local", "cloud")    # of models, which nothing else may have
TOKEN_BYTES = 4              # of English; code has some 3
TEMPLATE_BYTES = 100         # of a prompt around its messages: Llama 3's template has 26 tokens
BLOCK = 256                  # characters of a prompt, some 64 tokens: 3 s of a Raspberry Pi's reading
MAX_BLOCKS = 4096            # a million characters, more than a local model's window
MAX_RETRY_AFTER_S = 600.0
MOST_TOKENS = 1 << 32        # no window has so many
MAX_LINE_BYTES = 32 << 20    # of an event in an answer: as much as a request may have; more is an attack
MAX_BODY_BYTES = 64 << 20    # of a whole answer
CONTENT = ("content", "tool_calls", "reasoning_content", "reasoning", "refusal", "audio", "function_call", "block")


class OblixError(Exception):
    """An error for the client, in OpenAI's shape; each subclass knows its status and type."""
    status, type = 500, "server_error"
    code: str | None = None
    request_id = ""                             # of the client's request, once it is answered with this

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None,
                 status: int | None = None, type: str | None = None, retry: bool | None = None,
                 retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        self.code, self.status, self.type = code or self.code, status or self.status, type or self.type
        self.retry = retry                      # x-should-retry; None leaves it to the client
        # seconds an upstream asked us to wait; one that asks for more is tried before that
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

    def __init__(self, message: str, fault: Fault = Fault.TRANSPORT, **details: Any) -> None:
        super().__init__(message, **details)
        self.fault = fault

    @property
    def brief(self) -> str:
        """The text for logs and headers: our own words, as an upstream's may quote the prompt."""
        return self.message if self.fault is Fault.TRANSPORT else f"{self.fault.value} ({self.status})"


class ClientGone(Exception):
    """The client hung up; nobody is left to tell."""


HUNG_UP = "client hung up"    # its word in the log


class UsageError(Exception):
    """A mistake on the command line or in the environment, told in one line."""


def parts_of(message: Json) -> list[Json]:
    """Return a message's content as a list of parts, whichever form it came in; empty for null."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content or []


def choices_of(chunk: Chunk) -> list[Json]:
    """Return the choices of a chunk that may have come from anywhere."""
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def has_content(chunk: Chunk) -> bool:
    """Return True if a chunk has content that a client would miss."""
    deltas = [choice.get("delta") for choice in choices_of(chunk)]
    return any(isinstance(delta, dict) and any(map(delta.get, CONTENT)) for delta in deltas)


def is_empty(chunks: Iterable[Chunk]) -> bool:
    """Return True if an answer ended normally but has no content; `length` and `content_filter` count as content."""
    return not any(has_content(chunk) or choice.get("finish_reason") not in ("stop", None)
                   for chunk in chunks for choice in choices_of(chunk))


def count_in(value: Any) -> int:
    """Return a number of tokens as it was told, or 0 for what is none: two that are larger may have no sum in JSON."""
    return int(value) if type(value) in (int, float) and 0 <= value < MOST_TOKENS else 0


def text_of(message: Json) -> str:
    """Return the text of a message's content, each part on its own line; refusals count as text."""
    return "\n".join(part[part["type"]] for part in parts_of(message) if part["type"] in ("text", "refusal"))


def as_list(value: str | list[str]) -> list[str]:
    """Return one or several as several."""
    return [value] if isinstance(value, str) else value


def is_header_safe(text: str) -> bool:
    """Return True if a text is printable ASCII, which a header or a log takes as it is."""
    return text.isascii() and text.isprintable()


def finite(text: str) -> float:
    """Return the finite number in a text.  Raises ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("number out of range")
    return number


def integer(digits: str) -> int:
    """Return the integer that JSON writes as these digits.  Raises ValueError."""
    if len(digits) > MAX_DIGITS:
        raise ValueError("number out of range")
    return int(digits)


MAX_JSON_DEPTH = 100         # tool schemas nest some 10-20 deep; json itself gives up near 1,000
MAX_JSON_MARKS = 1 << 20     # each may cost 100 bytes of memory ("[[],[],…"); one in a text is about a token
MAX_DIGITS = 4300            # Python's own limit, which 3.9.2 of Debian 11 lacks: the work grows with the square
_JSON = json.JSONDecoder(parse_float=finite, parse_int=integer, parse_constant=finite)
_COMPACT = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?")


def loads(raw: str | bytes) -> Any:
    """Parse JSON by RFC 8259.  Raise ValueError, which quotes nothing, also for what is too deep or too large."""
    text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    if len(text) > MAX_JSON_MARKS and sum(map(text.count, ",:[{")) > MAX_JSON_MARKS:
        raise ValueError(f"more than {MAX_JSON_MARKS:,} commas, colons and brackets")
    try:
        value = _JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:    # nearly always
        return value
    level: list[Any] = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise ValueError("nested too deeply")


def dumps(value: Any) -> bytes:
    """Return compact ASCII JSON on one line; escapes keep a lone surrogate from breaking the encoding."""
    return _COMPACT.encode(value).encode("ascii")


@functools.lru_cache(64)    # clients and settings name few hosts
def host_of(authority: str) -> str:
    """Return the host in a host[:port], in lower case, or "" if there is none."""
    found = _AUTHORITY.fullmatch(authority.lower())
    return found[1].strip("[]").rstrip(".") if found else ""


def host_in(url: str) -> str:
    """Return the host in a URL, as `host_of` does."""
    return host_of(url.partition("://")[2].partition("/")[0])


@functools.lru_cache(64)
def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is without asking DNS, or None (RFC 6761, 6.3: localhost is loopback)."""
    if re.fullmatch(r"(?:.+\.)?localhost|127(?:\.[0-9]+){1,2}", host):    # every system makes 127.0.0.1 of 127.1
        host = "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(host: str) -> bool:
    """Return True if a host is this device."""
    address = address_of(host)
    return address is not None and address.is_loopback


# === 2. Settings ======================================================================================================
# uses: 1; pure
# The declaration of a setting yields its flag, its variable, --help and the README's table.  Secrets never print.

def setting(default: Any, help: str, low: float = 0, high: float = 1e6, *, env: str = "", secret: bool = False,
            choices: Any = None, form: str = "(?s).*", between: str = ",") -> Any:
    """Declare a setting: a number from `low` to `high`, or a text of this form.

    `env`: a variable without a flag; `between`: what separates the values of a list in its variable.
    """
    return dataclasses.field(default=default, repr=not secret, metadata={
        "help": help, "low": low, "high": high, "env": env, "choices": choices, "form": form, "between": between})


NUMBER = r"[+-]?\d+(\.\d*)?"
DURATION = rf"{NUMBER}|[+-]?((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+"    # as Ollama reads keep_alive; the latter is Go's
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
# What copying leaves around a value: blanks, a byte order mark, quotes (`docker run --env-file` keeps them).
_AROUND = " \t\r\n\xa0\ufeff\u200b\"'`\u201c\u201d\u2018\u2019"
_BEFORE_KEY = re.compile(r"(?:export\s+)?[A-Z][A-Z0-9_]*(?:KEY|TOKEN)=(?=[^=])|(?i:authorization:\s*)?(?i:bearer)\s+")
KEY_VARIABLE = "[A-Z_][A-Z0-9_]*"    # no vendor's key looks so: one that stands in its variable's place is not taken
_ODD_KEY = re.compile(r"(?i)[$<{%]|.*(?:\s|\.\.\.)|(?:bearer|none|null|undefined|your.*key.*)$")    # of a template


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a person can set.  A flag overrides its variable, and that the default."""
    local_model: tuple[str, ...] = setting((), "local model, provider:name or openai:name@http://host:port/v1; repeat "
        "in order of preference; default: the newest model of Ollama")
    cloud_model: tuple[str, ...] = setting((), "cloud model, provider:name or openai:name@https://host/v1#VARIABLE, "
        "which holds the key; repeat in order of preference; default: a cheap model of each provider with a key")
    cloud_api_key: str = setting("", "key for the first --cloud-model; `ps` shows flags: prefer the file", secret=True)
    cloud_api_key_file: str = setting("", "file that holds it")
    alias: tuple[str, ...] = setting((), "further name of a model, NAME=TARGET[,TARGET…]: auto, local, cloud or "
        "provider:name; NAME may have * and ?, and the first that fits counts; repeat", between=";")
    embedding_model: str = setting("", "model of all embeddings, provider:name or openai:name@http://host:port/v1; "
        "default: the newest that Ollama has, else OpenAI's small one if there is its key")
    host: str = setting("localhost", "address to listen on; one that the network reaches needs --api-key")
    port: int = setting(62549, "port to listen on; 0 picks a free one", 0, 65535)
    api_key: str = setting("", "key that clients must send; `ps` shows flags: prefer the file", secret=True)
    api_key_file: str = setting("", "file that holds it")
    no_auth: bool = setting(False, "let everybody in who reaches --host, without a key")
    allow_origin: tuple[str, ...] = setting((), "origin of web pages that may ask, as https://chat.example, or * for "
        "all; repeat; those on localhost and of desktop apps may")
    allow_host: tuple[str, ...] = setting((), "further name by which clients reach it, beside localhost, addresses and "
        "the device's own; repeat")
    demo: bool = setting(False, "serve two built-in scripted models, to try Oblix with nothing installed")
    connect_timeout_s: float = setting(5.0, "seconds to reach an upstream: DNS, TCP and TLS together", 0.1)
    prefer: str = setting("local", "what auto prefers while local is available and the cloud optimal: local, "
        "cloud, or whichever is measured to answer sooner", choices=("local", "cloud", "fast"))
    local_first_s: float = setting(5.0, "expected seconds to local's first word from which the cloud goes first, if it "
        "is expected in less than half of that; inf stays local", 0, math.inf)
    local_whole_s: float = setting(30.0, "the same for the end of an answer that is not streamed", 0, math.inf)
    local_slots: int = setting(1, "requests that the local model answers at once (Ollama's OLLAMA_NUM_PARALLEL)", 1)
    warm_up: str = setting("auto", "whether to load the local model at start, while the cloud is not optimal, and "
        "when the cloud answers in its place", choices=("auto", "never"))
    keep_alive: str = setting("auto", "how long Ollama keeps a model after its last use: seconds, or 10m, -1 for ever; "
        "auto is 30m, and 5m on battery; default leaves it to Ollama", form=rf"auto|default|{DURATION}")
    claude_cache: str = setting("auto", "whether to ask Claude to cache the prompt of a conversation that goes on, if "
        "the client does not", choices=("auto", "off"))
    on_cut: str = setting("error", "what follows when a plain text stream breaks off: an error, or another model that "
        "continues it", choices=("error", "continue"))
    first_byte_timeout_s: float = setting(300.0, "seconds until an answer's first content; a load takes minutes", 0.1)
    patience_s: float = setting(60.0, "seconds until first content while another model could answer", 0.1)
    stall_timeout_s: float = setting(60.0, "seconds of silence that end an answer under way; comments don't count", 0.1)
    request_timeout_s: float = setting(900.0, "seconds that a whole request may take, all attempts together", 0.1)
    max_requests: int = setting(512, "chat requests answered at once; more get a 503 and come again", 1, 65_536)
    max_body_mib: int = setting(32, "largest request, in MiB; images make 10 to 30 of them normal", 1, 128)
    drain: float = setting(8.0, "seconds that requests may go on after SIGTERM or Ctrl-C; docker stop waits for 10")
    probe_every_s: float = setting(30.0, "seconds between probes of a cloud that answers; sooner after trouble", 1)
    better_after_s: float = setting(10.0, "seconds that better readings must last before they count")
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
    latency_degraded_ms: float = setting(1000.0, "probe latency above which a cloud is degraded")
    loss_degraded_percent: float = setting(10.0, "share of failed probes above which a cloud is degraded")
    log_level: str = setting("info", "what is logged; info is a line per request",
        choices=("debug", "info", "warning", "error"))
    log_json: bool = setting(False, "log lines as JSON, for machines")
    ollama_host: str = setting("", "where Ollama listens, by Ollama's own rules", env="OLLAMA_HOST")
    openai_api_key: str = setting("", "key for OpenAI", env="OPENAI_API_KEY", secret=True)
    openai_base_url: str = setting("", "another OpenAI-compatible server, ending in /v1", env="OPENAI_BASE_URL")
    openai_org_id: str = setting("", "OpenAI organization", env="OPENAI_ORG_ID", secret=True)
    openai_project_id: str = setting("", "OpenAI project", env="OPENAI_PROJECT_ID", secret=True)
    anthropic_api_key: str = setting("", "key for Claude", env="ANTHROPIC_API_KEY", secret=True)
    anthropic_base_url: str = setting("", "another server that speaks Anthropic's API", env="ANTHROPIC_BASE_URL")
    endpoint_keys: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)    # of each #VARIABLE

    @classmethod
    def parse(cls, argv: Sequence[str], env: Mapping[str, str]) -> Settings:
        """Return the settings of flags and variables.  Raise UsageError; SystemExit(0) after --help and --version."""
        parser = _parser(cls)
        found = vars(parser.parse_args(argv))
        for field in declared(cls):
            text = env.get(variable_of(field), "").strip(_AROUND)
            if text and field.name not in found:
                found.update(_from_variable(parser, field, text))
            value = found.get(field.name, field.default)
            if isinstance(value, list):
                if not value or [] in value:    # argparse's reading of --flag=--
                    raise UsageError(f"{flag_of(field)} needs a value; see --help")
                found[field.name] = tuple(value)
            elif not field.repr:    # a secret
                found[field.name] = key_in(value, variable_of(field))
            elif field.name.endswith("_base_url"):
                found[field.name] = base_url_in(value)
        named = re.findall(f"#({KEY_VARIABLE})", " ".join(itertools.chain.from_iterable(
            as_list(found.get(name, [])) for name in ("local_model", "cloud_model", "alias", "embedding_model"))))
        return cls(**found, endpoint_keys=tuple([(name, key_in(env.get(name, ""), name)) for name in named]))


def declared(cls: Any) -> list[dataclasses.Field[Any]]:
    """Return the settings that a flag or a variable sets."""
    return [field for field in dataclasses.fields(cls) if field.metadata]


def key_in(text: str, place: str) -> str:
    """Return the key in a copied text, without quotes, variable or `Bearer`.  Raise UsageError for odd characters."""
    key = _BEFORE_KEY.sub("", text.strip(_AROUND), 1).strip(_AROUND)
    if not is_header_safe(key):
        raise UsageError(f"{place} holds characters that no key has: copy it again")
    return key


def base_url_in(text: str) -> str:
    """Return an address with a scheme: without one https is meant for a name of the internet, and http otherwise."""
    found = re.match("(?i)(https?)[:/]+(.*)", text)
    if found or not text or "://" in text:
        return f"{found[1].lower()}://{found[2]}" if found else text
    return ("https://" if re.match(r"[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}(?::443)?(?:/|$)", text) else "http://") + text


def odd_keys(settings: Settings) -> list[str]:
    """Return a line for each key that looks like no key, without the key."""
    keys = [(variable_of(field), getattr(settings, field.name)) for field in declared(settings) if not field.repr]
    return [f"{variable} does not look like a key: it has blanks inside, or is a placeholder"
            for variable, key in dict.fromkeys((*keys, *settings.endpoint_keys)) if _ODD_KEY.match(key)]


def variable_of(field: dataclasses.Field[Any]) -> str:
    """Return the environment variable of a setting."""
    return field.metadata["env"] or "OBLIX_" + field.name.upper()


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return the flag of a setting, "" if only a variable sets it."""
    return "" if field.metadata["env"] else "--" + field.name.replace("_", "-")


def _from_variable(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], text: str) -> Json:
    """Return what a variable's text sets, read as the flag's would be.  Raise UsageError."""
    if not flag_of(field):
        return {field.name: text}
    if isinstance(field.default, bool):
        if text.lower() not in _BOOLEANS:
            raise UsageError(f"{variable_of(field)}: {text!r} is neither true nor false")
        return {field.name: _BOOLEANS[text.lower()]}
    parts = text.split(field.metadata["between"]) if isinstance(field.default, tuple) else [text]
    values = [part.strip(_AROUND) for part in parts]
    try:
        return vars(parser.parse_args([f"{flag_of(field)}={value}" for value in values if value]))
    except UsageError as error:
        raise UsageError(f"{variable_of(field)}: {error}") from None


def _converter(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """Return argparse's converter of a text to the setting's type, which raises for a wrong range or form."""
    kind: Any = type(field.default)
    low, high, form = (field.metadata[name] for name in ("low", "high", "form"))
    wanted = "time such as 300, 10m, 1h30m or -1" if kind is str else f"number from {low:g} to {high:g}"

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if re.fullmatch(form, text) if kind is str else low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")
    return convert


def shown(field: dataclasses.Field[Any]) -> str:
    """Return a default as --help and the README show it."""
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises UsageError for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


_HELP = """One OpenAI-compatible endpoint that answers from the local model while the device can and from the cloud
when it cannot, and says which and why.

  server      serve, as without a command
  check       print what Oblix finds, what it would do and what to fix; the status is 0 if a request would be answered
  chat        talk with the running server, or with one of its own; [--model NAME] [--show-metrics]; takes a pipe, too
  models      print what there is on both sides
  env CLIENT  print the lines for a shell that point a client here: claude, codex, aider, openai, ollama"""


def _parser(cls: type[Settings]) -> argparse.ArgumentParser:
    """Return the parser of the command line, made from the declarations."""
    parser = OneLineParser(
        prog="oblix.py", usage="python oblix.py [COMMAND] [flags]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter, description=_HELP,
        epilog="More variables:\n" + "\n".join(f"  {variable_of(field):<20} {field.metadata['help']}"
                                               for field in declared(cls) if not flag_of(field)))
    parser.add_argument("--version", action="version", version=f"oblix {__version__}")
    for field in filter(flag_of, declared(cls)):
        text = f"{field.metadata['help']} [{variable_of(field)}" + (
            "]" if field.default in ("", (), False) else f", default {shown(field)}]")
        how: Json = {"help": text.replace("%", "%%")}
        if isinstance(field.default, bool):
            how["action"] = "store_true"
        else:
            how["metavar"] = "N" if isinstance(field.default, (int, float)) else field.name.rsplit("_", 1)[-1].upper()
            how.update({"action": "append"} if isinstance(field.default, tuple) else
                       {"type": _converter(field), "choices": field.metadata["choices"]})
        parser.add_argument(flag_of(field), **how)
    return parser


# === 3. Request in ====================================================================================================
# uses: 1; pure
# What does the client want, and is it allowed to ask?  HTTP's heads and the types of OpenAI's fields are checked here
# and nowhere else: behind `parse_request` each known field has its type, null means absent, and unknown fields and
# values are kept.  Section 6 checks the limits of each provider.

# --- 3. The head of a request -----------------------------------------------------------------------------------------

MAX_REQUEST_LINE = 8 << 10    # bytes; nothing here has a long path
MAX_FIELD_LINE = 16 << 10     # bytes; the longest that browsers and proxies send are tokens of a few KB
MAX_FIELDS = 100              # the SDKs send some 20
MAX_HEAD_BYTES = 64 << 10
CHUNKED = -1                  # the size of a body that is sent with chunked transfer coding

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) (HTTP/[0-9]\.[0-9])\r\n")
FIELD_LINE = re.compile(_TOKEN + rb":[\t -~\x80-\xff]*\r\n")
_FIELD_LINES = re.compile(rb"(?:" + FIELD_LINE.pattern + rb")*")
# Authority, path.  Clients join base URL and path with a /v1 or a slash too many: only one thing can be meant.
_TARGET = re.compile(r"(?:(?i:https?)://([^/?#]*))?(?:/+v1(?=[/?#]|$))*([^?#]*)")
# Two servers in a row may read two of these differently.
_ONCE = frozenset(["authorization", "content-length", "content-type", "host", "origin", "transfer-encoding"])


def is_size(text: str) -> bool:
    """Return True if a text is a size in bytes, as Content-Length has it."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a request, in which two servers can't disagree.  Names of fields are in lower case."""
    method: str
    target: str
    version: str
    fields: Mapping[str, str]

    @functools.cached_property
    def path(self) -> str:
        """The path without query, /v1, and slashes that are doubled or trail; still percent-encoded."""
        found = _TARGET.match(self.target)
        path = found[2] if found else ""
        return (re.sub("//+", "/", path) if "//" in path else path).rstrip("/") or "/"

    @property
    def authority(self) -> str | None:
        """The host[:port] that it is addressed to, in lower case: a target that names one overrides Host."""
        found = None if self.target[:1] == "/" else _TARGET.match(self.target)
        authority = found[1] if found and found[1] is not None else self.fields.get("host")
        return None if authority is None else authority.lower()

    @property
    def is_preflight(self) -> bool:
        """True if a browser asks what a page may send."""
        return self.method == "OPTIONS" and "origin" in self.fields and "access-control-request-method" in self.fields

    @property
    def keeps_open(self) -> bool:
        """True if the client wants the connection for its next request (RFC 9112, 9.3)."""
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
    """Return the head that a request's first line and its fields' lines contain.  Raises BadRequest.

    The stdlib reads them as e-mail.  This is strict, as a server in front of this one might read a line differently:
    then a client could hide a request in another (request smuggling; RFC 9112, 2.2, 5 and 11.2).
    """
    start = _REQUEST_LINE.fullmatch(first)
    if not start:
        raise BadRequest("This is not an HTTP request line (RFC 9112, 3)." + (
            " It looks like TLS: use http:// instead of https://." if first[:1] == b"\x16" else ""), code="bad_request")
    method, target, version = (part.decode("ascii") for part in start.groups())
    if not version.startswith("HTTP/1."):
        raise BadRequest(f"{version} is not supported: use HTTP/1.1.", status=505, code="unsupported_http_version")
    lines, fields = b"".join(more), dict[str, str]()
    if not _FIELD_LINES.fullmatch(lines):
        raise BadRequest("A line of the request's head is not `name: value` and CRLF.", code="bad_request")
    for line in lines.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in _ONCE and name in fields:
            raise BadRequest(f"The request has two {name} headers.", code="bad_request")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    if version != "HTTP/1.0" and "host" not in fields:
        raise BadRequest("The request has no Host header.", code="bad_request")
    return Head(method, target, version, fields)


def check_body_kind(head: Head) -> None:
    """Raise BadRequest for an unsupported Content-Type or Content-Encoding.

    A page may send a text or a form to any address unasked, but JSON only after a preflight.  A program may send what
    it likes (`curl -d` says that it sends a form): it has neither header that browsers add to each POST of a page, even
    if that hides where it comes from (`Origin: null`; Fetch standard, "append a request Origin header").
    """
    kind = head.fields.get("content-type", "").partition(";")[0].strip().lower()
    by_page = "origin" in head.fields or "sec-fetch-site" in head.fields
    if by_page and not re.fullmatch(r"application/([!-.0-~]+\+)?json", kind):
        raise BadRequest("Send the body as JSON, with the header `Content-Type: application/json`.", status=415,
                         code="unsupported_media_type")
    if head.fields.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise BadRequest("Send the body without a Content-Encoding.", status=415, code="unsupported_media_type")


# --- 3. Access --------------------------------------------------------------------------------------------------------

EXPOSED = ("x-oblix-model, x-oblix-side, x-oblix-reason, x-oblix-attempts, x-oblix-left-out, x-request-id, "
           "request-id, x-should-retry, retry-after")

_KEY_FIELDS = ("api-key", "x-api-key")    # of Azure's clients, of Anthropic's

# Schemes of pages that are part of an installed program; a page from elsewhere has http:, https: or null.  `file:` and
# browsers' extensions are left out: a download is from elsewhere, and an extension runs beside every page.
APPS = frozenset(("app", "capacitor", "capacitor-electron", "electron", "ionic", "tauri", "vscode-file",
                  "vscode-webview"))


@dataclasses.dataclass(frozen=True)
class Guard:
    """Access control: the API key if one is set, the Host header, the Origin header."""
    key: str = dataclasses.field(default="", repr=False)
    names: frozenset[str] = frozenset()      # of this server, in lower case; localhost and addresses are too
    origins: frozenset[str] = frozenset()    # of pages, in lower case, or "*"; pages on localhost may ask too

    def check(self, head: Head) -> None:
        """Raise OblixError unless the client may ask."""
        host = host_of(head.authority or "")
        if head.authority and not host:
            raise BadRequest("The Host header is not `host` or `host:port` (RFC 9112, 3.2).", code="bad_request")
        # Containers call the host host.docker.internal and the like.  Nobody on the internet can have a name below
        # .internal, but the operator of the network's DNS can: `welcomes` refuses the requests of such a page.
        if not self.key and head.authority is not None and not (self._is_own(host) or host.endswith(".internal")):
            # For the browser, a page whose own name leads here (DNS rebinding) is of the same origin.
            raise BadRequest("The Host header is none of this server's names. Use localhost or an IP address, or start "
                             "Oblix with --allow-host NAME, or with an --api-key.", status=403, code="host_not_allowed")
        if "origin" in head.fields and not self.welcomes(head):
            raise BadRequest("Pages of this origin may not use this server. Start Oblix with --allow-origin "
                             f"{head.fields['origin'][:100]} if they should.", status=403, code="origin_not_allowed")
        is_page = head.method in ("GET", "HEAD") and head.path == "/"    # it holds no facts, and sends the key for them
        if self.key and not (head.is_preflight or is_page or self.is_public(head) or self._knows_key(head)):
            raise BadRequest("The key of this Oblix is missing or wrong: send the one of --api-key or OBLIX_API_KEY "
                             "as `Authorization: Bearer …` or `x-api-key: …`.", status=401, type="authentication_error",
                             code="invalid_api_key", retry=False)

    def _is_own(self, host: str) -> bool:
        """Return True if a host means this server, without asking DNS."""
        return host in self.names or address_of(host) is not None

    def welcomes(self, head: Head) -> bool:
        """Return True if the page that asks is of this device, of this server itself, or of an allowed origin."""
        origin = head.fields.get("origin", "").lower()
        scheme, _, place = origin.partition("://")
        host = host_of(place)
        return bool(self.origins & {origin, "*"} or place and (scheme in APPS or is_loopback(host) or (
            place == head.authority and (self.key or self._is_own(host)))))

    def is_public(self, head: Head) -> bool:
        """Return True for GET /health without the key that is set: its answer has only status and version."""
        return bool(self.key) and head.method in ("GET", "HEAD") and head.path == "/health" and not (
            {"authorization", *_KEY_FIELDS} & head.fields.keys())

    def _knows_key(self, head: Head) -> bool:
        import hmac  # which loads libcrypto: see the imports
        scheme, _, token = head.fields.get("authorization", "").partition(" ")
        given = [token.strip() if scheme.lower() == "bearer" else "",
                 *(head.fields.get(name, "") for name in _KEY_FIELDS)]
        key = self.key.encode()    # in constant time, so that nobody finds it letter by letter
        return any(hmac.compare_digest(key, one.encode("latin-1")) for one in given)

    def cors_headers(self, head: Head) -> dict[str, str]:
        """Return the headers that let a page read the answer (Fetch standard, 3.2)."""
        asked = head.fields
        if "origin" not in asked or not self.welcomes(head):
            return {}
        allowed = {"Access-Control-Allow-Origin": asked["origin"], "Vary": "Origin"}
        if not head.is_preflight:
            return {**allowed, "Access-Control-Expose-Headers": EXPOSED}
        if asked.get("access-control-request-private-network") == "true":    # a public page, a device at home
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return {**allowed, "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS", "Access-Control-Max-Age": "600",
                "Access-Control-Allow-Headers": asked.get("access-control-request-headers", "*")}


# --- 3. The chat request ----------------------------------------------------------------------------------------------

Rule = tuple[Callable[[Any], object], str]    # a test of a value, and the words for what passes it


def need(ok: object, param: str, must: str, code: str = "invalid_value") -> None:
    """Raise BadRequest, which names the parameter and what it must be, unless a test of it passed."""
    if not ok:
        raise BadRequest(f"{param} {must}.", param=param, code=code)


def check_fields(fields: Json, rules: Mapping[str, Rule], needed: Iterable[str], where: str = "") -> None:
    """Raise BadRequest for a needed field that is missing, or one that breaks its rule; null counts as absent."""
    for name in needed:
        need(fields.get(name) is not None, where + name, f"is missing: it {rules[name][1]}",
             "missing_required_parameter")
    for name, value in fields.items():
        if name in rules and value is not None:
            need(rules[name][0](value), where + name, rules[name][1])


def _a(*kinds: type, words: str) -> Rule:
    return lambda value: isinstance(value, kinds), f"must be {words}"


def _list_of(kind: type, words: str) -> Rule:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value), (
        f"must be a list of {words}")


def whole_number(low: int, high: int, words: str = "") -> Rule:
    # subtle: type(), not isinstance(): True is an int, and `"n": true` must not pass for 1
    return lambda value: type(value) in (int, float) and low <= value <= high and int(value) == value, (
        f"must be an integer{words}")


def _has(value: Any, kinds: Mapping[str, Any]) -> bool:
    """Return True if a value is an object whose fields of these names are of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _is_call(call: Any) -> bool:    # Ollama's clients leave the id out, and send the arguments as an object
    return _has(call, {"id": (str, _ABSENT)}) and ((call.get("type") or "function") != "function" or _has(
        call.get("function"), _CALLED))


def _is_tool_choice(value: Any) -> bool:
    allowed = isinstance(value, dict) and value.get("type") == "allowed_tools"
    return _has(value.get("allowed_tools"), _ALLOWED) if allowed else isinstance(value, (str, dict))


_ABSENT = type(None)
_ALLOWED = {"tools": list, "mode": str}
_CALLED = {"name": str, "arguments": (str, dict, _ABSENT)}
_FUNCTION = {"name": str, "parameters": (dict, _ABSENT), "description": (str, _ABSENT)}
# A data: URL of an image, by the first bytes of its formats: what a client says of the type is often a guess.
_IMAGE = re.compile(r"(?i:data):([^;,]*)[^,]*;(?i:base64),"
                    r"(?:(?P<png>iVBORw0KGg)|(?P<jpeg>/9j/)|(?P<gif>R0lGOD)|(?P<webp>UklGR.{6}XRUJQ))")
_string, _boolean, _object = _a(str, words="a string"), _a(bool, words="true or false"), _a(dict, words="an object")
_number: Rule = lambda value: type(value) in (int, float), "must be a number"
_strings = _list_of(str, "strings")
WHOLE = ("max_tokens", "max_completion_tokens", "seed", "top_logprobs", "n")    # 1.0 is 1: some languages have no int

# A rule refuses what no server takes, or what this file could not read.  For anything else the upstream knows best:
# servers have efforts, kinds of tools and formats, and ranges of numbers that OpenAI's reference does not have.
FIELDS: dict[str, Rule] = {
    # the model's name goes into headers and logs
    "model": (lambda name: isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable(),
              'must be "auto" or another printable name of at most 256 characters, see GET /v1/models'),
    "messages": (lambda value: isinstance(value, list) and value, "must be a list of at least one message"),
    **dict.fromkeys(("temperature", "top_p", "presence_penalty", "frequency_penalty"), _number),
    **dict.fromkeys(WHOLE, whole_number(-2**63, 2**64 - 1)),    # no server's types take more
    "n": whole_number(1, 16384, " from 1 to 16384"),            # vLLM's limit
    "stream": _boolean, "logprobs": _boolean,
    "stop": (lambda value: isinstance(value, str) or _strings[0](value), "must be a string or a list of strings"),
    "tools": _list_of(dict, "tools"), "functions": _list_of(dict, "functions"),
    "tool_choice": (_is_tool_choice, 'must be "none", "auto", "required" or an object that names a tool'),
    "response_format": (lambda value: _has(value, {"type": str}), 'must be like {"type": "json_object"} or '
                        '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'),
    "reasoning_effort": _string, "service_tier": _string, "stream_options": _object,
    "options": _object,    # not OpenAI's: Ollama's own options, sent by SDK users as extra_body
}

# Values that mean the same as no field; many frameworks send them, and some upstreams refuse them.
NO_OPS = {"n": 1, "stream": False, "logprobs": False, "top_logprobs": 0, "stop": [], "tools": [], "functions": [],
          "logit_bias": {}, "modalities": ["text"], "response_format": {"type": "text"}}

MESSAGE_FIELDS: dict[str, Rule] = {
    "role": (lambda value: isinstance(value, str) and value, "must be system, developer, user, assistant or tool"),
    "tool_call_id": _string, "refusal": _string, "name": _string,
    "content": _a(str, list, words="a string or a list of content parts"),
    "function_call": (lambda value: _has(value, _CALLED), 'must be {"name": …, "arguments": "{}"}'),
    "tool_calls": (lambda value: isinstance(value, list) and all(map(_is_call, value)), 'must be a list of {"id": …, '
                   '"type": "function", "function": {"name": …, "arguments": "{}"}}'),
}

PARTS: dict[str, Callable[[Json], bool]] = {    # type of a content part -> test of the rest
    "text": lambda part: isinstance(part.get("text"), str),
    "refusal": lambda part: isinstance(part.get("refusal"), str),
    "image_url": lambda part: _has(part.get("image_url"), {"url": str}),
    "file": lambda part: _has(part.get("file"), {"file_data": (str, _ABSENT)}),
}


def parse_body(raw: bytes) -> Json:
    """Return the JSON object in a client's bytes.  Raise BadRequest."""
    try:
        body = loads(raw)
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest('The body must be a JSON object like {"model": "auto", …}.', code="invalid_json")
    return body


def parse_request(body: Json) -> ChatRequest:
    """Return the request in an OpenAI chat body.  Raise BadRequest for a type or range that no upstream takes."""
    check_fields(body, FIELDS, ("model", "messages"))
    model, body = body["model"], {name: value for name, value in body.items() if name != "model"}
    if body.get("stop") is not None and "" in as_list(body["stop"]):    # it says nothing, and vLLM refuses it
        body["stop"] = [stop for stop in as_list(body["stop"]) if stop]
    kept = {name: value for name, value in body.items()
            if value is not None and not (name in NO_OPS and value == NO_OPS[name])}
    kept.update({name: int(value) for name, value in kept.items() if type(value) is float and name in WHOLE})
    kept["messages"] = [_message(f"messages[{number}]", message) for number, message in enumerate(kept["messages"])]
    if "tools" in kept:
        kept["tools"] = [_tool(f"tools[{number}]", tool) for number, tool in enumerate(kept["tools"])]
    for name, needed in (("tool_choice", "tools"), ("parallel_tool_calls", "tools"), ("function_call", "functions")):
        if needed not in kept:    # OpenAI refuses the one without the other
            kept.pop(name, None)
    stream = kept.get("stream", False)
    options = kept.get("stream_options", {}) if stream else kept.pop("stream_options", {})
    return ChatRequest(model, kept, stream, bool(options.get("include_usage")))


def _tool(where: str, tool: Json) -> Json:
    """Return a tool, checked, with its type and without its nulls.  Raises BadRequest."""
    tool = {"type": "function", **without_nulls(tool, tool.get("type") or "function")}
    if tool["type"] == "function" and "function" not in tool and "name" in tool:    # as Responses has it, and Cursor
        tool = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    fits = tool["type"] != "function" or _has(tool.get("function"), _FUNCTION) and tool["function"]["name"]
    need(fits, where, 'must be like {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}')
    return tool


def _message(where: str, message: Any) -> Json:
    """Return a message, checked and without its nulls.  Raises BadRequest."""
    need(isinstance(message, dict), where, "must be an object")
    says = message.get("role") in ("system", "developer", "user")
    check_fields(message, MESSAGE_FIELDS, ("role", "content") if says else ("role",), f"{where}.")
    # servers' chat templates want a content, if only null
    checked: Json = {name: value for name, value in message.items() if value is not None or name == "content"}
    content, calls = message.get("content"), checked.pop("tool_calls", None)
    if isinstance(content, list):
        checked["content"] = [_part(f"{where}.content[{number}]", part) for number, part in enumerate(content)]
    if calls:
        checked["tool_calls"] = [without_nulls(call, call.get("type") or "function") for call in calls]
    return checked


def _part(where: str, part: Any) -> Json:
    """Return a content part, checked; an image_url that is a bare string becomes the object it should be."""
    need(isinstance(part, dict) and isinstance(part.get("type"), str), where, "must be an object with a type")
    kind = part["type"]
    if kind == "image_url" and isinstance(part.get("image_url"), str):
        part = {**part, "image_url": {"url": part["image_url"]}}
    need(kind not in PARTS or PARTS[kind](part), where, f"is not a well-formed {kind} part")
    image = _IMAGE.match(part["image_url"]["url"]) if kind == "image_url" else None
    if image and image[1].lower() != f"image/{image.lastgroup}":    # Claude and Gemini refuse it
        url = f"data:image/{image.lastgroup}{image.string[image.end(1):]}"
        part = {**part, "image_url": {**part["image_url"], "url": url}}
    return without_nulls(part, kind)


def route_of(head: Head) -> str:
    """Return where the header x-oblix-route sends a request, "" without it.  Raises BadRequest."""
    route = head.fields.get("x-oblix-route")
    need(route in (None, *OWN_NAMES), "x-oblix-route", f"must be one of {', '.join(OWN_NAMES)}")
    return route or ""


def without_nulls(fields: Json, inner: Any = None) -> Json:
    """Return an object without its nulls, and without those of the object in its field `inner`."""
    kept = {name: value for name, value in fields.items() if value is not None} if None in fields.values() else fields
    nested = kept.get(inner) if isinstance(inner, str) else None
    if isinstance(nested, dict) and None in nested.values():
        kept = {**kept, inner: without_nulls(nested)}
    return kept


# === 4. Monitors ======================================================================================================
# uses: 1 2
# How are the device and the network?  A monitor samples facts (IO) and judges them (pure); of requests it knows only
# whether they got through, and nothing of what its verdict leads to.  Each runs on a thread of its own, so that a probe
# which hangs delays no other.
# To add one: subclass Monitor, fill sample and judge, and name it in MONITORS; policy folds it in by its endpoint.

class Probe(NamedTuple):
    """What a probe of an endpoint found."""
    status: int
    models: tuple[Model, ...] | None
    latency_ms: float    # from request to answer, without the time that the server says it worked


class Hysteresis:
    """A level that turns worse after `worse_after` samples in a row, better after `better_after_s` of better ones."""

    def __init__(self, worse_after: int, better_after_s: float) -> None:
        self._worse_after, self._better_after_s = worse_after, better_after_s
        self._level: Level | None = None
        self._worse: list[Level] = []                # the samples in a row that were worse than the level
        self._better: tuple[float, Level] | None = None    # since when all were better, and the worst of them

    def feed(self, level: Level, now: float) -> Level:
        """Return the level that counts after one more sample, taken at `now` (seconds of any clock)."""
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
    """One thing that is watched.  Its own thread alone writes `reading`."""
    name: ClassVar[str] = ""
    worse_after: ClassVar[int] = 2    # samples in a row
    pause_s: ClassVar[float] = 1.0    # between samples

    def __init__(self, settings: Settings, side: Side, endpoint: Endpoint | None = None) -> None:
        self.settings, self.side, self.endpoint = settings, side, endpoint
        self.reading = Reading(side, Level.GOOD, "", {}, endpoint, known=False)
        self.sampled = threading.Event()    # set after the first sample
        self.wake = threading.Event()       # set it for a sample at once
        self._steady, self._fresh = Hysteresis(self.worse_after, settings.better_after_s), self.reading
        self._logged: set[str] = set()      # kinds of failure

    def sample(self) -> Json:
        """Return the facts of now.  May block; any exception keeps the last reading."""
        raise NotImplementedError

    def judge(self, facts: Json) -> Reading:
        """Return the verdict on facts.  Pure."""
        raise NotImplementedError

    def every_s(self) -> float:
        """Return the seconds until the next sample."""
        return self.pause_s

    def step(self, now: float) -> None:
        """Sample, judge, and publish a reading whose level is steady."""
        fresh, before = self.judge(self.sample()), self.reading.reason
        level = self._steady.feed(fresh.level, now)
        reason = fresh.reason if level else ""
        if level > fresh.level:
            reason = before if before.startswith("recovering") else f"recovering: {before}"
        self._fresh, self.reading = fresh, dataclasses.replace(fresh, level=level, reason=reason)

    def fail(self, error: Exception) -> None:
        """Mark the reading as stale, and log why."""
        self.reading = dataclasses.replace(self.reading, facts={**self.reading.facts, f"{self.name}_stale": True})
        self.log_once(error)

    def log_once(self, error: Exception) -> None:
        """Log the first failure of each kind: samples are taken every second."""
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning("monitor %s failed: %s: %s", self.name, kind, error)


# --- 4. The device ----------------------------------------------------------------------------------------------------

# A fact, its words in a reason, and the settings or facts with the values from which local is constrained and critical.
LIMITS = {
    "cpu_percent": ("cpu {:.0f}%", "cpu_constrained_percent", "cpu_critical_percent"),
    "memory_percent": ("memory {:.0f}%", "memory_constrained_percent", "memory_critical_percent"),
    "load_per_core": ("load {:g}", "load_constrained", "load_critical"),
    "gpu_percent": ("gpu {:.0f}%", "gpu_constrained_percent", "gpu_critical_percent"),
    "gpu_memory_percent": ("gpu memory {:.0f}%", "gpu_constrained_percent", "gpu_critical_percent"),
    "battery_percent": ("battery {:.0f}%", "battery_constrained_percent", "battery_critical_percent"),
    "temperature_c": ("temperature {:.0f} C", "temperature_high_c", "temperature_critical_c"),
}


def worst(facts: Json, settings: Settings) -> tuple[Level, str]:
    """Return the worst level of the facts, and a reason that names all that are not well.  A missing fact is fine."""
    values, found = {**vars(settings), **facts}, []
    # A load may be another machine's (LXC shows the host's), or one of threads that sleep (raspberrypi/linux's issue
    # 2881): CPUs that are idle are idle.
    ignored = {"load_per_core"} if facts.get("cpu_percent", 0.0) < 50 else set()
    ignored |= {"battery_percent"} if facts.get("battery_plugged") is not False else set()    # None: unknown
    for fact, (words, constrained, critical) in LIMITS.items():
        if fact in facts and fact not in ignored:
            sign = -1 if fact == "battery_percent" else 1    # a battery is bad when low
            value, strained_from, out_from = (sign * values[name] for name in (fact, constrained, critical))
            level = Level.OUT if value >= out_from else Level.STRAINED if value >= strained_from else Level.GOOD
            found.append((level, words.format(facts[fact])))
    return max((level for level, _ in found), default=Level.GOOD), ", ".join(words for level, words in found if level)


def thresholds(settings: Settings, facts: Json) -> Json:
    """Return the values from which each fact is no longer good, by the words for these levels."""
    values = {**vars(settings), **facts}
    device = {fact: {"constrained": values[constrained], "critical": values[critical]}
              for fact, (_, constrained, critical) in LIMITS.items() if constrained in values}
    return {**device, "latency_ms": {"degraded": settings.latency_degraded_ms},
            "loss_percent": {"degraded": settings.loss_degraded_percent}}


class DeviceMonitor(Monitor):
    """A monitor of this device.  Without psutil nothing is known, and local counts as available."""

    def __init__(self, settings: Settings, *readers: Callable[[Any], Json]) -> None:
        super().__init__(settings, Side.LOCAL)
        self.servers = ServerProcesses()
        self._found: dict[Callable[[Any], Json], Json] = dict.fromkeys(readers, {})    # the last facts of each

    def sample(self) -> Json:
        """Return the facts of all readers.  One that fails after it has worked keeps its last facts, told as stale."""
        import psutil  # takes 31 ms, so not on the way to the first answer; and the server starts without it
        facts: Json = {}
        for read in self._found:
            try:
                self._found[read] = read(psutil)
            except Exception as error:
                if self._found[read]:    # else it is denied, as Android and some containers do
                    self.log_once(error)
                    facts[f"{self.name}_stale"] = True
            facts.update(self._found[read])
        return facts

    def judge(self, facts: Json) -> Reading:
        return Reading(self.side, *worst(facts, self.settings), facts)


class ServerProcesses:
    """The processes of local model servers: what they use for our answers must not read as a busy machine.

    A server listens at a target's port or has a known name.  Its children are part of it; Oblix's parents are not.
    """
    names = ("ollama", ".ollama", "llama", "lm studio", "lms", "vllm")    # NixOS wraps programs with a dot
    afresh_s = 60.0    # between looks at all processes: exec changes a name, as vLLM's workers do; pids are reused
    share = 0.0005     # of a core, that looking for a server which is not seen to listen may cost

    def __init__(self) -> None:
        self.ports: frozenset[int] = frozenset()
        self.pids: frozenset[int] = frozenset()          # of the servers that the last use() found
        self._all: dict[int, tuple[str, int]] = {}       # pid -> name and parent
        self._above: set[int] = set()                    # pids of Oblix and its parents
        self._used_s: dict[Any, float] = {}              # psutil.Process of a server -> its CPU seconds so far
        self._listeners: Collection[int] = ()            # pids
        self._afresh_at = self._listen_at = -math.inf

    def use(self) -> tuple[float, int]:
        """Return the CPU seconds that the servers used since they were seen last, and the bytes that they hold."""
        import psutil
        with contextlib.suppress(Exception):    # a bare container may lack /proc
            self._look()
        used_s, held, before, self._used_s = 0.0, 0, self._used_s, {}
        for pid in self.pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)    # equal to the one of before only if it has begun when that one did
                self._used_s[process] = now_s = sum(process.cpu_times()[:2])    # user and system
                used_s += now_s - before.get(process, now_s)
                memory = process.memory_info()
                held += memory.rss - getattr(memory, "shared", 0)    # mapped weights are page cache, so available
        return used_s, held

    def _look(self) -> None:
        """Find the servers.  Reading a name takes 80 us and a desktop runs 300 processes: only new pids are read."""
        import psutil
        pids, now = set(psutil.pids()), time.monotonic()
        if now >= self._afresh_at:
            self._all, self._afresh_at = {}, now + self.afresh_s
            self._above = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        if now >= self._listen_at and pids.isdisjoint(self._listeners):
            with contextlib.suppress(Exception):    # Android denies it, a bare container may lack it
                self._listeners = listeners(self.ports)
            self._listen_at = now + max(5.0, (time.monotonic() - now) / self.share)
        before, self._all = self._all, {pid: self._all.get(pid, ("", 0)) for pid in pids}
        for pid in pids - before.keys():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                self._all[pid] = process.name().lower(), process.ppid()
        new = {pid for pid, (name, _) in self._all.items() if name.startswith(self.names) or pid in self._listeners}
        found = new = new - self._above
        while new:
            new = {pid for pid, (_, parent) in self._all.items() if parent in new} - found - self._above
            found |= new
        self.pids = frozenset(found)


def listeners(ports: Collection[int]) -> Collection[int]:
    """Return the pids of the processes that listen at these ports, as far as the system shows them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in read_text(f"/proc/net/{name}").splitlines()
            if " 0A " in line]    # it listens
    if rows:
        return holders(frozenset(f"socket:[{row[9]}]" for row in rows if int(row[1].rpartition(":")[2], 16) in ports))
    import psutil  # not on Linux, where it takes 15 us for each connection
    found: list[tuple[Any, int | None]] = []
    try:
        found += [(one, one.pid) for one in psutil.net_connections("tcp")]
    except psutil.AccessDenied:    # macOS shows a user only the own processes, and each by itself
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found += [(one, process.pid) for one in process.net_connections("tcp")]
    return {pid for one, pid in found if pid and one.status == "LISTEN" and one.laddr.port in ports}


@functools.lru_cache(1)
def holders(files: frozenset[str]) -> frozenset[int]:
    """Return the pids of the processes that have one of these files open, as far as Linux shows them."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/fd/*") if files else ():
        with contextlib.suppress(OSError):
            found |= {int(path.split("/")[2])} if os.readlink(path) in files else set()
    return frozenset(found)


class ResourceMonitor(DeviceMonitor):
    """CPU, memory and load of the device and of the model servers' container, less what these servers use."""
    name = "resources"
    limits_s = 10.0    # between looks for limits

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, self._ours, self._cpu, self._memory, self._load)
        self._cores = os.cpu_count() or 1
        self._at, self._passed_s = -math.inf, math.inf    # the last sample, and the seconds before it
        self._cores_ours, self._bytes_ours = 0.0, 0       # that the servers used in these seconds, and hold
        self._load_ours = 0.0
        self._groups: dict[ControlGroup, float] = {}      # with limits -> the CPU seconds that they have used
        self._limits_at = -math.inf

    def _ours(self, _: Any) -> Json:
        """Measure what the servers use, which the other readers subtract, and find out what limits them."""
        used_s, self._bytes_ours = self.servers.use()
        now = time.monotonic()
        self._passed_s, self._at = max(now - self._at, 0.01), now
        self._cores_ours = used_s / self._passed_s
        if now >= self._limits_at:
            self._limits_at = now + self.limits_s
            self._groups = {group: self._groups.get(group, math.nan) for group in control_groups(self.servers.pids)}
        return {"cores": min([self._cores, *(group.cores for group in self._groups)])}

    def _cpu(self, psutil: Any) -> Json:
        others = [psutil.cpu_percent() - 100 * self._cores_ours / self._cores]    # since this thread's last call
        for group, before_s in self._groups.items():
            self._groups[group] = now_s = group.cpu_s()
            others.append(100 * ((now_s - before_s) / self._passed_s - self._cores_ours) / group.cores)
        most = max(0.0, *others)    # a nan is never more
        return {"cpu_percent": round(min(most, 100.0), 1)} if self._passed_s < math.inf else {}

    def _memory(self, psutil: Any) -> Json:
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        rooms = [(memory.total, used - zfs_cache(used)), *(
            (group.memory, group.memory_used()) for group in self._groups if group.memory < memory.total)]
        percents = [100 * (taken - ours) / max(total - ours, 1) for total, taken in rooms
                    for ours in [min(self._bytes_ours, taken)]]
        return {"memory_percent": round(min(max(percents), 100.0), 1),
                "memory_free_mb": max(0, int(min(total - taken for total, taken in rooms))) >> 20}

    def _load(self, psutil: Any) -> Json:
        """Return the load of one minute, less the cores that the servers used, damped as the kernel damps it."""
        keep = math.exp(-self._passed_s / 60)
        self._load_ours = keep * self._load_ours + (1 - keep) * self._cores_ours
        others = max(0.0, psutil.getloadavg()[0] - self._load_ours)
        return {"load_per_core": round(others / self._cores, 2)}


def zfs_cache(used: float, path: str = "/proc/spl/kstat/zfs/arcstats") -> float:
    """Return the bytes in use that ZFS would give back.  A cache that is larger is the host's of this container."""
    arc = read_numbers(path)
    cache = arc.get("size", 0.0)
    return max(0.0, cache - arc.get("c_min", cache)) if cache <= used else 0.0


class ControlGroup(NamedTuple):
    """The limits of a container or a service, by Linux's control groups of version 2 or 1."""
    folder: str
    memory: float    # bytes
    cores: float

    def memory_used(self) -> float:
        """Return the bytes in use, without the page cache, which is given back."""
        used = read_number(self.folder, "memory.current", "memory.usage_in_bytes") or 0.0
        stat = read_numbers(f"{self.folder}/memory.stat")
        cache = sum(stat.get(f"total_{name}", stat.get(name, 0.0)) for name in ("active_file", "inactive_file"))
        return max(0.0, used - cache)

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far, or nan if they are unknown."""
        used_us = read_numbers(f"{self.folder}/cpu.stat").get("usage_usec", math.nan)
        return (read_number(self.folder, "cpuacct.usage") or 1000 * used_us) / 1e9


def control_groups(pids: Collection[int], root: str = "/") -> list[ControlGroup]:
    """Return the groups with limits that processes are in, outer ones too; this process's where none is known."""
    folders, found = dict[str, None](), []
    for line in "\n".join(read_text(f"{root}proc/{pid}/cgroup") for pid in pids or ("self",)).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")    # of 0::/a/b, or 4:cpu,cpuacct:/a/b
        parts = [part for part in path.split("/") if part]
        if ".." not in parts:    # it is outside of what a container is shown
            folders.update(("/".join([f"{root}sys/fs/cgroup", *filter(None, [controller]), *parts[:depth]]), None)
                           for controller in controllers.split(",") for depth in range(len(parts) + 1))
    for folder in folders:
        sizes = [read_number(folder, f"memory.{name}") or math.inf for name in ("max", "high", "limit_in_bytes")]
        memory = min(size if size < 1 << 60 else math.inf for size in sizes)    # 2**63: none
        cpu = read_text(f"{folder}/cpu.max").split() or [
            read_text(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (*map(parse_number, cpu), None)[:2]
        cores = quota / period if quota and period else math.inf
        found += [ControlGroup(folder, memory, cores)] if min(memory, cores) < math.inf else []
    return found


class PowerMonitor(DeviceMonitor):
    """Battery and temperature, where the device has a battery and reports temperatures."""
    name = "power"
    worse_after = 1
    pause_s = 10.0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, charge, temperature)


# What batteries and chargers tell -> whether the device is plugged in; the first that applies.  USB may be too weak.
PLUGGED = (({"Mains 1"}, True), ({"Discharging"}, False),
           ({"USB 1", "Wireless 1", "Charging", "Full", "Not charging"}, True), ({"Mains 0"}, False))


def charge(psutil: Any, folder: str = "/sys/class/power_supply") -> Json:
    """Return the facts of the device's batteries, taken as one by their sizes; none if it has none."""
    paths = glob.glob(f"{folder}/*")
    told, batteries = set[str](), list[tuple[Any, float]]()    # their percents and sizes; of a flat one the size is 0
    for path in paths:
        kind, scope, present, status, online = (
            read_text(f"{path}/{name}") for name in ("type", "scope", "present", "status", "online"))
        if scope != "Device":    # a mouse's
            told |= {status, f"{kind.split('_')[0]} {online}"}
            if kind == "Battery" and present != "0":
                size = read_number(path, "energy_full", "charge_full") or 1e-9
                batteries.append((read_number(path, "capacity"), size))
    plugged = next((plugged for texts, plugged in PLUGGED if texts & told), None)
    if not paths and (battery := psutil.sensors_battery()):
        batteries, plugged = [(battery.percent, 1.0)], battery.power_plugged
    batteries = [one for one in batteries if one[0] is not None and 0 <= one[0] < 255]    # 255 and -1 mean unknown
    if not batteries:
        return {}
    percent = sum(percent * size for percent, size in batteries) / sum(size for _, size in batteries)
    return {"battery_percent": round(min(percent, 100.0), 1), "battery_plugged": plugged}


HOTTEST = 125.0    # degrees, beyond which a sensor is broken: processors are off by then
# Sensors of processors and GPUs, by the names of their drivers and thermal zones; limits of those that tell none; and
# whether a critical temperature is where they throttle.  Elsewhere it is where the device switches itself off.  Other
# parts are warm by design (disks, memory, network cards), have inputs that nothing is connected to (board chips), or
# limits that somebody made up (acpitz, embedded controllers).
CHIPS = (
    (re.compile("coretemp|via_cputemp|nouveau|i915|xe$"), (80.0, 90.0), True),
    (re.compile("amdgpu|radeon"), (95.0, 100.0), True),
    (re.compile("k8temp|k10temp|zenpower"), (95.0, 100.0), False),    # they boost up to 95 degrees by design
    (re.compile(r"\w?cpu|gpu|soc|tj|package|cluster|(big|little|mid)(core|$)|center|core_|main\d|x86_pkg|tcpu|b0d4"
                "|g3d|mtktscpu|(bcm2835|imx|aml|exynos|sunxi)_therm|tsens_tz|scpi_sensors|sfctemp"),
     (80.0, 90.0), False),    # of single-board computers and phones: cpu_thermal, soc-thermal, GPU-therm, cpuss-0 …
)


def temperature_limits(chip: str, high: float | None, critical: float | None) -> tuple[float, float] | None:
    """Return the temperatures from which a sensor is high and critical, or None if it can't be judged."""
    for pattern, usual, throttles in CHIPS:
        if pattern.match(chip.lower().replace("-", "_")):
            if high and critical and 50 <= high <= critical <= HOTTEST and (throttles or high < critical):
                return high, critical if throttles else min(critical, high + 10)
            return usual
    return None


def temperature(psutil: Any, folder: str = "/sys/class/thermal") -> Json:
    """Return the facts of the sensor nearest to its limit, or furthest past it; none if none can be judged."""
    sensors = [(chip, one.current, one.high, one.critical) for chip, group in psutil.sensors_temperatures().items()
               for one in group if one.label != "Tctl" or "Tdie" not in [other.label for other in group]]
    # psutil leaves out the zones where any part, a disk say, has a sensor of its own.
    zones = [(read_text(f"{path}/type"), (read_number(path, "temp") or 0.0) / 1000, None, None)
             for path in glob.glob(f"{folder}/thermal_zone*")]
    for group in (sensors, zones):
        judged = [(current, *limits) for chip, current, high, critical in group
                  if 0 < current < HOTTEST and (limits := temperature_limits(chip, high, critical))]
        if judged:
            current, high, critical = max(judged, key=lambda one: (one[0] - one[1]) / max(one[2] - one[1], 0.1))
            return {"temperature_c": round(current, 1), "temperature_high_c": high, "temperature_critical_c": critical}
    return {}


# --- 4. GPUs ----------------------------------------------------------------------------------------------------------

class Gpu(NamedTuple):
    """Facts of a GPU; those of memory only if it has its own."""
    busy_percent: float | None = None
    used_mb: float | None = None
    total_mb: float | None = None


# The pids of model servers -> the GPUs, and the MB of their memory that these servers hold, or None if unknown
GpuSource = Callable[[frozenset[int]], tuple[list[Gpu], Optional[float]]]


class GpuMonitor(DeviceMonitor):
    """Use of the GPU and of its memory by others than the model servers."""
    name = "gpu"
    window_s = 0.3        # in which the servers' work tells whose the GPU's use is
    own_cores = 0.2       # servers that use more are at work
    share = 0.002         # of a core, that sampling may cost

    def __init__(self, settings: Settings, sources: Sequence[GpuSource] | None = None) -> None:
        super().__init__(settings, self._gpus)
        self.sources = gpu_sources() if sources is None else sources
        self._took_s = 0.0

    def _gpus(self, _: Any) -> Json:
        self.servers.use()
        begun = time.monotonic()
        if self.servers.pids:
            time.sleep(self.window_s)
        asked = time.monotonic()
        gpus, own_mb = self._ask(self.servers.pids)
        done = time.monotonic()
        self._took_s = done - asked
        return gpu_facts(gpus, own_mb, self.servers.use()[0] > self.own_cores * (done - begun))

    def _ask(self, servers: frozenset[int]) -> tuple[list[Gpu], float | None]:
        """Return what the first source finds that knows anything."""
        for source in self.sources:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                gpus, own_mb = source(servers)
                if any(gpu != Gpu() for gpu in gpus):
                    return gpus, own_mb
        return [], None

    def every_s(self) -> float:
        # nvidia-smi takes 30 ms to seconds, most of them in the driver.  One that hangs is asked again in 40 minutes.
        return max(5.0, self._took_s / self.share)


def gpu_facts(gpus: Iterable[Gpu], own_mb: float | None, own_use: bool) -> Json:
    """Return facts of GPUs: the use of the least busy one, which is the model servers' own while they are at work."""
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


# Files of a Jetson's GPU load (jetson_stats' issue 360 and its gpu.py: Nano, Xavier, Orin; a devfreq otherwise).
JETSON_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/*gpu*/load", "sys/class/devfreq/*gpu*/device/load",
                "sys/class/devfreq/*.g[apv]1*b/device/load")
WSL = "/usr/lib/wsl/lib"    # nvidia-smi's folder on WSL, on PATH or not; it knows of no processes there
COMMAND_S = 5.0             # a command that takes longer is killed
APU_MB = 2048               # AMD's built-in GPUs have less of their own: a part of RAM, which models do not use


def gpu_sources(root: str = "/") -> list[GpuSource]:
    """Return the readers of this device's GPUs, best first."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=root + WSL[1:])
    # A reader, and the paths or the command that it reads.  Jetsons have an nvidia-smi too, which says [N/A].
    table: list[tuple[Any, list[str]]] = [
        (jetson, [path for pattern in JETSON_LOADS for path in glob.glob(root + pattern)]),
        (nvidia, [smi, *glob.glob(root + "sys/bus/pci/drivers/nvidia/*:*")] if smi else []),
        (amd, [os.path.dirname(path) for path in glob.glob(root + "sys/class/drm/card*/device/gpu_busy_percent")]),
        (apple, "ioreg -r -d 1 -w 0 -c IOAccelerator".split() if sys.platform == "darwin" else []),
    ]
    return [functools.partial(reader, found) for reader, found in table if found]


def jetson(loads: list[str], _: frozenset[int]) -> tuple[list[Gpu], None]:
    """Read the load per mille.  Other boards write "45@800000000Hz", and run no models on their GPUs."""
    text = read_text(loads[0])
    return [Gpu(int(text) / 10)] if text.isdigit() and int(text) <= 1000 else [], None


def nvidia(paths: list[str], servers: frozenset[int]) -> tuple[list[Gpu], float | None]:
    """Ask nvidia-smi, unless all of its PCI devices are asleep."""
    smi, *devices = paths
    if devices and all(map(asleep, devices)):
        return [Gpu(0.0)], None
    rows = nvidia_rows(smi, "gpu=utilization.gpu,memory.used,memory.total")
    gpus = [Gpu(*row) for row in rows if len(row) == 3]
    if not servers or WSL in smi:    # an unknown server, in a container say, may hold what is in use
        return gpus, None
    held = [row for row in nvidia_rows(smi, "compute-apps=pid,used_gpu_memory") if row[0] is None or row[0] in servers]
    own_mb = None if any(None in row for row in held) else sum(row[-1] or 0.0 for row in held)
    return gpus, own_mb


def nvidia_rows(smi: str, query: str) -> list[list[float | None]]:
    """Return the numbers of lines like "37, 2048, 24564"; DGX Spark: "0, [N/A], [N/A]" (nvitop's pull request 208)."""
    text = run_command(smi, f"--query-{query}", "--format=csv,noheader,nounits")
    return [[parse_number(cell) for cell in line.split(",")] for line in text.splitlines()]


def amd(devices: list[str], _: frozenset[int]) -> tuple[list[Gpu], None]:
    """Read the driver's files.  Built-in GPUs count only where there is no other, and without their memory."""
    gpus = []
    for device in devices:
        busy, used, total = (0.0, None, None) if asleep(device) else (read_number(device, name) for name in (
            "gpu_busy_percent", "mem_info_vram_used", "mem_info_vram_total"))
        gpus.append(Gpu(busy, used and used / 2**20, total and total / 2**20))    # from bytes
    return [gpu for gpu in gpus if (gpu.total_mb or 0.0) >= APU_MB] or [Gpu(gpu.busy_percent) for gpu in gpus], None


def apple(command: list[str], _: frozenset[int]) -> tuple[list[Gpu], None]:
    """Ask ioreg for its IOAccelerators: {…,"Device Utilization %"=31,…}."""
    found = re.findall(r'"Device Utilization %"\s*=\s*(\d+)', run_command(*command))
    return [Gpu(float(percent)) for percent in found], None


def asleep(device: str) -> bool:
    """Return True if a PCI device is switched off until it is needed: it is idle, and a question would wake it."""
    return read_text(f"{device}/power/runtime_status") == "suspended"


def parse_number(text: str) -> float | None:
    """Return the number that a tool or a driver wrote, with or without a unit; None for "[N/A]" and other words."""
    with contextlib.suppress(ValueError):
        return finite(re.sub(r"\s*(%|MiB)$", "", text)) if "-" not in text else None
    return None


def read_text(path: str) -> str:
    """Return the text of a small file, "" if it can't be read."""
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        return file.read(1 << 16).strip()
    return ""


def read_number(folder: str, *names: str) -> float | None:
    """Return the number in the first of these files that holds one, or None."""
    return next((number for name in names if (number := parse_number(read_text(f"{folder}/{name}"))) is not None), None)


def read_numbers(path: str) -> dict[str, float]:
    """Return the numbers of a file whose lines begin with a name and end with its number."""
    rows = [line.split() for line in read_text(path).splitlines()]
    return {row[0]: number for row in rows if row and (number := parse_number(row[-1])) is not None}


def run_command(*command: str) -> str:
    """Return the output of a command.  Raise OSError or SubprocessError if it fails or hangs.

    One that hangs is killed with its children and then left alone, as a driver may hold it for ever.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii",
        errors="replace", start_new_session=True, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    try:
        text, _ = process.communicate(timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        with contextlib.suppress(subprocess.SubprocessError):
            process.communicate(timeout=2.0)    # it is dead at once, or stuck in a driver
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return text


# --- 4. Endpoints, and the watch over all -----------------------------------------------------------------------------

MAX_LATENCIES = 60    # of an endpoint, for the page: 5 minutes of a local server that is well, 30 of a cloud


class ConnectivityMonitor(Monitor):
    """The state of an endpoint: answers, their latency and losses, and the models that it lists."""
    name = "connectivity"
    window = 10         # probes and requests that the share of losses is taken from
    soonest_s = 1.0     # the first probe after trouble; each further one waits twice as long,
    latest_s = 15.0     # up to this
    endpoint: Endpoint

    def __init__(self, settings: Settings, side: Side, endpoint: Endpoint, fetch: Callable[[Endpoint], Probe]) -> None:
        """`fetch` probes an endpoint or raises UpstreamError."""
        super().__init__(settings, side, endpoint)
        self._fetch = fetch
        self._lost: collections.deque[bool] = collections.deque(maxlen=self.window)
        # What probes found lately: the unix time, and the latency in ms, or None where it was lost.
        self.latencies: collections.deque[tuple[float, float | None]] = collections.deque(maxlen=MAX_LATENCIES)
        self._models: tuple[Model, ...] | None = None    # kept while the endpoint does not answer
        self._best_share: dict[str, float] = {}          # model -> the most of it that was seen on the GPU
        self._backoff_s = self.soonest_s
        self._answered = False                           # a request, since a probe found the endpoint unwell

    def sample(self) -> Json:
        facts: Json = {"url": self.endpoint.base_url}
        answered, self._answered = self._answered, False
        try:
            probe = self._fetch(self.endpoint)
            facts.update(status=probe.status, latency_ms=round(probe.latency_ms, 2))
            self._models = self._models if probe.models is None else self._with_spills(probe.models)
        except UpstreamError as error:
            facts.update({"error": error.brief, **({"answers": True} if answered else {})})
        self._count("error" in facts)
        self.latencies.append((round(time.time(), 1), facts.get("latency_ms")))
        return {**facts, "loss_percent": round(100.0 * sum(self._lost) / self.window, 1), "models": self._models}

    def _with_spills(self, models: Iterable[Model]) -> tuple[Model, ...]:
        """Return the models with those marked that Ollama has quietly moved from the GPU to the CPU."""
        best = self._best_share = {model.name: max(model.gpu_share or 0.0, self._best_share.get(model.name, 0.0))
                                   for model in models}
        return tuple([dataclasses.replace(model, moved_to_cpu=(
            model.gpu_share is not None and model.gpu_share < best[model.name] / 2)) for model in models])

    def judge(self, facts: Json) -> Reading:
        level, reason, far = Level.GOOD, "", self.side is Side.CLOUD    # here latency and loss tell of no network
        where = self.endpoint.base_url.split("//")[1]
        if "error" in facts:    # a key that must not list models, or a server that can't, may answer requests
            level, reason = Level.STRAINED if "answers" in facts else Level.OUT, f"{where}: {facts['error']}"
        elif facts["status"] == 401:    # 403 may just mean that this key must not list models
            level, reason = Level.OUT, f"{where}: its key was refused"
        elif far and facts["latency_ms"] > self.settings.latency_degraded_ms:
            level, reason = Level.STRAINED, f"latency {facts['latency_ms']:.0f} ms"
        elif far and facts["loss_percent"] > self.settings.loss_degraded_percent:
            level, reason = Level.STRAINED, f"{facts['loss_percent']:.0f}% of probes lost"
        shown = {fact: value for fact, value in facts.items() if fact != "models"}
        return Reading(self.side, level, reason, shown, self.endpoint, facts.get("models"))

    def _count(self, lost: bool) -> None:
        if not lost and [*self._lost][-2:] == [True, True]:
            self._lost.clear()    # two in a row are an outage, whose length says nothing of the link that is back
        self._lost.append(lost)

    def tell(self, lost: bool) -> None:
        """Take what a request found at the endpoint: evidence as good as a sample's."""
        self._count(lost)
        self._answered = not lost and self._fresh.level is not Level.GOOD
        if lost or self._fresh.level is Level.OUT:
            self._backoff_s = self.soonest_s
            self.wake.set()

    def every_s(self) -> float:
        # The local server is asked often: it is near, and may be started or get a new model at any moment.
        usual = 5.0 if self.side is Side.LOCAL else self.settings.probe_every_s
        if self._fresh.level is Level.GOOD:
            self._backoff_s = self.soonest_s
            return usual if self.reading.level is Level.GOOD else min(self.soonest_s, usual)
        pause_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, self.latest_s)
        return min(pause_s, usual)


MONITORS: tuple[type[Monitor], ...] = (ResourceMonitor, PowerMonitor, GpuMonitor, ConnectivityMonitor)


def monitors_for(settings: Settings, targets: Sequence[Target], fetch: Callable[[Endpoint], Probe]) -> list[Monitor]:
    """Return a server's monitors: of its targets' endpoints, and of the device if a local model runs on it."""
    sides: dict[Endpoint, Side] = {}    # an endpoint of both sides is watched as the first one says
    for target in targets:
        if not target.endpoint.lacks_key:
            sides.setdefault(target.endpoint, target.side)
    here = [urllib.parse.urlsplit(target.endpoint.base_url) for target in targets
            if target.side is Side.LOCAL and target.endpoint.on_device]
    device = [kind(settings) for kind in MONITORS if here and issubclass(kind, DeviceMonitor)]
    for monitor in device:
        monitor.servers.ports = frozenset(url.port or (443 if url.scheme == "https" else 80) for url in here)
    network = [kind(settings, side, endpoint, fetch) for kind in MONITORS if issubclass(kind, ConnectivityMonitor)
               for endpoint, side in sides.items()]
    return [*(monitor for monitor in device if not isinstance(monitor, GpuMonitor) or monitor.sources), *network]


class Watch:
    """The monitors, each run on a thread of its own."""
    apart_s = 0.1    # between two samples at least, however often one is woken

    def __init__(self, monitors: Sequence[Monitor], sampled: Callable[[], None] = lambda: None) -> None:
        """`sampled` is called after each probe, on its monitor's thread, once every monitor has sampled."""
        self.monitors, self._after, self._settled = tuple(monitors), sampled, False
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(monitor, monitor.sampled), daemon=True,
                                          name=f"watch-{monitor.name}") for monitor in monitors]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The readings of now; never waits."""
        return tuple([monitor.reading for monitor in self.monitors])

    def tell(self, endpoint: Endpoint, lost: bool) -> None:
        """Pass on what a request found at an endpoint; never waits."""
        for monitor in self._of(endpoint):
            monitor.tell(lost)

    def look(self, endpoint: Endpoint, seen: Callable[[Reading], bool]) -> None:
        """Probe an endpoint until its reading shows something that has just changed, for a second at most."""
        deadline = time.monotonic() + 1
        for monitor in self._of(endpoint):
            while not seen(monitor.reading) and time.monotonic() < deadline:
                monitor.wake.set()
                if self._stop.wait(0.02):
                    return

    def latencies(self) -> list[Json]:
        """Return how each endpoint is, with what probes found lately, [unix time, ms or None] each; never waits."""
        return [{"provider": each.endpoint.provider, "url": each.endpoint.base_url, "side": each.side.value,
                 "level": WORDS[each.side][reading.level] if reading.known else "unknown", "reason": reading.reason,
                 **reading.facts, "latencies": [*each.latencies]}
                for each in self.monitors if isinstance(each, ConnectivityMonitor) for reading in [each.reading]]

    def first(self, endpoint: Endpoint) -> threading.Event:
        """Return the event of an endpoint's first probe, which is set already for one that is not watched."""
        sampled = threading.Event()
        sampled.set()
        return next((monitor.sampled for monitor in self._of(endpoint)), sampled)

    def _of(self, endpoint: Endpoint) -> list[ConnectivityMonitor]:
        return [monitor for monitor in self.monitors
                if isinstance(monitor, ConnectivityMonitor) and monitor.endpoint == endpoint]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def settle(self, limit_s: float) -> None:
        """Wait until every monitor has sampled once, `limit_s` seconds at most."""
        deadline = time.monotonic() + limit_s
        for monitor in self.monitors:
            monitor.sampled.wait(max(0.0, deadline - time.monotonic()))

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
            except Exception as error:    # whatever psutil or a platform comes up with
                monitor.fail(error)
            if monitor.wake.wait(monitor.every_s()):
                self._stop.wait(self.apart_s)

    def _announce(self, monitor: Monitor) -> None:
        """Report a sample that may matter to others: of an endpoint's models, or the last one that was missing."""
        settled, self._settled = self._settled, all(each.sampled.is_set() for each in self.monitors)
        if self._settled and (monitor.endpoint or not settled):
            self._after()


# === 5. Policy ========================================================================================================
# uses: 1; pure
# Which target first, and when would it answer?  Decides from a snapshot of the readings and of what requests have
# shown.  It has no clock and no memory, so a decision can be replayed; section 8 remembers the values defined here.

TYPICAL_TOKENS = 200    # of an answer whose length nobody knows
QUICK_LOAD_S = 3.0      # a load that takes no longer is not worth leaving the device for

# The seconds that a target rests after a fault, doubled for each further one in a row, and at most.  After a fault of
# the account a person must act, which is not soon.  A missing model may be pulled or named rightly at any time.
RESTS_S = {Fault.TRANSPORT: (1.0, 60.0), Fault.BUSY: (1.0, 60.0), Fault.ACCOUNT: (600.0, 3600.0),
           Fault.NOT_FOUND: (60.0, 60.0)}


@dataclasses.dataclass(frozen=True)
class Breaker:
    """A target's circuit breaker: closed; open while it rests; then half-open, until a trial has shown how it is."""
    failures: int = 0         # in a row
    until: float = 0.0        # when its rest ends, in the seconds of the ledger's clock
    reason: str = ""
    fault: Fault | None = None    # the last one
    last_resort: bool = True    # whether it may be tried even while it rests, when everything else has failed

    def rest_s(self, now: float) -> float:
        """Return the seconds that it rests from now on."""
        return max(0.0, self.until - now)

    def failed(self, error: UpstreamError, now: float) -> Breaker:
        """Return the breaker after a fault.  Requests that fail together count as one, as one does during a rest."""
        if error.fault not in RESTS_S:
            return self
        first_s, most_s = RESTS_S[error.fault]
        resting = self.rest_s(now) > 0
        failures = self.failures if resting else self.failures + 1
        rest_s = min(first_s * 2.0 ** min(failures - 1, 60), most_s)
        asked_s = error.retry_after_s or 0.0
        hopeless = error.fault is Fault.ACCOUNT or asked_s > 0 or resting and not self.last_resort
        until = now + max(rest_s, asked_s)
        if until < self.until:    # the fault before it is what still keeps the target from being asked
            return dataclasses.replace(self, failures=failures, last_resort=not hopeless)
        return Breaker(failures, until, error.brief, error.fault, not hopeless)


class Pace(NamedTuple):    # rebuilt with each answer, as the record is: a dataclass takes more than twice as long
    """How fast a target has answered lately."""
    firsts_s: tuple[float, ...] = ()    # seconds to the first content
    tokens_per_s: float = 0.0           # after it, a moving average
    load_s: float = 0.0                 # the model's last load into memory
    lengths: tuple[int, ...] = ()       # of answers, in tokens
    read: tuple[float, float] = (0.0, 0.0)    # tokens of prompts, and the seconds of reading; (0, 0): unknown
    at: float = 0.0                     # when it was learned, in the seconds of the ledger's clock

    def learned(self, first_s: float | None, tokens: int, seconds: float, read: tuple[float, float] = (0.0, 0.0),
                now: float = 0.0) -> Pace:
        """Return the pace after an answer whose first content took `first_s`, and its tokens `seconds` more."""
        firsts = (*self.firsts_s, first_s)[-20:] if first_s is not None else self.firsts_s
        rate = tokens / seconds if tokens > 1 and seconds > 0.001 else self.tokens_per_s
        rate = 0.7 * self.tokens_per_s + 0.3 * rate if self.tokens_per_s else rate
        before, took_s = self.read
        both = (0.8 * before + read[0], 0.8 * took_s + read[1]) if read[1] else self.read    # a long prompt tells more
        lengths = (*self.lengths, tokens)[-10:] if tokens else self.lengths
        return Pace(firsts, rate, self.load_s, lengths, both, now)    # _replace takes three times as long

    def reading_s(self, size: int) -> float:
        """Return the seconds that it takes to read so many bytes of a prompt; 0 where that is not known."""
        return size / TOKEN_BYTES * self.read[1] / self.read[0] if self.read[0] else 0.0

    def first_s(self, share: float) -> float:
        """Return the seconds within which this share of the first contents came, or 0 if none has been measured."""
        return sorted(self.firsts_s)[int(share * (len(self.firsts_s) - 1) + 0.5)] if self.firsts_s else 0.0


class Work(NamedTuple):
    """How much a request asks of a model."""
    size: int = 0                   # bytes of the prompt; 0: nobody knows
    blocks: tuple[int, ...] = ()    # as ChatRequest.blocks
    conversation: int = 0           # what tells it from others
    tokens: int = TYPICAL_TOKENS    # that the answer is expected to have
    max_output_tokens: int = 0            # that it may have; 0: the client does not say
    whole: bool = False             # the client sees nothing before the end

    def unread(self, cache: Cache) -> int:
        """Return how many bytes of the prompt a model that has this in its cache has to read."""
        same = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.blocks, cache.blocks))])
        goes_on = same == len(cache.blocks) and self.conversation == cache.conversation
        return max(self.size - (cache.size if goes_on else same * BLOCK), 1)


class Cache(NamedTuple):
    """What a local model read and wrote last, and so need not read again."""
    blocks: tuple[int, ...] = ()
    conversation: int = 0
    size: int = 0                   # bytes of the prompt and of the answer


class Record(NamedTuple):
    """What requests have shown of a target."""
    breaker: Breaker = Breaker()
    trial: bool = False                      # a request is finding out whether it is well again
    refused: frozenset[str] = frozenset()    # parameters that the model refuses
    pace: Pace = Pace()
    context: int = 0                         # the context that it was last asked to load, in tokens; 0: its own
    cache: Cache = Cache()


USUAL_WORK, UNTRIED = Work(), Record()


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
    first_limit_s: float = 5.0    # --local-first-s
    whole_limit_s: float = 30.0   # --local-whole-s
    patience_s: float = 60.0

    def record(self, target: Target) -> Record:
        """Return what requests have shown of a target."""
        return self.records.get(target, UNTRIED)


def condition(target: Target, snapshot: Snapshot) -> Condition:
    """Return a target's condition: what the readings say of it, and what requests have shown since."""
    found, record = survey(target, snapshot.readings, target in snapshot.loading), snapshot.record(target)
    if found.use is Eligibility.NO:
        return found
    resting = record.breaker.until > snapshot.now
    if resting or record.trial:
        use = Eligibility.LAST_RESORT if record.breaker.last_resort or not resting else Eligibility.NO
        return Condition("resting", f"rests after: {record.breaker.reason}", Level.OUT, use)
    if target.side is Side.CLOUD or found.state in ("unreachable", "too large"):
        return found
    if found.state in ("cold", "loading"):
        # With --prefer fast `predicted` counts the load, however long it is.
        if 0 < record.pace.load_s < (math.inf if snapshot.prefer == "fast" else QUICK_LOAD_S):
            return found
        return _worse(found, f"{target.model} is {'loading' if found.state == 'loading' else 'not loaded'}", Level.OUT)
    if snapshot.in_flight.get(target, 0) >= snapshot.slots:
        return dataclasses.replace(_worse(found, "busy"), state="busy")
    return found


@functools.lru_cache(32)
def survey(target: Target, readings: tuple[Reading, ...], loading: bool) -> Condition:
    """Return what the readings say of a target.  They change about once a second, and many requests ask in between."""
    reading = reading_of(target, readings)
    model = model_of(target, readings)
    barred = _barred(target, reading, model, None if loading else free_bytes(target, readings))
    if barred:
        return barred
    here = target.side is Side.LOCAL and target.endpoint.on_device    # else the device's load says nothing of it
    speaking = [one for one in readings if one.endpoint == target.endpoint or here and not one.endpoint]
    level = max((one.level for one in speaking), default=Level.GOOD)
    if reading and reading.level is Level.OUT:
        return Condition("unreachable", reading.reason, level)
    reason = "; ".join(one.reason for one in speaking if one.level == level and one.reason)
    found = Condition("ready" if reading and reading.known else "unknown", reason, level, may_load=level < Level.OUT,
                      known=level > Level.GOOD or all(one.known for one in speaking))
    if target.side is Side.LOCAL and (loading or model and model.cold):
        return dataclasses.replace(found, state="loading" if loading else "cold")
    moved_to_cpu = target.side is Side.LOCAL and model and model.moved_to_cpu
    return _worse(found, f"{target.model} went from GPU to CPU") if moved_to_cpu else found


def _worse(found: Condition, reason: str, level: Level | None = None) -> Condition:
    """Return a condition that is one level worse, or as bad as `level`, for one more reason."""
    reasons = "; ".join(filter(None, (found.reason, reason)))
    worse = level or Level(min(found.level + 1, Level.OUT))
    return dataclasses.replace(found, reason=reasons, level=worse, known=True)


def reading_of(target: Target, readings: Iterable[Reading]) -> Reading | None:
    """Return the reading of the target's endpoint, or None."""
    return next((reading for reading in readings if reading.endpoint == target.endpoint), None)


def models_of(endpoint: Endpoint, readings: Iterable[Reading]) -> tuple[Model, ...]:
    """Return the models that an endpoint lists, newest first; none while it has not listed them."""
    return next((reading.models for reading in readings if reading.endpoint == endpoint and reading.models), ())


def model_of(target: Target, readings: Iterable[Reading]) -> Model | None:
    """Return the target's model as its endpoint lists it, or None."""
    name = full_name(target.model)
    return next((model for model in models_of(target.endpoint, readings) if full_name(model.name) == name), None)


def full_name(name: str) -> str:
    """Return the one spelling of an Ollama name, with its tag, and without the host and the namespace if implied."""
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rsplit("/", 1)[-1] else name + ":latest"


def _barred(target: Target, reading: Reading | None, model: Model | None, free: float | None) -> Condition | None:
    """Return the condition of a target that is excluded, with advice, or a last resort, else None.

    A model that does not fit into the free memory is one: Ollama counts exactly, and the swap, and a Mac frees more.
    """
    def out(state: str, advice: str, use: Eligibility = Eligibility.NO) -> Condition:
        return Condition(state, advice, Level.OUT, use)

    if target.endpoint.lacks_key:
        return out("no key", f"no key: set {target.endpoint.key_variable}")
    if target.endpoint.provider != "ollama" or reading is None or reading.models is None:
        return None
    if not model:
        return out("not installed", f"not installed: run `ollama pull {target.model}`")
    if model.remote and target.side is Side.LOCAL:
        return out("remote", "answered by ollama.com, so it is not a local model: name it with --cloud-model")
    if model.cold and free is not None and model.size > free:
        return out("too large", f"would not fit: it takes {model.size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                   Eligibility.LAST_RESORT)
    return None


def free_bytes(target: Target, readings: Sequence[Reading]) -> float | None:
    """Return the bytes that a target's model could be loaded into, or None.  Ollama's other models make room for it."""
    facts = device_facts(readings)
    if not target.endpoint.on_device or "memory_free_mb" not in facts:
        return None
    loaded = [model.size for model in models_of(target.endpoint, readings) if not model.cold]
    free: float = (facts["memory_free_mb"] + facts.get("gpu_memory_free_mb", 0)) * 2**20
    return free + sum(loaded) if max(loaded, default=0) < 1 << 60 else None    # more than there is: nothing is known


def device_facts(readings: Iterable[Reading]) -> Json:
    """Return the facts of all monitors of this device."""
    return {fact: value for reading in readings if not reading.endpoint for fact, value in reading.facts.items()}


def side_condition(side: Side, snapshot: Snapshot, conditions: Mapping[Target, Condition],
                   refusals: Mapping[Target, str]) -> Condition:
    """Return the condition of a side's best target.  Targets that refuse the request count only if all of them do."""
    mine = [target for target in conditions if target.side is side]
    if not mine:
        awaited = [reading for reading in snapshot.readings if reading.side is side and reading.endpoint]
        return Condition("none", f"no {side.value} model", Level.OUT, known=all(reading.known for reading in awaited))
    able = [target for target in mine if target not in refusals] or mine
    return min((conditions[target] for target in able), key=lambda found: (found.use is Eligibility.NO, found.level))


def order_of_sides(local: Level, cloud: Level, prefer: str) -> tuple[Side, ...]:
    """Return the sides to try, in order.  A cloud that is out is left, whatever local's level, as a last resort."""
    if cloud is Level.OUT:
        return (Side.LOCAL,)
    return (Side.LOCAL, Side.CLOUD) if local is Level.GOOD and prefer != "cloud" else (Side.CLOUD, Side.LOCAL)


# --- 5. Time ----------------------------------------------------------------------------------------------------------

SWITCH_BELOW = 0.75    # --prefer fast leaves the table's order only for less than this share of the time
# After so long without an answer, a target's first word is expected in half of the measured time.  Nobody asks a target
# that is thought slow, so it would be thought slow for ever.  A cloud's trouble passes sooner than a device's.
FADE_S = {Side.LOCAL: 6 * 3600.0, Side.CLOUD: 600.0}
CLOUD_FIRST_S = 1.0    # of a cloud that has not been measured: half of them begin within 0.5 s (modelstats.ai)
CLOUD_LEAST_S, CLOUD_WHOLE_S = 10.0, 60.0    # patience with a cloud's stream, at least, and with its whole answer
# Bytes of prompt times bytes of model that a core, or a GPU, reads in a second, at least.  llama.cpp reads 28 tokens/s
# with a 1.5 GB model on a Raspberry Pi's 4 cores; with a 4.9 GB one 6.5 on an N100's 4, 26-50 on laptops' 8, 225 on an
# M4's GPU and 2,365 on a laptop's RTX 4070 (Potato OS bench; brand-o/normiebench 3, 4, 8, 38).
CORE_READS, GPU_READS = TOKEN_BYTES * 8e9, TOKEN_BYTES * 1000e9


class Times(NamedTuple):
    """The seconds from now after which a target is expected to answer; 0 where nothing is measured."""
    first_s: float    # to its first word
    end_s: float


def predicted(target: Target, found: Condition, snapshot: Snapshot, work: Work, share: float = 0.5) -> Times:
    """Return the times at which a target is expected to answer.

    A cloud's first word takes as long as this share of its last ones did.  A local model loads, works off its queue,
    and reads that part of the prompt that is not in its cache; a constrained device is about half as fast as measured.
    """
    record = snapshot.record(target)
    pace, fade = record.pace, 1 + max(0.0, snapshot.now - record.pace.at) / FADE_S[target.side]
    writing_s = work.tokens / pace.tokens_per_s if pace.tokens_per_s else 0.0
    if target.side is Side.CLOUD:
        first_s = pace.first_s(share) / fade
        return Times(first_s, first_s + writing_s)
    unloaded = found.state in ("cold", "loading")
    first_s = (pace.reading_s(work.unread(Cache() if unloaded else record.cache)) or pace.first_s(0.5)) / fade
    slower = 1 if unloaded else found.level if found.state == "busy" else 1 + found.level
    waves = snapshot.in_flight.get(target, 0) // snapshot.slots
    begun_s = (pace.load_s if unloaded else 0.0) + waves * slower * (first_s + writing_s)
    return Times(begun_s + slower * first_s, begun_s + slower * (first_s + writing_s))


def finding_out_s(target: Target, found: Condition, snapshot: Snapshot, work: Work) -> float:
    """Return the seconds to the end of a target's answer, for --prefer fast.

    Of a cloud the slow tail counts, as its usual time is not what makes people wait.  One request finds out about a
    target that has not been measured: for it the time is 0, and for those that come meanwhile infinite.
    """
    pace = snapshot.record(target).pace
    if pace.firsts_s or pace.tokens_per_s or not snapshot.in_flight.get(target):
        return predicted(target, found, snapshot, work, 0.9).end_s
    return math.inf


def guessed_s(target: Target, work: Work, snapshot: Snapshot) -> float:
    """Return a cautious guess of the seconds in which an unmeasured local model reads a prompt, or 0 without facts."""
    model, facts = model_of(target, snapshot.readings), device_facts(snapshot.readings)
    if not model or not target.endpoint.on_device:
        return 0.0
    fits_gpu = facts.get("gpu_memory_free_mb", 0) * 2**20 >= model.size
    on_gpu = model.gpu_share > 0.9 if model.gpu_share is not None else fits_gpu
    per_s = GPU_READS if on_gpu else CORE_READS * facts.get("cores", 0)
    return work.size * model.size / per_s if per_s else 0.0


def waits_s(target: Target, found: Condition, snapshot: Snapshot, work: Work) -> float:
    """Return the seconds that a client would wait for a local target: to the first word, or to a whole answer's end.

    One request at a time finds out about a target that has not been measured, if the guess lets its first word come
    before patience ends: for that one the time is 0.
    """
    times = predicted(target, found, snapshot, work)
    if not snapshot.record(target).pace.read[1]:
        guess_s = guessed_s(target, work, snapshot)
        if not snapshot.in_flight.get(target) and guess_s <= snapshot.patience_s:
            return 0.0
        times = Times(guess_s, guess_s + times.end_s - times.first_s)
    return times.end_s if work.whole else times.first_s


def in_time(plan: Plan, snapshot: Snapshot, work: Work) -> Plan:
    """Return the plan with the clouds before those local targets that would keep the client waiting for much longer.

    A cloud that merely rests is asked as well, by one request at a time.  A whole answer is expected to be as long as
    the longest of late, or as the client allows, since the client sees nothing of it before its end.
    """
    clouds = [target for target in (*plan.order, *plan.last_resort) if target.side is Side.CLOUD and (
        target in plan.order or plan.conditions[target].state == "resting")]
    if not clouds or not plan.order or plan.order[0].side is Side.CLOUD:
        return plan
    what, limit_s = "first word", snapshot.first_limit_s
    if work.whole:
        lengths = [tokens for record in snapshot.records.values() for tokens in record.pace.lengths]
        longest = max(lengths, default=TYPICAL_TOKENS)
        work = work._replace(tokens=min(work.max_output_tokens or longest, longest))
        what, limit_s = "end", snapshot.whole_limit_s
    theirs = predicted(clouds[0], plan.conditions[clouds[0]], snapshot, work)
    cloud_s = (theirs.first_s or CLOUD_FIRST_S) + (theirs.end_s - theirs.first_s if work.whole else 0.0)
    waits = {target: waits_s(target, plan.conditions[target], snapshot, work)
             for target in plan.order if target.side is Side.LOCAL}
    late = [target for target, wait_s in waits.items() if wait_s > max(limit_s, 2 * cloud_s)]
    if not late:
        return plan
    near = [target for target in waits if target not in late]
    return dataclasses.replace(
        plan, order=(*near, *clouds, *late), last_resort=tuple(hope for hope in plan.last_resort if hope not in clouds),
        reason=f"{plan.reason}; local {brief_s(waits[late[0]])} to the {what}, cloud {brief_s(cloud_s)}")


def cloud_patience_s(pace: Pace, stream: bool, patience_s: float) -> float:
    """Return the seconds that a cloud may be silent while a local model could answer."""
    if not stream:
        return max(CLOUD_WHOLE_S, patience_s)
    return max(CLOUD_LEAST_S, min(4 * pace.first_s(0.9), patience_s))


def brief_s(seconds: float) -> str:
    """Return seconds as a reason states them."""
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"


# --- 5. The order -----------------------------------------------------------------------------------------------------

def rank(snapshot: Snapshot, refusals: Mapping[Target, str], only: Side | None = None,
         work: Work = USUAL_WORK) -> Plan:
    """Return the order in which to try targets, and the reason.

    `refusals` are the reasons of targets that can't take this request; `only` keeps to one side, whatever its level.
    """
    conditions = {target: condition(target, snapshot) for target in snapshot.targets}
    sides_are = {side: side_condition(side, snapshot, conditions, refusals) for side in Side}
    sides = (only,) if only else order_of_sides(
        sides_are[Side.LOCAL].level, sides_are[Side.CLOUD].level, snapshot.prefer)
    excluded = {target: why for target, found in conditions.items() if (why := _why_not(target, found, refusals, only))}
    usable = [target for target in snapshot.targets if target not in excluded]
    planned = [target for target in usable if conditions[target].use is Eligibility.YES and target.side in sides]
    fast = snapshot.prefer == "fast"
    seconds = {target: finding_out_s(target, conditions[target], snapshot, work) for target in planned if fast}
    order = sorted(planned, key=lambda target: (sides.index(target.side), conditions[target].level,
                                                seconds.get(target, 0.0)))
    if fast and sides_are[Side.LOCAL].level is not Level.OUT:
        order = _sooner_first(order, seconds)
    last_resort = sorted((target for target in usable if target not in order),
                         key=lambda target: conditions[target].state == "too large")
    plan = Plan(tuple(order), _reason(sides_are, only, [(target, seconds[target]) for target in order if fast]),
                tuple(last_resort), tuple(excluded.items()), conditions)
    return in_time(plan, snapshot, work) if snapshot.prefer == "local" and not only else plan


def rank_one(target: Target, snapshot: Snapshot, refusals: Mapping[Target, str], work: Work) -> Plan:
    """Return the plan as `rank` would if there were this target alone."""
    plan = rank(dataclasses.replace(snapshot, targets=(target,)), refusals, None, work)
    return dataclasses.replace(plan, reason=f"{target.id} {plan.conditions[target].describe(target.side)}")


def in_turn(plans: Sequence[Plan]) -> Plan:
    """Return the plan that follows these one after the other, and then their last resorts."""
    if len(plans) == 1:
        return plans[0]
    order = dict.fromkeys(target for plan in plans for target in plan.order)
    hopes = dict.fromkeys(target for plan in plans for target in plan.last_resort if target not in order)
    excluded = {target: why for plan in plans for target, why in plan.excluded if target not in (*order, *hopes)}
    return Plan(tuple(order), "; ".join(dict.fromkeys(plan.reason for plan in plans)), tuple(hopes),
                tuple(excluded.items()), {target: found for plan in plans for target, found in plan.conditions.items()})


def _why_not(target: Target, found: Condition, refusals: Mapping[Target, str], only: Side | None) -> str:
    """Return the reason why a target is left out, or "" if it is not."""
    if only and target.side is not only:
        return f"{target.side.value} models were not asked for"
    return found.reason if found.use is Eligibility.NO else refusals.get(target, "")


def _reason(sides: Mapping[Side, Condition], only: Side | None, times: Iterable[tuple[Target, float]]) -> str:
    """Return the reason of the order, in a line."""
    levels = ", ".join(f"{side.value} {sides[side].describe(side)}" for side in Side if only in (None, side))
    known = ", ".join(f"{target.id} {seconds:.1f} s" for target, seconds in times if 0 < seconds < math.inf)
    return levels + (f"; kept to {only.value}" if only else "") + (f"; {known}" if known else "")


def _sooner_first(order: list[Target], seconds: Mapping[Target, float]) -> list[Target]:
    """Return the order, with the other side first if its first target is clearly sooner."""
    other = next((target for target in order if target.side is not order[0].side), None)
    if other and seconds[other] < SWITCH_BELOW * seconds[order[0]]:
        return sorted(order, key=lambda target: target.side is not other.side)
    return order


# === 6. Providers =====================================================================================================
# uses: 1 2; pure
# How does each vendor say it?  A provider turns a ChatRequest into its vendor's words, its answer's lines into chunks,
# and its errors into a Fault.  It never sees a socket: a list of byte lines is a full fake.
# To add one: subclass Provider, fill what differs, declare its key in Settings, and name it in PROVIDERS; the contract
# tests do the rest.

Lines = Iterable[Any]                          # bytes without their ends, or Texts
KeepAlive = Union[float, str, None]    # seconds, or a duration as Go writes it; negative: without end
Ask = Callable[[str, Optional[Json]], Json]    # (path, JSON to POST or None) -> the JSON object in the answer

MAX_MODELS = 4096      # of an endpoint; the largest catalogue known has some 500
DETAILS_AT_ONCE = 4    # models that one probe asks for details: each takes Ollama some milliseconds

# What code for a well-formed answer raises for another one.
NOT_IN_ITS_FORMAT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


# --- 6. The provider's interface --------------------------------------------------------------------------------------

class Provider:
    """A vendor's dialect."""
    name: ClassVar[str]
    label: ClassVar[str]
    key_variable: ClassVar[str] = ""
    default_model: ClassVar[str] = ""       # cheap and current; "" where only the endpoint knows
    vendor: ClassVar[str]                   # the host of the vendor's own servers
    chat_path: ClassVar[str]
    models_path: ClassVar[str]              # lists the models, without cost
    translates: ClassVar[bool] = True       # and is then always asked for a stream
    refuses: ClassVar[dict[str, str]] = {}  # parameter -> the reason why it can't be honoured
    renames: ClassVar[dict[str, str]] = {}  # parameter -> its name for a model that refuses this one
    spelt: ClassVar[dict[str, str]] = {}    # word of an error -> the parameter that it means
    takes: ClassVar[tuple[str, ...]] = ()   # parameters that all of its models take
    text_event: ClassVar[TextEvent]
    embed_path: ClassVar[str] = ""          # makes embeddings; "" where nothing does

    def endpoint(self, settings: Settings) -> Endpoint:
        """Return the provider's usual endpoint, with the key that belongs there."""
        raise NotImplementedError

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        """Return the headers of each request to the endpoint, except for its content type."""
        return {**present({"Authorization": endpoint.key and f"Bearer {endpoint.key}"}), **dict(endpoint.headers)}

    def encode(self, request: ChatRequest, target: Target, context: int = 0, keep_alive: KeepAlive = None) -> Json:
        """Return the body of the upstream request, for a request without a `refusal`.

        `context`: the window to load the model for; `keep_alive`: how long to keep it, or the prompt (Claude).
        """
        raise NotImplementedError

    def chunks(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        """Yield what an answer's lines say, in chunks for `in_order`, and the Texts among them.  Raises as `decode`."""
        raise NotImplementedError

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        """Yield the chunks of an answer as OpenAI's reference has them, and the Texts among its lines.

        Raises UpstreamError for errors and an early end, and NOT_IN_ITS_FORMAT for lines that are not.
        """
        return in_order(self.chunks(lines, request), request)

    def whole(self, raw: bytes, request: ChatRequest) -> Json:
        """Return the answer in a whole body as OpenAI's reference has it.  Raises as `decode`."""
        answer = None if _EVENTS.match(raw) else object_in(raw)    # some servers stream unasked
        return answer if answer and is_in_order(answer) else fold(self.decode(raw.splitlines(), request))

    def catalogue(self, ask: Ask, known: dict[str, Json]) -> tuple[Model, ...]:
        """Return the endpoint's models; `known` keeps their details.  Raises what `ask` raises, NOT_IN_ITS_FORMAT."""
        return tuple(map(self.listed, (ask(self.models_path, None).get("data") or [])[:MAX_MODELS]))

    def listed(self, item: Json) -> Model:
        """Return a model as an item of a list tells of it.  Raises NOT_IN_ITS_FORMAT."""
        name, abilities, takes = str(item["id"]), None, item.get("supported_parameters")
        with contextlib.suppress(*NOT_IN_ITS_FORMAT):
            abilities = self.abilities(item)
        return Model(name, created_at(item.get("created") or item.get("created_at")), capabilities=abilities,
                     title=str(item.get("display_name") or item.get("name") or ""),
                     max_context=tokens_in(item, WINDOWS), max_output=tokens_in(item, ANSWERS),
                     parameters=tuple(map(str, takes)) if isinstance(takes, list) else ())

    def abilities(self, item: Json) -> frozenset[str]:
        """Return a model's abilities, in Ollama's words, by an item of a list.  Raises NOT_IN_ITS_FORMAT."""
        takes, inputs = item["supported_parameters"], item["architecture"]["input_modalities"]    # OpenRouter's
        return frozenset(("completion", *(ability for ability, kind in INPUTS.items() if kind in inputs),
                          *(ability for ability, names in PARAMETERS.items() if names[0] in takes)))

    def planned(self, model: Model, asked: int, free: float | None) -> Model:
        """Return a model as clients may plan with it: with all its parameters, and the window that it can have.

        `asked` and `free` are as in `context_for`.
        """
        window, answer = _OPENAI_LIMITS.get(model.name, (0, 0))
        abilities = model.capabilities if model.capabilities and model.is_chat_model else ()
        known = [*self.takes, *(name for ability in abilities for name in PARAMETERS.get(ability, ()))]
        return dataclasses.replace(
            model, provider=self.name, max_context=model.max_context or window, max_output=model.max_output or answer,
            parameters=model.parameters or (tuple(sorted(known)) if abilities else ()))

    def embed(self, inputs: Sequence[Any], request: EmbeddingRequest, target: Target) -> Json:
        """Return the body of the upstream request for the vectors of some of the inputs.  Raises Unsupported."""
        raise Unsupported(f"{self.label} has no embeddings: ask another provider's model for them.", param="model")

    def vectors(self, answer: Json) -> tuple[list[Any], int]:
        """Return the vectors in an answer, in the order of the inputs, and the prompt's tokens.

        Raises NOT_IN_ITS_FORMAT.
        """
        raise NotImplementedError

    def text_event_of(self, request: ChatRequest) -> TextEvent | None:
        """Return the form of the events of text alone in the answer to this request, or None if each must be read."""
        return self.text_event

    def context_for(self, request: ChatRequest, model: Model, asked: int, free: float | None) -> int:
        """Return the window to load the model for, in tokens, or 0 to leave it as it is.  Raises Unsupported.

        `asked` is the window of the last request.  `free` is the memory in bytes for a larger one, None if unknown.
        """
        return 0

    def refuse_part(self, part: Json) -> str | None:
        """Return the reason why a content part that is no text can't be sent, or None."""
        return f"parts of type {part['type']} are not supported"

    def refusal(self, request: ChatRequest) -> Unsupported | None:
        """Return the error for what of the request this provider can't honour, or None."""
        if request.native and request.native.only and not request.native_to(self.name):
            return Unsupported(f"{request.native.only} can only be sent to {request.native.provider}'s models.",
                               param=request.native.only)
        if not self.translates or request.native_to(self.name):
            return None
        for param in sorted(self.refuses.keys() & request.body.keys()):
            return Unsupported(f"{self.label} does not support {param}: {self.refuses[param]}.", param=param)
        for where, part in request.parts():
            why = None if part["type"] in ("text", "refusal") else self.refuse_part(part)
            if why:
                return Unsupported(f"{self.label} can't take {where}: {why}.", param=where)
        for param, known in unknown_values(request):
            return Unsupported(f"{self.label} does not have this value of {param}: it takes {known}.", param=param)
        return None

    def adapt(self, payload: Json, refused: frozenset[str]) -> Json:
        """Return the payload without the parameters that the model is known to refuse, and within its known limits."""
        kept = {name: value for name, value in payload.items() if name not in refused} if refused else payload
        for old, new in self.renames.items() if refused else ():
            if old in payload and old not in kept and new not in refused:
                kept.setdefault(new, payload[old])
        for name, is_limit, most in [entry.partition("<=") for entry in refused]:
            if is_limit and isinstance(kept.get(name), (int, float)):
                kept[name] = min(kept[name], int(most))
        return kept

    def refused_parameter(self, error: UpstreamError, payload: Json) -> str | None:
        """Return the parameter that an error names and that may be left out, `name<=most` with its limit, or None."""
        if error.fault not in (Fault.REFUSED, Fault.TOO_LONG):
            return None
        for name in ("max_tokens", "max_completion_tokens"):
            most = limit_in(error.message, payload.get(name))
            if most:
                return f"{name}<={most}"
        said = re.split(r" one of |did you mean|supported values", error.message, flags=re.I)[0]
        quoted, paths = (re.findall(names, said) for names in (r"[`'\"]([\w.]+)[`'\"]", r"[A-Za-z_][\w.\[\]]*"))
        known = error.fault is Fault.REFUSED and re.search(_UNSUPPORTED, f"{error.message} {error.code}".lower())
        for path in [error.param or "", *quoted, *paths] if known else ():
            name = re.split(r"[.\[]", re.sub(r"^(body|request|parameters?)\.", "", path))[0]
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()    # xAI says presencePenalty
            name = self.spelt.get(name, name)
            if name in payload and (name not in ESSENTIAL or name in self.renames):
                return name
        return None


INPUTS = {"vision": "image", "audio": "audio", "file": "file"}    # ability -> what a prompt may have beside text
PARAMETERS = {"tools": ("tools", "tool_choice", "parallel_tool_calls"), "thinking": ("reasoning", "reasoning_effort")}
# The names by which lists tell of a model's window, of which the first that is there counts, and of its longest answer:
# LM Studio's, OpenRouter's, vLLM's, LM Studio's and Mistral's, Groq's, llama.cpp's, Claude's.
WINDOWS = ("loaded_context_length", "context_length", "max_model_len", "max_context_length", "context_window", "n_ctx",
           "max_input_tokens")
ANSWERS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
_OPENAI_LIMITS = {"gpt-6-luna": (922_000, 128_000)}    # OpenAI's list does not tell (its documentation, 2026-11)


def tokens_in(item: Json, names: Iterable[str]) -> int:
    """Return the number of tokens that an item of a list has under the first of these names, 0 if under none."""
    places = [place for place in (item, item.get("meta"), item.get("top_provider")) if isinstance(place, dict)]
    return next((number for name in names for place in places if (number := count_in(place.get(name)))), 0)


@functools.lru_cache(64)
def is_at(url: str, vendor: str) -> bool:
    """Return True if a URL's host is a vendor's, or one of its regions like eu.api.openai.com."""
    return f".{host_in(url)}".endswith(f".{vendor}")


def present(fields: Json) -> Json:
    """Return the fields that are not empty."""
    return {name: value for name, value in fields.items() if value}


def number_for(text: str) -> int:
    """Return a number of 32 bits for a text, always the same."""
    return binascii.crc32(text.encode("utf-8", "replace"))


def created_at(value: Any) -> int:
    """Return the unix seconds of a number or an RFC 3339 time, or 0 for anything else."""
    if isinstance(value, (int, float)):
        return int(value)
    with contextlib.suppress(ValueError, OverflowError):
        return int(datetime.datetime.fromisoformat(str(value)[:19]).replace(tzinfo=datetime.timezone.utc).timestamp())
    return 0


# --- 6. Errors --------------------------------------------------------------------------------------------------------

def limit_in(message: str, asked: Any) -> int:
    """Return the most tokens of an answer that an error allows, or 0 unless it names fewer than were asked for."""
    if not isinstance(asked, int):
        return 0
    found = next(filter(None, (re.search(pattern, message, re.I | re.S) for pattern in _ROOM)), None)
    if found:    # in either order
        window, prompt = map(int, filter(None, found.groups()))
        numbers = [abs(window - prompt)]
    elif re.search(_MOST, message, re.I) and re.search(_LIMIT, message, re.I):
        digits = re.findall(r"(?<![\[\d,])\d{1,3}(?:,\d{3})+\b|(?<![\w.-])\d{1,9}\b(?![-.]\w)", message)
        numbers = [int(number.replace(",", "")) for number in digits]
    else:
        return 0
    most = max((number for number in numbers if 256 < number < asked), default=0)    # less: the prompt is too long
    return most - 1 if most and "(exclusive)" in message else most    # Gemini


def is_permanent(param: str, error: UpstreamError) -> bool:
    """Return True if the model never accepts the parameter, or more of it; of efforts each knows some."""
    if "<=" in param:    # a number that is not round may be what this prompt leaves of a window
        most = int(param.partition("<=")[2])
        return error.fault is Fault.REFUSED and (most % 256 == 0 or most % 1000 == 0)
    return param in CHANGES or param != "reasoning_effort" and not re.search(_SOMETIMES, error.message.lower())


# What may not be dropped to please a model: without it the answer would be to another question.
ESSENTIAL = frozenset({"model", "messages", "tools", "tool_choice", "response_format", "format", "output_config", "n",
                       "stream", "system", "max_tokens", "max_completion_tokens", "modalities", "functions",
                       "function_call", "audio", "input"})

# What errors say of a parameter, in lower case, and what of one of its values, or of it beside another one.
_UNSUPPORTED = "|".join((
    r"unsupported|not support|unrecogni[sz]ed|deprecated|no longer|extra (input|field)|supported values|out of range",
    r"not (a |an )?(permitted|allowed|accepted|available|valid|known|recogni[sz]ed)|not one of|cannot both",
    r"(unknown|unexpected|invalid)[ _.](name|param|field|argument|keyword|key|propert|option|(enum )?value)",
    r"(must|should|has to) (be|start)|may (only|not) be|only .{0,40}(is|are) allowed",
))
_SOMETIMES = r'invalid (enum )?value|value "|(must|should|has to|may only|may not) be|out of range|\b(when|if|both)\b'
_MOST = r"max(imum)?[_ ]?(completion|new|output)?[_ ]?tokens|(completion|output) ?tokens"    # of an answer
_ROOM = (    # a window, and what a prompt takes of it
    r"(\d+) - (\d+)\)",                                                 # vLLM: "(64000 > 8192 - 100)"
    r"context length (?:is|of) (\d+) tokens.{0,80}?[(:] ?(\d+) (?:tokens )?(?:in|of|from) ",    # OpenAI, SGLang
    r"context length is (\d+) tokens.{0,80}contains at least (\d+)|passed (\d+) input.*context length is only (\d+)",
    r"limit: (\d+) \+ \d+ > (\d+)|<= (\d+)\. given: (\d+)",             # Claude: "190001 + 16384 > 200000"; TGI
)
_LIMIT = r"at most|less than|lower|[<>≤]|maximum|range|between|too large|exceed|up to|above|greater|afford|limit"

_IN_A_STREAM = 0    # the status of an error after a 200, if its code is not a status
_ANY, _BAD, _ILL = range(1000), (_IN_A_STREAM, 400, 412, 422), (_IN_A_STREAM, 400, 404, 422, 500, 502)

# Faults, with what we tell the client instead of the upstream's own fields.
_Meaning = tuple[Fault, Json]
_LONG: _Meaning = (Fault.TOO_LONG, {"status": 400, "type": "invalid_request_error", "code": "context_length_exceeded",
                                    "param": "messages"})
_MONEY: _Meaning = (Fault.ACCOUNT, {"code": "insufficient_quota"})
_KEY: _Meaning = (Fault.ACCOUNT, {"code": "invalid_api_key"})
_GONE: _Meaning = (Fault.NOT_FOUND, {"code": "model_not_found"})
_REFUSED: _Meaning = (Fault.REFUSED, {})
_LOADING: _Meaning = (Fault.LOADING, {"code": "model_loading", "retry_after_s": 5.0})

# Statuses, and words in the message, type, code or param, in lower case -> what they mean; the first rule that fits
# counts.  The words are from errors that users of those services reported.
_RULES: tuple[tuple[Collection[int], str, _Meaning], ...] = (
    (_ANY, r"insufficient[_ ](\w+[_ ])?(quota|balance|credit|fund)|arrear|good standing|余额不足|欠费", _MONEY),
    (_ANY, r"(balance|credits?) (is |are )?(too low|insufficient|exhausted)|credit.balance", _MONEY),    # Claude
    (_ANY, r"api usage limits|spend(ing)?[_ ]limit|billing_error|account.?overdue", _MONEY),    # Claude, xAI, Volcano
    (_ANY, r"billing[_ ](hard[_ ]limit|not[_ ]active)|exceeded_current_quota", _MONEY),    # OpenAI, Kimi
    (_BAD, r"quota (is |has been )?(exhausted|exceeded)|payment required|(trial|subscription)\b.{0,20}expired", _MONEY),
    (_ANY, r"api[ _-]?(key|token)\b.{0,20} (not valid|invalid|expired|disabled|revoked)|api_key_invalid", _KEY),
    (_ANY, r"(invalid|incorrect|expired|missing|no) (x-)?(api|access|auth)[ _-]?(key|token)|invalid_api_key", _KEY),
    (_BAD, r"unauthori[sz]ed|authentication.(failed|error|required)|令牌", _KEY),    # One API
    ((403,), r"moderation|flagged|content policy|usage guidelines", _REFUSED),    # OpenRouter, xAI
    ((402,), r"can only afford", _REFUSED),    # OpenRouter: of max_tokens
    ((401, 402, 403), "", (Fault.ACCOUNT, {})),
    (_BAD, r"location is not supported|unsupported_country", (Fault.ACCOUNT, {})),    # Gemini, OpenAI
    (_BAD, r"(organi[sz]ation|account|team)\b.{0,60}(disabled|restricted|suspended|deactivated)", (Fault.ACCOUNT, {})),
    ((413,), "", (Fault.TOO_LONG, {**_LONG[1], "status": 413})),    # Claude: over 32 MB
    ((429,), r"request too large", _LONG),    # OpenAI: for the tokens of a minute
    (_ILL, r"(prompt|input|request|conversation) (is )?too (long|large)", _LONG),    # Claude, Ollama, Bedrock
    (_ILL, r"maximum (context|prompt|model|sequence|input|allowed input) length", _LONG),    # OpenAI, vLLM, xAI
    (_ILL, r"context length (is|of) only|context_size|contextwindowexceeded", _LONG),    # vLLM, llama.cpp, LiteLLM
    (_ILL, r"(context|prompt)_\w+_exceeded|token limit exceeded|too many (input |prompt )?tokens", _LONG),    # Cohere
    (_ILL, r"(longer|greater|more) than .{0,20}(context|max tokens)", _LONG),    # Together, GLM
    (_ILL, r"exceed\w* (the |this |max\w* |model\S* |available |allowed |number of )*"
           r"(context|prompt|input|token|length|message)", _LONG),    # Kimi, Claude, Gemini, Volcano
    (_ILL, r"(input|prompt|context|message)s?[ _](tokens?|length|window|size)\b.{0,40}exceed", _LONG),    # Copilot
    (_ILL, r"prompt exceed|tokens, exceeding max|total tokens\b.{0,20}exceed|range of input length|超长", _LONG),
    (_ILL, r"tokens? to keep from the initial|keep the first \d+ tokens|`inputs` (tokens|must have)", _LONG),    # TGI
    (_ILL, r"max_tokens must be at least 1, got -", _LONG),    # vLLM, of what the prompt leaves of its window
    (_BAD, r"not a valid model|unknown_model|invalid_model|on-demand throughput", _GONE),    # OpenRouter, Bedrock
    (_BAD, r"(invalid|unknown|no such|unsupported|access) model\b(?! (param|option|setting|input|output))", _GONE),
    (_BAD, r"model_(not_(found|available|supported)|decommissioned|terms_required)", _GONE),    # Together, Groq
    (_BAD, r"model\b.{0,60}(not (exist|found|available|loaded|ready)|no longer|been (deprecated|decom))", _GONE),
    (_BAD, r"no models? (is |are )?loaded|(failed to|error|could not) load(ing)? model|not find (the )?model", _GONE),
    (_BAD, r"(^|; )(the )?(requested )?model (\S+ )?is not supported|model identifier is invalid", _GONE),    # Bedrock
    (_BAD, r"model .{0,20}(crashed|unloaded)|模型不存在", _GONE),    # LM Studio, GLM
    ((404,), r"no endpoints found that", _REFUSED),    # OpenRouter: … support image input
    ((400,), r" (invalid_value|invalid_type|missing_required_parameter) \S+ messages\[", (Fault.CLIENT, {})),
    ((500,), r'option ".*" must be of type', (Fault.REFUSED, {"status": 400})),    # Ollama: a wrong type
    (_ILL, r"jinja|\btemplate|must be at the beginning|\broles\b", _REFUSED),    # llama.cpp, Ollama, vLLM
    (_ILL, r"(image|audio|video|vision|multimodal).{0,20}not support|not support\w* (for )?(image|audio|video|vision|"
           r"multimodal|tool|function)|missing data required|mmproj", _REFUSED),    # LM Studio, llama.cpp
    (_ILL, r"(load|decode|process|open|unsupported|invalid|most \d+) (the )?(image|audio|content)", _REFUSED),
    (_ILL, r"pars(e|ing) (grammar|tool call)|unexpected keyword|unrecognized .{0,10}argument|extra inputs", _REFUSED),
    (_ILL, r"unknown (field|name|parameter|format)", _REFUSED),
    ((400, 415, 422, 501), "", _REFUSED),
    ((503,), r"^loading model|model.* is (currently |still )?loading", _LOADING),    # llama-server
    ((_IN_A_STREAM, 408, 409, 425, 429, *range(500, 1000)), "", (Fault.BUSY, {})),
    (range(400, 500), "", (Fault.NOT_FOUND, {})),    # 404 of a model; 405, 410 of a path
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded", 503: "server_is_overloaded"}
_STATUS_OF = {    # of an error in an answer, by its code or type
    **{word: status for words in (_TYPES, _CODES) for status, word in words.items()}, "invalid_request_error": 400,
    "context_length_exceeded": 400, "billing_error": 402, "not_found_error": 404, "insufficient_quota": 429,
    "overloaded_error": 529}


def classify(status: int, text: str, retry_after_s: float | None = None,
             endpoint: Endpoint | None = None) -> UpstreamError:
    """Return the error behind an upstream's answer of no status 2xx, whichever vendor's shape it has."""
    if 300 <= status < 400:
        return UpstreamError(f"redirected elsewhere ({status}), which is refused: configure the final address")
    key = endpoint.key if endpoint else ""
    text = redact(text, key).strip()
    try:
        told = [*itertools.islice(_said(loads(text)), MAX_WORDS)]
    except ValueError:
        told, text = [], "" if re.match(r"<[!?a-zA-Z]", text) else text    # a page of HTML helps nobody
    message = "; ".join(dict.fromkeys(value for name, value in told if name == "message"))[:MAX_MESSAGE]
    message = message or text[:300] or f"the upstream answered {status} without a message"
    fields: Json = {name: value for name, value in told if name != "message" and value not in ("None", "error")}
    if status == _IN_A_STREAM:
        code, kind = fields.get("code", ""), fields.get("type", "")
        status = _STATUS_OF.get(code) or _STATUS_OF.get(kind) or int(code if re.fullmatch("[45][0-9]{2}", code) else 0)
    words = " ".join([message[:1000], *(fields.get(name, "-") for name in ("code", "type", "param"))]).lower()
    fault, ours = next(meaning for statuses, pattern, meaning in _RULES
                       if status in statuses and re.search(pattern, words))
    if fault is Fault.TOO_LONG and not re.search(r"context (length|window)", message, re.I):
        message += " (context length exceeded)"    # what agents look for before they compact
    status = ours.get("status") or {_IN_A_STREAM: 502, 529: 503}.get(status, status)
    usual = {"type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
             "code": _CODES.get(status)}
    error = UpstreamError(message, fault, retry=None if fault in (Fault.BUSY, Fault.LOADING) else False,
                          **{"status": status, "retry_after_s": retry_after_s, **usual, **fields, **ours})
    if key and error.code == "invalid_api_key":
        error.message = f"The upstream refused the key that Oblix has for it: {message}"
    return error


def _said(body: Any) -> Iterator[tuple[str, str]]:
    """Yield what an error's body says as pairs with "message", "type", "code" or "param"; what is within is last."""
    if isinstance(body, str) and body.startswith(("{", "[")):    # OpenRouter has another's JSON as a text
        with contextlib.suppress(ValueError):
            body = loads(body)
    if isinstance(body, str) and body.strip():
        yield "message", body.strip()
    for item in body if isinstance(body, list) else ():
        yield from _said(item)
    if not isinstance(body, dict):
        return
    if isinstance(body.get("loc"), list):    # FastAPI's validation
        yield "message", f"{'.'.join(str(part) for part in body['loc'] if part != 'body')}: {body.get('msg')}"
        return
    for name, field in _NAMES.items():
        if re.fullmatch(r"[\w.\[\]-]{1,100}", str(body.get(name) or "")):    # and not a sentence of a prompt
            yield field, str(body[name])
    for name in _TEXTS:
        yield from _said(body.get(name))
    if "signin_url" in body:    # Ollama, asked for a model of ollama.com
        yield "message", "run `ollama signin` where Ollama runs"


_NAMES = {"type": "type", "code": "code", "error_code": "code", "reason": "code", "param": "param"}
_TEXTS = ("error errors message Message msg detail details metadata raw base_resp status_msg error_msg error_message "
          "error_description").split()
MAX_WORDS, MAX_MESSAGE = 64, 4000    # texts and names that are read of an error, characters of its message


def redact(text: str, key: str) -> str:
    """Return the text without the key, and without anything else that looks like one."""
    return re.sub(r"\bsk-[\w*-]{4,}", "sk-…", text.replace(key, "…") if key else text)


# --- 6. Reading events ------------------------------------------------------------------------------------------------

def object_in(text: str | bytes) -> Json | None:
    """Return the JSON object that a text is, or None."""
    try:
        value = loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def sse_data(lines: Lines) -> Iterator[Any]:
    """Yield the data of each server-sent event, and Texts as they are.

    One that the stream's end cuts is dropped (WHATWG HTML, 9.2.6).  A body without events is one, and [DONE].
    """
    data, size = list[bytes](), 0    # of the event
    streams: bool | None = None      # until its first line
    for line in lines:
        if isinstance(line, Texts):
            yield line
            continue
        if streams is None and line.strip():
            streams, line = bool(_EVENTS.match(line)), line.removeprefix(b"\xef\xbb\xbf")
        if streams is False or line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ") if streams else line)
            size += len(data[-1]) + 1
            most = MAX_LINE_BYTES if streams else MAX_BODY_BYTES
            if size > most + 1:
                raise UpstreamError(f"a piece of the answer is larger than {most >> 20} MiB")
        elif data and not line:
            yield b"\n".join(data).decode("utf-8", "replace")
            data, size = [], 0
    if streams is False:
        yield from (b"\n".join(data).decode("utf-8", "replace"), "[DONE]")


_EVENTS = re.compile(rb"\s*(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")    # how a body of events begins


def event_of(text: str | bytes) -> Json:
    """Return the JSON object of one event.  Raises UpstreamError for other JSON, and for an error in the answer."""
    event = object_in(text)
    if event is None:
        raise UpstreamError("a piece of the answer is not a JSON object", code="bad_upstream_answer")
    words = event.get("message", event.get("detail", event.get("msg")))    # the last: Zhipu
    base = event.get("base_resp")    # MiniMax; `errors`: Workers AI; flat: vLLM's older versions
    is_flat = "error" in (event.get("object"), event.get("type")) or isinstance(words, str) and "choices" not in event
    if is_flat or event.get("error") or event.get("errors") or isinstance(base, dict) and base.get("status_code"):
        raise classify(_IN_A_STREAM, dumps(event).decode())
    return event


def cut() -> UpstreamError:
    """Return the error of a stream that ends without its protocol's end mark."""
    return UpstreamError("the connection was closed before the answer was complete", code="upstream_cut")


def finish_of(reason: str) -> str:
    """Return a vendor's finish reason in OpenAI's words.  Raises UpstreamError if the answer broke off for it."""
    finish = next(finish for pattern, finish in _FINISH if re.search(pattern, reason.lower()))
    if not finish:
        raise UpstreamError(f"the upstream broke off its answer, for the reason {reason[:60]!r}", Fault.BUSY,
                            code="upstream_cut")
    return finish


_FINISH = (    # words in a reason -> OpenAI's reason, "" for an answer that broke off; the first that fits counts
    # error (OpenRouter), abort (vLLM, MiniMax), network_error (GLM), insufficient_system_resource (DeepSeek),
    # "function_call_filter: MALFORMED_FUNCTION_CALL" (Gemini)
    ("error|abort|cancel|fail|interrupt|insufficient|malformed|unexpected|overload|unavailable|time.?out|rate.lim", ""),
    ("length|max|limit|window|context|pause|incomplete|repetition", "length"),    # model_length (Mistral), pause_turn
    ("filter|safety|sensitive|refus|recitation|prohibit|block|guardrail|moderation|spii|language", "content_filter"),
    ("function_call", "function_call"), ("tool", "tool_calls"), ("", "stop"),     # eos, end_turn, COMPLETE
)


def chunk_of(finish_reason: str | None = None, logprobs: Json | None = None, **delta: Any) -> Chunk:
    """Return a chunk of choice 0."""
    return {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]}


def tool_chunk(index: int, arguments: Any, id: str | None = None, name: str | None = None) -> Chunk:
    """Return a piece of a tool call."""
    return chunk_of(tool_calls=[{"index": index, "id": id, "function": {"name": name, "arguments": arguments}}])


def told_of_reading(timings: Any, unread: float) -> tuple[float, float]:
    """Return the tokens of a prompt that were read and the seconds that it took; (0, 0) where a server tells nothing.

    llama.cpp counts without what was cached.  Ollama counts all; since 2026-08 it tells how much was cached (its pull
    requests 16428 and 17943), before that it is believed to be all but the share `unread`.
    """
    told = timings if isinstance(timings, dict) else {}
    took_ms, took_ns, read, total, cached = [
        number if isinstance(number, (int, float)) and 0 < number < 1 << 53 else 0 for number in map(told.get, (
            "prompt_ms", "prompt_eval_duration", "prompt_n", "prompt_eval_count", "prompt_eval_cached_count"))]
    read = read or (total - cached if told.get("prompt_eval_cached_count") is not None else total * unread)
    took_s = took_ms / 1e3 or took_ns / 1e9
    return (read, took_s) if took_s and read > 0 else (0.0, 0.0)


# An event with a text and nothing else, in each provider's own form.  Such events pass unread, which takes a tenth of
# the time (2 us for 20).  So a pattern must match no event of which `decode` would make anything but the text.
# U+0085, U+2028 and U+2029 are line ends to clients that use str.splitlines (httpx does): a text with one is read.
_IN_TEXT = rb'[^"\\\x00-\x1f\xc2\xe2]*'
_TEXT = (rb'"((?!")' + _IN_TEXT + rb'(?:(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\xc2(?!\x85)|\xe2(?!\x80[\xa8\xa9]))'
         + _IN_TEXT + rb')*)"')
_WORD = rb'"[^"\\\x00-\x1f\x7f-\xff]*"'
# The fields around an OpenAI text, in any order: vLLM, llama.cpp and OpenAI itself differ in it.
_OF_EVENT = (rb'(?:"(?:id|model|system_fingerprint|service_tier|obfuscation)": ?(?:null|' + _WORD
           + rb')|"object": ?"chat\.completion\.chunk"|"created": ?[0-9]+|"(?:usage|prompt_token_ids)": ?null)')
_OF_CHOICE = rb'(?:"index": ?0|"(?:logprobs|finish_reason|stop_reason|token_ids|matched_stop)": ?null)'
_OPENAI_TEXT = re.compile(
    rb'data: ?\{(?:' + _OF_EVENT + rb', ?)*"choices": ?\[\{(?:' + _OF_CHOICE
    + rb', ?)*"delta": ?\{(?:"role": ?"assistant", ?)?"content": ?' + _TEXT + rb'\}(?:, ?' + _OF_CHOICE
    + rb')*\}\](?:, ?' + _OF_EVENT + rb')*\}\n\n')
_OLLAMA_TEXT, _GENERATED_TEXT = [re.compile(
    rb'\{"model": ?' + _WORD + rb', ?"created_at": ?' + _WORD + rb', ?' + before + _TEXT + after
    + rb', ?"done": ?false\}\n') for before, after in (
        (rb'"message": ?\{"role": ?"assistant", ?"content": ?', rb'\}'), (rb'"response": ?', rb''))]
_CLAUDE_TEXT = re.compile(
    rb'event: ?content_block_delta\ndata: ?\{"type": ?"content_block_delta", ?"index": ?[0-9]+, ?"delta": ?\{"type": ?'
    rb'"text_delta", ?"text": ?' + _TEXT + rb'\} *\}\n\n')


# --- 6. Chunks in order -----------------------------------------------------------------------------------------------

def in_order(chunks: Iterable[Any], request: ChatRequest) -> Iterator[Any]:
    """Yield an answer's chunks as OpenAI's reference has them, and Texts as they are.  Raises as `decode`."""
    # Finish reasons and the usage come at the end: some servers say more after either, or either twice.
    taken = {str(call.get("id")) for message in request.body.get("messages", ()) if "tools" in request.body
             for call in message.get("tool_calls") or ()}
    choices: dict[int, _Choice] = collections.defaultdict(lambda: _Choice(taken))
    counted: Chunk = {}
    for chunk in chunks:
        if isinstance(chunk, Texts):
            yield chunk
            continue
        usage, told = chunk.pop("usage", None), choices_of(chunk)
        for place, choice in enumerate(told):
            choice["index"] = place if choice.get("index") is None else choice["index"]
            usage = choice.pop("usage", None) or usage    # Kimi
        if usage and isinstance(usage, dict):
            prompt, completion, total = (count_in(usage.get(name)) for name in _COUNTS)
            counts = prompt, completion, total or prompt + completion    # MiniMax tells the total alone
            counted = {**chunk, "choices": [], "usage": {**usage, **dict(zip(_COUNTS, counts))}}
        chunk["choices"] = [choice for choice in told if choices[choice["index"]].take(choice, chunk)]
        if chunk["choices"]:    # Azure begins with an event that has none
            yield chunk
    if not choices:
        raise UpstreamError("the answer has no choices", code="bad_upstream_answer")
    for one in choices.values():
        yield from one.end()
    if counted:
        yield counted


_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


def is_in_order(answer: Json) -> bool:
    """Return True if a whole answer is as `in_order` and `fold` would make it, as most are: these two take 20 us."""
    usage = answer.get("usage")
    return (_ERRORS.isdisjoint(answer) and answer.get("object") == "chat.completion" and bool(answer.get("choices"))
            and isinstance(usage, dict) and all(
                type(count) is int and count == count_in(count) for count in map(usage.get, _COUNTS)) and all(
                type(choice.get("index")) is int and isinstance(message.get("content"), str)
                and message.get("role") == "assistant" and choice.get("finish_reason") in _PLAIN_ENDS
                and choice.get("logprobs", 0) is None and "error" not in choice
                and "refusal" in message and _REMADE.isdisjoint(message)
                for choice in answer["choices"] for message in [choice.get("message") or {}]))


_ERRORS = frozenset({"error", "errors", "base_resp"})
_PLAIN_ENDS = ("stop", "length", "content_filter")
_REMADE = frozenset({"tool_calls", "function_call", "reasoning", "reasoning_content"})    # may have to change


class _Choice:
    """One choice of an answer, as far as it has come."""

    def __init__(self, taken: set[str]) -> None:
        """`taken` are the ids of tool calls in the conversation."""
        self._taken, self._finish, self._said, self._is_legacy = taken, "stop", False, False
        self._calls: list[_Call] = []       # in their order, as soon as they have a name
        self._known: dict[Any, _Call] = {}    # by the server's id, and by its index, or by the place in a chunk
        self._last: tuple[Chunk, Json] = ({}, {})    # the chunk with the finish reason, and the choice in it

    def take(self, choice: Json, chunk: Chunk) -> bool:
        """Put a chunk's choice in order.  Return False if it says nothing before the end.  Raises as `decode`."""
        if choice.get("error"):    # OpenRouter
            raise classify(_IN_A_STREAM, dumps({"error": choice["error"]}).decode())
        message = choice.pop("message", None)    # of a whole answer; MiniMax repeats that at the end of a stream
        delta = self._delta(choice.get("delta") or (not self._said and message) or {})
        self._said, reason = self._said or any(delta.values()), choice.get("finish_reason")
        delta = delta if self._last[0] else {"role": "assistant", **delta}
        if choice.get("logprobs"):
            complete_logprobs(choice["logprobs"])
        choice.update(delta=delta, finish_reason=None)
        if reason:
            self._finish = finish_of(str(reason))
        if reason or not self._last[0]:
            self._last = chunk, {**choice, "logprobs": None if delta else choice.get("logprobs")}
        return bool(delta) or not reason

    def _delta(self, said: Json) -> Json:
        """Return what a delta, or a message, says besides its role."""
        delta = {name: value for name, value in said.items() if value is not None and name != "role"}
        if isinstance(delta.get("reasoning"), str):    # vLLM, OpenRouter, Ollama's /v1
            thought = delta.pop("reasoning")
            delta["reasoning_content"] = delta.get("reasoning_content") or thought
        if isinstance(delta.get("content"), (list, dict)):     # Mistral's reasoning models
            parts = [delta["content"]] if isinstance(delta["content"], dict) else delta["content"]
            thought = [part for part in parts if isinstance(part, dict) and part.get("type") in _THOUGHTS]
            delta["content"] = [part for part in parts if part not in thought]
            delta.update(present({"reasoning_content": text_in(thought)}))
        for name in ("content", "reasoning_content", "refusal"):
            if not isinstance(delta.get(name, ""), str):
                delta[name] = text_in(delta[name])
        self._is_legacy = self._is_legacy or bool(delta.get("function_call"))
        calls = delta.pop("tool_calls", ())
        calls = [calls] if isinstance(calls, dict) else calls
        pieces = [self._piece(call, place) for place, call in enumerate(calls)]
        return {**delta, **present({"tool_calls": [*filter(None, pieces)]})} if pieces else delta

    def _piece(self, piece: Json, place: int) -> Json | None:
        """Return a piece of a tool call in order, or None if it says nothing, or not yet the name."""
        kind, field = ("custom", "input") if piece.get("custom") else ("function", "arguments")
        inner = piece.get(kind) or piece    # Workers AI has no `function` around it
        id, name = (str(value or "") for value in (piece.get("id"), inner.get("name")))
        text = inner.get(field)
        text = text if isinstance(text, str) else "" if text is None else dumps(text).decode()
        call, text = self._call(id, name, text, piece.get("index"), place)
        call.texts.extend([text] if text else ())
        rest = {name: value for name, value in piece.items() if name not in _OF_CALL}    # Gemini's extra_content
        if call.number >= 0:
            return {"index": call.number, **rest, kind: {field: text}} if text or rest else None
        call.name = call.name or name
        if not call.name:
            return None
        call.number, call.is_json = len(self._calls), kind == "function"
        self._calls.append(call)
        return {"index": call.number, "id": self._new_id(id or call.id), "type": kind, **rest,
                kind: {"name": call.name, field: "".join(call.texts)}}

    def _call(self, id: str, name: str, text: str, index: Any, place: int) -> tuple[_Call, str]:
        """Return the call that a piece belongs to, perhaps a new one, and what it adds to the arguments.

        Servers leave indices out or give parallel calls the same one (Gemini, ollama#15457, ollama#7881), and repeat
        ids and names.  Older vLLM has a new id in each piece of a call, but the name in the first piece only.
        """
        key = place if index is None else index
        call, other = self._known.get(key), self._known.get(id) if id else None
        if other and not (call and call.id == id) and not (name and index not in (None, other.index)):
            call = other    # else the server gave two calls one id
        added = call.added(id, name, text) if call else None
        if not call or added is None:
            call, added = _Call(index, id, name or (call.name if call else "")), text
        self._known[key] = self._known[id or key] = call
        return call, added

    def _new_id(self, id: str) -> str:
        """Return an id that the conversation has not had yet: the server's, if that is one."""
        numbers = itertools.count(len(self._taken))
        while not id or id in self._taken:
            id = f"call_{next(numbers)}"
        self._taken.add(id)
        return id

    def end(self) -> Iterator[Chunk]:
        """Yield the last chunks: the arguments of calls that have come without, and the finish reason."""
        if any(call.texts and call.number < 0 for call in self._known.values()):
            raise UpstreamError("a tool call came without its name", code="bad_upstream_answer")
        chunk, choice = self._last
        bare = [{"index": call.number, "function": {"arguments": "{}"}} for call in self._calls
                if call.is_json and not "".join(call.texts).strip()]
        finish = self._finish
        if finish in ("stop", "tool_calls", "function_call"):    # some say stop, or the same word always
            finish = "tool_calls" if self._calls else "function_call" if self._is_legacy else "stop"
        last: list[tuple[Json, str | None]] = [({"tool_calls": bare}, None)] if bare else []
        for delta, reason in [*last, ({}, finish)]:
            yield {**chunk, "choices": [{**choice, "delta": delta, "finish_reason": reason}]}


_THOUGHTS = ("thinking", "reasoning")    # types of a content's parts
_OF_CALL = frozenset({"index", "id", "type", "function", "custom", "name", "arguments"})


class _Call:
    """A tool call of an answer, as far as it has come."""

    def __init__(self, index: Any, id: str, name: str) -> None:
        self.index, self.id, self.name = index, id, name    # as the server has them
        self.number, self.is_json = -1, False               # its place among the calls, once its name has come
        self.texts: list[str] = []                          # of its arguments
        self._named_again = False

    def added(self, id: str, name: str, text: str) -> str | None:
        """Return what a piece in this call's place adds to the arguments, or None if it belongs to another call."""
        if name and (self.id and id and id != self.id or self.name and name != self.name):
            return None
        may_end = (name or self._named_again) and 0 < len(self.texts) <= 1000 and self.texts[-1].rstrip().endswith("}")
        if not may_end or object_in("".join(self.texts)) is None:    # not asked of very many pieces
            return text
        self._named_again = not text.strip()    # this call once more, or the beginning of another of its name
        return "" if self._named_again or id and (id, text) == (self.id, "".join(self.texts)) else None


def text_in(value: Any) -> str:
    """Return the text in a content's part, or in a list of them, at any depth.  Raises TypeError."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return text_in([value.get(name) or "" for name in ("text", *_THOUGHTS)])
    return "".join(map(text_in, value))


def complete_logprobs(logprobs: Any) -> None:
    """Add to log probabilities what OpenAI's reference has and some servers, like Ollama, leave out."""
    with contextlib.suppress(*NOT_IN_ITS_FORMAT):
        logprobs.setdefault("refusal", None)
        for token in logprobs.get("content") or ():
            token["top_logprobs"] = token.get("top_logprobs") or []
            for one in (token, *token["top_logprobs"]):
                one.setdefault("bytes", [*one["token"].encode("utf-8", "replace")])


def fold(chunks: Iterable[Chunk]) -> Json:
    """Return the chat.completion of a stream's chunks, which are in order, and at least one."""
    whole: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        whole.update(chunk)
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"index": 0, "message": {}, "logprobs": {}})
            delta, logprobs = piece.pop("delta"), piece.pop("logprobs", None)
            _join(choice["message"], delta)
            _join(choice["logprobs"], logprobs if isinstance(logprobs, dict) else {})
            choice.update(piece)
    for choice in choices.values():
        calls: dict[int, Json] = {}
        for call in choice["message"].pop("tool_calls", ()):
            _join(calls.setdefault(call.pop("index"), {}), call)
        said = {"role": "assistant", "content": "", "refusal": None, **choice["message"]}
        if calls:
            said.update(content=said["content"] or None, tool_calls=[*calls.values()])
        choice.update(message=said, logprobs=choice["logprobs"] or None)
    return {**whole, "object": "chat.completion", "choices": [*choices.values()]}


def _join(whole: Json, piece: Json) -> None:
    """Add a piece of an object to the whole, as the SDKs do: texts and lists grow; of anything else the last counts."""
    for name, value in piece.items():
        known = whole.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            _join(known, value)
        elif isinstance(known, (str, list)) and isinstance(value, type(known)):
            whole[name] += value
        elif value is not None or name not in whole:
            whole[name] = value


# --- 6. What is asked -------------------------------------------------------------------------------------------------

def needs_of(request: ChatRequest) -> frozenset[str]:
    """Return what a model must be capable of for a request, in Ollama's words (/api/show, capabilities)."""
    return frozenset(present({"vision": any(part["type"] == "image_url" for _, part in request.parts()),
                              "tools": chosen_tools(request.body)[0] and not forced_tools(request.body)}))


def unknown_values(request: ChatRequest) -> Iterator[tuple[str, str]]:
    """Yield the parameters whose values only some OpenAI-compatible servers know, with the values that all know."""
    body, effort, choice = request.body, effort_of(request.body), chosen_tools(request.body)[1]
    if effort and effort not in EFFORTS:
        yield "reasoning_effort", ", ".join(EFFORTS)
    if body.get("response_format", {"type": "text"})["type"] not in JSON_FORMS:
        yield "response_format", ", ".join(JSON_FORMS)
    if any(tool["type"] != "function" for tool in body.get("tools", ())):
        yield "tools", "tools of type function"
    if choice not in CHOICES and not name_of(choice):
        yield "tool_choice", f"{', '.join(CHOICES)} or a tool's name"
    if choice not in ("none", "auto") and not forced_tools(body):
        yield "tool_choice", "one of the tools"
    for number, message in enumerate(request.messages):
        if message["role"] not in ROLES:
            yield f"messages[{number}].role", ", ".join(ROLES)
        if "tool_calls" in message and not all(map(called_in, message["tool_calls"])):
            yield f"messages[{number}].tool_calls", "calls of functions"


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
CHOICES = ("none", "auto", "required")
JSON_FORMS = ("text", "json_object", "json_schema")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def effort_of(body: Json) -> str | None:
    """Return the effort that a request asks for, or None for the model's own."""
    effort = body.get("reasoning_effort")
    return None if effort in ("", "auto", "default") else effort


def name_of(tool: Any) -> str:
    """Return the name in a tool, or in the choice of one: {"type": kind, kind: {"name": ...}}; "" without one."""
    inner = tool.get(str(tool.get("type"))) if isinstance(tool, dict) else None
    return str(inner.get("name") or "") if isinstance(inner, dict) else ""


def chosen_tools(body: Json) -> tuple[list[Json], str | Json]:
    """Return the tools that tool_choice leaves, and the choice among them: a word, or the named tool."""
    tools, choice = body.get("tools", []), body.get("tool_choice", "auto")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = {name_of(tool) for tool in choice["allowed_tools"]["tools"]}
        tools, choice = [tool for tool in tools if name_of(tool) in allowed], choice["allowed_tools"]["mode"]
    return ([] if choice == "none" else tools), "required" if choice == "any" else choice    # Mistral's word


def forced_tools(body: Json) -> list[Json]:
    """Return the functions of which the answer must be a call; none where it may be a text."""
    tools, choice = chosen_tools(body)
    if isinstance(choice, dict):
        tools = [tool for tool in tools if name_of(tool) == name_of(choice)]
    return [] if choice in ("none", "auto") else [*{name_of(tool): tool["function"] for tool in tools}.values()]


def json_wanted(body: Json) -> Json | None:
    """Return the JSON schema that the answer must fit, {} for any JSON, or None for a text."""
    form = body.get("response_format", {"type": "text"})
    if form["type"] == "text":
        return None
    schema = (form["json_schema"] if isinstance(form.get("json_schema"), dict) else form).get("schema")
    return schema if isinstance(schema, dict) else {}    # beside the type, as llama.cpp and Together have it


def data_url(url: str) -> tuple[str, str] | None:
    """Return (media type, base64) of a data: URL, or None for any other."""
    found = re.match(r"data:([^;,]*)[^,]*;base64,", url, re.I)
    return (found[1].lower(), url[found.end():]) if found else None


def without_deprecated(messages: Sequence[Json]) -> list[Json]:
    """Return the messages as Ollama and Claude are told of them: without what is deprecated, with ids and names.

    Results without ids answer the calls of their names, or all calls if they have no names, in turn.
    """
    converted, names = list[Json](), dict[str, str]()    # of calls, by id
    waiting: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)    # ids by name; "": all
    for number, message in enumerate(messages):
        message = dict(message)
        if message.get("refusal") and not message.get("content"):
            message["content"] = message["refusal"]
        calls = message.get("tool_calls", ())
        calls = [{"function": message["function_call"]}] if "function_call" in message else calls
        message["tool_calls"] = [{"id": call.get("id") or f"call_{number}_{place}", "function": function_in(call)}
                                 for place, call in enumerate(calls)]
        for call in message["tool_calls"]:
            name = names[call["id"]] = call["function"]["name"]
            waiting[name].append(call["id"])
            waiting[""].append(call["id"])
        if message["role"] in ("tool", "function"):
            name = message.get("name") or ""
            id = message.get("tool_call_id") or (waiting[name].popleft() if waiting[name] else f"call_{number}")
            message.update(role="tool", tool_call_id=id, name=name or names.get(id, ""))
        converted.append(message)
    return converted


def function_in(call: Json) -> Json:
    """Return the name and the arguments of a message's tool call, as an object whatever the model once wrote."""
    inner = called_in(call)
    return {"name": inner["name"], "arguments": arguments_in(inner.get("arguments", inner.get("input")))}


def arguments_in(said: Any) -> Json:
    """Return a call's arguments as an object, whatever the model once wrote."""
    whole = object_in(said) if isinstance(said, str) and said else said or {}
    return whole if isinstance(whole, dict) else {"_raw": said}


def called_in(call: Json) -> Json:
    """Return what a tool call names, or {} for a kind that is no function or custom tool."""
    inner = call.get("function") or call.get("custom")
    return inner if isinstance(inner, dict) and isinstance(inner.get("name"), str) else {}


# --- 6. Tools and schemas ---------------------------------------------------------------------------------------------

def call_schema(tools: Sequence[Json]) -> Json:
    """Return the JSON schema of a call: of the one tool's arguments, or of the name of a tool and its arguments."""
    if len(tools) == 1:
        return _grammar_schema(tools[0], "#")
    schemas = [_grammar_schema(tool, f"#/$defs/{number}") for number, tool in enumerate(tools)]
    referred = {str(number): schema for number, schema in enumerate(schemas) if b'"$ref"' in dumps(schema)}
    calls = [{"type": "object", "properties": {"name": {"const": tool["name"]}, "arguments": schema},
              "required": ["name", "arguments"], "additionalProperties": False} for tool, schema in zip(tools, schemas)]
    return {"anyOf": calls, **present({"$defs": referred})}


def _grammar_schema(tool: Json, place: str) -> Json:
    """Return the schema of a tool's arguments at a place in another, to which its references lead.

    Without what llama.cpp makes no grammar of, or a very slow one (json-schema-to-grammar.cpp).
    """
    whole = tool_schema(tool)

    def change(schema: Json) -> Json:
        kept = {name: value for name, value in schema.items() if name not in _NOT_IN_GRAMMARS}
        ref = place + kept.pop("$ref", "")[1:]
        if ref.startswith("#/") and _referred(schema, whole) is not schema:
            return {"$ref": ref}
        return kept if _DECIDES_FORM & kept.keys() else {**kept, "type": [*_SCHEMA_TYPES[:-1]]}
    return in_each_schema(whole, change)  # type: ignore[no-any-return]


_NOT_IN_GRAMMARS = frozenset({"pattern", "minLength", "maxLength", "maxItems"})
_DECIDES_FORM = frozenset("type anyOf oneOf allOf const enum properties items prefixItems".split())


def as_call(chunks: Iterable[Chunk], tools: Sequence[Json]) -> Iterator[Chunk]:
    """Yield the chunks of an answer that `call_schema` held to a call, as that call.  Raises UpstreamError."""
    names = [tool["name"] for tool in tools]
    name, around = (names[0], 0) if len(names) == 1 else ("", 1)    # braces after the arguments
    held, said, is_call = "", list[str](), False
    yield chunk_of(content="")
    for chunk in chunks:
        for choice in choices_of(chunk):
            held, end = held + (choice["delta"].pop("content", "") or ""), choice["finish_reason"]
            is_call = is_call or "tool_calls" in choice["delta"]    # in Ollama's own words
            if not name:
                name, held = _begun_call(held, bool(end))
            if said or name in names and held.startswith("{"):
                size = len(held) - around * (end == "stop") if end else len(held.rstrip("} \t\r\n"))
                yield from [tool_chunk(0, held[:size], None, None if said else name)] if size > 0 else []
                said.append(held[:size])
                held = held[size:]
            if end == "stop" and not is_call and object_in("".join(said)) is None:
                raise UpstreamError("the answer is not the tool call that it had to be", Fault.REFUSED,
                                    code="bad_upstream_answer")
        yield chunk


def _begun_call(text: str, whole: bool) -> tuple[str, str]:
    """Return the name in a call's JSON, and the rest from its arguments on; ("", text) if they are not there yet."""
    begin = re.match(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)', text)
    if begin:
        return begin[1], text[begin.end():]
    with contextlib.suppress(*NOT_IN_ITS_FORMAT):
        call = loads(text) if whole else {}
        return str(call["name"]), dumps(call["arguments"]).decode() + "}"    # in another order
    return "", text


def only_json(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks of a translated answer without the fence or the sentences around its JSON object."""
    begun, closed, held = False, False, list[str]()    # held: what follows a brace, as that may be the last one
    for chunk in chunks:
        for choice in choices_of(chunk):
            text = choice["delta"].pop("content", "")
            if not begun and "{" in text:
                begun, held, text = True, [], text[text.index("{"):]
            closed = closed or begun and "}" in text
            size = text.rfind("}") + 1 if closed else len(text) if begun else 0
            if choice["finish_reason"] == "length" or choice["finish_reason"] and not begun:
                size = len(text) + 1    # a part of the object, or no JSON at all: nothing is held
            held.append(text[:size])
            if size or "role" in choice["delta"]:
                yield chunk_of(**{**choice["delta"], "content": "".join(held)})
                choice["delta"], held = {}, []
            held.append(text[size:])
            if choice["delta"] or choice["finish_reason"]:
                yield chunk
        if not choices_of(chunk):    # usage
            yield chunk


def tool_schema(function: Json) -> Json:
    """Return the schema of a function's arguments, in today's words and without alternatives at the top, for Claude."""
    whole = {"properties": {}, **in_each_schema(function.get("parameters") or {}, valid_schema), "type": "object"}
    # What the alternatives have becomes the object's, and its description tells of them.
    lost = {word: whole.pop(word) for word in ("allOf", "anyOf", "oneOf") if word in whole}
    if not lost:
        return whole
    variants, required = dict[str, dict[bytes, Any]](), dict.fromkeys(whole.get("required", []))
    for word, schemas in lost.items():
        found = (_referred(schema, whole) for schema in schemas if isinstance(schema, dict))
        branches = [*map(valid_schema, {id(branch): branch for branch in found}.values())]    # each once
        for name, schema in itertools.chain.from_iterable(branch.get("properties", {}).items() for branch in branches):
            variants.setdefault(name, {})[dumps(schema)] = schema
        needed = [{*branch.get("required", [])} for branch in branches] or [set[str]()]
        every = set.union(*needed) if word == "allOf" else set.intersection(*needed)
        required.update(dict.fromkeys(sorted(every)))
    merged = {name: {"anyOf": [*some.values()]} if len(some) > 1 else [*some.values()][0]
              for name, some in variants.items()}
    told = f"It must also fit {json.dumps(lost, ensure_ascii=False)}."
    return {**whole, "properties": {**merged, **whole["properties"]}, "required": [*required],
            "description": f"{whole.get('description', '')} {told if len(told) < 1000 else ''}".strip()}


def _referred(schema: Json, root: Json) -> Json:
    """Return what a schema's reference leads to within the root, or the schema itself."""
    start, *steps = schema.get("$ref", "").split("/")
    place: Any = root if start == "#" else None
    for step in steps:
        place = place.get(step) if isinstance(place, dict) else None
    return place if isinstance(place, dict) else schema


def valid_schema(schema: Json) -> Json:
    """Return a schema of any draft in the words of draft 2020-12, without those that Claude would refuse a tool for."""
    new = dict(schema)
    for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if new.get(strict) is True and bound in new:    # draft 4
            new[strict] = new.pop(bound)
    if isinstance(new.get("items"), list):    # all before 2020-12
        new["prefixItems"] = new.pop("items")
    if isinstance(new.get("properties"), dict):
        new["properties"] = {name: one if isinstance(one, dict) else {} for name, one in new["properties"].items()}
    new = {name: value for name, value in new.items() if type(value) in _FORMS.get(name, (type(value),))}
    if "required" in new:
        new["required"] = [name for name in new["required"] if isinstance(name, str)]
    if "type" in new and not all(kind in _SCHEMA_TYPES for kind in as_list(new["type"])):
        del new["type"]
    return new


def in_each_schema(schema: Any, change: Callable[[Json], Json]) -> Any:
    """Return a JSON schema with `change` made to it and to each schema in it, but not to data in it."""
    if isinstance(schema, list):
        return [in_each_schema(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return change({name: value if name in _DATA_IN_SCHEMAS else
                   {inner: in_each_schema(one, change) for inner, one in value.items()}
                   if name in _NAMED_SCHEMAS and isinstance(value, dict) else in_each_schema(value, change)
                   for name, value in schema.items()})


_SCHEMA_TYPES = ("string", "number", "boolean", "object", "array", "null", "integer")
_FORMS: dict[str, tuple[type, ...]] = {    # keyword -> the types of its value (JSON Schema's meta-schemas)
    word: kinds for words, kinds in (
        ("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf", (int, float)),
        ("minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains", (int,)),
        ("title description format pattern $ref $comment", (str,)),
        ("uniqueItems deprecated readOnly writeOnly", (bool,)),
        ("items additionalProperties not if then else contains propertyNames", (dict, bool)),
        ("properties patternProperties $defs definitions dependentSchemas", (dict,)),
        ("anyOf oneOf allOf prefixItems required enum examples", (list,)), ("type", (str, list)),
        ("$schema $id", ()),    # of another draft; another root for references
    ) for word in words.split()}
_DATA_IN_SCHEMAS = frozenset({"const", "enum", "default", "examples", "required", "dependentRequired"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
# What Claude's structured output does not take: bounds, which are numbers, and these.
_NOT_IN_SCHEMAS = {word for word, kinds in _FORMS.items() if int in kinds} | {
    "pattern", "not", "if", "then", "else"}


# --- 6. OpenAI --------------------------------------------------------------------------------------------------------

# OpenAI's models that answer 400 to tools unless their effort is "none" (OpenAI's documentation, 2026-11).
_NO_TOOLS_WHILE_REASONING = re.compile(r"gpt-(?:5\.6|6(?:\.1-terra|-sol|-luna))")


class OpenAI(Provider):
    """OpenAI's own API, and every server that is compatible with it: nearly nothing to translate."""
    name, label = "openai", "OpenAI"
    key_variable, default_model = "OPENAI_API_KEY", "gpt-6-luna"
    vendor, chat_path, models_path = "api.openai.com", "/chat/completions", "/models"
    translates = False
    text_event = TextEvent(_OPENAI_TEXT, b"\n\n")
    embed_path = "/embeddings"
    renames = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}

    def endpoint(self, settings: Settings) -> Endpoint:
        url = (settings.openai_base_url or f"https://{self.vendor}/v1").rstrip("/")
        extra = {"OpenAI-Organization": settings.openai_org_id, "OpenAI-Project": settings.openai_project_id}
        return Endpoint(self.name, url, settings.openai_api_key, tuple(present(extra).items()),
                        self.key_variable if is_at(url, self.vendor) else "")

    def encode(self, request: ChatRequest, target: Target, context: int = 0, keep_alive: KeepAlive = None) -> Json:
        payload = {"model": target.model, **request.body}
        if is_at(target.endpoint.base_url, self.vendor):    # its models know the new name, and none of Ollama's fields
            payload = self.adapt(payload, frozenset({"max_tokens", "options", "keep_alive", "think"}))
        else:    # others drop or refuse the role
            payload["messages"] = [{**message, "role": "system"} if message["role"] == "developer" else message
                                   for message in request.messages]
        if "tools" in payload and _NO_TOOLS_WHILE_REASONING.match(target.model):
            payload.setdefault("reasoning_effort", "none")
        return payload

    def adapt(self, payload: Json, refused: frozenset[str]) -> Json:
        kept = super().adapt(payload, refused)
        if "reasoning_effort" in payload.keys() - kept.keys() and "tools" in payload:
            kept["reasoning_effort"] = "none"    # these models take tools only without reasoning, and would reason
        for name, (_, change) in CHANGES.items():
            if name in refused:
                kept.update({place: change(kept[place]) for place in ("messages", "tools") if place in kept})
        return kept

    def refused_parameter(self, error: UpstreamError, payload: Json) -> str | None:
        if error.status in (400, 422, 500):
            said = [one for place in ("messages", "tools") for one in payload.get(place) or ()]
            for name, (words, change) in CHANGES.items():
                if re.search(words, error.message.lower()) and change(said) != said:
                    return name
        return super().refused_parameter(error, payload)

    def chunks(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        finished, asked = set[Any](), request.body.get("n", 1)
        try:
            for data in sse_data(lines):
                if isinstance(data, Texts):
                    yield data
                    continue
                if data.startswith("[DONE]"):
                    return
                event = event_of(data)
                event.pop("obfuscation", None)    # padding, of no use on this side of TLS
                finished.update(choice.get("index") for choice in choices_of(event) if choice.get("finish_reason"))
                yield event
            raise cut()
        except UpstreamError as error:    # some servers leave [DONE] out
            if error.fault is not Fault.TRANSPORT or len(finished) != asked:
                raise

    def text_event_of(self, request: ChatRequest) -> TextEvent | None:
        return self.text_event if request.body.get("n", 1) == 1 else None

    def embed(self, inputs: Sequence[Any], request: EmbeddingRequest, target: Target) -> Json:
        in_base64 = request.in_base64 and is_at(target.endpoint.base_url, self.vendor)    # others fail at it
        return {"model": target.model, "input": inputs, **({"encoding_format": "base64"} if in_base64 else {}),
                **request.body}

    def vectors(self, answer: Json) -> tuple[list[Any], int]:
        found, usage = answer["data"], answer.get("usage") or {}
        by_index = {item.get("index") or 0: item for item in found}    # Gemini leaves a 0 out, some have no other
        found = found if len(by_index) < 2 else [by_index[number] for number in range(len(found))]
        return [item["embedding"] for item in found], usage.get("prompt_tokens", usage.get("total_tokens")) or 0


def _with_short_ids(message: Json) -> Json:
    """Return a message with ids of tool calls of nine letters and digits, each id always as the same one."""
    def short(place: Json, name: str) -> Json:
        id = str(place[name])
        return {**place, name: id if re.fullmatch("[A-Za-z0-9]{9}", id) else f"{number_for(id):09x}"}
    if "tool_calls" in message:
        return {**message, "tool_calls": [short(call, "id") for call in message["tool_calls"]]}
    return short(message, "tool_call_id") if "tool_call_id" in message else message


def _without(prefix: str) -> Callable[[Json], Json]:
    def change(fields: Json) -> Json:
        kept = {name: value for name, value in fields.items() if not name.startswith(prefix)}
        parts = kept.get("content")
        return {**kept, "content": [*map(change, parts)]} if isinstance(parts, list) else kept
    return change


def _each(change: Callable[[Json], Json]) -> Callable[[list[Json]], list[Json]]:
    return lambda ones: [*map(change, ones)]


def _with_answers(messages: list[Json]) -> list[Json]:
    """Return messages in which an answer stands between what a tool and what the user said."""
    told = list[Json]()
    for message in messages:
        if told and (told[-1].get("role"), message.get("role")) == ("tool", "user"):
            told.append({"role": "assistant", "content": "Understood."})
        told.append(message)
    return told


def _with_short_description(tool: Json) -> Json:
    function = tool.get("function") or {}
    told = function.get("description")
    return {**tool, "function": {**function, "description": told[:1024]}} if isinstance(told, str) else tool


# What servers want otherwise in messages and tools: the words of their errors, the change.  It is remembered.
CHANGES: dict[str, tuple[str, Callable[[list[Json]], list[Json]]]] = {
    # Mistral's API, tokenizer and chat templates; the second breaks Claude Code (mistral-common#169)
    "tool_call_id": (r"tool call ids?\b.*\b9\b", _each(_with_short_ids)),
    "user after tool": (r"role .?user.? after role .?tool|roles must alternate", _with_answers),
    "no reasoning_content": (r"missing.*reasoning_content|reasoning_content.*(missing|passed back|required)",
                             _each(lambda one: {"reasoning_content": one.get("reasoning", ""), **one}
                                   if one.get("role") == "assistant" else one)),    # DeepSeek, Kimi
    # Groq, Mistral
    "reasoning_content": (r"\breasoning(_content|_details)?\b(?! effort)", _each(_without("reasoning"))),
    "cache_control": ("cache_control", _each(_without("cache_control"))),    # Gemini, Groq
    "long descriptions": (r"description\W+string too long.*\b1024\b", _each(_with_short_description)),    # Azure
}


# --- 6. Ollama --------------------------------------------------------------------------------------------------------

class Ollama(Provider):
    """Ollama's native API.  Its own /v1 can't set num_ctx, truncate or think, and takes images out of their message."""
    name, label = "ollama", "Ollama"
    vendor, chat_path, models_path = "ollama.com", "/api/chat", "/api/tags"
    refuses = {"n": "it gives one answer per request", "logit_bias": "it has no such option",
               "audio": "it answers in text", "modalities": "it answers in text",
               "web_search_options": "it does not search", "functions": "it is deprecated, send tools",
               "function_call": "it is deprecated, send tool_choice"}
    spelt = {"thinking": "think"}
    text_event = TextEvent(_OLLAMA_TEXT, b"\n")
    embed_path = "/api/embed"
    _options = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "max_tokens",
                "max_completion_tokens")
    _as_they_are = ("logprobs", "top_logprobs", "keep_alive", "think")    # the last two by extra_body of the SDKs
    _think = {"none": False, "minimal": "low", "xhigh": "max"}
    takes = (*_options, "logprobs", "top_logprobs", "response_format", "structured_outputs")

    def endpoint(self, settings: Settings) -> Endpoint:
        return Endpoint(self.name, ollama_url(settings.ollama_host))

    def refuse_part(self, part: Json) -> str | None:
        if part["type"] == "image_url":
            return None if data_url(part["image_url"]["url"]) else "images must be base64 data: URLs"
        return super().refuse_part(part)

    def encode(self, request: ChatRequest, target: Target, context: int = 0, keep_alive: KeepAlive = None) -> Json:
        body, native = request.body, request.native_to(self.name)
        options = {"num_predict" if "max" in name else name: body[name] for name in self._options if name in body}
        options.update({**present({"num_ctx": context}), **(native or request).body.get("options", {})})
        if "stop" in options:
            options["stop"] = as_list(options["stop"])
        usual: Json = {"truncate": False}    # without it the oldest messages are forgotten silently
        usual.update({} if keep_alive is None else {"keep_alive": keep_alive})
        if native:
            return {**usual, **native.body, **present({"options": options}), "model": target.model, "stream": True}
        messages, forced = self._messages(without_deprecated(request.messages)), forced_tools(body)
        if forced:    # it has no tool_choice, and holds an answer to a schema only without tools; no model sees either
            first = [messages.pop(0)["content"], ""] if messages[0]["role"] == "system" else []
            form = "its arguments" if len(forced) == 1 else '{"name": …, "arguments": {…}}'
            hint = f"Answer with a call of a tool below: write {form} as one JSON object, and nothing else."
            told = [json.dumps(tool, ensure_ascii=False) for tool in forced]
            messages.insert(0, {"role": "system", "content": "\n".join([*first, hint, *told])})
        schema = call_schema(forced) if forced else json_wanted(body)
        tools = [{**tool, "function": {**tool["function"], "parameters": tool_schema(tool["function"])}}
                 for tool in chosen_tools(body)[0]]    # it refuses what it can't read, and skips anyOf at the top
        payload = {
            "model": target.model, "messages": messages, "stream": True, **usual,
            **present({"options": options, "tools": [] if forced else tools,
                       "format": "json" if schema == {} else schema})}
        if effort_of(body):
            payload["think"] = self._think.get(body["reasoning_effort"], body["reasoning_effort"])
        payload.update({name: body[name] for name in self._as_they_are if name in body})
        return payload

    @staticmethod
    def _messages(messages: Sequence[Json]) -> list[Json]:
        """Return the messages in Ollama's shape, where a tool's result has the tool's name."""
        converted: list[Json] = []
        for message in messages:
            role = "system" if message["role"] == "developer" else message["role"]
            turn: Json = {"role": role, "content": text_of(message)}
            images = [data_url(part["image_url"]["url"]) for part in parts_of(message) if part["type"] == "image_url"]
            turn.update(present({"images": [image[1] for image in images if image]}))
            thought = message.get("reasoning_content") or message.get("reasoning")
            if thought and isinstance(thought, str):    # the templates of thinking models want it back
                turn["thinking"] = thought
            turn.update(present({"tool_calls": message["tool_calls"]}))
            if role == "tool":
                turn.update(tool_call_id=message["tool_call_id"], tool_name=message["name"])
            converted.append(turn)
        return converted

    def chunks(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        chunks, forced = self._said(lines, request.body.get("parallel_tool_calls", True)), forced_tools(request.body)
        return as_call(only_json(chunks), forced) if forced else chunks

    def text_event_of(self, request: ChatRequest) -> TextEvent | None:
        native = request.native_to(self.name)
        if native and native.path == GENERATE_PATH:
            return TextEvent(_GENERATED_TEXT, b"\n")
        return None if forced_tools(request.body) else self.text_event

    def _said(self, lines: Lines, parallel: bool) -> Iterator[Any]:
        yield chunk_of(content="")
        numbers = itertools.count()    # of calls: each comes whole, and the server's index is always 0
        for line in filter(None, lines):
            if isinstance(line, Texts):
                yield line
                continue
            event = event_of(line)
            message, logprobs = event.get("message") or event, event.get("logprobs")    # in itself: /api/generate
            calls = [{**call, "index": next(numbers)} for call in message.get("tool_calls") or ()]
            calls = calls if parallel else [call for call in calls if call["index"] == 0]    # it has no such field
            said = present({"reasoning_content": message.get("thinking"),
                            "content": message.get("content") or message.get("response"), "tool_calls": calls})
            if said or logprobs:
                yield chunk_of(None, {"content": logprobs} if logprobs else None, **said)
            if event.get("done"):
                yield chunk_of(finish_of(event.get("done_reason") or "stop"))
                yield {"usage": {"prompt_tokens": event.get("prompt_eval_count"),
                                 "completion_tokens": event.get("eval_count")}, "timings": event}
                return
        raise cut()    # a runaway repetition ends without done: true as well

    def embed(self, inputs: Sequence[Any], request: EmbeddingRequest, target: Target) -> Json:
        if not all(isinstance(one, str) for one in inputs):
            raise Unsupported("Ollama takes texts and no tokens (LangChain sends texts with "
                              "check_embedding_ctx_length=False).", param="input")
        body = {name: value for name, value in request.body.items() if name == "dimensions"}
        return {"model": target.model, "input": inputs, **body, **request.native}

    def vectors(self, answer: Json) -> tuple[list[Any], int]:
        return answer["embeddings"], answer.get("prompt_eval_count") or 0

    def catalogue(self, ask: Ask, known: dict[str, Json]) -> tuple[Model, ...]:
        listed = [Model(str(item["name"]), created_at(item.get("modified_at")),
                        is_remote(str(item["name"])) or bool(item.get("remote_host")), str(item.get("digest") or ""),
                        int(item.get("size") or 0), _capabilities(item), entry=item)
                  for item in ask(self.models_path, None).get("models") or []]
        models = sorted(listed, key=lambda model: -model.created)[:MAX_MODELS]
        with contextlib.suppress(UpstreamError, *NOT_IN_ITS_FORMAT):
            loaded = {str(name).lower(): item for item in ask("/api/ps", None)["models"]
                      for name in (item.get("digest"), item["name"]) if name}    # of two names it says the loaded one
            models = [_with_state(model, loaded.get(model.name.lower(), loaded.get(model.digest.lower())))
                      for model in models]
        by_key = {model.digest or model.name: model for model in models if not model.remote}
        for key in known.keys() - by_key.keys():
            del known[key]
        for key in [key for key in by_key if key not in known][:DETAILS_AT_ONCE]:
            with contextlib.suppress(UpstreamError):
                known[key] = _details(ask("/api/show", {"model": by_key[key].name}))
        for key in by_key.keys() & known.keys():
            known[key]["own_context"] = max(known[key].get("own_context", 0), by_key[key].context)
        return tuple(dataclasses.replace(model, **known.get(model.digest or model.name, {})) for model in models)

    def context_for(self, request: ChatRequest, model: Model, asked: int, free: float | None) -> int:
        # The steps are few, and a window once asked for is asked for again: each change reloads the model.
        native = request.native_to(self.name)
        if "num_ctx" in (native or request).body.get("options", {}) or not model.max_context:
            return 0
        size = request.size
        if size // MOST_BYTES > model.max_context:
            raise Unsupported(f"its maximum context length is {model.max_context} tokens, and the prompt has over "
                              f"{size // MOST_BYTES}", param="messages", code="context_length_exceeded")
        answer = min(request.max_output_tokens(512), MOST_ANSWER)
        now, own = self._windows(model, asked)
        needed = size // LEAST_BYTES + answer
        if needed <= now:
            return now if now == asked or not model.context and needed > DEFAULT_CONTEXT else 0
        step = next((step for step in CONTEXTS if step >= needed), CONTEXTS[-1])
        wanted = max(now, own, min(step, model.max_context))
        if self._fits(model, wanted, free):
            return wanted if wanted > now or wanted == asked else 0
        if size // LARGE_BYTES + answer <= now:    # it may fit anyway: Ollama counts exactly, and refuses if not
            return 0
        raise Unsupported(f"a context of {wanted} tokens does not fit in memory: its maximum context length is {now} "
                          "tokens now", param="messages", code="context_length_exceeded")

    @staticmethod
    def _windows(model: Model, asked: int) -> tuple[int, int]:
        """Return the window that a model has or would be loaded for, and one that it is never made smaller than."""
        own = max(asked, min(model.own_context, model.max_context))
        return model.context or own or DEFAULT_CONTEXT, own

    @staticmethod
    def _fits(model: Model, window: int, free: float | None) -> bool:
        # The size of a loaded model is with its context, and `free` counts it as free.  Where not even the model fits,
        # it is asked as a last resort, so `free` is no limit.
        return free is None or model.size > free or model.size + (window - model.context) * model.token_bytes <= free

    def planned(self, model: Model, asked: int, free: float | None) -> Model:
        model = super().planned(model, asked, free)
        if not model.is_chat_model:
            return model
        now, own = self._windows(model, asked)
        steps = [max(now, own, min(step, model.max_context)) for step in CONTEXTS]
        most = max([now, *(step for step in steps if self._fits(model, step, free))])
        most = min(most, model.max_context) if model.max_context else model.context    # which `context_for` leaves
        return dataclasses.replace(model, max_context=most, max_output=min(MOST_ANSWER, most // 2))


GENERATE_PATH = "/api/generate"
MOST_ANSWER = 4096        # tokens, for which a window is made large enough; a longer answer may find it full
DEFAULT_CONTEXT = 4096    # what Ollama loads on a machine with less than 23 GiB of GPU memory
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
# Bytes a token: code and languages other than English have about 3; English has 4, and seldom 5; none has 8.
LEAST_BYTES, LARGE_BYTES, MOST_BYTES = 3, 5, 8


def _capabilities(item: Json) -> frozenset[str] | None:
    """Return what a model can do as /api/tags says, or its family, in older versions; None if neither says it."""
    said = frozenset(map(str, item.get("capabilities") or ()))
    embeds = "bert" in str((item.get("details") or {}).get("family")).lower()    # nomic-bert, xlm-roberta, …
    return said or (frozenset({"embedding"}) if embeds else None)


def _with_state(model: Model, loaded: Json | None) -> Model:
    """Return the model with what /api/ps tells of it; None if that does not list it."""
    if loaded is None:
        return dataclasses.replace(model, cold=not model.remote)
    size, on_gpu = int(loaded.get("size") or 0), int(loaded.get("size_vram") or 0)
    return dataclasses.replace(model, context=int(loaded.get("context_length") or 0), size=size or model.size,
                               gpu_share=min(1.0, on_gpu / size) if size else None, loaded=loaded)


def _details(shown: Json) -> Json:
    """Return the fields of a Model that /api/show tells; none if it is not in its format."""
    with contextlib.suppress(*NOT_IN_ITS_FORMAT):
        info = shown.get("model_info") or {}
        said = re.search(r"(?m)^num_ctx\s+([0-9]{1,9})$", str(shown.get("parameters")))
        kind = info.get("general.architecture")
        number = {name[len(f"{kind}."):]: value for name, value in info.items()
                  if name.startswith(f"{kind}.") and isinstance(value, int)}    # some are lists, one number a layer
        heads = number.get("attention.head_count", 0)
        usual = number.get("embedding_length", 0) // heads if heads else 0
        row = sum(number.get(f"attention.{name}_length") or usual for name in ("key", "value"))
        # llama.cpp keeps a key and a value of 16 bits each for every layer and head
        token_bytes = 2 * number.get("block_count", 0) * number.get("attention.head_count_kv", 0) * row
        return {**present({"capabilities": frozenset(map(str, shown.get("capabilities") or ()))}),
                "max_context": number.get("context_length", 0), "token_bytes": token_bytes,
                "own_context": int(said[1]) if said else 0}
    return {}


def is_remote(name: str) -> bool:
    """Return True if ollama.com answers for an Ollama name: tag `cloud`, or a tag that ends in `-cloud`."""
    tag = name.lower().rsplit("/", 1)[-1].partition(":")[2]
    return tag == "cloud" or tag.endswith("-cloud")


def ollama_url(host: str) -> str:
    """Return the address that OLLAMA_HOST means to a client, by Ollama's own rules (envconfig.Host)."""
    text = host.strip().strip("\"'")
    scheme, found, rest = text.rpartition("://")
    scheme = scheme or ("https" if text == "ollama.com" else "http")
    default = 443 if scheme == "https" else 80 if found else 11434
    place, slash, path = rest.partition("/")
    name, _, port = place.rpartition(":") if re.search(r"^[^:]*:[^:]*$|\]:", place) else (place, "", "")
    name = name.strip("[]")
    # The variable is the server's bind address, too.
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) and int(port) < 65536 else default
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{number}{slash}{path}".rstrip("/")


# --- 6. Claude --------------------------------------------------------------------------------------------------------

class _ClaudeModel(NamedTuple):
    """The request fields that a Claude model takes, as far as models differ in them."""
    sampling: int = 0         # of temperature and top_p: both, one, or neither
    adaptive: bool = True     # thinks by an effort; older models within a budget of tokens
    xhigh: bool = True        # knows this effort
    off: str = ""             # the type of thinking that stops it, where it thinks unasked and can be stopped
    forced: bool = True       # takes a tool_choice that forces a call
    prefill: bool = False     # continues an assistant's message
    most: int = 128_000       # tokens of an answer; it refuses more


_CLAUDE_MODELS = (    # the first that fits (Anthropic's documentation, 2026-11); a new name counts as the newest model
    (r"[a-z]+-(?:[1-3]|4(?:-[0-5])?)", _ClaudeModel(1, adaptive=False, prefill=True, most=64_000)),
    (r"[a-z]+-4-6", _ClaudeModel(2, xhigh=False)),
    (r"haiku-5-5|opus-5", _ClaudeModel(off="disabled")),
    (r"sonnet-5-5", _ClaudeModel(off="between_tools", forced=False)),
    (r"opus-5-5|(?:fable|mythos)-5-[12]", _ClaudeModel(forced=False)),
    (r".*", _ClaudeModel()),
)
_CLAUDE_MAX_TOKENS = 16384    # where the client sets no limit: thinking counts too, so a small one gives empty answers
_THINKING_BUDGETS = {"minimal": 1024, "low": 2048, "medium": 4096, "high": 8192, "xhigh": 16384, "max": 16384}


@functools.lru_cache(64)
def _claude_model(name: str) -> _ClaudeModel:
    """Return the fields that the model of this name takes; the date at its end makes no difference."""
    base = re.sub(r"^claude-|-\d{8}$", "", name)
    return next(model for pattern, model in _CLAUDE_MODELS if re.fullmatch(pattern, base, re.S))



class Claude(Provider):
    """Anthropic's Messages API, in both directions."""
    name, label = "claude", "Claude"
    key_variable, default_model = "ANTHROPIC_API_KEY", "claude-haiku-5-5"
    vendor, chat_path, models_path = "api.anthropic.com", "/v1/messages", "/v1/models?limit=1000"
    text_event = TextEvent(_CLAUDE_TEXT, b"\n\n")
    takes = ("max_tokens", "max_completion_tokens", "stop", "response_format", "structured_outputs")
    refuses = {**Ollama.refuses, "logprobs": "it does not tell them", "top_logprobs": "it does not tell them"}

    def endpoint(self, settings: Settings) -> Endpoint:
        url = (settings.anthropic_base_url or f"https://{self.vendor}").rstrip("/").removesuffix("/v1")
        return Endpoint(self.name, url, settings.anthropic_api_key, (),
                        self.key_variable if is_at(url, self.vendor) else "")

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        # 2023-06-01 and not 2026-10-21: the later version refuses temperature and top_p for every model.
        return {"anthropic-version": "2023-06-01", **present({"x-api-key": endpoint.key})}

    def abilities(self, item: Json) -> frozenset[str]:
        told = {"vision": "image_input", "file": "pdf_input", "thinking": "thinking"}
        return frozenset(("completion", "tools", *(ability for ability, name in told.items()
                                                   if item["capabilities"][name]["supported"])))

    def refuse_part(self, part: Json) -> str | None:
        if part["type"] == "image_url":
            url = part["image_url"]["url"]
            fits = url.startswith("https://") or re.fullmatch("image/(jpeg|png|gif|webp)", (data_url(url) or [""])[0])
            return None if fits else "images must be https: URLs or data: URLs of JPEG, PNG, GIF or WebP"
        if part["type"] == "file":
            kind, data = data_url(part["file"].get("file_data") or "") or ("", "")
            with contextlib.suppress(ValueError):    # Claude takes text decoded, so its base64 must be whole
                if kind == "application/pdf" or kind.startswith("text/") and base64.b64decode(data):
                    return None
            return "files must be sent as base64 data: URLs of a PDF or of text"
        return super().refuse_part(part)

    def encode(self, request: ChatRequest, target: Target, context: int = 0, keep_alive: KeepAlive = None) -> Json:
        if request.native_to(self.name):
            return {**request.native_to(self.name).body, "model": target.model}  # type: ignore[union-attr]
        body, model = request.body, _claude_model(target.model)
        system, turns = claude_conversation(without_deprecated(request.messages), model.prefill)
        choice, schema = chosen_tools(body)[1], json_wanted(body)
        if schema == {}:    # Claude has no field for JSON without a schema
            system.extend(text_blocks("Answer with one JSON object and nothing else: no prose, no Markdown fence."))
        if choice not in ("auto", "none") and not model.forced:
            which = claude_name(name_of(choice)) if isinstance(choice, dict) else "that fits best"
            system.extend(text_blocks(f"Answer with a call of the tool {which}."))
            choice = "auto"
        payload = present({
            "model": target.model, "messages": turns, "stream": True,
            "max_tokens": min(request.max_output_tokens(_CLAUDE_MAX_TOKENS), model.most),
            "system": system,
            "stop_sequences": [stop for stop in as_list(body.get("stop", [])) if stop.strip()],
            "service_tier": {"auto": "auto", "default": "standard_only"}.get(body.get("service_tier", "")),
            **self._tools(body, choice, turns)})
        if schema:
            payload["output_config"] = {"format": {"type": "json_schema", "schema": closed_schema(schema)}}
        self._think(payload, effort_of(body), model)
        self._cache(payload, request, keep_alive is not None)
        if "thinking" not in payload:    # with it, any temperature but 1 is a 400
            asked = [name for name in ("temperature", "top_p") if name in body][:model.sampling]
            payload.update({name: min(1.0, max(0.0, body[name])) for name in asked})
        return payload

    def refused_parameter(self, error: UpstreamError, payload: Json) -> str | None:
        # Bedrock, Vertex and Azure do not know all of the betas that Claude Code names (new-api#2975, litellm#20021).
        if error.fault is Fault.REFUSED and re.search(r"anthropic.beta|\bbeta (flag|header)", error.message):
            return next(iter(re.findall(r"`([\w.-]+)`", error.message)), "anthropic-beta")
        return super().refused_parameter(error, payload)

    @staticmethod
    def _tools(body: Json, choice: str | Json, turns: Sequence[Json]) -> Json:
        """Return the fields for tools and for the choice among them."""
        chosen = chosen_tools(body)[0]
        # Claude must know the tools that the history calls, even if it may call none now.
        tools = [claude_tool(tool) for tool in chosen or body.get("tools", [])] or [
            claude_tool({"function": {"name": name}}) for name in _tools_used(turns)]
        theirs: Json = ({"type": "tool", "name": claude_name(name_of(choice))} if isinstance(choice, dict)
                        else {"type": "any" if choice == "required" else "auto"})
        if not chosen:
            theirs = {"type": "none"}
        elif body.get("parallel_tool_calls") is False:
            theirs["disable_parallel_tool_use"] = True
        by_name = {tool["name"]: tool for tool in tools}    # it refuses a second tool of a name
        return {"tools": [*by_name.values()], "tool_choice": theirs} if tools else {}

    @staticmethod
    def _cache(payload: Json, request: ChatRequest, ask: bool) -> None:
        """Keep the last four of the client's marks: it refuses more.  Without any, ask for caching if that will pay."""
        own = request.body.get("cache_control")
        payload.update({"cache_control": own} if isinstance(own, dict) else {})
        blocks = [*payload.get("tools", []), *payload.get("system", []),
                  *(block for turn in payload["messages"] for block in turn["content"])]
        marked = [block for block in blocks if "cache_control" in block]
        for block in marked[:max(0, len(marked) + ("cache_control" in payload) - 4)]:
            del block["cache_control"]
        goes_on = any(turn["role"] == "assistant" for turn in payload["messages"])
        if ask and goes_on and not marked and request.size >= 512 * TOKEN_BYTES:    # no model caches a shorter prompt
            payload.setdefault("cache_control", {"type": "ephemeral"})

    @staticmethod
    def _think(payload: Json, effort: str | None, model: _ClaudeModel) -> None:
        """Add what `reasoning_effort` means to the model."""
        if effort == "none":
            payload.update({"thinking": {"type": model.off}} if model.off else {})
        elif effort and model.adaptive:
            effort = {"minimal": "low", "xhigh": "xhigh" if model.xhigh else "high"}.get(effort, effort)
            payload["thinking"] = {"type": "adaptive", "display": "summarized"}
            payload.setdefault("output_config", {})["effort"] = effort
        elif effort and payload.get("tool_choice", {}).get("type") not in ("any", "tool") and not _tools_used(
                payload["messages"]):    # a budget goes with neither forced tools nor calls whose thinking is lost
            budget = _THINKING_BUDGETS[effort]
            payload["thinking"] = {"type": "enabled", "budget_tokens": budget}
            payload["max_tokens"] = max(payload["max_tokens"], budget + 1024)

    def chunks(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        own = {claude_name(name_of(tool)): tool["function"] for tool in request.body.get("tools", ())}
        chunks = self._chunks(lines, own)
        return only_json(chunks) if json_wanted(request.body) == {} else chunks

    def text_event_of(self, request: ChatRequest) -> TextEvent | None:
        return self.text_event if json_wanted(request.body) != {} else None

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Any]:
        return self._chunks(lines, {}, request) if request.native_to(self.name) else super().decode(lines, request)

    def whole(self, raw: bytes, request: ChatRequest) -> Json:
        if not request.native_to(self.name):
            return super().whole(raw, request)
        answer, message = fold(super().decode(raw.splitlines(), request)), object_in(raw)
        return {**answer, "native": {**message, "content": [*message["content"]]}} if message else answer

    def _chunks(self, lines: Lines, own: dict[str, Json], native: ChatRequest | None = None) -> Iterator[Any]:
        """Yield what the events say; those for a native request are passed on, each within its first chunk."""
        usage, stop = Json(), Json()
        blocks: dict[int, Json] = {}
        for data in sse_data(lines):
            if isinstance(data, Texts):
                yield data
                continue
            event = event_of(data)
            kind, said = str(event.get("type")), list[Chunk]()
            if kind.startswith("content_block_"):
                said.extend(self._said(event, blocks, own))
            elif kind in ("message", "message_start"):    # whole, or streamed
                if blocks:    # a relay that failed and started over
                    raise UpstreamError("a second answer began before the first had ended", code="upstream_cut")
                stop = event if kind == "message" else event.get("message") or {}
                usage.update(stop.get("usage") or {})
                said.extend(self._begun(event, blocks, own))
            elif kind == "message_delta":
                stop = {**stop, **(event.get("delta") or {})}
                usage.update({name: count for name, count in (event.get("usage") or {}).items() if count is not None})
            is_end = kind in ("message", "message_stop")
            said.extend(self._end(stop, usage) if is_end else ())
            if native and kind == "message":    # a relay that does not stream
                yield from in_order(said, native)
            else:
                yield from _with_native(event, said) if native else said
            if is_end:
                return
        raise cut()

    def _begun(self, event: Json, blocks: dict[int, Json], own: dict[str, Json]) -> Iterator[Chunk]:
        """Yield what a message says as it begins: all, if it is whole."""
        yield chunk_of(content="")
        for index, end in itertools.product(range(len(event.get("content") or ())), ("start", "stop")):
            part = {"type": f"content_block_{end}", "index": index, "content_block": event["content"][index]}
            yield from self._said(part, blocks, own)

    @staticmethod
    def _said(event: Json, blocks: dict[int, Json], own: dict[str, Json]) -> Iterator[Chunk]:
        """Yield what an event of a content block says.

        `blocks` are those that have begun, empty after their end; `own` the client's functions by Claude's names.
        """
        index, kind, piece = event.get("index") or 0, event["type"], event.get("delta") or {}
        block = blocks.setdefault(index, {})
        if kind == "content_block_start":
            piece = event["content_block"]    # its text is mostly empty
            block = blocks[index] = {**piece}
            if block["type"] == "tool_use":
                function = own.get(str(block.get("name"))) or block
                block.update(json=[], keys={claude_key(name): name for name in tool_schema(function)["properties"]
                                            if claude_key(name) != name})
                yield tool_chunk(index, "", block.get("id"), function.get("name"))
        elif block.get("type") == "tool_use" and piece.get("partial_json"):
            block["json"].append(piece["partial_json"])
            yield from [] if block["keys"] else [tool_chunk(index, piece["partial_json"])]
        elif kind == "content_block_stop" and block.get("type") == "tool_use":
            blocks[index], text = {}, "".join(block["json"])
            whole = object_in(text) if text else block.get("input")
            if block["keys"] and isinstance(whole, dict):
                whole = {block["keys"].get(name, name): value for name, value in whole.items()}
            yield from [] if text and not block["keys"] else [tool_chunk(index, whole or text or {})]
        said = present({"content": text_in(piece.get("text") or ""),
                        "reasoning_content": text_in(piece.get("thinking") or "")})
        if said:
            yield chunk_of(**said)

    def _end(self, stop: Json, usage: Json) -> Iterator[Chunk]:
        """Yield the last chunks: an explained refusal, the finish reason, the usage."""
        explanation = (stop.get("stop_details") or {}).get("explanation")
        if stop.get("stop_reason") == "refusal" and explanation:
            yield chunk_of(refusal=explanation)
        yield chunk_of(finish_of(stop.get("stop_reason") or "stop"))
        told, read, written = (count_in(usage.get(name)) for name in (
            "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"))
        thinking = (usage.get("output_tokens_details") or {}).get("thinking_tokens")
        yield {"usage": {"prompt_tokens": told + read + written,
                         "completion_tokens": usage.get("output_tokens"),
                         "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
                         **present({"completion_tokens_details": present({"reasoning_tokens": thinking})})}}


def _with_native(event: Json, said: Sequence[Chunk]) -> Iterator[Chunk]:
    """Yield an event's chunks for a client of its own dialect: the first has the event, and the others nothing.

    Any block but a text is content to this client as it begins: of a thought or of a tool that Claude runs itself
    nothing else may come for long.
    """
    kind = (event.get("content_block") or {}).get("type", "text")
    for number, chunk in enumerate(said or ({} if kind == "text" else chunk_of(block=kind),)):
        yield {"choices": [], **chunk, "native": {} if number else event}


def claude_conversation(messages: Sequence[Json], prefills: bool) -> tuple[list[Json], list[Json]]:
    """Return the system's blocks and the turns that Claude takes.

    Turns alternate and begin with the user; without `prefills` they end so.  After calls come the results of all.
    """
    system: list[Json] = []
    said: list[tuple[str, list[Json]]] = [("user", [])]
    used: set[str] = set()
    waiting: dict[str, list[Json]] = {}    # the client's id of a call -> results without content yet
    for message in messages:
        blocks = claude_content(message)
        texts = [block for block in blocks if block["type"] == "text"]
        if message["role"] in ("system", "developer"):
            system.extend(texts)
        elif message["role"] == "assistant":
            calls, waiting = message["tool_calls"], {}
            uses = [_claude_call(call, used) for call in calls]
            results = [{"type": "tool_result", "tool_use_id": use["id"], "content": "(no result)"} for use in uses]
            for call, result in zip(calls, results):
                waiting.setdefault(call["id"], []).append(result)
            said += [("assistant", texts + uses)] if texts or uses else []
            said += [("user", results)] if results else []
        elif message["role"] == "tool" and waiting.get(message["tool_call_id"]):
            marks = [{"cache_control": block.pop("cache_control")} for block in blocks if "cache_control" in block]
            waiting[message["tool_call_id"]].pop(0).update({"content": blocks or "", **_mark_of(*marks[-1:])})
        else:
            said.append(("user", blocks))
    turns = [{"role": role, "content": [block for _, some in group for block in some] or text_blocks(".")}
             for role, group in itertools.groupby(said, lambda pair: pair[0])]
    last = turns[-1]
    if last["role"] == "assistant" and not prefills:
        turns.append({"role": "user", "content": text_blocks("Continue.")})
    elif last["role"] == "assistant" and last["content"][-1]["type"] == "text":
        last["content"][-1]["text"] = last["content"][-1]["text"].rstrip()
    return system, turns


def claude_content(message: Json) -> list[Json]:
    """Return a message's parts as blocks; `refuse_part` has seen them before."""
    blocks: list[Json] = []
    for part in parts_of(message):
        if part["type"] in ("text", "refusal"):
            blocks.extend({**block, **_mark_of(part)} for block in text_blocks(part[part["type"]]))
            continue
        kind = "image" if part["type"] == "image_url" else "document"
        url = part["image_url"]["url"] if kind == "image" else part["file"]["file_data"]
        media_type, data = data_url(url) or ("", "")
        source = {"type": "base64", "media_type": media_type, "data": data} if data else {"type": "url", "url": url}
        if media_type.startswith("text/"):
            text = base64.b64decode(data).decode("utf-8", "replace")
            source = {"type": "text", "media_type": "text/plain", "data": text}
        blocks.append({"type": kind, "source": source, **_mark_of(part)})
    if blocks:
        blocks[-1].update(_mark_of(message))
    return blocks


def _claude_call(call: Json, used: set[str]) -> Json:
    """Return a tool call as a block, under an id of Claude's letters that the conversation has not used yet."""
    function = call["function"]
    id = claude_id(call["id"])
    while id in used:
        id += "_"
    used.add(id)
    given = {claude_key(key): value for key, value in function["arguments"].items()}
    return {"type": "tool_use", "id": id, "name": claude_name(function["name"]), "input": given}


def text_blocks(text: str) -> list[Json]:
    """Return a text as a block, or nothing for an empty one, which Claude refuses."""
    return [{"type": "text", "text": text}] if text.strip() else []


def _tools_used(turns: Sequence[Json]) -> list[str]:
    """Return the names of the tools that the turns call, each once."""
    return list(dict.fromkeys(block["name"] for turn in turns for block in turn["content"]
                              if block["type"] == "tool_use"))


def claude_tool(tool: Json) -> Json:
    """Return a tool in Claude's shape, without `strict`: few schemas qualify for it there."""
    function, schema = tool["function"], tool_schema(tool["function"])
    schema["properties"] = {claude_key(name): inner for name, inner in schema["properties"].items()}
    schema.update({"required": [*map(claude_key, schema["required"])]} if "required" in schema else {})
    return {"name": claude_name(function["name"]), **present({"description": function.get("description")}),
            "input_schema": schema, **_mark_of(tool, function)}


def claude_id(id: str) -> str:
    """Return a tool call's id in the letters that Claude takes; Kimi's are like functions.find:0."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", id) or "call"


def claude_name(name: str, more: str = "") -> str:
    """Return the name by which Claude knows a tool: its own, or one made of that alone where it would be refused."""
    fits = re.fullmatch(rf"[\w{more}-]{{1,64}}", name, re.A)
    return name if fits else f"{re.sub('[^a-zA-Z0-9_-]', '_', name[:55])}_{number_for(name):08x}"


claude_key = functools.partial(claude_name, more=".")    # of an argument


def _mark_of(*places: Json) -> Json:
    """Return the client's mark for Claude's prompt cache in the first of the places that has one."""
    marks = [place["cache_control"] for place in places if isinstance(place.get("cache_control"), dict)]
    return {"cache_control": marks[0]} if marks else {}


def closed_schema(schema: Any) -> Any:
    """Return a JSON schema as Claude's structured output takes it: closed objects, no bounds, anyOf for oneOf."""
    def closed(schema: Json) -> Json:
        kept = {"anyOf" if name == "oneOf" else name: value for name, value in schema.items()
                if name not in _NOT_IN_SCHEMAS}
        kind = kept.get("type")
        is_object = kind == "object" or isinstance(kind, list) and "object" in kind or "properties" in kept
        return {**kept, "additionalProperties": False} if is_object else kept
    return in_each_schema(schema, closed)


# --- 6. Targets -------------------------------------------------------------------------------------------------------

PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (Ollama(), OpenAI(), Claude())}


def split_id(text: str) -> tuple[str, str]:
    """Return (provider, model) of `provider:model`, or ("", text) if no provider is named."""
    name, colon, model = text.partition(":")
    name = {"anthropic": "claude"}.get(name.lower(), name.lower())
    return (name, model) if colon and name in PROVIDERS else ("", text)


def configured_targets(settings: Settings) -> tuple[Target, ...]:
    """Return the targets that flags and variables name, local ones (of --local-model) first.  Raises UsageError."""
    if settings.cloud_api_key and not settings.cloud_model:
        raise UsageError("--cloud-api-key needs the --cloud-model that it is for")
    local = [_target(settings, "--local-model", spec) for spec in settings.local_model]
    for spec, target in zip(settings.local_model, local):
        if not may_be_local(target.endpoint, target.model):
            raise UsageError(f"--local-model {spec}: a cloud answers this model; name it with --cloud-model, or say "
                             f"where it runs, like {target.endpoint.provider}:NAME@http://127.0.0.1:8080/v1")
    cloud = [_target(settings, "--cloud-model", spec, "" if number else settings.cloud_api_key)
             for number, spec in enumerate(settings.cloud_model)]
    if not cloud:
        usual = [_target(settings, "", f"{provider.name}:{provider.default_model}")
                 for provider in PROVIDERS.values() if provider.default_model]
        cloud = [target for target in usual if not target.endpoint.lacks_key]
    return tuple(dict.fromkeys([*(target._replace(side=Side.LOCAL) for target in local), *cloud]))


def _target(settings: Settings, option: str, spec: str, key: str = "") -> Target:
    """Return the cloud target of `provider:model`, which `@http://host:port/v1` and `#VARIABLE` may follow.

    Raises UsageError, which names the option, and repeats nothing that may be a key.
    """
    flag = f"{option} {spec.partition('#')[0]}"
    provider, rest = split_id(spec)
    if not provider:
        raise UsageError(f"{flag}: start with one of {', '.join(name + ':' for name in PROVIDERS)}")
    model, at, url = rest.rpartition("@")
    if "://" not in url:    # a name may have an @ itself: LM Studio's name@4bit, Cloudflare's @cf/meta/name
        if re.search(r":\d{2,5}([/#]|$)", url if at else ""):
            raise UsageError(f"{flag}: write the address as http://{url.partition('#')[0]}")
        model, at, url = rest, "", ""
    if "://" in model:    # what stands before an @ may be a password
        raise UsageError(f"{option}: an address can't contain an @; a key goes into the variable that a #NAME behind "
                         "the address names, or into --cloud-api-key")
    if not model or not model.isprintable():
        raise UsageError(f"{flag}: name a model, like {provider}:NAME or {provider}:NAME@http://host:port/v1")
    url, mark, variable = url.partition("#")
    if mark and (key or not re.fullmatch(KEY_VARIABLE, variable)):
        raise UsageError(f"{flag}: behind # stands the name of the variable that holds the key, like #MY_KEY; "
                         "there is one key for a model")
    usual = PROVIDERS[provider].endpoint(settings)
    # The usual key is not meant for another server.
    endpoint = Endpoint(provider, url.rstrip("/"), key or dict(settings.endpoint_keys).get(variable, ""),
                        key_variable=variable) if at else usual._replace(key=key or usual.key)
    if not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[!-~]*)?", endpoint.base_url):
        raise UsageError(f"{endpoint.base_url} is not an address like https://host/v1")
    return Target(endpoint, model, Side.CLOUD)


class Alias(NamedTuple):
    """A further name, which may have wildcards, and what it means in turn: targets' names, or targets themselves."""
    name: str
    targets: tuple[str | Target, ...]

    def __str__(self) -> str:
        told = [target.id if isinstance(target, Target) else target for target in self.targets]
        return f"alias {self.name}={','.join(told)}"


def configured_aliases(settings: Settings, known: Sequence[Target]) -> tuple[Alias, ...]:
    """Return the aliases in their order, where an address of a known target means that one.  Raises UsageError."""
    aliases = []
    for text in settings.alias:
        name, _, told = text.partition("=")
        name, specs = name.strip(), [spec.strip() for spec in told.split(",")]
        if not (name and name.isprintable() and all(specs)):
            raise UsageError(f"--alias {text.partition('#')[0]}: write NAME=TARGET, or NAME=TARGET,TARGET")
        if name in OWN_NAMES:
            raise UsageError(f"--alias {name}=: that is one of Oblix's own names, {', '.join(OWN_NAMES)}")
        aliases.append(Alias(name, tuple([_alias_target(settings, spec, known) for spec in specs])))
    return tuple(aliases)


def _alias_target(settings: Settings, spec: str, known: Sequence[Target]) -> str | Target:
    """Return what an alias means by a target: a name, or the target itself if it has an address.  Raises UsageError."""
    if spec in OWN_NAMES:
        return spec
    if not split_id(spec)[0]:
        raise UsageError(f"--alias …={spec.partition('#')[0]}: a target is {', '.join(OWN_NAMES)} or begins with "
                         f"{', '.join(name + ':' for name in PROVIDERS)}")
    found = _target(settings, "--alias", spec)
    if "://" not in spec:
        return found.id
    same = [target for target in known if target[:2] == found[:2]]
    return same[0] if same else _placed(found)


def _placed(target: Target) -> Target:
    """Return a target with the side on which it is, as far as its address tells."""
    here = may_be_local(target.endpoint, target.model) and (
        target.endpoint.on_device or target.endpoint.provider == "ollama")
    return target._replace(side=Side.LOCAL if here else Side.CLOUD)


def embedding_targets(settings: Settings) -> tuple[Target, ...]:
    """Return the target of --embedding-model, if there is one.  Raises UsageError."""
    if not settings.embedding_model:
        return ()
    return (_placed(_target(settings, "--embedding-model", settings.embedding_model)),)


def first_of(inputs: Sequence[Any], most: int) -> Sequence[Any]:
    """Return the first of the inputs of an embedding that go in one request, `most` at most and one at least."""
    sizes = itertools.accumulate(map(len, inputs[:most]))
    return inputs[:max(sum(1 for size in sizes if size <= MAX_BATCH), 1)]


# At once: some servers take no more than 32 (TEI); of OpenAI's vectors, of 3072 numbers each, JSON may have 256 here.
# Others say so: DashScope takes 10, and Mistral counts the tokens of all.
MOST_INPUTS = (32, 256)
TOO_MANY = re.compile(r"(?i)\bbatch|array.*(too long|max)|too many|tokens per request|at most \d+ (items|inputs)")
MAX_BATCH = 200_000    # characters, or tokens: OpenAI takes 300,000 tokens, and a character is seldom more than one


def check_dimensions(one: Any, request: EmbeddingRequest) -> None:
    """Raise Unsupported if a vector has another size than was asked for.

    Some servers take no notice of it.  Those that refuse it are asked without, as many clients say the usual size.
    """
    asked = request.body.get("dimensions")
    if asked and len(one) != ((4 * asked + 2) // 3 * 4 if request.in_base64 else asked):
        raise Unsupported(f"The model made no vectors of {asked} numbers: leave dimensions out, or ask for others.",
                          param="dimensions")


def vector(told: Any, in_base64: bool) -> Any:
    """Return a server's vector in the form that is wanted, whichever it came in.  Raises NOT_IN_ITS_FORMAT."""
    numbers, raw = told, base64.b64decode(told, validate=True) if isinstance(told, str) else b""
    if raw:
        if len(raw) % 4:
            raise ValueError("no float32s")
        numbers = struct.unpack(f"<{len(raw) // 4}f", raw)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("no vector")
    if not in_base64:
        return numbers
    return told if raw else base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def may_be_local(endpoint: Endpoint, model: str) -> bool:
    """Return True if a model may count as local: neither a vendor's server nor ollama.com answers."""
    return not any(is_at(endpoint.base_url, provider.vendor) for provider in PROVIDERS.values()) and not (
        endpoint.provider == "ollama" and is_remote(model))


# === 7. Transport =====================================================================================================
# uses: 1 3
# How do bytes get to an upstream and back?  By the proxies that urllib knows, over connections that stay open between
# requests, in HTTP/1.1, which is written and read here.  It knows addresses and deadlines, and nothing of what
# the bytes mean.  Four rules hold here and in 12:
#   A wait is a blocking call that ends by itself after a tick; then one callback looks at the clock and the client.
#   A stream belongs to its own thread from head to end: what one read brought goes out in one write.
#   Events that say a text and nothing else are known by one static pattern, and pass as values of their own type.
#   The kernel schedules threads, not Oblix: those of requests are held on one core.

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
    """Limit each read and each write of a connection, which then raises one of NOT_YET, to so many seconds.

    Python's settimeout adds two system calls to every wait, and each of them hands the interpreter to another thread:
    30 us of CPU with 16 clients on two cores (measured).  The kernel limits the waits of a blocking socket itself: on
    Linux, where that was tried, and not with TLS, as the ssl module repeats what was cut short.
    """
    if sys.platform != "linux" or hasattr(connection, "pending"):    # TLS
        return connection.settimeout(limit_s)
    connection.settimeout(None)
    size = len(connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))    # of the C library's struct timeval
    value = struct.pack("qq" if size == 16 else "ii", int(limit_s), int(limit_s % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, value)


def wait_for(event: threading.Event, limit_s: float, look: Look) -> bool:
    """Return True if an event of ours comes within the limit.  Raise what the look raises."""
    deadline = time.monotonic() + limit_s
    look()
    while not event.wait(min(TICK_S, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
        look()
    return True


class Errand:
    """Work on a thread of its own; it has a value or an error when `done` is set."""
    value: Any = None
    error: Exception | None = UpstreamError("it failed")    # by a bug, which stderr tells

    def __init__(self) -> None:
        self.done = threading.Event()

    def result(self, look: Look = no_look) -> Any:
        """Return what the work returns, when it does.  Raise what it raises, and what the look raises."""
        wait_for(self.done, math.inf, look)
        if self.error:
            raise copy.copy(self.error)    # others wait for the same
        return self.value


class Errands:
    """Work of one kind.  Callers that want the same piece at a time share it; one that leaves does not end it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self.under_way: dict[Any, Errand] = {}    # by key; only setdefault, get and del are used, which are atomic

    def begin(self, key: Any, *more: Any) -> Errand:
        """Begin to work on a key, or join the errand that is under way.  Do not wait."""
        fresh = Errand()
        errand = self.under_way.setdefault(key, fresh)
        if errand is fresh:
            thread = threading.Thread(target=self._run, args=(errand, key, *more), name="errand", daemon=True)
            try:
                thread.start()
            except RuntimeError:    # no more threads
                errand.error = UpstreamError("no thread is left for it", status=503, code="out_of_threads")
                self._end(errand, key)
        return errand

    def _run(self, errand: Errand, key: Any, *more: Any) -> None:
        try:
            errand.value, errand.error = self._work(key, *more), None
        except (OblixError, OSError, ValueError) as failure:
            errand.error = failure
        finally:
            self._end(errand, key)

    def _end(self, errand: Errand, key: Any) -> None:
        del self.under_way[key]
        errand.done.set()


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

MAX_ADDRESSES = 8    # of a name that are tried
LOOK_UP_S = 10       # after which one that hangs is waited for by nobody new
DEAD_S = 6           # after which a silent network has failed, and not a slow model: the peer's kernel answers at once


class _Route(NamedTuple):
    """How an upstream is reached."""
    upstream: str    # its host[:port]
    tls: bool
    host: str        # host[:port] to connect to: the upstream, or a proxy
    tunnel: str      # the upstream's host[:port] where a proxy passes bytes through to it, else ""
    head: str        # the request line's target and version, and fields
    secret: str      # the field that the proxy wants to see of a tunnel, else ""


def _proxy_for(there: urllib.parse.SplitResult) -> str:
    """Return the URL of the system's proxy to a URL, or "" where there is none or the host is near.

    Raise UpstreamError for one that does not speak HTTP: its owner may not want to be seen without it.
    """
    name = (there.hostname or "").rstrip(".")
    address = address_of(name)
    if is_loopback(name) or (address.is_private if address else    # link-local included
                             "." not in name or name.endswith((".local", ".lan", ".internal", ".home.arpa"))):
        return ""
    from urllib.request import getproxies, proxy_bypass  # takes 2 MiB, which a local model alone does not need
    known = getproxies()
    proxy = known.get(there.scheme) or known.get("all", "")
    port = there.port or (443 if there.scheme == "https" else 80)
    if not proxy or any(_excepts(rule, name, port) for rule in re.split(r"[,\s]+", known.get("no", "").lower())):
        return ""
    kind, found, _ = proxy.partition("://")
    if found and kind.lower() not in ("http", "https"):
        raise UpstreamError(f"{kind} proxies are not supported: set {there.scheme}_proxy to one that speaks HTTP, or "
                            f"no_proxy={name} to do without", status=503, code="unsupported_proxy")
    return "" if proxy_bypass(there.netloc) else proxy if found else f"http://{proxy}"


def _excepts(rule: str, name: str, port: int) -> bool:
    """Return True if a rule of NO_PROXY is for a host: x.test (and all below it), *.x.test:8000, x.*, 100.64.0.0/10."""
    address = address_of(name)
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(rule.strip("[]"), strict=False)
        return address is not None and address in network
    found = re.fullmatch(r"\[?([^\[\]]+?)\]?(?::([0-9]+))?", rule)
    if not found or found[2] and int(found[2]) != port:
        return False
    wanted = found[1].lstrip("*").strip(".")
    return fnmatch.fnmatchcase(name, found[1]) or wanted != "" and f".{name}".endswith("." + wanted)


def way_to(url: str) -> _Route:
    """Return how a URL is reached: as it is, or by the system's proxy."""
    there = urllib.parse.urlsplit(url)
    by, host, tls = urllib.parse.urlsplit(_proxy_for(there)), there.netloc, there.scheme == "https"
    path = urllib.parse.urlunsplit(("", "", there.path or "/", there.query, ""))
    user = ":".join(urllib.parse.unquote(part or "") for part in (by.username, by.password))
    secret = f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n" if by.username else ""
    middle = by.netloc.rpartition("@")[2]
    if middle and not tls:    # it passes on requests
        return _Route(host, by.scheme == "https", middle, "", f"{url} HTTP/1.1\r\nHost: {host}\r\n{secret}", "")
    return _Route(host, tls, middle or host, middle and host, f"{path} HTTP/1.1\r\nHost: {host}\r\n", secret)


def _dial(found: Sequence[Any], watch: Look) -> socket.socket:
    """Return a TCP connection to the first address that takes one.  Raise OSError, and what `watch` raises.

    One of them may lead nowhere, so they are tried side by side: each a tick after the one before, or at once where
    that has failed (RFC 8305, section 5).
    """
    both = [[one for one in found if (one[0] == found[0][0]) is same] for same in (True, False)]    # versions of IP
    left = [one for pair in itertools.zip_longest(*both) for one in pair if one][:MAX_ADDRESSES]
    failure, trying = OSError("its name has no address"), selectors.DefaultSelector()
    try:
        while left or trying.get_map():
            watch()
            try:
                if left:
                    one = _begin_to_connect(*left.pop(0))
                    trying.register(one, selectors.EVENT_WRITE, one)
            except OSError as error:
                failure = error
                continue
            for key, _ in trying.select(TICK_S):
                trying.unregister(key.data)
                code = key.data.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return key.data  # type: ignore[no-any-return]
                key.data.close()
                failure = OSError(code, os.strerror(code))
        raise failure
    finally:
        for key in tuple(trying.get_map().values()):
            key.data.close()
        trying.close()


def _begin_to_connect(family: int, kind: int, protocol: int, _: str, address: Any) -> socket.socket:
    """Return a socket that is on its way to an address.  Raise OSError."""
    one = socket.socket(family, kind, protocol)
    one.setblocking(False)
    try:
        with contextlib.suppress(BlockingIOError):
            one.connect(address)
    except OSError:
        one.close()
        raise
    return one


def _prepare(upstream: socket.socket) -> None:
    """Let a connection send at once, wait for a tick at most, and fail where its other end has vanished.

    The last happens as a device changes networks.  Else a request on a kept connection would wait there for as long as
    a model may think.  What was sent and is not acknowledged counts here on macOS (TCP_RXT_CONNDROPTIME) and Windows
    (TCP_MAXRT), whose options Python has no names for, and in `_undelivered` on Linux.
    """
    upstream.settimeout(TICK_S)
    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 9, "TCP_KEEPALIVE": 9, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
    options = {getattr(socket, name): value for name, value in names.items() if hasattr(socket, name)}
    for option, value in {**options, **{"darwin": {0x80: DEAD_S}, "win32": {5: DEAD_S}}.get(sys.platform, {})}.items():
        with contextlib.suppress(OSError):
            upstream.setsockopt(socket.IPPROTO_TCP, option, value)


def _undelivered(upstream: socket.socket) -> tuple[int, float]:
    """Return (how much that was sent the other side's kernel has not acknowledged, for how many seconds it is silent).

    Both are 0 where nothing is on its way, or where the system does not tell.
    """
    with contextlib.suppress(OSError, struct.error):
        if sys.platform == "darwin":
            return upstream.getsockopt(socket.SOL_SOCKET, 0x1024), 0.0    # SO_NWRITE
        if sys.platform == "linux":
            told = upstream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232).ljust(232, b"\0")    # linux/tcp.h
            sent, silent_ms, unsent, window = (struct.unpack_from("=I", told, at)[0] for at in (24, 56, 144, 228))
            # A peer that takes nothing now is not silent.  A firewall of this device drops what then counts as unsent.
            return sent + unsent, silent_ms / 1000 if sent or unsent and window else 0.0
    return 0, 0.0


def _open_tunnel(upstream: socket.socket, way: _Route, watch: Look) -> None:
    """Ask a proxy to pass bytes through.  Raise UpstreamError where it does not, OSError, and what `watch` raises."""
    there = way.tunnel if urllib.parse.urlsplit(f"//{way.tunnel}").port else f"{way.tunnel}:443"
    asked = f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n{way.secret}\r\n".encode("latin-1")
    send_all(upstream, asked, math.inf, watch)
    answer = Answer(upstream, Limits(math.inf, math.inf, math.inf), watch, no_look)
    answer.read_head()
    if answer.status >= 300:
        raise _refused_by_proxy(answer.status)


def _refused_by_proxy(status: int) -> UpstreamError:
    advice = ": are user and password right in https_proxy or http_proxy?" if status == 407 else ""
    return UpstreamError(f"the proxy refuses, with status {status}{advice}", status=503, code="upstream_unreachable")


# --- 7. Reading an answer ---------------------------------------------------------------------------------------------

MAX_ANSWER_HEAD = 64 << 10    # bytes
MAX_CHUNK_LINE = 1024         # bytes of a chunk's size and extensions, of which nobody is known to send any
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?(?:\n|$)")
_FIELDS_USED = re.compile(r"(?i)\n(connection|content-length|content-type|openai-processing-ms|retry-after(?:-ms)?|"
                          r"transfer-encoding):([^\n]*)")
_EMPTY_LINE = re.compile(rb"(?m)^[ \t\r]*\n")    # ends the trailers behind a body in chunks
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
        self._most = MAX_STREAM_BYTES
        self.silent = True             # nothing has come
        self.undelivered = False       # nor can the request have been worked on: its end was not acknowledged
        self._asked = time.monotonic()
        self._begun = self._trailing = self.complete = False    # the last one: the body has come
        self.ended = False             # the protocol's end mark has come, if not the end of the framing

    def watch(self) -> None:
        """See to client, clock, upstream.  Raise UpstreamError, ConnectionAbortedError, what the look raises."""
        before = time.monotonic()
        self._look()
        now = time.monotonic()
        self._deadline += now - before    # a client that takes what it is sent slowly is no silence of the upstream
        if self.silent and now - self._asked >= TICK_S:
            amount, silent_s = _undelivered(self._upstream)
            self.undelivered = amount > 0
            if min(silent_s, now - self._asked) >= DEAD_S:
                raise ConnectionAbortedError
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
        self.status = 0
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
        self._head = head = self._held[:end.start()].decode("latin-1").replace("\r\n", "\n")
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

    def field(self, name: str) -> str:
        """Return the value of any field of the head, "" without it."""
        found = re.search(rf"(?i)\n{name}: *([^\n]*)", self._head)
        return found[1] if found else ""

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
        """The seconds that the server asks to wait: `retry-after-ms` or `retry-after`, by RFC 9110, 10.2.3."""
        text = self._fields.get("retry-after", "")
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if self._fields.get("retry-after-ms"):
                return max(0.0, finite(self._fields["retry-after-ms"]) / 1000)
            if re.fullmatch(r"\s*[\d.]+\s*", text):
                return finite(text)
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else None
        return None

    def begin(self) -> None:
        """From now on limit silence: the first content has come, or more that is more than a sign of life."""
        self._begun, self._deadline = True, time.monotonic() + self._limits.stall_s

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
        """Return the body that is in what has come; None is the connection's end.  Raise UpstreamError, ValueError."""
        if come is None and (self._chunked or self._counted):
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
        if self._size > self._most:
            raise UpstreamError(f"the answer is larger than {self._most >> 20} MiB")
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
        end = _EMPTY_LINE.search(self._held) if self._trailing else None
        if end:
            self.complete, self._held = True, self._held[end.end():]
        elif len(self._held) > (MAX_ANSWER_HEAD if self._trailing else MAX_CHUNK_LINE) or (
                not self._trailing and self._held.find(b"\n", 2) >= 0):
            raise ValueError("no chunk")
        return b"".join(found)

    def body(self, within_first_byte: bool = False) -> bytes:
        """Return the whole body, all within the first byte's limit if that is said.  Raise UpstreamError."""
        self._most, pieces = MAX_BODY_BYTES, []
        for piece in self._pieces():
            if not within_first_byte:
                self.begin()
            pieces.append(piece)
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
            if self._begun and (texts or any(line[:1] not in b":\r\n" for line in lines)):
                self.begin()    # counted from when the client has taken it
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

    def close(self) -> None:
        """Keep the connection if the answer has been read to its end, else break it off, which stops the upstream."""
        if self.ended and not self.complete:    # what is behind the end mark is read, if it comes at once
            self._look, self._until, self._deadline = no_look, math.inf, time.monotonic() + DRAIN_S
            limit_waits(self._upstream, DRAIN_S)
            with contextlib.suppress(UpstreamError):
                collections.deque(self._pieces(), 0)
            limit_waits(self._upstream, TICK_S)
        if self.complete and self._keeps_open and not self._held:
            self._keep()
        else:
            self._upstream.close()


def time_is_up() -> UpstreamError:
    """Return the error of a request that has taken all the time that it may."""
    return UpstreamError("the time limit of the whole request is over (--request-timeout-s)", Fault.LATE, status=504,
                         code="request_timeout", retry=False)


_FAULTS: tuple[tuple[Any, str, int, str], ...] = (    # the first that fits; socket.timeout is TimeoutError since 3.10
    (NOT_YET, "no connection, or the request was not accepted, within the time limit", 504, "upstream_timeout"),
    ((socket.gaierror, UnicodeError), "its host name can't be resolved", 503, "upstream_unreachable"),
    (ConnectionRefusedError, "connection refused", 503, "upstream_unreachable"),
    (ConnectionAbortedError, "what is sent does not arrive: the network is gone, or it drops large packets (MTU)", 503,
     "upstream_unreachable"),
    (ConnectionError, "the connection broke off", 502, "upstream_cut"),
    (OSError, "unreachable: {}", 503, "upstream_unreachable"),
    (ValueError, "it does not answer in HTTP", 502, "bad_upstream_answer"),
)


# by OpenSSL's number of what is wrong with a certificate (x509_vfy.h), or its word for another fault
_TLS_ADVICE: dict[Any, str] = {
    **dict.fromkeys((9, 10), "is the clock of this device right?"),    # not yet valid, has expired
    **dict.fromkeys((18, 19, 20, 21), "if its issuer is your own, or a proxy's, name that one's certificate in "
                                      "SSL_CERT_FILE; else, is the package ca-certificates installed?"),
    **dict.fromkeys((62, 64), "is the address right, and no login page in between?"),
    "WRONG_VERSION_NUMBER": "there is no TLS there: is its address http://…?",
}


def _about_tls(error: Any) -> str:
    """Return which fault of TLS it is, and what a person can do."""
    number, why = getattr(error, "verify_code", 0), getattr(error, "reason", None) or "it broke off"
    advice = _TLS_ADVICE.get(number or why, "")
    return f"TLS failed: {error.verify_message.rstrip('.') if number else why}" + (f"; {advice}" if advice else "")


@contextlib.contextmanager
def _upstream_faults(where: str = "") -> Iterator[None]:
    """Turn all that sockets, TLS and DNS raise into an UpstreamError, here and nowhere else."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        words, status, code = next(fault[1:] for fault in _FAULTS if isinstance(error, fault[0]))
        if hasattr(error, "library") and not isinstance(error, NOT_YET):    # of ssl, which need not be imported
            words, status, code, why = "{}", 502, "upstream_tls", _about_tls(error)
        raise UpstreamError(words.format(why) + where, status=status, code=code) from error


# --- 7. Exchanges -----------------------------------------------------------------------------------------------------

def _new_tls_context() -> ssl.SSLContext:
    import ssl
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class Transport:
    """Opens exchanges with upstreams, over connections that stay open between requests.

    Proxies are as in the environment, but never for hosts that are near.  No redirect is followed: nothing here does
    it, so that no key can be carried anywhere by one.
    """

    def __init__(self) -> None:
        self._idle: dict[Any, collections.deque[tuple[socket.socket, float]]] = {}    # by way[:4]
        self._way = functools.lru_cache(256)(way_to)    # there are a few URLs for each endpoint; proxies take 0.05 ms
        self._tls_context = functools.lru_cache(1)(_new_tls_context)    # when first needed: it reads all certificates
        # (host, port, …) -> addresses, on a thread of its own, as the resolver has no time limit
        self._resolver = Errands(lambda place: socket.getaddrinfo(place[0], place[1], type=socket.SOCK_STREAM))
        self._closed = False
        self.connect_s = math.inf    # the most that connecting may take, whatever an exchange's limits say

    def open(self, url: str, headers: Mapping[str, str], payload: bytes | None, limits: Limits,
             look: Look = no_look) -> Answer:
        """Return the answer, of any status, to a POST of JSON, or a GET.  Raise UpstreamError, what the look raises."""
        with _upstream_faults():
            way = self._way(url)
            lines = [f"{'GET' if payload is None else 'POST'} {way.head}User-Agent: oblix/{__version__}", "Accept: */*",
                     "Accept-Encoding: identity", *(f"{name}: {value}" for name, value in headers.items())]
            if payload is not None:
                lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
            head = "\r\n".join([*lines, "", ""]).encode("latin-1")
            answer = self._exchange(way, head + (payload or b""), limits, look)
            if answer.status == 407:
                answer.close()
                raise _refused_by_proxy(407)
            return answer

    def _exchange(self, way: _Route, raw: bytes, limits: Limits, look: Look) -> Answer:
        """Send a request, and return its answer when the head has come.

        A kept connection may have died while it was idle.  That shows at once, or nothing of the request is
        acknowledged: only then is it sent again.  A model that has worked on it may be paid for it.
        """
        begun, kept = time.monotonic(), self._kept(way)
        while True:
            upstream = kept or self._connect(way, min(limits.connect_s, self.connect_s), look)
            answer = Answer(upstream, limits, look, functools.partial(self._keep, way, upstream))
            try:
                send_all(upstream, raw, limits.stall_s, answer.watch)
                answer.read_head()
                return answer
            except BaseException as error:
                with contextlib.suppress(OSError):    # nothing more shall be sent of what was written to it
                    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                        struct.pack("hh" if os.name == "nt" else "ii", 1, 0))
                upstream.close()
                dead = isinstance(error, OSError) and not isinstance(error, NOT_YET) and answer.silent
                if not kept or not dead or not answer.undelivered and time.monotonic() - begun > STALE_S:
                    raise
            self.forget(f"//{way.upstream}")    # the others have gone the same way
            kept = None

    def _connect(self, way: _Route, limit_s: float, look: Look) -> socket.socket:
        """Return a new connection, in TLS where wanted.  Raise UpstreamError, OSError, and what the look raises."""
        deadline = time.monotonic() + limit_s

        def watch() -> None:
            look()
            if time.monotonic() >= deadline:
                raise UpstreamError("no connection within the time limit", status=504, code="upstream_timeout")

        there = urllib.parse.urlsplit(f"//{way.host}")
        port = there.port or (443 if way.tls and not way.tunnel else 80)
        place = there.hostname, port, int(time.monotonic() / LOOK_UP_S)
        with _upstream_faults(f" (at the proxy {way.host})" if way.host != way.upstream else ""):
            upstream = _dial(self._resolver.begin(place).result(watch), watch)
        try:
            _prepare(upstream)
            if way.tunnel:
                _open_tunnel(upstream, way, watch)
            if way.tls:
                name = urllib.parse.urlsplit(f"//{way.tunnel or way.host}").hostname
                secured = upstream = self._tls_context().wrap_socket(upstream, server_hostname=name,
                                                                     do_handshake_on_connect=False)
                while not secured.version():
                    watch()
                    with contextlib.suppress(*NOT_YET):
                        secured.do_handshake()
            limit_waits(upstream, TICK_S)
        except BaseException:
            upstream.close()
            raise
        return upstream

    def _kept(self, way: _Route) -> socket.socket | None:
        """Return an idle connection on which nothing has come: neither its end, nor bytes that nobody asked for."""
        idle = self._idle.get(way[:4], collections.deque())
        with contextlib.suppress(IndexError):    # none is left
            while True:
                upstream, since = idle.pop()
                if 0 <= time.time() - since < IDLE_S and not _has_come(upstream, _READABLE):
                    return upstream
                upstream.close()
        return None

    def _keep(self, way: _Route, upstream: socket.socket) -> None:
        """Keep a connection for the next request, and close those that nobody has used for long."""
        now = time.time()    # which goes on while the device sleeps, unlike monotonic
        self._idle.setdefault(way[:4], collections.deque()).append((upstream, now))
        for idle in tuple(self._idle.values()):
            with contextlib.suppress(IndexError):    # none is left
                while self._closed or len(idle) > MAX_IDLE or not 0 <= now - idle[0][1] <= IDLE_S:
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

MAX_REMEMBERED = 256    # targets: clients name them, so there must be an end


class Ledger:
    """Requests in flight, and what requests have shown of each target."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[Target, int] = {}    # guarded by _lock; no zeros
        self._records: dict[Target, Record] = {}    # guarded by _lock; in the order in which they were last changed

    @contextlib.contextmanager
    def flight(self, target: Target) -> Iterator[int]:
        """Count a request as in flight while the block runs, which is given the count."""
        with self._lock:
            number = self._in_flight[target] = self._in_flight.get(target, 0) + 1
        try:
            yield number
        finally:
            with self._lock:
                self._in_flight[target] -= 1
                if not self._in_flight[target]:
                    del self._in_flight[target]

    def in_flight(self) -> dict[Target, int]:
        """Return the requests in flight by target."""
        with self._lock:
            return dict(self._in_flight)

    def records(self) -> dict[Target, Record]:
        """Return what is known of each target."""
        with self._lock:
            return dict(self._records)

    def record(self, target: Target) -> Record:
        """Return what is known of one target."""
        with self._lock:
            return self._records.get(target, UNTRIED)

    def _update(self, target: Target, change: Callable[[Record], Record]) -> Record:
        """Replace a target's record and return the one of before.  `change` does nothing but make a value."""
        with self._lock:
            before = self._records.pop(target, UNTRIED)
            self._records[target] = change(before)
            if len(self._records) > MAX_REMEMBERED:
                del self._records[next(iter(self._records))]
        return before

    @contextlib.contextmanager
    def trial(self, target: Target) -> Iterator[bool]:
        """Give the block True if it may try the target: until one has answered after a fault, one request at a time."""
        if not self.record(target).breaker.failures:    # nearly always
            yield True
            return
        taken = self._update(target, lambda record: record._replace(trial=True)).trial
        try:
            yield not taken
        finally:
            if not taken:
                self._update(target, lambda record: record._replace(trial=False))

    def settle(self, target: Target, error: UpstreamError | None) -> Breaker:
        """Note that an attempt has failed, or with None succeeded.  Return the target's breaker of before."""
        now, known = self.clock(), self.record(target).breaker
        if not error and not known.failures:    # nearly always
            return known
        return self._update(target, lambda record: record._replace(
            breaker=record.breaker.failed(error, now) if error else Breaker())).breaker

    def learn_refusal(self, target: Target, param: str) -> None:
        """Remember that this model refuses a parameter of the upstream's dialect."""
        self._update(target, lambda record: record._replace(refused=record.refused | {param}))

    def learn_pace(self, target: Target, first_s: float | None, tokens: int, seconds: float,
                   read: tuple[float, float] = (0.0, 0.0), cache: Cache | None = None) -> None:
        """Remember how fast an answer was, and what its model has in its cache."""
        now = self.clock()
        self._update(target, lambda record: record._replace(
            pace=record.pace.learned(first_s, tokens, seconds, read, now), cache=cache or record.cache))

    def learn_load(self, target: Target, load_s: float, context: int) -> None:
        """Remember how long the model took to load, and for which context.  It has nothing in its cache."""
        self._update(target, lambda record: record._replace(
            pace=record.pace._replace(load_s=load_s), context=context, cache=Cache()))


# --- 8. The journal ---------------------------------------------------------------------------------------------------

MAX_RECENT, MAX_NAME = 50, 100    # requests that /status lists; characters of the name that a client asked for
SHOWN = ("id", "front", "asked", "served", "side", "reason", "attempts", "fallbacks", "first_token_s", "tokens",
         "tokens_per_s", "seconds", "status", "outcome", "error")
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)    # seconds
_OF_TARGET = ("target", "side")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {    # name -> type, help, labels
    "oblix_requests_total": ("counter", "Requests to models that have ended: ok, rejected (4xx), error, cut (a stream "
                             "that broke off) or hung_up (by the client).", ("front", *_OF_TARGET, "outcome")),
    "oblix_fallbacks_total": ("counter", "Failed attempts at a target after which another one answered, by cause.",
                              ("target", "cause")),
    "oblix_tokens_total": ("counter", "Tokens of prompts and completions, as upstreams count them.",
                           (*_OF_TARGET, "type")),
    "oblix_time_to_first_token_seconds": ("histogram", "Time to the first content of streams.", _OF_TARGET),
    "oblix_request_duration_seconds": ("histogram", "Time to the end of requests that a target answered.", _OF_TARGET),
    "oblix_requests_in_flight": ("gauge", "Requests that a target is answering.", _OF_TARGET),
    "oblix_side_level": ("gauge", "0: local available, cloud optimal; 1: constrained, degraded; 2: critical, "
                         "disconnected.", ("side",)),
    "oblix_target_level": ("gauge", "The same for each target.", _OF_TARGET),
    "oblix_target_state": ("gauge", "1 for the state that a target is in.", (*_OF_TARGET, "state")),
    "oblix_breaker_state": ("gauge", "0: closed; 1: half-open, the next request is a trial; 2: open, it rests.",
                            _OF_TARGET),
    "oblix_breaker_rest_seconds": ("gauge", "Time that a target still rests after its failures.", _OF_TARGET),
    "oblix_build_info": ("gauge", "1 for the version that runs.", ("version",)),
    "process_cpu_seconds_total": ("counter", "User and system CPU time.", ()),
    "process_resident_memory_bytes": ("gauge", "Resident memory.", ()),
    "process_start_time_seconds": ("gauge", "Start of the process, in unix time.", ()),
    "process_open_fds": ("gauge", "Open file descriptors.", ()),
}


class Journal:
    """Sums over the requests that have ended, for /metrics, and the last ones, for /status."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.recent: collections.deque[Json] = collections.deque(maxlen=MAX_RECENT)
        self._targets = {""}    # that are labels
        self._lock = threading.Lock()
        self._sums: dict[tuple[Any, ...], float] = {}    # guarded by _lock; (a metric, its labels' values, a bucket)

    def add(self, facts: Json) -> None:
        """Take what the log's line says of a request to a model."""
        outcome, seconds, served = outcome_of(facts), facts["seconds"], facts.get("served", "")
        shown = {**{name: facts.get(name) for name in SHOWN}, "outcome": outcome}
        shown["asked"] = shown["asked"] and shown["asked"][:MAX_NAME]
        self.recent.append({"time": round(time.time() - seconds, 3), **shown})
        labels = self.name(served), facts.get("side", "")
        sums: list[tuple[tuple[Any, ...], float]] = [(("oblix_requests_total", facts["front"], *labels, outcome), 1)]
        sums += [(("oblix_fallbacks_total", self.name(failed), cause), 1)
                 for failed, cause in facts.get("fallbacks", ())]
        if served:
            sums += [(("oblix_tokens_total", *labels, "prompt"), facts.get("prompt_tokens", 0)),
                     (("oblix_tokens_total", *labels, "completion"), facts.get("tokens", 0))]
            sums += _observed("oblix_request_duration_seconds", labels, seconds)
        if "first_token_s" in facts:
            sums += _observed("oblix_time_to_first_token_seconds", labels, facts["first_token_s"])
        with self._lock:
            for key, amount in sums:
                self._sums[key] = self._sums.get(key, 0) + amount

    def name(self, target: str) -> str:
        """Return a target's name as a label: clients name targets, so beyond MAX_REMEMBERED it is `other`."""
        if target not in self._targets:
            if len(self._targets) >= MAX_REMEMBERED:
                return "other"
            self._targets.add(target)
        return target

    def sums(self) -> dict[tuple[Any, ...], float]:
        """Return a copy of the sums."""
        with self._lock:
            return dict(self._sums)


def outcome_of(facts: Json) -> str:
    """Return how a request ended, in the words of oblix_requests_total."""
    if "error" not in facts:
        return "ok"
    if facts["error"] == HUNG_UP:
        return "hung_up"
    if facts.get("status") == 200:    # the head had been sent
        return "cut" if "served" in facts else "error"
    return "rejected" if facts.get("status", 500) < 500 else "error"


def _observed(metric: str, labels: tuple[str, ...], seconds: float) -> list[tuple[tuple[Any, ...], float]]:
    """Return what a histogram gets by one more value: in its bucket, and in the sum."""
    return [((metric, *labels, bisect.bisect_left(BUCKETS, seconds)), 1), ((metric, *labels, "sum"), seconds)]


def exposition(values: Mapping[tuple[Any, ...], float]) -> str:
    """Return metrics in Prometheus' text format, version 0.0.4."""
    lines: list[str] = []
    for metric, (kind, text, names) in METRICS.items():
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        found = {key[1:]: value for key, value in values.items() if key[0] == metric}
        samples = _buckets(found) if kind == "histogram" else (("", *each) for each in found.items())
        for suffix, labels, value in samples:
            marks = ",".join([f'{name}="{str(label).translate(_ESCAPES)}"'
                              for name, label in zip((*names, "le"), labels)])
            lines.append(f"{metric}{suffix}{{{marks}}} {value}" if marks else f"{metric} {value}")
    return "\n".join([*lines, ""])


def _buckets(counts: Mapping[tuple[Any, ...], float]) -> Iterator[tuple[str, tuple[Any, ...], float]]:
    """Yield a histogram's samples: the suffix of the name, the labels, the value."""
    for labels in dict.fromkeys(key[:-1] for key in counts):
        number: float = 0
        for place, bound in enumerate((*BUCKETS, "+Inf")):
            number += counts.get((*labels, place), 0)
            yield "_bucket", (*labels, bound), number
        yield from (("_sum", labels, counts.get((*labels, "sum"), 0)), ("_count", labels, number))


# === 9. Gateway =======================================================================================================
# uses: 1 2 3 4 5 6 7 8 10
# How does one request become one answer?  Composes the sections above: resolve the model, rank the targets, try them
# until one has content, and tell why.  It knows nothing of the client's HTTP but the socket to watch.

PROBE_LIMITS = Limits(connect_s=math.inf, first_byte_s=5.0, stall_s=5.0)
MAX_NEAR = 500               # names that are compared with one that nothing has: each takes some 0.1 ms
SECOND_TRY_S = 0.5           # sooner nothing will have changed
PAUSE_S, MAX_PAUSE_S = 0.5, 2.0    # before a cloud that has failed is asked again: at least, and less than,
SLOW_S = 15.0                # where the local model would take longer than this
OVERHEAD_S = 0.2             # of a first word besides its reading: HTTP, the template, the first token's writing
WARM_AGAIN_S = 300.0         # as long as Ollama keeps a model by itself
KEPT_S, KEPT_ON_BATTERY_S = 1800, 300    # a model in memory; Ollama's own default is the latter
CACHED_S = 300    # a prompt, by Claude: its usual time
LOAD_S = 300.0               # Ollama gives up a load after 5 minutes by itself (OLLAMA_LOAD_TIMEOUT)
LOAD_RETRY_S = 5.0    # the Retry-After where only a loading model could have answered
MAX_SAID = 32_768     # chunks of a stream that are kept to be continued, some 1 KB each; a longer one is not
MAX_HELD = 4096       # chunks that say nothing before the first that does; a few are usual
_ADVICE = "start Ollama and pull a model, or set OPENAI_API_KEY or ANTHROPIC_API_KEY"
# Codes of faults that tell of the way to an endpoint, so that it is worth a probe at once.
_LOST = ("upstream_unreachable", "upstream_tls", "upstream_timeout", "upstream_cut")


def new_id(prefix: str) -> str:
    """Return a fresh random id.  It is not a secret, so it takes no system call."""
    return f"{prefix}{random.getrandbits(96):024x}"


def _envelope(first: Chunk, model: str) -> Json:
    """Return what all chunks of a stream have in common: the upstream's id and time where its first chunk has them."""
    id = first.get("id")
    return {"id": id if id and isinstance(id, str) else new_id("chatcmpl-"), "object": "chat.completion.chunk",
            "created": created_at(first.get("created")) or int(time.time()), "model": model}


class Prober:
    """Asks endpoints how they are, over the route that requests take: same proxy, same TLS."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._details: dict[Endpoint, dict[str, Json]] = {}    # of models; one thread asks each endpoint

    def __call__(self, endpoint: Endpoint) -> Probe:
        """Return the state of an endpoint.  Raises UpstreamError, also for a captive portal's page."""
        provider, answers, models = PROVIDERS[endpoint.provider], list[Answer](), None

        def ask(path: str, payload: Json | None) -> Json:
            answer = self._transport.open(endpoint.base_url + path, provider.headers(endpoint),
                                          None if payload is None else dumps(payload), PROBE_LIMITS)
            answers.append(answer)
            with contextlib.closing(answer):
                text = answer.body(within_first_byte=True)
            if answer.status in (404, 405):    # a compatible server without a list of models is there anyway
                return {}
            try:
                told = loads(text)
            except ValueError:
                raise UpstreamError(f"what answers there is not {provider.label} (a login page?)") from None
            if answer.status >= 500 or 300 <= answer.status < 400:
                raise classify(answer.status, text.decode("utf-8", "replace"), None, endpoint)
            return told  # type: ignore[no-any-return]
        with contextlib.suppress(*NOT_IN_ITS_FORMAT):    # a list in no shape we know
            models = provider.catalogue(ask, self._details.setdefault(endpoint, {}))
        first = answers[0]
        latency_ms = 1000 * max(0.0, first.waited_s - first.worked_s)
        return Probe(first.status, models if first.status == 200 else None, latency_ms)


class Result(NamedTuple):
    """An answer on its way to the client: either `whole`, or `chunks` whose first ones have content."""
    target: Target
    reason: str
    attempts: int
    whole: Json | None = None
    chunks: Iterator[Any] = iter(())
    held: int = 0       # how many of the chunks have come; the last of them has content
    fallbacks: Sequence[tuple[str, str]] = ()    # targets that failed, and their faults; it may grow with the chunks


class Gateway:
    """One per process: what is configured and known, and what to do with a request.  Any thread may call it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger, self.transport, self.loader = Ledger(), Transport(), Errands(self._load)
        self.journal = Journal()
        self.limits = Limits(settings.connect_timeout_s, settings.first_byte_timeout_s, settings.stall_timeout_s)
        self.transport.connect_s = settings.connect_timeout_s    # of probes and of loads, too
        self._started = settings.prefer == "cloud"    # what is the second choice is loaded only when it may be needed
        self._warm_from = 0.0    # no sooner again: what did not stay in memory may not be able to, or not be wanted
        # Targets that are loaded but not shown so: the context that was asked for, and what their server shows instead.
        # Some don't say the context, or another one (clamped, times the parallel slots), and models of one file of
        # weights are one to Ollama.  Another load would change nothing.
        self._shown_as: dict[Target, tuple[int, frozenset[tuple[str, int]]]] = {}
        self._configured = configured_targets(settings)
        for target in self._configured:    # before any that clients name
            self.journal.name(target.id)
        self._embedders: tuple[Target, ...] = embedding_targets(settings)    # one at most
        self._default_endpoints = {name: provider.endpoint(settings) for name, provider in PROVIDERS.items()}
        self._ollama = self._default_endpoints["ollama"]
        self.ollama_url = self._ollama.base_url
        self.aliases = configured_aliases(settings, self._configured)
        # Ollama is watched in any case: whatever it has installed can be asked for by name
        watched = (Target(self._ollama, "", Side.LOCAL), *self._configured, *(
            target for alias in self.aliases for target in alias.targets if isinstance(target, Target)))
        self._prober = Prober(self.transport)
        self.watch = Watch(monitors_for(settings, watched, self._probe), sampled=self._stand_by)
        self.heard = self.watch.first(self._ollama)    # set when it has told what it has, or has not answered

    def close(self) -> None:
        self.watch.stop()
        self.transport.close()

    def snapshot(self) -> Snapshot:
        """Return all that a decision is made from, as it is now.  Does not wait."""
        settings, readings, loading = self.settings, self.watch.readings, frozenset(tuple(self.loader.under_way))
        local = () if settings.local_model else newest_that_fits(self._ollama, readings, loading)
        return Snapshot(readings, (*local, *self._configured), self.ledger.records(), self.ledger.in_flight(), loading,
                        self.ledger.clock(), settings.prefer, settings.local_slots, settings.local_first_s,
                        settings.local_whole_s, settings.patience_s)

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
        """Load a target's model if it is cold and the device is well enough.  Does not wait."""
        now = self.ledger.clock()
        if self.settings.warm_up == "auto" and found.state == "cold" and found.may_load and now >= self._warm_from:
            self._warm_from = now + WARM_AGAIN_S
            self.loader.begin(target, self.ledger.record(target).context)

    def _load(self, target: Target, context: int) -> None:
        """Load a model by a request of our own.  Raises UpstreamError."""
        log.info("%s is loading", target.id)
        provider, endpoint, started = PROVIDERS[target.endpoint.provider], target.endpoint, time.monotonic()
        limits = self.limits._replace(first_byte_s=max(LOAD_S, self.settings.first_byte_timeout_s))
        try:
            # Ollama loads a model for a request without messages, and says nothing
            encoded = provider.encode(ChatRequest("", {"messages": []}), target, context, self.keep_alive(target))
            with contextlib.closing(self.open(target, provider.chat_path, encoded, limits, no_look)) as answer:
                text = answer.body(within_first_byte=True).decode("utf-8", "replace")
            for line in text.splitlines() or [text]:    # an error, or a login page, may come with any status
                event_of(line)
        except UpstreamError as error:
            log.info("%s was not loaded: %s", target.id, error.brief)
            self.ledger.settle(target, error)    # it rests before it is tried again
            raise
        load_s = time.monotonic() - started
        log.info("%s is loaded, %.1f s", target.id, load_s)
        self.ledger.learn_load(target, load_s, context)
        self._shown_as.pop(target, None)
        self.watch.look(endpoint, lambda reading: _shows_loaded(target, (context, 0), reading))    # 0: it does not say
        model = model_of(target, self.watch.readings)
        if model and (model.cold or context not in (0, model.context)):
            instead = models_of(endpoint, self.watch.readings) if model.cold else (model,)
            self._shown_as[target] = context, _in_memory(instead)
            self.watch.look(endpoint, lambda reading: _shows_loaded(target, (context,), reading))

    def _probe(self, endpoint: Endpoint) -> Probe:
        """Return the state of an endpoint, whose models are in memory as they were loaded.  Raise UpstreamError."""
        probe = self._prober(endpoint)
        models = {full_name(model.name): model for model in probe.models or ()}
        shown = _in_memory(models.values())
        for target, (context, instead) in tuple(self._shown_as.items()):
            name = full_name(target.model)
            model = models.get(name) if target.endpoint == endpoint else None
            if model and (instead == shown or instead & shown) and (model.cold or instead >= _in_memory([model])):
                models[name] = dataclasses.replace(model, cold=False, context=context or model.context)
            elif model:
                self._shown_as.pop(target, None)    # it is shown, or what was in memory with it is gone
        return probe._replace(models=probe.models and tuple(models.values()))

    def keep_alive(self, target: Target) -> KeepAlive:
        """Return how long a target's server is asked to keep the model, or the prompt; None leaves that to it."""
        if target.endpoint.provider == "claude":
            return CACHED_S if self.settings.claude_cache == "auto" else None
        said = self.settings.keep_alive
        if said == "default" or target.side is Side.CLOUD:
            return None
        if said == "auto":
            plugged = device_facts(self.watch.readings).get("battery_plugged")
            return KEPT_ON_BATTERY_S if plugged is False and target.endpoint.on_device else KEPT_S
        return float(said) if re.fullmatch(NUMBER, said) else said    # Ollama reads "300" as no duration

    def meaning_of(self, name: str) -> Alias:
        """Return the first alias that a model's name fits, or the name's own meaning as an alias without a name."""
        plain = name.removesuffix(":latest")    # which Ollama's clients add
        if plain in OWN_NAMES:
            return Alias("", (plain,))
        return next((alias for alias in self.aliases if any(
            fnmatch.fnmatchcase(one, alias.name) for one in (name, plain))), Alias("", (name,)))

    def resolve(self, name: str | Target, snapshot: Snapshot) -> Target:
        """Return the one target that a name, which is not an alias, stands for.  Raises BadRequest (404)."""
        if isinstance(name, Target):
            return name
        provider, model = split_id(name)
        for target in snapshot.targets:
            its = target.endpoint.provider
            if provider in ("", its) and (model == target.model
                                          or its == "ollama" and full_name(model) == full_name(target.model)):
                return target
        spelt = [one for one in models_of(self._ollama, snapshot.readings) if full_name(one.name) == full_name(model)]
        if not (provider or spelt) and model.startswith("claude-") and not self._default_endpoints["claude"].lacks_key:
            provider = "claude"    # Anthropic's clients name its models so
        if not model or not (provider or spelt):
            raise self._unknown(name, snapshot)
        endpoint = self._default_endpoints[provider or "ollama"]
        local = endpoint.provider == "ollama" and may_be_local(endpoint, model) and not any(
            one.remote for one in spelt)
        model = spelt[0].name.removesuffix(":latest") if spelt else model    # one target for all spellings
        return Target(endpoint, model, Side.LOCAL if local else Side.CLOUD)

    def _unknown(self, name: str, snapshot: Snapshot) -> BadRequest:
        """Return the error for a name that nothing has, with the nearest names."""
        import difflib
        ids = [*self.catalogue()][len(OWN_NAMES):MAX_NEAR]
        near = difflib.get_close_matches(name, dict.fromkeys([*ids, *(split_id(id)[1] for id in ids)]))
        return BadRequest(
            f"There is no model {name!r}." + (f" Do you mean {' or '.join(near)}?" if near else "") +
            f" Choose one of {', '.join([*OWN_NAMES, *(target.id for target in snapshot.targets)])}, or any other as "
            f"provider:name with {', '.join(PROVIDERS)} as the provider; see GET /v1/models.", param="model",
            status=404, code="model_not_found")

    def plan(self, request: ChatRequest) -> Plan:
        """Return what to try for a request.  Raises OblixError: an unknown model, no key, nothing that can answer.

        A model that was named is tried alone, whatever is known of it.
        """
        snapshot, alias = self.snapshot(), self.meaning_of(request.model)
        asked = [name if name in OWN_NAMES else self.resolve(name, snapshot) for name in alias.targets]
        if len(asked) == 1 and isinstance(asked[0], Target):
            refused = PROVIDERS[asked[0].endpoint.provider].refusal(request)
            if refused:
                raise refused
            check_key(asked[0])
            plan = Plan((asked[0],), "the request named the model")
        else:
            plan = self._plan_of_all(request, asked, snapshot)
        return dataclasses.replace(plan, reason=f"{alias}: {plan.reason}") if alias.name else plan

    def _plan_of_all(self, request: ChatRequest, asked: Sequence[str | Target], snapshot: Snapshot) -> Plan:
        """Return the plan for Oblix's own names, and for targets, one after the other.  Raises OblixError."""
        more = [one for one in asked if isinstance(one, Target) and one not in snapshot.targets]
        targets = (*snapshot.targets, *more)
        refusals = {target: refused for target in targets if (refused := self._refusal(request, target, snapshot))}
        told = {target: refused.message for target, refused in refusals.items()}
        work = work_of(request) if len(targets) > 1 else USUAL_WORK
        plan = in_turn([rank_one(one, snapshot, told, work) if isinstance(one, Target) else
                        rank(snapshot, told, None if one == "auto" else Side(one), work) for one in asked])
        if not plan.order and not plan.last_resort:
            raise self._nothing_left(plan, refusals, snapshot, [
                target for target in targets if any(one in ("auto", target.side, target) for one in asked)])
        return plan

    def _refusal(self, request: ChatRequest, target: Target, snapshot: Snapshot) -> Unsupported | None:
        """Return what of the request a target can't do, from what its provider and its server say, or None."""
        refused = PROVIDERS[target.endpoint.provider].refusal(request)
        if refused or target.endpoint.provider != "ollama":
            return refused
        model = model_of(target, snapshot.readings)
        lacking = needs_of(request) - model.capabilities if model and model.capabilities else ()
        if lacking:
            return Unsupported(f"the model has no {' and no '.join(sorted(lacking))}", param="model")
        try:
            self.context(request, target, snapshot)
        except Unsupported as error:
            return error
        return None

    def context(self, request: ChatRequest, target: Target, snapshot: Snapshot) -> int:
        """Return the context to load the target's model for, or 0 to leave it as it is.  Raises Unsupported."""
        model = model_of(target, snapshot.readings)
        if not model or not model.max_context:
            return 0
        return PROVIDERS[target.endpoint.provider].context_for(
            request, model, snapshot.record(target).context, free_bytes(target, snapshot.readings))

    @staticmethod
    def _nothing_left(plan: Plan, refusals: Mapping[Target, Unsupported], snapshot: Snapshot,
                      asked: Sequence[Target]) -> OblixError:
        """Return the error of a plan without a target: the client's, if the request itself excludes all of them."""
        text = "; ".join(f"{target.id}: {reason.rstrip('.')}" for target, reason in plan.excluded)
        if asked and all(target in refusals for target in asked):
            codes = {refused.code for refused in refusals.values()}
            return Unsupported(f"No model can take this request: {text}.", param=refusals[asked[0]].param,
                               code=codes.pop() if len(codes) == 1 else None)
        breakers = [snapshot.record(target).breaker for target in asked if target not in refusals]
        wait_s = min((breaker.rest_s(snapshot.now) for breaker in breakers
                      if breaker.rest_s(snapshot.now) and breaker.fault is not Fault.ACCOUNT), default=None)
        advice = "" if wait_s else f"; {_ADVICE}"
        return NoTarget(f"No model can answer: {plan.reason}. {text or 'Nothing is configured'}{advice}.",
                        retry=None if wait_s else False, retry_after_s=wait_s)

    def answer(self, request: ChatRequest, look: Look = no_look) -> Result:
        """Return the first answer that a target of the plan gives.  Raise OblixError, and what the look raises.

        What is returned has content; whatever happens later is told in its chunks' UpstreamError.
        """
        return Dispatch(self, request, look).run()

    def open(self, target: Target, path: str, encoded: Json, limits: Limits, look: Look,
             more: Iterable[tuple[str, str]] = ()) -> Answer:
        """Return a target's answer of status 2xx to a body, with these headers more.  Raise as `Transport.open`.

        The parameters that the model refuses are left out one by one; what it never accepts is remembered.
        """
        provider, endpoint = PROVIDERS[target.endpoint.provider], target.endpoint
        url, headers = endpoint.base_url + path, {**provider.headers(endpoint), **dict(more)}
        changed: dict[str, UpstreamError] = {}    # what was refused of this request -> in which words
        while True:
            unwanted = self.ledger.record(target).refused.union(changed)
            payload, sent = provider.adapt(encoded, unwanted), headers
            if unwanted:    # Claude's betas are words of a header
                sent = present({name: ",".join([word for word in value.split(",") if word.strip() not in unwanted])
                                for name, value in headers.items() if name not in unwanted})
            answer = self.transport.open(url, sent, dumps(payload), limits, look)
            if answer.status < 300 and answer.content_type != "text/html":
                for refused, error in changed.items():
                    if is_permanent(refused, error):
                        self.ledger.learn_refusal(target, refused)
                return answer
            with contextlib.closing(answer):
                if answer.status < 300:
                    raise UpstreamError(f"a web page answered instead of {provider.label} (a login page?)",
                                        code="bad_upstream_answer")
                text = answer.body().decode("utf-8", "replace")
            error = classify(answer.status, text, answer.retry_after_s, endpoint)
            param = provider.refused_parameter(error, payload)
            if not param or param.partition("<=")[0] in [known.partition("<=")[0] for known in changed]:
                raise error
            log.info("%s refuses %s: asked without", target.id, param.replace("<=", " above "))
            changed[param] = error

    def embed(self, request: EmbeddingRequest, route: str, look: Look = no_look) -> tuple[Target, list[Any], int]:
        """Return the target that made the vectors of a request, the vectors, and the tokens of its inputs.

        Vectors of two models have nothing in common: one model makes all, or the one that is named, and none in its
        place.  A `route` of local or cloud excludes the other side.  Raise OblixError, and what the look raises.
        """
        target, until = self._embedder(request, route, look), time.monotonic() + self.settings.request_timeout_s
        vectors, tokens = list[Any](), 0
        most = MOST_INPUTS[is_at(target.endpoint.base_url, PROVIDERS[target.endpoint.provider].vendor)]
        try:
            with self.ledger.flight(target), _without_key(target.endpoint):
                while len(vectors) < len(request.inputs):
                    inputs = first_of(request.inputs[len(vectors):], most)
                    found, count = self._vectors(target, inputs, request, self.limits._replace(until=until), look)
                    most = most if found else len(inputs) // 2
                    vectors, tokens = vectors + found, tokens + count
                    if len({*map(len, vectors)}) > 1:
                        raise UpstreamError("its vectors differ in length", code="bad_upstream_answer")
        except UpstreamError as error:
            self.note(target, error)
            if error.fault not in (Fault.REFUSED, Fault.TOO_LONG, Fault.CLIENT):
                error.message = (f"{target.id}: {error.message.rstrip('.')}. No other model is asked in its place: "
                                 "vectors of two models have nothing in common.")
            raise
        if vectors:
            self.note(target, None)
            check_dimensions(vectors[0], request)
        return target, vectors, tokens

    def _vectors(self, target: Target, inputs: Sequence[Any], request: EmbeddingRequest, limits: Limits,
                 look: Look) -> tuple[list[Any], int]:
        """Return the vectors of inputs and their tokens; no vectors if the server takes fewer inputs at once."""
        provider = PROVIDERS[target.endpoint.provider]
        try:
            answer = self.open(target, provider.embed_path, provider.embed(inputs, request, target), limits, look)
        except UpstreamError as error:
            if len(inputs) > 1 and error.status in (400, 413, 422) and TOO_MANY.search(error.message):
                return [], 0
            raise
        with contextlib.closing(answer), _in_its_format():
            found, count = provider.vectors(event_of(answer.body()))
            if len(found) != len(inputs):
                raise ValueError("a vector is missing")
            return [vector(one, request.in_base64) for one in found], count

    def _embedder(self, request: EmbeddingRequest, route: str, look: Look) -> Target:
        """Return the one target for embeddings that a model's name stands for.  Raise OblixError."""
        wait_for(self.heard, PROBE_LIMITS.first_byte_s, look)
        snapshot, usual = self.snapshot(), self._usual_embedder()
        name = self.meaning_of(request.model).targets[0]
        if name not in OWN_NAMES:
            target = self.resolve(name, dataclasses.replace(snapshot, targets=(*usual, *snapshot.targets)))
        elif usual:
            target = usual[0]
        else:
            raise NoTarget("No model makes embeddings: start Ollama and pull one (`ollama pull nomic-embed-text`) "
                           "or set OPENAI_API_KEY, or name one with --embedding-model.", retry=False)
        for side in ({name, route} - {target.side.value}) & {"local", "cloud"}:
            raise BadRequest(f"No embeddings are made {side}: the model for them is {target.id}, and another one's "
                             "vectors have nothing in common with its own.", status=404, code="model_not_found")
        check_key(target)
        return target

    def _usual_embedder(self) -> tuple[Target, ...]:
        """Return the model of all embeddings, or none.  It stays the same for as long as Oblix runs."""
        if not self._embedders:
            found = [f"ollama:{model.name}" for model in models_of(self._ollama, self.watch.readings)
                     if not model.remote and model.embeds]
            openai = self._default_endpoints["openai"]
            if openai.key and openai.key_variable:    # it is OpenAI's own
                found.append("openai:text-embedding-3-small")
            if found:
                self._embedders = (self.resolve(found[0], self.snapshot()),)
                log.info("%s makes the embeddings; to keep it, start Oblix with --embedding-model", found[0])
        return self._embedders

    def counted(self, request: ChatRequest) -> int | None:
        """Return how many tokens the server of a named target counts, or None if it does not at once."""
        names = self.meaning_of(request.model).targets
        with contextlib.suppress(OblixError, *NOT_IN_ITS_FORMAT):
            if len(names) > 1 or names[0] in OWN_NAMES:    # which target answers is decided later
                return None
            target = self.resolve(names[0], self.snapshot())
            native, provider = request.native_to(target.endpoint.provider), PROVIDERS[target.endpoint.provider]
            if native and not target.endpoint.lacks_key:
                encoded = provider.encode(request, target)
                with contextlib.closing(self.open(target, native.path, encoded, PROBE_LIMITS, no_look,
                                                  native.headers)) as answer:
                    return int(loads(answer.body(within_first_byte=True))["input_tokens"])
        return None

    def prepare(self, request: ChatRequest, unload: bool, look: Look) -> None:
        """Make Ollama load or unload the model of a request without a prompt.  Raise OblixError, what the look raises.

        Of several models it loads the one that would be asked, if it is Ollama's, and unloads the first of Ollama's.
        """
        plan = self.plan(request)
        order = [*plan.order, *plan.last_resort]
        for target in [one for one in (order if unload else order[:1]) if request.native_to(one.endpoint.provider)][:1]:
            provider, context = PROVIDERS[target.endpoint.provider], self.ledger.record(target).context
            limits = self.limits._replace(first_byte_s=max(LOAD_S, self.limits.first_byte_s))
            payload = provider.encode(request, target, context, self.keep_alive(target))
            with contextlib.closing(self.open(target, provider.chat_path, payload, limits, look)) as answer:
                answer.body(within_first_byte=True)

    def note(self, target: Target, error: UpstreamError | None) -> None:
        """Learn from an attempt that has failed, or with None succeeded."""
        before = self.ledger.settle(target, error)
        if error and error.fault is Fault.ACCOUNT and before.fault is not Fault.ACCOUNT:
            log.error("%s won't answer until somebody acts: %s", target.id, error.brief)
        if error and error.code in _LOST:
            self.watch.tell(target.endpoint, lost=True)
            self.transport.forget(target.endpoint.base_url)

    def health(self) -> Json:
        """Return the state of everything.  Does not wait."""
        snapshot = self.snapshot()
        plan = rank(snapshot, {})
        able = any(plan.conditions[target].state != "unreachable" for target in plan.order)
        waiting = any(reading.endpoint and not reading.known for reading in snapshot.readings)    # no evidence yet
        targets = [_target_report(target, plan.conditions[target], snapshot) for target in snapshot.targets]
        reasons = [f"{target['id']}: {target['reason']}" for target in targets]
        return {
            "status": "healthy" if able or waiting else "unhealthy", "version": __version__,
            **{side.value: _side_report(side, snapshot, plan.conditions) for side in Side},
            "plan": {"order": [target.id for target in plan.order], "reason": plan.reason}, "targets": targets,
            **({} if able or waiting else {"reasons": reasons or [f"no model is configured: {_ADVICE}"]}),
        }

    def status(self) -> Json:
        """Return what the page shows: the state of everything, and what was asked lately.  Does not wait."""
        facts = device_facts(self.watch.readings)
        return {**self.health(), "uptime_s": round(time.monotonic() - self.journal.started, 1),
                "thresholds": thresholds(self.settings, facts), "network": self.watch.latencies(),
                "requests": [*self.journal.recent][::-1]}

    def metrics(self) -> bytes:
        """Return the metrics of everything, as Prometheus reads them.  Does not wait."""
        snapshot, values = self.snapshot(), {**self.journal.sums(), **_process_values()}
        values["oblix_build_info", __version__] = 1
        values["process_start_time_seconds",] = time.time() - time.monotonic() + self.journal.started
        conditions = rank(snapshot, {}).conditions
        for side in Side:
            values["oblix_side_level", side.value] = int(side_condition(side, snapshot, conditions, {}).level)
        for target in dict.fromkeys((*snapshot.targets, *snapshot.in_flight)):
            labels, breaker = (self.journal.name(target.id), target.side.value), snapshot.record(target).breaker
            key = ("oblix_requests_in_flight", *labels)
            values[key] = values.get(key, 0) + snapshot.in_flight.get(target, 0)
            if target in conditions:
                rest_s = breaker.rest_s(snapshot.now)
                values.update({("oblix_target_level", *labels): int(conditions[target].level),
                               ("oblix_target_state", *labels, conditions[target].state): 1,
                               ("oblix_breaker_state", *labels): 2 if rest_s else 1 if breaker.failures else 0,
                               ("oblix_breaker_rest_seconds", *labels): rest_s})
        return exposition(values).encode("utf-8", "replace")

    def models(self) -> list[Json]:
        """Return all models that can be asked for, as GET /v1/models lists them.  Does not wait."""
        return [model_item(id, model) for id, model in self.catalogue().items()]

    def catalogue(self) -> dict[str, Model]:
        """Return what is known of each name that can be asked for.  Does not wait."""
        snapshot, aliases = self.snapshot(), [alias.name for alias in self.aliases if not set("*?[") & {*alias.name}]
        found = {name: self.known(name, snapshot) for name in (*OWN_NAMES, *aliases)}
        found.update({target.id: self._planned(target, snapshot) for target in (*snapshot.targets, *self._embedders)})
        for model in models_of(self._ollama, snapshot.readings):
            target = Target(self._ollama, model.name.removesuffix(":latest"), Side.LOCAL)
            found[target.id] = self._planned(target, snapshot, model)
        return found

    def known(self, name: str, snapshot: Snapshot) -> Model:
        """Return what is known of a name, listed or not.  Raises BadRequest (404)."""
        meant = self.meaning_of(name).targets
        found = [(target.side, self._planned(target, snapshot)) for one in meant for target in (
            self._answering(one, snapshot) if one in OWN_NAMES else [self.resolve(one, snapshot)])]
        return found[0][1] if len(meant) == 1 and meant[0] not in OWN_NAMES else in_common(found)

    @staticmethod
    def _answering(name: str, snapshot: Snapshot) -> tuple[Target, ...]:
        """Return the targets that may answer now for one of Oblix's own names."""
        plan = rank(snapshot, {}, None if name == "auto" else Side(name))
        return plan.order or plan.last_resort

    def _planned(self, target: Target, snapshot: Snapshot, model: Model | None = None) -> Model:
        """Return what clients may plan with for a target, whose model may be known."""
        usual = Model(target.model, capabilities=frozenset({"embedding"}) if target in self._embedders else None)
        model = model or model_of(target, snapshot.readings) or usual
        return PROVIDERS[target.endpoint.provider].planned(
            model, snapshot.record(target).context, free_bytes(target, snapshot.readings))


def in_common(models: Sequence[tuple[Side, Model]]) -> Model:
    """Return what holds whichever of these models answers.

    What a cloud does not tell counts only if no local model tells: that one's window is smaller, its abilities fewer.
    """
    def shared(fact: str, merge: Callable[[Any], Any]) -> Any:
        told = [(side, getattr(model, fact)) for side, model in models]
        needed = [value for side, value in told if side is Side.LOCAL] or [value for _, value in told]
        return merge([value for _, value in told if value]) if needed and all(needed) else None
    return Model("", capabilities=shared("capabilities", lambda sets: frozenset.intersection(*sets)),
                 max_context=shared("max_context", min) or 0, max_output=shared("max_output", min) or 0,
                 parameters=tuple(sorted(shared("parameters", lambda lists: set.intersection(*map(set, lists))) or ())))


def check_key(target: Target) -> None:
    """Raise OblixError for a target that needs a key and has none."""
    if target.endpoint.lacks_key:
        raise OblixError(f"{target.id} needs a key: set {target.endpoint.key_variable} where Oblix runs.",
                         status=401, type="authentication_error", code="no_api_key", retry=False)


@functools.lru_cache(4)
def newest_that_fits(ollama: Endpoint, readings: tuple[Reading, ...],
                     loading: frozenset[Target]) -> tuple[Target, ...]:
    """Return Ollama's newest model that fits into memory, or else its newest one, or none."""
    found = [Target(ollama, model.name.removesuffix(":latest"), Side.LOCAL) for model in models_of(ollama, readings)
             if model.is_chat_model and not model.remote and may_be_local(ollama, model.name)]
    fitting = (target for target in found if survey(target, readings, target in loading).use is Eligibility.YES)
    return (next(fitting, found[0]),) if found else ()


def _in_memory(models: Iterable[Model]) -> frozenset[tuple[str, int]]:
    """Return the names and contexts of the models that a server shows in its memory."""
    return frozenset((model.name, model.context) for model in models if not model.cold and not model.remote)


def _shows_loaded(target: Target, contexts: tuple[int, ...], reading: Reading) -> bool:
    """Return True if a reading knows of a load that has ended, for one of these contexts unless all are 0."""
    model = model_of(target, (reading,))
    return model is None or not model.cold and (not any(contexts) or model.context in contexts)


def _target_report(target: Target, found: Condition, snapshot: Snapshot) -> Json:
    record, model = snapshot.record(target), model_of(target, snapshot.readings)
    breaker, pace = record.breaker, record.pace
    memory = {"context": model.context, "gpu_share": model.gpu_share} if model and model.context else {}
    reason = found.reason or ("not probed yet" if found.state == "unknown" else None)
    return {"id": target.id, "side": target.side.value, "level": found.word(target.side), "state": found.state,
            "reason": reason, "in_flight": snapshot.in_flight.get(target, 0), "failures": breaker.failures,
            "rest_s": round(breaker.rest_s(snapshot.now), 1), **memory,
            "first_token_s": round(pace.first_s(0.5), 3) if pace.firsts_s else None,
            "tokens_per_s": round(pace.tokens_per_s, 1) or None}


def _process_values() -> dict[tuple[Any, ...], float]:
    """Return the process' own metrics, as far as the system has them."""
    values: dict[tuple[Any, ...], float] = {("process_cpu_seconds_total",): time.process_time()}
    with contextlib.suppress(Exception):    # psutil is missing, /proc is, or Windows has no such number
        import psutil
        values["process_resident_memory_bytes",] = psutil.Process().memory_info().rss
        values["process_open_fds",] = psutil.Process().num_fds()
    return values


def _side_report(side: Side, snapshot: Snapshot, conditions: Mapping[Target, Condition]) -> Json:
    found = side_condition(side, snapshot, conditions, {})
    mine = [reading for reading in snapshot.readings if reading.side is side]
    endpoints = [reading.facts for reading in mine if reading.endpoint and reading.facts]
    return {"level": found.word(side), "reason": found.reason, "facts": {**device_facts(mine), "endpoints": endpoints}}


class _Failure(NamedTuple):
    """An attempt that failed."""
    target: Target
    error: UpstreamError
    at: float        # by time.monotonic
    hurried: bool    # it was given less time than it would have had alone

    def may_be_back(self) -> bool:
        """Return True if the target was only slow, or was gone so long ago that it may be back."""
        slow = self.error.fault is Fault.LOADING or self.hurried and self.error.code == "upstream_timeout"
        gone = self.error.code in ("upstream_unreachable", "upstream_cut")
        return slow or gone and time.monotonic() - self.at >= SECOND_TRY_S


Stream = Generator[Any, None, None]    # of chunks, and of Texts


class _Overtaken(Exception):
    """Another request has taken the target's last slot since the plan was made."""


class Dispatch:
    """One request on its way through its plan, on the thread of its client."""

    def __init__(self, gateway: Gateway, request: ChatRequest, look: Look) -> None:
        self._gateway, self._request, self._look = gateway, request, look
        self._settings, self.ledger = gateway.settings, gateway.ledger
        self._until = time.monotonic() + self._settings.request_timeout_s
        self._meant = gateway.meaning_of(request.model).targets
        self._heard = self._meant == ("cloud",) or gateway.heard.is_set()
        self._plan = self._first_plan()
        self._named = len(self._meant) == 1 and self._meant[0] not in OWN_NAMES
        self._failed: list[_Failure] = []
        self._fallbacks: list[tuple[str, str]] = []
        self._overtaken: list[Target] = []
        # Of the attempt under way: the targets that may be tried after it, whether it is the first or a last resort,
        # its beginning, the limit to its first content where that is less than it would have alone.
        self._others: tuple[Target, ...] = ()
        self._alone = False
        self._asked_at, self._patience_s = 0.0, math.inf

    def run(self) -> Result:
        """Return the first answer.  Raises OblixError, ClientGone."""
        local = next((target for target in self._plan.order if target.side is Side.LOCAL), None)
        if local and self._plan.order[0].side is Side.CLOUD and self._settings.prefer != "cloud":
            self._gateway.warm_up(local, self._plan.conditions[local])    # for the next request
        with contextlib.closing(self._order()) as order:
            for target, self._others in order:
                try:
                    return self._attempt(target)
                except _Overtaken:
                    self._overtaken.append(target)
                except UpstreamError as error:
                    self._fail(target, error)
                    if not error.fault.moves_on:
                        break
        raise _all_failed(self._plan, self._failed)

    def _first_plan(self) -> Plan:
        """Return the plan.  Raise OblixError where there is none although it is known what Ollama has.

        The request may be the first one after a start.  Then wait until somebody is known to be there, if not for long.
        """
        gateway, until = self._gateway, time.monotonic() + PROBE_LIMITS.first_byte_s
        while not self._heard and "auto" in self._meant and time.monotonic() < until and not any(
                one.endpoint and one.known and one.level < Level.OUT for one in gateway.watch.readings):
            self._heard = self._wait(gateway.heard, TICK_S)
        try:
            return gateway.plan(self._request)
        except OblixError:
            if not self._hears_more():
                raise
            return gateway.plan(self._request)

    def _hears_more(self) -> bool:
        """Return True if Ollama has told what it has since the request came: it may be the first one after a start."""
        before, self._heard = self._heard, True
        return not before and self._wait(self._gateway.heard, PROBE_LIMITS.first_byte_s)

    def _order(self) -> Generator[tuple[Target, tuple[Target, ...]], None, None]:
        """Yield each target to try, and those that would be tried after it.

        The plan's order comes first, then the last resorts, then once more the targets that were only slow or away.
        """
        hope = [*self._plan.last_resort]
        for place, target in enumerate(self._plan.order):
            with contextlib.nullcontext(True) if self._named else self.ledger.trial(target) as allowed:
                if not allowed:
                    hope.append(target)
                    continue
                yield target, self._plan.order[place + 1:]
                if self._again(target):
                    yield target, self._plan.order[place + 1:]
        yield from ((target, ()) for target in itertools.chain(self._overtaken, hope))
        if self._named:
            return
        if self._hears_more():
            with contextlib.suppress(OblixError):
                self._plan = self._gateway.plan(self._request)
            tried_before = {tried.target for tried in self._failed}
            yield from ((target, ()) for target in self._plan.order if target not in tried_before)
        yield from ((tried.target, ()) for tried in [*self._failed] if tried.may_be_back())

    def _fail(self, target: Target, error: UpstreamError) -> None:
        """Note an attempt that has failed."""
        log.info("%s failed: %s", target.id, error.brief)
        self._fallbacks.append((target.id, error.fault.name.lower()))
        self._gateway.note(target, error)
        waited_s = time.monotonic() - self._asked_at
        if error.code == "upstream_timeout" and waited_s >= self._patience_s:
            self._learn_silence(target, waited_s)
        self._failed.append(_Failure(target, error, time.monotonic(), self._patience_s < math.inf))

    def _again(self, target: Target) -> bool:
        """Return True, after a pause, if a cloud has just failed and is worth another try before a slow local model."""
        error = self._failed[-1].error if self._failed and self._failed[-1].target == target else None
        if not error or not self._others or (target.side, self._others[0].side) != (Side.CLOUD, Side.LOCAL):
            return False
        pause_s = max(PAUSE_S, error.retry_after_s or 0.0)
        at_once = error.fault is Fault.BUSY or error.code in ("upstream_unreachable", "upstream_cut")
        work, local = work_of(self._request)._replace(whole=True), self._others[0]
        local_s = waits_s(local, self._plan.conditions[local], self._gateway.snapshot(), work)
        if not at_once or pause_s >= MAX_PAUSE_S or local_s <= SLOW_S:
            return False
        self._wait(threading.Event(), pause_s)
        return True

    def _limits(self, target: Target) -> Limits:
        """Return this attempt's limits: patience while the other side could answer.  Raise UpstreamError at the end."""
        usual, left_s = self._gateway.limits, self._until - time.monotonic()
        if left_s <= 0:
            raise time_is_up()
        patience_s = usual.first_byte_s
        if target.side is Side.LOCAL and self._others:
            patience_s = self._settings.patience_s
        elif any(other.side is Side.LOCAL for other in self._others):
            pace = self.ledger.record(target).pace
            patience_s = cloud_patience_s(pace, self._request.stream, self._settings.patience_s)
        self._asked_at, self._patience_s = time.monotonic(), patience_s if patience_s < usual.first_byte_s else math.inf
        return Limits(min(usual.connect_s, left_s), min(patience_s, usual.first_byte_s), usual.stall_s, self._until)

    def _attempt(self, target: Target) -> Result:
        """Try one target, up to its first content, or to its end where the client wants a whole answer."""
        provider = PROVIDERS[target.endpoint.provider]
        if self._request.stream or provider.translates and not self._request.native_to(provider.name):
            held, stream = self._begun(self._request, target)
            whole = None if self._request.stream else fold(itertools.chain(held, stream))
        else:
            whole = self._whole(self._request, target)
        self._gateway.watch.tell(target.endpoint, lost=False)
        reasons = [f"{tried.target.id}: {tried.error.brief}" for tried in self._failed]
        told = target, "; ".join([*reasons, self._plan.reason]), len(reasons) + 1
        if whole is not None:
            self._gateway.note(target, None)    # a stream may still break off
            return Result(*told, whole, fallbacks=self._fallbacks)
        relay = self._continuing if self._settings.on_cut == "continue" else self._noted
        return Result(*told, None, relay(target, held, stream), len(held), self._fallbacks)

    def _begun(self, request: ChatRequest, target: Target) -> tuple[list[Chunk], Stream]:
        """Return the chunks of a target's answer up to the first with content, the commit point, and its stream.

        Raise UpstreamError for what fails before that, as does an empty answer while there is another target to ask.
        """
        stream, held = self._stream(request, target), list[Chunk]()
        for chunk in stream:
            held.append(chunk)
            if has_content(chunk):
                break
            if len(held) > MAX_HELD:
                stream.close()
                raise UpstreamError(f"no content in {MAX_HELD} pieces", code="bad_upstream_answer")
        if is_empty(held) and (self._others or request is not self._request):
            raise UpstreamError("the answer was empty", code="empty_answer")
        return held, stream

    def _loaded(self, request: ChatRequest, target: Target, limits: Limits) -> int:
        """Load a local model if need be.  Return the context to ask for, or 0 for its own.  Raise UpstreamError."""
        if target.endpoint.provider != "ollama":
            return 0
        context, loader = 0, self._gateway.loader
        if self._meant == ("local",):    # for `auto` a cloud is as good
            self._wait(self._gateway.watch.first(target.endpoint), PROBE_LIMITS.first_byte_s)
        for _ in range(2):    # the load that was joined may have been for a smaller context
            load, snapshot = loader.under_way.get(target), self._gateway.snapshot()
            model = model_of(target, snapshot.readings)
            if model and model.remote and target.side is Side.LOCAL and not self._named:
                raise UpstreamError("answered by ollama.com, so it is not a local model", Fault.NOT_FOUND, status=404)
            if not load and model and not model.remote:
                try:
                    context = self._gateway.context(request, target, snapshot)
                except Unsupported as error:    # the memory has shrunk since the plan was made
                    raise UpstreamError(error.message, Fault.TOO_LONG, status=error.status, type=error.type,
                                        code=error.code, param=error.param, retry=False) from None
                if model.cold or context not in (0, model.context):
                    load = loader.begin(target, context)
            if not load:
                break
            if self._wait(load.done, limits.first_byte_s):
                load.result()
            elif time.monotonic() >= self._until:
                raise time_is_up()
            else:
                raise UpstreamError("the model is still loading", Fault.LOADING, status=503, code="model_loading",
                                    retry_after_s=LOAD_RETRY_S)
        return context

    def _wait(self, event: threading.Event, limit_s: float) -> bool:
        """Return True if the event comes within the limit.  Raise what the look raises."""
        return wait_for(event, min(limit_s, self._until - time.monotonic()), self._look)

    def _stream(self, request: ChatRequest, target: Target) -> Stream:
        """Yield the chunks of a target's streamed answer, all with one id, time and model.

        After the first content, events that say a text and nothing else come as Texts: of choice 0.
        """
        envelope: Json = {}
        provider, started, begun, tokens = PROVIDERS[target.endpoint.provider], 0.0, 0.0, 0
        timings: Json | None = None
        is_foreign = provider.translates and not request.native_to(provider.name)    # its client can't read its timings
        may_pass = request.stream and self._settings.on_cut != "continue"
        try:
            with self._exchange(request, target) as (answer, started):
                for chunk in decoded(answer, provider, request):
                    if isinstance(chunk, Texts):
                        yield chunk
                        continue
                    timings = (chunk.pop if is_foreign else chunk.get)("timings", timings)
                    envelope = envelope or _envelope(chunk, target.id)
                    told = {**envelope, **chunk, **envelope}
                    if not begun and has_content(chunk):
                        begun = time.monotonic()
                        answer.begin()
                        is_first = [choice["index"] for choice in choices_of(told)] == [0]
                        answer.text_event = provider.text_event_of(request) if may_pass and is_first else None
                    tokens = tokens_of(chunk) or tokens
                    yield told
                answer.ended = True
        finally:    # a client that has read enough has seen how fast it was
            if begun:
                self._learn(request, target, begun - started, tokens, time.monotonic() - begun, timings)

    def _whole(self, request: ChatRequest, target: Target) -> Json:
        """Return the whole answer of a target that was asked for one.  Raise UpstreamError, also for an empty one."""
        with self._exchange(request, target) as (answer, started):
            raw = answer.body()
            with _in_its_format():
                whole = PROVIDERS[target.endpoint.provider].whole(raw, request)
        said: Iterator[Chunk] = ({"choices": [{**choice, "delta": choice["message"]}]} for choice in whole["choices"])
        if self._others and is_empty(said) and not whole.get("native", {}).get("content"):
            raise UpstreamError("the answer was empty", code="empty_answer")
        self._learn(request, target, None, tokens_of(whole), time.monotonic() - started, whole.get("timings"))
        return {**whole, **_envelope(whole, target.id), "object": "chat.completion"}

    def _learn(self, request: ChatRequest, target: Target, first_s: float | None, tokens: int, seconds: float,
               timings: Any) -> None:
        """Remember how fast a target answered, and of a local model how fast it read and what its cache has.

        Where its server does not tell how long it read, our own clock does, if nobody else was answered meanwhile.
        """
        if target.side is Side.CLOUD:
            self.ledger.learn_pace(target, first_s, tokens, seconds)
            return
        work = work_of(request)
        unread = work.unread(self.ledger.record(target).cache)
        read = told_of_reading(timings, unread / work.size)
        if not read[1] and first_s and self._alone:
            read = unread / TOKEN_BYTES, max(first_s - OVERHEAD_S, first_s / 4)
        seconds -= read[1] if first_s is None else 0.0
        self.ledger.learn_pace(target, first_s, tokens, seconds, read if self._is_well(target) else (0.0, 0.0),
                               Cache(work.blocks, work.conversation, work.size + TOKEN_BYTES * tokens))

    def _is_well(self, target: Target) -> bool:
        """Return True if nothing slowed a target down when the plan was made, as far as that is known."""
        found = self._plan.conditions.get(target)
        return found is None or found.level is Level.GOOD

    def _learn_silence(self, target: Target, waited_s: float) -> None:
        """Remember that a target said nothing for as long as it was waited for: it takes that long at least."""
        record, read = self.ledger.record(target), (0.0, 0.0)
        if target.side is Side.LOCAL and self._alone and self._is_well(target):
            work = work_of(self._request)
            unread = work.unread(record.cache)
            if record.pace.reading_s(unread) < waited_s:
                read = unread / TOKEN_BYTES, waited_s
        self.ledger.learn_pace(target, waited_s, 0, 0.0, read, Cache())

    @contextlib.contextmanager
    def _exchange(self, request: ChatRequest, target: Target) -> Iterator[tuple[Answer, float]]:
        """Give the block the upstream's answer, and when it was asked.  It is in flight while the block reads it.

        Raises UpstreamError, without the key in its texts, ClientGone, and _Overtaken where another request has taken
        the target's last slot since the plan was made and a cloud could answer.
        """
        limits, provider = self._limits(target), PROVIDERS[target.endpoint.provider]
        context, native = self._loaded(request, target, limits), request.native_to(provider.name)
        path, headers = (native.path, native.headers) if native else (provider.chat_path, ())
        with self.ledger.flight(target) as number:
            self._alone = number == 1
            counted_on = target.side is Side.LOCAL and self._others and self._others[0].side is Side.CLOUD
            if counted_on and number > self._settings.local_slots and self._plan.conditions[target].state != "busy":
                raise _Overtaken
            started = time.monotonic()
            encoded = provider.encode(request, target, context, self._gateway.keep_alive(target))
            with _without_key(target.endpoint), contextlib.closing(
                    self._gateway.open(target, path, encoded, limits, self._look, headers)) as answer:
                yield answer, started

    def _noted(self, target: Target, held: Sequence[Chunk], stream: Stream) -> Stream:
        """Yield the held chunks and the rest of a stream.  Tell the ledger how it ends; close the upstream."""
        with contextlib.closing(stream):
            yield from held
            try:
                yield from stream
            except UpstreamError as error:
                self._gateway.note(target, error)
                raise
        self._gateway.note(target, None)

    def _continuing(self, target: Target, held: Sequence[Chunk], stream: Stream) -> Stream:
        """Yield the chunks of an answer and, where it breaks off, the rest from the next target that gives one."""
        said: list[Chunk] = []
        try:
            with contextlib.closing(self._noted(target, held, stream)) as noted:
                for chunk in noted:
                    said.extend([chunk] if len(said) <= MAX_SAID else ())
                    yield chunk
        except UpstreamError as error:
            text = continuable_text(self._request, said) if len(said) <= MAX_SAID and error.fault.moves_on else ""
            request = continuation(self._request, text, len(said)) if text else None
            follower = self._follower(request) if request else None
            if not follower:
                raise
            log.warning("%s continues an answer that broke off: %s", follower[0].id, error.brief)
            self._fallbacks.append((target.id, error.fault.name.lower()))
            yield from continued(self._noted(*follower), said[0], text, follower[0].id)

    def _follower(self, request: ChatRequest) -> tuple[Target, list[Chunk], Stream] | None:
        """Return the next target that begins to answer, with its answer's beginning and stream, or None."""
        while self._others:
            target, self._others = self._others[0], self._others[1:]
            try:
                return target, *self._begun(request, target)
            except _Overtaken:
                log.info("%s could not continue: it has no free slot", target.id)
            except UpstreamError as error:
                log.info("%s could not continue: %s", target.id, error.brief)
                self._gateway.note(target, error)
        return None


@contextlib.contextmanager
def _without_key(endpoint: Endpoint) -> Iterator[None]:
    """Take the endpoint's key out of the texts of a block's faults."""
    try:
        yield
    except UpstreamError as error:
        for name in ("message", "code", "type", "param"):
            if getattr(error, name):
                setattr(error, name, redact(getattr(error, name), endpoint.key))
        raise


@contextlib.contextmanager
def _in_its_format() -> Iterator[None]:
    """Turn the errors of a block that reads an answer into a fault of the upstream."""
    try:
        yield
    except NOT_IN_ITS_FORMAT as error:
        raise UpstreamError("the answer is not in its own format", code="bad_upstream_answer") from error


def decoded(answer: Answer, provider: Provider, request: ChatRequest) -> Iterator[Any]:
    """Yield the chunks of a streamed answer, and the Texts in it."""
    with _in_its_format():    # not around what we do with them: a bug of ours is no fault of an upstream
        yield from provider.decode(answer.lines(), request)


def conversation_of(request: ChatRequest) -> int:
    """Return a hash that tells a conversation from others, as far as a prompt cache goes: of its beginning."""
    messages = request.messages
    first_user = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    return hash(tuple(text_of(message) for message in messages[:first_user + 1]))


def work_of(request: ChatRequest) -> Work:
    """Return how much a request asks of a model."""
    tokens = min(request.max_output_tokens(TYPICAL_TOKENS), TYPICAL_TOKENS)
    return Work(TEMPLATE_BYTES + request.size, request.blocks, conversation_of(request), tokens,
                request.max_output_tokens(0), not request.stream)


def _all_failed(plan: Plan, failed: Sequence[_Failure]) -> OblixError:
    """Return the most useful error when no target answered: the only one, or one that lists all of them.

    Where all targets refused the request, but for last resorts, the first refusal is the answer.
    """
    target, last = failed[-1].target, failed[-1].error
    errors = [tried.error for tried in failed]
    told = [tried.error for tried in failed if tried.target not in plan.last_resort] or errors
    if all(error.fault in (Fault.REFUSED, Fault.TOO_LONG) for error in told):
        return told[0]
    if not last.fault.moves_on or len(failed) == 1 and not plan.excluded:
        if last.fault is Fault.TRANSPORT:    # our own words do not name the target
            last.message = f"{target.id}: {last.message}"
        return last
    waits = [error.retry_after_s for error in errors if error.retry_after_s is not None]
    reasons = [(tried.target, tried.error.message) for tried in failed] + [*plan.excluded]
    text = f"No model could answer ({plan.reason}). " + "; ".join(
        f"{target.id}: {reason.rstrip('.')}" for target, reason in reasons)
    alike = last.fault is not Fault.TRANSPORT and {error.status for error in errors} == {last.status}
    return NoTarget(text, retry=None if waits else False, retry_after_s=min(waits, default=None),
                    status=last.status if alike else None, type=last.type if alike else None)


# === 10. Response out =================================================================================================
# uses: 1 6; pure
# What does any client get, whichever API it speaks?  Counts, errors, and one answer of two where the first broke off.

# The prompt for another model to continue.  A prefill would be shorter, but the newer Claude models refuse one.
CONTINUE = ("Your last message was cut off. Continue it exactly where it ends: repeat nothing of it, and say nothing "
            "about the interruption.")
_NOT_CONTINUED = {"tools", "functions", "response_format", "logprobs", "n", "modalities", "audio", "prediction"}
LEAST_OVERLAP, OVERLAP = 8, 200    # characters of the text that a continuation may repeat at its beginning


def tokens_of(answer: Json, kind: str = "completion_tokens") -> int:
    """Return the completion tokens, or those of another kind, that an answer or a chunk counts, or 0."""
    usage = answer.get("usage")
    return count_in(usage.get(kind)) if isinstance(usage, dict) else 0


def continuable_text(request: ChatRequest, said: Sequence[Chunk]) -> str:
    """Return the text of a stream that broke off, or "" unless it is plain text."""
    deltas = [choice["delta"] for chunk in said for choice in chunk["choices"]]
    plain = all(name in ("role", "content", "refusal") for delta in deltas for name in delta if delta[name])
    plain = plain and not _NOT_CONTINUED & request.body.keys() and not (request.native and request.native.only)
    return "".join(delta.get("content", "") for delta in deltas) if plain else ""


def continuation(request: ChatRequest, text: str, tokens: int) -> ChatRequest | None:
    """Return the request for the rest of an answer of about so many tokens, or None if its limit leaves none."""
    body = {**request.body, "messages": [*request.messages, {"role": "assistant", "content": text},
                                         {"role": "user", "content": CONTINUE}]}
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 0) > 0:
            body[name] -= tokens
            if body[name] < 1:
                return None
    return dataclasses.replace(request, body=body, native=None)


def continued(chunks: Iterable[Chunk], first: Chunk, text: str, by: str) -> Iterator[Chunk]:
    """Yield a continuation's chunks as the first target's: with its id, time and model, without a second role.

    What repeats the end of `text` is left out.  The first chunk names the target that continues.
    """
    envelope: Json = {**{name: first[name] for name in ("id", "created", "model")}, "oblix": {"continued_by": by}}
    held: str | None = ""    # a beginning that may repeat the end of the text; None once that is decided
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            delta.pop("role", None)
            if held is not None:
                held += delta.pop("content", "")
                if len(held) >= min(OVERLAP, len(text)) or choice["finish_reason"]:
                    rest, held = without_overlap(text, held), None
                    delta.update({"content": rest} if rest else {})
        if "usage" in chunk or any(choice["delta"] or choice["finish_reason"] for choice in chunk["choices"]):
            yield {**chunk, **envelope}
            envelope.pop("oblix", None)


def without_overlap(said: str, more: str) -> str:
    """Return `more` without the longest beginning that repeats the end of `said`; a few characters may by chance."""
    sizes = range(min(OVERLAP, len(said), len(more)), LEAST_OVERLAP - 1, -1)
    return more[next((size for size in sizes if said.endswith(more[:size])), 0):]


def rfc3339(seconds: int) -> str:
    """Return a unix time as RFC 3339 has it."""
    within = min(max(seconds, 0), 253_402_300_799)    # of the years 1970 to 9999
    return datetime.datetime.fromtimestamp(within, datetime.timezone.utc).isoformat().replace("+00:00", "Z")


def model_item(id: str, model: Model) -> Json:
    """Return a model as a list has it for clients of OpenAI, OpenRouter and Anthropic, without what is unknown."""
    inputs = ["text", *(kind for ability, kind in INPUTS.items() if ability in (model.capabilities or ()))]
    return {"id": id, "object": "model", "created": model.created, "owned_by": model.provider or "oblix",
            "type": "model", "name": model.title or id, "display_name": model.title or id,
            "created_at": rfc3339(model.created), "lifecycle": "active",
            **present({"context_length": model.max_context, "max_input_tokens": model.max_context,
                       "max_output_tokens": model.max_output, "max_tokens": model.max_output,
                       "architecture": model.capabilities and {"input_modalities": inputs},
                       "supported_parameters": [*model.parameters]})}


def model_list(items: list[Json]) -> Json:
    """Return the list of models that OpenAI's, Anthropic's and Codex's clients read; the last wants `models`."""
    return {"object": "list", "data": items, "has_more": False, "first_id": items[0]["id"],
            "last_id": items[-1]["id"], "models": []}


def error_body(error: OblixError) -> Json:
    """Return the error object that the SDKs read (OpenAI API reference, errors)."""
    return {"error": {"message": error.message or type(error).__name__, "type": error.type, "param": error.param,
                      "code": error.code}}


def error_headers(error: OblixError) -> dict[str, str]:
    """Return the headers by which an SDK decides to retry, and when."""
    headers = {} if error.retry is None else {"x-should-retry": str(error.retry).lower()}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"    # RFC 9110, 15.5.2
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return headers


# === 11. Fronts =======================================================================================================
# uses: 1 3 6 10; pure
# Which APIs do clients speak?  A front is the mirror image of a provider: it makes a ChatRequest of a client's body,
# and that API's answer, events and errors of what is said inside.  Nothing between the two knows which front was asked.
# To add one: subclass Front, and the Writer that it names, for whole answers and streams; and name it in FRONTS.

Frame = tuple[bytes, bytes]    # what is around the text of a stream's events that say nothing else


class Writer:
    """The client's side of one answer: it is asked for the whole one, or for what each chunk says."""
    event: Callable[[Json], bytes]    # writes an event of a stream

    def __init__(self, front: Any, request: ChatRequest) -> None:
        self._front, self._request = front, request

    def whole(self, answer: Json) -> Json:
        """Return the whole answer for a chat.completion."""
        raise NotImplementedError

    def take(self, chunk: Any) -> bytes:
        """Return the events for what a chunk, or Texts, say."""
        raise NotImplementedError

    def end(self) -> bytes:
        """Return the events that end a complete answer."""
        return b""

    def broken(self, error: OblixError) -> bytes:
        """Return the events that end an answer that broke off, of which nothing may look complete."""
        return self.event(self._front.error(error))


class Front:
    """An API that clients speak."""
    name: ClassVar[str]                         # for the log and for metrics
    writer: ClassVar[type[Writer]]              # of its answers
    events: ClassVar[str] = "text/event-stream; charset=utf-8"    # the content type of its streams
    keep_alive: ClassVar[bytes] = b": keep-alive\n\n"             # what is sent where nothing else is to be said

    def request(self, body: Json, head: Head) -> ChatRequest:
        """Return the request in a client's body.  Raise BadRequest."""
        raise NotImplementedError

    def stream(self, request: ChatRequest) -> Writer:
        """Return the writer of an answer, which may be a stream."""
        return self.writer(self, request)

    def at_once(self, request: ChatRequest, now: int) -> Json | None:
        """Return the answer to a request that needs no model's words, or None; `now` is in unix seconds."""
        return None

    def note_time(self, answer: Json, first_s: float, seconds: float) -> None:
        """Put into an answer, or its chunk with the usage, when it began and ended, where its clients are told."""

    def error(self, error: OblixError) -> Json:
        """Return the body of an error."""
        return error_body(error)

    def headers(self, request_id: str) -> dict[str, str]:
        """Return the headers of each reply that this API has besides those of all replies."""
        return {}


def around_text(event: bytes, begin: bytes) -> Frame:
    """Return what is around the text of an event, which is a NUL there, and which `begin` precedes."""
    before, after = event.split(begin + rb'\u0000"', 1)    # no string can hold such quotes
    return before + begin, b'"' + after


def framed(texts: Sequence[bytes], frame: Frame | None) -> bytes:
    """Return the events that say these texts."""
    before, after = frame or (b"", b"")    # the first text of a stream is in a chunk
    return before + (after + before).join(texts) + after


# --- 11. OpenAI's chat completions ------------------------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"    # exactly so: some clients reject an extra space
# Fields of an event that says a text and nothing else.  Any other is the first chunk's own, and not the stream's.
AROUND_TEXT = frozenset(("id object created model system_fingerprint service_tier prompt_token_ids "
                         "index logprobs finish_reason stop_reason token_ids matched_stop").split())


def sse(event: Json) -> bytes:
    """Return a server-sent event."""
    return b"data: " + dumps(event) + b"\n\n"


def text_frame(chunk: Chunk) -> Frame | None:
    """Return what is around the text of this stream's events that say nothing else; None for another choice's."""
    if [choice["index"] for choice in chunk["choices"]] != [0]:
        return None
    choice = {name: None if name in ("logprobs", "finish_reason") else value
              for name, value in chunk["choices"][0].items() if name in AROUND_TEXT}
    kept = {name: value for name, value in chunk.items() if name in AROUND_TEXT}
    return around_text(sse({**kept, "choices": [{**choice, "delta": {"content": "\0"}}]}), b'"delta":{"content":"')


def for_client(chunk: Chunk, include_usage: bool) -> Chunk | None:
    """Return the chunk if a client may see it, or None: many clients fail at an unasked usage without choices."""
    return chunk if include_usage or "usage" not in chunk else None


class _ChatWriter(Writer):
    event = staticmethod(sse)
    _frame: Frame | None = None    # around the texts of events that say nothing else

    def whole(self, answer: Json) -> Json:
        return answer

    def take(self, chunk: Any) -> bytes:
        if isinstance(chunk, Texts):
            return framed(chunk, self._frame)
        if not self._frame and has_content(chunk):
            self._frame = text_frame(chunk)
        shown = for_client(chunk, self._request.include_usage)
        return b"" if shown is None else sse(shown)

    def end(self) -> bytes:
        return DONE


class Chat(Front):
    """OpenAI's chat completions: the language inside."""
    name, writer = "chat", _ChatWriter

    def request(self, body: Json, head: Head) -> ChatRequest:
        left_out: tuple[str, ...] = ()
        if "messages" not in body and "input" in body:    # as Cursor asks here, in agent mode
            asked, left_out = RESPONSES.chat(body)
            body = {**asked, "stream_options": body.get("stream_options")}
        request = parse_request(body)
        return dataclasses.replace(request, left_out=left_out) if left_out else request


# --- 11. Answers in items ---------------------------------------------------------------------------------------------

_SAID = ("reasoning_content", "content", "refusal")    # what a delta or a message says besides its calls


class Item:
    """A thought, a text or a call of an answer, for an API that tells one of them after the other."""

    def __init__(self, key: Any, index: int, kind: str, start: Json) -> None:
        """`key` is a field of a delta, or the index of a call; `kind` and `start` are in the API's words."""
        self.key, self.index, self.kind, self.start = key, index, kind, start
        self.held, self.said = list[bytes](), list[bytes]()    # texts before and after they are told, as JSON has them
        self.logprobs, self.logprobs_told = list[Json](), 0
        self.is_open = False
        self.frame: Any = None    # around each text in its event

    def text(self) -> str:
        """Return what is said so far."""
        return str(json.loads('"%s"' % b"".join(self.said + self.held).decode("utf-8", "replace")))

    def may_end(self) -> bool:
        """Return True if the next item may begin: a call is complete only when its arguments are."""
        ends = b"".join(self.said[-1:]).rstrip(rb" \nrt").endswith(b"}")    # blanks in JSON's text are like \n
        is_asked = ends and len(self.said) <= 1000    # of very many pieces each answer would cost too much
        return self.key in _SAID or is_asked and object_in(self.text()) is not None


class ItemWriter(Writer):
    """Tells one item after the other: what comes while a call is open waits until that call may end."""
    _begin: Callable[[Json], bytes]                          # the events for the first chunk of an answer
    _start: Callable[[Any, Json | None], tuple[str, Json]]   # key, call -> the kind of a new item, and its `start`
    _open: Callable[[Item], bytes]                           # the events that begin an item,
    _deltas: Callable[[Item, Sequence[bytes]], bytes]        # that tell pieces of its text,
    _close: Callable[[Item], bytes]                          # and that end it

    def __init__(self, front: Any, request: ChatRequest) -> None:
        super().__init__(front, request)
        self._begun = False
        self._items, self._count = list[Item](), 0    # the first is open, the others wait; how many there were
        self._finish, self._usage = "stop", Json()

    def take(self, chunk: Any) -> bytes:
        if isinstance(chunk, Texts):
            if [item.key for item in self._items] == ["content"]:    # nearly always
                self._items[0].said.append(b"".join(chunk))
                return self._deltas(self._items[0], chunk)
            self._add("content", chunk)
            return self._flow()
        events = b"" if self._begun else self._begin(chunk)
        self._begun, self._usage = True, chunk.get("usage") or self._usage
        for choice in chunk["choices"][:1]:
            self._finish = choice.get("finish_reason") or self._finish
            self._hear(choice)
        return events + self._flow()

    def _hear(self, choice: Json) -> None:
        """Add to the items what a choice says, in a delta or in a message."""
        said, logprobs = choice.get("delta") or choice.get("message") or {}, choice.get("logprobs")
        logprobs = logprobs.get("content") if isinstance(logprobs, dict) else None
        for field in filter(said.get, _SAID):
            self._add(field, [dumps(str(said[field]))[1:-1]])
            self._items[-1].logprobs += logprobs if field == "content" and isinstance(logprobs, list) else ()
        for place, call in enumerate(said.get("tool_calls") or ()):
            text = _inner(call).get("arguments") or _inner(call).get("input")
            self._add(call.get("index", place), [dumps(text)[1:-1]] if text else [], call)

    def _add(self, key: Any, texts: Sequence[bytes], call: Json | None = None) -> None:
        item = next((item for item in (self._items if call else self._items[-1:]) if item.key == key), None)
        if not item:
            if call and not _inner(call).get("name"):    # blanks after a call that has ended
                return
            item = Item(key, self._count, *self._start(key, call))
            self._items.append(item)
            self._count += 1
        item.held += texts

    def _flow(self, is_end: bool = False) -> bytes:
        """Return the events for what is held of the open item, and of each next one if that one may end."""
        events = b""
        while self._items:
            item = self._items[0]
            events += b"" if item.is_open else self._open(item)
            item.is_open = True
            if item.held:
                texts, item.held = item.held, []
                item.said.append(b"".join(texts))
                events += self._deltas(item, texts)
            if not is_end and (len(self._items) == 1 or not item.may_end()):
                break
            events += self._close(item)
            del self._items[0]
        return events


def _inner(call: Json) -> Json:
    """Return what a tool call, or a piece of one, says of a function or a custom tool."""
    return call.get("function") or call.get("custom") or {}


# --- 11. OpenAI's Responses: what is asked ----------------------------------------------------------------------------

class _Tool(NamedTuple):
    """A client's tool."""
    kind: str              # of the items that call it; "" for a tool that only OpenAI can run
    name: str
    namespace: str = ""
    function: Json = {}    # as models are told of it, without the name


_NOT_KEPT = ("previous_response_id", "conversation", "background", "prompt")
_AS_IN_CHAT = frozenset(("model stream temperature top_p top_logprobs parallel_tool_calls user safety_identifier "
                         "prompt_cache_key prompt_cache_options prompt_cache_retention service_tier seed stop "
                         "presence_penalty frequency_penalty options keep_alive think").split())
_RESPONSES_FIELDS: dict[str, Rule] = {
    "input": (lambda value: isinstance(value, (str, list)), "must be a string or a list of items"),
    "include": (lambda value: isinstance(value, list), "must be a list of strings"),
    "tool_choice": (lambda value: isinstance(value, (str, dict)), FIELDS["tool_choice"][1]),
    "max_output_tokens": FIELDS["max_tokens"],
    "instructions": FIELDS["service_tier"], **dict.fromkeys(("text", "reasoning", "metadata"), FIELDS["options"]),
}
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}    # kind of item -> its text
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
_SYSTEM = ("system", "developer")
_TEXT_PARTS = {**dict.fromkeys(("input_text", "output_text", "text", "summary_text", "reasoning_text"), "text"),
               "refusal": "refusal"}


def flat_name(namespace: Any, name: str) -> str:
    """Return the name by which models know a tool: they have no namespaces.  OpenAI's names have 64 letters at most."""
    if not namespace or namespace == "functions":    # Codex's word for none
        return name
    return re.sub("[^A-Za-z0-9_-]", "_", f"{str(namespace).rstrip('_')}__{name}")[-64:]


def tools_of(body: Json) -> dict[str, _Tool]:
    """Return the tools in a body by the names that models know.  Raise BadRequest."""
    # For OpenAI's newest models Codex has its tools in an item.
    items = body["input"] if isinstance(body.get("input"), list) else []
    lists = [("tools", body.get("tools") or []), *(
        (f"input[{number}].tools", item.get("tools")) for number, item in enumerate(items)
        if isinstance(item, dict) and item.get("type") == "additional_tools")]
    return {flat_name(tool.namespace, tool.name) if tool.kind else f"({tool.name})": tool
            for where, tools in lists for tool in _flat_tools(tools, where)}


def _flat_tools(tools: Any, where: str, namespace: str = "") -> Iterator[_Tool]:
    """Yield the tools of a list, and of the namespaces in it.  Raise BadRequest."""
    need(isinstance(tools, list), where, "must be a list of tools")
    for number, tool in enumerate(tools):
        here = f"{where}[{number}]"
        need(isinstance(tool, dict), here, "must be an object")
        kind = tool.get("type") or "function"
        if kind not in ("function", "custom", "namespace"):
            yield _Tool("", str(kind)[:64])
            continue
        tool = tool["function"] if isinstance(tool.get("function"), dict) else tool    # Cursor mixes both forms
        need(tool.get("name") and isinstance(tool["name"], str), f"{here}.name", "must be a string")
        if kind == "namespace":
            yield from _flat_tools(tool.get("tools"), f"{here}.tools", tool["name"])
            continue
        if kind == "function":
            told = {name: tool[name] for name in ("description", "parameters", "strict") if tool.get(name) is not None}
            yield _Tool("function_call", tool["name"], namespace, told)
            continue
        form, words = tool.get("format"), str(tool.get("description") or "")
        if isinstance(form, dict) and "definition" in form:
            words += f"\n\nThe input must fit this {form.get('syntax')} grammar:\n{form['definition']}"
        schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        yield _Tool("custom_tool_call", tool["name"], namespace, {"description": words, "parameters": schema})


def _choice_of(choice: Any, tools: dict[str, _Tool]) -> Any:
    """Return a choice among the tools as chat has it, or None for one that only OpenAI can run."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        need(isinstance(choice.get("tools"), list), "tool_choice.tools", "must be a list of tools")
        allowed = [_choice_of(tool, tools) for tool in choice["tools"] if isinstance(tool, dict)]
        return {"type": "allowed_tools", "allowed_tools": {
            "mode": choice.get("mode") or "auto", "tools": [*filter(None, allowed)]}}
    inner = choice["function"] if isinstance(choice.get("function"), dict) else choice
    name = flat_name(inner.get("namespace"), str(inner.get("name")))
    return {"type": "function", "function": {"name": name}} if name in tools else None


def _part_of(where: str, part: Any) -> Json:
    """Return a content part as chat has it.  Raise BadRequest."""
    need(isinstance(part, dict), where, "must be an object")
    kind = str(part.get("type"))
    if kind in _TEXT_PARTS:
        text = part.get(_TEXT_PARTS[kind])
        need(isinstance(text, str), f"{where}.{_TEXT_PARTS[kind]}", "must be a string")
        return {"type": "text", "text": text}
    if kind in ("input_image", "image_url"):
        image = part.get("image_url")
        image = image if isinstance(image, dict) else {"url": image, "detail": part.get("detail")}
        need(isinstance(image.get("url"), str), f"{where}.image_url", "must be a URL: Oblix keeps no files")
        return {"type": "image_url", "image_url": without_nulls(image)}
    need(kind == "input_file" and isinstance(part.get("file_data"), str), where,
         "must be an input_text, an input_image, or an input_file with file_data: Oblix keeps no files")
    return {"type": "file", "file": without_nulls({name: part.get(name) for name in ("filename", "file_data")})}


def _content_of(where: str, content: Any) -> str | list[Json]:
    """Return a content as chat has it: one text as a string, which every server takes.  Raise BadRequest."""
    if isinstance(content, str):
        return content
    need(isinstance(content, list), where, "must be a string or a list of parts")
    parts = [_part_of(f"{where}[{number}]", part) for number, part in enumerate(content)]
    return str(parts[0]["text"]) if len(parts) == 1 and "text" in parts[0] else parts or ""


def messages_of(items: Sequence[Any]) -> tuple[list[Json], list[str]]:
    """Return the messages in input items, and the kinds of items that only OpenAI can read.  Raise BadRequest.

    What an assistant thinks, says and calls in a row is one message: servers want the outputs of all its calls next.
    """
    entries = [_entry_of(f"input[{number}]", item) for number, item in enumerate(items)]
    messages = list[Json]()
    for role, group in itertools.groupby([one for one in entries if one[0]], lambda entry: entry[0]):
        turn = [*group]
        told = _turn_of(turn) if role == "assistant" else [message for *_, message in turn]
        rest = [part for message in told for part in parts_of(message) if role == "tool" and part["type"] != "text"]
        # most servers take texts alone as outputs
        messages += [{**message, "content": text_of(message)} for message in told] if role == "tool" else told
        messages += [{"role": "user", "content": rest}] if rest else []
    kinds = [str(item["type"])[:64] for role, _, item in entries if not role]
    return messages, [kind for kind in kinds if kind != "additional_tools"]


def _entry_of(where: str, item: Any) -> tuple[str, str, Json]:
    """Return (who says an item, where it is, its message), or the item itself: an assistant's, or "" for nobody's."""
    need(isinstance(item, dict), where, "must be an object")
    kind, role = str(item.get("type") or "message"), item.get("role")
    if kind in ("reasoning", *_CALLS) or kind == "message" and role == "assistant":
        return "assistant", where, item
    if kind == "message":
        need(role in ("user", *_SYSTEM), f"{where}.role", "must be user, assistant, system or developer")
        return "user", where, {"role": role, "content": _content_of(f"{where}.content", item.get("content"))}
    if kind in _OUTPUTS:
        need(isinstance(item.get("call_id"), str), f"{where}.call_id", "must be a string")
        content = _content_of(f"{where}.output", item.get("output"))
        return "tool", where, {"role": "tool", "tool_call_id": item["call_id"], "content": content}
    return "", where, item


def _turn_of(entries: Iterable[tuple[str, str, Json]]) -> list[Json]:
    """Return the one message of an assistant's items, or none for thoughts alone.  Raise BadRequest."""
    texts, thoughts, calls = list[str](), list[str](), list[Json]()
    for _, where, item in entries:
        field = _CALLS.get(str(item.get("type")))
        if field:
            for name in ("call_id", "name", field):
                need(isinstance(item.get(name), str), f"{where}.{name}", "must be a string")
            text = item[field] if field == "arguments" else dumps({"input": item[field]}).decode()
            called = {"name": flat_name(item.get("namespace"), item["name"]), "arguments": text}
            calls.append({"id": item["call_id"], "type": "function", "function": called})
            continue
        is_thought = item.get("type") == "reasoning"
        place = "summary" if is_thought and not item.get("content") else "content"
        said = text_of({"content": _content_of(f"{where}.{place}", item.get(place) or "")})
        (thoughts if is_thought else texts).append(said)
    text, thought = ("\n\n".join(filter(None, some)) for some in (texts, thoughts))
    turn = {"role": "assistant", "content": text, **present({"reasoning_content": thought, "tool_calls": calls})}
    return [turn] if text or calls else []


def _system_first(instructions: str, messages: Sequence[Json]) -> list[Json]:
    """Return the messages with at most one system message, the first: chat templates, as Qwen's, fail at any other.

    What a client says in that role later is told as the user's.  At the front it would change the beginning of the
    prompt, which the model's server has read before.
    """
    head = [*itertools.takewhile(lambda message: message["role"] in _SYSTEM and all(
        part["type"] == "text" for part in parts_of(message)), messages)]
    text = "\n\n".join(filter(None, [instructions, *map(text_of, head)]))
    rest = [{**message, "role": "user"} if message["role"] in _SYSTEM else message for message in messages[len(head):]]
    # Clients send an empty input to see whether a model answers.
    return [*([{"role": "system", "content": text}] if text else []), *(rest or [{"role": "user", "content": "."}])]


def chat_of(body: Json, items: Sequence[Any]) -> tuple[Json, tuple[str, ...]]:
    """Return a body and its input items as chat's body, and what is left out of it.  Raise BadRequest."""
    tools, choice, text = tools_of(body), body.get("tool_choice"), body.get("text") or {}
    messages, left_out = messages_of(items)
    form, effort = text.get("format"), (body.get("reasoning") or {}).get("effort")
    if form is not None:
        need(isinstance(form, dict) and isinstance(form.get("type"), str), "text.format", "must have a type")
        inner = {name: value for name, value in form.items() if name != "type" and value is not None}
        form = {"type": form["type"], **({form["type"]: inner} if inner else {})}
    chosen = _choice_of(choice, tools)
    left_out = [tool.name for tool in tools.values() if not tool.kind] + left_out + (
        ["tool_choice"] if choice and not chosen else []) + (["truncation"] if body.get("truncation") == "auto" else [])
    return {
        **{name: value for name, value in body.items() if name in _AS_IN_CHAT},
        "messages": _system_first(body.get("instructions") or "", messages),
        "tools": [{"type": "function", "function": {"name": name, **tool.function}}
                  for name, tool in tools.items() if tool.kind],
        "tool_choice": chosen, "response_format": form, "verbosity": text.get("verbosity"), "reasoning_effort": effort,
        "max_completion_tokens": body.get("max_output_tokens"),
        "logprobs": bool(body.get("top_logprobs")) or "message.output_text.logprobs" in (body.get("include") or ()),
    }, tuple(dict.fromkeys(left_out))


# --- 11. OpenAI's Responses: what is answered -------------------------------------------------------------------------

class _Kind(NamedTuple):
    """A kind of output item, and its events."""
    prefix: str             # of its id
    item: Json
    events: str             # before .delta and .done
    text: str               # the field that has the text: in the item, or in its one part
    parts: str = ""         # the field that has the parts
    part: Json = {}
    part_events: str = ""   # before .added and .done
    place: Json = {}        # of the part


_MESSAGE: Json = {"type": "message", "role": "assistant"}
_KINDS = {    # by the field of a delta, and by the kind of a call
    "reasoning_content": _Kind("rs", {"type": "reasoning"}, "response.reasoning_summary_text", "text", "summary",
                               {"type": "summary_text"}, "response.reasoning_summary_part", {"summary_index": 0}),
    "content": _Kind("msg", _MESSAGE, "response.output_text", "text", "content", {"type": "output_text",
                     "annotations": [], "logprobs": []}, "response.content_part", {"content_index": 0}),
    "refusal": _Kind("msg", _MESSAGE, "response.refusal", "refusal", "content", {"type": "refusal"},
                     "response.content_part", {"content_index": 0}),
    "function_call": _Kind("fc", {"type": "function_call"}, "response.function_call_arguments", "arguments"),
    "custom_tool_call": _Kind("ctc", {"type": "custom_tool_call"}, "response.custom_tool_call_input", "input"),
}
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_NO_LOGPROBS = b',"logprobs":[]'
_ALWAYS = {"object": "response", "background": False, "error": None, "incomplete_details": None,
           "previous_response_id": None, "store": False, "truncation": "disabled"}
_ECHOED: Json = {    # of the request; with what is usual
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "top_logprobs": 0,
    "reasoning": {"effort": None, "summary": None}, "temperature": None, "text": {"format": {"type": "text"}},
    "tool_choice": "auto", "tools": [], "top_p": None, "user": None}
MAX_KEPT, MAX_KEPT_BYTES = 256, 64 << 10    # items, and of each of them


def _input_in(arguments: str) -> str:
    """Return the text that a model gave to a custom tool, by whatever name."""
    text = next(iter((object_in(arguments) or {}).values()), None)
    return text if isinstance(text, str) else arguments


def _usage_of(usage: Any) -> Json | None:
    """Return chat's usage as this API has it."""
    if not usage or not isinstance(usage, dict):
        return None
    read, written = ({"usage": usage.get(name)} for name in ("prompt_tokens_details", "completion_tokens_details"))
    return {"input_tokens": usage.get("prompt_tokens"), "input_tokens_details": {
                name: tokens_of(read, name) for name in ("cached_tokens", "cache_write_tokens")},
            "output_tokens": usage.get("completion_tokens"), "output_tokens_details": {
                "reasoning_tokens": tokens_of(written, "reasoning_tokens")}, "total_tokens": usage.get("total_tokens")}


def _item_of(item: Item, status: str) -> Json:
    """Return an item as the API has it."""
    kind, has_text = _KINDS[item.kind], status != "in_progress"
    text = item.text() if has_text else ""
    part = {**kind.part, **present({"logprobs": item.logprobs}),
            kind.text: _input_in(text) if kind.text == "input" else text}
    return {**item.start, "status": status, **({kind.parts: [part] if has_text else []} if kind.parts else part)}


class _ResponsesWriter(ItemWriter):
    def __init__(self, front: Responses, request: ChatRequest) -> None:
        super().__init__(front, request)
        self._answer = next(front.numbers)    # tells it from others, as some servers give them all one id
        self._number, self._status = 0, "completed"    # of the next event, and of the last item
        self._response = Json()

    @functools.cached_property
    def _tools(self) -> dict[str, _Tool]:
        return tools_of(self._request.origin)

    def whole(self, answer: Json) -> Json:
        self.take(answer)
        self.end()
        return self._response

    def end(self) -> bytes:
        reason = _INCOMPLETE.get(self._finish)
        self._status = "incomplete" if reason else "completed"
        events = self._flow(True)
        return events + self._states(self._status, incomplete_details={"reason": reason} if reason else None)

    def broken(self, error: OblixError) -> bytes:
        # The SDKs raise the first event, and only if it has an error object; Codex reads the second, and not the first.
        told = error_body(error)["error"]
        events = b"" if self._begun else self._begin({})
        return events + self._event("error", **{**told, "error": told}) + self._states(
            "failed", error={"code": error.code or error.type, "message": told["message"]})

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._request.stream:
            return b""
        self._number += 1
        return b"event: %b\n%b" % (kind.encode(), sse({**fields, "type": kind, "sequence_number": self._number - 1}))

    def _states(self, *states: str, **fields: Any) -> bytes:
        """Return the events that tell how the whole answer is."""
        self._response.update(usage=_usage_of(self._usage), status=states[-1], **fields)
        if not self._request.stream:
            return b""
        told = b',"response":%b}\n\n' % dumps(self._response)    # once: its tools alone may have 30 KB
        return b"".join([self._event(f"response.{state}")[:-3] + told for state in states])

    def _begin(self, first: Json) -> bytes:
        body, id = self._request.origin, re.sub("[^A-Za-z0-9]", "", str(first.get("id")).removeprefix("chatcmpl-"))
        self._id = f"{id[-40:]}x{self._answer:x}"
        self._response = {
            "id": f"resp_{self._id}", "created_at": first.get("created", 0), **_ALWAYS, "output": [],
            "model": first.get("model", self._request.model), "service_tier": first.get("service_tier") or "default",
            **{name: usual if body.get(name) is None else body[name] for name, usual in _ECHOED.items()}}
        return self._states("created", "in_progress")

    def _start(self, key: Any, call: Json | None) -> tuple[str, Json]:
        kind, more = key, Json()
        if call:
            name = str(_inner(call).get("name"))
            tool = self._tools.get(name) or _Tool("", name)    # one that the model has made up
            kind, more = tool.kind or "function_call", {"call_id": call.get("id"), "name": tool.name}
            more.update(present({"namespace": tool.namespace}))
        id = f"{_KINDS[kind].prefix}_{self._id}_{self._count}"
        return kind, {"id": id, **_KINDS[kind].item, "status": "", **more}

    @staticmethod
    def _where(item: Item) -> Json:
        """Return the fields of an event that name an item, or its part."""
        return {"item_id": item.start["id"], "output_index": item.index, **_KINDS[item.kind].place}

    def _part_event(self, item: Item, step: str, part: Json) -> bytes:
        kind = _KINDS[item.kind]
        return self._event(f"{kind.part_events}.{step}", **self._where(item), part=part) if kind.parts else b""

    def _open(self, item: Item) -> bytes:
        kind, whole = _KINDS[item.kind], _item_of(item, "in_progress")
        name = f"{kind.events}.delta"
        item.frame = b'event: %b\n%b,"delta":"%%b"%b,"sequence_number":%%d}\n\n' % (
            name.encode(), sse({"type": name, **self._where(item)})[:-3], _NO_LOGPROBS * ("logprobs" in kind.part))
        events = self._event("response.output_item.added", output_index=item.index, item=whole)
        return events + self._part_event(item, "added", {**kind.part, kind.text: ""})

    def _deltas(self, item: Item, texts: Sequence[bytes]) -> bytes:
        # that text is within the JSON of the arguments, which has to be complete
        return b"" if item.kind == "custom_tool_call" else self._told(item, texts)

    def _told(self, item: Item, texts: Sequence[bytes]) -> bytes:
        logprobs, item.logprobs_told = item.logprobs[item.logprobs_told:], len(item.logprobs)
        texts, frame, first = [b"".join(texts)] if logprobs else texts, item.frame, self._number
        self._number += len(texts)
        events = b"".join([frame % (text, number) for number, text in enumerate(texts, first)])
        return events.replace(_NO_LOGPROBS, b',"logprobs":' + dumps(logprobs)) if logprobs else events

    def _close(self, item: Item) -> bytes:
        kind, whole = _KINDS[item.kind], _item_of(item, self._status if len(self._items) == 1 else "completed")
        self._response["output"].append(whole)
        if self._request.origin.get("store") is not False and sum(map(len, item.said)) <= MAX_KEPT_BYTES:
            self._front.kept.append(whole)
        part = whole[kind.parts][0] if kind.parts else whole
        events = self._told(item, [dumps(part["input"])[1:-1]]) if kind.text == "input" else b""
        told = {name: part[name] for name in (kind.text, "logprobs") if name in part}
        events += self._event(f"{kind.events}.done", **self._where(item), **told)
        events += self._part_event(item, "done", part)
        return events + self._event("response.output_item.done", output_index=item.index, item=whole)


class Responses(Front):
    """OpenAI's Responses, without its store: only the newest items are kept, for clients that refer to them."""
    name, writer = "responses", _ResponsesWriter

    def __init__(self) -> None:
        self.kept: collections.deque[Json] = collections.deque(maxlen=MAX_KEPT)
        self.numbers = itertools.count()    # of answers

    def request(self, body: Json, head: Head) -> ChatRequest:
        asked, left_out = self.chat(body)
        request = parse_request({**asked, "stream_options": {"include_usage": True}})
        return dataclasses.replace(request, origin=body, left_out=left_out)

    def chat(self, body: Json) -> tuple[Json, tuple[str, ...]]:
        """Return a body as chat's, and what is left out of it.  Raise BadRequest."""
        check_fields(body, _RESPONSES_FIELDS, ())
        for name in _NOT_KEPT:
            need(not body.get(name), name, "is not supported: Oblix stores no responses and no prompts. Send the whole "
                 "input with each request", "unsupported_parameter")
        asked = body.get("input") or []
        items = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        referring = [number for number, item in enumerate(items)
                     if isinstance(item, dict) and item.get("type") == "item_reference"]
        kept = {item["id"]: item for item in tuple(self.kept)} if referring else {}
        for number in referring:
            items[number] = kept.get(str(items[number].get("id")))
            need(items[number], f"input[{number}]", "refers to an item that Oblix does not have: it keeps the newest "
                 f"{MAX_KEPT} in its memory. Send whole items: set store to false (Vercel AI SDK: providerOptions: "
                 "{openai: {store: false}})", "unsupported_parameter")
        return chat_of(body, items)


# --- 11. Anthropic's Messages -----------------------------------------------------------------------------------------

_MESSAGES_FIELDS: dict[str, Rule] = {
    **{name: FIELDS[name] for name in ("model", "messages", "stream", "temperature", "top_p", "tools")},
    "max_tokens": whole_number(0, MOST_TOKENS, " from 0"),
    "system": (lambda value: isinstance(value, (str, list)), "must be a string or a list of text blocks"),
    "stop_sequences": (lambda value: isinstance(value, list) and FIELDS["stop"][0](value), "must be a list of strings"),
    **dict.fromkeys(("tool_choice", "thinking", "output_config", "output_format"), FIELDS["stream_options"]),
}
# The blocks that others than Claude can be asked with, and the types of their fields.
_BLOCK_FIELDS: dict[str, dict[str, Any]] = {
    "text": {"text": str}, "image": {"source": dict}, "document": {"source": dict}, "thinking": {"thinking": str},
    "search_result": {"content": list}, "tool_reference": {"tool_name": str},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str, "content": (str, list, type(None))}}
_SOURCE_FIELDS = {"base64": ("media_type", "data"), "url": ("url",), "file": ("file_id",), "text": ("data",)}
_TOLD_OF_TEXTS = ("title", "source", "context")    # of documents and of what a search has found
# What Claude Code changes with each request, so that no server's cache of the prompt would fit any more: the first
# block of the system (llama.cpp's pull request 20623), and what is left of its budget (omlx#2881, ollama's 17918).
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
_COUNTDOWN = re.compile(r"<total_tokens>\s*\d+ tokens left\s*</total_tokens>")
_OWN_TOOLS = (None, "custom")    # the types of a client's own; the others are Anthropic's
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_STOPS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_ERROR_TYPES = {401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
                409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
                504: "timeout_error", 529: "overloaded_error"}
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),    # kind of block -> its pieces
           "tool_use": ("input_json_delta", "partial_json")}
BYTES_A_TOKEN = 3.5    # as Anthropic's glossary has it for Claude; other tokenizers have 3 to 4 bytes


def prompt_tokens(request: ChatRequest) -> int:
    """Return about how many tokens a prompt has, by its size."""
    return math.ceil(request.size / BYTES_A_TOKEN)


def messages_body(body: Json) -> tuple[Json, tuple[str, ...]]:
    """Return a Messages body as a chat body, and the tools that it leaves out.  Raises BadRequest."""
    own = [tool for tool in body.get("tools") or () if tool.get("type") in _OWN_TOOLS]
    for number, tool in enumerate(own):
        need(isinstance(tool.get("name"), str) and isinstance(tool.get("input_schema"), dict), f"tools.{number}",
             'must be like {"name": …, "description": …, "input_schema": {…}}')
    tools = [{"type": "function", "function": {"name": claude_name(tool["name"]), "parameters": tool["input_schema"],
                                               "description": tool.get("description")}} for tool in own]
    config, choice = body.get("output_config") or {}, body.get("tool_choice") or {"type": "auto"}
    form = config.get("format") or body.get("output_format")
    schema = form.get("schema") if isinstance(form, dict) else None
    kind, name = str(choice.get("type")), choice.get("name")
    need(kind in _TOOL_CHOICES or isinstance(name, str), "tool_choice",
         'must have the type auto, any or none, or name a tool: {"type": "tool", "name": …}')
    told: Json = {name: body.get(name) for name in ("model", "temperature", "top_p", "stream")}
    told.update(
        messages=_chat_messages(body), tools=tools, stop=body.get("stop_sequences"),
        stream_options={"include_usage": True},    # and 0 tokens only fill Claude's cache:
        max_tokens=None if body.get("max_tokens") is None else max(1, body["max_tokens"]),
        tool_choice=_TOOL_CHOICES.get(kind, {"type": "function", "function": {"name": claude_name(str(name))}}),
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") else None,
        reasoning_effort=_effort_meant(body.get("thinking") or {}, config),
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        if isinstance(schema, dict) else None)
    return told, tuple([str(tool["type"]) for tool in body.get("tools") or () if tool.get("type") not in _OWN_TOOLS])


def _own_names(body: Json) -> dict[str, str]:
    """Return the client's names of its tools by those that others are told: OpenAI takes 64 characters, Claude 128."""
    names = [tool["name"] for tool in body.get("tools") or () if isinstance(tool.get("name"), str)]
    return {claude_name(name): name for name in names}


def _effort_meant(thinking: Json, config: Json) -> str | None:
    """Return the reasoning_effort that Anthropic's fields mean, or None for the model's own."""
    kind, budget = thinking.get("type"), thinking.get("budget_tokens")
    if kind == "disabled":
        return "none"
    if config.get("effort") in EFFORTS:
        return config["effort"]  # type: ignore[no-any-return]
    return ("low" if budget <= 2048 else "medium" if budget < 8192 else "high") if isinstance(budget, int) else None


def _chat_messages(body: Json) -> list[Json]:
    """Return the system and the messages of a Messages body as a chat's.  Raises BadRequest."""
    system = "\n".join(block["text"] for block in _blocks_in(body.get("system") or "", "system", True))
    said, turns = [{"role": "system", "content": system}] if system else [], list[tuple[bool, list[Json]]]()
    for number, message in enumerate(body["messages"]):
        role = message.get("role") if isinstance(message, dict) else None
        need(role in ("user", "assistant", "system"), f"messages.{number}", 'must have the role "user" or "assistant"')
        blocks = _blocks_in(message.get("content"), f"messages.{number}.content", role == "system")
        if role == "system":    # in between some templates refuse it, and Ollama takes it to the front of its cache
            blocks = [{**one, "text": f"<system-reminder>\n{one['text']}\n</system-reminder>"} for one in blocks]
        turns.append((role == "assistant", blocks))
    for is_assistant, group in itertools.groupby(turns, lambda turn: turn[0]):    # some templates want to alternate
        blocks = [block for _, some in group for block in some]
        said.extend(_assistant_message(blocks) if is_assistant else _user_messages(blocks))
    return said


def _blocks_in(content: Any, where: str, is_system: bool = False) -> list[Json]:
    """Return the blocks of a content that others than Claude can be asked with.  Raises BadRequest."""
    need(isinstance(content, (str, list)), where, "must be a string or a list of blocks")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kept = []
    for number, block in enumerate(blocks):
        place, kind = f"{where}.{number}", str(block.get("type") if isinstance(block, dict) else None)
        need(kind != "None", place, "must be an object with a type")
        for name, types in _BLOCK_FIELDS.get(kind, {}).items():
            need(isinstance(block.get(name), types), f"{place}.{name}", f"is missing or of a wrong type ({kind} block)")
        text = block["text"] if kind == "text" else ""
        billing = _BILLING.match(text)
        text = _COUNTDOWN.sub("", text[billing.end() if billing else 0:]).strip()
        if text or kind != "text" and kind in _BLOCK_FIELDS and not is_system:
            kept.append({**block, "text": text} if is_system else block)
    return kept


def _parts_of_block(block: Json) -> list[Json]:
    """Return the parts of a chat's content that say what a block says.  Raises BadRequest."""
    kind = block["type"]
    if kind == "tool_reference":    # what Claude Code's search among tools has found
        return text_blocks(f"You can call the tool {block['tool_name']} now.")
    told = text_blocks("\n".join(block[name] for name in _TOLD_OF_TEXTS if isinstance(block.get(name), str)))
    if kind == "search_result":
        return [*told, *_parts_within(block["content"], "search_result.content")]
    if kind not in ("image", "document"):    # of the others only a text can stand here
        return text_blocks(block.get("text", ""))
    source, form = block["source"], str(block["source"].get("type"))
    if form == "content":
        return [*told, *_parts_within(source.get("content"), f"{kind}.source.content")]
    needed = _SOURCE_FIELDS.get(form, ())
    need(needed and all(isinstance(source.get(name), str) for name in needed), f"{kind}.source",
         f"must be of a type among {', '.join(_SOURCE_FIELDS)}, and complete")
    if form == "text":
        return [*told, *text_blocks(source["data"])]
    url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
    if kind == "image" and form != "file":
        return [{"type": "image_url", "image_url": {"url": url}}]
    where = {"file_id": source["file_id"]} if form == "file" else {"file_url" if form == "url" else "file_data": url}
    return [{"type": "file", "file": {"filename": str(block.get("title") or "document.pdf"), **where}}]


def _parts_within(content: Any, where: str) -> list[Json]:
    return [part for block in _blocks_in(content, where) for part in _parts_of_block(block)]


def _assistant_message(blocks: Sequence[Json]) -> list[Json]:
    """Return what the assistant said; of thoughts only those without a signature, which are not Claude's."""
    text = "\n".join(block["text"] for block in blocks if block["type"] == "text")
    thought = "".join(block["thinking"] for block in blocks
                      if block["type"] == "thinking" and not block.get("signature"))
    calls = [{"id": block["id"], "type": "function", "function": {
        "name": claude_name(block["name"]), "arguments": dumps(block["input"]).decode()}}
        for block in blocks if block["type"] == "tool_use"]
    more = present({"tool_calls": calls, "reasoning_content": thought})
    return [{"role": "assistant", "content": text or None, **more}] if text or calls else []


def _user_messages(blocks: Sequence[Json]) -> list[Json]:
    """Return the results of tools, which have to follow their calls, and then what else the user says."""
    results, rest = list[Json](), list[Json]()
    for block in blocks:
        if block["type"] != "tool_result":
            rest.extend(_parts_of_block(block))
            continue
        parts = _parts_within(block.get("content") or "", "tool_result.content")
        text = text_of({"content": parts})
        if block.get("is_error") and "error" not in text[:100].lower():    # there is no field for it
            text = f"Error: {text}"
        results.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        rest.extend(part for part in parts if part["type"] != "text")    # a tool's message takes texts alone
    texts = [part["text"] for part in rest if part["type"] == "text"]
    content = "\n".join(texts) if len(texts) == len(rest) else rest    # some servers take no list
    return [*results, *([{"role": "user", "content": content}] if rest else [])]


def _for_claude(message: Json) -> Json:
    """Return a message without what Claude refuses of other models: thoughts that it has not signed, their ids."""
    blocks = message["content"]
    return message if isinstance(blocks, str) else {**message, "content": [
        {name: claude_id(value) if name in ("id", "tool_use_id") and isinstance(value, str) else value
         for name, value in block.items()}
        for block in blocks if block["type"] != "thinking" or block.get("signature")]}


def _long_prompt(message: str) -> str:
    """Return the text of an error in the words by which agents know that they have to shorten the conversation."""
    if re.search(r"prompt is too long: \d+ tokens > \d+ maximum", message):    # Claude's own
        return message
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", message)
    limits = re.findall(r"(?i)(?:length|limit|window|size|n_ctx|maximum|>)\D{0,40}?(\d{1,9})\b", plain)
    most = max(map(int, limits), default=0)
    asked = max(map(int, re.findall(r"(?<![\w.:-])\d{1,9}\b(?![-.]\w)", plain)), default=0)    # not of a model's name
    told = f"{asked} tokens > {most}" if asked > most else f"over {most} tokens > {most}"
    return f"prompt is too long: {told} maximum ({message})" if most else f"prompt is too long: {message}"


def _framed(event: Json) -> bytes:
    """Return an event as Anthropic's clients read it, or nothing for one without a name."""
    name = str(event.get("type"))
    return b"event: %b\ndata: %b\n\n" % (name.encode(), dumps(event)) if name.isidentifier() and name.isascii() else b""


class _MessagesWriter(ItemWriter):
    event = staticmethod(_framed)
    _ended = False    # by Claude itself

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return _own_names(self._request.origin)

    def take(self, chunk: Any) -> bytes:
        native = None if isinstance(chunk, Texts) else chunk.get("native")
        return super().take(chunk) if native is None else self._native(native)

    def whole(self, answer: Json) -> Json:
        if "native" in answer:
            return answer["native"]  # type: ignore[no-any-return]
        self._hear(answer["choices"][0])
        content = [{**item.start, **({"input": arguments_in(item.text())} if item.kind == "tool_use" else {
            item.kind: item.text()})} for item in self._items]
        self._finish, self._usage = answer["choices"][0]["finish_reason"], answer.get("usage") or {}
        return {**self._message(answer), "content": content, **self._stop()}

    def _message(self, answer: Json) -> Json:
        """Return the message of an answer as it begins."""
        return {"id": f"msg_{answer['id'].removeprefix('chatcmpl-')}", "type": "message", "role": "assistant",
                "model": answer["model"], "content": [], "stop_reason": None, "stop_sequence": None,
                "usage": self._counts()}

    def _stop(self) -> Json:
        return {"stop_reason": _STOPS.get(self._finish, "end_turn"), "stop_sequence": None}

    def _counts(self) -> Json:
        """Return the counts so far, with an estimate of the prompt until, or unless, the server tells any."""
        usage = self._usage
        details = {"usage": usage.get("prompt_tokens_details")}
        read, written = tokens_of(details, "cached_tokens"), tokens_of(details, "cache_write_tokens")
        new = max(0, tokens_of({"usage": usage}, "prompt_tokens") - read - written)
        return {"input_tokens": new if usage else prompt_tokens(self._request), "cache_creation_input_tokens": written,
                "cache_read_input_tokens": read, "output_tokens": tokens_of({"usage": usage})}

    def _begin(self, first: Json) -> bytes:
        return _framed({"type": "message_start", "message": self._message(first)}) + MESSAGES.keep_alive

    def _native(self, event: Json) -> bytes:
        """Return an event of Claude's as it came, and note which block is open."""
        kind, self._begun = event.get("type"), True
        if kind == "content_block_start":
            block, index = event["content_block"], event.get("index")
            item = Item("content" if block["type"] == "text" else None,
                        index if type(index) is int else self._count, str(block["type"]), block)
            self._items, self._count, item.is_open = [item], item.index + 1, True
        self._items = [] if kind == "content_block_stop" else self._items
        self._ended = self._ended or kind == "message_stop"
        return _framed(event) if event else b""

    def _start(self, key: Any, call: Json | None) -> tuple[str, Json]:
        if call:
            name = str(_inner(call)["name"])
            return "tool_use", {"type": "tool_use", "id": call.get("id"), "name": self._names.get(name, name),
                                "input": {}}
        kind = "thinking" if key == "reasoning_content" else "text"
        return kind, {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}

    @staticmethod
    def _step(item: Item, step: str, **fields: Json) -> bytes:
        return _framed({"type": f"content_block_{step}", "index": item.index, **fields})

    def _open(self, item: Item) -> bytes:
        return self._step(item, "start", content_block=item.start)

    def _deltas(self, item: Item, texts: Sequence[bytes]) -> bytes:
        kind, field = _DELTAS.get(item.kind, _DELTAS["text"])
        item.frame = item.frame or around_text(
            self._step(item, "delta", delta={"type": kind, field: "\0"}), b'"%b":"' % field.encode())
        if item.kind != "tool_use":    # a call's are read again
            item.said.clear()
        return framed(texts, item.frame)

    def _close(self, item: Item) -> bytes:
        signed = b""
        if item.kind == "thinking":    # some clients drop thoughts without it; only Claude can sign
            signed = self._step(item, "delta", delta={"type": "signature_delta", "signature": ""})
        return signed + self._step(item, "stop")

    def end(self) -> bytes:
        if self._ended:
            return b""
        last = {"type": "message_delta", "delta": self._stop(), "usage": self._counts()}
        return self._flow(True) + _framed(last) + _framed({"type": "message_stop"})


class Messages(Front):
    """Anthropic's Messages.  Claude gets a request as it came, and its answer goes back as it comes."""
    name, writer = "messages", _MessagesWriter
    keep_alive = _framed({"type": "ping"})

    def request(self, body: Json, head: Head) -> ChatRequest:
        needed = ("model", "messages") if head.path.endswith("/count_tokens") else ("model", "messages", "max_tokens")
        check_fields(body, _MESSAGES_FIELDS, needed)
        told, left_out = messages_body(body)
        path = f"/v1{head.path}{'?beta=true' if 'beta=true' in head.target.partition('?')[2].split('&') else ''}"
        messages = [message for message in map(_for_claude, body["messages"]) if message["content"] != []]
        native = Native("claude", path, {**body, "messages": messages}, tuple([
            (name, head.fields[name]) for name in ("anthropic-version", "anthropic-beta") if name in head.fields]))
        return dataclasses.replace(parse_request(told), origin=body, native=native, left_out=left_out)

    def error(self, error: OblixError) -> Json:
        kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        text = _long_prompt(error.message) if error.code == "context_length_exceeded" else error.message
        told = {"type": kind, "message": text or type(error).__name__}
        return {"type": "error", "error": told, "request_id": error.request_id}

    def headers(self, request_id: str) -> dict[str, str]:
        return {"request-id": request_id}


# --- 11. Ollama's lists of models -------------------------------------------------------------------------------------

# The first version with all the APIs that Oblix has: /v1/responses came with 0.13.4 (Codex asks for it), /v1/messages
# with 0.14.0.  VS Code wants 0.6.4.
OLLAMA_VERSION = "0.14.0"
_DETAILS = {"parent_model": "", "format": "", "family": "oblix", "families": ["oblix"], "parameter_size": "",
            "quantization_level": ""}    # Zed reads no list in which one is missing


class OllamaApi(Front):
    """What all of Ollama's paths have in common."""

    def error(self, error: OblixError) -> Json:
        return {"error": error.message or type(error).__name__}


def ollama_entry(id: str, model: Model) -> Json:
    """Return a model's entry in /api/tags: an installed one's as Ollama has it."""
    name = id.removeprefix("ollama:")
    name = name if ":" in name else name + ":latest"
    # What nobody knows of may take tools: a client sends none to a model that does not say so.
    return {"modified_at": rfc3339(model.created), "size": model.size, "digest": f"{number_for(id):08x}" * 8,
            "capabilities": sorted(model.capabilities or ("completion", "tools")), **present(model.entry),
            "name": name, "model": name, "details": {**_DETAILS, **(model.entry.get("details") or {})}}


def ollama_details(id: str, model: Model) -> Json:
    """Return the answer of /api/show.  Clients read the window at the architecture's name, as VS Code and Zed do."""
    entry = ollama_entry(id, model)
    family = entry["details"]["family"] or "oblix"
    template = "{{ .Prompt }}{{ .Suffix }}" * ("insert" in entry["capabilities"])    # by which Continue asks to insert
    return {"license": "", "modelfile": "", "parameters": "", "template": template, "system": "",
            **{name: entry[name] for name in ("details", "capabilities", "modified_at")},
            "model_info": {"general.architecture": family, **present({f"{family}.context_length": model.max_context}),
                           "general.basename": model.title or id.removesuffix(":latest")}}


def ollama_loaded(models: Iterable[Model]) -> Json:
    """Return the answer of /api/ps: what Ollama has in memory, as it says it."""
    return {"models": [*{str(model.loaded["name"]): model.loaded for model in models if model.loaded}.values()]}


# --- 11. Ollama's API -------------------------------------------------------------------------------------------------

_A_TEXT, _WHOLE = FIELDS["reasoning_effort"], FIELDS["seed"]
_SHARED = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty")    # with OpenAI
_AS_IN_OPENAI = ("model", "tools", "logprobs", "top_logprobs")
_DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")    # in ns
_ONLY_OLLAMA = ("raw", "template", "context", "suffix")    # knows what these make of a prompt
OLLAMA_FIELDS: dict[str, Rule] = {
    **{name: FIELDS[name] for name in ("model", "stream", "tools", "options", "logprobs", "top_logprobs")},
    **dict.fromkeys(("prompt", "system", "suffix", "template"), _A_TEXT), "raw": FIELDS["stream"],
    "messages": (lambda value: isinstance(value, list), "must be a list of messages"),
    "format": (lambda value: isinstance(value, dict) or value in ("", "json"), 'must be "json" or a JSON schema'),
    "think": (lambda value: isinstance(value, (bool, str)), 'must be true, false, "low", "medium" or "high"'),
    "keep_alive": (lambda value: type(value) in (int, float, str), 'must be seconds, or a time such as "5m"'),
    "context": (lambda value: isinstance(value, list), "must be a list of numbers"),
    "images": (lambda value: isinstance(value, list) and all(isinstance(image, str) for image in value),
               "must be a list of images in base64"),
}
OLLAMA_MESSAGE: dict[str, Rule] = {
    **dict.fromkeys(("role", "content", "thinking", "tool_name", "name", "tool_call_id"), _A_TEXT),
    "images": OLLAMA_FIELDS["images"],
    "tool_calls": (lambda value: MESSAGE_FIELDS["tool_calls"][0](value) and all(map(called_in, value)),
                   'must be a list of {"function": {"name": …, "arguments": {}}}'),
}
OLLAMA_OPTIONS: dict[str, Rule] = {    # for a wrong type Ollama has a 500
    **{name: FIELDS[name] for name in _SHARED}, **dict.fromkeys(("num_predict", "num_ctx"), _WHOLE)}


def ndjson(value: Json) -> bytes:
    """Return a line of newline-delimited JSON."""
    return dumps(value) + b"\n"


class _OllamaWriter(Writer):
    event = staticmethod(ndjson)
    _frame: Frame | None = None

    def __init__(self, front: OllamaChat, request: ChatRequest) -> None:
        super().__init__(front, request)
        self._last: list[Chunk] = []    # what is said at the end: calls, which its clients get whole, reason, usage

    def whole(self, answer: Json) -> Json:
        choice = answer["choices"][0]
        return {**self._front.piece(answer, choice, _ollama_calls(choice)), **self._front.ended(answer)}

    def take(self, chunk: Any) -> bytes:
        if isinstance(chunk, Texts):
            return framed(chunk, self._frame)
        self._frame = self._frame or around_text(
            ndjson(self._front.piece(chunk, {"delta": {"content": "\0"}})), self._front.before_text)
        choices = chunk["choices"]
        if not self._last or "usage" in chunk or any(
                choice["finish_reason"] or "tool_calls" in choice["delta"] for choice in choices):
            self._last.append({**chunk, "choices": [
                {**choice, "delta": {"tool_calls": [*choice["delta"].get("tool_calls", ())]}} for choice in choices]})
        return b"".join([ndjson(self._front.piece(chunk, choice)) for choice in choices
                         if any(map(choice["delta"].get, _SAID)) or choice.get("logprobs")])

    def end(self) -> bytes:
        answer = fold(self._last)
        calls = _ollama_calls(answer["choices"][0])
        told = ndjson(self._front.piece(answer, {}, calls)) if calls else b""
        return told + ndjson({**self._front.piece(answer, {}), **self._front.ended(answer)})


class OllamaChat(OllamaApi):
    """Ollama's /api/chat.  Ollama itself gets a request as it came, others get it in OpenAI's words."""
    name, writer, events = "ollama", _OllamaWriter, "application/x-ndjson"
    path, before_text = "/api/chat", b'"content":"'
    keep_alive = (b'{"model":"","created_at":"1970-01-01T00:00:00Z","message":{"role":"assistant","content":""},'
                  b'"done":false}\n')    # its clients read each line as JSON

    def request(self, body: Json, head: Head) -> ChatRequest:
        check_fields(body, OLLAMA_FIELDS, ("model",))
        body = without_nulls(body, "options")
        options, messages = body.get("options", {}), self.messages(body)
        check_fields(options, OLLAMA_OPTIONS, (), "options.")
        if not messages:
            own: Json = {"messages": [], **{name: body[name] for name in ("keep_alive", "options") if name in body}}
            return ChatRequest(body["model"], {"messages": []}, origin=body, native=Native("ollama", "/api/chat", own))
        effort: Any = body.get("think")
        request = parse_request({
            **{name: options.get(name) for name in _SHARED}, **{name: body.get(name) for name in _AS_IN_OPENAI},
            "messages": [*map(_with_calls, answered(without_deprecated(messages)))], "stream": body.get("stream", True),
            "stream_options": {"include_usage": True}, "response_format": _format(body.get("format")),
            "max_tokens": max(options.get("num_predict", 0), 0) or None,    # -1 is no limit, -2 the window's
            "reasoning_effort": {True: "medium", False: "none", "": None}.get(effort, effort)})
        only = next((name for name in _ONLY_OLLAMA if body.get(name)), "")
        return dataclasses.replace(request, origin=body, native=Native("ollama", self.path, body, only=only))

    def messages(self, body: Json) -> list[Json]:
        """Return the messages in OpenAI's words, with their calls as they came.  Raise BadRequest."""
        return [_from_ollama(f"messages[{number}]", message) for number, message in enumerate(body.get("messages", []))]

    def at_once(self, request: ChatRequest, now: int) -> Json | None:
        if request.messages:
            return None
        reason = "unload" if request.origin.get("keep_alive") in (0, "0", "0s", "0m") else "load"
        return {**self.piece({"model": request.model, "created": now}, {}), "done": True, "done_reason": reason}

    def note_time(self, answer: Json, first_s: float, seconds: float) -> None:
        took = (seconds, 0.0, first_s, max(seconds - first_s, 0.001))    # clients divide by the last
        if not _timings_of(answer).get("total_duration"):
            answer["timings"] = {name: int(part * 1e9) for name, part in zip(_DURATIONS, took)}

    def piece(self, answer: Json, choice: Json, calls: Sequence[Json] = ()) -> Json:
        """Return the piece of an answer that says what a choice and calls say."""
        said, told = choice.get("message") or choice.get("delta") or {}, choice.get("logprobs")
        text = said.get("content") or said.get("refusal") or ""
        more = present({"thinking": said.get("reasoning_content"), "tool_calls": calls})
        return {"model": answer["model"], "created_at": rfc3339(answer["created"]), **self.said(text, more),
                **present({"logprobs": told.get("content") if isinstance(told, dict) else None}), "done": False}

    def said(self, text: str, more: Json) -> Json:
        """Return the fields of a piece that have its text, and what it says besides."""
        return {"message": {"role": "assistant", "content": text, **more}}

    def ended(self, answer: Json) -> Json:
        """Return the fields of the last piece of an answer."""
        usage, finish = answer.get("usage") or {}, answer["choices"][0]["finish_reason"]
        timings = _timings_of(answer)
        return {"done": True, "done_reason": "length" if finish == "length" else "stop",
                **{name: timings.get(name) or 0 for name in _DURATIONS},
                "prompt_eval_count": usage.get("prompt_tokens") or 0, "eval_count": usage.get("completion_tokens") or 0}


class OllamaGenerate(OllamaChat):
    """Ollama's /api/generate: one prompt."""
    path, before_text = GENERATE_PATH, b'"response":"'
    keep_alive = b'{"model":"","created_at":"1970-01-01T00:00:00Z","response":"","done":false}\n'

    def messages(self, body: Json) -> list[Json]:
        asked = {"role": "user", "content": body.get("prompt", ""), "images": body.get("images")}
        system = {"role": "system", "content": body.get("system", "")}
        asks = asked["content"] or asked["images"]
        return [_from_ollama("", one) for one in (system, asked) if one["content"] or one is asked] if asks else []

    def said(self, text: str, more: Json) -> Json:
        return {"response": text, **more}

    def ended(self, answer: Json) -> Json:
        return {**super().ended(answer), "context": _timings_of(answer).get("context") or []}    # ComfyUI wants one


def _timings_of(answer: Json) -> Json:
    """Return Ollama's last piece of an answer, or what others tell under the same name, or {}."""
    return answer["timings"] if isinstance(answer.get("timings"), dict) else {}


def _from_ollama(where: str, message: Any) -> Json:
    """Return a message of Ollama's in OpenAI's words, with its calls as they came.  Raise BadRequest."""
    need(isinstance(message, dict), where, "must be an object")
    check_fields(message, OLLAMA_MESSAGE, ("role",), f"{where}.")
    text = message.get("content") or ""
    images = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}    # or what its bytes say
              for image in message.get("images") or ()]
    texts = [{"type": "text", "text": text}] if text else []
    return {"role": message["role"], "content": [*texts, *images] if images else text, **present({
        "tool_calls": message.get("tool_calls"), "tool_call_id": message.get("tool_call_id"),
        "name": message.get("tool_name") or message.get("name"), "reasoning_content": message.get("thinking")})}


def answered(messages: Iterable[Json]) -> Iterator[Json]:
    """Yield messages in which a result follows each call, and none has lost its call: OpenAI refuses both.

    Home Assistant cuts old messages off wherever it is.
    """
    waiting: dict[str, Json] = {}    # results that are missing yet, by id
    for message in (*messages, {"role": "", "tool_calls": []}):
        if message["role"] == "tool" and waiting.pop(message["tool_call_id"], None):
            yield message
            continue
        yield from waiting.values()
        waiting = {call["id"]: {"role": "tool", "tool_call_id": call["id"], "content": "(no result)", "tool_calls": []}
                   for call in message["tool_calls"]}
        if message["role"] == "tool":
            yield {"role": "user", "content": message["content"], "tool_calls": []}
        elif message["role"]:
            yield message


def _with_calls(message: Json) -> Json:
    """Return one of the messages of `without_deprecated` in OpenAI's words: arguments are a text there."""
    calls = [{**call, "type": "function", "function": {
        **call["function"], "arguments": dumps(call["function"]["arguments"]).decode()}}
        for call in message["tool_calls"]]
    return {**{name: value for name, value in message.items() if value or name == "content"}, "tool_calls": calls}


def _ollama_calls(choice: Json) -> list[Json]:
    """Return the tool calls of a whole choice as Ollama has them: arguments are an object there."""
    return [{"id": call["id"], "function": {"index": index, **function_in(call)}}
            for index, call in enumerate(choice["message"].get("tool_calls") or ())]


def _format(asked: str | Json | None) -> Json | None:
    """Return OpenAI's response_format for Ollama's format."""
    if isinstance(asked, dict):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked}}
    return {"type": "json_object"} if asked else None


# --- 11. Legacy completions -------------------------------------------------------------------------------------------

COMPLETION_FIELDS: dict[str, Rule] = {
    "prompt": (lambda value: len(value) == 1 and bool(value[0]) and isinstance(value[0], str)
               if isinstance(value, list) else value and isinstance(value, str),
               "must be one text that is not empty: Oblix takes no tokens, and one prompt in a request"),
    "suffix": _A_TEXT, "echo": FIELDS["stream"],
    "best_of": (lambda value: value == 1, "must be 1: each answer that is made is given, see n"),
    "logprobs": (lambda value: value is False, "is not supported here: ask for it at /v1/chat/completions"),
}
_NOT_OF_CHAT = {*COMPLETION_FIELDS, "messages", "tools", "functions", "top_logprobs"}


class _CompletionWriter(_ChatWriter):
    def __init__(self, front: Front, request: ChatRequest) -> None:
        super().__init__(front, request)
        echo = "".join(request.origin["prompt"]) if request.origin.get("echo") else ""
        self._echoes: dict[int, str] = dict.fromkeys(range(request.body.get("n", 1)), echo)    # before each choice

    def whole(self, answer: Json) -> Json:
        """Return an answer or a piece of one, each choice behind its echo, which is taken away."""
        said = [(choice, choice.get("message") or choice["delta"]) for choice in answer["choices"]]
        told = [{"index": choice["index"], "logprobs": None, "finish_reason": choice["finish_reason"], "text":
                 self._echoes.pop(choice["index"], "") + (words.get("content") or words.get("refusal") or "")}
                for choice, words in said]
        return {"id": answer["id"].replace("chatcmpl-", "cmpl-", 1), "object": "text_completion",
                "created": answer["created"], "model": answer["model"], "choices": told,
                **present({"usage": answer.get("usage")})}

    def take(self, chunk: Any) -> bytes:
        if isinstance(chunk, Texts):
            return framed(chunk, self._frame)
        told = self.whole(chunk)
        if not self._frame:
            says = {"index": 0, "logprobs": None, "finish_reason": None, "text": "\0"}
            self._frame = around_text(sse({**told, "choices": [says]}), b'"text":"')
        told["choices"] = [choice for choice in told["choices"] if choice["text"] or choice["finish_reason"]]
        return sse(told) if told["choices"] or self._request.include_usage and "usage" in told else b""


class Completions(Front):
    """OpenAI's legacy completions: the prompt is a user's message, without a limit of tokens unless one is given.

    OpenAI's limit was 16.  Ollama and llama.cpp, for which most of today's clients are made, have none.
    """
    name, writer = "completions", _CompletionWriter

    def request(self, body: Json, head: Head) -> ChatRequest:
        check_fields(body, COMPLETION_FIELDS, ("prompt",))
        prompt, suffix = "".join(body["prompt"]), body.get("suffix")
        kept = {name: value for name, value in body.items() if name not in _NOT_OF_CHAT}
        request = parse_request({**kept, "messages": [{"role": "user", "content": prompt}]})
        native = Native("ollama", GENERATE_PATH, {"prompt": prompt, "suffix": suffix}, only="suffix")
        return dataclasses.replace(request, origin=body, native=native if suffix else None)


# --- 11. Embeddings ---------------------------------------------------------------------------------------------------

def _is_input(value: Any) -> bool:
    """Return True for a text or a list of tokens, or for a list of texts, or of such lists, of which none is empty."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and (_are_tokens(value) or all(one and isinstance(one, str) for one in items)
                            or all(map(_are_tokens, items)))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(one) is int for one in value)


_EMBED_OPTIONS = ("options", "keep_alive", "truncate")


class Embeddings:
    """OpenAI's /v1/embeddings."""
    name = "embeddings"
    rules: ClassVar[dict[str, Rule]] = {
        "model": FIELDS["model"], "user": _A_TEXT, "input": (_is_input, "must be a text, a list of texts, or of lists "
                                                             "of tokens, of which none is empty"),
        "encoding_format": (lambda value: value in ("float", "base64"), "must be float or base64"),
        "dimensions": (lambda value: type(value) is int and 0 < value < 1 << 16, "must be an integer from 1 to 65535")}
    needed: ClassVar[tuple[str, ...]] = ("model", "input")
    field: ClassVar[str] = "input"
    passed: ClassVar[tuple[str, ...]] = ()    # to OpenAI's and compatible servers; all, as some want an input_type
    native: ClassVar[Json] = {"truncate": False}    # for Ollama; as OpenAI: too long a text is an error

    def request(self, body: Json) -> EmbeddingRequest:
        """Return the request in a client's body.  Raise BadRequest."""
        check_fields(body, self.rules, self.needed)
        body = without_nulls(body)
        inputs: Any = body.get(self.field) or []
        inputs = [inputs] if _are_tokens(inputs) else as_list(inputs)
        passed = self.passed or body.keys() - {"model", "input", "encoding_format"}
        kept = {name: value for name, value in body.items() if name in passed}
        native = {**self.native, **{name: body[name] for name in _EMBED_OPTIONS if name in self.rules and name in body}}
        return EmbeddingRequest(body["model"], inputs, body.get("encoding_format") == "base64", kept, native)

    def answer(self, model: str, vectors: Sequence[Any], tokens: int, seconds: float) -> Json:
        """Return the client's answer."""
        data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(vectors)]
        return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens,
                                                                          "total_tokens": tokens}}


class OllamaEmbed(Embeddings):
    """Ollama's /api/embed."""
    rules: ClassVar[dict[str, Rule]] = {
        **{name: Embeddings.rules[name] for name in ("model", "dimensions")},
        **{name: OLLAMA_FIELDS[name] for name in ("options", "keep_alive")}, "truncate": FIELDS["stream"],
        "input": FIELDS["stop"], "prompt": _A_TEXT}
    needed = ("model",)
    passed, native = ("dimensions",), {}

    def answer(self, model: str, vectors: Sequence[Any], tokens: int, seconds: float) -> Json:
        return {"model": model, "embeddings": vectors, "total_duration": int(seconds * 1e9), "load_duration": 0,
                "prompt_eval_count": tokens}


class OllamaEmbeddings(OllamaEmbed):
    """Ollama's /api/embeddings, of old: one prompt."""
    field = "prompt"

    def answer(self, model: str, vectors: Sequence[Any], tokens: int, seconds: float) -> Json:
        return {"embedding": vectors[0] if vectors else []}


EMBEDDINGS: dict[str, Embeddings] = {    # by path, without /v1
    "/embeddings": Embeddings(), "/api/embed": OllamaEmbed(), "/api/embeddings": OllamaEmbeddings()}


# --- 11. All of them --------------------------------------------------------------------------------------------------

CHAT, RESPONSES, MESSAGES, OLLAMA, OLLAMA_CHAT, OLLAMA_GENERATE = (
    Chat(), Responses(), Messages(), OllamaApi(), OllamaChat(), OllamaGenerate())
FRONTS: dict[str, Front] = {    # by path, without /v1
    "/chat/completions": CHAT, "/responses": RESPONSES, "/messages": MESSAGES, "/completions": Completions(),
    OLLAMA_CHAT.path: OLLAMA_CHAT, OLLAMA_GENERATE.path: OLLAMA_GENERATE}
_BELOW = {"/messages/": MESSAGES, "/api/": OLLAMA}    # how the path begins of what else these APIs have


def front_of(head: Head) -> Front:
    """Return the front in whose shape a request is answered, whatever is wrong with it."""
    path = head.path
    return FRONTS.get(path) or next((front for start, front in _BELOW.items() if path.startswith(start)), CHAT)


# === 12. Server =======================================================================================================
# uses: 1 2 3 7 9 10 11 13
# How do clients reach the gateway?  HTTP on the stdlib's threading server: connections, routes, bodies, one write per
# event, and the end.  It knows nothing of targets.

HEAD_S = 20.0                   # from the first byte of a head to its last; they come in one packet
BODY_S = 30.0                   # for a body's first byte, and between any two
BODY_BYTES_PER_S = 8 << 10      # the slowest that one may come after that, on average: a poor mobile link
IDLE_CLIENT_S = 75.0            # between requests; SDKs drop idle connections after 4-5 s, proxies after 60
SEND_S = 60.0                   # in which a client takes nothing of its answer
LINGER_S = 2.0                  # for the rest of a body that is refused
GRACE_S = 1.0                   # for a request that is on its way when Oblix is being stopped, and one that is ended
MAX_BODIES_BYTES = 128 << 20    # of requests under way, each of which takes some times its size
KEEP_ALIVE_S = 15.0             # of silence in a stream; proxies give up after 30 to 60 s


# --- 12. Who is here --------------------------------------------------------------------------------------------------

class Guest:
    """A client's connection, and what the client sends on it, each part of which has to come within a limit."""

    def __init__(self, connection: socket.socket, admission: Admission) -> None:
        self.connection, self._admission = connection, admission
        self.silent = True               # nothing of the next request has come
        self.busy = False                # a chat request is being answered
        self.since = time.monotonic()    # when it was last busy or answered, or could begin its next request
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
                return self.some(end or limit + 1)
            self._receive()

    def some(self, most: int) -> bytes:
        """Return what comes next, so many bytes at most.  Raise as `_receive`."""
        if not self._held:
            self._receive()
        piece = bytes(self._held[:most])
        del self._held[:most]
        return piece

    def _receive(self) -> None:
        """Wait for more.  Raise ClientGone where none comes, and what `_look` raises."""
        while True:
            try:
                piece = self.connection.recv(8 << 10 if self.silent else PIECE_BYTES)    # each idle client holds it
                break
            except NOT_YET:
                self._look()
            except OSError:
                raise ClientGone from None
        if not piece:
            raise ClientGone
        now = time.monotonic()
        if self.silent:
            self.silent, self._deadline = False, now + HEAD_S
        self._look()    # bytes may drip, each within the tick
        self._deadline = min(self._deadline + len(piece) / self._bytes_per_s, now + BODY_S)
        self._held += piece

    def _look(self) -> None:
        """Raise ClientGone if no request has begun in its time, BadRequest if one is too slow, Busy if Oblix ends."""
        now = time.monotonic()
        if self.silent:
            if now >= min(self._deadline, self._admission.idle_until):
                raise ClientGone
        elif self._admission.ended:
            raise shutting_down()
        elif now >= self._deadline:
            raise BadRequest("The request came too slowly.", status=408, code="request_too_slow")

    def linger(self) -> None:
        """Take the rest of an unread body, within reason: closed over it TCP resets, and the reply is lost."""
        self.since = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < self.since + LINGER_S:
                with contextlib.suppress(*NOT_YET):
                    if not self.connection.recv(PIECE_BYTES):
                        return

    def hang_up(self) -> None:
        """End the connection, also under a thread that waits on it."""
        with contextlib.suppress(OSError):    # it was closed meanwhile
            self.connection.shutdown(socket.SHUT_RDWR)


class Admission:
    """The connected clients, and the limits of what they may ask at once; shared by all listeners and threads."""

    def __init__(self, max_requests: int, max_body_bytes: int) -> None:
        self._max_requests, self._max_connections = max_requests, 2 * max_requests
        self.max_body_bytes = min(max_body_bytes, MAX_BODIES_BYTES)
        self.guests: set[Guest] = set()    # whose add and discard are atomic
        self._lock = threading.Lock()
        self._requests = self._bytes = 0    # guarded by it
        self.stopping = self.ended = False    # connections close behind their answers; every request ends at its look
        self.idle_until = math.inf            # when connections close on which nothing is being asked

    def enter(self, connection: socket.socket) -> Guest:
        """Return the guest on a new connection.  One more than there may be takes another's place."""
        guest = Guest(connection, self)
        self.guests.add(guest)
        if len(self.guests) > self._max_connections:
            self.make_room()
        return guest

    def make_room(self) -> None:
        """Close the connection that has gone longest without a chat request: idle, sending slowly, reading nothing."""
        waiting = [guest for guest in tuple(self.guests) if not guest.busy]
        slowest = min(waiting, key=lambda guest: guest.since, default=None)
        if slowest:
            self.guests.discard(slowest)    # it is not counted while it goes
            slowest.hang_up()

    def take(self, requests: int, size: int) -> None:
        """Count chat requests and bytes of bodies; negative ones have ended.  Raise Busy if that is too much."""
        with self._lock:
            if requests > 0 and self.full:
                raise too_much("--max-requests")
            if size > 0 and self._bytes + size > MAX_BODIES_BYTES:
                raise too_much("all requests under way are too large")
            self._requests, self._bytes = self._requests + requests, self._bytes + size

    @property
    def full(self) -> bool:
        """Return True if one more chat request would be too many."""
        return self._requests >= self._max_requests


def too_much(what: str) -> Busy:
    """Return the error for a client that asks when Oblix has enough to do."""
    return Busy(f"Oblix has as much to do as it takes on at once ({what}); ask again in a moment.", retry_after_s=1.0)


def shutting_down() -> Busy:
    """Return the error for a client whose request ends because Oblix does."""
    return Busy("Oblix is being stopped; ask again in a moment.", code="shutting_down", retry_after_s=1.0)


# --- 12. A connection -------------------------------------------------------------------------------------------------

class Handler(socketserver.BaseRequestHandler):
    """One client connection, on a thread of its own: requests in and replies out."""
    server: Listener

    def handle(self) -> None:
        self.guest: Guest = self.request
        self.gateway: Gateway = self.server.gateway
        self.admission, self.guard, connection = self.server.admission, self.server.guard, self.guest.connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)    # else a second small write waits 40 ms
        limit_waits(connection, TICK_S)
        with contextlib.suppress(ClientGone):    # nobody is left to tell
            while self._answer_next():
                pass

    def _answer_next(self) -> bool:
        """Read a request and answer it.  Return True if another one may follow."""
        self.close_connection, self._unread = True, True
        self.head, self._common, self.told = _NO_HEAD, dict[str, str](), dict[str, Any]()
        self.id, self._counted = new_id("req_"), 0
        self.started = time.monotonic()
        self.guest.await_request()
        try:
            self._read_head()
            self._route()
        except ClientGone:
            if self.head is _NO_HEAD:    # nothing was asked
                return False
            self.close_connection, self.told["error"] = True, HUNG_UP
        except OblixError as error:
            self._refuse(error)
        except Exception:  # a bug of ours takes down one request and is told in the log
            log.exception("%s internal error", self.id)
            self.close_connection, self.told["error"] = True, "internal error"
            if "status" not in self.told:
                self._refuse(OblixError(f"Oblix failed internally; its log tells more at {self.id}."))
        finally:
            self.admission.take(-self.guest.busy, -self._counted)
            self.guest.busy, self.guest.since = False, time.monotonic()    # it may be sent away now
        self._tell()
        if self._unread:
            self.guest.linger()
        return not self.close_connection

    def _read_head(self) -> None:
        """Read a request's head, and see whether it may be asked.  Raise OblixError, ClientGone."""
        first = self.guest.line(MAX_REQUEST_LINE)
        if first == b"\r\n":    # one is ignored: RFC 9112, 2.2
            first = self.guest.line(MAX_REQUEST_LINE)
        self.started = time.monotonic()
        if len(first) > MAX_REQUEST_LINE:
            raise BadRequest(f"The request line is longer than {MAX_REQUEST_LINE} bytes.", status=414,
                             code="uri_too_long")
        self.head = parse_head(first, self._fields())
        self._unread = self.head.body_size != 0
        self.close_connection = not self.head.keeps_open
        front = FRONTS.get(self.head.path) or EMBEDDINGS.get(self.head.path)
        if front:
            self.told["front"] = front.name
        self._common = {**self.guard.cors_headers(self.head), **front_of(self.head).headers(self.id)}
        self.guard.check(self.head)

    def _fields(self) -> Iterator[bytes]:
        """Yield the lines of the fields in a head, or behind a chunked body.  Raise OblixError, ClientGone."""
        size = 0
        for _ in range(MAX_FIELDS + 1):
            line = self.guest.line(MAX_FIELD_LINE)
            if line == b"\r\n":
                return
            size += len(line)
            if len(line) > MAX_FIELD_LINE or size > MAX_HEAD_BYTES:
                break
            yield line
        raise BadRequest(f"The request has more than {MAX_FIELDS} header fields, or one that is too long.", status=431,
                         code="headers_too_large")

    def body(self) -> bytes:
        """Return the request's body.  Raise OblixError, ClientGone."""
        check_body_kind(self.head)
        size, expected = self.head.body_size, self.head.fields.get("expect", "").lower()
        if expected not in ("", "100-continue"):
            raise BadRequest("The only Expect that is honoured is 100-continue.", status=417, code="expectation_failed")
        if self.admission.full:
            raise too_much("--max-requests")    # before the body is waited for
        self._check_size(size)
        if expected and self.head.version != "HTTP/1.0":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
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
        """Return so many bytes, which are counted as they come.  Raise Busy, ClientGone."""
        body = bytearray()
        while len(body) < size:
            piece = self.guest.some(size - len(body))
            body += piece
            self.admission.take(0, len(piece))
            self._counted += len(piece)
        return bytes(body)

    def _chunked_body(self) -> bytes:
        """Return a body in chunks (RFC 9112, 7.1), which the stdlib leaves to us."""
        body, malformed = bytearray(), BadRequest("The chunked body is malformed.", code="bad_framing")
        while True:
            start = _CHUNK_START.fullmatch(self.guest.line(MAX_CHUNK_LINE))
            if not start:
                raise malformed
            size = int(start[1], 16)
            if not size:
                break
            self._check_size(len(body) + size)
            body += self._exactly(size)
            if self.guest.line(2) != b"\r\n":
                raise malformed
        if not all(map(FIELD_LINE.fullmatch, self._fields())):    # trailers, of which none is of use
            raise malformed
        return bytes(body)

    def json(self, status: int, body: Json, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, dumps(body), {**JSON_HEADERS, **(headers or {})})

    def _refuse(self, error: OblixError) -> None:
        """Answer with an error, or end with it the stream that has begun."""
        self.told["error"], error.request_id = error.code or error.type, self.id
        with contextlib.suppress(ClientGone):    # the log tells of the error
            if "status" in self.told:
                self.close_connection = True    # which breaks off: the framing, too, must not look complete
                self._hold(self._writer.broken(error))
                self._flush()
            else:
                self.json(error.status, front_of(self.head).error(error), error_headers(error))

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a whole reply in one write."""
        length = {} if status == 204 else {"Content-Length": str(len(body))}
        head = self.reply_head(status, {**headers, **length})
        body = b"" if self.head.method == "HEAD" else body
        self.told["bytes_out"], self.guest.since = len(body), time.monotonic()    # make_room knows before the client
        self.write(head + body)

    def reply_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the head of a reply, whose values are made safe for a header line."""
        self.told["status"] = status
        if self._unread or self.admission.stopping:    # unread bytes are not a next request
            self.close_connection = True
        fields = {**headers, **self._common, "x-request-id": self.id, "Server": f"oblix/{__version__}",
                  "Date": http_date(int(time.time())), "Connection": "close" if self.close_connection else "keep-alive"}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        if not is_header_safe("".join(lines)):
            lines = [re.sub("[^ -~]+", " ", line) for line in lines]
        start = f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}"
        return "\r\n".join([start, *lines, "", ""]).encode("ascii")

    def write(self, data: bytes) -> None:
        """Send data.  Raise ClientGone, also where the client takes nothing of it for SEND_S."""
        try:
            send_all(self.guest.connection, data, SEND_S)
        except OSError:
            raise ClientGone from None

    def _tell(self) -> None:
        """Write the one line that the log has of a request, and tell the journal of one to a model."""
        quiet = self.told.get("status") == 200 and self.head.path in QUIET
        level = logging.DEBUG if quiet else logging.INFO
        seconds, tokens = round(time.monotonic() - self.started, 3), self.told.get("tokens", 0)
        facts = {"id": self.id, "method": self.head.method[:20], "path": self.head.path[:64], **self.told,
                 "seconds": seconds}
        if tokens:    # else the upstream has not said
            answering_s = max(seconds - facts.get("first_token_s", 0.0), 0.001)
            facts["tokens_per_s"] = round(tokens / answering_s, 1)
        if "front" in facts:
            self.gateway.journal.add(facts)
        if log.isEnabledFor(level):
            text = "".join([words % facts[name] for name, words in LOG_WORDS.items() if name in facts])
            log.log(level, printable(text), extra={"facts": facts})

    # The routes.

    def _route(self) -> None:
        """Answer the request.  Raise OblixError, ClientGone."""
        head, path = self.head, self.head.path
        place = next((place for place in ("/models/", "/api/blobs/") if path.startswith(place)), path)
        methods, answer = ROUTES.get(place, ((), None))
        if head.method == "OPTIONS":
            return self.reply(204, b"", {"Allow": ", ".join([*(methods or ("GET", "HEAD", "POST")), "OPTIONS"])})
        if answer is None:
            asked = head.target.partition("?")[0][:100]
            posts = ", ".join(one if one.startswith("/api/") else f"/v1{one}" for one in (*FRONTS, *EMBEDDINGS))
            raise BadRequest(f"There is nothing at {head.method[:20]} {asked}. Oblix serves POST {posts}, GET "
                             "/v1/models and GET /health.", status=404, code="unknown_url")
        if head.method not in methods:
            self._common["Allow"] = ", ".join(methods)    # RFC 9110, 15.5.6
            raise BadRequest(f"{path[:100]} takes {' or '.join(methods)}, not {head.method[:20]}.",
                             status=405, code="method_not_allowed")
        return answer(self)

    def _page(self) -> None:
        self.reply(200, *page())

    def _health(self) -> None:
        health = self.gateway.health()
        shown = ("status", "version") if self.guard.is_public(self.head) else health
        self.json(200 if health["status"] == "healthy" else 503, {name: health[name] for name in shown})

    def _models(self) -> None:
        gateway, wanted = self.gateway, urllib.parse.unquote(self.head.path[len("/models/"):])
        if not wanted:
            return self.json(200, model_list(gateway.models()))
        model = gateway.known(wanted, gateway.snapshot())
        check_fields({"model": wanted}, FIELDS, ())
        self.json(200, model_item(wanted, model))

    def _ollama_model(self) -> None:
        body, gateway = parse_body(self.body()), self.gateway
        name: Any = body.get("model") or body.get("name")
        check_fields({"model": name}, FIELDS, ("model",))
        with contextlib.suppress(BadRequest):
            model = gateway.known(name, gateway.snapshot())
            if model.entry or model.provider != "ollama" or name in gateway.catalogue():
                return self.json(200, ollama_details(name, model))
        raise BadRequest(f"model '{name}' not found", status=404, code="model_not_found")

    def _ollama_only(self) -> None:
        raise BadRequest("Oblix does not manage models: do that at Ollama's own address, "
                         f"{self.gateway.ollama_url}. Oblix finds what it has.", status=403, code="not_here")

    def _chat(self) -> None:
        """Answer a request for a model's words.  Raise OblixError, ClientGone."""
        self._front = front = FRONTS[self.head.path]
        request = self._asked(front)
        self.told["asked"] = request.model
        told = front.at_once(request, int(time.time()))
        if told is not None:
            self._begin(math.inf)
            self.gateway.prepare(request, told["done_reason"] == "unload", self._look)
            return self.json(200, told)
        self._begin(KEEP_ALIVE_S if request.stream else math.inf)
        self._event_headers, self._writer = {"Content-Type": front.events, **EVENT_HEADERS}, front.stream(request)
        served = self.gateway.answer(request, self._look)
        self.told["fallbacks"] = served.fallbacks
        headers = self._served(served.target, served.reason, served.attempts)
        if request.left_out and not request.native_to(served.target.endpoint.provider):
            headers["x-oblix-left-out"] = ", ".join(request.left_out)[:1000]
        if served.whole is not None:
            self._count(served.whole)
            return self.json(200, self._writer.whole(served.whole), headers)
        self.told["first_token_s"] = round(time.monotonic() - self.started, 3)
        self._event_headers.update(headers)
        with contextlib.closing(served.chunks):  # type: ignore[type-var]
            self._stream(served)

    def _asked(self, front: Front) -> ChatRequest:
        """Return the request in the body, for what x-oblix-route names instead of its model.  Raise OblixError."""
        request, route = front.request(parse_body(self.body()), self.head), route_of(self.head)
        return dataclasses.replace(request, model=route) if route else request

    def _count_tokens(self) -> None:
        """Answer how many tokens a prompt has: as Claude counts them if it is named, or by their size."""
        request = self._asked(MESSAGES)
        self.json(200, {"input_tokens": self.gateway.counted(request) or prompt_tokens(request)})

    def _embed(self) -> None:
        """Answer a request for embeddings.  Raise OblixError, ClientGone."""
        api = EMBEDDINGS[self.head.path]
        request, route = api.request(parse_body(self.body())), route_of(self.head)
        self.told["asked"] = request.model
        self._begin(math.inf)
        target, vectors, tokens = self.gateway.embed(request, route, self._look)
        self.told["prompt_tokens"] = tokens
        headers = self._served(target, "the model of embeddings", 1)
        self.json(200, api.answer(target.id, vectors, tokens, time.monotonic() - self.started), headers)

    def _begin(self, keep_alive_s: float) -> None:
        """Count a request for a model's work from now on, and see to its client.  Raise Busy."""
        self.admission.take(1, 0)
        self.guest.busy = True
        self._events, self._keep_alive_s = b"", keep_alive_s
        self._looked = self._sent = time.monotonic()

    def _served(self, target: Target, reason: str, attempts: int) -> dict[str, str]:
        """Note which target has answered, and return the headers that name it."""
        told = {"served": target.id, "side": target.side.value, "reason": reason, "attempts": attempts}
        self.told.update(told)
        return {"x-oblix-model": target.id, **{f"x-oblix-{name}": str(value) for name, value in told.items()
                                               if name != "served"}}

    def _look(self) -> None:
        """See to the client before each wait and at each tick.  Raise ClientGone if it has left, Busy if Oblix ends."""
        self._flush()
        now = time.monotonic()
        if now - self._looked < TICK_S:
            return
        self._looked = now
        if self.admission.ended:
            raise shutting_down()
        if has_left(self.guest.connection):
            raise ClientGone
        if now - self._sent >= self._keep_alive_s:
            self._hold(self._front.keep_alive)    # it commits the status 200, but no answer: another may give it
            self._flush()

    def _stream(self, served: Result) -> None:
        """Pass on the chunks, the first content at once.  Raise UpstreamError where they are cut off."""
        try:
            for number, chunk in enumerate(served.chunks, 1):
                if not isinstance(chunk, Texts) and "usage" in chunk:
                    self._count(chunk)
                self._hold(self._writer.take(chunk))
                if number == served.held:
                    self._flush()
        except Exception as error:
            if isinstance(error, UpstreamError):
                log.warning("%s cut: %s", self.id, error.brief)
            self._flush()    # what was said before may be seen
            raise
        self._hold(self._writer.end())
        self._flush(last=True)

    def _count(self, answer: Json) -> None:
        """Note the tokens that an answer, or a chunk of one, counts."""
        counts = {"tokens": tokens_of(answer), "prompt_tokens": tokens_of(answer, "prompt_tokens")}
        self.told.update({name: count for name, count in counts.items() if count})
        self._front.note_time(answer, self.told.get("first_token_s", 0.0), time.monotonic() - self.started)

    def _hold(self, events: bytes) -> None:
        """Hold events until the next wait: a write takes 20 us, and a read brings several.  Raise ClientGone."""
        self._events += events
        if len(self._events) > PIECE_BYTES:
            self._flush()

    def _flush(self, last: bool = False) -> None:
        """Send what is held in one write, the first with the head, the `last` with the end.  Raise ClientGone."""
        if not self._events and not last:
            return
        events, self._events, self._sent, head = self._events, b"", time.monotonic(), b""
        is_framed = self.head.version != "HTTP/1.0"    # which has no chunked bodies
        if "status" not in self.told:
            self.close_connection |= not is_framed    # nothing else shows the end of the stream
            framing = {"Transfer-Encoding": "chunked"} if is_framed else {}
            head = self.reply_head(200, {**self._event_headers, **framing})
        self.told["bytes_out"] = self.told.get("bytes_out", 0) + len(events)
        if is_framed:
            events = (b"%x\r\n%b\r\n" % (len(events), events) if events else b"") + (b"0\r\n\r\n" if last else b"")
        self.write(head + events)


QUIET = ("/health", "/", "/metrics", "/status")    # asked again and again: a good answer is logged at debug only
REASONS = {int(status): status.phrase for status in http.HTTPStatus}
JSON_HEADERS = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}
METRICS_HEADERS = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_NO_HEAD = Head("-", "-", "HTTP/1.1", {})    # of a request whose own can't be read
_CHUNK_START = re.compile(rb"([0-9a-fA-F]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
# The words for each fact of a request in the log, in the order of the line; a fact that is not known is left out.
LOG_WORDS = {"id": "%s", "method": " %s", "path": " %s", "status": " %s", "asked": " %s", "served": " -> %s",
             "side": " (%s)", "first_token_s": ", first %.2f s", "tokens_per_s": ", %.1f tokens/s",
             "bytes_in": ", in %s B", "bytes_out": ", out %s B", "seconds": ", %.2f s", "error": ": %s",
             "reason": ": %s"}

_READ = ("GET", "HEAD")
# Path without /v1 -> methods, and what answers them; OPTIONS goes everywhere.
ROUTES: dict[str, tuple[tuple[str, ...], Callable[[Handler], None] | None]] = {
    **dict.fromkeys(FRONTS, (("POST",), Handler._chat)), **dict.fromkeys(EMBEDDINGS, (("POST",), Handler._embed)),
    "/": (_READ, Handler._page),
    "/messages/count_tokens": (("POST",), Handler._count_tokens),
    "/health": (_READ, Handler._health), "/models": (_READ, Handler._models), "/models/": (_READ, Handler._models),
    "/metrics": (_READ, lambda handler: handler.reply(200, handler.gateway.metrics(), METRICS_HEADERS)),
    "/status": (_READ, lambda handler: handler.json(200, handler.gateway.status())),
    "/api/version": (_READ, lambda handler: handler.json(200, {"version": OLLAMA_VERSION})),
    "/api/tags": (_READ, lambda handler: handler.json(200, {
        "models": [*itertools.starmap(ollama_entry, handler.gateway.catalogue().items())]})),
    "/api/ps": (_READ, lambda handler: handler.json(200, ollama_loaded(handler.gateway.catalogue().values()))),
    "/api/show": (("POST",), Handler._ollama_model),
    **{f"/api/{name}": ((*_READ, "POST", "DELETE"), Handler._ollama_only)
       for name in ("pull", "push", "create", "copy", "delete", "blobs/")}}


@functools.lru_cache(1)
def http_date(second: int) -> str:
    """Return a unix time as HTTP has it (RFC 9110, 5.6.7)."""
    return email.utils.formatdate(second, usegmt=True)


def printable(text: str) -> str:
    """Return a text for the log, without the control characters by which what it quotes could forge a line."""
    return text if is_header_safe(text) else re.sub("[^ -~]", "?", text)


# --- 12. Listening, and the end ---------------------------------------------------------------------------------------

class Listener(http.server.ThreadingHTTPServer):
    """One listening socket."""
    request_queue_size = 1024                   # the default of 5 drops bursts: clients then wait 1, 3, 7 s for TCP
    allow_reuse_address = os.name == "posix"    # on Windows it would let two programs share the port
    timeout = 5.0                               # until `handle_request` returns by itself

    def __init__(self, address: tuple[str, int], admission: Admission, guard: Guard, handler: type[Handler] = Handler,
                 gateway: Gateway = None) -> None:  # type: ignore[assignment]  # the demo's handler needs none
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.gateway, self.admission, self.guard, self._is_done = gateway, admission, guard, False
        super().__init__(address, handler)
        self.host, self.port = str(self.server_address[0]), int(self.server_address[1])
        self.thread = threading.Thread(target=self._run, name="listen", daemon=True)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)    # HTTPServer's asks DNS for a name, which takes seconds offline

    def stop(self) -> None:
        """Wait until the clients that the kernel has taken so far are in and the socket is closed; see `_run`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        with contextlib.suppress(OSError):    # a client wakes its thread
            socket.create_connection((host, self.port), 0.2).close()
        self.thread.join()

    def _run(self) -> None:
        hold_on_one_core(self.port)
        while not self._is_done:
            if self.admission.stopping:
                self.timeout = 0.0
            self.handle_request()
        self.server_close()

    def handle_timeout(self) -> None:
        """Note that no client is left in the kernel's queue."""
        self._is_done = not self.timeout

    def get_request(self) -> Any:
        try:
            connection, address = super().get_request()
        except OSError:    # no descriptor is free; the client stays in the queue, which would be looked at without end
            self.admission.make_room()
            time.sleep(TICK_S)
            raise
        return self.admission.enter(connection), address

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request.connection)
        self.admission.guests.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, RuntimeError):
            log.warning("a client was sent away: %s", error)    # no thread is left
        elif not isinstance(error, OSError):    # a client that left while its connection was set up
            log.exception("a connection failed")


def hold_on_one_core(port: int, cpufreq: str = "/sys/devices/system/cpu/cpu%d/cpufreq/cpuinfo_max_freq") -> None:
    """Hold this thread, and those that it starts, on the fastest core it may use.

    The interpreter runs one thread at a time, and two cores hand it to and fro: a bare relay answers 8,400 requests a
    second on two cores, and 19,600 held on one.  Monitors and commands start from other threads and stay free.  Of
    equally fast cores the port decides, so that two Oblixes on a device can have one each.
    """
    with contextlib.suppress(AttributeError, OSError):    # only Linux has affinities, and a sandbox may forbid them
        speeds = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0)
        for core in speeds:
            with contextlib.suppress(OSError, ValueError), open(cpufreq % core, encoding="ascii") as told:
                speeds[core] = int(told.read())
        fastest = [core for core in speeds if speeds[core] == max(speeds.values())]
        os.sched_setaffinity(0, {fastest[port % len(fastest)]})


def guard_of(settings: Settings) -> Guard:
    """Return the access control of the settings.  Raise UsageError if it would let in the network without a word."""
    host = settings.host.strip("[]").lower()
    if settings.api_key and settings.no_auth:
        raise UsageError("--no-auth and --api-key exclude each other")
    if not (settings.api_key or settings.no_auth or is_loopback(host)):
        raise UsageError(f"--host {host} lets others use this device's models and keys: set OBLIX_API_KEY to a key "
                         "that they must send, or say --no-auth")
    own = socket.gethostname().lower()
    names = [host, own, f"{own}.local", *map(str.lower, settings.allow_host)]
    return Guard(settings.api_key, frozenset(filter(None, names)), frozenset(map(str.lower, settings.allow_origin)))


def listen(settings: Settings, gateway: Gateway) -> list[Listener]:
    """Return listening sockets: one, or for localhost one for each of its two addresses.  Raise UsageError."""
    host, port, listeners = settings.host.strip("[]"), settings.port, list[Listener]()
    admission, guard = Admission(settings.max_requests, settings.max_body_mib << 20), guard_of(settings)
    for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
        try:
            listeners.append(Listener((address, port), admission, guard, gateway=gateway))
            port = listeners[0].port
        except (OSError, OverflowError, UnicodeError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            if listeners:
                if not taken:    # no IPv6 here
                    break
                listeners[0].server_close()
                if not settings.port:
                    return listen(settings, gateway)    # another free port
            # Without ::1, clients that try it first for `localhost` would send their prompts to the program there.
            raise UsageError(f"port {port} of {address} is in use, perhaps by another Oblix: choose one with --port"
                             if taken else f"can't listen on {address} port {port}: {error}") from error
    return listeners


def with_keys_from_files(settings: Settings) -> Settings:
    """Return the settings with the keys that files hold.  Raise UsageError."""
    for name in ("api_key", "cloud_api_key"):
        path, flag = getattr(settings, f"{name}_file"), f"--{name.replace('_', '-')}-file"
        if not path:
            continue
        if getattr(settings, name):
            raise UsageError(f"{flag} and the key itself are both set: choose one")
        try:
            with open(os.path.expanduser(path), "rb") as file:
                data = file.read(64 << 10)
            text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")    # PowerShell's
        except (OSError, ValueError) as error:
            raise UsageError(f"{flag}: {path} can't be read: "
                             f"{getattr(error, 'strerror', None) or 'it is not plain text'}") from error
        key = key_in(text, f"{flag}: {path}")
        if not key:
            raise UsageError(f"{flag}: {path} holds no key")
        settings = dataclasses.replace(settings, **{name: key, f"{name}_file": ""})  # type: ignore[arg-type]
    return settings


class Server:
    """A running gateway with its listeners."""

    def __init__(self, settings: Settings) -> None:
        self.gateway = Gateway(settings)
        self.listeners = listen(settings, self.gateway)
        first = self.listeners[0]
        self.admission, self.port = first.admission, first.port
        self.url = f"http://{f'[{first.host}]' if ':' in first.host else first.host}:{self.port}"

    def _stop(self) -> None:
        """Let no new client in, and close connections behind their answers: those that ask nothing after GRACE_S."""
        self.admission.stopping, self.admission.idle_until = True, time.monotonic() + GRACE_S
        for listener in self.listeners:
            listener.stop()

    def drain(self, limit_s: float, pause: Callable[[], int]) -> int:
        """Let requests end within the limit, and end the rest in-band.  Return at once what `pause` returns but 0."""
        self._stop()
        for seconds in (limit_s, GRACE_S):
            deadline = time.monotonic() + seconds
            while self.admission.guests and time.monotonic() < deadline:
                hurried = pause()
                if hurried:
                    return hurried
            self.admission.ended, self.admission.idle_until = True, 0.0
        return 0

    def close(self) -> None:
        """End at once."""
        self._stop()
        for guest in tuple(self.admission.guests):
            guest.hang_up()
        self.gateway.close()


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Server]:
    """Serve until the block ends.  Raise UsageError."""
    server = Server(with_keys_from_files(settings))
    server.gateway.watch.start()
    for listener in server.listeners:
        listener.thread.start()
    try:
        yield server
    finally:
        server.close()


# === 13. Page =========================================================================================================
# uses: nothing; pure
# What does a browser show at the address?  What /status tells, again and again, and a box to try a prompt.

PAGE_POLICY = ("default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; connect-src 'self'; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'")


@functools.lru_cache(1)
def page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers, whose policy lets in its own script and style, by their hashes, and no other."""
    import hashlib  # loads libcrypto, as hmac does: only where somebody looks
    parts = [PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode() for tag in ("script", "style")]
    hashes = [f"sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}" for part in parts]
    return PAGE.encode(), {"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff",
                           "Referrer-Policy": "no-referrer", "Content-Security-Policy": PAGE_POLICY.format(*hashes)}


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Oblix</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'><path d=
'M4 0a4 4 0 000 8z' fill='teal'/><path d='M4 0a4 4 0 010 8z' fill='slateblue'/></svg>">
<style>
:root { color-scheme: light dark; --bg: #f4f5f7; --card: #fff; --ink: #1b2028; --dim: #59626f; --line: #dde1e7;
  --track: #e3e7ec; --local: #08776e; --cloud: #5b4bd1; --ok: #2a7d46; --warn: #9a5b00; --bad: #c0283a }
@media (prefers-color-scheme: dark) { :root { --bg: #101317; --card: #181c22; --ink: #e3e7ed; --dim: #98a2af;
  --line: #2a3039; --track: #2b323c; --local: #40c4b5; --cloud: #a99eff; --ok: #5fc583; --warn: #e5a443;
  --bad: #ff7d86 } } * { box-sizing: border-box } [hidden], .locked > :not(#key) { display: none !important }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums } h1 { font-size: 1.15rem; margin: 0 }
h2 { font-size: .95rem; margin: 0 0 .6rem } header, main { max-width: 84rem; margin: auto; padding: .8rem }
header, main, #sides, .row { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: baseline }
small, .dim { color: var(--dim); font-size: .86rem; font-weight: 400 } .all { min-width: 9rem }
main { gap: .8rem; align-items: stretch } .row { justify-content: space-between; gap: 0 .7rem }
.card { flex: 1 1 21rem; min-width: 0; max-width: 100%; padding: .8rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px } .wide { flex-basis: 100% } i { font-style: normal }
#now { border-left: 5px solid var(--bad) } #now.by-local { border-color: var(--local) }
#now.by-cloud { border-color: var(--cloud) } header { padding-bottom: 0 }
.gone > :not(#key) { opacity: .55; filter: grayscale(1) } #plan { font-size: 1.3rem; line-height: 1.35 }
#plan small { display: block } #sides, #who, #answer { margin-top: .5rem } code { font: .95em ui-monospace, monospace }
.local b { color: var(--local) } .cloud b { color: var(--cloud) } .ok i { color: var(--ok) }
.warn, .warn i { color: var(--warn) } .bad, .bad i { color: var(--bad) } .track { fill: var(--track) }
svg { display: block; width: 100%; overflow: visible } line, path { vector-effect: non-scaling-stroke; fill: none }
path { stroke: var(--cloud); stroke-width: 1.7 } .ok .fill { fill: var(--ok) } .warn .fill { fill: var(--warn) }
.bad .fill, rect.none { fill: var(--bad) } rect.local { fill: var(--local) } rect.cloud { fill: var(--cloud) }
.tick { stroke: var(--ink); stroke-width: 1.5 } .limit { stroke: var(--warn); stroke-dasharray: 2 4 }
.meter, #lanes { display: grid; grid-template-columns: 7rem 1fr 5rem; gap: .7rem; align-items: center }
.meter { margin-bottom: .4rem } .meter > :last-child { text-align: right } .link + .link { margin-top: .8rem }
#lanes { grid-template-columns: auto 1fr; gap: 0 .8rem } #lanes div { line-height: 22px }
table { border-collapse: collapse; width: 100% } .scroll { max-height: 26rem; overflow: auto } .top { min-width: 5rem }
th { text-align: left; color: var(--dim); font-weight: 400; position: sticky; top: 0; background: var(--card) }
td, th { padding: .25rem .8rem .25rem 0; vertical-align: top } td { border-top: 1px solid var(--line) }
.num, .time { white-space: nowrap } .num { text-align: right } #model { flex: 1; min-width: 0; width: 6rem }
input, select, textarea, button { font: inherit; color: inherit; background: var(--bg); border: 1px solid var(--dim);
  border-radius: 6px; padding: .3rem .7rem; max-width: 100% } .main { background: var(--ink); color: var(--card) }
textarea { width: 100%; display: block; margin: .2rem 0 .5rem; resize: vertical } :disabled { opacity: .5 }
p { margin: 0 } :focus-visible { outline: 3px solid var(--cloud); outline-offset: 2px }
#answer { white-space: pre-wrap }
@media (max-width: 700px) { thead { position: absolute; clip-path: inset(50%) } #plan { font-size: 1.1rem }
  tr { display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: .4rem 0; border-top: 1px solid var(--line) }
  td { border: 0; padding: 0 } .all { flex: 1 0 100% } .top { order: -1; min-width: 0 } td:empty { display: none }
  td[data-is]::before { content: attr(data-is) " "; color: var(--dim) } }
</style>
<header><h1>Oblix <small id="version"></small></h1><p id="live" role="status">connecting …</p>
<p class="dim">API at <code id="base"></code>, model <code>auto</code></p></header>
<noscript>This page needs JavaScript. GET /status has the same facts.</noscript>
<main id="main">
<form id="key" class="card wide" hidden><label>This Oblix wants its key: <input id="secret" type="password" required
autocomplete="current-password"></label> <button class="main">Show</button>
<span id="wrong" class="bad" role="alert"></span></form>
<section id="now" class="card wide" aria-label="Now"><p id="plan" aria-live="polite">…</p>
<div id="sides"></div></section>
<section class="card"><h2>Device</h2><div id="device"></div></section>
<section class="card"><h2>Network</h2><div id="network"></div></section>
<section class="card"><h2>Try a prompt</h2>
<form id="try"><label for="prompt" class="dim">Prompt</label>
<textarea id="prompt" rows="3" required>Say hello in one sentence.</textarea>
<div class="row"><select id="model" aria-label="Model"></select><button id="send" class="main">Send</button>
<button id="stop" type="button" disabled>Stop</button></div></form>
<p id="who" role="status"></p><div id="answer" role="log" aria-label="Answer"></div></section>
<section class="card wide"><h2>Who answered</h2><div id="lanes"></div></section>
<section class="card wide"><h2>Targets</h2><table><thead><tr><th>Target<th>State<th class="num">First token
<th class="num">Tokens/s<th class="num">In flight<th class="num">Rests<tbody id="targets"></table></section>
<section class="card wide"><h2>Last requests</h2><div class="scroll" tabindex="0" role="region" aria-label="Requests">
<table><thead><tr><th>Time<th>Asked<th>Served by<th>Why<th class="num">First token<th class="num">Tokens/s<th>Status
<tbody id="requests"></table></div></section></main>
<script>
"use strict";
const EVERY_MS = 2000, SIDES = ["local", "cloud"], MARKS = {ok: "●", warn: "▲", bad: "✕", "": "○"};
const LEVELS = {available: "ok", optimal: "ok", constrained: "warn", degraded: "warn", critical: "bad",
  disconnected: "bad"};
const METERS = [["cpu_percent", "CPU", "%"], ["memory_percent", "Memory", "%"], ["load_per_core", "Load per core", ""],
  ["gpu_percent", "GPU", "%"], ["gpu_memory_percent", "GPU memory", "%"], ["battery_percent", "Battery", "%"],
  ["temperature_c", "Temperature", " °C"]];
const $ = id => document.getElementById(id), drawn = {};
let key = sessionStorage.getItem("oblix-key") ?? "", seen = "", timer, asking;

// What the server says goes into the page by el alone, which takes it as text: clients choose names.
function el(name, attributes, ...children) {
  const svg = ["svg", "rect", "line", "path", "title"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children.flat(2).map(child => child ?? ""));
  return node;
}
// Only what has changed is made anew, so that a selection stays, and nothing is read out twice.
function put(id, make, ...values) {
  const text = JSON.stringify(values);
  if (drawn[id] !== text) $(id).replaceChildren(...[make(...values)].flat());
  drawn[id] = text;
}
const css = level => LEVELS[level] ?? "";
const mark = (style, text) => el("span", {class: style}, el("i", {}, MARKS[style]), " " + text);
const state = (level, word) => mark(css(level), word ?? level);
const small = (...texts) => el("small", {class: "row"}, texts.map(text => el("span", {}, text)));
const fixed = (value, digits, unit = "") => value ? value.toFixed(digits) + unit : "";
const clock = time => new Date(time * 1000).toLocaleTimeString([], {hourCycle: "h23"});
const minutes = seconds => seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;

function sentence({order: [first, ...others], reason}, side, why) {
  const auto = el("b", {}, "auto"), then = others.length ? `If that fails: ${others.join(", then ")}.` : "";
  if (why || !first) return [auto, ` reaches nobody now: ${reason}.`, el("small", {}, why?.join("; "))];
  return [auto, " would ask ", el("span", {class: side}, el("b", {}, first)), ` (${side}) now: ${reason}.`,
    el("small", {}, then)];
}
function sides(reports, configured) {
  return reports.map(([level, reason], at) => el("span", {class: SIDES[at]}, el("b", {}, SIDES[at]), " ",
    configured.includes(SIDES[at]) ? state(level) : state("", "none"), " ", el("small", {}, reason)));
}
function meter([fact, label, unit], value, {constrained, critical}, spared) {
  const low = fact === "battery_percent", past = limit => !spared && (low ? value <= limit : value >= limit);
  const level = css(past(critical) ? "critical" : past(constrained) ? "constrained" : "available"), text = value + unit;
  const most = unit === "%" ? 100 : 1.25 * critical, x = number => Math.min(100 * number / most, 100);
  const told = `${text}; limits ${constrained} and ${critical}${spared ? ", which do not count now" : ""}`;
  return el("div", {class: "meter " + level, role: "meter", "aria-label": label, "aria-valuenow": Math.min(value, most),
    "aria-valuemin": 0, "aria-valuemax": most, "aria-valuetext": told, title: told}, el("span", {}, label),
    el("svg", {viewBox: "0 0 100 10", height: 10, preserveAspectRatio: "none"},
      el("rect", {class: "track", width: 100, height: 10}), el("rect", {class: "fill", width: x(value), height: 10}),
      [constrained, critical].map(x).map(at => el("line", {class: "tick", x1: at, x2: at, y1: -2, y2: 12}))),
    el("span", {}, level === "ok" ? "" : MARKS[level] + " ", text, low && spared ? " ⚡" : ""));
}
function device(facts, limits) {
  const known = METERS.filter(([fact]) => fact in limits && fact in facts);
  const missing = METERS.filter(one => !known.includes(one)).map(([, label]) => label);
  const spared = {battery_percent: facts.battery_plugged !== false, load_per_core: facts.cpu_percent < 50};
  return [...known.map(one => meter(one, facts[one[0]], limits[one[0]], spared[one[0]])), small(known[0] ?
    missing[0] && `Not seen here: ${missing.join(", ")}.` : "Not watched: no local model runs on it.")];
}
function curve(points, limit) {
  const begun = points[0][0], span = points.at(-1)[0] - begun || 1, x = time => 300 * (time - begun) / span;
  const most = 1.05 * Math.max(limit, ...points.map(([, ms]) => ms)), y = ms => 40 - 40 * ms / most;
  const line = points.map(([time, ms], at) => ms == null ? "" :    // h.1 shows a point alone, too
    `${points[at - 1]?.[1] == null ? "M" : "L"}${x(time).toFixed(1)} ${y(ms).toFixed(1)}h.1`).join("");
  return el("svg", {viewBox: "0 0 300 40", height: 40, preserveAspectRatio: "none", "aria-hidden": true},
    el("line", {class: "limit", x2: 300, y1: y(limit), y2: y(limit)}), el("path", {d: line}),
    points.filter(([, ms]) => ms == null).map(([time]) =>
      el("rect", {class: "none", x: x(time) - 1, width: 2, height: 40})));
}
function network(links, {latency_ms: {degraded}}) {
  if (!links[0]) return small("No server is configured.");
  return links.map(({url, side, level, latencies: points, ...one}) => el("div", {class: "link " + side},
    el("div", {class: "row"}, el("b", {}, url.replace(/^https?:\/\//, "")), state(level)),
    side === "cloud" && points[1] ? curve(points, degraded) : "",
    small(one.error ?? (one.latency_ms?.toFixed() ?? "?") + " ms" + (side === "cloud" ? ` of ${degraded}` : ""),
      points[1] ? "last " + minutes(points.at(-1)[0] - points[0][0]) : "", `${one.loss_percent ?? 0}% lost`)));
}
const cell = (style, what, is) => el("td", is ? {class: style, "data-is": is} : {class: style}, what || "");
const times = one => [cell("num", fixed(one.first_token_s, 2, " s"), "first token"),
  cell("num", fixed(one.tokens_per_s, 1), "tokens/s")];
function targets(list) {
  return list.map(one => el("tr", {}, cell("all " + one.side, el("b", {}, one.id)), cell("all",
    [state(one.state === "cold" ? "" : one.level, one.state), " ", el("small", {}, one.reason)]), times(one),
    cell("num", one.in_flight && `${one.in_flight}`, "in flight"), cell("num", fixed(one.rest_s, 0, " s"), "rests")));
}
function requests(list) {
  const why = one => [one.reason, ...(one.fallbacks ?? []).map(of => of.join(": "))].filter(Boolean).join("; after ");
  const end = one => [one.status, ...one.outcome === "ok" ? [] : [one.outcome, one.error]].filter(Boolean).join(" ");
  return list.map(one => el("tr", {}, cell("top time", clock(one.time)), cell("top",
    [one.asked, el("small", {}, one.front === "chat" ? "" : " " + one.front)]),
    cell("all " + one.side, el("b", {}, one.served)), cell("all", el("small", {}, why(one))), times(one),
    cell(one.outcome === "ok" ? "top" : "top bad", end(one))));
}
function lanes(list) {
  const names = [...SIDES, "none"], lane = one => names.indexOf(one.side ?? "none"), old = [...list].reverse();
  const counts = names.map((name, at) => `${name} ${list.filter(one => lane(one) === at).length}`);
  return [el("div", {}, counts.map((text, at) => el("div", {class: names[at]}, el("b", {}, text)))),
    el("svg", {viewBox: "0 0 500 66", height: 66, preserveAspectRatio: "none", role: "img",
      "aria-label": counts.join(", ")}, old.map((one, at) =>
      el("rect", {class: names[lane(one)], x: 501 - 10 * (old.length - at), y: 22 * lane(one) + 4, width: 8,
        height: 14}, el("title", {}, `${clock(one.time)} ${one.asked}: ${one.served ?? one.error}`)))),
    el("span", {}), small("", old[0] ? `${clock(old[0].time)} – ${clock(list[0].time)}` : "No request yet.")];
}
const option = name => el("option", name === ($("model").value || "auto") ? {selected: ""} : {}, name);
function show({version, plan, reasons, thresholds, requests: last, targets: all, network: links, ...of}) {
  const side = !reasons && all.find(target => target.id === plan.order[0])?.side || "nobody";
  put("version", text => text, version);
  put("plan", sentence, plan, side, reasons);
  put("sides", sides, SIDES.map(name => [of[name].level, of[name].reason]), all.map(target => target.side));
  put("device", device, of.local.facts, thresholds);
  put("network", network, links, thresholds);
  put("targets", targets, all);
  put("lanes", lanes, last);
  put("requests", requests, last);
  put("model", names => names.map(option), ["auto", ...SIDES, ...all.map(target => target.id)]);
  $("now").className = "card wide by-" + side;
  $("key").hidden = true;
  live("ok", "live");
  seen = `; below is how it was at ${clock(Date.now() / 1000)}`;
}
function live(style, text) {
  put("live", mark, style, text);
  $("main").className = {bad: "gone", warn: "locked"}[style] ?? "";
}
const headers = () => key ? {Authorization: "Bearer " + key} : {};
async function look() {
  clearTimeout(timer);
  let status;
  try {
    const reply = await fetch("/status", {headers: headers(), cache: "no-store", signal: AbortSignal.timeout(10000)});
    if (reply.status === 401) return wantKey();
    status = await reply.json();
  } catch {
    live("bad", `no answer from the server${seen}; asking again`);
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(look, EVERY_MS);
  if (status) show(status);
}
function wantKey() {
  $("wrong").textContent = key && "That is not its key.";
  $("key").hidden = false;
  live("warn", "waits for the key");
  $("secret").select();
}
function takeKey(event) {
  event.preventDefault();
  key = $("secret").value.replace(/[^!-~]/g, "");
  sessionStorage.setItem("oblix-key", key);
  look();
}
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "";;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("The answer was cut off before its end.");
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events.filter(event => event.startsWith("data: "))) {
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.slice(6));
    }
  }
}
async function ask(model, content, signal) {
  const begun = performance.now(), since = from => (performance.now() - from) / 1000;
  const body = {model, messages: [{role: "user", content}], stream: true, stream_options: {include_usage: true}};
  const reply = await fetch("/v1/chat/completions", {method: "POST", signal, body: JSON.stringify(body),
    headers: {...headers(), "Content-Type": "application/json"}});
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const told = name => reply.headers.get("x-oblix-" + name) ?? "";
  let first = 0, tokens = 0;
  for await (const {error, model, usage, choices} of eventsOf(reply.body)) {
    if (error) throw new Error(error.message);
    const {content: text, reasoning_content: thought} = choices?.[0]?.delta ?? {};
    tokens = usage?.completion_tokens ?? tokens;
    if (!first && (text || thought)) {
      say(told("side"), el("b", {}, told("model") || model), ` answers: ${told("reason")}`);
      $("who").append(` (first token after ${since(begun).toFixed(2)} s).`);
      first = performance.now();
    }
    $("answer").append(thought ? el("span", {class: "dim"}, thought) : "", text ?? "");
  }
  if (tokens) $("who").append(` ${tokens} tokens, ${(tokens / since(first)).toFixed()} a second.`);
}
const say = (style, ...what) => { $("who").className = style; $("who").replaceChildren(...what); };
const busy = is => { $("send").disabled = is; $("stop").disabled = !is; $("answer").setAttribute("aria-busy", is); };
async function send(event) {
  event.preventDefault();
  asking = new AbortController();
  busy(true);
  $("answer").replaceChildren();
  say("dim", `Asking ${$("model").value} …`);
  try {
    await ask($("model").value, $("prompt").value, asking.signal);
  } catch (error) {
    $("who").append(el("span", {class: "bad"}, asking.signal.aborted ? " Stopped." : ` ✕ ${error.message}`));
  }
  busy(false);
  look();
}
$("try").addEventListener("submit", send);
$("key").addEventListener("submit", takeKey);
$("stop").addEventListener("click", () => asking.abort());
document.addEventListener("visibilitychange", () => document.hidden ? clearTimeout(timer) : look());
$("base").textContent = location.origin + "/v1";
look();
</script>
"""


# === 14. Demo =========================================================================================================
# uses: 1 2 3 6 11 12
# What can a newcomer run without Ollama and without a key?  A server on a loopback port that speaks Ollama's and
# OpenAI's formats, and answers from a script.

DEMO_TEXT = "A scripted answer by the demo's {} model, in {}'s wire format, to {} message(s)."
_DEMO_MODEL = {"name": "demo-local:latest", "size": 1, "size_vram": 0, "context_length": 32768,
               "capabilities": ["completion", "tools"]}
_DEMO_FACTS: dict[str, Json] = {    # by path
    "/api/tags": {"models": [_DEMO_MODEL]}, "/api/ps": {"models": [_DEMO_MODEL]}, "/api/show": _DEMO_MODEL,
    "/v1/models": {"object": "list", "data": [{"id": "demo-cloud", "object": "model"}]}}


def _demo_lines(messages: int, by: Sequence[str]) -> Iterator[bytes]:
    """Yield the script as Ollama's lines, slowly, so that a stream looks like one."""
    words = re.findall(r"\S+\s*", DEMO_TEXT.format(*by, messages))
    end = {"done_reason": "stop", "prompt_eval_count": 10 * messages, "eval_count": len(words)}
    for word in [*words, ""]:
        time.sleep(0.02)
        yield dumps({"model": "demo-local", "created_at": "2026-11-01T00:00:00Z", "done": not word,
                     "message": {"role": "assistant", "content": word}, **({} if word else end)}) + b"\n"


class _DemoHandler(Handler):
    """Ollama's and OpenAI's API, as far as Oblix asks for them."""

    def _route(self) -> None:
        path = self.head.target
        if path in _DEMO_FACTS:
            return self.json(200, _DEMO_FACTS[path])
        asked, ours = loads(self.body()), path == "/api/chat"
        lines = _demo_lines(len(asked["messages"]), ("local", "Ollama") if ours else ("cloud", "OpenAI"))
        head = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "created": int(time.time()),
                "model": asked["model"]}
        chunks = ({**head, **{name: chunk[name] for name in chunk.keys() - {"timings"}}}
                  for chunk in PROVIDERS["ollama"].decode(lines, ChatRequest("", {"messages": []})))
        if not (ours or asked.get("stream")):
            return self.json(200, fold(chunks))
        self._event_headers = {"Content-Type": "application/x-ndjson" if ours else CHAT.events}
        for self._events in lines if ours else itertools.chain(map(sse, chunks), [DONE]):
            self._flush()
        self._flush(last=True)

    def _tell(self) -> None:
        """Log nothing: Oblix's own log tells the story."""


@contextlib.contextmanager
def demo(settings: Settings) -> Iterator[Settings]:
    """Yield settings that point to the scripted server alone while the block runs; unchanged ones without --demo."""
    if not settings.demo:
        yield settings
        return
    server = Listener(("127.0.0.1", 0), Admission(1 << 16, MAX_BODIES_BYTES), Guard(), _DemoHandler)
    server.thread.start()
    url = f"http://127.0.0.1:{server.port}"
    try:
        yield dataclasses.replace(settings, ollama_host=url, local_model=(), cloud_api_key="",
                                  cloud_model=(f"openai:demo-cloud@{url}/v1",), openai_api_key="", openai_base_url="",
                                  anthropic_api_key="", anthropic_base_url="")
    finally:
        server.admission.stopping = True
        server.stop()


# === 15. Command line =================================================================================================
# uses: 1 2 4 6 7 9 10 12 14
# What does a person see at the start?  In ten seconds: the address, what was found, what `auto` will do, what to fix.
# And what can a person ask for in a terminal?

LOG_S = 0.1       # in which the lines of the log are collected, to be written together
LOG_END_S = 1.0   # for the last of them, and for what is printed
MAX_LOG_LINES = 10_000
HANG_UP = getattr(signal, "SIGHUP", 0)    # the terminal is gone; Windows does not tell
# After the start it gives back 13 of 32 MiB, after 500 streams 6 of 42; a look takes 0.1 ms.
TIDY_S: float | None = 2.0 if sys.platform == "linux" else None

SYSLOG = {"CRITICAL": 3, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}    # level -> priority (sd-daemon(3))


def address_at(settings: Settings, port: int) -> str:
    """Return the address by which clients reach a server with these settings."""
    host = settings.host.strip("[]")
    host = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def start_texts(settings: Settings, server: Server) -> Iterator[str]:
    """Yield what a start prints: the address at once, and the rest when the monitors could say a first word."""
    base = address_at(settings, server.port) + "/v1"
    yield f"Oblix {__version__} at {base}" + ("  (demo: the answers are scripted)" if settings.demo else "")
    server.gateway.watch.settle(0.5)
    key = "the key of --api-key" if settings.api_key else "placeholder"
    lines = ["", *findings(server.gateway.health())]
    if settings.no_auth:
        lines += ["Everybody who can reach this address may use it, with the keys that it has (--no-auth).", ""]
    lines += ["Use it:", "  from openai import OpenAI", f'  client = OpenAI(base_url="{base}", api_key="{key}")',
              '  print(client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hello"}])'
              ".choices[0].message.content)", ""]
    yield "\n".join(lines)


def findings(health: Json) -> list[str]:
    """Return what was found, what `auto` does now and why, and what to fix."""
    lines = []
    for side in Side:
        report = health[side.value]
        known = {name: value for name, value in report["facts"].items() if name.split("_")[0] not in report["reason"]}
        facts = ", ".join(words.format(known[name]) for name, (words, *_) in LIMITS.items() if name in known)
        level = report["level"] + (f": {report['reason']}" if report["reason"] else "")
        lines += [f"  {side.value:<7} {level}" + (f" ({facts})" if facts else "")]
        lines += [f"          {target['id']} is {target['state']}" for target in health["targets"]
                  if target["side"] == side.value]
    first, *others = (health["status"] == "healthy" and health["plan"]["order"]) or ["nothing"]
    order = f"{first} answers now" + (f", and {' then '.join(others)} if it fails" if others else "")
    fixes = [f"  {advice}" for advice in advices(health)]
    return [*lines, f"  auto    {order}", "", *(["Fix:", *fixes, ""] if fixes else [])]


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


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a command; the server ends the process later: see `run_server`.  Return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")    # a terminal need not know a model's name
    try:
        own, flags = _command_words(command, argv[bool(command):])
        settings = with_keys_from_files(Settings.parse(flags, os.environ if env is None else env))
        is_quiet = command in ("chat", "models", "env") and settings.log_level == "info"
        start_log(dataclasses.replace(settings, log_level="error") if is_quiet else settings)
        for line in odd_keys(settings):
            log.warning(line)
        return COMMANDS[command or "server"](settings, own)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return _status_of(error)


def _command_words(command: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what a command takes for itself, and the flags that are settings.  Raise UsageError."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    if command == "chat":
        parser.add_argument("--model", default="auto")
        parser.add_argument("--show-metrics", action="store_true")
    elif command == "env":
        parser.add_argument("client", nargs="?", default="")
    return parser.parse_known_args(argv)


def _status_of(error: Exception) -> int:
    """Say what ended the program, a mistake in what was set in one line.  Return the exit status."""
    is_told = isinstance(error, (UsageError, OblixError))
    say(f"oblix: {error}" if is_told else traceback.format_exc(), "stderr")
    return 2 if isinstance(error, UsageError) else 1


def say(text: str, stream: str = "stdout") -> None:
    """Print, and do without where that fails or lasts: on a full disk, into a pipe that is closed or not read."""
    said = []

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=getattr(sys, stream), flush=True)
            said.append(text)

    writer = threading.Thread(target=write, name="say", daemon=True)
    try:
        writer.start()
        writer.join(LOG_END_S)
    except RuntimeError:    # no thread is left
        write()
    if not said:    # at its end Python would flush the stream: wait for ever, or fail and exit with a status of its own
        setattr(sys, stream, None)


@dataclasses.dataclass
class _LogFormatter(logging.Formatter):
    """Lines for people, for machines (--log-json), or for journald, which has the time already and wants priorities."""
    as_json: bool
    journal: bool

    def format(self, record: logging.LogRecord) -> str:
        lines = [printable(record.getMessage())]
        if record.exc_info and record.exc_info[0]:    # where it happened, and its kind; its own text may quote a prompt
            lines += "".join(traceback.format_tb(record.exc_info[2])).splitlines() + [record.exc_info[0].__name__]
        if self.as_json:
            at = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
            return dumps({"time": at.isoformat(timespec="milliseconds"), "level": record.levelname,
                          "message": "\n".join(lines), **getattr(record, "facts", {})}).decode()
        lines[0] = f"{record.levelname} {lines[0]}"
        if self.journal:    # each line is an entry of its own there
            return "\n".join(f"<{SYSLOG.get(record.levelname, 7)}>{line}" for line in lines)
        return f"{self.formatTime(record)} " + "\n".join(lines)


class _LogWriter(logging.Handler):
    """Writes lines on a thread of its own, those of LOG_S together: no request waits for the disk or the terminal.

    Where nobody takes the log its oldest lines are dropped: while a buffered stream is full each request would wait.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream, self._come, self._closing = stream, threading.Event(), threading.Event()
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_LOG_LINES)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record) + "\n")
        self._come.set()

    def _run(self) -> None:
        closing = False
        while not closing:
            self._come.wait()
            self._come.clear()
            closing = self._closing.wait(LOG_S)
            with contextlib.suppress(OSError, ValueError):    # nobody reads it, or it is closed
                self.stream.write("".join([self._lines.popleft() for _ in range(len(self._lines))]))
                self.stream.flush()

    def close(self) -> None:
        """Wait until all that has come is written, but no longer than LOG_END_S."""
        self._closing.set()
        self._come.set()
        self._thread.join(LOG_END_S)
        super().close()


def start_log(settings: Settings) -> None:
    """Log to stderr."""
    handler, place = _LogWriter(sys.stderr or open(os.devnull, "w", encoding="ascii")), ""    # None where it is closed
    with contextlib.suppress(OSError, ValueError):    # a stderr that is not a file
        stderr = os.fstat(handler.stream.fileno())    # JOURNAL_STREAM: systemd.exec(5)
        place = f"{stderr.st_dev}:{stderr.st_ino}"
    handler.setFormatter(_LogFormatter(settings.log_json, os.environ.get("JOURNAL_STREAM") == place))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    # What no line shows need not be found out for each (logging's documentation, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def run_server(settings: Settings, _: argparse.Namespace) -> int:
    """Answer requests until a signal comes, then let them end, on a thread that ends the process.  Return 0 at once.

    Python keeps a script's syntax tree for as long as the script runs, and this one's takes 13 of 36 MiB.
    """
    waiting = catch_signals()    # which only the main thread may do; when the script has ended it waits for ours

    def run() -> None:
        try:
            status = _serve(settings, waiting)
        except Exception as error:
            status = _status_of(error)
        logging.shutdown()    # writes the last lines, which os._exit leaves out
        os._exit(status)

    if (3, 12) <= sys.version_info < (3, 12, 3):    # no thread could start after the script's end (cpython#113964)
        run()
    threading.Thread(target=run, name="main").start()
    return 0


def catch_signals() -> socket.socket:
    """Return a socket that from now on gets the number of each signal that asks for the end."""
    # Python itself writes to the other when a signal comes: no handler of ours that another signal could interrupt.
    waiting, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.detach(), warn_on_full_buffer=False)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):    # Windows has the last one in SIGHUP's place
        number = getattr(signal, name, None)
        if number and (number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN):    # as nohup leaves it
            signal.signal(number, lambda *_: None)
    return waiting


def _serve(settings: Settings, waiting: socket.socket) -> int:
    """Serve until `waiting` gets a signal.  Return 0, or 128 more than a second signal that ended what ran."""
    raise_file_limit(4 * settings.max_requests + 256)    # for each two connections of clients, and two upstream
    with demo(settings) as settings, running(settings) as server:
        for text in start_texts(settings, server):
            say(text)
        while not signal_within(waiting, TIDY_S):
            with contextlib.suppress(ImportError, OSError, AttributeError):    # only glibc has it
                import ctypes
                ctypes.CDLL(None).malloc_trim(0)    # gives freed memory back to the system
        log.info("stopping; what runs has %g s (--drain), and a second signal ends it at once", settings.drain)

        def hurried() -> int:
            number = signal_within(waiting, 0.05)
            return number if number != HANG_UP else 0    # a terminal that closes sends two, or systemd one as well

        again = server.drain(settings.drain, hurried)
    return 128 + again if again else 0


def signal_within(waiting: socket.socket, limit_s: float | None) -> int:
    """Return the number of the signal that comes within the limit (None: none), or 0."""
    waiting.settimeout(limit_s)
    try:
        return waiting.recv(1)[0]
    except socket.timeout:
        return 0


def raise_file_limit(wanted: int) -> None:
    """Let the process open so many files, or as many as it may; many systems give 1,024 unless asked for more."""
    # Windows has no such limit, and macOS may allow less than it says.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)    # -1, or a huge number, where there is no limit
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


def run_check(settings: Settings, _: argparse.Namespace) -> int:
    """Print what is found and what `auto` would do.  Return 0 if it would answer, else 1.  Raise UsageError."""
    guard_of(settings)    # a start would refuse mistakes in the access settings, too
    with demo(settings) as settings, contextlib.closing(
            Gateway(dataclasses.replace(settings, warm_up="never"))) as gateway:
        gateway.watch.start()
        gateway.watch.settle(6.0)    # longer than a probe may take
        time.sleep(1.3)              # until the second sample, the first that knows the CPU's use
        health = gateway.health()
    say("\n".join([f"Oblix {__version__} would do this now ({health['plan']['reason']}):", "", *findings(health)]))
    return 0 if health["status"] == "healthy" and health["plan"]["order"] else 1


# --- 15. Commands that ask a server -----------------------------------------------------------------------------------

ANSWER_LIMITS = Limits(connect_s=5.0, first_byte_s=math.inf, stall_s=math.inf)    # a server has limits of its own
DIM, RED = "2", "31"    # colours of a terminal
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")    # by a terminal
# For each client the lines that point it here, after one that says how they are used.
CLIENTS = {
    "claude": '''export ANTHROPIC_BASE_URL=%(url)s ANTHROPIC_AUTH_TOKEN="%(key)s"
export ANTHROPIC_MODEL=auto ANTHROPIC_SMALL_FAST_MODEL=auto ANTHROPIC_DEFAULT_HAIKU_MODEL=auto
unset ANTHROPIC_API_KEY''',
    "codex": '''codex() { command codex -c model=auto -c model_provider=oblix -c model_providers.oblix.name=Oblix \\
  -c model_providers.oblix.base_url=%(url)s/v1 -c model_providers.oblix.wire_api=responses%(flag)s "$@"; }''',
    "aider": 'export OPENAI_API_BASE=%(url)s/v1 OPENAI_API_KEY="%(key)s" AIDER_MODEL=openai/auto',
    "openai": 'export OPENAI_BASE_URL=%(url)s/v1 OPENAI_API_KEY="%(key)s"',
    "ollama": 'export OLLAMA_HOST=%(url)s OLLAMA_API_KEY="%(key)s"'}


class Peer:
    """A running Oblix, asked as a client asks."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._transport = url, Transport()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, path: str, body: Json | None = None) -> Answer:
        """Return the answer to a GET, or to the POST of a body, unread.  Raise UpstreamError."""
        limits, payload = (ANSWER_LIMITS, dumps(body)) if body else (PROBE_LIMITS, None)
        return self._transport.open(self._url + path, self._headers, payload, limits)


@contextlib.contextmanager
def reached(settings: Settings, settle_s: float) -> Iterator[Peer]:
    """Yield the Oblix that runs with these settings, or one that runs while the block does.  Raise UsageError."""
    host, server = settings.host.strip("[]"), ""
    host = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    peer = Peer(address_at(dataclasses.replace(settings, host=host), settings.port), settings.api_key)
    with contextlib.suppress(UpstreamError), contextlib.closing(peer.ask("/health")) as answer:
        server = answer.field("server") or "unknown"
    if server.startswith("oblix/"):
        yield peer
    elif server:
        raise UsageError(f"another program answers at port {settings.port}: name Oblix's with --port")
    else:
        with demo(settings) as own, running(dataclasses.replace(own, host="127.0.0.1", port=0)) as started:
            started.gateway.watch.settle(settle_s)
            yield Peer(started.url, settings.api_key)


def told_by(answer: Answer) -> Json:
    """Return the JSON object of an answer.  Raise OblixError with the message of an error."""
    found = object_in(answer.body()) or {"error": {"message": "the answer is not in Oblix's format"}}
    if "error" in found:
        raise OblixError(f"{found['error']['message']} ({answer.status})")
    return found


def show(text: str, stream: TextIO, colour: str = "") -> None:
    """Print a piece of text at once, on a terminal in colour."""
    plain = not (colour and stream.isatty()) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    text = _OBEYED.sub("", text)
    stream.write(text if plain or not text else f"\x1b[{colour}m{text}\x1b[0m")
    stream.flush()


@dataclasses.dataclass
class Conversation:
    """A conversation through a server: answers go to stdout, and all else to stderr."""
    peer: Peer
    model: str
    shows_metrics: bool
    messages: list[Json] = dataclasses.field(default_factory=list)
    reason: str = ""    # of the last decision

    def turn(self, text: str) -> None:
        """Show the answer to a text as it comes, and its target.  Raise OblixError.

        What has been said stays in the conversation, also of an answer that breaks off.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        asked = {"model": self.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        said, thinks, last, started, first = "", False, Json(), time.monotonic(), 0.0
        try:
            with contextlib.closing(self.peer.ask("/v1/chat/completions", asked)) as answer:
                if answer.status != 200:
                    told_by(answer)
                for last in decoded(answer, PROVIDERS["openai"], ChatRequest("", {"messages": []}, True, True)):
                    thought, piece = ("".join(choice["delta"].get(name) or "" for choice in last["choices"])
                                      for name in ("reasoning_content", "content"))
                    first = first or (time.monotonic() if has_content(last) else 0.0)
                    said += piece
                    if sys.stderr.isatty() and (thought or piece and thinks):
                        show(thought or "\n", sys.stderr, DIM)
                    thinks = bool(thought)
                    show(piece, sys.stdout)
        finally:
            if said:
                self.messages = [*messages, {"role": "assistant", "content": said}]
                show("\n", sys.stdout)
        self._tell(answer.field, last, first - started, time.monotonic() - first)

    def _tell(self, field: Callable[[str], str], last: Chunk, first_s: float, rest_s: float) -> None:
        """Show which target gave an answer, the reason if it has changed, and the speed if that is wanted."""
        side, reason, tokens = field("x-oblix-side"), field("x-oblix-reason"), tokens_of(last)
        told = f"{field('x-oblix-model') or last.get('model')}" + (f" ({side})" if side else "")
        told += f": {reason}" if reason != self.reason else ""
        if self.shows_metrics and first_s > 0:
            told += f"; first {first_s:.2f} s" + (f", {tokens / max(rest_s, 0.001):.1f} tokens/s" if tokens else "")
        self.reason = reason
        show(f"{told}\n", sys.stderr, DIM)

    def answers(self, text: str) -> bool:
        """Take a turn that Ctrl-C interrupts on a terminal.  Return False, and show why, if it fails."""
        try:
            self.turn(text)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            show("(interrupted)\n", sys.stderr, DIM)
        except OblixError as error:
            show(f"error: {error}\n", sys.stderr, RED)
            return False
        return True


def run_chat(settings: Settings, asked: argparse.Namespace) -> int:
    """Talk until the person ends it, or answer what comes through a pipe.  Return the exit status."""
    with reached(settings, 1.0) as peer:
        talk = Conversation(peer, asked.model, asked.show_metrics)
        if not sys.stdin.isatty():
            text = sys.stdin.read().strip()
            return int(bool(text) and not talk.answers(text))
        with contextlib.suppress(ImportError):
            __import__("readline")    # input() then knows the arrows
        show("/model NAME asks for another model, /new begins a new conversation, exit ends.\n", sys.stderr, DIM)
        for text in iter(_line_typed, "exit"):
            model = re.fullmatch(r"/model\s+(\S+)", text)
            if model:
                talk.model = model[1]
            elif text == "/new":
                talk.messages.clear()
            elif text:
                talk.answers(text)
    return 0


def _line_typed() -> str:
    """Return the line that a person types: "exit" also for /exit and Ctrl-D, and "" for Ctrl-C."""
    try:
        text = input("> ").strip()
        return "exit" if text == "/exit" else text
    except (EOFError, KeyboardInterrupt) as error:
        show("\n", sys.stdout)
        return "exit" if isinstance(error, EOFError) else ""


def run_models(settings: Settings, _: argparse.Namespace) -> int:
    """Print what there is on both sides.  Return the exit status."""
    told = []
    with reached(dataclasses.replace(settings, warm_up="never"), 6.0) as peer:
        for path in ("/v1/models", "/health", "/api/tags"):
            with contextlib.closing(peer.ask(path)) as answer:
                told.append(told_by(answer))
    rows = [("MODEL", "SIDE", "STATE", "SIZE", "CONTEXT", "CAN"), *model_rows(*told)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    say("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    return 0


def model_rows(listed: Json, health: Json, tags: Json) -> Iterator[tuple[str, ...]]:
    """Yield a row for each model that can be asked for, from what a server tells of them."""
    targets = {target["id"]: target for target in health["targets"]}
    files = {"ollama:" + file["name"].removesuffix(":latest"): file for file in tags["models"]}
    now = {"auto": ", ".join(health["plan"]["order"][:1]), **{side.value: health[side.value]["level"] for side in Side}}
    for model in listed["data"]:
        id, file = model["id"], files.get(model["id"], {})
        usual = {"side": "", "state": now.get(id, "alias")} if model["owned_by"] == "oblix" else {
            "side": "cloud" if is_remote(id) else "local", "state": "installed"}
        target, size = targets.get(id, usual), file.get("size", 0)
        contexts = dict.fromkeys(filter(None, (target.get("context"), model.get("context_length"))))    # now, at most
        can = {*file.get("capabilities", ()), *model.get("architecture", {}).get("input_modalities", ()),
               *({"tools"} & {*model.get("supported_parameters", ())})} - {"completion", "text", "vision"}
        yield (id, target["side"], target["state"], f"{size / 1e9:.1f} GB" if size > 5e7 else "",
               " of ".join(f"{context:,}" for context in contexts), ", ".join(sorted(can)))


def run_env(settings: Settings, asked: argparse.Namespace) -> int:
    """Print the lines for a shell that point a client here, with the key's variable and not the key."""
    if asked.client not in CLIENTS or not settings.port:
        raise UsageError(f"env needs the name of a client: {', '.join(CLIENTS)}; and with --port 0, the port")
    told = {"url": address_at(settings, settings.port), "key": "oblix", "flag": ""}
    if settings.api_key:
        told.update(key="$OBLIX_API_KEY", flag=" -c model_providers.oblix.env_key=OBLIX_API_KEY")
        say("# OBLIX_API_KEY must hold the key of --api-key.")
    say(f'# eval "$(python oblix.py env {asked.client})" in the shell that starts the client, but not in the one that\n'
        "# starts Oblix, which reads some of these variables as well.\n" + CLIENTS[asked.client] % told)
    return 0


COMMANDS: dict[str, Callable[[Settings, argparse.Namespace], int]] = {
    "server": run_server, "check": run_check, "chat": run_chat, "models": run_models, "env": run_env}


if __name__ == "__main__":
    sys.exit(main())
