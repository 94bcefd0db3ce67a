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
  5. No thread waits for another while it holds the lock.
  6. /health and /v1/models never wait for the network.
  7. Nothing non-finite ever appears in JSON.

Who owns which state
  monitors' readings     each monitor's own thread writes its one attribute; everybody reads it without a lock (4)
  idle connections       deques of the transport, whose append and pop are atomic (7)
  TLS context            made by the first thread that needs it; a second one made at once is just dropped (7)
  ledger                 what is in flight, what each model refused; behind the only lock (8)
  clients' connections   a set of each listener, whose add and discard are atomic (11)
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
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import enum
import errno
import http
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import (
    Any,
    Callable,
    ClassVar,
    NoReturn,
    Optional,
)

__version__ = "0.1.0"

log = logging.getLogger("oblix")


# === 1. Vocabulary ====================================================================================================
# uses: nothing; pure
# Which words does the rest of the file speak?  Values are frozen, closed sets are enums.  Nothing here knows a
# socket, a clock or a provider's dialect.

Json = dict[str, Any]     # a JSON object
Chunk = dict[str, Any]    # an OpenAI chat.completion.chunk, or the part of one that says something


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
    CLIENT = "client"           # the request itself is wrong: no other target would do better

    @property
    def moves_on(self) -> bool:
        """Whether another target may do better."""
        return self is not Fault.CLIENT


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


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that an endpoint says it has."""
    name: str
    created: int = 0        # unix seconds
    chats: bool = True      # False for embedding models
    remote: bool = False    # an Ollama name that is answered by ollama.com


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


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A checked chat request: `body` holds OpenAI fields of the right types, without nulls and no-op defaults."""
    model: str
    body: Json
    stream: bool = False
    include_usage: bool = False

    @property
    def messages(self) -> list[Json]:
        return self.body["messages"]  # type: ignore[no-any-return]

    def parts(self) -> Iterator[tuple[str, Json]]:
        """Every content part with the path that an error should name."""
        for m, message in enumerate(self.messages):
            for p, part in enumerate(parts_of(message)):
                yield f"messages[{m}].content[{p}]", part


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which targets to try in which order, what was left out, and why."""
    order: tuple[Target, ...]
    reason: str
    left_out: tuple[tuple[Target, str], ...] = ()


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
        self.retry_after_s = retry_after_s      # seconds an upstream asked us to wait


class BadRequest(OblixError):
    """The client's own mistake."""
    status, type = 400, "invalid_request_error"


class Unsupported(BadRequest):
    """A request that is right in itself, but that this provider can't honour."""
    code = "unsupported_parameter"


class NoTarget(OblixError):
    """Nothing that may answer can answer."""
    status, code = 503, "no_target_available"


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
    return "\n".join(part[part["type"]] for part in parts_of(message) if part["type"] in ("text", "refusal"))


def finite(text: str) -> float:
    """The finite number in a text.  Raises ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number out of range: {text[:20]}")
    return number


_JSON = json.JSONDecoder(parse_float=finite, parse_constant=finite)


def loads(text: str | bytes) -> Any:
    """Parse JSON as RFC 8259 has it: UTF-8, no NaN or Infinity (json.loads lets both in, and writes them out again).

    Raises ValueError, RecursionError.
    """
    return _JSON.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))


def dumps(value: Any) -> bytes:
    """Compact ASCII JSON on one line; non-ASCII is escaped, so that a lone surrogate can't break the encoding."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def deeper_than(value: Any, limit: int) -> bool:
    """Whether JSON nests more than `limit` levels deep."""
    level = [value]
    for _ in range(limit):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
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
    cloud_api_key: str = setting("", "key for the first --cloud-model (the variable keeps it out of `ps`)", secret=True)
    host: str = setting("localhost", "address to listen on; localhost is 127.0.0.1 and ::1")
    port: int = setting(62549, "port to listen on; 0 picks a free one", high=65535)
    demo: bool = setting(False, "serve two built-in scripted models, one local and one cloud, to try Oblix with "
                                "nothing installed")
    connect_timeout_s: float = setting(5.0, "seconds to reach an upstream: DNS, TCP and TLS together", low=0.1,
                                       high=3600)
    first_byte_timeout_s: float = setting(300.0, "seconds until an answer's first content; Ollama may load a model for "
                                                 "minutes", low=0.1, high=86_400)
    stall_timeout_s: float = setting(60.0, "seconds of silence that end an answer under way; comments don't count",
                                     low=0.1, high=86_400)
    probe_every_s: float = setting(30.0, "seconds between probes of a cloud that is well; sooner after trouble", low=1,
                                   high=86_400)
    cpu_constrained_percent: float = setting(80.0, "CPU use from which local is constrained")
    cpu_critical_percent: float = setting(95.0, "CPU use from which local is critical")
    memory_constrained_percent: float = setting(85.0, "memory use from which local is constrained")
    memory_critical_percent: float = setting(95.0, "memory use from which local is critical")
    load_constrained: float = setting(1.5, "load per core from which local is constrained")
    load_critical: float = setting(3.0, "load per core from which local is critical")
    latency_degraded_ms: float = setting(200.0, "probe latency above which a cloud is degraded")
    loss_degraded_percent: float = setting(10.0, "share of failed probes above which a cloud is degraded")
    log_level: str = setting("info", "what is logged; info is a line per request",
                             choices=("debug", "info", "warning", "error"))
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
        prog="oblix.py", usage="python oblix.py [flags]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="One OpenAI-compatible endpoint that answers from the local model while the device can and from "
                    "the cloud\nwhen it cannot, and says which and why.",
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
            how.update(action="append", metavar="MODEL")
        else:
            number = isinstance(field.default, (int, float))
            how.update(metavar="N" if number else field.name.rsplit("_", 1)[-1].upper(),
                       type=_number_of(field) if number else str, choices=field.metadata["choices"])
        parser.add_argument(flag_of(field), **how)
    return parser


# === 3. Request in ====================================================================================================
# uses: 1; pure
# What does the client want?  OpenAI's types and ranges are checked here and nowhere else: behind `parse_request` every
# known field has them, null means absent, and unknown fields are kept.  What a provider can't take it says itself (6).

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
    for name, check in FIELDS.items():
        _refuse(name, check(body[name]) if body.get(name) is not None else None)
    kept = {name: value for name, value in body.items()
            if value is not None and not (name in NO_OPS and value == NO_OPS[name])}
    kept["messages"] = _messages(body.get("messages"))
    for name, needed in (("tool_choice", "tools"), ("parallel_tool_calls", "tools"), ("function_call", "functions")):
        if needed not in kept:    # OpenAI refuses the one without the other
            kept.pop(name, None)
    stream = kept.get("stream", False)
    options = kept.get("stream_options", {}) if stream else kept.pop("stream_options", {})
    return ChatRequest(model, kept, stream, bool(options.get("include_usage")))


def _refuse(param: str, complaint: str | None) -> None:
    if complaint:
        raise BadRequest(f"{param} {complaint}.", param=param, code="invalid_value")


