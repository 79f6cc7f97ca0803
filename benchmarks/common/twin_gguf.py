"""A twin as a GGUF file, and llama.cpp running it: what the benchmark and the test of the extra `llama-cpp` share.

GGUF is llama.cpp's file format; its architecture `mistral3` is Ministral-3's. No vocabulary is written: prompts and
answers are token ids.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np

from nemodiff.builder.checkpoint.safetensors_file import read_tensors
from nemodiff.builder.checkpoint.weights import _to_f32

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(twin: Path, path: Path, kind: str = "F32") -> Path:
    """Write an exported twin with its matrices as F32, F16, Q8_0 or Q4_0; the head of Q4_0 is Q8_0."""
    import gguf

    config = json.loads((twin / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, "mistral3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for file in sorted(twin.glob("*.safetensors")):
        for name, tensor in read_tensors(file).items():
            values = _to_f32(np.array(tensor.array()))
            stem = name.removesuffix(".weight")
            layer = ""
            if stem.startswith("model.layers."):
                number, _, stem = stem.removeprefix("model.layers.").partition(".")
                layer = f"blk.{number}."
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):  # rotated pairs lie side by side there
                heads = values.shape[0] // config["head_dim"]
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            chosen = "F32" if values.ndim == 1 else "Q8_0" if (kind, stem) == ("Q4_0", "lm_head") else kind
            stored = gguf.GGMLQuantizationType[chosen]
            packed = gguf.quants.quantize(np.ascontiguousarray(values), stored)
            writer.add_tensor(f"{layer}{_NAMES[stem]}.weight", packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize_gguf(source: Path, path: Path) -> None:
    """Write a GGUF of F32 as Q4_0 by llama.cpp's own quantizer, which gives its head Q6_K."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    if code:
        raise RuntimeError(f"llama_model_quantize gave {code}")


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, with one text in its cache."""

    def __init__(self, path: Path, threads: int, slots: int = 1024) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = slots
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._greedy = llama_cpp.llama_sampler_init_greedy()

    def forward(self, ids: list[int], start: int, predict_all: bool = False) -> np.ndarray:
        """Decode ids at position `start` and return the logits after the last one, or after every one, (R, V) f32."""
        lib, batch = self._lib, self._batch
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, start, -1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place] = token
            batch.pos[place] = start + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = predict_all or place == len(ids) - 1
        code = lib.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        count = len(ids) if predict_all else 1
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (count, self._vocab))

    def token(self, ids: list[int], start: int) -> int:
        """Decode ids at position `start` and take the best token after the last one, by llama.cpp's own sampler."""
        self.forward(ids, start)
        return int(self._lib.llama_sampler_sample(self._greedy, self._context, -1))

    def greedy(self, prompt: list[int], new_tokens: int, ends: tuple[int, ...], never: int) -> list[int]:
        """The tokens of a greedy answer, without the id `never`, up to an end."""
        answer: list[int] = []
        ids, start = prompt, 0
        while len(answer) < new_tokens:
            logits = self.forward(ids, start)[-1].copy()
            logits[never] = -np.inf
            start += len(ids)
            ids = [int(logits.argmax())]
            answer += ids
            if ids[0] in ends:
                break
        return answer

    def close(self) -> None:
        """Free the model."""
        self._lib.llama_sampler_free(self._greedy)
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
