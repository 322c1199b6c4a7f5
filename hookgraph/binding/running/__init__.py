"""Passes of a bound model: anchors carried out by hooks, inputs, outputs, caches, resumed passes."""