def _json_object(raw: bytes) -> Json:
    """The body as an object.  Raises BadRequest for whatever else it is."""
    try:
        body = loads(raw)
    except RecursionError:
        raise BadRequest("The body is JSON nested far too deeply.", code="invalid_json") from None
    except ValueError as error:    # not JSON, not UTF-8, a 5,000-digit integer, 1e999
        raise BadRequest(f"The body is not valid JSON: {_without_content(error)}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest('The body must be a JSON object like {"model": "auto", "messages": […]}.', code="invalid_json")
    # The count of opening brackets bounds the depth, and is nearly free; only rich bodies are walked.
    if raw.count(b"{") + raw.count(b"[") > MAX_JSON_DEPTH and deeper_than(body, MAX_JSON_DEPTH):
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


# === 4. Monitors ======================================================================================================
# uses: 1 2
# How are the device and the network?  A monitor samples facts (IO) and judges them (pure); it knows nothing of requests
# or of what its verdict leads to.  Each runs on a thread of its own, so that a probe which hangs delays no other.
# To add one: subclass Monitor, fill sample and judge, and name it in MONITORS; policy folds it in by its side.

Fetch = Callable[[Endpoint], tuple[int, Any]]    # an endpoint -> status and JSON of its probe; raises UpstreamError


class Monitor:
    """One thing that is watched.  `reading` is written by the monitor's own thread only."""
    name: ClassVar[str] = ""

    def __init__(self, side: Side, endpoint: Endpoint | None = None) -> None:
        self.side, self.endpoint = side, endpoint
        self.reading = Reading(side, Level.GOOD, "", {}, endpoint, known=False)

    def sample(self) -> Json:
        """Facts of now.  May block; any exception keeps the last reading."""
        raise NotImplementedError

    def judge(self, facts: Json) -> Reading:
        """The verdict on facts.  Pure."""
        raise NotImplementedError

    def every_s(self) -> float:
        """Seconds until the next sample."""
        raise NotImplementedError

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        """The monitors of this kind that a server with these targets wants."""
        raise NotImplementedError


class ResourceMonitor(Monitor):
    """CPU, memory and load of the device, by psutil; without psutil nothing is known and local counts as available."""
    name = "resources"

    def __init__(self, settings: Settings) -> None:
        super().__init__(Side.LOCAL)
        self._limits = {    # fact: (unit, constrained from, critical from)
            "cpu_percent": ("%", settings.cpu_constrained_percent, settings.cpu_critical_percent),
            "memory_percent": ("%", settings.memory_constrained_percent, settings.memory_critical_percent),
            "load_per_core": ("", settings.load_constrained, settings.load_critical),
        }

    def sample(self) -> Json:
        import psutil  # 31 ms to import: not on the way to the first answer, and the server starts without it
        reads: dict[str, Callable[[], float]] = {
            "cpu_percent": psutil.cpu_percent, "memory_percent": lambda: psutil.virtual_memory().percent,
            "load_per_core": lambda: round(psutil.getloadavg()[0] / (psutil.cpu_count() or 1), 2)}
        facts = {}
        for name, read in reads.items():
            with contextlib.suppress(Exception):  # Android and some containers deny one or the other
                facts[name] = read()
        if not self.reading.known:
            facts.pop("cpu_percent", None)    # it is the use since the last call: the first has nothing to tell
        return facts

    def judge(self, facts: Json) -> Reading:
        level, reasons = Level.GOOD, []
        for name, (unit, constrained, critical) in self._limits.items():
            value = facts.get(name, 0.0)
            found = Level.OUT if value >= critical else Level.STRAINED if value >= constrained else Level.GOOD
            if found:
                reasons.append(f"{name.split('_')[0]} {value:g}{unit}")
            level = max(level, found)
        return Reading(self.side, level, ", ".join(reasons), facts)

    def every_s(self) -> float:
        return 1.0

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        return [cls(settings)]


class ConnectivityMonitor(Monitor):
    """Whether an endpoint answers, how fast and how surely, and which models it says it has."""
    name = "connectivity"
    window = 10    # probes that the share of losses is taken from

    def __init__(self, settings: Settings, side: Side, endpoint: Endpoint, fetch: Fetch) -> None:
        super().__init__(side, endpoint)
        self._settings, self._watched, self._fetch = settings, endpoint, fetch
        self._lost: collections.deque[bool] = collections.deque(maxlen=self.window)

    def sample(self) -> Json:
        facts: Json = {"url": self._watched.base_url}
        started = time.monotonic()
        try:
            facts["status"], facts["models"] = self._fetch(self._watched)
        except UpstreamError as error:
            facts["error"] = error.brief
        facts["latency_ms"] = round((time.monotonic() - started) * 1000, 1)
        self._lost.append("error" in facts)
        facts["loss_percent"] = round(100.0 * sum(self._lost) / len(self._lost), 1)
        return facts

    def judge(self, facts: Json) -> Reading:
        facts = dict(facts)
        models = facts.pop("models", None)
        level, reason = self._verdict(facts)
        return Reading(self.side, level, reason, facts, self.endpoint, models)

    def _verdict(self, facts: Json) -> tuple[Level, str]:
        where = self._watched.base_url.split("//")[1]
        if "error" in facts:
            return Level.OUT, f"{where}: {facts['error']}"
        if facts["status"] == 401:    # 403 may just mean that this key must not list models
            return Level.OUT, f"{where}: its key was refused"
        if self.side is Side.LOCAL:     # on the device neither latency nor loss says anything about the network
            return Level.GOOD, ""
        if facts["latency_ms"] > self._settings.latency_degraded_ms:
            return Level.STRAINED, f"latency {facts['latency_ms']:.0f} ms"
        if facts["loss_percent"] > self._settings.loss_degraded_percent:
            return Level.STRAINED, f"{facts['loss_percent']:.0f}% of probes lost"
        return Level.GOOD, ""

    def every_s(self) -> float:
        # The local server is asked often: it is near, and may be started or get a new model at any moment.
        usual = 5.0 if self.side is Side.LOCAL else self._settings.probe_every_s
        return usual if self.reading.level is Level.GOOD else min(3.0, usual)

    @classmethod
    def needed(cls, settings: Settings, targets: Iterable[Target], fetch: Fetch) -> list[Monitor]:
        sides: dict[Endpoint, Side] = {}    # one that serves both sides is watched as a local one
        for target in targets:
            if not target.endpoint.lacks_key:
                sides.setdefault(target.endpoint, target.side)
        return [cls(settings, side, endpoint, fetch) for endpoint, side in sides.items()]


MONITORS: tuple[type[Monitor], ...] = (ResourceMonitor, ConnectivityMonitor)


class Watch:
    """Runs the monitors, each on its own thread."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self.monitors = tuple(monitors)
        self._stop = threading.Event()
        self._sampled = [threading.Event() for _ in self.monitors]
        self._threads = [threading.Thread(target=self._run, args=pair, name=f"watch-{pair[0].name}", daemon=True)
                         for pair in zip(self.monitors, self._sampled)]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What is known now; never waits."""
        return tuple(monitor.reading for monitor in self.monitors)

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
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(0.2)

    def _run(self, monitor: Monitor, sampled: threading.Event) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                monitor.reading = monitor.judge(monitor.sample())
                failing = False
            except Exception as error:  # whatever psutil or a platform comes up with: the last reading stays
                if not failing:
                    log.warning("monitor %s can't read: %s: %s", monitor.name, type(error).__name__, error)
                failing = True
            sampled.set()
            self._stop.wait(monitor.every_s())


# === 5. Policy ========================================================================================================
# uses: 1; pure
# Which target first?  Decides from readings, targets and refusals alone.  It has no clock and no memory, so a decision
# can be replayed.

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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all readings say of one side together."""
    level: Level
    reason: str
    known: bool

    def describe(self, side: Side) -> str:
        """The level as users know it, with the reason where there is one."""
        return self.word(side) + (f" ({self.reason})" if self.reason else "")

    def word(self, side: Side) -> str:
        """The level as users know it."""
        return WORDS[side][self.level] if self.known else "unknown"


def judge_side(side: Side, readings: Sequence[Reading], targets: Iterable[Target]) -> Verdict:
    """One verdict on a side: that of its worst monitor, where of its targets' endpoints the best one counts."""
    used = {target.endpoint for target in targets if target.side is side}
    mine = [reading for reading in readings if reading.side is side]
    if not used:
        return Verdict(Level.OUT, f"no {side.value} model", all(reading.known for reading in mine if reading.endpoint))
    endpoints = sorted((reading for reading in readings if reading.endpoint in used), key=lambda reading: reading.level)
    decisive = [reading for reading in mine if reading.endpoint is None] + endpoints[:1]
    level = max((reading.level for reading in decisive), default=Level.GOOD)
    reasons = [reading.reason for reading in decisive if reading.level == level and reading.reason]
    return Verdict(level, "; ".join(reasons), all(reading.known for reading in decisive))


def reading_of(target: Target, readings: Iterable[Reading]) -> Reading | None:
    """The reading of the target's endpoint."""
    return next((reading for reading in readings if reading.endpoint == target.endpoint), None)


def obstacle(target: Target, readings: Iterable[Reading]) -> tuple[str, str] | None:
    """Why a target can't answer as (state, advice), or None: what no order of targets can make good."""
    endpoint, reading = target.endpoint, reading_of(target, readings)
    if endpoint.lacks_key:
        return "no key", f"no key: set {endpoint.key_variable}"
    if endpoint.provider != "ollama" or reading is None or reading.models is None:
        return None
    found = [model for model in reading.models if same_model(target.model, model.name)]
    if not found:
        return "not installed", f"not installed: run `ollama pull {target.model}`"
    if found[0].remote and target.side is Side.LOCAL:
        return "remote", "answered by ollama.com, so it is not a local model: name it with --cloud-model"
    return None


def same_model(asked: str, installed: str) -> bool:
    """Whether two Ollama names mean one model: case does not count, and `:latest` is implied."""
    def full(name: str) -> str:
        return name.lower() if ":" in name.rsplit("/", 1)[-1] else name.lower() + ":latest"
    return full(asked) == full(installed)


def rank(readings: Sequence[Reading], targets: Sequence[Target], refusals: Mapping[str, str],
         only: Side | None = None) -> Plan:
    """The order in which to try targets, and why.

    `refusals` maps target ids to what they can't do of this request; `only` keeps to one side, whatever its level.
    """
    verdicts = {side: judge_side(side, readings, targets) for side in Side}
    sides = (only,) if only else TABLE[verdicts[Side.LOCAL].level, verdicts[Side.CLOUD].level]

    def why_not(target: Target) -> str:
        if only and target.side is not only:
            return f"{target.side.value} models were not asked for"
        blocked = obstacle(target, readings)
        if blocked or target.id in refusals:
            return blocked[1] if blocked else refusals[target.id]
        return "" if target.side in sides else verdicts[target.side].describe(target.side)

    def place(target: Target) -> tuple[int, int]:
        reading = reading_of(target, readings)
        return sides.index(target.side), int(reading.level if reading else Level.GOOD)

    order: list[Target] = []
    left_out: list[tuple[Target, str]] = []
    for target in targets:
        why = why_not(target)
        if why:
            left_out.append((target, why))
        else:
            order.append(target)
    order.sort(key=place)
    reason = ", ".join(f"{side.value} {verdicts[side].describe(side)}" for side in Side if only in (None, side))
    return Plan(tuple(order), reason + (f"; kept to {only.value}" if only else ""), tuple(left_out))


# === 6. Providers =====================================================================================================
# uses: 1 2; pure
# How does each vendor say it?  A provider turns a ChatRequest into its own words, its answer's lines into chunks, and
# its errors into a Fault.  It never sees a socket: a list of byte lines is a full fake.
# To add one: subclass Provider, fill what differs, declare its key in Settings, and name it in PROVIDERS; the contract
# tests do the rest.

Lines = Iterable[bytes]

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
    translates: ClassVar[bool] = True       # and is then always asked for a stream
    refuses: ClassVar[dict[str, str]] = {}  # parameter -> why it can't be honoured
    renames: ClassVar[dict[str, str]] = {}  # parameter -> what to call it for a model that refuses it by this name

    def endpoint(self, settings: Settings) -> Endpoint:
        """Where the provider is by default, with the key that belongs there."""
        raise NotImplementedError

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        """Headers that every request to the endpoint carries beside its content type."""
        raise NotImplementedError

    def encode(self, request: ChatRequest, target: Target) -> Json:
        """The body of the upstream request, for a request that `refusal` has nothing against."""
        raise NotImplementedError

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Chunk]:
        """Chunks of the streamed answer to a request.

        Raises UpstreamError for an error among the lines and for an early end, and whatever a line that is not in the
        provider's own format makes Python raise.
        """
        raise NotImplementedError

    def models(self, listing: Json) -> tuple[Model, ...] | None:
        """The models that the probe's answer lists; None where it lists none."""
        return None

    def refuse_part(self, part: Json) -> str | None:
        """Why a content part can't be sent, or None."""
        return None

    def refusal(self, request: ChatRequest) -> Unsupported | None:
        """What of the request this provider can't honour."""
        for param, why in self.refuses.items():
            if param in request.body:
                return Unsupported(f"{self.label} does not support {param}: {why}.", param=param)
        for where, part in request.parts():
            why = self.refuse_part(part) or ""
            if why:
                return Unsupported(f"{self.label} can't take {where}: {why}.", param=where)
        if self.translates and any(tool["type"] != "function" for tool in request.body.get("tools", [])):
            return Unsupported(f"{self.label} supports tools of type function only.", param="tools")
        return None

    def adapt(self, payload: Json, refused: frozenset[str]) -> Json:
        """The payload without what the model is known to refuse."""
        return {name: value for name, value in payload.items() if name not in refused}

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
    """The chunk that ends a stream."""
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


