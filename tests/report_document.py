"""A realistic report.json to render, and the rendered page as a browser reads it."""

from __future__ import annotations

import math
import random
from html.parser import HTMLParser
from typing import Any

Document = dict[str, Any]

CLASSES = {
    "reverse words": ("Reverse the order of the words: ", "in the garden sleeps cat the"),
    "count vowels": ("How many vowels are in this sentence? ", "There are nine vowels in it."),
    "past tense": ("Rewrite the sentence in the past tense: ", "The gardener watered the roses."),
    "uppercase": ("Write the sentence in capital letters: ", "THE RIVER FREEZES IN JANUARY."),
    "pig latin": ("Translate into Pig Latin: ", "ethay iverray eezesfray inyay anuaryjay"),
}
SENTENCES = (
    "The cat sleeps in the garden.",
    "The river freezes in January, but the children skate on it long before the ice is safe.",
    "My neighbour repairs old clocks.",
    "Nobody noticed that the train to Lyon had left four minutes early.",
    "A good map tells you what to leave out.",
)
METHODS = {
    "hyperinf": ("HyperINF (converged)", 0.981, 0.02, 0.93, 0.06),
    "datainf": ("DataInf", 0.962, 0.03, 0.85, 0.11),
    "grad_dot": ("Gradient dot product", 0.889, 0.08, 0.61, 0.19),
}


def make_block(i: int, method: str, rng: random.Random) -> Document:
    """One block's report, as the solvers write it."""
    solved = method == "hyperinf"
    side, wide = ("lora_A", 576) if i % 2 == 0 else ("lora_B", 192 if i % 4 == 3 else 576)
    name = f"model.layers.{i // 4}.self_attn.{'q' if i % 4 < 2 else 'v'}_proj.{side}.weight"
    fell = solved and i in (17, 74)
    return {
        "block": name,
        "method": "direct" if fell else "schulz" if solved else method,
        "backend": "cpu",
        "precision": "fp64" if fell else "fp32",
        "n": 900,
        "shape": [8, wide],
        "damping": 10 ** rng.uniform(-7, -5),
        "condition_bound": 10 ** rng.uniform(3.5, 4.7) if solved else None,
        "products": 14 if solved else 0,
        "iterations": 4 if solved else 0,
        "residual": 10 ** rng.gauss(-13 if fell else -6.9, 0.25) if solved else None,
        "converged": True,
        "fallback": "residual 3e-4 missed the tolerance, solved directly in fp64" if fell else None,
        "collapse_angle": rng.uniform(28, 74) if solved else None,
    }


def make_example(i: int, kind: str, influence: float, rng: random.Random) -> Document:
    question, answer = CLASSES[kind]
    text = f"{question}{rng.choice(SENTENCES)}"
    return {
        "id": i,
        "influence": influence,
        "prompt": text,
        "answer": answer,
        "class": kind,
        "corrupted": rng.random() < 0.12,
    }


def make_query(i: int, methods: list[str], rng: random.Random) -> Document:
    kind = rng.choice(list(CLASSES))
    lists: Document = {}
    for method in methods:
        p_same = METHODS.get(method, METHODS["datainf"])[3]
        size = 10 ** rng.uniform(1.5, 3.5)
        lists[method] = {
            name: [
                make_example(
                    rng.randrange(900),
                    kind if rng.random() < share else rng.choice(list(CLASSES)),
                    sign * size * 0.82**k * rng.uniform(0.9, 1.0),
                    rng,
                )
                for k in range(5)
            ]
            for name, sign, share in (("helpful", -1, p_same), ("harmful", 0.45, 0.1))
        }
    question, answer = CLASSES[kind]
    prompt = f"{question}{rng.choice(SENTENCES)} (query {i})"
    return {"id": i, "prompt": prompt, "answer": answer, "class": kind, "methods": lists}


def make_curve(auc: float) -> Document:
    xs = [i / 60 for i in range(61)]
    power = (1 - auc) / auc
    return {
        "name": "same class (ROC)",
        "x": xs,
        "y": [x**power for x in xs],
        "x_label": "false positive rate",
        "y_label": "true positive rate",
    }


