"""From a trace to anchors: which location is reached where, and why others are absent."""