def sse_data(lines: Lines) -> Iterator[str]:
    """The data of each server-sent event; one that the stream's end cuts off is dropped (WHATWG HTML, 9.2.6)."""
    data: list[str] = []
    for number, line in enumerate(lines):
        if not line:
            if data:
                yield "\n".join(data)
            data = []
        elif line.startswith((b"data:", b"\xef\xbb\xbfdata:") if number == 0 else b"data:"):
            text = line.partition(b":")[2].decode("utf-8", "replace")
            data.append(text[1:] if text.startswith(" ") else text)


def event_of(text: str | bytes) -> Json:
    """The JSON object of one event.  Raises UpstreamError for anything else, and for an error inside the answer."""
    try:
        event = loads(text)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise UpstreamError("a piece of the answer is not a JSON object", code="bad_upstream_answer")
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


class OpenAI(Provider):
    """OpenAI's own API, and every server that is compatible with it: nearly nothing to translate."""
    name, label = "openai", "OpenAI"
    key_variable, default_model = "OPENAI_API_KEY", "gpt-6-luna"
    chat_path, probe_path = "/chat/completions", "/models"
    translates = False
    renames = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
    official = "https://api.openai.com/v1"

    def endpoint(self, settings: Settings) -> Endpoint:
        url = (settings.openai_base_url or self.official).rstrip("/")
        extra = (("OpenAI-Organization", settings.openai_org_id), ("OpenAI-Project", settings.openai_project_id))
        return Endpoint(self.name, url, settings.openai_api_key, tuple(pair for pair in extra if pair[1]),
                        self.key_variable if url == self.official else "")

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        return {**({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}), **dict(endpoint.headers)}

    def encode(self, request: ChatRequest, target: Target) -> Json:
        payload = {"model": target.model, **request.body}
        if target.endpoint.base_url == self.official:    # its models all know the new name, and none of Ollama's fields
            payload = self.adapt(payload, frozenset({"max_tokens", "options", "keep_alive", "think"}))
        if "tools" in payload and _NO_TOOLS_WHILE_REASONING.match(target.model):
            payload.setdefault("reasoning_effort", "none")
        return payload

    def adapt(self, payload: Json, refused: frozenset[str]) -> Json:
        kept = super().adapt(payload, refused)
        for old, new in self.renames.items():
            if old in payload and old not in kept and new not in refused:
                kept.setdefault(new, payload[old])
        if "reasoning_effort" in payload.keys() - kept.keys() and "tools" in payload:
            kept["reasoning_effort"] = "none"    # these models take tools only without reasoning, and would reason
        return kept

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Chunk]:
        seen: set[Any] = set()            # what must be said once: roles and tool calls
        finished: dict[int, bool] = {}    # choice -> whether its finish_reason came
        for data in sse_data(lines):
            if data.startswith("[DONE]") and finished:
                return
            chunk = event_of(data)
            chunk["choices"] = choices_of(chunk)
            for choice in chunk["choices"]:
                self._once(choice, seen)
                index = choice.get("index", 0)
                finished[index] = finished.get(index, False) or bool(choice.get("finish_reason"))
            yield chunk
        if list(finished.values()) != [True] * request.body.get("n", 1):    # some servers leave [DONE] out
            raise cut()

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
    chat_path, probe_path = "/api/chat", "/api/tags"
    refuses = _NEITHER_HAS
    official = "https://ollama.com:443"
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

    def encode(self, request: ChatRequest, target: Target) -> Json:
        body = request.body
        payload: Json = {"model": target.model, "messages": self._messages(modernised(request.messages)),
                         "stream": True, "truncate": False}    # without it the oldest messages are forgotten silently
        options = {theirs: body[ours] for ours, theirs in self._options.items() if ours in body}
        if "stop" in options:
            options["stop"] = [stop for stop in as_list(options["stop"]) if stop]
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

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Chunk]:
        yield chunk_of(role="assistant", content="")
        calls = 0
        for event in map(event_of, filter(None, lines)):
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
        found = [Model(str(item["name"]), created_at(item.get("modified_at")), self._chats(item),
                       is_remote(str(item["name"])) or bool(item.get("remote_host")))
                 for item in listing.get("models") or []]
        return tuple(sorted(found, key=lambda model: -model.created))

    @staticmethod
    def _chats(item: Json) -> bool:
        able = item.get("capabilities")
        return "completion" in able if able else "embed" not in item["name"]


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

    def encode(self, request: ChatRequest, target: Target) -> Json:
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

    def decode(self, lines: Lines, request: ChatRequest) -> Iterator[Chunk]:
        chunks = self._chunks(lines)
        by_instruction = request.body.get("response_format", {}).get("type") == "json_object"
        return unfenced(chunks) if by_instruction else chunks

    def _chunks(self, lines: Lines) -> Iterator[Chunk]:
        usage: Json = {}
        stop: Json = {}
        calls, fresh = -1, False    # fresh: a tool call whose arguments have not begun
        block: Json = {}            # the one that is open
        for event in map(event_of, sse_data(lines)):
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
        return tuple(Model(item["id"], created_at(item.get("created_at"))) for item in listing.get("data") or [])


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
# uses: 1
# How do bytes get to an upstream and back?  urllib's opener over connections that stay open between requests.  It knows
# addresses, deadlines and the client's hang-up, and nothing of what the bytes mean.

