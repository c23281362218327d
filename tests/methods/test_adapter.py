import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerState
from tiny import make_tiny_backbone
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from trainers import quiet_trainer

from lit_multiip.backbone import sampler as sampling
from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.people import MiniFaces
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.files import LitMultiIPError, hash_file
from lit_multiip.finite import NonFiniteLoss, RequireFinite
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import AvgPool, Concat, MaxPool, SelfAttention
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.runs import CheckpointError

Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(tiny_backbone, tmp_path_factory):
    data = MultiPhotoData(
        Backbone(str(tiny_backbone)),
        MiniFaces(train=3, validation=2, test=2, photos=11),
        batch_size=8,
        held_out=2,
        cache_dir=str(tmp_path_factory.mktemp("features")),
    )
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture(scope="module")
def tasks(data):
    return next(iter(data.test_dataloader()))


@pytest.fixture
def batch(data):
    return next(iter(data.train_dataloader()))


def built(backbone: Path, aggregator: Any = SelfAttention, steps: int = 3, **options: Any) -> MultiIPAdapter:
    module = MultiIPAdapter(Backbone(str(backbone)), aggregator, sampling=Sampling(steps=steps), **options)
    module.configure_model()
    module.log = lambda *_, **__: None
    return module.eval()


def one(batch: Batch, index: int) -> Batch:
    return default_collate([_row(batch, index)])


def _row(batch: Batch, index: int) -> Batch:
    return {name: _row(rows, index) if isinstance(rows, dict) else rows[index] for name, rows in batch.items()}


# Training


def test_self_attention_without_queries_has_the_validation_loss_of_average_pooling(tiny_backbone, tasks, monkeypatch):
    logged = {}
    for name, aggregator in {"ours": lambda dim: SelfAttention(dim, query_scale=0), "theirs": AvgPool}.items():
        module = built(tiny_backbone, aggregator)
        values = logged[name] = {}
        monkeypatch.setattr(
            module, "log", lambda name, value, *_, _into=values, **__: _into.update({name: float(value)})
        )
        with torch.no_grad():
            module.validation_step(tasks, 0)
    ours, theirs = logged["ours"], logged["theirs"]
    assert set(ours) == {
        "val/loss",
        "val/gap_shuffled",
        "val/gap_dropped",
        *(f"val/loss_t{t}" for t in (125, 375, 625, 875)),
    }
    assert ours == pytest.approx(theirs, abs=1e-5)
    bins = [value for name, value in ours.items() if name.startswith("val/loss_t")]
    assert ours["val/loss"] == pytest.approx(sum(bins) / 4, rel=1e-5)


def test_the_gap_to_another_persons_photos_is_left_out_where_there_is_nobody(tiny_backbone, tasks, monkeypatch):
    module, logged = built(tiny_backbone), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    with torch.no_grad():
        module.validation_step(tasks, 0)
        both = dict(logged)
        logged.clear()
        module.validation_step({name: value for name, value in tasks.items() if name != "other_references"}, 0)
    assert both.pop("val/gap_shuffled") != 0
    assert logged == both


def test_an_adapter_made_at_random_is_not_drawn_with_until_it_is_trained(tmp_path):
    backbone = make_tiny_backbone(tmp_path / "bare")
    module, again = built(backbone, AvgPool), built(backbone, AvgPool)
    module.trainer = again.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for start in (module.on_test_start, module.on_predict_start):
        with pytest.raises(
            BackboneError, match=r"made at random and was never trained .*--model\.ip_adapter <file>, or run"
        ):
            start()
    assert module.describe()["ip_adapter_sha256"] is None
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    again.on_load_checkpoint(checkpoint)
    again.on_predict_start()


def test_a_results_file_tells_the_adapter_by_its_content(tiny_backbone):
    [file] = (tiny_backbone / "ip_adapter").glob("*.safetensors")
    assert built(tiny_backbone, AvgPool).describe()["ip_adapter_sha256"] == hash_file(file)


