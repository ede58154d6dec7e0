"""Fingerprints see whatever changes what a network computes, and nothing else."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.support import tiny
from treesearch.backends import maze, mnist
from treesearch.backends.base import fingerprint
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.backends.pipelines import DiffusersKernel

ROOT = Path(__file__).parents[2]


class Scaled:
    """An attention processor, say."""

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 40, 3), nn.Linear(200, 200)
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.strength, self.processor, self.scaling = 1.0, Scaled(1.0), {"b": 2.0, "a": 1.0}
        self.chosen, self.act = {"x", "y", "z"}, nn.functional.silu

    def forward(self, x, timestep=None):
        return self.processor(self.second(x)) * self.strength


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def hook(by):
    return lambda module, args, output: by * output


def same_hook(module, args, output):
    return output


FACTOR = 1.0


def global_hook(module, args, output):
    return FACTOR * output


def in_place(network):
    network.load_state_dict({k: 2 * v for k, v in network.state_dict().items()})


def one_entry(network):
    network.second.weight.data[17, 101] += 1e-3  # `data` leaves the tensor's version as it is


def renamed(network):
    network.__class__ = type("Net", (Net,), {"forward": lambda self, x, timestep=None: 2 * x})


CHANGES = {
    "weights in place": in_place,
    "one weight of many": one_entry,
    "a hidden buffer": lambda n: n.hidden.mul_(2),
    "a setting": lambda n: setattr(n, "strength", 0.5),
    "a new setting": lambda n: setattr(n.first, "s1", 0.9),
    "a processor's setting": lambda n: setattr(n.processor, "by", 2.0),
    "another processor": lambda n: setattr(n, "processor", functools.partial(Scaled.__call__, Scaled(1.0))),
    "an adapter's scale": lambda n: n.scaling.update(a=0.5),
    "an activation": lambda n: setattr(n, "act", nn.functional.gelu),
    "a hook": lambda n: n.second.register_forward_hook(same_hook),
    "a hook before": lambda n: n.second.register_forward_pre_hook(lambda m, a: a),
    "what a hook closes over": lambda n: n.second.register_forward_hook(hook(2.0)),
    "a parametrization": lambda n: parametrizations.weight_norm(n.second),
    "half precision": lambda n: n.half(),
    "a method": lambda n: setattr(n, "forward", functools.partial(n.forward, timestep=3)),
    "code of a class": renamed,
    "stride": lambda n: setattr(n.first, "stride", (2, 2)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_what_is_computed_is_seen(what):
    network = net()
    before = fingerprint.of(network)
    assert before is not None
    CHANGES[what](network)
    after = fingerprint.of(network)
    assert after is not None
    assert after != before


def test_hooks_are_told_apart_by_what_they_hold(monkeypatch):
    found = []
    for by in (2.0, 3.0, 2.0):
        network = net()
        network.register_forward_hook(hook(by))
        found.append(fingerprint.of(network))
    assert found[0] == found[2] != found[1]
    network = net()
    network.register_forward_hook(global_hook)
    before = fingerprint.of(network)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    assert fingerprint.of(network) != before


SAME = {
    "train": lambda n: n.train(),
    "gradients": lambda n: n.requires_grad_(False),
    "memory format": lambda n: n.to(memory_format=torch.channels_last),
    "a copy": copy.deepcopy,
    "compiled in place": lambda n: n.compile(backend="eager") or n,
    "compiled": lambda n: torch.compile(n, backend="eager"),
    "a hook taken away": lambda n: n.register_forward_hook(same_hook).remove() or n,
    "another order of a dict": lambda n: setattr(n, "scaling", {"a": 1.0, "b": 2.0}) or n,
    "an equal processor": lambda n: setattr(n, "processor", Scaled(1.0)) or n,
}


@pytest.mark.parametrize("what", SAME)
def test_what_changes_nothing_is_not_seen(what):
    network = net()
    before = fingerprint.of(network)
    assert before is not None
    assert fingerprint.of(SAME[what](network)) == before


def hooked():
    """A network of no library, with a hook."""
    network = net()
    network.register_forward_hook(hook(2.0))
    return network


def test_another_process_finds_the_same(tiny_root):
    """A run goes on in another process, where sets have another order: of a library's configurations too."""
    folder = tiny.checkpoint("sd", tiny_root)
    line = f"""
from tests.backends import test_fingerprint as t
print(t.fingerprint.of(t.hooked()), *t.shipped({str(folder)!r}), sep="\\n")"""
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", line], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [fingerprint.of(hooked()), *shipped(str(folder))]


def shipped(folder):
    """Fingerprints of the models that ship, and of a checkpoint's pipeline."""
    pipeline = DiffusersKernel.from_pretrained(folder, num_steps=2, device="cpu")
    return [kernel.fingerprint for kernel in (mnist(), maze(), pipeline)]


class Opaque:
    __slots__ = ()


@pytest.mark.parametrize("unknown", [torch.Generator(), iter([1]), Opaque().__repr__, {"held": memoryview(b"x")}])
def test_what_cannot_be_read_has_no_fingerprint(unknown):
    network = net()
    network.odd = unknown
    assert fingerprint.of(network) is None
    network = net()
    network.register_forward_hook(functools.partial(same_hook, unknown))
    assert fingerprint.of(network) is None
    assert fingerprint.of(net().to("meta")) is None


def test_an_object_that_holds_itself_ends():
    network = net()
    network.loop = [network]
    assert fingerprint.of(network) is not None


def test_a_kernel_tells_its_network_as_it_is_now():
    kernel = DiffusionKernel(
        net(), state_shape=(200,), schedule=Schedule.flow(torch.linspace(0, 1, 4, dtype=torch.float64))
    )
    before = kernel.fingerprint
    kernel.model.strength = 0.5
    assert kernel.fingerprint != before
    kernel.model.strength = 1.0
    assert kernel.fingerprint == before
    assert mnist_kernel(3).fingerprint == mnist_kernel(3).fingerprint is not None


class Packed(torch.Tensor):
    """A quantised weight that knows nothing but what it is made of."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].values, args[0].scale)
        raise NotImplementedError(func)


class Stored(nn.Parameter):
    """Packed bytes beside what they mean, as GGUF and bitsandbytes keep them."""

    kind = None


def test_weights_of_quantisers_are_read_by_what_they_are_made_of():
    found = set()
    for values, scale in ((1, 1.0), (2, 1.0), (1, 2.0)):
        network = nn.Linear(2, 2, bias=False)
        packed = Packed(torch.full((2, 2), values, dtype=torch.int8), torch.full((2, 1), scale))
        network.weight = nn.Parameter(packed, requires_grad=False)
        found.add(fingerprint.of(network))
    for kind in (8, 4):
        network = nn.Linear(2, 2, bias=False)
        network.weight = Stored(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
        network.weight.kind = kind
        found.add(fingerprint.of(network))
    assert len(found) == 5
    assert None not in found
