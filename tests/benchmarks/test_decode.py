"""The benchmark of decoding, on a small decoder."""

import dataclasses

import pytest

from benchmarks import decode


@pytest.mark.slow
def test_its_tables(monkeypatch, capsys):
    small = dataclasses.replace(
        decode.DECODER, n_layers=1, d_model=28, n_heads=2, n_kv_heads=1, head_dim=14, d_ff=32
    )
    monkeypatch.setattr(decode, "DECODER", small)
    monkeypatch.setattr(decode, "DECODE_ROWS", (2,))
    mine = decode.ours(1, None)
    assert [(name, sorted(by_rows)) for name, by_rows in mine.items()] == [
        (name, ["2", "2, first"]) for name in ("base", "molora")
    ]
    seconds = {"8": 6.5, "8, first": 0.2}
    assert decode.a_token(seconds, 8) == pytest.approx(0.1)
    decode.report(mine, {"molora, tuned": {"seconds": {"2": 1.0}}})
    printed = capsys.readouterr().out
    assert "molora, tuned, 2 rows" in printed and "128.0" in printed
