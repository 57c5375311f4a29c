"""Which parameters share a learning rate and a weight decay."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LearningRates:
    """Of the parts of a model, at the top of the schedule that they all follow; None is `main`."""

    main: float
    vision: float | None = None
    mlp: float | None = None

    @property
    def own(self) -> Mapping[str, float]:
        """The parts that have one of their own, by the name that metrics give them."""
        rates = {"vision": self.vision, "mlp": self.mlp}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def get(self, name: str) -> float:
        """Get a parameter's; the adapters of a part belong to it."""
        part = "vision" if ".vision_tower." in name else "mlp" if ".multi_modal_projector." in name else "main"
        return self.own.get(part, self.main)


def build_parameter_groups(
    model: nn.Module, rates: LearningRates, *, decayed: Container[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Group what learns by learning rate and weight decay, the groups of the main rate first.

    Args:
        decayed: names of the parameters that decay.

    Returns:
        Groups as torch's optimizers take them; none is empty.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (rates.get(name), weight_decay if name in decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    # Trainer logs the rate of the first.
    ordered = sorted(groups.items(), key=lambda item: item[0][0] != rates.main)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in ordered]
