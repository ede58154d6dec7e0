"""What a search costs beside a diffusers pipeline's own loop, and its memory against the plan: `make bench-pipelines`.

    1  best-of-N over the pipeline's `__call__` at equal batch, steps and images, decoding included (CPU)
    2  8 prompts x FK with 4 particles in shared batches of 32 over prompt by prompt in batches of 4 (CPU)
    m  peak memory of Stable Diffusion's decoder, full size, against the plan (CPU, resident set of a process)
    g  full-size architectures in bfloat16, of Wan a video: NFE/s of both at the best batch size of each, peak memory
       against the plan, share of reward and decoding in the time: python -m experiments.bench.pipelines --gpu; without
       a GPU the rows say that they were not run

Weights are random: speed and memory do not depend on them. Both sides get the conditioning ready-made and score their
images. Ratios are of two things timed in turn within this process, medians of the rounds. `--tiny` runs every part on
models of a few thousand weights, wherever it is, to see that the script works.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import tyro
from torch import Tensor, nn

import treesearch as ts
from experiments.bench.architectures import autoencoder, kernel_of
from experiments.bench.overhead import show
from treesearch.backends.base import Shared
from treesearch.backends.base.live import peak
from treesearch.backends.pipelines import DiffusersKernel, meta, vae
from treesearch.rewards.base import Reward, as_reward

ARCHITECTURES = ("sd", "sdxl", "sd3", "flux")
FULL = (*ARCHITECTURES, "qwen_image", "wan")
NOT_RUN = {"not_run": "no GPU"}
PROMPTS = [f"a {colour} cube" for colour in ("red", "blue", "green", "white", "black", "pink", "grey", "gold")]
TARGET = 0.95


@dataclass(frozen=True)
class Args:
    """Arguments."""

    parts: str = "12m"
    """which parts to run; --gpu runs g alone"""
    gpu: bool = False
    """the full-size part, on the GPU if there is one"""
    tiny: bool = False
    """every part on tiny models"""
    models: tuple[str, ...] = ()
    """architectures to run: sd, sdxl, sd3, flux and, with --gpu, qwen_image, wan; empty for all"""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """of part g"""
    num_steps: int = 20
    """steps of a sample"""
    rounds: int = 5
    """timed rounds of each ratio, after one that warms up"""
    out: Path = Path("runs/results/bench_pipelines.json")
    """figures as JSON"""


# The two sides


def sync() -> float:
    """The clock, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def stock(kernel: DiffusersKernel, reward: Reward, batch: int, batches: int) -> int:
    """Samples by the pipeline's own `__call__`; returns the NFE."""
    if not hasattr(kernel.pipe, "vae_scale_factor") or type(kernel.pipe).__name__ == "QwenImagePipeline":
        return _told(kernel, reward, batch, batches)
    encoded = {k: v.value if isinstance(v, Shared) else v for k, v in kernel.encode(PROMPTS[:1]).items()}
    text = {
        name.replace("pooled_embeds", "pooled_prompt_embeds"): value.expand(batch, *value.shape[1:])
        for name, value in encoded.items()
        if name != "text_ids"
    }
    height, width = _pixels(kernel)
    more = {"eta": 1.0} if type(kernel.pipe).__name__ == "StableDiffusionPipeline" else {}
    for _ in range(batches):
        images = kernel.pipe(
            **text, height=height, width=width, num_inference_steps=kernel.num_steps, output_type="pt", **more
        ).images
        reward(images.float(), PROMPTS[:1] * batch)
    return batch * batches * kernel.num_steps


def _told(kernel: DiffusersKernel, reward: Reward, batch: int, batches: int) -> int:
    """The same of a pipeline that is given prompts: its text encoder, a small one, runs."""
    settings, prompts = kernel.family.settings, PROMPTS[:1] * batch
    given = {name: getattr(settings, name) for name in ("height", "width", "num_frames")}
    given = {name: value for name, value in given.items() if value is not None}
    for _ in range(batches):
        made = kernel.pipe(prompt=prompts, negative_prompt=[""] * batch, num_inference_steps=kernel.num_steps,
                           output_type="pt", return_dict=False, **given)[0]  # fmt: skip
        reward(made.float(), prompts)
    return batch * batches * kernel.num_steps


def _pixels(kernel: DiffusersKernel) -> tuple[int, int]:
    latents = kernel.family.unpack(torch.empty(1, *kernel.state_shape, device="meta"))
    factor = kernel.pipe.vae_scale_factor
    return latents.shape[-2] * factor, latents.shape[-1] * factor


