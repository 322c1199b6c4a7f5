from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from hookgraph.algorithms.effects.exact import exact_effects
from hookgraph.algorithms.metrics import logit_diff
from hookgraph.binding import bind
from hookgraph.binding.running.inputs import Accepted
from hookgraph.binding.running.recalling import Lent
from hookgraph.errors import InputError, LoadError, LocationError, UnknownLocationError
from hookgraph.graph.hook_graph import HookGraph
from hookgraph.graph.run import Run
from hookgraph.hooks.editing import SetTo
from hookgraph.ontology.transformer import ATTN_OUT, ATTN_Z, LOGITS, MLP_OUT, RESID_POST, RESID_PRE
from hookgraph_tests.binding.made_up import LoomConfig, LoomForCausalLM
from hookgraph_tests.families import FAMILIES, LAYERS, PADDING, VOCABULARY, bound, model_of, tokens
from hookgraph_tests.tiny import build
from hookgraph_tests.unchecked import unchecked

IDS = tokens()
WORDS = ("the", "cat", "sat", "on", "a", "mat")


def tokenizer(side: str = "left") -> PreTrainedTokenizerFast:
    """Words to ids 3, 4, ...; made here, since nothing may be downloaded."""
    vocabulary = {"<pad>": PADDING, "<unk>": 1, **{word: 3 + i for i, word in enumerate(WORDS)}}
    base = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", unk_token="<unk>", padding_side=side
    )


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# --- what can be run --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_mappings_give_the_models_own_logits(family: str):
    graph = bound(family)
    with torch.no_grad():
        expected = model_of(graph)(input_ids=IDS, use_cache=False).logits
    mask = torch.ones_like(IDS)
    for inputs in (IDS, {"input_ids": IDS}, BatchEncoding({"input_ids": IDS, "attention_mask": mask})):
        assert torch.equal(graph.run(inputs).logits, expected)
    assert torch.equal(graph.run(IDS.int()).logits, expected)


def test_embeddings_can_be_run_instead_of_ids():
    graph = bound("llama")
    embedded = model_of(graph).get_input_embeddings()(IDS).detach()
    close(graph.run({"inputs_embeds": embedded}).logits, graph.run(IDS).logits)


def test_the_callers_mapping_is_left_alone():
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    bound("llama").run(inputs)
    assert list(inputs) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_run_where_there_is_a_tokenizer(side: str):
    graph = bind(model_of(bound("llama")), tokenizer(side), check=False)
    alone = graph.run("the cat sat").logits
    assert torch.equal(alone, graph.run(torch.tensor([[3, 4, 5]])).logits)
    longer = graph.run("a mat on the cat").logits
    both = graph.run(["the cat sat", "a mat on the cat"]).logits
    close(both[1], longer[0])
    close(both[0, 2:] if side == "left" else both[0, :3], alone[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_leaves_every_real_position_as_without(family: str):
    graph = bound(family)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 6, 5)]
    padded = torch.full((3, 6), PADDING)
    mask = torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 6 - len(row) :] = row
        mask[i, 6 - len(row) :] = 1
    asked = [RESID_POST[1], MLP_OUT[2], ATTN_Z[2], LOGITS]
    run = graph.run({"input_ids": padded, "attention_mask": mask}, save=asked)
    for i, row in enumerate(rows):
        alone = graph.run(row[None], save=asked)
        for place in asked:
            close(run[place][i, 6 - len(row) :], alone[place][0])


def test_a_masked_token_between_others_keeps_its_position_whatever_the_other_rows():
    graph = bound("llama", torch.float64)
    rows: list[Tensor] = []
    for first in (1, 0):
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, 2] = 0
        mask[1, 0] = first
        rows.append(graph.run({"input_ids": IDS, "attention_mask": mask}).logits[0])
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-9, atol=1e-9)