MAX_LINE_BYTES = 32 << 20     # of an event: as much as a request may have; more is no answer but an attack
MAX_BODY_BYTES = 64 << 20     # of a whole answer
MAX_IDLE = 64                 # connections kept open to one host: as many as Oblix is meant to serve at once
IDLE_S = 55.0                 # below the 60 s after which many load balancers drop an idle connection
PIECE_BYTES = 1 << 16         # sent under one time limit
DRAIN_S = 0.05                # wait for the few bytes behind an end mark, so that the connection can be kept


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long each phase of an exchange may take, in seconds."""
    connect_s: float        # DNS, TCP, TLS and a proxy's tunnel together
    first_byte_s: float     # from the request's last byte to the answer's first content
    stall_s: float          # silence between two events of a stream, or between two bytes of a whole answer


class _Reader(io.RawIOBase):
    """The upstream's bytes as http.client reads them: each wait has a deadline, and ends when the client hangs up."""

    def __init__(self, upstream: socket.socket, client: socket.socket | None, limits: Limits) -> None:
        self._upstream, self._stall_s = upstream, limits.stall_s
        self._client = {client: _READABLE} if client else {}    # the client's socket -> what it is watched for
        self._deadline, self._begun = time.monotonic() + limits.first_byte_s, False

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client.HTTPResponse calls on its socket.  Closing the result leaves the connection open."""
        return io.BufferedReader(self, 1 << 16)

    def readable(self) -> bool:
        return True

    def begin(self) -> None:
        """The first content has come: from now on `progress` counts."""
        self._begun = True
        self.progress()

    def progress(self) -> None:
        """Something came that is more than a sign of life: only silence after it is limited."""
        if self._begun:
            self._deadline = time.monotonic() + self._stall_s

    def drain_within(self, limit_s: float) -> None:
        """Wait no longer than this from now on."""
        self._client, self._deadline = {}, time.monotonic() + limit_s

    def readinto(self, buffer: Any) -> int:
        while True:
            self._wait()
            with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):    # a TLS record that carries no data
                return self._upstream.recv_into(buffer)

    def _wait(self) -> None:
        """Return when the upstream can be read.  Raises UpstreamError at the deadline, ClientGone on a hang-up."""
        if isinstance(self._upstream, ssl.SSLSocket) and self._upstream.pending():
            return    # already decrypted: the socket itself would look silent
        while True:
            left_s = self._deadline - time.monotonic()
            ready = _ready({self._upstream: _READABLE, **self._client}, max(0.0, left_s))
            if self._upstream in ready:
                return
            if ready:
                self._client = _still_there(self._client)
            elif left_s <= 0:
                raise UpstreamError("the answer stalled" if self._begun else "no answer began within the time limit",
                                    status=504, code="upstream_timeout")


# poll, as select fails from descriptor 1,024 on; Windows has only select.  A client that has sent more than its request
# stays readable, so it is watched for its hang-up alone, which Linux tells apart.
_READABLE, _HUNG_UP = getattr(select, "POLLIN", 1), getattr(select, "POLLRDHUP", 0)


def _ready(watched: Mapping[socket.socket, int], timeout_s: float) -> list[socket.socket]:
    """The sockets on which a watched event has happened, within `timeout_s`."""
    if not hasattr(select, "poll"):
        return select.select([one for one, what in watched.items() if what], [], [], timeout_s)[0]
    poller = select.poll()
    for one, what in watched.items():
        poller.register(one, what)
    found = {descriptor for descriptor, _ in poller.poll(math.ceil(timeout_s * 1000))}
    return [one for one in watched if one.fileno() in found]


def _still_there(client: dict[socket.socket, int]) -> dict[socket.socket, int]:
    """The client, who sent more than its request, to be watched for its hang-up only.  Raises ClientGone if it left."""
    for one, what in client.items():
        with contextlib.suppress(OSError):
            if what == _READABLE and one.recv(1, socket.MSG_PEEK):
                return {one: _HUNG_UP}
    raise ClientGone


class _Call(urllib.request.Request):
    """A request with what urllib has no place for."""
    limits: Limits
    client: socket.socket | None


class _PoolingHandler(urllib.request.AbstractHTTPHandler):
    """urllib's handler for http: and https:, with connections that are used again."""

    def __init__(self) -> None:
        super().__init__()
        self._idle: dict[Any, collections.deque[tuple[socket.socket, float]]] = {}
        self._tls: ssl.SSLContext | None = None    # made when first needed: it reads every certificate there is

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> Answer:
        return self._exchange(request, http.client.HTTPConnection, {})

    def https_open(self, request: urllib.request.Request) -> Answer:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._exchange(request, http.client.HTTPSConnection, {"context": self._tls})

    def _exchange(self, request: Any, connection_class: Any, options: Json) -> Answer:
        """Send the request; the answer's head has come when this returns."""
        headers = {**request.headers, **request.unredirected_hdrs}
        tunnel = request._tunnel_host    # where urllib's ProxyHandler leaves an https: target's real host
        secret = {"Proxy-Authorization": headers.pop("Proxy-authorization")} if "Proxy-authorization" in headers else {}
        if not tunnel:
            headers.update(secret)
        head = f"{request.get_method()} {request.selector} HTTP/1.1\r\n" + "".join(
            f"{name.title()}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        raw = head.encode("latin-1") + (request.data or b"")
        place = (request.type, request.host, tunnel)

        def connect() -> socket.socket:
            connection = connection_class(request.host, timeout=request.limits.connect_s, **options)
            if tunnel:
                connection.set_tunnel(tunnel, headers=secret)
            connection.connect()
            return connection.sock  # type: ignore[no-any-return]

        kept = self._acquire(place)
        if kept:
            with contextlib.suppress(ConnectionError, ssl.SSLError):    # it died while idle; try a fresh one
                return self._send(kept, raw, request, place)
        direct = is_near(request.host) and not tunnel
        return self._send(connect() if direct else _within(request.limits.connect_s, connect), raw, request, place)

    def _send(self, upstream: socket.socket, raw: bytes, request: Any, place: Any) -> Answer:
        with contextlib.ExitStack() as failing:
            failing.callback(upstream.close)
            upstream.settimeout(request.limits.stall_s)
            for start in range(0, len(raw), PIECE_BYTES):    # sendall's timeout counts for all of its bytes together
                upstream.sendall(raw[start:start + PIECE_BYTES])
            upstream.settimeout(0)    # from here on _Reader waits
            reader = _Reader(upstream, request.client, request.limits)
            response = http.client.HTTPResponse(reader, method=request.get_method())  # type: ignore[arg-type]
            failing.callback(response.close)
            response.begin()
            while response.status < 200:    # 102, 103: the answer is still to come (http.client skips 100 only)
                response.headers = None  # type: ignore[assignment]  # begin() does nothing while there are headers
                response.begin()
            failing.pop_all()
        return Answer(response, reader, upstream, lambda: self._release(place, upstream))

    def _acquire(self, place: Any) -> socket.socket | None:
        """An idle connection that still looks alive: neither old nor readable (an end, or bytes nobody asked for)."""
        idle = self._idle.get(place)
        while idle:
            try:
                upstream, since = idle.pop()
            except IndexError:    # another thread was quicker
                break
            if time.monotonic() - since < IDLE_S and not _ready({upstream: _READABLE}, 0):
                return upstream
            upstream.close()
        return None

    def _release(self, place: Any, upstream: socket.socket) -> None:
        idle = self._idle.setdefault(place, collections.deque())
        idle.append((upstream, time.monotonic()))
        with contextlib.suppress(IndexError):    # another thread was quicker
            while len(idle) > MAX_IDLE or time.monotonic() - idle[0][1] > IDLE_S:
                idle.popleft()[0].close()

    def close(self) -> None:
        for idle in self._idle.values():
            while idle:
                idle.popleft()[0].close()


def _within(limit_s: float, connect: Callable[[], socket.socket]) -> socket.socket:
    """What `connect` returns or raises.  Raises UpstreamError after `limit_s` seconds.

    A thread is the only bound there is on the resolver, which has no timeout of its own.
    """
    made: concurrent.futures.Future[socket.socket] = concurrent.futures.Future()

    def run() -> None:
        try:
            made.set_result(connect())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=run, name="connect", daemon=True).start()
    try:
        return made.result(limit_s)
    except concurrent.futures.TimeoutError:
        made.add_done_callback(lambda late: None if late.exception() else late.result().close())
        raise UpstreamError("no connection within the time limit", status=504, code="upstream_timeout") from None


class Answer:
    """An upstream's answer: status and headers have come, the body is still to be read.  To be closed."""

    def __init__(self, response: http.client.HTTPResponse, reader: _Reader, upstream: socket.socket,
                 give_back: Callable[[], None]) -> None:
        self._response, self._reader, self._upstream, self._release = response, reader, upstream, give_back
        self.status = response.status
        self.content_type = response.headers.get_content_type()
        self.retry_after_s = _retry_after(response.headers)
        self._ended = self._complete = False

    def begin(self) -> None:
        """The first content has come: the limit is no longer on its coming, but on silence."""
        self._reader.begin()

    def _pieces(self) -> Iterator[bytes]:
        """The body as it comes.  Raises UpstreamError where it breaks off."""
        with _upstream_faults():
            while True:
                piece = self._response.read1(1 << 16)
                if not piece:
                    break
                yield piece
            if self._response.length:    # http.client lets a short body pass
                raise UpstreamError("the connection was closed before the answer was complete", code="upstream_cut")
        self._complete = True

    def body(self, within_first_byte: bool = False) -> bytes:
        """The whole body; all of it `within_first_byte`'s limit if that is set.

        Raises UpstreamError where it breaks off or is too large.
        """
        pieces, size = [], 0
        for piece in self._pieces():
            if not within_first_byte:
                self._reader.begin()
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise UpstreamError(f"the answer is larger than {MAX_BODY_BYTES >> 20} MiB")
        return b"".join(pieces)

    def lines(self) -> Iterator[bytes]:
        """The body's lines without their ends: LF, CRLF or CR, and no other (bytes.splitlines knows just these).

        Comments and empty lines are no progress.  Claude's pings are: it thinks silently, and may do so for long.
        """
        held, size = [], 0    # the pieces of a line whose end has not come
        for piece in self._pieces():
            held.append(piece)
            size += len(piece)
            if size > MAX_LINE_BYTES + len(piece):
                raise UpstreamError(f"a piece of the answer is larger than {MAX_LINE_BYTES >> 20} MiB")
            if b"\n" not in piece and b"\r" not in piece:
                continue
            text = b"".join(held)
            lines = text.splitlines(True)
            # the last line may go on, and so may a CR that an LF could follow
            held = [lines.pop()] if not text.endswith(b"\n") else []
            size = sum(map(len, held))
            if any(line[:1] not in b":\r\n" for line in lines):
                self._reader.progress()
            yield from (line.rstrip(b"\r\n") for line in lines)
        if held:
            yield b"".join(held).rstrip(b"\r")

    def mark_complete(self) -> None:
        """The protocol's end mark has come; only the end of the framing may still be missing."""
        self._ended = True

    def close(self) -> None:
        """Keep the connection if the answer has been read to its end, else break it off, which stops the upstream."""
        if self._ended and not self._complete:
            self._reader.drain_within(DRAIN_S)
            with contextlib.suppress(UpstreamError):
                collections.deque(self._pieces(), 0)
        keep = self._complete and not self._response.will_close
        self._response.close()
        if keep:
            self._release()
        else:
            self._upstream.close()


