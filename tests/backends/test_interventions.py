"""What interventions share: taps and changes that leave no trace, rows of a batch, laws, actions, proposals."""

import math
import pickle
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import tiny
from tests.support.interventions import HEADS, Fade, Own
from treesearch import rewards
from treesearch.backends import mnist
from treesearch.backends.base import describe
from treesearch.backends.base.capture import captured, changed
from treesearch.backends.base.taps import on_rows, tapped
from treesearch.backends.interventions import Actions, Away, Intervened, Proposal, Rows
from treesearch.backends.interventions.cfg import cfg
from treesearch.backends.wrappers.labelled import pack
from treesearch.testing import check_kernel

KERNEL = mnist(num_steps=5)
STILL = mnist(num_steps=5, eta=0.0)
X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 4, 2, 1])


OWN = Intervened(KERNEL, Own())
ACTIONS = Actions(Away(KERNEL, Intervened(KERNEL, Own((0.5, 1.0))), 2.0), (4, 2))


@pytest.mark.parametrize("kernel", [OWN, Away(KERNEL, OWN, 2.0), ACTIONS, Intervened(STILL, Own())])
def test_they_are_kernels(kernel):
    check_kernel(kernel, rows=5)


@pytest.mark.parametrize("kernel", [Proposal(OWN), Actions(Proposal(Away(KERNEL, OWN, 1.0)), (3,))])
def test_proposals_are_kernels_with_weights(kernel):
    check_kernel(kernel, proposal=True, rows=5)


def test_a_window_moves_its_rows_of_a_batch_and_no_bit_of_the_others():
    plain, some = KERNEL.transition(X, T).mean, Intervened(KERNEL, Own(), levels=(3, 4)).transition(X, T).mean
    moved = (plain != some).flatten(1).any(1)
    assert moved.tolist() == [False, True, False, False]
    assert not torch.equal(plain[:3], OWN.transition(X, T).mean[:3])


def test_settings_are_of_rows():
    chosen = torch.tensor([[0], [1], [2], [0]])
    two = Intervened(KERNEL, Own((0.5, 1.0)))
    found = two.transition(X, T, {"choices": chosen}).mean
    for i, setting in enumerate(chosen[:, 0].tolist()):
        alone = Intervened(KERNEL, Own(((0.5, 1.0)[setting - 1],))) if setting else KERNEL
        assert torch.equal(found[i], alone.transition(X, T).mean[i])


def test_nothing_is_left_behind_by_an_exception():
    @dataclass(frozen=True)
    class Failing(Own):
        def on(self, network, rows):
            def tap(attend, q, k, v):
                raise ArithmeticError("no")

            return tapped(network, {HEADS: tap})

    before = KERNEL.transition(X, T).mean
    with pytest.raises(ArithmeticError):
        Intervened(KERNEL, Failing()).transition(X, T)
    part = KERNEL.network.get_submodule(HEADS)
    assert not part._forward_hooks
    assert not part._forward_pre_hooks
    assert torch.equal(KERNEL.transition(X, T).mean, before)


def test_other_threads_that_call_the_network_meet_no_hook():
    plain, found = KERNEL.transition(X, T).mean, []
    alone = threading.Thread(target=lambda: found.append(KERNEL.transition(X, T).mean))
    with tapped(KERNEL.network, {HEADS: lambda attend, q, k, v: v}), changed(KERNEL.network, {"": lambda h, *_: 0 * h}):
        alone.start()
        alone.join()
    assert torch.equal(found[0], plain)


def test_parts_that_are_called_only_by_another_thread_are_not_captured():
    with captured(KERNEL.network, (HEADS,)) as seen:
        other = threading.Thread(target=lambda: KERNEL.transition(X, T))
        other.start()
        other.join()
    assert not seen


def test_a_processor_without_torchs_attention_is_refused():
    from diffusers.models.attention_processor import AttnProcessor

    kernel = mnist(num_steps=2)
    kernel.network.get_submodule(HEADS).set_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
        Intervened(kernel, Own()).transition(X[:1], T[-1:])


def test_keys_beyond_a_mask_are_seen_by_all():
    q, k, v = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))

    class Attending(torch.nn.Module):
        def forward(self, x, mask):
            return torch.nn.functional.scaled_dot_product_attention(x, k, v, attn_mask=mask)

    more = torch.ones(1, 2, 3, 4)
    for mask in (torch.zeros(5, 5), torch.ones(5, 5, dtype=torch.bool)):
        net = Attending()
        with tapped(net, {"": lambda attend, q, k, v: attend(q, torch.cat([k, more], 2), torch.cat([v, more], 2))}):
            found = net(q, mask)
        full = torch.nn.functional.scaled_dot_product_attention(q, torch.cat([k, more], 2), torch.cat([v, more], 2))
        assert torch.allclose(found, full, atol=1e-6)


