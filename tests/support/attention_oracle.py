"""An attention processor of torch that scales, detaches and keeps maps by hand."""

import torch


class ByHand:
    """diffusers' attention written out; `scale` multiplies the maps' columns, `detach` stops the tokens' gradients."""

    def __init__(self, scale=None, detach=None):
        self.scale, self.detach, self.maps = scale, detach, None

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            h.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for h in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        if self.detach is not None:
            detached = torch.from_numpy(self.detach)[:, None, :, None]
            k, v = (torch.where(detached, h.detach(), h) for h in (k, v))
        self.maps = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        if self.scale is not None:
            self.maps = self.maps * torch.from_numpy(self.scale)[:, None, None, :]
        return attn.to_out[0]((self.maps @ v).transpose(1, 2).flatten(-2))
