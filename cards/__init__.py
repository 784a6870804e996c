"""Dataset and model cards: from the facts of a manifest to escaped Markdown."""
