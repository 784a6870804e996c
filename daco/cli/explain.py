"""Which atoms fire on a prompt, by name, without steering: behind `daco explain`; no files."""

from typing import Any

import pandas as pd
import torch

from daco.capture import capture
from daco.sites import image_token_ids
from daco.steering_sae import SteeringSAE

COLUMNS = ("layer", "atom", "polarity", "concepts", "positions", "image", "strength")


@torch.no_grad()
def fired(model: Any, sae: SteeringSAE, inputs: Any) -> pd.DataFrame:
    """The atoms that fire on a prompt.

    Args:
        model: The model of the SAEs.
        sae: The SAEs.
        inputs: One prompt, as `chat_inputs` makes it.

    Returns:
        One row a layer and atom, the largest total strength of a layer first: polarity, nearest concepts,
        positions where it fires, how many of them are image tokens, and its mean strength there.
    """
    inputs = inputs.to(model.device)
    with capture(model, list(sae.layers), stop=True) as captured:
        captured.run(**inputs)
    is_image = torch.isin(inputs["input_ids"][0].cpu(), torch.tensor(image_token_ids(model)))
    rows = []
    for number, layer in sae.layers.items():
        z = captured.activations[number][0].to(layer.sae.W_dec.device, layer.sae.W_dec.dtype)
        code = layer.sae.encode(z).cpu()
        total, labels = code.sum(0), layer.labels()
        for atom in total.argsort(descending=True, stable=True)[: int((total > 0).sum())].tolist():
            on = code[:, atom] > 0
            facts = (
                number,
                atom,
                labels[atom],
                layer.names(atom)[:3],
                int(on.sum()),
                int((on & is_image).sum()),
            )
            rows.append((*facts, float(total[atom] / on.sum())))
    return pd.DataFrame(rows, columns=list(COLUMNS))
