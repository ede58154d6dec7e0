"""Every wrapper passes on the kernel contract and nothing else, and stays around what a kernel's methods return."""

import ast
import contextlib
import copy
import importlib
import inspect
import pickle
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
import torch

import treesearch
from treesearch import backends
from treesearch.backends.base import MAKES_KERNELS, PASSED_ON, Gaussian, Guided, Kernel, Wrapper, describe, optional
from treesearch.backends.chains.heun import Heun
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.exact.moments import Moments
from treesearch.backends.exact.teleport import Teleport
from treesearch.backends.guidance import DAS, DPS, TDS, Diffuser, GuidanceScales, PolicyGuided, TrustRegion, Valued
from treesearch.backends.guidance.diffeditor import DiffEditor
from treesearch.backends.guidance.drawn import Drawn
from treesearch.backends.guidance.elucd import EluCD
from treesearch.backends.guidance.flowchef import FlowChef
from treesearch.backends.guidance.lacon import Aligned, LaCon
from treesearch.backends.guidance.noise import NoiseProposal
from treesearch.backends.guidance.noise_law import NoiseLaw
from treesearch.backends.guidance.regions import moved
from treesearch.backends.guidance.steered import Steered
from treesearch.backends.guidance.universal import Universal
from treesearch.backends.interventions import Actions, Away, Intervened, Intervention, Proposal
from treesearch.backends.interventions.lina import Expanded, Lina
from treesearch.backends.interventions.retrieval import Retrieved
from treesearch.backends.models.aligner import Aligner, Plan
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.policy import PolicyKernel, Seen
from treesearch.backends.roots import Direct, Regional, Rooted
from treesearch.backends.roots.absent import Absent
from treesearch.backends.roots.bdia import Bdia
from treesearch.backends.text.rescored import Rescored
from treesearch.backends.text.scaffold import Scaffold
from treesearch.backends.text.turns import FieldOrder
from treesearch.backends.wrappers.completed import Completed
from treesearch.backends.wrappers.composed import Composed
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.backends.wrappers.spliced import Spliced
from treesearch.planning.warm_start import WarmStart
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.observation import masked, measurement
from treesearch.rewards.outlines import edges
from treesearch.testing import Counting

F64 = torch.float64
ROOT = Path(__file__).parents[2]
MOMENTS = Moments(torch.zeros(3, 2, dtype=F64), torch.eye(6, dtype=F64)[:2].reshape(2, 3, 2), torch.ones(2, dtype=F64))
PLANE = Normalisation((0.0, 0.0), (1.0, 1.0))
ALIGNER = Aligner(Plan(condition="edges(2)", shape=(1, 2, 2), parts=("",), channels=(1,)))
EDGES = measurement(edges(2), torch.zeros(1, 2, 2), tolerance=0.1)
MASK = torch.tensor([[True, False], [False, False], [True, False]])


def score(samples, prompts):
    return samples.double().flatten(1).sum(1)


REWARD = Reward(score, "sum")


def half(x, t, law, cond):
    return law


def worth(x, t, law, cond):
    return -t.double()


class Bed(GaussianTrajectories):
    """A kernel with every method that a wrapper may meet, and some that return kernels."""

    eta = 1.0

    def __init__(self, name="bed"):
        mean, cov = torch.zeros(3, 2, dtype=F64), torch.eye(6, dtype=F64)
        super().__init__(mean, cov, channels=Channels(1, 1), num_steps=6, eta=self.eta)
        self.name = name

    @property
    def fingerprint(self):
        return self.name

    def renoise(self, x, t_from, t_to, noise):
        return x + noise

    def from_image(self, image):
        return type(self)("from_image")

    def from_noise(self, x_T):
        return type(self)("from_noise")

    def with_horizon(self, horizon):
        return type(self)("with_horizon")

    def to(self, device):
        return type(self)(f"to {device}")

    def one_day(self) -> Self:
        return type(self)("one_day")


