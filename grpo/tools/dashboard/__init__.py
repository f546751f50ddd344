"""Dashboard: run directories in a browser."""
