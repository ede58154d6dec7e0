"""The memory plan of a pipeline against what the same work has alive when it runs."""

import warnings
from dataclasses import replace

import pytest
import torch

import treesearch as ts
from tests.support import tiny, tiny_called  # noqa: F401  builders
from treesearch import api as loop
from treesearch.backends.base.live import LiveBytes
from treesearch.backends.pipelines import memory
from treesearch.backends.pipelines.kernel import DiffusersKernel
from treesearch.cli import probe, run
from treesearch.rewards.base import as_reward

FAMILIES = ("sd", "sdxl", "sd3", "flux")
PROMPTS = ["a red cube", "a blue sphere"]
UNBINNED = {"use_resolution_binning": False}


@pytest.fixture(scope="module")
def load(tiny_root):
    kernels = {}

    def get(name, **settings):
        key = (name, *sorted(settings.items()))
        if key not in kernels:
            size = {"height": 32, "width": 32} if name == "flux" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                folder = str(tiny.checkpoint(name, tiny_root))
                kernels[key] = DiffusersKernel.from_pretrained(folder, num_steps=3, **size | settings)
        return kernels[key]

    return get


def measured(work):
    with torch.no_grad(), LiveBytes("cpu") as live:
        work()
    return live.peak


def test_storages_count_once_and_as_long_as_they_live():
    weight = torch.zeros(1000)
    with LiveBytes("cpu") as live:
        a = weight + 1
        b = a.view(10, 100).t() * 2
        del a
        c = weight.view(10, 100)
        c += 1
    assert (live.now, live.peak) == (4000, 8000)
    del b
    assert live.now == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_is_what_the_run_has_alive(load, family):
    kernel = load(family)
    plan = kernel.memory_plan(6, prompts=PROMPTS)
    encoded = kernel.encode(PROMPTS)
    assert plan.network == pytest.approx(measured(lambda: memory.step(kernel, encoded, 6)), rel=0.01)
    assert plan.decode == pytest.approx(measured(lambda: memory.decoding(kernel, 6)), rel=0.01)
    assert plan.conditioning == sum(v[0].nbytes for v in encoded.values() if isinstance(v, torch.Tensor))
    assert plan.state == torch.zeros(kernel.state_shape).nbytes
    parts = {name: part for name, part in kernel.pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert plan.weights == {
        name: sum(t.nbytes for t in (*part.parameters(), *part.buffers())) for name, part in parts.items()
    }


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen_image", {}), ("pixart_sigma", {"network_inputs": UNBINNED})],
)
def test_a_dry_run_of_a_generic_adapter_is_what_runs(family, settings, tiny_root):
    """By blocks, and by the pipeline's own call: what it prints is what a step and a decoding have alive."""
    place = str(tiny.checkpoint(family, tiny_root))
    kernel = DiffusersKernel.from_pretrained(place, num_steps=2, device="cpu", height=64, width=64, **settings)
    found, encoded = probe.estimate(session(kernel, batch_size=3))["memory"], kernel.encode(PROMPTS)
    for line, work in (("step of 3 rows", memory.step), ("decoding, 4 at a time", memory.decoding)):
        given = (kernel, encoded, 3) if work is memory.step else (kernel, 3)
        work(*given)
        assert found[line] == pytest.approx(measured(lambda work=work, given=given: work(*given)), rel=0.01)
    assert found["state"] == torch.zeros(kernel.state_shape).nbytes
    weights = {name: sum(w.nbytes for w in part.parameters()) for name, part in kernel.modules().items()}
    assert all(found[f"weights of {name}"] >= size > 0 for name, size in weights.items())


