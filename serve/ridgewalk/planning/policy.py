"""How an engine admits and limits its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ridgewalk.engine.scheduler_config import AdmissionName
from ridgewalk.placement.default_limits import DEFAULT_LIMITS
from ridgewalk.placement.hardware import Device
from ridgewalk.routing.decision import RoutingName


@dataclass(frozen=True)
class Policy:
    """Limits of each attention group, and what the host does while the ranks compute."""

    name: str
    max_num_seqs: int
    max_num_batched_tokens: int
    memory_share: float  # of a device's memory, for weights, activations and KV cache
    host_overlaps: bool  # steps are scheduled ahead: host and ranks work at the same time
    admission: AdmissionName = "prompt_only"
    routing: RoutingName | None = None  # None: vLLM's balancer

    def on(self, device: Device) -> Policy:
        """With the limits of the device, where they are our engine's own."""
        return replace(self, **DEFAULT_LIMITS[device]._asdict()) if self.name == "ridgewalk" else self


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            # As vLLM v1 admits: whoever's prompt fits. All are its defaults on GPUs of this class.
            Policy("vllm", 1024, 8192, 0.9, host_overlaps=False),
            # Our engine's defaults on GPUs: a request begins when the predicted peak of KV use fits, and goes where it
            # delays everybody least.
            Policy(
                "ridgewalk",
                *DEFAULT_LIMITS["cuda"],
                0.9,
                host_overlaps=True,
                admission="predictive",
                routing="kv_growth",
            ),
        )
    }
)
