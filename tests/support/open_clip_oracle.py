"""open_clip's text model as its code builds it, so that a file is opened strictly under the names that follow."""

import torch
from torch import nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class TextModel(nn.Module):
    """What Stability's codes keep of it: all but the image half."""

    def __init__(self, vocabulary, width, inner, heads, *, layers, projection):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, inner, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, projection))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.eval()

    def forward(self, ids, *, skip_last):
        """(the last hidden state, its norm, the projection at the end of the text)."""
        mask = torch.full((77, 77), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding
        for block in list(self.transformer.resblocks)[: -1 if skip_last else None]:
            x = block(x, mask)
        normed = self.ln_final(x)
        return x, normed, normed[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
