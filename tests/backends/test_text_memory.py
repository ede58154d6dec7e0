"""The memory plan of kernels of texts against what the same step has alive when it runs."""

import pytest
import torch

import treesearch as ts
from treesearch import api
from treesearch.backends.base.live import LiveBytes
from treesearch.backends.text.kernel import MaskedTextKernel
from treesearch.backends.text.own import MaskedTransformer, Size
from treesearch.cli import probe
from treesearch.rewards.analytic import constant

SIZE = Size(vocabulary=6000, length=16, width=16, depth=1, heads=2)


def kernel(**settings):
    return MaskedTextKernel(MaskedTransformer(SIZE).eval(), length=16, num_steps=2, mask=2, **settings)


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [({}, []), ({"guidance_scale": 2.0}, [5]), ({"top_p": 0.5}, [])],
    ids=["", "guided", "nucleus"],
)
def test_the_plan_is_what_a_step_has_alive(settings, prompt):
    made = kernel(**settings)
    cond = made.encode([prompt] * 6)
    x = made.prior(torch.zeros(6, 16), cond)
    with LiveBytes("cpu") as live:
        made.transition(x, torch.ones(6, dtype=torch.int64), cond).sample(torch.zeros(6, 16))
    plan = made.memory_plan(6)
    assert 1 <= (plan.total - plan.weights) / live.peak < 1.25
    assert plan.lines()["device, in all"] == plan.total
    assert plan.weights == 4 * sum(w.numel() for w in made.model.parameters())
    assert plan.fits is None


def test_a_dry_run_says_it_where_there_is_a_module():
    def asked(made):
        options = api.Options(4, "all")
        return probe.estimate(
            api.make_session(made, constant(0.0), ts.BestOfN(), None, ts.Budget(nfe=100), 0, options, None)
        )

    assert asked(kernel())["memory"] == kernel().memory_plan(4).lines()
    network = MaskedTransformer(SIZE).eval()
    function = MaskedTextKernel(lambda x: network(x), length=16, num_steps=2, mask=2)
    assert function.memory_plan(4) is None
    assert "memory" not in asked(function)
