"""What a pass is measured by."""

import torch

from hookgraph.binding.running.outputs import read_output


def test_logits_come_before_states_and_of_several_parts_the_last_state_counts():
    first, last, logits = torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.full((2, 3, 5), 2.0)
    parts = {"encoder_last_hidden_state": first, "decoder_last_hidden_state": last, "masks": logits}
    assert read_output(parts) is last
    assert read_output({**parts, "last_hidden_state": first}) is first
    assert read_output({**parts, "logits": logits}) is logits
    assert read_output((first, last)) is first
