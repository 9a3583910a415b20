"""Modules: parameters, and one call of an operator."""

from .attend_step import AttendStep
from .embedding import TokenEmbedding
from .ffn_step import FFNStep
from .language_model import MacaronLM
from .lie_trotter import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from .macaron import MacaronDecoderLayer, MacaronEncoderLayer
from .macaron_bert import MacaronBert
from .momentum import MomentumStack
from .ngpt import NGPT, NGPTLayer, keep_normalized
from .norm import SphereNorm
from .split_layer import SplitLayer
from .split_stack import SplitStack
from .stacks import MacaronDecoder, MacaronEncoder
from .transformer import MacaronTransformer

__all__ = [
    "NGPT",
    "AttendStep",
    "FFNStep",
    "LieTrotterDecoderLayer",
    "LieTrotterEncoderLayer",
    "MacaronBert",
    "MacaronDecoder",
    "MacaronDecoderLayer",
    "MacaronEncoder",
    "MacaronEncoderLayer",
    "MacaronLM",
    "MacaronTransformer",
    "MomentumStack",
    "NGPTLayer",
    "SphereNorm",
    "SplitLayer",
    "SplitStack",
    "TokenEmbedding",
    "keep_normalized",
]
