"""Shared by all benchmarks: programs timed in turn, JSON with machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dagjax.api import versions

RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, its arrays waited for."""
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def in_turn(runs: dict[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
    """Times of several programs run in turn, A B A B ..., after one warm-up each."""
    for run in runs.values():
        seconds(run)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            found[name].append(seconds(run))
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """The median over turns of the time of one over the time of the other."""
    pairs = zip(found[one], found[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each program."""
    return {name: round(statistics.median(t), 6) for name, t in found.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, devices, versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": versions(),
    }


def write(name: str, figures: dict[str, Any]) -> None:
    """Write `results/NAME.json`, and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **figures}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
