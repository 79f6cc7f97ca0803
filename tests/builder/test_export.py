"""The autoregressive twin: the same weights bit for bit, the same tokens and logits, and nothing of others destroyed.

Whether the twin is right is judged by transformers, which loads the written folder as any of its own.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused, run, snapshot
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import TINY_CHAT, load_make_data, shapes, write_checkpoint

import nemodiff
from nemodiff.builder import export
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.checkpoint.safetensors_file import PIECE, copy_tensors
from nemodiff.builder.export import Exporter
from nemodiff.builder.twin import twin_name
from nemodiff.errors import BuildError, CheckpointError
from nemodiff.runtime.engines.passes import causal

YARN = json.loads((TINY_CHAT / "config.json").read_text())["rope_parameters"]
LONG = {"rope_theta": 10000.0, "original_max_position_embeddings": 40, "llama_4_scaling_beta": 0.5}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def load(folder: Path) -> Any:
    """The twin as a user of transformers loads it, in f32 to compare it with an engine."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # no tensor missing, left over, of another shape
    assert type(model).__name__ == "Ministral3ForCausalLM"
    return model.eval()


def logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        result: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return result


def continued(model: Any, ids: list[int], limit: int) -> list[int]:
    """Greedy new tokens; what ends and what is never chosen comes from the folder alone."""
    import torch

    prompt = torch.tensor([ids])
    pad = model.generation_config.eos_token_id
    mask = torch.ones_like(prompt)
    result = model.generate(prompt, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=pad)
    return [int(token) for token in result[0, len(ids) :]]


# ---- what transformers says ----


