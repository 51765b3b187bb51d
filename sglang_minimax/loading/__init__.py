"""From checkpoint tensors to parameters: the grammar of names, and a ledger that leaves no gap."""
