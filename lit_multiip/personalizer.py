"""The Python API: photos of a person in, pictures out; tune, score, and take away."""

from __future__ import annotations

import copy
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch import Tensor

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.drawing import NOTHING, Drawing, MaskLike, read_masks, without_copies
from lit_multiip.data.people import Person, PhotoLike, read_person, read_photos
from lit_multiip.data.photos import Photo
from lit_multiip.data.record import Record, training_record
from lit_multiip.evaluation.critic import CriticExtractor
from lit_multiip.evaluation.extractors import Extractor, refuse_conditioning_network
from lit_multiip.evaluation.person import score_images, see
from lit_multiip.evaluation.pictures import to_picture
from lit_multiip.export.card import record_of
from lit_multiip.export.weights import check_target, embed_person, write
from lit_multiip.files import LitMultiIPError, first_line, quiet_logger
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import Aggregator
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Dtype, Method
from lit_multiip.pixels import square, to_tensor
from lit_multiip.pretrained import Pretrained, load_pretrained, read_extractors
from lit_multiip.tuning import FollowTuning, Progress, Tuned, copy_trained, tune_person


class PersonalizerError(LitMultiIPError):
    """What a person's photos or a tuning lack; the message says what to do."""


@dataclass(eq=False)
class Shared:
    """A built method with which several people are drawn, one at a time, each by weights of their own."""

    loaded: Pretrained
    extractors: list[Extractor] | None
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    lock: Any = field(default_factory=threading.RLock)
    tuning: Any = field(default_factory=threading.Lock)
    owner: Tuned | None = None  # whose weights are in the model; None: as loaded
    untuned: Tuned | None = None  # as loaded, once others have been in their place


