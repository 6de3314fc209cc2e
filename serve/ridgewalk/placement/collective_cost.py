"""Seconds of collectives: a latency, and bytes over bandwidth."""

from __future__ import annotations

from ridgewalk.placement.hardware import HardwareSpec, Link


def all_reduce_s(hardware: HardwareSpec, ranks: int, num_bytes: float) -> float:
    """Through a switch that adds up (NVLink SHARP) each rank sends and receives its bytes once.

    Otherwise, as in a ring, 2 (n - 1) / n of them (Thakur et al. 2005, section 4.5).
    """
    once = hardware.link(ranks).reduces_in_switch
    return _seconds(hardware, ranks, num_bytes if once else 2 * (ranks - 1) / ranks * num_bytes)


def all_gather_s(hardware: HardwareSpec, ranks: int, num_bytes: float) -> float:
    """``num_bytes`` is what each rank has in the end."""
    return _seconds(hardware, ranks, (ranks - 1) / ranks * num_bytes)


def all_to_all_s(hardware: HardwareSpec, ranks: int, num_bytes: float) -> float:
    """``num_bytes`` is what a rank has for all; its own part stays."""
    link = hardware.all_to_all if ranks <= hardware.devices_per_node else None
    return _seconds(hardware, ranks, (ranks - 1) / ranks * num_bytes, link)


def send_s(hardware: HardwareSpec, ranks_apart: int, num_bytes: float) -> float:
    """From one pipeline stage to the next, whose devices are so many apart."""
    link = hardware.link(ranks_apart + 1)
    return link.latency_s + num_bytes / (link.bandwidth * hardware.link_efficiency)


def _seconds(hardware: HardwareSpec, ranks: int, sent_bytes: float, link: Link | None = None) -> float:
    """Over ``link``, or over the one that joins so many."""
    if ranks == 1:
        return 0.0
    link = link or hardware.link(ranks)
    return link.latency_s + sent_bytes / (link.bandwidth * hardware.link_efficiency)
