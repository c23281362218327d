"""Aggregators G: from the embeddings of one person's photos to the embeddings the IP-Adapter sees.

Every `G` maps `(B, N, D) -> (B, M, D)`; each of the M vectors becomes four image tokens. The order of the photos
never matters: what is pooled is invariant, and what keeps a row per photo permutes its rows with the photos (which
cross-attention, being permutation-invariant itself, does not see). `First` alone reads the order it is given.

Where an adapter takes T patch tokens of a photo, `G` maps `(B, N, T, D) -> (B, M, T, D)` before the adapter's
resampler: each of the T places by itself, but `SelfAttention`, which attends over all N T tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_multiip.backbone.layouts import join_rows, split_rows
from lit_multiip.files import LitMultiIPError


class Aggregator(nn.Module, ABC):
    """Base of all aggregators: checks the input, then leaves the work to `aggregate`.

    Args:
        dim: width D of an image embedding, read from the image encoder's weights.

    Raises:
        ValueError: `dim` is not positive.
    """

    weights_are: str | None = None  # what `photo_weights` are, such as "attention"
    counts_repeats: bool = True  # whether a photo that is given twice counts twice

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise LitMultiIPError(
                f"an embedding has at least one dimension, got dim={dim}: pass the image encoder's width"
            )
        self.dim = dim

    def forward(self, embeds: Tensor) -> Tensor:
        """Aggregate one person's photo embeddings.

        Args:
            embeds: image embeddings, (B, N, D), N >= 1, or patch tokens, (B, N, T, D). What stands for no photo, in
                dropped or negative conditions, takes its place AFTER aggregation.

        Returns:
            (B, M, D) or (B, M, T, D); M is 1 for First and what pools, and N for Concat and SelfAttention.

        Raises:
            ValueError: `embeds` is not of such a shape with this aggregator's D, or N is 0.
        """
        self._check(embeds)
        return self.aggregate(embeds) if embeds.ndim == 3 else self.aggregate_tokens(embeds)

    def photo_weights(self, embeds: Tensor) -> Tensor | None:
        """How much each photo gets to say, where that can be read off; for inspection.

        Args:
            embeds: image embeddings, (B, N, D), or patch tokens, (B, N, T, D), of whose places it is the mean.

        Returns:
            (B, N), rows of at least 0 that sum to one; None where `weights_are` is.
        """
        if self.weights_are is None:
            return None
        self._check(embeds)
        return self.weigh(embeds) if embeds.ndim == 3 else _places(embeds, self.weigh).mean(dim=1)

    @abstractmethod
    def aggregate(self, embeds: Tensor) -> Tensor:
        """Map checked embeddings (B, N, D) to (B, M, D)."""

    def weigh(self, embeds: Tensor) -> Tensor:
        """Return the weights of checked embeddings, (B, N, D) -> (B, N), where `weights_are` says what they are."""
        raise NotImplementedError(f"{type(self).__name__}.weights_are says that photos have weights: give it `weigh`")

    def aggregate_tokens(self, tokens: Tensor) -> Tensor:
        """Map checked patch tokens (B, N, T, D) to (B, M, T, D): each of the T places by itself."""
        return _places(tokens, self.aggregate).transpose(1, 2)  # (B, T, M, D) => (B, M, T, D)

    @property
    def name(self) -> str:
        """Name in tables and checkpoints."""
        return type(self).__name__

    def _check(self, embeds: Tensor) -> None:
        name, shape = type(self).__name__, tuple(embeds.shape)
        if embeds.ndim not in (3, 4):
            raise LitMultiIPError(
                f"{name} takes embeddings of shape (B, N, D), got {shape}: add the missing dimensions"
            )
        if embeds.shape[-1] != self.dim:
            raise LitMultiIPError(
                f"{name} was built for embeddings of width {self.dim}, got width {embeds.shape[-1]}: "
                "use the image encoder it was built for"
            )
        if embeds.shape[1] == 0:
            raise LitMultiIPError(
                f"{name} got no photo, shape {shape}: pass at least one reference, or drop the condition"
            )

    def extra_repr(self) -> str:
        """Show the width in `print(module)`."""
        return f"dim={self.dim}"


def _places(tokens: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Call a function of embeddings (B, N, D) on each place of patch tokens, (B, N, T, D) => (B, T, ...)."""
    rows = function(tokens.transpose(1, 2).flatten(0, 1))  # (B T, ...)
    return rows.reshape(tokens.shape[0], tokens.shape[2], *rows.shape[1:])


