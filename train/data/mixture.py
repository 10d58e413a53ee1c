"""How several datasets share a batch: by whole lanes, in proportion to their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction

from pipeline.config import ConfigError
from train.data.index import Part
from train.settings import DatasetSettings, DataSettings

log = logging.getLogger(__name__)


def check_weights(datasets: Mapping[str, DatasetSettings]) -> None:
    """Raise `ConfigError` unless all datasets have a weight or none has."""
    without = [name for name, dataset in datasets.items() if dataset.weight is None]
    if without and len(without) < len(datasets):
        raise ConfigError(
            f"train.data.datasets.{without[0]}.weight: not set, but other datasets have one; "
            "give all of them a weight, or none"
        )


def lanes_each(parts: Sequence[Part], data: DataSettings, batch: int) -> list[int]:
    """The lanes of each dataset. Raises `ConfigError` if one would get none."""
    if len(parts) == 1:
        return [data.lanes]
    check_weights(data.datasets)
    given = [data.datasets[part.name].weight for part in parts]
    weights = [
        float(part.samples) if weight is None else weight
        for part, weight in zip(parts, given, strict=True)
    ]
    lanes = shared_out(data.lanes, weights)
    if not all(lanes):
        more = range(data.lanes + 1, batch + 1)
        enough = next((n for n in more if batch % n == 0 and all(shared_out(n, weights))), None)
        fix = f"set train.data.lanes={enough}" if enough else "raise train.batch or the weight"
        raise ConfigError(
            f"train.data.datasets.{parts[lanes.index(0)].name}: its weight is less than one of "
            f"{data.lanes} lanes; {fix}"
        )
    for part, weight, width in zip(parts, weights, lanes, strict=True):
        log.info(
            "%s: %d of %d lanes, %.4g of every batch; %.4g by its %s",
            *(part.name, width, data.lanes, width / data.lanes, weight / sum(weights)),
            "weight" if given[0] is not None else "samples",
        )
    return lanes


def shared_out(lanes: int, weights: Sequence[float]) -> list[int]:
    """`lanes` in proportion to `weights`, by largest remainders; the first of equals has it."""
    # As written, 0.1 is a tenth: a rounding error must not decide which dataset gets a lane.
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [lanes * weight / sum(exact) for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[: lanes - sum(shares)]:
        shares[i] += 1
    return shares
