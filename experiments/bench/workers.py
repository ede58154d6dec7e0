"""What Ray workers lose: `make bench-ray`.

    a      a kernel that sleeps as a GPU would, 20 ms a step: efficiency of best-of-N, FK and DTS (async) on 1-8 workers
    model  16, 32 and 128 workers: a discrete-event model fed with the driver's cost as measured in part a
    b      the MNIST model: two single-thread workers over one process with two threads
    gpu    two actors that share a GPU over one that has it; rewards beside the model over rewards after it

Efficiency is ideal time / measured time of a whole `ts.search`, its first and last bundles included, on a pool that
has run the kernel before. The ideal is NFE / (W · B / t(B)), t(B) = a + b·B: W devices that never wait. Beside it
stands the ratio to the efficiency of one process without workers, timed in the same round: that one pays for the same
host work between passes, so the ratio is what is lost by the distribution alone.

Sizes: T = 50 and five branching levels, so segments of 10 to 50 steps; B = 8 rows a pass, eight full batches of whole
rollouts (8 s) a worker. FK: populations of 8·W·B, so that a level takes a worker eight batches, 1.6 s, and ends in a
barrier. DTS: 4·W·B iterations in flight, that is two bundles of two batches a worker: rows of a bundle end one after
another, and the next bundle fills the room they leave.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray gives its workers a niceness of 15, which a GPU would not notice and a sleeping thread on a shared core does.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

import treesearch as ts
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.distributed.lending import Lender
from treesearch.distributed.pool import AHEAD
from treesearch.distributed.sharing import BUNDLE_SECONDS, share_out
from treesearch.methods.base import spaced_levels
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.images.classifier import even

MACHINE = "2 shared CPU cores"
BATCH = 8
STEPS = 50
SIZES = (16, 256)  # KB of a state
TARGETS = {4: 0.95, 8: 0.90}
METHODS = ("best_of_n", "fk", "dts_async")
NOISE = 16
FK_BATCHES = 8  # full batches of a worker in a population
IN_FLIGHT = 4  # full batches in flight a worker, asynchronous DTS


@dataclass(frozen=True)
class Args:
    """Arguments."""

    quick: bool = False
    """one round, 4 and 8 workers, half the work: minutes"""
    only: str = "a,model,b,gpu"
    """parts to run, separated by commas; the model takes its costs from part a, of this run or of the results file"""
    rounds: int = 3
    """timed rounds; every case is run once in each"""
    out: Path = Path("runs/results/bench_ray.json")
    """figures as JSON; a table goes beside it as .md"""


# ------------------------------------------------------------------------------------------------- the sleeping kernel


@dataclass(frozen=True)
class Nudged:
    """x_{t-1} = x_t with noise added to its first entries: a law that costs the host next to nothing."""

    mean: Tensor

    @property
    def endpoint(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        self.mean[:, :NOISE] += 0.1 * noise  # in place: a copy of every state would be host work no GPU asks for
        return self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x))

    def log_weight(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x))

    def take(self, rows: Tensor) -> Nudged:
        return Nudged(self.mean[rows])


@dataclass(frozen=True)
class Sleeper:
    """A device on which a pass of n rows takes a + b·n seconds; the host sleeps meanwhile.

    Args:
        kilobytes: of a state.
        a, b: 20 ms at 8 rows, nine tenths of it whatever the batch.
    """

    kilobytes: int
    a: float = 0.018
    b: float = 0.002 / BATCH
    num_steps: int = STEPS
    noise_shape = (NOISE,)
    fingerprint = "sleeper"

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.kilobytes * 256,)

    def seconds(self, rows: int) -> float:
        """t(rows)."""
        return self.a + self.b * rows

    def prior(self, noise: Tensor, cond: Any = None) -> Tensor:
        x = torch.zeros((len(noise), *self.state_shape))
        x[:, :NOISE] = noise
        return x

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Nudged:
        time.sleep(self.seconds(len(x)))
        return Nudged(x)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def first_entry(x: Tensor) -> Tensor:
    """A reward that costs nothing and differs between samples."""
    return x[:, 0]


def method_of(name: str, workers: int, batches: int) -> tuple[Any, ts.Budget]:
    """A method sized for so many workers, and the budget of `batches` full batches of rollouts for each."""
    rows = workers * BATCH
    made = {
        "best_of_n": ts.BestOfN(),
        "fk": ts.FeynmanKac(num_particles=min(FK_BATCHES, batches) * rows),
        "dts_async": ts.DiffusionTreeSampling(mode="async", wave=IN_FLIGHT * rows),
    }[name]
    return made, ts.Budget(nfe=batches * rows * STEPS)


# ---------------------------------------------------------------------------------------------------------- part a


class Meter:
    """The driver's side of a search: its CPU seconds, and what it handled for them."""

    def __init__(self) -> None:
        self.bundles = self.rows = 0
        lender: Any = Lender
        lend = lender._lend

        def counted(lender: Any, actor: Any, parts: Any, failures: int) -> None:
            self.bundles += 1
            self.rows += sum(len(rows) for _, rows in parts)
            lend(lender, actor, parts, failures)

        lender._lend = counted

    @contextmanager
    def reading(self) -> Iterator[dict[str, float]]:
        """Fills the dictionary with what happens inside."""
        found: dict[str, float] = {}
        before = (time.thread_time(), time.process_time(), self.bundles, self.rows)
        yield found
        after = (time.thread_time(), time.process_time(), self.bundles, self.rows)
        names = ("driver_thread_s", "driver_process_s", "bundles", "rows")
        found |= {name: b - a for name, a, b in zip(names, before, after, strict=True)}


