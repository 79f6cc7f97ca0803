"""A model that sees: features against transformers, tokens against the reference, and every way to give an image."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import output_of
from oracle import reference
from oracle.reference_model import ReferenceModel
from PIL import Image as Pillow
from PIL import ImageDraw
from safetensors.numpy import load_file, save_file
from stand_ins.messages import asked
from stand_ins.vision import FLAT, VISION, as_bytes, picture, write_vision_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.contract import PAGE
from nemodiff.engine_info import read_engine
from nemodiff.errors import BuildError, CheckpointError, EngineError, RequestError
from nemodiff.fields import Fields
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape
from nemodiff.runtime.engines.torch.step import Step
from nemodiff.runtime.images import sight
from nemodiff.runtime.images.decode import decode
from nemodiff.runtime.images.image import MEAN, STD, Image, make_image
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.requests import image_parts
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence
from nemodiff.vision import VisionConfig, parse_vision

MODES = ("ar", "diffusion", "linear_spec", "quadratic_spec")
SIZES = [(30, 20), (8, 8), (1, 1), (64, 24), (100, 37)]  # the last is scaled down


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_checkpoint(tmp_path_factory.mktemp("vision") / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> LoadedEngine:
    return nemodiff.load(Builder(checkpoint, checkpoint.parent / "engine").run())


def seen(engine: LoadedEngine, source: Any) -> Image:
    vision = engine.info.model.vision
    assert vision is not None
    return make_image(decode(source), vision, engine.info.build.max_image_size)


def whole(image: Image, merge: int = 2) -> np.ndarray:
    """The normalized pixels that an image was cut from, (3, height, width)."""
    side = 4
    cut = image.patches.reshape(image.rows, image.columns, merge, merge, 3, side, side)
    return np.ascontiguousarray(
        cut.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, image.rows * merge * side, image.columns * merge * side)
    )


@pytest.mark.parametrize("size", [0, 12, True])
def test_the_largest_image_is_one_of_whole_tokens(engine: LoadedEngine, tmp_path: Path, size: int) -> None:
    folder = Path(shutil.copytree(engine.folder, tmp_path / "engine", copy_function=os.link))
    config = json.loads((folder / "config.json").read_text())
    config["build_config"]["max_image_size"] = size
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=f"max_image_size is {size}, allowed: a multiple of 8; "):
        read_engine(folder)


@pytest.mark.torch
def test_pixels_are_normalized_as_for_clip() -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    for ours, theirs in ((MEAN, OPENAI_CLIP_MEAN), (STD, OPENAI_CLIP_STD)):
        np.testing.assert_array_equal(ours, np.array(theirs, np.float32))


@pytest.mark.torch
@pytest.mark.parametrize(("act", "merge"), [("silu", 2), ("gelu", 3)])
def test_features_are_those_of_transformers(tmp_path: Path, act: str, merge: int) -> None:
    from oracle import vision_oracle

    vision = VISION | {"hidden_act": act}
    folder = write_vision_checkpoint(tmp_path / "checkpoint", vision_config=vision, spatial_merge_size=merge)
    engine = nemodiff.load(Builder(folder, tmp_path / "engine").run())
    torch_engine = nemodiff.load(Builder(folder, tmp_path / "torch", backend="torch", dtype="f32").run(), device="cpu")
    images = [seen(engine, picture(*size, seed)) for seed, size in enumerate(SIZES)]
    expected = vision_oracle.features(folder, [whole(image, merge) for image in images])
    for image, one in zip(images, expected, strict=True):
        for backend in (engine.backend, torch_engine.backend):
            np.testing.assert_allclose(backend.see(image), one, rtol=2e-4, atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [((300, 100), (56, 28)), ((20, 30), (56, 84)), ((13, 57), (40, 56))])
def test_pixels_are_interpolated_as_torch_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    import torch

    from nemodiff.runtime.images.image import _resized

    pixels = np.random.default_rng(3).uniform(0, 255, (*old, 3)).astype(np.float32)
    ours = _resized(_resized(pixels, new[1], 1), new[0], 0)
    batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
    # Without antialiasing torch's cubic kernel is OpenCV's, by which the released processor resizes.
    theirs = torch.nn.functional.interpolate(batch, new, mode="bicubic", align_corners=False)[0]
    np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs.numpy(), atol=1e-2)


def test_pixels_are_normalized_and_patches_in_order(engine: LoadedEngine) -> None:
    source = picture(24, 16)
    image = seen(engine, source)
    assert (image.columns, image.rows) == (3, 2)
    expected = (np.asarray(source, np.float32) / np.float32(255) - MEAN) / STD
    np.testing.assert_array_equal(whole(image), expected.transpose(2, 0, 1))
    assert image.positions[:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1400, 1400), (50, 50)),
        ((1540, 1540), (50, 50)),
        ((28, 28), (1, 1)),
        ((29, 28), (2, 1)),
        ((50, 100), (2, 4)),
        ((1500, 3000), (25, 50)),
        ((1401, 1401), (50, 50)),
        ((3080, 770), (50, 13)),
        ((1, 1), (1, 1)),
        ((20000, 1), (50, 1)),
    ],
)
def test_the_grid_of_the_released_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    released = VisionConfig(1024, 24, 4096, 16, 64, 14, 1540, "silu", 10000.0, 2)
    assert released.default_max_image_size == 1400
    assert released.grid(*size, 1400) == grid
    assert released.tokens(1400, 1400, 1400) == 2500 + 49 + 2
    assert released.tokens(28, 56, 1400) == 5


def test_an_image_is_rows_of_pads_between_start_and_end(engine: LoadedEngine) -> None:
    sequence = prepare(engine, asked(picture(24, 16), picture(8, 8)), Options())
    start, pad, row_break, end = 18, 19, 20, 21
    two_by_three = [start, pad, pad, pad, row_break, pad, pad, pad, end]
    at = sequence.prompt.index(start)
    assert sequence.prompt[at : at + 12] == [*two_by_three, start, pad, end]
    assert sequence.images is not None
    assert sequence.images.tokens == [9, 3]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_reference(checkpoint: Path, engine: LoadedEngine, mode: str) -> None:
    model = ReferenceModel.load(checkpoint)
    pictures = [picture(30, 20), picture(9, 40, 1)]
    sequence = prepare(engine, asked(*pictures), Options())
    model.images = np.concatenate([engine.backend.see(seen(engine, one)) for one in pictures])
    answer = nemodiff.generate(engine, asked(*pictures), mode=mode, max_new_tokens=24, block_length=8)
    if mode == "diffusion":
        expected = reference.diffusion(model, sequence.prompt, 24, 8, 0.9, model.eos)
    else:
        expected = reference.ar(model, sequence.prompt, 24, model.eos)
    assert answer.token_ids == list(expected.tokens)
    small = nemodiff.generate(engine, asked(*pictures), mode=mode, max_new_tokens=24, block_length=8, prefill_chunk=5)
    assert small.token_ids == answer.token_ids
    model.images = model.images[::-1].copy()
    model.clear()
    assert list(reference.ar(model, sequence.prompt, 24, model.eos).tokens) != list(expected.tokens)


@pytest.mark.torch
def test_torch_sees_the_same(checkpoint: Path, engine: LoadedEngine, tmp_path: Path) -> None:
    folder = Builder(checkpoint, tmp_path / "torch", backend="torch", dtype="f32").run()
    torch_engine = nemodiff.load(folder, device="cpu")
    image = seen(engine, picture(30, 20))
    np.testing.assert_allclose(torch_engine.backend.see(image), engine.backend.see(image), rtol=2e-4, atol=2e-5)
    prompts = [asked(picture(30, 20), picture(9, 40, 1)), asked(text="Hello"), asked(picture(16, 16))]
    for mode in MODES:
        expected = [nemodiff.generate(engine, one, mode=mode, max_new_tokens=16).token_ids for one in prompts]
        answers = nemodiff.generate_many(torch_engine, prompts, rows=3, mode=mode, max_new_tokens=16)
        assert [answer.token_ids for answer in answers] == expected


@pytest.mark.torch
def test_rows_with_images_find_their_graphs(checkpoint: Path, engine: LoadedEngine, tmp_path: Path) -> None:
    """Greedy, sampled and with logits, beside rows without an image: every forward is one that the warm-up captures."""
    from stand_ins.torch_graphs import RecordingDevice

    folder = Builder(checkpoint, tmp_path / "torch", backend="torch", dtype="f32").run()
    loaded = nemodiff.load(folder, device="cpu")
    backend = TorchEngine(folder, loaded.info, RecordingDevice(), graphs=True, pages=24)
    shapes, of = set[FlatShape](), backend.steps.of

    def noted(shape: FlatShape) -> Step:
        shapes.add(shape)
        return of(shape)

    backend.steps.of = noted  # type: ignore[method-assign]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 5}, {"repetition_penalty": 1.3}]
    prompts = [asked(picture(30, 20)), asked(picture(9, 40, 1), picture(16, 16)), asked(text="Hello")]
    wanted = [(prompt, {"mode": "linear_spec", "max_new_tokens": 8, **kind}) for prompt in prompts for kind in kinds]
    expected = [nemodiff.generate(engine, prompt, **options).token_ids for prompt, options in wanted]
    with nemodiff.Scheduler(dataclasses.replace(loaded, backend=backend), rows=4) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt, options in wanted]
        assert [handle.result(60).token_ids for handle in handles] == expected
    assert shapes <= set(backend.steps.shapes)
    assert {shape.embedded for shape in shapes} == {False, True}


def test_images_are_told_apart_by_their_content(engine: LoadedEngine) -> None:
    prompts = [asked(picture(40, 40, seed)) for seed in (0, 1, 0, 1)]
    alone = [nemodiff.generate(engine, prompt, max_new_tokens=8) for prompt in prompts]
    assert alone[0].token_ids != alone[1].token_ids
    for rows in (1, 3):
        together = list(nemodiff.generate_many(engine, prompts, rows=rows, max_new_tokens=8))
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
        assert [one.prompt_tokens for one in together] == [one.prompt_tokens for one in alone]
    first = prepare(engine, prompts[0], Options())
    other = prepare(engine, prompts[1], Options())
    assert first.prompt == other.prompt
    assert first.keys != other.keys


def test_what_was_seen_is_remembered(engine: LoadedEngine) -> None:
    image = seen(engine, picture(16, 16, 7))
    first = engine.sight(image)
    assert engine.sight(seen(engine, picture(16, 16, 7))) is first


def test_of_what_was_seen_the_latest_are_kept(engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = list[Image]()
    keeping = sight.Sight(lambda image: looks.append(image) or np.zeros((4, 8), np.float32))
    monkeypatch.setattr(sight, "KEPT_BYTES", 2 * 4 * 8 * 4)
    first, second, third = (seen(engine, picture(16, 16, seed)) for seed in (1, 2, 3))
    for image in (first, second, first, third, first, second, third):
        keeping(image)
    assert looks == [first, second, third, second, third]


def test_an_image_is_seen_once_however_many_passes_it_takes(
    engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[int]()
    monkeypatch.setattr(sight, "KEPT_BYTES", 1)  # two prompts at a time drive each other's image out

    def see(image: Image) -> np.ndarray:
        looks.append(image.tokens)
        return engine.backend.see(image)

    fresh = dataclasses.replace(engine)
    fresh.__dict__["sight"] = sight.Sight(see)
    asks = [asked(picture(64, 64, seed), picture(64, 64, seed + 1)) for seed in (1, 3)]
    prompts, whole = ([prepare(one, ask, Options()) for ask in asks] for one in (fresh, engine))
    for start in range(0, len(prompts[0].prompt), 7):
        for one, other in zip(prompts, whole, strict=True):
            assert one.images is not None
            assert other.images is not None
            found, expected = one.images.within(start, start + 7), other.images.within(start, start + 7)
            for left, right in zip(found or (), expected or (), strict=True):
                np.testing.assert_array_equal(left, right)
    assert len(looks) == 4


@pytest.mark.parametrize("passes", [1, 2])
def test_an_image_that_cannot_be_seen_fails_its_own_request(engine: LoadedEngine, passes: int) -> None:
    wrong = seen(engine, picture(64, 64, 8)).digest

    def see(image: Image) -> np.ndarray:
        if image.digest == wrong:
            raise MemoryError("no room for the scores")
        return engine.backend.see(image)

    frail = dataclasses.replace(engine)
    frail.__dict__["sight"] = sight.Sight(see)
    options = Options(max_new_tokens=8, prefill_chunk=512 if passes == 1 else 8)
    text = "" if passes == 1 else "x" * 100  # of some passes before its image
    bad = prepare(frail, [{"role": "system", "content": text}, *asked(picture(64, 64, 8))], options)
    good = prepare(frail, asked(picture(64, 64, 9)), options)
    alone = nemodiff.generate(engine, asked(picture(64, 64, 9)), max_new_tokens=8).token_ids
    batch = Batch(engine.backend, 2, kept=2)
    batch.add(bad)
    batch.add(good)
    errors = dict[Sequence, Exception]()
    while len(batch):
        errors |= {result.sequence: result.error for result in batch.step() if result.error is not None}
    batch.close()
    assert list(errors) == [bad]
    assert isinstance(errors[bad], EngineError)
    assert "could not look at an image of 73 tokens (no room for the scores); send a smaller one" in str(errors[bad])
    assert good.tokens == alone


@pytest.mark.torch
def test_an_image_that_cannot_be_seen_again_fails_its_own_request(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose pages an older one has taken is computed again, and others' images have driven its own out."""
    folder = Builder(checkpoint, tmp_path / "torch", backend="torch", dtype="f32").run()
    loaded = nemodiff.load(folder, device="cpu")
    prompts = [[{"role": "system", "content": "x" * 30}, *asked(picture(64, 64, seed))] for seed in (9, 8)]
    alone = [nemodiff.generate(loaded, one, mode="ar", max_new_tokens=12).token_ids for one in prompts]
    monkeypatch.setattr(sight, "KEPT_BYTES", 1)
    looks = list[bytes]()
    scarce = dataclasses.replace(loaded, backend=TorchEngine(folder, loaded.info, "cpu", pages=4))

    def see(image: Image) -> np.ndarray:
        looks.append(image.digest)
        if looks.count(image.digest) == 2:
            raise MemoryError("no room for the scores")
        return loaded.backend.see(image)

    scarce.__dict__["sight"] = sight.Sight(see)
    good, bad, late = (prepare(scarce, prompts[n], Options(mode="ar", max_new_tokens=12)) for n in (0, 1, 1))
    assert len(good.prompt) < 2 * PAGE < len(good.prompt) + 11
    batch = Batch(scarce.backend, 2, kept=2)
    batch.add(good)
    batch.add(bad)
    errors = dict[Sequence, Exception]()
    while len(batch):
        errors |= {result.sequence: result.error for result in batch.step() if result.error is not None}
        if batch.counts.preempted and len(looks) == 2:
            scarce.sight(seen(loaded, picture(16, 16)))
    assert batch.counts.preempted == 1
    batch.add(late)
    while len(batch):
        list(batch.step())
    batch.close()
    assert list(errors) == [bad]
    assert isinstance(errors[bad], EngineError)
    assert "could not look at an image of 73 tokens (no room for the scores)" in str(errors[bad])
    assert good.tokens == alone[0]
    assert alone[1][: len(bad.tokens)] == bad.tokens
    assert late.tokens == alone[1]  # by K/V of its own: what has been computed without the image is not kept