class First(Aggregator):
    """The first photo as given, (B, N, D) -> (B, 1, D): the IP-Adapter as published, with one reference."""

    counts_repeats = False

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Take row 0."""
        return embeds[:, :1]  # (B, 1, D)


class MaxPool(Aggregator):
    """Element-wise maximum over the photos, (B, N, D) -> (B, 1, D)."""

    weights_are = "share of dimensions won"
    counts_repeats = False

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Take the maximum over N."""
        return embeds.amax(dim=1, keepdim=True)  # (B, 1, D)

    def weigh(self, embeds: Tensor) -> Tensor:
        """Share of the D dimensions in which a photo is the maximum; photos that tie divide a dimension."""
        wins = (embeds == embeds.amax(dim=1, keepdim=True)).float()  # (B, N, D)
        return (wins / wins.sum(dim=1, keepdim=True)).mean(dim=2)  # (B, N)


class AvgPool(Aggregator):
    """Mean over the photos, (B, N, D) -> (B, 1, D)."""

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Take the mean over N."""
        return embeds.mean(dim=1, keepdim=True)  # (B, 1, D)


class NormAvgPool(Aggregator):
    """Mean of the photos' directions at their mean norm, (B, N, D) -> (B, 1, D): a longer photo counts no more."""

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Average unit vectors, and give the result the mean norm of the photos."""
        norms = embeds.norm(dim=2, keepdim=True)  # (B, N, 1)
        direction = F.normalize(F.normalize(embeds, dim=2).mean(dim=1, keepdim=True), dim=2)  # (B, 1, D)
        pooled: Tensor = direction * norms.mean(dim=1, keepdim=True)  # (B, 1, D)
        return pooled


class WeightedSum(Aggregator):
    """Sum of the photos, weighted by how well each agrees with the others, (B, N, D) -> (B, 1, D).

    Weights are softmax_n(mean_m cos(x_n, x_m) / temperature): a photo of somebody else counts less.

    Args:
        dim: width D of an embedding.
        temperature: the smaller, the less odd photos count; large values give `AvgPool`.

    Raises:
        ValueError: `temperature` is not positive.
    """

    weights_are = "agreement with the others"

    def __init__(self, dim: int, temperature: float = 0.05) -> None:
        super().__init__(dim)
        _check_temperature(temperature)
        self.temperature = temperature

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Weigh and add."""
        return (self.weigh(embeds)[:, :, None] * embeds).sum(dim=1, keepdim=True)  # (B, 1, D)

    def weigh(self, embeds: Tensor) -> Tensor:
        """Return the weights, (B, N)."""
        return torch.softmax(_cosines(embeds).mean(dim=2) / self.temperature, dim=1)

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        return f"dim={self.dim}, temperature={self.temperature}"