def make_document(
    *,
    blocks: int = 120,
    queries: int = 20,
    methods: tuple[str, ...] = tuple(METHODS),
    seed: int = 0,
) -> Document:
    """A report.json such as an identification run on a small language model writes."""
    rng = random.Random(seed)
    parts = []
    for method in methods:
        label, auc, auc_sd, recall, recall_sd = METHODS.get(method, METHODS["datainf"])
        reports = [make_block(i, method, rng) for i in range(blocks)]
        residuals = [b["residual"] for b in reports if b["residual"] is not None]
        edges = [-5000 + 200 * i for i in range(51)]
        parts.append(
            {
                "method": method,
                "label": label if method in METHODS else method,
                "damping": "0.1 x mean squared gradient",
                "seconds": {"fit": rng.uniform(0.5, 3), "score": rng.uniform(1, 4)},
                "histogram": {
                    "edges": edges,
                    "counts": [round(20000 * math.exp(-abs(e + 100) / 420)) for e in edges[:-1]],
                },
                "metrics": {
                    "same class": {
                        "auc_mean": auc,
                        "auc_sd": auc_sd,
                        "recall_mean": recall,
                        "recall_sd": recall_sd,
                    },
                    "corrupted": {"auc": auc - 0.2, "recall": recall - 0.3},
                },
                "curves": [
                    make_curve(auc),
                    {
                        "name": "corrupted (detection)",
                        "x": [i / 40 for i in range(41)],
                        "y": [(i / 40) ** (1.3 - auc) for i in range(41)],
                        "x_label": "share of the training set inspected",
                        "y_label": "share of the corrupted rows found",
                    },
                ],
                "certificate": {
                    "certified": True,
                    "worst_residual": max(residuals, default=None),
                    "summary": f"all {blocks} blocks solved"
                    if residuals
                    else "closed form, no linear system had to be solved",
                    "tolerance": 1e-6,
                },
                "blocks": reports,
            }
        )
    baselines = [
        ("observed label only", 0.5, 0.1),
        ("token overlap", 0.713, 0.34),
    ]
    return {
        "format": 1,
        "title": "Which training sentences taught which trick?",
        "command": "identify",
        "created": "2025-03-01T10:20:30+00:00",
        "seed": 42,
        "environment": {
            "hyperinf_kernels": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11.7",
            "device": "cpu",
            "threads": 2,
            "backends": {
                "gram_accumulate_": "torch",
                "spd_inverse": "cpu",
                "schulz_solve": "torch",
            },
        },
        "model": {
            "name": "SmolLM2-135M",
            "adapter": "runs/sentences-r8",
            "blocks": blocks,
            "parameters": 460_800,
            "loss": "causal LM, answer tokens, summed per example",
            "skill": {"base": 0.01, "tuned": 0.35, "unit": "accuracy"},
        },
        "data": {
            "train": {"source": "sentences.jsonl", "rows": 900},
            "query": {"source": "sentences-test.jsonl", "rows": queries},
        },
        "seconds": {"fine-tune": 80.1, "gradients": 31.0, "solve and score": 6.4, "write": 0.21},
        "methods": parts,
        "baselines": [
            {
                "name": name,
                "metrics": {"same class": {"auc_mean": auc, "auc_sd": 0.05, "recall_mean": recall}},
                "curves": [make_curve(auc)],
            }
            for name, auc, recall in baselines
        ],
        "queries": [make_query(i, list(methods), rng) for i in range(queries)],
    }


VOID = {"meta", "input", "br"}
URL_ATTRIBUTES = {"src", "href", "xlink:href", "action", "formaction", "data", "poster", "srcset"}


class Page(HTMLParser):
    """The page as a browser reads it: elements with attributes, text, and whether tags balance."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open[-1:] == [name], f"</{name}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def having(self, kind: str) -> list[dict[str, str | None]]:
        """Attributes of all elements with a class."""
        return [a for _, a in self.elements if kind in (a.get("class") or "").split()]

    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.elements if "id" in a]
