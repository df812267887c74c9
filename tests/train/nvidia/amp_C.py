"""Stand-in of apex's kernels (csrc/multi_tensor_*.cu): loops over tensors, demands as asserts.

Like the kernels it reads flag, rate and counter where they are, never on the host, and takes a
tensor's elements as they lie in memory.
"""

import torch


def _demands(noop, lists, floats=(), ints=()):
    assert noop.dtype == torch.int32 and noop.numel() == 1
    assert len(lists[0]) > 0, "tensor_lists[0].size() is not > 0"
    for tensors in zip(*lists, strict=True):
        for t in tensors:
            assert t.dtype == torch.float32 and t.device == noop.device
            assert t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last), (
                "A tensor was not contiguous."
            )
            # Not checked by apex, which would take the elements of one for those of another.
            strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
            first = tensors[0].stride()
            assert strides == [s for s, n in zip(first, t.shape, strict=True) if n > 1]
    for x, dtype in [(x, torch.float32) for x in floats] + [(x, torch.int32) for x in ints]:
        assert isinstance(x, torch.Tensor) and x.dtype == dtype and x.device == noop.device


def _write(noop, old, new):
    old.copy_(torch.where(noop == 0, new, old))


@torch.no_grad()
def multi_tensor_sgd(
    chunk_size, noop_flag, tensor_lists, wd, momentum, dampening, lr, nesterov, first_run,
    wd_after_momentum, scale,
):  # fmt: skip
    assert not nesterov and not wd_after_momentum and isinstance(lr, float)
    _demands(noop_flag, tensor_lists)
    for g, p, m in zip(*tensor_lists, strict=True):
        g = g * scale + wd * p
        new = g
        if momentum:
            new = g if first_run else m * momentum + (1 - dampening) * g
            _write(noop_flag, m, new)
        _write(noop_flag, p, p - lr * new)


def _moments(g, m, v, beta1, beta2, beta3, step, bias_correction):
    m = beta1 * m + beta3 * g
    v = beta2 * v + (1 - beta2) * g * g
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    return m, v, m / corrections[0], v / corrections[1]


@torch.no_grad()
def multi_tensor_adam_capturable(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction,
    weight_decay, inv_scale,
):  # fmt: skip
    assert mode == 1, "only AdamW is imitated"
    _demands(noop_flag, tensor_lists, (lr, inv_scale), (step,))
    for g, p, m, v in zip(*tensor_lists, strict=True):
        g = g * inv_scale
        new_m, new_v, m_hat, v_hat = _moments(
            g, m, v, beta1, beta2, 1 - beta1, step, bias_correction
        )
        _write(noop_flag, p, p - lr * (m_hat / (v_hat.sqrt() + epsilon) + weight_decay * p))
        _write(noop_flag, m, new_m)
        _write(noop_flag, v, new_v)


def multi_tensor_adam(*args):
    raise AssertionError("the flag would not be looked at")


multi_tensor_adam_capturable_master = multi_tensor_adam


@torch.no_grad()
def multi_tensor_l2norm_mp(chunk_size, noop_flag, tensor_lists, per_tensor):
    _demands(noop_flag, tensor_lists)
    norms = torch.stack([t.norm() for t in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms[:0]


@torch.no_grad()
def multi_tensor_lamb_mp(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, bias_correction,
    weight_decay, grad_averaging, mode, global_grad_norm, max_grad_norm, use_nvlamb, found_inf,
    inv_scale,
):  # fmt: skip
    assert mode == 1, "only decoupled decay is imitated"
    floats = (lr, global_grad_norm, max_grad_norm, found_inf, inv_scale)
    _demands(noop_flag, tensor_lists, floats, (step,))
    over = global_grad_norm > max_grad_norm
    clip = torch.where(over, global_grad_norm / max_grad_norm, torch.ones_like(global_grad_norm))
    for g, p, m, v in zip(*tensor_lists, strict=True):
        beta3 = 1 - beta1 if grad_averaging else 1.0
        new_m, new_v, m_hat, v_hat = _moments(
            g * inv_scale / clip, m, v, beta1, beta2, beta3, step, bias_correction
        )
        update = m_hat / (v_hat.sqrt() + epsilon) + weight_decay * p
        ratio = torch.ones(())
        if use_nvlamb or weight_decay != 0:
            w, u = p.norm(), update.norm()
            ratio = torch.where((u != 0) & (w != 0), w / u, ratio)
        _write(noop_flag, g, update)  # so it is: the gradient is the workspace
        _write(noop_flag, p, p - lr * ratio * update)
        _write(noop_flag, m, new_m)
        _write(noop_flag, v, new_v)
