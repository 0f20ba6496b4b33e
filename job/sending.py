"""Arrays on their way to the device, which is not waited for: it may still be at work on what came before."""

import numpy as np
import torch


def sent(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The values on the device, in their own type. torch waits for all that the GPU has to do before it copies from
    memory that is not pinned."""
    here = torch.from_numpy(values)
    return here.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else here
