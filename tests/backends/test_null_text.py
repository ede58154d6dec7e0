"""∅ by level and image: negative-prompt inversion, null-text inversion, and what guidance reads of them."""

import pytest
import torch

from tests.support import tiny
from tests.support.conditional import cond_of, conditional, draws, run, told
from treesearch.backends.base import Gaussian, fingerprint
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.inversion import invert
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.roots import Rooted
from treesearch.backends.roots.absent import Absent
from treesearch.backends.roots.negative_prompt import negative_prompt, unguided
from treesearch.backends.roots.null_text import null_text
from treesearch.testing import check_kernel

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
PROMPTS = ["left", "right", "left"]
X0 = draws(PROMPTS)
KERNEL = conditional(steps=6)
COND = cond_of(KERNEL, PROMPTS)
PATH = invert(KERNEL, X0, cond=unguided(KERNEL, COND))


def rms(x, y):
    return float((x - y).square().mean().sqrt())


# Guidance


def test_guidance_is_that_of_the_formula():
    """w = 1 tells the model c alone, and another w calls it on ∅ and c."""
    plain, t = conditional(steps=6, scale=1.0), torch.tensor([6, 3, 1])
    absent = {"condition": told(["", "", ""])}
    at = {name: getattr(plain.chain, name)[t][:, None].float() for name in ("alpha", "sigma")}
    eps = [(X0 - at["alpha"] * plain.transition(X0, t, c).endpoint) / at["sigma"] for c in (absent, COND)]
    mixed = eps[0] + 7.5 * (eps[1] - eps[0])
    law = KERNEL.transition(X0, t, COND)
    assert (law.endpoint - (X0 - at["sigma"] * mixed) / at["alpha"]).abs().max() < 1e-4
    assert (plain.rows_per_nfe, KERNEL.rows_per_nfe) == (1, 2)
    assert set(plain.encode(["left"])) == {"condition"}
    assert len({plain.fingerprint, KERNEL.fingerprint, conditional(steps=6, negative_prompt="left").fingerprint}) == 3


@pytest.mark.parametrize("scale", [float("nan"), -1.0, True, "7.5"])
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="guidance_scale is"):
        conditional(scale=scale)


def test_guidance_needs_a_condition():
    with pytest.raises(ValueError, match="a `condition` to guide by"):
        DiffusionKernel(lambda x, t: x, state_shape=(2,), schedule=KERNEL.chain.schedule, guidance_scale=2.0)


def test_a_guided_kernel_keeps_the_laws():
    check_kernel(conditional(steps=4, eta=1.0), ["left", "right"])


# ∅ where guidance reads it


def test_each_row_has_the_absent_of_its_level_and_image():
    table = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(1))
    t, task = torch.tensor([6, 2, 2, 1]), torch.tensor([2, 0, 1, 1])
    put = Absent(KERNEL, {"condition": table}).put(t, {"negative_condition": told([""]), "task": task})
    assert torch.equal(put["negative_condition"], table[[5, 1, 1, 0], [2, 0, 1, 1]])
    same = Absent(KERNEL, {"condition": table[:1, :1]}).put(t, {"negative_condition": told([""]), "task": task})
    assert torch.equal(same["negative_condition"], table[0, :1].expand(4, 3))


def test_an_absent_that_is_the_kernel_s_own_changes_no_bit():
    own = Absent(KERNEL, {"condition": told([""])[None]})
    t = torch.tensor([6, 4, 1])
    assert torch.equal(own.transition(X0, t, COND).mean, KERNEL.transition(X0, t, COND).mean)


def test_the_wrapper_keeps_the_laws():
    kernel = conditional(steps=4, eta=1.0)
    check_kernel(Absent(kernel, {"condition": torch.zeros(4, 2, 3)}), ["left", "right"])
    assert Absent(kernel, {"condition": torch.zeros(4, 2, 3)}).base_law == "classes under an ∅ of its own"


def test_under_the_picture_s_own_prompt_guidance_does_nothing():
    plain, kernel = conditional(steps=6, scale=1.0), negative_prompt(KERNEL, COND)
    t = torch.tensor([6, 4, 1])
    assert torch.equal(kernel.transition(X0, t, COND).mean, plain.transition(X0, t, COND).mean)
    assert torch.equal(PATH, invert(plain, X0, cond=COND))
    other = cond_of(KERNEL, ["right", "left", "right"])
    assert not torch.equal(kernel.transition(X0, t, other).mean, plain.transition(X0, t, other).mean)


