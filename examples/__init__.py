"""A package of its own, so that `python -m examples.acceptance` never finds another one of that name."""
