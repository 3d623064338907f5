"""The checks of the resume validator: pure functions from facts to findings, without torch."""
