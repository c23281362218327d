"""The frozen backbone: any diffusers Stable Diffusion folder or hub id, and what embeds photos for it.

A backbone is what diffusers calls a pipeline: unet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json,
plus image_encoder/ and, optionally, feature_extractor/ and ip_adapter/. All sizes come from the loaded weights.
Backbones that were published before their adapter have no image_encoder/: it is then named apart, by a folder or by
hub id and subfolder, such as `h94/IP-Adapter/models/image_encoder`; an adapter's file likewise.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_multiip.backbone.components import (
    COMPONENTS,
    TEXT_COMPONENTS,
    BackboneError,
    clip_processor,
    component_class,
    find_image_encoder,
    fingerprint_folder,
    fingerprint_hub,
    lacks,
    lists_component,
    not_fetched,
    read_component,
    read_image_encoder,
    read_index,
    resolve_backbone,
)
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.ip_adapter import read_layout
from lit_multiip.backbone.layouts import PLAIN, Layout, find_layout
from lit_multiip.data.record import Record, read_record
from lit_multiip.files import first_line, quiet_logger

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on.safetensors"  # in a backbone's folder: the record of the people whom it was trained on


class Backbone:
    """A frozen pipeline of Stable Diffusion's family, and the encoder of the photos that condition it.

    Constructing it reads nothing. One instance goes to the module and to the data, so that both mean the same. A family
    whose UNet, texts or latents differ overrides the methods that say how.

    Args:
        path: `mini` (the miniature in this package), a folder of a diffusers pipeline, or a hub id `org/name`.
        image_encoder: folder, or hub id and subfolder, of the CLIP vision model; None takes the backbone's own.
        published_adapter: file, or hub id and file, of the IP-Adapter; None takes that of the backbone's ip_adapter/.
        face_encoder: a face-recognition network that conditions in CLIP's place, or beside it.
        image_side: of the square images in px; None takes the side that the UNet was made for.
        layout: of the adapter: `plain`, `plus` (Plus-Face too), `full_face`, `faceid` or `faceid_plus_v2`; it says what
            is encoded of a photo. None recognises it by the published adapter's weights.
    """

    def __init__(
        self,
        path: str = "mini",
        image_encoder: str | None = None,
        published_adapter: str | None = None,
        face_encoder: FaceEncoder | None = None,
        image_side: int | None = None,
        layout: str | None = None,
    ) -> None:
        self._layout = None if layout is None else find_layout(layout)
        self.path, self.image_encoder, self.published_adapter = path, image_encoder, published_adapter
        self.face_encoder, self._image_side = face_encoder, image_side

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def fill(self, face_encoder: FaceEncoder | None, image_side: int, layout: str | None) -> Backbone:
        """Return a copy that has these where nothing was given; see the class for what they are."""
        filled = copy.copy(self)
        filled.__dict__.pop("layout", None)  # as it was found without them
        filled.face_encoder = self.face_encoder or face_encoder
        filled._image_side = self._image_side or image_side
        filled._layout = self._layout or (None if layout is None else find_layout(layout))
        return filled

    # ---- components -------------------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Path of the folder, or the hub id."""
        return resolve_backbone(self.path)

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """Load one component; modules come frozen and in eval mode.

        Args:
            name: one of `COMPONENTS`. Without feature_extractor/, CLIP's preprocessing at the image encoder's own side
                is returned, as diffusers does.
            dtype: of the weights.
        """
        if name not in COMPONENTS:
            raise BackboneError(f"a backbone has no component '{name}': choose one of {', '.join(COMPONENTS)}")
        if name == "feature_extractor" and not lists_component(self.place, name):
            return clip_processor(int(self._image_encoder_config(None).image_size))
        return read_component(self.place, name, dtype)

    def config(self, name: str) -> Mapping[str, Any]:
        """Read the configuration of a network, such as `unet` or `text_encoder`, without its weights."""
        try:
            if name.startswith("text_encoder"):
                return transformers.CLIPTextConfig.from_pretrained(self.place, subfolder=name).to_dict()
            config: Any = diffusers.UNet2DConditionModel.load_config(self.place, subfolder=name)
        except OSError as error:
            if not Path(self.place).is_dir():
                raise BackboneError(not_fetched(self.path, f"{name}/config.json", "path", error)) from error
            raise BackboneError(lacks(self.path, name)) from error
        return config

    def fingerprint(self, name: str) -> str:
        """Name a component by its content, for cache keys and checkpoints, 16 hexadecimal digits.

        A local component is named by its files (configuration and weights); one on the hub by its id and the commit
        in the local cache, or by the id alone where it cannot be fetched. A feature_extractor that the folder lacks is
        named after the image encoder, which then determines it.
        """
        if not Path(self.place).is_dir():
            return fingerprint_hub(self.place, "model_index.json", name)
        folder = Path(self.place, name)
        if name == "feature_extractor" and not folder.is_dir():
            return self.fingerprint("image_encoder")
        found = fingerprint_folder(folder)
        if found is None:
            raise BackboneError(lacks(self.path, name))
        return found

    def pipeline(self, **components: Any) -> Any:
        """Make the backbone's own kind of diffusers pipeline around some of its components; the others are None."""
        index, cls = read_index(self.place), self._pipeline_class()
        settings = {name: value for name, value in index.items() if not isinstance(value, (list, tuple))}
        settings |= {"requires_safety_checker": False, "add_watermarker": False}
        given = dict.fromkeys(index) | settings | components
        expected = inspect.signature(cls.__init__).parameters
        return cls(**{name: value for name, value in given.items() if name in expected})

    def _pipeline_class(self) -> Any:
        return component_class("diffusers", read_index(self.place).get("_class_name", ""), self.path)

    def trained_on(self) -> Record | None:
        """Read the record of the people whom the backbone was trained on; None where its folder has none."""
        file = Path(self.place, TRAINED_ON)
        if not file.is_file():
            return None
        try:
            return read_record(load_file(file))
        except (OSError, SafetensorError) as error:
            raise BackboneError(f"'{file}' cannot be read ({first_line(error)}): fetch the backbone again") from error

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @cached_property
    def _unet(self) -> Mapping[str, Any]:
        return self.config("unet")

    @cached_property
    def _vae(self) -> Mapping[str, Any]:
        return self.config("vae")

    @property
    def vae_scale(self) -> int:
        """How many px a latent spans."""
        return 2 ** (len(self._vae["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by to have unit variance."""
        return float(self._vae.get("scaling_factor", 0.18215))

    @property
    def image_side(self) -> int:
        """Side of the square images in px."""
        return self._image_side or int(self._unet["sample_size"]) * self.vae_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of an image's latent."""
        side = self.image_side // self.vae_scale
        return int(self._vae["latent_channels"]), side, side

    @property
    def takes_sizes(self) -> bool:
        """Whether the UNet takes, as SDXL's, a pooled text embedding and the photo's sizes besides the text."""
        return self._unet.get("addition_embed_type") == "text_time"

    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored features of a target or prompt, by their kind; see `features.py`."""
        channels, height, width = self.latent_shape
        tokens = int(self.config("text_encoder")["max_position_embeddings"])
        shapes: dict[str, tuple[int, ...]] = {
            "latent": (2 * channels, height, width),
            "text": (tokens, int(self._unet["cross_attention_dim"])),
        }
        if self.takes_sizes:
            shapes |= {"pooled": (int(self.config("text_encoder_2")["projection_dim"] or 0),), "frame": (4,)}
        return shapes

    # ---- texts ------------------------------------------------------------------------------------------------------

    @property
    def text_components(self) -> list[str]:
        """Names of the tokenizers and text encoders that the pipeline has: one pair, or SDXL's two."""
        index, expected = read_index(self.place), inspect.signature(self._pipeline_class().__init__).parameters
        return [name for name in TEXT_COMPONENTS if name in expected and (index.get(name) or [None])[0] is not None]

    def text_pipeline(self, dtype: torch.dtype = torch.float32) -> Any:
        """Load tokenizers and text encoders, frozen, in a pipeline of the backbone's kind, for `encode_prompts`."""
        return self.pipeline(**{name: self.load(name, dtype) for name in self.text_components})

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts by the pipeline's own `encode_prompt`; a prompt that is too long is cut, with a warning.

        Args:
            pipe: of `text_pipeline`.
            prompts: B of them.

        Returns:
            `prompt_embeds`, text states (B, L, E), and of SDXL `pooled_prompt_embeds` (B, P).
        """
        length = pipe.tokenizer.model_max_length
        cut = [prompt for prompt in prompts if len(pipe.tokenizer(prompt, verbose=False).input_ids) > length]
        if cut:
            logger.warning("%d prompts are cut to %d tokens, such as '%s'", len(cut), length, cut[0][:100])
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with quiet_logger("diffusers", logging.ERROR):  # one for each cut prompt
            states = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **options)
        return {"prompt_embeds": states[0]} | ({"pooled_prompt_embeds": states[2]} if len(states) == 4 else {})

    def sizes(self, frame: Tensor) -> dict[str, Tensor]:
        """Return the sizes of a photo that the UNet takes besides the text: `time_ids` (6,) of SDXL, else nothing.

        Args:
            frame: height and width of the photo's file, top and left of its square once the shorter side is the
                square's, as published, (4,).
        """
        return {"time_ids": torch.cat([frame, torch.full((2,), float(self.image_side))])} if self.takes_sizes else {}

    def predict(
        self, unet: Any, noised: Tensor, t: Tensor, text: Mapping[str, Tensor], image_embeds: Tensor | None = None
    ) -> Tensor:
        """Return the UNet's prediction, (B, C, h, w).

        Args:
            unet: the network, which may have an IP-Adapter.
            noised: latents at step t, (B, C, h, w).
            t: timesteps, (B,) int64.
            text: `prompt_embeds` (B, L, E), and of SDXL `pooled_prompt_embeds` (B, P) and `time_ids` (B, 6).
            image_embeds: aggregated embeddings, (B, M, D), where an IP-Adapter is installed.
        """
        added: dict[str, Any] = {} if image_embeds is None else {"image_embeds": [image_embeds]}
        if self.takes_sizes:
            added |= {"text_embeds": text["pooled_prompt_embeds"].to(unet.dtype), "time_ids": text["time_ids"]}
        states = text["prompt_embeds"].to(unet.dtype)
        return unet(noised.to(unet.dtype), t, encoder_hidden_states=states, added_cond_kwargs=added or None).sample

    # ---- photos that condition --------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> Layout:
        """Layout of the adapter, which says what of a photo conditions.

        Raises:
            BackboneError: it takes a face network that is not given, or none where one is.
        """
        layout = self._layout
        if layout is None:
            found = self._adapter_candidate()
            layout = PLAIN if found is None else read_layout(found)[0]
            if not self.uses_clip and "face" not in layout.kinds:
                layout = PLAIN  # no published adapter takes a face network's embeddings but FaceID's
        if layout is not PLAIN:
            layout.check_face(self.face_encoder)
        return layout

    def photo_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what conditions of one photo, by the layout's kinds: `embeds`, `tokens` and `face`."""
        return {kind: self._photo_shape(kind) for kind in self.layout.kinds}

    def _photo_shape(self, kind: str) -> tuple[int, ...]:
        if kind == "tokens":
            config = self._image_encoder_config(self.image_encoder)
            return (config.image_size // config.patch_size) ** 2 + 1, int(config.hidden_size)
        if kind == "face":
            assert self.face_encoder is not None  # `layout` checks it
            return (self.face_encoder.load().width,)
        return (self.embed_dim,)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each of the layout's kinds."""
        return tuple(shape[-1] for shape in self.photo_shapes().values())

    @property
    def uses_clip(self) -> bool:
        """Whether CLIP's image encoder has a part in the embedding of a photo."""
        return self.face_encoder is None or self.face_encoder.beside_clip

    @property
    def clip_dim(self) -> int:
        """Width of CLIP's embedding."""
        return int(self._image_encoder_config(self.image_encoder).projection_dim)

    @property
    def embed_dim(self) -> int:
        """Width D of a photo's embedding."""
        clip = self.clip_dim if self.uses_clip else 0
        return clip + (0 if self.face_encoder is None else self.face_encoder.load().width)

    def load_image_encoder(self, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        """Load CLIP's preprocessing and image encoder, frozen and in eval mode.

        An encoder that lies apart gets CLIP's preprocessing at its own side.
        """
        if self.image_encoder is None:
            return self.load("feature_extractor"), self.load("image_encoder", dtype)
        side = int(self._image_encoder_config(self.image_encoder).image_size)
        return clip_processor(side), read_image_encoder(self.image_encoder, dtype)

    def image_encoder_file(self) -> tuple[str, Path | None]:
        """Return the place of the image encoder, and its weights' file where that is on this disk."""
        root, subfolder = self._image_encoder_place(self.image_encoder)
        if Path(root).is_dir():
            return str(Path(root, subfolder)), Path(root, subfolder, "model.safetensors")
        found = try_to_load_from_cache(root, f"{subfolder}/model.safetensors".lstrip("/"))
        return f"{root}/{subfolder}".rstrip("/"), Path(found) if isinstance(found, str) else None

    def photo_encoder_name(self) -> str:
        """Return the names of the networks that embed photos."""
        clip = [self.image_encoder or f"that of {self.path}"] if self.uses_clip else []
        return " beside ".join([*([] if self.face_encoder is None else [self.face_encoder.path]), *clip])

    def fingerprint_photo_encoder(self) -> str:
        """Name all that makes the embedding of a photo by its content, 16 hexadecimal digits or more."""
        clip = self.fingerprint_image_encoder() if self.uses_clip else ""
        return clip + ("" if self.face_encoder is None else self.face_encoder.fingerprint())

    def fingerprint_image_encoder(self) -> str:
        """Name CLIP's image encoder and preprocessing by their content, 32 hexadecimal digits."""
        if self.image_encoder is None:
            return self.fingerprint("image_encoder") + self.fingerprint("feature_extractor")
        root, subfolder = find_image_encoder(self.image_encoder)
        if Path(root).is_dir():
            found = fingerprint_folder(Path(root))
            if found is None:
                raise BackboneError(f"image encoder '{self.image_encoder}' is an empty folder")
        else:
            found = fingerprint_hub(root, f"{subfolder}/config.json".lstrip("/"), subfolder)
        return 2 * found  # the encoder determines its preprocessing

    def adapter_file(self) -> str | None:
        """Return the published adapter, or the one .safetensors file in a local ip_adapter/; None if there is none.

        None, too, where it is of another layout than the backbone's, or takes no face network that stands in CLIP's
        place.
        """
        found = self._adapter_candidate()
        if found is None or (self._layout is None and self.face_encoder is None):
            return found
        return found if self.layout is read_layout(found)[0] and (self.uses_clip or self.layout.lora) else None

    def _adapter_candidate(self) -> str | None:
        if self.published_adapter is not None:
            return self.published_adapter
        found = sorted(Path(self.place, "ip_adapter").glob("*.safetensors"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise BackboneError(
                f"backbone '{self.path}' has several adapters in ip_adapter/ ({names}): name one by its path"
            )
        return str(found[0]) if found else None

    def _image_encoder_place(self, image_encoder: str | None) -> tuple[str, str]:
        return (self.place, "image_encoder") if image_encoder is None else find_image_encoder(image_encoder)

    def _image_encoder_config(self, image_encoder: str | None) -> Any:
        root, subfolder = self._image_encoder_place(image_encoder)
        try:
            values, _ = transformers.CLIPVisionConfig.get_config_dict(root, subfolder=subfolder)
            if "model_type" not in values:  # where there is no file, transformers has its defaults to offer
                raise OSError("there is no such file")
            return transformers.CLIPVisionConfig.from_pretrained(root, subfolder=subfolder)
        except (OSError, ValueError) as error:
            if not Path(root).is_dir():
                wanted = f"{subfolder}/config.json".lstrip("/")
                also = f"{lacks(self.path, 'image_encoder')}; else " if image_encoder is None else ""
                raise BackboneError(also + not_fetched(root, wanted, "image_encoder", error)) from error
            if image_encoder is None:
                raise BackboneError(lacks(self.path, "image_encoder")) from error
            raise BackboneError(
                f"image encoder '{image_encoder}' has no readable config.json ({first_line(error)}): give the folder "
                "of a CLIPVisionModelWithProjection"
            ) from error
