"""From gradients, or a model and its data, to influence scores."""

from .attributor import Attributor
from .influence import influence
from .scores import InfluenceScores, Ranked

__all__ = ["Attributor", "InfluenceScores", "Ranked", "influence"]
