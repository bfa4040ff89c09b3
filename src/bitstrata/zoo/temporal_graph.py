"""Temporal graph network: memories of nodes, updated by interactions, and predictions of links."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import check_positive


class TimeEncoding(nn.Module):
    """Spans of time, any shape, to (..., width): cos(span * rate + phase), rate and phase learned.

    Rates start at 10^0 .. 10^-9 per unit of time. Parameters and no linear layer, so that it stays in float.

    Source: Xu et al., Inductive representation learning on temporal graphs, 2020.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(10.0 ** -torch.linspace(0, 9, width))
        self.phase = nn.Parameter(torch.zeros(width))

    def forward(self, span: Tensor) -> Tensor:
        return torch.cos(span.to(self.rate.dtype).unsqueeze(-1) * self.rate + self.phase)


class TemporalAttention(nn.Module):
    """Attention of nodes to their latest neighbours: query (B, Q) and neighbours (B, K, N) to (B, width).

    absent: bool (B, K), True where there is no neighbour; a node without any gets zeros before the last projection.
    """

    def __init__(self, queries: int, neighbours: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(queries, width)
        self.key_value = nn.Linear(neighbours, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, neighbours: Tensor, absent: Tensor) -> Tensor:
        q = self.query(query).unflatten(-1, (self.heads, -1))  # (B, heads, d)
        k, v = self.key_value(neighbours).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, K, heads, d)
        scores = torch.einsum("bhd,bkhd->bhk", q, k) * q.shape[-1] ** -0.5
        alone = absent.all(1)
        weights = scores.masked_fill((absent & ~alone[:, None])[:, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("bhk,bkhd->bhd", weights, v).masked_fill(alone[:, None, None], 0)
        return self.out(mixed.flatten(1))


class TemporalGraphNetwork(nn.Module):
    """Predicts which nodes interact, from interactions in the order of time.

    Every node has a memory. An interaction leaves each of its two nodes a message: both memories, the features of the
    interaction, the encoded time since the node's last update. Of several in a batch the last one counts. `nn.GRUCell`
    updates the memory by it. A node's embedding attends to its `neighbours` latest interactions; two linear layers
    score a pair of embeddings.

    A batch is predicted first and learned about later, so a prediction never sees the interaction it predicts:

        positive, negative = model(sources, destinations, others, times)   # gradients reach the updater
        ... backward, optimizer step ...
        model.observe(sources, destinations, times, features)

    `forward` changes nothing. It applies messages that wait, so that the loss reaches the updater; `observe` makes
    these updates last, without gradients, and then leaves the new messages. State is in buffers: `reset` forgets it.

    Args:
        nodes: how many, numbered from 0. features: of an interaction.
        memory, time_width, width: of a memory, an encoded span, an embedding.
        heads: of the attention; a divisor of width. neighbours: latest interactions of a node that it attends to.

    Source: Rossi et al., Temporal graph networks for deep learning on dynamic graphs, 2020 (sections 3.1, 3.2, 4.2; the
    form TGN-attn with one layer); nodes have no features of their own.
    """

    memory: Tensor
    updated: Tensor
    other: Tensor
    event_time: Tensor
    event_features: Tensor
    waiting: Tensor
    near: Tensor
    near_time: Tensor
    near_features: Tensor
    written: Tensor
    now: Tensor

    def __init__(
        self,
        nodes: int,
        features: int,
        *,
        memory: int = 64,
        time_width: int = 32,
        width: int = 64,
        heads: int = 2,
        neighbours: int = 10,
    ) -> None:
        super().__init__()
        check_positive(
            "TemporalGraphNetwork", nodes=nodes, features=features, memory=memory, time_width=time_width, width=width,
            heads=heads, neighbours=neighbours,
        )  # fmt: skip
        if width % heads:
            raise ValueError(f"TemporalGraphNetwork: width {width} is no multiple of {heads} heads")
        self.nodes, self.features, self.neighbours = nodes, features, neighbours
        self.time = TimeEncoding(time_width)
        self.updater = nn.GRUCell(2 * memory + features + time_width, memory)
        self.attention = TemporalAttention(memory + time_width, memory + features + time_width, width, heads)
        self.merge1 = nn.Linear(width + memory, width)
        self.merge2 = nn.Linear(width, width)
        self.score1 = nn.Linear(2 * width, width)
        self.score2 = nn.Linear(width, 1)
        for name, shape, dtype in (
            ("memory", (nodes, memory), torch.float32),
            ("updated", (nodes,), torch.float64),
            ("other", (nodes,), torch.int64),
            ("event_time", (nodes,), torch.float64),
            ("event_features", (nodes, features), torch.float32),
            ("waiting", (nodes,), torch.bool),
            ("near", (nodes, neighbours), torch.int64),
            ("near_time", (nodes, neighbours), torch.float64),
            ("near_features", (nodes, neighbours, features), torch.float32),
            ("written", (nodes,), torch.int64),
            ("now", (), torch.float64),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.reset()

    def reset(self) -> None:
        """Forget all interactions: memories of zeros, no messages, no neighbours; time starts anew."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        self.now.fill_(-torch.inf)

    def forward(self, sources: Tensor, destinations: Tensor, others: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (logits) of each source with its destination and with the other node.

        sources, destinations, others: int64 (B,). times: (B,), ascending, none before the last one observed.

        Returns two (B,). Raises ValueError for other shapes, nodes that do not exist, and times that are not
        finite or run backwards.
        """
        self._check("forward", sources, destinations, times, others)
        embedded = self.embed(torch.cat((sources, destinations, others)), times.repeat(3))
        source, destination, other = embedded.chunk(3)
        pairs = torch.cat((torch.cat((source, destination), 1), torch.cat((source, other), 1)))
        positive, negative = self.score2(self.score1(pairs).relu()).squeeze(1).chunk(2)
        return positive, negative

    def embed(self, nodes: Tensor, times: Tensor) -> Tensor:
        """Embeddings (B, width) of nodes int64 (B,) at times (B,), from what was observed."""
        near, filled = self.near[nodes], torch.arange(self.neighbours, device=nodes.device)
        absent = filled >= self.written[nodes, None]  # slots fill from 0 on
        distinct, where = torch.unique(torch.cat((nodes, near.flatten())), return_inverse=True)
        memory, _ = self._updated(distinct)
        own, theirs = memory[where[: len(nodes)]], memory[where[len(nodes) :]].unflatten(0, tuple(near.shape))
        spans = (times.to(torch.float64)[:, None] - self.near_time[nodes]).masked_fill(absent, 0)
        query = torch.cat((own, self.time(torch.zeros_like(times))), 1)
        read = torch.cat((theirs, self.near_features[nodes], self.time(spans)), 2)
        mixed = self.attention(query, read.masked_fill(absent[..., None], 0), absent)
        return self.merge2(self.merge1(torch.cat((mixed, own), 1)).relu())

    @torch.no_grad()
    def observe(self, sources: Tensor, destinations: Tensor, times: Tensor, features: Tensor) -> None:
        """Learn of interactions that happened: (B,), (B,), (B,) as in `forward`, features (B, features).

        In this order: messages that wait for these nodes are applied for good, then the new messages and neighbours
        are written. Raises ValueError as `forward` does.
        """
        self._check("observe", sources, destinations, times)
        if features.shape != (len(sources), self.features):
            raise ValueError(
                f"TemporalGraphNetwork.observe: features must be ({len(sources)}, {self.features}), "
                f"got {tuple(features.shape)}"
            )
        if not len(sources):
            return
        involved = torch.cat((sources, destinations)).unique()
        self.memory[involved], self.updated[involved] = self._updated(involved)
        nodes = torch.stack((sources, destinations), 1).flatten()  # in the order of time
        others = torch.stack((destinations, sources), 1).flatten()
        events = torch.arange(len(sources), device=nodes.device).repeat_interleave(2)
        order = nodes.argsort(stable=True)
        ranked, counts = nodes[order].unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        self._leave_messages(ranked, others[order][ends - 1], events[order][ends - 1], times, features)
        rank = torch.arange(len(order), device=nodes.device) - (ends - counts).repeat_interleave(counts)
        late = rank >= (counts - self.neighbours).repeat_interleave(counts)  # of one node's, those that stay
        rows, kept = nodes[order][late], events[order][late]
        slots = (self.written[rows] + rank[late]) % self.neighbours
        self.near[rows, slots] = others[order][late]
        self.near_time[rows, slots] = times[kept].to(torch.float64)
        self.near_features[rows, slots] = features[kept].to(self.near_features.dtype)
        self.written[ranked] += counts
        self.now.copy_(times[-1])

    def _leave_messages(self, nodes: Tensor, others: Tensor, events: Tensor, times: Tensor, features: Tensor) -> None:
        self.other[nodes] = others
        self.event_time[nodes] = times[events].to(torch.float64)
        self.event_features[nodes] = features[events].to(self.event_features.dtype)
        self.waiting[nodes] = True

    def _updated(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Memories (B, memory) of distinct nodes once the messages that wait are applied, and times of update (B,)."""
        before, waiting = self.memory[nodes], self.waiting[nodes]
        span = self.event_time[nodes] - self.updated[nodes]
        message = torch.cat((before, self.memory[self.other[nodes]], self.event_features[nodes], self.time(span)), 1)
        after = self.updater(message, before)
        moment = torch.where(waiting, self.event_time[nodes], self.updated[nodes])
        return torch.where(waiting[:, None], after, before), moment

    def _check(self, call: str, *tensors: Tensor) -> None:
        sources, _, times, *_ = tensors
        call = f"TemporalGraphNetwork.{call}"
        if sources.dim() != 1 or any(tensor.shape != sources.shape for tensor in tensors):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(f"{call}: nodes and times must all be (B,), got {shapes}")
        for tensor in (*tensors[:2], *tensors[3:]):
            wrong = (tensor < 0) | (tensor >= self.nodes)
            if wrong.any():
                raise ValueError(f"{call}: node {int(tensor[wrong][0])} is outside 0..{self.nodes - 1}")
        if not bool(torch.isfinite(times).all()):
            raise ValueError(f"{call}: times must be finite, got {float(times[~torch.isfinite(times)][0])}")
        if len(times) and (bool((times.diff() < 0).any()) or float(times[0]) < float(self.now)):
            raise ValueError(f"{call}: times must ascend from the last one observed, {float(self.now)}")
