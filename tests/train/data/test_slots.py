"""Shared memory: the same arrays on both sides, and nothing with a name."""

from __future__ import annotations

import os

import numpy as np
import pytest

from train.data.slots import Layout, Slots, receive, share


def test_what_is_shared_arrives_whole_and_is_not_copied() -> None:
    content = {
        "odd": np.arange(7, dtype=np.uint8),
        "empty": np.zeros((0, 2), np.int64),
        "wide": np.arange(100_000, dtype=np.float64).reshape(100, -1),
        "text": "x" * 300_000,
    }
    descriptor, spans = share(content)
    try:
        received = receive(descriptor, spans)
        assert isinstance(received, dict)
        for name in ("odd", "empty", "wide"):
            assert np.array_equal(received[name], content[name])
            assert received[name].dtype == content[name].dtype  # type: ignore[attr-defined]
        assert received["text"] == content["text"]
        with pytest.raises(ValueError, match="read-only"):
            received["wide"][0, 0] = 1
        # A change of the file shows through: the arrays are the file's pages.
        os.pwrite(descriptor, np.float64(-5).tobytes(), spans[-1][0])
        assert received["wide"][0, 0] == -5
        assert content["wide"][0, 0] == 0  # type: ignore[index]
        assert len(repr(spans)) < 200
    finally:
        os.close(descriptor)


def test_two_sides_of_a_slot_do_not_overlap_with_others() -> None:
    layout = Layout(batch=3, context=5, side=7)
    descriptor = os.memfd_create("test")
    try:
        ours, theirs = Slots(layout, descriptor), Slots(layout, os.dup(descriptor))
        for number in (2, 0, 1):
            slot = layout.slot(ours.memory(number))
            slot.rows[:], slot.tokens[:], slot.pixels[:] = number, 10 + number, 20 + number
        for number in range(3):
            slot = layout.slot(theirs.memory(number))
            assert slot.rows.shape == (3,)
            assert slot.tokens.shape == (3, 5)
            assert slot.pixels.shape == (3, 7, 7, 3)
            assert set(slot.rows.flat) == {number}
            assert set(slot.tokens.flat) == {10 + number}
            assert set(slot.pixels.flat) == {20 + number}
        os.close(theirs.descriptor)
    finally:
        os.close(descriptor)
