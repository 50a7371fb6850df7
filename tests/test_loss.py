"""The loss and its factor against mpmath, and lifted out of the file as a user would."""

import inspect
import math

import mpmath
import pytest
import torch

import common

NS = [1, 2, 16, 64, 256, 4096, 10**6]
LOG_PS = [-math.inf, -1e4, -746.0, -740.0, -708.0, -700.0, -300.0, -100.0, -41.0, -40.0, -39.0, -30.0, -20.0, -13.8]
LOG_PS += [-10.0, -5.0, -2.0, -1.0, -0.7, -0.69314718, -0.693, -0.5, -0.1, -1e-2, -1e-4, -1e-8, -1e-12, 0.0]
mpmath.mp.dps = 60


def exact_loss(log_p, n):
    """-log(1 - (1-p)^N) at 60 digits and more: (1-p)^N is 1 - Np + … where p is below 1e-60."""
    if log_p == -math.inf:
        return mpmath.inf
    with mpmath.workdps(60 + int(-log_p)):
        miss = (1 - mpmath.exp(log_p)) ** n
        return -mpmath.log1p(-miss) if n > 1 else -mpmath.mpf(log_p)


def exact_factor(log_p, n):
    if log_p == -math.inf or n == 1:
        return mpmath.mpf(1)
    with mpmath.workdps(60 + int(-log_p)):
        p = mpmath.exp(log_p)
        if p == 1:
            return mpmath.mpf(0)
        return n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n)


def close(value, exact):
    # Relative to 1e-9, down to the smallest normal double: under that a double has not got nine digits.
    return value == float(exact) or abs(mpmath.mpf(value) - exact) <= 1e-9 * abs(exact) + 1e-300


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("log_p", LOG_PS)
def test_values_and_gradients_against_mpmath(log_p, n):
    x = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    loss = common.dco_loss(x, n)
    loss.backward()
    factor = common.dco_factor(x, n).item()
    assert close(loss.item(), exact_loss(log_p, n)), (loss.item(), exact_loss(log_p, n))
    assert close(factor, exact_factor(log_p, n)), (factor, exact_factor(log_p, n))
    assert close(x.grad.item(), -exact_factor(log_p, n)), (x.grad.item(), exact_factor(log_p, n))


@pytest.mark.parametrize("n", NS)
def test_a_whole_batch_has_no_nan_in_its_gradient(n):
    x = torch.tensor(LOG_PS, dtype=torch.float64, requires_grad=True)
    common.dco_loss(x, n).sum().backward()
    assert not x.grad.isnan().any()
    assert ((common.dco_factor(x, n) >= 0) & (common.dco_factor(x, n) <= 1)).all()


def test_limits_of_the_factor():
    p = torch.tensor([1e-9, 0.5, 1.0]).log()
    assert common.dco_factor(p, 1).tolist() == [1, 1, 1]
    small, half, certain = common.dco_factor(p, 256).tolist()
    assert small == pytest.approx(1, abs=1e-6) and half < 1e-70 and certain == 0
    # The thresholds that the paper states: N' = 64 drops a DCOa example between 6/64 and 7/64 right (F = 0.01).
    kept, dropped = common.dco_factor(torch.tensor([6 / 64, 7 / 64]).log(), 64).tolist()
    assert kept >= 0.01 > dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_input_is_kept(dtype):
    log_p = torch.tensor([-3.0, -1e-3], dtype=dtype)
    assert common.dco_loss(log_p, 64).dtype == common.dco_factor(log_p, 64).dtype == dtype


def test_gradient_of_the_loss_is_the_factor_times_that_of_cross_entropy(tiny_model, tokenizer):
    """Eq. 3 by autograd through a model, against the F-weighted cross-entropy of Eq. 4."""
    rows = [{"id": i, "source": "", "problem": f"{i}+4=", "answer": str(i + 4)} for i in range(6)]
    examples, _ = common.encode(rows, tokenizer, "direct", 2048)
    batch = common.collate(examples, tokenizer.pad_token_id)
    gradients = []
    for loss_of in (
        lambda log_p: common.dco_loss(log_p, 64),
        lambda log_p: common.dco_factor(log_p, 64).detach() * -log_p,
    ):
        tiny_model.zero_grad()
        loss_of(common.completion_log_probs(tiny_model, batch) / 4).mean().backward()  # /4: F from 0.2 to 0.9
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_model.parameters()]))
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["dco_loss", "dco_factor", "completion_log_probs"])
def test_functions_can_be_copied_into_another_code_base(name, tiny_model, tokenizer):
    """Each stands alone, with torch and nothing else in sight."""
    source = inspect.getsource(getattr(common, name))
    namespace = {"torch": torch}
    exec(source, namespace)
    if name == "completion_log_probs":
        examples, _ = common.encode(
            [{"id": 0, "source": "", "problem": "1+1=", "answer": "2"}], tokenizer, "direct", 99
        )
        arguments = (tiny_model, common.collate(examples, 0))
    else:
        arguments = (torch.tensor([-3.0, -50.0, 0.0]), 64)
    assert namespace[name](*arguments).equal(getattr(common, name)(*arguments))
