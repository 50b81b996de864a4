"""The peak on a GPU begins anew where training begins."""

import pytest
import torch

from outrider.train.heads import memory


def test_on_a_gpu_the_peak_is_forgotten_and_nothing_else(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    memory.forget_peak(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]
    memory.forget_peak(torch.device("cpu"))
    assert len(asked) == 1


@pytest.mark.gpu
def test_what_ran_before_no_longer_counts():
    device = torch.device("cuda")
    torch.empty(2**26, device=device)
    before = memory.peak_memory(device)
    memory.forget_peak(device)
    assert memory.peak_memory(device) <= before - 2**26
