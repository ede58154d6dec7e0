"""The recipes of docs/networks.md run as they stand: x̂_0 of a step is what their formulas say, in twenty lines."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import RFD4ProteinaTransformer, UNet2DModel

import treesearch as ts
from tests.support.tiny import seeded, stirred
from treesearch.rewards.base import as_reward

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def recipe(name):
    found = {}
    exec(next(block for block in BLOCKS if f"def {name}(" in block), found)
    return found[name]


def states(kernel, t, prompts=None):
    t = torch.tensor(t)
    x = torch.randn(len(t), *kernel.state_shape, generator=torch.Generator().manual_seed(1))
    cond = {} if prompts is None else {k: getattr(v, "value", v) for k, v in kernel.encode(prompts).items()}
    return x, t, cond | {"task": torch.arange(len(t))}


def found(kernel, prompts=None):
    """A search over samples runs, and draws finite ones."""
    reward = as_reward(lambda samples: -samples.flatten(1).square().mean(1), "small")
    budget = ts.Budget(nfe=8 * kernel.num_steps * len(prompts or [""]))
    result = ts.search(kernel, reward, ts.FeynmanKac(num_particles=4), prompts=prompts, budget=budget)
    assert all(task.samples.isfinite().all() for task in result.tasks)
    return result


@pytest.mark.parametrize("block", BLOCKS)
def test_a_recipe_is_twenty_lines(block):
    body = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(body) <= 20


def test_edm_denoises_gaussian_data():
    """Of x_0 ~ N(0, s²) the denoiser is s² x / (s² + σ²), which is c_skip where s is σ_data, and F is 0."""
    kernel = recipe("edm")(lambda x, told: torch.zeros_like(x), (64,), T=40)
    x, t, cond = states(kernel, [1, 40, 20])
    sigma = kernel.chain.schedule.sigma[t][:, None].float()
    law = kernel.transition(sigma * x, t, cond)
    torch.testing.assert_close(law.endpoint, 0.25 / (0.25 + sigma**2) * sigma * x)
    said = []
    recipe("edm")(lambda x, told: said.append(told) or x, (64,)).transition(x, torch.tensor([1, 2, 18]), cond)
    assert said[0][0] == pytest.approx(torch.tensor(0.002).log().item() / 4, rel=1e-5)
    variance, table = 80.0**2, kernel.chain.schedule.sigma
    for high, low in zip(table.flip(0)[:-1], table.flip(0)[1:], strict=True):
        own = (low / high) ** 2 * (high**2 - low**2)
        kept = 0.25 / (0.25 + high**2)
        variance = (kept + (low**2 - own).sqrt() / high * (1 - kept)) ** 2 * variance + own
    first = as_reward(lambda samples: samples[:, 0], "first")
    samples = ts.search(kernel, first, ts.BestOfN(), budget=ts.Budget(nfe=40 * 64)).samples.flatten()
    error = float(samples.var() / variance - 1) / (2 / len(samples)) ** 0.5
    assert abs(error) < 4


def test_a_flow_is_told_s():
    kernel = recipe("flow")(lambda x, s: x * s[:, None], (4,), T=10)
    x, t, cond = states(kernel, [1, 10, 5])
    s = torch.tensor([0.1, 1.0, 0.5])[:, None]
    torch.testing.assert_close(kernel.transition(x, t, cond).endpoint, x - s * (x * s))
    found(kernel)


def test_a_class_guides():
    with seeded():
        unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
                           down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
                           num_class_embeds=3)  # fmt: skip
        stirred(unet)
    kernel = recipe("by_class")(unet, ["cat", "dog"], BARS, (1, 8, 8), T=4)
    x, t, cond = states(kernel, [1, 4], ["cat", "dog"])
    step = kernel.chain.timestep[t]
    with torch.no_grad():
        given, absent = (unet(x, step, torch.tensor(labels)).sample for labels in ([0, 1], [2, 2]))
    eps = absent + 3.0 * (given - absent)
    alpha, sigma = (table[t].float().reshape(2, 1, 1, 1) for table in (kernel.chain.alpha, kernel.chain.sigma))
    torch.testing.assert_close(alpha * kernel.transition(x, t, cond).endpoint, x - sigma * eps, atol=1e-5, rtol=1e-4)
    found(kernel, ["cat", "dog"])


def test_points_that_are_not_there_are_zero():
    kernel = recipe("points")(lambda x, t, mask: torch.tanh(x), BARS, 5, 4, T=6)
    result = found(kernel, ["2", "5"])
    for task, count in zip(result.tasks, (2, 5), strict=True):
        assert (task.samples[:, count:] == 0).all()
        assert (task.samples[:, :count] != 0).all()
        assert task.samples[..., :3].sum(1).abs().max() < 1e-4
    x, t, cond = states(kernel, [3, 3], ["2", "5"])
    other = x.clone()
    other[0, 2:] += 9.0
    one, two = (kernel.transition(v, t, cond).endpoint for v in (x, other))
    torch.testing.assert_close(one, two)


def test_two_times_in_one_state():
    with seeded():
        network = RFD4ProteinaTransformer(
            nlayers=1, token_dim=32, nheads=2, dim_cond=16, pair_repr_dim=16, latent_dim=4, t_emb_dim=16, seq_sep_dim=8,
            xt_pair_dist_dim=6, feats_seq=("xt_bb_ca", "xt_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_cond=(),
        )  # fmt: skip
        stirred(network)
    backbone, latents = torch.linspace(0, 1, 6) ** 2, torch.linspace(0, 1, 6)
    masks = {"is_in_context_conditioning": torch.zeros(3, dtype=torch.bool)}
    masks |= {"supports_local_latent": torch.ones(3, dtype=torch.bool)}
    kernel = recipe("protein")(network, backbone, latents, 3, **masks)
    x, t, cond = states(kernel, [5, 2])
    times = torch.stack([backbone[[0, 3]], latents[[0, 3]]])
    rows = {name: value.expand(2, 3) for name, value in masks.items()}
    with torch.no_grad():
        out = network(x[..., :3], x[..., 3:], *times, padding_mask=torch.ones(2, 3, dtype=torch.bool),
                      conditioning=rows, recycle_depth=1)  # fmt: skip
    left = (1 - times)[:, :, None, None]
    clean = torch.cat([x[..., :3] + left[0] * out.backbone, x[..., 3:] + left[1] * out.local_latents], -1)
    torch.testing.assert_close(kernel.transition(x, t, cond).endpoint, clean, atol=1e-5, rtol=1e-5)
    assert found(kernel).samples.shape[1:] == (3, 7)
