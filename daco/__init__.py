"""DACO: load concept dictionaries and steering SAEs, and steer multimodal LLMs with them."""

from daco.dictionary import ConceptDictionary
from daco.manifest import FORMAT_VERSION
from daco.sae import SAE, LayerSAE
from daco.steering_sae import SteeringSAE

__version__ = "0.1.0"

__all__ = ["FORMAT_VERSION", "SAE", "ConceptDictionary", "LayerSAE", "SteeringSAE"]
