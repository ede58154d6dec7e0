"""Experts: a reward's network that is taught noise, band by band, from draws of the kernel alone."""

import itertools
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import treesearch as ts
from treesearch.backends.base import Wrapper
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS, Valued, banded
from treesearch.backends.guidance.experts import Card, Experts, ExpertValue, Sight, refuse_loose_head, teacher_name
from treesearch.backends.guidance.transfer import Plan, _goal, linex, rollouts, transfer
from treesearch.backends.models.mnist import cosine_alphas_cumprod, mnist_kernel
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.compose import cached
from treesearch.rewards.headed import Headed, LogProbability
from treesearch.rewards.images import classifier
from treesearch.testing import check_kernel

F64 = torch.float64
EPS32 = 2.0**-23
T, K = 10, 1000


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Denoiser(nn.Module):
    """The exact one of N(0, I): x̂_0 = α x, which is v = 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, timestep):
        return self.scale * x


class Steep(nn.Module):
    """logits (0, 4 x_1) of (n, 2)."""

    def __init__(self, slope=4.0):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.weight.data = torch.tensor([[0.0, 0.0], [slope, 0.0]])
        self.layer.bias.data.zero_()

    def forward(self, x):
        return self.layer(x)


STEEP = Steep().requires_grad_(False)


def steep(device):
    return STEEP


def bed(num_steps=T, seed=None):
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(K), num_steps, prediction="v")
    kernel = DiffusionKernel(Denoiser().requires_grad_(False), state_shape=(2,), schedule=schedule)
    if seed is not None:
        kernel.model.scale.data.fill_(seed)
    return kernel


REWARD = Reward(Headed(steep, LogProbability((1,))), "steep")
BLACK = Reward(lambda x, _: x[:, 0].double(), "first entry")  # no gradient is asked of it


class Curved(Wrapper):
    """A kernel whose samples are no line of its states."""

    def decode(self, x0):
        return x0**3


@dataclass(frozen=True)
class Loose:
    """A head that sees a constant on all logits."""

    def __call__(self, logits):
        return (logits.double() - (0.5 * logits.double()).logsumexp(1, keepdim=True))[:, 1]


LOOSE = Reward(Headed(steep, Loose()), "loose")


def times(factor):
    return as_reward(lambda x: factor * x[:, 0].double())


def opaque(held=itertools.count()):  # noqa: B008  # of no content that can be read
    return as_reward(lambda x: x[:, 0] + 0 * (held is None), "opaque")


BLIND = Reward(lambda x, _: x.detach()[:, 0].double().requires_grad_(), "blind")
QUICK = Plan(steps=20, batch_size=8)


def family(reward=REWARD, reads="state", **settings):
    return transfer(reward, bed(), rank=1, reads=reads, samples=8, plan=QUICK, **settings)


def exact(x, t, kernel):
    """log E[σ(4 x_0)] of x_0 ~ N(α x_t, σ²), by a sum over a fine grid."""
    alpha, sigma = kernel.chain.schedule.alpha[t], kernel.chain.schedule.sigma[t]
    z = torch.linspace(-8, 8, 2001, dtype=F64)
    law = (-(z**2) / 2).exp() / (-(z**2) / 2).exp().sum()
    x0 = alpha[:, None] * x[:, :1].double() + sigma[:, None] * z
    return (torch.sigmoid(4 * x0) * law).sum(1).log()


def noisy_rows(kernel, n=400):
    """x_t of N(0, I) data has that law at every level."""
    return normal(n, 2, seed=5), torch.arange(n) % kernel.num_steps + 1


# changes of a network


def digits():
    from treesearch.rewards.images.classifier import load_classifier

    return load_classifier()


def test_changes_of_nothing_are_the_network_bit_for_bit():
    network, x = digits(), torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    none = banded.unchanged(network, 5, 4, torch.Generator().manual_seed(0))
    for n in range(5):
        assert torch.equal(banded.call(network, none, x, torch.full((6,), n)), network(x))
        assert all(
            torch.equal(w, own)
            for w, own in zip(banded.changed(network, none, n).values(), network.parameters(), strict=True)
        )


def stirred(network, bands=3, rank=2):
    changes = banded.unchanged(network, bands, rank, torch.Generator().manual_seed(0))
    return {k: c + 0.1 * normal(*c.shape, seed=i) for i, (k, c) in enumerate(changes.items())}


def test_rows_of_mixed_bands_are_each_alone_and_the_network_stays():
    network = digits()
    before = [w.clone() for w in network.parameters()]
    changes, x, band = stirred(network), torch.rand(7, 1, 28, 28), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    mixed = banded.call(network, changes, x, band)
    alone = torch.cat([banded.call(network, changes, x[i : i + 1], band[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(mixed, alone, rtol=2000 * EPS32, atol=2000 * EPS32 * float(alone.abs().max()))
    assert (mixed - network(x)).abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.slow
def test_a_band_is_what_peft_makes_of_the_same_factors():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 4, bias=False))
    changes, x, band = stirred(network), normal(4, 2, 4, 4), torch.tensor([1, 0, 2, 1])
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"])
    other = peft.get_peft_model(nn.Sequential(*network), config, adapter_name="b0")
    for n in range(3):
        if n:
            other.add_adapter(f"b{n}", config)
        for layer in ("0", "2"):
            part = other.base_model.model[int(layer)]
            for half, into in (("a", part.lora_A), ("b", part.lora_B)):
                own = into[f"b{n}"].weight
                own.data = changes[f"{layer}.weight.{half}"][n].reshape(own.shape).clone()
    with torch.no_grad():
        theirs = other.eval()(x, adapter_names=[f"b{n}" for n in band.tolist()])
    torch.testing.assert_close(
        banded.call(network, changes, x, band).detach(), theirs, rtol=64 * EPS32, atol=64 * EPS32
    )


def test_an_expert_is_a_twelfth_of_the_classifier():
    share = banded.share(digits(), banded.unchanged(digits(), 5, 4, torch.Generator()))
    assert 0.05 < share < 0.1


# bands


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_bands_are_equal_parts_of_the_training_steps_on_every_grid(bands):
    """floor(k N / K) for the cosine schedule: exact but for k + 1 in K + 1, which moves no level of these grids."""
    for steps in (1, 4, 10, 25, 50):
        schedule = Schedule.variance_preserving(cosine_alphas_cumprod(K), steps)
        found = banded.band_of(banded.angles(schedule)[1:], bands)
        k = (schedule.timestep + 1).double() / (K + 1)
        assert torch.equal(found, (bands * k).floor().long())
        assert found.min() >= 0
        assert found.max() == bands - 1
        assert (found.diff() >= 0).all()
    assert banded.band_of(torch.tensor([0.0, 1.0]), bands).tolist() == [0, bands - 1]


def test_a_flow_has_the_bands_of_its_own_noise():
    flow = Schedule.flow(torch.linspace(0, 1, 5, dtype=F64), torch.arange(4))
    assert banded.band_of(banded.angles(flow)[1:], 4).tolist() == [0, 2, 3, 3]


# what is learnt


@pytest.mark.parametrize(("reads", "black"), [("state", False), ("endpoint", False), ("endpoint", True)])
def test_the_value_learnt_is_nearer_to_the_soft_value_than_what_knows_no_noise(reads, black):
    kernel = bed()
    plan = Plan(steps=300, batch_size=64, lr=0.01)
    fn = Reward(lambda x, _: torch.nn.functional.logsigmoid(4 * x[:, 0].double()), "black")
    reward = fn if black else REWARD
    made = transfer(reward, kernel, bands=5, rank=1, reads=reads, samples=1000, plan=plan)
    x, t = noisy_rows(kernel)
    law, goal = kernel.transition(x, t), exact(x, t, kernel)
    learnt = Valued(kernel, reward, made).transition(x, t).rewards
    naive = REWARD(x if reads == "state" else law.endpoint)
    errors = [float((found - goal).square().mean().sqrt()) for found in (learnt, naive)]
    assert errors[0] < 0.5 * errors[1], errors


def test_the_second_loss_is_least_at_the_soft_value():
    r = 1.5 * normal(20_000, seed=1).double()
    v = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = linex(0.8 * (r - v))
        loss.backward()
        return loss

    optimizer.step(closure)
    soft = float(torch.logsumexp(0.8 * r, 0) - math.log(len(r))) / 0.8
    assert v.item() == pytest.approx(soft, abs=0.02)  # what lies beyond δ = 4 is a line
    assert soft > float(r.mean()) + 0.8
    far = torch.tensor([4.0, 5.0, 6.0], dtype=F64)
    assert float(linex(far[2:]) - linex(far[1:2])) == pytest.approx(math.exp(4) - 1)


def test_the_goal_of_a_lambda_is_its_soft_value():
    """dL/dv = 0 at log E exp(λ r)/λ, with no δ beyond 4."""
    x0, lam = normal(500, 2), 0.5
    goal, r = _goal(BLACK, bed(), x0, lam, Plan()), x0[:, 0].double()
    soft = float((lam * r).logsumexp(0) - math.log(len(r))) / lam
    out = torch.full((500, 1), (soft - goal.centre) / goal.spread, requires_grad=True)
    goal.loss(out, goal.targets).backward()
    assert abs(float(out.grad.sum())) < 500 * EPS32


def test_a_temperature_makes_the_targets_sharper():
    x0 = normal(5, 2)
    targets = _goal(REWARD, bed(), x0, 1.0, Plan(temperature=0.25)).targets
    torch.testing.assert_close(targets, (STEEP(x0) / 0.25).softmax(1), rtol=8 * EPS32, atol=8 * EPS32)


def test_a_family_serves_the_same_reward_made_again():
    for make in (lambda: times(2.0), lambda: cached(times(2.0)), lambda: 1 + cached(times(2.0))):
        reward = make()
        made = family(reward, "endpoint")
        reward(normal(3, 2))  # what it counts is no part of what it is
        assert made.of(bed(), reward).reward is reward
        made.of(bed(), make())


@pytest.mark.parametrize("file", ["ppap.safetensors", "ppap_endpoint.safetensors"])
def test_shipped_experts_are_of_every_head_of_log_p_and_of_no_tempered_one(file):
    card, network = Experts.load(file).card, digits()
    fixed = (classifier.digit(8), classifier.digits([1, 2]), classifier.even(), classifier.odd())
    for reward in (*fixed, classifier.digit(8, tau1=2, tau2=2)):
        assert teacher_name(reward) == card.teacher
        refuse_loose_head(reward, network, card.shape)
    with pytest.raises(ValueError, match="changes where all logits rise by one number"):
        refuse_loose_head(classifier.digit(8, tau1=1, tau2=0.5), network, card.shape)
    with pytest.raises(ValueError, match="has its weights between other parts, as softplus for ReLU: transfer"):
        Valued(mnist_kernel(num_steps=2), classifier.digit(8, softplus=5.0), file)


def test_transfer_repeats_for_a_seed():
    one, again, other = (
        family(),
        family(),
        transfer(REWARD, bed(), rank=1, samples=8, plan=Plan(steps=20, batch_size=8, seed=1)),
    )
    assert all(torch.equal(c, again.changes[k]) for k, c in one.changes.items())
    assert any(not torch.equal(c, other.changes[k]) for k, c in one.changes.items())
    critic, again = (family(BLACK, "endpoint") for _ in range(2))
    assert all(torch.equal(w, again.base[k]) for k, w in critic.base.items())
    assert STEEP.layer.weight.tolist() == [[0.0, 0.0], [4.0, 0.0]]


# as values


def test_experts_are_potentials_and_guides_with_a_gradient():
    kernel, made = bed(), family()
    for wrapped in (Valued(kernel, REWARD, made), TDS(kernel, REWARD, value=made, through_network=False)):
        check_kernel(wrapped, proposal=isinstance(wrapped, TDS))
        found = ts.search(wrapped, REWARD, ts.FeynmanKac(num_particles=4), progress=False)
        assert found.rewards.tolist() == REWARD(found.samples).tolist()  # at t = 0 the reward itself
    x, t = noisy_rows(kernel, 5)
    plain, guided = kernel.transition(x, t), TDS(kernel, REWARD, value=made).transition(x, t)
    assert (guided.mean - plain.mean).abs().max() > 1e-4
    black = TDS(kernel, BLACK, value=family(BLACK, "endpoint")).transition(x, t)
    assert (black.mean - plain.mean).abs().max() > 1e-6


def test_an_evaluation_is_told_as_a_call_of_the_reward():
    assert Valued(bed(), REWARD, family()).rewards_per_nfe == (0, *(1,) * T)


def test_levels_follow_the_noise_and_not_the_step():
    """x_t of the same α_t in chains of 10 and 20 steps is worth the same."""
    made, x = family(), normal(3, 2)
    one, other = (Valued(bed(steps), REWARD, made) for steps in (10, 20))
    t = torch.tensor([2, 5, 10])
    assert torch.equal(one.transition(x, t).rewards, other.transition(x, 2 * t).rewards)


def test_a_noisy_state_is_seen_in_the_size_of_a_variance_preserving_chain():
    sight, x, angle = Sight(None, "state", False, 0.5, 0.5), normal(4, 3), torch.linspace(0, 1, 4)
    alpha, sigma = angle.cos(), angle.sin()
    flow = 1 / (alpha + sigma)  # the same noise at α + σ = 1
    seen = sight.of_noisy(flow[:, None] * x, flow * alpha, flow * sigma)
    torch.testing.assert_close(seen, 0.5 + 0.5 * x, rtol=8 * EPS32, atol=8 * EPS32)


def test_experts_go_to_other_processes_and_are_told_apart(tmp_path):
    made = family()
    made.save(tmp_path / "mine.safetensors")
    wrapped, x, t = Valued(bed(), REWARD, made), *noisy_rows(bed(), 4)
    sent = pickle.loads(pickle.dumps(wrapped))
    assert torch.equal(sent.transition(x, t).rewards, wrapped.transition(x, t).rewards)
    assert sent.fingerprint == wrapped.fingerprint
    assert wrapped.fingerprint != Valued(bed(), REWARD, family(bands=3)).fingerprint
    read = Valued(bed(), REWARD, str(tmp_path / "mine.safetensors"))
    assert isinstance(read.value, ExpertValue)
    torch.testing.assert_close(read.transition(x, t).rewards, wrapped.transition(x, t).rewards, rtol=0.01, atol=0.01)
    moved = read.to("cpu")
    assert moved.value.sight.kernel is moved.kernel
    critic = family(BLACK, "endpoint")
    critic.save(tmp_path / "black.safetensors")
    assert Experts.load(tmp_path / "black.safetensors").of(bed(), BLACK).network.training is False


# bad input


def saved(path, card=None, **tensors):
    from safetensors.torch import save_file

    save_file(tensors or {"x": torch.zeros(2)}, path, card)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Valued(bed(seed=0.1), REWARD, family()), "the experts are of kernel '[0-9a-f]+', not of"),
        (
            lambda p: Valued(bed(), Reward(Headed(lambda d: Steep(3.0), LogProbability((1,))), "steep"), family()),
            "the experts are of 'Steep [0-9a-f]{24} [0-9a-f]{8}', not of 'Steep [0-9a-f ]+': transfer",
        ),
        (lambda p: Valued(bed(), BLACK, family()), "not of 'first entry [0-9a-f]{24}': transfer a family from it"),
        (lambda p: Valued(bed(), times(3.0), family(times(2.0))), "of '<lambda> [0-9a-f]+', not of '<lambda> "),
        (lambda p: Valued(bed(), 1 + times(3.0), family(1 + times(2.0))), "not of '"),
        (lambda p: family(opaque()), "nothing tells 'opaque' from other rewards of its name"),
        (lambda p: Valued(bed(), LOOSE, family()), "'loose' changes where all logits rise by one number"),
        (lambda p: family(LOOSE), "'loose' changes where all logits rise by one number"),
        (lambda p: Valued(LinearGaussian(), REWARD, family()), "LinearGaussian is no kernel on a backends.chains"),
        (lambda p: Experts(Card(bands=4, rank=1), family().changes), r"of \[5\] bands, their card says 4"),
        (lambda p: Valued(bed(), REWARD, "no.safetensors"), "no weights 'no.safetensors'"),
        (lambda p: Valued(bed(), REWARD, saved(p / "x.safetensors")), "holds no experts"),
        (lambda p: Valued(bed(), REWARD, "mt.safetensors"), "holds no experts"),
        (lambda p: family(bands=0), "bands and rank are 0 and 1"),
        (lambda p: family(bands=2.5), "bands and rank are 2.5 and 1"),
        (lambda p: family(reads="eyes"), "experts read 'eyes', expected state or endpoint"),
        (lambda p: family(BLACK, lam=0.0), "lam is 0.0, expected a finite number above 0"),
        (lambda p: family(Reward(lambda x, _: 0 * x[:, 0], "flat")), "'flat' is 0 with spread 0 on all draws"),
        (lambda p: transfer(REWARD, bed(), samples=1), "samples is 1, expected two rollouts or more"),
        (lambda p: Plan(temperature=0.0), "temperature above 0"),
        (
            lambda p: transfer(REWARD, bed(), reads="endpoint", samples=rollouts(bed(), 2, endpoints=False)),
            "the rollouts kept no endpoints",
        ),
        (lambda p: transfer(REWARD, Curved(bed()), samples=2), "Curved.decode is no line near 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message, tmp_path):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        make(tmp_path)


class Shut(Wrapper):
    """A kernel that keeps no graph."""

    def transition(self, x, t, cond=None):
        with torch.no_grad():
            return self.kernel.transition(x, t, cond)


def test_a_guide_needs_a_value_with_a_graph():
    x, t = noisy_rows(bed(), 5)
    seen = Valued(Shut(bed()), REWARD, family(reads="endpoint")).transition(x, t)
    assert seen.rewards.isfinite().all()
    with pytest.raises(TypeError, match="the value keeps no graph: score by it without a guide, Valued"):
        TDS(Shut(bed()), REWARD, value=family(reads="endpoint")).transition(x, t)
    assert TDS(Shut(bed()), REWARD, value=family()).transition(x, t).rewards.isfinite().all()  # x_t has its own
    with pytest.raises(TypeError, match="learn a value of it"):
        TDS(bed(), BLIND).transition(x, t)
