"""Figures hold the data they were given, and nothing of pyplot; animations appear whole or not."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lstmjax import plots

T = np.linspace(1.0, 3.0, 20)


def line(axes, label):
    (found,) = (item for item in axes.get_lines() if item.get_label() == label)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def legend_is_in_the_way(figure, axes):
    """Whether the legend covers any part of the axes, where lines may be, or of the title."""
    figure.canvas.draw()
    text = axes.get_title(loc="left")
    (title,) = axes.findobj(lambda item: hasattr(item, "get_text") and item.get_text() == text)
    legend = axes.get_legend().get_window_extent()
    covers_data = legend.y0 < axes.get_window_extent().y1 - 1
    return covers_data or legend.y1 > title.get_window_extent().y0 + 1


def test_learning_curve_draws_every_curve():
    x, a = np.arange(1, 6), np.array([0.5, 0.3, np.nan, 0.2, 0.1])
    curves = {"train": (x, a), "validation": (x, a + 1), "test": (x, a + 2), "fourth": (x, a + 3)}
    figure = plots.learning_curve("IMDB (offline)", curves, "loss", xlabel="epoch", logy=True)
    (axes,) = figure.axes
    for label, (_, y) in curves.items():
        np.testing.assert_array_equal(line(axes, label)[0], x)
        np.testing.assert_array_equal(line(axes, label)[1], y)
    assert axes.get_title(loc="left") == "IMDB (offline)"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("epoch", "loss", "log")
    assert not legend_is_in_the_way(figure, axes)
    styles = {(item.get_color(), item.get_linestyle()) for item in axes.get_lines()}
    assert len(styles) == 4 and len({style for _, style in styles}) == 4


def test_learning_curve_of_one_curve_or_of_nothing_positive():
    figure = plots.learning_curve("t", {"a": ([1, 2], [0.0, -1.0])}, "y", logy=True)
    assert figure.axes[0].get_yscale() == "linear" and figure.axes[0].get_legend() is None
    with pytest.raises(ValueError, match="curves: got none, expected at least one"):
        plots.learning_curve("t", {}, "y")
    with pytest.raises(ValueError, match=r"curves: got \(2,\) and \(3,\) for 'a', expected \[N\]"):
        plots.learning_curve("t", {"a": ([1, 2], [1, 2, 3])}, "y")


def test_sin_fit_draws_target_and_prediction():
    figure = plots.sin_fit(T, np.cos(T), np.sin(T), "cos from sin (generated)", 180)
    (axes,) = figure.axes
    np.testing.assert_array_equal(line(axes, "target"), (T, np.cos(T)))
    np.testing.assert_array_equal(line(axes, "prediction"), (T, np.sin(T)))
    assert axes.get_title(loc="left") == "cos from sin (generated), update 180"
    assert axes.get_ylim() == (-1.2, 1.2) and axes.get_xlim() == (1.0, 3.0)
    assert not legend_is_in_the_way(figure, axes)


def test_forecast_shows_the_error():
    known, future = np.arange(5.0), np.arange(5.0, 12.0)
    truth = np.sin(future)
    error = np.array([0.0, 1e-4, -2e-4, 1e-3, 3e-3, -1e-2, 5e-2])
    predictions = {"window": truth + error, "carried": truth, "linear": truth + 2 * error}
    figure = plots.forecast(known, np.sin(known), future, truth, predictions, "sin (generated)")
    upper, lower = figure.axes
    np.testing.assert_array_equal(line(upper, "known"), (known, np.sin(known)))
    np.testing.assert_array_equal(line(upper, "window"), (future, truth + error))
    window, carried, linear, _ = (np.asarray(item.get_ydata()) for item in lower.get_lines())
    assert np.isnan(window[0]) and np.isnan(carried).all()
    np.testing.assert_allclose(window[1:], np.abs(error[1:]), rtol=1e-10)
    np.testing.assert_allclose(linear[1:], 2 * np.abs(error[1:]), rtol=1e-10)
    assert lower.get_yscale() == "log" and upper.get_title(loc="left") == "sin (generated)"
    assert not legend_is_in_the_way(figure, upper)
    with pytest.raises(ValueError, match=r"predictions: got \(6,\) for 'a', expected \(7,\)"):
        plots.forecast(known, known, future, truth, {"a": truth[1:]}, "t")
    with pytest.raises(ValueError, match="predictions: got none"):
        plots.forecast(known, known, future, truth, {}, "t")


def draw(axes, frame):
    plots.draw_sin_fit(axes, T, np.cos(T), np.cos(T) * frame, "cos", int(10 * frame))


def test_animation_has_every_frame_and_repeats(tmp_path):
    path = plots.save_animation([0.1, 0.5, 0.9], tmp_path / "fit.gif", draw, fps=10)
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("GIF", 3)
        assert (image.info["loop"], image.info["duration"]) == (0, 100)
        frames = []
        for i in range(3):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB"), float))
    assert frames[0].shape == (324, 630, 3)
    # Blue pixels are the prediction's: they move, and the frame around the axes does not.
    blue = [np.argwhere((f[..., 2] > 140) & (f[..., 0] < 60))[:, 0].mean() for f in frames]
    assert len({round(row) for row in blue}) == 3
    assert (np.abs(frames[2] - frames[0])[:, :50].max(), frames[0].std() > 10) == (0, True)


def test_a_failed_animation_leaves_nothing_behind(tmp_path, monkeypatch):
    old = tmp_path / "fit.gif"
    old.write_bytes(b"old")

    def full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            plots.save_animation([0.1], old, draw)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.gif"] and old.read_bytes() == b"old"
    with pytest.raises(ValueError, match="path: got 'fit.png', expected a name that ends in .gif"):
        plots.save_animation([0.1], tmp_path / "fit.png", draw)
    with pytest.raises(ValueError, match="frames: got none"):
        plots.save_animation([], tmp_path / "new.gif", draw)


def test_live_plot_without_a_display_says_so():
    message = "--live: got no window, expected a display and a window toolkit"
    with pytest.raises(ValueError, match=message):
        plots.LivePlot(draw)
    assert matplotlib.pyplot.get_fignums() == []


WINDOW = """
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, FigureManagerBase