def part_a(args: Args) -> dict[str, Any]:
    """Efficiency of the sleeping kernel."""
    counts = (4, 8) if args.quick else (1, 2, 4, 8)
    batches, rounds = (4, 1) if args.quick else (8, args.rounds)
    meter, reward = Meter(), as_reward(first_entry, name="first entry")
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        # Workers that ask for no CPU of Ray's fit beside one another, so that rounds can interleave pools of all sizes.
        pools = {w: stack.enter_context(ts.RayWorkers(w, cpus_per_worker=0)) for w in sorted(counts, reverse=True)}
        kernels: list[Any] = [Sleeper(size) for size in SIZES]
        for kernel in kernels:
            for w, pool in pools.items():
                ts.search(kernel, reward, ts.BestOfN(n=4 * w * BATCH), batch_size=BATCH, workers=pool)
            for _ in range(rounds):
                for name in METHODS:
                    alone = one_search(kernel, reward, name, 1, 2, None, meter)
                    for w, pool in pools.items():
                        got = one_search(kernel, reward, name, w, batches, pool, meter)
                        got["over_one_process"] = got["efficiency"] / alone["efficiency"]
                        got["one_process"] = alone["efficiency"]
                        found.setdefault(f"{kernel.kilobytes}KB {name} {w}", []).append(got)
                        print(f"  {kernel.kilobytes}KB {name:<10} {w} {got['efficiency']:.3f}", flush=True)
        rtt = round_trip()
    cases = {case: summary(runs) for case, runs in found.items()}
    for case, figures in cases.items():
        figures["target"] = TARGETS.get(int(case.split()[-1]))
    every = [run for runs in found.values() for run in runs]
    return {
        "batches_a_worker": batches,
        "rounds": rounds,
        "cases": cases,
        "driver": driver_cost(every),
        "round_trip_s": rtt,
    }


def one_search(
    kernel: Any, reward: Reward, name: str, workers: int, batches: int, pool: Any, meter: Meter
) -> dict[str, float]:
    """Run a search; where its time went."""
    method, budget = method_of(name, workers, batches)
    with meter.reading() as out:
        began = time.perf_counter()
        result = ts.search(kernel, reward, method, budget=budget, batch_size=BATCH, workers=pool)
        wall = time.perf_counter() - began
    nfe, step = result.cost.nfe, kernel.seconds(BATCH)
    out |= {"efficiency": nfe / BATCH * step / workers / wall, "wall_s": wall, "nfe": nfe}
    out |= {"repeated_nfe": result.cost.repeated_nfe}
    if pool is not None:
        seen = result.diagnostics["workers"]
        # Of W·wall: time in passes, of them the room that had rows, of these what a pass should have taken.
        evaluated = sum(each["nfe"] for each in seen["by_worker"].values())
        passes = evaluated / max(1e-9, seen["fill"]) / BATCH
        out |= {"busy": seen["busy"], "fill": seen["fill"], "pass_ms": 1e3 * seen["busy"] * wall * workers / passes}
        out |= {"mb": seen["mb_in"] + seen["mb_out"], "stolen_rows": seen["stolen_rows"]}
    if name == "dts_async":
        out |= {f"steps_{t}": share for t, share in starts(result.tree).items()}
    return out


