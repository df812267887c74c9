"""Bad input to the drop-in losses is a ValueError in the user's own names."""

import pytest
import torch

from mokd_fast.interop import dino, dinov2, dinov3, ibot, lightly, mokd, solo

V, T, B, K, N = 4, 2, 3, 8, 4  # N = 2 x 2 patches
STUDENT, TEACHER = torch.zeros(V * B, K), torch.zeros(T * B, K)
MASK = torch.ones(B, 2, 2).bool()
BUILDS = {
    "dino": lambda **o: dino.DINOLoss(K, V, 0.04, 0.04, 0, 1, **o),
    "solo": lambda **o: solo.DINOLoss(K, 0.04, 0.04, 0, 1, num_large_crops=V, **o),
    "mokd search": lambda **o: mokd.CTSearchLoss(0.04, 0.04, 0, 1, **o),
    "ibot": lambda **o: ibot.iBOTLoss(K, K, 2, 0, 0.04, 0.04, 0.04, 0.04, 0, 1, **o),
    "lightly": lambda **o: lightly.DINOLoss(K, **o),
    "lightly patch": lambda **o: lightly.IBOTPatchLoss(K, **o),
    "dinov2": lambda **o: dinov2.DINOLoss(K, **o),
    "dinov2 patch": lambda **o: dinov2.iBOTPatchLoss(K, **o),
    "dinov3": lambda **o: dinov3.DINOLoss(K, **o),
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("temperature", [0, -0.1])
def test_the_student_temperature_is_checked_at_construction(name, temperature):
    with pytest.raises(ValueError, match=f"student_temp must be > 0 and finite, got {temperature}"):
        BUILDS[name](student_temp=temperature)


def wrong(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*x.shape[:-1], K + 1)


@pytest.mark.parametrize(
    ("name", "argument", "call"),
    [
        ("dino", "out_dim", lambda loss, s, t: loss(s, t, 0)),
        ("solo", "num_prototypes", lambda loss, s, t: loss(s, t)),
        ("lightly", "output_dim", lambda loss, s, t: loss(t.chunk(T), s.chunk(V))),
        ("lightly patch", "output_dim", lambda loss, s, t: loss(t, s, MASK)),
    ],
)
def test_the_prototypes_are_those_of_the_constructor(name, argument, call):
    loss = BUILDS[name]()
    suffix = "out" if name.startswith("lightly") else "output"
    message = rf"_{suffix} must have {argument} = {K} prototypes .* got shape \[.*{K + 1}\]"
    for who, pair in {
        "student": (wrong(STUDENT), TEACHER),
        "teacher": (STUDENT, wrong(TEACHER)),
    }.items():
        with pytest.raises(ValueError, match=who + message):
            call(loss, *pair)


def ibot_call(**changed):
    patches = torch.zeros(2 * B, N, K)
    views = {"student_output": (STUDENT[: 2 * B], patches), "teacher_output": (TEACHER, patches)}
    rest = {"student_local_cls": None, "student_mask": [MASK, MASK]}
    return BUILDS["ibot"]()(**(views | rest | changed), epoch=0)


@pytest.mark.parametrize("name", ["student_output", "teacher_output"])
def test_ibot_names_the_head_whose_prototypes_do_not_fit(name):
    patches = torch.zeros(2 * B, N, K)
    with pytest.raises(ValueError, match=rf"{name}\[0\] must have out_dim = {K}"):
        ibot_call(**{name: (wrong(TEACHER), patches)})
    with pytest.raises(ValueError, match=rf"{name}\[1\] must have patch_out_dim = {K}"):
        ibot_call(**{name: (TEACHER, wrong(patches))})
    with pytest.raises(ValueError, match=f"student_local_cls must have out_dim = {K}"):
        ibot_call(student_local_cls=wrong(TEACHER))


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (None, "NoneType"),
        (MASK.long(), "torch.int64"),
        (MASK.float(), "torch.float32"),
        (MASK.flatten(1), r"shape \[3, 4\]"),
    ],
)
def test_a_mask_that_selects_rows_is_boolean(mask, got):
    message = rf"must be a boolean mask \[B, H, W\], got .*{got}"
    rows = torch.zeros(MASK.sum(), K)
    with pytest.raises(ValueError, match="^mask " + message):
        BUILDS["lightly patch"]()(rows, rows, mask)


def test_ibot_takes_masks_of_0_and_1_as_the_original():
    loss = ibot_call()["loss"]
    for mask in (MASK.long(), MASK.float()):
        assert torch.equal(ibot_call(student_mask=[mask, mask])["loss"], loss)


def test_ibot_without_masks():
    with pytest.raises(ValueError, match=r"student_mask must list a mask .* got None"):
        ibot_call(student_mask=None)


def test_what_is_right_here_runs():
    assert ibot_call()["loss"].isfinite()
