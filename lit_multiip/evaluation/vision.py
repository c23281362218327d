"""CLIP-T, CLIP-I and DINO: networks of transformers that say how alike whole pictures are, and how they fit a prompt.

Likeness of whole pictures counts background, clothes and style as well as the face, so it is called `similarity_*` and
not `identity_*`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from lit_multiip.backbone.components import safe_config
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.files import LitMultiIPError, first_line


class _Transformer(Extractor):
    """A network of transformers with its own preprocessing."""

    can_identify = True
    likeness = "similarity"

    def __init__(self, model: str, name: str | None) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.network, self._processor = _load(AutoModel, model), _load(AutoImageProcessor, model)
        self.name, self.source = name or _name_of(model), model
        self.freeze()

    def shares_weights(self, file: Path) -> bool:
        """See `Extractor.shares_weights`: whether a CLIP image encoder starts with this one's weights."""
        return _have_same_weights(self.network, file)


class CLIP(_Transformer):
    """CLIP-T, the cosine of image and prompt, as `prompt`; CLIP-I, the cosine of two images, as `similarity_*`.

    Its image embeddings, not normalised, are the features of FID and KID. Cosines are plain: not clipped at zero and
    not multiplied by 100 or 2.5. Prompts are cut off where they are longer than the network reads.

    Args:
        model: folder or hub id of a model with `get_image_features` and `get_text_features`, such as a CLIP or SigLIP.
        name: part of every score's key; None takes the last part of `model`.
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14", name: str | None = None) -> None:
        super().__init__(model, name)
        from transformers import AutoTokenizer

        if not (hasattr(self.network, "get_image_features") and hasattr(self.network, "get_text_features")):
            kind = type(self.network).__name__
            raise LitMultiIPError(f"'{model}' is a {kind}, which has no embeddings of text: give a CLIP, or take DINO")
        self._tokenizer = _load(AutoTokenizer, model)
        self._text: dict[str, Tensor] = {}  # unit embeddings (E,) on the CPU; rows share their prompts
        embedding = self.compute(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).embedding
        self.num_features = None if embedding is None else embedding.shape[1]

    @torch.no_grad()
    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        pixels = _preprocess(self._processor, images)
        embeddings = _pooled_embeddings(self.network.get_image_features(pixel_values=pixels))  # (B, E)
        return Extraction(embeddings, embedding=embeddings)

    def prompt_agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIP-T: cosine of each image and its prompt, (B, 3, H, W) and B prompts -> (B,), in -1..1."""
        embedding = self.extract(images).embedding
        assert embedding is not None
        self._encode_prompts([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text], images.device)
        text = torch.stack([self._text[prompt] for prompt in prompts])  # (B, E)
        return (embedding.cpu() * text).sum(dim=-1)

    def _encode_prompts(self, prompts: Sequence[str], device: torch.device) -> None:
        if not prompts:
            return
        length = min(self._tokenizer.model_max_length, self.network.config.text_config.max_position_embeddings)
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = self._tokenizer(list(prompts), return_tensors="pt", **options).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            embeddings = _pooled_embeddings(self.network.get_text_features(**tokens)).float()
        self._text |= dict(zip(prompts, F.normalize(embeddings, dim=-1).cpu(), strict=True))


class DINO(_Transformer):
    """DINO's likeness of pictures as `similarity_*`: the cosine of the last layer's class tokens.

    The class tokens, not normalised, are the features of FID and KID. Any vision transformer with a class token goes.

    Args:
        model: folder or hub id. DreamBooth's DINO metric is that of `facebook/dino-vits16`.
        name: part of every score's key; None takes the last part of `model`.
    """

    def __init__(self, model: str = "facebook/dino-vits16", name: str | None = None) -> None:
        super().__init__(model, name)
        self.num_features = int(self.network.config.hidden_size)

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        hidden = self.network(pixel_values=_preprocess(self._processor, images)).last_hidden_state  # (B, T, D)
        return Extraction(hidden[:, 0], embedding=hidden[:, 0])


def _load(auto: Any, model: str) -> Any:
    """A component of a model; weights come from safetensors alone, in float32, and no code of the model's is run."""
    folder = Path(model).expanduser()
    place = str(folder) if folder.is_dir() else model
    weights: dict[str, Any] = {}
    try:
        if auto.__name__ == "AutoModel":
            weights = {"use_safetensors": True, "dtype": torch.float32, "config": safe_config(place)}
        return auto.from_pretrained(place, **weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(
            f"'{model}' cannot be loaded ({first_line(error)}): give a folder that save_pretrained wrote, with "
            "safetensors and preprocessor_config.json, or a hub id that can be reached"
        ) from error


def _preprocess(processor: Any, images: Tensor) -> Tensor:
    """What a model's own preprocessing makes of images, uint8 (B, 3, H, W) => (B, 3, S, S)."""
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3), which every processor takes
    values: Tensor = processor(images=list(pixels), input_data_format="channels_last", return_tensors="pt")[
        "pixel_values"
    ]
    return values.to(images.device, torch.float32)


def _pooled_embeddings(output: Any) -> Tensor:
    """Embeddings (B, E), which transformers returns bare before version 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _have_same_weights(network: torch.nn.Module, file: Path) -> bool:
    """Whether a safetensors file has the network's patch embedding: what differs by training differs there first."""
    state = network.state_dict()
    mine = [value for name, value in state.items() if "patch_embedding" in name and value.ndim == 4]
    with safe_open(file, "pt") as other:
        for name in other.keys():  # noqa: SIM118 (it is no mapping)
            if "patch_embedding" not in name:
                continue
            theirs = other.get_tensor(name).float()
            for value in mine:
                if value.shape == theirs.shape and torch.allclose(value.cpu(), theirs, rtol=2**-7, atol=1e-6):
                    return True
    return False


def _name_of(model: str) -> str:
    return re.sub(r"[^\w.-]", "_", Path(model).expanduser().name)
