"""Differentiable group learning: dynamic structure pruning, Park et al. 2023, arXiv 2303.09736.

Notation, with the suffixes of tensors::

    L, G, F, C, K   layers of one shape, groups, filters, input channels, kernel elements
    W (L F C K)     weights
    α (L G F)       logits; p = softmax(α/τ + Gumbel noise) over the groups, with temperature τ
    ℓ (L G C)       ℓ_gc = sqrt(Σ_{f,k} (p_gf W_fck)²), the norm of group g in channel c
    s (L G)         s_g = (Σ_f √p_gf)², the squared size of a group
    R               the group lasso Σ_g s_g Σ_c ℓ_gc
    q               the factor of the penalty: λ times learning rate, ramp and the layer's scale

Groups never take part in the forward pass. Through R they pull the weights of channels that a group
needs least to zero. A training step on W is followed by one on α, which looks one step ahead::

    W₁ = W - q ∂R/∂W                     the penalty with the drawn groups
    W₂ = W₁ - optimizer step             of the same batch
    W₃ = W₂ - q ∂R/∂W at W₂
    ∂/∂α through the softmax of          ∂R/∂p at W₂ + (∂²R/∂p∂W at W)·(W₃ - W₁)

Then W, the momentum and the statistics of batch norm are restored, and W receives the penalty with
hard groups. All derivatives are closed forms in Σ_k W², so that a stack of layers of one shape
takes a few batched matrix products. For example, with one channel, one group of two filters with
p = (1, 1) and W = (3, 4): ℓ = 5, s = (1 + 1)² = 4, R = 20, and ∂R/∂W = s W/ℓ = (2.4, 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.data.tasks import AnyTask
from widthsearch.errors import StudyError
from widthsearch.modules.tree import join
from widthsearch.proposers.filter_groups.architecture import branchable
from widthsearch.proposers.protocol import Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import TorchDispatchMode, foreach_copy_, tree_leaves
from widthsearch.tracing.inputs import sample
from widthsearch.tracing.interpreter import run_on_meta
from widthsearch.tracing.polynomials import as_constant
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import Backward, SgdSteps, sgd_step
from widthsearch.training.trainer import placed
from widthsearch.utils.devices import check_device, deterministic_cudnn, seeded

aten = torch.ops.aten

# -- which layers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupedLayer:
    """A convolution whose filters are grouped.

    Attributes:
        name: The layer.
        scale: ``sqrt(C·H·W / 16384) · k / F^1.5`` for an input of shape (C, H, W) and a k×k kernel;
            the layer's scale of the penalty is this value times ``G^1.5``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        >>> space = SearchSpace.from_model(net, (3, 16, 16))
        >>> find_layers(space)  # √(4 · 16 · 16 / 16384) · 1 / 4^1.5
        (GroupedLayer(name='1', scale=0.03125),)
    """

    name: str
    scale: float


def find_layers(space: SearchSpace) -> tuple[GroupedLayer, ...]:
    """Find the convolutions of a space whose filters can be grouped.

    Those are ungrouped ``Conv2d`` layers whose inputs and outputs both have free widths, so neither
    stems nor classifiers. Projection shortcuts are left out: a 1×1 convolution that is alone on one
    side of a sum while the other side passes several convolutions.

    Args:
        space: A space without ties and pins.
    """
    model = space.build(space.base, device="meta")
    paths = _Paths({id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)})
    run_on_meta(model.eval(), sample(space.input_shape, 1, "meta"), paths)
    out = []
    for layer, module in model.named_modules():
        if not (isinstance(module, nn.Conv2d) and layer in paths.inputs):
            continue
        free = [as_constant(n) is None for n in space.trace.shapes[join(layer, "weight")][:2]]
        shortcut = layer in paths.alone and module.weight[0, 0].numel() == 1
        if branchable(space, layer) and all(free) and not shortcut:
            size = math.prod(paths.inputs[layer][1:]) / 16384
            scale = math.sqrt(size) * module.kernel_size[0] / module.out_channels**1.5
            out.append(GroupedLayer(layer, scale))
    return tuple(out)


class _Paths(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the convolutions that each tensor has passed.

    Attributes:
        inputs: The shape of each convolution's input.
        alone: Convolutions that one side of a sum passed alone, and the other side not, which
            passed several convolutions that the first side did not.
    """

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.inputs: dict[str, torch.Size] = {}
        self.alone: set[str] = set()
        self._through: dict[int, frozenset[str]] = {}
        self._kept: list[Tensor] = []  # keeps ids unique

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sides = [self._through.get(id(x), frozenset()) for x in tensors]
        through: frozenset[str] = frozenset().union(*sides)
        packet = func.overloadpacket
        if packet is aten.convolution and id(args[1]) in self.layers:
            layer = self.layers[id(args[1])]
            self.inputs[layer] = args[0].shape
            through |= {layer}
        elif packet in (aten.add, aten.add_) and len(sides) == 2:
            for own, other in ((sides[0], sides[1]), (sides[1], sides[0])):
                if len(own - other) == 1 and len(other - own) > 1:
                    self.alone |= own - other
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._through[id(x)] = through
                self._kept.append(x)
        return out