def test_rows_of_a_network_are_blocks_of_those_of_an_evaluation():
    rows = Rows(torch.tensor([3, 2, 1]), torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool))
    twice = rows.of_network(torch.zeros(6, 1))
    assert twice.t.tolist() == [3, 2, 1] * 2
    assert twice.given.tolist() == [False] * 3 + [True] * 3
    with on_rows(torch.tensor([True, False, True])):
        assert rows.of_network(torch.zeros(2, 1)).setting.tolist() == [0, 2]
    with pytest.raises(RuntimeError, match="4 rows for 3"):
        rows.of_network(torch.zeros(4, 1))


def test_the_law_is_said_and_that_of_a_proposal_is_the_models():
    reward = rewards.digit(8)
    assert "mnist under Own" in OWN.base_law
    for kernel, law in (
        (OWN, "new, mnist under Own"),
        (ACTIONS, "one of 3 actions"),
        (Proposal(OWN), "the model's own"),
    ):
        result = ts.search(kernel, reward, ts.BestOfN(n=2), budget=ts.Budget(nfe=10))
        assert law in result.certificate().base_law
        assert f"base law p: {result.certificate().base_law}" in str(result.certificate())


def test_a_proposal_has_the_law_of_p():
    """E_q[w f(x_s)] = E_p[f(x_s)], here in closed form: w of a step is N(x; p)/N(x; q)."""
    law, p = Proposal(OWN).transition(X, T), KERNEL.transition(X, T)
    x = law.sample(torch.randn(X.shape, generator=torch.Generator().manual_seed(1)))
    noisy = T > 1
    assert torch.allclose((p.log_prob(x) - law.log_prob(x))[noisy], law.log_weight(x)[noisy], atol=1e-6)
    assert torch.equal(law.mean[~noisy], p.mean[~noisy])


def test_away_is_linear_and_off_at_zero():
    plain, weak = KERNEL.transition(X, T), OWN.transition(X, T)
    assert torch.equal(Away(KERNEL, OWN, 0.0).transition(X, T).mean, plain.mean)
    assert torch.allclose(Away(KERNEL, OWN, 2.0).transition(X, T).mean, 3 * plain.mean - 2 * weak.mean, atol=1e-5)
    assert describe(Away(KERNEL, OWN, 2.0)).rows_per_nfe == (2,) * 6


def test_actions_are_drawn_evenly_at_their_levels_and_kept_at_others():
    noise = torch.randn(3000, *ACTIONS.noise_shape, generator=torch.Generator().manual_seed(0))
    first = ACTIONS.labels(ACTIONS.prior(noise))
    shares = [float((first == a).double().mean()) for a in range(3)]
    assert max(abs(share - 1 / 3) for share in shares) < 4 * (2 / 9 / 3000) ** 0.5
    x = ACTIONS.prior(noise[:9])
    kept = ACTIONS.transition(x, torch.full((9,), 5)).sample(noise[9:18])
    assert torch.equal(ACTIONS.labels(kept), first[:9])
    drawn = ACTIONS.transition(x, torch.full((9,), 4)).sample(noise[9:18])
    assert not torch.equal(ACTIONS.labels(drawn), first[:9])


def test_an_action_rules_from_the_next_step_on():
    x = ACTIONS.prior(torch.randn(3, *ACTIONS.noise_shape, generator=torch.Generator().manual_seed(3)))
    x[:, -1] = torch.tensor([0.0, 1.0, 2.0])[:, None, None]
    x[:, 0] = x[:1, 0]
    means = ACTIONS.transition(x, torch.full((3,), 4)).law.mean
    assert torch.equal(means[0], KERNEL.transition(x[:, :1], torch.full((3,), 4)).mean[0])
    assert len({m.sum().item() for m in means}) == 3


def test_actions_are_called_by_their_settings():
    kernel = Actions(Intervened(Intervened(KERNEL, Own((0.5, 1.0))), Fade((0.1, 0.3))), (3,), ((0, 0), (2, 0), (1, 2)))
    assert kernel.names == ("none", "u = 1", "u = 0.5 + by 0.3")


def test_the_law_of_a_step_is_that_of_the_state_and_of_the_action():
    x = ACTIONS.prior(torch.randn(3, *ACTIONS.noise_shape, generator=torch.Generator().manual_seed(3)))
    a = ACTIONS.labels(x)
    drawn, kept = (ACTIONS.transition(x, torch.full((3,), t)) for t in (4, 5))
    at = lambda law, label: pack(law.law.mean, label)  # noqa: E731
    alone = drawn.law.log_prob(drawn.law.mean)
    assert torch.allclose(drawn.log_prob(at(drawn, (a + 1) % 3)), alone - math.log(3), rtol=1e-12)
    assert (drawn.log_prob(at(drawn, a + 0.5)) == -math.inf).all()
    assert torch.equal(kept.log_prob(at(kept, a)), kept.law.log_prob(kept.law.mean))
    assert (kept.log_prob(at(kept, (a + 1) % 3)) == -math.inf).all()


