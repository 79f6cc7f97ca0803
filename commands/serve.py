"""`nemodiff serve`: an engine behind an HTTP server."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from ..contract import DEFAULT_MAX_LOGPROBS, MODES
from ..errors import RequestError, install
from . import options
from .streams import TEXT


def _each(form: str, refusal: str, shown: int = 60) -> Callable[..., tuple[str, ...]]:
    """Checks every value of an option that may be repeated; of a refused one so many characters are shown."""

    def check(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(form, value, re.DOTALL):
                raise click.BadParameter(f"{repr(value)[:shown]} {refusal}")
        return values

    return check


_check_keys = _each(
    r"\S(.*\S)?", "is empty or has space around it, which no client can send; give another key, or none", shown=20
)
_check_names = _each(r"\*|(\*\.)?[^\s/*]+", "is no name of a host, allowed: NAME, *.NAME or *")
_check_origins = _each(
    r"\*|https?://[^/\s]+",
    "is no origin, allowed: http://HOST or https://HOST, with a port if any and nothing after it, or *",
)


@click.command()
@options.engine
@options.host
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Listen on this port; 0 takes a free one.",
)
@click.option(
    "--api-key",
    type=TEXT,
    multiple=True,
    envvar="NEMODIFF_API_KEY",
    callback=_check_keys,
    help="Require this key from clients; repeat the option to allow several.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    type=TEXT,
    metavar="NAME",
    callback=_check_names,
    help="Answer under this name too, or *.NAME, or * for any; may be repeated. [default: its address and localhost]",
)
@click.option(
    "--allowed-origin",
    multiple=True,
    type=TEXT,
    metavar="URL",
    callback=_check_origins,
    help="Let pages of this origin ask from a browser (CORS), or * for any; may be repeated. [default: none]",
)
@click.option(
    "--served-model-name", type=TEXT, help="Show the model to clients by this name. [default: the engine folder's]"
)
@click.option(
    "--mode",
    type=click.Choice([*MODES, "auto"]),
    default="linear_spec",
    show_default=True,
    help="Decode in this mode where a request names none.",
)
@click.option(
    "--rows", type=int, help="Run this many requests at the same time. [default: the engine's max batch size]"
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Let this many requests wait and refuse further ones.",
)
@click.option(
    "--max-logprobs",
    type=click.IntRange(0),
    default=DEFAULT_MAX_LOGPROBS,
    show_default=True,
    help="Tell of this many likeliest tokens for each token, and refuse a request that asks for more.",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(1),
    default=4 << 20,
    show_default=True,
    help="Refuse a request whose body is longer than this.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Hold this many connections; a further one takes the place of one that is idle.",
)
@click.option(
    "--client-timeout",
    type=options.Number(0, min_open=True),
    default=60,
    show_default=True,
    help="Close a connection whose request has not arrived, or whose answer is not read, for this many seconds.",
)
@click.option(
    "--timeout",
    type=options.Number(0, min_open=True),
    default=600,
    show_default=True,
    help="Cancel a request after this many seconds.",
)
@click.option(
    "--drain",
    type=options.Number(0),
    default=30,
    show_default=True,
    help="Give running requests this many seconds to finish after SIGTERM.",
)
@click.option(
    "--allow-image-urls",
    is_flag=True,
    help="Fetch images that a request names by http URL: up to 16 MiB, 10 seconds, from public addresses only.",
)
@click.option(
    "--no-prefix-reuse", is_flag=True, help="Compute every prompt in full, even where it begins like an earlier one."
)
@options.generation_config
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Write a line per request to standard error, with the id of its X-Request-Id. [default: none]",
)
@click.option(
    "--trace-spans", is_flag=True, help="Send OpenTelemetry spans, to where OTEL_EXPORTER_OTLP_ENDPOINT says."
)
@options.loading
def serve(
    engine: Path,
    host: str,
    port: int,
    api_key: tuple[str, ...],
    allowed_host: tuple[str, ...],
    allowed_origin: tuple[str, ...],
    served_model_name: str | None,
    mode: str,
    rows: int | None,
    max_queue: int,
    max_logprobs: int,
    max_request_bytes: int,
    max_connections: int,
    client_timeout: float,
    timeout: float,
    drain: float,
    allow_image_urls: bool,
    no_prefix_reuse: bool,
    loading: dict[str, Any],
    generation_config: str,
    log_format: Literal["text", "json"] | None,
    trace_spans: bool,
) -> None:
    """Serve ENGINE over HTTP.

    The server speaks OpenAI's and Anthropic's APIs, reports metrics, and has a page to watch the engine decode.
    """
    try:
        from ..runtime.requests.generation_config import sampling_defaults
        from ..serving.http.app import Limits, Reports, open_server
        from ..serving.http.hosts import AllowedHosts
        from ..serving.http.request_log import log_message
        from ..serving.http.server import bind, check_connections, signals_heard
        from ..serving.http.server import serve as listen
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing; install it: {install('nemodiff[serve]')}") from None
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world != "1":
        raise RequestError(
            f"torchrun has started {world} ranks, and each would serve at port {port}; start one server with "
            f"--tp-size {world}, which starts the ranks"
        )
    if served_model_name is not None and not served_model_name.strip():
        raise click.UsageError("--served-model-name is empty; give a name, or leave it out")
    check_connections(max_connections)
    limits = Limits(
        timeout=timeout,
        max_request_bytes=max_request_bytes,
        keys=api_key,
        waiting=max_queue,
        hosts=AllowedHosts(host, allowed_host),
        origins=allowed_origin,
        connections=max_connections,
        patience=client_timeout,
        image_urls=allow_image_urls,
        logprobs=max_logprobs,
    )
    sampling = sampling_defaults(engine) if generation_config == "auto" else {}
    with bind(host, port) as listening, signals_heard():
        server = open_server(
            engine,
            limits=limits,
            name=served_model_name,
            defaults={"mode": mode, **sampling},
            prefix_reuse=not no_prefix_reuse,
            reports=Reports(log_format, trace_spans),
            rows=rows,
            **loading,
        )

        def announce(address: str) -> None:
            say(f"serving {server.name} on {address}", model=server.name, address=address)
            if sampling:
                proposed = ", ".join(f"{name} {value:g}" for name, value in sampling.items())
                say(f"where a request does not say otherwise, by generation_config.json: {proposed}", sampling=sampling)

        def say(message: str, **fields: Any) -> None:
            if log_format == "json":
                log_message(message, **fields)
            else:
                click.echo(message, err=True)

        listen(server, listening, drain, announce)
