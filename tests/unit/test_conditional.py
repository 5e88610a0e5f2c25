"""If-None-Match as in RFC 9110."""

from __future__ import annotations

import pytest
from fastapi import Request

from latentline.api.conditional import unchanged


def asks(*headers: str) -> Request:
    return Request({"type": "http", "headers": [(b"if-none-match", one.encode("latin-1")) for one in headers]})


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ((), False),
        (("",), False),
        (('"a"',), True),
        (('  "a"\t',), True),
        (('W/"a"',), True),
        (('"b"',), False),
        (('"b", "a"',), True),
        (('"b","a","c"',), True),
        (('"b" , W/"a"',), True),
        ((', ,"a",',), True),
        ((",",), False),
        (('"b"', '"a"'), True),
        (('"b"', 'W/"c"'), False),
        (("*",), True),
        ((" * ",), True),
        # A tag may hold what would end it elsewhere.
        (('"b,"', '"a"'), True),
        (('"x,"a",y"',), False),
        (('"a, b"',), False),
        (('"W/"', '"a"'), True),
        (('"\xe9"', '"a"'), True),
        (('""',), False),
        # What is not as the RFC has it asks for nothing.
        (("a",), False),
        (('"a',), False),
        (('a"',), False),
        (('w/"a"',), False),
        (('W/ "a"',), False),
        (("W/a",), False),
        (('"a" "b"',), False),
        (('"a", b',), False),
        (('*, "a"',), False),
        (('"a", *',), False),
        (("'a'",), False),
        (('"a b"', '"a"'), False),
        (('"a"\x7f',), False),
    ],
)
def test_if_none_match(headers: tuple[str, ...], known: bool) -> None:
    assert unchanged(asks(*headers), '"a"') is known


def test_a_long_header_is_read_in_one_pass() -> None:
    assert unchanged(asks('"b",' * 16_000 + '"a"'), '"a"')
    assert not unchanged(asks(" \t" * 30_000 + "x"), '"a"')
    assert not unchanged(asks('"' * 64_000), '"a"')
