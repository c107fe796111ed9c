"""BERT's input: word + token type + position embedding, layer norm, dropout."""

import torch.nn.functional as F
from torch import Tensor


def embed_ref(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> Tensor:
    x = F.embedding(input_ids, word, padding_idx) + F.embedding(token_type_ids, token_type)
    x = F.layer_norm(x + F.embedding(position_ids, position), word.shape[-1:], weight, bias, eps)
    return F.dropout(x, dropout_p) if dropout_p else x


def embed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> Tensor:
    """Look up three tables, add, normalise: (n_tokens,) ids to (n_tokens, hidden).

    input_ids, token_type_ids, position_ids: (n_tokens,) int32 or int64, inside their tables: not
    checked here. word: (vocab_size, hidden), token_type: (type_vocab_size, hidden), position:
    (max_position_embeddings, hidden), weight, bias: (hidden,), all of one dtype. padding_idx: the
    row of `word` that gets no gradient.
    """
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(ids.shape)}"
            )
    for name, table in (("token_type", token_type), ("position", position)):
        if table.shape[1:] != word.shape[1:] or table.dtype != word.dtype:
            raise ValueError(
                f"{name} must be (rows, {word.shape[-1]}) {word.dtype} as word, "
                f"got {tuple(table.shape)} {table.dtype}"
            )
    return embed_ref(
        input_ids, token_type_ids, position_ids,
        word, token_type, position, weight, bias, dropout_p, eps, padding_idx,
    )  # fmt: skip
