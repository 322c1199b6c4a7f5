"""Prove a binding on values and edited values, where that is cheap."""