class Concat(Aggregator):
    """Every photo brings its own tokens, (B, N, D) -> (B, N, D), as diffusers does with several photos.

    Args:
        dim: width D of an embedding.
        linear: return x W_v, which starts at W_v = I, in place of x: the control for what attention adds, since
            `SelfAttention` has this matrix too.
    """

    def __init__(self, dim: int, linear: bool = False) -> None:
        super().__init__(dim)
        self.to_v = nn.Linear(dim, dim, bias=False) if linear else None
        if self.to_v is not None:
            nn.init.eye_(self.to_v.weight)

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Return the embeddings as they are, or x W_v."""
        return embeds if self.to_v is None else self.to_v(embeds)  # (B, N, D)

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        return f"dim={self.dim}" + (", linear=True" if self.to_v is not None else "")


class SelfAttention(Aggregator):
    """Self-attention over the photos, Z = softmax(Q K^T / sqrt(d)) V, Q = x W_q, K = x W_k, V = x W_v (Algorithm 1).

    No biases, so zeros stay zeros. The paper does not say how it starts. Here W_k = I and W_q = s I, with s the
    `query_scale`, so that it starts as something known, with a gradient to leave it by:

    * default: W_v = I. Photo n's logits are s x_n . x_m / sqrt(d), largest for itself: at s = 1 a row is mostly its own
      photo (0.96 of it with the miniature's embeddings, of norm 14.5), so that, untrained, it is nearly `Concat`. At
      s = 0 every row is the mean of the photos, `AvgPool`, and has to learn to be told apart (W_q can: W_k is not 0).
    * `residual`: x + Z with W_v = 0. Untrained, it is `Concat`, whatever s. W_v moves with the first step, and with
      s = 0 W_q with the second.

    Args:
        dim: width D of an embedding.
        heads: number of heads; d = D / heads. The paper uses one.
        residual: add the input, x + Z.
        query_scale: s, before training.
        pool: `mean` averages the N rows into one embedding, 4 tokens (the other reading of section 3.5); `none` keeps
            the rows.
        attend: false takes Z = x W_v in place of softmax(Q K^T / sqrt(d)) V. No checkpoint records it, so a trained
            model can be drawn without its attention.

    Raises:
        ValueError: `heads` is not a positive divisor of `dim`, or `query_scale` is negative or not finite.
    """

    weights_are = "attention"

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        residual: bool = False,
        query_scale: float = 1.0,
        pool: Literal["none", "mean"] = "none",
        attend: bool = True,
    ) -> None:
        super().__init__(dim)
        if heads < 1 or dim % heads:
            raise LitMultiIPError(f"heads={heads} does not divide the embedding width {dim}: choose a divisor of {dim}")
        if not 0 <= query_scale < math.inf:
            raise LitMultiIPError(f"query_scale must be finite and at least 0, got {query_scale}")
        self.heads, self.residual, self.pool, self.attend = heads, residual, pool, attend
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.to_q.weight).mul_(query_scale)
        nn.init.eye_(self.to_k.weight)
        if residual:
            nn.init.zeros_(self.to_v.weight)
        else:
            nn.init.eye_(self.to_v.weight)

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Attend: row n of (B, N, D) is what photo n takes from all N; M = N rows, or their mean, M = 1."""
        return self._pool(self._rows(embeds))

    def aggregate_tokens(self, tokens: Tensor) -> Tensor:
        """Attend over all N T tokens, (B, N, T, D) => (B, M, T, D): a token takes from those of every photo."""
        return self._pool(self._rows(tokens.flatten(1, 2)).reshape_as(tokens))

    def _pool(self, rows: Tensor) -> Tensor:
        return rows.mean(dim=1, keepdim=True) if self.pool == "mean" else rows  # (B, M, ...)

    def _rows(self, embeds: Tensor) -> Tensor:
        mixed = self.to_v(embeds)  # (B, N, D)
        if self.attend:
            query, key, value = map(self._split, (self.to_q(embeds), self.to_k(embeds), mixed))  # (B, h, N, d)
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # (B, N, D)
        rows: Tensor = embeds + mixed if self.residual else mixed  # (B, N, D)
        return rows

    def attention_weights(self, embeds: Tensor) -> Tensor:
        """Weights softmax(Q K^T / sqrt(d)) for inspection.

        Args:
            embeds: image embeddings, (B, N, D), or patch tokens, (B, N, T, D).

        Returns:
            (B, heads, N, N); row n holds photo n's weights over all N and sums to one. Of patch tokens it is the mean
            over a photo's tokens of what they give to all tokens of each photo.
        """
        self._check(embeds)
        rows = embeds if embeds.ndim == 3 else embeds.flatten(1, 2)
        query, key = self._split(self.to_q(rows)), self._split(self.to_k(rows))  # (B, h, N, d)
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, h, N, N)
        weights = torch.softmax(logits, dim=-1)
        if embeds.ndim == 4:
            photos = embeds.shape[1:3]  # N, T
            weights = weights.reshape(*weights.shape[:2], *photos, *photos).sum(dim=5).mean(dim=3)  # (B, h, N, N)
        return weights

    def photo_weights(self, embeds: Tensor) -> Tensor:
        """Attention that each photo receives: the mean over heads and over the photos that attend."""
        return self.attention_weights(embeds).mean(dim=(1, 2))  # (B, h, N, N) => (B, N)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], self.heads, -1).transpose(1, 2)  # (B, N, D) -> (B, h, N, d)

    def extra_repr(self) -> str:
        """Show the options in `print(module)`."""
        pool = f", pool={self.pool}" if self.pool != "none" else ""
        return f"dim={self.dim}, heads={self.heads}, residual={self.residual}{pool}"