class Nothing(Intervention):
    """Changes nothing."""

    settings = ("nothing",)
    identity = ()

    def on(self, network, rows):
        return contextlib.nullcontext()


class Flow(Bed):
    """Without noise after the prior."""

    eta = 0.0


class Known(Bed):
    """With a network whose parts have names."""

    network = torch.nn.Identity()


class Told(Bed):
    """It is told what is known."""

    def encode(self, prompts):
        known = torch.zeros(len(prompts), *self.state_shape, dtype=F64)
        return {"known": known, "mask": torch.zeros_like(known, dtype=torch.bool)}


class Written(Bed):
    """Of texts, a token a letter, as far as wrappers ask."""

    words, length, reveal, top_p = object(), 40, "left", 1.0

    def plain(self, text):
        return list(map(ord, text))


class Record(Bed):
    """Of a record, as far as wrappers ask."""

    fields = ("a",)

    def known(self, cond, n):
        return {}


def bed(kind, *name):
    """What a wrapper of this class can be around."""
    inside = {DiffEditor, Aligned, LaCon, Intervened, Expanded, Retrieved, Away, Proposal, Actions}
    if kind in (Scaffold, Rescored):
        return Written(*name)
    if kind is FieldOrder:
        return Record(*name)
    if kind is Composed:
        return Told(*name)
    return (Flow if kind in (Heun, Regional) else Known if kind in inside else Bed)(*name)


def make(kind, kernel):
    """A wrapper of each class."""
    held = torch.zeros(3, 2, dtype=F64)
    made = {
        Guided: lambda k: Guided(k, half, "half"),
        PolicyKernel: lambda k: PolicyKernel(k, Seen(Normalisation((0.0,), (1.0,)), 1), PLANE, 1),
        TDS: lambda k: TDS(k, REWARD),
        DAS: lambda k: DAS(k, REWARD),
        DPS: lambda k: DPS(k, REWARD),
        TrustRegion: lambda k: TrustRegion(k, REWARD),
        Valued: lambda k: Valued(k, REWARD, worth),
        Drawn: lambda k: Drawn(k, REWARD),
        NoiseProposal: lambda k: NoiseProposal(k, SimpleNamespace(fingerprint="steers")),
        NoiseLaw: lambda k: NoiseLaw(k, SimpleNamespace(fingerprint="steers")),
        Scaffold: lambda k: Scaffold(k, '{"properties": {"a": {}}}', 2),
        Rescored: Rescored,
        FieldOrder: FieldOrder,
        FlowChef: lambda k: FlowChef(k, REWARD),
        EluCD: lambda k: EluCD(k, REWARD),
        Universal: lambda k: Universal(k, REWARD, steps=1),
        Aligned: lambda k: Aligned(k, ALIGNER),
        LaCon: lambda k: LaCon(Aligned(k, ALIGNER), EDGES),
        Steered: lambda k: Steered(k, measurement(masked(MASK), torch.zeros(2), tolerance=0.1)),
        Cycle: lambda k: Cycle(k, low=2, high=4),
        Intervened: lambda k: Intervened(k, Nothing()),
        Expanded: lambda k: Expanded(k, Lina(((1.0, 0.0),)), expanded={}),
        Retrieved: lambda k: Retrieved(k, Nothing(), "library", k=1),
        Away: lambda k: Away(k, k, 1.0),
        Proposal: lambda k: Proposal(Intervened(k, Nothing())),
        Actions: lambda k: Actions(Intervened(k, Nothing()), (2,)),
        Diffuser: lambda k: Diffuser(k, REWARD),
        PolicyGuided: lambda k: PolicyGuided(k, REWARD),
        GuidanceScales: lambda k: GuidanceScales(Guided(k, half, "half"), (0.0, 1.0), (2,)),
        Clamp: lambda k: Clamp(k, MASK, held),
        Drafted: lambda k: Drafted(k, k, 1.0),
        Absent: lambda k: Absent(k, {"text": torch.zeros(6, 1, 2)}),
        Rooted: lambda k: Rooted(k, torch.zeros(7, 1, 3, 2, dtype=F64)),
        DiffEditor: lambda k: DiffEditor(k, torch.zeros(7, 1, 3, 2, dtype=F64), moved(MASK, (0, 0)), parts=("",)),
        Regional: lambda k: Regional(k, MASK, eta=0.5),
        Direct: lambda k: Direct(k, torch.zeros(7, 1, 3, 2, dtype=F64)),
        WarmStart: lambda k: WarmStart(k, torch.zeros(1, 1, 3, 2, dtype=F64), 3),
        Counting: lambda k: Counting(k),
        SecondOrder: lambda k: SecondOrder(k),
        Heun: lambda k: Heun(k),
        Bdia: lambda k: Bdia(k),
        Teleport: lambda k: Teleport(k, 0.5, MOMENTS),
        Completed: lambda k: Completed(k, Bed("student"), (2, 4)),
        Spliced: lambda k: Spliced(k, Bed("student"), 3),
        Composed: lambda k: Composed(k, 2),
    }
    return made[kind](kernel)


