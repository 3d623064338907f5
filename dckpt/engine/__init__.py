"""Schedules the pipelines: plan, stage, write and commit on the way out; find, fit, read and apply on the way back."""