def test_the_loss_is_the_epsilon_error_at_the_drawn_step(tiny_backbone, batch):
    module = built(tiny_backbone, snr_gamma=None)
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        expected = []
        for item in (one(batch, index) for index in range(len(batch["eps"]))):
            mean, logvar = item["moments"].chunk(2, dim=1)
            x = (mean + (logvar / 2).exp() * item["latent_noise"]) * module.backbone.scaling_factor
            t = (item["time"] * 1000).long()
            alpha_bar = module.noise.alphas_cumprod[t]
            noised = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * item["eps"]  # eq. (8)
            embeds = module.aggregator(item["references"]) * (0.0 if item["drop_image"] else 1.0)
            predicted = module.unet(
                noised, t, item["text"]["prompt_embeds"], added_cond_kwargs={"image_embeds": [embeds]}
            ).sample
            expected.append(((predicted - item["eps"]) ** 2).mean())
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_is_the_error_of_x0_times_the_snr_of_at_most_gamma(tmp_path, kind):
    module = built(make_tiny_backbone(tmp_path / "own", prediction_type=kind), snr_gamma=5.0)
    t = torch.tensor([0, 100, 400, 700, 999])
    x, eps, wrong = torch.randn(3, 5, 4, 8, 8).unbind()
    alpha = module.noise.alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma, snr = (1 - alpha**2).sqrt(), (alpha**2 / (1 - alpha**2)).flatten()
    assert snr[0] > 5 > snr[-1] > 0
    noised = module.noise.add_noise(x, eps, t)
    # an error of the prediction, and the error of x0 that follows from it
    error = wrong.square().mean(dim=(1, 2, 3))
    x0 = (
        (noised - sigma * (eps + wrong)) / alpha
        if kind == "epsilon"
        else alpha * noised - sigma * (module.noise.get_velocity(x, eps, t) + wrong)
    )
    expected = snr.clamp(max=5) * (x0 - x).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(error * module.loss_weights(t), expected, rtol=1e-3, atol=1e-5)


def test_the_snr_weighs_the_training_loss_and_not_the_validation_loss(tiny_backbone, batch, tasks, monkeypatch):
    plain, weighted = built(tiny_backbone), built(tiny_backbone, snr_gamma=0.5)
    batch["drop_image"][:] = False
    logged: dict[str, list[float]] = {"plain": [], "weighted": []}
    for name, module in (("plain", plain), ("weighted", weighted)):
        monkeypatch.setattr(module, "log", lambda key, value, name=name, **_: logged[name].append(float(value)))
        module.validation_step(tasks, 0)
        logged[name].append(float(module.training_step(batch, 0).detach()))
    assert logged["plain"][:-2] == logged["weighted"][:-2]
    t = (batch["time"] * 1000).long()
    assert logged["weighted"][-1] < logged["plain"][-1] and float(weighted.loss_weights(t).mean()) < 0.95
    with pytest.raises(LitMultiIPError, match=r"model.snr_gamma=0.0 must be above 0: 5 is usual, null is eq. \(1\)"):
        MultiIPAdapter(snr_gamma=0.0)


def test_a_dropped_condition_is_zeros_after_aggregation(tiny_backbone, batch):
    module = built(tiny_backbone)
    batch = {**batch, "drop_image": torch.ones_like(batch["drop_image"])}
    other = {**batch, "references": batch["references"].roll(1, 0) * 3}
    with torch.no_grad():
        dropped, elsewhere = module.training_step(batch, 0), module.training_step(other, 0)
        batch["drop_image"].zero_()
        kept = module.training_step(batch, 0)
    assert torch.equal(dropped, elsewhere) and not torch.equal(dropped, kept)


def test_training_changes_what_is_trained_and_no_bit_of_what_is_frozen(tiny_backbone, data, tmp_path):
    module = built(tiny_backbone, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), lr_warmup_steps=0)
    before = copy.deepcopy(module.state_dict())
    options = {"limit_val_batches": 0, "use_distributed_sampler": False, "default_root_dir": tmp_path}
    trainer = quiet_trainer(max_steps=4, **options)
    trainer.fit(module, data.train_dataloader())
    after, trained = module.state_dict(), set(module.trained_parameters())
    # W_q, W_k, W_v; Linear and LayerNorm with biases; K' and V' of four layers
    assert len(trained) == 3 + 4 + 2 * 4
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained

    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == trained
    assert path.stat().st_size < 400_000

    again = built(tiny_backbone)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=again.strict_loading)
    assert all(torch.equal(after[name], values) for name, values in again.state_dict().items())


