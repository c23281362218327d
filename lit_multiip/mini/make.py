"""`python -m lit_multiip make-mini`: draw the portraits, train every network of the miniature, write its folder.

The stages run in the order of `STAGES`; each reads what earlier ones wrote to `--out`, so that one can be remade
alone. Measured on one thread of a 2-core CPU; see `measure.py` for what the result can do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lit_multiip.backbone.ip_adapter import ip_adapter_state
from lit_multiip.cli import CLI
from lit_multiip.mini import stages
from lit_multiip.mini.portraits import Portraits
from lit_multiip.mini.tokenizer import MAX_LENGTH, make_tokenizer
from lit_multiip.pixels import to_signal

CRITIC_PEOPLE, CRITIC_PHOTOS = 500, 40
BACKBONE_PEOPLE, BACKBONE_PHOTOS = 8000, 5


class Maker:
    """Makes the miniature's folder stage by stage.

    Args:
        out: the folder to write; a diffusers pipeline folder, plus `critic/` and `critic_b/`.
        work: where portraits and training states are kept between calls.
        seed: decides every portrait, every initial weight and every draw.
        scale: multiplies every stage's number of steps; below 1 for a trial.
    """

    def __init__(self, out: Path, work: Path, seed: int, scale: float) -> None:
        self.out, self.work, self.seed, self.scale = out, work, seed, scale

    def _portraits(self) -> Portraits:
        return Portraits(self.work, "backbone", BACKBONE_PEOPLE, BACKBONE_PHOTOS, self.seed)

    def _fit(self, stage: L.LightningModule, data: Dataset[Any], steps: int, batch: int, ema: float | None) -> None:
        """Train `stage`; an interrupted training goes on from its last checkpoint."""
        steps, folder = max(10, int(steps * self.scale)), self.work / type(stage).__name__
        name = getattr(getattr(stage, "critic", None), "config", {}).get("architecture", "stage")
        checkpoints = ModelCheckpoint(folder, name, every_n_train_steps=100, enable_version_counter=False)
        callbacks: list[L.Callback] = [checkpoints]
        if ema is not None:
            callbacks.append(EMAWeightAveraging(decay=ema))
        loader = DataLoader(data, batch, shuffle=True, drop_last=True)
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed",
            max_steps=steps,
            logger=CSVLogger(folder, name),
            callbacks=callbacks,
            enable_model_summary=False,
            log_every_n_steps=25,
            gradient_clip_val=1.0,
        )
        resume = folder / f"{name}.ckpt"
        trainer.fit(stage, loader, ckpt_path=str(resume) if resume.exists() else None, weights_only=True)

    def critic(self, role: str = "critic", architecture: str = "convnet", steps: int = 1000) -> None:
        """Train one critic on its own people. After 1400 steps it knew 76 % from one photo: too many, see gate.py."""
        data = Portraits(self.work, role, CRITIC_PEOPLE, CRITIC_PHOTOS, self.seed)
        stage = stages.CriticStage(architecture, CRITIC_PEOPLE, CRITIC_PHOTOS)
        self._fit(stage, data, steps, 128, ema=None)
        stage.critic.save(self.out / role)

    def critic_b(self) -> None:
        """Train the second critic: another architecture, other people."""
        self.critic("critic_b", "patchnet", 1400)

    def clip(self) -> None:
        """Train tokenizer, text encoder and image encoder."""
        data = self._portraits()
        tokenizer = make_tokenizer(self.out / "tokenizer")
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vision_config = CLIPVisionConfig(
            hidden_size=160,
            intermediate_size=480,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            projection_dim=128,
        )
        text, vision = CLIPTextModelWithProjection(text_config), CLIPVisionModelWithProjection(vision_config)
        stage = stages.CLIPStage(vision, text, tokenizer, data)
        self._fit(stage, data, 1600, 128, ema=None)
        self._fit(stages.CLIPImageStage(stage), data, 5000, 128, ema=None)
        _save_for_float32(vision, self.out / "image_encoder")
        plain = CLIPTextModel(text_config)
        plain.load_state_dict({key.removeprefix("text_model."): v for key, v in text.text_model.state_dict().items()})
        _save_for_float32(plain, self.out / "text_encoder")
        weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in plain.state_dict().items()}
        save_file(weights, self.out / "text_encoder" / "model.safetensors", {"format": "pt"})  # all versions read these
        CLIPImageProcessor(
            size={"shortest_edge": 64},
            crop_size={"height": 64, "width": 64},
            image_mean=stages.MEAN,
            image_std=stages.STD,
        ).save_pretrained(self.out / "feature_extractor")

    def vae(self) -> None:
        """Train the autoencoder, then set its scaling factor so that latents have unit variance."""
        data = self._portraits()
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=16,
            sample_size=64,
        )
        self._fit(stages.VAEStage(vae), data, 8000, 8, ema=0.999)
        vae.eval()
        with torch.no_grad():
            images = torch.stack([data[i]["image"] for i in range(0, len(data), len(data) // 512)])
            latents = torch.cat([vae.encode(to_signal(part)).latent_dist.mean for part in images.split(64)])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        vae.half().save_pretrained(self.out / "vae")

    def vae_decoder(self) -> None:
        """Train the autoencoder's decoder further; latents, and with them the UNet, stay as they are."""
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(self.out / "vae"))  # keeps no path in its config
        vae.load_state_dict(load_file(self.out / "vae" / "diffusion_pytorch_model.safetensors"))
        vision = CLIPVisionModelWithProjection.from_pretrained(self.out / "image_encoder").float()
        self._fit(stages.VAEDecoderStage(vae, vision), self._portraits(), 3000, 8, ema=0.999)
        vae.half().save_pretrained(self.out / "vae")

    def unet(self) -> None:
        """Train the UNet on latents of the backbone's people."""
        data = self._portraits()
        vae: Any = AutoencoderKL.from_pretrained(self.out / "vae").float().eval()
        path = self.work / "moments.pt"
        if not path.exists():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                batches = tqdm(DataLoader(data, 64), "encoding portraits")
                moments = [vae.encode(to_signal(b["image"])).latent_dist.parameters.half() for b in batches]
            torch.save(torch.cat(moments), path)
        scheduler: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        unet: Any = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(96, 160),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=2,  # the number of heads: few and wide ones are several times faster on CPU
        )
        stage = stages.UNetStage(
            unet,
            scheduler,
            torch.load(path),
            vae.config.scaling_factor,
            CLIPTextModel.from_pretrained(self.out / "text_encoder").float(),
            CLIPTokenizer.from_pretrained(self.out / "tokenizer"),
            data,
        )
        self._fit(stage, torch.arange(len(data)), 5000, 32, ema=0.999)  # type: ignore[arg-type]
        unet.half().save_pretrained(self.out / "unet")
        DDIMScheduler.from_config(scheduler.config, steps_offset=1, set_alpha_to_one=False).save_pretrained(
            self.out / "scheduler"
        )
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (self.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def ip_adapter(self) -> None:
        """Train the single-photo IP-Adapter as the published one was, by the project's own `fit`."""
        config = Path(__file__).with_name("ip_adapter.yaml")
        steps = yaml.safe_load(config.read_text())["trainer"]["max_steps"]
        options = {
            "config": config,
            "backbone.path": self.out,
            "seed_everything": self.seed,
            "data.cache_dir": self.work / "features",
            "trainer.max_steps": max(10, int(steps * self.scale)),
            "trainer.logger.init_args.save_dir": self.work,
        }
        shutil.rmtree(self.out / "ip_adapter", ignore_errors=True)
        fit = CLI(["fit", *(f"--{key}={value}" for key, value in options.items())])
        state = ip_adapter_state(fit.model.unet)
        (self.out / "ip_adapter").mkdir()
        flat = {f"{part}.{key}": value.half() for part, values in state.items() for key, value in values.items()}
        save_file(flat, self.out / "ip_adapter" / "ip-adapter_mini.safetensors")


STAGES = ["critic", "critic_b", "clip", "vae", "unet", "ip_adapter", "vae_decoder"]


def _save_for_float32(module: Any, folder: Path) -> None:
    """Save weights as float16 with a configuration that reads them as float32, as diffusers reads the UNet's."""
    module.half().save_pretrained(folder)
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_mini(
    out: str = "runs/mini/weights",
    work: str = "runs/mini/work",
    seed: int = 0,
    stages: list[str] | None = None,
    scale: float = 1.0,
) -> None:
    """Make the miniature backbone from a seed.

    Args:
        out: folder to write; copy it over `lit_multiip/mini/weights` to ship it.
        work: folder for portraits and training states, so that an interrupted training goes on.
        seed: decides portraits, initial weights and draws.
        stages: which to make, of critic, critic_b, clip, vae, unet, ip_adapter and vae_decoder; all by default, in
            this order.
        scale: multiplies every number of training steps.
    """
    unknown = set(stages or []) - set(STAGES)
    if unknown:
        raise SystemExit(f"unknown stages {sorted(unknown)}: choose from {STAGES}")
    maker = Maker(Path(out), Path(work), seed, scale)
    for number, stage in enumerate(STAGES):
        if stages is None or stage in stages:
            L.seed_everything(seed + number)
            getattr(maker, stage)()
