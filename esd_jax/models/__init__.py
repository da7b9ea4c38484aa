"""The networks, in Flax NNX: the attributes carry the names of diffusers' and transformers' modules."""