def best_of_n(kernel: DiffusersKernel, reward: Reward, batch: int, batches: int) -> int:
    """As many samples by best-of-N; returns the NFE."""
    budget = ts.Budget(nfe=batch * batches * kernel.num_steps)
    return ts.search(kernel, reward, ts.BestOfN(), prompts=PROMPTS[:1], budget=budget, batch_size=batch).cost.nfe


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """NFE per second of the clock, and of this process's time, which others on the machine move less."""
    wall, own = sync(), time.process_time()
    nfe = work()
    return nfe / (sync() - wall), nfe / (time.process_time() - own)


def ratio(rounds: int, base: Callable[[], int], other: Callable[[], int], names: tuple[str, str]) -> dict[str, Any]:
    """Medians of interleaved rounds; which side goes first alternates."""
    found: list[dict[str, tuple[float, float]]] = []
    for round_ in range(rounds + 1):
        sides = list(zip(names, (base, other), strict=True))
        found.append({name: timed(work) for name, work in (sides if round_ % 2 else sides[::-1])})
    found = found[1:]
    speeds = {f"{name}_nfe_per_s": statistics.median(each[name][0] for each in found) for name in names}
    wall, own = ([each[names[1]][k] / each[names[0]][k] for each in found] for k in (0, 1))
    spread = {"lowest": min(wall), "highest": max(wall), "ratio_of_process_time": statistics.median(own)}
    return speeds | {"ratio": statistics.median(wall)} | spread


def mean_of_images() -> Reward:
    """A reward that costs nothing."""
    return as_reward(lambda images, prompts=None: images.flatten(1).mean(1), name="mean")


def small(args: Args, name: str) -> DiffusersKernel:
    """A kernel for parts 1 and 2."""
    size = "tiny" if args.tiny else "medium"
    return kernel_of(name, size, args.num_steps, torch.device("cpu"), torch.float32)


def part_1(args: Args) -> dict[str, Any]:
    """Overhead over the pipeline's own loop at batch 8."""
    out, reward = {}, mean_of_images()
    for name in args.models or ARCHITECTURES:
        kernel = small(args, name)
        found = ratio(
            args.rounds,
            lambda kernel=kernel: stock(kernel, reward, 8, 2),
            lambda kernel=kernel: best_of_n(kernel, reward, 8, 2),
            ("pipeline", "search"),
        )
        out[name] = {"ms_per_step": 8e3 / found["pipeline_nfe_per_s"]} | found | {"target": TARGET}
    return out