def starts(tree: Any) -> dict[int, float]:
    """Share of rollouts by their evaluations: one from level t makes a node of every level below, at t evaluations."""
    levels, counts = np.unique(np.asarray(tree.t)[1:], return_counts=True)
    levels, made = levels[::-1], counts[::-1] / counts[0]
    out = {STEPS: float(made[0])}  # those from the root
    for level, share in zip(levels, np.diff(made), strict=False):
        out[int(level)] = out.get(int(level), 0.0) + float(share)
    return out


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians; the range of the efficiency."""
    out: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return out | {"range": [min(r["efficiency"] for r in runs), max(r["efficiency"] for r in runs)]}


def driver_cost(runs: list[dict[str, float]]) -> dict[str, float]:
    """CPU seconds of the driver's thread: least squares on bundles, rows and MB over all searches, none negative."""
    names = ["bundles", "rows", "mb"]
    x = np.array([[run[name] for name in names] for run in runs])
    y = np.array([run["driver_thread_s"] for run in runs])
    keep = list(range(len(names)))
    while True:
        fit = np.linalg.lstsq(x[:, keep], y, rcond=None)[0]
        if (fit >= 0).all():
            break
        keep.pop(int(fit.argmin()))
    cost = dict.fromkeys(names, 0.0) | {names[i]: float(c) for i, c in zip(keep, fit, strict=True)}
    left = y - x[:, keep] @ fit
    return {f"s_per_{name.rstrip('s')}": cost[name] for name in names} | {
        "explained": float(1 - left.var() / y.var()),
        "process_over_thread": sum(r["driver_process_s"] for r in runs) / sum(y),
    }


def round_trip() -> float:
    """Median seconds of an empty call of an actor."""
    import ray

    class Echo:
        def call(self) -> None:
            """Nothing."""

    echo: Any = ray.remote(num_cpus=0)(Echo).remote()
    times = []
    for _ in range(100):
        began = time.perf_counter()
        ray.get(echo.call.remote())
        times.append(time.perf_counter() - began)
        time.sleep(0.01)
    ray.kill(echo)
    return statistics.median(times)


# ------------------------------------------------------------------------------------------------------------- model


@dataclass(eq=False)
class Packet:
    """A bundle of the model."""

    left: NDArray[np.int64]  # evaluations left of each row
    wave: int
    evaluations: int


@dataclass(eq=False)
class Device:
    """A worker of the model: bundles that came, in order, and whether a pass is under way."""

    bundles: deque[Packet] = field(default_factory=deque)
    lent: int = 0
    owes: float = 0.0  # evaluations lent and not returned
    passing: bool = False


@dataclass(frozen=True)
class Costs:
    """What the model is fed with, in seconds."""

    bundle: float
    row: float
    mb: float
    latency: float  # of a message between driver and worker
    overhead: float  # host work of a pass beside the sleep