def test_text_alone_needs_no_image(checkpoint: Path, engine: LoadedEngine) -> None:
    sequence = prepare(engine, "Hello", Options())
    answer = nemodiff.generate(engine, "Hello", mode="linear_spec", max_new_tokens=16)
    model = ReferenceModel.load(checkpoint)
    assert answer.token_ids == list(reference.ar(model, sequence.prompt, 16, model.eos).tokens)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert prepare(engine, parts, Options()).prompt == sequence.prompt


def test_every_way_to_give_an_image_is_the_same(engine: LoadedEngine, tmp_path: Path) -> None:
    source = picture(20, 12)
    data = as_bytes(source)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    keys = [prepare(engine, asked(one), Options()).keys for one in (source, data, path, str(path))]
    for value in ({"url": url}, url):
        message = [{"role": "user", "content": [{"type": "image_url", "image_url": value}, asked()[0]["content"][0]]}]
        keys.append(prepare(engine, message, Options()).keys)
    assert all(one == keys[0] for one in keys)


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
    ],
)
def test_files_of_every_kind(form: str, mode: str, options: dict[str, Any]) -> None:
    colour = Pillow.new("RGBA", (6, 4), (200, 30, 90, 255))
    source = colour.convert("RGB").convert(mode) if mode != "RGBA" else colour
    pixels = decode(as_bytes(source, form, **options))
    assert pixels.shape == (4, 6, 3)
    expected = np.asarray(source.convert("RGB"))
    np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=6 if form == "JPEG" else 0)


