"""Parts of a model that are on the device only while they are used: text encoders and the VAE, around a training.

diffusers' `enable_model_cpu_offload` does the same for its pipelines. A network that was not given to `Visitors` stays
where it is: `arrive` and `send_visitors_away` then do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch._guards import detect_fake_mode

_ATTRIBUTE = "_retune_visitors"


class Visitors:
    """Groups of networks that wait in RAM and are on a device one group at a time, and not while their host computes.

    Args:
        host: the network that stays on the device.
        groups: networks that are used together, such as SDXL's two text encoders.
        device: the host's.
    """

    def __init__(self, host: nn.Module, groups: Iterable[Sequence[nn.Module]], device: torch.device):
        self._groups, self._device = [list(group) for group in groups], device
        self._there: list[nn.Module] = []
        host.to(device)
        for network in (network for group in self._groups for network in group):
            network.to("cpu")
            vars(network)[_ATTRIBUTE] = self
        vars(host)[_ATTRIBUTE] = self

    def arrive(self, network: nn.Module) -> None:
        """Brings a network's group to the device; the others leave it first."""
        group = next((group for group in self._groups if any(network is member for member in group)), None)
        if group is None or group is self._there:
            return
        self.leave()
        for member in group:
            member.to(self._device)
        self._there = group

    def leave(self) -> None:
        """Sends whatever is on the device back to RAM."""
        for network in self._there:
            network.to("cpu")
        self._there = []


def arrive(network: nn.Module) -> None:
    """Brings a network that visits the device there; called by whoever computes with it, before it makes inputs.

    Not where it computes without values: what is moved then would have none afterwards.
    """
    visitors = vars(network).get(_ATTRIBUTE)
    if visitors is not None and detect_fake_mode() is None:
        visitors.arrive(network)


def send_visitors_away(host: nn.Module) -> None:
    """Makes room for the host's activations; called by whoever computes with the host. See `arrive`."""
    visitors = vars(host).get(_ATTRIBUTE)
    if visitors is not None and detect_fake_mode() is None:
        visitors.leave()