def part_2(args: Args) -> dict[str, Any]:
    """Shared batches over prompt by prompt."""
    out, reward, method = {}, mean_of_images(), ts.FeynmanKac(num_particles=4)
    for name in args.models or ARCHITECTURES:
        kernel = small(args, name)

        def run(prompts: list[str], batch: int, kernel: DiffusersKernel = kernel) -> int:
            budget = ts.Budget(nfe=len(prompts) * 4 * kernel.num_steps)
            return ts.search(kernel, reward, method, prompts=prompts, budget=budget, batch_size=batch).cost.nfe

        out[name] = ratio(
            max(1, args.rounds // 2),
            lambda run=run: sum(run([prompt], 4) for prompt in PROMPTS),
            lambda run=run: run(PROMPTS, 32),
            ("prompt_by_prompt", "shared"),
        )
    return out


# Memory


RESIDENT = """
import re, sys, torch
from experiments.bench import architectures as b
from treesearch.backends.pipelines import vae
torch.set_num_threads(1)
model, side = b.autoencoder("sd", sys.argv[1]).eval().requires_grad_(False), int(sys.argv[2])
read = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
vae.decode(model, torch.zeros(1, 4, 8, 8), 1)
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
vae.decode(model, torch.zeros(1, 4, side, side), 1)
print(read("VmHWM") - before)
"""


def part_m(args: Args) -> dict[str, Any]:
    """High-water mark of a process that decodes one image, above what it had before, against the plan (Linux)."""
    size = "tiny" if args.tiny else "full"
    model = autoencoder("sd", size).eval().requires_grad_(False)
    out: dict[str, Any] = {"weights_mb": sum(p.nbytes for p in model.parameters()) / 2**20}
    for side in (32, 64):
        latents = torch.zeros(1, 4, side, side, device="meta")
        shadow = meta.shadow(model)
        plan = peak(lambda latents=latents, shadow=shadow: vae.decode(shadow, latents, 1))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        job = [sys.executable, "-c", RESIDENT, size, str(side)]
        printed = subprocess.run(job, capture_output=True, text=True, env=environment, check=True).stdout
        measured = int(printed.split()[-1])
        out[f"latents_{side}"] = {
            "plan_mb": plan / 2**20,
            "measured_mb": measured / 2**20,
            "measured_over_plan": measured / plan,
        }
    return out


# Full size


def part_g(args: Args) -> dict[str, Any]:
    """Speed at the best batch size of each side, memory, and where the time goes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    for name in args.models or FULL:
        if device.type == "cpu" and not args.tiny:
            out[name] = NOT_RUN
            continue
        size, dtype = ("tiny", torch.float32) if args.tiny else ("full", torch.bfloat16)
        kernel = kernel_of(name, size, args.num_steps, device, dtype)
        sizes = {n: found for n in args.batch_sizes if (found := at_batch(kernel, n, args.rounds))}
        best = {
            side: max(sizes, key=lambda n: sizes[n].get(f"{side}_nfe_per_s") or 0) for side in ("pipeline", "search")
        }
        speeds = {side: sizes[n][f"{side}_nfe_per_s"] for side, n in best.items()}
        out[name] = {
            "network_parameters": sum(p.numel() for p in kernel.family.network.parameters()),
            "best_batch": best,
            "nfe_per_s": speeds,
            "ratio": speeds["search"] / speeds["pipeline"],
            "shares": shares(kernel, vision_reward(device, dtype, args.tiny), best["search"]),
            "by_batch": {str(n): found for n, found in sizes.items()},
        }
        del kernel
        release()
    return out


def at_batch(kernel: DiffusersKernel, batch: int, rounds: int) -> dict[str, Any]:
    """Speeds and peak memory at one batch size; sides that run out of memory are left out."""
    reward, found, times = mean_of_images(), {}, {"pipeline": stock, "search": best_of_n}
    speeds: dict[str, list[float]] = {side: [] for side in times}
    for round_ in range(rounds + 1):
        for side, run in times.items():
            with out_of_memory_is_an_answer():
                release()
                speed, _ = timed(lambda run=run: run(kernel, reward, batch, 1))
                found[f"{side}_peak_mb"] = _peak_bytes() / 2**20
                speeds[side] += [speed] if round_ else []
    found |= {f"{side}_nfe_per_s": statistics.median(values) for side, values in speeds.items() if values}
    plan = kernel.memory_plan(batch, prompts=PROMPTS[:1]).total
    found["plan_mb"] = plan / 2**20
    if found.get("search_peak_mb"):
        found["search_peak_over_plan"] = found["search_peak_mb"] / found["plan_mb"]
    return found


@contextmanager
def out_of_memory_is_an_answer() -> Iterator[None]:
    """A batch that does not fit has no figure."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)


def release() -> None:
    """Give memory back and begin a new high-water mark."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def vision_reward(device: torch.device, dtype: torch.dtype, small: bool) -> Reward:
    """A ViT-L/14 on 224 pixels, the size of what CLIP rewards run."""
    shape = (16, 1, 2, 32) if small else (1024, 24, 16, 4096)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = transformers.CLIPVisionConfig(image_size=224, patch_size=14, **dict(zip(names, shape, strict=True)))
    model = transformers.CLIPVisionModel(config).eval().requires_grad_(False).to(device, dtype)

    def score(images: Tensor, prompts: Any = None) -> Tensor:
        images = images[:, 0] if images.ndim == 5 else images  # the first frame of a video
        pixels = nn.functional.interpolate(images.to(device), (224, 224), mode="bilinear", antialias=True)
        return model(pixel_values=pixels.to(dtype)).pooler_output.float().mean(1)

    return as_reward(score, name="vit_l")


def shares(kernel: DiffusersKernel, reward: Reward, batch: int) -> dict[str, float]:
    """Shares of decoding and of a ViT-L reward in the time of a search that waits for the device at each."""
    spent = {"decode": 0.0, "reward": 0.0}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = sync()
            found = function(*given)
            spent[name] += sync() - began
            return found

        return call

    watched = copy.copy(kernel)
    watched.decode = watch("decode", kernel.decode)
    score = watch("reward", reward)
    scored = as_reward(lambda images, prompts=None: score(images, prompts), name="vit_l")
    best_of_n(kernel, reward, batch, 1)  # warms up
    began = sync()
    best_of_n(watched, scored, batch, 2)
    whole = sync() - began
    return {name: seconds / whole for name, seconds in spent.items()}


def main() -> None:
    """Run the parts and write the figures."""
    args = tyro.cli(Args)
    parts = {"1": part_1, "2": part_2, "m": part_m, "g": part_g}
    found = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    found |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    for name in "g" if args.gpu else args.parts:
        figures = {
            "command": " ".join(["python -m experiments.bench.pipelines", *sys.argv[1:]]),
            "threads": torch.get_num_threads(),
            "rounds": args.rounds,
        }
        found[name] = figures | parts[name](args)
        print(f"part {name}")
        show(found[name], "  ")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
