"""A test without a backbone: data, a method that draws the held-out photos themselves, and an extractor."""

from __future__ import annotations

import csv
import json

import lightning as L
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from trainers import quiet_trainer

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.split import Split, split_people
from lit_multiip.data.tasks import make_tasks
from lit_multiip.evaluation.callback import ScoreTest
from lit_multiip.evaluation.extractors import Extraction, Extractor

SIDE = 64


class Thumbnail(Extractor):
    """Pixels of a 3 x 3 thumbnail; of prompts it reads those with purple shirts, and finds that all agree."""

    num_features = 27
    num_classes = 27
    can_identify = True

    def __init__(self, name="thumbnail", source=None):
        super().__init__()
        self.name, self.source = name, source
        self.freeze()

    def compute(self, images):
        features = F.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)
        return Extraction(features, features, features)

    def prompt_agreement(self, images, prompts):
        return torch.tensor([1.0 if "purple shirt" in prompt else float("nan") for prompt in prompts])


class Tasks(Dataset):
    def __init__(self, tasks, others):
        self.tasks, self.others = tasks, others

    def __len__(self):
        return len(self.tasks)

    def __getitem__(self, i):
        pixels = torch.from_numpy(np.array(self.tasks[i].held_out.image())).permute(2, 0, 1)
        mean = pixels / 127.5 - 1
        item = {"task": i, "seed": self.tasks[i].seed, "moments": torch.cat([mean, torch.zeros_like(mean)])}
        return item | ({"other_references": i} if self.others else {})


class Data(L.LightningDataModule):
    def __init__(self, test=3, seeds=1, photos=6, others=True):
        super().__init__()
        self.others = others  # whether there are references of another person
        self.seed = 0
        self.split: Split = split_people(MiniFaces(0, train=4, validation=1, test=test, photos=photos).people())
        self.tasks = make_tasks(self.split.test, references=4, held_out=2, seeds=seeds)

    def test_dataloader(self):
        return DataLoader(Tasks(self.tasks, self.others), batch_size=2)


class Perfect(L.LightningModule):
    """Makes the held-out photo itself; without the right references, noise that depends on the seed alone."""

    image_side = SIDE
    conditions = ("right", "none", "zero", "other")

    def __init__(self, backbone=".", name="Perfect"):
        super().__init__()
        self.spent = {"personalise": 0.5}
        self.trained_on = None
        self.identity_networks = {}
        self.backbone, self.name = Backbone(backbone), name
        self.calls = []

    def describe(self):
        return {"method": self.name, "backbone": self.backbone.path, "guidance_scale": float("inf")}

    def test_step(self, batch, i):
        self.calls.append("method")
        return self.generate(batch)

    def generate(self, batch, references="right"):
        self.calls.append(references)
        if references == "right":
            return self.decode(batch["moments"].chunk(2, dim=1)[0])
        noise = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
        return torch.stack([torch.randint(0, 256, (3, SIDE, SIDE), generator=g).to(torch.uint8) for g in noise])

    def decode(self, latents):
        return ((latents + 1) * 127.5).round().to(torch.uint8)


def run(folder, *, module=None, data=None, trainer_options=None, **options):
    options = {"extractors": [Thumbnail()], "output": str(folder), "resamples": 50, **options}
    trainer = quiet_trainer(callbacks=[ScoreTest(**options)], **(trainer_options or {}))
    logged = trainer.test(module or Perfect(), datamodule=data or Data(), verbose=False)
    return trainer, logged[0]


def read(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with (folder / "scores.csv").open() as file:
        return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse), list(csv.DictReader(file))
