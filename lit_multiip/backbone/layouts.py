"""Layouts of IP-Adapter files: what each takes of a photo, its projection in diffusers, and its weights' names.

A layout is recognised by the weights of a file. A further one is a subclass of `Layout`, in this file or one of its
own, and a line in `LAYOUTS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.faces import FaceEncoder

HEAD = 64  # width of a head of attention; diffusers' loader knows no other
LORA_PARTS = ("q", "k", "v", "out")  # of an attention layer, as FaceID's files name them
# What a photo is to an adapter, by the kind of its features.
KINDS = {"embeds": "photo embeddings", "tokens": "patch tokens", "face": "face embeddings"}
_REMEDY = {
    "embeds": "set backbone.image_encoder to the one that it was trained with",
    "tokens": "set backbone.image_encoder to the one that it was trained with, for the published ones "
    "h94/IP-Adapter/models/image_encoder",
    "face": "set backbone.face_encoder.path to the network that it was trained with, for the published ones "
    "w600k_r50.onnx of insightface's buffalo_l",
}
Names = Sequence[tuple[str, str]]


class Layout(ABC):
    """How one kind of IP-Adapter is stored, and which of diffusers' projections it is."""

    name: ClassVar[str]  # as `backbone.layout` takes it
    title: ClassVar[str]  # as its authors call it
    kinds: ClassVar[tuple[str, ...]]  # of what it takes of a photo, see KINDS
    tokens: ClassVar[int | None]  # image tokens a photo; None: as many as it has patch tokens
    projection: ClassVar[str]  # class in diffusers.models.embeddings
    key: ClassVar[str]  # a weight of image_proj that no layout before it in LAYOUTS has
    names: ClassVar[Names]  # of the projection's weights: diffusers' => published, in order
    lora: ClassVar[bool] = False  # whether its file holds LoRA of all attention, trained with it

    @abstractmethod
    def widths(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the width of each of `kinds` that a projection's published weights take."""

    @abstractmethod
    def build(self, context: int, widths: Sequence[int], like: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Make diffusers' projection with fresh weights.

        Args:
            context: width of the UNet's text states.
            widths: of each of `kinds`.
            like: published weights, whose other sizes are taken; None takes those of the published adapters.
        """

    def publish_name(self, name: str) -> str:
        """Return the published name of a weight of diffusers' projection; see `join_kv`."""
        for ours, published in self.names:
            name = name.replace(ours, published)
        return name

    def prepare(self, projection: nn.Module) -> None:
        """Set what a projection does beside its weights."""
        return None

    def check_face(self, face: FaceEncoder | None) -> None:
        """Refuse a face network that the layout does not take, or the lack of one that it takes."""
        if "face" not in self.kinds:
            if face is not None:
                raise BackboneError(
                    f"{self.title} takes the patch tokens of CLIP alone: leave backbone.face_encoder out, or set "
                    "backbone.layout to faceid or faceid_plus_v2"
                )
        elif face is None or face.beside_clip != ("tokens" in self.kinds):
            beside = "true" if "tokens" in self.kinds else "false"
            raise BackboneError(
                f"{self.title} takes a face network's embedding: set backbone.face_encoder.path, and "
                f"backbone.face_encoder.beside_clip to {beside} (configs/with/{self.name}.yaml)"
            )

    def check_widths(self, weights: Mapping[str, Tensor], widths: Sequence[int], what: str) -> None:
        """Refuse a projection for another encoder of photos, which `what` names, with the remedy."""
        for kind, needs, given in zip(self.kinds, self.widths(weights), widths, strict=True):
            if needs != given:
                raise BackboneError(
                    f"{what} ({self.title}) takes {KINDS[kind]} of width {needs}, and this backbone's have {given}: "
                    f"{_REMEDY[kind]}"
                )


class Plain(Layout):
    """The IP-Adapter as first published: Linear and LayerNorm of one embedding."""

    name, title, projection = "plain", "IP-Adapter", "ImageProjection"
    kinds, tokens, key = ("embeds",), 4, "proj.weight"
    names = (("image_embeds", "proj"),)

    def widths(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """See `Layout.widths`; 0 where the Linear is missing."""
        return (weights["proj.weight"].shape[-1] if "proj.weight" in weights else 0,)

    def build(self, context: int, widths: Sequence[int], like: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See `Layout.build`."""
        from diffusers.models.embeddings import ImageProjection

        return ImageProjection(widths[0], context, num_image_text_embeds=4)


class FullFace(Layout):
    """Full Face: two Linears and a LayerNorm of every patch token."""

    name, title, projection = "full_face", "IP-Adapter Full Face", "IPAdapterFullImageProjection"
    kinds, tokens, key = ("tokens",), None, "proj.3.weight"
    names = (("ff.net.0.proj", "proj.0"), ("ff.net.2", "proj.2"), ("norm", "proj.3"))

    def widths(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """See `Layout.widths`."""
        return (_size(weights, "proj.0.weight", 1),)

    def build(self, context: int, widths: Sequence[int], like: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See `Layout.build`."""
        from diffusers.models.embeddings import IPAdapterFullImageProjection

        return IPAdapterFullImageProjection(widths[0], context)


_RESAMPLER: Names = (
    ("ln0", "0.norm1"),
    ("ln1", "0.norm2"),
    ("attn.to_out.0", "0.to_out"),
    ("attn.", "0."),
    ("ff.1.net.0.proj", "1.1"),
    ("ff.1.net.2", "1.3"),
    ("ff.0", "1.0"),
)


class FaceIDPlusV2(Layout):
    """FaceID Plus v2: 4 tokens of a face embedding, corrected by a resampler over the photo's patch tokens.

    Diffusers takes the patch tokens by the attribute `clip_embeds`. Here a photo is one row of both, (E + T H,), which
    `_split_rows` takes apart. Version 1 has the same weights without the shortcut, and cannot be told apart by them.
    """

    name, title = "faceid_plus_v2", "IP-Adapter FaceID Plus v2"
    projection = "IPAdapterFaceIDPlusImageProjection"
    kinds, tokens, key, lora = ("face", "tokens"), 4, "perceiver_resampler.proj_in.weight", True
    names = (("proj.net.0.proj", "proj.0"), ("proj.net.2", "proj.2"), *_RESAMPLER)

    def widths(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """See `Layout.widths`."""
        return _size(weights, "proj.0.weight", 1), _size(weights, "perceiver_resampler.proj_in.weight", 1)

    def build(self, context: int, widths: Sequence[int], like: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See `Layout.build`."""
        from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection

        return IPAdapterFaceIDPlusImageProjection(
            embed_dims=context,
            output_dims=context,
            hidden_dims=widths[1],
            id_embeddings_dim=widths[0],
            heads=max(context // HEAD, 1),
        )

    def publish_name(self, name: str) -> str:
        """See `Layout.publish_name`."""
        inside = name.startswith(("layers.", "proj_in.", "proj_out.", "norm_out."))
        return ("perceiver_resampler." if inside else "") + super().publish_name(name)

    def prepare(self, projection: nn.Module) -> None:
        """Add the face's own tokens to the result, which is what version 2 does."""
        projection.shortcut = True  # type: ignore[assignment]
        projection.register_forward_pre_hook(_split_rows)


def _split_rows(projection: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Take rows (K, E + T H) apart: patch tokens go where diffusers looks for them, face embeddings (K, E) go on."""
    face, tokens = inputs[0].tensor_split([projection.proj.net[0].proj.in_features], dim=1)
    projection.clip_embeds = tokens.unflatten(1, (-1, projection.proj_in.in_features))[None]  # (1, K, T, H)
    return (face,)


class FaceID(Layout):
    """FaceID: two Linears and a LayerNorm of a face embedding."""

    name, title, projection = "faceid", "IP-Adapter FaceID", "IPAdapterFaceIDImageProjection"
    kinds, tokens, key, lora = ("face",), 4, "proj.0.weight", True
    names = (("ff.net.0.proj", "proj.0"), ("ff.net.2", "proj.2"))

    def widths(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """See `Layout.widths`."""
        return (_size(weights, "proj.0.weight", 1),)

    def build(self, context: int, widths: Sequence[int], like: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See `Layout.build`."""
        from diffusers.models.embeddings import IPAdapterFaceIDImageProjection

        tokens = 4 if like is None else _size(like, "proj.2.weight", 0) // _size(like, "norm.weight", 0)
        return IPAdapterFaceIDImageProjection(widths[0], context, mult=2, num_tokens=tokens)


class Plus(Layout):
    """Plus and Plus-Face, whose photos are cut to the face: a resampler of the photo's patch tokens to 16 tokens."""

    name, title, projection = "plus", "IP-Adapter Plus", "IPAdapterPlusImageProjection"
    kinds, tokens, key = ("tokens",), 16, "latents"
    names = _RESAMPLER

    def widths(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """See `Layout.widths`."""
        return (_size(weights, "proj_in.weight", 1),)

    def build(self, context: int, widths: Sequence[int], like: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See `Layout.build`; the published resamplers are as wide as the text states, at most 1280 (SDXL)."""
        from diffusers.models.embeddings import IPAdapterPlusImageProjection

        hidden, queries = min(context, 1280), 16
        heads = max(hidden // HEAD, 1)
        if like is not None:
            queries, hidden = like["latents"].shape[1:]
            heads = _size(like, "layers.0.0.to_q.weight", 0) // HEAD
        return IPAdapterPlusImageProjection(
            embed_dims=widths[0], output_dims=context, hidden_dims=hidden, heads=heads, num_queries=queries
        )


# Recognised in this order.
LAYOUTS: tuple[Layout, ...] = (Plain(), FullFace(), FaceIDPlusV2(), FaceID(), Plus())
PLAIN = LAYOUTS[0]


def find_layout(name: str) -> Layout:
    """Return the layout of a name."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise BackboneError(f"backbone.layout is '{name}': choose one of {', '.join(layout.name for layout in LAYOUTS)}")


def recognise(weights: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a projection's published weights; `PLAIN` where no layout has such."""
    return next((layout for layout in LAYOUTS if layout.key in weights), PLAIN)


def layout_of(projection: nn.Module | None) -> Layout | None:
    """Return the layout of one of diffusers' projections."""
    return next((layout for layout in LAYOUTS if layout.projection == type(projection).__name__), None)


_K, _V, _KV = ".to_k.", ".to_v.", ".to_kv."  # in the names of a resampler's weights


def join_kv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join a resampler's K and V, which diffusers keeps apart, to the published `to_kv`; others stay as they are.

    Args:
        weights: of an adapter, of which `image_proj.*` are the projection's.
    """
    joined: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith("image_proj.") and _K in key:
            joined[key.replace(_K, _KV)] = torch.cat([value, weights[key.replace(_K, _V)]])
        elif not (key.startswith("image_proj.") and _V in key):
            joined[key] = value
    return joined


def split_kv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take a resampler's published `to_kv` apart; the inverse of `join_kv`."""
    parts: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith("image_proj.") and _KV in key:
            parts[key.replace(_KV, _K)], parts[key.replace(_KV, _V)] = value.chunk(2)
        else:
            parts[key] = value
    return parts


def check_sections(state: Any, what: str) -> None:
    """Refuse whatever holds no adapter's weights."""
    projection, attention = (
        state.get(name) if isinstance(state, Mapping) else None for name in ("image_proj", "ip_adapter")
    )
    if not isinstance(projection, Mapping) or not isinstance(attention, Mapping):
        raise BackboneError(f"{what} lacks the sections 'image_proj' and 'ip_adapter': give IP-Adapter weights")
    odd = [key for key, value in (*projection.items(), *attention.items()) if not isinstance(value, Tensor)]
    if odd:
        raise BackboneError(f"{what} has something other than a tensor under '{odd[0]}': give IP-Adapter weights")


def refuse_version_1(layout: Layout, name: str) -> None:
    """Refuse FaceID Plus of version 1, which only its published name tells apart from version 2."""
    if layout.name == "faceid_plus_v2" and "faceid-plus_" in name:
        raise BackboneError(
            f"IP-Adapter file '{name}' is FaceID Plus of version 1, which is drawn in another way: give version 2, "
            f"'{name.replace('faceid-plus_', 'faceid-plusv2_')}'"
        )


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Make one row a photo of its features of several kinds, (..., E + T H); of one kind it stays as it is."""
    if len(parts) == 1:
        return parts[0]
    rows = parts[0].ndim - 1  # dimensions before the features', by the first kind, whose features are vectors
    return torch.cat([part.flatten(rows) for part in parts], dim=rows)


def split_rows(rows: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Take rows of `join_rows` apart by kind; `shapes` are those of one photo's features."""
    if len(shapes) == 1:
        return dict.fromkeys(shapes, rows)
    parts = rows.split([math.prod(shape) for shape in shapes.values()], dim=-1)
    return {kind: part.unflatten(-1, shape) for (kind, shape), part in zip(shapes.items(), parts, strict=True)}


def _size(weights: Mapping[str, Tensor], key: str, dim: int) -> int:
    if key not in weights or weights[key].ndim <= dim:
        raise BackboneError(f"the adapter lacks the weight 'image_proj.{key}': fetch it again")
    return int(weights[key].shape[dim])
