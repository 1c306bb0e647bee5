"""The orders of positions that "permuted MNIST" stands for in papers, by name and by hash.

| name           | used by                            | what it is                             |
|----------------|------------------------------------|----------------------------------------|
| `none`         |                                    | 0, 1, 2, …                             |
| `numpy-92916`  | expRNN (Lezcano-Casado, 2019)      | NumPy's legacy generator               |
| `torch-12008`  | coRNN (Rusch & Mishra, 2021)       | `torch.randperm` on a CPU              |
| `numpy-0`      | LMU (Voelker et al., 2019)         | NumPy's legacy generator               |
| `bit-reversal` | S4 (Gu et al., 2022), S5           | bits of the index, read backwards      |

They are different tasks, some harder than others: a number needs the order's name. The papers
have n = 784; for other n the same recipe is followed.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from lstmjax.data.dataset import check_choice, check_int

PIXELS = 784
LONGEST = 2**27  # torch.randperm draws 64 bits a place from (2**32 - 1) // 20 on


def permutation(name: str, n: int = PIXELS) -> np.ndarray:
    """The order of that name: a sequence x is read as x'_t = x_{p(t)}.

    Args:
      name: one of `PERMUTATIONS`.
      n: positions, 1 to 2²⁷.

    Returns:
      p, int64 [n], each of 0 … n − 1 once.

    Raises:
      ValueError: an unknown name; n out of range.
    """
    check_choice("permutation", name, tuple(PERMUTATIONS))
    check_int("n", n, 1, LONGEST)
    return PERMUTATIONS[name](int(n))


def permutation_sha256(order: np.ndarray) -> str:
    """The sha256 of an order's numbers as little-endian int64, 64 hexadecimal digits.

    Raises:
      ValueError: not the integers 0 … n − 1 in some order.
    """
    order = np.asarray(order)
    whole = order.ndim == 1 and order.dtype.kind in "iu"
    if not whole or not np.array_equal(np.sort(order), np.arange(len(order))):
        what = f"{order.dtype}{list(order.shape)}"
        raise ValueError(f"order: got {what}, expected the integers 0 to n - 1, each once")
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()


def _numpy(seed: int, n: int) -> np.ndarray:
    """`np.random.RandomState(seed).permutation(n)`, whose numbers NumPy has promised to keep."""
    return np.random.RandomState(seed).permutation(n).astype(np.int64)


def _torch(seed: int, n: int) -> np.ndarray:
    """What `torch.manual_seed(seed); torch.randperm(n)` gives on a CPU (checked with 2.13).

    Both libraries have a Mersenne Twister (MT19937) that an integer seeds in the same way. Torch
    then shuffles from the front (Fisher & Yates, 1938; Durstenfeld, 1964): place i changes with
    i + r mod (n − i), r the next 32 bits, for i = 0 … n − 2.
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, n - 1, dtype=np.uint32)
    order = np.arange(n, dtype=np.int64)
    for i, r in enumerate(draws.tolist()):
        j = i + r % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


def _bit_reversal(n: int) -> np.ndarray:
    """0 … 2ᵇ − 1 by their b bits read backwards, 2ᵇ the power of two from n on; those below n.

    For n = 784 that is b = 10: 0, 512, 256, 768, 128, …
    """
    bits = (n - 1).bit_length()
    found = np.arange(2**bits, dtype=np.int64)
    turned = np.zeros_like(found)
    for bit in range(bits):
        turned |= (found >> bit & 1) << (bits - 1 - bit)
    return turned[turned < n]


PERMUTATIONS: dict[str, Callable[[int], np.ndarray]] = {
    "none": lambda n: np.arange(n, dtype=np.int64),
    "numpy-92916": lambda n: _numpy(92916, n),
    "torch-12008": lambda n: _torch(12008, n),
    "numpy-0": lambda n: _numpy(0, n),
    "bit-reversal": _bit_reversal,
}
