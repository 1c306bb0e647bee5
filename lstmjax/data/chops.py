"""Reviews cut into chops, and packed into batches of one shape.

A review is read in chops, segments of at most so many steps (Johnson & Zhang, 2016): long reviews
cost what their tokens cost, and a recurrence is as long as a chop. A batch has room for a fixed
number of segments, so that one compiled program serves every batch:

    cut = segments(offsets, chop=50)
    batches = Batches.of(cut, rows, epochs=10, seed=0, capacity=256, devices=2)
    for piece in pieces(batches.plan(epoch), 10): ...

Which reviews a batch has does not depend on the number of devices: it is packed as one, and then
shared out. So the gradient of a batch is the same on any number of them, to round-off, as long as
nothing is dropped at random; what is dropped is drawn by each device for its own.

Letters: N reviews, M segments of all of them, K batches, D devices, W segments of a device's part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lstmjax.data.dataset import check_int

# ---- chops --------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """The segments of all reviews, those of review n from `first[n]` to `first[n + 1]`.

    Fields:
      first: int64 `[N + 1]`.
      begin: int32 `[M]`, where a segment begins in the array of all ids.
      length: int32 `[M]`, its ids, 1 or more.
    """

    first: np.ndarray
    begin: np.ndarray
    length: np.ndarray


def segments(offsets: np.ndarray, chop: int) -> Segments:
    """Cuts reviews into chops.

    A review of n ids becomes ⌈n / chop⌉ segments, as equal as possible, the longer ones first: a
    short last one would have nothing to look back on.

    Args:
      offsets: int64 `[N + 1]`, as from `load`.
      chop: the most ids of a segment, 1 or more; 0 leaves every review whole.

    Raises:
      ValueError: `chop` below 0.
    """
    check_int("chop", chop, 0)
    lengths = np.diff(offsets)
    count = -(-lengths // chop) if chop else np.ones_like(lengths)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    number = np.arange(first[-1]) - first[:-1].repeat(count)  # of a segment in its review
    least, longer = np.divmod(lengths, np.maximum(count, 1))
    least, longer = least.repeat(count), longer.repeat(count)
    begin = offsets[:-1].repeat(count) + number * least + np.minimum(number, longer)
    length = least + (number < longer)
    return Segments(first, begin.astype(np.int32), length.astype(np.int32))


def tokens(cut: Segments, rows: np.ndarray) -> int:
    """How many ids the reviews `rows` have together."""
    before = np.concatenate([[0], np.cumsum(cut.length, dtype=np.int64)])
    return int((before[cut.first[1:]] - before[cut.first[:-1]])[rows].sum())


# ---- batches ------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Reviews in batches.

    Fields:
      rows: int64 `[N]`, the reviews in their order.
      batch: int64 `[N]`, the batch of each, rising.
      device: int64 `[N]`, which device's part of it.
      load: int64 `[K, D]`, how many segments each part has.
    """

    rows: np.ndarray
    batch: np.ndarray
    device: np.ndarray
    load: np.ndarray


