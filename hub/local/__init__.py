"""A local Hub over HTTP, for the demo, for tests and for places without a network."""
