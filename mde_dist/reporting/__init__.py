"""Run directories -> one HTML page: history.py reads them, pages.py puts the page together from the parts beside it."""
