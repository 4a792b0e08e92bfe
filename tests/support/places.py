"""A model with modules at two places."""

import torch
from models import Mlp
from torch import nn


class Places(nn.Module):
    """A linear layer at two places, and a block at three."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.other, self.own = self.one, nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Mlp(), nn.Linear(4, 8)])
        self.blocks.extend(self.blocks[:1])
        self.last = self.blocks[0]

    def forward(self, x):
        x = self.other(torch.tanh(self.own(self.one(x))))
        for block in self.blocks:
            x = block(x)
        return self.last(self.blocks[1](x))
