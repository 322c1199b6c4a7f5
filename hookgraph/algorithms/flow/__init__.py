"""`contributions` and what it is made of: how information flows from token to token through the layers."""
