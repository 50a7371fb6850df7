"""The loss and its factor against mpmath, and copied out of the file as a user would."""

import math

import mpmath
import pytest
import torch

import common

NS = [1, 2, 16, 64, 256, 4096, 10**6]
LOG_PS = [-1e4, -746.0, -740.0, -700.0, -300.0, -100.0, -41.0, -40.0001, -40.0, -39.9999, -39.0]
LOG_PS += [-30.0, -20.0, -13.8, -10.0, -5.0, -2.0, -1.0, -0.7, -0.6931, -0.6930, -0.6929, -0.5]
LOG_PS += [-0.1, -1e-2, -1e-4, -1e-8, -1e-12, *(-i / 4 for i in range(1, 200))]


def exact(log_p, n):
    """Return (loss, factor) by Eq. 3 and 4 as they stand, with as many digits as they take."""
    with mpmath.workdps(60 + int(-log_p)):
        p = mpmath.exp(log_p)
        miss = (1 - p) ** n
        return -mpmath.log1p(-miss), n * (1 - p) ** (n - 1) * p / (1 - miss)


def assert_close(values, expected):
    """To 1e-12 of each; below 1e-290 a double has fewer digits."""
    for log_p, value, one in zip(LOG_PS, values.tolist(), expected, strict=True):
        assert abs(value - one) <= 1e-12 * abs(one) + 1e-290, (log_p, value, one)


@pytest.mark.parametrize("n", NS)
def test_loss_factor_and_gradient_are_those_of_the_equations(n):
    x = torch.tensor(LOG_PS, dtype=torch.float64, requires_grad=True)
    losses, factors = zip(*(exact(log_p, n) for log_p in LOG_PS), strict=True)
    loss = common.dco_loss(x, n)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert_close(loss, losses)
    assert_close(common.dco_factor(x, n), factors)
    assert_close(-gradient, factors)  # that of cross-entropy, -log p, is -1


@pytest.mark.parametrize("n", NS)
def test_both_ends_have_no_nan(n):
    """p = 0 and p = 1 beside ordinary values: a branch leaves the others' gradients alone."""
    x = torch.tensor([-math.inf, -50.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss, factor = common.dco_loss(x, n), common.dco_factor(x, n)
    (gradient,) = torch.autograd.grad(loss[1:].sum() + loss[0].clamp(max=1e9), x)
    assert gradient.isfinite().all()
    assert loss[0] == math.inf and loss[3] == 0
    assert factor[0] == 1 and factor[3] == (n == 1)


def test_they_keep_the_type_of_their_argument():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        log_p = torch.tensor([-50.0, -3.0, 0.0], dtype=dtype)
        assert common.dco_loss(log_p, 64).dtype == common.dco_factor(log_p, 64).dtype == dtype
