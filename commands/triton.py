"""`nemodiff triton`: an engine behind Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options
from .streams import TEXT

_PORT = click.IntRange(1, 65535)


@click.group()
def triton() -> None:
    """Serve an engine with Triton Inference Server."""


@triton.command(short_help="Write ENGINE into a model repository.")
@options.engine
@click.option("--repo", type=options.PATH, required=True, help="Write the model into this model repository.")
@click.option("--name", type=TEXT, default="nemodiff", show_default=True, help="Give the model this name.")
@click.option(
    "--set",
    "assignments",
    type=TEXT,
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a value for the whole model; repeat the option to set several.",
)
@click.option("--link", is_flag=True, help="Link to the engine folder instead of copying it.")
@click.option(
    "--gpu",
    "gpus",
    type=click.IntRange(0),
    multiple=True,
    help="Run an instance on this GPU; repeat the option for several, among which Triton shares requests.",
)
@click.option("--batched", is_flag=True, help="Give every tensor a batch dimension of 1, as TensorRT-LLM's have.")
def export(engine: Path, repo: Path, assignments: tuple[str, ...], **choices: Any) -> None:
    """Write ENGINE as a model into a model repository of Triton Inference Server.

    --set takes rows, waiting, threads, device, gpu_memory_utilization, warmup, prefix_reuse, prefill_tokens,
    max_logprobs, stream_interval_ms, generation_config=auto for the sampling that the model proposes, and the default
    of any input or field of sampling_parameters, such as mode=ar, max_tokens=200 or stream=true.
    """
    from ..serving.triton_server.export import export as export_model
    from ..serving.triton_server.export import parse_assignments

    folder = export_model(engine, repo, parameters=parse_assignments(assignments), **choices)
    click.echo(f"exported     {folder}; try: nemodiff triton run {repo}", err=True)


@triton.command()
@click.argument("repo", type=options.PATH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@options.host
@click.option("--http-port", type=_PORT, default=8000, show_default=True, help="Serve HTTP on this port.")
@click.option("--grpc-port", type=_PORT, default=8001, show_default=True, help="Serve gRPC on this port.")
@click.option("--metrics-port", type=_PORT, default=8002, show_default=True, help="Serve metrics on this port.")
def run(repo: Path, arguments: tuple[str, ...], host: str, http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Start this machine's tritonserver on the model repository REPO.

    ARGUMENTS after -- are passed to tritonserver as they are.
    """
    from ..serving.triton_server.server import serve

    serve(repo, host, (http_port, grpc_port, metrics_port), arguments)


@triton.command()
def install() -> None:
    """Install a tritonserver for CPUs.

    It is put beside the packages of this Python, takes 290 MB, and needs Linux but no container.
    """
    from ..serving.triton_server.install import install as install_server

    click.echo(f"installed    {install_server()}; try: nemodiff triton run REPO", err=True)
