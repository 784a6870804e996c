"""Quality of every concept's stimuli: how far positives stand above negatives, and whether both sides agree.

Reads the finished stages `concepts`, `embeddings` and `stimuli` of a run; returns a table, one row a linked
concept. Nothing here changes a release.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from builders.embeddings import Embeddings, load_embeddings
from builders.scores import Floats, Rows
from daco.tables import LINKS, read_table


def concept_quality(out: Path) -> pd.DataFrame:
    """Figures of every linked concept.

    Args:
        out: A run folder, done up to `stimuli`.

    Returns:
        Columns concept_id, concept, n_positive; `margin`, the mean distance (Eq. 4) of negatives less that of
        positives; `gap`, the distance of the nearest negative less that of the farthest positive (below 0:
        they overlap); `agreement`, the mean cosine of a positive's image with the captions of the other
        positives less that with the captions of negatives (above 0: image and text mean the same); `spread`,
        one less the mean cosine of two positives' images (0: all alike). Best margin first.
    """
    links = read_table(out / "stimuli" / "links.parquet", LINKS).to_pandas()
    embeddings = load_embeddings(out / "embeddings")
    places = {name: i for i, name in enumerate(embeddings.ids)}
    rows = [
        _figures(concept_id, found, embeddings, places)
        for concept_id, found in links.groupby("concept_id", sort=False)
    ]
    return pd.DataFrame(rows).sort_values(["margin", "concept_id"], ascending=[False, True], kind="stable")


def _figures(
    concept_id: object, links: pd.DataFrame, embeddings: Embeddings, places: dict[str, int]
) -> dict[str, object]:
    near, far = (links[links["role"] == role] for role in ("positive", "negative"))
    images, texts, others = (
        _units(side, [places[name] for name in chosen["stimulus_id"]])
        for side, chosen in ((embeddings.images, near), (embeddings.texts, near), (embeddings.texts, far))
    )
    return {
        "concept_id": concept_id,
        "concept": links["concept"].iloc[0],
        "n_positive": len(near),
        "margin": float(far["dist"].mean() - near["dist"].mean()),
        "gap": float(far["dist"].min() - near["dist"].max()),
        "agreement": _without_own(images @ texts.T) - float((images @ others.T).mean()),
        "spread": 1 - _without_own(images @ images.T),
    }


def _units(side: Floats, rows: list[int]) -> Floats:
    found = Rows(side).take(np.array(rows)).astype(np.float64)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def _without_own(cosines: Floats) -> float:
    """Mean of a square matrix without its diagonal; of a single pair, the pair's own."""
    n = len(cosines)
    if n == 1:
        return float(cosines[0, 0])
    return float((cosines.sum() - np.trace(cosines)) / (n * (n - 1)))
