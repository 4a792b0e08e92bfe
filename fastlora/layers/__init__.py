"""What a module becomes: a linear layer with an adapter, experts, a gated MLP; and which may."""
