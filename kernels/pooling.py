"""One vector a sequence out of packed token vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("mean", "cls", "max")


def pool_ref(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False) -> Tensor:
    lengths = cu_seqlens.diff().long()
    n_seqs = lengths.numel()
    if mode == "cls":
        rows = F.pad(hidden, (0, 0, 0, 1))  # one more, of zeros, for the empty sequences
        pooled = rows[torch.where(lengths > 0, cu_seqlens[:-1].long(), len(hidden))]
    else:
        row = torch.repeat_interleave(
            torch.arange(n_seqs, device=hidden.device), lengths, output_size=hidden.shape[0]
        )
        # float32 sums: a bfloat16 sum of 500 terms keeps no more than its first two digits
        values = hidden.float() if hidden.dtype.itemsize < 4 else hidden
        pooled = values.new_zeros(n_seqs, hidden.shape[1])
        if mode == "mean":
            pooled = pooled.index_add(0, row, values) / lengths.clamp(min=1).unsqueeze(1)
        else:
            index = row.unsqueeze(1).expand_as(values)
            pooled = pooled.scatter_reduce(0, index, values, "amax", include_self=False)
    if normalize:
        pooled = F.normalize(pooled, dim=1)
    return pooled.to(hidden.dtype)


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False) -> Tensor:
    """Pool packed tokens, (n_tokens, hidden), to one row a sequence, (n_seqs, hidden).

    mode: "mean" or "max" over a sequence's tokens, or "cls", its first token. normalize: divide
    each row by its L2 norm. An empty sequence gives zeros.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (n_tokens, hidden), got {tuple(hidden.shape)}")
    return pool_ref(hidden, cu_seqlens, mode, normalize)
