"""A session reads its text and measures its moments once."""

from __future__ import annotations

from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.config import CalibrationSettings
from lrcompress.layers.ffn_layouts import select
from tests.tiny import byte_tokenizer, tiny_model


def test_moments_are_measured_once_with_gradients_and_once_without() -> None:
    model = tiny_model()
    settings = CalibrationSettings(num_samples=9, gradient_samples=2, seq_len=16)
    session = CalibrationSession(model, byte_tokenizer(), select(model), settings)
    assert session.fingerprint is None
    plain = session.moments(False)
    assert session.moments(False) is plain
    with_gradients = session.moments(True)
    assert session.moments(True) is with_gradients
    assert session.moments(False) is plain
    assert (plain.tokens, plain.gradient_tokens) == (144, 0)
    assert with_gradients.tokens == 128  # one sample is held out
    assert with_gradients.gradient_tokens == 32
    assert session.fingerprint is not None
