"""How much memory a run takes."""

import sys

import torch


def forget_peak(device: torch.device) -> None:
    """Has `peak_memory` begin anew with what is on the GPU now; on a CPU nothing can be forgotten.

    What ran before, such as an engine that wrote answers, then no longer counts, but for tensors
    of its that are still held.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes, at most at one time; None where no one counts.

    On a GPU those of tensors since `forget_peak`. On a CPU those of the whole process since it
    began, with all that it did before.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
