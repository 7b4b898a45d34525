"""Records as HTML pages that stand alone: no request leaves them, and equal records give equal bytes."""
