"""Data: files and hub datasets -> rows -> prompts."""
