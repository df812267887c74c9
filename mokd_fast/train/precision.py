"""train.precision=auto: bf16 where its products are faster than those of fp32."""

import torch


def choose_precision(wish: str, device: torch.device) -> tuple[str, str]:
    """fp32, bf16 or fp16 for a wish that may be auto, and for auto the reason."""
    if wish != "auto":
        return wish, ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} has it"
        return "fp32", f"{name} has no bf16; train.precision=fp16 is there"
    # An older torch cannot say.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    have = [name for name in ("amx_bf16", "avx512_bf16") if found.get(name)]
    if have:
        return "bf16", f"the processor has {have[0]}"
    return "fp32", "no amx_bf16 and no avx512_bf16 is seen in the processor"
