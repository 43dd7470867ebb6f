"""Errors that grow with the position: named as a drift; faults at single tokens, layers and positions are not."""

from __future__ import annotations

import pytest
import torch

from workbench.comparison.drift import find_drift
from workbench.comparison.verdict import FACTOR

TAPS = ("embed", "layers.0", "layers.1", "norm")


def clean(positions=4096, seed=0):
    """Ratios as clean runs have them: about 0.8, at most 2.5."""
    generator = torch.Generator().manual_seed(seed)
    return 0.8 * torch.exp(0.3 * torch.randn(len(TAPS), positions, generator=generator, dtype=torch.float64))


def drifting(positions=4096, last=12.0, seed=0):
    """As measured with one long float32 sum over the keys: 1.1 at the beginning, growing with the root of the position."""
    ratios = clean(positions, seed)
    ratios[1:] *= torch.linspace(0, 1, positions, dtype=torch.float64).sqrt() * (last / 0.8 - 1) + 1
    return ratios


def found(ratios):
    return find_drift(ratios, ~(ratios <= FACTOR), TAPS, FACTOR)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("last", [10.0, 16.0, 22.0])
def test_growth_with_the_position_is_named(last, seed):
    drift = found(drifting(last=last, seed=seed))
    assert drift is not None
    assert drift.tap == "layers.0"
    assert drift.last > 2 * drift.first
    assert "order of summation" in str(drift)


def test_clean_ratios_are_no_drift_even_if_all_are_called_wrong():
    ratios = clean()
    assert find_drift(ratios, torch.ones_like(ratios, dtype=torch.bool), TAPS, FACTOR) is None


def test_a_layer_whose_error_grows_with_the_position_is_no_drift():
    """Its own angles or window are wrong: the layers before it do not drift."""
    taps = ("embed", *(f"layers.{number}" for number in range(12)))
    generator = torch.Generator().manual_seed(0)
    ratios = 0.8 * torch.exp(0.3 * torch.randn(len(taps), 4096, generator=generator, dtype=torch.float64))
    ratios[7:] *= torch.linspace(1, 26, 4096, dtype=torch.float64)
    assert find_drift(ratios, ratios > FACTOR, taps, FACTOR) is None


@pytest.mark.parametrize("size", [40.0, 60.0])
def test_one_wrong_token_late_in_a_drift_is_not_hidden(size):
    ratios = drifting(last=10.0)
    ratios[2, 3000] = size
    assert found(ratios) is None


def test_one_wrong_token_in_a_drift_is_not_hidden():
    ratios = drifting(last=10.0)
    ratios[2, 700] = 60.0
    assert found(ratios) is None


def test_a_step_is_no_drift():
    ratios = clean()
    ratios[1:, 2000:] *= 20.0
    assert found(ratios) is None


def test_a_wrong_layer_is_no_drift():
    ratios = clean()
    ratios[2:] *= 30.0
    assert found(ratios) is None


def test_errors_far_above_rounding_are_no_drift():
    assert found(drifting(last=2000.0)) is None


def test_nan_and_short_prompts_are_no_drift():
    ratios = drifting()
    ratios[1, 5] = torch.nan
    assert found(ratios) is None
    assert found(drifting(positions=400)) is None


def test_wrong_first_tokens_are_no_drift():
    ratios = drifting(positions=4099)
    ratios[1, 0] = 20.0
    assert found(ratios) is None
