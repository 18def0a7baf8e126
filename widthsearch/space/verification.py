"""What torch itself counts while a network runs: what predicted costs are checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from widthsearch.errors import SpaceError, first_line
from widthsearch.space.cost import Cost
from widthsearch.torch_internals import TorchDispatchMode, tree_leaves
from widthsearch.tracing.inputs import call, sample


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts activation elements, and remembers what is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.activations = 0
        self.stage = "forward in eval mode"
        self.operation = "none"
        self.layers: list[str] = []
        self.hooks = []
        for layer, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(self._entering(layer)))
            self.hooks.append(module.register_forward_hook(self._leaving))

    def _entering(self, layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.layers.append(layer)

        return hook

    def _leaving(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self.layers.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.operation = str(func)
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry and self.stage == "forward in eval mode":
            first = out if isinstance(out, Tensor) else out[0]
            self.activations += first.numel()
        return out


@contextmanager
def countable() -> Iterator[None]:
    """Fused attention hides its products from the counter: run it as the products it is."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run_and_count(model: nn.Module, inputs: Any, device: str | torch.device) -> Cost:
    """Run a network forward in eval mode, and forward and backward in training mode.

    Args:
        model: A network on the device; it is left in training mode, with gradients.
        inputs: One sample, as :func:`~widthsearch.tracing.inputs.sample` takes it.
        device: Where to run; ``meta`` runs shapes without values.

    Returns:
        What was counted for one sample in eval mode: half of ``FlopCounterMode``'s FLOPs.

    Raises:
        SpaceError: It does not run; names the module and the operation.
    """
    device = torch.device(device)
    watch = _Watch(model)
    where = device if device.type == "meta" else nullcontext()  # tensors that forward makes
    own = [device] if device.type == "cuda" else []
    with countable(), where, torch.random.fork_rng(devices=own):
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as flops, watch:
                # The counter's own hooks stumble over parameters that are passed to a module.
                learned = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
                call(model.eval(), sample(inputs, 1, device))
            for p in learned:
                p.requires_grad_(True)
            watch.stage = "forward in training mode"
            with watch:
                out = call(model.train(), sample(inputs, 2, device))
                watch.stage = "backward"
                losses = [x.sum() for x in tree_leaves(out) if _differentiable(x)]
                if losses:
                    torch.autograd.backward(losses)
        except Exception as error:
            layer = watch.layers[-1] if watch.layers else ""
            kind = type(model.get_submodule(layer)).__name__
            where_in = f"module {layer or '(the model itself)'!r} ({kind})"
            raise SpaceError(
                f"{'it' if watch.stage == 'backward' else where_in} fails in {watch.stage}, "
                f"operation {watch.operation}: {first_line(error)}"
            ) from error
        finally:
            for hook in watch.hooks:
                hook.remove()
    return Cost(
        macs=flops.get_total_flops() // 2,
        params=sum(p.numel() for p in model.parameters()),
        activations=watch.activations,
    )


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
