"""MultiIPAdapter: a frozen diffusion UNet that learns to restore a photo of a person from other photos of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.encoders import PhotoEncoder
from lit_multiip.backbone.ip_adapter import (
    LORA_RANK,
    find_adapter_file,
    install_ip_adapter,
    ip_adapter_from_text,
    ip_adapter_parameters,
    read_adapter_record,
    read_ip_adapter,
    read_layout,
    require_lora,
)
from lit_multiip.backbone.layouts import PLAIN
from lit_multiip.backbone.lora import LORA_FILE, add_lora, lora_disabled, read_lora, require_peft
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.record import RECORD, read_record
from lit_multiip.files import hash_file
from lit_multiip.methods.aggregators import Aggregator, OfKinds, SelfAttention
from lit_multiip.methods.method import Batch, Method, References

VALIDATION_TIMES = (0.125, 0.375, 0.625, 0.875)  # t / T, the centres of four bins


class MultiIPAdapter(Method):
    """Trains the aggregator and the adapter: its projection, K', V', and FaceID's LoRA (eq. 1/17, section 3.5).

    Args:
        backbone: frozen; shared with the data.
        aggregator: G; gets the width of an embedding, or of a patch token.
        ip_adapter: `auto` (the backbone's published adapter, else its ip_adapter/, else `text`), `text` (from the text
            K and V), a file, or hub id and file, of the backbone's layout. An exported adapter brings its aggregator's
            weights too. Where the published adapter is of another layout, or a face network stands in CLIP's place,
            `auto` is `text`; with one beside CLIP, a plain adapter made for CLIP alone starts with zeros for the face.
        trained: `adapter`, or `aggregator` alone.
        lora_rank: of LoRA on all of the UNet's attention, trained with the adapter (needs peft); None adds none, but
            FaceID's, which is a part of the adapter and has its own rank, or 128.
        lr_schedule: a schedule of `diffusers.optimization.get_scheduler`, stepped every optimiser step.
        kwargs: of `Method`.
    """

    conditions: ClassVar[tuple[References, ...]] = ("right", "none", "zero", "other")
    must_agree: ClassVar[dict[str, str]] = {
        **Method.must_agree,
        "image_encoder_content": "set backbone.image_encoder and backbone.face_encoder to what it was trained with",
        "trained": "set model.trained likewise",
        "lora_rank": "set model.lora_rank likewise",
    }

    aggregator: Aggregator  # from `build` on

    def __init__(
        self,
        backbone: Backbone | None = None,
        aggregator: Callable[[int], Aggregator] = SelfAttention,
        ip_adapter: str = "auto",
        trained: Literal["adapter", "aggregator"] = "adapter",
        lora_rank: int | None = None,
        lr_schedule: str = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, lr_schedule=lr_schedule, **kwargs)
        require_peft(lora_rank)
        self.make_aggregator, self.ip_adapter, self.trained = aggregator, ip_adapter, trained
        self.lora_rank = lora_rank
        self.adapter_is_random = False  # made from the text K and V with a random projection, and not yet trained
        self._adapter_file: Path | None = None  # from which the adapter's weights were read

    # ---- building -----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the UNet and install the adapter."""
        self.unet = self.backbone.load("unet", self.frozen_dtype)
        face, layout, shapes = self.backbone.face_encoder, self.backbone.layout, self.backbone.photo_shapes()
        widths = [shape[-1] for shape in shapes.values()]
        path = self.check_adapter()
        if path is None:
            rank = self.lora_rank or LORA_RANK
            state: Any = ip_adapter_from_text(self.unet, widths, layout=layout, lora_rank=rank)
            self.adapter_is_random = True
        else:
            state = read_ip_adapter(path)
            self._adapter_file = find_adapter_file(path)
            if RECORD in state or path == self.ip_adapter:  # a published adapter is a part of the backbone
                self.trained_on = read_record(state.get(RECORD))
            if layout is PLAIN and face is not None and face.beside_clip:
                _widen(state["image_proj"], self.backbone.clip_dim, *widths)
        if layout.lora:
            self._take_rank(require_lora(layout, state, f"IP-Adapter file '{path}'"), path)
        install_ip_adapter(self.unet, state, widths)
        parts = {kind: self.make_aggregator(shape[-1]) for kind, shape in shapes.items()}
        self.aggregator = OfKinds(parts, shapes) if len(parts) > 1 else next(iter(parts.values()))
        if path is not None and "aggregator" in state:
            self._load_aggregator(state["aggregator"], path)
        if self.adds_lora:
            add_lora(self.unet, self.lora_rank)
        if path is not None and not layout.lora:
            self._load_lora(path)
        for parameter in ip_adapter_parameters(self.unet).values():
            parameter.requires_grad_(self.trained == "adapter")

    @property
    def adds_lora(self) -> bool:
        """Whether there is LoRA beside the adapter, rather than none, or in it."""
        return self.lora_rank is not None and not self.backbone.layout.lora

    def check_adapter(self) -> str | None:
        """Return the adapter's file, None for one made from the text K and V; only shapes of weights are read.

        Raises:
            BackboneError: it is of another layout than the backbone's, or made for another encoder of photos.
        """
        path, layout = self._adapter_path(), self.backbone.layout
        if path is None:
            return None
        found, state = read_layout(path)
        if found is not layout:
            raise BackboneError(
                f"IP-Adapter file '{path}' is {found.title}, and photos are encoded for {layout.title}: set "
                f"backbone.layout={found.name}, or give an adapter of the layout {layout.name}"
            )
        if layout is not PLAIN:
            layout.check_widths(state["image_proj"], self.backbone.widths, f"IP-Adapter file '{path}'")
        if layout.lora:
            require_lora(layout, state, f"IP-Adapter file '{path}'")
        return path

    def configure_callbacks(self) -> list[Any]:
        """Check the adapter too before any photo is encoded."""
        self.check_adapter()
        return super().configure_callbacks()

    def _take_rank(self, rank: int, path: str | None) -> None:
        """Take the rank of FaceID's own LoRA for the model's."""
        require_peft(rank)
        if self.lora_rank not in (None, rank):
            raise BackboneError(
                f"IP-Adapter file '{path}' has LoRA of rank {rank}, and model.lora_rank is {self.lora_rank}: leave "
                "model.lora_rank out"
            )
        self.lora_rank = rank

    def _adapter_path(self) -> str | None:
        """Return where the adapter's weights are; None where it is made from the text K and V, at random in part."""
        path = self.backbone.adapter_file() if self.ip_adapter == "auto" else self.ip_adapter
        return None if path == "text" else path

    def _load_aggregator(self, weights: dict[str, Tensor], path: str) -> None:
        """Load the aggregator of an exported adapter, whose K' and V' were trained on its output."""
        own = self.settings()
        found = read_adapter_record(path).get("aggregator", own)
        own_keys = set(self.aggregator.state_dict())
        if found != own or own_keys != set(weights):
            what = found if found != own else f"another aggregator (weights {', '.join(sorted(weights))})"
            raise BackboneError(f"adapter '{path}' was trained with {what}, not {own}: set model.aggregator likewise")
        self.aggregator.load_state_dict(weights)

    def _load_lora(self, path: str) -> None:
        """Load the LoRA that an exported adapter was trained with, from beside the adapter's file."""
        found = read_adapter_record(path).get("lora_rank")
        if found is None:
            return
        if found != self.lora_rank:
            raise BackboneError(
                f"adapter '{path}' was trained with LoRA of rank {found}: set model.lora_rank={found}, not "
                f"{self.lora_rank}"
            )
        read_lora({"unet": self.unet}, find_adapter_file(str(Path(path).with_name(LORA_FILE))))

    def configure_optimizers(self) -> Any:
        """Return the optimiser of what is trained, and its schedule by the step."""
        if not self.trained_parameters():
            raise ValueError(
                f"{self.method()} with trained='{self.trained}' has nothing to train: set model.trained to 'adapter'"
            )
        optimizer, schedule = self.optimizer_and_schedule(int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- training -----------------------------------------------------------------------------------------------

    def condition(self, references: Tensor, blank: Tensor | None = None) -> Tensor:
        """Aggregate one set of embeddings a sample, (B, R, D) -> (B, M, D), or of patch tokens, (B, R, T, D).

        Args:
            references: of a batch.
            blank: of a batch, what stands for no photo, (B, ...); None takes zeros. A set without a face gives it.
        """
        if self.backbone.face_encoder is None:
            embeds: Tensor = self.aggregator(references)
            return embeds
        faceless = references.flatten(1).isnan().any(dim=1)  # (B,)
        embeds = self.aggregator(references.masked_fill(_over(faceless, references), 0.0))
        return torch.where(_over(faceless, embeds), _no_photo(embeds, blank), embeds)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Restore the held-out photos of a batch of `HeldOutGroups` items."""
        x = self.latents(batch["moments"], batch["latent_noise"])  # (B, C, h, w)
        blank = batch.get("blank")
        embeds = self.condition(batch["references"], blank)  # (B, M, D)
        embeds = torch.where(_over(batch["drop_image"], embeds), _no_photo(embeds, blank), embeds)  # AFTER aggregation
        t = (batch["time"] * self.noise.config.num_train_timesteps).long()  # (B,)
        error = self.denoising_loss(x, batch["eps"], t, batch["text"], embeds)  # (B,)
        loss = (error * self.loss_weights(t)).mean()
        self.watch.loss(error, "loss", self.global_step, batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss at fixed noise a timestep bin, and the reference gap: what shuffling or dropping the photos costs."""
        mean, _ = batch["moments"].chunk(2, dim=1)
        x = mean * self.backbone.scaling_factor
        weight = (~batch["repeated"]).float()  # (B,); whatever the number of ranks, every task counts once
        count = int(weight.sum())
        # Lightning averages these numbers over ranks as integers, so they are multiples of the number of ranks
        size = count * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        blank = batch.get("blank")
        right = self.condition(batch["references"], blank)
        variants = {"right": right, "dropped": _no_photo(right, blank)}
        if "other_references" in batch:  # not where there is only one person
            variants["shuffled"] = self.condition(batch["other_references"], blank)
        sums = dict.fromkeys(variants, torch.zeros((), device=x.device))
        for number, time in enumerate(VALIDATION_TIMES):
            generators = [torch.Generator().manual_seed(int(seed) + number) for seed in batch["seed"]]
            eps = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
            t = torch.full((len(x),), int(time * self.noise.config.num_train_timesteps), device=x.device)
            for name, embeds in variants.items():
                error = self.denoising_loss(x, eps, t, batch["text"], embeds)
                self.watch.loss(error, "validation loss", self.global_step, batch)
                loss = (error * weight).sum() / max(count, 1)
                sums[name] = sums[name] + loss / len(VALIDATION_TIMES)
                if name == "right":
                    self.log(f"val/loss_t{int(t[0])}", loss, batch_size=size, sync_dist=True)
        self.log("val/loss", sums["right"], batch_size=size, sync_dist=True, prog_bar=True)
        for name in list(variants)[1:]:
            self.log(f"val/gap_{name}", sums[name] - sums["right"], batch_size=size, sync_dist=True, prog_bar=True)

    # ---- drawing ------------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, references: References = "right", ip_scale: float | None = None) -> Tensor:
        """Draw the images of a batch of tasks: RGB, (B, 3, H, W) uint8.

        Args:
            batch: of `TaskDataset` items.
            references: the task's own, none (scale 0 and no LoRA), another person's, or what stands for no photo
                after the aggregator.
            ip_scale: overrides `sampling.ip_scale`.
        """
        blank = batch.get("blank")
        embeds = self.condition(batch["other_references" if references == "other" else "references"], blank)
        negative = _no_photo(embeds, blank)
        if references == "zero":
            embeds = negative
        alone = references == "none" and self.lora_rank is not None
        with lora_disabled(self.unet) if alone else nullcontext():
            return self.sampler(
                batch["text"],
                batch["negative_text"],
                embeds,
                [int(seed) for seed in batch["seed"]],
                self.image_side,
                0.0 if references == "none" else ip_scale,
                negative,
            )

    def on_test_start(self) -> None:
        """Measure what a person costs: the image encoder's pass over the references, and G.

        One person is timed, after a pass to warm up, for all; the test itself reads stored features.
        """
        self.refuse_random_adapter()
        tasks = getattr(getattr(self.trainer, "datamodule", None), "tasks", None)
        if not tasks or not self.trainer.is_global_zero:
            return
        encoder = self.photo_encoder()
        for _ in range(2):
            start = perf_counter()
            self.condition(encoder(tasks[0].references).to(self.device)[None]).cpu()
            seconds = perf_counter() - start
        self.spent["personalise"] = seconds * len({task.person for task in tasks})

    def on_predict_start(self) -> None:
        """Refuse to draw with an untrained adapter."""
        self.refuse_random_adapter()

    def refuse_random_adapter(self) -> None:
        """Raise `BackboneError` if the adapter was made at random and never trained."""
        if self.adapter_is_random:
            self.check_untrained()

    def check_untrained(self) -> None:
        """Raise `BackboneError` if the adapter is made at random."""
        if self._adapter_path() is None:
            raise BackboneError(
                f"the adapter is made at random and was never trained (model.ip_adapter '{self.ip_adapter}', backbone "
                f"'{self.backbone.path}'): give a trained one by --model.ip_adapter <file>, or run fit first and then "
                "this on its run"
            )

    def on_train_start(self) -> None:
        """Count the adapter as trained from here on."""
        self.adapter_is_random = False

    def photo_encoder(self) -> PhotoEncoder:
        """Load the encoder of photos, which is no part of the module."""
        return PhotoEncoder(self.backbone, self.device)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def method(self) -> str:
        """Return the name of the aggregator, and of what is added to the plain method."""
        added, layout = ["LoRA"] * self.adds_lora, self.backbone.layout
        if layout is not PLAIN:
            added.append(layout.title.removeprefix("IP-Adapter "))
        elif (face := self.backbone.face_encoder) is not None:
            added.append("face and CLIP" if face.beside_clip else "face")
        return " + ".join([self.aggregator.name, *added])

    def settings(self) -> str:
        """Return name and arguments of the aggregator, and the adapter's layout where it is not the plain one."""
        layout = self.backbone.layout
        of = "" if layout is PLAIN else f" of {layout.name}"
        return f"{self.aggregator.name}({self.aggregator.extra_repr()}){of}"

    def provenance(self) -> dict[str, Any]:
        """Return the facts of a checkpoint."""
        return super().provenance() | {
            "image_encoder": self.backbone.photo_encoder_name(),
            "image_encoder_content": self.backbone.fingerprint_photo_encoder(),
            "trained": self.trained,
            "lora_rank": self.lora_rank,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or backbone; its adapter is a trained one."""
        super().on_load_checkpoint(checkpoint)
        self.adapter_is_random = False

    @cached_property
    def _adapter_sha256(self) -> str | None:
        return None if self._adapter_file is None else hash_file(self._adapter_file)

    def describe(self) -> dict[str, Any]:
        """Return method, backbone, adapter, sampling and number of trained parameters, for a results file.

        `ip_adapter_sha256` is of the file that the adapter was read from, before any training; None where it was made
        from the text K and V.
        """
        face = self.backbone.face_encoder
        file = self.ip_adapter if self.ip_adapter in ("auto", "text") else "file"
        return super().describe() | {
            "aggregator": self.settings(),
            "ip_adapter": file,
            "ip_adapter_sha256": self._adapter_sha256,
            "image_encoder": self.backbone.image_encoder,
            "face_encoder": None if face is None else asdict(face),
        }


def _over(flags: Tensor, embeds: Tensor) -> Tensor:
    """Give flags (B,) as many dimensions as embeddings have."""
    return flags.view(-1, *[1] * (embeds.ndim - 1))


def _no_photo(embeds: Tensor, blank: Tensor | None) -> Tensor:
    """Return what stands for no photo, (B, ...), in the shape of conditions (B, M, ...); zeros where there is none."""
    return torch.zeros_like(embeds) if blank is None else blank[:, None].to(embeds).expand_as(embeds)


def _widen(projection: dict[str, Tensor], clip: int, width: int) -> None:
    """Widen a Linear (4 E, clip) that was made for CLIP alone, with zeros for the face's embedding beside it."""
    weight = projection.get("proj.weight")
    if weight is not None and weight.ndim == 2 and weight.shape[1] == clip:
        projection["proj.weight"] = F.pad(weight, (0, width - clip))
