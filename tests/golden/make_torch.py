"""Golden vectors from PyTorch: ``nn.LSTM`` and ``nn.LSTMCell`` in float64 on the CPU."""

import numpy as np
import torch
from golden import write
from problem import GRID, HIDDEN, LENGTHS, PROJECTION, SEED, problem, target, versions
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

STEPS = 20
ADAM = {"optimizer": "adam", "learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
CLIPPED = {**ADAM, "clip_norm": 0.15, "clip_eps": 1e-6}  # gradient · min(1, clip_norm/(norm + eps))


def tensors(tree):
    """Nested dicts of arrays as leaves to differentiate with respect to."""
    if isinstance(tree, dict):
        return {name: tensors(value) for name, value in tree.items()}
    return torch.tensor(tree, requires_grad=True)


def arrays_of(tree, take):
    """``take`` of every tensor in nested dicts, as NumPy arrays."""
    if isinstance(tree, dict):
        return {name: arrays_of(value, take) for name, value in tree.items()}
    return take(tree).detach().numpy().copy()


def run(module, x, state, lengths=None):
    """x [T, B, D], {"0": {"h", "c"}, …} -> (hs [T, B, ·], final states)."""
    if isinstance(module, nn.LSTMCell):
        h, c, hs = state["0"]["h"], state["0"]["c"], []
        for x_t in x:
            h, c = module(x_t, (h, c))
            hs.append(h)
        return torch.stack(hs), {"0": {"h": h, "c": c}}
    h, c = (torch.stack([part[name] for part in state.values()]) for name in "hc")
    if lengths is None:
        hs, (h, c) = module(x, (h, c))
    else:
        packed = pack_padded_sequence(x, torch.from_numpy(lengths), enforce_sorted=False)
        hs, (h, c) = module(packed, (h, c))
        hs, _ = pad_packed_sequence(hs, total_length=len(x))
    return hs, {n: {"h": h[int(n)], "c": c[int(n)]} for n in state}


def record(module, arrays):
    """Adds the outputs and the gradients to the arrays of a case."""
    x, state, weights = (
        tensors(arrays["x"]),
        tensors(arrays["state"]),
        dict(module.named_parameters()),
    )
    hs, final = run(module, x, state, arrays.get("lengths"))
    loss = torch.sum(torch.from_numpy(arrays["loss"]["hs"]) * hs)
    for n, part in final.items():
        for name in "hc":
            loss = loss + torch.sum(torch.from_numpy(arrays["loss"][n][name]) * part[name])
    loss.backward()
    grad = arrays_of({"weights": weights, "x": x, "state": state}, lambda tensor: tensor.grad)
    outputs = arrays_of({"hs": hs, "final": final}, lambda tensor: tensor)
    return {**arrays, **outputs, "grad": grad}


def train(module, arrays, settings):
    """Twenty steps on mean((hs − target)²)."""
    weights = list(module.parameters())
    if settings["optimizer"] == "adam":
        optimizer = torch.optim.Adam(
            weights, settings["learning_rate"], (settings["b1"], settings["b2"]), settings["eps"]
        )
    else:
        optimizer = torch.optim.SGD(weights, settings["learning_rate"])
    goal, clip, losses, norms = target(arrays), settings.get("clip_norm"), [], []
    x, state = tensors(arrays["x"]), tensors(arrays["state"])
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.mean((run(module, x, state)[0] - torch.from_numpy(goal)) ** 2)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(weights, np.inf if clip is None else clip)))
        losses.append(loss.item())
        optimizer.step()
    # Adam does not see a gradient that is always scaled alike, so only some steps may be clipped.
    assert clip is None or min(norms) < clip < max(norms), (min(norms), max(norms))
    weights = arrays_of(dict(module.named_parameters()), lambda tensor: tensor)
    return {"target": goal, "loss": np.array(losses), "weights": weights}


def case(name, *, cell=nn.LSTM, settings=None, sizes=None, **options):
    """One case: (arrays, manifest entry)."""
    module = cell(3, HIDDEN, **options).double()
    width = options.get("proj_size", HIDDEN)
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    states = [[(width, HIDDEN)] * directions] * layers
    arrays = problem(name, module.state_dict(), states, **(sizes or {}))
    weights = {key: torch.from_numpy(value) for key, value in arrays["weights"].items()}
    module.load_state_dict(weights)
    arrays = record(module, arrays)
    stack = "layer" if layers == directions == 1 else "stack"
    entry = {"load": "torch", "stack": stack, "options": {}}
    if settings is not None:
        arrays["train"], entry["train"] = train(module, arrays, settings), settings
    return arrays, entry


def main():
    torch.set_num_threads(1)
    two, both, padded = {"num_layers": 2}, {"bidirectional": True}, {"sizes": {"lengths": LENGTHS}}
    projected = {"proj_size": PROJECTION}
    cases = {
        "plain": {},
        **{name: {"sizes": {"steps": t, "batch": b}} for name, (t, b) in GRID.items()},
        "no_bias": {"bias": False},
        "projection": projected,
        "cell": {"cell": nn.LSTMCell},
        "lengths": padded,
        "two_layers": two,
        "bidirectional": both,
        "bidirectional_lengths": {**both, **padded},
        "two_layers_bidirectional": {**two, **both},
        "two_layers_bidirectional_projection_lengths": {**two, **both, **projected, **padded},
        "train_adam": {"settings": ADAM},
        "train_sgd": {"settings": {"optimizer": "sgd", "learning_rate": 0.5}},
        "train_adam_clip": {"settings": CLIPPED},
    }
    made = {name: case(name, **options) for name, options in cases.items()}
    found = versions("numpy", "torch")
    write("torch", made, script="make_torch.py", versions=found, seed=SEED)


if __name__ == "__main__":
    main()
