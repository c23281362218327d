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
from torch import Tensor

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.encoders import PhotoEncoder
from lit_multiip.backbone.ip_adapter import (
    LORA_RANK,
    Scale,
    find_adapter_file,
    install_ip_adapter,
    ip_adapter_from_text,
    ip_adapter_parameters,
    read_adapter_record,
    read_ip_adapter,
    set_ip_scale,
)
from lit_multiip.backbone.layouts import PLAIN
from lit_multiip.backbone.lora import add_lora, lora_disabled, require_peft
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.drawing import Drawing
from lit_multiip.data.record import RECORD, merge_records, read_record, unknown_record
from lit_multiip.files import LitMultiIPError, hash_file
from lit_multiip.methods.adapter_rates import build_with_kv_factor, check_kv_factor
from lit_multiip.methods.adapter_weights import check_file, load_aggregator, load_lora, no_photo, over, take_rank, widen
from lit_multiip.methods.aggregators import Aggregator, OfKinds, SelfAttention
from lit_multiip.methods.identity_loss import IdentityLoss, digest_weights
from lit_multiip.methods.method import VALIDATION_TIMES, Batch, Method, References
from lit_multiip.runs import CheckpointError, read_checkpoint


class MultiIPAdapter(Method):
    """Trains the aggregator and the adapter: its projection, K', V', and FaceID's LoRA (eq. 1/17, section 3.5).

    Args:
        backbone: frozen; shared with the data.
        aggregator: G; gets the width of an embedding, or of a patch token.
        ip_adapter: `auto` (the backbone's published adapter, else its ip_adapter/, else `text`), `text` (from the text
            K and V), a file, or hub id and file, of the backbone's layout. An exported adapter brings its aggregator's
            weights too. Where the published adapter is of another layout, or a face network stands in CLIP's place,
            `auto` is `text`; with one beside CLIP, a plain adapter made for CLIP alone starts with zeros for the face.
        start: checkpoint of a run of this method, whose weights `fit` starts at; LoRA may be new.
        trained: `adapter`, or `aggregator` alone.
        lora_rank: of LoRA on all of the UNet's attention, trained with the adapter (needs peft); None adds none, but
            FaceID's, which is a part of the adapter and has its own rank, or 128.
        kv_lr_factor: K' and V' learn at the optimiser's rate times this; all else at the rate.
        identity_loss: added to the squared error in training; None adds none.
        lr_schedule: a schedule of `diffusers.optimization.get_scheduler`, stepped every optimiser step.
        snr_gamma: of `loss_weights`; None is the paper's eq. (1).
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
        start: str | None = None,
        trained: Literal["adapter", "aggregator"] = "adapter",
        lora_rank: int | None = None,
        kv_lr_factor: float = 1.0,
        identity_loss: IdentityLoss | None = None,
        lr_schedule: str = "cosine",
        snr_gamma: float | None = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, lr_schedule=lr_schedule, snr_gamma=snr_gamma, **kwargs)
        require_peft(lora_rank)
        check_kv_factor(kv_lr_factor, trained)
        self.make_aggregator, self.ip_adapter, self.trained, self.start = aggregator, ip_adapter, trained, start
        self.lora_rank, self.kv_lr_factor, self.identity_loss = lora_rank, kv_lr_factor, identity_loss
        self.identity_network = None if identity_loss is None else identity_loss.network  # so that it moves along
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
            state: Any = ip_adapter_from_text(self.unet, widths, layout=layout, lora_rank=self.lora_rank or LORA_RANK)
            self.adapter_is_random = True
        else:
            state = read_ip_adapter(path)
            self._adapter_file = find_adapter_file(path)
            if RECORD in state or path == self.ip_adapter:  # a published adapter is a part of the backbone
                self.trained_on = read_record(state.get(RECORD))
            if layout is PLAIN and face is not None and face.beside_clip:
                widen(state["image_proj"], self.backbone.clip_dim, *widths)
        if layout.lora:
            self.lora_rank = take_rank(state, self.lora_rank, path)
        install_ip_adapter(self.unet, state, widths)
        parts = {kind: self.make_aggregator(shape[-1]) for kind, shape in shapes.items()}
        self.aggregator = OfKinds(parts, shapes) if len(parts) > 1 else next(iter(parts.values()))
        if path is not None and "aggregator" in state:
            load_aggregator(self.aggregator, self.settings(), state["aggregator"], path)
        if self.lora_rank is not None and not layout.lora:
            add_lora(self.unet, self.lora_rank)
        if path is not None:
            if not layout.lora:
                load_lora(self.unet, self.lora_rank, path)
            self.identity_networks |= read_adapter_record(path).get("identity_networks", {})
        for parameter in ip_adapter_parameters(self.unet).values():
            parameter.requires_grad_(self.trained == "adapter")
        self.check_sampling(self.sampling)

    @property
    def adds_lora(self) -> bool:
        """Whether there is LoRA beside the adapter, rather than none, or in it."""
        return self.lora_rank is not None and not self.backbone.layout.lora

    def check_adapter(self) -> str | None:
        """Return the adapter's file, None for one made from the text K and V; only shapes of weights are read.

        Raises:
            BackboneError: it is of another layout than the backbone's, or made for another encoder of photos.
        """
        path = self._adapter_path()
        if path is not None:
            check_file(self.backbone, path)
        return path

    def configure_callbacks(self) -> list[Any]:
        """Check the adapter too before any photo is encoded."""
        self.check_adapter()
        return super().configure_callbacks()

    def _adapter_path(self) -> str | None:
        """Return where the adapter's weights are; None where it is made from the text K and V, at random in part."""
        path = self.backbone.adapter_file() if self.ip_adapter == "auto" else self.ip_adapter
        return None if path == "text" else path

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser of what is trained; with `kv_lr_factor` K' and V' are a group of their own."""
        if self.kv_lr_factor == 1:
            return super().build_optimizer()
        return build_with_kv_factor(self.make_optimizer, self.trained_parameters(), self.kv_lr_factor)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of what is trained, and its schedule by the step."""
        if not self.trained_parameters():
            raise LitMultiIPError(
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
        embeds = self.aggregator(references.masked_fill(over(faceless, references), 0.0))
        return torch.where(over(faceless, embeds), no_photo(embeds, blank), embeds)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Restore the held-out photos of a batch of `HeldOutGroups` items."""
        x = self.latents(batch["moments"], batch["latent_noise"])  # (B, C, h, w)
        blank = batch.get("blank")
        embeds = self.condition(batch["references"], blank)  # (B, M, D)
        embeds = torch.where(over(batch["drop_image"], embeds), no_photo(embeds, blank), embeds)  # AFTER aggregation
        t = (batch["time"] * self.noise.config.num_train_timesteps).long()  # (B,)
        predicted = self.denoise(x, batch["eps"], t, batch["text"], embeds)
        error = self.prediction_error(predicted, x, batch["eps"], t, batch.get("loss_map"))  # (B,)
        loss = (error * self.loss_weights(t)).mean()
        self.watch.loss(error, "loss", self.global_step, batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        if self.identity_loss is not None:
            x0 = self.predicted_x0(predicted, x, batch["eps"], t)
            distance = self._identity_distance(self.identity_loss, x0, batch)
            self.watch.loss(distance, "identity loss", self.global_step, batch)
            self.log("train/identity_loss", distance.mean(), sync_dist=True)
            loss = loss + self.identity_loss.weight * distance.mean()
        return loss

    def _identity_distance(self, identity_loss: IdentityLoss, x0: Tensor, batch: Batch) -> Tensor:
        """Return the identity loss of each sample, (B,); 0 for those that are not decoded.

        Args:
            identity_loss: compares images.
            x0: predicted, scaled latents (B, C, h, w).
            batch: of `HeldOutGroups` items.
        """
        decoded = (batch["time"] < identity_loss.max_time) & ~batch["drop_image"]  # (B,)
        distance = torch.zeros(len(x0), device=x0.device)
        if decoded.any():
            mean, _ = batch["moments"][decoded].chunk(2, dim=1)
            with torch.no_grad():
                held_out = self.sampler.decode_signal(mean)
            made = self.sampler.decode_signal(x0[decoded] / self.backbone.scaling_factor)
            distance[decoded] = identity_loss(made, held_out)
        return distance

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
        variants = {"right": right, "dropped": no_photo(right, blank)}
        if "other_references" in batch:  # not where there is only one person
            variants["shuffled"] = self.condition(batch["other_references"], blank)
        sums = dict.fromkeys(variants, torch.zeros((), device=x.device))
        for t, eps in self.fixed_draws(x, batch["seed"].tolist()):
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

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse blocks that the UNet lacks."""
        try:
            set_ip_scale(self.unet, sampling.ip_scale)
        finally:
            set_ip_scale(self.unet, 1.0)

    def check_drawing(self, drawing: Drawing) -> None:
        """Refuse weights that the aggregator would not feel, and negatives without guidance."""
        if drawing.weighted and not self.aggregator.counts_repeats:
            raise LitMultiIPError(
                f"{self.aggregator.name} gives photos no weights: leave out weights other than 0 and 1, or "
                "take another model.aggregator, such as AvgPool"
            )
        if drawing.negatives:
            self.sampling.require_guidance()

    def generate(self, batch: Batch, references: References = "right", ip_scale: Scale | None = None) -> Tensor:
        """Draw the images of a batch of tasks: RGB, (B, 3, H, W) uint8.

        Args:
            batch: of `TaskDataset` items; masks of the first are those of all.
            references: the task's own, none (scale 0 and no LoRA), another person's, or what stands for no photo
                after the aggregator.
            ip_scale: overrides `sampling.ip_scale`.
        """
        blank = batch.get("blank")
        embeds = self.condition(batch["other_references" if references == "other" else "references"], blank)
        if references == "zero":
            embeds = no_photo(embeds, blank)
        people = [embeds, *(self.condition(rows, blank) for rows in batch.get("beside", ()))]  # (B, M, D) each
        negative, masks = None, None
        if "negatives" in batch:
            negative = torch.cat([self.condition(rows, blank) for rows in batch["negatives"]], dim=1)
        elif blank is not None and self.sampling.guidance_scale > 1:
            negative = no_photo(torch.cat(people, dim=1), blank)
        if "masks" in batch:  # (B, P, H, W); each person's embeddings share the weight
            counts = [rows.shape[1] for rows in people]
            pairs = zip(batch["masks"][0], counts, strict=True)
            masks = torch.cat([(mask / count).expand(count, -1, -1) for mask, count in pairs])  # (M, H, W)
        alone = references == "none" and self.lora_rank is not None
        with lora_disabled(self.unet) if alone else nullcontext():
            return self.sampler(
                batch["text"],
                batch["negative_text"],
                torch.cat(people, dim=1),
                [int(seed) for seed in batch["seed"]],
                self.image_side,
                0.0 if references == "none" else ip_scale,
                negative,
                masks,
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
        """Refuse to draw with an untrained adapter, or what cannot be drawn."""
        self.refuse_random_adapter()
        for request in getattr(getattr(self.trainer, "datamodule", None), "requests", [])[:1]:
            self.check_drawing(request.drawing)

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

    def on_fit_start(self) -> None:
        """Start at the weights of `start`, unless resuming."""
        if self.start is not None and self.trainer.ckpt_path is None:
            self.load_start(read_checkpoint(Path(self.start)))

    def load_start(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights of another run of this method, and whom they know; LoRA that it lacks stays new."""
        self.refuse_other(checkpoint, ("method", "unet", "image_encoder_content"))
        weights, own = checkpoint["state_dict"], self.trained_parameters()
        without_lora = {name for name in own if ".lora_" not in name}
        if set(weights) not in (set(own), without_lora):
            odd = min(set(weights) ^ set(own))
            raise CheckpointError(
                f"'{self.start}' and the model differ in weights such as '{odd}': set model.trained and "
                "model.lora_rank as in its config.yaml"
            )
        self.load_state_dict(weights, strict=False)
        self.trained_on = merge_records(self.trained_on, checkpoint.get(RECORD, unknown_record()))
        self.adapter_is_random = False

    def on_train_start(self) -> None:
        """Count the adapter as trained from here on, and by which network."""
        self.adapter_is_random = False
        if self.identity_loss is not None:
            network = self.identity_loss.network
            self.identity_networks |= {digest_weights(network): network.name}
            if self.gradient_checkpointing:
                self.sampler.pipe.vae.enable_gradient_checkpointing()

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
            "kv_lr_factor": self.kv_lr_factor,
            "identity_loss": None if self.identity_loss is None else self.identity_loss.describe(),
            "ip_adapter": file,
            "ip_adapter_sha256": self._adapter_sha256,
            "image_encoder": self.backbone.image_encoder,
            "face_encoder": None if face is None else asdict(face),
        }
