"""A plain DINO training script, as users have it. README.md shows the lines to change."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from mokd_fast.interop.dino import DINOLoss

K, D, V, B = 512, 16, 4, 8


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, D))
        self.last_layer = weight_norm(nn.Linear(D, K, bias=False))
        norms = self.last_layer.parametrizations.weight.original0
        norms.requires_grad_(False).fill_(1)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return self.last_layer(x)


torch.manual_seed(0)
student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.GELU(), Head())
teacher = copy.deepcopy(student)
dino_loss = DINOLoss(K, V, 0.04, 0.04, 0, 1)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
generator, momentum, losses = torch.Generator().manual_seed(0), 0.996, []
for _ in range(20):
    crops = torch.randn(V * B, 3, 8, 8, generator=generator)
    with torch.no_grad():
        t = teacher(crops[: 2 * B])
    s = student(crops)
    loss = dino_loss(s, t, epoch=0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for q, p in zip(teacher.parameters(), student.parameters(), strict=True):
            q.lerp_(p, 1 - momentum)
    losses.append(loss.item())
