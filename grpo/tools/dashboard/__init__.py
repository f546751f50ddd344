"""Dashboard: run directories -> tables (readers.py) -> a page in the browser (app.py). It reads files only."""
