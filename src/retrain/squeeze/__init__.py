"""LoRA-Squeeze: which rank an adapter needs, layer by layer, and the adapter at that rank."""
