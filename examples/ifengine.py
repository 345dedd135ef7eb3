"""The HyperINF repository's IFEngine: only the import differs from its notebooks."""

import torch

from hyperinf_kernels.integrations.hyperinf import IFEngine  # was: from influence import IFEngine

torch.manual_seed(0)
tr_grad_dict, val_grad_dict = (
    {k: {"lora_A": torch.randn(4, 32), "lora_B": torch.randn(4, 16)} for k in range(n)}
    for n in (50, 10)
)

engine = IFEngine()
engine.preprocess_gradients(tr_grad_dict, val_grad_dict)
engine.compute_hvps(lambda_const_param=10)
engine.compute_IF()
for method, scores in engine.IF_dict.items():
    print(f"{method:10} {engine.time_dict[method]:.4f} s, most helpful: {scores.argsort()[:3]}")
