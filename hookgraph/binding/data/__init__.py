"""What a binding is, as data: anchors, findings, family records, how a value lies in a tensor."""
