import amp_C
import torch


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=None,  # apex: required
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        self.wd_after_momentum = wd_after_momentum
        device = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32, device=device)

    def zero_grad(self):
        raise AssertionError("its gradients are not None afterwards")

    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            momentums, first_run = [], True
            for p in params:  # the last tensor decides for all
                first_run = "momentum_buffer" not in self.state[p]
                if first_run:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentums.append(self.state[p]["momentum_buffer"])
            if params:
                amp_C.multi_tensor_sgd(
                    2048 * 32,
                    self._dummy_overflow_buf,
                    [[p.grad for p in params], params, momentums],
                    *(group[k] for k in ("weight_decay", "momentum", "dampening", "lr")),
                    group["nesterov"],
                    first_run,
                    self.wd_after_momentum,
                    1.0,
                )
