"""What hookgraph costs, against the same work written plainly. See README.md."""
