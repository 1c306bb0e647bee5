"""The named orders: their numbers stand here, and their definitions are written a second time."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lstmjax.data.permutations import PERMUTATIONS, permutation, permutation_sha256

# (name, n): the first six numbers, and the sha256 of all as little-endian int64. Those of
# torch-12008 were computed by torch 2.13.0: torch.manual_seed(12008); torch.randperm(n).
GOLDEN = {
    ("none", 784): (
        [0, 1, 2, 3, 4, 5],
        "b608df37c700252ea49c332221bee218c64831224cf032c2b64703afbd789d0a",
    ),
    ("numpy-92916", 784): (
        [319, 576, 323, 107, 355, 716],
        "96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74",
    ),
    ("torch-12008", 784): (
        [91, 97, 471, 426, 157, 451],
        "f4113bc8ae78902146fba54feaff34c7de185249d3b85ce9584e3d76ca98b3bd",
    ),
    ("numpy-0", 784): (
        [693, 85, 647, 392, 765, 14],
        "fe62e3fef305ce16e55f08cd0056a8b237e12af6c9523ff3fb35395f6ec55222",
    ),
    ("bit-reversal", 784): (
        [0, 512, 256, 768, 128, 640],
        "30d91dc29f161321971bfea6ba16c735e4b5fe678d607efb470896d9de75ef44",
    ),
    ("none", 196): (
        [0, 1, 2, 3, 4, 5],
        "96bdb95018ff1ad836b16e8e87337bfb88bab5001d3385fde05c292b27fd4fce",
    ),
    ("numpy-92916", 196): (
        [152, 165, 171, 169, 69, 91],
        "c4e50b70c46de9550e0d3d91d8ce583f9ae1ef189ecf7b87c213f9f3eb56afcb",
    ),
    ("torch-12008", 196): (
        [91, 25, 179, 191, 181, 86],
        "3aa81c599525f53a378c2ab823f059ed22e62ea96fca949e409062040c703b93",
    ),
    ("numpy-0", 196): (
        [83, 12, 33, 113, 171, 134],
        "7846719e93924c191a4b8b1191654600f7fcb50723e04843f8c0f5e446ddf799",
    ),
    ("bit-reversal", 196): (
        [0, 128, 64, 192, 32, 160],
        "b4c381ebc5380b79880d52be8bd9091e1e709dc2143cc08f718949c25c8f7a37",
    ),
    # Of torch alone, whose shuffle is written anew here: other lengths, the shortest among them.
    ("torch-12008", 1): (
        [0],
        "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",
    ),
    ("torch-12008", 2): (
        [1, 0],
        "4cbbd8ca5215b8d161aec181a74b694f4e24b001d5b081dc0030ed797a8973e0",
    ),
    ("torch-12008", 7): (
        [0, 4, 2, 6, 1, 5],
        "8f001a835834a108c4ea04010481073213e965589147b29ec11ad80f1150f71d",
    ),
    ("torch-12008", 1000): (
        [635, 178, 345, 874, 865, 331],
        "7102f83ee5fdf38d91fdd9ad2d7dae54ee847236a20bced225d5c62e17f27f37",
    ),
}


@pytest.mark.parametrize(("name", "n"), GOLDEN)
def test_the_orders_never_change(name, n):
    order, (first, sha256) = permutation(name, n), GOLDEN[name, n]
    assert order.dtype == np.int64 and order[:6].tolist() == first
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == sha256
    assert permutation_sha256(order) == sha256


def test_every_order_stands_above_for_both_lengths():
    both = {(name, n) for name in PERMUTATIONS for n in (784, 196)}
    assert both <= GOLDEN.keys()
    for n in (784, 196):  # and each is another one
        assert len({GOLDEN[name, n][1] for name in PERMUTATIONS}) == len(PERMUTATIONS)


@given(st.sampled_from(list(PERMUTATIONS)), st.integers(1, 300))
def test_each_is_a_permutation(name, n):
    np.testing.assert_array_equal(np.sort(permutation(name, n)), np.arange(n))


def test_784_is_what_is_meant_without_a_length():
    for name in PERMUTATIONS:
        np.testing.assert_array_equal(permutation(name), permutation(name, 784))


def halved(positions):
    """Those in even places first, then those in odd ones, and the same within each half."""
    if len(positions) == 1:
        return positions
    return halved(positions[::2]) + halved(positions[1::2])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 100, 196, 256, 784, 1024, 1025])
def test_bit_reversal_is_that_of_the_next_power_of_two_with_the_rest_left_out(n):
    whole = 1
    while whole < n:
        whole *= 2
    want = [position for position in halved(list(range(whole))) if position < n]
    assert permutation("bit-reversal", n).tolist() == want


def test_numpy_orders_are_those_that_anyone_gets():
    for seed in (0, 92916):
        want = list(range(784))
        np.random.RandomState(seed).shuffle(want)  # of a list: written in Python, not in C
        assert permutation(f"numpy-{seed}").tolist() == want


def test_the_hash_does_not_depend_on_how_numbers_are_stored():
    order = permutation("numpy-0", 50)
    want = permutation_sha256(order)
    for other in (order.astype(np.uint8), order.astype(">i4"), np.repeat(order, 2)[::2]):
        assert permutation_sha256(other) == want
    assert permutation_sha256(order[::-1]) != want


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutation("numpy-1"), "permutation: got 'numpy-1', expected one of 'none', 'n"),
        (lambda: permutation(None), "permutation: got None, expected one of 'none'"),
        (lambda: permutation("none", 0), "n: got 0, expected an integer from 1 to 134217728"),
        (lambda: permutation("none", 2**31), "n: got 2147483648, expected an integer from 1"),
        (lambda: permutation("none", 7.0), "n: got 7.0, expected an integer from 1"),
        (lambda: permutation_sha256(np.array([0, 2])), "order: got int64[2], expected the integer"),
        (lambda: permutation_sha256(np.array([0, 0])), "order: got int64[2], expected the integer"),
        (lambda: permutation_sha256(np.array([0.0, 1.0])), "order: got float64[2], expected the"),
        (lambda: permutation_sha256(np.array([[0]])), "order: got int64[1, 1], expected the integ"),
    ],
)
def test_what_cannot_be_used_is_named(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