_FAULTS: tuple[tuple[Any, ...], ...] = (    # the first that fits; socket.timeout is TimeoutError since 3.10
    (socket.timeout, "no connection, or the request was not accepted, within the time limit", 504, "upstream_timeout"),
    (socket.gaierror, "its host name can't be resolved", 503, "upstream_unreachable"),
    (ssl.SSLError, "TLS failed: {}", 502, "upstream_tls"),
    (ConnectionRefusedError, "connection refused", 503, "upstream_unreachable"),
    ((ConnectionError, http.client.IncompleteRead), "the connection broke off", 502, "upstream_cut"),
    (OSError, "unreachable: {}", 503, "upstream_unreachable"),
    ((http.client.HTTPException, ValueError), "it does not answer in HTTP", 502, "bad_upstream_answer"),
)


@contextlib.contextmanager
def _upstream_faults() -> Iterator[None]:
    """Everything that sockets, TLS, DNS and http.client raise becomes an UpstreamError, here and nowhere else."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        for kinds, words, status, code in _FAULTS:
            if isinstance(error, kinds):
                raise UpstreamError(words.format(why), status=status, code=code) from error
        raise


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait by `retry-after-ms` or `retry-after`, a number or an HTTP date (RFC 9110, 10.2.3)."""
    text = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, TypeError):
        if headers.get("retry-after-ms"):
            return max(0.0, finite(headers["retry-after-ms"]) / 1000)
        if re.fullmatch(r"\s*[\d.]+\s*", text):
            return finite(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    return None


def is_near(host: str) -> bool:
    """Whether a host[:port] is the device itself or a private address: nothing has to be looked up."""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_private    # loopback and link-local included
    except ValueError:
        return False


class _Proxies(urllib.request.ProxyHandler):
    """The environment's proxies, but not for hosts on the device or its own network."""

    def proxy_open(self, req: Any, proxy: str, type: str) -> Any:
        name = urllib.parse.urlsplit(f"//{req.host}").hostname or ""
        ours = is_near(req.host) or "." not in name or name.endswith((".local", ".lan", ".internal", ".home.arpa"))
        return None if ours else super().proxy_open(req, proxy, type)


class Transport:
    """Opens exchanges with upstreams.  Proxies are as in the environment, but never for hosts that are near.

    No redirect is followed: there is no handler for it, so that no key can be carried anywhere by one.
    """

    def __init__(self) -> None:
        self._kept, self._opener = _PoolingHandler(), urllib.request.OpenerDirector()
        for handler in (_Proxies(), self._kept, urllib.request.UnknownHandler()):
            self._opener.add_handler(handler)
        self._opener.addheaders = [("User-Agent", f"oblix/{__version__}")]

    def open(self, url: str, headers: Mapping[str, str], payload: Json | None, limits: Limits,
             client: socket.socket | None = None) -> Answer:
        """Send a request (POST with a payload, else GET) and return the answer, whatever its status.

        `client` is watched while waiting.  Raises UpstreamError, and ClientGone when the client hangs up.
        """
        data = dumps(payload) if payload is not None else None
        kind = {"Content-Type": "application/json"} if data is not None else {}
        with _upstream_faults():
            call = _Call(url, data, {**headers, **kind, "Accept": "*/*", "Accept-Encoding": "identity"})
            call.limits, call.client = limits, client
            return self._opener.open(call)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._kept.close()


# === 8. Ledger ========================================================================================================
# uses: 1
# What does the process remember from one request to the next?  The only shared mutable state behind a lock, which is
# held for a few dictionary operations and never while anything slow happens.

MAX_REMEMBERED = 256    # models whose refusals are kept: clients name models, so it must have an end


class Ledger:
    """Requests in flight per target, and the parameters that models have refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight: dict[Target, int] = {}    # guarded by _lock; no zeros
        self._refused: collections.OrderedDict[Target, frozenset[str]] = collections.OrderedDict()    # guarded by _lock

    @contextlib.contextmanager
    def flight(self, target: Target) -> Iterator[None]:
        """Count a request as in flight while the block runs."""
        self._count(target, 1)
        try:
            yield
        finally:
            self._count(target, -1)

    def _count(self, target: Target, step: int) -> None:
        with self._lock:
            self._in_flight[target] = self._in_flight.get(target, 0) + step
            if not self._in_flight[target]:
                del self._in_flight[target]

    def in_flight(self) -> dict[Target, int]:
        """Requests in flight by target."""
        with self._lock:
            return dict(self._in_flight)

    def refused(self, target: Target) -> frozenset[str]:
        """Parameters of the upstream's dialect that this model is known to refuse."""
        with self._lock:
            return self._refused.get(target, frozenset())

    def learn(self, target: Target, param: str) -> None:
        """Remember that this model refuses a parameter."""
        with self._lock:
            self._refused[target] = self._refused.get(target, frozenset()) | {param}
            self._refused.move_to_end(target)
            while len(self._refused) > MAX_REMEMBERED:
                self._refused.popitem(last=False)


# === 9. Gateway =======================================================================================================
# uses: 1 2 4 5 6 7 8 10
# How does one request become one answer?  Composes the sections above: resolve the model, rank the targets, try them
# until one has content, and tell why.  It knows nothing of the client's HTTP but the socket to watch.

PROBE_LIMITS = Limits(connect_s=5.0, first_byte_s=5.0, stall_s=5.0)


def new_id(prefix: str) -> str:
    """A fresh random id."""
    return prefix + secrets.token_hex(12)


@dataclasses.dataclass
class Served:
    """An answer on its way to the client: either `whole`, or `chunks` whose first ones have content."""
    target: Target
    reason: str = ""
    attempts: int = 1
    whole: Json | None = None
    chunks: Iterator[Chunk] = iter(())


class Gateway:
    """One per process.  Its methods may run on any number of threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limits = Limits(settings.connect_timeout_s, settings.first_byte_timeout_s, settings.stall_timeout_s)
        self.ledger, self._transport = Ledger(), Transport()
        self._configured = configured_targets(settings)
        self._default_endpoints = {name: provider.endpoint(settings) for name, provider in PROVIDERS.items()}
        # Ollama is watched in any case: whatever it has installed can be asked for by name
        watched = (Target(self._default_endpoints["ollama"], "", Side.LOCAL), *self._configured)
        self.watch = Watch([monitor for kind in MONITORS for monitor in kind.needed(settings, watched, self._probe)])

    def close(self) -> None:
        self.watch.stop()
        self._transport.close()

    def _probe(self, endpoint: Endpoint) -> tuple[int, Any]:
        """(status, models) of an endpoint.  Raises UpstreamError: a captive portal's page is not a cloud."""
        provider = PROVIDERS[endpoint.provider]
        answer = self._transport.open(endpoint.base_url + provider.probe_path, provider.headers(endpoint), None,
                                      PROBE_LIMITS)
        with contextlib.closing(answer):
            text = answer.body(within_first_byte=True)
        if answer.status in (404, 405):    # a compatible server without a list of models is there all the same
            return answer.status, None
        try:
            listing = loads(text)
        except (RecursionError, ValueError):
            raise UpstreamError(f"what answers there is no {provider.label} (a login page?)") from None
        if answer.status >= 500 or 300 <= answer.status < 400:
            raise classify(answer.status, text.decode("utf-8", "replace"), None, endpoint)
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):    # a list in no shape we know
            return answer.status, provider.models(listing) if answer.status == 200 else None
        return answer.status, None

    def targets(self, readings: Sequence[Reading]) -> tuple[Target, ...]:
        """What `auto` may choose from, local first: what is configured, or else the newest model that Ollama has."""
        if self._settings.local_model:
            return self._configured
        found = [model for model in self._installed(readings)
                 if model.chats and not model.remote and may_be_local(self._default_endpoints["ollama"], model.name)]
        local = [Target(self._default_endpoints["ollama"], _short(model.name), Side.LOCAL) for model in found[:1]]
        return (*local, *self._configured)

    def _installed(self, readings: Iterable[Reading]) -> tuple[Model, ...]:
        """Ollama's models; none while it has not listed them."""
        return next((reading.models for reading in readings
                     if reading.endpoint == self._default_endpoints["ollama"] and reading.models), ())

    def resolve(self, name: str, readings: Sequence[Reading]) -> Target:
        """The one target that a model's name stands for.  Raises BadRequest (404)."""
        provider, model = split_id(name)
        known = self.targets(readings)
        for target in known:
            if (provider in ("", target.endpoint.provider)) and (
                    model == target.model or target.endpoint.provider == "ollama" and same_model(model, target.model)):
                return target
        installed = [found for found in self._installed(readings) if same_model(model, found.name)]
        if not model or not (provider or installed):
            examples = ", ".join(["auto", "local", "cloud", *(target.id for target in known)])
            raise BadRequest(f"There is no model {name!r}. Choose one of {examples}, or any other as provider:name "
                             f"with {', '.join(PROVIDERS)} as the provider; see GET /v1/models.", param="model",
                             status=404, code="model_not_found")
        endpoint = self._default_endpoints[provider or "ollama"]
        local = endpoint.provider == "ollama" and may_be_local(endpoint, model) and not any(
            found.remote for found in installed)
        return Target(endpoint, model, Side.LOCAL if local else Side.CLOUD)

    def plan(self, request: ChatRequest) -> Plan:
        """What to try for a request.  Raises OblixError: an unknown model, no key, nothing that can answer."""
        readings = self.watch.readings
        if request.model not in ("auto", "local", "cloud"):
            target = self.resolve(request.model, readings)
            refused = PROVIDERS[target.endpoint.provider].refusal(request)
            if refused:
                raise refused
            if target.endpoint.lacks_key:
                raise OblixError(f"{target.id} needs a key: set {target.endpoint.key_variable} where Oblix runs.",
                                 status=401, type="authentication_error", code="no_api_key", retry=False)
            return Plan((target,), "the request named the model")
        targets = self.targets(readings)
        refusals = {target.id: refused for target in targets
                    for refused in [PROVIDERS[target.endpoint.provider].refusal(request)] if refused}
        plan = rank(readings, targets, {id: refused.message for id, refused in refusals.items()},
                    None if request.model == "auto" else Side(request.model))
        if not plan.order:
            raise self._nothing_left(plan, refusals, [target for target in targets
                                                      if request.model in ("auto", target.side.value)])
        return plan

    @staticmethod
    def _nothing_left(plan: Plan, refusals: Mapping[str, Unsupported], asked: Sequence[Target]) -> OblixError:
        """The error of a plan without a target: the client's, if it is the request that rules all of them out."""
        text = _listing(f"{target.id}: {reason}" for target, reason in plan.left_out)
        if asked and all(target.id in refusals for target in asked):
            return Unsupported(f"No model can take this request: {text}.", param=refusals[asked[0].id].param)
        return NoTarget(f"No model can answer: {plan.reason}. {text or 'Nothing is configured'}. "
                        "Start Ollama and pull a model, or set OPENAI_API_KEY or ANTHROPIC_API_KEY.", retry=False)

    def answer(self, request: ChatRequest, client: socket.socket | None = None) -> Served:
        """The first answer that a target of the plan gives.  Raises OblixError, ClientGone.

        Before the first content every fault moves on to the next target; what is returned has content, and whatever
        happens later is told in its chunks' UpstreamError.
        """
        plan = self.plan(request)
        failed: list[tuple[Target, UpstreamError]] = []
        for number, target in enumerate(plan.order, 1):
            try:
                served = self._attempt(request, target, client, last=number == len(plan.order))
            except UpstreamError as error:
                log.info("%s failed: %s", target.id, error.brief)
                failed.append((target, error))
                if not error.fault.moves_on:
                    break
            else:
                served.attempts = number
                served.reason = "; ".join([f"{tried.id}: {error.brief}" for tried, error in failed] + [plan.reason])
                return served
        raise _all_failed(plan, failed)

    def _attempt(self, request: ChatRequest, target: Target, client: socket.socket | None, last: bool) -> Served:
        """One try of one target, up to its first content, or to its end where the client wants a whole answer.

        An empty answer is a fault as long as there is another target to ask.
        """
        if request.stream:
            stream = self._stream(request, target, client)
            held = _until_content(stream)
            served = Served(target, chunks=_chained(held, stream))
        elif PROVIDERS[target.endpoint.provider].translates:
            held = list(self._stream(request, target, client))
            served = Served(target, whole=fold(held))
        else:
            held = [self._whole(request, target, client)]
            served = Served(target, whole=held[0])
        if not last and is_empty(held):
            raise UpstreamError("the answer was empty", code="empty_answer")
        return served

    def _stream(self, request: ChatRequest, target: Target,
                client: socket.socket | None) -> Generator[Chunk, None, None]:
        """The chunks of a target's streamed answer, all with one id, time and model."""
        envelope = {"id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": int(time.time())}
        provider, begun = PROVIDERS[target.endpoint.provider], False
        with self._exchanging(request, target, client) as answer:
            if answer.content_type == "application/json" and not provider.translates:
                event_of(answer.body())
                raise UpstreamError("it answered whole where a stream was asked for", code="bad_upstream_answer")
            for chunk in provider.decode(answer.lines(), request):
                if not begun and has_content(chunk):
                    begun = True
                    answer.begin()
                yield {**envelope, **chunk, "model": target.id}
            answer.mark_complete()

    def _whole(self, request: ChatRequest, target: Target, client: socket.socket | None) -> Json:
        """The whole answer of a target that was asked for one."""
        with self._exchanging(request, target, client) as answer:
            whole = event_of(answer.body())
            if not isinstance(choices_of(whole)[0]["message"], dict):
                raise TypeError("message")
        return {**whole, "model": target.id}

    @contextlib.contextmanager
    def _exchanging(self, request: ChatRequest, target: Target, client: socket.socket | None) -> Iterator[Answer]:
        """The upstream's answer, in flight while the block reads it; whatever the block trips over is its fault."""
        with self.ledger.flight(target), contextlib.closing(self._open(request, target, client)) as answer:
            try:
                yield answer
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise UpstreamError("the answer is not in its own format", code="bad_upstream_answer") from error
            except UpstreamError as error:
                error.message = redact(error.message, target.endpoint.key)
                raise

    def _open(self, request: ChatRequest, target: Target, client: socket.socket | None) -> Answer:
        """The upstream's answer of status 2xx.

        Parameters that the model refuses are left out one by one; those that it refuses as such are remembered.
        """
        provider, endpoint = PROVIDERS[target.endpoint.provider], target.endpoint
        encoded = provider.encode(request, target)
        dropped: frozenset[str] = frozenset()
        while True:
            refused = self.ledger.refused(target) | dropped
            payload = provider.adapt(encoded, refused)
            answer = self._transport.open(endpoint.base_url + provider.chat_path, provider.headers(endpoint), payload,
                                          self._limits, client)
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
                self.ledger.learn(target, param)

    def health(self) -> Json:
        """The state of everything, from memory alone."""
        readings, flights = self.watch.readings, self.ledger.in_flight()
        targets = self.targets(readings)
        plan = rank(readings, targets, {})
        states = [(target, *_state(target, readings)) for target in targets]
        reasons = [f"{target.id}: {reason}" for target, state, reason in states] or [_NOTHING]
        able = any(state in ("ready", "unknown") for target, state, _ in states if target in plan.order)
        waiting = any(reading.endpoint and not reading.known for reading in readings)    # no evidence yet
        return {
            "status": "healthy" if able or waiting else "unhealthy", "version": __version__,
            **{side.value: _side_report(side, readings, targets) for side in Side},
            "plan": {"order": [target.id for target in plan.order], "reason": plan.reason},
            "targets": [{"id": target.id, "side": target.side.value, "state": state, "reason": reason or None,
                         "in_flight": flights.get(target, 0)} for target, state, reason in states],
            **({} if able or waiting else {"reasons": reasons}),
        }

    def models(self) -> list[tuple[str, int, str]]:
        """(id, created, owner) of all that can be asked for, from memory alone."""
        readings = self.watch.readings
        found = dict.fromkeys(("auto", "local", "cloud"), (0, "oblix"))
        found.update({target.id: (0, target.endpoint.provider) for target in self.targets(readings)})
        found.update({f"ollama:{_short(model.name)}": (model.created, "ollama")
                      for model in self._installed(readings)})
        return [(id, *rest) for id, rest in found.items()]


