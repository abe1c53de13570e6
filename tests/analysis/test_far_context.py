"""What lies beyond a window, against attention written out with loops."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiaroscuro.analysis.far_context import far_part


@given(
    time=st.integers(1, 12),
    window=st.integers(1, 6),
    sinks=st.integers(0, 3),
    groups=st.integers(1, 2),
    softcap=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_far_is_what_the_window_and_the_sinks_leave_out(
    time: int, window: int, sinks: int, groups: int, softcap: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, key_heads, width = 2 * groups, 2, 3
    query = torch.randn(heads, time, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, key_heads, time, width, generator=generator, dtype=torch.float64)
    found = far_part(query, key, value, window, sinks, softcap)
    for i in range(time):
        whole, close, mass, steps = [], [], 0.0, 0.0
        for h in range(heads):
            k, v = key[h // groups], value[h // groups]
            plain = [float(query[h, i] @ k[j]) / math.sqrt(width) for j in range(i + 1)]
            scores = [math.exp(x if softcap is None else softcap * math.tanh(x / softcap)) for x in plain]
            near = [j for j in range(i + 1) if i - j < window or j < sinks]
            whole.append(sum(scores[j] * v[j] for j in range(i + 1)) / sum(scores))
            close.append(sum(scores[j] * v[j] for j in near) / sum(scores[j] for j in near))
            for j in set(range(i + 1)) - set(near):
                mass += scores[j] / sum(scores) / heads
                steps += scores[j] / sum(scores) / heads * (i - j)
        size = float(torch.cat(whole).norm())
        moved = float((torch.cat(whole) - torch.cat(close)).norm()) / size
        torch.testing.assert_close(float(found.moved[i]), moved, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(float(found.mass[i]), mass, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(float(found.distance[i]), steps / mass if mass else 0.0, rtol=1e-9, atol=1e-12)
