"""LSTMs as pure functions in JAX."""

from lstmjax.bptt import depths, window_start
from lstmjax.dropout import (
    Noise,
    dropout,
    embedding_dropout,
    locked_dropout,
    recurrent_noise,
    variational_dropout,
    weight_drop,
    word_dropout,
)
from lstmjax.gru import GRUParams, GRUState, gru, gru_step, init_gru
from lstmjax.initializers import chrono, log_uniform, uniform_gate
from lstmjax.lstm import LSTMParams, LSTMState, init_lstm, lstm, lstm_step
from lstmjax.optim import clip_by_norm, clipped_adam, tf_adam
from lstmjax.recurrence import Bidirectional, bidirectional, stack
from lstmjax.rnn import RNNParams, RNNState, init_rnn, rnn, rnn_step
from lstmjax.train import TrainState, init_state, make_eval_step, make_train_step

__version__ = "0.1.0"

__all__ = [
    "Bidirectional",
    "GRUParams",
    "GRUState",
    "LSTMParams",
    "LSTMState",
    "Noise",
    "RNNParams",
    "RNNState",
    "TrainState",
    "bidirectional",
    "chrono",
    "clip_by_norm",
    "clipped_adam",
    "depths",
    "dropout",
    "embedding_dropout",
    "gru",
    "gru_step",
    "init_gru",
    "init_lstm",
    "init_rnn",
    "init_state",
    "locked_dropout",
    "log_uniform",
    "lstm",
    "lstm_step",
    "make_eval_step",
    "make_train_step",
    "recurrent_noise",
    "rnn",
    "rnn_step",
    "stack",
    "tf_adam",
    "uniform_gate",
    "variational_dropout",
    "weight_drop",
    "window_start",
    "word_dropout",
]
