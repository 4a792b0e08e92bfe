"""Module classes with fast calls: adapted linear layers, experts, gated MLPs; and their checks."""