# -- the regulariser ---------------------------------------------------------------------------


class GroupLasso:
    """Derivatives of R at probabilities p and weights W.

    Args:
        p_LGF: Probabilities; one-hot over the groups where assignments are hard.
        squares_LFC: ``Σ_k W²``.

    Example:
        >>> W = torch.tensor([[[3.0], [4.0]]])  # one layer, two filters, one channel
        >>> lasso = GroupLasso(torch.ones(1, 1, 2), W.square())
        >>> (lasso.weight_factor() * W).flatten()  # ∂R/∂W
        tensor([2.4000, 3.2000])
    """

    def __init__(self, p_LGF: Tensor, squares_LFC: Tensor) -> None:  # noqa: N803
        self._p, self._squares = p_LGF, squares_LFC
        self._roots = p_LGF.sqrt()
        self._total = self._roots.sum(-1, keepdim=True)
        self._norms = (p_LGF.square() @ squares_LFC).sqrt()
        self._inverse = 1 / (self._norms + 1e-8)

    def weight_factor(self) -> Tensor:
        """The factor of W in ∂R/∂W = factor · W, (L, F, C)."""
        return (self._total * self._p).square().mT @ self._inverse

    def probability_gradient(self) -> Tensor:
        """∂R/∂p, (L, G, F)."""
        return self._product(self._norms, self._inverse @ self._squares.mT)

    def mixed_product(self, change_LFC: Tensor) -> Tensor:  # noqa: N803
        """(∂²R/∂p∂W)·v for a direction v of the weights, (L, G, F).

        Args:
            change_LFC: The derivative of ``Σ_k W²`` along v, ``2 Σ_k W v``.
        """
        norms = self._p.square() @ change_LFC * self._inverse / 2
        reciprocals = self._inverse @ change_LFC.mT
        reciprocals -= (norms * self._inverse.square()) @ self._squares.mT
        return self._product(norms, reciprocals)

    def _product(self, norms_LGC: Tensor, reciprocals_LGF: Tensor) -> Tensor:  # noqa: N803
        """``∂s/∂p · Σ_c ℓ + s · p · Σ_c (Σ_k W²)/ℓ``, of these values or their derivatives."""
        size = self._total.square() * self._p * reciprocals_LGF
        return size + self._total / self._roots * norms_LGC.sum(-1, keepdim=True)


# -- learning ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Stack:
    """Layers of one shape.

    Attributes:
        layers: The layers.
        weights: W, shape (L, F, C, k, k); the parameters of the layers are views of it.
        logits: α, shape (L, G, F).
        scale: The scale of each layer's penalty, shape (L, 1, 1).
    """

    layers: tuple[GroupedLayer, ...]
    weights: Tensor
    logits: Tensor
    scale: Tensor

    def squares(self) -> Tensor:
        """``Σ_k W²``, (L, F, C)."""
        return self.weights.square().sum((-2, -1))

    def shrink(self, factor: float, lasso: GroupLasso) -> None:
        """``W ← W - factor · scale · ∂R/∂W``."""
        shrunk = 1 - factor * self.scale * lasso.weight_factor()
        self.weights.mul_(shrunk[..., None, None])

    def hard(self) -> Tensor:
        """The most probable group of each filter, one-hot, (L, G, F)."""
        chosen = self.logits.argmax(1, keepdim=True)
        return torch.zeros_like(self.logits).scatter_(1, chosen, 1.0)


