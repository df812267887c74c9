import amp_C
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert capturable and not master_weights and not amsgrad, "the rest is not imitated"
        defaults = {
            "lr": torch.tensor(lr),
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = int(adam_w_mode)
        self.param_groups_master = [
            {"params": [None for _ in group["params"]]} for group in self.param_groups
        ]
        device = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32, device=device)

    def zero_grad(self):
        raise AssertionError("not called: it takes no set_to_none")

    def step(
        self,
        closure=None,
        grads=None,
        output_params=None,
        scale=None,
        grad_norms=None,
        grad_scaler=None,
    ):
        for group, master in zip(self.param_groups, self.param_groups_master, strict=True):
            assert len(master["params"]) == len(group["params"]), "the rest would be left out"
            if not group["params"]:
                continue
            device = group["params"][0].device
            if "step" in group:  # before the flag of this step is there, in the first group
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int32)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int32, device=device)
            lists = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
                for rows, t in zip(lists, (p.grad, p, *self.state[p].values()), strict=True):
                    rows.append(t)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            inv_scale = grad_scaler._get_scale_async().double().reciprocal().float()
            if lists[0]:
                amp_C.multi_tensor_adam_capturable(
                    2048 * 32,
                    self._dummy_overflow_buf,
                    lists,
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["step"],
                    self.adam_w_mode,
                    int(group["bias_correction"]),
                    group["weight_decay"],
                    inv_scale,
                )
