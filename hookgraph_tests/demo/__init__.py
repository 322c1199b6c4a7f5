"""Tests of hookgraph.demo."""
