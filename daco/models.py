"""Which models of transformers can be steered, and how that is known; reads the table in `models.json`."""

import json
from importlib.resources import files

import pandas as pd

STATUSES = ("tested", "resolves", "does not")
"""`tested`: steered logits were compared with a slow reference. `resolves`: the decoder blocks are found;
no model was run. `does not`: they are not, or hold no one residual stream, and the row says why."""

COLUMNS = (
    "name",
    "model_type",
    "model_class",
    "takes",
    "status",
    "because",
    "shown",
    "image_scope",
    "forward",
)


def supported() -> pd.DataFrame:
    """Every image-text and text model class of transformers that was looked at, tested ones first.

    The table was made by tests (`python -m builders.model_table` in the project's checkout), with the version
    of transformers in `attrs["transformers"]`.

    Returns:
        One row a class and model type: `name` (as people call it; empty where nothing but its config was
        tried), `model_type`, `model_class`, `takes` ("images and text" or "text"), `status` (of STATUSES),
        `because` (why it does not resolve), `shown` (what the tests showed, comma separated), `image_scope`
        (whether its config names its image tokens, for `scope="image"`) and `forward` (whether its first
        blocks gave the residual stream in a forward of shapes alone; False also where none could be made).

    Example:
        >>> models = supported()
        >>> sorted(models["status"].unique())
        ['does not', 'resolves', 'tested']
    """
    found = json.loads(files("daco").joinpath("models.json").read_text("utf-8"))
    table = pd.DataFrame(found["models"], columns=list(COLUMNS))
    table.attrs["transformers"] = found["transformers"]
    return table
