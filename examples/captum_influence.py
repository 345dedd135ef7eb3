"""captum's influence() with HyperINF embeddings."""

import tempfile

import torch
from data import trained

from hyperinf_kernels.integrations.captum import HyperInfInfluenceFunction

model, train, query = trained()
with tempfile.NamedTemporaryFile(suffix=".pt") as checkpoint:
    torch.save(model.state_dict(), checkpoint.name)
    function = HyperInfInfluenceFunction(
        model, train, checkpoint.name, loss_fn=torch.nn.CrossEntropyLoss(), batch_size=16,
        sample_wise_grads_per_batch=True,
        checkpoints_load_func=lambda m, path: m.load_state_dict(torch.load(path)) and 1.0,
    )  # fmt: skip
    found = function.influence(query.tensors, k=1)
    print("most helpful:", found.indices[:, 0].tolist())
