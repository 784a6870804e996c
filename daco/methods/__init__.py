"""Ways to steer: what each adds to the residual stream (DESIGN 4.6 and 4.7); `daco.steering` applies them.

Reads SAEs and dictionaries; knows nothing of models, hooks or tokens.
"""

from daco.methods.method import Change, Method
from daco.methods.mop import MOP
from daco.methods.prompt import SAFETY_PROMPT, SafetyPrompt
from daco.methods.sae_steering import SAESteering
from daco.methods.vectors import ActAdd, Projection

__all__ = [
    "MOP",
    "SAFETY_PROMPT",
    "ActAdd",
    "Change",
    "Method",
    "Projection",
    "SAESteering",
    "SafetyPrompt",
]
