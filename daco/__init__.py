"""DACO: load concept dictionaries and steering SAEs, and steer multimodal LLMs with them."""

from daco.assignment import PerRow
from daco.dictionary import ConceptDictionary
from daco.manifest import FORMAT_VERSION
from daco.methods import (
    MOP,
    OMP,
    ActAdd,
    ObliqueProjection,
    Projection,
    RefusalDirection,
    SAESteering,
    SafetyPrompt,
)
from daco.sae import SAE, LayerSAE
from daco.sites import ModelFacts, find_trunk
from daco.steering import Run, attach, steer
from daco.steering_sae import SteeringSAE
from daco.wrapping import Wrapped, wrap

__version__ = "0.1.0"

__all__ = [
    "FORMAT_VERSION",
    "MOP",
    "OMP",
    "SAE",
    "ActAdd",
    "ConceptDictionary",
    "LayerSAE",
    "ModelFacts",
    "ObliqueProjection",
    "PerRow",
    "Projection",
    "RefusalDirection",
    "Run",
    "SAESteering",
    "SafetyPrompt",
    "SteeringSAE",
    "Wrapped",
    "attach",
    "find_trunk",
    "steer",
    "wrap",
]
