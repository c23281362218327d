"""Multi-photo IP-Adapter: personalised images from several photos of a person, in PyTorch Lightning.

The names in `__all__` are public, and imported when they are first asked for: `import lit_multiip` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {  # the module of each public name
    "personalizer": ("Personalizer",),
    "backbone.pipeline": ("Backbone",),
    "backbone.sampler": ("Sampling",),
    "backbone.faces": ("FaceEncoder",),
    "data": ("LFW", "Folder", "MiniFaces", "PeopleSource", "Person", "Photo", "Task"),
    "datamodule": ("MultiPhotoData",),
    "methods.method": ("Method",),
    "methods.adapter": ("MultiIPAdapter",),
    "methods.dreambooth": ("DreamBooth",),
    "methods.aggregators": (
        "Aggregator", "AgreementGate", "AvgPool", "Concat", "First", "MaxPool", "NormAvgPool", "SelfAttention",
        "WeightedSum",
    ),
    "evaluation.extractors": ("Extraction", "Extractor", "Inception"),
    "evaluation.critic": ("CriticExtractor",),
    "evaluation.faces": ("FaceRecognition", "SFace"),
    "evaluation.vision": ("CLIP", "DINO"),
    "evaluation.metrics": ("CopyPaste", "IdentitySimilarity", "NearestReference"),
    "evaluation.scores": (
        "copy_paste", "diversity", "fid", "identity_scores", "identity_similarity", "inception_score",
        "inception_score_uniform", "kid", "nearest_reference",
    ),
    "evaluation.callback": ("ScoreTest",),
    "files": ("LitMultiIPError",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from lit_multiip.personalizer import Personalizer as Personalizer


def __getattr__(name: str) -> Any:
    """Import a public name's module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lit_multiip' has no attribute '{name}': the public names are in __all__")
    return getattr(importlib.import_module(f"lit_multiip.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
