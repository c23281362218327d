"""Beginning at another backbone: its configurations, and its weights as far as they fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.record import Record
from lit_multiip.files import shorten
from lit_multiip.mini.training import RecipeError

logger = logging.getLogger(__name__)

PREFIX = "text_model."  # of a text encoder's weights, which some versions of transformers write


class Start:
    """The backbone that a recipe begins at.

    Args:
        path: as `backbone.path`; None begins at random weights, and takes all configurations from the recipe.
    """

    def __init__(self, path: str | None) -> None:
        self.path, self._backbone = path, None if path is None else Backbone(path)

    def config(self, component: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of a component: the backbone's, and over it what is given."""
        found: Any = {} if self._backbone is None else self._backbone.load(component).config
        known = found if isinstance(found, Mapping) else found.to_dict()
        return {key: value for key, value in {**known, **given}.items() if not key.startswith("_")}

    def fill(self, module: nn.Module, component: str) -> None:
        """Copy those weights of the backbone's component that `module` has in the same size; name the others."""
        if self._backbone is None:
            return
        theirs = {key.removeprefix(PREFIX): v for key, v in self._backbone.load(component).state_dict().items()}
        own = module.state_dict()
        fitting = {key: theirs[key] for key in own if key in theirs and theirs[key].shape == own[key].shape}
        if not fitting:
            raise RecipeError(f"start_from='{self.path}': none of its weights of '{component}' fits: leave it out")
        sizes = [
            f"{key} {tuple(theirs[key].shape)} => {tuple(own[key].shape)}"
            for key in own
            if key in theirs and key not in fitting
        ]
        absent = [key for key in own if key not in theirs]
        module.load_state_dict(fitting, strict=False)
        logger.info("%s: %d of %d weights are those of '%s'", component, len(fitting), len(own), self.path)
        if sizes:
            logger.warning(
                "%s: %d weights have another size, and begin anew: %s", component, len(sizes), shorten(sizes)
            )
        if absent:
            logger.warning("%s: %d weights are not there, and begin anew: %s", component, len(absent), shorten(absent))

    def scheduler(self) -> dict[str, Any]:
        """Return the configuration of the noise: the backbone's, or Stable Diffusion's own."""
        own = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
        if self._backbone is None:
            return own
        config = dict(self._backbone.load("scheduler").config)
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise RecipeError(
                f"start_from='{self.path}' predicts {config['prediction_type']}, and the UNet is trained to predict "
                "epsilon: begin at another backbone"
            )
        return {key: config[key] for key in (*own, "num_train_timesteps") if key in config}

    def record(self) -> Record | None:
        """Return the record of the people whom the backbone was trained on; None where it has none."""
        return None if self._backbone is None else self._backbone.trained_on()
