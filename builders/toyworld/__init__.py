"""The toy world: a procedurally drawn corpus, small enough to build everything from on a laptop."""
