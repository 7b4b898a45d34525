"""The small study of tests/steps/study."""

from tests.steps.study.conftest import calm, place

__all__ = ["calm", "place"]