def test_a_step_never_waits_for_the_device_and_does_the_unets_arithmetic_alone(tiny_backbone, batch):
    """A meta tensor has no values: whatever asked for one would raise. SD1.5 is counted in tests/benchmarks."""
    module = built(tiny_backbone).to("meta")
    batch = move_data_to_device(batch, torch.device("meta"))
    with FlopCounterMode(display=False) as step:
        module.training_step(batch, 0).backward()
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen and all(module.get_parameter(name).grad is None for name in frozen)
    assert all(p.grad is not None for p in module.trained_parameters().values())
    embeds = module.condition(batch["references"]).detach().requires_grad_()
    t = torch.zeros(len(embeds), dtype=torch.long, device="meta")
    text = batch["text"]["prompt_embeds"]
    with FlopCounterMode(display=False) as floor:
        conditions = {"image_embeds": [embeds]}
        module.unet(batch["eps"], t, text, added_cond_kwargs=conditions).sample.sum().backward()
    assert step.get_total_flops() < 1.01 * floor.get_total_flops()
    with FlopCounterMode(display=False) as whole:
        module.unet.requires_grad_(True)
        module.unet(batch["eps"], t, text, added_cond_kwargs=conditions).sample.sum().backward()
    assert whole.get_total_flops() > 1.2 * floor.get_total_flops()


@pytest.mark.parametrize("option", ["channels_last", "gradient_checkpointing"])
def test_what_changes_the_speed_changes_no_loss_and_no_gradient(tiny_backbone, batch, option):
    results = []
    for options in ({}, {option: True}):
        module = built(tiny_backbone, **options).train()
        loss = module.training_step(batch, 0)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in module.trained_parameters().items()}))
    (plain, expected), (changed, gradients) = results
    assert changed == pytest.approx(plain, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_the_aggregator_alone_can_be_trained(tiny_backbone):
    module = built(tiny_backbone, trained="aggregator")
    assert set(module.trained_parameters()) == {f"aggregator.to_{name}.weight" for name in "qkv"}
    with pytest.raises(ValueError, match=r"AvgPool.*nothing to train"):
        built(tiny_backbone, AvgPool, trained="aggregator").configure_optimizers()


def test_a_loss_of_nan_stops(tiny_backbone, batch, tasks):
    module = built(tiny_backbone)
    module.watch = RequireFinite()
    torch.nn.init.constant_(module.aggregator.to_v.weight, float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 0, of .*: lower the learning rate"):
        module.training_step(batch, 0)
    with torch.no_grad(), pytest.raises(NonFiniteLoss, match="validation loss is nan"):
        module.validation_step(tasks, 0)


# Checkpoints


def saved(module: MultiIPAdapter) -> dict[str, Any]:
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_of_another_method_is_refused(tiny_backbone):
    checkpoint = saved(built(tiny_backbone))
    for other in (AvgPool, lambda dim: SelfAttention(dim, residual=True), lambda dim: SelfAttention(dim, heads=2)):
        with pytest.raises(CheckpointError, match=r"another method: SelfAttention\(dim=24, heads=1, residual=False\)"):
            built(tiny_backbone, other).on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"set model\.trained likewise"):
        built(tiny_backbone, trained="aggregator").on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="not written by lit_multiip"):
        built(tiny_backbone).on_load_checkpoint({"state_dict": {}})