def order(rows: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The reviews `rows` in the order of an epoch."""
    return np.asarray(rows)[np.random.default_rng([seed, epoch]).permutation(len(rows))]


def pack(cut: Segments, rows: np.ndarray, capacity: int, devices: int = 1) -> Packed:
    """Fills batches with whole reviews, one after the other, each until the next does not fit.

    The reviews of a batch are shared out among devices, the one with most segments first, each to
    the device that has the fewest segments so far.

    Args:
      cut: the reviews' segments.
      rows: [N] reviews in order, N >= 1.
      capacity: segments of a batch, over all devices.
      devices: D.

    Raises:
      ValueError: no review; one with more segments than `capacity`; a size below 1.
    """
    check_int("capacity", capacity, 1)
    check_int("devices", devices, 1)
    rows = np.asarray(rows, np.int64)
    if len(rows) == 0:
        raise ValueError("rows: got no reviews, expected 1 or more")
    size = np.diff(cut.first)[rows]
    if size.max() > capacity:
        raise ValueError(f"capacity: got {capacity}, expected at least {size.max()}")
    ends, reached, begin = np.cumsum(size), 0, [0]
    while begin[-1] < len(rows):
        begin.append(int(np.searchsorted(ends, reached + capacity, side="right")))
        reached = ends[begin[-1] - 1]
    batch = np.arange(len(begin) - 1).repeat(np.diff(begin))

    load = np.zeros((len(begin) - 1, devices), np.int64)
    device, largest = np.zeros(len(rows), np.int64), np.lexsort((-size, batch))
    rank = np.arange(len(rows)) - np.asarray(begin)[batch]  # among its batch, the largest first
    for number in range(rank.max() + 1):  # of all batches at once
        own = largest[rank == number]
        device[own] = load[batch[own]].argmin(axis=1)
        load[batch[own], device[own]] += size[own]
    return Packed(rows, batch, device, load)


def width(packed: Sequence[Packed]) -> int:
    """How many segments the largest part of any batch has: W with which all can be laid out."""
    return max(int(one.load.max()) for one in packed)


def lay_out(cut: Segments, packed: Packed, width: int) -> dict[str, np.ndarray]:
    """The batches as arrays of one shape, the parts of a batch side by side.

    Args:
      cut: the reviews' segments.
      packed: from `pack`.
      width: W, room for segments, and for as many reviews, in each part.

    Returns:
      `{"rows", "weight", "begin", "length", "slot"}`, each `[K, D W]` int32 (`weight`: float32).
      In each part the reviews stand in front, `rows` with a `weight` of 1, and rows of weight 0
      fill it up; so do their segments, with segments of length 0. `slot` is the place of a
      segment's review within its part, W where there is none.

    Raises:
      ValueError: a part does not fit.
    """
    if packed.load.max() > width:
        raise ValueError(f"width: got {width}, expected at least {packed.load.max()}")
    batches, devices = packed.load.shape
    sort = np.lexsort((packed.device, packed.batch))  # stable: the order stays in every part
    rows, part = packed.rows[sort], (packed.batch * devices + packed.device)[sort]
    size = np.diff(cut.first)[rows]
    starts = np.searchsorted(part, np.arange(batches * devices))
    slot = np.arange(len(rows)) - starts[part]
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    place = part * width + before[:-1] - before[starts[part]]  # of a review's first segment
    number = np.arange(before[-1]) - before[:-1].repeat(size)

    shape, flat = (batches, devices * width), batches * devices * width
    plan = {name: np.zeros(flat, np.int32) for name in ("rows", "begin", "length")}
    plan["weight"], plan["slot"] = np.zeros(flat, np.float32), np.full(flat, width, np.int32)
    plan["rows"][part * width + slot] = rows
    plan["weight"][part * width + slot] = 1
    into, segment = place.repeat(size) + number, cut.first[rows].repeat(size) + number
    plan["begin"][into], plan["length"][into] = cut.begin[segment], cut.length[segment]
    plan["slot"][into] = slot.repeat(size)
    return {name: array.reshape(shape) for name, array in plan.items()}


def pieces(plan: dict[str, np.ndarray], at_most: int) -> list[dict[str, np.ndarray]]:
    """A plan of K batches in pieces of `at_most`, and the rest one by one: two shapes at most."""
    count = len(plan["rows"])
    whole = count - count % at_most
    places = [slice(k, k + at_most) for k in range(0, whole, at_most)]
    places += [slice(k, k + 1) for k in range(whole, count)]
    return [{name: array[place] for name, array in plan.items()} for place in places]


class Batches(NamedTuple):
    """The batches of all epochs, packed before the first, so that one width fits them all.

    Fields:
      cut: the reviews' segments.
      packed: of each epoch.
      width: W.
    """

    cut: Segments
    packed: list[Packed]
    width: int

    @classmethod
    def of(
        cls, cut: Segments, rows: np.ndarray, *, epochs: int, seed: int, capacity: int, devices: int
    ) -> "Batches":
        """Packs the reviews `rows` in the order of each epoch, from 1 on; see `order`, `pack`."""
        orders = [order(rows, seed=seed, epoch=epoch) for epoch in range(1, epochs + 1)]
        packed = [pack(cut, own, capacity, devices) for own in orders]
        return cls(cut, packed, width(packed))

    @property
    def updates(self) -> int:
        """Batches of all epochs."""
        return sum(len(own.load) for own in self.packed)

    @property
    def tokens(self) -> int:
        """Ids that are read in all epochs."""
        return sum(tokens(self.cut, own.rows) for own in self.packed)

    def fill(self, steps: int) -> float:
        """Which share of all that is computed are no tokens, with segments of so many steps."""
        slots = sum(own.load.size for own in self.packed) * self.width * steps
        return 1 - self.tokens / slots

    def plan(self, epoch: int) -> dict[str, np.ndarray]:
        """The batches of an epoch, from 1 on; see `lay_out`."""
        return lay_out(self.cut, self.packed[epoch - 1], self.width)