def test_gradient_is_planned_with_its_checkpoints(load):
    kernel = load("sd")
    plan = kernel.memory_plan(6, prompts=PROMPTS, backward=True)
    encoded = kernel.encode(PROMPTS)
    assert plan.backward == pytest.approx(measured(lambda: memory.gradient(kernel, encoded, 6)), rel=0.02)
    assert plan.backward > plan.network + plan.decode


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_grows_with_the_batch(load, family):
    kernel = load(family)
    plans = [kernel.memory_plan(n) for n in (1, 2, 8)]
    for name in ("network", "decode"):
        few, twice, many = (getattr(plan, name) for plan in plans)
        assert few < twice < many <= 8.1 * few, name
    totals = [plan.total for plan in plans]
    assert totals == sorted(totals)


def test_tiles_take_less(load):
    kernel = load("sd", height=64, width=64)
    plan = kernel.memory_plan(2)
    assert plan.decode_tiled < plan.decode / 2
    tiled = load("sd", height=64, width=64, tiling=True, decode_batch=2)
    assert plan.decode_tiled == pytest.approx(measured(lambda: memory.decoding(tiled, 2)), rel=0.01)


def test_planning_leaves_the_kernel_as_it_was(load):
    kernel = load("sd")
    encoded = kernel.encode(PROMPTS)
    before = memory.step(kernel, encoded, 1)
    kernel.memory_plan(2, backward=True)
    assert not any(p.is_meta for part in kernel.pipe.components.values() if isinstance(part, torch.nn.Module)
                   for p in part.parameters())  # fmt: skip
    assert torch.equal(before, memory.step(kernel, encoded, 1))


def test_encoders_that_leave_make_room(load):
    kernel = load("sd", text_encoders="free")
    plan = kernel.memory_plan(1, prompts=PROMPTS)
    assert plan.leaving == plan.weights["text_encoder"] > 0
    assert replace(plan, leaving=0).total >= plan.total
    kernel.encode(PROMPTS)
    after = kernel.memory_plan(1, prompts=PROMPTS)
    assert "text_encoder" not in after.weights
    assert (after.encode, after.network, after.conditioning) == (0, plan.network, plan.conditioning)


def mean(images, prompts=None):
    return images.mean((1, 2, 3))


def never(images, prompts=None):
    raise AssertionError("nothing should have run")


def session(kernel, score=mean, batch_size=4):
    reward = as_reward(score, name="score")
    options = loop.Options(batch_size, "all")
    return loop.make_session(kernel, reward, ts.BestOfN(), PROMPTS, ts.Budget(nfe=100), 0, options, None)


def test_dry_run_prints_the_plan(load, capsys):
    kernel = load("sd")
    found = probe.estimate(session(kernel))
    assert found["memory"] == kernel.memory_plan(4, prompts=PROMPTS).lines()
    assert "fits" not in found
    run.print_estimate(found, as_json=False)
    printed = capsys.readouterr().out
    assert "weights of unet" in printed
    assert "KiB" in printed


def test_a_third_pass_is_in_the_plan(load):
    """Skipped layers of SD3, at the level at which they are."""
    kernel = load("sd3", guidance_scale=4.0, skip_guidance_layers=(1,), skip_layer_guidance_start=0.0,
                  skip_layer_guidance_stop=1.0)  # fmt: skip
    encoded = {k: getattr(v, "value", v) for k, v in kernel.encode(PROMPTS).items()}
    x, t = torch.randn(2, *kernel.state_shape), torch.tensor([2, 2])
    kernel.transition(x, t, encoded)
    peak, plan = measured(lambda: kernel.transition(x, t, encoded)), kernel.memory_plan(2, prompts=PROMPTS)
    assert plan.network == pytest.approx(peak, rel=0.25)
    assert kernel.rows_per_nfe == 3


def test_dry_run_runs_nothing_that_does_not_fit(load, monkeypatch):
    kernel = load("sd")
    need = kernel.memory_plan(4, prompts=PROMPTS).total
    monkeypatch.setattr(memory, "capacity", lambda device: need)
    assert probe.estimate(session(kernel))["fits"] is True
    monkeypatch.setattr(memory, "capacity", lambda device: need - 1)
    found = probe.estimate(session(kernel, never))
    assert found["fits"] is False
    assert found["memory"]["device has"] == need - 1
