"""What the passes through a chain leave for UBP, and the hooks that collect it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.capture import hook
from fused_so.optim.chain import Link


class Passage:
    """What one forward and backward pass through a chain leaves, all of it as (n, d) rows.

    `inputs` of the links, `preactivations` where phi' needs them, the model's `outputs` (later
    those of the links not yet taken), and `signals`: the gradient of the loss with respect to the
    output of each link.
    """

    def __init__(self, links: int):
        self.inputs: list[Tensor | None] = [None] * links
        self.preactivations: list[Tensor | None] = [None] * links
        self.signals: list[Tensor | None] = [None] * links
        self.outputs: Tensor | None = None

    def take(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Input, output, preactivation and signal of a link, in the dtype to compute in.

        To be asked from the top down: of what no link below needs, nothing is kept.
        """
        values = (self.inputs[index], self.outputs, self.preactivations[index], self.signals[index])
        self.outputs = self.inputs[index]
        self.inputs[index] = self.preactivations[index] = self.signals[index] = None
        return tuple(None if value is None else accumulate(value) for value in values)

    def clear(self) -> None:
        self.__init__(len(self.inputs))


class Watch:
    """Forward hooks on a chain that hand over the passage of every backward pass.

    Passes without gradients are not seen, nor are those that do not run from end to end. The
    rows live as long as autograd's graph or whoever `receive` gives them to.
    """

    def __init__(
        self,
        links: list[Link],
        last: nn.Module,
        check: Callable[[], None],
        receive: Callable[[Passage], None],
    ):
        self._links, self._check, self._receive = links, check, receive
        self._passage: Passage | None = None
        self._handles = [
            hook(link.linear.register_forward_hook, self._enter, i, with_kwargs=True)
            for i, link in enumerate(links)
        ]
        self._handles.append(hook(last.register_forward_hook, self._end, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int, _: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        (h,) = (*args, *kwargs.values())
        if index == 0:
            self._passage = None
            if torch.is_grad_enabled():
                self._check()
                self._passage = Passage(len(self._links))
        if (passage := self._passage) is None:
            return
        link = self._links[index]
        if h.dim() != 2:
            raise ValueError(
                f"UBP takes rows of examples, (n, d); the input of layer {link.name!r} has shape "
                f"{tuple(h.shape)}"
            )
        passage.inputs[index] = h.detach()
        if not link.slope_from_output:
            passage.preactivations[index] = output.detach()
        if index and h.requires_grad:
            _keep_gradient(h, passage, index - 1)

    def _end(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        passage, self._passage = self._passage, None
        if passage is None or not output.requires_grad or passage.inputs[-1] is None:
            return
        passage.outputs = output.detach()
        _keep_gradient(output, passage, len(self._links) - 1)
        output.register_hook(lambda _: self._receive(passage))


def _keep_gradient(h: Tensor, passage: Passage, index: int) -> None:
    def keep(gradient: Tensor) -> None:
        passage.signals[index] = gradient.detach()

    h.register_hook(keep)
