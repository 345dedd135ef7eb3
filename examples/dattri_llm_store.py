"""HyperINF on gradients that dattri-llm stored."""

import tempfile

import torch
from data import trained
from dattri_llm import AttributionArguments, AttributionTask
from torch.utils.data import Dataset

from hyperinf_kernels.integrations.dattri_llm import HyperINFAttributor


class Rows(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return dict(zip("xy", self.data[index], strict=True))


def loss(model, batch):
    # a sum, because dattri-llm does not undo a mean over the batch
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


model, train, query = trained()
with tempfile.TemporaryDirectory() as folder:
    arguments = AttributionArguments(output_dir=folder, per_device_train_batch_size=16,
                                     use_cpu=True)  # fmt: skip
    attributor = HyperINFAttributor(arguments, task=AttributionTask(loss, model))
    [(train_store, query_store)] = attributor.cache(Rows(train), Rows(query))
    score = attributor.attribute_from_cache(train_store, query_store)
    print("most helpful:", score.scores.argmax(0).tolist())
