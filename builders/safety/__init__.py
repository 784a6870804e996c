"""The safety evaluation: suites of prompts, a model under each method, judges of its answers, the table."""
