"""Rows into packed, globally defined batches. Import from the modules: reading rows needs no torch, encoding does."""