class Model:
    """Discrete events: a driver that serves one thing at a time, W workers that make passes of up to B rows.

    The driver deals rows as a search's `Lender` does, with the same function; half of a bundle's cost falls due when
    it is lent, half when it returns. Workers hold two bundles and fill a pass from the older one first, as `Station`.

    Args:
        workers: W.
        step: seconds of a pass of B rows.
        costs: measured.
        mb_row: MB that a row brings home.
    """

    def __init__(self, workers: int, step: float, costs: Costs, mb_row: float) -> None:
        self.devices = [Device() for _ in range(workers)]
        self.a, self.b, self.costs, self.mb_row = 0.9 * step, 0.1 * step / BATCH, costs, mb_row
        self.speed = np.full(workers, BATCH / (step + costs.overhead))
        self.queue: deque[tuple[int, int]] = deque()  # (evaluations, wave)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.ids = itertools.count()
        self.now = self.driver_free = self.driver_busy = 0.0
        self.arrived: Callable[[Packet], None] = lambda packet: None

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Have something happen."""
        heapq.heappush(self.events, (when, next(self.ids), what))

    def run(self) -> float:
        """Until nothing happens any more; the time."""
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self.driver_free

    def serve(self, seconds: float, then: Callable[[], None]) -> None:
        """The driver works on something once it is free."""
        self.driver_free = max(self.driver_free, self.now) + seconds
        self.driver_busy += seconds
        self.at(self.driver_free, then)

    def dispatch(self) -> None:
        """Deal what is queued to workers with room."""
        while self.queue and any(d.lent < AHEAD for d in self.devices):
            free = np.array([d.lent < AHEAD for d in self.devices])
            cost = np.array([nfe for nfe, _ in self.queue], float)
            batch = BATCH * cost.mean()
            given = share_out(
                cost,
                np.full(len(cost), -1),
                np.arange(len(free)),
                free,
                backlog=np.array([d.owes for d in self.devices]) / self.speed,
                speed=self.speed,
                most=np.maximum(1, self.speed * BUNDLE_SECONDS // batch) * batch,
                batch_size=BATCH,
            )
            if (given < 0).all():
                return
            rows, self.queue = list(self.queue), deque(r for r, g in zip(self.queue, given, strict=True) if g < 0)
            for i in np.flatnonzero(free):
                mine = [rows[j] for j in np.flatnonzero(given == i)]
                if mine:
                    self.lend(self.devices[i], mine)

    def lend(self, device: Device, rows: list[tuple[int, int]]) -> None:
        left = np.array([nfe for nfe, _ in rows])
        packet = Packet(left, rows[0][1], int(left.sum()))
        device.lent += 1
        device.owes += packet.evaluations
        cost = (self.costs.bundle + self.costs.row * len(rows)) / 2
        self.serve(cost, lambda: self.at(self.now + self.costs.latency, lambda: self.take(device, packet)))

    def take(self, device: Device, packet: Packet) -> None:
        device.bundles.append(packet)
        if not device.passing:
            self.start_pass(device)

    def start_pass(self, device: Device) -> None:
        room, n = BATCH, 0
        for packet in device.bundles:
            rows = np.argsort(-packet.left, kind="stable")[: min(room, int((packet.left > 0).sum()))]
            packet.left[rows] -= 1
            room, n = room - len(rows), n + len(rows)
        device.passing = n > 0
        if n:
            self.at(self.now + self.a + self.b * n + self.costs.overhead, lambda: self.end_pass(device))

    def end_pass(self, device: Device) -> None:
        for packet in [p for p in device.bundles if not p.left.any()]:
            device.bundles.remove(packet)
            self.at(self.now + self.costs.latency, lambda packet=packet: self.reply(device, packet))
        self.start_pass(device)

    def reply(self, device: Device, packet: Packet) -> None:
        rows = len(packet.left)
        cost = (self.costs.bundle + self.costs.row * rows) / 2 + self.costs.mb * self.mb_row * rows

        def done() -> None:
            device.lent -= 1
            device.owes -= packet.evaluations
            self.arrived(packet)
            self.dispatch()

        self.serve(cost, done)


def modelled(
    name: str, workers: int, step: float, batches: int, costs: Costs, mb_row: float, lengths: dict[int, float]
) -> dict[str, float]:
    """Efficiency and the driver's share of the time, of a search like those of part a."""
    levels = 1 if name == "best_of_n" else len(spaced_levels(STEPS, 5, top=True))
    segments = {"best_of_n": {STEPS: 1.0}, "fk": {STEPS // levels: 1.0}, "dts_async": lengths}[name]
    mean = sum(steps * share for steps, share in segments.items())
    model = Model(workers, step, costs, mb_row)
    rows = workers * BATCH
    total = round(batches * rows * STEPS / mean)  # rows in all
    draw = np.random.default_rng(0)
    asked = evaluations = 0

    def ask(n: int, wave: int) -> None:
        nonlocal asked, evaluations
        n = min(n, total - asked)
        asked += n
        steps = draw.choice(list(segments), n, p=list(segments.values()))
        evaluations += int(steps.sum())
        model.queue.extend((int(k), wave) for k in steps)

    open_rows: dict[int, int] = {}

    def in_waves(size: int, ahead: int) -> None:
        """Waves of so many rows, `ahead` of them asked before the one that runs is complete."""
        numbers = itertools.count()

        def more() -> None:
            while len(open_rows) <= ahead and asked < total:
                before, number = asked, next(numbers)
                ask(size, number)
                open_rows[number] = asked - before

        def arrived(packet: Packet) -> None:
            open_rows[packet.wave] -= len(packet.left)
            if not open_rows[packet.wave]:
                open_rows.pop(packet.wave)
            more()

        model.arrived = arrived
        more()

    if name == "dts_async":
        model.arrived = lambda packet: ask(len(packet.left), 0)
        ask(IN_FLIGHT * rows, 0)
    else:
        in_waves(rows if name == "best_of_n" else min(FK_BATCHES, batches) * rows, int(name == "best_of_n"))
    model.dispatch()
    wall = model.run()
    return {
        "efficiency": evaluations / BATCH * step / workers / wall,
        "driver": model.driver_busy / wall,
        "saturates_at": workers * wall / model.driver_busy,
    }


def part_model(args: Args, measured: dict[str, Any]) -> dict[str, Any]:
    """A model, not a measurement: 4 and 8 workers beside what was measured, then 16, 32 and 128."""
    driver, cases, batches = measured["driver"], measured["cases"], measured["batches_a_worker"]
    out: dict[str, Any] = {"note": "a model, not a measurement", "validation": {}, "prediction": {}}
    for size in SIZES:
        dts = cases[f"{size}KB dts_async 8"]
        lengths = {int(key.removeprefix("steps_")): share for key, share in dts.items() if key.startswith("steps_")}
        for name in METHODS:
            mb_row = cases[f"{size}KB {name} 8"]["mb"] / cases[f"{size}KB {name} 8"]["rows"]
            for workers in (4, 8):
                case = f"{size}KB {name} {workers}"
                costs = costs_of(driver, measured["round_trip_s"], cases[case]["pass_ms"])
                got = modelled(name, workers, 0.02, batches, costs, mb_row, lengths)["efficiency"]
                out["validation"][case] = {
                    "model": got,
                    "measured": cases[case]["efficiency"],
                    "model_over_measured": got / cases[case]["efficiency"],
                }
            # On a device of one's own a pass costs the host what it costs one worker here, not eight on two cores.
            least = min(figures["pass_ms"] for case, figures in cases.items() if case.startswith(f"{size}KB {name}"))
            costs = costs_of(driver, measured["round_trip_s"], least)
            for step, workers in itertools.product((0.02, 0.05), (16, 32, 128)):
                got = modelled(name, workers, step, batches, costs, mb_row, lengths)
                out["prediction"][f"{size}KB {name} {workers} workers {1e3 * step:.0f} ms"] = got
    return out


def costs_of(driver: dict[str, float], rtt: float, pass_ms: float) -> Costs:
    """The model's costs from measured ones."""
    overhead = max(0.0, pass_ms / 1e3 - 0.02)
    return Costs(driver["s_per_bundle"], driver["s_per_row"], driver["s_per_mb"], rtt / 2, overhead)


# ------------------------------------------------------------------------------------------------------- parts b, gpu


def part_b(args: Args) -> dict[str, Any]:
    """Two workers of one thread over one process of two threads."""
    kernel, reward = mnist_kernel(25), even()
    nfe, batch = (96 if args.quick else 256) * kernel.num_steps, 32
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"  the machine is not quiet (load {load:.1f}): this part is not reliable now")
    torch.set_num_threads(2)
    found = {}
    with ts.RayWorkers(2) as pool:
        for name, method in {
            "best_of_n": ts.BestOfN(),
            "dts_async": ts.DiffusionTreeSampling(mode="async", wave=IN_FLIGHT * 2 * batch),
        }.items():

            def speed(workers: Any, method: Any = method) -> float:
                began = time.perf_counter()
                budget = ts.Budget(nfe=nfe)
                result = ts.search(kernel, reward, method, budget=budget, batch_size=batch, workers=workers)
                return result.cost.nfe / (time.perf_counter() - began)

            found[name] = ratio(1 if args.quick else args.rounds, lambda: speed(None), lambda: speed(pool))
            found[name]["target"] = 0.95
    return {"load_before": load, "nfe": nfe, "batch": batch} | found


def part_gpu(args: Args) -> dict[str, Any]:
    """One GPU: shared by two actors over held by one; rewards beside the model over rewards after it."""
    if not torch.cuda.is_available():
        return {"note": "not run: no GPU"}
    kernel = ts.Recipe("mnist")
    budget = ts.Budget(nfe=(128 if args.quick else 1024) * 25)

    def speed(reward: Any, pool: ts.RayWorkers) -> float:
        began = time.perf_counter()
        result = ts.search(kernel, reward, ts.BestOfN(), budget=budget, batch_size=64, workers=pool)
        return result.cost.nfe / (time.perf_counter() - began)

    rounds, found = 1 if args.quick else args.rounds, {}
    whole, half = {"num_workers": 1, "gpus_per_worker": 1}, {"num_workers": 2, "gpus_per_worker": 0.5}
    cases: dict[str, tuple[ts.Recipe, dict[str, Any], dict[str, Any]]] = {
        "two_actors_share": (ts.Recipe("even"), whole, half),
        "reward_overlap": (ts.Recipe(slow_reward), whole, whole | {"reward_workers": 2}),
    }
    for name, (reward, base, other) in cases.items():
        # One after another: both would not fit on one GPU.
        speeds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for settings, into in zip((base, other), speeds, strict=True):
                with ts.RayWorkers(**settings) as pool:
                    speed(reward, pool)
                    into.append(speed(reward, pool))
        found[name] = ratio_of(list(zip(*speeds, strict=True)))
    return found


def slow_reward() -> Reward:
    """A reward that takes 2 ms a sample, somewhere else than on the GPU."""

    def score(x: Tensor) -> Tensor:
        time.sleep(0.002 * len(x))
        return x.flatten(1).mean(1)

    return as_reward(score, name="slow")


def ratio(rounds: int, base: Callable[[], float], other: Callable[[], float]) -> dict[str, Any]:
    """Medians of interleaved rounds, after one that warms up."""
    return ratio_of([(base(), other()) for _ in range(rounds + 1)][1:])


def ratio_of(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of pairs of NFE/s, and the range of their ratio."""
    ratios = [b / a for a, b in pairs]
    return {
        "base_nfe_per_s": statistics.median(a for a, _ in pairs),
        "workers_nfe_per_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


# ------------------------------------------------------------------------------------------------------------- output


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = [f"# Ray workers: what is lost\n\nMachine: {found['machine']}. Load {found['load']}. Medians, with ranges.\n"]
    if "a" in found:
        out.append(f"## A kernel that sleeps: 20 ms a step, B = {BATCH}, T = {STEPS}\n")
        out.append("Driver CPU: " + ", ".join(f"{k} {v:.3g}" for k, v in found["a"]["driver"].items()) + ".\n")
        columns = ["size, method, workers", "efficiency", "range", "target", "over one process", "busy", "fill"]
        out += [row([*columns, "ms a pass", "repeated NFE"]), row(["---"] * 9)]
        for case, f in found["a"]["cases"].items():
            spread, target = " – ".join(f"{v:.3f}" for v in f["range"]), f["target"] or ""
            shares = [f"{f[name]:.3f}" for name in ("over_one_process", "busy", "fill")]
            repeated = f"{f['repeated_nfe'] / f['nfe']:.4f}"
            out.append(row([case, f"{f['efficiency']:.3f}", spread, target, *shares, f"{f['pass_ms']:.2f}", repeated]))
    if "model" in found:
        out += ["\n## Model (not a measurement)\n", row(["case", "model", "measured", "ratio"]), row(["---"] * 4)]
        for case, f in found["model"]["validation"].items():
            out.append(row([case, *(f"{f[name]:.3f}" for name in ("model", "measured", "model_over_measured"))]))
        out += ["", row(["case", "efficiency", "driver busy", "driver saturates at"]), row(["---"] * 4)]
        for case, f in found["model"]["prediction"].items():
            shares = [f"{f[name]:.3f}" for name in ("efficiency", "driver")]
            out.append(row([case, *shares, f"{f['saturates_at']:.0f} workers"]))
    for part, title in (("b", "Two workers over one process with two threads, MNIST"), ("gpu", "GPU")):
        if part in found:
            out.append(f"\n## {title}\n")
            if "note" in found[part]:
                out.append(found[part]["note"])
            cases = {k: v for k, v in found[part].items() if isinstance(v, dict)}
            if cases:
                out += [row(["case", "ratio", "range", "NFE/s", "target"]), row(["---"] * 5)]
            for case, f in cases.items():
                spread = " – ".join(f"{v:.3f}" for v in f["range"])
                speeds = f"{f['base_nfe_per_s']:.0f} → {f['workers_nfe_per_s']:.0f}"
                out.append(row([case, f"{f['ratio']:.3f}", spread, speeds, f.get("target", "")]))
    return "\n".join(out) + "\n"


def row(cells: list[Any]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Run the parts and write the figures."""
    args = tyro.cli(Args)
    found = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    found |= {"machine": MACHINE, "load": [round(v, 1) for v in os.getloadavg()]}
    print(f"load {found['load']}")
    for name in args.only.split(","):
        print(f"part {name}", flush=True)
        if name == "model":
            if "a" not in found:
                raise SystemExit(f"part model needs part a: {args.out} holds none")
            found[name] = part_model(args, found["a"])
        else:
            found[name] = {"a": part_a, "b": part_b, "gpu": part_gpu}[name](args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        args.out.with_suffix(".md").write_text(tables(found), "utf-8")
    print(tables(found))


if __name__ == "__main__":
    main()
