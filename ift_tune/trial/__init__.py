"""One trial of the outer search: its length, its rows, its checkpoint, its end."""
