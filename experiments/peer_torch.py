"""Reviews and digits in PyTorch: peers.py --framework torch.

They are written as PyTorch's users write them: modules, Adam, a plain loop over batches of tensors
that lie in memory, nothing compiled, a thread per core. Two things differ from the programs in
other frameworks, and are left as PyTorch has them or cannot be had otherwise:

- nn.LSTM adds two biases, where others have one. The second one stays zero and is not trained:
  trained, the two would move twice as far as one.
- Adam's ε is added after the bias correction of the second moment, in Keras and in ours before it
  (``lstmjax.optim.tf_adam``), where it weighs up to 1/√(1 − β₂) = 31.6 times as much in the first
  updates. It shows where gradients are tiny.
"""

if __name__ == "__main__":  # before PyTorch is imported, which may be missing
    import peers

    peers.no_script(__file__)

import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peer_tasks
import torch
from peer_tasks import Metrics, Result, score_epochs
from torch import Tensor, nn
from torch.nn import functional as F

from lstmjax.train import Clock

Splits = dict[str, tuple[Tensor, Tensor]]  # split → inputs, labels


def load(seed: int) -> dict[str, str]:
    """Seeds PyTorch and gives it a thread per core; returns its version."""
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    torch.manual_seed(seed)
    return {"torch": torch.__version__}


# ---- models -------------------------------------------------------------------------------------


def one_bias(layer: nn.LSTM) -> nn.LSTM:
    """The layer with biases of 0, but 1 of the forget gate, and with only the first one trained."""
    hidden = layer.hidden_size
    nn.init.zeros_(layer.bias_ih_l0)
    nn.init.ones_(layer.bias_ih_l0[hidden : 2 * hidden])  # gates i, f, g, o
    nn.init.zeros_(layer.bias_hh_l0).requires_grad_(False)
    return layer


def dropped(xs: Tensor, rate: float, training: bool) -> Tensor:
    """Drops features of xs [B, T, F], the same at all steps: one mask for each review."""
    return xs * F.dropout(torch.ones_like(xs[:, :1]), rate, training) if training else xs


class Reviews(nn.Module):
    """Two LSTMs(64) on embedded words: ids int64 [B, T] → logits [B]; Keras's initial laws."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10_000, 100)
        self.first = one_bias(nn.LSTM(100, 64, batch_first=True))
        self.second = one_bias(nn.LSTM(64, 64, batch_first=True))
        self.head = nn.Linear(64, 1)
        nn.init.uniform_(self.embed.weight, -0.05, 0.05)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight_ih_l0)
            nn.init.orthogonal_(layer.weight_hh_l0)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        hs, _ = self.first(dropped(self.embed(ids), 0.2, self.training))
        _, (h, _) = self.second(dropped(hs, 0.2, self.training))
        return self.head(h[-1]).squeeze(-1)


class Digits(nn.Module):
    """LSTM(100) over rows of pixels: [B, 28, 28] → logits [B, 10]; TensorFlow 1's initial laws."""

    def __init__(self):
        super().__init__()
        self.lstm = one_bias(nn.LSTM(28, 100, batch_first=True))
        self.head = nn.Linear(100, 10)
        limit = math.sqrt(6 / (28 + 100 + 400))  # of [w_x; w_h] as one matrix, [D + H, 4H]
        nn.init.uniform_(self.lstm.weight_ih_l0, -limit, limit)
        nn.init.uniform_(self.lstm.weight_hh_l0, -limit, limit)
        nn.init.trunc_normal_(self.head.weight, std=0.1, a=-0.2, b=0.2)
        nn.init.constant_(self.head.bias, 0.1)

    def forward(self, rows: Tensor) -> Tensor:
        _, (h, _) = self.lstm(rows)
        return self.head(h[-1])


