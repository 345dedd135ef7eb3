"""HyperINF in kronfluence: its pairwise scoring on factors that we write."""

import tempfile

import torch
from data import trained
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task

import hyperinf_kernels as hk
from hyperinf_kernels.integrations.kronfluence import score_arguments, write_factors


class Classify(Task):
    def compute_train_loss(self, batch, model, sample=False):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def loss(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


model, train, query = trained()
grads = hk.per_sample_gradients(model, train.tensors, loss=loss, blocks=".")
solver = hk.HyperINF()
# kronfluence keeps a bias as the last column of its weight
solver.update({
    f"{k}.weight": torch.cat([grads[f"{k}.weight"], grads[f"{k}.bias"].mT], 2) for k in (0, 2)
})  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    task = Classify()
    analyzer = Analyzer("example", prepare_model(model, task), task, cpu=True, output_dir=folder)
    write_factors(analyzer, "hyperinf", solver.fit())
    analyzer.compute_pairwise_scores(
        "scores", "hyperinf", query, train, per_device_query_batch_size=5,
        per_device_train_batch_size=16, score_args=score_arguments(),
    )  # fmt: skip
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    print("most helpful:", scores.argmax(1).tolist())
