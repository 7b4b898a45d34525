"""The pool: found, fetched, checked, chosen, compared."""
