"""The small model of the conversion tests."""

from tests.unit.conversion.conftest import model_config

__all__ = ["model_config"]
