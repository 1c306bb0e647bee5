"""Every figure. Functions take arrays and return a matplotlib Figure that belongs to nobody else.

No figure here goes through pyplot, whose global state would leak from one run into the next; the
one exception is `LivePlot`, which needs a window. Colours are those of Okabe and Ito (2008), which
colour-blind readers can tell apart; lines differ in their dashes too, for print.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_INK, _GRID = "#222222", "#E3E3E3"


def learning_curve(
    title: str,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ylabel: str,
    *,
    xlabel: str = "update",
    logy: bool = False,
) -> Figure:
    """Losses or accuracies over training.

    Args:
      title: what was trained, and on which data.
      curves: `(x [N], y [N])` by label; NaN leaves a gap.
      ylabel: the quantity, with its unit where it has one.
      xlabel: what `x` counts.
      logy: whether to draw `y` on a logarithmic axis (where it has positive values at all).

    Returns:
      The figure. A curve of up to 20 points is drawn with its points.

    Raises:
      ValueError: there is no curve, or an `x` and its `y` differ in length.
    """
    if not curves:
        raise ValueError("curves: got none, expected at least one")
    figure, (axes,) = _figure(1, height=3.8)
    positive = False
    for i, (label, (x, y)) in enumerate(curves.items()):
        x, y = np.asarray(x, float), np.asarray(y, float)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(
                f"curves: got {x.shape} and {y.shape} for {label!r}, expected [N] both"
            )
        marker = "o" if len(x) <= 20 else None
        axes.plot(x, y, color=_colour(i), linestyle=_dash(i), marker=marker, ms=4, label=label)
        positive |= bool(np.any(y > 0))
    if logy and positive:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half an epoch
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _dress(axes, title, legend=len(curves) > 1)
    return figure


class Band(NamedTuple):
    """A curve of many runs.

    Attributes:
      x: [N].
      values: [S, N], of each run; NaN leaves a gap.
      mean, low, high: [N], their mean and its interval (NaN for none).
    """

    x: ArrayLike
    values: ArrayLike
    mean: ArrayLike
    low: ArrayLike
    high: ArrayLike


def learning_bands(
    title: str,
    curves: Mapping[str, Band],
    ylabel: str,
    *,
    xlabel: str = "update",
    logy: bool = False,
) -> Figure:
    """``learning_curve`` of many runs: their mean, its interval as a band, the runs as faint lines.

    Args:
      title, ylabel, xlabel, logy: as in ``learning_curve``.
      curves: by label.

    Returns:
      The figure. The axis shows all runs, and of a band that is wider what has room.

    Raises:
      ValueError: as ``learning_curve``; ``values`` that do not fit the mean.
    """
    means = {label: (band.x, band.mean) for label, band in curves.items()}
    figure = learning_curve(title, means, ylabel, xlabel=xlabel, logy=logy)
    (axes,) = figure.axes
    for i, (label, (x, values, _, low, high)) in enumerate(curves.items()):
        values = np.asarray(values, float)
        if values.ndim != 2 or values.shape[1:] != np.shape(x):
            shapes = f"got {values.shape} for {label!r}, expected [S, {len(x)}]"
            raise ValueError(f"curves: {shapes}")
        axes.plot(x, values.T, color=_colour(i), linewidth=0.6, alpha=0.35)
        axes.fill_between(x, low, high, color=_colour(i), alpha=0.18, linewidth=0)
        if len(x) == 1:  # neither lines nor bands show at a single place
            axes.vlines(x, low, high, color=_colour(i), linewidth=2)
    # By the runs: the interval of two or three of them can be so wide that it flattens all else.
    drawn = np.concatenate([np.ravel(band.values) for band in curves.values()])
    drawn = drawn[np.isfinite(drawn) & ((drawn > 0) | (not logy))]
    if drawn.size:
        low, high = drawn.min(), drawn.max()
        room = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-12)
        axes.set_ylim((low / 1.5, high * 1.5) if logy else (low - room, high + room))
    return figure


def draw_sin_fit(
    axes: Axes, t: ArrayLike, target: ArrayLike, prediction: ArrayLike, title: str, step: int
) -> None:
    """Draws a target and its prediction into axes: one frame of `save_animation` or `LivePlot`.

    Args:
      axes: empty axes.
      t: times in radians `[T]`.
      target, prediction: values `[T]`.
      title: what was trained, and on which data.
      step: how many updates the prediction comes after.
    """
    axes.plot(t, target, color=COLOURS[1], label="target")
    axes.plot(t, prediction, color=COLOURS[0], linestyle="--", label="prediction")
    axes.set_ylim(-1.2, 1.2)
    axes.set_xlim(float(np.min(t)), float(np.max(t)))
    axes.set_xlabel("t (radians)")
    axes.set_ylabel("value")
    _dress(axes, f"{title}, update {step}")


def sin_fit(
    t: ArrayLike, target: ArrayLike, prediction: ArrayLike, title: str, step: int
) -> Figure:
    """The fit of a sine after `step` updates: `draw_sin_fit` in a figure of its own."""
    figure, (axes,) = _figure(1, height=3.6)
    draw_sin_fit(axes, t, target, prediction, title, step)
    return figure


def forecast(
    t_known: ArrayLike,
    known: ArrayLike,
    t_future: ArrayLike,
    truth: ArrayLike,
    predictions: Mapping[str, ArrayLike],
    title: str,
) -> Figure:
    """A forecast beside the truth, and below it the absolute error on a logarithmic axis.

    Args:
      t_known, known: times in radians and values `[N]` that the forecast starts from.
      t_future, truth: times and true values `[K]` of the steps that are forecast.
      predictions: forecasts `[K]` by label.
      title: what was trained, and on which data.

    Returns:
      The figure, of two axes.

    Raises:
      ValueError: a forecast has not the truth's shape, or there is none.
    """
    truth = np.asarray(truth, float)
    if not predictions:
        raise ValueError("predictions: got none, expected at least one")
    figure, (upper, lower) = _figure(2, height=5.6)
    upper.plot(t_known, known, color="#888888", label="known")
    upper.plot(t_future, truth, color=_INK, linewidth=3, alpha=0.35, label="truth")
    for i, (label, prediction) in enumerate(predictions.items()):
        prediction = np.asarray(prediction, float)
        if prediction.shape != truth.shape:
            shapes = f"got {prediction.shape} for {label!r}, expected {truth.shape}"
            raise ValueError(f"predictions: {shapes}")
        style = {"color": _colour(i), "linestyle": _dash(i + 1)}
        upper.plot(t_future, prediction, label=label, **style)
        error = np.abs(prediction - truth)
        # An error of exactly 0 has no place on a logarithmic axis.
        lower.plot(t_future, np.where(error > 0, error, math.nan), **style)
        if np.any(error > 0):
            lower.set_yscale("log")
    for axes in (upper, lower):
        axes.axvline(float(np.min(t_future)), color="#888888", linewidth=0.8, linestyle=":")
    upper.set_ylabel("value")
    lower.set_ylabel("absolute error")
    lower.set_xlabel("t (radians)")
    _dress(upper, title)
    _dress(lower, "", legend=False)
    return figure


def save_animation(
    frames: Iterable[Any],
    path: str | os.PathLike,
    draw: Callable[[Axes, Any], None],
    *,
    fps: int = 12,
) -> Path:
    """Writes an animated .gif that repeats for ever.

    Args:
      frames: what `draw` needs for each frame; at least one.
      path: the file, ending in .gif; it appears whole or not at all.
      draw: draws a frame into axes that have just been cleared.
      fps: frames a second.

    Returns:
      The path.

    Raises:
      ValueError: there are no frames, or the path does not end in .gif.
      OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".gif":
        raise ValueError(f"path: got {path.name!r}, expected a name that ends in .gif")
    frames = list(frames)
    if not frames:
        raise ValueError("frames: got none, expected at least one")
    figure, (axes,) = _figure(1, height=3.6)
    figure.set_dpi(90)
    images = []
    for frame in frames:
        axes.clear()
        draw(axes, frame)
        figure.canvas.draw()
        # Laid out once, for the first frame: the axes must not jump about afterwards.
        figure.set_layout_engine("none")
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    images = _with_one_palette(images)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options = {"append_images": images[1:], "duration": 1000 // fps, "loop": 0}
    try:
        images[0].save(temporary, format="GIF", save_all=True, **options)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _with_one_palette(images: list[Image.Image]) -> list[Image.Image]:
    """Images of 64 colours, the same ones in each: a palette for each frame would flicker."""
    some = {0, len(images) // 2, len(images) - 1}
    together = Image.fromarray(np.concatenate([np.asarray(images[i]) for i in sorted(some)]))
    palette = together.quantize(64, dither=Image.Dither.NONE)
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


class LivePlot:
    """A window that shows a fit as it is learned (`--live`)."""

    def __init__(self, draw: Callable[[Axes, Any], None]):
        """Opens the window.

        Args:
          draw: as for `save_animation`.

        Raises:
          ValueError: no display, or no window toolkit, is available.
        """
        from matplotlib import pyplot

        try:
            self._figure, self._axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        except ImportError as error:  # the backend that MPLBACKEND asks for cannot be had
            raise ValueError(f"--live: got no window: {error}") from error
        if self._figure.canvas.required_interactive_framework is None:
            pyplot.close(self._figure)
            raise ValueError("--live: got no window, expected a display and a window toolkit")
        self._pyplot = pyplot
        self._draw = draw
        self._figure.show()

    def show(self, frame: Any) -> None:
        """Draws a frame; does nothing once the user has closed the window."""
        if not self._pyplot.fignum_exists(self._figure.number):
            return
        self._axes.clear()
        self._draw(self._axes, frame)
        self._figure.canvas.draw_idle()
        self._figure.canvas.flush_events()

    def close(self) -> None:
        """Closes the window."""
        self._pyplot.close(self._figure)


def _figure(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure, 7 inches wide, of axes below one another with a shared x axis."""
    figure = Figure(figsize=(7, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def _dress(axes: Axes, title: str, legend: bool = True) -> None:
    """Grid, frame, title, and the legend above the axes, where no data can be."""
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    lines = 0
    if legend:
        lines = math.ceil(len(axes.get_legend_handles_labels()[0]) / 3)
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(ncols=3, frameon=False, fontsize="small", **place)
    axes.set_title(title, loc="left", fontsize="medium", color=_INK, pad=8 + 15 * lines)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _dash(i: int) -> str:
    return _DASHES[i % len(_DASHES)]
