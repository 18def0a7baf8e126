"""A library's model at other widths, by other arguments of the library's own constructor.

While the function that makes the model runs, the constructor of its class is replaced by one that
changes the arguments whose names stand in :data:`WIDTHS`, wherever they stand: an integer, a list
of them, a field of a configuration. It is no part of ``widthsearch``, so that a network that
``widthsearch`` builds can be compared with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

from torch import nn

from widthsearch.modules.arguments import integers, with_integers

Make = Callable[[], nn.Module]
WIDTHS = (
    # attention
    *("embed_dim", "embed_dims", "dim", "dims", "hidden_dim", "hidden_dims", "mlp_dim", "d_model"),
    *("hidden_size", "hidden_sizes", "intermediate_size", "d_ff", "ffn_dim", "n_embd", "conv_dim"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "embedding_size", "word_embed_proj_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads", "n_head"),
    *("encoder_attention_heads", "decoder_attention_heads"),
    *("decoder_hidden_size", "feature_size", "key_dim", "mlp_ratio", "mlp_ratios"),
    # convolution
    *("width_per_group", "base_width", "cardinality", "growth_rate", "num_init_features"),
    *("init_features", "init_filters", "features", "channels", "filters", "widths", "width"),
    *("group_widths", "group_size", "stem_width", "stem_size", "stem_channels", "stem_chs"),
    *("block_channels", "stages_out_channels", "decoder_channels", "out_chs", "c", "chs"),
    *("input_channels", "expanded_channels", "last_channel", "num_features", "head_channels"),
    *("mid_channels", "head_hidden_size", "decoder_pyramid_channels"),
    *("decoder_segmentation_channels", "psp_out_channels"),
    *("alpha", "width_mult"),
)
"""Names of arguments that are widths, or that widths are a multiple of."""
WITHIN = ("in_channels", "out_channels")
"""Further names, within lists and configurations alone: the model's own are fixed."""
BACKBONES = ("ResNet", "MobileNetV3", "UNetDecoder")
"""Classes within a model whose constructors are given other widths too."""


def alternatives(make: Make, model: nn.Module) -> Iterator[tuple[str, Make]]:
    """Functions that may construct a model at other widths, each with the arguments it changes.

    Args:
        make: Makes the model.
        model: The model, for its classes.
    """
    if type(model).__module__ == "torchvision.models.vgg":
        yield "cfgs below 512 × 0.5", partial(_narrow_vgg, make)
    kinds = {type(m): None for m in model.modules() if m is model or _is_backbone(m)}
    for kind in kinds:
        given = _Arguments(kind)
        given.run(make)
        names = tuple(dict.fromkeys(given.names))
        some = names[:5] if len(names) > 1 else ()
        without = ([n for n in names if n != name] for name in some)
        groups = [[*names], *without, *([name] for name in some)]
        for group in groups if names else ():
            for factor in (0.5, 2, 1.5):
                label = f"{', '.join(group[:3])}{', …' if len(group) > 3 else ''} × {factor}"
                yield label, partial(_Arguments(kind, tuple(group), factor).run, make)


def _narrow_vgg(make: Make) -> nn.Module:
    from torchvision.models import vgg

    cfgs = {
        key: [n // 2 if isinstance(n, int) and n < 512 else n for n in cfg]
        for key, cfg in vgg.cfgs.items()
    }
    with mock.patch.dict(vgg.cfgs, cfgs):  # the classifier asks for 512 channels
        return make()


def _is_backbone(module: nn.Module) -> bool:
    return type(module).__name__ in BACKBONES


class _Arguments:
    """Changes the arguments of a class's constructor while a function runs.

    Args:
        kind: The class.
        chosen: The arguments to multiply.
        factor: By how much.

    Attributes:
        names: The arguments that could be multiplied, in order.
    """

    def __init__(self, kind: Any, chosen: tuple[str, ...] = (), factor: float = 1) -> None:
        self.kind, self.chosen, self.factor = kind, chosen, factor
        self.names: list[str] = []

    def run(self, make: Make) -> nn.Module:
        """The function's model."""
        kind, own, original = self.kind, vars(self.kind).get("__init__"), self.kind.__init__
        signature = inspect.signature(original)

        def __init__(module: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            arguments = signature.bind(module, *args, **kwargs)
            arguments.apply_defaults()
            if type(module) is kind:
                for name, value in list(arguments.arguments.items())[1:]:
                    arguments.arguments[name] = self._changed(name, value)
            original(*arguments.args, **arguments.kwargs)

        kind.__init__ = __init__
        try:
            return make()
        finally:
            if own is None:
                del kind.__init__
            else:
                kind.__init__ = own

    def _changed(self, name: str, value: Any) -> Any:
        if type(value) is float and name in WIDTHS:
            self.names.append(name)
            return value * self.factor if name in self.chosen else value
        numbers = {}
        for path, number in integers(value):
            named = [key for _, key in path if isinstance(key, str)]
            own = named[-1] if named else name
            if own in WIDTHS or (own in WITHIN and path):
                self.names.append(own)
                if own in self.chosen:
                    numbers[path] = int(number * self.factor)
        return with_integers(value, numbers)
