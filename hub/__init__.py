"""Plan, publish and verify releases on a Hub; and a local Hub for demos, tests and air-gapped use."""
