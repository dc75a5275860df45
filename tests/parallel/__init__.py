"""Serving with several processes: tensor parallel, and one copy of the model each."""
