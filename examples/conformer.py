"""A speech encoder before and after ``macaron_ops.replace_layers``: the half-steps of every Conformer layer, fused.

A Conformer layer is a Strang splitting with a convolution in it: half an FFN step, attention, convolution, half an FFN
step. The model is transformers' Parakeet encoder with random weights, so that nothing is downloaded; shown are the
report, how far outputs and gradients are from the model's own, and the time of a training step.

    python examples/conformer.py
    python examples/conformer.py --width 512 --layers 17 --seconds 8
"""

import argparse
import copy
import statistics
import time

import torch
import transformers

import macaron_ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4, help="of audio in each of two recordings")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the median is shown")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = transformers.ParakeetEncoderConfig(
        hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=8, intermediate_size=4 * args.width
    )
    before = transformers.AutoModel.from_config(config).eval()
    frames = int(100 * args.seconds)
    inputs = {
        "input_features": torch.randn(2, frames, config.num_mel_bins),
        "attention_mask": (torch.arange(frames) < torch.tensor([[frames], [frames // 2]])).long(),
    }
    after = copy.deepcopy(before)
    print(macaron_ops.replace_layers(after, strict=True))

    def step(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and all gradients in one vector."""
        model.zero_grad()
        y = model(**inputs).last_hidden_state
        y.square().mean().backward()
        return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for name, a, b in zip(("output", "gradients"), step(before), step(after), strict=True):
        print(f"{name}: largest difference {(a - b).abs().max() / a.abs().max():.1e} of the largest number")
    times: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(args.repeats):  # by turns
        for name, model in (("before", before), ("after", after)):
            start = time.perf_counter()
            step(model)
            times[name].append(1e3 * (time.perf_counter() - start))
    print("a step: " + ", ".join(f"{statistics.median(t):.0f} ms {name}" for name, t in times.items()))
    print(macaron_ops.restore_layers(after))


if __name__ == "__main__":
    main()
