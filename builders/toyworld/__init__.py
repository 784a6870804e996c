"""The toy world: drawn pictures, a tiny CLIP and a tiny LLaVA trained on them, methods compared."""
