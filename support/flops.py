"""Floating-point operations: of pairs, and what share of a GPU's peak a step reaches.

pair_flops       FLOPs of each pair's forward pass, in blocks and in the head
utilisation      MFU and HFU of a step
"""

import numpy as np
import torch

# Dense bf16 TFLOP/s by NVIDIA's datasheets. The first name that the GPU's contains counts.
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
}


def peak_tflops() -> float | None:
    """Of this process's GPU; None if it is not in the table or there is no GPU."""
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def pair_flops(llama, pairs: list, share_prompt: bool) -> np.ndarray:
    """FLOPs of a forward pass, (pairs, 3): of the blocks, of the head, and of what a recomputed
    block computes again, for all blocks.

    2 FLOPs for each weight and token (in the head only for scored tokens), and of attention only
    what the causal mask lets through. Backward has twice as many. A recomputed block computes all
    again but its last product, down_proj. llama: model.LlamaConfig.
    """
    lengths = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs], float)
    n_p, responses = lengths[:, :1], lengths[:, 1:]
    prompts = 1 if share_prompt else (responses > 0).sum(1)  # how often a prompt is computed
    scored = responses.sum(1)
    tokens = prompts * n_p[:, 0] + scored
    seen = prompts * n_p[:, 0] * (n_p[:, 0] + 1) / 2  # pairs of a query and a key
    seen = seen + (responses * n_p + responses * (responses + 1) / 2).sum(1)

    width, inner, layers = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    heads = 2 * llama.num_attention_heads + 2 * llama.num_key_value_heads  # of q, o, k and v
    weights = width * heads * llama.head_dim + 3 * width * inner
    attention = 4 * llama.num_attention_heads * llama.head_dim * seen
    blocks = layers * (2 * weights * tokens + attention)
    again = blocks - layers * 2 * width * inner * tokens
    return np.stack([blocks, 2 * llama.vocab_size * width * scored, again], axis=1)


def utilisation(
    blocks: float, head: float, again: float, recomputed: float, seconds: float, available: float
) -> dict[str, float]:
    """MFU and HFU of a step of so many seconds on devices of `available` FLOPs a second in all.

    blocks, head, again: `pair_flops` of the step; recomputed: the share of blocks that backward
    computes again.
        MFU = 3 (blocks + head) / (seconds * available)
        HFU = the same, with what is computed again
    As PaLM defines them (arXiv 2204.02311, appendix B), but attention that the causal mask hides
    does not count.
    """
    model = 3 * (blocks + head)
    done = model + recomputed * again
    return {"mfu": model / seconds / available, "hfu": done / seconds / available}