def test_position_ids_that_are_given_are_kept():
    graph = bound("gpt2")
    mask = torch.ones_like(IDS)
    mask[:, 0] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    shifted = {**inputs, "position_ids": torch.arange(2, 2 + IDS.shape[1])[None].expand_as(IDS)}
    own = {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    assert torch.equal(graph.run(inputs).logits, graph.run(own).logits)
    assert not torch.allclose(graph.run(inputs).logits, graph.run(shifted).logits, atol=1e-3)


@pytest.mark.parametrize(
    "inputs", [IDS, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], ids=["ids", "mapping"]
)
def test_copies_repeat_the_whole_batch(inputs: Any):
    prepared = bound("gpt2").binding.prepare(inputs, copies=3)
    ids = prepared["input_ids"]
    assert isinstance(ids, Tensor)
    assert torch.equal(ids, torch.cat([IDS, IDS, IDS]))
    assert all(not isinstance(v, Tensor) or v.shape[0] == 6 for v in prepared.values())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_copies_repeat_positions_in_time_and_space_along_the_batch(count: int):
    positions = torch.arange(3 * count * 6).view(3, count, 6)
    inputs = {"input_ids": tokens(count, 6), "position_ids": positions}
    prepared = bound("llama").binding.prepare(inputs, copies=2)
    assert torch.equal(prepared["position_ids"], torch.cat([positions, positions], dim=1))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert bound("llama").remember(inputs, 3) is None  # it is not known how these are divided


def test_positions_given_once_are_those_of_every_example():
    graph = bound("llama", torch.float64)
    pair = [{"input_ids": x, "position_ids": torch.arange(6)[None]} for x in (IDS, tokens(2, 6, seed=1))]
    nodes = [ATTN_Z[1].at(head=h, pos=-1) for h in range(2)]
    found = exact_effects(graph, pair[0], pair[1], logit_diff(3, 5), nodes)
    expected = exact_effects(graph, IDS, pair[1]["input_ids"], logit_diff(3, 5), nodes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- what cannot ------------------------------------------------------------------------------

HERE = RESID_POST[1]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


WRONG_INPUTS: dict[str, tuple[Any, str]] = {
    "text": ("the cat", r"text needs a tokenizer: bind\(model, tokenizer=...\), or pass token ids"),
    "texts": (["the cat", "a mat"], "text needs a tokenizer"),
    "float ids": (torch.rand(2, 3), "token ids are integers, not float32"),
    "bool ids": (torch.ones(2, 3, dtype=torch.bool), "token ids are integers, not bool"),
    "1-D ids": (torch.tensor([3, 4, 5]), r"token ids have shape \(batch, pos\), not \(3,\)"),
    "3-D ids": (torch.ones(1, 2, 3, dtype=torch.long), r"shape \(batch, pos\), not \(1, 2, 3\)"),
    "no examples": (torch.zeros(0, 3, dtype=torch.long), r"there are no tokens: .* shape \(0, 3\)"),
    "empty": ({}, "there is nothing to run: the inputs are empty; give token ids"),
    "no tokens": (torch.zeros(2, 0, dtype=torch.long), r"there are no tokens: .* shape \(2, 0\)"),
    "beyond": (torch.tensor([[3, VOCABULARY]]), f"range from 3 to {VOCABULARY}, but .* {VOCABULARY} tokens"),
    "negative": (torch.tensor([[-1, 3]]), f"range from -1 to 3, but the vocabulary has {VOCABULARY} tokens"),
    "in a mapping": ({"input_ids": torch.rand(2, 3)}, "token ids are integers, not float32"),
    "number": (3.5, "cannot run float: pass token ids"),
    "list of ids": ([[3, 4]], "cannot run list: pass token ids"),
    "nothing": (None, "cannot run NoneType: pass token ids"),
}


@pytest.fixture(params=FAMILIES)
def unharmed(request: pytest.FixtureRequest) -> Any:
    """A graph; afterwards its model computes what it computed before."""
    graph = bound(request.param)
    before = graph.run(IDS).logits
    yield graph
    assert torch.equal(graph.run(IDS).logits, before)


@pytest.mark.parametrize(("inputs", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_inputs_that_cannot_be_run_say_why_and_do_no_harm(unharmed: HookGraph, inputs: Any, message: str):
    with unchecked(), pytest.raises(InputError, match=message):
        unharmed.run(inputs, save=[HERE, HERE.grad], metric=metric)


def load_missing(graph: HookGraph) -> object:
    return Run.load("/nonexistent/run.safetensors")


WRONG_PLACES: dict[str, tuple[Callable[[HookGraph], object], type[Exception], str]] = {
    "layer": (
        lambda graph: graph.run(IDS, save=[RESID_POST[LAYERS]]),
        UnknownLocationError,
        rf"no location resid.post\[{LAYERS}\]: its decoder has {LAYERS} layers, 0 to {LAYERS - 1}",
    ),
    "index in a save": (
        lambda graph: graph.run(IDS, save=[ATTN_Z[1].at(head=4)]),
        LocationError,
        r"attn.z\[1\]@head=4: head=4 is out of range, head has size 4",
    ),
    "index in a hook": (
        lambda graph: graph.hook(RESID_PRE[1].at(pos=[0, 9]), torch.neg).run(IDS),
        LocationError,
        "pos=0,9 is out of range, pos has size 6",
    ),
    "index of a gradient": (
        lambda graph: graph.run(IDS, save=[MLP_OUT[1].grad.at(d_model=99)], metric=metric),
        LocationError,
        "d_model=99 is out of range, d_model has size 32",
    ),
    "file": (load_missing, LoadError, "expected a run saved by hookgraph, found: No such file"),
}


@pytest.mark.parametrize(("ask", "kind", "message"), WRONG_PLACES.values(), ids=WRONG_PLACES)
def test_what_cannot_be_asked_of_a_model_says_why_and_does_no_harm(
    unharmed: HookGraph, ask: Callable[[HookGraph], object], kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        ask(unharmed)


def test_a_part_of_what_was_saved_whole_counts_the_tokens_of_each_row():
    graph, mask = bound("gpt2"), torch.ones_like(IDS)
    mask[0, :2] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    whole, part = RESID_POST[1], RESID_POST[1].at(pos=[0, 3])
    expected = graph.run(inputs, save=[part])[part]
    assert torch.equal(graph.run(inputs, save=[whole])[part], expected)


@pytest.mark.parametrize("name", ["input_idz", "inputs_ids", "atention_mask", "position_id"])
def test_an_argument_that_is_nearly_one_of_the_models_is_refused(name: str):
    with pytest.raises(InputError, match=f"the model takes no argument '{name}': did you mean "):
        bound("gpt2").run({"input_ids": IDS, name: torch.ones_like(IDS)})


def test_arguments_that_a_model_hands_on_are_let_through():
    graph = bound("llama")
    given = {"input_ids": IDS, "output_hidden_states": True}
    assert torch.equal(graph.run(given).logits, graph.run(IDS).logits)


def test_a_name_with_a_word_more_or_less_is_no_slip():
    Accepted(frozenset({"mm_token_type_ids", "pixel_values"}), more=True).check(["token_type_ids"])


def test_a_model_that_hands_nothing_on_takes_what_it_names_only():
    known = Accepted(frozenset({"input_ids", "use_cache"}), more=False)
    known.check(["use_cache"])
    with pytest.raises(InputError, match="takes no argument 'pixels': known: input_ids, use_cache"):
        known.check(["input_ids", "pixels"])


# --- a cache among the inputs -----------------------------------------------------------------


def prefixed(cache: Cache | None = None) -> tuple[HookGraph, dict[str, Any]]:
    """Tokens behind a prefix that a cache holds."""
    graph = bound("llama", torch.float64)
    cache = DynamicCache(config=model_of(graph).config) if cache is None else cache
    with torch.no_grad():
        model_of(graph)(input_ids=tokens(seed=3), past_key_values=cache, use_cache=True)
    return graph, {"input_ids": IDS, "past_key_values": cache}


def test_a_cache_is_read_and_not_written_to():
    graph, inputs = prefixed()
    whole = graph.run(torch.cat([tokens(seed=3), IDS], 1), save=[RESID_POST[1]])
    for _ in range(2):
        found = graph.run(inputs, save=[RESID_POST[1]])
        torch.testing.assert_close(found[RESID_POST[1]], whole[RESID_POST[1]][:, 6:], rtol=1e-5, atol=1e-6)
    assert inputs["past_key_values"].get_seq_length() == 6


def test_a_cache_is_read_by_models_that_read_none_unless_they_may_add_to_it():
    graph, inputs = prefixed()
    assert graph.binding.prepare(inputs)["use_cache"] is True
    assert graph.binding.prepare({**inputs, "use_cache": False})["use_cache"] is False
    assert graph.binding.prepare(IDS)["use_cache"] is False


def test_whisper_reads_the_cache_that_it_is_given():
    model = build("causal", "whisper").double()
    graph, ids = bind(model), torch.arange(10, 24).view(2, 7)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    rest = {"input_ids": ids[:, 3:], "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    expected = graph.run(ids).logits[:, 3:]
    torch.testing.assert_close(graph.run(rest).logits, expected, rtol=1e-6, atol=1e-9)


def check_cached(graph: HookGraph, inputs: dict[str, Any], other: dict[str, Any]) -> None:
    """Exact effects behind a cache, divided or not, are those of one pass for each node."""
    metric = logit_diff(3, 5)
    nodes = [graph.every(ATTN_OUT)[0].at(pos=-1), MLP_OUT[1]]
    before, corrupt = graph.run(inputs, metric=metric).metric, graph.run(other, save=nodes)
    moved = [graph.hook(x, SetTo(corrupt[x])).run(inputs, metric=metric).metric for x in nodes]
    assert before is not None
    expected = torch.stack([x - before for x in moved if x is not None])
    assert float(expected.abs().min()) > 1e-6
    for size in (256, 2, 1):
        found = exact_effects(graph, inputs, other, metric, nodes, batch_size=size)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_algorithms_begin_each_pass_with_the_cache_that_was_given():
    graph, inputs = prefixed()
    check_cached(graph, inputs, {**inputs, "input_ids": tokens(seed=1)})
    assert inputs["past_key_values"].get_seq_length() == 6


def test_a_cache_of_another_kind_is_copied_repeated_and_divided():
    graph = bound("llama", torch.float64)
    graph, inputs = prefixed(StaticCache(config=model_of(graph).config, max_cache_len=16))
    assert torch.equal(graph.run(inputs).logits, graph.run(inputs).logits)
    check_cached(graph, inputs, {**inputs, "input_ids": tokens(seed=1)})
    assert inputs["past_key_values"].get_seq_length() == 6


@pytest.mark.parametrize(
    ("table", "name", "past"),
    [
        ("causal", "falcon_h1", 6),
        ("causal", "lfm2", 6),
        ("seq2seq", "t5", 3),
        ("seq2seq", "bart", 3),
    ],
)
def test_caches_of_states_and_of_encoders_are_repeated_and_divided(table: str, name: str, past: int):
    """Models with states go on from a cache by one token at a time."""
    model = build(table, name).double()
    graph, ids = bind(model), torch.arange(10, 24).view(2, 7)
    key, given = "input_ids", {}
    if table == "seq2seq":
        key, given = "decoder_input_ids", {"input_ids": ids + 20}
    with torch.no_grad():
        cache = model(**given, **{key: ids[:, :past]}, use_cache=True).past_key_values
    inputs = {**given, key: ids[:, past:], "past_key_values": cache}
    whole = graph.run({**given, key: ids}).logits[:, past:]
    torch.testing.assert_close(graph.run(inputs).logits, whole, rtol=1e-5, atol=1e-5)
    check_cached(graph, inputs, {**inputs, key: ids[:, past:] + 3})
    assert cache.get_seq_length() == past


def test_a_cache_that_holds_more_than_layers_is_asked_for_an_order_of_its_own():
    cache = MiniMaxCache()
    cache.set_linear_cache(0, torch.tensor([[3.0], [4.0]]))
    assert Lent(cache, torch.tensor([1, 0, 1])).fresh().linear_cache[0].flatten().tolist() == [4.0, 3.0, 4.0]
    assert len(cache.linear_cache[0]) == 2


def test_padding_before_a_cache_moves_the_positions_behind_it():
    graph, inputs = prefixed()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :2] = 0
    found = graph.binding.prepare({**inputs, "attention_mask": mask})["position_ids"]
    assert found.tolist() == [[6, 7, 8, 9, 10, 11], [4, 5, 6, 7, 8, 9]]


def test_generation_goes_on_from_a_cache():
    graph, inputs = prefixed()
    inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    ids = torch.cat([tokens(seed=3), IDS], 1)
    expected = model_of(graph).generate(ids, max_new_tokens=4, do_sample=False)[:, 12:]  # pyright: ignore
    found = graph.generate({**inputs, "input_ids": ids}, max_new_tokens=4, do_sample=False)
    assert torch.equal(found.tokens[:, 12:], expected)
    assert inputs["past_key_values"].get_seq_length() == 6


def test_an_empty_cache_is_as_good_as_none():
    graph = bound("llama", torch.float64)
    inputs = {"input_ids": IDS, "past_key_values": DynamicCache(config=model_of(graph).config)}
    assert torch.equal(graph.run(inputs).logits, graph.run(IDS).logits)
    assert graph.run(graph.binding.prepare(inputs, copies=2)).logits.shape[0] == 2 * len(IDS)


class Labelled(LoomForCausalLM):
    """Labels are a condition, and no loss."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        cloth = self.spool(input_ids)
        cloth = cloth if labels is None else cloth + self.spool(labels)
        for row in self.cloth:
            cloth = row(cloth)
        return CausalLMOutput(logits=self.label(self.hem(cloth)))


def test_labels_that_a_model_of_somebody_elses_reads_are_given_to_it():
    model = Labelled(LoomConfig(echo=False)).eval()
    inputs = {"input_ids": IDS, "labels": IDS.flip(0)}
    found = bind(model, check=False).run(inputs).logits
    assert torch.equal(found, model(**inputs).logits.detach())
