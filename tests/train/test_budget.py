# SPDX-License-Identifier: Apache-2.0
"""Laws of budgets: they add up over probes and stages, and arms of unequal cost are not compared unnoticed."""

import pytest

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.flops import model_flops
from jaxlm.train.budget import Budget, assert_equal_budget


def test_flops_are_six_a_parameter_and_trained_token_and_two_otherwise():
    """Kernels of 12 D^2 a layer and a head of D V, and attention over the whole row."""
    config = ModelConfig(vocab_size=50, width=8, num_layers=2, num_heads=2, mlp_width=32, gated=False)
    kernels = 2 * 12 * 8**2 + 8 * 50
    forward = model_flops(config, tokens=1, length=16, causal=False)
    spent = Budget(
        trained_tokens=10, processed_tokens=30, generated_tokens=5, evaluated_tokens=7, forward_flops=forward
    )
    attention = 12 * 2 * 8 * 16
    assert spent.flops == 30 * (6 * kernels + attention) + 12 * (2 * kernels + attention / 3)


def test_stages_add_up_and_probes_are_not_the_final_run():
    probe = Budget(trained_tokens=10, final_tokens=0, processed_tokens=30, forward_flops=2.0)
    final = Budget(trained_tokens=40, processed_tokens=60, generated_tokens=3, forward_flops=2.0)
    whole = probe + final
    assert (whole.trained_tokens, whole.final_tokens, whole.processed_tokens) == (50, 40, 90)
    assert whole.flops == probe.flops + final.flops
    with pytest.raises(ValueError, match="models with 2 and 3 FLOPs a token do not add up"):
        probe + Budget(trained_tokens=1, processed_tokens=1, forward_flops=3.0)
    with pytest.raises(ValueError, match=r"counts what was spent, got {'trained_tokens': -1, 'final_tokens': -1}"):
        Budget(trained_tokens=-1, processed_tokens=1)


def test_unequal_budgets_are_refused_with_the_remedy():
    joint = Budget(trained_tokens=100, processed_tokens=200, forward_flops=1.0)
    dear = Budget(trained_tokens=162, final_tokens=100, processed_tokens=324, forward_flops=1.0)
    for of in ("trained_tokens", "processed_tokens", "flops"):
        with pytest.raises(ValueError, match=r"cpi_ft \w+ 1\.62 times the \w+ of joint; give joint the extra steps"):
            assert_equal_budget({"cpi_ft": dear, "joint": joint}, of=of)
    assert_equal_budget({"cpi_ft": dear, "joint": joint}, of="final_tokens")
    assert_equal_budget({"cpi_ft": dear, "joint": joint}, rel=0.63)
    assert_equal_budget({"a": joint, "b": Budget(trained_tokens=101, processed_tokens=200)})
    with pytest.raises(ValueError, match="a trained inf times"):
        assert_equal_budget({"a": joint, "b": Budget(trained_tokens=0, processed_tokens=0)})
    with pytest.raises(ValueError, match=r"budgets are equal in one of trained_tokens, .* got 'tokens'"):
        assert_equal_budget({"a": joint}, of="tokens")
