"""Agreement between ranks: keys in a store of our own, a deadline on every wait, the same error everywhere."""
