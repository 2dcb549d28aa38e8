"""What integrations share: the layer behind a router's logits, loading of experts, versions; no framework."""
