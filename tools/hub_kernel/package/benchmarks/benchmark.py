"""``kernels benchmark FOLDER``: a layer's forward, and torch's three products."""

import torch
from kernels.benchmark import Benchmark

ROWS, WIDTH, RANK, SCALE = 2048, 4096, 16, 2.0


class LoRALinearBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=torch.bfloat16) / shape[-1] ** 0.5

        self.layer = self.kernel.layers.LoRALinear()
        self.layer.weight, self.layer.bias, self.layer.scaling = drawn(WIDTH, WIDTH), None, SCALE
        self.layer.lora_A, self.layer.lora_B = drawn(RANK, WIDTH), drawn(WIDTH, RANK)
        self.x = drawn(ROWS, WIDTH)
        self.out = self.x.new_empty(ROWS, WIDTH)

    def benchmark_forward(self) -> None:
        with torch.no_grad():
            self.out = self.layer(self.x)

    def verify_forward(self) -> torch.Tensor:
        layer, x = self.layer, self.x
        return x @ layer.weight.T + SCALE * (x @ layer.lora_A.T) @ layer.lora_B.T
