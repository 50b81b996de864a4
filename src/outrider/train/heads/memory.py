"""How much memory a run took."""

import sys

import torch


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU, else of the whole process; None where no one counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
