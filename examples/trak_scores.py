"""TRAK with DataInf instead of its rescaled inverse."""

import functools
import tempfile

from data import trained
from torch.utils.data import DataLoader
from trak import TRAKer

import hyperinf_kernels as hk
from hyperinf_kernels.integrations.trak import ScoreComputer

model, train, query = trained()
with tempfile.TemporaryDirectory() as folder:
    computer = functools.partial(ScoreComputer, method="datainf", damping=hk.DataInfDamping(0.1))
    build = functools.partial(
        TRAKer, model=model, task="image_classification", train_set_size=60, save_dir=folder,
        device="cpu", proj_dim=32, use_half_precision=False, score_computer=computer,
    )  # fmt: skip
    traker = build()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in DataLoader(train, 16):
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker = build()
    traker.start_scoring_checkpoint("queries", model.state_dict(), 0, num_targets=5)
    for batch in DataLoader(query, 2):
        traker.score(batch, num_samples=len(batch[0]))
    print("most helpful:", traker.finalize_scores("queries").argmax(0).tolist())
