"""Fingerprint of a head: who made the keys and values that are kept for it."""

import hashlib
from dataclasses import replace

import torch

from outrider.models.heads.spec import Head

SAMPLE = 4096  # values of either end of a tensor


def head_fingerprint(head: Head) -> str:
    """Changes whenever sizes, conventions or weights do; where the files lie does not matter."""
    told = replace(head.spec, source="", assumed=frozenset(), pinned=frozenset())
    digest = hashlib.sha256(str(told).encode())
    for name in sorted(head.tensors):
        tensor = head.tensors[name].flatten()
        samples = torch.cat([tensor[:SAMPLE], tensor[-SAMPLE:]]).contiguous()
        digest.update(f"{name}{tuple(head.tensors[name].shape)}".encode())
        digest.update(samples.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
