"""`nemodiff export`: the autoregressive twin of a checkpoint, as a plain Ministral-3 folder for other engines.

Only the headers of the weight files are written anew; the bytes after them are copied as they are, so shards, dtypes
and values stay the checkpoint's. The folder is put in place in one step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..contract import EXPORT_FORMATS, counted, size_text
from ..engine_folder import CONFIG_FILE, GENERATION_FILE, TWIN_FILE
from ..errors import BuildError
from ..version import __version__
from .checkpoint.carried_notes import regex_notes
from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .checkpoint.folder import ADAPTER_FOLDER, CARRIED_NAMES, INDEX, WEIGHTS, copy_carried, read_json
from .checkpoint.hub import Source, resolve
from .checkpoint.layout import match
from .checkpoint.safetensors_file import Tensor, copy_tensors
from .graph.graph import build_graph
from .resources import check_export_disk, disk_free
from .staging import Kind, check_target, staged
from .twin import twin_config, twin_dtype, twin_generation, twin_name

EXPORT = Kind("export", TWIN_FILE, frozenset({TWIN_FILE, CONFIG_FILE, WEIGHTS, INDEX, *CARRIED_NAMES}))


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """What an export will write; sizes in bytes."""

    tensors: int
    parameters: int
    dtype: str
    weight_bytes: int
    files: tuple[str, ...]
    disk_free: int
    adapter_rank: int
    unknown_fields: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self, checkpoint: str, output: Path) -> list[str]:
        """The plan for people."""
        count = counted(len(self.files), "file")
        weights = size_text(self.weight_bytes)
        unknown = ", ".join(self.unknown_fields)
        adapter = f"the drafter adapter of rank {self.adapter_rank}: the twin only decodes autoregressively"
        return [
            f"checkpoint   {checkpoint}: {counted(self.tensors, 'tensor')}, {weights}",
            f"twin         Ministral3ForCausalLM, {self.parameters:,} parameters, {self.dtype}",
            f"disk         {weights} to write under {output} in {count}, {size_text(self.disk_free)} free",
            *([f"left out     {adapter}"] if self.adapter_rank else []),
            *([f"ignored      unknown config fields: {unknown}"] if unknown else []),
            *(f"note         {note}" for note in self.notes),
        ]


class Exporter:
    """One export: opens and checks everything on construction; `plan()` and `run()` are the two things to do then.

    Args:
        checkpoint: folder or hub id `OWNER/NAME[@REVISION]`.
        output: the folder to write; an export already there is replaced.
        layout: `ministral3`, the only format so far.
        headers_only: of a hub id fetch no weights, which is enough for `plan()`.

    Raises:
        CheckpointError, BuildError: one line that says what to do.
    """

    def __init__(
        self, checkpoint: str | Path, output: str | Path, *, layout: str = "ministral3", headers_only: bool = False
    ) -> None:
        if layout not in EXPORT_FORMATS:
            raise BuildError(f"--format is {layout!r}, allowed: {', '.join(EXPORT_FORMATS)}; choose one of them")
        self.output = Path(output)
        self.layout = layout
        check_target(self.output, EXPORT)
        self.source: Source = resolve(str(checkpoint), headers_only=headers_only)
        self.checkpoint: Checkpoint = open_checkpoint(self.source.folder)
        if self.checkpoint.model.vision:
            raise BuildError(
                f"{self.source.folder / CONFIG_FILE}: the model sees images, which no Ministral-3 twin does; build an "
                "engine from it, or export one of the text models"
            )
        # The twin's tensors are the engine's, so the graph of an engine is the list of what must be there.
        graph = build_graph(self.checkpoint.model, "f32")
        plain = [tensor for tensor in self.checkpoint.tensors.values() if isinstance(tensor, Tensor)]
        if len(plain) < len(self.checkpoint.tensors):
            raise BuildError(
                f"{self.source.folder}: its projections are quantized, allowed: f32, f16 or bf16; export the "
                "checkpoint that it was made from"
            )
        match([graph], self.checkpoint.tensors, self.source.folder / CONFIG_FILE)
        self.shards: dict[str, list[Tensor]] = {}
        for tensor in sorted(plain, key=lambda t: (t.file.name, t.offset)):
            self.shards.setdefault(tensor.file.name, []).append(tensor)

    def plan(self) -> ExportPlan:
        """What the export will write; nothing is written."""
        model = self.checkpoint.model
        adapter = self.checkpoint.adapter
        return ExportPlan(
            tensors=len(self.checkpoint.tensors),
            parameters=model.parameters,
            dtype=twin_dtype(self.checkpoint),
            weight_bytes=sum(t.nbytes for t in self.checkpoint.tensors.values()),
            files=tuple(self.shards),
            disk_free=disk_free(self.output),
            adapter_rank=adapter.rank if adapter else 0,
            unknown_fields=model.unknown_fields,
            notes=(
                *self.checkpoint.notes,
                *regex_notes(self.checkpoint.folder, "it is copied as it is, so load it with fix_mistral_regex=True"),
            ),
        )

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> Path:
        """Write the folder and return its path; `advance` gets each number of weight bytes written."""
        if self.source.headers_only:
            raise BuildError(f"{self.source.name}: only headers were fetched; leave out headers_only to export")
        plan = self.plan()
        check_export_disk(self.output, plan.weight_bytes, plan.disk_free)
        with staged(self.output, EXPORT) as stage, self.checkpoint.reading():
            for name, tensors in self.shards.items():
                copy_tensors(tensors, twin_name, stage / name, advance)
            if list(self.shards) != [WEIGHTS]:
                _write(stage / INDEX, self._index(plan))
            self._write_small_files(stage)
            _write(stage / TWIN_FILE, self._origin(stage))
        return self.output

    def _index(self, plan: ExportPlan) -> dict[str, Any]:
        """Which of several weight files holds each tensor."""
        weight_map = {twin_name(tensor.name): name for name, tensors in self.shards.items() for tensor in tensors}
        total = {"total_size": plan.weight_bytes, "total_parameters": plan.parameters}
        return {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}

    def _write_small_files(self, stage: Path) -> None:
        """Write the configs, and copy what belongs to the tokenizer."""
        folder = self.source.folder
        copy_carried(folder, stage)
        generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {}
        _write(stage / GENERATION_FILE, twin_generation(self.checkpoint.model, generation))
        _write(stage / CONFIG_FILE, twin_config(self.checkpoint))

    def _origin(self, stage: Path) -> dict[str, Any]:
        """Where the twin comes from and which files are its own."""
        return {
            "format": self.layout,
            "checkpoint": {"name": self.source.name, "revision": self.source.revision},
            "left_out": [ADAPTER_FOLDER] if self.checkpoint.adapter else [],
            "versions": {"nemodiff": __version__},
            "files": {
                path.relative_to(stage).as_posix(): {"bytes": path.stat().st_size}
                for path in sorted(stage.rglob("*"))
                if path.is_file()
            },
        }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
