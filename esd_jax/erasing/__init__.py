"""What erasing methods share: their shape, concepts as encoded prompts, sampled x_t, and the search for embeddings."""
