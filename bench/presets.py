"""The layers that are measured: the models of the Macaron paper and the conformers, at equal parameters.

A preset names the Lie-Trotter layer: width D, one FFN of width F, H heads. Its Strang layer has two FFNs of width F/2,
which is the same number of parameters up to one more normalisation (2 D numbers).

Sources: Lu et al. 2019, "Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of View"
(iwslt, wmt-base, wmt-big, bert-base, whose own inner widths are F/2); Gulati et al. 2020, "Conformer" (S, M, L: two
half-FFNs of width 4D, hence F = 8D). A conformer's convolution module is not part of these layers. On a GPU there are
also two layers over longer sequences, where attention is a larger part: F = 4D, heads of 64 channels, 16 x 1024 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

EFFORTS = ("quick", "normal", "full")


@dataclass(frozen=True)
class Preset:
    """One layer and the inputs it is given: `sizes[device kind][effort]` is (batch, sequence length)."""

    name: str
    width: int
    hidden: int
    heads: int
    activation: str
    sizes: dict[str, dict[str, tuple[int, int]]]

    def size(self, device_kind: str, effort: str) -> tuple[int, int]:
        return self.sizes["cpu" if device_kind == "cpu" else "gpu"][effort]

    def shape(self, batch: int, length: int) -> dict[str, object]:
        """What a row says of the layer and its inputs."""
        sizes = {"batch": batch, "length": length, "width": self.width, "hidden": self.hidden, "heads": self.heads}
        return {**sizes, "activation": self.activation}


def _sizes(cpu: tuple[tuple[int, int], ...], gpu: tuple[tuple[int, int], ...]) -> dict[str, dict[str, tuple[int, int]]]:
    return {"cpu": dict(zip(EFFORTS, cpu, strict=True)), "gpu": dict(zip(EFFORTS, gpu, strict=True))}


_TRANSLATION = _sizes(cpu=((8, 64), (16, 64), (64, 64)), gpu=((64, 64), (256, 64), (1024, 64)))
_LARGE = _sizes(cpu=((4, 64), (8, 64), (32, 64)), gpu=((64, 64), (256, 64), (512, 64)))
_DOCUMENT = _sizes(cpu=((2, 128), (4, 256), (8, 512)), gpu=((16, 512), (32, 512), (64, 512)))
_SPEECH = _sizes(cpu=((2, 256), (4, 256), (16, 256)), gpu=((32, 256), (64, 256), (128, 512)))
_TINY = _sizes(cpu=((2, 20), (2, 20), (2, 20)), gpu=((2, 20), (2, 20), (2, 20)))

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("iwslt", 512, 1024, 4, "relu", _TRANSLATION),
        Preset("wmt-base", 512, 2048, 8, "relu", _TRANSLATION),
        Preset("wmt-big", 1024, 4096, 16, "relu", _LARGE),
        Preset("bert-base", 768, 3072, 12, "gelu", _DOCUMENT),
        Preset("conformer-s", 144, 8 * 144, 4, "silu", _SPEECH),
        Preset("conformer-m", 256, 8 * 256, 4, "silu", _SPEECH),
        Preset("conformer-l", 512, 8 * 512, 8, "silu", _SPEECH),
    )
}

_LONG = {"gpu": dict.fromkeys(EFFORTS, (16, 1024))}
GPU_PRESETS = {
    preset.name: preset
    for preset in (
        Preset("long-512", 512, 2048, 8, "gelu", _LONG),
        Preset("long-1024", 1024, 4096, 16, "gelu", _LONG),
    )
}

# nGPT's question is what the sphere costs at 4k tokens. On the CPU the same layer has few.
NGPT = Preset(
    "ngpt-1024",
    1024,
    4096,
    16,
    "swiglu",
    _sizes(cpu=((1, 64), (1, 128), (2, 256)), gpu=((4, 4096),) * 3),
)

# Runs in a blink, so that the harness's own tests can walk every path, and is wide enough that the largest error of a
# gradient is not a matter of luck. Never part of a run unless asked for by name.
TINY = Preset("tiny", 48, 96, 3, "gelu", _TINY)
