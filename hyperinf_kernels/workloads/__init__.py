"""One file per kind of row: how it is read, encoded, batched and shown, its losses and its skill.

Every file has one class that fits `protocol.Workload`. A new kind is a new file and a line here.
"""

from .chat import Chat
from .classification import Classification
from .prompted import Prompted
from .protocol import Workload
from .seq2seq import Seq2Seq
from .text import Text

KINDS: tuple[Workload, ...] = (Prompted(), Classification(), Text(), Seq2Seq(), Chat())

__all__ = ["KINDS", "Workload"]
