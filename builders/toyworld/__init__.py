"""The toy world: drawn pictures, a tiny CLIP and a tiny LLaVA trained on them, and the comparison of methods."""