def double_softmax(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the logits' softmax taken for logits: the source's mistake."""
    return F.cross_entropy(logits.softmax(-1), label)


# ---- training -----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What is trained, and how.

    Attributes:
      model: a module.
      loss: ``loss(logits, label)``, the mean over a batch.
      right: ``right(logits, label)``, which of a batch are told correctly, [B].
      adam: the optimiser.
      batch_size: examples in a batch.
      drop_remainder: whether those that do not fill a last batch sit out the epoch.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], Tensor]
    adam: torch.optim.Adam
    batch_size: int
    drop_remainder: bool = False


def shuffled(x: Tensor, y: Tensor, batch_size: int, drop_remainder: bool) -> Iterator:
    """Batches of x [N, ...] and y [N], all rows in a new order every time."""
    for rows in torch.randperm(len(y)).split(batch_size):
        if len(rows) == batch_size or not drop_remainder:
            yield x[rows], y[rows]


def timed(clock: Clock, name: str, run: Callable, batches: Iterable) -> list:
    """``run`` of every batch, on the clock: the first one ever is "compile", the rest ``name``."""
    found, batches = [], iter(batches)
    if clock.seconds[name] == 0:
        with clock("compile"):
            found.append(run(*next(batches)))
    with clock(name):
        found += [run(*batch) for batch in batches]
    return found


def means(found: list[tuple[float, int, int]]) -> dict[str, float]:
    """Of (mean loss, right ones, examples) of every batch: the means over all examples."""
    count = sum(n for *_, n in found)
    loss = sum(loss * n for loss, _, n in found) / count
    return {"loss": loss, "accuracy": sum(right for _, right, _ in found) / count}


def fit_and_score(
    problem: Problem, splits: Splits, epochs: int, test_every_epoch: bool, clock: Clock
) -> Metrics:
    """Trains and scores."""
    model, loss_of, right, adam, *how = problem

    def learn(x, y):
        adam.zero_grad()
        logits = model(x)
        loss = loss_of(logits, y)
        loss.backward()
        adam.step()
        return loss.item(), int(right(logits, y).sum()), len(y)

    @torch.no_grad()
    def score(x, y):
        logits = model(x)
        return loss_of(logits, y).item(), int(right(logits, y).sum()), len(y)

    def train():
        model.train()
        return means(timed(clock, "train", learn, shuffled(*splits["train"], *how)))

    def evaluate(split):
        model.train(False)
        x, y = splits[split]
        return means(timed(clock, "eval", score, zip(x.split(500), y.split(500), strict=True)))

    return score_epochs(epochs, train, evaluate, splits, test_every_epoch, clock)


# ---- programs -----------------------------------------------------------------------------------


def in_torch(splits: peer_tasks.Arrays, inputs: Any, labels: Any) -> Splits:
    """The arrays as tensors of these NumPy types."""
    return {
        name: (torch.from_numpy(x.astype(inputs)), torch.from_numpy(y.astype(labels)))
        for name, (x, y) in splits.items()
    }


def reviews_problem() -> Problem:
    """Fresh weights, and Keras's numbers for Adam."""
    model = Reviews()
    adam = torch.optim.Adam(trained(model), lr=1e-3, eps=1e-7)
    loss = F.binary_cross_entropy_with_logits
    return Problem(model, loss, lambda z, y: (z > 0) == (y > 0), adam, 128, drop_remainder=True)


def digits_problem(as_published: bool) -> Problem:
    """Fresh weights, and TensorFlow 1's numbers for Adam."""
    model = Digits()
    adam = torch.optim.Adam(trained(model), lr=1e-4, eps=1e-8)
    loss = double_softmax if as_published else F.cross_entropy
    return Problem(model, loss, lambda z, y: z.argmax(-1) == y, adam, 50)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weights for weights in model.parameters() if weights.requires_grad]


def learn_reviews(config: Any, clock: Clock, *, as_published: bool = False) -> Result:
    """Two LSTMs(64) on the last 80 words."""
    dataset, splits = peer_tasks.reviews(config, as_published)
    splits, epochs = in_torch(splits, np.int64, np.float32), peer_tasks.REVIEW_EPOCHS
    return dataset, fit_and_score(reviews_problem(), splits, epochs, as_published, clock)


def learn_digits(config: Any, clock: Clock, *, as_published: bool) -> Result:
    """LSTM(100) over 28 rows; as published, the loss takes softmax of the softmax."""
    dataset, splits = peer_tasks.digits(config)
    splits, epochs = in_torch(splits, np.float32, np.int64), peer_tasks.DIGIT_EPOCHS
    return dataset, fit_and_score(digits_problem(as_published), splits, epochs, as_published, clock)


PROGRAMS = {
    "imdb-tf2": learn_reviews,
    "imdb-tf2-source": partial(learn_reviews, as_published=True),
    "mnist-tf1": partial(learn_digits, as_published=True),
    "mnist-corrected": partial(learn_digits, as_published=False),
}
