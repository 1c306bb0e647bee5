"""What devices tell each other in a train step, from 1 of them to 64, and what that will cost.

    python experiments/scaling_devices.py            up to 64 CPU devices, in about five minutes
    python experiments/scaling_devices.py --quick    up to 8, and a small model

The step of experiments/imdb.py is compiled for each number of devices and looked into: the sum of
gradients and metrics over devices has to be the only thing that is sent, once in a step. Two steps
are then taken, to see that all numbers of devices come to the same weights. 64 devices on a few
cores say nothing about time, so the time on many GPUs is worked out instead, from the bytes:

    t = α + 2 (N − 1)/N · bytes/B       a ring of N (Patarasuk and Yuan, 2009); α to start and end
    efficiency = step/(step + t)        each GPU has a batch of its own, as large as on one GPU

Nothing is sent before the backward pass is done, so nothing is hidden behind it. α, B and the time
of a step are stated below, each as a range, and the efficiencies are ranges too: the fast step with
the slow network, to the slow step with the fast one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lstmjax import cli, losses, parallel, train
from lstmjax.models import SequenceModel
from lstmjax.records import Run, RunError, params_sha256


class Fabric(NamedTuple):
    """How N GPUs are connected, from good to bad.

    Attributes:
      gpus: N.
      name: in words.
      latency: α in microseconds.
      bandwidth: B in GB/s, of one GPU.
    """

    gpus: int
    name: str
    latency: tuple[float, float]
    bandwidth: tuple[float, float]


class Work(NamedTuple):
    """A model and the time of its step on one GPU.

    Attributes:
      name: in words.
      bytes: of its gradients.
      step: milliseconds, from fast to slow.
    """

    name: str
    bytes: int
    step: tuple[float, float]


# Measured by others with NCCL's own tests, on Hopper GPUs: 12 to 17 µs for a few bytes and 460 to
# 480 GB/s for gigabytes between 8 GPUs on NVLink; 46 to 48 GB/s for each 400 Gb/s adapter between
# machines. The bad ends are guesses for a few MB in a real program. 32 machines are a tree of 5
# levels, there and back, at 5 to 15 µs.
FABRICS = (
    Fabric(8, "one machine, NVLink", (15, 40), (470, 100)),
    Fabric(256, "32 machines, 400 Gb/s each GPU", (65, 190), (46, 15)),
)
# A step of the loop over time is bound by starting kernels: 18 to 37 µs forward and backward,
# however small the batch. The limit of a kernel that stays on the GPU is 7.6 ms in the second case.
PER_STEP = 0.018, 0.037


def works(bytes_of_imdb: int) -> tuple[Work, ...]:
    """The models whose scaling is predicted."""
    steps = 80 * 2  # tokens, layers
    wide = 4 * (2 * 1024 * 4096 + 4096)
    return (
        Work("IMDB, 2 × LSTM(64), T = 80", bytes_of_imdb, tuple(steps * t for t in PER_STEP)),
        Work("LSTM(1024), T = 1024, loop", wide, tuple(1024 * t for t in PER_STEP)),
        Work("LSTM(1024), T = 1024, one kernel", wide, (7.6, 7.6)),
    )


def seconds(count: int, latency: float, bandwidth: float, size: int) -> float:
    """Of an all-reduce of ``size`` bytes: α in µs, B in GB/s."""
    return latency * 1e-6 + 2 * (count - 1) / count * size / (bandwidth * 1e9)


def efficiency(fabric: Fabric, work: Work) -> tuple[float, float]:
    """From the fast step with the slow network to the slow step with the fast one."""
    worst, best = (
        seconds(fabric.gpus, fabric.latency[end], fabric.bandwidth[end], work.bytes)
        for end in (1, 0)
    )
    fast, slow = (time / 1000 for time in work.step)
    return fast / (fast + worst), slow / (slow + best)


# ---- the program --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    quick: bool = False
    """A small model on up to 8 devices."""
    most: int | None = None
    """The most devices, doubled from 1 on: 64, or 8 with --quick."""
    batch_size: int = 128
    """Reviews in a batch, over all devices."""
    seed: int = 0
    """Of weights and reviews."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


def make_model(quick: bool) -> SequenceModel:
    """That of experiments/imdb.py, without dropout: masks depend on the number of devices."""
    sizes = (5, 50, 4) if quick else (64, 10_000, 100)
    hidden_size, vocabulary_size, input_size = sizes
    return SequenceModel(
        cell="lstm",
        hidden_size=hidden_size,
        output_size=1,
        num_layers=2,
        vocabulary_size=vocabulary_size,
        input_size=input_size,
    )


