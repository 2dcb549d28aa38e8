"""When a plug-in leaves an engine alone: by the engine's version, or by its environment variable."""

from __future__ import annotations

import pytest

from zemoe.integrations.engines.versions import switch_of, why_not


@pytest.mark.parametrize(
    ("engine", "versions"),
    [
        ("vLLM", ["0.26.0", "0.32.0", "0.33.0", "0.33.1.dev3+cpu"]),
        ("SGLang", ["0.5.11", "0.5.15.post1", "0.5.23"]),
    ],
)
@pytest.mark.parametrize("value", [None, "", "1"])
def test_versions_that_were_tried_are_taken_unless_switched_off(engine, versions, value):
    assert all(why_not(engine, version, value) is None for version in versions)
    assert why_not(engine, versions[0], "0") == f"{switch_of(engine)}=0"


@pytest.mark.parametrize(
    ("engine", "version", "value", "reason"),
    [
        ("vLLM", "0.32.0", "0", "ZEMOE_VLLM=0"),
        ("vLLM", "0.32.0", "off", "ZEMOE_VLLM must be 0 or 1, got 'off'"),
        ("vLLM", "0.25.1", None, "zemoe knows vLLM 0.26 to 0.33, and this is 0.25.1"),
        ("vLLM", "0.34.0", None, "zemoe knows vLLM 0.26 to 0.33, and this is 0.34.0"),
        ("vLLM", "1.0", None, "zemoe knows vLLM 0.26 to 0.33, and this is 1.0"),
        ("vLLM", "dev", None, "zemoe knows vLLM 0.26 to 0.33, and this is dev"),
        ("SGLang", "0.5.23", "0", "ZEMOE_SGLANG=0"),
        ("SGLang", "0.5.23", "no", "ZEMOE_SGLANG must be 0 or 1, got 'no'"),
        *(
            ("SGLang", version, None, f"zemoe knows SGLang 0.5.11 to 0.5.23, and this is {version}")
            for version in ("0.5.10", "0.6.0", "0.5.24", "unknown")
        ),
    ],
)
def test_the_reason_why_a_plug_in_stands_back(engine, version, value, reason):
    assert why_not(engine, version, value) == reason
