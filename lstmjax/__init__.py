"""LSTMs as pure functions in JAX."""

from lstmjax.dropout import dropout, variational_dropout
from lstmjax.gru import GRUParams, GRUState, gru, gru_step, init_gru
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
    "RNNParams",
    "RNNState",
    "TrainState",
    "bidirectional",
    "clip_by_norm",
    "clipped_adam",
    "dropout",
    "gru",
    "gru_step",
    "init_gru",
    "init_lstm",
    "init_rnn",
    "init_state",
    "lstm",
    "lstm_step",
    "make_eval_step",
    "make_train_step",
    "rnn",
    "rnn_step",
    "stack",
    "tf_adam",
    "variational_dropout",
]
