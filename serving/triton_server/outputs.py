"""The output tensors of the Triton model.

Every response has `text_output`; the others are in the last response.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from ...runtime.events.events import Finished
from .parameters import Type

NUMPY: dict[Type, Any] = {"STRING": object, "UINT32": "uint32", "FP32": "float32"}


@dataclasses.dataclass(frozen=True)
class Output:
    """One output tensor.

    value: reads it from a finished request, and may return None; the writer has the others. many: any number of
    elements.
    """

    name: str
    type: Type
    value: Callable[[Finished], Any] | None = None
    many: bool = False


def _logprobs(finished: Finished) -> list[float] | None:
    logprobs = finished.generation.logprobs
    return None if logprobs is None else [token.logprob for token in logprobs]


def _sum_of_logprobs(finished: Finished) -> float | None:
    logprobs = _logprobs(finished)
    return None if logprobs is None else sum(logprobs)


def _logprobs_of_prompt(finished: Finished) -> list[float] | None:
    """From the prompt's second token on."""
    logprobs = finished.generation.prompt_logprobs
    return None if logprobs is None else [token.logprob for token in logprobs if token is not None]


OUTPUTS = (
    Output("text_output", "STRING"),
    Output("finish_reason", "STRING", lambda f: f.generation.finish_reason),
    Output("num_input_tokens", "UINT32", lambda f: f.generation.prompt_tokens),
    Output("num_image_tokens", "UINT32", lambda f: sum(f.generation.image_tokens) or None),
    Output("num_output_tokens", "UINT32", lambda f: len(f.generation.token_ids)),
    Output("num_reused_tokens", "UINT32", lambda f: f.generation.reused_tokens),
    Output("nfe", "STRING", lambda f: json.dumps(f.generation.nfe)),
    Output("tokens_per_pass", "FP32", lambda f: f.generation.decode_tpf),
    Output("acceptance_length", "FP32", lambda f: f.generation.acceptance.mean),
    Output("output_log_probs", "FP32", _logprobs, many=True),
    Output("cum_log_probs", "FP32", _sum_of_logprobs),
    Output("logprobs", "STRING"),
    Output("cumulative_logprob", "FP32", _sum_of_logprobs),
    Output("prompt_log_probs", "FP32", _logprobs_of_prompt, many=True),
    Output("warnings", "STRING", lambda f: f.generation.warnings or None, many=True),
    Output("time_to_first_token_ms", "FP32", lambda f: f.ttft_ms),
    Output("inter_token_latency_ms", "FP32", lambda f: f.itl_ms),
)
