"""Point-to-point communication between pipeline stages that knows what crosses each boundary."""

from __future__ import annotations

from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor


class SharedStateCommunicator(P2PCommunicator):
    """Megatron's point-to-point communication, for tensors as wide as their boundary's payload.

    The schedules ask for `config.hidden_size` channels; `model.config` knows how many there are.
    """

    def _communicate(
        self, *, tensor_shape: Any, recv_prev: bool, recv_next: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if tensor_shape is not None and (recv_prev or recv_next):
            # In the interleaved schedule this is one of many boundaries, and all have the same width.
            boundary = self.current_stage - 1 if recv_prev else self.current_stage
            payload = self.config.boundary_payloads[boundary]
            tensor_shape = (*tensor_shape[:2], self.config.boundary_width(payload))
        return super()._communicate(tensor_shape=tensor_shape, recv_prev=recv_prev, recv_next=recv_next, **kwargs)
