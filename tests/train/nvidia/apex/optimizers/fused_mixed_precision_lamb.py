import amp_C
import torch


class FusedMixedPrecisionLamb(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        step=0,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
        reduced_precision_dtype=None,
    ):
        assert reduced_precision_dtype is None and not amsgrad, "the rest is not imitated"
        defaults = {
            "lr": torch.tensor(lr),
            "step": torch.tensor([step], dtype=torch.int32),
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)
        device = self.param_groups[0]["params"][0].device
        for group in self.param_groups:
            group |= {key: group[key].to(device) for key in ("lr", "step")}
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32, device=device)
        self.adam_w_mode, self.use_nvlamb = int(adam_w_mode), use_nvlamb
        self.param_groups_full_precision = []

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for name, default in self.defaults.items():
            if isinstance(default, torch.Tensor):
                self.param_groups[-1][name] = default.clone()

    def load_state_dict(self, state_dict):
        """Tensors stay on the device that they come from."""
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [
            saved | {"params": group["params"]}
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        state = {params[i]: dict(row) for i, row in state_dict["state"].items()}
        self.__setstate__({"state": state, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        if not self.param_groups_full_precision:
            self.param_groups_full_precision = [
                {"params": [None for _ in group["params"]]} for group in self.param_groups
            ]
        device = self.param_groups[0]["params"][0].device
        found_inf = grad_scaler._check_inf_per_device(self)[device]
        self._dummy_overflow_buf.copy_(found_inf)
        scale = grad_scaler._get_scale_async()
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = amp_C.multi_tensor_l2norm_mp(2048 * 32, self._dummy_overflow_buf, [grads], False)[0]
        full = self.param_groups_full_precision
        for group, others in zip(self.param_groups, full, strict=True):
            assert len(others["params"]) == len(group["params"]), "the rest would be left out"
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int32)
            lists = [[], [], [], []]
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
                for rows, t in zip(lists, (p.grad, p, *self.state[p].values()), strict=True):
                    rows.append(t)
            amp_C.multi_tensor_lamb_mp(
                2048 * 32,
                self._dummy_overflow_buf,
                lists,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                int(group["bias_correction"]),
                group["weight_decay"],
                int(group["grad_averaging"]),
                self.adam_w_mode,
                norm,
                self.defaults["max_grad_norm"] * scale,
                self.use_nvlamb,
                found_inf,
                scale.double().reciprocal().float(),
            )
