"""LSTM, GRU and RNN, layers and cells, that train in integers: products of codes, gates in float.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1 (the products) and
table 5 (recurrent networks). The equations of the gates are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..integer.engine_step import SharedWeight
from .integer_layers import IntegerLayerOfSeveral, integer_form

State = tuple[Tensor, ...]  # (h,) or (h, c), each (rows, features)
Gates = Callable[[Tensor, Tensor, State], State]


def _lstm(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_hidden).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    (r, z, n), (hr, hz, hn) = from_input.chunk(3, dim=-1), from_hidden.chunk(3, dim=-1)
    z = (z + hz).sigmoid()
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * state[0],)


def _tanh(from_input: Tensor, from_hidden: Tensor, _state: State) -> State:
    return ((from_input + from_hidden).tanh(),)


def _relu(from_input: Tensor, from_hidden: Tensor, _state: State) -> State:
    return ((from_input + from_hidden).relu(),)


GATES: dict[str, Gates] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


class _Recurrent(IntegerLayerOfSeveral):
    """What layers and cells share: the initial state, checked."""

    state_names: ClassVar[tuple[str, ...]] = ("h0",)
    input_size: int
    hidden_size: int

    def _given(self, hx: Any) -> State:
        """The initial state as a tuple; ValueError if it is none."""
        names = self.state_names
        given = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if len(given) != len(names) or not all(isinstance(part, Tensor) for part in given):
            kinds = ", ".join(type(part).__name__ for part in given)
            raise ValueError(f"{self.label}: hx must be {' and '.join(names)}, each a Tensor, got ({kinds})")
        return given

    def _checked(self, state: State, shapes: Sequence[tuple[int, ...]]) -> State:
        for part, name, shape in zip(state, self.state_names, shapes, strict=True):
            if tuple(part.shape) != shape:
                raise ValueError(f"{self.label}: {name} must be {shape}, got {tuple(part.shape)}")
        return tuple(self._guarded(part) for part in state)

    def _result(self, state: State) -> Any:
        return state if len(self.state_names) > 1 else state[0]


# --- cells ------------------------------------------------------------------------------------------------------------


class _IntegerCell(_Recurrent):
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Any  # Parameter or None
    bias_hh: Any

    def _product_names(self) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"

    def _gates(self) -> Gates:
        raise NotImplementedError(f"{type(self).__name__} must name its gates")

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{self.label}: input must be (batch, {self.input_size}) or ({self.input_size},), "
                f"got {tuple(input.shape)}"
            )
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            state: State = tuple(input.new_zeros(shape) for _ in self.state_names)
        else:
            state = self._checked(self._given(hx), [shape] * len(self.state_names))
        from_input = self._product("weight_ih", input, self.weight_ih, self.bias_ih)
        from_hidden = self._product("weight_hh", state[0], self.weight_hh, self.bias_hh)
        return self._result(self._gates()(from_input, from_hidden, state))


@integer_form(nn.LSTMCell)
class IntegerLSTMCell(_IntegerCell, nn.LSTMCell):
    """`torch.nn.LSTMCell` in integers: (batch, in), (h, c) -> (h, c); unbatched too; see `IntegerLayer`.

    Products "weight_ih" (input) and "weight_hh" (hidden state), each with ranges and streams of its own; the gates are
    float. ValueError for shapes that do not fit.
    """

    state_names = ("h0", "c0")

    def _gates(self) -> Gates:
        return _lstm


@integer_form(nn.GRUCell)
class IntegerGRUCell(_IntegerCell, nn.GRUCell):
    """`torch.nn.GRUCell` in integers: (batch, in), h -> h; as `IntegerLSTMCell`."""

    def _gates(self) -> Gates:
        return _gru


@integer_form(nn.RNNCell)
class IntegerRNNCell(_IntegerCell, nn.RNNCell):
    """`torch.nn.RNNCell` in integers, tanh or ReLU: (batch, in), h -> h; as `IntegerLSTMCell`."""

    def _gates(self) -> Gates:
        return GATES[f"RNN_{self.nonlinearity.upper()}"]


# --- layers over sequences --------------------------------------------------------------------------------------------


class _IntegerRNN(_Recurrent):
    mode: str
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _flat_weights_names: list[str]

    def _product_names(self) -> tuple[str, ...]:
        return tuple(name for name in self._flat_weights_names if name.startswith("weight"))

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Output and final state, of torch's shapes.

        Args:
            input: (steps, batch, in), (batch, steps, in) if batch_first, (steps, in), or a PackedSequence.
            hx: the initial state, h0 or (h0, c0), as torch's; None for zeros.

        Raises:
            ValueError: shapes that do not fit; no steps; what `integer_linear` raises.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            order = "batch, steps" if self.batch_first else "steps, batch"
            raise ValueError(
                f"{self.label}: input must be ({order}, {self.input_size}) or (steps, {self.input_size}), "
                f"got {tuple(input.shape)}"
            )
        batched = input.dim() == 3
        state = None if hx is None else self._given(hx)
        if not batched:
            input = input.unsqueeze(1)
            state = None if state is None else tuple(part.unsqueeze(1) for part in state)
        turned = batched and self.batch_first
        steps_first = input.transpose(0, 1) if turned else input
        steps, batch = steps_first.shape[:2]
        if steps == 0:
            raise ValueError(f"{self.label}: input {tuple(input.shape)} has no steps")
        initial = self._initial(state, input, batch)
        rows, final = self._layers(steps_first.reshape(steps * batch, self.input_size), [batch] * steps, initial)
        output = rows.reshape(steps, batch, rows.shape[-1])
        if not batched:
            return output.squeeze(1), self._result(tuple(part.squeeze(1) for part in final))
        return output.transpose(0, 1) if turned else output, self._result(final)

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        if input.data.dim() != 2 or input.data.shape[-1] != self.input_size:
            raise ValueError(
                f"{self.label}: the data of a packed input must be (elements, {self.input_size}), "
                f"got {tuple(input.data.shape)}"
            )
        sizes = input.batch_sizes.tolist()
        state = self._initial(None if hx is None else self._given(hx), input.data, sizes[0])
        if input.sorted_indices is not None:
            state = tuple(part.index_select(1, input.sorted_indices) for part in state)
        rows, final = self._layers(input.data, sizes, state)
        if input.unsorted_indices is not None:
            final = tuple(part.index_select(1, input.unsorted_indices) for part in final)
        packed = PackedSequence(rows, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return packed, self._result(final)

    def _initial(self, state: State | None, data: Tensor, batch: int) -> State:
        count = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: len(self.state_names)]
        shapes = [(count, batch, width) for width in widths]
        if state is None:
            return tuple(data.new_zeros(shape) for shape in shapes)
        return self._checked(state, shapes)

    def _layers(self, data: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """All layers on rows sorted by step, sizes[t] of them at step t: rows of the last layer, and final states."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                data = F.dropout(data, self.dropout, self.training)
            outputs = []
            for suffix in suffixes:
                initial = tuple(part[len(finals)] for part in state)
                rows, final = self._direction(f"l{layer}{suffix}", data, sizes, initial, bool(suffix))
                outputs.append(rows)
                finals.append(final)
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _direction(
        self, tail: str, data: Tensor, sizes: list[int], initial: State, backward: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction. Sequences are sorted by length, so those still running are the first rows."""
        from_input = self._weighted("ih", tail, data).split(sizes)
        hidden, projection = SharedWeight(), SharedWeight()
        outputs: list[Tensor] = []
        ended: list[State] = []
        state = tuple(part[: sizes[-1]] for part in initial) if backward else initial
        for step in reversed(range(len(sizes))) if backward else range(len(sizes)):
            rows, size = state[0].shape[0], sizes[step]
            if size > rows:  # backward: sequences that end at this step begin here
                state = tuple(torch.cat((part, late[rows:size])) for part, late in zip(state, initial, strict=True))
            elif size < rows:
                ended.append(tuple(part[size:] for part in state))
                state = tuple(part[:size] for part in state)
            state = GATES[self.mode](from_input[step], self._weighted("hh", tail, state[0], hidden), state)
            if self.proj_size:
                state = (self._weighted("hr", tail, state[0], projection), *state[1:])
            outputs.append(state[0])
        if backward:
            outputs.reverse()
        if ended:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
        return torch.cat(outputs), state

    def _weighted(self, kind: str, tail: str, x: Tensor, shared: SharedWeight | None = None) -> Tensor:
        name = f"weight_{kind}_{tail}"
        return self._product(name, x, getattr(self, name), getattr(self, f"bias_{kind}_{tail}", None), shared)


@integer_form(nn.LSTM)
class IntegerLSTM(_IntegerRNN, nn.LSTM):
    """`torch.nn.LSTM` in integers, with all its options; see `IntegerLayer`.

    Products are called by the names of their weights, and each has ranges and streams of its own. The product of a
    layer's input takes all time steps at once, as torch's does: its activation, and in the backward pass its gradient,
    have one range over time, so what a step gets depends on the steps after it, too. The product of the hidden state,
    and the projection of `proj_size`, have a range a step. The gates, the cell state and the sums are float, in the
    wider dtype of input and weights, and are kept in float for the backward pass. A packed sequence has no padding to
    widen ranges.

    Under on_nonfinite "skip" the gradients of initial states are 0 in steps that are skipped.
    """

    state_names = ("h0", "c0")


@integer_form(nn.GRU)
class IntegerGRU(_IntegerRNN, nn.GRU):
    """`torch.nn.GRU` in integers, with all its options; as `IntegerLSTM`."""


@integer_form(nn.RNN)
class IntegerRNN(_IntegerRNN, nn.RNN):
    """`torch.nn.RNN` in integers, tanh or ReLU, with all its options; as `IntegerLSTM`."""
