"""A crash in the middle of a run."""

from medmoe_jax.data.batches import BatchStream


class Stop(Exception):
    """Stands for a crash."""


def crash_in_batch(monkeypatch, number):
    """The stream fails when the batch of this number, over all stages, is asked for."""
    given, real = [], BatchStream.__next__

    def fail(stream):
        given.append(0)
        if len(given) == number:
            raise Stop
        return real(stream)

    monkeypatch.setattr(BatchStream, "__next__", fail)
