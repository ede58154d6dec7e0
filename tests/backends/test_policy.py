"""Diffusion policies: chunks told observations, and the same as a function of their noise."""

import pytest
import torch
from diffusers import DDIMScheduler

from treesearch.backends.chains.diffusion import CONDITION
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.backends.models.policy import PolicyCard, PolicyKernel, load_policy, policy, save_policy
from treesearch.policies.frozen import FrozenPolicy
from treesearch.testing import check_kernel

SEEN = torch.tensor([[0.0, -1.0, 0, 0, 0.02, -1.0, 0.5, 0], [0.9, 0.2, 0, 1, 0.9, 0.3, 0, 2]])
PROMPTS = [{"start": row} for row in SEEN.tolist()]


def test_it_is_a_kernel():
    check_kernel(policy(num_steps=3, eta=1.0), prompts=PROMPTS)


def test_its_chunks_are_those_of_diffusers_own_loop():
    network, card = load_policy("two_routes.safetensors")
    betas = 1 - torch.cat([cosine_alphas_cumprod()[:1], cosine_alphas_cumprod()[1:] / cosine_alphas_cumprod()[:-1]])
    scheduler = DDIMScheduler(
        trained_betas=betas.numpy(), prediction_type="sample", timestep_spacing="trailing", set_alpha_to_one=True,
        clip_sample=True, clip_sample_range=card.clip,
    )  # fmt: skip
    scheduler.set_timesteps(5)
    w = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    told = card.observations.encode(SEEN.unflatten(1, (2, 4))).flatten(1)
    x = w.reshape(2, 8, 2)
    for k in scheduler.timesteps:
        x = scheduler.step(network(x, k.expand(2), told), k, x).prev_sample
    found = FrozenPolicy(policy(num_steps=5)).actions(SEEN, w)
    torch.testing.assert_close(found, card.actions.decode(x), atol=1e-5, rtol=1e-5)


def test_what_it_observes_decides_what_it_does():
    kernel = policy()
    assert torch.equal(kernel.encode(PROMPTS)[CONDITION], kernel.seen(SEEN)[CONDITION])
    a, b = FrozenPolicy(kernel).actions(SEEN, torch.zeros(2, 16))
    assert (a - b).abs().max() > 0.5


@pytest.mark.parametrize(
    ("prompt", "words"), [({"goal": [1.0, 1.0]}, "8 numbers"), ({"start": [0.0] * 4}, "expected 8"), ({}, "8 numbers")]
)
def test_a_prompt_without_what_it_observes_is_refused(prompt, words):
    with pytest.raises(ValueError, match=words):
        policy().encode([prompt])


def test_a_policy_goes_through_its_file(tmp_path):
    plain = Normalisation((0.0,), (2.0,))
    card = PolicyCard(actions=plain, observations=plain, chunk=3, history=1, width=4)
    save_policy(card.build(), card, tmp_path / "mine.safetensors")
    kernel = policy(tmp_path / "mine.safetensors", num_steps=2)
    assert (kernel.state_shape, kernel.observed, kernel.channels.size) == ((3, 1), 1, 1)
    x = torch.randn(4, 3, 1)
    torch.testing.assert_close(kernel.encode_samples(kernel.decode(x)), x)
    other = policy(tmp_path / "mine.safetensors", num_steps=2, eta=1.0)
    assert kernel.fingerprint == policy(tmp_path / "mine.safetensors", num_steps=2).fingerprint != other.fingerprint


def test_a_damaged_file_is_named(tmp_path):
    plain = Normalisation((0.0,), (2.0,))
    card, file = (
        PolicyCard(actions=plain, observations=plain, chunk=3, history=1, width=4),
        tmp_path / "mine.safetensors",
    )
    save_policy(card.build(), card, file)
    whole = file.read_bytes()
    for part in (
        whole[: len(whole) // 2],
        whole[:20],
        b"",
        whole.replace(b"chunk", b"chank"),
        whole.replace(b"4,", b"5,"),
    ):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=r"mine\.safetensors is no diffusion policy, or a damaged one"):
            load_policy(file)


def test_normalisation_of_another_size_is_refused():
    kernel = policy()
    with pytest.raises(ValueError, match="expected \\(chunk, 1\\)"):
        PolicyKernel(kernel.kernel, kernel.told, Normalisation((0.0,), (1.0,)), 8)
    with pytest.raises(ValueError, match="no diffusion policy"):
        load_policy("maze_medium.safetensors")


def test_frozen_is_asked_row_by_row():
    seen, w = torch.randn(5, 8), torch.randn(5, 16)
    torch.testing.assert_close(
        FrozenPolicy(policy(), batch_size=2).states(seen, w), FrozenPolicy(policy()).states(seen, w)
    )


def test_frozen_is_without_noise_graph_or_change():
    with pytest.raises(ValueError, match="eta=0"):
        FrozenPolicy(policy(eta=1.0))
    frozen = FrozenPolicy(policy())
    before, w = frozen.weights, torch.randn(2, 16, requires_grad=True)
    made = frozen.states(SEEN.requires_grad_(), w)
    assert not made.requires_grad
    assert frozen.evaluations == 10
    assert frozen.weights == before
    frozen.kernel.network.layers[0].bias.data += 1
    assert frozen.weights != before
