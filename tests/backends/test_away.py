"""Leading away, and weights that lead back: which choices, which rows, which kernel, what each costs."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tests.support.interventions import Fade, Own
from treesearch.backends import mnist
from treesearch.backends.base import Gaussian, Guided, Wrapper, describe, optional, shift_mean
from treesearch.backends.interventions import Actions, Away, Intervened, Intervention, Proposal
from treesearch.backends.wrappers.cycle import Cycle

KERNEL = mnist(num_steps=5)
X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 4, 2, 1])
OWN, TWO = Intervened(KERNEL, Own()), Intervened(KERNEL, Own((0.5, 1.0)))
FADED = Intervened(TWO, Fade())
PLAIN = KERNEL.transition(X, T)


def chosen(*rows):
    return {"choices": torch.tensor(rows)}


def led(law, weak, scale):
    return law.mean + scale * (law.mean - weak.mean)


class Rows:
    """Rows that the network is called on, call by call."""

    def __init__(self):
        self.seen = []

    def __enter__(self):
        self.hook = KERNEL.network.register_forward_pre_hook(lambda part, given: self.seen.append(len(given[0])))
        return self.seen

    def __exit__(self, *_):
        self.hook.remove()


# choices


def test_each_of_two_interventions_reads_its_own_choice():
    found = FADED.transition(X, T, chosen([1, 0], [0, 1], [2, 1], [0, 0])).mean
    alone = {
        0: Intervened(KERNEL, Own((0.5,))),
        1: Intervened(KERNEL, Fade()),
        2: Intervened(OWN, Fade()),
        3: KERNEL,
    }
    for i, kernel in alone.items():
        assert torch.equal(found[i], kernel.transition(X, T).mean[i])


def test_away_from_a_kernel_without_interventions_keeps_the_kernels_own():
    kernel, rows = Away(TWO, KERNEL, 2.0), chosen([0], [1], [2], [1])
    assert kernel.choices == TWO.choices
    assert Actions(kernel, (3,)).names == ("none", "u = 0.5", "u = 1")
    assert torch.allclose(kernel.transition(X, T, rows).mean, led(TWO.transition(X, T, rows), PLAIN, 2.0), atol=1e-6)


def test_an_action_sets_both_kernels_alike():
    kernel, rows = Away(TWO, FADED, 2.0), chosen([1, 0], [1, 1], [0, 1], [2, 1])
    assert kernel.choices == (("u = 0.5", "u = 1"), ("by 0.3",))
    strong = TWO.transition(X, T, rows)
    found = kernel.transition(X, T, rows).mean
    assert torch.equal(found[0], strong.mean[0])
    assert torch.allclose(found, led(strong, FADED.transition(X, T, rows), 2.0), atol=1e-6)
    assert Intervened(Away(TWO, KERNEL, 1.0), Fade()).choices == kernel.choices
    Away(TWO, Intervened(mnist(num_steps=5), Own((0.5, 1.0))), 1.0)  # another network under the same settings


class Likewise(Own):
    """Of the same settings."""


@pytest.mark.parametrize("other", [Own((0.1, 0.2, 0.3)), Fade((0.5, 1.0)), Likewise((0.5, 1.0))])
def test_actions_that_mean_two_things_are_refused(other):
    with pytest.raises(ValueError, match="mean two things"):
        Away(TWO, Intervened(KERNEL, other), 1.0)


# which rows


def test_a_window_costs_what_it_runs():
    kernel = Away(KERNEL, Intervened(KERNEL, Own(), levels=(3, 4)), 2.0)
    assert describe(kernel).rows_per_nfe == (1, 1, 1, 2, 2, 1)
    assert describe(Proposal(kernel)).rows_per_nfe == (2, 2, 2, 3, 3, 2)
    assert describe(Proposal(OWN)).rows_per_nfe == (2,) * 6
    assert describe(Away(KERNEL, mnist(num_steps=5), 2.0, levels=(3, 4))).rows_per_nfe == (1, 1, 1, 2, 2, 1)
    for t, calls in ((5, [4]), (4, [4, 4])):
        with Rows() as seen:
            kernel.transition(X, torch.full((4,), t))
        assert seen == calls


def test_nothing_more_is_run_where_no_row_leads_away():
    kernel = Away(KERNEL, TWO, 2.0)
    for rows, calls in ((chosen([0], [0], [0], [0]), [4]), (chosen([0], [2], [0], [0]), [4, 4])):
        with Rows() as seen:
            law = kernel.transition(X, T, rows)
        assert seen == calls
        assert torch.equal(law.mean[0], PLAIN.mean[0])
    with Rows() as seen:
        Away(KERNEL, OWN, 0.0).transition(X, T)
    assert seen == [4]
    with pytest.raises(ValueError, match="2 settings"):
        kernel.transition(X, T)


@pytest.mark.parametrize(
    "kernel",
    [
        Away(KERNEL, Intervened(KERNEL, Own(), levels=(3, 4)), 2.0),
        Away(KERNEL, OWN, 2.0, levels=(3, 4)),
        Away(KERNEL, Away(KERNEL, OWN, 1.0), 2.0, levels=(3, 4)),
    ],
)
def test_rows_outside_of_the_window_stay_to_the_bit_and_both_outputs_are_led(kernel):
    law, weak = kernel.transition(X, T), kernel.weak.transition(X, T)
    for ours, plain, theirs in (
        (law.mean, PLAIN.mean, weak.mean),
        (law.endpoint, PLAIN.endpoint, weak.endpoint),
    ):
        assert torch.equal(ours[[0, 2, 3]], plain[[0, 2, 3]])
        assert torch.allclose(ours[1], 3 * plain[1] - 2 * theirs[1], atol=1e-5)
        assert not torch.equal(ours[1], plain[1])


# places


class Nothing(Intervention):
    """Changes nothing."""

    settings = ("nothing",)

    def on(self, network, rows):
        raise NotImplementedError


@dataclass(frozen=True)
class Placed:
    """A kernel that says where it is."""

    device: str = "cpu"
    start: int = 0
    num_steps = 2
    state_shape = (2,)
    network = nn.Identity()

    def prior(self, noise, cond=None):
        return noise

    def transition(self, x, t, cond=None):
        return Gaussian(x, torch.ones_like(x), x)

    def decode(self, x0):
        return x0

    def to(self, device):
        return replace(self, device=device)

    def from_noise(self, start):
        return replace(self, start=start)


def test_a_weak_kernel_moves_with_its_kernel():
    placed = Placed()
    shared = Away(placed, Intervened(placed, Nothing(), levels=(2, 2)), 1.0, levels=(1, 2))
    other = Away(placed, Placed(start=7), 1.0)
    moved = shared.to("meta")
    assert moved.weak.kernel is moved.kernel  # one network, not two
    assert moved.kernel.device == "meta"
    assert (moved.weak.levels, moved.levels) == ((2, 2), (1, 2))
    assert other.to("meta").weak == Placed("meta", 7)
    assert shared.from_noise(3).weak.kernel.start == 3
    assert other.from_noise(3).weak.start == 7


# laws


@dataclass(frozen=True)
class Wide(Wrapper):
    """A change of the spread."""

    @property
    def untouched(self):
        return self.kernel

    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t, cond)
        return replace(law, std=2 * law.std)


@dataclass(frozen=True)
class Said(Wrapper):
    """A kernel that is a law of its own."""

    base_law = "another"


def test_weights_lead_back_to_the_kernel_with_all_that_is_around_it():
    cycle = {"low": 1, "high": 3}
    t, plain = torch.tensor([6, 4, 3, 2]), Cycle(KERNEL, **cycle)
    p = plain.transition(X, t)
    for changed in (
        Cycle(OWN, **cycle),
        Intervened(Cycle(OWN, **cycle), Fade()),
        Away(plain, Cycle(OWN, **cycle), 1.0),
    ):
        law = Proposal(changed).transition(X, t)
        assert torch.equal(law.base_mean, p.mean)
        assert not torch.equal(law.mean, p.mean)
    assert Proposal(Cycle(OWN, **cycle)).base_law is None
    assert Proposal(Intervened(Said(KERNEL), Own())).base_law == "another"
    assert optional(Cycle(KERNEL, **cycle), "untouched") is None


GUIDED = Guided(KERNEL, shift_mean(lambda x, t, law, cond: torch.ones_like(x)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Away(KERNEL, mnist(num_steps=5, eta=0.0), 1.0), "noise at t = 2"),
        (lambda: Away(KERNEL, OWN, 1.0, levels=(0, 2)), "1 <= low"),
        (lambda: Away(KERNEL, OWN, 1.0, levels=3), r"expected \(low, high\)"),
        (lambda: Away(GUIDED, KERNEL, 1.0).transition(X, T), "without weights"),
        (lambda: Away(KERNEL, GUIDED, 1.0).transition(X, T), "without weights"),
        (lambda: Proposal(Wide(KERNEL)).transition(X, T), "another spread"),
        (lambda: Proposal(Intervened(GUIDED, Own())).transition(X, T), "without weights"),
        (lambda: Proposal(Actions(OWN, (3,))), "around the proposal"),
        (lambda: Intervened(KERNEL, Own((0.5, 0.5))), "each once"),
        (lambda: Intervened(KERNEL, Own(())), "one or more"),
        (lambda: Actions(OWN, 3), "several in a tuple"),
        (lambda: Actions(OWN, (3.0,)), "no whole numbers"),
        (lambda: Actions(OWN, (True,)), "no whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()


# identity


def twice():
    class Halved(Own):
        def on(self, network, rows):
            return Fade(self.strengths).on(network, rows)

    return Halved


def again():
    class Halved(Own):
        def on(self, network, rows):
            return Fade((0.5,)).on(network, rows)

    return Halved


def computed(code):
    class Halved(Own):
        factor = property(code)

        def on(self, network, rows):
            return Fade((self.factor,)).on(network, rows)

    return Halved


def test_the_code_of_an_intervention_is_part_of_what_it_is():
    kinds = (twice(), again(), computed(lambda self: 0.5), computed(lambda self: 0.2))
    found = [Intervened(KERNEL, kind()).fingerprint for kind in kinds]
    assert None not in found
    assert len(set(found)) == 4
    assert Intervened(KERNEL, twice()()).fingerprint == found[0]


def test_the_code_of_a_wrapper_is_part_of_what_it_is():
    class Wide(Wrapper):
        def transition(self, x, t, cond=None):
            return self.kernel.transition(x, t, cond)

    one, other = (kind(KERNEL).fingerprint for kind in (Wide, globals()["Wide"]))
    assert None not in (one, other)
    assert one != other
