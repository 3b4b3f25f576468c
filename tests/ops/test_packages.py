"""What the kernels can use of other packages: absent, broken or there; tensors in place and out of place."""

import sys
import warnings

import pytest
import torch

from archscale_megatron.ops.packages import aligned, optional


def test_a_package_that_is_not_there_is_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optional("no_such_package_of_kernels") is None
        assert optional("json") is sys.modules["json"]


def test_a_package_that_does_not_load_is_heard_of_once(monkeypatch, tmp_path):
    (tmp_path / "broken_kernels.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "half_a_package.py").write_text("import no_such_package_of_kernels")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in [("broken_kernels", "undefined symbol: _ZN3c10"), ("half_a_package", "No module named")]:
        with pytest.warns(UserWarning, match=f"{name} is installed but does not load, .*{reason}") as heard:
            assert optional(name) is None and optional(name) is None
        assert len(heard) == 1


def test_only_rows_out_of_place_are_copied():
    x = torch.randn(5, 3, 48)
    for cut in (x, x[..., 8:24], x[1:, :2], x.transpose(0, 1), x[:, :1].expand(5, 4, 48)):
        assert aligned(cut) is cut
    for cut in (x[..., 4:20], x[..., ::2], torch.randn(5, 3, 44)[..., :40], x.transpose(1, 2)):
        copy = aligned(cut)
        assert copy.is_contiguous() and copy.equal(cut) and copy.data_ptr() != cut.data_ptr()