def test_load_from_checkpoint_takes_the_arguments_of_the_run_and_warns_of_nothing(tiny_backbone, tmp_path):
    module, path = built(tiny_backbone, aggregator=MaxPool), tmp_path / "last.ckpt"
    with torch.no_grad():
        for weights in module.trained_parameters().values():
            weights.add_(1.0)
    torch.save(saved(module) | {"pytorch-lightning_version": L.__version__}, path)
    backbone = {"backbone": Backbone(str(tiny_backbone)), "weights_only": True, "map_location": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = MultiIPAdapter.load_from_checkpoint(path, aggregator=MaxPool, **backbone)
    expected, found = module.state_dict(), again.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(CheckpointError, match=r"another method: MaxPool.*give load_from_checkpoint the arguments"):
        MultiIPAdapter.load_from_checkpoint(path, **backbone)


def test_a_checkpoint_of_another_backbone_is_refused_but_a_copy_is_not(tiny_backbone, tmp_path):
    checkpoint = saved(built(tiny_backbone))
    other = make_tiny_backbone(tmp_path / "other", ip_adapter=True, seed=1)
    with pytest.raises(CheckpointError, match=rf"another backbone: .*{tiny_backbone.name}.*this model: .*other"):
        built(other).on_load_checkpoint(checkpoint)
    copied = tmp_path / "copied"
    copied.symlink_to(tiny_backbone)
    built(copied).on_load_checkpoint(checkpoint)


# Drawing


def test_an_image_does_not_depend_on_its_batch(tiny_backbone, tasks):
    module = built(tiny_backbone)
    with torch.no_grad():
        together = module.generate(tasks)
        alone = torch.cat([module.generate(one(tasks, index)) for index in range(4)])
    assert together.shape == (4, 3, 32, 32) and together.dtype == torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1
    # Same prompts and noise, other people beside it: diffusers' pipeline by itself would mix their embeddings.
    strangers = {**tasks, "references": tasks["references"].clone()}
    strangers["references"][1:] *= -2
    with torch.no_grad():
        assert torch.equal(module.generate(strangers)[0], together[0])
        assert not torch.equal(module.generate(strangers)[1], together[1])


@pytest.mark.parametrize("aggregator", [Concat, AvgPool])
def test_our_sampler_is_the_plain_pipeline_bit_for_bit(tiny_backbone, tasks, aggregator):
    module = built(tiny_backbone, aggregator)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None, image_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        str(tiny_backbone), subfolder="ip_adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for task in (one(tasks, index) for index in range(4)):
        with torch.no_grad():
            positive = module.aggregator(task["references"])
            images = pipe(
                num_inference_steps=3,
                guidance_scale=3.0,
                prompt_embeds=task["text"]["prompt_embeds"],
                negative_prompt_embeds=task["negative_text"]["prompt_embeds"],
                ip_adapter_image_embeds=[torch.cat([torch.zeros_like(positive), positive])],
                generator=torch.Generator().manual_seed(int(task["seed"])),
                output_type="np",
            ).images
            ours = module.generate(task)
        assert torch.equal(ours, torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2))


def test_zero_ip_scale_equals_the_plain_backbone(tiny_backbone, tasks):
    module = built(tiny_backbone)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None, image_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        plain = pipe(
            num_inference_steps=3,
            guidance_scale=3.0,
            prompt_embeds=tasks["text"]["prompt_embeds"],
            negative_prompt_embeds=tasks["negative_text"]["prompt_embeds"],
            generator=[torch.Generator().manual_seed(int(seed)) for seed in tasks["seed"]],
            output_type="pt",
        ).images
        no_references, stranger = module.generate(tasks, ip_scale=0.0), module.generate(tasks, "other", ip_scale=0.0)
        right, zero = module.generate(tasks), module.generate(tasks, "zero")
    assert (no_references.int() - (plain * 255).round().int()).abs().max() <= 1
    assert torch.equal(no_references, stranger)
    assert not torch.equal(no_references, zero)  # zero embeddings have tokens of their own
    assert not torch.equal(right, zero)


