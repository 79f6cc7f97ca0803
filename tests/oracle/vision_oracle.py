"""transformers' Pixtral tower and Mistral-3 projector on a checkpoint's weights, the outside oracle of images."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig, PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector


def features(folder: Path, pixels: list[np.ndarray]) -> list[np.ndarray]:
    """The embeddings of images, each (tokens, E) f32; `pixels` are normalized, (3, height, width) f32.

    They go through the tower together, padded to one size, as the released processor makes a batch.
    """
    config = json.loads((folder / "config.json").read_text())
    vision = PixtralVisionConfig(**config["vision_config"])
    text = MistralConfig(hidden_size=config["hidden_size"], rms_norm_eps=config["rms_norm_eps"])
    whole = Mistral3Config(
        vision_config=vision,
        text_config=text,
        spatial_merge_size=config["spatial_merge_size"],
        projector_hidden_act=config["projector_hidden_act"],
        multimodal_projector_bias=config["multimodal_projector_bias"],
        vision_feature_layer=config["vision_feature_layer"],
    )
    tower, projector = PixtralVisionModel(vision).eval(), Mistral3MultiModalProjector(whole).eval()
    tensors = load_file(folder / "model.safetensors")
    for module, name in ((tower, "encoder.vision_tower."), (projector, "encoder.multi_modal_projector.")):
        state = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        module.load_state_dict({key: value.float() for key, value in state.items()})
    sizes = torch.tensor([image.shape[1:] for image in pixels])
    height, width = sizes.max(dim=0).values.tolist()
    padded = [np.pad(one, ((0, 0), (0, height - one.shape[1]), (0, width - one.shape[2]))) for one in pixels]
    with torch.no_grad():
        hidden = tower(torch.from_numpy(np.stack(padded)), image_sizes=sizes).last_hidden_state
        merged = projector(hidden.squeeze(0), sizes)
    cell = config["vision_config"]["patch_size"] * config["spatial_merge_size"]
    counts = [(h // cell) * (w // cell) for h, w in sizes.tolist()]
    return [one.numpy() for one in merged.split(counts)]
