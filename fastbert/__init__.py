"""BERT made fast without changing it: packed tokens, fused kernels, the same numbers.

Everything is imported when it is first used, so that `fastbert --help` waits for nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastbert.config import BertConfig
    from fastbert.conversion import convert
    from fastbert.drop_in import Acceleration, accelerate, restore
    from fastbert.embed import Embedder
    from fastbert.heads import (
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )
    from fastbert.lm import BertForMaskedLM, BertForPreTraining, BertLMHeadModel
    from fastbert.model import BertModel
    from fastbert.packing import PackedBatch, pack, unpack
    from fastbert.pretrained import BertPreTrainedModel
    from fastbert.quantization import quantize
    from fastbert.tokenizer import AddedToken, BatchEncoding, BertTokenizer
    from fastbert.vocab import train_vocab

_MODULES = {
    "Acceleration": "drop_in",
    "AddedToken": "tokenizer",
    "BatchEncoding": "tokenizer",
    "BertConfig": "config",
    "BertForMaskedLM": "lm",
    "BertForMultipleChoice": "heads",
    "BertForNextSentencePrediction": "heads",
    "BertForPreTraining": "lm",
    "BertForQuestionAnswering": "heads",
    "BertForSequenceClassification": "heads",
    "BertForTokenClassification": "heads",
    "BertLMHeadModel": "lm",
    "BertModel": "model",
    "BertPreTrainedModel": "pretrained",
    "BertTokenizer": "tokenizer",
    "Embedder": "embed",
    "PackedBatch": "packing",
    "accelerate": "drop_in",
    "convert": "conversion",
    "pack": "packing",
    "quantize": "quantization",
    "restore": "drop_in",
    "train_vocab": "vocab",
    "unpack": "packing",
}
__all__ = [
    "Acceleration",
    "AddedToken",
    "BatchEncoding",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "BertPreTrainedModel",
    "BertTokenizer",
    "Embedder",
    "PackedBatch",
    "accelerate",
    "convert",
    "pack",
    "quantize",
    "restore",
    "train_vocab",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(import_module(f"fastbert.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