def test_what_shines_through_is_white() -> None:
    clear = as_bytes(Pillow.new("RGBA", (3, 3), (0, 0, 0, 0)))
    np.testing.assert_array_equal(decode(clear), np.full((3, 3, 3), 255))
    palette = Pillow.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    np.testing.assert_array_equal(decode(as_bytes(palette, transparency=0)), np.full((2, 2, 3), 255))


def test_of_an_animation_the_first_picture_is_seen_and_orientation_is_not_applied() -> None:
    frames = [Pillow.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data)[0, 0], [255, 0, 0])
    exif = Pillow.Exif()
    exif[0x0112] = 6
    turned = as_bytes(Pillow.new("RGB", (56, 28)), "JPEG", exif=exif.tobytes())
    assert decode(turned).shape == (28, 56, 3)


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    grey = Pillow.fromarray(np.full((2, 2), 0x8000, np.uint16))
    np.testing.assert_array_equal(decode(as_bytes(grey)), np.full((2, 2, 3), 128))


def hostile() -> list[tuple[str, bytes]]:
    png = as_bytes(picture(30, 30))
    bomb = bytearray(as_bytes(Pillow.new("1", (1, 1))))
    import struct
    import zlib

    header = struct.pack(">II", 100_000, 100_000) + bytes(bomb[24:29])
    bomb[16:29] = header
    bomb[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return [
        ("empty", b""),
        ("text", b"hello"),
        ("truncated", png[: len(png) // 2]),
        ("header", png[:20]),
        ("tiff", as_bytes(picture(4, 4), "TIFF")),
        ("bomb", bytes(bomb)),
        ("broken jpeg", as_bytes(picture(30, 30), "JPEG")[:60]),
        ("long", png + bytes(64 * 2**20)),
        ("scans", with_scans(200)),
    ]


def with_scans(count: int) -> bytes:
    """A progressive JPEG with that many scans more than its encoder has made."""
    data = as_bytes(Pillow.new("L", (600, 600), 77), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def test_a_jpeg_may_have_many_scans_and_what_looks_like_them() -> None:
    decode(with_scans(80))
    scans = b"\xff\xda" * 200
    plain = as_bytes(Pillow.new("L", (6, 6), 77), "JPEG", progressive=True, comment=scans)
    assert scans in plain  # as thumbnails are in a picture's head
    decode(plain + scans)  # and a film behind it
    decode(as_bytes(picture(6, 6)) + b"\xff\xda\0\2" * 200)  # or behind what is no JPEG


@pytest.mark.parametrize(("name", "data"), hostile(), ids=[name for name, _ in hostile()])
def test_broken_and_hostile_files_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode(data, "image 1")
    line = str(caught.value)
    assert line.startswith("image 1: ")
    assert "allowed" in line
    assert line.isprintable()
    if name == "bomb":
        assert "67,108,864" in line


def test_files_with_wrong_bytes_are_pictures_or_refused() -> None:
    rng = random.Random(1)
    animation = {"save_all": True, "append_images": [picture(20, 20, 2)]}
    files = [as_bytes(picture(30, 30), form) for form in ("PNG", "JPEG", "WEBP", "GIF")]
    files += [as_bytes(picture(30, 30, mode="CMYK"), "JPEG"), as_bytes(picture(20, 20), "GIF", **animation)]
    decoded = 0
    lines = []
    for _ in range(600):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(len(data))
            if rng.random() < 0.2:
                del data[at + 1 :]
            data[at] = rng.randrange(256)
        try:
            decoded += decode(bytes(data), "image 1").ndim == 3
        except RequestError as error:
            lines.append(str(error))
    assert all(line.startswith("image 1: ") and line.isprintable() for line in lines)
    assert 50 < decoded < 550


def test_extreme_shapes(engine: LoadedEngine) -> None:
    for size in ((1, 1), (20_000, 1), (1, 20_000)):
        answer = nemodiff.generate(engine, asked(Pillow.new("RGB", size)), max_new_tokens=2)
        assert len(answer.token_ids) == 2


def test_a_strip_of_millions_of_pixels_takes_little_memory(engine: LoadedEngine) -> None:
    vision = engine.info.model.vision
    assert vision is not None
    for shape in ((3_000_000, 1, 3), (1, 3_000_000, 3)):
        pixels = np.zeros(shape, np.uint8)
        tracemalloc.start()
        make_image(pixels, vision, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * 2**20


def test_no_more_images_are_decoded_than_a_prompt_can_hold(tmp_path: Path, checkpoint: Path) -> None:
    short = nemodiff.load(Builder(checkpoint, tmp_path / "engine", max_seq_len=100).run())
    with pytest.raises(RequestError, match="image 2 brings the prompt to 146 tokens"):
        prepare(short, asked(picture(64, 64), picture(64, 64), "never looked at"), Options())


def test_no_more_pixels_are_decoded_than_a_prompt_may_have(
    engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_parts, "MOST_PIXELS", 2 * 20_000)
    strip = picture(20_000, 1)
    assert prepare(engine, asked(strip, strip), Options()).images is not None
    with pytest.raises(RequestError, match="image 3 brings the prompt to 40,001 pixels"):
        prepare(engine, asked(strip, strip, picture(1, 1), "never looked at"), Options())


def test_a_picture_of_another_class_is_one(engine: LoadedEngine) -> None:
    class Photo(Pillow.Image):
        pass

    photo = Photo()
    photo.im, photo._mode, photo._size = (source := picture(24, 16)).im, source.mode, source.size
    one, other = (prepare(engine, asked(image), Options()) for image in (photo, source))
    assert one.keys == other.keys


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ([{"type": "image", "image": "/nowhere.png"}], "/nowhere.png: cannot be read"),
        ([{"type": "image", "image": "https://nowhere/a.png"}], "https://nowhere/a.png: cannot be read"),
        ([{"type": "image", "image": 3}], "image 1 is 3"),
        ([{"type": "image", "image": ImageDraw.Draw(picture(4, 4))}], "image 1 is <PIL"),
        ([{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}], "allowed: data:image"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}}], "no base64"),
        ([{"type": "image_url"}], "the URL is None"),
        ([{"type": "audio"}], "a part of a message"),
        ([3], "a part of a message"),
    ],
)
def test_malformed_parts_are_refused(engine: LoadedEngine, content: Any, fragment: str) -> None:
    with pytest.raises(RequestError, match=r"; give|allowed") as caught:
        prepare(engine, [{"role": "user", "content": content}], Options())
    assert fragment in str(caught.value)


