"""Hidden states of a `transformers` model, caught where one decoder layer hands on to the next.

Shape legend: N rows of the pass, D hidden width, A boundaries.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class States:
    """The boundaries of a model: the input of each decoder layer, and that of its last norm.

    Attributes:
        norm: before the head; None where the model has no layers and norm that we can find.
        layers: of the decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        is_known = isinstance(layers, nn.ModuleList) and isinstance(norm, nn.Module)
        self.layers: Sequence[nn.Module] = list(layers) if is_known and layers is not None else []
        self.norm: nn.Module | None = norm if is_known else None

    @contextmanager
    def caught(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """While a pass runs: by boundary, the residual stream of all rows."""
        assert self.norm is not None
        places = [*self.layers, self.norm]
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for boundary in taps:
                hook = places[boundary].register_forward_pre_hook(
                    _catch(found, boundary), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield found

    def stack(self, found: dict[int, Tensor], taps: Sequence[int]) -> Tensor:
        """tapped_AND of what was caught."""
        return torch.stack([found[boundary].flatten(0, -2) for boundary in taps])


def _catch(found: dict[int, Tensor], boundary: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[boundary] = args[0] if args else kwargs["hidden_states"]

    return hook
