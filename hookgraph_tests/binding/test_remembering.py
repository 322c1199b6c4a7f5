"""What a model remembers of the first positions stays as it is, whatever passes go on from it."""

import torch

from hookgraph.binding.remembering import Remembered
from hookgraph_tests.families import bound, tokens


def test_a_cache_keeps_nothing_of_the_pass_that_uses_it():
    ids = tokens()
    rest = bound("gpt2").remember(ids, 3)
    assert rest is not None
    remembered = rest["past_key_values"]
    assert isinstance(remembered, Remembered)
    cache = remembered.repeated(2).fresh()
    before = cache.layers[0].keys
    assert before is not None
    new = torch.ones_like(before[:, :, :1])
    keys, values = cache.update(new, 2 * new, 0)
    assert keys.shape[:3] == (2 * len(ids), before.shape[1], 4)
    assert torch.equal(keys[:, :, :3], before)
    assert torch.equal(keys[:, :, 3:], new)
    assert torch.equal(values[:, :, 3:], 2 * new)
    assert cache.get_seq_length() == remembered.get_seq_length() == 3
    assert cache.layers[0].keys is before