def test_an_image_is_refused_where_it_cannot_be_seen(engine: LoadedEngine, tiny_engine: Path) -> None:
    for loaded, message, options, fragment in (
        (nemodiff.load(tiny_engine), asked(picture(4, 4)), Options(), "cannot see"),
        (engine, asked(picture(4, 4)), Options(chat=False), "leave out --raw"),
        (engine, [{**asked(picture(4, 4))[0], "role": "assistant"}], Options(), "allowed: user and tool"),
    ):
        with pytest.raises(RequestError, match=fragment):
            prepare(loaded, message, options)


def test_images_of_tools_stand_before_what_the_user_says_next(engine: LoadedEngine) -> None:
    first, second = ({"type": "image", "image": picture(8, 8, seed)} for seed in (1, 2))
    text = {"type": "text", "text": "found"}
    user, assistant = {"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}
    tool = {"role": "tool", "content": "found"}
    for given, meant in (
        (
            [user, {"role": "tool", "content": [text, first]}, {"role": "tool", "content": [second]}],
            [user, tool, {"role": "tool", "content": ""}, {"role": "user", "content": [first, second]}],
        ),
        (
            [{"role": "tool", "content": [first, text]}, {"role": "user", "content": [second, text]}],
            [tool, {"role": "user", "content": [first, second, text]}],
        ),
        (
            [{"role": "tool", "content": [first, text]}, user],
            [tool, {"role": "user", "content": [first, {"type": "text", "text": "Look."}]}],
        ),
        (
            [{"role": "tool", "content": [text, first]}, assistant, user],
            [tool, {"role": "user", "content": [first]}, assistant, user],
        ),
    ):
        one, other = (prepare(engine, messages, Options()).keys for messages in (given, meant))
        assert one == other


def test_what_a_text_spells_is_no_image(engine: LoadedEngine) -> None:
    sequence = prepare(engine, asked(picture(4, 4), text="<|image_start|><|image_pad|>"), Options())
    assert sequence.prompt.count(18) == sequence.prompt.count(19) == 1


def test_the_plan_tells_what_an_image_takes(checkpoint: Path, tmp_path: Path) -> None:
    builder = Builder(checkpoint, tmp_path / "engine", max_image_size=32)
    (line,) = [line for line in builder.plan().lines("x", tmp_path) if line.startswith("images")]
    assert "up to 21 tokens" in line
    assert builder.plan().vision_parameters == sum(
        tensor.array().size for name, tensor in builder.tensors.items() if "vision_tower" in name or "projector" in name
    )
    engine = nemodiff.load(builder.run())
    assert len(prepare(engine, asked(picture(64, 64)), Options()).images or ()) == 1
    assert seen(engine, picture(64, 64)).rows == 4
    (line,) = [line for line in output_of("inspect", str(builder.output)).splitlines() if line.startswith("images")]
    assert line.endswith("up to 32 pixels a side, 21 tokens")


def test_the_plan_tells_of_images_that_no_row_holds(checkpoint: Path, tmp_path: Path) -> None:
    for length, told in ((74, 0), (73, 1)):
        plan = Builder(checkpoint, tmp_path / "engine", max_seq_len=length).plan()
        notes = [note for note in plan.notes if "does not fit in rows" in note]
        assert len(notes) == told
    assert notes[0].startswith("an image of 64 x 64 pixels or larger, 73 tokens, does not fit in rows of 73")


def test_f16_sees_nearly_the_same(checkpoint: Path, engine: LoadedEngine, tmp_path: Path) -> None:
    small = nemodiff.load(Builder(checkpoint, tmp_path / "engine", dtype="f16").run())
    image = seen(engine, picture(20, 20))
    np.testing.assert_allclose(small.backend.see(image), engine.backend.see(image), rtol=0.05, atol=0.5)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"vision_config": None}, "vision_config is None"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": True}, "multimodal_projector_bias is True"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({"spatial_merge_size": 0}, "spatial_merge_size is 0"),
        ({"spatial_merge_size": 3}, "has shape"),
        ({"vision_config": VISION | {"rope_parameters": {"rope_theta": 5.0}}}, "allowed: the 10000 of rope_theta"),
        ({"vision_config": VISION | {"rope_parameters": {"factor": 4.0}}}, "factor is 4.0"),
        ({"vision_config": VISION | {"rope_parameters": {"type": "yarn"}}}, "rope_type is 'yarn'"),
        ({"vision_config": VISION | {"rope_parameters": 5}}, "rope_parameters is 5, allowed: an object"),
        (
            {"vision_config": VISION | {"num_attention_heads": 3}},
            "head_dim is 12, allowed: hidden_size / num_attention",
        ),
        (
            {"vision_config": VISION | {"num_attention_heads": 4, "head_dim": 6}},
            "head_dim is 6, allowed: a multiple of 4",
        ),
        ({"vision_config": VISION | {"image_size": 7}}, "image_size is 7, allowed: 8 (one token) or more"),
        ({"vision_config": VISION | {"window": 8}}, "window is 8, allowed: no such field of a Pixtral tower"),
        ({"architectures": ["NemotronLabsDiffusionModel"]}, "model_type"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    folder = write_vision_checkpoint(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        Builder(folder, tmp_path / "engine")
    assert fragment in str(caught.value)


def test_what_a_config_leaves_out_or_spells_otherwise() -> None:
    def parsed(**changes: Any) -> VisionConfig:
        return parse_vision(Fields("config.json", FLAT | {"vision_config": VISION | changes}))

    plain = parsed()
    own = {
        name: VISION[name] for name in VISION if name not in ("head_dim", "rope_theta", "model_type", "num_channels")
    }
    given = {name: {"vision_config": own | {"model_type": "pixtral"} | more} for name, more in {
        "nothing": {"_name_or_path": "x"},
        "as transformers": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}},
        "older": {"rope_scaling": {"type": "default", "factor": None}, "rope_theta": None},
    }.items()}  # fmt: skip
    for name, changes in given.items():
        assert parse_vision(Fields("config.json", FLAT | changes)) == plain, name
    assert parsed(rope_theta=None, rope_parameters={"rope_theta": 5.0}).rope_theta == 5.0
    assert parsed(rope_theta=5.0, rope_parameters={"rope_theta": 5.0}).rope_theta == 5.0
    sizes = {size: parsed(image_size=size).default_max_image_size for size in (8, 15, 64, 1407, 1408, 9999)}
    assert sizes == {8: 8, 15: 8, 64: 64, 1407: 1400, 1408: 1400, 9999: 1400}
    assert parsed(patch_size=1000, image_size=2000).default_max_image_size == 2000  # a token at least


def test_tensors_and_tokens_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    lost = "encoder.multi_modal_projector.linear_2.weight"
    save_file({name: one for name, one in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=lost):
        Builder(folder, tmp_path / "engine")
    text = (folder / "tokenizer.json").read_text("utf-8").replace("<|image_break|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match="image_break"):
        Builder(folder, tmp_path / "engine")


def test_another_image_token_in_the_config_is_told(tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path / "checkpoint", image_token_index=10)
    (note,) = [note for note in Builder(folder, tmp_path / "engine").plan().notes if "image" in note]
    assert "image_token_index 10" in note
    assert "the tokenizer decides" in note


def test_what_no_engine_or_twin_has_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="sees images"):
        Exporter(checkpoint, tmp_path / "twin")
    with pytest.raises(BuildError, match="multiples of 8"):
        Builder(checkpoint, tmp_path / "engine", max_image_size=30)
