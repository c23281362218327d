"""DreamBooth, the paper's baseline: for each person the UNet itself is tuned, on that person's photos.

Eq. (12) is E[w_t ||x_hat(alpha_t x + sigma_t eps, c) - x||^2], where x_hat is x by the UNet's prediction. Since
x_hat - x = (sigma_t / alpha_t) (eps - eps_hat), the weight w_t = alpha_t^2 / sigma_t^2, the signal-to-noise ratio,
makes it the plain epsilon MSE, the loss of all methods here. Eq. (13) adds prior preservation: lambda times the same
loss on images x_pr that the frozen backbone drew, with t' and eps' of their own.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.backbone.lora import add_lora, require_peft
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.groups import stable_hash
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.class_images import ClassImages
from lit_multiip.methods.method import Batch, Method, References
from lit_multiip.methods.people import Draws, Who, people_of
from lit_multiip.runs import CheckpointError

logger = logging.getLogger(__name__)

WITHOUT_WARMUP = ("constant", "piecewise_constant")  # schedules of diffusers that ignore its steps


class DreamBooth(Method):
    """Tunes the UNet on one person's reference set under "a photo of sks person" (eq. 12, 13).

    `fit` learns one person, `data.person`; `test` and `predict` learn each person that they draw, always from
    the backbone's own weights, which are put back bit for bit. All draws are functions of (seed, person, step) alone.

    In prompts the identifier stands before the first class noun, in place of its article: "a photo of a person in a red
    shirt" becomes "a photo of sks person in a red shirt". To a prompt that lacks the noun ", sks person" is appended.

    Args:
        backbone: frozen but for what is tuned; shared with the data.
        optimizer: over the tuned parameters; each person has a new one.
        lr_schedule: a schedule of `diffusers.optimization.get_scheduler`, stepped every optimiser step.
        steps: of tuning, a person; `trainer.max_steps` is -1, or the same.
        batch_size: reference photos a step, and as many class images.
        prior_weight: lambda of eq. (13); 0 needs no class images, and suits the miniature, to which `sks` means little.
        class_images: how many the backbone draws, once, from seeds 0, 1, ...
        class_folder: where they are kept, by their settings.
        identifier: a rare token, which comes to mean the person.
        class_noun: the class of which the person is one.
        tuned: the UNet, or the text encoder too.
        lora_rank: tune low-rank additions to the attention layers in place of the weights (needs peft).
        seed: of all draws.
        kwargs: of `Method`; `ip_scale`, `ip_start` and `ip_end` of `sampling` keep their defaults, as there is no image
            attention.
    """

    per_person: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=1e-2),
        lr_schedule: str = "constant",
        steps: int = 400,
        batch_size: int = 4,
        prior_weight: float = 0.0,
        class_images: int = 50,
        class_folder: str = "runs/features",
        identifier: str = "sks",
        class_noun: str = "person",
        tuned: Literal["unet", "unet+text"] = "unet",
        lora_rank: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, optimizer, lr_schedule, **kwargs)
        if min(steps, batch_size, class_images) < 1 or not prior_weight >= 0:
            raise LitMultiIPError(
                f"steps={steps}, batch_size={batch_size} and class_images={class_images} must be at least 1, and "
                f"prior_weight={prior_weight} at least 0"
            )
        if lr_schedule not in WITHOUT_WARMUP and steps <= self.lr_warmup_steps:
            raise LitMultiIPError(
                f"model.steps={steps} end within the {self.lr_warmup_steps} steps of the warm-up and learn nothing: "
                "add the *_dreambooth.yaml of the backbone's config in configs/on/, or set model.lr_warmup_steps"
            )
        require_peft(lora_rank)
        if not identifier.strip() or not class_noun.strip():
            raise LitMultiIPError("identifier and class_noun must not be empty: give words such as 'sks' and 'person'")
        self.check_sampling(self.sampling)
        self.automatic_optimization = False  # fit takes the same steps as test
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.prior_weight, self.class_images = prior_weight, class_images
        self.identifier, self.class_noun = identifier.strip(), class_noun.strip()
        self.tuned, self.lora_rank = tuned, lora_rank
        self.learnt: tuple[str, str] | None = None  # whom the weights know: person and reference set
        self.as_is = False  # images are drawn with the weights as they are, as within fit
        self.texts: Any = None  # the pipeline's tokenizers and text encoders
        self.prior = ClassImages(self.backbone, self.sampling, self.class_prompt(), class_images, class_folder)
        self._prompt_embeds: dict[str, Tensor] | None = None

    # ---- building ---------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load UNet and text encoders, and keep a copy of the weights that will be tuned."""
        whole = self.lora_rank is None
        self.unet = self.backbone.load("unet", torch.float32 if whole else self.frozen_dtype)
        whole = whole and self.tuned == "unet+text"
        self.texts = self.backbone.text_pipeline(torch.float32 if whole else self.frozen_dtype)
        for name in self.text_encoders():
            setattr(self, name, getattr(self.texts, name))
        for name in self.tuned_modules():
            module = getattr(self, name).requires_grad_(self.lora_rank is None)
            if self.lora_rank is not None:
                add_lora(module, self.lora_rank, self.seed)
        self._pristine = self._copied()
        tokenizer = self.texts.tokenizer
        tokens = tokenizer(self.identifier).input_ids[1:-1]
        if len(tokens) > 1:
            words = tokenizer.convert_ids_to_tokens(tokens)
            logger.warning("the identifier '%s' is %d tokens, %s: rarer is better", self.identifier, len(tokens), words)

    def text_encoders(self) -> list[str]:
        """Return the names of the text encoders: one, or SDXL's two."""
        return [name for name in self.backbone.text_components if name.startswith("text_encoder")]

    def tuned_modules(self) -> list[str]:
        """Return the names of the modules that are tuned."""
        return ["unet", *(self.text_encoders() if self.tuned == "unet+text" else [])]

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse options of photos, which DreamBooth does not look at while it draws."""
        for name, plain in (("ip_scale", 1), ("ip_start", 0), ("ip_end", 1)):
            if (value := getattr(sampling, name)) != plain:
                raise LitMultiIPError(
                    f"sampling.{name}={value} has no effect, as DreamBooth has no image attention: leave it at {plain}"
                )

    def check_trainer(self, trains: bool) -> None:
        """Refuse, too, a precision that needs a scaled loss, and a Trainer that would stop early."""
        super().check_trainer(trains)
        if self.trainer.precision == "16-mixed":
            raise LitMultiIPError("DreamBooth scales no loss, as 16-mixed needs: use trainer.precision bf16-mixed")
        if self.trainer.state.fn == TrainerFn.FITTING and self.trainer.max_steps not in (-1, self.steps):
            raise LitMultiIPError(
                f"trainer.max_steps is {self.trainer.max_steps} and model.steps {self.steps}: leave trainer.max_steps "
                "at -1 and set model.steps, which test takes too"
            )

    def setup(self, stage: str) -> None:
        """Where nothing is held out to validate on, have a checkpoint saved when training ends, and none chosen."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and not getattr(data, "validation_tasks", None):
            self.trainer.check_val_every_n_epoch = 1
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.monitor:
                    callback.save_top_k = 0

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _copied(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.trained_parameters().items()}

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained_parameters().items():
            parameter.copy_(weights[name])
        torch.clear_autocast_cache()  # it may hold casts of the weights before

    def forget(self) -> None:
        """Put the backbone's own weights back, bit for bit."""
        self._load(self._pristine)
        self.learnt = None

    @contextmanager
    def pristine(self) -> Iterator[None]:
        """Put the backbone's own weights in place meanwhile."""
        tuned = self._copied()
        self._load(self._pristine)
        try:
            yield
        finally:
            self._load(tuned)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def class_prompt(self) -> str:
        """Return C_pr of eq. (13)."""
        return f"a photo of a {self.class_noun}"

    def personal_prompt(self, prompt: str) -> str:
        """Write the identifier into a prompt, as the class says."""
        noun = re.compile(rf"(?:\b(?:an?|the)\s+)?\b({re.escape(self.class_noun)})\b", re.IGNORECASE)
        personal, found = noun.subn(lambda match: f"{self.identifier} {match[1]}", prompt, count=1)
        return personal if found else f"{prompt}, {self.identifier} {self.class_noun}"

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return text states `prompt_embeds`, (B, L, E), and of SDXL `pooled_prompt_embeds`, (B, P)."""
        return self.backbone.encode_prompts(self.texts, prompts)

    def _tuning_prompts(self) -> dict[str, Tensor]:
        """Encode the person's and the class's prompt, (2, ...); only once if the text encoders are frozen."""
        prompts = [self.personal_prompt(self.class_prompt()), self.class_prompt()]
        if self.tuned == "unet+text":
            return self.encode(prompts)
        if self._prompt_embeds is None:
            with torch.no_grad():
                self._prompt_embeds = self.encode(prompts)
        return self._prompt_embeds

    # ---- class images -----------------------------------------------------------------------------------------------

    def prepare_class_images(self, draw: bool = True) -> None:
        """Read the class images; if `draw`, draw them first where they are missing."""
        if self.prior_weight == 0:
            return
        if draw and not self.prior.file().exists():
            start = time.perf_counter()
            with self.pristine():
                self.prior.write(self.draw, self.sampler.encode)
            self.spent["class_images"] = time.perf_counter() - start
        self.prior.read()

    def _start(self) -> None:
        """Prepare the class images, on rank 0 first."""
        self._prompt_embeds = None
        if self.trainer.is_global_zero:
            with self.trainer.precision_plugin.forward_context():  # hooks lack the autocast that steps have
                self.prepare_class_images()
        self.trainer.strategy.barrier("class images")
        if not self.trainer.is_global_zero:
            self.prepare_class_images(draw=False)

    # ---- tuning -----------------------------------------------------------------------------------------------------

    def draws(self, person: str, step: int, term: Literal["references", "class"], photos: int) -> Draws:
        """Draw for one term of the loss; a function of (seed, person, step, term) alone, on the CPU."""
        generator = torch.Generator().manual_seed(stable_hash(self.seed, person, step, term) % 2**63)
        which = torch.randint(photos, (self.batch_size,), generator=generator)
        t = torch.randint(self.noise.config.num_train_timesteps, (self.batch_size,), generator=generator)
        shape = (self.batch_size, *self.backbone.latent_shape)
        latent_noise, eps = (torch.randn(shape, generator=generator) for _ in range(2))
        return Draws(which, t, latent_noise, eps)

    def losses(self, who: Who, step: int) -> tuple[Tensor, Tensor]:
        """Return the epsilon MSE on the person's photos (eq. 12 with w_t = SNR) and on class images (eq. 13)."""
        terms: list[tuple[Literal["references", "class"], Tensor]] = [("references", who.moments)]
        if self.prior_weight > 0:
            assert self.prior.moments is not None
            terms.append(("class", self.prior.moments))
        draws = [self.draws(who.person, step, term, len(photos)) for term, photos in terms]
        moments = [photos.cpu()[one.which] for one, (_, photos) in zip(draws, terms, strict=True)]
        _, t, latent_noise, eps = (torch.cat(parts).to(self.device) for parts in zip(*draws, strict=True))
        text = {
            name: states[: len(terms)].repeat_interleave(self.batch_size, dim=0)
            for name, states in self._tuning_prompts().items()
        }
        whole = self.backbone.sizes(torch.tensor([self.image_side, self.image_side, 0.0, 0.0]))  # of a class image
        for name, size in whole.items():
            of_class = size.expand((len(terms) - 1) * self.batch_size, *size.shape)
            text[name] = torch.cat([who.sizes[name].cpu()[draws[0].which], of_class]).to(self.device)
        x = self.latents(torch.cat(moments).to(self.device), latent_noise)
        error = self.denoising_loss(x, eps, t, text) * self.loss_weights(t)
        own, prior = error[: self.batch_size].mean(), error[self.batch_size :]
        return own, prior.mean() if len(prior) else torch.zeros_like(own)

    def _tuning_step(self, who: Who, step: int, optimizer: Any, schedule: Any) -> tuple[Tensor, Tensor]:
        """Take one step, within the caller's autocast."""
        own, prior = self.losses(who, step)
        loss = own + self.prior_weight * prior
        self.watch.loss(loss, "loss", step, {"person": [who.person]})
        with torch.autocast(self.device.type, enabled=False):  # autocast is for the forward pass alone
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.watch.gradients(self, step, [who.person])
            optimizer.step()
            schedule.step()
        torch.clear_autocast_cache()  # it holds casts of the weights before this step
        return own.detach(), prior.detach()

    def personalise(self, who: Who) -> None:
        """Tune on a person from the backbone's own weights, unless they are the last person tuned on."""
        if self.learnt == who[:2]:
            return
        start = time.perf_counter()
        self.forget()
        with torch.inference_mode(False), torch.enable_grad():
            sizes = {name: size.cpu().clone() for name, size in who.sizes.items()}
            who = who._replace(moments=who.moments.cpu().clone(), sizes=sizes)
            optimizer, schedule = self.optimizer_and_schedule(self.steps)
            for step in tqdm(range(self.steps), f"tuning on {who.person}", delay=10, leave=False):
                self._tuning_step(who, step, optimizer, schedule)
            optimizer.zero_grad()
        self.watch.look()
        self.learnt = who[:2]
        self.spent["personalise"] += time.perf_counter() - start

    # ---- fit --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Return the optimiser of what is tuned, and its schedule by the step."""
        optimizer, schedule = self.optimizer_and_schedule(self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Prepare the class images; start from the backbone's own weights unless resuming."""
        if self.trainer.ckpt_path is None:
            self.forget()
        self._start()
        self.as_is = True

    def on_train_end(self) -> None:
        """Tune again before what is drawn next."""
        self.as_is = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Tune on the one person of the batch."""
        [(who, _)] = people_of(batch)
        if self.learnt not in (None, who[:2]):
            raise CheckpointError(
                f"the checkpoint is of {self.learnt[0]}, not of {who.person}: leave the checkpoint out, or set "
                "data.person and the data as they were"
            )
        self.learnt = who[:2]
        own, prior = self._tuning_step(who, self.global_step, self.optimizers(), self.lr_schedulers())
        losses = {"train/loss": own + self.prior_weight * prior, "train/references": own, "train/class": prior}
        self.log_dict(losses, sync_dist=True)
        return own

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on held-out photos of the person in `data.photos`, at fixed noise, under their personal prompts."""
        x = batch["moments"].chunk(2, dim=1)[0] * self.backbone.scaling_factor  # (B, C, h, w)
        text = batch["text"] | self.encode([self.personal_prompt(prompt) for prompt in batch["prompt"]])
        losses = [self.denoising_loss(x, eps, t, text) for t, eps in self.fixed_draws(x, batch["seed"].tolist())]
        self.log("val/loss", torch.cat(losses).mean(), batch_size=len(x), sync_dist=True, prog_bar=True)

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop after `steps`."""
        if self.global_step >= self.steps:
            self.trainer.should_stop = True

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Prepare to tune on everyone from the backbone's own weights, also on the person of a checkpoint."""
        if getattr(getattr(self.trainer, "datamodule", None), "photos", None) is None:  # else the checkpoint is tested
            if self.learnt is not None:
                logger.info("test tunes on everyone from the start, also on %s of the checkpoint", self.learnt[0])
            self.forget()
        self._start()

    def on_predict_start(self) -> None:
        """Keep a checkpoint's weights, for the case that they are of this person and these photos."""
        if self.learnt is not None:
            logger.info("the checkpoint is of %s", self.learnt[0])
        self._start()

    def on_test_end(self) -> None:
        """Put the weights back."""
        self.forget()

    on_predict_end = on_test_end

    def generate(self, batch: Batch, references: References = "right") -> Tensor:
        """Draw the images of a batch of tasks, tuning on each person first: RGB, (B, 3, H, W) uint8.

        Args:
            batch: of `TaskDataset` items, sorted by person.
            references: the task's own, with the identifier in the prompt, or none: the backbone itself.
        """
        if references not in self.conditions:
            raise LitMultiIPError(f"DreamBooth cannot be conditioned on references='{references}': {self.conditions}")
        seeds = [int(seed) for seed in batch["seed"]]
        if references == "none":
            with self.pristine():
                return self.sampler(batch["text"], batch["negative_text"], None, seeds, self.image_side)
        images = []
        for who, rows in people_of(batch):
            if not self.as_is:
                self.personalise(who)
            prompts = [self.personal_prompt(batch["prompt"][row]) for row in rows]
            images.append(self.draw(prompts, [seeds[row] for row in rows]))
        return torch.cat(images)

    def draw(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Draw an image a prompt and seed, with the weights as they are."""
        negative = {name: rows.expand(len(seeds), *rows.shape[1:]) for name, rows in self.encode([""]).items()}
        return self.sampler(self.encode(prompts), negative, None, seeds, self.image_side)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def method(self) -> str:
        """Return `DreamBooth` and its options."""
        options = ["text"] * (self.tuned == "unet+text") + ["LoRA"] * (self.lora_rank is not None)
        return " + ".join(["DreamBooth", *options])

    def settings(self) -> str:
        """Return the options that decide the weights' shapes."""
        return f"DreamBooth(tuned={self.tuned}, lora_rank={self.lora_rank})"

    def provenance(self) -> dict[str, Any]:
        """Return the facts of a checkpoint, and which person it knows."""
        person, reference_set = self.learnt or (None, None)
        return super().provenance() | {"person": person, "reference_set": reference_set}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or backbone; read which person it knows."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint["lit_multiip"]
        self.learnt = (found["person"], found["reference_set"]) if found["person"] is not None else None

    def describe(self) -> dict[str, Any]:
        """Return method, backbone, tuning, sampling and number of trained parameters, for a results file."""
        tuning = ("steps", "batch_size", "prior_weight", "class_images", "identifier", "class_noun", "seed")
        facts = super().describe() | {name: getattr(self, name) for name in tuning}
        return {name: value for name, value in facts.items() if name not in ("person", "reference_set")}
