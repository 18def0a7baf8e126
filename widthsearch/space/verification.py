"""Verifies predicted costs against torch's own counts while networks run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from widthsearch.errors import SpaceError, first_line
from widthsearch.modules.tree import tensors_of
from widthsearch.space.computation import (
    compare_masks_with_cuts,
    compare_with_class,
    floats,
    random_inputs,
    untrained,
)
from widthsearch.space.cost import Cost
from widthsearch.torch_internals import TorchDispatchMode
from widthsearch.tracing.inputs import call, sample
from widthsearch.tracing.interpreter import no_fast_path, track_layers
from widthsearch.tracing.sample_values import SampleValues
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check_space` found; a fault raises instead.

    Attributes:
        networks: The widths of each network that ran, by a description.
        device: The device that they ran on.
        constructed: The networks among them, and the base, that the model's class can be
            constructed as by its own arguments: they start and compute alike.
        masked: The number of axes on which masks give what cutting gives.
        unknown: The number of axes whose channels are unknown.
        idle: Trainable parameters that two training steps of the base do not move.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (4,))
        >>> report = check_space(space, device="meta")
        >>> "widest" in report.networks, report.device
        (True, 'meta')
    """

    networks: Mapping[str, Widths]
    device: str
    constructed: tuple[str, ...] = ()
    masked: int = 0
    unknown: int = 0
    idle: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = [
            f"checked: {len(self.networks)} networks ({', '.join(self.networks)}) run forward and "
            f"backward on {self.device}; MACs, parameters and activations are as predicted"
        ]
        if self.device != "meta":
            alike = ", ".join(self.constructed) or "no network: its class takes no such arguments"
            moved = "every trainable parameter"
            if self.idle:
                more = ", …" if len(self.idle) > 3 else ""
                moved += (
                    f" but {len(self.idle)}, as in the model ({', '.join(self.idle[:3])}{more})"
                )
            found += [
                f"start and outputs equal those of the model's class at: {alike}",
                f"masks equal cuts on {self.masked} axes ({self.unknown} of unknown channels)",
                f"two training steps move {moved}",
            ]
        return "; ".join(found)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts activation elements, and tracks the module and the operation that are running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.activations = 0
        self.stage = "forward in eval mode"
        self.operation = "none"
        self.layers: list[str] = []
        self.hooks = track_layers(model, self.layers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operation = str(func)
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry and self.stage == "forward in eval mode":
            first = out if isinstance(out, Tensor) else out[0]
            self.activations += first.numel()
        return out


@contextmanager
def countable() -> Iterator[None]:
    """Run attention and recurrent layers as separate products.

    The counter does not see into their fused kernels: those of oneDNN on a CPU, of cuDNN on a GPU.
    """
    fused: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [backend.enabled for backend in fused]
    try:
        for backend in fused:
            backend.enabled = False
        with no_fast_path(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, enabled in zip(fused, before, strict=True):
            backend.enabled = enabled


def run_and_count(model: nn.Module, inputs: Any, device: str | torch.device) -> Cost:
    """Run a network forward in eval mode, and forward and backward in training mode.

    Args:
        model: A network on the device; afterwards it is in training mode and has gradients.
        inputs: One sample, as :func:`~widthsearch.tracing.inputs.sample` takes it.
        device: The device; ``meta`` runs shapes without values.

    Returns:
        The counts of one sample in eval mode; MACs are half of ``FlopCounterMode``'s FLOPs.

    Raises:
        SpaceError: The network does not run; the message names the module and the operation.
    """
    device = torch.device(device)
    watch = _Watch(model)
    meta = device.type == "meta"
    where = device if meta else nullcontext()  # tensors that forward makes
    own = [device] if device.type == "cuda" else []
    values = SampleValues() if meta else None  # code may branch on the sample
    with where, torch.random.fork_rng(devices=own), values or nullcontext():
        try:
            with torch.no_grad(), countable(), FlopCounterMode(display=False) as flops, watch:
                # The counter's own hooks fail on modules whose inputs are parameters.
                learned = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
                call(model.eval(), sample(inputs, 1, device))
            for p in learned:
                p.requires_grad_(True)
            watch.stage = "forward in training mode"
            if values is not None:
                values.random = True
            with watch:
                out = call(model.train(), sample(inputs, 2, device))
                watch.stage = "backward"
                if losses := [x.sum() for x in floats(out) if x.requires_grad]:
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
        weight_bytes=sum(t.numel() * t.element_size() for *_, t in tensors_of(model)),
    )


def check_space(
    space: SearchSpace, *, seed: int = 0, vectors: int = 3, device: str | torch.device = "cpu"
) -> CheckReport:
    """Build networks, run them, and compare what they cost and compute with what is expected.

    The narrowest, the widest and random networks are built, run forward in eval mode, and forward
    and backward in training mode. MACs are compared with ``FlopCounterMode``, integer for integer,
    without attention's fused kernels, which hide products from it. On another device than ``meta``
    the following is compared too, on the CPU:

    - the base, and those of the networks that the model's class can be constructed as by its own
      arguments, with these: each tensor at start and the output, where the space has no
      ``leftovers``;
    - masked random channels of the base with a network without them, to 1e-5 of the output;
    - the parameters that two training steps move, with those that they move in the base.

    Args:
        space: The space.
        seed: Seeds the random widths and the initialisation.
        vectors: How many random width vectors.
        device: The device that the networks run on; ``meta`` runs shapes without values, which
            takes no memory and little time.

    Raises:
        SpaceError: A network does not cost what was predicted, does not run, or computes something
            else; the message names its widths and the quantity, or the module and the operation.
    """
    rng = random.Random(seed)
    networks = {
        "narrowest": space.widths([axis.min_width for axis in space.axes]),
        "widest": space.widths([axis.max_width for axis in space.axes]),
    }
    for i in range(vectors):
        networks[f"random {i + 1}"] = space.widths([rng.choice(axis.grid) for axis in space.axes])
    for description, widths in networks.items():
        with _at(space, description, widths):
            _check_network(space, widths, seed, device)
    if torch.device(device).type == "meta":
        return CheckReport(networks, str(device))
    constructed = []
    for description, widths in {"base": space.base, **networks}.items():
        if widths == space.base or not space.leftovers:
            with _at(space, description, widths):
                if compare_with_class(space, widths.vector, seed):
                    constructed.append(description)
    with _at(space, "base", space.base):
        masked, unknown = compare_masks_with_cuts(space, seed)
    x = random_inputs(space, 2, seed)
    idle = untrained(space.model.reference(space.base.vector, seed) or space.build(space.base), x)
    for description, widths in {"base": space.base, **networks}.items():
        with _at(space, description, widths):
            # A unit may be dead at a small width, so values may stay; gradients may not be lost.
            lost = untrained(space.build(widths, seed=seed), x, gradients=True) - idle
            if lost:
                raise SpaceError(
                    f"training does not reach its {min(lost)!r}, but reaches that of the model"
                )
    return CheckReport(
        networks, str(device), tuple(constructed), masked, unknown, tuple(sorted(idle))
    )


@contextmanager
def _at(space: SearchSpace, description: str, widths: Widths) -> Iterator[None]:
    """Name the widths in an error, of the space or of the model's own code."""
    try:
        yield
    except Exception as error:
        vector = ", ".join(map(str, widths.vector))
        reason = error if isinstance(error, SpaceError) else first_line(error)
        raise SpaceError(
            f"space {space.name!r} does not hold at its {description} widths [{vector}]: {reason}"
        ) from error


def _check_network(
    space: SearchSpace, widths: Widths, seed: int, device: str | torch.device
) -> None:
    try:
        network = space.build(widths, seed=seed, device=device)
    except Exception as error:
        raise SpaceError(f"it cannot be built: {first_line(error)}") from error
    counted, predicted = run_and_count(network, space.input_shape, device), space.cost(widths)
    if counted != predicted and (wider := _without_skipped_products(space, widths)):
        network = space.build(wider, device="meta")
        counted, predicted = run_and_count(network, space.input_shape, "meta"), space.cost(wider)
    for quantity in ("macs", "params", "activations", "weight_bytes"):
        a, b = getattr(counted, quantity), getattr(predicted, quantity)
        if a != b:
            raise SpaceError(f"its {quantity} are {a:,}, but the space predicts {b:,}")


def _without_skipped_products(space: SearchSpace, widths: Widths) -> Widths | None:
    """The widths with more than one group on each axis, if the network calls ``torch.einsum``.

    Over a dim of size 1 ``einsum`` multiplies elementwise, which torch's counter does not count.
    Such widths are counted at the next width instead; None if that is no matter here.
    """
    wider = [
        width + axis.step if width == traced.divisor else width
        for width, axis, traced in zip(widths.vector, space.axes, space.trace.axes, strict=True)
    ]
    if tuple(wider) == widths.vector:
        return None
    x = sample(space.input_shape, 1)
    with torch.device("meta"), torch.no_grad(), SampleValues(), _EinsumSpy() as spy:
        call(space.build(widths, device="meta").eval(), x)
    return space.widths(wider) if spy.called else None


class _EinsumSpy(TorchFunctionMode):
    """Notes whether ``torch.einsum`` is called."""

    called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called |= func is torch.einsum
        return func(*args, **(kwargs or {}))