@pytest.mark.torch
def test_twin_gives_the_tokens_of_mode_ar(twin: Path, tiny_engine: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load(twin), transformers.AutoTokenizer.from_pretrained(twin)
    data, rng = load_make_data(), random.Random(5)
    prompts = [data.example(rng)[1] for _ in range(8)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    result = run("run", tiny_engine, "--mode", "ar", "--input-file", file, "--json", "--max-new-tokens", 48)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert {answer["finish_reason"] for answer in answers} == {"stop", "length"}  # both ends are covered
    for text, answer in zip(prompts, answers, strict=True):
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert len(ids) == answer["prompt_tokens"]
        assert continued(model, ids, 48) == answer["token_ids"]


@pytest.mark.torch
def test_twin_s_logits_are_the_oracle_s(twin: Path) -> None:
    pytest.importorskip("torch")
    from oracle import transformers_oracle

    ids = [130 + (i * 7) % 200 for i in range(64)]
    np.testing.assert_array_equal(
        logits(load(twin), ids), transformers_oracle.logits(transformers_oracle.load(TINY_CHAT), ids)
    )


@pytest.mark.torch
def test_twin_is_loaded_in_the_checkpoint_s_dtype(twin: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert str(transformers.AutoModelForCausalLM.from_pretrained(twin).dtype) == "torch.bfloat16"


@pytest.mark.torch
@pytest.mark.parametrize(
    "rope",
    [
        pytest.param({"rope_parameters": YARN | LONG}, id="yarn"),
        pytest.param({"rope_parameters": YARN | LONG | {"factor": 0.25}}, id="factor below one"),
        pytest.param({"rope_parameters": YARN | LONG | {"mscale_all_dim": 0.5, "truncate": False}}, id="two scales"),
        pytest.param({"rope_parameters": LONG | {"rope_type": "default"}}, id="no yarn"),
        # The twin needs a query scale written down all the same, because transformers always multiplies by it.
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, id="no query scale"),
        pytest.param(
            {
                "rope_parameters": None,
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "mscale": None},
            },
            id="older names",
        ),
    ],
)
def test_long_positions_behave_as_in_the_engine(tmp_path: Path, rope: dict[str, Any]) -> None:
    """96 tokens, past two periods of 40, from a sharded bf16 checkpoint."""
    source = write_checkpoint(tmp_path / "checkpoint", seed=3, shards=3, **rope)
    folder = Exporter(source, tmp_path / "twin").run()
    written = read(folder, "config.json")["rope_parameters"]
    original = rope["rope_parameters"] or rope["rope_scaling"]
    assert {key: written.get(key) for key in original} == original
    ids = np.random.default_rng(5).integers(0, 891, 96).tolist()
    model = load(folder)
    engine = nemodiff.load(Builder(source, tmp_path / "engine").run(), threads=1)
    ours = engine.backend.open(1).forward([causal("verify", ids, 0, predict_all=True, logits=True)])[0].logits
    assert ours is not None
    np.testing.assert_allclose(logits(model, ids), ours, atol=1e-3)
    assert continued(model, ids, 40) == nemodiff.generate(engine, ids, mode="ar", max_new_tokens=40).token_ids
    if written["llama_4_scaling_beta"]:  # the comparison would see a lost query scale
        model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
        assert np.abs(logits(model, ids) - ours).max() > 0.1


@pytest.mark.torch
def test_twin_never_gives_the_mask_id(checkpoint: Path) -> None:
    prompt, engine = [130, 131, 132], checkpoint.parent / "engine"
    winner = nemodiff.generate(nemodiff.load(Builder(checkpoint, engine).run()), prompt, mode="ar", max_new_tokens=1)
    tensors = load_file(checkpoint / "model.safetensors")
    # Twice the winner's row gives twice its logit, so the mask id would win.
    tensors["diffusion_head.weight"][100] = 2 * tensors["diffusion_head.weight"][winner.token_ids[0]]
    save_file(tensors, checkpoint / "model.safetensors")
    model = load(Exporter(checkpoint, checkpoint.parent / "twin").run())
    expected = nemodiff.generate(nemodiff.load(Builder(checkpoint, engine).run()), prompt, mode="ar", max_new_tokens=8)
    assert logits(model, prompt)[-1].argmax() == 100
    assert continued(model, prompt, 8) == expected.token_ids


# ---- what is written ----


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_tensor_is_there_bit_for_bit(tmp_path: Path, dtype: str, shards: int) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, shards=shards)
    done: list[int] = []
    folder = Exporter(source, tmp_path / "twin").run(done.append)
    files = sorted(p.name for p in source.glob("*.safetensors"))
    assert sorted(p.name for p in folder.glob("*.safetensors")) == files
    placed, total = {}, 0
    for file in files:
        with safe_open(folder / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
        before, after = load_file(source / file), load_file(folder / file)
        assert set(after) == {twin_name(name) for name in before}
        placed |= dict.fromkeys(after, file)
        for name, tensor in before.items():
            total += tensor.nbytes
            assert after[twin_name(name)].dtype == tensor.dtype
            assert after[twin_name(name)].tobytes() == tensor.tobytes()
    assert sum(done) == total
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"} <= set(placed)
    assert not [name for name in placed if "encoder" in name or "diffusion" in name]
    assert (folder / "model.safetensors.index.json").exists() == (shards > 1)
    if shards > 1:
        index = read(folder, "model.safetensors.index.json")
        assert index["weight_map"] == placed
        assert index["metadata"]["total_size"] == total
    dtypes = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    assert read(folder, "config.json")["dtype"] == dtypes[dtype]


def test_tensors_of_two_dtypes_are_loaded_in_one_that_holds_both(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["encoder.norm.weight"] = tensors["encoder.norm.weight"].astype(np.float16)
    save_file(tensors, checkpoint / "model.safetensors")
    folder = Exporter(checkpoint, checkpoint.parent / "twin").run()
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == np.float16
    assert read(folder, "config.json")["dtype"] == "float32"


def test_config_is_a_plain_ministral(twin: Path) -> None:
    config, source = read(twin, "config.json"), read(TINY_CHAT, "config.json")
    assert (config["architectures"], config["model_type"]) == (["Ministral3ForCausalLM"], "ministral3")
    assert config["rope_parameters"] == source["rope_parameters"]
    assert config["llama_4_scaling"] == {"original_max_position_embeddings": 16384, "beta": 0.1}
    assert (config["tie_word_embeddings"], config["use_cache"], config["pad_token_id"]) == (False, True, None)
    for name in config.keys() & source.keys() - {"architectures", "model_type", "use_cache"}:
        assert config[name] == source[name]
    assert not [name for name in config if "mask" in name or "dlm" in name or "block" in name]


def test_small_files_come_along(checkpoint: Path) -> None:
    generation = {"eos_token_id": [11, 2], "temperature": 0.5, "do_sample": True, "suppress_tokens": [7]}
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    folder = Exporter(checkpoint, checkpoint.parent / "twin").run()
    assert read(folder, "generation_config.json") == generation | {"suppress_tokens": [7, 100]}
    assert read(folder, "config.json")["eos_token_id"] == [11, 2]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
    for name in ("generation_config.json", "chat_template.jinja"):
        (checkpoint / name).unlink()
    Exporter(checkpoint, folder).run()
    assert read(folder, "generation_config.json") == {"eos_token_id": 11, "suppress_tokens": [100]}
    assert not (folder / "chat_template.jinja").exists()


def test_the_adapter_is_left_out_and_the_plan_says_so(checkpoint: Path) -> None:
    result = run("export", checkpoint, "-o", checkpoint.parent / "twin")
    assert (result.exit_code, result.stdout) == (0, "")
    lines = [line for line in result.stderr.splitlines() if "drafter adapter" in line]
    assert lines == ["left out     the drafter adapter of rank 4: the twin only decodes autoregressively"]
    origin = read(checkpoint.parent / "twin", "nemodiff_export.json")
    assert (origin["format"], origin["left_out"]) == ("ministral3", ["linear_spec_lora"])
    assert origin["checkpoint"] == {"name": "checkpoint", "revision": None}
    files = {p.name: {"bytes": p.stat().st_size} for p in (checkpoint.parent / "twin").iterdir()}
    assert origin["files"] == {name: entry for name, entry in files.items() if name != "nemodiff_export.json"}


def test_dry_run_writes_nothing(checkpoint: Path) -> None:
    before = snapshot(checkpoint.parent)
    for flag in ("--dry-run", "--dry_run"):
        result = run("export", checkpoint, "--format", "ministral3", "-o", checkpoint.parent / "twin", flag)
        assert (result.exit_code, result.stderr) == (0, "")
        for text in ("21 tensors", "Ministral3ForCausalLM, ", "float32", "in 1 file, ", "adapter of rank 4"):
            assert text in result.stdout
    assert snapshot(checkpoint.parent) == before


MEASURED = """
import resource, sys
from nemodiff.builder.export import Exporter
exporter = Exporter(sys.argv[1], sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exporter.run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """280 MB of zeros, as a hole in the file."""
    source = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, hidden_size=1024)
    config = read(source, "config.json") | {"vocab_size": 65536}
    (source / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes(config).items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "twin")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout) * 1024
    assert end > 16 * PIECE
    assert grown < 3 * PIECE
    assert open_checkpoint(source).tensors["diffusion_head.weight"].shape == (65536, 1024)


# ---- what is refused, and what is never destroyed ----


@pytest.mark.parametrize(
    ("place", "fragments"),
    [
        pytest.param(
            "engine", ["engine: exists and is not an export (nemodiff_export.json is missing)", "--output"], id="engine"
        ),
        pytest.param("checkpoint", ["checkpoint: exists and is not an export", "--output"], id="checkpoint"),
        pytest.param("file", ["file: exists and is not a folder; choose another --output"], id="file"),
        pytest.param("twin", ["replacing this export would remove 'notes.txt'", "move it away"], id="stranger"),
    ],
)
def test_an_output_that_is_no_export_is_kept(
    checkpoint: Path, refused: Refused, place: str, fragments: list[str]
) -> None:
    root = checkpoint.parent
    Builder(checkpoint, root / "engine").run()
    (Exporter(checkpoint, root / "twin").run() / "notes.txt").write_text("precious")
    (root / "file").write_text("precious")
    refused(["export", str(checkpoint), "-o", str(root / place)], *fragments)


def test_a_build_does_not_replace_an_export(checkpoint: Path, refused: Refused) -> None:
    folder = Exporter(checkpoint, checkpoint.parent / "twin").run()
    refused(["build", str(checkpoint), "-o", str(folder)], "exists and is not an engine (manifest.json is missing)")


def test_an_export_is_replaced_whole(checkpoint: Path) -> None:
    root = checkpoint.parent
    folder = Exporter(write_checkpoint(root / "sharded", shards=3), root / "twin").run()
    assert len(list(folder.glob("*.safetensors"))) == 3
    Exporter(checkpoint, folder).run()
    expected = Exporter(checkpoint, root / "other").run()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in expected.iterdir()}
    (folder / "nemodiff_export.json").write_text("{")
    (folder / "config.json").unlink()
    Exporter(checkpoint, folder).run()
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()}
    assert {p.name for p in root.iterdir()} == {"checkpoint", "sharded", "twin", "other"}


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_an_ended_export_leaves_nothing(checkpoint: Path, replacing: bool) -> None:
    folder = checkpoint.parent / "twin"
    if replacing:
        Exporter(checkpoint, folder).run()
    before = snapshot(checkpoint.parent)

    def advance(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Exporter(checkpoint, folder).run(advance)
    assert snapshot(checkpoint.parent) == before


def test_broken_checkpoints_are_refused(checkpoint: Path, refused: Refused) -> None:
    command = ["export", str(checkpoint), "-o", str(checkpoint.parent / "twin")]
    weights = checkpoint / "model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-1])
    refused(command, "model.safetensors: not a whole safetensors file")
    save_file({name: t for name, t in tensors.items() if name != "encoder.norm.weight"}, weights)
    refused(command, "tensor encoder.norm.weight of shape [32] is missing")
    save_file(tensors | {"encoder.extra.weight": tensors["encoder.norm.weight"]}, weights)
    refused(command, "tensor encoder.extra.weight is not part of this architecture")
    weights.write_bytes(whole)
    (checkpoint / "config.json").write_text('{"architectures": ["Ministral3ForCausalLM"]}')  # a twin's
    refused(command, "config.json: architectures is ['Ministral3ForCausalLM']")
    shutil.rmtree(checkpoint)
    refused(command, "checkpoint: no such folder; give a checkpoint folder or a hub id")


def test_other_formats_are_refused(checkpoint: Path, refused: Refused) -> None:
    command = ["export", str(checkpoint)]
    output = ["-o", str(checkpoint.parent / "twin")]
    refused([*command, *output, "--format", "gguf"], "'--format': 'gguf' is not 'ministral3'", code=2)
    refused(command, "Missing option '-o' / '--output'", code=2)
    with pytest.raises(BuildError, match=r"--format is 'gguf', allowed: ministral3; choose one of them"):
        Exporter(checkpoint, output[1], layout="gguf")


def test_a_full_disk_is_refused_before_a_byte_is_written(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "disk_free", lambda path: 1000)
    refused(
        ["export", str(checkpoint), "-o", str(checkpoint.parent / "twin")],
        "twin: the export needs 64.",
        "of disk, 1000 B are free; free some space or choose another --output",
    )


def test_a_file_that_shrinks_while_it_is_copied_is_refused(checkpoint: Path) -> None:
    tensors = sorted(open_checkpoint(checkpoint).tensors.values(), key=lambda t: t.offset)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(tensors[-1].offset)
    with pytest.raises(CheckpointError, match=rf"ended {tensors[-1].nbytes} bytes early.*download the file again"):
        copy_tensors(tensors, twin_name, checkpoint.parent / "copy.safetensors", lambda nbytes: None)
