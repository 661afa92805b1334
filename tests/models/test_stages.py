"""Stages as data and the rule on depth."""

import pytest

from pcenet.models import Stage, make_stages


def test_stages_are_put_together():
    assert make_stages((1, 2, 4), (1, 2, 3), (8, 16, 32), (16, None, 2)) == [
        Stage(1, 1, 8, 16),
        Stage(2, 2, 16, None),
        Stage(4, 3, 32, 2),
    ]


@pytest.mark.parametrize(
    "patch_sizes",
    [
        (16, 4, 2),  # covers 16, 8, 8 px
        (8, 4, 2),  # covers 8, 8, 8 px: may stay, must not grow
        (None, 4, 2),
        (16, None, 4),  # covers 16, -, 16 px
        (None, None, None),
    ],
)
def test_allowed(patch_sizes):
    assert [s.patch_size for s in make_stages((1, 2, 4), (1, 1, 1), (8, 8, 8), patch_sizes)] == list(patch_sizes)


@pytest.mark.parametrize(
    ("patch_sizes", "message"),
    [
        ((4, 4, 2), "4 follows 4"),
        ((8, None, 8), "8 follows 8"),
        ((2, 4, 1), "4 follows 2"),
        ((6, 4, 2), r"8 px \(patch 4, stride 2\) follow 6 px; take a patch of 3 at most"),
        ((16, None, 5), r"20 px \(patch 5, stride 4\) follow 16 px; take a patch of 4 at most"),
        ((0, 4, 2), "patch_size of stage 0 is 0"),
    ],
)
def test_rule_on_depth(patch_sizes, message):
    with pytest.raises(ValueError, match=message):
        make_stages((1, 2, 4), (1, 1, 1), (8, 8, 8), patch_sizes)


@pytest.mark.parametrize(
    ("strides", "depths", "widths", "message"),
    [
        ((1, 2), (1, 1, 1), (8, 8, 8), "one entry per stage"),
        ((3, 6, 12), (1, 1, 1), (8, 8, 8), r"strides\[0\]=3 must be a power of two"),
        ((2, 4, 6), (1, 1, 1), (8, 8, 8), "6 is not a multiple of 4"),
        ((1, 2, 4), (1, 0, 1), (8, 8, 8), "depth of stage 1 is 0"),
        ((1, 2, 4), (1, 1, 1), (8, 8, -8), "width of stage 2 is -8"),
        ((1, 2, 4), (1, 1.5, 1), (8, 8, 8), "depth of stage 1 is 1.5; it must be a whole number"),
        ((1, 2.0, 4), (1, 1, 1), (8, 8, 8), "stride of stage 1 is 2.0"),
        ((1, 2, 4), (1, 1, 1), (None, 8, 8), "width of stage 0 is None"),
        ((1, 2, 4), (1, 1, 1), ("a", 8, 8), "width of stage 0 is 'a'"),
    ],
)
def test_other_rules(strides, depths, widths, message):
    with pytest.raises(ValueError, match=message):
        make_stages(strides, depths, widths, (None, None, None))
