"""Names, order and defaults of the arguments: what a changed import line must not change."""

import inspect

import pytest

from mokd_fast.interop import dino, dinov2, dinov3, ibot, mokd, solo

TABLE = "warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs, student_temp=0.1"
LAZY = {"update_center": "teacher_output", "reduce_center_update": "teacher_output"}
PATCH = dict.fromkeys(LAZY, "teacher_patch_tokens")
SINKHORN = "teacher_output, teacher_temp, n_iterations=3"

# lightly's are compared with the installed lightly, in test_lightly.py.
SIGNATURES = {
    dino.DINOLoss: {
        "__init__": f"out_dim, ncrops, {TABLE}, center_momentum=0.9",
        "forward": "student_output, teacher_output, epoch",
        "update_center": "teacher_output",
    },
    mokd.CTSearchLoss: {"__init__": TABLE, "forward": "student, teacher, epoch"},
    solo.DINOLoss: {
        "__init__": "num_prototypes, warmup_teacher_temp, teacher_temp, "
        "warmup_teacher_temp_epochs, num_epochs, student_temp=0.1, num_large_crops=2, "
        "center_momentum=0.9",
        "forward": "student_output, teacher_output",
        "update_center": "teacher_output",
    },
    ibot.iBOTLoss: {
        "__init__": "out_dim, patch_out_dim, ngcrops, nlcrops, warmup_teacher_temp, teacher_temp, "
        "warmup_teacher_temp2, teacher_temp2, warmup_teacher_temp_epochs, nepochs, "
        "student_temp=0.1, center_momentum=0.9, center_momentum2=0.9, lambda1=1.0, lambda2=1.0, "
        "mim_start_epoch=0",
        "forward": "student_output, teacher_output, student_local_cls, student_mask, epoch",
        "update_center": "teacher_cls, teacher_patch",
    },
    dinov2.DINOLoss: {
        "__init__": "out_dim, student_temp=0.1, center_momentum=0.9",
        "forward": "student_output_list, teacher_out_softmaxed_centered_list",
        "softmax_center_teacher": "teacher_output, teacher_temp",
        "sinkhorn_knopp_teacher": SINKHORN,
        "apply_center_update": "",
        **LAZY,
    },
    dinov2.iBOTPatchLoss: {
        "__init__": "patch_out_dim, student_temp=0.1, center_momentum=0.9",
        "forward": "student_patch_tokens, teacher_patch_tokens, student_masks_flat",
        "forward_masked": "student_patch_tokens_masked, teacher_patch_tokens_masked, "
        "student_masks_flat, n_masked_patches=None, masks_weight=None",
        "softmax_center_teacher": "teacher_patch_tokens, teacher_temp",
        "sinkhorn_knopp_teacher": "teacher_output, teacher_temp, n_masked_patches_tensor, "
        "n_iterations=3",
        "apply_center_update": "",
        **PATCH,
    },
    dinov3.DINOLoss: {
        "__init__": "out_dim, student_temp=0.1, center_momentum=0.9",
        "init_weights": "",
        "forward": "student_logits, teacher_probs, ignore_diagonal=False",
        "softmax_center_teacher": "teacher_output, teacher_temp, update_centers=True",
        "sinkhorn_knopp_teacher": SINKHORN,
        "apply_center_update": "",
        **LAZY,
    },
}


@pytest.mark.parametrize(
    ("cls", "method", "expected"),
    [(cls, name, text) for cls, table in SIGNATURES.items() for name, text in table.items()],
)
def test_the_arguments_are_the_peers(cls, method, expected):
    found = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    empty = inspect.Parameter.empty
    assert expected == ", ".join(
        p.name if p.default is empty else f"{p.name}={p.default}" for p in found
    )
