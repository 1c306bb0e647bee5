"""Optimisers against NumPy, and the laws they must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lstmjax import optim


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's Adam mixes int32 counts and float moments, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    return [
        {n: rng.normal(size=s) * 10.0 ** rng.integers(-6, 3) for n, s in shapes.items()}
        for _ in range(steps)
    ]


def run(tx, params, grads):
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def numpy_adam(params, grads, lr, b1, b2, eps, tensorflow):
    m = {n: np.zeros_like(p) for n, p in params.items()}
    v = {n: np.zeros_like(p) for n, p in params.items()}
    out = []
    for t, g in enumerate(grads, start=1):
        params = dict(params)
        for n in params:
            m[n] = b1 * m[n] + (1 - b1) * g[n]
            v[n] = b2 * v[n] + (1 - b2) * g[n] ** 2
            if tensorflow:
                rate = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
                params[n] = params[n] - rate * m[n] / (np.sqrt(v[n]) + eps)
            else:
                m_hat, v_hat = m[n] / (1 - b1**t), v[n] / (1 - b2**t)
                params[n] = params[n] - lr * m_hat / (np.sqrt(v_hat) + eps)
        out.append(params)
    return out


def clip_together(g, bound):
    norm = np.sqrt(sum(np.sum(a**2) for a in g.values()))
    return {n: a * min(1, bound / norm) for n, a in g.items()}


@pytest.mark.parametrize("b1, b2, eps", [(0.8, 0.99, 1e-7), (0.9, 0.999, 1e-8), (0.0, 0.9, 1e-3)])
def test_tf_adam_is_tensorflows(b1, b2, eps):
    params, grads = gradients(1, seed=1)[0], gradients(25)
    with jax.enable_x64(True):
        ours = run(optim.tf_adam(0.01, b1=b1, b2=b2, eps=eps), params, grads)
        theirs = numpy_adam(params, grads, 0.01, b1, b2, eps, tensorflow=True)
        for a, b in zip(ours, theirs, strict=True):
            for n in a:
                np.testing.assert_allclose(a[n], b[n], rtol=1e-12, atol=1e-14)


def test_tf_adam_in_float32_knows_its_step_size():
    """1 − β₂ᵗ as written is off by 6e-5 at the first steps; the step would have half of it."""
    tx = optim.tf_adam(1.0, eps=0.0)
    state = tx.init({"w": jnp.zeros(1)})
    m = v = 0.0
    for t, g in enumerate([0.5, -2.0, 1.0, 3.0], start=1):
        updates, state = tx.update({"w": jnp.array([g])}, state)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        want = -np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / np.sqrt(v)
        np.testing.assert_allclose(updates["w"][0], want, rtol=1e-6)


def test_tf_adam_differs_from_optax_where_gradients_are_tiny():
    # At t = 1, optax moves lr·g/(|g|+ε), TensorFlow lr·g/(|g|+ε/√(1−β₂)): 31.6 times the ε.
    g = {"w": jnp.array([1e-7])}
    ours = run(optim.tf_adam(1.0, eps=1e-7), {"w": jnp.zeros(1)}, [g])[0]["w"]
    theirs = run(optax.adam(1.0, eps=1e-7), {"w": jnp.zeros(1)}, [g])[0]["w"]
    np.testing.assert_allclose(-ours[0], 1 / (1 + 1 / np.sqrt(1 - 0.999)), rtol=1e-6)
    np.testing.assert_allclose(-theirs[0], 0.5, rtol=1e-4)


def test_tf_adam_accepts_a_schedule():
    """The first update has the rate of count 0, and each one the next."""
    params, grads = {"w": np.zeros(2)}, [{"w": np.array([1.0, -2.0])}] * 4
    got = run(optim.tf_adam(lambda count: 0.1 / (1 + count)), {"w": jnp.zeros(2)}, grads)
    each = numpy_adam(params, grads, 1.0, 0.9, 0.999, 1e-7, tensorflow=True)
    places = np.array([np.zeros(2), *(p["w"] for p in each)])
    want = np.cumsum(np.diff(places, axis=0) * [[0.1], [0.05], [0.1 / 3], [0.025]], axis=0)
    np.testing.assert_allclose([p["w"] for p in got], want, rtol=1e-5)


@pytest.mark.parametrize("bound", [0.3, 5.0, None])
def test_clipped_adam_clips_all_parameters_together(bound):
    params, grads = gradients(1, seed=1)[0], gradients(25)
    clipped = grads if bound is None else [clip_together(g, bound) for g in grads]
    with jax.enable_x64(True):
        ours = run(optim.clipped_adam(0.01, bound, b1=0.8, b2=0.99), params, grads)
        theirs = numpy_adam(params, clipped, 0.01, 0.8, 0.99, 1e-8, tensorflow=False)
        for a, b in zip(ours, theirs, strict=True):
            for n in a:
                np.testing.assert_allclose(a[n], b[n], rtol=1e-10, atol=1e-14)


def test_clip_by_norm_laws():
    clip = optim.clip_by_norm(2.0)
    for g in gradients(20):
        g = jax.tree.map(jnp.float32, g)
        once, _ = clip.update(g, clip.init(g))
        twice, _ = clip.update(once, clip.init(g))
        for n in g:
            norm = np.linalg.norm(g[n])
            # Each tensor by its own norm; direction kept; nothing happens below the bound.
            expected = g[n] if norm <= 2 else g[n] * (2.0 / norm)
            np.testing.assert_allclose(once[n], expected, rtol=1e-5)
            np.testing.assert_allclose(twice[n], once[n], rtol=1e-6)


def test_clip_by_norm_of_zero_is_zero():
    clip = optim.clip_by_norm(2.0)
    out, _ = clip.update({"w": jnp.zeros(3)}, clip.init(None))
    np.testing.assert_array_equal(out["w"], np.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "clip", [optim.clip_by_norm(1.0), optim.clipped(optax.identity(), 1.0)], ids=["each", "all"]
)
def test_norms_of_16_bits_are_summed_in_float32(clip, dtype):
    """300² is infinite in float16, and anything over infinity is 0."""
    g = {"w": jnp.asarray([300.0, -400.0], dtype)}
    got, _ = clip.update(g, clip.init(g))
    assert got["w"].dtype == dtype
    np.testing.assert_allclose(np.float32(got["w"]), [0.6, -0.8], rtol=jnp.finfo(dtype).eps)
    step, _ = (adam := optim.clipped_adam(0.1)).update(g, adam.init(g))
    np.testing.assert_allclose(np.float32(step["w"]), [-0.1, 0.1], rtol=jnp.finfo(dtype).eps)


@pytest.mark.parametrize("make", [optim.clipped_adam, optim.tf_adam])
def test_optimisers_keep_dtypes(make):
    tx = make(0.1)
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    updates, state = tx.update(params, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    again, _ = tx.update(params, state, params)
    assert jax.tree.map(lambda u: u.dtype, again) == jax.tree.map(lambda p: p.dtype, params)


@pytest.mark.parametrize("make", [optim.clipped_adam, optim.tf_adam])
def test_moments_of_bfloat16_weights_are_those_of_float32(make):
    """A burst, and then small gradients: in bfloat16 the second moment would not fall again."""
    grads = [{"w": np.float32([100.0, -60.0])}] + [{"w": np.float32([0.01, 0.02])}] * 400
    short = [jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), g) for g in grads]
    tx = make(0.1)

    def moments(grads):
        step = jax.jit(tx.update)
        state = tx.init(jax.tree.map(jnp.zeros_like, grads[0]))
        for g in grads:
            updates, state = step(g, state)
        (nu,) = [s.nu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu"))
                 if hasattr(s, "nu")]  # fmt: skip
        return updates["w"], nu["w"]

    (update, nu), (wide_update, wide_nu) = moments(short), moments(grads)
    assert update.dtype == jnp.bfloat16 and nu.dtype == jnp.float32
    np.testing.assert_allclose(nu, wide_nu, rtol=0.01)
    np.testing.assert_allclose(np.float32(update), wide_update, rtol=0.02)


@pytest.mark.parametrize("make", [optim.clipped_adam, optim.tf_adam])
def test_numbers_can_be_injected(make):
    """optax.inject_hyperparams hands all of them in, traced."""
    *grads, params = jax.tree.map(jnp.float32, gradients(6))
    plain, injected = make(0.01, b2=0.99), optax.inject_hyperparams(make)(0.01, b2=0.99)
    want = run(plain, params, grads)
    got = run(injected._replace(update=jax.jit(injected.update)), params, grads)
    for one, other in zip(got, want, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-7)
    none = optax.inject_hyperparams(make)(0.01, b1=0.0)
    got = run(none._replace(update=jax.jit(none.update)), params, grads)[-1]
    want = run(make(0.01, b1=0.0), params, grads)[-1]
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: optim.clipped_adam(-1.0), "learning_rate: got -1.0, expected a finite number > 0"),
        (
            lambda: optim.clipped_adam(None),
            "learning_rate: got None, expected a number > 0 or a sch",
        ),
        (lambda: optim.in_float32(optax.adam), "tx: got .*, expected an optax transformation"),
        (lambda: optim.clipped_adam(0.1, 0.0), "max_norm: got 0.0"),
        (lambda: optim.tf_adam(float("nan")), "learning_rate: got nan"),
        (lambda: optim.clipped_adam(0.1, b1=1.0), "b1: got 1.0, expected 0 <= b1 < 1"),
        (lambda: optim.tf_adam(0.1, b2=-0.1), "b2: got -0.1, expected 0 <= b2 < 1"),
        (lambda: optim.tf_adam(0.1, eps=-1), "eps: got -1, expected a number >= 0"),
        (lambda: optim.clipped(None, 1.0), "tx: got None, expected an optax transformation"),
        (lambda: optim.clip_by_norm(-2), "max_norm: got -2"),
        (lambda: optim.clip_by_norm(None), "max_norm: got None, expected a finite number > 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_defaults_are_the_published_ones():
    """Keras's ε of 1e-7, at a gradient where it shows; optax's Adam behind a bound of 1."""
    params, grads = {"w": np.zeros(1)}, [{"w": np.array([1e-7])}] * 3
    want = numpy_adam(params, grads, 1.0, 0.9, 0.999, 1e-7, tensorflow=True)
    got = run(optim.tf_adam(1.0), {"w": jnp.zeros(1)}, grads)
    np.testing.assert_allclose(got[-1]["w"], want[-1]["w"], rtol=1e-5)
    params, *grads = jax.tree.map(jnp.float32, gradients(4))
    default = run(optim.clipped_adam(0.01), params, grads)
    asked = run(optim.clipped_adam(0.01, 1.0, b1=0.9, b2=0.999, eps=1e-8), params, grads)
    free = run(optim.clipped_adam(0.01, None), params, grads)
    for n in params:
        np.testing.assert_array_equal(default[-1][n], asked[-1][n])
        assert np.any(default[-1][n] != free[-1][n])
