import importlib.util
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_backbone
from torch import Tensor
from torch.utils.data import default_collate
from trainers import quiet_trainer

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.photos import DataError
from lit_multiip.datamodule import MultiPhotoData, PredictArgs
from lit_multiip.evaluation.critic import CriticExtractor
from lit_multiip.finite import NonFiniteLoss, RequireFinite
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.class_images import ClassImages
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.people import Who, people_of
from lit_multiip.runs import CheckpointError

PEOPLE = ["test_000000", "test_000001"]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


def faces(backbone: Path, features: str, **options: Any) -> MultiPhotoData:
    source = MiniFaces(train=2, validation=2, test=2, photos=11)
    data = MultiPhotoData(Backbone(str(backbone)), source, cache_dir=features, **{"held_out": 2, **options})
    data.per_person = True  # as setup finds out from the trainer's module
    return data


@pytest.fixture(scope="module")
def data(tiny_backbone, features):
    data = faces(tiny_backbone, features)
    data.setup("test")
    return data


@pytest.fixture(scope="module")
def tasks(data):
    """Two people, two held-out photos each."""
    return next(iter(data.test_dataloader()))


@pytest.fixture
def tuned_on(monkeypatch):
    """The person of every step."""
    people = []
    original = DreamBooth.losses
    monkeypatch.setattr(
        DreamBooth, "losses", lambda self, who, step: people.append(who.person) or original(self, who, step)
    )
    return people


def person(tasks: dict[str, Any], row: int) -> Who:
    return Who(tasks["person"][row], tasks["reference_set"][row], tasks["reference_moments"][row])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def dreambooth(backbone: Path, folder: str, **options: Any) -> DreamBooth:
    options = {
        "optimizer": sgd,
        "lr_schedule": "constant",
        "steps": 2,
        "batch_size": 2,
        "prior_weight": 1.0,
        "class_images": 3,
        "sampling": Sampling(steps=2),
    } | options
    return DreamBooth(Backbone(str(backbone)), class_folder=folder, **options)


def built(backbone: Path, folder: str, **options: Any) -> DreamBooth:
    module = dreambooth(backbone, folder, **options)
    module.configure_model()
    module.prepare_class_images()
    return module


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return quiet_trainer(**{"default_root_dir": folder, "max_steps": -1, "precision": "bf16-mixed", **options})


def weights(module: DreamBooth) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in module.state_dict().items()}


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


# The loss