class AgreementGate(Aggregator):
    """A photo that does not agree with the others gives way to those that do, (B, N, D) -> (B, N, D).

    Z_n = (g_n x_n + (1 - g_n) sum_m w_m x_m) W_v, with w_n = softmax_n(mean_{m != n} cos(x_n, x_m) / temperature) and
    g_n = min(1, N w_n). The temperature and W_v, which starts at I, are trained. It is not in the paper: it is made for
    references among which are photos of other people.

    Args:
        dim: width D of an embedding.
        temperature: before training; the smaller, the less odd photos count. Large values give `Concat`.

    Raises:
        ValueError: `temperature` is not positive.
    """

    weights_are = "agreement with the others"

    def __init__(self, dim: int, temperature: float = 0.1) -> None:
        super().__init__(dim)
        _check_temperature(temperature)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.to_v = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.to_v.weight)

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Put the weighted mean in the place of what does not agree."""
        weights = self.weigh(embeds)[:, :, None]  # (B, N, 1)
        gate = (embeds.shape[1] * weights).clamp(max=1)  # (B, N, 1)
        mean = (weights * embeds).sum(dim=1, keepdim=True)  # (B, 1, D)
        rows: Tensor = self.to_v(gate * embeds + (1 - gate) * mean)  # (B, N, D)
        return rows

    def weigh(self, embeds: Tensor) -> Tensor:
        """Return the weights w, (B, N)."""
        cosines = _cosines(embeds)
        others = cosines.sum(dim=2) - cosines.diagonal(dim1=1, dim2=2)  # (B, N), without itself
        agreement = others / max(embeds.shape[1] - 1, 1)
        return torch.softmax(agreement / self.log_temperature.exp(), dim=1)


def _cosines(embeds: Tensor) -> Tensor:
    """Cosine of every two photos, (B, N, D) => (B, N, N)."""
    unit = F.normalize(embeds, dim=2)
    return unit @ unit.transpose(1, 2)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise LitMultiIPError(f"temperature={temperature} must be above 0: 0.05 to 0.1 is usual, 1 hardly weighs")


class OfKinds(Aggregator):
    """An aggregator for each kind of what conditions, where an adapter takes several: (B, N, E + T H) in one row.

    Args:
        parts: aggregators of one class, by kind.
        shapes: of a photo's features, by kind.
    """

    def __init__(self, parts: Mapping[str, Aggregator], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(sum(math.prod(shape) for shape in shapes.values()))
        self.parts, self.shapes = nn.ModuleDict(parts), dict(shapes)
        first = self._part(next(iter(shapes)))
        self.weights_are, self.counts_repeats = first.weights_are, first.counts_repeats

    def aggregate(self, embeds: Tensor) -> Tensor:
        """Aggregate each kind by itself, (B, N, E + T H) => (B, M, E + T H)."""
        return join_rows([self._part(kind)(value) for kind, value in split_rows(embeds, self.shapes).items()])

    def photo_weights(self, embeds: Tensor) -> Tensor | None:
        """Return the mean of the kinds' weights, (B, N)."""
        self._check(embeds)
        if self.weights_are is None:
            return None
        found = (self._part(kind).photo_weights(value) for kind, value in split_rows(embeds, self.shapes).items())
        return torch.stack([weights for weights in found if weights is not None]).mean(dim=0)

    @property
    def name(self) -> str:
        """Name of the parts."""
        return self._part(next(iter(self.shapes))).name

    def extra_repr(self) -> str:
        """Show the options of the parts in `print(module)`."""
        return "; ".join(f"{kind}: {part.extra_repr()}" for kind, part in self.parts.items())

    def _part(self, kind: str) -> Aggregator:
        part = self.parts[kind]
        assert isinstance(part, Aggregator)
        return part
