"""Folders of models with random weights, so small that a few hundred steps teach them something."""

import torch

from fastbert import BertConfig, BertForMaskedLM, BertTokenizer


def save_model(folder, words, **changes):
    """A model that knows these words, of one layer of 32 columns but for the changes."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # as small as it is, it would learn little from 0.02
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).replace(**changes)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizer({token: i for i, token in enumerate(vocab)}).save_pretrained(folder)
    return folder