def test_the_snr_as_weight_turns_equation_12_into_the_epsilon_error(tiny_backbone, features):
    module = built(tiny_backbone, features)
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(10, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([1, 5, 50, 100, 200, 400, 600, 800, 950, 999])
    prompt_embeds = module.encode(["a photo of sks person"])["prompt_embeds"].expand(10, -1, -1)
    alpha_bar = module.noise.alphas_cumprod.double()[t][:, None, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = alpha * x + sigma * eps
    with torch.no_grad():
        eps_hat = module.unet(x_t.float(), t, prompt_embeds).sample.double()
        x_hat = (x_t - sigma * eps_hat) / alpha
        equation_12 = (alpha**2 / sigma**2 * (x_hat - x) ** 2).mean(dim=(1, 2, 3))
        ours = module.denoising_loss(x.float(), eps.float(), t, {"prompt_embeds": prompt_embeds})
    assert (equation_12 / ours - 1).abs().max() < 1e-4


def test_the_two_terms_are_of_the_persons_photos_and_of_class_images(tiny_backbone, features, tasks):
    module, who = built(tiny_backbone, features), person(tasks, 0)
    class_moments = load_file(module.prior.file())["moments"].float()
    terms = [("references", who.moments, "a photo of sks person"), ("class", class_moments, "a photo of a person")]
    with torch.no_grad():
        for loss, (term, moments, prompt) in zip(module.losses(who, 7), terms, strict=True):
            draws = module.draws(who.person, 7, term, len(moments))
            mean, logvar = moments[draws.which].chunk(2, dim=1)
            x = (mean + (logvar / 2).exp() * draws.latent_noise) * module.backbone.scaling_factor
            expected = module.denoising_loss(x, draws.eps, draws.t, module.encode([prompt, prompt])).mean()
            assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_the_prior_term_has_steps_and_noise_of_its_own(tiny_backbone, features):
    module = built(tiny_backbone, features, batch_size=4)
    own = [module.draws("Ann", step, "references", 9) for step in range(250)]
    prior = [module.draws("Ann", step, "class", 9) for step in range(250)]
    t, t_prior = (torch.cat([one.t for one in draws]).double() for draws in (own, prior))
    eps, eps_prior = (torch.cat([one.eps.flatten() for one in draws]).double() for draws in (own, prior))
    noise = torch.cat([one.latent_noise.flatten() for one in own]).double()
    for a, b in ((t, t_prior), (eps, eps_prior), (eps, noise)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5
    assert abs(float(t.mean()) - 499.5) < 4 * 1000 / (12 * len(t)) ** 0.5
    assert set(torch.cat([one.which for one in own]).tolist()) == set(range(9))


def test_draws_are_of_the_seed_the_person_and_the_step(tiny_backbone, features):
    module, other = built(tiny_backbone, features), built(tiny_backbone, features, seed=1)
    one = module.draws("Ann", 3, "references", 9)
    assert all(torch.equal(a, b) for a, b in zip(one, module.draws("Ann", 3, "references", 9), strict=True))
    for elsewhere in (
        module.draws("Bob", 3, "references", 9),
        module.draws("Ann", 4, "references", 9),
        other.draws("Ann", 3, "references", 9),
    ):
        assert not torch.equal(one.eps, elsewhere.eps) and not torch.equal(one.t, elsewhere.t)


def test_the_prior_term_changes_what_is_learnt(tiny_backbone, features, tasks):
    tuned = []
    for prior_weight in (0.0, 1.0, 1.0):
        module = built(tiny_backbone, features, prior_weight=prior_weight)
        module.personalise(person(tasks, 0))
        tuned.append(weights(module))
    assert changed(tuned[0], tuned[1]) and not changed(tuned[1], tuned[2])


def test_a_loss_of_nan_stops(tiny_backbone, features, tasks):
    module = built(tiny_backbone, features)
    module.watch = RequireFinite()
    with pytest.raises(NonFiniteLoss, match="loss is nan at step 0, of test_000000"):
        module.personalise(person(tasks, 0)._replace(moments=torch.full((9, 8, 8, 8), float("nan"))))


# Nothing leaks from one person to the next


@pytest.mark.parametrize("tuned", ["unet", "unet+text"])
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_backbones_own_weights_come_back_bit_for_bit(tiny_backbone, features, tasks, tuned, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    module = built(tiny_backbone, features, tuned=tuned, lora_rank=lora_rank)
    before = weights(module)
    module.personalise(person(tasks, 0))
    after = weights(module)
    moved = changed(before, after)
    assert moved and moved <= set(module.trained_parameters())
    assert {name.split(".")[0] for name in moved} == {"unet": {"unet"}, "unet+text": {"unet", "text_encoder"}}[tuned]
    assert all((".lora_" in name) == bool(lora_rank) for name in moved)
    with module.pristine():
        assert not changed(before, weights(module))
    assert not changed(after, weights(module))
    module.forget()
    assert not changed(before, weights(module)) and module.learnt is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_persons_images_are_bit_equal_whoever_came_before(tiny_backbone, features, tmp_path, precision):
    def drawn(names):
        images = {name: [] for name in names}
        module, data = dreambooth(tiny_backbone, features), faces(tiny_backbone, features)

        class Watch(L.Callback):
            def setup(self, *_, **__):
                data.tasks = [task for task in data.tasks if task.person in names]

            def on_test_start(self, *_):
                self.before = weights(module)

            def on_test_batch_end(self, _, __, outputs, batch, *___):
                for name, image in zip(batch["person"], outputs, strict=True):
                    images[name].append(image)

        trainer(tmp_path, callbacks=[watch := Watch()], precision=precision).test(module, data, verbose=False)
        assert not changed(watch.before, weights(module))
        return images

    after, alone = drawn(PEOPLE), drawn(PEOPLE[1:])
    assert [len(images) for images in after.values()] == [2, 2]
    assert torch.equal(torch.stack(after[PEOPLE[1]]), torch.stack(alone[PEOPLE[1]]))


def test_a_person_in_two_batches_is_tuned_on_once(tiny_backbone, features, tmp_path, tuned_on):
    module, data = dreambooth(tiny_backbone, features, steps=3), faces(tiny_backbone, features, eval_batch_size=1)
    trainer(tmp_path).test(module, data, verbose=False)
    assert tuned_on == [PEOPLE[0]] * 3 + [PEOPLE[1]] * 3
    assert module.spent["personalise"] > 0


def test_held_out_photos_are_never_tuned_on(data, tasks):
    assert data.features is not None
    held_out = {task.held_out.content_key() for task in data.tasks}
    for row, task in enumerate(data.tasks):
        assert not held_out & {photo.content_key() for photo in task.references}
        expected = torch.stack([data.features.moments(photo) for photo in task.references])
        assert torch.equal(tasks["reference_moments"][row], expected)


# Drawing


def test_without_references_it_is_the_backbone_also_after_tuning(tiny_backbone, features, tasks):
    module = built(tiny_backbone, features)
    adapter = MultiIPAdapter(Backbone(str(tiny_backbone)), sampling=Sampling(steps=2))
    adapter.configure_model()
    with torch.no_grad():
        plain, tuned, again = (module.generate(tasks, given) for given in ("none", "right", "none"))
        theirs = adapter.generate({**tasks, "references": torch.zeros(4, 9, 24)}, "none")
    assert torch.equal(plain, again) and not torch.equal(plain, tuned)
    assert (plain.int() - theirs.int()).abs().max() <= 1
    for given in ("zero", "other"):
        assert given not in module.conditions
        with pytest.raises(ValueError, match=f"cannot be conditioned on references='{given}'"):
            module.generate(tasks, given)


def test_the_identifier_is_in_what_is_drawn_and_the_tasks_prompts_are_left_alone(
    tiny_backbone, features, tasks, monkeypatch
):
    module, asked = built(tiny_backbone, features), []
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    prompts = list(tasks["prompt"])
    with torch.no_grad():
        module.generate(tasks)
    assert tasks["prompt"] == prompts and not any("sks" in prompt for prompt in prompts)
    assert {module.personal_prompt(prompt) for prompt in prompts} <= set(asked)
    assert {prompt for prompt in asked if "sks" not in prompt} == {"", "a photo of a person"}


@pytest.mark.parametrize(
    ("prompt", "personal"),
    [
        ("a photo of a person", "a photo of sks person"),
        ("a photo of a person in a red shirt", "a photo of sks person in a red shirt"),
        ("a photo of a smiling person, in a hat", "a photo of a smiling sks person, in a hat"),
        ("the Person and a person", "sks Person and a person"),
        ("person", "sks person"),
        ("in a personal hat", "in a personal hat, sks person"),
        ("two persons", "two persons, sks person"),
        ("a man in a suit", "a man in a suit, sks person"),
    ],
)
def test_the_identifier_stands_before_the_class_noun(prompt, personal):
    assert DreamBooth().personal_prompt(prompt) == personal


def test_another_identifier_and_noun_are_taken_as_they_are():
    module = DreamBooth(identifier=r"\1z", class_noun="dog")
    assert module.personal_prompt("a dog (a person's)") == r"\1z dog (a person's)"
    assert module.class_prompt() == "a photo of a dog"


def test_the_identifier_is_one_token_of_the_miniature_and_more_are_told(tiny_backbone, features, caplog):
    from lit_multiip.mini.tokenizer import IDENTIFIERS

    assert DreamBooth().identifier == IDENTIFIERS[0]
    assert len(Backbone("mini").load("tokenizer")(IDENTIFIERS[0]).input_ids) == 3
    built(tiny_backbone, features, prior_weight=0)  # whose tokens are letters
    assert "'sks' is 3 tokens" in caplog.text


# Class images


def test_class_images_are_drawn_once_and_by_the_backbone(tiny_backbone, tmp_path, tasks, monkeypatch):
    module = built(tiny_backbone, str(tmp_path), class_images=5)
    assert module.spent["class_images"] > 0
    stored = load_file(module.prior.file())
    assert stored["images"].shape == (5, 3, 32, 32) and stored["images"].dtype == torch.uint8
    assert stored["moments"].shape == (5, 8, 8, 8)
    assert [path.name for path in module.prior.file().parent.iterdir()] == ["images.safetensors"]
    with torch.no_grad():
        plain = module.sampler(module.encode(["a photo of a person"]), module.encode([""]), None, [3], 32)
    assert (plain[0].int() - stored["images"][3].int()).abs().max() <= 1

    tuned = dreambooth(tiny_backbone, str(tmp_path / "again"), class_images=5)
    tuned.configure_model()
    tuned.prior.moments = stored["moments"].float()
    tuned.personalise(person(tasks, 0))
    tuned.prepare_class_images()  # by the backbone, whoever was learnt before
    assert torch.equal(load_file(tuned.prior.file())["images"], stored["images"])

    def fail(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(ClassImages, "write", fail)
    assert "class_images" not in built(tiny_backbone, str(tmp_path), class_images=5).spent
    built(tiny_backbone, str(tmp_path), prior_weight=0, class_images=7)
    with pytest.raises(AssertionError, match="drawn again"):
        built(tiny_backbone, str(tmp_path), class_images=5, sampling=Sampling(steps=3))


def test_broken_class_images_are_told(tiny_backbone, tmp_path):
    file = built(tiny_backbone, str(tmp_path)).prior.file()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"images\.safetensors' cannot be read .*delete the file"):
        built(tiny_backbone, str(tmp_path))


# fit and predict


@pytest.fixture(scope="module")
def fitted(tiny_backbone, features, tmp_path_factory):
    """A module fitted to the first test person, and its checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    module, fit = dreambooth(tiny_backbone, features, steps=3), trainer(folder)
    fit.fit(module, datamodule=faces(tiny_backbone, features, person=PEOPLE[0]))
    fit.save_checkpoint(folder / "last.ckpt")
    assert fit.global_step == 3
    return module, folder / "last.ckpt"


def test_fit_learns_what_test_learns_bit_for_bit(fitted, tiny_backbone, features, tmp_path):
    learnt = {}

    class Keep(L.Callback):
        def on_test_batch_end(self, _, module, outputs, batch, *__):
            learnt[batch["person"][0]] = weights(module)

    module, data = dreambooth(tiny_backbone, features, steps=3), faces(tiny_backbone, features, eval_batch_size=2)
    trainer(tmp_path, callbacks=[Keep()]).test(module, data, verbose=False)
    assert not changed(learnt[PEOPLE[0]], weights(fitted[0]))
    assert changed(learnt[PEOPLE[1]], weights(fitted[0]))


def test_a_checkpoint_holds_what_was_tuned_and_whom_it_knows(fitted):
    checkpoint = torch.load(fitted[1], weights_only=True)
    assert set(checkpoint["state_dict"]) == {name for name in fitted[0].state_dict() if name.startswith("unet.")}
    assert checkpoint["lit_multiip"]["person"] == PEOPLE[0]
    assert checkpoint["global_step"] == 3


def test_predict_draws_the_person_of_a_checkpoint_without_tuning(fitted, tiny_backbone, features, tmp_path, tuned_on):
    def draw(name, checkpoint):
        module = dreambooth(tiny_backbone, features, steps=3)
        data = faces(tiny_backbone, features, person=name, predict=PredictArgs(None, ["a person", "in a hat"], [0, 1]))
        made = trainer(tmp_path).predict(module, data, ckpt_path=checkpoint, weights_only=True)
        return torch.cat(made)

    images = draw(PEOPLE[0], fitted[1])
    assert tuned_on == []
    assert torch.equal(images, draw(PEOPLE[0], None)) and tuned_on == [PEOPLE[0]] * 3
    other = draw(PEOPLE[1], fitted[1])  # of whom the checkpoint knows nothing
    assert tuned_on[3:] == [PEOPLE[1]] * 3
    assert torch.equal(other, draw(PEOPLE[1], None)) and not torch.equal(images, other)


def test_a_test_tunes_on_the_person_of_a_checkpoint_too(fitted, tiny_backbone, features, tmp_path, tuned_on, caplog):
    caplog.set_level("INFO")
    module, data = dreambooth(tiny_backbone, features, steps=1), faces(tiny_backbone, features)
    trainer(tmp_path).test(module, data, ckpt_path=fitted[1], weights_only=True, verbose=False)
    assert tuned_on == PEOPLE
    assert "test tunes on everyone from the start, also on test_000000" in caplog.text


def test_an_interrupted_fit_goes_on_to_the_same_weights_and_with_nobody_else(fitted, tiny_backbone, features, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
                trainer.should_stop = True

    def fit(name, **options):
        module = dreambooth(tiny_backbone, features, steps=3)
        given = {"ckpt_path": tmp_path / "two.ckpt", "weights_only": True} if not options else {}
        trainer(tmp_path, **options).fit(module, datamodule=faces(tiny_backbone, features, person=name), **given)
        return module

    two = fit(PEOPLE[0], callbacks=[Stop()])
    assert two.global_step == 2 and changed(weights(two), weights(fitted[0]))
    assert not changed(weights(fit(PEOPLE[0])), weights(fitted[0]))
    with pytest.raises(CheckpointError, match="the checkpoint is of test_000000, not of test_000001"):
        fit(PEOPLE[1])


def test_checkpoints_of_other_methods_and_other_tuning_are_refused(fitted, tiny_backbone, features, tmp_path):
    checkpoint = torch.load(fitted[1], weights_only=True)
    adapter = MultiIPAdapter(Backbone(str(tiny_backbone)))
    adapter.configure_model()
    with pytest.raises(CheckpointError, match=r"another method: DreamBooth\(tuned=unet, lora_rank=None\).*Self"):
        adapter.on_load_checkpoint(checkpoint)
    theirs = {"state_dict": adapter.state_dict()}
    adapter.on_save_checkpoint(theirs)
    with pytest.raises(CheckpointError, match=r"another method: SelfAttention.*DreamBooth\(tuned=unet"):
        built(tiny_backbone, features).on_load_checkpoint(theirs)
    with pytest.raises(CheckpointError, match=r"this model: DreamBooth\(tuned=unet\+text"):
        built(tiny_backbone, features, tuned="unet+text").on_load_checkpoint(checkpoint)
    elsewhere = make_tiny_backbone(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="another backbone"):
        built(elsewhere, features).on_load_checkpoint(checkpoint)


def test_lora_keeps_and_saves_the_additions_alone(tiny_backbone, features, tmp_path, tasks):
    pytest.importorskip("peft")
    options = {"lora_rank": 2, "frozen_dtype": "bfloat16"}
    module, fit = dreambooth(tiny_backbone, features, **options), trainer(tmp_path)
    fit.fit(module, datamodule=faces(tiny_backbone, features, person=PEOPLE[0]))
    fit.save_checkpoint(path := tmp_path / "lora.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    # four linear layers of the two attentions of each of the four blocks, two factors each
    assert len(state) == 4 * 2 * 4 * 2 and all(".lora_" in name for name in state)
    assert {values.dtype for values in state.values()} == {torch.float32}
    assert module.unet.conv_in.weight.dtype == torch.bfloat16
    again = built(tiny_backbone, features, **options)
    again.on_load_checkpoint(checkpoint)
    texts = tasks["text"], tasks["negative_text"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = again.sampler(*texts, None, [0] * 4, 32)
        again.load_state_dict(state, strict=False)
        torch.clear_autocast_cache()
        after = again.sampler(*texts, None, [0] * 4, 32)
    assert not torch.equal(before, after)
    assert again.method() == "DreamBooth + LoRA"
    assert again.describe()["trained_parameters"] == sum(values.numel() for values in state.values())


def test_lora_without_peft_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'lit_multiip\[lora\]'"):
        DreamBooth(lora_rank=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lr_schedule": "cosine", "steps": 20}, r"model\.steps=20 end within the 20 steps.*_dreambooth\.yaml"),
        ({"prior_weight": -1.0}, "prior_weight=-1"),
        ({"prior_weight": float("nan")}, "prior_weight=nan"),
        ({"identifier": " "}, "must not be empty"),
        ({"sampling": Sampling(ip_scale=0.5)}, "ip_scale=0.5 has no effect"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DreamBooth(**wrong)


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, None, r"learns one person: set data\.person to one of the 6, such as test_000000"),
        ({}, "test_0000", r"no person 'test_0000': .* such as test_000"),
        ({"precision": "bf16-true"}, PEOPLE[0], r"nothing is trained: use bf16-mixed"),
        ({"max_steps": 1}, PEOPLE[0], r"max_steps is 1 and model\.steps 2"),
        ({"max_steps": 3}, PEOPLE[0], r"max_steps is 3 and model\.steps 2"),
        pytest.param(
            {"precision": "16-mixed", "accelerator": "gpu"},
            PEOPLE[0],
            r"use trainer\.precision bf16-mixed",
            marks=pytest.mark.gpu,
        ),
    ],
)
def test_a_fit_that_cannot_go_well_is_refused_before_work(tiny_backbone, features, tmp_path, options, name, message):
    module = dreambooth(tiny_backbone, features)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options).fit(module, datamodule=faces(tiny_backbone, features, person=name))
    assert module.unet is None


def test_an_adapter_does_not_learn_one_person(tiny_backbone, features, tmp_path):
    data = faces(tiny_backbone, features, person=PEOPLE[0])
    with pytest.raises(DataError, match="is for methods that learn one person"):
        trainer(tmp_path).fit(MultiIPAdapter(Backbone(str(tiny_backbone))), datamodule=data)


def test_facts_for_a_results_file(tiny_backbone, features, tasks):
    module = built(tiny_backbone, features)
    module.personalise(person(tasks, 0))
    facts = module.describe()
    assert facts["method"] == "DreamBooth" and facts["steps"] == 2 and facts["identifier"] == "sks"
    assert facts["trained_parameters"] == sum(p.numel() for p in module.unet.parameters())
    assert "person" not in facts and json.dumps(facts)


# The default setting


@pytest.mark.slow
def test_the_default_setting_learns_a_person_on_the_miniature(tmp_path):
    """Three people that no training saw; identity by critic_b to four held-out photos each."""
    data = MultiPhotoData(source=MiniFaces(train=2, validation=3, test=2, photos=13), cache_dir=str(tmp_path))
    data.per_person, data.tested = True, "validation"
    data.setup("test")
    module, critic, tasks = DreamBooth(), CriticExtractor("critic_b"), default_collate(list(dataset_of(data)))
    module.configure_model()
    untuned, images = identity(critic, module.generate(tasks, "none"), data), []
    for who, rows in people_of(tasks):
        module.forget()
        before = own_loss(module, who)
        module.personalise(who)
        assert own_loss(module, who) < 0.9 * before, who.person
        prompts = [module.personal_prompt(tasks["prompt"][row]) for row in rows]
        images.append(module.draw(prompts, [int(tasks["seed"][row]) for row in rows]))
    tuned = identity(critic, torch.cat(images), data)
    print(f"identity by critic_b: untuned {untuned:.3f}, tuned {tuned:.3f}")
    assert tuned > untuned + 0.4


def dataset_of(data: MultiPhotoData) -> Any:
    dataset = data.test_dataloader().dataset
    return (dataset[i] for i in range(len(data.tasks)))


def own_loss(module: DreamBooth, who: Who) -> float:
    """The loss on the person's photos, the mean over 16 steps' draws that no tuning has."""
    with torch.no_grad():
        return float(torch.stack([module.losses(who, step)[0] for step in range(10_000, 10_016)]).mean())


def identity(critic: CriticExtractor, images: Tensor, data: MultiPhotoData) -> float:
    """The mean cosine of images and their held-out photos."""
    photos = [torch.from_numpy(np.array(task.held_out.image().convert("RGB"))).permute(2, 0, 1) for task in data.tasks]
    made, wanted = (critic.embed(batch.float()) for batch in (images, torch.stack(photos)))
    return float(torch.cosine_similarity(made, wanted).mean())
