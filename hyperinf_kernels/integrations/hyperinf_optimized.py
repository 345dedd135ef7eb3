"""The HyperINF repository's `influence_optimized.py`, whose accurate method inverts the GFIM."""

from __future__ import annotations

from .reference import Engine, GenerationEngine

__all__ = ["IFEngine", "IFEngineGeneration"]

KEYS = {
    "hyperinf": "Low-Rank_HyperINF",
    "identity": "identity",
    "datainf": "Datainf",
    "lissa": "LiSSA",
    "accurate_gfim": "accurate",
}


class IFEngine(Engine):
    keys = KEYS


class IFEngineGeneration(GenerationEngine):
    keys = KEYS