class GroupLearning:
    """Learns the groups of a network's filters while the network trains.

    Args:
        model: The network; the weights of the layers become views of stacked tensors.
        layers: The layers whose filters are grouped.
        groups: G.
        lr: The learning rate of the logits (Adam, ε = 1e-12).
        temperature: τ.
        penalties: For each step, λ times the learning rate of the weights times a ramp.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        >>> options = {"groups": 2, "lr": 0.01, "temperature": 1.0, "penalties": [0.1]}
        >>> learning = GroupLearning(model, [GroupedLayer("1", 0.03)], **options)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def backward():
        ...     loss = model(torch.ones(2, 3, 4, 4)).square().mean()
        ...     loss.backward()
        ...     return loss.detach()
        >>> bool(learning.step(sgd, backward) > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[GroupedLayer],
        *,
        groups: int,
        lr: float,
        temperature: float,
        penalties: Sequence[float],
    ) -> None:
        self._model, self._temperature, self._penalties = model, temperature, iter(penalties)
        self._stacks = list(_stacked(model, layers, groups))
        self._adam = torch.optim.Adam([s.logits for s in self._stacks], lr=lr, eps=1e-12)

    def step(self, optimizer: torch.optim.Optimizer, backward: Backward) -> Tensor:
        """A step of the weights, a step of the logits, and the penalty with hard groups.

        This is a step hook, see :mod:`widthsearch.training.sgd`. It runs the batch twice, the
        second time at the weights of the look-ahead.
        """
        p = [self._draw(stack) for stack in self._stacks]
        loss = sgd_step(optimizer, backward)
        factor = next(self._penalties)
        with torch.no_grad():
            squares = [stack.squares() for stack in self._stacks]
            lassos = [GroupLasso(q, w2) for q, w2 in zip(p, squares, strict=True)]
            with self._restored(optimizer):
                before = []
                for stack, lasso in zip(self._stacks, lassos, strict=True):
                    before.append(stack.weights.clone())
                    stack.shrink(factor, lasso)
                ahead = [stack.weights.clone() for stack in self._stacks]  # W₁
                with torch.enable_grad():
                    sgd_step(optimizer, backward)  # to W₂
                for i, stack in enumerate(self._stacks):
                    lasso = GroupLasso(p[i], stack.squares())
                    gradient = lasso.probability_gradient()
                    stack.shrink(factor, lasso)  # to W₃
                    moved = stack.weights - ahead[i]
                    gradient += lassos[i].mixed_product(2 * (before[i] * moved).sum((-2, -1)))
                    # The derivative of the softmax.
                    centred = gradient - (p[i] * gradient).sum(1, keepdim=True)
                    stack.logits.grad = p[i] * centred / self._temperature
            self._adam.step()
            for stack, w2 in zip(self._stacks, squares, strict=True):
                stack.shrink(factor, GroupLasso(stack.hard(), w2))
        return loss

    def assignments(self) -> dict[str, Tensor]:
        """The group of each filter by layer, shape (F,)."""
        return {
            layer.name: stack.logits[i].argmax(0)
            for stack in self._stacks
            for i, layer in enumerate(stack.layers)
        }

    def _draw(self, stack: _Stack) -> Tensor:
        noise = -torch.empty_like(stack.logits).exponential_().log()
        return (stack.logits / self._temperature + noise).softmax(1)

    @contextmanager
    def _restored(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A context after which network and optimizer have the values from before it."""
        state = [v for of in optimizer.state.values() for v in of.values()]
        tensors = [*self._model.parameters(), *self._model.buffers(), *state]
        detached = [t.detach() for t in tensors if isinstance(t, Tensor)]
        # One list per dtype: with mixed dtypes foreach_copy_ takes a slow path on CUDA.
        lists = [[t for t in detached if t.dtype == d] for d in {t.dtype for t in detached}]
        saved = [[t.clone() for t in of] for of in lists]
        try:
            yield
        finally:
            for changed, copies in zip(lists, saved, strict=True):
                foreach_copy_(changed, copies)


def _stacked(model: nn.Module, layers: Sequence[GroupedLayer], groups: int) -> Iterator[_Stack]:
    modules = dict(model.named_modules())
    shapes: dict[torch.Size, list[GroupedLayer]] = {}
    for layer in layers:
        shapes.setdefault(modules[layer.name].weight.shape, []).append(layer)
    for shape, of in shapes.items():
        weights: list[Any] = [modules[layer.name].weight for layer in of]
        # Keeps the memory format of the network's weights: contiguous or channels last.
        order, back = (0, 1, 2, 3), (0, 1, 2, 3, 4)
        if not weights[0].is_contiguous():
            order, back = (0, 2, 3, 1), (0, 1, 4, 2, 3)
        stack = torch.stack([w.detach().permute(order) for w in weights]).permute(back)
        for weight, view in zip(weights, stack, strict=True):
            weight.data = view
        scale = torch.tensor([layer.scale * groups**1.5 for layer in of], device=stack.device)
        logits = torch.zeros(len(of), groups, shape[0], device=stack.device)
        yield _Stack(tuple(of), stack, logits, scale.view(-1, 1, 1))


def learn_groups(
    model: nn.Module,
    layers: Sequence[GroupedLayer],
    task: AnyTask,
    recipe: Recipe,
    setting: Setting,
    *,
    groups: int,
    penalty: float,
    lr: float,
    temperature: float,
) -> dict[str, Tensor]:
    """Train a network by a recipe and learn the groups of its filters, see :class:`GroupLearning`.

    Returns:
        The group of each filter by layer, shape (F,).

    Raises:
        StudyError: The loss is not finite, or a batch is larger than the training split.
    """
    place = check_device(setting.device)
    loader, _ = placed(model, task, recipe, place)
    steps = loader.steps
    rates = [recipe.learning_rate(step, steps) for step in range(recipe.epochs * steps)]
    learning = GroupLearning(
        model,
        layers,
        groups=groups,
        lr=lr,
        temperature=temperature,
        # The penalty grows linearly to λ.
        penalties=[penalty * rate * (i / len(rates)) for i, rate in enumerate(rates, 1)],
    )
    sgd = SgdSteps(model, loader, recipe, place, hook=learning.step)
    for epoch in range(recipe.epochs):
        with seeded(setting.seed, epoch + 1, place) as generator, deterministic_cudnn():
            loss = sgd.run(generator, rates[epoch * steps : (epoch + 1) * steps])
        if not math.isfinite(loss):
            raise StudyError(
                f"group learning must keep a finite loss, but with penalty={penalty} and "
                f"lr={recipe.lr} it diverged; lower one of them"
            )
        setting.report(f"groups: epoch {epoch + 1} of {recipe.epochs}, loss {loss:.3f}")
    return learning.assignments()
