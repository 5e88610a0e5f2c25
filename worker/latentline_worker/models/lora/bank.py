"""The adapters that a model has in memory: for each layer one stack of updates, from which every row takes its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from latentline_worker.models.transfer import to_device

from .file import Target

Update = tuple[torch.Tensor, torch.Tensor]  # (rank, fan_in) and (fan_out, rank)


class Bank:
    """Updates of a model's layers in numbered slots; slot 0 is no update.

    A layer gets its stack when the first adapter that changes it comes. Its module stays what it is: a forward hook adds the updates.
    While ``index`` is None, the hooks do nothing.

    Args:
        target: the model.
        slots: adapter sets that are there at once.
        rank: of one slot, the ranks of all adapters of a set together.
    """

    def __init__(self, target: Target, slots: int, rank: int) -> None:
        self._target, self.slots, self.rank = target, slots, rank
        self._layers: dict[tuple[str, str], _Layer] = {}
        self.index: torch.Tensor | None = None  # (rows,) int64: the slot of each row of the forward that runs

    @property
    def num_layers(self) -> int:
        """Layers that have a stack. A recorded forward knows those of its time."""
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        return sum(layer.stack.nbytes for layer in self._layers.values())

    @contextmanager
    def on(self, index: torch.Tensor | None) -> Iterator[None]:
        """Let the rows of every forward in the block take their slots, (rows,) int64."""
        self.index = index
        try:
            yield
        finally:
            self.index = None

    @torch.inference_mode()
    def reserve(self, layers: Mapping[str, Any]) -> None:
        """Make the stacks of these layers, by part and name."""
        for part, names in layers.items():
            for name in names:
                if (part, name) not in self._layers:
                    module = self._target.layer(part, name)
                    assert module is not None  # reading the adapter has checked it
                    self._layers[part, name] = _Layer(self, module, self.slots + 1, self.rank, len(self._layers))

    @torch.inference_mode()
    def write(self, slot: int, updates: Mapping[tuple[str, str], Update]) -> None:
        """Replace what a slot holds. What the device was asked to do before still sees the old content."""
        for key, layer in self._layers.items():
            layer.write(slot, updates.get(key))


class _Layer:
    """The stack of one layer: (slots, rank, fan_in + fan_out), the first matrix of each update beside its second one, transposed.

    Args:
        number: another one for each layer. A recorder of forwards (``torch.jit``) makes constants of the stacks and takes equal ones for
            the same one, so stacks that hold no update yet must differ. The number lies in the second matrix of slot 0, whose first
            one is zero: their product stays zero.
    """

    def __init__(self, bank: Bank, module: torch.nn.Linear | torch.nn.Conv2d, slots: int, rank: int, number: int) -> None:
        self._bank = bank
        weight = module.weight
        self._fan_in = weight[0].numel()
        self.stack = weight.new_zeros(slots, rank, self._fan_in + len(weight))
        low, high = number % 256, number // 256  # each exact in every type
        self.stack[0, 0, self._fan_in :] = float(low)
        self.stack[0, 0, -1] = float(high)
        module.register_forward_hook(self._add)

    def write(self, slot: int, update: Update | None) -> None:
        self.stack[slot].zero_()
        if update is not None:
            both = torch.cat([update[0], update[1].t()], 1).to(self.stack.dtype)
            self.stack[slot, : len(both)] = to_device(both, self.stack.device)

    def _add(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        """The layer's output with each row's own update added: ``up @ (down @ x)``."""
        if self._bank.index is None:
            return None
        x, both = inputs[0], self.stack[self._bank.index]
        down, up = both[..., : self._fan_in], both[..., self._fan_in :]
        if isinstance(module, torch.nn.Conv2d):
            # As a matrix product over the patches that the kernel sees; a grouped convolution would fix the number of rows.
            patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
            return output + torch.bmm(up.transpose(1, 2), torch.bmm(down, patches)).view_as(output)
        inner = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), down.transpose(1, 2))
        wide = output.reshape(x.shape[0], -1, output.shape[-1])
        return torch.baddbmm(wide, inner, up).view_as(output)
