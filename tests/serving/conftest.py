"""What several tests of the servers share: a server whose model calls tools, a client of it, an engine that sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stand_ins.http_server import Served, serving
from stand_ins.vision import write_vision_checkpoint

from nemodiff.builder.build import Builder

if TYPE_CHECKING:
    from openai import OpenAI


@pytest.fixture(scope="module")
def server(xml_tool_engine: Path) -> Iterator[Served]:
    """tiny-chat with a template that shows tools, for each file of tests; some have a server of their own."""
    with serving(xml_tool_engine, "--served-model-name", "tiny") as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[OpenAI]:
    """OpenAI's client of the file's server."""
    from openai import OpenAI

    with OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def seeing_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that sees; read it, never change it."""
    folder = tmp_path_factory.mktemp("seeing")
    return Builder(write_vision_checkpoint(folder / "checkpoint"), folder / "seeing").run()