class FigureManager(FigureManagerBase):
    def show(self):
        print("shown")

class FigureCanvas(FigureCanvasAgg):
    required_interactive_framework = "headless"
    manager_class = FigureManager
    def draw_idle(self):
        self.draw()
    def flush_events(self):
        (axes,) = self.figure.axes
        print("drawn", len(axes.get_lines()), axes.get_title(loc="left"))
"""


def test_live_plot_draws_into_its_window_until_it_is_closed(tmp_path):
    """With a stand-in for a window toolkit, in a process of its own."""
    (tmp_path / "window.py").write_text(WINDOW)
    program = """
import os, sys
sys.path.insert(0, os.environ["STAND_IN"])
from lstmjax import plots
import test_plots
live = plots.LivePlot(test_plots.draw)
live.show(0.5)
live.show(0.7)
live.close()
live.show(0.9)
"""
    folders = [str(plots.Path(plots.__file__).parents[1]), str(plots.Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env={**plots.os.environ, "MPLBACKEND": "module://window", "STAND_IN": str(tmp_path),
             "PYTHONPATH": plots.os.pathsep.join([*folders, str(tmp_path)]), "DISPLAY": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn = "drawn 2 cos, update 5\ndrawn 2 cos, update 7\n"
    assert done.stdout == f"shown\n{drawn}"


def test_figures_do_not_touch_pyplot():
    program = """
import sys
from lstmjax import plots
plots.sin_fit([1, 2], [1, 2], [1, 2], "t", 0)
print("matplotlib.pyplot" in sys.modules)
"""
    path = {"PYTHONPATH": str(plots.Path(plots.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**plots.os.environ, **path})  # fmt: skip
    assert done.stdout == "False\n", done.stderr