_NOTHING = "no model is configured: start Ollama and pull a model, or set OPENAI_API_KEY or ANTHROPIC_API_KEY"


def _short(name: str) -> str:
    return name[:-len(":latest")] if name.endswith(":latest") else name


def _state(target: Target, readings: Sequence[Reading]) -> tuple[str, str]:
    """(state, reason) of a target, in a word and in a line."""
    blocked, reading = obstacle(target, readings), reading_of(target, readings)
    if blocked:
        return blocked
    if reading is None or not reading.known:
        return "unknown", "not probed yet"
    return ("unreachable" if reading.level is Level.OUT else "ready"), reading.reason


def _side_report(side: Side, readings: Sequence[Reading], targets: Sequence[Target]) -> Json:
    verdict, facts = judge_side(side, readings, targets), {}
    for reading in readings:
        if reading.side is side and reading.endpoint is None:
            facts.update(reading.facts)
    endpoints = [reading.facts for reading in readings if reading.side is side and reading.endpoint and reading.facts]
    return {"level": verdict.word(side), "reason": verdict.reason,
            "facts": {**facts, "endpoints": endpoints}}


def _listing(lines: Iterable[str]) -> str:
    return "; ".join(line.rstrip(".") for line in lines)


def _until_content(stream: Iterator[Chunk]) -> list[Chunk]:
    """The chunks up to the first with content: the commit point.  The stream's faults before it come out here."""
    held: list[Chunk] = []
    for chunk in stream:
        held.append(chunk)
        if has_content(chunk):
            break
    return held


def _chained(held: list[Chunk], stream: Generator[Chunk, None, None]) -> Iterator[Chunk]:
    """The held chunks and the rest; whoever closes it closes the upstream."""
    with contextlib.closing(stream):
        yield from held
        yield from stream


