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


def test_what_an_encoder_returns_is_not_what_a_model_of_several_parts_comes_to():
    start, encoded = torch.zeros(2, 3), torch.ones(2, 3, 4)
    assert read_output({"start_logits": start, "encoder_last_hidden_state": encoded}) is start
    assert read_output({"encoder_last_hidden_state": encoded}) is encoded