def modules():
    for package in (backends, treesearch):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__") and "distributed" not in found.name:
                yield importlib.import_module(found.name)


def below(kind):
    return {kind, *(c for direct in kind.__subclasses__() for c in below(direct))}


CLASSES = {c for module in modules() for c in vars(module).values() if inspect.isclass(c)}
WRAPPERS = sorted((c for c in CLASSES & below(Wrapper) if not c.__name__.startswith("_")), key=lambda c: c.__name__)
CONCRETE = [c for c in WRAPPERS if c is not Wrapper and not inspect.isabstract(c)]
KERNELS = {
    c for c in CLASSES - below(Wrapper) if all(hasattr(c, name) for name in ("prior", "transition", "decode"))
} - {Kernel}
NAMES = sorted(
    {name for c in KERNELS for name in dir(c) if not name.startswith("_")} | set(dir(Bed())) - set(dir(object))
)
NAMES = [name for name in NAMES if not name.startswith("_")]


def inner_most(kernel):
    return inner_most(kernel.kernel) if isinstance(kernel, Wrapper) else kernel


def test_every_kernel_and_wrapper_was_found():
    assert {"DiffusersKernel", "TrajectoryKernel", "DiffusionKernel", "LinearGaussian"} <= {c.__name__ for c in KERNELS}
    for kind in CONCRETE:
        assert isinstance(make(kind, bed(kind)), kind)


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda c: c.__name__)
def test_every_public_name_of_every_kernel_is_passed_wrapped_again_or_refused(kind):
    class Full(type(bed(kind))):
        pass

    for name in NAMES:
        if name not in PASSED_ON and not hasattr(bed(kind), name):
            setattr(Full, name, lambda self, *args: Bed())
    wrapper, plain = make(kind, Full()), Full()
    for name in NAMES:
        if name in MAKES_KERNELS | {"one_day"}:
            made = getattr(wrapper, name)() if name == "one_day" else getattr(wrapper, name)(0)
            assert type(made) is kind, name
            assert inner_most(made).name == name
        elif hasattr(kind, name) or name in vars(wrapper):
            assert hasattr(wrapper, name), name
        else:
            assert hasattr(wrapper, name) == (name in PASSED_ON - kind.withheld and hasattr(plain, name)), name


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda c: c.__name__)
def test_a_wrapper_is_named_after_what_it_does_and_to_whom(kind):
    wrapper = make(kind, bed(kind))
    told = wrapper.fingerprint
    assert told is not None
    assert told == make(kind, bed(kind)).fingerprint
    assert "bed" in told
    assert told != make(kind, bed(kind, "other")).fingerprint
    moved = wrapper.to("cpu")
    assert type(moved) is kind
    assert inner_most(moved).name == "to cpu"


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda c: c.__name__)
def test_a_wrapper_can_be_copied_and_sent(kind):
    wrapper = make(kind, bed(kind))
    for other in (copy.copy(wrapper), copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert type(other) is kind
        assert other.fingerprint == wrapper.fingerprint
        assert describe(other) == describe(wrapper)


def test_the_wrapper_of_a_wrapper_keeps_both():
    nested = Clamp(TDS(Guided(Bed(), half, "half"), REWARD), MASK, torch.zeros(3, 2, dtype=F64))
    moved = nested.with_horizon(3).from_noise(0).to("cpu")
    assert [type(k) for k in (moved, moved.kernel, moved.kernel.kernel)] == [Clamp, TDS, Guided]
    assert inner_most(moved).name == "to cpu"
    assert moved.scores is REWARD
    assert "Guided" in nested.fingerprint
    assert "TDS" in nested.fingerprint


def test_settings_tell_wrappers_apart():
    values = torch.zeros(3, 2, dtype=F64)
    y = [measurement(masked(MASK), torch.zeros(2), tolerance=t) for t in (0.1, 0.2)]
    tolerant = [Steered(Bed(), one).fingerprint for one in y]
    clamps = [Clamp(Bed(), MASK, v).fingerprint for v in (values, values + 1)]
    scales = [GuidanceScales(Guided(Bed(), half, "half"), (0.0, w), (2,)).fingerprint for w in (1.0, 2.0)]
    orders = [SecondOrder(Bed(), order=n).fingerprint for n in (2, 3)]
    skips = [Teleport(Bed(), skip, MOMENTS).fingerprint for skip in (0.2, 0.5)]
    asked = [Completed(Bed(), Bed("student"), levels).fingerprint for levels in (None, (2,))]
    jumps = [Spliced(Bed(), Bed("student"), at).fingerprint for at in (2, 3)]
    chunks = [Composed(Told(), n).fingerprint for n in (2, 3)]
    for one, other in (tolerant, clamps, scales, orders, skips, asked, jumps, chunks):
        assert one != other
    assert Guided(Bed(), half).fingerprint is None  # two functions cannot be told apart
    assert TDS(Guided(Bed(), half), REWARD).fingerprint is None


class Failing(Bed):
    @property
    def departs(self):
        return self.misspelt

    @property
    def rows_per_nfe(self):
        return self.misspelt


class FailingWrapper(Guided):
    @property
    def departs(self):
        return self.misspelt


def test_a_property_that_fails_is_not_taken_for_absent():
    for look in (
        lambda: describe(Failing()),
        lambda: describe(Guided(Failing(), half)),
        lambda: getattr(Guided(Failing(), half), "departs", None),
        lambda: getattr(TDS(Guided(Failing(), half), REWARD), "rows_per_nfe", 1),
        lambda: describe(FailingWrapper(Bed(), half)),
        lambda: FailingWrapper(Bed(), half).departs,
    ):
        with pytest.raises(RuntimeError, match=r"misspelt|rows_per_nfe"):
            look()
    assert optional(Bed(), "departs", "none") == "none"


def test_what_moves_a_kernel_must_return_it():
    class Moved(Bed):
        def to(self, device):
            return None

    with pytest.raises(TypeError, match="returned NoneType, expected a kernel"):
        Guided(Moved(), half).to("cpu")
    assert isinstance(Guided(Still(), half).to("cpu"), Guided)


class Still:
    """A kernel that cannot be moved."""

    num_steps, state_shape = 2, (1,)

    def prior(self, noise, cond=None):
        return noise

    def transition(self, x, t, cond=None):
        return Gaussian(0.5 * x, torch.ones(len(x), 1), x)

    def decode(self, x0):
        return x0


@pytest.mark.parametrize("package", ["backends", "rewards", "treesearch", "experiments"])
def test_nothing_else_passes_attributes_on(package):
    """A class of its own with a `__getattr__` would be a list of exceptions again."""
    for path in (ROOT / package).rglob("*.py"):
        if "def __getattr__" not in (text := path.read_text("utf-8")):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name != "Wrapper":
                passes = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__getattr__"]
                assert not any("kernel" in ast.unparse(f) for f in passes), f"{path}: {node.name}"
