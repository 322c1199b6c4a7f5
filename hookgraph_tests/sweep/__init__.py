"""The sweep: every architecture of the installed transformers built tiny, bound, and proven.

    python -m hookgraph_tests.sweep --table causal --only llama,gpt2     # look at a few
    python -m hookgraph_tests.sweep --write                              # all, and write the page
    python -m hookgraph_tests.sweep --effects --table causal             # compare effects with brute force

`docs/reference/architectures.md` is what it writes for people, `architectures.json` beside it for the test
that repeats a part of the sweep.
"""
