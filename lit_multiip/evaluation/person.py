"""The callback that scores the tuning on one person: what is drawn from the held-out photos' prompts, at validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from lit_multiip.evaluation.callback import ScoreTest
from lit_multiip.evaluation.critic import CriticExtractor
from lit_multiip.evaluation.extractors import (
    Extraction,
    Extractor,
    leave_out_trainers,
    refuse_conditioning_network,
)
from lit_multiip.evaluation.metrics import IdentitySimilarity, NearestReference
from lit_multiip.evaluation.scoring import RealPhotos, extract_all
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.identity_loss import digest_weights

logger = logging.getLogger(__name__)

IDENTITY = "val/identity"  # by which the best checkpoint is chosen: that of the first extractor that tells people apart


class ScorePerson(L.Callback):
    """Logs how like the held-out photos of one person (`data.photos`) their prompts are drawn, at every validation.

    Before training and at each validation it logs `val/identity_held_out_mean/<extractor>` (cosine to the mean of the
    held-out photos), `val/nearest_reference/<extractor>` and `val/prompt/<extractor>`, and `val/identity`, the first of
    these again, whose name does not depend on who scores. Every rank draws all images, which are few.

    Args:
        extractors: networks that score; None takes those of the `ScoreTest` beside it, whose first one that tells
            people apart decides.
    """

    def __init__(self, extractors: list[Extractor] | None = None) -> None:
        self.extractors = extractors
        self.untrained: dict[str, float] = {}  # the scores before training
        self._real: list[Extraction] = []  # of each extractor

    def state_dict(self) -> dict[str, Any]:
        """Return the scores before training."""
        return {"untrained": self.untrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember them."""
        self.untrained = state_dict["untrained"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the extractors; refuse one that conditions."""
        if stage != "fit" or not self._acts(trainer):
            return
        if self.extractors is None:
            others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            beside = [callback for callback in others if isinstance(callback, ScoreTest)]
            if not beside:
                raise LitMultiIPError(
                    "ScorePerson has no networks that score: give extractors, or a ScoreTest beside it"
                )
            beside[0].setup(trainer, pl_module, "test")
            self.extractors = beside[0].extractors
        module: Any = pl_module
        for extractor in self._loaded():
            refuse_conditioning_network(extractor, module.backbone)
        loss = getattr(module, "identity_loss", None)
        taught = module.identity_networks | ({} if loss is None else {digest_weights(loss.network): loss.network.name})
        self.extractors = leave_out_trainers(self._loaded(), taught)
        if not any(extractor.can_identify for extractor in self._loaded()):
            raise LitMultiIPError("no extractor tells people apart, and the best checkpoint is chosen by that: add one")
        if isinstance(self._loaded()[0], CriticExtractor) and module.backbone.path != "mini":
            logger.warning(
                "the critic knows drawn portraits alone: for real photos add --config configs/score/real.yaml"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score what is drawn before any training."""
        if self._acts(trainer) and trainer.global_step == 0:
            self.untrained = self._score(trainer, pl_module)
            for log in trainer.loggers:
                log.log_metrics(self.untrained, 0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score and log."""
        if self._acts(trainer) and not trainer.sanity_checking:
            pl_module.log_dict(self._score(trainer, pl_module), sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what tuning changed."""
        if not self._acts(trainer) or not self.untrained:
            return
        best: Any = trainer.checkpoint_callback
        chosen = getattr(best, "best_model_score", None) if getattr(best, "monitor", None) == IDENTITY else None
        if chosen is not None:
            what = "identity to the held-out photos by %s: %.3f untuned, %.3f at the best checkpoint"
            logger.info(what, self._judge().name, self.untrained[IDENTITY], float(chosen))

    def _acts(self, trainer: L.Trainer) -> bool:
        data = getattr(trainer, "datamodule", None)
        return trainer.state.fn == TrainerFn.FITTING and getattr(data, "photos", None) is not None

    def _loaded(self) -> list[Extractor]:
        assert self.extractors is not None  # after setup
        return self.extractors

    def _judge(self) -> Extractor:
        return next(extractor for extractor in self._loaded() if extractor.can_identify)

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Draw the validation tasks and score the images."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.val_dataloader().dataset
        training, images = module.training, list[Tensor]()
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():  # hooks lack the autocast that steps have
            for first in range(0, len(dataset), data.eval_batch_size):
                rows = range(first, min(first + data.eval_batch_size, len(dataset)))
                batch = trainer.strategy.batch_to_device(default_collate([dataset[row] for row in rows]))
                images.append(module.generate(batch).cpu())
        module.train(training)
        tasks, side = dataset.tasks, module.image_side
        photos = RealPhotos([photo for t in tasks for photo in (t.held_out, *t.references)], side, show_progress=False)
        out = photos.find(dict.fromkeys(task.held_out for task in tasks))
        references = photos.find(dict.fromkeys(tasks[0].references))
        prompts = [task.prompt for task in tasks]
        scores: dict[str, float] = {}
        device = trainer.strategy.root_device
        if not self._real:
            self._real = [see(extractor, photos.pixels, device) for extractor in self._loaded()]
        for extractor, real in zip(self._loaded(), self._real, strict=True):
            found = score_images(extractor, torch.cat(images), real, out, references, prompts, device)
            scores |= {f"val/{key}": value for key, value in found.items()}
            if extractor is self._judge():
                scores[IDENTITY] = found[f"{extractor.likeness}_held_out_mean/{extractor.name}"]
        return scores


def see(extractor: Extractor, images: Tensor, device: torch.device | str) -> Extraction:
    """Have an extractor see images, (N, 3, H, W) uint8."""
    return extract_all(extractor, images, torch.device(device), tqdm(disable=True))[0]


def score_images(
    extractor: Extractor,
    images: Tensor,
    real: Extraction,
    held_out: Sequence[int],
    references: Sequence[int],
    prompts: Sequence[str] | None,
    device: torch.device | str,
) -> dict[str, float]:
    """Score images of one person, as means over the images.

    Args:
        extractor: that scores.
        images: (T, 3, H, W) uint8.
        real: what the extractor says of the person's photos.
        held_out: rows of `real` that no method has seen; none leaves their scores out.
        references: rows of `real` that the images were drawn from; none likewise.
        prompts: of the images, for how well they follow them.
        device: of the extractor.

    Returns:
        By `<score>/<extractor>`, `identity_held_out_mean` and `identity_references` (or `similarity_...`),
        `nearest_reference` and `prompt`; what is undefined everywhere is left out, but for identity, which is NaN.
    """
    made, agreement = extract_all(extractor, images, torch.device(device), tqdm(disable=True), prompts)
    vectors, photos = made.vectors(), real.vectors()

    def rows(at: Sequence[int]) -> Tensor:
        return photos[list(at)].expand(len(vectors), -1, -1)  # (T, K, E)

    scores: dict[str, float] = {}
    if extractor.can_identify:
        for name, at in (("held_out_mean", held_out), ("references", references)):
            if at:
                metric = IdentitySimilarity()
                metric.update(vectors, rows(at))
                scores[f"{extractor.likeness}_{name}/{extractor.name}"] = float(metric.compute())
    if references:
        nearest = NearestReference()
        nearest.update(vectors, rows(references))
        scores[f"nearest_reference/{extractor.name}"] = float(nearest.compute())
    if len(agreement) and (known := agreement[agreement == agreement]).size:
        scores[f"prompt/{extractor.name}"] = float(known.mean())
    return scores
