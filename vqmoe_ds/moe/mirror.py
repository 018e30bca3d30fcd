"""Python copies of one-element buffers, so that reading them does not make the host wait for the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class HostMirror:
    """The number in a one-element tensor, read back only after somebody else wrote it.

    Whoever writes through ``write`` costs no read. Loads and moves are noticed by the tensor's identity and version;
    collectives write without a new version, so who calls one increments it (``autograd.graph.increment_version``).
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version, self._value = -1, 0

    def read(self, tensor: Tensor) -> int:
        """The number; waits for the device if it may have changed since it was last seen."""
        if tensor.is_inference():  # without a version
            return int(tensor)
        if self._tensor is not tensor or self._version != tensor._version:
            self._see(tensor, int(tensor))
        return self._value

    def write(self, tensor: Tensor, value: int) -> None:
        """Set tensor and copy."""
        tensor.fill_(value)
        if not tensor.is_inference():
            self._see(tensor, value)

    def __reduce__(self) -> Any:
        """Copies start unseen: a copied tensor counts its versions anew."""
        return HostMirror, ()

    def _see(self, tensor: Tensor, value: int) -> None:
        # The tensor and not its id: Python may give that to a new tensor once this one is gone.
        self._tensor, self._version, self._value = tensor, tensor._version, value
