"""quanda's mislabelling metric on our explainer."""

from data import trained
from quanda.metrics.downstream_eval import MislabelingDetectionMetric

from hyperinf_kernels.integrations.quanda import HyperINFExplainer

model, train, query = trained()
metric = MislabelingDetectionMetric(
    model=model, train_dataset=train, mislabeling_indices=[0, 1, 2],
    explainer_cls=HyperINFExplainer, expl_kwargs={"blocks": "weight$"},
)  # fmt: skip
print("mislabelling detection:", float(metric.compute()["score"]))
