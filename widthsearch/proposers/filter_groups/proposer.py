"""DSP: learned filter groups; channels leave groups of filters, and layers become branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from widthsearch.data.tasks import AnyTask
from widthsearch.errors import SpaceError
from widthsearch.proposers.filter_groups.learning import find_layers, learn_groups
from widthsearch.proposers.filter_groups.pruning import GroupPruning
from widthsearch.proposers.protocol import Count, Finite, Proposal, Setting
from widthsearch.proposers.tuning import train_base
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import evaluate
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("filter_groups")
class FilterGroups:
    """Dynamic structure pruning (DSP; Park et al. 2023, arXiv 2303.09736).

    The base network is trained, then trained further while groups of filters are learned (see
    ``learning.py``). Each group then loses the input channels with the least energy, up to a share
    β of the energy, and dead structure is removed (see ``pruning.py``). This leaves branched
    architectures, which ``branched`` in the provenance lists: one for each of ``members`` budgets,
    down to ``setting.lowest`` of the base's MACs, with β found by bisection. The trajectory has
    their plain projections: every layer is as wide as the channels left in it, on the grid. Further
    members are the projections that meet the same budgets in plain MACs.

    Deviations: the base is trained and groups are learned by the study's recipe; no epoch is chosen
    by its accuracy; the resulting networks are trained from scratch. Channels of axes that cannot
    be told apart, or that a user pinned, remain; a tied axis is as wide as its widest member.
    Residual streams stay wide, since ungrouped layers (a stem, a projection) make all of their
    channels.

    Attributes:
        groups: Groups of filters per layer; default 4.
        penalty: λ of the group lasso; default 2e-3, the paper's value for ResNet-20 on CIFAR-10
            (5e-4 for ResNet-56) over 47,000 steps. Fewer steps need more.
        group_lr: The learning rate of the logits; default 1e-3.
        temperature: τ of the softmax; default 0.5.
        members: The number of budgets; default 6.
        pretrain: The recipe of the base network; default the study's recipe.
        learn: The recipe while groups are learned; default the study's recipe.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> method = FilterGroups(groups=2, penalty=1.0, members=2)
        >>> proposal = method(space, load_task("digits"), Setting(recipe=Recipe(epochs=1)))
        >>> proposal.trajectory[0] == space.base, sorted(proposal.provenance["branched"][0])
        (True, ['architecture', 'beta', 'budget', 'macs', 'plain'])
    """

    groups: Count = 4
    penalty: Finite = 2e-3
    group_lr: Finite = 1e-3
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    members: Count = 6
    pretrain: Recipe | None = None
    learn: Recipe | None = None

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Train the base network, learn groups, prune at several budgets.

        Raises:
            SpaceError: No layer can be grouped.
            StudyError: Training diverged.
        """
        model, groups, measured = self.learned(space, task, setting)
        pruning = GroupPruning(space, model, groups, self.groups)
        base = pruning.macs(pruning.pruned(0.0))
        shares = np.geomspace(1, setting.lowest, self.members + 1)[1:].tolist()
        branched, betas = [], []
        for share in shares:
            beta = pruning.solve(share * base)
            if beta is None:
                continue
            pruned = pruning.pruned(beta)
            branched.append(
                {
                    "budget": share,
                    "beta": beta,
                    "macs": pruning.macs(pruned),
                    "plain": list(pruning.projected(pruned).vector),
                    "architecture": pruning.architecture(pruned).to_json(),
                }
            )
            betas += [beta, pruning.solve(share * base, plain=True)]
        found = sorted(beta for beta in betas if beta is not None)
        projections = (pruning.projected(pruning.pruned(beta)) for beta in found)
        provenance = {"seed": setting.seed, **asdict(self), **measured, "branched": branched}
        return Proposal(
            "filter_groups", tuple(dict.fromkeys([space.base, *projections])), provenance
        )

    def learned(
        self, space: SearchSpace, task: AnyTask, setting: Setting
    ) -> tuple[nn.Module, Mapping[str, Tensor], dict[str, float]]:
        """Train the base network and learn its groups.

        Returns:
            The network, the group of each filter by layer, and the validation accuracies in percent
            (or the losses of an own task) before and after group learning.
        """
        plain = space.unconstrained
        layers = find_layers(plain)
        if not layers:
            raise SpaceError(
                "filter groups need an ungrouped Conv2d whose inputs and outputs both have free "
                f"widths, but space {space.name!r} has none; use another method (`sensitivity`)"
            )
        pretrain, learn = self.pretrain or setting.recipe, self.learn or setting.recipe
        model = plain.build(plain.base, seed=setting.seed)
        pretrained = train_base(model, task, pretrain, setting)
        groups = learn_groups(
            model,
            layers,
            task,
            learn,
            replace(setting, seed=setting.seed + 1),
            groups=self.groups,
            penalty=self.penalty,
            lr=self.group_lr,
            temperature=self.temperature,
        )
        value = evaluate(model, task, "validation", setting.device, learn.precision)
        return model, groups, {"pretrained": pretrained, "grouped": value}