def test_a_chain_without_noise_branches_by_actions():
    kernel = Actions(Intervened(STILL, Own((0.5, 1.0))), (3,))
    assert [bool(s) for s in describe(kernel).stochastic] == [True, False, False, True, False, False]
    result = ts.search(
        kernel,
        rewards.digit(8),
        ts.DiffusionTreeSearch(branch_at=(5, 3), widening_c=1.0, widening_alpha=0.3),
        budget=ts.Budget(nfe=100),
        batch_size=4,
    )
    roots = result.tree.roots(result.tasks[0].leaves)
    assert len(np.unique(roots)) < len(roots)
    assert len({round(r, 6) for r in result.rewards.tolist()}) > len(np.unique(roots))


def test_it_goes_on_where_it_was_stopped(tmp_path):
    make = lambda n, path: ts.search(  # noqa: E731
        ACTIONS,
        rewards.digit(8),
        ts.DiffusionTreeSearch(branch_at=(4, 2)),
        budget=ts.Budget(nfe=n),
        store=path,
        batch_size=4,
    )
    make(40, tmp_path / "run")
    again = ts.resume(tmp_path / "run", ACTIONS, rewards.digit(8), budget=ts.Budget(nfe=80))
    whole = make(80, tmp_path / "whole")
    assert torch.equal(again.rewards, whole.rewards)


def test_their_fingerprint_is_of_all_that_decides_the_law():
    others = [
        OWN,
        Intervened(KERNEL, Own((0.5,))),
        Intervened(KERNEL, Own(), levels=(1, 2)),
        Away(KERNEL, OWN, 1.0),
        Away(KERNEL, OWN, 2.0),
        Proposal(OWN),
        ACTIONS,
        replace(ACTIONS, levels=(4,)),
        replace(ACTIONS, only=((0,), (1,))),
    ]
    found = [kernel.fingerprint for kernel in others]
    assert None not in found
    assert len(set(found)) == len(found)
    assert pickle.loads(pickle.dumps(OWN)).fingerprint == OWN.fingerprint


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Intervened(ts.backends.gaussian(dim=2), Own()), "no network"),
        (lambda: Intervened(KERNEL, Own(), levels=(3, 9)), "1 <= low <= high <= T = 5"),
        (lambda: Intervened(KERNEL, Own((0.5, 1.0))).transition(X, T), "2 settings"),
        (lambda: tapped(KERNEL.network, {"unet.mid_block.attention.0": None}).__enter__(), "attentions.0"),
        (lambda: Actions(KERNEL, (2,)), "no interventions"),
        (lambda: Actions(OWN, (9,)), "outside 1..T"),
        (lambda: Actions(OWN, (2,), ((0,), (2,))), "at most"),
        (lambda: Actions(OWN, (2,), ((0,), (0,))), "twice"),
        (lambda: Actions(Intervened(KERNEL, Own(tuple(i / 300 for i in range(300)))), (2,)), "more than 256"),
        (lambda: Away(KERNEL, mnist(num_steps=4), 1.0), "one chain"),
        (lambda: Away(KERNEL, OWN, float("nan")), "finite number"),
        (lambda: Proposal(KERNEL), "no intervention"),
        (lambda: cfg(KERNEL, 2.0), "classifier-free"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.checkpoint("sd", tmp_path_factory.mktemp("tiny")))


def test_a_guidance_weight_is_that_of_the_pipeline(folder):
    load = lambda w: ts.backends.diffusers(folder, num_steps=4, guidance_scale=w)  # noqa: E731
    kernel, other = load(3.0), load(1.5)
    cond = kernel.encode(["a", "b"])
    cond = {
        k: v[:2].repeat(2, *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) else v.value for k, v in cond.items()
    }
    x, t = torch.randn(4, *kernel.state_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 3, 2, 1])
    plain = kernel.transition(x, t, cond).mean
    assert torch.equal(cfg(kernel, 3.0).transition(x, t, cond).mean, plain)
    theirs = other.transition(x, t, cond).mean
    assert torch.allclose(cfg(kernel, 1.5).transition(x, t, cond).mean, theirs, atol=1e-4)
    windowed = cfg(kernel, 1.5, levels=(2, 3)).transition(x, t, cond).mean
    assert (windowed != plain).flatten(1).any(1).tolist() == [False, True, True, False]
    chosen = cond | {"choices": torch.tensor([[0], [1], [0], [2]])}
    mixed = cfg(kernel, (1.5, 3.0)).transition(x, t, chosen).mean
    assert torch.equal(mixed[[0, 2, 3]], plain[[0, 2, 3]])
    assert torch.allclose(mixed[1], theirs[1], atol=1e-4)


def test_a_network_that_checkpoints_gradients_is_refused(folder):
    kernel = ts.backends.diffusers(folder, num_steps=2)
    kernel.network.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        cfg(kernel, 1.5)
    kernel.network.disable_gradient_checkpointing()
    cfg(kernel, 1.5)


def test_a_compiled_network_is_refused():
    kernel = mnist(num_steps=2)
    kernel.network._compiled_call_impl = kernel.network._call_impl  # what `Module.compile` sets
    with pytest.raises(ValueError, match="compile"):
        Intervened(kernel, Own())
