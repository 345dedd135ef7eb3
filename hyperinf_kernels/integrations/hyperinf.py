"""The HyperINF repository's `influence.py`: change the import, keep the script."""

from __future__ import annotations

from .reference import Engine, GenerationEngine

__all__ = ["IFEngine", "IFEngineGeneration"]

KEYS = {
    "identity": "identity",
    "hyperinf": "iterative",
    "datainf": "datainf",
    "lissa": "LiSSA",
    "accurate": "accurate",
}


class IFEngine(Engine):
    keys = KEYS


class IFEngineGeneration(GenerationEngine):
    keys = KEYS
