"""What adding up costs products in FP8: as the units do it fastest, and in fp32.

    python -m bench.fp8_sums

Products [4096, K] by [K, N] of normally distributed values, with a mean of 0 or of 0.3 deviations, against the same FP8
numbers' in fp64: what part of it least squares find in the result, how far the result is from it, and microseconds. A
CPU adds up in fp32 either way, and is not timed. Results with date and hardware: bench/RESULTS.md.
"""

import torch

from bench.fp8_learning import distance
from job import fp8

ROWS = 4096
SHAPES = ((576, 576), (1536, 576), (4096, 4096), (11008, 4096), (4096, 11008))
"""K and N: of SmolLM2-135M, and of a 7B Llama."""


def part(found: torch.Tensor, expected: torch.Tensor) -> float:
    """What part of the expected is in what is found."""
    return float((found.double() * expected).sum() / (expected**2).sum())


def cells(left: fp8.Scaled, right: fp8.Scaled, exact: torch.Tensor, fast: bool) -> str:
    """Of one product."""

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            left[0],
            right[0].T,
            scale_a=left[1],
            scale_b=right[1].T,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    took = ""
    if exact.is_cuda:
        from triton.testing import do_bench

        took = f"{do_bench(product, return_mode='median') * 1000:.0f}"
    found = product()
    return f"{part(found, exact):.5f} | {distance(found, exact):.2%} | {took}"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print("| K, N | mean | fast: part | distance | us | fp32: part | distance | us |\n" + "|---" * 8 + "|")
    for inner, width in SHAPES:
        for mean in (0.0, 0.3):
            x, weight = (torch.randn(rows, inner, device=device) + mean for rows in (ROWS, width))
            left, right = fp8.scaled(x.bfloat16()), fp8.scaled(weight.bfloat16())
            exact = (left[0].double() * left[1]) @ (right[0].double() * right[1]).T
            both = " | ".join(cells(left, right, exact, fast) for fast in (True, False))
            print(f"| {inner}, {width} | {mean:g} | {both} |", flush=True)


if __name__ == "__main__":
    main()
