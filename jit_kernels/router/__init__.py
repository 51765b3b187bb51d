"""The router: which experts a token goes to, and with what weights, from its hidden state."""
