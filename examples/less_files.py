"""LESS' gradient files, selected with a preconditioner."""

import tempfile
from pathlib import Path

import torch

from hyperinf_kernels.integrations.less import calculate_influence_score, selection_scores
from hyperinf_kernels.store.arrays import read_less

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    files = []
    for name, n in (("train", 100), ("validation", 6)):
        rows = torch.nn.functional.normalize(torch.randn(n, 64), dim=1)
        files.append(Path(folder) / f"{name}.pt")
        torch.save(rows.half(), files[-1])
    train, validation = (
        torch.cat([grads["all"][:, 0] for _, grads in read_less(file)]) for file in files
    )
scores = calculate_influence_score(train, validation, method="exact")
print("selected:", selection_scores(scores, [0, 0, 0, 1, 1, 1]).topk(5).indices.tolist())
