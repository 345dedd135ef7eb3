"""pyDVL's DataInf, right for any number of batches and queries."""

from data import trained
from pydvl.influence import SequentialInfluenceCalculator
from pydvl.influence.torch.util import NestedTorchCatAggregator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

# was: from pydvl.influence.torch import InverseHarmonicMeanInfluence
from hyperinf_kernels.integrations.pydvl import DataInfInfluence

model, train, query = trained()
train_loader = DataLoader(train, 16)
influence = DataInfInfluence(model, cross_entropy, regularization=0.1).fit(train_loader)
lazy = SequentialInfluenceCalculator(influence).influences(DataLoader(query, 2), train_loader)
scores = lazy.compute(aggregator=NestedTorchCatAggregator())
print("most helpful:", scores.argmax(1).tolist())