def _all_failed(plan: Plan, failed: Sequence[tuple[Target, UpstreamError]]) -> OblixError:
    """The most useful error when no target answered: the only one, or one that lists all of them."""
    last = failed[-1][1]
    if not last.fault.moves_on or (len(failed) == 1 and not plan.left_out):
        if last.fault is Fault.DOWN:    # our own words: say of whom
            last.message = f"{failed[-1][0].id}: {last.message}"
        return last
    attempts = [f"{target.id}: {error.message}" for target, error in failed]
    waits = [error.retry_after_s for _, error in failed if error.retry_after_s is not None]
    text = f"No model could answer ({plan.reason}). " + _listing(
        attempts + [f"{target.id}: {reason}" for target, reason in plan.left_out])
    if all(error.fault is Fault.TOO_LONG for _, error in failed):
        return BadRequest(text, code="context_length_exceeded", param="messages")
    again: Json = {"retry": None if waits else False, "retry_after_s": min(waits, default=None)}
    if last.fault is not Fault.DOWN and {error.status for _, error in failed} == {last.status}:
        return NoTarget(text, status=last.status, type=last.type, **again)
    return NoTarget(text, **again)


# === 10. Response out =================================================================================================
# uses: 1; pure
# What does the client read?  Chunks become server-sent events or one completion, errors become OpenAI's error object.

DONE = b"data: [DONE]\n\n"    # exactly so: some clients reject an extra space


