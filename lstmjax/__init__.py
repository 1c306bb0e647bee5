"""LSTMs as pure functions in JAX."""

from lstmjax.dropout import dropout, variational_dropout
from lstmjax.gru import GRUParams, GRUState, gru, gru_step, init_gru
from lstmjax.lstm import LSTMParams, LSTMState, init_lstm, lstm, lstm_step
from lstmjax.recurrence import Bidirectional, bidirectional, stack
from lstmjax.rnn import RNNParams, RNNState, init_rnn, rnn, rnn_step

__version__ = "0.1.0"

__all__ = [
    "Bidirectional",
    "GRUParams",
    "GRUState",
    "LSTMParams",
    "LSTMState",
    "RNNParams",
    "RNNState",
    "bidirectional",
    "dropout",
    "gru",
    "gru_step",
    "init_gru",
    "init_lstm",
    "init_rnn",
    "lstm",
    "lstm_step",
    "rnn",
    "rnn_step",
    "stack",
    "variational_dropout",
]
