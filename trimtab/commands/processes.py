"""The processes of a run: one, or those that ``accelerate launch`` started."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

__all__ = ["Processes"]

T = TypeVar("T")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """Splits work among processes. One process alone needs no accelerate, and does not wait for torch.

    Args:
        device: what ``--device`` says.

    Attributes:
        number: of this process, 0 in the first.
        count: how many there are.
        device: ``device``, or where it is ``"auto"`` and there are several the one that accelerate gives this process.
    """

    def __init__(self, device: str) -> None:
        self.number, self.count, self.device = 0, 1, device
        self._state: Any = None
        if not any(os.environ.get(name, "1") not in ("", "1") for name in _SIZES):
            return
        import torch
        from accelerate import PartialState

        cpu = device.startswith("cpu") or not torch.accelerator.is_available()
        # The first to finish waits for the last, which may take days.
        self._state = PartialState(cpu=cpu, timeout=timedelta(days=30))
        self.number, self.count = self._state.process_index, self._state.num_processes
        if device == "auto" and self.count > 1:
            self.device = str(self._state.device)

    @property
    def first(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.number == 0

    def shared(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        (value,) = broadcast_object_list([value])
        return value

    def share_of(self, items: Sequence[T]) -> list[T]:
        """This process's part of items, every n-th, so that dear ones which lie together are spread."""
        if self.count == 1:
            return list(items)
        spread = [item for number in range(self.count) for item in items[number :: self.count]]
        with self._state.split_between_processes(spread) as mine:
            return list(mine)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            self._state.wait_for_everyone()