def test_decoding_is_the_vaes(tiny_backbone, tasks):
    module = built(tiny_backbone)
    mean = tasks["moments"].chunk(2, dim=1)[0]
    with torch.no_grad():
        expected = Backbone(str(tiny_backbone)).load("vae").decode(mean).sample
        decoded = module.decode(mean)
    assert (decoded.float() - ((expected + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.51


def test_without_guidance_the_text_alone_is_no_part(tiny_backbone, tasks):
    module = MultiIPAdapter(Backbone(str(tiny_backbone)), sampling=Sampling(steps=2, guidance_scale=1.0))
    module.configure_model()
    other = {**tasks, "negative_text": {"prompt_embeds": tasks["negative_text"]["prompt_embeds"] + 1}}
    with torch.no_grad():
        assert torch.equal(module.generate(tasks), module.generate(other))


def test_a_large_batch_is_decoded_image_by_image_and_a_small_one_at_once(tiny_backbone, tasks, monkeypatch):
    module = built(tiny_backbone)
    sizes = []
    drawn = []
    for most, expected in ((10**9, [4]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr(sampling, "SLICED", most)
        sizes.clear()
        with torch.no_grad():
            drawn.append(module.generate(tasks))
            if not sizes:  # the sampler is there now
                module.sampler.pipe.vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
                module.generate(tasks)
        assert sizes == expected
    assert (drawn[0].int() - drawn[1].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan is not finite"),
        ({"ip_scale": float("inf")}, "ip_scale=inf is not finite"),
        ({"steps": 0}, "give at least 1"),
        ({"scheduler": "Nope"}, "'Nope' is not a diffusers class"),
    ],
)
def test_impossible_sampling_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("method", [MultiIPAdapter, DreamBooth])
def test_a_strategy_that_shards_weights_is_refused_by_name(name, method):
    """Its checkpoints would lack what was trained, whose names and shapes it changes."""
    cls = getattr(L.pytorch.strategies, name)
    module = method()
    module._trainer = SimpleNamespace(
        strategy=cls.__new__(cls), precision="32-true", state=TrainerState(), barebones=False
    )
    with pytest.raises(ValueError, match=rf"trainer.strategy is {name}, which shards weights: use ddp"):
        module.configure_callbacks()


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("bf16-true", {}, "nothing is trained: use bf16-mixed"),
        ("16-true", {}, "nothing is trained: use bf16-mixed"),
        ("32-true", {"frozen_dtype": "bfloat16"}, r"does not go with model\.frozen_dtype=bfloat16: use bf16-mixed"),
    ],
)
def test_a_precision_that_trains_nothing_is_refused_before_any_work(precision, options, message, tmp_path):
    data = MultiPhotoData(Backbone("mini"), MiniFaces(train=3), cache_dir=str(tmp_path / "features"))
    trainer = quiet_trainer(precision=precision, max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.fit(MultiIPAdapter(Backbone("mini"), **options), data)
    assert not list(tmp_path.iterdir())


def test_the_training_loss_is_the_mean_over_ranks(tiny_backbone, batch):
    module, logged = built(tiny_backbone), {}
    module.log = lambda name, value, **options: logged.update({name: options})
    with torch.no_grad():
        module.training_step(batch, 0)
    assert logged["train/loss"]["sync_dist"] is True


# Learning rates


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_k_and_v_learn_at_their_own_multiple_of_the_scheduled_rate(tiny_backbone, optimizer):
    options = {"optimizer": lambda p: optimizer(p, lr=0.1), "lr_schedule": "linear", "lr_warmup_steps": 0}
    module = built(tiny_backbone, kv_lr_factor=3.0, **options)
    made, schedule = module.optimizer_and_schedule(10)
    others, kv = made.param_groups
    named = module.trained_parameters()
    assert {id(p) for p in kv["params"]} == {id(p) for name, p in named.items() if name.endswith("_ip.0.weight")}
    assert len(kv["params"]) == 2 * 4 and len(others["params"]) + len(kv["params"]) == len(named)
    for step in range(10):
        assert (others["lr"], kv["lr"]) == pytest.approx((0.1 * (1 - step / 10), 0.3 * (1 - step / 10)))
        made.step()
        schedule.step()
    assert module.describe()["kv_lr_factor"] == 3.0


def test_a_step_of_sgd_moves_k_and_v_by_the_factor_and_nothing_else(tiny_backbone, batch):
    moved = {}
    for factor in (1.0, 3.0):
        module = built(tiny_backbone, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), kv_lr_factor=factor)
        made = module.build_optimizer()
        assert len(made.param_groups) == (1 if factor == 1 else 2)
        before = {name: p.detach().clone() for name, p in module.trained_parameters().items()}
        module.training_step(batch, 0).backward()
        made.step()
        moved[factor] = {name: p.detach() - before[name] for name, p in module.trained_parameters().items()}
    for name, change in moved[1.0].items():
        expected = 3 * change if "_ip.0.weight" in name else change
        torch.testing.assert_close(moved[3.0][name], expected, rtol=1e-3, atol=1e-7)


def test_a_factor_that_has_no_effect_or_no_meaning_is_refused(tiny_backbone):
    with pytest.raises(LitMultiIPError, match=r"kv_lr_factor=2.0 has no effect, as model.trained=aggregator"):
        MultiIPAdapter(trained="aggregator", kv_lr_factor=2.0)
    with pytest.raises(LitMultiIPError, match=r"kv_lr_factor=0.0 must be above 0"):
        MultiIPAdapter(kv_lr_factor=0.0)

    class WithoutRate(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1.0)
            for group in self.param_groups:
                group["lr"] = None

    with pytest.raises(LitMultiIPError, match="WithoutRate has none"):
        built(tiny_backbone, optimizer=WithoutRate, kv_lr_factor=2.0).build_optimizer()
