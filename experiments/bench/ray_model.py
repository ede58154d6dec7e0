"""A discrete-event model of a driver and its workers, fed with the measured cost of the driver: no measurement."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.bench.ray_setup import BATCH, FK_BATCHES, IN_FLIGHT, METHODS, SIZES, STEPS
from treesearch.distributed.pool import AHEAD
from treesearch.distributed.sharing import BUNDLE_SECONDS, share_out
from treesearch.methods.settings import spaced_levels


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


def predicted(measured: dict[str, Any]) -> dict[str, Any]:
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