class Personalizer:
    """Draws one person from photos, by a trained adapter or DreamBooth.

    Photos that `tune` holds out do not condition from then on either, so that `score` may compare with them.

    It is light: `with_photos` returns another one for other photos that shares the model, while tuned weights are each
    one's own. Several threads may use them; they take turns.

        me = Personalizer.from_pretrained("runs/self_attn/version_0").with_photos(["a.jpg", picture, "folder/"])
        images = me("a photo of a smiling person", seeds=[0, 1], ip_scale=0.8)
        me.tune(steps=40)
        print(me.score(me("a photo of a person"), held_out=["b.jpg"]))
        me.save("exported")
    """

    def __init__(
        self, loaded: Pretrained, extractors: list[Extractor] | None = None, cache_dir: str | Path | None = None
    ) -> None:
        """Take what `load_pretrained` returned; see `from_pretrained`."""
        model, data = loaded.model.eval(), loaded.data
        data.per_person = model.per_person
        self._folder = None if cache_dir is not None else tempfile.TemporaryDirectory(prefix="lit_multiip-")
        data.cache_dir = str(cache_dir if self._folder is None else self._folder.name)
        if isinstance(model, DreamBooth):
            model.as_is = model.as_is or model.learnt is not None
        self._shared = Shared(loaded, extractors)
        self._person: Person | None = None
        self._usable: Person | None = None  # with the photos that may condition, cut as the method takes them
        self._drawn: tuple[Photo, ...] = ()
        self._held_out: Sequence[Photo] = ()
        self._tuned: Tuned | None = None
        if data.photos is not None and Path(data.photos).expanduser().is_dir():  # a run of one person
            self._person = read_person(data.photos)
            split = data.split_photos(self._person)
            self._usable, self._held_out = split.train[0], split.validation[0].photos

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Backbone,
        method: str | Callable[[int], Aggregator] | type[Method] | None = None,
        backbone: Backbone | None = None,
        extractors: list[Extractor] | None = None,
        cache_dir: str | Path | None = None,
        dtype: Dtype | None = None,
        **options: Any,
    ) -> Personalizer:
        """Load a run, an exported folder or hub id; or, with a method, a backbone and its published adapter.

        Args:
            source: folder of a run (its best checkpoint is taken), exported folder, or its hub id; with `method` a
                `Backbone`, or what it is called: `mini`, a diffusers folder, a hub id.
            method: name or class of an aggregator, such as `AvgPool`, or `DreamBooth`.
            backbone: of exported files, where their record does not say where it lies.
            extractors: networks that score; None takes the run's, else, of the miniature, its critics.
            cache_dir: where the encoders' outputs are kept; None takes a folder that goes when this object goes. With
                the commands' own, `runs/features`, images equal theirs to the last bit.
            dtype: of the frozen weights, such as `bfloat16`; `save` takes `float32`.
            options: of the method, such as `lora_rank` or `sampling`.
        """
        return cls(load_pretrained(source, method, backbone, dtype, **options), extractors, cache_dir)

    # ---- what it is ---------------------------------------------------------------------------------------------

    @property
    def model(self) -> Method:
        """The LightningModule, built; with whose weights depends on who drew last."""
        return self._shared.loaded.model

    @property
    def person(self) -> Person:
        """The person and all photos of them."""
        if self._person is None:
            raise PersonalizerError("there are no photos yet: call with_photos(['a.jpg', picture, 'folder/']) first")
        return self._person

    @property
    def references(self) -> tuple[Photo, ...]:
        """The photos that condition, as many as the method was trained with; none that tuning held out."""
        if not self._drawn:  # DreamBooth takes all
            person, data = self._usable_person(), self._shared.loaded.data
            self._drawn = without_copies(person).photos if self.model.per_person else data.draw_references(person)
        return self._drawn

    def _usable_person(self) -> Person:
        if self._usable is None:
            [self._usable] = self._shared.loaded.data.usable([self.person])
        return self._usable

    @property
    def tuned(self) -> Tuned | None:
        """What `tune` did; None before."""
        return self._tuned

    @property
    def is_tuning(self) -> bool:
        """Whether this object, or one that shares its model, tunes just now."""
        return bool(self._shared.tuning.locked())

    def to(self, device: str | torch.device) -> Personalizer:
        """Move the model, for all that share it, and return this object."""
        with self._shared.lock:
            self._shared.device = self._shared.loaded.data.device = torch.device(device)
            self.model.to(device)
        return self

    def with_photos(self, photos: PhotoLike | Sequence[PhotoLike], name: str = "person") -> Personalizer:
        """Return a Personalizer of these photos, any number of one person; weights that were tuned stay.

        Args:
            photos: files, folders of one person's photos, pictures (PIL), or `Photo`s. A text file beside a photo file
                is its prompt.
            name: of the person, for files that are written; a single folder's own where that is all that is given.
        """
        new = copy.copy(self)
        new._person, new._usable, new._drawn, new._held_out = read_photos(photos, name), None, (), ()
        return new

    # ---- drawing ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = (0,),
        weights: Sequence[float] | None = None,
        negatives: PhotoLike | Sequence[PhotoLike] | None = None,
        beside: Personalizer | Sequence[Personalizer] = (),
        masks: MaskLike | Sequence[MaskLike] = (),
        **sampling: Any,
    ) -> list[Image.Image]:
        """Draw every prompt with every seed: the same images as `predict` draws.

            me("a photo of a person", weights=[2, 1, 1, 0, 1], negatives="not_like_these", ip_end=0.6)
            you = me.with_photos("Bo_Ray")
            me("a photo of two people", beside=you, masks=["left.png", "right.png"])

        Args:
            prompts: what to draw; the person is "a person" in it, never a name.
            seeds: an image each per prompt.
            weights: one a photo, in the order of `person.photos` less those that tuning held out; then of each person
                beside. A photo of weight 2 counts as two, one of 0 is left out, and all others are used.
            negatives: photos that guidance leads away from.
            beside: further people in the picture, made by `with_photos`; this object's weights draw them too.
            masks: pictures in black and white (files, PIL) of an image's size, one a person, this one's first: white
                where that person's photos act.
            sampling: of `Sampling`, for this call alone: `ip_scale`, `guidance_scale`, `steps`, ...
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        data = self._shared.loaded.data
        with self.weights_in_place() as model, self._drawing(**sampling):
            references, drawing = self.choose_photos(weights, negatives, beside, masks)
            model.check_drawing(drawing)
            self._prepare(model)
            data.request(self.person.name, references, texts, numbers, drawing)
            parts = []
            for number, batch in enumerate(data.predict_dataloader()):
                parts.append(model.predict_step(move_data_to_device(batch, self._shared.device), number).cpu())
        return [to_picture(image) for image in torch.cat(parts)]

    def choose_photos(
        self,
        weights: Sequence[float] | None = None,
        negatives: PhotoLike | Sequence[PhotoLike] | None = None,
        beside: Personalizer | Sequence[Personalizer] = (),
        masks: MaskLike | Sequence[MaskLike] = (),
    ) -> tuple[tuple[Photo, ...], Drawing]:
        """Return the references of a drawing, and what acts on it besides; the arguments are those of a call."""
        others = list(beside) if isinstance(beside, Sequence) else [beside]
        areas = read_masks(masks if isinstance(masks, Sequence) and not isinstance(masks, str) else [masks])
        if weights is None and negatives is None and not others and not areas:
            return self.references, NOTHING
        if any(not isinstance(one, Personalizer) or one._shared is not self._shared for one in others):
            raise PersonalizerError("beside this person stand people of the same model: make them by with_photos(...)")
        data = self._shared.loaded.data
        unlike = [] if negatives is None else data.usable([read_photos(negatives, "negatives")])
        people = [one._usable_person() for one in (self, *others)]
        shares = None if weights is None else [weights] if isinstance(weights, int | float) else list(weights)
        return data.draw_together(people, weights=shares, negatives=unlike, masks=areas)

    def _prepare(self, model: Method) -> None:
        if isinstance(model, MultiIPAdapter):
            model.refuse_random_adapter()
        elif isinstance(model, DreamBooth) and not model.as_is:
            model.prepare_class_images()

    @property
    def image_embeds(self) -> list[Tensor]:
        """What a diffusers pipeline takes as `ip_adapter_image_embeds`: no photo and the person's, [(2, M, ...)]."""
        with self.weights_in_place() as model, torch.no_grad():
            if not isinstance(model, MultiIPAdapter):
                raise PersonalizerError(f"{model.method()} has no image embeddings: the identifier draws the person")
            return [embed_person(model, model.photo_encoder(), self.references)]

    def to_pipeline(self) -> Any:
        """Return a plain diffusers pipeline with copies of the weights, on the same device.

        Its call takes `ip_adapter_image_embeds=me.image_embeds`, as do other pipelines made of it by `from_pipe`.
        """
        with self.weights_in_place() as model:
            backbone = model.backbone
            texts = {name: backbone.load(name, model.unet.dtype) for name in backbone.text_components}
            if isinstance(model, DreamBooth):
                texts |= {name: copy.deepcopy(getattr(model, name)) for name in model.text_encoders()}
            scheduler = getattr(diffusers, model.sampling.scheduler).from_config(backbone.load("scheduler").config)
            unet = copy.deepcopy(model.unet).requires_grad_(False)
            pipe = backbone.pipeline(unet=unet, vae=backbone.load("vae"), scheduler=scheduler, **texts)
            if isinstance(model, MultiIPAdapter):
                pipe.set_ip_adapter_scale(model.sampling.ip_scale)
            return pipe.to(self._shared.device, model.unet.dtype)

    # ---- tuning -------------------------------------------------------------------------------------------------

    def tune(
        self,
        steps: int | None = None,
        learning_rate: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Personalizer:
        """Tune on the photos, as `fit --photos` does, and return this object.

        Two of the photos, and at most one of five, are held out. Their prompts are drawn before, and four times
        meanwhile; the weights with the best identity are kept. Without a network that scores, the last are kept.
        Held-out photos do not condition after it. Once `score` was asked, `with_photos` may give all of them again.

        Args:
            steps: of the optimiser; None takes 40, or DreamBooth's own.
            learning_rate: None takes 2e-4, or DreamBooth's own.
            progress: is told of every step, in the thread of the tuning.
            stop: is asked after every step; True ends the tuning with the best weights so far.
        """
        if (steps is not None and steps < 1) or (learning_rate is not None and not 0 < learning_rate < math.inf):
            raise PersonalizerError(f"steps={steps} and learning_rate={learning_rate} must be above 0")
        if not self._shared.tuning.acquire(blocking=False):
            raise PersonalizerError("another tuning is going on with this model: wait until it has ended, or stop it")
        try:
            with self.weights_in_place() as model:
                self._keep_untuned()
                try:
                    of = (model, self._shared.loaded.data, self.person, self._shared.device)
                    how = (self._shared.loaded.precision, self.extractors, steps, learning_rate)
                    with quiet_logger("lightning.pytorch"):
                        tuned = self._tuned = tune_person(*of, *how, FollowTuning(progress, stop))
                finally:
                    self._put(self._tuned or self._shared.untuned)
                self._usable, self._drawn = replace(self.person, photos=tuple(tuned.photos)), ()
                self._held_out = tuned.held_out
        finally:
            self._shared.tuning.release()
        return self

    # ---- scores, and away ---------------------------------------------------------------------------------------

    def score(
        self,
        images: Sequence[Image.Image],
        held_out: PhotoLike | Sequence[PhotoLike] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Say how much images look like the person, as means over the images.

        Args:
            images: of the person, as this object draws them.
            held_out: photos of the person that were not given; None takes those that tuning held out.
            prompts: of the images, to say how well they follow them.

        Returns:
            By `<score>/<extractor>`, as in `evaluation/README.md`: `identity_held_out_mean` to the held-out photos,
            `identity_references` and `nearest_reference` to the photos given, and `prompt`.
        """
        judges = self.extractors
        if not judges or not images:
            lacks = "no network scores real photos by itself: from_pretrained(..., extractors=[SFace()])"
            raise PersonalizerError(lacks if images else "there are no images to score: draw some")
        if prompts is not None and len(prompts) != len(images):
            raise PersonalizerError(f"{len(images)} images have {len(prompts)} prompts: give one an image")
        out = self._held_out if held_out is None else read_photos(held_out, "held out").photos
        references = list(dict.fromkeys(self.references))
        known = {photo.original().content_key() for photo in references}
        if copies := [photo.name for photo in out if photo.original().content_key() in known]:
            raise PersonalizerError(f"'{copies[0]}' is among the photos that are drawn from: give one that is not")
        side, device = self.model.image_side, self._shared.device
        real = to_tensor(square(photo.image(), side) for photo in (*out, *references))
        pixels = to_tensor(square(image.convert("RGB"), side) for image in images)
        scores: dict[str, float] = {}
        with self._shared.lock:
            for judge in judges:
                seen, at = see(judge, real, device), range(len(out) + len(references))
                scores |= score_images(judge, pixels, seen, at[: len(out)], at[len(out) :], prompts, device)
        return scores

    def save(
        self, folder: str | Path, overwrite: bool = False, dtype: Literal["float32", "float16"] = "float32"
    ) -> list[Path]:
        """Write what `export` writes: weights for plain diffusers, the person's embeddings, and a card.

        Returns:
            The files.
        """
        loaded = self._shared.loaded
        people: dict[str, Sequence[Photo]] = {}
        if self._person is not None and not self.model.per_person:
            people = {self._person.name: self.references}
        check_target(folder, list(people), overwrite)
        with self.weights_in_place() as model:
            if model.unet.dtype != torch.float32:
                raise PersonalizerError("frozen weights are rounded: load with dtype='float32' to save")
            self._keep_untuned()
            step = self._tuned.steps if self._tuned else loaded.step
            record = record_of(model, loaded.data, step, loaded.name, dtype)
            record |= {"precision": loaded.precision}
            try:
                return write(model, folder, record, loaded.config, self.trained_on(), people, overwrite)
            finally:
                self._put(self._tuned or self._shared.untuned)  # a file's dtype rounds them
                model.on_fit_end()

    def trained_on(self) -> Record:
        """Return the record of whom the weights know, the person who was tuned on among them."""
        tuned = self._tuned
        people = [] if tuned is None else [Person(self.person.name, tuple(tuned.photos))]
        held_out = () if tuned is None else tuned.held_out
        return training_record(people, self._shared.loaded.trained_on, held_out=held_out)

    # ---- whose weights, and how ---------------------------------------------------------------------------------

    @property
    def extractors(self) -> list[Extractor] | None:
        """The networks that score, made once; None where none is known."""
        shared = self._shared
        if shared.extractors is None:
            shared.extractors = read_extractors(shared.loaded.config)
            if shared.extractors is None and self.model.backbone.path == "mini":
                shared.extractors = [CriticExtractor()]
        for extractor in shared.extractors or ():
            refuse_conditioning_network(extractor, self.model.backbone)
        return shared.extractors

    @contextmanager
    def weights_in_place(self) -> Iterator[Method]:
        """Have the model to oneself, with one's own weights in it."""
        with self._shared.lock:
            if self._shared.owner is not self._tuned:
                self._put(self._tuned or self._shared.untuned)
            yield self.model

    @torch.no_grad()
    def _put(self, tuned: Tuned | None) -> None:
        """Put weights into the model."""
        assert tuned is not None
        model, shared = self.model, self._shared
        for name, parameter in model.trained_parameters().items():
            parameter.copy_(tuned.weights[name])
        torch.clear_autocast_cache()  # it may hold casts of the weights before
        shared.owner = None if tuned is shared.untuned else tuned
        if isinstance(model, DreamBooth):
            model.learnt, model.as_is = tuned.learnt, tuned is not shared.untuned or tuned.steps > 0

    def _keep_untuned(self) -> None:
        """Keep a copy of the weights as they were loaded, before others take their place."""
        if self._shared.untuned is None:
            model = self.model
            learnt, knows = (model.learnt, model.as_is) if isinstance(model, DreamBooth) else (None, False)
            self._shared.untuned = Tuned(copy_trained(model), learnt, (), (), int(knows), {}, {})

    @contextmanager
    def _drawing(self, **sampling: Any) -> Iterator[None]:
        """Draw meanwhile by changed options, in the precision of the run, and without gradients."""
        model, known = self.model, {one.name for one in fields(Sampling)}
        if odd := sampling.keys() - known:
            raise PersonalizerError(f"'{min(odd)}' is no option of drawing: give {', '.join(sorted(known))}")
        own, sampler = model.sampling, model.sampler
        try:
            changed = replace(own, **sampling)
        except (TypeError, ValueError) as error:
            raise PersonalizerError(f"images cannot be drawn so: {first_line(error)}") from error
        model.check_sampling(changed)
        model.sampling = sampler.sampling = changed
        if changed.scheduler != own.scheduler:  # which a sampler is made with
            model._sampler = None
        kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self._shared.loaded.precision)
        try:
            with torch.no_grad(), torch.autocast(self._shared.device.type, kind, enabled=kind is not None):
                yield
        finally:
            model.sampling, model._sampler = own, sampler
            sampler.sampling = own
