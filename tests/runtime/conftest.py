"""What several tests of the runtime share: tiny-chat in numpy and in engines, and its tokenizer."""

from __future__ import annotations

import equality
import pytest
from oracle.reference import ReferenceModel
from stand_ins.checkpoints import TINY_CHAT

from nemodiff.runtime.text.codec import TextCodec


@pytest.fixture(scope="module")
def oracle() -> ReferenceModel:
    """tiny-chat's network in numpy."""
    return ReferenceModel.load(TINY_CHAT)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    """tiny-chat's tokenizer and template."""
    return TextCodec(TINY_CHAT)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> equality.Setup:
    """tiny-chat in engines with and without an adapter, and its oracle."""
    return equality.Setup.make(tmp_path_factory.mktemp("equality"))
