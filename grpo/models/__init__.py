"""Models: loading, families, LoRA, reference, distribution strategies, weight synchronisation."""
