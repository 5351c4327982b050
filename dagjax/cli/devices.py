"""The platform, its devices, and the compilation cache of a process."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def set_up_jax(device: str) -> None:
    """Choose the platform, one host device a core, and the compilation cache.

    Raises:
        ValueError: If there is no such kind of device.
    """
    if device not in ("auto", "cpu", "gpu", "tpu"):
        raise ValueError(f"device {device!r}: expected auto, cpu, gpu or tpu")
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dagjax"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"no device of kind {device!r} here; try --device cpu"
        ) from error
