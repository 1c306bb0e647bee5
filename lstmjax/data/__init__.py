"""The data sets: one file each, NumPy arrays out, every split with its hash.

| call                                     | what                                    |
|------------------------------------------|-----------------------------------------|
| `sin.stateful_batches`, `sin.forecast_windows` | the two sine tasks                |
| `imdb.load`                              | film reviews as word ids                |
| `mnist.load`                             | digits as rows, pixels, permuted pixels |
| `long_lag.adding`, …                     | adding, temporal order and copy problems |
| `streams.bits`, `characters.load`        | streams whose needed memory is known    |

Importing this package loads neither tensorflow-datasets nor matplotlib.
"""

from lstmjax.data import imdb, mnist, sin
from lstmjax.data.dataset import DataError, Dataset

__all__ = ["DataError", "Dataset", "imdb", "mnist", "sin"]