def sse(event: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(event) + b"\n\n"


def for_client(chunk: Chunk, include_usage: bool) -> Chunk | None:
    """The chunk as a client may see it: usage only when asked, as many clients index choices[0] unseen."""
    if include_usage or "usage" not in chunk:
        return chunk
    return {name: value for name, value in chunk.items() if name != "usage"} if choices_of(chunk) else None


def fold(chunks: Iterable[Chunk]) -> Json:
    """One chat.completion out of a translated stream, which has at least one chunk and no choice but 0."""
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
    """The error object that the SDKs read (OpenAI API reference, errors)."""
    return {"error": {"message": error.message or type(error).__name__, "type": error.type, "param": error.param,
                      "code": error.code}}


def error_headers(error: OblixError) -> dict[str, str]:
    """What tells an SDK whether and when to try again."""
    headers = {} if error.retry is None else {"x-should-retry": str(error.retry).lower()}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return headers


def answer_headers(target: Target, reason: str, attempts: int) -> dict[str, str]:
    """Who answered, and why."""
    return {"x-oblix-model": target.id, "x-oblix-side": target.side.value, "x-oblix-reason": reason,
            "x-oblix-attempts": str(attempts)}


def models_body(models: Iterable[tuple[str, int, str]]) -> Json:
    """GET /v1/models."""
    return {"object": "list", "data": [{"id": id, "object": "model", "created": created, "owned_by": owner}
                                       for id, created, owner in models]}


# === 11. Server =======================================================================================================
# uses: 1 2 3 9 10 12
# How do clients reach the gateway?  HTTP on the stdlib's threading server: routes, bodies, one write per event.  It
# knows nothing of targets.

MAX_REQUEST_BYTES = 32 << 20    # about four 6 MB photos as base64; more is a mistake
LINGER_S = 2.0                  # for the rest of a body that is refused
READ_TIMEOUT_S = 75.0           # for a request's bytes and between requests; SDKs drop idle connections after 4-5 s

ROUTES = {"/chat/completions": ("POST",), "/models": ("GET", "HEAD"), "/health": ("GET", "HEAD"),
          "/": ("GET", "HEAD")}    # path without /v1 -> methods; OPTIONS goes everywhere


class _Handler(http.server.BaseHTTPRequestHandler):
    """One client connection, on a thread of its own."""
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"oblix/{__version__}", ""
    disable_nagle_algorithm = True      # else a second small write waits 40 ms for the client's delayed ACK
    timeout = READ_TIMEOUT_S
    server: _Listener

    def handle(self) -> None:
        with contextlib.suppress(OSError):    # the client left: nobody to tell
            super().handle()

    def _serve(self) -> None:
        self._id, self._sent, started = new_id("req_"), False, time.monotonic()
        self._unread = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        try:
            outcome = self._route()
        except ClientGone:
            self.close_connection, outcome = True, "client hung up"
        except OblixError as error:
            outcome = self._refuse(error)
        except OSError:
            raise
        except Exception:  # a bug of ours takes down one request and is told in the log
            log.exception("%s internal error", self._id)
            outcome = "internal error"
            self.close_connection = True
            if not self._sent:
                self._refuse(OblixError(f"Oblix failed internally; its log tells more at {self._id}."))
        log.info("%s %s %s: %s, %.0f ms", self._id, self.command, re.sub("[^!-~]", "?", self._path()[:64]), outcome,
                 1000 * (time.monotonic() - started))
        self._linger()

    do_GET = do_HEAD = do_POST = do_OPTIONS = do_PUT = do_PATCH = do_DELETE = do_TRACE = do_CONNECT = _serve

    def _path(self) -> str:
        """The path without query, /v1 and trailing slash; still percent-encoded."""
        path = re.split("[?#]", self.path, maxsplit=1)[0]
        path = re.sub("^https?://[^/]*", "", path).rstrip("/")
        return re.sub("^/v1(?=/|$)", "", path) or "/"

    def _route(self) -> str:
        """Answer the request; returns what the log line says of it.  Raises OblixError, ClientGone."""
        path = self._path()
        model = urllib.parse.unquote(path[len("/models/"):]) if path.startswith("/models/") else ""
        methods = ROUTES.get("/models" if model else path)
        if self.command == "OPTIONS":
            return self._reply(204, b"", {"Allow": ", ".join([*(methods or ("GET", "HEAD", "POST")), "OPTIONS"])})
        if methods is None:
            raise BadRequest(f"There is nothing at {self.command} {path[:100]}. Oblix serves POST "
                             "/v1/chat/completions, GET /v1/models and GET /health; use the chat completions API.",
                             status=404, code="unknown_url")
        if self.command not in methods:
            raise BadRequest(f"{path[:100]} takes {' or '.join(methods)}, not {self.command[:20]}.",
                             status=405, code="method_not_allowed")
        if path == "/chat/completions":
            return self._chat()
        if path == "/":
            return self._reply(200, PAGE.encode(), {"Content-Type": "text/html; charset=utf-8"})
        if path == "/health":
            health = self.server.gateway.health()
            return self._json(200 if health["status"] == "healthy" else 503, health)
        return self._models(model)

    def _models(self, wanted: str) -> str:
        models = self.server.gateway.models()
        if not wanted:
            return self._json(200, models_body(models))
        found = [model for model in models if model[0] == wanted]
        if not found:
            raise BadRequest(f"There is no model {wanted[:100]!r}; GET /v1/models lists them.", param="model",
                             status=404, code="model_not_found")
        return self._json(200, models_body(found)["data"][0])

    def _chat(self) -> str:
        request = parse_request(self._body())
        served = self.server.gateway.answer(request, self.connection)
        headers = answer_headers(served.target, served.reason, served.attempts)
        if served.whole is not None:
            self._json(200, served.whole, headers)
        else:
            with contextlib.closing(served.chunks):  # type: ignore[type-var]
                self._stream(served.chunks, request.include_usage, headers)
        return f"{request.model} -> {served.target.id} ({served.reason})"

    def _stream(self, chunks: Iterator[Chunk], include_usage: bool, headers: Mapping[str, str]) -> None:
        """Server-sent events, one write each.  A fault ends them with an error event and a closed connection."""
        framed = self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or not framed
        head = self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                                "X-Accel-Buffering": "no", **({"Transfer-Encoding": "chunked"} if framed else {}),
                                **headers})

        def send(event: bytes, end: bytes = b"") -> None:
            nonlocal head
            self._sent = True
            self.wfile.write(head + (b"%x\r\n%s\r\n%s" % (len(event), event, end) if framed else event))
            head = b""

        try:
            for chunk in chunks:
                shown = for_client(chunk, include_usage)
                if shown is not None:
                    send(sse(shown))
        except UpstreamError as error:
            log.warning("%s cut: %s", self._id, error.brief)
            self.close_connection = True    # and no last chunk: the framing, too, must look broken off
            return send(sse(error_body(error)))
        send(DONE, b"0\r\n\r\n")

    def _body(self) -> bytes:
        """The request's body.  Raises OblixError, ClientGone."""
        lengths = self.headers.get_all("Content-Length") or []
        coded = self.headers.get_all("Transfer-Encoding") or []
        if coded and (lengths or [code.strip().lower() for code in coded] != ["chunked"]):
            raise BadRequest("Send either a Content-Length or Transfer-Encoding: chunked.", code="bad_framing")
        if coded:
            body = self._chunked_body()
        elif len(lengths) == 1 and re.fullmatch(r"\d{1,18}", lengths[0].strip(), re.ASCII):
            if int(lengths[0]) > MAX_REQUEST_BYTES:
                raise _too_large()
            body = self.rfile.read(int(lengths[0]))
            if len(body) < int(lengths[0]):
                raise ClientGone
        else:
            raise BadRequest("Send the body's size as one decimal Content-Length.", code="bad_framing")
        self._unread = False
        return body

    def _chunked_body(self) -> bytes:
        """A body in chunks (RFC 9112, 7.1), which the stdlib leaves to us."""
        body = bytearray()
        while True:
            size = self.rfile.readline(1024).split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
                raise BadRequest("The chunked body is malformed.", code="bad_framing")
            if not int(size, 16):
                break
            if len(body) + int(size, 16) > MAX_REQUEST_BYTES:
                raise _too_large()
            body += self.rfile.read(int(size, 16))
            if self.rfile.readline(3) not in (b"\r\n", b"\n"):
                raise BadRequest("The chunked body is malformed.", code="bad_framing")
        for _ in range(100):    # trailers
            if self.rfile.readline(1 << 16) in (b"\r\n", b"\n", b""):
                return bytes(body)
        raise BadRequest("The chunked body has too many trailers.", code="bad_framing")

    def _linger(self) -> None:
        """After a reply to a body that was not read: take the rest, within reason, and close.

        Closed over unread bytes TCP resets the connection, and the client never sees the reply.
        """
        if not self._unread:
            return
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_S)
        deadline = time.monotonic() + LINGER_S
        while time.monotonic() < deadline and self.connection.recv(1 << 16):
            pass

    def _json(self, status: int, body: Json, headers: Mapping[str, str] | None = None) -> str:
        return self._reply(status, dumps(body), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, error: OblixError) -> str:
        """Answer with an error."""
        methods = ROUTES.get(self._path(), ("GET", "HEAD", "POST")) if error.status == 405 else ()
        allow = {"Allow": ", ".join(methods)} if methods else {}
        self._json(error.status, error_body(error), {**error_headers(error), **allow})
        return f"{error.status} {error.code}"

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> str:
        """A whole reply in one write; returns its status."""
        self._sent = True
        length = {} if status == 204 else {"Content-Length": str(len(body))}
        self.wfile.write(self._head(status, {**headers, **length}) + (b"" if self.command == "HEAD" else body))
        return str(status)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head of a reply; values are made safe for a header line."""
        self.close_connection = self.close_connection or self._unread    # the unread bytes are not a next request
        fields = {**headers, "x-request-id": self._id, "Server": self.server_version, "Date": self.date_time_string(),
                  "Connection": "close" if self.close_connection else "keep-alive"}
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase if status in _STATUSES else 'Status'}"]
        lines += [f"{name}: {re.sub('[^ -~]+', ' ', value)}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the stdlib says of requests that it can't read, in OpenAI's shape."""
        self._id, self._unread, self.close_connection = new_id("req_"), True, True
        self.command = self.command or "GET"
        self._refuse(BadRequest(f"{http.HTTPStatus(code).phrase}: {message or 'bad request'}.", code="bad_request",
                                status=405 if code == 501 else code))    # 501: "Unsupported method"
        self._linger()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `_serve` writes the one line of a request."""


_STATUSES = frozenset(http.HTTPStatus)


def _too_large() -> BadRequest:
    return BadRequest(f"The body is larger than {MAX_REQUEST_BYTES >> 20} MiB.", status=413, code="request_too_large")


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
    """One listening socket, with the connections it has accepted."""

    def __init__(self, address: tuple[str, int], gateway: Gateway) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.gateway = gateway
        self._open: set[socket.socket] = set()    # clients' connections; add and discard are atomic
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6 and self.server_address[0] != "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._open.discard(request)

    def run(self) -> None:
        """Serve until `shutdown`, which wakes the loop: it need not wake up by itself while nothing happens."""
        self.serve_forever(poll_interval=5)

    def shutdown(self) -> None:
        stopping = threading.Thread(target=super().shutdown, name="stop", daemon=True)
        stopping.start()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.server_name, self.server_name)
        while stopping.is_alive():
            with contextlib.suppress(OSError):
                socket.create_connection((host, self.server_port), 0.2).close()
            stopping.join(0.02)

    def server_close(self) -> None:
        """Stop listening and end every connection: threads that wait for a next request would wait on."""
        super().server_close()
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):    # a client that left while its connection was set up
            log.exception("a connection failed")


def listen(settings: Settings, gateway: Gateway) -> list[_Listener]:
    """Listening sockets: one, or for localhost one for each of its two addresses.  Raises UsageError."""
    host, port = settings.host.strip("[]"), settings.port
    first = _listener("127.0.0.1" if host == "localhost" else host, port, gateway)
    if host != "localhost":
        return [first]
    try:
        return [first, _Listener(("::1", first.server_port), gateway)]
    except OSError as error:
        if error.errno != errno.EADDRINUSE:    # no IPv6 here
            return [first]
        first.server_close()
        if not port:
            return listen(settings, gateway)    # another free port
        # Clients that try ::1 first for `localhost` would send their prompts to whoever that is.
        raise UsageError(f"port {port} of ::1 is in use by another program: choose one with --port") from error


def _listener(host: str, port: int, gateway: Gateway) -> _Listener:
    try:
        return _Listener((host, port), gateway)
    except (OSError, OverflowError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use, perhaps by another Oblix: choose one with --port") from error
        raise UsageError(f"can't listen on {host} port {port}: {error}") from error


class Server:
    """A running gateway with its listeners."""

    def __init__(self, gateway: Gateway, listeners: Sequence[_Listener]) -> None:
        self.gateway = gateway
        self.port = listeners[0].server_port
        host = listeners[0].server_name
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Server]:
    """A server that answers until the block ends.  Raises UsageError."""
    gateway = Gateway(settings)
    listeners = listen(settings, gateway)
    gateway.watch.start()
    for listener in listeners:
        threading.Thread(target=listener.run, name="listen", daemon=True).start()
    try:
        yield Server(gateway, listeners)
    finally:
        for listener in listeners:
            listener.shutdown()
            listener.server_close()
        gateway.close()


# === 12. Page =========================================================================================================
# uses: nothing; pure
# What does a person see who opens the address in a browser?  /health, in words; the page asks for nothing else.

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
    listing: ClassVar[Json]

    def do_GET(self) -> None:
        self._send("application/json", [dumps(self.listing)])

    def do_POST(self) -> None:
        asked = loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, lines = self.script(asked)
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
    listing = {"models": [{"name": "demo-local:latest", "model": "demo-local:latest", "size": 1,
                           "modified_at": "2026-11-01T00:00:00Z", "digest": "", "details": {},
                           "capabilities": ["completion", "tools"]}]}

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
    listing = {"object": "list", "data": [{"id": "demo-cloud", "object": "model", "created": 0, "owned_by": "demo"}]}

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
# uses: 1 2 11 13
# What does a person see who starts it?  In ten seconds: the address, what was found, what `auto` will do, what to fix.

SETTLE_S = 0.5    # how long the start waits for the monitors' first word; offline they have none to wait for


def start_text(settings: Settings, server: Server) -> str:
    """The lines that a start prints."""
    health = server.gateway.health()
    host = "localhost" if settings.host == "localhost" else server.url.split("//")[1].rsplit(":", 1)[0]
    base = f"http://{host}:{server.port}/v1"
    lines = [f"Oblix {__version__} at {base}" + ("  (demo: the answers are scripted)" if settings.demo else ""), ""]
    for side in Side:
        lines += _side_lines(side, health)
    first, *others = (health["status"] == "healthy" and health["plan"]["order"]) or ["nothing"]
    order = f"{first} answers now" + (f", and {' then '.join(others)} if it fails" if others else "")
    lines += [f"  auto    {order}", ""]
    lines += ["Fix:", *(f"  {advice}" for advice in advices(health)), ""] if advices(health) else []
    lines += ["Use it:", "  from openai import OpenAI", f'  client = OpenAI(base_url="{base}", api_key="placeholder")',
              '  print(client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hello"}])'
              ".choices[0].message.content)", ""]
    return "\n".join(lines)


FACT_WORDS = {"cpu_percent": "CPU {}%", "memory_percent": "memory {}%", "load_per_core": "load {} per core"}


def _side_lines(side: Side, health: Json) -> list[str]:
    report = health[side.value]
    known = {name: value for name, value in report["facts"].items() if name.split("_")[0] not in report["reason"]}
    facts = ", ".join(words.format(known[name]) for name, words in FACT_WORDS.items() if name in known)
    level = report["level"] + (f": {report['reason']}" if report["reason"] else "")
    lines = [f"  {side.value:<7} {level}" + (f" ({facts})" if facts else "")]
    return lines + [f"          {target['id']} is {target['state']}" for target in health["targets"]
                    if target["side"] == side.value]


def advices(health: Json) -> list[str]:
    """What a person could do to have both sides answer, a line each."""
    found = [f"{target['id']} {target['state']}: {target['reason']}" for target in health["targets"]
             if target["state"] not in ("ready", "unknown")]
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
    """Run the server until SIGTERM or Ctrl-C.  Returns the exit status: 2 for a mistake in flags or variables."""
    stops: list[int] = []    # no Event: a second signal in the first's handler would wait for its lock for ever
    try:
        settings = Settings.parse(sys.argv[1:] if argv is None else argv, os.environ if env is None else env)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
        with demo(settings) as settings, running(settings) as server:
            for name in ("SIGINT", "SIGTERM"):
                signal.signal(getattr(signal, name), lambda number, _: stops.append(number))
            server.gateway.watch.settle(SETTLE_S)
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")    # a terminal need not know a model's name
            print(start_text(settings, server), flush=True)
            while not stops:
                time.sleep(0.25)
    except UsageError as error:
        print(f"oblix: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