# What is learnt


def by_the_book(kernel, path, cond, tolerance, steps=10):
    """One image, with torch's own Adam, as published."""
    z, null, found = path[-1], told([""]).clone(), []
    for i, t in enumerate(range(kernel.num_steps, 0, -1)):
        null, at, share = null.clone().requires_grad_(), torch.tensor([t]), i / kernel.num_steps
        adam = torch.optim.Adam([null], lr=1e-2 * (1 - share / 2))
        for _ in range(steps):
            mean = kernel.transition(z.detach().requires_grad_(), at, cond | {"negative_condition": null}).mean
            loss = torch.nn.functional.mse_loss(mean, path[t - 1])
            adam.zero_grad()
            (grad,) = torch.autograd.grad(loss, null)
            null.grad = grad
            adam.step()
            if loss < tolerance * (1 + 100 * share):
                break
        null = null.detach()
        z = kernel.transition(z, at, cond | {"negative_condition": null}).mean
        found.insert(0, null)
    return torch.stack(found), z


def test_it_is_the_published_optimisation_row_by_row():
    """Images of a batch are learnt together, and stop each by its own loss."""
    kernel = conditional(steps=8, scale=1.3)
    cond = cond_of(kernel, PROMPTS)
    path = invert(kernel, X0, cond=unguided(kernel, cond))
    found = null_text(kernel, path, cond=cond, tolerance=3e-3)
    assert len(set(found.evaluations.tolist())) > 1
    for i, prompt in enumerate(PROMPTS):
        null, x0 = by_the_book(kernel, path[:, i : i + 1], cond_of(kernel, [prompt]), 3e-3)
        torch.testing.assert_close(found.kernel.table["condition"][:, i], null[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.path[0, i : i + 1], x0, atol=1e-4, rtol=1e-4)
        alone = null_text(kernel, path[:, i : i + 1], cond=cond_of(kernel, [prompt]), tolerance=3e-3)
        assert int(alone.evaluations) == int(found.evaluations[i])


def test_order_of_what_is_missed():
    """DDIM at w = 7.5 ≫ negative prompt >= null text, as measured on Gaussian classes at T = 50; ratios, not values."""
    kernel = conditional()
    cond = cond_of(kernel, PROMPTS)
    path = invert(kernel, X0, cond=unguided(kernel, cond))
    learnt = null_text(kernel, path, cond=cond)
    ddim, npi = (rms(run(k, path[-1], cond), X0) for k in (kernel, negative_prompt(kernel, cond)))
    null = rms(run(learnt.kernel, path[-1], cond), X0)
    assert null <= npi
    assert npi < 0.2 * ddim
    assert null < 0.1 * ddim
    assert learnt.evaluations.max() <= 50 * 11


def test_the_learnt_chain_comes_by_to_the_bit():
    """From the last pivot, as a root; weights, ∅ and prompts are as they were."""
    before = fingerprint.of([KERNEL.model, COND])
    found = null_text(KERNEL, PATH, cond=COND)
    assert fingerprint.of([KERNEL.model, COND]) == before
    rooted = Rooted(found.kernel, PATH)
    x = rooted.prior(torch.zeros(3, 2), COND | {"pictures": torch.tensor(3)})
    for t in range(6, 0, -1):
        assert torch.equal(x, found.path[t])
        x = rooted.transition(x, torch.full((3,), t), COND).mean
    assert torch.equal(x, found.path[0])


def test_it_begins_where_the_chain_will():
    found = null_text(KERNEL, PATH, cond=COND, level=4)
    assert torch.equal(found.path[4:], PATH[4:])
    assert torch.equal(found.kernel.table["condition"][4:], told([""]).expand(2, 3, 3))
    assert not torch.equal(found.path[3], PATH[3])
    x = PATH[4]
    for t in range(4, 0, -1):
        x = found.kernel.transition(x, torch.full((3,), t), COND).mean
    assert torch.equal(x, found.path[0])


def test_its_path_is_that_without_noise_whatever_eta():
    noisy = conditional(steps=6, eta=1.0)
    learnt = null_text(noisy, PATH, cond=COND)
    torch.testing.assert_close(learnt.path, null_text(KERNEL, PATH, cond=COND).path, atol=1e-3, rtol=1e-3)


WRONG = {
    "no ∅": (lambda: null_text(conditional(6, 1.0), PATH, cond={"condition": told(PROMPTS)}), "not told of any ∅"),
    "no prompts": (lambda: negative_prompt(KERNEL, None), "not told of any ∅"),
    "path": (
        lambda: null_text(KERNEL, PATH[:-1], cond=COND),
        r"path has shape \(6, 3, 2\), expected finite states \(7",
    ),
    "NaN": (lambda: null_text(KERNEL, PATH * torch.nan, cond=COND), "expected finite states"),
    "level": (lambda: null_text(KERNEL, PATH, cond=COND, level=7), r"level is 7, expected 1..T = 6"),
    "steps": (lambda: null_text(KERNEL, PATH, cond=COND, steps=True), "steps is True"),
    "lr": (lambda: null_text(KERNEL, PATH, cond=COND, lr=float("nan")), "lr is nan"),
    "tolerance": (lambda: null_text(KERNEL, PATH, cond=COND, tolerance="small"), "tolerance is 'small'"),
    "rows": (lambda: null_text(KERNEL, PATH[:, :2], cond=COND), "has 3 rows for 2 images"),
    "levels": (lambda: Absent(KERNEL, {"condition": torch.zeros(5, 1, 3)}), r"expected \(1 or T = 6, m\)"),
    "empty": (lambda: Absent(KERNEL, {}), "tables of ∅ have"),
    "images": (lambda: Absent(KERNEL, {"a": torch.zeros(6, 1), "b": torch.zeros(6, 2)}), "tables of ∅ have"),
    "name": (lambda: Absent(KERNEL, {"text": torch.zeros(6, 1, 3)}).put(X0[:, 0].long(), COND), "∅ for text, guidance"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_loss_that_is_not_finite_is_said():
    with pytest.raises(ArithmeticError, match="the loss of ∅ at level 6 is not finite"):
        null_text(KERNEL, PATH, cond=COND | {"condition": COND["condition"] * torch.nan})


# Pipelines


def opened(name, root, **more):
    kernel = DiffusersKernel.from_pretrained(
        str(tiny.checkpoint(name, root)), num_steps=2, device="cpu", eta=0.0, guidance_scale=3.0, **more
    )
    return kernel, cond_of(kernel, ["a cat", "a dog"] if name != "dit" else ["0", "1"])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_pipelines_learn_theirs(name, tiny_root):
    more = {"components": {"text_encoder_3": None, "tokenizer_3": None}} if name == "sd3" else {}
    kernel, cond = opened(name, tiny_root, **more)
    x0 = 0.5 * torch.randn(2, *kernel.state_shape, generator=torch.Generator().manual_seed(0))
    path = invert(kernel, x0, cond=unguided(kernel, cond))
    before = fingerprint.of([kernel.family.network, cond])
    found = null_text(kernel, path, cond=cond, steps=2)
    assert fingerprint.of([kernel.family.network, cond]) == before
    assert set(found.kernel.table) == {n.removeprefix("negative_") for n in cond if n.startswith("negative_")}
    step = lambda k: (k.transition(path[2], torch.tensor([2, 2]), cond).mean - path[1]).square().flatten(1).mean(1)  # noqa: E731
    assert (step(found.kernel) < step(kernel)).all()
    alone = {n: v[:1] if isinstance(v, torch.Tensor) else v for n, v in cond.items()}
    one = negative_prompt(kernel, cond).transition(path[2][:1], torch.tensor([2]), alone)
    assert isinstance(one, Gaussian)
    assert (
        one.mean - kernel.transition(path[2][:1], torch.tensor([2]), unguided(kernel, alone)).mean
    ).abs().max() < 1e-4


def test_labels_are_put_and_not_learnt(tiny_root):
    kernel, cond = opened("dit", tiny_root)
    x0 = torch.zeros(2, *kernel.state_shape)
    path = invert(kernel, x0, cond=unguided(kernel, cond))
    assert (
        run(negative_prompt(kernel, cond), path[-1], cond) - run(kernel, path[-1], unguided(kernel, cond))
    ).abs().max() < 1e-4
    with pytest.raises(TypeError, match="is a label, which cannot be learnt: use negative_prompt"):
        null_text(kernel, path, cond=cond)


def test_guidance_that_is_embedded_has_no_absent(tiny_root):
    kernel, cond = opened("flux", tiny_root, height=16, width=16)
    with pytest.raises(ValueError, match="DiffusersKernel is not told of any ∅"):
        negative_prompt(kernel, cond)