def make_step(model: SequenceModel) -> Any:
    """A train step on reviews; by plain SGD, for Adam would blow up round-off."""

    def loss_fn(params, batch, key):
        logits = model.apply({"params": params}, batch["ids"])[1][:, 0]
        loss = losses.total(losses.binary_cross_entropy(logits, batch["label"]), batch["weight"])
        correct = losses.total(losses.binary_correct(logits, batch["label"]), batch["weight"])
        return losses.mean(loss), {"loss": loss, "accuracy": correct}

    return train.make_train_step(loss_fn, optax.sgd(0.1), axis_name=parallel.AXIS)


class Seen(NamedTuple):
    """What a program of two steps sends.

    Attributes:
      devices: how many it is for.
      collectives: in a step.
      collectives_outside: of the steps.
      bytes: in a step, of each device.
      difference: of the weights after the steps from those on one device, the largest.
    """

    devices: int
    collectives: int
    collectives_outside: int
    bytes: int
    difference: float


def look(config: Config, devices: list, data: dict, clock: train.Clock, first: Any) -> tuple:
    """What two steps on these devices send, and the weights after them; ``first``: on one."""
    model = make_model(config.quick)
    params = model.init(jax.random.key(config.seed), data["ids"][:1])["params"]
    state = train.init_state(params, optax.sgd(0.1), jax.random.key(config.seed))
    order = np.arange(2 * config.batch_size)
    plan = train.plan_batches(order, config.batch_size, multiple=len(devices))
    given = (
        parallel.place(state, devices),
        parallel.place(data, devices),
        parallel.place(plan, devices, parallel.BATCHES),
    )
    run = parallel.spread(train.scan_steps(make_step(model)), devices)
    program = clock.compile(run, *given)
    with clock("train"):
        state, _ = jax.block_until_ready(program(*given))
    params = parallel.fetch(state.params)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, first or params)
    found = parallel.collectives(program.as_text())
    inside = [c for c in found if c.loops]
    sent, difference = sum(c.bytes for c in inside), max(map(float, jax.tree.leaves(apart)))
    if len(inside) != 1 or inside[0].kind != "all-reduce":
        kinds = ", ".join(c.kind for c in inside)
        raise RunError(f"a step on {len(devices)} devices has {kinds}, expected one all-reduce")
    return Seen(len(devices), 1, len(found) - 1, sent, difference), params


# ---- the run ------------------------------------------------------------------------------------


def tables(seen: list[Seen], size: int) -> str:
    """What was found, and what follows for gradients of that size, as Markdown."""
    lines = ["| devices | collectives in a step | outside of steps | bytes | largest difference |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {n} | {c} | {out} | {sent:,} | {d:.1e} |" for n, c, out, sent, d in seen]
    lines += ["", "| model | MB | " + " | ".join(f"{f.gpus} GPUs" for f in FABRICS) + " |"]
    lines += ["|---|---|" + "---|" * len(FABRICS)]
    for work in works(size):
        ranges = [efficiency(fabric, work) for fabric in FABRICS]
        cells = " | ".join(f"{low:.1%} to {high:.1%}" for low, high in ranges)
        lines.append(f"| {work.name} | {work.bytes / 1e6:.1f} | {cells} |")
    return "\n".join(lines)


def run(config: Config) -> None:
    cli.check_counts(config, "most", "batch_size")
    cli.check_counts(config, "seed", least=0)
    most = config.most or (8 if config.quick else 64)
    devices, clock = parallel.use_devices(most, "most"), train.Clock()
    rng, steps = np.random.default_rng(config.seed), 80 if not config.quick else 7
    words = make_model(config.quick).vocabulary_size
    data = {
        "ids": rng.integers(0, words, (2 * config.batch_size, steps)).astype(np.int32),
        "label": rng.integers(0, 2, 2 * config.batch_size).astype(np.int32),
    }
    seen, first = [], None
    with Run.create("scaling-devices", config, out=config.out) as folder:
        for count in (2**n for n in range(most.bit_length())):
            one, params = look(config, devices[:count], data, clock, first)
            first = first or params
            seen.append(one)
        size = sum(a.nbytes for a in jax.tree.leaves(first))
        print(tables(seen, size))
        columns = zip(Seen._fields, zip(*seen, strict=True), strict=True)
        metrics = {"gradient_bytes": size} | {name: list(values) for name, values in columns}
        for fabric in FABRICS:
            ranges = [efficiency(fabric, work) for work in works(size)]
            metrics[f"efficiency_{fabric.gpus}_low"] = [low for low, _ in ranges]
            metrics[f"efficiency_{fabric.gpus}_high"] = [high for _, high in ranges]
        folder.finish(
            dataset={"name": "random ids", "source": "generated", "sha256": params_sha256(data)},
            metrics=metrics,
            seconds=clock.seconds,
            params_sha256=params_sha256(first),
            seed=config.seed,
            devices=devices,
        )
    print(f"record in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
