"""STTS (Spatio-Temporal Token Scoring) on Molmo2, for Hugging Face Transformers. Names are loaded when first used."""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_stts_molmo import STTSConfig as STTSConfig
    from .configuration_stts_molmo import STTSMolmoConfig as STTSMolmoConfig
    from .modeling_stts_molmo import STTSMolmoForConditionalGeneration as STTSMolmoForConditionalGeneration
    from .modeling_stts_molmo import STTSMolmoModel as STTSMolmoModel
    from .processing_stts_molmo import STTSMolmoProcessor as STTSMolmoProcessor
    from .processing_stts_molmo import STTSMolmoVideoProcessor as STTSMolmoVideoProcessor
    from .tools.answer import WatchedVideo as WatchedVideo
    from .tools.checkpoint import Checkpoint as Checkpoint
    from .tools.conversion import convert_checkpoint as convert_checkpoint
    from .tools.training import VideoQACollator as VideoQACollator
    from .tools.training import log_aux_loss as log_aux_loss
    from .tools.training import parameter_groups as parameter_groups
    from .tools.visualization import visualize as visualize
    from .tools.why import see_why as see_why

    __version__: str

MODULES = {
    "Checkpoint": "tools.checkpoint",
    "STTSConfig": "configuration_stts_molmo",
    "STTSMolmoConfig": "configuration_stts_molmo",
    "STTSMolmoForConditionalGeneration": "modeling_stts_molmo",
    "STTSMolmoModel": "modeling_stts_molmo",
    "STTSMolmoProcessor": "processing_stts_molmo",
    "STTSMolmoVideoProcessor": "processing_stts_molmo",
    "VideoQACollator": "tools.training",
    "WatchedVideo": "tools.answer",
    "convert_checkpoint": "tools.conversion",
    "log_aux_loss": "tools.training",
    "parameter_groups": "tools.training",
    "see_why": "tools.why",
    "visualize": "tools.visualization",
}
__all__ = [*MODULES, "__version__"]
if "__path__" in globals():  # pytest reads this file alone, in a folder with a name that no package has
    __path__.append(os.path.join(__path__[0], "tools", "entry"))  # where `python -m` finds its `__main__`


def __getattr__(name: str):
    if name == "__version__":
        return version("stts-molmo")
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
