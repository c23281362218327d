"""The adapters of tencent-ailab/IP-Adapter as published: their projections, and attention with the image's tokens.

Written anew after resampler.py, ip_adapter.py, ip_adapter_faceid.py and attention_processor_faceid.py there; weights
have the names of the published files.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

HEAD, RANK = 64, 4


class Perceiver(nn.Module):
    """Latents (B, Q, D) attend to a photo's tokens (B, T, D) and to themselves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, HEAD * heads, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEAD * heads, bias=False)
        self.to_out = nn.Linear(HEAD * heads, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        key, value = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (each.unflatten(2, (self.heads, HEAD)).transpose(1, 2) for each in (self.to_q(latents), key, value))
        weights = (q @ k.transpose(2, 3) / HEAD**0.5).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Of Plus, where `queries` are given; of FaceID Plus the latents come from the face."""

    def __init__(self, width: int, dim: int, out: int, heads: int, queries: int | None = None) -> None:
        super().__init__()
        if queries is not None:
            self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(width, dim), nn.Linear(dim, out), nn.LayerNorm(out)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Perceiver(dim, heads),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, 4 * dim, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * dim, dim, bias=False),
                    ),
                ]
            )
            for _ in range(4)
        )

    def forward(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        x, z = self.proj_in(x), self.latents.expand(len(x), -1, -1) if latents is None else latents
        for attend, forward in self.layers:  # type: ignore[misc]
            z = attend(x, z) + z
            z = forward(z) + z
        return self.norm_out(self.proj_out(z))


class FullFace(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, context), nn.LayerNorm(context))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class FaceID(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 4 * context))
        self.norm, self.context = nn.LayerNorm(context), context

    def forward(self, face: Tensor) -> Tensor:
        return self.norm(self.proj(face).reshape(-1, 4, self.context))


class FaceIDPlus(FaceID):
    """Version 2, with the shortcut."""

    def __init__(self, width: int, tokens: int, context: int) -> None:
        super().__init__(width, context)
        self.perceiver_resampler = Resampler(tokens, context, context, max(context // HEAD, 1))

    def forward(self, face: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        own = super().forward(face)
        return own + self.perceiver_resampler(tokens, own)


def projection(layout: str, context: int, face: int, tokens: int) -> nn.Module:
    """The projection of a layout as published, at these widths."""
    if layout == "plus":
        return Resampler(tokens, min(context, 1280), context, max(min(context, 1280) // HEAD, 1), queries=16)
    if layout == "full_face":
        return FullFace(tokens, context)
    return FaceID(face, context) if layout == "faceid" else FaceIDPlus(face, tokens, context)


class Attention(nn.Module):
    """Attention with LoRA and, in cross-attention, K' and V' of the image's tokens, which are the last ones."""

    def __init__(self, weights: dict[str, Tensor], tokens: int) -> None:
        super().__init__()
        self.own = nn.ParameterDict({name.replace(".", "/"): value.clone() for name, value in weights.items()})
        self.tokens = tokens

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states[:, : -self.tokens]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def project(x: Tensor, layer: nn.Module, part: str) -> Tensor:
            down = f"to_{part}_lora/down/weight"
            if down not in self.own:
                return layer(x)
            return layer(x) + x @ self.own[down].T @ self.own[down.replace("down", "up")].T

        query = heads(project(hidden_states, attn.to_q, "q"))
        key, value = heads(project(text, attn.to_k, "k")), heads(project(text, attn.to_v, "v"))
        z = F.scaled_dot_product_attention(query, key, value)
        if encoder_hidden_states is not None:
            image = encoder_hidden_states[:, -self.tokens :]
            key, value = (heads(image @ self.own[f"to_{kv}_ip/weight"].T) for kv in "kv")
            z = z + F.scaled_dot_product_attention(query, key, value)
        return project(z.transpose(1, 2).flatten(2), attn.to_out[0], "out")


class Published(nn.Module):
    """UNet, projection and attention, as tutorial_train_plus.py and tutorial_train_faceid.py put them together."""

    def __init__(self, unet: UNet2DConditionModel, project: nn.Module, weights: dict[str, Tensor], tokens: int) -> None:
        super().__init__()
        self.unet, self.project = unet.requires_grad_(False), project
        processors = dict(unet.attn_processors)
        for number, name in enumerate(processors):
            own = {k.removeprefix(f"{number}."): v for k, v in weights.items() if k.startswith(f"{number}.")}
            processors[name] = Attention(own, tokens) if own else processors[name]
        unet.set_attn_processor(dict(processors))  # which empties what it is given
        self.processors = processors

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor, *photo: Tensor, added: Any = None) -> Tensor:
        states = torch.cat([text, self.project(*photo)], dim=1)
        return self.unet(noisy, t, states, added_cond_kwargs=added).sample

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the adapter by the names in its file."""
        found = {f"image_proj.{name}": p.grad for name, p in self.project.named_parameters()}
        for number, processor in enumerate(self.processors.values()):
            for name, p in getattr(processor, "own", {}).items():
                found[f"ip_adapter.{number}.{name.replace('/', '.')}"] = p.grad
        return found  # type: ignore[return-value]


def attention_weights(unet: UNet2DConditionModel, lora: bool) -> dict[str, Tensor]:
    """Random K' and V' of every cross-attention, and LoRA of all attention, by the names in a published file."""
    weights = {}
    for number, name in enumerate(unet.attn_processors):
        attn: Any = unet.get_submodule(name.removesuffix(".processor"))
        if not name.endswith("attn1.processor"):
            for kv in "kv":
                weights[f"{number}.to_{kv}_ip.weight"] = torch.randn_like(getattr(attn, f"to_{kv}").weight) / 5
        for part, layer in {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}.items():
            if lora:
                out, given = layer.weight.shape
                weights[f"{number}.to_{part}_lora.down.weight"] = torch.randn(RANK, given) / 5
                weights[f"{number}.to_{part}_lora.up.weight"] = torch.randn(out, RANK) / 5
    return weights
