"""The quality page of a run: its best, median and worst concepts with their pictures, in one HTML file.

Reads a run folder that is done up to `stimuli`; returns HTML, or writes it:
`python -m cards.quality RUN PAGE.html`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from builders.corpus import image_file, open_image
from builders.quality import concept_quality
from builders.stages import done
from cards.pictures import data_url
from cards.render import TEMPLATES
from daco.errors import DacoError

SHOWN = 6
"""Concepts of each group."""
POSITIVES, NEGATIVES = 6, 3
"""Pictures of each concept."""
THUMBNAIL = 96
FIGURES = ("margin", "gap", "agreement", "spread")


def quality_html(out: Path, title: str) -> str:
    """The quality page.

    Args:
        out: A run folder, done up to `stimuli`.
        title: What it is called; text.

    Returns:
        A self-contained HTML page; every text from data is escaped.
    """
    done(out, "stimuli")
    table = concept_quality(out)
    shown = _Shown(out)
    middle = max(0, (len(table) - SHOWN) // 2)
    groups = [("Best", table.head(SHOWN)), ("Median", table.iloc[middle : middle + SHOWN]),
              ("Worst", table.tail(SHOWN).iloc[::-1])]  # fmt: skip
    counts = done(out, "stimuli")["counts"]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    return environment.get_template("quality.html.jinja").render(
        title=title,
        n_concepts=len(table),
        n_stimuli=shown.n_linked,
        busiest=shown.busiest,
        dropped=[
            (what, [(name.replace("_", " "), n) for name, n in sorted(counts.get(key, {}).items()) if n])
            for what, key in (("concepts", "skipped"), ("candidates", "candidates_dropped"))
        ],
        overlapping=float((table["gap"] < 0).mean()),
        disagreeing=float((table["agreement"] <= 0).mean()),
        quantiles=_quantiles(table),
        groups=[(name, [shown.concept(row) for row in part.to_dict("records")]) for name, part in groups],
    )


def _quantiles(table: pd.DataFrame) -> list[tuple[str, list[float]]]:
    """Of each figure the 5 %, 25 %, 50 %, 75 % and 95 % quantiles over concepts."""
    return [(name, np.quantile(table[name], (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()) for name in FIGURES]


class _Shown:
    """What the page shows of a concept's stimuli.

    Args:
        out: The run folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        links = pd.read_parquet(out / "stimuli" / "links.parquet")
        self.links = dict(iter(links.groupby("concept_id", sort=False)))
        self.stimuli = pd.read_parquet(out / "corpus" / "stimuli.parquet").set_index("stimulus_id")
        uses = links[links["role"] == "positive"]["stimulus_id"].value_counts()
        self.n_linked = int(links["stimulus_id"].nunique())
        self.busiest = int(uses.max())

    def concept(self, row: dict[str, Any]) -> dict[str, Any]:
        """A concept's figures and pictures."""
        links = self.links[row["concept_id"]]
        sides = {}
        for role, n in (("positive", POSITIVES), ("negative", NEGATIVES)):
            found = links[(links["role"] == role) & (links["rank"] < n)].sort_values("rank")
            sides[role] = [self._picture(link) for link in found.to_dict("records")]
        return row | {"positives": sides["positive"], "negatives": sides["negative"]}

    def _picture(self, link: dict[str, Any]) -> dict[str, Any]:
        row = self.stimuli.loc[link["stimulus_id"]]
        caption = row["caption"] if len(row["caption"]) <= 60 else row["caption"][:59] + "…"
        facts = {"caption": caption, "image": ""} | {k: link[k] for k in ("dist", "sim_image", "sim_text")}
        try:
            small = open_image(image_file(self.out / "corpus", row["file"]))
        except Exception:  # its pixels are elsewhere, or gone since
            return facts
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return facts | {"image": data_url(small)}


def main() -> int:
    """Write the page of a run; our own errors end it with one line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, done up to stimuli")
    parser.add_argument("page", type=Path, help="HTML file to write")
    arguments = parser.parse_args()
    title = f"Stimuli of {arguments.run.resolve().name}"
    try:
        arguments.page.write_text(quality_html(arguments.run, title), encoding="utf-8")
    except DacoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
