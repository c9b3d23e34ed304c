"""The machine a measurement was made on."""

import os
import platform

import torch


def machine(device: str | None = None) -> dict:
    """Processor, cores, torch's threads, and the GPU's name (None on a CPU), ready for JSON.

    Args:
        device: "cpu" or another's type; None: "cuda" where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None if device == "cpu" else torch.get_device_module(device).get_device_name(),
    }
