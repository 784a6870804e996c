"""Ways to steer: what each adds to the residual stream (DESIGN 4.6 and 4.7); `daco.steering` applies them.

Reads SAEs, dictionaries and activations; knows nothing of hooks or tokens, but for the helper that reads
where a model refuses.
"""

from daco.methods.method import Change, Method
from daco.methods.mop import MOP, OMP
from daco.methods.oblique import ObliqueProjection
from daco.methods.prompt import SAFETY_PROMPT, SafetyPrompt
from daco.methods.refusal import RefusalDirection, prompt_activations
from daco.methods.sae_steering import SAESteering
from daco.methods.vectors import ActAdd, Projection

__all__ = [
    "MOP",
    "OMP",
    "SAFETY_PROMPT",
    "ActAdd",
    "Change",
    "Method",
    "ObliqueProjection",
    "Projection",
    "RefusalDirection",
    "SAESteering",
    "SafetyPrompt",
    "prompt_activations",
]
