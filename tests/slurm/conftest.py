"""The packed folder of the trainer's tests, here too."""

from tests.train.conftest import attempt, one_thread, pack

__all__ = ["attempt", "one_thread", "pack"]
