"""Sizes of memory, as people write and read them."""

from __future__ import annotations

import pytest

from graftwork.config.sizes import format_size, parse_size
from graftwork.errors import GraftworkError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24 GiB", 24 << 30),
        ("24GB", 24 << 30),
        ("1.5g", 3 << 29),
        ("512 MiB", 512 << 20),
        ("1024", 1024),
        ("8 kib", 8192),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1 GiB", "0 GiB", "24 GiB more", "24 QiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(GraftworkError) as caught:
        parse_size(text)
    assert str(caught.value) == f"'{text}' is not a memory size; write one such as '24 GiB'"


def test_sizes_are_shown_in_the_unit_that_fits() -> None:
    assert [format_size(size) for size in (3, 3277, 512 << 20, 1000 << 20, 12 << 30, 200 << 30)] == [
        "3 bytes",
        "3.2 KiB",
        "512 MiB",
        "1.0 GiB",
        "12.0 GiB",
        "200 GiB",
    ]
